//! The settings of adapters, and the environment variables of their originals.

use std::{collections::BTreeMap, time::Duration};

use weir::{
    compat::{
        event_stream::{self, SseRoute},
        ganomede,
        grip::{self, GripRoute},
    },
    config::{AdapterConfig, AdapterContext, Backend, Config, Loaded},
};

fn read(file: &str, environment: &[(&str, &str)]) -> Result<Loaded, String> {
    super::read(file, environment, &[])
}

// === ganomede ===

#[test]
fn variables_of_ganomede() {
    const SECRET: (&str, &str) = ("API_SECRET", "s3cret");
    let ganomede = |more: &[(&str, &str)]| {
        let own = [SECRET, ("PORT", "9000"), ("POLL_TIMEOUT", "30000"), ("LOG_LEVEL", "WARN")];
        read("compat.enable = [\"ganomede\"]\nlog.level = \"debug\"", &[&own, more].concat())
    };
    let Loaded { config, sources, .. } = ganomede(&[]).unwrap();
    assert_eq!(config.server.listen, ["127.0.0.1:9000".parse().unwrap()]);
    assert_eq!(config.compat.get::<ganomede::Config>().secret.reveal(), "s3cret");
    assert_eq!(config.compat.get::<ganomede::Config>().poll_timeout, Duration::from_secs(30));
    assert_eq!(sources["server.listen"].to_string(), "PORT");
    assert_eq!(sources["compat.ganomede.secret"].to_string(), "API_SECRET");
    assert_eq!(sources["log.level"].to_string(), "LOG_LEVEL");
    let shown = config.to_toml(false, &sources);
    assert!(shown.contains("listen = [\"127.0.0.1:9000\"]  # PORT\n"), "{shown}");
    assert!(shown.contains("level = \"warn\"  # LOG_LEVEL\n") && !shown.contains("s3cret"), "{shown}");

    // weir's own variables override those of the original.
    let own = [SECRET, ("PORT", "9000"), ("WEIR__COMPAT__ENABLE", "ganomede"), ("WEIR__SERVER__LISTEN", "127.0.0.1:1")];
    let flagged = read("", &own).unwrap();
    assert_eq!(flagged.config.server.listen, ["127.0.0.1:1".parse().unwrap()]);
    assert_eq!(
        ganomede(&[("WEIR__LOG__LEVEL", "trace")]).unwrap().sources["log.level"].to_string(),
        "WEIR__LOG__LEVEL"
    );

    // Only auth.allow_anonymous permits public addresses.
    let open = ganomede(&[("HOST", "0.0.0.0")]).unwrap_err();
    assert!(open.starts_with("HOST: server.listen: 0.0.0.0:9000 can be reached from other machines"), "{open}");
    let allowed = ganomede(&[("WEIR__AUTH__ALLOW_ANONYMOUS", "true")]).unwrap().config;
    assert_eq!(allowed.server.listen, ["0.0.0.0:9000".parse().unwrap()]);
    assert!(ganomede(&[("HOST", "localhost")]).is_ok());
    assert!(
        ganomede(&[("HOST", "example.com")])
            .unwrap_err()
            .starts_with("HOST: server.listen: \"example.com:9000\" is not")
    );
    let wrong = read("compat.enable = [\"ganomede\"]", &[("POLL_TIMEOUT", "soon")]).unwrap_err();
    assert!(wrong.contains("POLL_TIMEOUT: compat.ganomede.poll_timeout:"), "{wrong}");
    assert!(wrong.contains("compat.ganomede.secret: is missing"), "{wrong}");

    let redis = ganomede(&[("REDIS_EVENTS_PORT_6379_TCP_ADDR", "db.example")]).unwrap();
    assert_eq!(
        (redis.config.bus.backend, redis.config.bus.redis.url.reveal()),
        (Backend::Redis, "redis://db.example:6379")
    );
    assert_eq!(redis.sources["bus.redis.url"].to_string(), "REDIS_EVENTS_PORT_6379_TCP_ADDR");
}

// === event_stream ===

#[test]
fn routes_must_not_overlap_other_paths() {
    let routes = |paths: &[&str]| {
        let tables: Vec<_> = paths
            .iter()
            .map(|path| format!("[[compat.sse.routes]]\npath = \"{path}\"\nchannels = [\"{{id}}\", \"all\"]\n"))
            .collect();
        read(&tables.join(""), &[])
    };
    let loaded = routes(&["/api/events/{id}", "/api/rooms/{id}/events"]).unwrap();
    assert_eq!(loaded.config.compat.get::<event_stream::Config>().routes[1].channels, ["{id}", "all"]);
    let shown = loaded.config.to_toml(false, &BTreeMap::new());
    assert_eq!(read(&shown, &[]).unwrap().config, loaded.config);
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
    let routes = vec![SseRoute { path: "/subscribe".into(), channels: Vec::new() }];
    let context = AdapterContext { enabled: true, allow_anonymous: false, paths: vec![("/subscribe", "another")] };
    let [(key, problems)] = &event_stream::Config { routes }.contradictions(&context)[..] else { panic!() };
    assert_eq!(*key, "compat.sse.routes");
    assert!(problems.contains("/subscribe would take /subscribe, which is another already"), "{problems}");
    assert!(problems.contains("/subscribe streams no channels"), "{problems}");
}

