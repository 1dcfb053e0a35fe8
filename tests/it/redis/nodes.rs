//! Nodes of weir on one Redis, writers and readers on them, and a judge: what a writer was told against what each reader
//! saw.

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
    event::{self, channel},
    eventually_within,
};

pub const KEEP: Retention = Retention { count: 100_000, age: Duration::from_secs(3600), bytes: 64 << 20 };
pub const ALL: ReadLimit = ReadLimit { events: 100_000, bytes: 64 << 20 };

static LINES: Format = Format {
    open: |_| {},
    event: |channel, event, out| {
        event.write_json(channel, out);
        out.push(b'\n');
    },
    close: |_| {},
};

pub fn draft(n: u64, key: Option<&str>) -> Draft {
    event::draft(None, &n.to_string(), key)
}

/// One weir, as far as the bus goes.
pub struct Node {
    pub bus: Arc<Bus>,
    pub redis: Arc<Redis>,
    pub metrics: Arc<Metrics>,
    pub topics: Arc<Topics>,
}

impl Node {
    pub async fn start(url: &str) -> Self {
        Node::with(url, KEEP, Ack::Stored).await
    }

    pub async fn with(url: &str, keep: Retention, ack: Ack) -> Self {
        Node::of(url, keep, RedisSettings { prefix: "weir:".into(), ack }).await
    }

    pub async fn of(url: &str, keep: Retention, settings: RedisSettings) -> Self {
        let config = Config {
            rules: vec![RetentionRule { pattern: Pattern::new("*"), retention: keep }],
            retention: keep,
            budget: 64 << 20,
            keys: KeyLimits { window: Duration::from_secs(300), count: 10_000 },
            consumer_idle: Duration::from_secs(3600),
            max_consumers: 1000,
            max_cursors: 1000,
        };
        let topics = Arc::new(Topics::new(config, WallClock::System));
        let metrics = Arc::new(Metrics::new());
        let deployment = Topology::start(RedisUrl::parse(url).unwrap(), metrics.clone());
        deployment.ready(Duration::from_secs(30)).await.unwrap();
        let redis = Arc::new(Redis::start(deployment, topics.clone(), settings));
        Node { bus: Arc::new(Bus::new(redis.clone(), topics.clone())), redis, metrics, topics }
    }

    pub async fn publish(&self, name: &str, n: u64) -> Result<Placed, Code> {
        self.bus.publish_one("", &channel(name), draft(n, None)).await.map_err(|error| error.code())
    }

    /// Until it is placed: Redis may be away.
    pub async fn insist(&self, name: &str, n: u64) -> Placed {
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

    pub async fn reader(&self, name: &str, start: Start) -> Reader {
        let mut subs = Subscriptions::new(&LINES);
        let watch = self.bus.watch(&[channel(name)]).await.unwrap().remove(0);
        let added = subs.add(watch, start, None);
        let log: Arc<Mutex<Vec<Seen>>> = Arc::new(Mutex::new(added.gap.into_iter().map(Seen::Gap).collect()));
        let task = tokio::spawn({
            let log = log.clone();
            async move {
                loop {
                    let delivery = poll_fn(|cx| subs.poll_next(cx)).await;
                    let mut log = log.lock();
                    match delivery.item {
                        DeliveryItem::Gap(gap) => log.push(Seen::Gap(gap)),
                        DeliveryItem::Events { bytes, .. } => {
                            for line in std::str::from_utf8(&bytes).unwrap().lines() {
                                let event: Value = serde_json::from_str(line).unwrap();
                                let at = format!("{}-{}", event["epoch"].as_str().unwrap(), event["offset"]);
                                log.push(Seen::Event(at.parse().unwrap(), event["data"].as_u64().unwrap()));
                            }
                        }
                    }
                }
            }
        });
        Reader { log, task }
    }
}

#[derive(Clone, Debug)]
pub enum Seen {
    Event(Position, u64),
    Gap(Gap),
}

impl Seen {
    fn number(&self) -> Option<u64> {
        match self {
            Seen::Event(_, n) => Some(*n),
            Seen::Gap(_) => None,
        }
    }
}

pub struct Reader {
    log: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reader {
    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }

