//! The binary, as a person or a script uses it: real processes, real sockets, exit codes.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// How long something may take that must happen: two busy cores in CI.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node of its own, killed with the test.
struct Node {
    process: Child,
    url: String,
}

/// A client command that is under way.
struct Running {
    process: Child,
    lines: mpsc::Receiver<String>,
    notes: Arc<Mutex<String>>,
}

struct Done {
    code: i32,
    lines: Vec<Value>,
    notes: String,
}

/// A way to the node that can be cut.
struct Wire {
    url: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WEIR")) {
        command.env_remove(name);
    }
    command
}

impl Node {
    fn start() -> Self {
        let mut process = binary()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(process.stderr.take().unwrap());
        let (tx, rx) = mpsc::channel();
        // Reads on to the end, or the node would block on a full pipe.
        thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                let line: Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(url) = line["url"].as_str() {
                    let _ = tx.send(url.to_owned());
                }
            }
        });
        let url = rx.recv_timeout(PATIENCE).expect("the node says where it listens");
        Node { process, url }
    }

    fn signal(&mut self, name: &str) -> ExitStatus {
        Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status().unwrap();
        wait(&mut self.process)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn wait(process: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !probe() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a client command to its end.
fn weir(url: &str, args: &[&str]) -> Done {
    weir_with(url, args, "")
}

fn weir_with(url: &str, args: &[&str], input: &str) -> Done {
    let mut command = binary();
    command.args(args).env("WEIR_URL", url).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    // A command that does not read its input closes it.
    let _ = process.stdin.take().unwrap().write_all(input.as_bytes());
    let output = process.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    Done { code: output.status.code().unwrap(), lines, notes: String::from_utf8(output.stderr).unwrap() }
}

/// Starts a client command that goes on.
fn start(url: &str, args: &[&str]) -> Running {
    let mut command = binary();
    command.args(args).env("WEIR_URL", url).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let (tx, lines) = mpsc::channel();
    let out: BufReader<ChildStdout> = BufReader::new(process.stdout.take().unwrap());
    thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            let _ = tx.send(line);
        }
    });
    let notes = Arc::new(Mutex::new(String::new()));
    let (said, mut errors) = (notes.clone(), BufReader::new(process.stderr.take().unwrap()));
    thread::spawn(move || {
        let mut line = String::new();
        while errors.read_line(&mut line).is_ok_and(|n| n > 0) {
            said.lock().unwrap().push_str(&std::mem::take(&mut line));
        }
    });
    Running { process, lines, notes }
}

impl Running {
    fn next(&self) -> Value {
        let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line; notes: {}", self.said()));
        serde_json::from_str(&line).expect(&line)
    }

    fn said(&self) -> String {
        self.notes.lock().unwrap().clone()
    }

    fn says(&self, text: &str) {
        until(text, || self.said().contains(text));
    }
}

impl Done {
    fn ok(self) -> Vec<Value> {
        assert_eq!(self.code, 0, "{}", self.notes);
        self.lines
    }

    fn fails(self, code: i32, notes: &str) {
        assert_eq!(self.code, code, "{}", self.notes);
        assert!(self.notes.contains(notes), "{}", self.notes);
        assert!(self.lines.is_empty());
    }
}

impl Wire {
    fn to(url: &str) -> Self {
        let target = url.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let ends = open.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let far = TcpStream::connect(&target).unwrap();
                ends.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Wire { url, open }
    }

