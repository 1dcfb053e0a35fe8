//! Micro-benchmarks of the code that runs for every event and every call: `cargo bench --bench micro`.
//!
//! They compare two builds on one machine. The total cost of a delivery depends on system calls: see `load`.

use std::{
    hint::black_box,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use divan::{Bencher, counter::ItemsCount};
use futures_util::FutureExt;
use serde_json::value::RawValue;
use weir::{
    backend::memory,
    bus::{Bus, Config, DeliveryItem, Retention, Subscriptions, WallClock},
    channel::Channel,
    cluster::{MonotonicClock, single::single_node},
    event::{Draft, DraftParts, Event, EventData},
    position::{Epoch, Position, Start},
    rpc::{
        Call, CallAnswer, CallId, CallerId, ForwardedCall, Hub, HubConnection, Peer, PeerRoom, ProvideRequest,
        WriteOutcome,
    },
    token::{AfterParam, ResumeToken},
    transport::sse::frame,
};

fn main() {
    divan::main();
}

/// 100 bytes, as in `load`.
fn data() -> Box<RawValue> {
    RawValue::from_string(format!("{{\"text\":\"{}\"}}", "x".repeat(89))).unwrap()
}

fn draft(data: &RawValue) -> Draft {
    Draft::new(DraftParts { kind: Some("created"), data: EventData::Json(data), ..DraftParts::default() }, 1_000_000)
        .unwrap()
}

fn event() -> Event {
    draft(&data()).place(Position { epoch: Epoch::random(), offset: 1_234_567 }, 1_763_640_000_123)
}

fn channel() -> Channel {
    Channel::parse("orders").unwrap()
}

fn bus() -> Bus {
    let retention = Retention { count: 1_000, age: Duration::from_secs(3600), bytes: 64 << 20 };
    let config = Config { rules: Vec::new(), retention, budget: 1 << 30, ..Config::default() };
    memory::bus(config, WallClock::System)
}

// === encode ===

#[divan::bench]
fn encode_draft(bencher: Bencher) {
    let data = data();
    bencher.bench(|| draft(black_box(&data)));
}

#[divan::bench]
fn encode_sse_frame(bencher: Bencher) {
    let (channel, event) = (channel(), Arc::new(event()));
    bencher.bench(|| frame::EVENT.encode(black_box(&channel), [black_box(&event)]));
}

#[divan::bench]
fn encode_sse_batch_of_64(bencher: Bencher) {
    let (channel, events) = (channel(), std::array::from_fn::<_, 64, _>(|_| Arc::new(event())));
    bencher.counter(ItemsCount::new(64_u32)).bench(|| frame::EVENT.encode(black_box(&channel), &events));
}

// === append ===

#[divan::bench]
fn append(bencher: Bencher) {
    let (bus, channel, data) = (bus(), channel(), data());
    bencher
        .with_inputs(|| draft(&data))
        .bench_local_values(|draft| bus.publish_one("", &channel, draft).now_or_never().unwrap().unwrap());
}

// === tokens ===

fn positions(channels: usize) -> (Vec<Channel>, Vec<Position>) {
    let name = |at| Channel::parse(&format!("orders/{at}")).unwrap();
    let position = |at| Position { epoch: Epoch::random(), offset: 1_000_000 + at as u64 };
    ((0..channels).map(name).collect(), (0..channels).map(position).collect())
}

#[divan::bench(args = [1, 10, 100])]
fn token_write(bencher: Bencher, channels: usize) {
    let (channels, positions) = positions(channels);
    bencher.bench(|| ResumeToken::encode(black_box(&channels), black_box(&positions)));
}

#[divan::bench(args = [1, 10, 100])]
fn token_read(bencher: Bencher, channels: usize) {
    let (channels, positions) = positions(channels);
    let text = ResumeToken::encode(&channels, &positions);
    bencher.bench(|| black_box(&text).parse::<AfterParam>().unwrap().starts(black_box(&channels)).unwrap());
}

// === a step of a subscription ===

/// The work of the bus for one delivery: an event is appended, and each reader wakes, gets the shared frame and is
/// parked again.
#[divan::bench(args = [1, 100, 10_000])]
fn subscription_step(bencher: Bencher, readers: usize) {
    let (bus, channel, data) = (bus(), channel(), data());
    let mut context = Context::from_waker(Waker::noop());
    let mut subscriptions: Vec<Subscriptions> = (0..readers)
        .map(|_| {
            let mut subscriptions = Subscriptions::new(&frame::EVENT);
            let watch = bus.watch(std::slice::from_ref(&channel)).now_or_never().unwrap().unwrap().pop().unwrap();
            subscriptions.add(watch, Start::Now, None);
            assert!(subscriptions.poll_next(&mut context).is_pending());
            subscriptions
        })
        .collect();
    bencher.counter(ItemsCount::new(readers)).with_inputs(|| draft(&data)).bench_local_values(|draft| {
        let _ = bus.publish_one("", &channel, draft).now_or_never().unwrap().unwrap();
        for reader in &mut subscriptions {
            let Poll::Ready(delivery) = reader.poll_next(&mut context) else { panic!("nothing to read") };
            assert!(matches!(black_box(delivery.item), DeliveryItem::Events { count: 1, .. }));
            assert!(reader.poll_next(&mut context).is_pending());
        }
    });
}

// === calls ===

/// A provider that stores the last call written to it.
#[derive(Default)]
struct Quiet(Mutex<Option<CallId>>);

impl Peer for Quiet {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        *self.0.lock().unwrap() = call.id;
        WriteOutcome::Written
    }

    fn cancel(&self, _: CallId) {}

    fn answer(&self, _: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        assert!(matches!(answer, CallAnswer::Result(_)));
        PeerRoom::Free
    }

    fn late(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
        PeerRoom::Free
    }

    fn withdrawn(&self, _: &str, _: &str) {}
}

/// A call that is routed to its provider and its reply to the caller, with a number of registered providers.
#[divan::bench(args = [1, 8])]
fn call_routing(bencher: Bencher, providers: usize) {
    let hub = Hub::new(Arc::default(), MonotonicClock::real(), single_node(), Arc::default());
    let peers: Vec<(Arc<Quiet>, HubConnection)> = (0..providers)
        .map(|_| {
            let peer = Arc::new(Quiet::default());
            let connection = HubConnection::new(&hub, peer.clone());
            drop(connection.provide(&ProvideRequest::new("jwt-service")).try_finish().ok().unwrap().unwrap());
            (peer, connection)
        })
        .collect();
    let caller = HubConnection::new(&hub, Arc::new(Quiet::default()));
    let params = data();
    bencher.bench_local(|| {
        caller.call(CallerId::new(b"17"), &Call::new("jwt-service", "generate", Some(&params)));
        let written = peers.iter().find_map(|(peer, connection)| Some((peer.0.lock().unwrap().take()?, connection)));
        let (id, connection) = written.unwrap();
        connection.reply(id, CallAnswer::Result(&params))
    });
}
