//! The command line interface: real processes, real sockets, exit codes.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Process, RedisServer,
    command::{Finished, Running, finish_blocking, weir_command},
    eventually_blocking,
    process::{exit_status, send_signal},
    proxy::TcpProxy,
};

/// Runs a client command to its end.
fn run(url: &str, args: &[&str]) -> Finished {
    finish_blocking(url, args, "")
}

#[test]
fn publish_read_and_channel_commands() {
    let node = Process::start(&[]);
    let url = &*node.url();
    let placed =
        run(url, &["publish", "orders", r#"{"id":12345678901234567890.10}"#, "--type", "created", "--from", "shop"]);
    let placed = placed.ok();
    assert_eq!((&placed[0]["channel"], &placed[0]["offset"]), (&json!("orders"), &json!(1)));
    run(url, &["publish", "orders", "just text"]).ok();
    run(url, &["publish", "orders"]).ok();
    assert_eq!(finish_blocking(url, &["publish", "orders", "-"], "{\n \"whole\": true\n}\n").ok()[0]["offset"], 4);
    let lines = finish_blocking(url, &["publish", "orders", "--lines", "--type", "line"], "1\ntwo\n{\"three\":3}").ok();
    assert_eq!(lines.iter().map(|line| line["offset"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 6, 7]);

    let keyed = ["publish", "orders", "once", "--key", "k1"];
    assert_eq!(run(url, &keyed).ok()[0]["offset"], run(url, &keyed).ok()[0]["offset"]);

    let read = run(url, &["read", "orders"]);
    assert!(read.notes.contains("weir: next: "), "{}", read.notes);
    let read = read.ok();
    assert_eq!(read.len(), 8);
    assert_eq!((&read[0]["type"], &read[0]["from"]), (&json!("created"), &json!("shop")));
    assert_eq!(read[1]["data"], "just text");
    assert!(read[2].get("data").is_none());
    assert_eq!((&read[3]["data"], &read[5]["data"]), (&json!({"whole": true}), &json!("two")));
    assert_eq!(run(url, &["read", "orders", "--type", "line", "--limit", "2", "--all"]).ok().len(), 3);
    assert_eq!(run(url, &["read", "orders", "--last", "2"]).ok()[0]["offset"], 7);
    let after = format!("{}-6", read[0]["epoch"].as_str().unwrap());
    assert_eq!(run(url, &["read", "orders", "--after", &after]).ok().len(), 2);
    assert_eq!(run(url, &["read", "orders", "--after", "now", "--wait", "10ms"]).ok().len(), 0);
    // Numbers keep every digit.
    let output = weir_command().args(["read", "orders", "--url", url, "--limit", "1"]).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("12345678901234567890.10"));

    assert_eq!(run(url, &["channels", "--prefix", "ord"]).ok()[0]["channel"], "orders");
    assert_eq!(run(url, &["channels", "show", "orders"]).ok()[0]["top"], 8);
    run(url, &["channels", "delete", "orders", "--before", &after]).ok();
    assert_eq!(run(url, &["channels", "show", "orders"]).ok()[0]["first"], 6);
    run(url, &["channels", "delete", "orders"]).ok();
    for unknown in [["channels", "show", "order"], ["channels", "delete", "order"], ["channels", "delete", "orders"]] {
        run(url, &unknown).fails(3, "channel order");
    }
    assert_eq!(run(url, &["read", "orders"]).ok().len(), 0);
}

#[test]
fn commands_fail_with_documented_exit_codes() {
    let node = Process::start(&[]);
    let url = &*node.url();
    run(url, &["publish", "$services", "1"]).fails(3, "forbidden");
    run(url, &["read", "orders", "--after", "what?"]).fails(3, "invalid_position");
    run(url, &["tail", "orders", "--after", "what?"]).fails(2, "not a position");
    // An epoch may begin with a hyphen.
    run(url, &["read", "orders", "--after", "-u3Vq0-6"]).ok();
    run(url, &["consumers", "commit", "mailer", "-u3Vq0-6", "--channel", "orders"]).fails(3, "");
    run(url, &["tail", "orders", "--after", "earliest", "--last", "3"]).fails(2, "cannot be used with");
    run(url, &["call", "weir/echo", "{oops"]).fails(2, "not JSON");
    run(url, &["call", "echo"]).fails(2, "SERVICE/METHOD");
    run(url, &["call", "nobody/there"]).fails(4, "no_provider");
    run(url, &["call", "weir/echo", "--timeout", "5"]).fails(2, "5 of what? write 5s or 5ms");
    run(url, &["frobnicate"]).fails(2, "unrecognized");
    run(&url.replace("http:", "https:"), &["services"]).fails(4, "the server does not speak TLS");
    // Text that looks like JSON is published with a note: the shell may have removed quotes.
    let text = run(url, &["publish", "orders", "{id:7}"]);
    assert!(text.notes.contains("not JSON"), "{}", text.notes);
    text.ok();
    run("ftp://x", &["services"]).fails(2, "neither http nor https");
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for command in [&["services"][..], &["tail", "x"], &["provide", "x"]] {
        run(&nowhere, command).fails(4, "cannot connect to http://127.0.0.1:");
    }
}

#[test]
fn responses_of_other_servers_are_told_apart_from_those_of_weir() {
    for (response, code, notes) in [
        ("401 Unauthorized\r\ncontent-length: 9", 3, "HTTP status 401 Unauthorized, which is not from weir"),
        ("502 Bad Gateway\r\ncontent-length: 9", 4, "HTTP status 502 Bad Gateway, which is not from weir"),
        ("302 Found\r\nlocation: /login\r\ncontent-length: 9", 1, "a redirect to /login"),
        ("200 OK\r\ncontent-type: text/html\r\ncontent-length: 9", 1, "is this a weir node?"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut client in listener.incoming().map_while(Result::ok) {
                // The head of the request arrives in one piece.
                let _ = client.read(&mut [0; 4096]);
                let _ =
                    client.write_all(format!("HTTP/1.1 {response}\r\nconnection: close\r\n\r\n<p>no</p>").as_bytes());
            }
        });
        for command in [&["services"][..], &["tail", "orders"], &["provide", "echo"], &["publish", "orders", "1"]] {
            run(&url, command).fails(code, notes);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn tail_resumes_after_a_lost_connection() {
    let node = Process::start(&[]);
    let proxy = TcpProxy::start(node.address.port()).await;
    let proxied = format!("http://{}", proxy.address());
    run(&node.url(), &["publish", "a", "1"]).ok();
    run(&node.url(), &["publish", "b", "2"]).ok();
    let tail = Running::start(&proxied, &["tail", "a", "b", "--last", "5", "--count", "5"]);
    let mut seen = vec![tail.next()["data"].clone(), tail.next()["data"].clone()];
    run(&node.url(), &["publish", "a", "3"]).ok();
    seen.push(tail.next()["data"].clone());
    proxy.disconnect();
    tail.notes_contain("retrying in");
    run(&node.url(), &["publish", "b", "4"]).ok();
    run(&node.url(), &["publish", "a", "5"]).ok();
    seen.extend([tail.next()["data"].clone(), tail.next()["data"].clone()]);
    seen.sort_by_key(Value::as_u64);
    assert_eq!(seen, [json!(1), json!(2), json!(3), json!(4), json!(5)]);
    let mut tail = tail;
    assert!(exit_status(&mut tail.process).success(), "--count ends the command");
}

#[test]
fn a_closed_output_pipe_ends_a_command_without_failure() {
    let node = Process::start(&[]);
    let mut tail = Running::start(&node.url(), &["subscribe", "a", "--last", "1"]);
    // A closed pipe, as with `head -1`, is not a failure.
    drop(tail.process.stdout.take());
    let head = format!("{} tail a --url {} --last 1 | head -n 1", env!("CARGO_BIN_EXE_weir"), node.url());
    let head = Command::new("bash").args(["-c", &format!("set -o pipefail; {head}")]).stdout(Stdio::piped()).spawn();
    let mut head = head.unwrap();
    run(&node.url(), &["publish", "a", "1"]).ok();
    run(&node.url(), &["publish", "a", "2"]).ok();
    eventually_blocking("the pipeline has ended", || {
        run(&node.url(), &["publish", "a", "3"]).ok();
        head.try_wait().unwrap().is_some_and(|status| status.success())
    });
}

#[test]
fn call_provide_and_services_commands() {
    let node = Process::start(&[]);
    let url = &*node.url();
    assert_eq!(run(url, &["call", "weir/echo", r#"{"n":1}"#]).ok(), [json!({"n": 1})]);

    let mut echo = Running::start(url, &["provide", "echo"]);
    echo.notes_contain("providing echo");
    assert_eq!(run(url, &["call", "echo/any", "[1,2]"]).ok(), [json!([1, 2])]);
    assert_eq!(run(url, &["call", "echo/any"]).ok(), [Value::Null]);

    let script = r#"read params; case "$WEIR_METHOD" in
        add) echo "{\"sum\": $(echo "$params" | tr -d '[]' | tr , +)}" ;;
        text) echo "not json" ;;
        bad) echo '{"code":42,"message":"no such user","data":{"x":1}}'; exit 1 ;;
        broken) exit 7 ;;
        slow) echo $$ > "$WEIR_TEST_FILE"; sleep 600 ;;
    esac"#;
    let file = std::env::temp_dir().join(format!("weir-cli-test-{}", std::process::id()));
    // Commands inherit the environment of the provider except for its token.
    let shell = format!("export WEIR_TEST_FILE={}; {script}", file.display());
    let mut math = Running::start(url, &["provide", "math", "--exclusive", "--concurrency", "2", "--", &shell]);
    math.notes_contain("providing math");
    assert_eq!(run(url, &["call", "math/text", "[]"]).ok(), [json!("not json")]);
    let sum = run(url, &["call", "math/add", "[1,2]"]);
    assert_eq!(sum.code, Some(0), "{}", sum.notes);
    run(url, &["call", "math/bad", "[]"]).fails(3, "no such user");
    run(url, &["call", "math/broken", "[]"]).fails(3, "exit status: 7");
    run(url, &["provide", "math", "--exclusive"]).fails(3, "service_taken");
    let services = run(url, &["services", "--prefix", "ma"]).ok();
    assert_eq!((services.len(), &services[0]["service"]), (1, &json!("math")), "{services:?}");

    // A caller that disconnects ends the command and its child processes.
    let caller = Running::start(url, &["call", "math/slow", "[]"]);
    let pid = || std::fs::read_to_string(&file).ok().filter(|pid| pid.ends_with('\n'));
    eventually_blocking("the command has started", || pid().is_some());
    drop(caller);
    let pid = pid().unwrap();
    let _ = std::fs::remove_file(&file);
    eventually_blocking("the command has ended", || !Path::new("/proc").join(pid.trim()).join("fd").exists());

    send_signal(&math.process, Signal::TERM);
    assert!(exit_status(&mut math.process).success());
    run(url, &["call", "math/text", "[]"]).fails(4, "no_provider");
    send_signal(&echo.process, Signal::INT);
    assert!(exit_status(&mut echo.process).success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn provide_registers_again_after_a_lost_connection() {
    let node = Process::start(&[]);
    let proxy = TcpProxy::start(node.address.port()).await;
    let proxied = format!("http://{}", proxy.address());
    let provider = Running::start(&proxied, &["provide", "echo", "--exclusive"]);
    provider.notes_contain("providing echo");
    proxy.disconnect();
    provider.notes_contain("retrying in");
    eventually_blocking("the provider has registered again", || {
        provider.notes().matches("providing echo").count() == 2
    });
    assert_eq!(run(&node.url(), &["call", "echo/x", "[3]"]).ok(), [json!([3])]);
}

#[test]
fn presence_and_connections_commands_list_and_kick() {
    let node = Process::start(&[]);
    let url = &*node.url();
    let mut ann = Running::start(url, &["tail", "chat", "--present", "ann"]);
    eventually_blocking("ann is present", || run(url, &["presence", "chat"]).ok().len() == 1);
    assert_eq!(run(url, &["presence", "chat"]).ok()[0]["client"], "ann");
    assert_eq!(run(url, &["presence", "chat", "--count"]).ok()[0]["count"], 1);
    let connections = run(url, &["connections", "--channel", "chat"]).ok();
    assert_eq!((connections.len(), &connections[0]["transport"]), (1, &json!("sse")));
    assert!(run(url, &["connections", "--subject", "user-7"]).ok().is_empty());
    run(url, &["connections", "kick"]).fails(2, "--subject");
    run(url, &["connections", "kick", "--subject", ""]).fails(3, "subject is empty");
    run(url, &["connections", "kick", "--id", "nothing"]).fails(3, "no connection nothing");
    let id = connections[0]["id"].as_str().unwrap();
    assert_eq!(run(url, &["connections", "kick", "--id", id]).ok(), [json!({ "kicked": 1 })]);
    // A kicked command does not reconnect.
    assert_eq!(exit_status(&mut ann.process).code(), Some(3));
    ann.notes_contain("kicked");
    eventually_blocking("ann has left", || run(url, &["presence", "chat"]).ok().is_empty());
}

#[test]
fn consumer_commands_read_commit_seek_and_delete() {
    let node = Process::start(&[]);
    let url = &*node.url();
    finish_blocking(url, &["publish", "orders", "--lines"], "1\n2\n3\n").ok();
    let read = ["read", "orders", "--consumer", "mailer", "--limit", "2"];
    let first = run(url, &read);
    let next = first.notes.split("next: ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    assert_eq!(first.ok().len(), 2);
    assert_eq!(run(url, &read).ok()[0]["data"], 1, "without a commit the same page is returned");
    run(url, &["consumers", "commit", "mailer", &next]).ok();
    assert_eq!(run(url, &read).ok()[0]["data"], 3);
    assert_eq!(run(url, &["consumers", "show", "mailer"]).ok()[0]["channels"][0]["lag"], 1);
    assert_eq!(run(url, &["consumers"]).ok()[0]["name"], "mailer");
    run(url, &["consumers", "seek", "mailer", "orders", "earliest"]).ok();
    assert_eq!(run(url, &read).ok()[0]["data"], 1);
    let mut auto = read.to_vec();
    auto.push("--commit");
    assert_eq!(run(url, &auto).ok().len(), 2);
    assert_eq!(run(url, &auto).ok()[0]["data"], 3);
    run(url, &["consumers", "delete", "mailer"]).ok();
    run(url, &["consumers", "show", "mailer"]).fails(3, "not_found");
}

/// The lines that a command prints on a terminal.
fn on_terminal(url: &str, args: &str) -> Vec<String> {
    let line = format!("{} {args}", env!("CARGO_BIN_EXE_weir"));
    let output = Command::new("script").args(["-qec", &line, "/dev/null"]).env("WEIR_URL", url).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    text.lines().map(|line| line.trim_end().to_owned()).collect()
}

#[test]
fn lists_are_tables_on_a_terminal() {
    let node = Process::start(&[]);
    let url = &*node.url();
    assert_eq!(on_terminal(url, "consumers"), ["weir: the list is empty"]);
    run(url, &["publish", "orders", "1"]).ok();
    run(url, &["publish", "orders-of-today", "2"]).ok();
    run(url, &["read", "orders", "--consumer", "mailer", "--commit"]).ok();
    let tail = Running::start(url, &["tail", "chat", "--present", "ann"]);
    eventually_blocking("ann is present", || run(url, &["presence", "chat"]).ok().len() == 1);

    let channels = on_terminal(url, "channels --prefix orders");
    assert_eq!(channels.len(), 3, "{channels:?}");
    let words: Vec<_> = channels[0].split_whitespace().collect();
    assert_eq!(words, ["CHANNEL", "EPOCH", "FIRST", "TOP", "BYTES", "READERS", "TIME"]);
    let time = channels[1].rsplit(' ').next().unwrap();
    assert!(time.starts_with("20") && time.contains('T') && time.ends_with('Z'), "{channels:?}");
    assert_eq!(channels[1].find(time), channels[0].find("TIME"), "columns are aligned: {channels:?}");

    assert!(on_terminal(url, "channels show orders")[1].starts_with("orders  "));
    let lag = "NAME    MODE    CHANNEL  POSITION";
    for list in ["consumers", "consumers list", "consumers show mailer"] {
        let lines = on_terminal(url, list);
        assert!(
            lines.len() == 2 && lines[0].starts_with(lag) && lines[1].starts_with("mailer  cursor  orders"),
            "{lines:?}"
        );
    }
    for (list, column) in [("services", "PROVIDERS"), ("presence chat", "CLIENT"), ("connections", "TRANSPORT")] {
        let lines = on_terminal(url, list);
        assert!(lines.len() == 2 && lines[0].contains(column), "{lines:?}");
    }
    let commands = ["services", "presence chat", "connections", "consumers", "consumers show mailer", "channels list"];
    for list in commands {
        for line in on_terminal(url, &format!("{list} --json")) {
            assert!(serde_json::from_str::<Value>(&line).unwrap().is_object(), "{line}");
        }
    }
    // In a pipe.
    assert!(run(url, &["channels", "--json"]).ok()[0]["time"].is_u64());
    drop(tail);
}

#[test]
fn settings_are_validated_and_shown_with_their_source() {
    let file = std::env::temp_dir().join(format!("weir-cli-test-{}.toml", std::process::id()));
    std::fs::write(&file, "sse.heartbeat = \"15s\"\ncolour = 1\n[rpc]\ntimeout = 5\n").unwrap();
    for command in [&["config", "check"][..], &["config", "show"], &["serve"], &[]] {
        let output =
            weir_command().args(command).arg("--config").arg(&file).env("WEIR__LIMITS__BATCH", "0").output().unwrap();
        let notes = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), notes.lines().count()), (Some(2), 3), "{notes}");
        assert!(notes.contains(".toml: colour: unknown key") && notes.contains("WEIR__LIMITS__BATCH: limits.batch: "));
        assert!(output.stdout.is_empty());
    }
    std::fs::write(&file, "sse.heartbeat = \"15s\"\n").unwrap();
    let shown = weir_command().args(["config", "show"]).env("WEIR_CONFIG", &file).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains(&format!("heartbeat = \"15s\"  # {}\n", file.display())), "{text}");
    std::fs::remove_file(&file).unwrap();

    let open = weir_command().args(["--listen", "0.0.0.0:0"]).output().unwrap();
    assert_eq!(open.status.code(), Some(2));
    let notes = String::from_utf8(open.stderr).unwrap();
    assert!(notes.starts_with("--listen: server.listen: 0.0.0.0:0 can be reached from other machines"), "{notes}");
    assert!(notes.contains("auth.allow_anonymous = true"));

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = weir_command().args(["--listen", &taken.local_addr().unwrap().to_string()]).output().unwrap();
    assert_eq!(taken.status.code(), Some(1));
    assert!(String::from_utf8(taken.stderr).unwrap().contains("in use (os error 98): is weir already running?"));
}

#[test]
fn an_unknown_variable_prevents_a_start_unless_kubernetes_sets_it() {
    for command in [&["config", "check"][..], &["config", "show"], &["serve"], &[]] {
        let environment = [("WEIR_LISTEN", "127.0.0.1:0"), ("weir__sse__heartbeat", "5s")];
        let output = weir_command().args(command).envs(environment).output().unwrap();
        let notes = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{notes}");
        let expected = "WEIR_LISTEN: unknown variable; did you mean WEIR__SERVER__LISTEN?\n\
                        weir__sse__heartbeat: unknown variable; did you mean WEIR__SSE__HEARTBEAT?\n";
        assert_eq!(notes, expected);
    }
    let links =
        [("WEIR_PORT", "tcp://10.96.0.7:8000"), ("WEIR_SERVICE_HOST", "10.96.0.7"), ("WEIR__LOG__LEVEL", "debug")];
    let node = Process::start(&links);
    let log = node.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("WEIR_PORT")).collect();
    assert!(lines.len() == 1 && lines[0].contains("DEBUG") && lines[0].contains("WEIR_SERVICE_HOST"), "{log}");
    let checked = weir_command().args(["config", "check"]).envs(links).output().unwrap();
    assert!(checked.status.success());
}