    fn cut(&self) {
        for end in self.open.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

#[test]
fn publish_read_and_look_after() {
    let node = Node::start();
    let url = node.url.as_str();
    let placed =
        weir(url, &["publish", "orders", r#"{"id":12345678901234567890.10}"#, "--type", "created", "--from", "shop"]);
    let placed = placed.ok();
    assert_eq!((&placed[0]["channel"], &placed[0]["offset"]), (&json!("orders"), &json!(1)));
    weir(url, &["publish", "orders", "just text"]).ok();
    weir(url, &["publish", "orders"]).ok();
    assert_eq!(weir_with(url, &["publish", "orders", "-"], "{\n \"whole\": true\n}\n").ok()[0]["offset"], 4);
    let lines = weir_with(url, &["publish", "orders", "--lines", "--type", "line"], "1\ntwo\n{\"three\":3}").ok();
    assert_eq!(lines.iter().map(|line| line["offset"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 6, 7]);

    let keyed = ["publish", "orders", "once", "--key", "k1"];
    assert_eq!(weir(url, &keyed).ok()[0]["offset"], weir(url, &keyed).ok()[0]["offset"]);

    let read = weir(url, &["read", "orders"]);
    assert!(read.notes.contains("weir: next: "), "{}", read.notes);
    let read = read.ok();
    assert_eq!(read.len(), 8);
    assert_eq!((&read[0]["type"], &read[0]["from"]), (&json!("created"), &json!("shop")));
    assert_eq!(read[1]["data"], "just text");
    assert!(read[2].get("data").is_none());
    assert_eq!((&read[3]["data"], &read[5]["data"]), (&json!({"whole": true}), &json!("two")));
    assert_eq!(weir(url, &["read", "orders", "--type", "line", "--limit", "2", "--all"]).ok().len(), 3);
    assert_eq!(weir(url, &["read", "orders", "--last", "2"]).ok()[0]["offset"], 7);
    let after = format!("{}-6", read[0]["epoch"].as_str().unwrap());
    assert_eq!(weir(url, &["read", "orders", "--after", &after]).ok().len(), 2);
    assert_eq!(weir(url, &["read", "orders", "--after", "now", "--wait", "10ms"]).ok().len(), 0);
    // Numbers keep every digit on their way through.
    let output = binary().args(["read", "orders", "--url", url, "--limit", "1"]).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("12345678901234567890.10"));

    assert_eq!(weir(url, &["channels", "--prefix", "ord"]).ok()[0]["channel"], "orders");
    assert_eq!(weir(url, &["channels", "show", "orders"]).ok()[0]["top"], 8);
    weir(url, &["channels", "delete", "orders", "--before", &after]).ok();
    assert_eq!(weir(url, &["channels", "show", "orders"]).ok()[0]["first"], 6);
    weir(url, &["channels", "delete", "orders"]).ok();
    assert_eq!(weir(url, &["read", "orders"]).ok().len(), 0);
}

#[test]
fn how_commands_fail() {
    let node = Node::start();
    let url = node.url.as_str();
    weir(url, &["publish", "$services", "1"]).fails(3, "forbidden");
    weir(url, &["read", "orders", "--after", "what?"]).fails(3, "invalid_position");
    weir(url, &["tail", "orders", "--after", "what?"]).fails(2, "not a position");
    weir(url, &["tail", "orders", "--after", "earliest", "--last", "3"]).fails(2, "cannot be used with");
    weir(url, &["call", "weir/echo", "{oops"]).fails(2, "not JSON");
    weir(url, &["call", "echo"]).fails(2, "SERVICE/METHOD");
    weir(url, &["call", "nobody/there"]).fails(4, "no_provider");
    weir(url, &["call", "weir/echo", "--timeout", "5"]).fails(2, "5 of what? write 5s or 5ms");
    weir(url, &["frobnicate"]).fails(2, "unrecognized");
    weir(&url.replace("http:", "https:"), &["services"]).fails(4, "no TLS is spoken there");
    // Nothing failed, but a quote that the shell ate is worth a word.
    let text = weir(url, &["publish", "orders", "{id:7}"]);
    assert!(text.notes.contains("not JSON"), "{}", text.notes);
    text.ok();
    weir("ftp://x", &["services"]).fails(2, "neither http nor https");
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for command in [&["services"][..], &["tail", "x"], &["provide", "x"]] {
        weir(&nowhere, command).fails(4, "cannot connect to http://127.0.0.1:");
    }
}

#[test]
fn tail_comes_back_where_it_was() {
    let node = Node::start();
    let wire = Wire::to(&node.url);
    weir(&node.url, &["publish", "a", "1"]).ok();
    weir(&node.url, &["publish", "b", "2"]).ok();
    let tail = start(&wire.url, &["tail", "a", "b", "--last", "5", "--count", "5"]);
    let mut seen = vec![tail.next()["data"].clone(), tail.next()["data"].clone()];
    weir(&node.url, &["publish", "a", "3"]).ok();
    seen.push(tail.next()["data"].clone());
    wire.cut();
    tail.says("again in");
    weir(&node.url, &["publish", "b", "4"]).ok();
    weir(&node.url, &["publish", "a", "5"]).ok();
    seen.extend([tail.next()["data"].clone(), tail.next()["data"].clone()]);
    seen.sort_by_key(Value::as_u64);
    assert_eq!(seen, [json!(1), json!(2), json!(3), json!(4), json!(5)]);
    let mut tail = tail;
    assert!(wait(&mut tail.process).success(), "--count ends it");
}

#[test]
fn nobody_reads_the_output() {
    let node = Node::start();
    let mut tail = start(&node.url, &["subscribe", "a", "--last", "1"]);
    // Closed by whoever we were piped to: like `head -1`, that is no failure.
    drop(tail.process.stdout.take());
    let head = format!("{} tail a --url {} --last 1 | head -n 1", env!("CARGO_BIN_EXE_weir"), node.url);
    let head = Command::new("bash").args(["-c", &format!("set -o pipefail; {head}")]).stdout(Stdio::piped()).spawn();
    let mut head = head.unwrap();
    weir(&node.url, &["publish", "a", "1"]).ok();
    weir(&node.url, &["publish", "a", "2"]).ok();
    until("the pipe to end", || {
        weir(&node.url, &["publish", "a", "3"]).ok();
        head.try_wait().unwrap().is_some_and(|status| status.success())
    });
}

#[test]
fn services_by_commands() {
    let node = Node::start();
    let url = node.url.as_str();
    assert_eq!(weir(url, &["call", "weir/echo", r#"{"n":1}"#]).ok(), [json!({"n": 1})]);

    let mut echo = start(url, &["provide", "echo"]);
    echo.says("providing echo");
    assert_eq!(weir(url, &["call", "echo/any", "[1,2]"]).ok(), [json!([1, 2])]);
    assert_eq!(weir(url, &["call", "echo/any"]).ok(), [Value::Null]);

    let script = r#"read params; case "$WEIR_METHOD" in
        add) echo "{\"sum\": $(echo "$params" | tr -d '[]' | tr , +)}" ;;
        text) echo "not json" ;;
        bad) echo '{"code":42,"message":"no such user","data":{"x":1}}'; exit 1 ;;
        broken) exit 7 ;;
        slow) echo $$ > "$WEIR_TEST_FILE"; sleep 600 ;;
    esac"#;
    let file = std::env::temp_dir().join(format!("weir-cli-test-{}", std::process::id()));
    // The environment of a provider is that of its commands, but for its token.
    let shell = format!("export WEIR_TEST_FILE={}; {script}", file.display());
    let mut math = start(url, &["provide", "math", "--exclusive", "--concurrency", "2", "--", &shell]);
    math.says("providing math");
    assert_eq!(weir(url, &["call", "math/text", "[]"]).ok(), [json!("not json")]);
    let sum = weir(url, &["call", "math/add", "[1,2]"]);
    assert_eq!(sum.code, 0, "{}", sum.notes);
    weir(url, &["call", "math/bad", "[]"]).fails(3, "no such user");
    weir(url, &["call", "math/broken", "[]"]).fails(3, "exit status: 7");
    weir(url, &["provide", "math", "--exclusive"]).fails(3, "service_taken");
    let services = weir(url, &["services", "--prefix", "ma"]).ok();
    assert_eq!((services.len(), &services[0]["service"]), (1, &json!("math")), "{services:?}");

    // A caller that hangs up ends the command, and what that started.
    let caller = start(url, &["call", "math/slow", "[]"]);
    let pid = || std::fs::read_to_string(&file).ok().filter(|pid| pid.ends_with('\n'));
    until("the command to begin", || pid().is_some());
    drop(caller);
    let pid = pid().unwrap();
    let _ = std::fs::remove_file(&file);
    until("the command to be ended", || !Path::new("/proc").join(pid.trim()).join("fd").exists());

    Command::new("kill").args(["-TERM", &math.process.id().to_string()]).status().unwrap();
    assert!(wait(&mut math.process).success());
    weir(url, &["call", "math/text", "[]"]).fails(4, "no_provider");
    Command::new("kill").args(["-INT", &echo.process.id().to_string()]).status().unwrap();
    assert!(wait(&mut echo.process).success());
}

#[test]
fn provide_comes_back() {
    let node = Node::start();
    let wire = Wire::to(&node.url);
    let provider = start(&wire.url, &["provide", "echo", "--exclusive"]);
    provider.says("providing echo");
    wire.cut();
    provider.says("again in");
    until("the provider to be back", || provider.said().matches("providing echo").count() == 2);
    assert_eq!(weir(&node.url, &["call", "echo/x", "[3]"]).ok(), [json!([3])]);
}

#[test]
fn who_is_there_is_listed_and_kicked() {
    let node = Node::start();
    let url = node.url.as_str();
    let mut ann = start(url, &["tail", "chat", "--present", "ann"]);
    until("ann is present", || weir(url, &["presence", "chat"]).ok().len() == 1);
    assert_eq!(weir(url, &["presence", "chat"]).ok()[0]["client"], "ann");
    assert_eq!(weir(url, &["presence", "chat", "--count"]).ok()[0]["count"], 1);
    let connections = weir(url, &["connections", "--channel", "chat"]).ok();
    assert_eq!((connections.len(), &connections[0]["transport"]), (1, &json!("sse")));
    assert!(weir(url, &["connections", "--subject", "user-7"]).ok().is_empty());
    weir(url, &["connections", "kick"]).fails(2, "--subject");
    let id = connections[0]["id"].as_str().unwrap();
    assert_eq!(weir(url, &["connections", "kick", "--id", id]).ok(), [json!({ "kicked": 1 })]);
    // It does not come back.
    assert_eq!(wait(&mut ann.process).code(), Some(3));
    ann.says("kicked");
    until("ann has left", || weir(url, &["presence", "chat"]).ok().is_empty());
}

#[test]
fn consumers_are_kept() {
    let node = Node::start();
    let url = node.url.as_str();
    weir_with(url, &["publish", "orders", "--lines"], "1\n2\n3\n").ok();
    let read = ["read", "orders", "--consumer", "mailer", "--limit", "2"];
    let first = weir(url, &read);
    let next = first.notes.split("next: ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    assert_eq!(first.ok().len(), 2);
    assert_eq!(weir(url, &read).ok()[0]["data"], 1, "not committed: the same again");
    weir(url, &["consumers", "commit", "mailer", &next]).ok();
    assert_eq!(weir(url, &read).ok()[0]["data"], 3);
    assert_eq!(weir(url, &["consumers", "show", "mailer"]).ok()[0]["channels"][0]["lag"], 1);
    assert_eq!(weir(url, &["consumers"]).ok()[0]["name"], "mailer");
    weir(url, &["consumers", "seek", "mailer", "orders", "earliest"]).ok();
    assert_eq!(weir(url, &read).ok()[0]["data"], 1);
    let mut auto = read.to_vec();
    auto.push("--commit");
    assert_eq!(weir(url, &auto).ok().len(), 2);
    assert_eq!(weir(url, &auto).ok()[0]["data"], 3);
    weir(url, &["consumers", "delete", "mailer"]).ok();
    weir(url, &["consumers", "show", "mailer"]).fails(3, "not_found");
}

#[test]
fn settings_are_checked_and_shown() {
    let file = std::env::temp_dir().join(format!("weir-cli-test-{}.toml", std::process::id()));
    std::fs::write(&file, "sse.heartbeat = \"15s\"\ncolour = 1\n[rpc]\ntimeout = 5\n").unwrap();
    for command in [&["config", "check"][..], &["config", "show"], &["serve"], &[]] {
        let output =
            binary().args(command).arg("--config").arg(&file).env("WEIR__LIMITS__BATCH", "0").output().unwrap();
        let notes = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), notes.lines().count()), (Some(2), 3), "{notes}");
        assert!(notes.contains(".toml: colour: unknown key") && notes.contains("WEIR__LIMITS__BATCH: limits.batch: "));
        assert!(output.stdout.is_empty());
    }
    std::fs::write(&file, "sse.heartbeat = \"15s\"\n").unwrap();
    let shown = binary().args(["config", "show"]).env("WEIR_CONFIG", &file).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains(&format!("heartbeat = \"15s\"  # {}\n", file.display())), "{text}");
    std::fs::remove_file(&file).unwrap();

    let open = binary().args(["--listen", "0.0.0.0:0"]).output().unwrap();
    assert_eq!(open.status.code(), Some(2));
    let notes = String::from_utf8(open.stderr).unwrap();
    assert!(notes.starts_with("--listen: server.listen: 0.0.0.0:0 can be reached from other machines"), "{notes}");
    assert!(notes.contains("auth.allow_anonymous = true"));

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = binary().args(["--listen", &taken.local_addr().unwrap().to_string()]).output().unwrap();
    assert_eq!(taken.status.code(), Some(1));
    assert!(String::from_utf8(taken.stderr).unwrap().contains("in use (os error 98): is weir running already?"));
}

