//! The conformance suite of backends. A backend implements [`Harness`] and adds one line at the end of this file.

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, value::RawValue};
use weir::{
    backend::{
        memory::Memory,
        redis::{
            Ack, Redis, RedisSettings,
            client::{RedisUrl, Topology},
        },
    },
    bus::*,
    channel::Channel,
    error::Code,
    event::{Draft, DraftParts, EventData},
    metrics::Metrics,
    pattern::Pattern,
    position::{Epoch, Position, Start},
};

use crate::support::{
    RedisCluster, RedisSentinel, RedisServer,
    event::{self, JSON_LINES, channel, number},
    eventually::PATIENCE,
};

/// A bus over the backend under test.
trait Harness: Sync + Send + 'static {
    fn start(keep: Retention) -> impl Future<Output = Self> + Send;
    fn bus(&self) -> &Arc<Bus>;
    /// Advances the clock and runs the housekeeping.
    fn pass(&self, time: Duration) -> impl Future<Output = ()> + Send;
}

const KEEP: Retention = Retention { count: 1000, age: Duration::from_secs(3600), bytes: 1 << 20 };
const WINDOW: Duration = Duration::from_secs(300);
const ALL: ReadLimit = ReadLimit { events: 1000, bytes: 1 << 20 };

fn draft(n: u64) -> Draft {
    keyed(n, None)
}

fn keyed(n: u64, key: Option<&str>) -> Draft {
    event::draft(Some(if n.is_multiple_of(3) { "third" } else { "other" }), &n.to_string(), key)
}

async fn place(bus: &Bus, name: &str, n: u64) -> Placed {
    bus.publish_one("", &channel(name), draft(n)).await.unwrap()
}

async fn fill(bus: &Bus, name: &str, numbers: std::ops::RangeInclusive<u64>) -> Vec<Placed> {
    let mut placed = Vec::new();
    for n in numbers {
        placed.push(place(bus, name, n).await);
    }
    placed
}

async fn read(bus: &Bus, name: &str, start: Start) -> LogPage {
    bus.read(&channel(name), start, ALL, None).await.unwrap()
}

fn numbers(page: &LogPage) -> Vec<u64> {
    page.events.iter().map(|event| number(event)).collect()
}

// === reading and publishing ===

