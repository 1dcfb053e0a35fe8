use super::*;

fn read(file: &str, environment: &[(&str, &str)], flags: &[Override]) -> Result<Loaded, String> {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load::from(Some(("weir.toml".into(), Ok(file.into()))), environment, flags).map_err(|problems| problems.to_string())
}

fn file() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config.toml")
}

const HEAD: &str = "\
# All settings of weir with their defaults. A configuration file (weir --config FILE, or WEIR_CONFIG) needs only the settings
# that it changes. Environment variables override the file (WEIR__SSE__HEARTBEAT=15s; lists separated by commas), and flags
# override both. Durations have a unit (500ms, 5s, 2m, 1h, 30d); sizes are in bytes or have a unit (512KiB, 16MiB, 8MB).
# `weir config check` validates a configuration. Generated from src/config.rs by `UPDATE=1 cargo test config`.

";

#[test]
fn the_file_in_the_repository_is_the_defaults() {
    let expected = HEAD.to_owned() + &Config::default().to_toml(true, &BTreeMap::new());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file(), &expected).unwrap();
    }
    let text = std::fs::read_to_string(file()).unwrap();
    assert!(text == expected, "config.toml is out of date: UPDATE=1 cargo test config");
    let loaded = read(&text, &[], &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    let mut config = Config::default();
    let mut items = Vec::new();
    config.items("", &mut items);
    for item in items {
        let (key, doc) = match &item {
            Item::Section { key, doc } => (key, doc),
            Item::Setting(setting) => (&setting.key, &setting.doc),
        };
        assert!(!doc.trim().is_empty(), "{key} is not explained");
        if let Item::Setting(setting) = &item {
            assert!(loaded.sources.contains_key(&setting.key), "{key} is not in config.toml");
        }
    }
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let text = "sse.heartbeat = \"15s\"\n[ws]\nping = \"10s\"\n[server]\nlisten = \"127.0.0.1:1, [::1]:2\"\n";
    let flag = Override { flag: "--listen", key: "server.listen", value: "127.0.0.1:9".into() };
    let only_file = read(text, &[], &[]).unwrap().config;
    assert_eq!(only_file.server.listen, ["127.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()]);
    let environment = [("WEIR__SSE__HEARTBEAT", "16s"), ("WEIR__SERVER__LISTEN", "127.0.0.1:5"), ("WEIR_URL", "x")];
    let loaded = read(text, &environment, &[flag]).unwrap();
    assert_eq!(loaded.config.sse.heartbeat, seconds(16));
    assert_eq!(loaded.config.ws.ping, seconds(10));
    assert_eq!(loaded.config.server.listen, ["127.0.0.1:9".parse().unwrap()]);
    assert_eq!(loaded.sources["server.listen"], Source::Flag("--listen"));
    assert_eq!(loaded.sources["ws.ping"].to_string(), "weir.toml");
    assert_eq!(loaded.sources["sse.heartbeat"].to_string(), "WEIR__SSE__HEARTBEAT");
}

#[test]
fn everything_wrong_is_reported_at_once() {
    let text = r#"
sse.hearbeat = "5s"
colour = 1
[empty]
[ws]
[rpc]
timeout = 5
[limits]
batch = 0
event = "lots"
header = 100
[server]
listen = "here"
[cors]
origins = ["null"]
[[channels]]
match = "a*"
keep = { count = -1, wiegth = 3 }
[[channels]]
keep.age = "1d"
"#;
    let environment = [("WEIR__LOG__LEVEL", "louder"), ("WEIR__PLUGINS__URL", "redis://x"), ("WEIR__HEARTBEAT", "5s")];
    let problems = read(text, &environment, &[]).unwrap_err();
    let mut expected: Vec<&str> = r#"weir.toml: sse.hearbeat: unknown key; did you mean sse.heartbeat?
weir.toml: colour: unknown key
weir.toml: empty: unknown key
weir.toml: rpc.timeout: 5 of what? write 5s or 5ms
weir.toml: limits.batch: must be at least 1
weir.toml: limits.event: needs a number of bytes, plain or as "16MiB", not "lots"; the units are KiB, MiB, GiB, kB, MB and GB
weir.toml: limits.header: must be at least 8KiB
weir.toml: server.listen: "here" is not an address with a port: write 127.0.0.1:8000, 0.0.0.0:8000 or [::1]:8000
weir.toml: cors.origins: "null" is not an origin: write https://example.com or https://*.example.com, without a path
weir.toml: channels[0].keep.count: needs a whole number, not -1
weir.toml: channels[0].keep.wiegth: unknown key
weir.toml: channels[1]: has no `match`: which channels is it for?
WEIR__PLUGINS__URL: plugins.url: unknown key; did you mean bus.redis.url?
WEIR__HEARTBEAT: heartbeat: unknown key; did you mean sse.heartbeat?
WEIR__LOG__LEVEL: log.level: "louder" is no level: write one of error, warn, info, debug, trace, off, or by target as "info,weir::rpc=debug""#
        .lines()
        .collect();
    let mut lines: Vec<&str> = problems.lines().collect();
    expected.sort_unstable();
    lines.sort_unstable();
    assert_eq!(lines, expected);
}

#[test]
fn a_file_that_is_no_toml_says_where() {
    let problems = read("[sse]\nheartbeat = \n[ws]\nping = \"1s\"\n", &[], &[]).unwrap_err();
    assert!(problems.starts_with("weir.toml: "), "{problems}");
    let missing = load(Some(std::path::Path::new("/no/such/weir.toml")), [], &[]).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/weir.toml: cannot be read: "), "{missing}");
}

#[test]
fn nobody_listens_to_the_world_by_accident() {
    let problems =
        read("server.listen = [\"0.0.0.0:8000\", \"127.0.0.1:1\"]\nadmin.listen = \"[::]:9\"", &[], &[]).unwrap_err();
    assert_eq!(problems.lines().count(), 2);
    assert!(problems.starts_with("weir.toml: server.listen: 0.0.0.0:8000 can be reached from other machines"));
    assert!(problems.contains("auth.allow_anonymous = true"));
    let environment = [("WEIR__AUTH__ALLOW_ANONYMOUS", "true"), ("WEIR__SERVER__LISTEN", "0.0.0.0:8000")];
    assert!(!read("", &environment, &[]).unwrap().config.is_loopback_only());
    assert!(Config::default().is_loopback_only());
}

#[test]
fn rules_come_in_order_and_what_they_leave_out_is_the_default() {
    let text = "[[channels]]\nmatch = \"live/*\"\nkeep.count = 5\n[[channels]]\nmatch = \"*\"\n[channels.keep]\nbytes = \"1MiB\"";
    let rules = read(text, &[], &[]).unwrap().config.channels;
    assert_eq!(rules[0], ChannelRule { pattern: "live/*".into(), keep: Keep { count: 5, ..Keep::default() } });
    assert_eq!(rules[1].keep, Keep { bytes: MIB, ..Keep::default() });
    let from_text = [("WEIR__CHANNELS", r#"[{match="live/*", keep.count=5}]"#)];
    assert_eq!(read(text, &from_text, &[]).unwrap().config.channels, rules[..1]);
    let wrong = [("WEIR__CHANNELS", "live/*")];
    assert!(read(text, &wrong, &[]).unwrap_err().starts_with("WEIR__CHANNELS: channels: "));
}

#[test]
fn what_is_shown_is_read_back() {
    let text = r#"
server.listen = ["127.0.0.1:0", "[::1]:8000"]
admin.listen = "localhost:9000"
cors.origins = ["https://*.example.com", "http://localhost:3000"]
log.level = "info,weir::rpc=debug"
limits.event = 999_999
limits.frame = 0x20_0000
limits.queued = 10000000
rpc.wait_for_provider = "0s"
[[channels]]
match = "say \"hi\"\u0007"
keep.age = "90s"
[[channels]]
match = "*"
"#;
    let loaded = read(text, &[], &[]).unwrap();
    let shown = loaded.config.to_toml(false, &loaded.sources);
    assert!(shown.contains("event = 999999  # weir.toml\n"), "{shown}");
    assert_eq!(read(&shown, &[], &[]).unwrap().config, loaded.config);
    let empty = read("channels = []", &[], &[]).unwrap().config;
    assert!(empty.channels.is_empty());
    assert_eq!(read(&empty.to_toml(true, &BTreeMap::new()), &[], &[]).unwrap().config, empty);
}

#[test]
fn an_event_fits_a_chunk_of_a_stream() {
    let with =
        |event| read(&format!("limits = {{ event = \"{event}\", frame = \"6MiB\", queued = \"8MiB\" }}"), &[], &[]);
    assert!(with("4MiB").is_ok());
    assert!(with("5MiB").unwrap_err().contains("limits.event: must be at most 4MiB"));
}

const ROUTES: &str = r#"
[compat]
enable = ["grip"]
[[compat.grip.routes]]
origin = "http://127.0.0.1:3000/"
key = "base64:c2VjcmV0"
[[compat.grip.routes]]
path = "/api"
origin = "https://example.com"
prefix = "api-"
"#;

#[test]
fn lists_of_tables_have_their_own_keys() {
    let loaded = read(ROUTES, &[], &[]).unwrap();
    let [one, two] = &loaded.config.compat.grip.routes[..] else { panic!("{loaded:?}") };
    assert_eq!((one.path.as_str(), one.origin.as_str()), ("/", "http://127.0.0.1:3000"));
    assert_eq!(one.key_bytes().as_deref(), Some(&b"secret"[..]));
    assert_eq!((two.path.as_str(), two.prefix.as_str(), two.key.is_empty()), ("/api", "api-", true));
    let text = [("WEIR__COMPAT__GRIP__ROUTES", r#"[{origin="http://a:1", path="/x"}]"#)];
    assert_eq!(read(ROUTES, &text, &[]).unwrap().config.compat.grip.routes[0].path, "/x");

    let wrong = "[[compat.grip.routes]]\npath = \"x\"\n[[compat.grip.routes]]\norigin = \"http://a/b\"\nkee = 1";
    let problems = read(wrong, &[], &[]).unwrap_err();
    for problem in [
        "compat.grip.routes[0].path: \"x\" is not a path",
        "compat.grip.routes[0]: has no `origin`",
        "compat.grip.routes[1].origin: \"http://a/b\" is not where a server is",
        "compat.grip.routes[1].kee: unknown key",
    ] {
        assert!(problems.contains(problem), "{problems}");
    }
}

#[test]
fn secrets_are_not_shown_and_what_is_shown_in_their_place_is_no_secret() {
    let loaded = read(ROUTES, &[], &[]).unwrap();
    let shown = loaded.config.to_toml(true, &loaded.sources);
    assert!(!shown.contains("c2VjcmV0") && !format!("{loaded:?}").contains("c2VjcmV0"), "{shown}");
    assert!(shown.contains("\n[[compat.grip.routes]]\npath = \"/\"\n"), "{shown}");
    let problems = read(&shown, &[], &[]).unwrap_err();
    assert!(problems.contains("compat.grip.routes[0].key: is what weir shows instead of the secret"), "{problems}");
}

#[test]
fn who_may_publish_from_elsewhere_has_a_key() {
    let open = format!("{ROUTES}\n[compat.grip]\npublish_listen = \"0.0.0.0:5561\"\nlisten = \"0.0.0.0:7999\"");
    let problems = read(&open, &[], &[]).unwrap_err();
    assert!(problems.contains("compat.grip.publish_listen: 0.0.0.0:5561 can be reached"), "{problems}");
    assert_eq!(problems.lines().count(), 1);
    let keyed = open.replace("prefix = \"api-\"", "key = \"k\"");
    assert!(read(&keyed, &[], &[]).is_ok());
    let twice = ROUTES.replace("/api", "/");
    assert!(read(&twice, &[], &[]).unwrap_err().contains("compat.grip.routes: / has two origins"));
    let bad = ROUTES.replace("c2VjcmV0", "c2Vjcm*");
    assert!(read(&bad, &[], &[]).unwrap_err().contains("the key of / is not valid base64"));
    let clash = format!("{ROUTES}\n[compat.grip]\nlisten = \"127.0.0.1:8000\"");
    assert!(read(&clash, &[], &[]).unwrap_err().contains("compat.grip.listen: 127.0.0.1:8000 is listed twice"));
}

#[test]
fn variables_of_an_original_count_where_it_is_alone() {
    const SECRET: (&str, &str) = ("API_SECRET", "s3cret");
    let ganomede = |more: &[(&str, &str)]| {
        let own = [SECRET, ("PORT", "9000"), ("POLL_TIMEOUT", "30000"), ("LOG_LEVEL", "WARN")];
        read("compat.enable = [\"ganomede\"]\nlog.level = \"debug\"", &[&own, more].concat(), &[])
    };
    let Loaded { config, sources } = ganomede(&[]).unwrap();
    assert_eq!(config.server.listen, ["127.0.0.1:9000".parse().unwrap()]);
    assert_eq!(config.compat.ganomede.secret.reveal(), "s3cret");
    assert_eq!(config.compat.ganomede.poll_timeout, seconds(30));
    assert_eq!(sources["server.listen"].to_string(), "PORT");
    assert_eq!(sources["compat.ganomede.secret"].to_string(), "API_SECRET");
    assert_eq!(sources["log.level"].to_string(), "LOG_LEVEL");
    let shown = config.to_toml(false, &sources);
    assert!(shown.contains("listen = [\"127.0.0.1:9000\"]  # PORT\n"), "{shown}");
    assert!(shown.contains("level = \"warn\"  # LOG_LEVEL\n") && !shown.contains("s3cret"), "{shown}");

    // weir's own variables and flags win.
    let flag = Override { flag: "--listen", key: "server.listen", value: "127.0.0.1:1".into() };
    let flagged = read("", &[SECRET, ("PORT", "9000"), ("WEIR__COMPAT__ENABLE", "ganomede")], &[flag]).unwrap();
    assert_eq!(flagged.config.server.listen, ["127.0.0.1:1".parse().unwrap()]);
    assert_eq!(
        ganomede(&[("WEIR__LOG__LEVEL", "trace")]).unwrap().sources["log.level"].to_string(),
        "WEIR__LOG__LEVEL"
    );

    // Whom weir serves is said in one place.
    let open = ganomede(&[("HOST", "0.0.0.0")]).unwrap_err();
    assert!(open.starts_with("HOST: server.listen: 0.0.0.0:9000 can be reached from other machines"), "{open}");
    let anybody = ganomede(&[("WEIR__AUTH__ALLOW_ANONYMOUS", "true")]).unwrap().config;
    assert_eq!(anybody.server.listen, ["0.0.0.0:9000".parse().unwrap()]);
    assert!(ganomede(&[("HOST", "localhost")]).is_ok());
    assert!(
        ganomede(&[("HOST", "example.com")])
            .unwrap_err()
            .starts_with("HOST: server.listen: \"example.com:9000\" is not")
    );
    let wrong = read("compat.enable = [\"ganomede\"]", &[("POLL_TIMEOUT", "soon")], &[]).unwrap_err();
    assert!(wrong.contains("POLL_TIMEOUT: compat.ganomede.poll_timeout:"), "{wrong}");
    assert!(wrong.contains("compat.ganomede.secret: is missing"), "{wrong}");

    let redis = ganomede(&[("REDIS_EVENTS_PORT_6379_TCP_ADDR", "db.example")]).unwrap();
    assert_eq!(
        (redis.config.bus.backend, redis.config.bus.redis.url.reveal()),
        (Backend::Redis, "redis://db.example:6379")
    );
    assert_eq!(redis.sources["bus.redis.url"].to_string(), "REDIS_EVENTS_PORT_6379_TCP_ADDR");

    let node_sse = [("PORT", "9090"), ("DEBUG_LOGS", "true")];
    let config = read("compat.enable = [\"node-sse\"]", &node_sse, &[]).unwrap().config;
    assert_eq!(config.server.listen, ["127.0.0.1:9090".parse().unwrap()]);
    assert_ne!(config.log.level, Level::info());
    let silent = read("compat.enable = [\"microstream\"]", &[("PORT", "3000"), ("LOG_LEVEL", "silent")], &[]).unwrap();
    assert!(silent.config.to_toml(false, &BTreeMap::new()).contains("level = \"off\""));

    // Two could not both mean it; and without an adapter nobody does.
    for enabled in ["[\"microstream\", \"node-sse\"]", "[]"] {
        let ignored = read(&format!("compat.enable = {enabled}"), &[("PORT", "9000")], &[]).unwrap();
        assert_eq!(ignored.config.server.listen, Config::default().server.listen);
    }
}

#[test]
fn routes_of_streams_take_nobody_s_paths() {
    let routes = |paths: &[&str]| {
        let tables: Vec<_> = paths
            .iter()
            .map(|path| format!("[[compat.sse.routes]]\npath = \"{path}\"\nchannels = [\"{{id}}\", \"all\"]\n"))
            .collect();
        read(&tables.join(""), &[], &[])
    };
    let loaded = routes(&["/api/events/{id}", "/api/rooms/{id}/events"]).unwrap();
    assert_eq!(loaded.config.compat.sse.routes[1].channels, ["{id}", "all"]);
    let shown = loaded.config.to_toml(false, &BTreeMap::new());
    assert_eq!(read(&shown, &[], &[]).unwrap().config, loaded.config);
    for (paths, reason) in [
        (&["/v1/{id}"][..], "compat.sse.routes: /v1/{id} would take /v1/*, which is weir's already"),
        (&["/{id}"], "/{id} would take /metrics, which is weir's already"),
        (&["/"], "/ would take /, which is weir's already"),
        (&["/a/{id}", "/a/b"], "/a/{id} and /a/b are both the path of some requests"),
        (&["/a{id}"], "a token is a whole segment"),
    ] {
        let problems = routes(paths).unwrap_err();
        assert!(problems.contains(reason), "{problems}");
    }
    let enabled = "compat.enable = [\"node-sse\"]\n[[compat.sse.routes]]\npath = \"/subscribe\"\nchannels = []";
    let problems = read(enabled, &[], &[]).unwrap_err();
    assert!(problems.contains("/subscribe would take /subscribe, which is node-sse already"), "{problems}");
    assert!(problems.contains("/subscribe streams no channels"), "{problems}");
}

#[test]
fn what_would_be_ignored_in_silence_is_refused() {
    let refused = |environment: &[(&str, &str)], file: &str| {
        let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        load::from(Some(("weir.toml".into(), Ok(file.into()))), environment, &[]).unwrap_err().to_string()
    };
    let island = refused(&[("WEIR__BUS__REDIS__URL", "redis://x")], "");
    assert!(island.starts_with("WEIR__BUS__REDIS__URL: bus.redis.url: is set, but bus.backend is memory"), "{island}");
    let routes = refused(&[], "[[compat.grip.routes]]\norigin = \"http://127.0.0.1:3000\"\n");
    assert!(routes.contains("compat.grip.routes: are set, but compat.enable does not contain grip"), "{routes}");
}
