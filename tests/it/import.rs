//! `weir import ganomede` from one real Redis to another, read by ganomede's clients afterwards.

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use weir::{
    compat::ganomede,
    config::{ChannelRule, Keep},
};

use crate::support::{
    RedisServer, Starter,
    command::{Finished, finish, weir_command},
    weir_on,
};

/// The age of the first event, in ms: older than the import holds back, younger than the retention.
const BEFORE: u64 = 2 * 3_600_000;

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// The Redis of a ganomede-events service, in the format of the original.
struct Source {
    server: RedisServer,
    connection: ::redis::Connection,
    began: u64,
}

impl Source {
    async fn start() -> Self {
        let server = RedisServer::start(&["--enable-debug-command", "yes"]).await;
        let connection = ::redis::Client::open(server.url()).unwrap().get_connection().unwrap();
        Source { server, connection, began: now() - BEFORE }
    }

    fn set(&mut self, key: &str, value: impl ToString) {
        ::redis::cmd("SET").arg(key).arg(value.to_string()).exec(&mut self.connection).unwrap();
    }

    fn event(&self, id: u64) -> Value {
        json!({"id": id, "timestamp": self.began + id * 10, "type": "add", "from": "users/v1", "data": {"n": id, "name": format!("n{id}")}})
    }

    fn put(&mut self, channel: &str, event: &Value) {
        let (id, key) = (event["id"].as_u64().unwrap(), format!("{channel}:{}", event["id"]));
        let mut pipe = ::redis::pipe();
        pipe.cmd("SET").arg(&key).arg(event.to_string()).cmd("ZADD").arg(format!("{channel}:keys")).arg(id).arg(key);
        pipe.exec(&mut self.connection).unwrap();
    }

    fn put_many(&mut self, channel: &str, ids: impl Iterator<Item = u64>) {
        for id in ids {
            self.put(channel, &self.event(id));
        }
    }

    async fn digest(&self) -> String {
        self.server.cli(&["DEBUG", "DIGEST"]).await
    }
}

/// The import as a command.
fn command(from: &str, to: &str, args: &[&str]) -> Command {
    let mut command = weir_command();
    command.env("WEIR__BUS__BACKEND", "redis").env("WEIR__BUS__REDIS__URL", to);
    command.args(["import", "ganomede", "--from", from]).args(args);
    command
}

async fn import(from: &str, to: &str, args: &[&str]) -> Finished {
    finish(command(from, to, args)).await
}

/// A node on that Redis with the adapter for ganomede.
fn on(redis: &RedisServer) -> Starter {
    weir_on(&redis.url()).with(|config| {
        config.compat.enable = vec!["ganomede"];
        config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
        config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = std::time::Duration::ZERO;
    })
}