#[test]
fn sigterm_and_sigint_shut_a_node_down_gracefully() {
    for signal in [Signal::TERM, Signal::INT] {
        let node = Process::start(&[]);
        run(&node.url(), &["services"]).ok();
        node.signal(signal);
        node.ended();
    }
}

/// A proxy that terminates TLS with a certificate of `tls/`. Returns its URL.
async fn tls_before(upstream: std::net::SocketAddr) -> String {
    use tokio_rustls::rustls::{
        ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    };
    let file = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls").join(name);
    let certificate = CertificateDer::from_pem_file(file("leaf.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(file("leaf.key")).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let mut server = tokio::net::TcpStream::connect(upstream).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn commands_connect_over_tls_and_verify_the_certificate() {
    let node = Process::start(&[]);
    let url = tls_before(node.address).await;
    let authority = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls/ca.pem");
    let trusting = |args: &[&str]| {
        let mut command = weir_command();
        command.args(args).env("WEIR_URL", &url).env("SSL_CERT_FILE", &authority).stderr(Stdio::piped());
        command
    };
    let mut provider = trusting(&["provide", "echo"]).spawn().unwrap();
    let mut notes = BufReader::new(provider.stderr.take().unwrap());
    let mut line = String::new();
    notes.read_line(&mut line).unwrap();
    assert!(line.contains("providing echo"), "{line}");
    let called = trusting(&["call", "echo/x", "[1]"]).output().unwrap();
    assert_eq!(String::from_utf8(called.stdout).unwrap(), "[1]\n");
    provider.kill().unwrap();
    provider.wait().unwrap();
    let _ = notes.read_to_string(&mut line);
    // Without the authority the certificate is rejected.
    run(&url, &["services"]).fails(4, "cannot connect to https://localhost:");
}

#[test]
fn no_line_of_help_is_longer_than_a_hundred_columns() {
    fn check(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in help.lines() {
            // The width that clap assumes without a terminal.
            assert!(line.chars().count() <= 100, "weir {}: {line}", command.get_name());
        }
        command.get_subcommands().for_each(check);
    }
    check(&<weir::cli::Cli as clap::CommandFactory>::command());
}

#[test]
fn every_command_and_argument_has_help_and_usage_lines_show_what_is_required() {
    fn check(command: &clap::Command) {
        assert!(command.get_about().is_some(), "weir {}", command.get_name());
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "weir {}: {argument}", command.get_name());
        }
        command.get_subcommands().for_each(check);
    }
    check(&<weir::cli::Cli as clap::CommandFactory>::command());
    let usage = |args: &[&str]| {
        let output = weir_command().args(args).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        help.lines().find_map(|line| line.strip_prefix("Usage: weir ")).unwrap().to_owned()
    };
    assert_eq!(usage(&["connections", "kick"]), "connections kick [OPTIONS] <--subject <SUBJECT>|--id <ID>>");
    assert_eq!(usage(&["publish"]), "publish [OPTIONS] <CHANNEL> [DATA]");
    assert_eq!(usage(&["provide"]), "provide [OPTIONS] <SERVICE> [-- <CMD>...]");
    // Errors show the same lines, also if the URL is in the environment.
    for (command, line) in [
        ("tail", "Usage: weir tail [OPTIONS] <CHANNEL>..."),
        ("connections kick", "Usage: weir connections kick [OPTIONS] <--subject <SUBJECT>|--id <ID>>"),
        ("channels lst", "Usage: weir channels [OPTIONS]\n       weir channels <COMMAND>"),
        ("import ganomede", "Usage: weir import ganomede [OPTIONS] --from <URL>"),
    ] {
        run("localhost:1", &command.split(' ').collect::<Vec<_>>()).fails(2, line);
    }
}