    pub fn numbers(&self) -> Vec<u64> {
        let log = self.log.lock();
        log.iter().filter_map(Seen::number).collect()
    }

    pub fn gaps(&self) -> Vec<Gap> {
        let log = self.log.lock();
        log.iter().filter_map(|seen| if let Seen::Gap(gap) = seen { Some(gap.clone()) } else { None }).collect()
    }

    /// Waits until it has seen the event with this number.
    pub async fn sees(&self, n: u64) {
        eventually_within(MINUTE, &format!("a reader sees {n}"), async || self.numbers().contains(&n)).await;
    }
}

/// Writes 1, 2, 3… into one channel, one after the other, and remembers what it was told.
pub struct Writer {
    stop: Arc<AtomicBool>,
    told: Arc<Mutex<Vec<Told>>>,
    /// How many were told when it was last looked.
    looked: AtomicUsize,
    task: JoinHandle<()>,
}

#[derive(Clone, Debug)]
pub struct Told {
    pub n: u64,
    pub what: Result<Placed, Code>,
}

impl Writer {
    pub fn start(node: &Node, name: &'static str) -> Self {
        let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let task = tokio::spawn({
            let (bus, stop, told) = (node.bus.clone(), stop.clone(), told.clone());
            async move {
                for n in 1.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let what = bus.publish_one("", &channel(name), draft(n, None)).await.map_err(|error| error.code());
                    let pause = if what.is_ok() { 1 } else { 20 };
                    told.lock().push(Told { n, what });
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
            }
        });
        Writer { stop, told, looked: AtomicUsize::new(0), task }
    }

    /// Waits until so many more were acknowledged.
    pub async fn writes(&self, more: usize) {
        let count = || self.told.lock().iter().filter(|told| told.what.is_ok()).count();
        let goal = count() + more;
        eventually_within(MINUTE, &format!("{more} more events are placed"), async || count() >= goal).await;
        self.looked.store(self.told.lock().len(), SeqCst);
    }

    /// Waits until one was refused, or its answer lost, since it was last waited for some to be placed.
    pub async fn fails(&self) {
        let since = self.looked.load(SeqCst);
        eventually_within(MINUTE, "a publish fails", async || {
            self.told.lock()[since..].iter().any(|told| told.what.is_err())
        })
        .await;
    }

    pub async fn stop(self) -> Vec<Told> {
        self.stop.store(true, SeqCst);
        self.task.await.unwrap();
        Arc::try_unwrap(self.told).unwrap().into_inner()
    }
}

/// What was acknowledged was seen, exactly so and in order, or lies in a gap that was announced where it would have been.
/// What was refused was not seen, and nothing was seen twice; but a reset leads back to the beginning.
pub fn judge(told: &[Told], reader: &Reader) {
    let seen = reader.seen();
    let mut last = 0;
    for one in &seen {
        let (position, n) = match one {
            Seen::Event(position, n) => (position, n),
            Seen::Gap(gap) => {
                if gap.reason == GapReason::Reset {
                    last = 0;
                }
                continue;
            }
        };
        assert!(*n > last, "{n} after {last}: twice, or out of order");
        last = *n;
        match &told[*n as usize - 1].what {
            Ok(placed) => assert_eq!(placed.position, *position, "{n} is not where the writer was told"),
            Err(Code::Unconfirmed) => {}
            Err(code) => panic!("{n} was refused ({code:?}) and is there"),
        }
    }
    for told in told.iter().filter(|told| told.what.is_ok()) {
        let before = seen.iter().rposition(|one| one.number().is_some_and(|n| n < told.n)).map_or(0, |at| at + 1);
        let after = seen.iter().position(|one| one.number().is_some_and(|n| n > told.n)).unwrap_or(seen.len());
        let there = seen.iter().any(|one| one.number() == Some(told.n));
        let announced = seen[before..after].iter().any(|one| matches!(one, Seen::Gap(_)));
        assert!(
            there || announced,
            "{told:?} was acknowledged, and is missing without a word: {:?}",
            &seen[before.saturating_sub(3)..seen.len().min(after + 3)]
        );
    }
}