#[tokio::test]
async fn events_cursors_and_indices_are_imported() {
    let (mut source, target) = (Source::start().await, RedisServer::start(&[]).await);
    source.put_many("users/v1", 1..=40);
    source.set("indices:users/v1", 41);
    // Ids without event: before the first, in between, and of a channel that has lost all events.
    source.put_many("a:b", [3, 4, 7].into_iter());
    source.set("indices:a:b", 7);
    source.set("indices:gone", 50);
    source.put("odd", &json!({"id": 1, "timestamp": source.began, "type": "t", "from": "f"}));
    source.put(
        "odd",
        &json!({"id": 2, "timestamp": source.began - 5, "type": "t", "from": "f", "data": ["ü", {"x": 1.50}]}),
    );
    source.set("last-fetched:mailer:users/v1", 30);
    source.set("last-fetched:shop/v1:a:b", 4);
    source.set("last-fetched:ahead:a:b", 99);
    source.set("last-fetched:y:gone", 50);
    source.set("last-fetched:y:nowhere", 5);
    source.set("indices:by-name", json!({"id": "by-name", "channel": "users/v1", "field": "data.name"}));
    // Keys of other applications are ignored.
    source.set("other:keys", "text");
    ::redis::cmd("ZADD").arg("shop:keys").arg(1).arg("door").exec(&mut source.connection).unwrap();
    // A read-only user and the digest of all data show that the import does not write to its source.
    let rules = ["ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+@connection"];
    assert_eq!(source.server.cli(&rules).await, "OK");
    let before = source.digest().await;
    let from = format!("redis://reader:pw@{}", source.server.address());

    let plan = import(&from, &target.url(), &["--dry-run"]).await.ok();
    assert_eq!(plan[0], json!({"channel": "a:b", "events": 3, "void": 4, "top": 7}));
    assert_eq!(target.cli(&["KEYS", "weir:{a:b}*"]).await, "", "a dry run writes nothing");
    let lines = import(&from, &target.url(), &[]).await.ok();
    assert_eq!(lines[..4], plan, "the import does what the dry run listed");
    assert_eq!(lines[0], json!({"channel": "a:b", "events": 3, "void": 4, "top": 7}));
    assert_eq!(lines[1], json!({"channel": "gone", "events": 0, "void": 50, "top": 50}));
    assert_eq!(lines[2], json!({"channel": "odd", "events": 2, "void": 0, "top": 2}));
    assert_eq!(lines[3], json!({"channel": "users/v1", "events": 40, "void": 0, "top": 40}));
    assert_eq!(lines[4], json!({"cursors": 4, "indices": 1, "cursors_without_channel": 1}));
    let plan = import(&from, &target.url(), &["--dry-run"]).await.ok();
    assert_eq!(
        plan[0],
        json!({"channel": "a:b", "events": 0, "void": 0, "top": 7}),
        "the second import has nothing to do"
    );
    assert_eq!(source.digest().await, before);

    let weir = on(&target).await;
    let get = async |path: &str| {
        let path = format!("/events/v1/{path}{}secret=s", if path.contains('?') { '&' } else { '?' });
        weir.get(path).await.expect(200).json()
    };
    let all: Vec<Value> = (1..=40).map(|id| source.event(id)).collect();
    assert_eq!(get("events?clientId=new&channel=users/v1").await, json!(all));
    assert_eq!(get("events?clientId=mailer&channel=users/v1").await, json!(all[30..]));
    let ab = [source.event(3), source.event(4), source.event(7)];
    assert_eq!(get("events?clientId=new&channel=a:b").await, json!(ab));
    assert_eq!(get("events?clientId=shop/v1&channel=a:b").await, json!(ab[2..]));
    assert_eq!(get("events?clientId=ahead&channel=a:b").await, json!([]));
    assert_eq!(get("latest?channel=a:b&limit=2").await, json!(ab[1..]));
    assert_eq!(get("indices/by-name/n7").await["rows"], json!([all[6]]));
    // A timestamp before that of the preceding event is raised to it.
    let odd = get("events?clientId=new&channel=odd").await;
    assert_eq!((&odd[1]["timestamp"], &odd[1]["data"]), (&json!(source.began), &json!(["ü", {"x": 1.50}])));
    // New events continue the ids.
    for (channel, id) in [("users/v1", 41), ("a:b", 8), ("gone", 51)] {
        let emit = json!({"secret": "s", "clientId": "c", "channel": channel, "from": "f", "type": "t"});
        assert_eq!(
            weir.request("POST", "/events/v1/events")
                .header("content-type", "application/json")
                .body(emit.to_string())
                .await
                .expect(200)
                .json()["id"],
            id
        );
    }
    // The native API reads missing ids as events without data, and ids before the first as a gap.
    let read = weir.get("/v1/events?channel=a:b&after=0").await.expect(200).json();
    let kinds: Vec<_> = read["events"].as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(json!(kinds), json!(["add", "add", "weir.void", "weir.void", "add", "t"]));
    assert_eq!(read["gaps"][0]["missed"], 2, "{read}");

    // A second import into channels to which weir has published since adds new events of the other channels.
    source.put_many("odd", [3].into_iter());
    let lines = import(&from, &target.url(), &[]).await.ok();
    assert_eq!(lines[2], json!({"channel": "odd", "events": 1, "void": 0, "top": 3}));
    assert_eq!(lines[3], json!({"channel": "users/v1", "events": 0, "void": 0, "top": 41}));
    // A cursor is not moved back.
    get("events?clientId=mailer&channel=users/v1&after=40").await;
    import(&from, &target.url(), &[]).await.ok();
    assert_eq!(get("events?clientId=mailer&channel=users/v1").await[0]["id"], 41);
    // Events that both sides have added under the same id are a conflict.
    source.put_many("users/v1", [41].into_iter());
    let twice = import(&from, &target.url(), &[]).await;
    twice.fails(3, "users/v1: weir has events of its own");
    assert!(twice.lines.is_empty());
}

