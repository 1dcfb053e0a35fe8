//! Buses of several nodes on one Redis with writers and readers, and a judge that compares the results of a writer with
//! what each reader received.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::task::JoinHandle;
use weir::{
    backend::redis::{
        Ack, Redis, RedisSettings,
        client::{RedisUrl, Topology},
    },
    bus::*,
    error::Code,
    event::Draft,
    metrics::Metrics,
    pattern::Pattern,
    position::{Position, Start},
};

use crate::support::{
    MINUTE,
    event::{self, JSON_LINES, channel},
    eventually_within,
};

pub const KEEP: Retention = Retention { count: 100_000, age: Duration::from_secs(3600), bytes: 64 << 20 };
pub const ALL: ReadLimit = ReadLimit { events: 100_000, bytes: 64 << 20 };

pub fn draft(n: u64, key: Option<&str>) -> Draft {
    event::draft(None, &n.to_string(), key)
}

/// The bus of one node.
pub struct BusNode {
    pub bus: Arc<Bus>,
    pub redis: Arc<Redis>,
    pub metrics: Arc<Metrics>,
    pub topics: Arc<Topics>,
}

impl BusNode {
    pub async fn start(url: &str) -> Self {
        BusNode::with(url, KEEP, Ack::Stored).await
    }

    pub async fn with(url: &str, keep: Retention, ack: Ack) -> Self {
        BusNode::of(url, keep, RedisSettings { prefix: "weir:".into(), ack }).await
    }

    pub async fn of(url: &str, keep: Retention, settings: RedisSettings) -> Self {
        let config = Config {
            rules: vec![RetentionRule { pattern: Pattern::new("*"), retention: keep }],
            retention: keep,
            max_consumers: 1000,
            ..Config::default()
        };
        let topics = Arc::new(Topics::new(config, WallClock::System));
        let metrics = Arc::new(Metrics::new());
        let deployment = Topology::start(RedisUrl::parse(url).unwrap(), metrics.clone());
        deployment.ready(Duration::from_secs(30)).await.unwrap();
        let redis = Arc::new(Redis::start(deployment, topics.clone(), settings));
        BusNode { bus: Arc::new(Bus::new(redis.clone(), topics.clone())), redis, metrics, topics }
    }

    pub async fn publish(&self, name: &str, n: u64) -> Result<Placed, Code> {
        self.bus.publish_one("", &channel(name), draft(n, None)).await.map_err(|error| error.code())
    }

    /// Publishes until Redis accepts the event: it may be down.
    pub async fn publish_until_accepted(&self, name: &str, n: u64) -> Placed {
        loop {
            match self.publish(name, n).await {
                Ok(placed) => return placed,
                Err(Code::BusUnavailable) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(code) => panic!("{code:?}"),
            }
        }
    }

    pub async fn read(&self, name: &str, start: Start) -> LogPage {
        self.bus.read(&channel(name), start, ALL, None).await.unwrap()
    }

    pub async fn reader(&self, name: &str, start: Start) -> BusReader {
        let mut subs = Subscriptions::new(&JSON_LINES);
        let watch = self.bus.watch(&[channel(name)]).await.unwrap().remove(0);
        let added = subs.add(watch, start, None);
        let log: Arc<Mutex<Vec<Received>>> = Arc::new(Mutex::new(added.gap.into_iter().map(Received::Gap).collect()));
        let task = tokio::spawn({
            let log = log.clone();
            async move {
                loop {
                    let delivery = poll_fn(|cx| subs.poll_next(cx)).await;
                    let mut log = log.lock();
                    match delivery.item {
                        DeliveryItem::Gap(gap) => log.push(Received::Gap(gap)),
                        DeliveryItem::Events { bytes, .. } => {
                            for line in std::str::from_utf8(&bytes).unwrap().lines() {
                                let event: Value = serde_json::from_str(line).unwrap();
                                let at = format!("{}-{}", event["epoch"].as_str().unwrap(), event["offset"]);
                                log.push(Received::Event(at.parse().unwrap(), event["data"].as_u64().unwrap()));
                            }
                        }
                    }
                }
            }
        });
        BusReader { log, task }
    }
}

#[derive(Clone, Debug)]
pub enum Received {
    Event(Position, u64),
    Gap(Gap),
}

impl Received {
    fn number(&self) -> Option<u64> {
        match self {
            Received::Event(_, n) => Some(*n),
            Received::Gap(_) => None,
        }
    }
}