// === grip ===

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

fn routes(config: &Config) -> Vec<GripRoute> {
    config.compat.get::<grip::Config>().routes
}

#[test]
fn routes_have_their_own_keys() {
    let loaded = read(ROUTES, &[]).unwrap();
    let [one, two] = &routes(&loaded.config)[..] else { panic!("{loaded:?}") };
    assert_eq!((one.path.as_str(), one.origin.as_str()), ("/", "http://127.0.0.1:3000"));
    assert_eq!(one.key_bytes().as_deref(), Some(&b"secret"[..]));
    assert_eq!((two.path.as_str(), two.prefix.as_str(), two.key.is_empty()), ("/api", "api-", true));
    let text = [("WEIR__COMPAT__GRIP__ROUTES", r#"[{origin="http://a:1", path="/x"}]"#)];
    assert_eq!(routes(&read(ROUTES, &text).unwrap().config)[0].path, "/x");

    let wrong = "[[compat.grip.routes]]\npath = \"x\"\n[[compat.grip.routes]]\norigin = \"http://a/b\"\nkee = 1";
    let problems = read(wrong, &[]).unwrap_err();
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
fn keys_are_not_printed_and_their_placeholder_is_rejected() {
    let loaded = read(ROUTES, &[]).unwrap();
    let shown = loaded.config.to_toml(true, &loaded.sources);
    assert!(!shown.contains("c2VjcmV0") && !format!("{loaded:?}").contains("c2VjcmV0"), "{shown}");
    assert!(shown.contains("\n[[compat.grip.routes]]\npath = \"/\"\n"), "{shown}");
    let problems = read(&shown, &[]).unwrap_err();
    assert!(problems.contains("compat.grip.routes[0].key: is what weir shows instead of the secret"), "{problems}");
}

#[test]
fn a_public_publish_address_requires_keys() {
    let open = format!("{ROUTES}\n[compat.grip]\npublish_listen = \"0.0.0.0:5561\"\nlisten = \"0.0.0.0:7999\"");
    let problems = read(&open, &[]).unwrap_err();
    assert!(problems.contains("compat.grip.publish_listen: 0.0.0.0:5561 can be reached"), "{problems}");
    assert_eq!(problems.lines().count(), 1);
    let keyed = open.replace("prefix = \"api-\"", "key = \"k\"");
    assert!(read(&keyed, &[]).is_ok());
    let twice = ROUTES.replace("/api", "/");
    assert!(read(&twice, &[]).unwrap_err().contains("compat.grip.routes: / has two origins"));
    let bad = ROUTES.replace("c2VjcmV0", "c2Vjcm*");
    assert!(read(&bad, &[]).unwrap_err().contains("the key of / is not valid base64"));
    let clash = format!("{ROUTES}\n[compat.grip]\nlisten = \"127.0.0.1:8000\"");
    assert!(read(&clash, &[]).unwrap_err().contains("compat.grip.listen: 127.0.0.1:8000 is listed twice"));
}

#[test]
fn routes_of_a_disabled_adapter_are_rejected() {
    let problems = read("[[compat.grip.routes]]\norigin = \"http://127.0.0.1:3000\"\n", &[]).unwrap_err();
    assert!(problems.contains("compat.grip.routes: are set, but compat.enable does not contain grip"), "{problems}");
}

// === node_sse ===

#[test]
fn variables_of_node_sse() {
    let variables = [("PORT", "9090"), ("DEBUG_LOGS", "true")];
    let config = read("compat.enable = [\"node-sse\"]", &variables).unwrap().config;
    assert_eq!(config.server.listen, ["127.0.0.1:9090".parse().unwrap()]);
    assert_ne!(config.log.level, Config::default().log.level);
}

// === microstream ===

#[test]
fn variables_of_microstream() {
    let variables = [("PORT", "3000"), ("LOG_LEVEL", "silent")];
    let config = read("compat.enable = [\"microstream\"]", &variables).unwrap().config;
    assert_eq!(config.server.listen, ["127.0.0.1:3000".parse().unwrap()]);
    assert!(config.to_toml(false, &BTreeMap::new()).contains("level = \"off\""));
}