#[tokio::test]
async fn an_import_continues_after_a_kill_at_any_point() {
    let (mut source, target) = (Source::start().await, RedisServer::start(&[]).await);
    source.put_many("one", (1..=900).filter(|id| id % 100 != 0));
    source.put_many("two", 200..=900);
    source.set("last-fetched:c:one", 450);
    let length =
        async |channel: &str| -> u64 { target.cli(&["XLEN", &format!("weir:{{{channel}}}:s")]).await.parse().unwrap() };
    for (channel, point) in [("one", 1), ("one", 333), ("one", 700), ("two", 150), ("two", 500)] {
        let mut child = command(&source.server.url(), &target.url(), &[])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // An import that ends first is one of the points, too.
        while length(channel).await < point && child.try_wait().unwrap().is_none() {}
        child.kill().unwrap();
        child.wait().unwrap();
    }
    import(&source.server.url(), &target.url(), &[]).await.ok();
    let weir = on(&target).await;
    for (channel, first) in [("one", 1), ("two", 200)] {
        let mut after = 0;
        let mut seen: Vec<Value> = Vec::new();
        loop {
            let path = format!("/events/v1/events?clientId=x&channel={channel}&after={after}&secret=s&limit=1000");
            let page = weir.get(path).await.expect(200).json();
            let Some(last) = page.as_array().unwrap().last() else { break };
            after = last["id"].as_u64().unwrap();
            seen.extend(page.as_array().unwrap().iter().cloned());
        }
        let expected: Vec<Value> =
            (first..=900).filter(|id| channel == "two" || id % 100 != 0).map(|id| source.event(id)).collect();
        assert_eq!(seen, expected);
    }
    let next = weir.get("/events/v1/events?clientId=c&channel=one&limit=1&secret=s").await.expect(200).json();
    assert_eq!(next[0]["id"], 451);
}