#[test]
fn a_node_told_to_leave_leaves_well() {
    for signal in ["TERM", "INT"] {
        let mut node = Node::start();
        weir(&node.url, &["services"]).ok();
        assert!(node.signal(signal).success());
    }
}

/// Whatever ends TLS before a weir, with a certificate of `tls/`.
fn tls_before(url: &str) -> String {
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
    let target = url.trim_start_matches("http://").to_owned();
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            tx.send(listener.local_addr().unwrap().port()).unwrap();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let (acceptor, target) = (acceptor.clone(), target.clone());
                tokio::spawn(async move {
                    let Ok(mut near) = acceptor.accept(near).await else { return };
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
    });
    format!("https://localhost:{}", rx.recv_timeout(PATIENCE).unwrap())
}

#[test]
fn over_tls() {
    let node = Node::start();
    let url = tls_before(&node.url);
    let authority = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls/ca.pem");
    let trusting = |args: &[&str]| {
        let mut command = binary();
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
    // And nobody else is believed.
    weir(&url, &["services"]).fails(4, "cannot connect to https://localhost:");
}

#[test]
fn no_line_of_help_is_broken_in_two() {
    fn look(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in help.lines() {
            // As wide as a terminal is thought to be that is none.
            assert!(line.chars().count() <= 100, "weir {}: {line}", command.get_name());
        }
        command.get_subcommands().for_each(look);
    }
    look(&<weir::cli::Cli as clap::CommandFactory>::command());
}