async fn offsets_are_dense<H: Harness>() {
    let h = H::start(KEEP).await;
    let tasks: Vec<_> = (0..4)
        .map(|writer| {
            let bus = h.bus().clone();
            tokio::spawn(async move {
                for n in 0..200 {
                    place(&bus, "a", writer * 1000 + n).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let page = read(h.bus(), "a", Start::Earliest).await;
    let offsets: Vec<u64> = page.events.iter().map(|event| event.offset).collect();
    assert_eq!(offsets, (1..=800).collect::<Vec<_>>());
    assert!(page.events.windows(2).all(|pair| pair[0].time <= pair[1].time && pair[0].epoch == pair[1].epoch));
    for writer in 0..4 {
        let mine: Vec<u64> = numbers(&page).into_iter().filter(|n| n / 1000 == writer).collect();
        assert!(mine.is_sorted(), "the order of each writer is kept");
    }
}

async fn pages_are_consecutive<H: Harness>() {
    let h = H::start(KEEP).await;
    fill(h.bus(), "a", 1..=25).await;
    let (mut start, mut seen) = (Start::Earliest, Vec::new());
    loop {
        let page = h.bus().read(&channel("a"), start, ReadLimit { events: 10, bytes: 1 << 20 }, None).await.unwrap();
        assert_eq!(page.gap, None);
        seen.extend(numbers(&page));
        start = Start::After(page.next);
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, (1..=25).collect::<Vec<_>>());
    let small = h.bus().read(&channel("a"), Start::Earliest, ReadLimit { events: 10, bytes: 1 }, None).await.unwrap();
    assert_eq!(numbers(&small), [1], "at least one event, whatever its size");
    assert_eq!(numbers(&read(h.bus(), "a", Start::Last(3)).await), [23, 24, 25]);
    assert_eq!(numbers(&read(h.bus(), "a", Start::Last(100)).await).len(), 25);
    assert_eq!(numbers(&read(h.bus(), "a", Start::AfterOffset(24)).await), [25]);
    assert!(numbers(&read(h.bus(), "a", Start::Now).await).is_empty());
}

async fn a_filter_moves_the_position<H: Harness>() {
    let h = H::start(KEEP).await;
    fill(h.bus(), "a", 1..=20).await;
    let filter = Filter::new(&["third"]).unwrap().unwrap();
    let page = h.bus().read(&channel("a"), Start::Earliest, ALL, Some(&filter)).await.unwrap();
    assert_eq!(numbers(&page), [3, 6, 9, 12, 15, 18]);
    assert_eq!((page.next.offset, page.more), (20, false));
    let two = ReadLimit { events: 2, ..ALL };
    let page = h.bus().read(&channel("a"), Start::Earliest, two, Some(&filter)).await.unwrap();
    assert_eq!(numbers(&page), [3, 6]);
    assert!(page.more && page.next.offset < 9);
}

async fn a_batch_is_consecutive_in_each_channel<H: Harness>() {
    let h = H::start(KEEP).await;
    let drafts = (1..=9).map(|n| (channel(if n % 2 == 0 { "even" } else { "odd" }), draft(n))).collect();
    let placed = h.bus().publish("", drafts).await.unwrap();
    let offsets: Vec<u64> = placed.iter().map(|placed| placed.position.offset).collect();
    assert_eq!(offsets, [1, 1, 2, 2, 3, 3, 4, 4, 5]);
    assert_eq!(numbers(&read(h.bus(), "odd", Start::Earliest).await), [1, 3, 5, 7, 9]);
}

// === creation and deletion of a channel ===

async fn reading_never_writes<H: Harness>() {
    let h = H::start(KEEP).await;
    let page = read(h.bus(), "guessed", Start::Earliest).await;
    assert!(page.events.is_empty() && page.gap.is_none() && page.next.epoch.is_absent());
    assert_eq!(h.bus().list("", None, 10).await.unwrap(), []);
    assert!(h.bus().inspect(&channel("guessed")).await.unwrap().epoch.is_absent());
}

async fn a_position_of_an_absent_channel_misses_nothing_after_its_creation<H: Harness>() {
    let h = H::start(KEEP).await;
    let before = read(h.bus(), "a", Start::Now).await.next;
    fill(h.bus(), "a", 1..=3).await;
    let page = read(h.bus(), "a", Start::After(before)).await;
    assert_eq!((numbers(&page), page.gap), (vec![1, 2, 3], None));
}

async fn a_deleted_log_is_announced<H: Harness>() {
    let h = H::start(KEEP).await;
    let placed = fill(h.bus(), "a", 1..=3).await;
    h.bus().remove(&channel("a"), None).await.unwrap();
    let page = read(h.bus(), "a", Start::After(placed[0].position)).await;
    let gap = page.gap.unwrap();
    assert_eq!((gap.reason, gap.after), (GapReason::Deleted, Some(placed[0].position)));
    assert!(gap.next.epoch.is_absent() && page.events.is_empty());
    let absent = page.next;
    let recreated = place(h.bus(), "a", 4).await;
    assert_eq!(recreated.position.offset, 1);
    assert_ne!(recreated.position.epoch, placed[0].position.epoch);
    let page = read(h.bus(), "a", Start::After(placed[1].position)).await;
    assert_eq!((numbers(&page), page.gap.unwrap().reason), (vec![4], GapReason::Deleted));
    for nothing_missed in [placed[2].position, absent] {
        let page = read(h.bus(), "a", Start::After(nothing_missed)).await;
        assert_eq!((numbers(&page), page.gap), (vec![4], None));
    }
}

async fn an_absent_position_does_not_outlive_a_log<H: Harness>() {
    let h = H::start(KEEP).await;
    let before = read(h.bus(), "a", Start::Now).await.next;
    place(h.bus(), "a", 1).await;
    h.bus().remove(&channel("a"), None).await.unwrap();
    for _ in 0..2 {
        let gap = read(h.bus(), "a", Start::After(before)).await.gap.unwrap();
        assert_eq!((gap.reason, gap.missed), (GapReason::Reset, None));
        place(h.bus(), "a", 2).await;
    }
}

async fn an_idle_channel_is_reclaimed_and_recreated<H: Harness>() {
    let h = H::start(Retention { age: Duration::from_secs(10), ..KEEP }).await;
    let before = read(h.bus(), "a", Start::Now).await.next;
    let placed = fill(h.bus(), "a", 1..=2).await;
    h.pass(Duration::from_secs(11)).await;
    assert!(read(h.bus(), "a", Start::Earliest).await.events.is_empty());
    h.pass(Duration::from_secs(200)).await;
    assert_eq!(h.bus().list("", None, 10).await.unwrap(), [], "reclaimed");
    let absent = read(h.bus(), "a", Start::Now).await.next;
    assert!(absent.epoch.is_absent());
    let recreated = place(h.bus(), "a", 3).await;
    assert_eq!(recreated.position.offset, 1);
    let gap = |page: LogPage| page.gap.map(|gap| gap.reason);
    assert_eq!(gap(read(h.bus(), "a", Start::After(before)).await), Some(GapReason::Reset));
    assert_eq!(gap(read(h.bus(), "a", Start::After(placed[0].position)).await), Some(GapReason::Reset));
    assert_eq!(gap(read(h.bus(), "a", Start::After(placed[1].position)).await), None, "it had received everything");
    assert_eq!(gap(read(h.bus(), "a", Start::After(absent)).await), None);
}

async fn a_reader_prevents_reclaiming_of_its_channel<H: Harness>() {
    let h = H::start(Retention { age: Duration::from_secs(10), ..KEEP }).await;
    place(h.bus(), "a", 1).await;
    let mut reader = Reader::open(h.bus(), &["a"], Start::Now, None).await;
    h.pass(Duration::from_secs(500)).await;
    let second = place(h.bus(), "a", 2).await;
    assert_eq!(second.position.offset, 2, "the same log");
    reader.until(|log| log.numbers("a") == [2]).await;
    assert_eq!(reader.log.gaps, []);
}

// === gaps ===

async fn trimmed_events_are_announced<H: Harness>() {
    let h = H::start(Retention { count: 10, ..KEEP }).await;
    let placed = fill(h.bus(), "a", 1..=30).await;
    let page = read(h.bus(), "a", Start::After(placed[4].position)).await;
    let gap = page.gap.clone().unwrap();
    assert_eq!(gap.reason, GapReason::Trimmed);
    assert_eq!((gap.next, gap.missed), (placed[20].position, Some(15)));
    assert_eq!(gap.resume(), placed[19].position);
    assert_eq!(numbers(&page), (21..=30).collect::<Vec<_>>());
    assert_eq!(read(h.bus(), "a", Start::After(placed[19].position)).await.gap, None, "exactly at the first event");
    assert_eq!(read(h.bus(), "a", Start::Earliest).await.gap, None);
}

async fn retention_by_age_and_bytes<H: Harness>() {
    let h = H::start(Retention { age: Duration::from_secs(60), bytes: 2000, count: 1000 }).await;
    fill(h.bus(), "a", 1..=100).await;
    let info = h.bus().inspect(&channel("a")).await.unwrap();
    assert!(info.bytes <= 2000 && info.first > 1 && info.top == 100, "{info:?}");
    h.pass(Duration::from_secs(40)).await;
    place(h.bus(), "a", 101).await;
    h.pass(Duration::from_secs(40)).await;
    assert_eq!(numbers(&read(h.bus(), "a", Start::Earliest).await), [101]);
}

async fn unknown_positions_produce_a_gap<H: Harness>() {
    let h = H::start(KEEP).await;
    let placed = fill(h.bus(), "a", 1..=3).await;
    let epoch = placed[0].position.epoch;
    let gap = |page: LogPage| page.gap.map(|gap| (gap.reason, gap.next.offset));
    let ahead = Start::After(Position { epoch, offset: 9 });
    assert_eq!(gap(read(h.bus(), "a", ahead).await), Some((GapReason::BadPosition, 4)));
    assert_eq!(gap(read(h.bus(), "a", Start::AfterOffset(9)).await), Some((GapReason::BadPosition, 4)));
    let unknown = Start::After(Position { epoch: Epoch::random(), offset: 1 });
    assert_eq!(gap(read(h.bus(), "a", unknown).await), Some((GapReason::Reset, 1)));
    let ancient = Start::After(Position::absent(1_000_000));
    assert_eq!(gap(read(h.bus(), "a", ancient).await), Some((GapReason::Reset, 1)));
    let page = read(h.bus(), "never", Start::After(Position { epoch, offset: 1 })).await;
    assert_eq!(page.gap.unwrap().reason, GapReason::Reset);
}

async fn an_explicit_trim_is_announced<H: Harness>() {
    let h = H::start(KEEP).await;
    let placed = fill(h.bus(), "a", 1..=5).await;
    h.bus().remove(&channel("a"), Some(placed[3].position)).await.unwrap();
    assert_eq!(numbers(&read(h.bus(), "a", Start::Earliest).await), [4, 5]);
    let gap = read(h.bus(), "a", Start::After(placed[0].position)).await.gap.unwrap();
    assert_eq!((gap.reason, gap.missed), (GapReason::Deleted, Some(2)));
    let foreign = Position { epoch: Epoch::random(), offset: 1 };
    let refused = h.bus().remove(&channel("a"), Some(foreign)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidPosition);
}

// === keys ===

async fn a_key_is_published_once<H: Harness>() {
    let h = H::start(KEEP).await;
    let publish = |subject: &'static str, n, key| {
        let bus = h.bus().clone();
        async move { bus.publish_one(subject, &channel("a"), keyed(n, Some(key))).await }
    };
    let first = publish("", 1, "k").await.unwrap();
    let again = publish("", 1, "k").await.unwrap();
    assert_eq!((again.position, again.time, again.duplicate), (first.position, first.time, true));
    assert_eq!(publish("", 2, "k").await.unwrap_err().code(), Code::KeyReused);
    assert!(!publish("somebody", 1, "k").await.unwrap().duplicate, "keys are scoped by subject");
    let batch = vec![(channel("a"), draft(7)), (channel("a"), keyed(2, Some("k")))];
    let failed = h.bus().publish("", batch).await.unwrap_err();
    assert_eq!((failed.error.code(), failed.placed), (Code::KeyReused, vec![None, None]));
    let twice = vec![(channel("a"), keyed(5, Some("t"))), (channel("a"), keyed(5, Some("t")))];
    let placed = h.bus().publish("", twice).await.unwrap();
    assert_eq!((placed[0].position, placed[1].duplicate), (placed[1].position, true));
    assert_eq!(numbers(&read(h.bus(), "a", Start::Earliest).await), [1, 1, 5]);
    h.pass(WINDOW + Duration::from_secs(10)).await;
    assert!(!publish("", 2, "k").await.unwrap().duplicate, "forgotten");
    h.bus().remove(&channel("a"), None).await.unwrap();
    assert!(!publish("", 2, "k").await.unwrap().duplicate, "the key is deleted with its event");
}

async fn every_key_of_the_window_is_remembered<H: Harness>() {
    let h = H::start(KEEP).await;
    let first = h.bus().publish_one("", &channel("a"), keyed(1, Some("first"))).await.unwrap();
    for batch in 0..11 {
        let drafts = (0..1000).map(|n| (channel("a"), keyed(n, Some(&format!("{batch}-{n}"))))).collect();
        h.bus().publish("", drafts).await.unwrap();
    }
    h.pass(WINDOW - Duration::from_secs(1)).await;
    let again = h.bus().publish_one("", &channel("a"), keyed(1, Some("first"))).await.unwrap();
    assert_eq!((again.position, again.duplicate), (first.position, true));
    h.pass(Duration::from_secs(1)).await;
    assert!(!h.bus().publish_one("", &channel("a"), keyed(1, Some("first"))).await.unwrap().duplicate);
}

async fn keys_outlive_the_events_of_a_channel<H: Harness>() {
    let h = H::start(Retention { age: Duration::from_secs(1), ..KEEP }).await;
    let publish = async || h.bus().publish_one("", &channel("a"), keyed(1, Some("k"))).await.unwrap();
    let first = publish().await;
    h.pass(WINDOW - Duration::from_secs(1)).await;
    assert_eq!(numbers(&read(h.bus(), "a", Start::Earliest).await), [0; 0]);
    let again = publish().await;
    assert_eq!((again.position, again.duplicate), (first.position, true));
    h.pass(Duration::from_secs(2)).await;
    assert!(!publish().await.duplicate);
}

async fn a_retry_with_another_trace_context_is_a_duplicate<H: Harness>() {
    let h = H::start(KEEP).await;
    let publish = async |meta: Option<&str>| {
        let meta: Option<Box<RawValue>> = meta.map(|meta| serde_json::from_str(meta).unwrap());
        let data = EventData::Text("x");
        let parts = DraftParts { meta: meta.as_deref(), data, key: Some("k"), ..DraftParts::default() };
        h.bus().publish_one("", &channel("a"), Draft::new(parts, 1000).unwrap()).await
    };
    publish(Some(r#"{"tenant":"7","traceparent":"00-1","tracestate":"v=1"}"#)).await.unwrap();
    for meta in [r#"{"traceparent":"00-2","baggage":"u=1","tenant":"7"}"#, r#"{"tenant":"7"}"#] {
        assert!(publish(Some(meta)).await.unwrap().duplicate, "{meta}");
    }
    for meta in [Some(r#"{"tenant":"8","traceparent":"00-1"}"#), None] {
        assert_eq!(publish(meta).await.unwrap_err().code(), Code::KeyReused, "{meta:?}");
    }
}

// === cursors ===

async fn cursors_only_advance<H: Harness>() {
    let h = H::start(KEEP).await;
    let (bus, a) = (h.bus(), channel("a"));
    let absent = read(bus, "a", Start::Now).await.next;
    assert_eq!(bus.cursor("c", &a).await.unwrap(), None);
    bus.commit("c", &a, absent).await.unwrap();
    let placed = fill(bus, "a", 1..=5).await;
    for (to, expected) in [(3, 3), (1, 3), (4, 4)] {
        bus.commit("c", &a, placed[to].position).await.unwrap();
        assert_eq!(bus.cursor("c", &a).await.unwrap(), Some(placed[expected].position));
    }
    bus.commit("c", &a, absent).await.unwrap();
    assert_eq!(bus.cursor("c", &a).await.unwrap(), Some(placed[4].position));
    let ahead = Position { offset: 9, ..placed[0].position };
    assert_eq!(bus.commit("c", &a, ahead).await.unwrap_err().code(), Code::InvalidPosition);
    bus.seek("c", &a, placed[0].position).await.unwrap();
    assert_eq!(bus.cursor("c", &a).await.unwrap(), Some(placed[0].position));
    bus.remove(&a, None).await.unwrap();
    let recreated = place(bus, "a", 1).await;
    bus.commit("c", &a, placed[4].position).await.unwrap();
    bus.commit("c", &a, recreated.position).await.unwrap();
    bus.commit("c", &a, placed[4].position).await.unwrap();
    assert_eq!(bus.cursor("c", &a).await.unwrap(), Some(recreated.position), "a position of a newer log is later");
    assert_eq!(bus.consumer("c").await.unwrap().unwrap().cursors, [(a.clone(), recreated.position)]);
    bus.seek("d", &channel("b"), absent).await.unwrap();
    let names =
        |list: Vec<ConsumerInfo>| list.into_iter().map(|consumer| consumer.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(bus.consumers("", None, 10).await.unwrap()), ["c", "d"]);
    assert_eq!(names(bus.consumers("", Some("c"), 10).await.unwrap()), ["d"]);
    assert!(bus.forget("c").await.unwrap() && !bus.forget("c").await.unwrap());
    h.pass(Duration::from_secs(40 * 24 * 3600)).await;
    assert!(bus.consumer("d").await.unwrap().is_none(), "an idle consumer expires");
}

async fn channels_are_listed_by_name<H: Harness>() {
    let h = H::start(KEEP).await;
    for name in ["b", "a/2", "a/1", "c", "a/3"] {
        place(h.bus(), name, 1).await;
    }
    let names = |list: Vec<ChannelInfo>| list.into_iter().map(|info| info.channel.to_string()).collect::<Vec<_>>();
    assert_eq!(names(h.bus().list("a/", None, 2).await.unwrap()), ["a/1", "a/2"]);
    assert_eq!(names(h.bus().list("a/", Some("a/2"), 2).await.unwrap()), ["a/3"]);
    assert_eq!(names(h.bus().list("", None, 10).await.unwrap()).len(), 5);
}

// === live readers ===

/// A live reader and everything it has received.
struct Reader {
    subs: Subscriptions,
    channels: Vec<Channel>,
    log: History,
}

#[derive(Debug, Default)]
struct History {
    events: BTreeMap<String, Vec<(String, u64, u64)>>,
    gaps: Vec<Gap>,
}

impl History {
    fn numbers(&self, channel: &str) -> Vec<u64> {
        self.events.get(channel).map_or(Vec::new(), |events| events.iter().map(|(_, _, n)| *n).collect())
    }
}

impl Reader {
    async fn open(bus: &Bus, names: &[&str], start: Start, filter: Option<Filter>) -> Self {
        let channels: Vec<Channel> = names.iter().map(|name| channel(name)).collect();
        let filter = filter.map(Arc::new);
        let mut reader = Reader { subs: Subscriptions::new(&JSON_LINES), channels, log: History::default() };
        for watch in bus.watch(&reader.channels).await.unwrap() {
            let added = reader.subs.add(watch, start, filter.clone());
            reader.log.gaps.extend(added.gap);
        }
        reader
    }

    async fn next(&mut self) {
        let delivery = poll_fn(|cx| self.subs.poll_next(cx)).await;
        self.take(delivery);
    }

    fn take(&mut self, delivery: Delivery) {
        match delivery.item {
            DeliveryItem::Gap(gap) => self.log.gaps.push(gap),
            DeliveryItem::Events { bytes, count } => {
                let lines: Vec<&str> = std::str::from_utf8(&bytes).unwrap().lines().collect();
                assert_eq!(lines.len(), count as usize);
                for line in lines {
                    let event: Value = serde_json::from_str(line).unwrap();
                    let channel = self.subs.channel(delivery.slot).unwrap();
                    assert_eq!(event["channel"], channel.as_str());
                    let epoch = event["epoch"].as_str().unwrap().to_owned();
                    let entry = (epoch, event["offset"].as_u64().unwrap(), event["data"].as_u64().unwrap());
                    self.log.events.entry(channel.to_string()).or_default().push(entry);
                }
            }
        }
    }

    fn take_ready(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(delivery) = self.subs.poll_next(cx) {
            self.take(delivery);
        }
    }

    /// Reads until the position in its only channel is `head`.
    async fn reach(&mut self, head: Position) {
        let reached = poll_fn(|cx| {
            self.take_ready(cx);
            if self.subs.position(0) == Some(head) { Poll::Ready(()) } else { Poll::Pending }
        });
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        assert!(reached.is_ok(), "at {:?} and not at {head}", self.subs.position(0));
    }

    async fn until(&mut self, reached: impl Fn(&History) -> bool) {
        while !reached(&self.log) {
            let next = tokio::time::timeout(PATIENCE, self.next()).await;
            assert!(next.is_ok(), "no event in time; so far: {:?}", self.log);
        }
    }
}

async fn a_live_reader_receives_published_events<H: Harness>() {
    let h = H::start(KEEP).await;
    let mut reader = Reader::open(h.bus(), &["a", "b"], Start::Now, None).await;
    let mut third = Reader::open(h.bus(), &["a"], Start::Now, Filter::new(&["third"]).unwrap()).await;
    fill(h.bus(), "a", 1..=300).await;
    place(h.bus(), "b", 1).await;
    reader.until(|log| log.numbers("a").len() == 300 && log.numbers("b") == [1]).await;
    assert_eq!(reader.log.numbers("a"), (1..=300).collect::<Vec<_>>());
    third.until(|log| log.numbers("a").len() == 100).await;
    assert!(third.log.numbers("a").iter().all(|n| n % 3 == 0));
    place(h.bus(), "b", 2).await;
    reader.until(|log| log.numbers("b") == [1, 2]).await;
    assert!(reader.log.gaps.is_empty() && third.log.gaps.is_empty());
}

async fn a_slow_reader_receives_a_gap<H: Harness>() {
    let h = H::start(Retention { count: 10, ..KEEP }).await;
    let first = place(h.bus(), "a", 1).await;
    let mut reader = Reader::open(h.bus(), &["a"], Start::Now, None).await;
    fill(h.bus(), "a", 2..=50).await;
    reader.until(|log| log.numbers("a").len() == 10).await;
    assert_eq!(reader.log.numbers("a"), (41..=50).collect::<Vec<_>>());
    let [gap] = reader.log.gaps.as_slice() else { panic!("{:?}", reader.log.gaps) };
    assert_eq!((gap.after, gap.missed, gap.next.offset), (Some(first.position), Some(39), 41));
}

async fn a_reader_continues_after_its_log_is_deleted<H: Harness>() {
    let h = H::start(KEEP).await;
    let mut reader = Reader::open(h.bus(), &["a"], Start::Earliest, None).await;
    let mut behind = Reader::open(h.bus(), &["a"], Start::Earliest, None).await;
    fill(h.bus(), "a", 1..=2).await;
    reader.until(|log| log.numbers("a") == [1, 2]).await;
    h.bus().remove(&channel("a"), None).await.unwrap();
    place(h.bus(), "a", 3).await;
    reader.until(|log| log.numbers("a") == [1, 2, 3]).await;
    assert_eq!(reader.log.gaps, [], "it had received everything");
    behind.until(|log| log.numbers("a") == [3]).await;
    assert_eq!(behind.log.gaps.len(), 1, "it missed the deleted events");
}

async fn no_event_is_lost_between_a_read_and_a_wait<H: Harness>() {
    let h = H::start(KEEP).await;
    let bus = h.bus().clone();
    let reader = tokio::spawn(async move {
        let (mut at, mut seen) = (Start::Earliest, Vec::new());
        while seen.len() < 500 {
            let mut subs = Subscriptions::new(Format::NONE);
            let watch = bus.watch(&[channel("a")]).await.unwrap().remove(0);
            let page = read(&bus, "a", at).await;
            at = Start::After(page.next);
            if page.events.is_empty() {
                subs.add(watch, at, None);
                let waited = tokio::time::timeout(PATIENCE, poll_fn(|cx| subs.poll_changed(cx))).await;
                assert!(waited.is_ok(), "the wait missed an event after {seen:?}");
            }
            seen.extend(numbers(&page));
        }
        seen
    });
    for n in 1..=500 {
        place(h.bus(), "a", n).await;
        if n % 7 == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(reader.await.unwrap(), (1..=500).collect::<Vec<_>>());
}

async fn closed_readers_release_everything<H: Harness>() {
    let h = H::start(KEEP).await;
    for round in 0..20 {
        let mut readers = Vec::new();
        for _ in 0..50 {
            readers.push(Reader::open(h.bus(), &["a", "b", "c"], Start::Now, None).await);
        }
        place(h.bus(), "a", round).await;
        for reader in readers.iter_mut().step_by(2) {
            reader.until(|log| log.numbers("a") == [round]).await;
        }
        for reader in readers.iter_mut().step_by(3) {
            reader.subs.remove(1);
        }
    }
    assert_eq!(h.bus().topics().readers(), 0);
}

/// A workload of concurrent writers, late, slow and filtered readers, trims and deletes.
#[derive(Debug, Clone)]
struct Workload {
    keep: usize,
    writers: u64,
    each: u64,
    deletes: u64,
    readers: Vec<(u8, bool)>,
}

async fn workload<H: Harness>(workload: Workload) {
    let h = H::start(Retention { count: workload.keep, ..KEEP }).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..workload.writers {
        let bus = h.bus().clone();
        writers.push(tokio::spawn(async move {
            let mut placed = Vec::new();
            for n in 0..workload.each {
                let n = writer * 1_000_000 + n;
                placed.push((n, place(&bus, "a", n).await.position));
                if fastrand::u8(..) < 40 {
                    tokio::task::yield_now().await;
                }
            }
            placed
        }));
    }
    let mut readers = Vec::new();
    for (slowness, filtered) in workload.readers.clone() {
        let (bus, done) = (h.bus().clone(), done.clone());
        readers.push(tokio::spawn(async move {
            for _ in 0..slowness {
                tokio::task::yield_now().await;
            }
            let filter = filtered.then(|| Filter::new(&["third"]).unwrap().unwrap());
            let mut reader = Reader::open(&bus, &["a"], Start::Earliest, filter).await;
            while !done.load(Ordering::SeqCst) {
                for _ in 0..=fastrand::u8(..=slowness) {
                    tokio::task::yield_now().await;
                }
                poll_fn(|cx| {
                    reader.take_ready(cx);
                    Poll::Ready(())
                })
                .await;
            }
            // Then it reads all that was written: delivery may lag behind publishing for a while.
            let head = bus.head(&channel("a")).await.unwrap();
            if !head.epoch.is_absent() {
                reader.reach(head).await;
            }
            (filtered, reader.log)
        }));
    }
    for _ in 0..workload.deletes {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        h.bus().remove(&channel("a"), None).await.unwrap();
    }
    let mut placed: BTreeMap<(String, u64), u64> = BTreeMap::new();
    for writer in writers {
        for (n, position) in writer.await.unwrap() {
            let twice = placed.insert((position.epoch.to_string(), position.offset), n);
            assert!(twice.is_none(), "two events have the same position");
        }
    }
    done.store(true, Ordering::SeqCst);
    for reader in readers {
        let (filtered, log) = reader.await.unwrap();
        check(&placed, filtered, &log);
    }
}

/// Asserts that every event was received once, in order and unmodified, and that missing ones lie in an announced gap.
fn check(placed: &BTreeMap<(String, u64), u64>, filtered: bool, log: &History) {
    let events = log.events.get("a").cloned().unwrap_or_default();
    let mut epochs = Vec::new();
    for (epoch, offset, n) in &events {
        assert_eq!(placed.get(&(epoch.clone(), *offset)), Some(n), "the event is unmodified");
        assert!(!filtered || n % 3 == 0);
        if epochs.last() != Some(epoch) {
            assert!(!epochs.contains(epoch), "events of an earlier log follow those of a later one");
            epochs.push(epoch.clone());
        }
    }
    for epoch in &epochs {
        let seen: Vec<u64> = events.iter().filter(|event| event.0 == *epoch).map(|event| event.1).collect();
        assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "once and in order");
        let missing = placed
            .iter()
            .filter(|((of, _), n)| of == epoch && (!filtered || *n % 3 == 0))
            .map(|((_, offset), _)| *offset)
            .filter(|offset| !seen.contains(offset));
        for offset in missing {
            let announced = log.gaps.iter().any(|gap| {
                let in_reach = gap.next.epoch.to_string() == *epoch && offset < gap.next.offset;
                // The log was deleted before the reader reached its end.
                let ended = gap.after.is_some_and(|after| after.epoch.to_string() == *epoch && offset > after.offset);
                in_reach || ended
            });
            // A reader that starts at `earliest` in a trimmed log did not request the events before it.
            let never_asked = log.gaps.is_empty() && seen.first().is_some_and(|first| offset < *first);
            let before_start = seen.first().is_some_and(|first| offset < *first) && epochs.first() == Some(epoch);
            assert!(announced || never_asked || before_start, "offset {offset} of {epoch} is missing: {:?}", log.gaps);
        }
    }
}

fn workloads<H: Harness>() {
    let strategy = (2usize..200, 1u64..5, 1u64..300, 0u64..4, prop::collection::vec((0u8..60, any::<bool>()), 1..8))
        .prop_map(|(keep, writers, each, deletes, readers)| Workload { keep, writers, each, deletes, readers });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&strategy, |case| {
            runtime.block_on(async {
                tokio::spawn(workload::<H>(case)).await.map_err(|e| TestCaseError::fail(e.to_string()))
            })
        })
        .unwrap();
}

// === the backends ===

struct InMemory {
    bus: Arc<Bus>,
    memory: Arc<Memory>,
    topics: Arc<Topics>,
    now: Arc<AtomicU64>,
}

fn config(keep: Retention, budget: usize) -> Config {
    Config {
        // A rule, so that every test includes pattern matching.
        rules: vec![RetentionRule { pattern: Pattern::new("*"), retention: keep }],
        retention: KEEP,
        budget,
        key_window: WINDOW,
        max_consumers: 1000,
        ..Config::default()
    }
}

impl InMemory {
    fn with(keep: Retention, budget: usize) -> Self {
        let now = Arc::new(AtomicU64::new(1_763_640_000_123));
        let topics = Arc::new(Topics::new(config(keep, budget), WallClock::Manual(now.clone())));
        // A position of an absent channel from the second in which the backend started is not accepted as current.
        now.fetch_add(2000, Ordering::SeqCst);
        let memory = Arc::new(Memory::new(topics.clone()));
        InMemory { bus: Arc::new(Bus::new(memory.clone(), topics.clone())), memory, topics, now }
    }
}

impl Harness for InMemory {
    async fn start(keep: Retention) -> Self {
        InMemory::with(keep, 64 << 20)
    }

    fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    async fn pass(&self, time: Duration) {
        self.now.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
        for _ in 0..64 {
            self.memory.sweep();
        }
    }
}

macro_rules! conformance {
    ($(#[$attribute:meta])? $backend:ident: $harness:ty) => {
        mod $backend {
            use super::*;
            conformance!(@ $(#[$attribute])? $harness: offsets_are_dense pages_are_consecutive a_filter_moves_the_position
                a_batch_is_consecutive_in_each_channel reading_never_writes a_position_of_an_absent_channel_misses_nothing_after_its_creation
                a_deleted_log_is_announced an_absent_position_does_not_outlive_a_log
                an_idle_channel_is_reclaimed_and_recreated a_reader_prevents_reclaiming_of_its_channel trimmed_events_are_announced
                retention_by_age_and_bytes unknown_positions_produce_a_gap an_explicit_trim_is_announced a_key_is_published_once
                every_key_of_the_window_is_remembered keys_outlive_the_events_of_a_channel
                a_retry_with_another_trace_context_is_a_duplicate
                cursors_only_advance channels_are_listed_by_name a_live_reader_receives_published_events
                a_slow_reader_receives_a_gap a_reader_continues_after_its_log_is_deleted no_event_is_lost_between_a_read_and_a_wait
                closed_readers_release_everything);

            $(#[$attribute])?
            #[test]
            fn concurrent_writers_readers_trims_and_deletes_keep_every_guarantee() {
                workloads::<$harness>();
            }
        }
    };
    (@ $harness:ty: $($case:ident)+) => {
        $(conformance!(@@ $harness: $case);)+
    };
    (@ #[$attribute:meta] $harness:ty: $($case:ident)+) => {
        $(conformance!(@@ #[$attribute] $harness: $case);)+
    };
    (@@ $(#[$attribute:meta])? $harness:ty: $case:ident) => {
        $(#[$attribute])?
        #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn $case() {
            super::$case::<$harness>().await;
        }
    };
}

conformance!(memory: InMemory);

/// The backend on a real Redis, which all tests of a deployment share; each test has a key prefix of its own.
///
/// The suite controls the clock, also that of the scripts: with a manual clock the scripts take its time instead of
/// that of TIME. There is no setting for that.
struct InRedis<D> {
    bus: Arc<Bus>,
    redis: Arc<Redis>,
    now: Arc<AtomicU64>,
    deployment: std::marker::PhantomData<D>,
}

/// The deployment on which the suite runs.
trait SharedRedis: Send + Sync + 'static {
    fn url() -> impl Future<Output = String> + Send;
}

macro_rules! shared_redis {
    ($name:ident: $server:ty = $start:expr) => {
        struct $name;

        impl SharedRedis for $name {
            async fn url() -> String {
                static SERVER: tokio::sync::OnceCell<$server> = tokio::sync::OnceCell::const_new();
                SERVER.get_or_init(|| $start).await.url()
            }
        }
    };
}

shared_redis!(Standalone: RedisServer = RedisServer::start(&[]));
shared_redis!(Watched: RedisSentinel = RedisSentinel::start());
shared_redis!(Clustered: RedisCluster = RedisCluster::start(3, 0));

// `tests/run.sh servers` sets the variables to the paths of the server programs.
shared_redis!(Older: RedisServer = other("WEIR_TEST_REDIS_6_2"));
shared_redis!(Valkey: RedisServer = other("WEIR_TEST_VALKEY"));

async fn other(variable: &str) -> RedisServer {
    let program = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names no server program"));
    RedisServer::start_of(&program, &[]).await
}

impl<D: SharedRedis> Harness for InRedis<D> {
    async fn start(keep: Retention) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let url = RedisUrl::parse(&D::url().await).unwrap();
        let now = Arc::new(AtomicU64::new(1_763_640_000_123));
        let topics = Arc::new(Topics::new(config(keep, 64 << 20), WallClock::Manual(now.clone())));
        let deployment = Topology::start(url, Arc::new(Metrics::new()));
        deployment.ready(Duration::from_secs(30)).await.unwrap();
        let prefix = format!("t{}:", NUMBER.fetch_add(1, Ordering::SeqCst));
        let redis = Arc::new(Redis::start(deployment, topics.clone(), RedisSettings { prefix, ack: Ack::Stored }));
        now.fetch_add(2000, Ordering::SeqCst);
        InRedis { bus: Arc::new(Bus::new(redis.clone(), topics)), redis, now, deployment: std::marker::PhantomData }
    }

    fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Advances in steps, so that the periodic audit of channels that are in use runs in between.
    async fn pass(&self, time: Duration) {
        let step = Duration::from_secs(30).max(time / 32);
        let mut left = time;
        while !left.is_zero() {
            let now = step.min(left);
            left -= now;
            self.now.fetch_add(now.as_millis() as u64, Ordering::SeqCst);
            self.redis.audit().await;
        }
        (0..64).for_each(|_| self.redis.sweep());
    }
}

conformance!(redis: InRedis<Standalone>);
conformance!(redis_sentinel: InRedis<Watched>);
conformance!(redis_cluster: InRedis<Clustered>);
conformance!(#[ignore = "needs Redis 6.2: tests/run.sh servers"] redis_6_2: InRedis<Older>);
conformance!(#[ignore = "needs Valkey: tests/run.sh servers"] valkey: InRedis<Valkey>);

// === guarantees of the memory backend ===

#[tokio::test]
async fn reclaimed_channels_use_no_memory() {
    let h = InMemory::with(Retention { age: Duration::from_secs(10), ..KEEP }, 512 << 20);
    for n in 0..200_000 {
        place(&h.bus, &format!("name {n}"), n).await;
    }
    assert_eq!(h.topics.count(), 200_000);
    h.pass(Duration::from_secs(100)).await;
    assert_eq!((h.topics.count(), h.topics.used()), (0, 0));
    // The backend remembers a limited number of reclaimed channels and announces the limit as a reset.
    let old = read(&h.bus, "name 0", Start::After(Position::absent(1_763_640_002))).await;
    assert_eq!(old.gap.unwrap().reason, GapReason::Reset);
}

#[tokio::test]
async fn the_memory_budget_is_enforced_and_announced() {
    let h = InMemory::with(Retention { count: 100_000, bytes: 64 << 20, ..KEEP }, 1 << 20);
    place(&h.bus, "old", 1).await;
    for n in 0..20_000u64 {
        h.now.fetch_add(1, Ordering::SeqCst);
        place(&h.bus, &format!("c{}", n % 20), n).await;
        assert!(h.topics.used() <= (1 << 20) + 1000);
    }
    for name in ["old", "c7"] {
        let page = read(&h.bus, name, Start::AfterOffset(0)).await;
        assert_eq!(page.gap.unwrap().reason, GapReason::Budget, "{name}");
    }
}

/// Keys are never evicted: beyond their part of the budget, events with new keys are rejected, and nothing else is.
#[tokio::test]
async fn keys_that_cannot_be_remembered_are_rejected() {
    let h = InMemory::with(KEEP, 1 << 20);
    let publish = async |n: u64, key: Option<&str>| h.bus.publish_one("", &channel("a"), keyed(n, key)).await;
    let mut accepted = 0;
    let error = loop {
        match publish(accepted, Some(&accepted.to_string())).await {
            Ok(placed) => assert!(!placed.duplicate),
            Err(error) => break error,
        }
        accepted += 1;
    };
    assert_eq!(error.code(), Code::Overloaded);
    assert!((1000..10_000).contains(&accepted) && h.topics.used() <= 1 << 20, "{accepted}");
    for n in 0..accepted {
        assert!(publish(n, Some(&n.to_string())).await.unwrap().duplicate);
    }
    assert!(!publish(1, None).await.unwrap().duplicate);
    h.pass(WINDOW).await;
    assert!(!publish(1, Some("new")).await.unwrap().duplicate);
}