#[tokio::test]
async fn an_import_that_would_lose_or_mix_events_is_rejected() {
    let (mut source, target) = (Source::start().await, RedisServer::start(&[]).await);
    source.put_many("a", 1..=30);
    source.put_many("b", 1..=3);
    let (from, to) = (source.server.url(), target.url());
    let mut memory = command(&from, &to, &[]);
    memory.env_remove("WEIR__BUS__BACKEND");
    finish(memory).await.fails(2, "bus.backend is memory");
    import("redis+sentinel://x/y", &to, &[]).await.fails(2, "one Redis");
    import("redis://127.0.0.1:1", &to, &[]).await.fails(4, "the source");
    import(&from, "redis://127.0.0.1:1", &[]).await.fails(4, "Redis cannot be reached");

    // Retention rules that would trim imported events.
    let dir = tempdir();
    for (keep, reason) in [
        ("count = 10", "of 30 events 10 would be kept"),
        ("age = \"60m\"", "keep.age"),
        ("bytes = 4000", "more than the 4000 bytes"),
    ] {
        let file = format!("{dir}/weir.toml");
        std::fs::write(&file, format!("channels = [{{ match = \"a\", keep = {{ {keep} }} }}]")).unwrap();
        import(&from, &to, &["--config", &file]).await.fails(3, reason);
        assert_eq!(target.cli(&["EXISTS", "weir:{a}:m", "weir:{b}:m"]).await, "0", "nothing was written");
    }
    std::fs::write(format!("{dir}/weir.toml"), "channels = [{ match = \"a\", keep = { count = 10 } }]").unwrap();
    // The stored retention of the earlier imports stays in effect for a minute.
    target.cli(&["DEL", "weir:{keep}"]).await;
    import(&from, &to, &["--config", &format!("{dir}/weir.toml"), "--allow-trim"]).await.ok();
    let few = Keep { count: 10, ..Keep::default() };
    let weir = on(&target).with(|config| config.channels = vec![ChannelRule { pattern: "a".into(), keep: few }]).await;
    let kept = weir.get("/events/v1/events?clientId=x&channel=a&secret=s").await.expect(200).json();
    assert_eq!((kept.as_array().unwrap().len(), &kept[9]["id"]), (10, &json!(30)));

    // If weir has events of its own in a channel, no channel is imported.
    let other = RedisServer::start(&[]).await;
    let second = on(&other).await;
    second.publish("b", "1").await;
    let done = import(&from, &other.url(), &[]).await;
    done.fails(3, "b: weir has events of its own");
    assert_eq!(other.cli(&["EXISTS", "weir:{a}:m"]).await, "0");
}

#[tokio::test]
async fn data_that_cannot_be_imported_is_named() {
    let (mut source, target) = (Source::start().await, RedisServer::start(&[]).await);
    source.put("a", &json!({"id": 1, "timestamp": source.began, "type": "weir.x", "from": "f"}));
    source.put("a", &json!({"id": 2, "timestamp": source.began, "type": "t", "from": "f"}));
    source.put("a", &json!({"id": 3, "type": "t"}));
    source.put("$mine", &json!({"id": 1, "timestamp": source.began, "type": "t", "from": "f"}));
    source.set(&format!("last-fetched:{}:a", "x".repeat(200)), 1);
    let done = import(&source.server.url(), &target.url(), &[]).await;
    for reason in [
        "channel a: event 1: types beginning with weir.",
        "channel a: event 3: unreadable",
        "channel \"$mine\"",
        "too long",
    ] {
        done.fails(1, reason);
    }
    assert_eq!(done.lines[0]["events"], 1);
    // A second run is accepted.
    import(&source.server.url(), &target.url(), &[]).await.fails(1, "event");
    let weir = on(&target).await;
    let seen = weir.get("/events/v1/events?clientId=x&channel=a&secret=s").await.expect(200).json();
    assert_eq!(seen, json!([{"id": 2, "timestamp": source.began, "type": "t", "from": "f"}]));
}

/// While ganomede runs, an event may still be missing that has a smaller id than one that exists.
#[tokio::test]
async fn recent_missing_events_are_left_for_a_second_run() {
    let (mut source, target) = (Source::start().await, RedisServer::start(&[]).await);
    let now = now();
    let at = |id: u64| json!({"id": id, "timestamp": now + 3_600_000, "type": "t", "from": "f"});
    source.put("a", &at(1));
    source.put("a", &at(3));
    let done = import(&source.server.url(), &target.url(), &[]).await;
    assert!(done.notes.contains("left for a second run"), "{}", done.notes);
    assert_eq!(done.ok()[0], json!({"channel": "a", "events": 1, "void": 0, "top": 1, "held_back": 2}));
    source.put("a", &at(2));
    let done = import(&source.server.url(), &target.url(), &[]).await.ok();
    assert_eq!(done[0], json!({"channel": "a", "events": 2, "void": 0, "top": 3}));
}

fn tempdir() -> String {
    let dir = std::env::temp_dir().join(format!("weir-import-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir.display().to_string()
}
