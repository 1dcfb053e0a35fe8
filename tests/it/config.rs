//! Settings: their sources, their errors, and `config.toml`.

mod adapters;

use std::{collections::BTreeMap, path::Path, time::Duration};

use weir::{
    compat,
    config::{
        AdapterConfig, COMMAND_VARIABLES, ChannelRule, CompatSection, Config, ConfigItem, Keep, Loaded,
        OriginalVariables, Override, Section, Source, load,
    },
};

fn read(file: &str, environment: &[(&str, &str)], flags: &[Override]) -> Result<Loaded, String> {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let file = Some(("weir.toml".into(), Ok(file.into())));
    weir::config::read(&compat::default_config(), file, environment, flags).map_err(|problems| problems.to_string())
}

fn file() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config.toml")
}

const HEAD: &str = "\
# All settings of weir with their defaults. A configuration file (weir --config FILE, or WEIR_CONFIG) needs only the settings
# that it changes. Environment variables override the file (WEIR__SSE__HEARTBEAT=15s; lists separated by commas), and flags
# override both. An unknown key is an error, and so is an unknown variable that begins with WEIR_. Durations have a unit
# (500ms, 5s, 2m, 1h, 30d); sizes are in bytes or have a unit (512KiB, 16MiB, 8MB). `weir config check` validates a
# configuration. Generated from the sections in src/ by `UPDATE=1 cargo test config`.

";

#[test]
fn config_toml_is_generated() {
    let expected = HEAD.to_owned() + &compat::default_config().to_toml(true, &BTreeMap::new());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file(), &expected).unwrap();
    }
    let text = std::fs::read_to_string(file()).unwrap();
    assert!(text == expected, "config.toml is out of date: UPDATE=1 cargo test config");
    let loaded = read(&text, &[], &[]).unwrap();
    assert_eq!(loaded.config, compat::default_config());
    let mut config = compat::default_config();
    let mut items = Vec::new();
    config.items("", &mut items);
    for item in items {
        let (key, doc) = match &item {
            ConfigItem::Section { key, doc } => (key, *doc),
            ConfigItem::Setting(setting) => (&setting.key, &*setting.doc),
        };
        assert!(!doc.trim().is_empty(), "{key} is not explained");
        if let ConfigItem::Setting(setting) = &item {
            assert!(loaded.sources.contains_key(&setting.key), "{key} is not in config.toml");
        }
    }
}

