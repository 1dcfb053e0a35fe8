//! `GET /metrics`, and the page that documents it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::support::{RedisServer, Socket, Weir, weir, weir_on};

/// Kind and labels of each metric.
type Inventory = BTreeMap<String, (String, BTreeSet<String>)>;

async fn scrape(weir: &Weir) -> String {
    weir.get("/metrics").await.expect(200).text().to_owned()
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

fn served(text: &str) -> Inventory {
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let mut all: Inventory = kinds.map(|(name, kind)| (name.to_owned(), (kind.to_owned(), BTreeSet::new()))).collect();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let series = line.rsplit_once(' ').unwrap().0;
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let name = base.filter(|base| all.contains_key(*base)).unwrap_or(name);
        let (_, known) = all.get_mut(name).unwrap_or_else(|| panic!("{name} has no type"));
        for label in labels.trim_end_matches('}').split("\",").filter_map(|label| Some(label.split_once('=')?.0)) {
            if label != "le" {
                known.insert(label.to_owned());
            }
        }
    }
    all
}

/// The rows of the page: `name{label,…}`, kind, meaning.
fn documented() -> Inventory {
    let page = std::fs::read_to_string("proto-docs/metrics.md").unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let rows = rows.filter(|(metric, _)| metric.starts_with("weir_") || metric.starts_with("process_"));
    rows.map(|(metric, rest)| {
        let (name, labels) = metric.split_once('{').unwrap_or((metric, ""));
        let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
        let (kind, meaning) = rest.split_once(" | ").unwrap();
        assert!(meaning.trim_end_matches(" |").len() > 10, "{name} has no meaning");
        (name.to_owned(), (kind.to_owned(), labels.map(str::to_owned).collect()))
    })
    .collect()
}

#[tokio::test]
async fn every_metric_is_documented_and_every_documented_metric_is_served() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    assert_eq!(served(&scrape(&node).await), documented());
    // Without Redis there are no metrics about it.
    let alone = weir().await;
    let mut expected = documented();
    expected.retain(|name, _| !name.starts_with("weir_redis_"));
    assert_eq!(served(&scrape(&alone).await), expected);
}

#[tokio::test]
async fn every_call_is_in_the_histogram() {
    let weir = weir().await;
    let (mut caller, mut provider) = (weir.socket().await, Socket::open(weir.address).await);
    provider.provide("echo").await;
    let served = async {
        for _ in 0..500 {
            let request = provider.next_request().await;
            provider.reply(&request, json!(1)).await;
        }
    };
    let called = async {
        for n in 0..500 {
            caller.feed(json!({ "jsonrpc": "2.0", "id": n, "method": "echo/x" }).to_string()).await;
        }
        caller.flush().await;
        for _ in 0..500 {
            caller.next().await;
        }
    };
    tokio::join!(served, called);
    let text = scrape(&weir).await;
    assert_eq!(value(&text, r#"weir_rpc_calls_total{result="ok"}"#), 500.0);
    assert_eq!(value(&text, r#"weir_rpc_duration_seconds_count{result="ok"}"#), 500.0);
    assert!(value(&text, r#"weir_rpc_duration_seconds_sum{result="ok"}"#) > 0.0);
}

#[tokio::test]
async fn the_lag_of_consumers_the_memory_budget_and_the_latency_of_routes_are_shown() {
    let weir = weir().with(|config| config.bus.memory.budget = 1 << 20).await;
    weir.get("/v1/events?channel=a&consumer=c&start=now").await.expect(200);
    let text = scrape(&weir).await;
    assert_eq!((value(&text, "weir_consumers"), value(&text, "weir_consumer_lag_events")), (1.0, 0.0));
    assert_eq!(value(&text, "weir_bus_evicted_events_total"), 0.0);
    for n in 0..7 {
        weir.post("/v1/events?channel=a", n.to_string()).await.expect(201);
    }
    let text = scrape(&weir).await;
    assert_eq!(value(&text, "weir_consumer_lag_events"), 7.0);
    assert_eq!(value(&text, r#"weir_http_request_duration_seconds_count{route="publish"}"#), 7.0);
    assert_eq!(value(&text, r#"weir_http_request_duration_seconds_count{route="read"}"#), 1.0);
    assert_eq!(value(&text, "weir_bus_memory_limit_bytes"), f64::from(1 << 20));
    for _ in 0..8 {
        weir.post("/v1/events?channel=b", "x".repeat(200_000)).await.expect(201);
    }
    assert!(value(&scrape(&weir).await, "weir_bus_evicted_events_total") > 0.0);
}