#[tokio::test]
async fn the_log_names_the_bus_the_node_and_the_listeners_and_ends_with_stopped() {
    let redis = RedisServer::start(&[]).await;
    redis.cli(&["ACL", "SETUSER", "node", "on", ">secret", "~*", "&*", "+@all"]).await;
    let url = redis.url().replace("://", "://node:secret@");
    let process = Process::start(&[
        ("WEIR__BUS__BACKEND", "redis"),
        ("WEIR__BUS__REDIS__URL", &url),
        ("WEIR__ADMIN__LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__ENABLE", "grip"),
        ("WEIR__COMPAT__GRIP__LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__GRIP__PUBLISH_LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__GRIP__ROUTES", r#"[{ origin = "http://127.0.0.1:1" }]"#),
        ("WEIR__DRAIN__WINDOW", "0s"),
    ]);
    process.signal(Signal::TERM);
    let log = process.ended();
    assert!(!log.contains("secret"), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let entries = |message: &str| lines.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let starting = entries("starting");
    assert_eq!(starting[0]["bus"], format!("redis://{}/0", redis.address()));
    assert_eq!(starting[0]["node"].as_str().unwrap().len(), 16);
    let listening = entries("listening");
    let purposes: Vec<_> = listening.iter().map(|line| line["for"].as_str().unwrap()).collect();
    assert_eq!(purposes, ["clients", "admin", "GRIP proxy", "GRIP publish"]);
    assert_eq!(lines.last().unwrap()["message"], "stopped");
}