#[test]
fn flags_override_the_environment_which_overrides_the_file() {
    let text = "sse.heartbeat = \"15s\"\n[ws]\nping = \"10s\"\n[server]\nlisten = \"127.0.0.1:1, [::1]:2\"\n";
    let flag = Override { flag: "--listen", key: "server.listen", value: "127.0.0.1:9".into() };
    let only_file = read(text, &[], &[]).unwrap().config;
    assert_eq!(only_file.server.listen, ["127.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()]);
    let environment = [("WEIR__SSE__HEARTBEAT", "16s"), ("WEIR__SERVER__LISTEN", "127.0.0.1:5"), ("WEIR_URL", "x")];
    let loaded = read(text, &environment, &[flag]).unwrap();
    assert_eq!(loaded.config.sse.heartbeat, Duration::from_secs(16));
    assert_eq!(loaded.config.ws.ping, Duration::from_secs(10));
    assert_eq!(loaded.config.server.listen, ["127.0.0.1:9".parse().unwrap()]);
    assert_eq!(loaded.sources["server.listen"], Source::Flag("--listen"));
    assert_eq!(loaded.sources["ws.ping"].to_string(), "weir.toml");
    assert_eq!(loaded.sources["sse.heartbeat"].to_string(), "WEIR__SSE__HEARTBEAT");
}

#[test]
fn all_errors_are_reported_at_once() {
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
WEIR__PLUGINS__URL: unknown variable; did you mean WEIR__BUS__REDIS__URL?
WEIR__HEARTBEAT: unknown variable; did you mean WEIR__SSE__HEARTBEAT?
WEIR__LOG__LEVEL: log.level: "louder" is no level: write one of error, warn, info, debug, trace, off, or by target as "info,weir::rpc=debug""#
        .lines()
        .collect();
    let mut lines: Vec<&str> = problems.lines().collect();
    expected.sort_unstable();
    lines.sort_unstable();
    assert_eq!(lines, expected);
}

#[test]
fn an_unknown_variable_is_an_error_with_the_right_name() {
    for (mistaken, right) in [
        ("WEIR_LISTEN", "WEIR__SERVER__LISTEN"),
        ("WEIR_PORT", "WEIR__SERVER__LISTEN"),
        ("WEIR_LISTEN_ADDR", "WEIR__SERVER__LISTEN"),
        ("WEIR_ADMIN_LISTEN", "WEIR__ADMIN__LISTEN"),
        ("WEIR_ADMIN_PORT", "WEIR__ADMIN__LISTEN"),
        ("WEIR_SSE_HEARTBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR___SSE__HEARTBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE___HEARTBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE_HEARTBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE__HEARTBEAT__", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE__HEARTBEAT__SECONDS", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE__HEARBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__WS__HEARTBEAT", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__SSE", "WEIR__SSE__HEARTBEAT"),
        ("weir__sse__heartbeat", "WEIR__SSE__HEARTBEAT"),
        ("Weir_Sse_Heartbeat", "WEIR__SSE__HEARTBEAT"),
        ("WEIR__sse__heartbeat", "WEIR__SSE__HEARTBEAT"),
        ("WEIR_REDIS_URL", "WEIR__BUS__REDIS__URL"),
        ("WEIR_REDIS", "WEIR__BUS__REDIS__URL"),
        ("WEIR_LOG", "WEIR__LOG__LEVEL"),
        ("WEIR_LOG_LEVEL", "WEIR__LOG__LEVEL"),
        ("WEIR_COMPAT", "WEIR__COMPAT__ENABLE"),
        ("WEIR_CHANNELS", "WEIR__CHANNELS"),
        ("WEIR__CHANNELS__0__MATCH", "WEIR__CHANNELS"),
        ("WEIR_ALLOW_ANONYMOUS", "WEIR__AUTH__ALLOW_ANONYMOUS"),
        ("WEIR_CONF", "WEIR_CONFIG"),
        ("weir_url", "WEIR_URL"),
    ] {
        let expected = format!("{mistaken}: unknown variable; did you mean {right}?");
        assert_eq!(read("", &[(mistaken, "1")], &[]).unwrap_err(), expected);
    }
    for none in ["WEIR_", "WEIR__", "WEIR_FROBNICATE"] {
        assert!(read("", &[(none, "1")], &[]).unwrap_err().starts_with(&format!("{none}: unknown variable")), "{none}");
    }
    // Not weir's.
    read("", &[("WEIRD_LISTEN", "1"), ("MY_WEIR_LISTEN", "1"), ("WEIR", "1")], &[]).unwrap();
    read("", &COMMAND_VARIABLES.map(|name| (name, "1")), &[]).unwrap();
}

#[test]
fn the_variables_that_kubernetes_sets_for_a_service_are_ignored() {
    let links = [
        ("WEIR_SERVICE_HOST", "10.96.0.7"),
        ("WEIR_SERVICE_PORT", "8000"),
        ("WEIR_SERVICE_PORT_HTTP", "8000"),
        ("WEIR_PORT", "tcp://10.96.0.7:8000"),
        ("WEIR_PORT_8000_TCP", "tcp://10.96.0.7:8000"),
        ("WEIR_PORT_8000_TCP_PROTO", "tcp"),
        ("WEIR_PORT_8000_TCP_PORT", "8000"),
        ("WEIR_PORT_8000_TCP_ADDR", "10.96.0.7"),
        ("WEIR_PORT_53_UDP_ADDR", "10.96.0.7"),
        ("WEIR_ADMIN_SERVICE_HOST", "10.96.0.8"),
        ("WEIR_ADMIN_SERVICE_PORT_METRICS", "9000"),
        ("WEIR_ADMIN_PORT", "tcp://10.96.0.8:9000"),
        ("WEIR_ADMIN_PORT_9000_TCP_ADDR", "10.96.0.8"),
    ];
    let loaded = read("", &links, &[]).unwrap();
    assert_eq!(loaded.config, compat::default_config());
    assert_eq!(loaded.service_links, links.map(|(name, _)| name));
    for mistaken in [("WEIR_PORT", "8000"), ("WEIR_ADMIN_PORT", "9000"), ("WEIR_PORT_TCP", "8000")] {
        assert!(read("", &[mistaken], &[]).is_err(), "{mistaken:?}");
    }
}

#[test]
fn an_invalid_or_missing_file_is_named() {
    let problems = read("[sse]\nheartbeat = \n[ws]\nping = \"1s\"\n", &[], &[]).unwrap_err();
    assert!(problems.starts_with("weir.toml: "), "{problems}");
    let missing = load(&Config::default(), Some(Path::new("/no/such/weir.toml")), [], &[]).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/weir.toml: cannot be read: "), "{missing}");
}

#[test]
fn a_public_address_requires_allow_anonymous() {
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
fn channel_rules_keep_their_order_and_omitted_values_are_defaults() {
    let text = "[[channels]]\nmatch = \"live/*\"\nkeep.count = 5\n[[channels]]\nmatch = \"*\"\n[channels.keep]\nbytes = \"1MiB\"";
    let rules = read(text, &[], &[]).unwrap().config.channels;
    assert_eq!(rules[0], ChannelRule { pattern: "live/*".into(), keep: Keep { count: 5, ..Keep::default() } });
    assert_eq!(rules[1].keep, Keep { bytes: 1 << 20, ..Keep::default() });
    let from_text = [("WEIR__CHANNELS", r#"[{match="live/*", keep.count=5}]"#)];
    assert_eq!(read(text, &from_text, &[]).unwrap().config.channels, rules[..1]);
    let wrong = [("WEIR__CHANNELS", "live/*")];
    assert!(read(text, &wrong, &[]).unwrap_err().starts_with("WEIR__CHANNELS: channels: "));
}

#[test]
fn printed_toml_loads_as_the_same_configuration() {
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
fn the_largest_event_fits_a_chunk_of_a_stream() {
    let with =
        |event| read(&format!("limits = {{ event = \"{event}\", frame = \"6MiB\", queued = \"8MiB\" }}"), &[], &[]);
    assert!(with("4MiB").is_ok());
    assert!(with("5MiB").unwrap_err().contains("limits.event: must be at most 4MiB"));
}

#[test]
fn settings_that_would_have_no_effect_are_rejected() {
    let rejected = read("", &[("WEIR__BUS__REDIS__URL", "redis://x")], &[]).unwrap_err();
    assert!(
        rejected.starts_with("WEIR__BUS__REDIS__URL: bus.redis.url: is set, but bus.backend is memory"),
        "{rejected}"
    );
}

#[derive(Clone, Debug, PartialEq)]
struct FakeAdapter(&'static str);

impl Section for FakeAdapter {
    fn doc(&self) -> &'static str {
        ""
    }

    fn items<'a>(&'a mut self, _at: &str, _items: &mut Vec<ConfigItem<'a>>) {}
}

impl AdapterConfig for FakeAdapter {
    fn name(&self) -> &'static str {
        self.0
    }

    fn read_original(&self, variables: &mut OriginalVariables<'_>) {
        variables.set_listen(None);
        variables.set_log_level();
    }
}

#[test]
fn variables_of_an_original_apply_if_it_is_alone() {
    let adapters = ["one", "two"].map(|name| Box::new(FakeAdapter(name)) as Box<dyn AdapterConfig>);
    let defaults = Config { compat: CompatSection::new(adapters), ..Config::default() };
    let environment = [("PORT", "3000"), ("LOG_LEVEL", "silent")].map(|(name, value)| (name.into(), value.into()));
    for (enabled, applies) in [("[\"one\"]", true), ("[\"one\", \"two\"]", false), ("[]", false)] {
        let file = Some(("weir.toml".into(), Ok(format!("compat.enable = {enabled}"))));
        let config = weir::config::read(&defaults, file, environment.clone(), &[]).unwrap().config;
        let port = config.server.listen[0].port();
        let off = config.to_toml(false, &BTreeMap::new()).contains("level = \"off\"");
        assert_eq!((port, off), if applies { (3000, true) } else { (8000, false) }, "{enabled}");
    }
    // Flags override the variables of the original.
    let flag = Override { flag: "--listen", key: "server.listen", value: "127.0.0.1:1".into() };
    let file = Some(("weir.toml".into(), Ok("compat.enable = [\"one\"]".into())));
    let flagged = weir::config::read(&defaults, file, environment, &[flag]).unwrap().config;
    assert_eq!(flagged.server.listen[0].port(), 1);
}