pub struct BusReader {
    log: Arc<Mutex<Vec<Received>>>,
    task: JoinHandle<()>,
}

impl Drop for BusReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl BusReader {
    pub fn received(&self) -> Vec<Received> {
        self.log.lock().clone()
    }

    pub fn numbers(&self) -> Vec<u64> {
        let log = self.log.lock();
        log.iter().filter_map(Received::number).collect()
    }

    pub fn gaps(&self) -> Vec<Gap> {
        let log = self.log.lock();
        log.iter().filter_map(|seen| if let Received::Gap(gap) = seen { Some(gap.clone()) } else { None }).collect()
    }

    /// Waits until it has received the event with this number.
    pub async fn receives(&self, n: u64) {
        eventually_within(MINUTE, &format!("a reader receives {n}"), async || self.numbers().contains(&n)).await;
    }
}

/// Publishes 1, 2, 3… to one channel, one after the other, and records the results.
pub struct BusWriter {
    stop: Arc<AtomicBool>,
    results: Arc<Mutex<Vec<PublishResult>>>,
    /// The number of results at the last call of [`writes`](Self::writes).
    checked: AtomicUsize,
    task: JoinHandle<()>,
}

#[derive(Clone, Debug)]
pub struct PublishResult {
    pub n: u64,
    pub result: Result<Placed, Code>,
}

impl BusWriter {
    pub fn start(node: &BusNode, name: &'static str) -> Self {
        let (stop, results) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let task = tokio::spawn({
            let (bus, stop, results) = (node.bus.clone(), stop.clone(), results.clone());
            async move {
                for n in 1.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let result =
                        bus.publish_one("", &channel(name), draft(n, None)).await.map_err(|error| error.code());
                    let pause = if result.is_ok() { 1 } else { 20 };
                    results.lock().push(PublishResult { n, result });
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
            }
        });
        BusWriter { stop, results, checked: AtomicUsize::new(0), task }
    }

    /// Waits until `more` further publishes were acknowledged.
    pub async fn writes(&self, more: usize) {
        let count = || self.results.lock().iter().filter(|publish| publish.result.is_ok()).count();
        let goal = count() + more;
        eventually_within(MINUTE, &format!("{more} more events are acknowledged"), async || count() >= goal).await;
        self.checked.store(self.results.lock().len(), SeqCst);
    }

    /// Waits until a publish has failed since the last call of [`writes`](Self::writes).
    pub async fn fails(&self) {
        let since = self.checked.load(SeqCst);
        eventually_within(MINUTE, "a publish fails", async || {
            self.results.lock()[since..].iter().any(|publish| publish.result.is_err())
        })
        .await;
    }

    pub async fn stop(self) -> Vec<PublishResult> {
        self.stop.store(true, SeqCst);
        self.task.await.unwrap();
        Arc::try_unwrap(self.results).unwrap().into_inner()
    }
}

/// Asserts that every acknowledged event was received unmodified and in order, or lies in a gap announced in its place,
/// and that no rejected event was received and none was received twice. After a reset a reader starts at the beginning.
pub fn judge(results: &[PublishResult], reader: &BusReader) {
    let seen = reader.received();
    let mut last = 0;
    for one in &seen {
        let (position, n) = match one {
            Received::Event(position, n) => (position, n),
            Received::Gap(gap) => {
                if gap.reason == GapReason::Reset {
                    last = 0;
                }
                continue;
            }
        };
        assert!(*n > last, "{n} after {last}: twice, or out of order");
        last = *n;
        match &results[*n as usize - 1].result {
            Ok(placed) => assert_eq!(placed.position, *position, "{n} is not at the acknowledged position"),
            Err(Code::Unconfirmed) => {}
            Err(code) => panic!("{n} was rejected ({code:?}) and received"),
        }
    }
    for publish in results.iter().filter(|publish| publish.result.is_ok()) {
        let before = seen.iter().rposition(|one| one.number().is_some_and(|n| n < publish.n)).map_or(0, |at| at + 1);
        let after = seen.iter().position(|one| one.number().is_some_and(|n| n > publish.n)).unwrap_or(seen.len());
        let received = seen.iter().any(|one| one.number() == Some(publish.n));
        let announced = seen[before..after].iter().any(|one| matches!(one, Received::Gap(_)));
        assert!(
            received || announced,
            "{publish:?} was acknowledged and is missing without a gap: {:?}",
            &seen[before.saturating_sub(3)..seen.len().min(after + 3)]
        );
    }
}
