//! [`SubscriptionStream`]: a response that is held open for events of the bus in an adapter's own words.
//!
//! The adapter gives the shared [`Format`](crate::bus::Format) of its [`Subscriptions`], the head and the first bytes, and a
//! [`StreamHandler`] for all that is said beside events. Drain, stalled peers, metrics and leaving hyper are done here, as for
//! weir's own streams.
//!
//! Watch the channels and [`add`](Subscriptions::add) them before the response is returned: what is published once a
//! client has read the head is then never missed.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::Response;

use crate::{
    auth::Identity,
    bus::{Delivery, DeliveryItem, Gap, Subscriptions},
    error::Code,
    metrics::{OpenConnection, Transport},
    net::{
        chunk,
        stream::{Progress, StreamOutput, StreamResponse, StreamSource},
        timer::{Due, Timer, TimerWheel},
    },
    node::Node,
    sessions::{ChannelSet, ConnectionRegistration},
};

/// How often a stream without a keep-alive reports what it delivered.
const REPORT: Duration = Duration::from_secs(20);

/// What one stream says beside events, and about them. Everything pushed is a whole [chunk](super::chunk).
pub trait StreamHandler: Send + Unpin + 'static {
    /// How often [`keep_alive`](Self::keep_alive) is sent; `None` for never.
    fn beat(&self) -> Option<Beat> {
        None
    }

    fn keep_alive(&mut self) -> Bytes {
        Bytes::new()
    }

    /// Pushes what this reader alone is to hear now, before newer events. Leaves the task's waker where more will come
    /// from.
    fn poll_aside(&mut self, _: &mut Context<'_>, _: &mut StreamOutput) -> Then {
        Then::GoOn
    }

    /// Changes what is read, between what was said aside and the next events.
    fn tune(&mut self, _: &mut Subscriptions) {}

    /// Pushes the `count` events of one subscription, encoded as its format wants them and shared with other readers.
    fn events(&mut self, _slot: u32, bytes: Bytes, _count: u32, out: &mut StreamOutput) -> Then {
        out.push(bytes);
        Then::GoOn
    }

    /// History is missing here, since this reader was too slow for what is kept. Who has no word for it ends the stream:
    /// the client comes back, and knows that it was away.
    fn gap(&mut self, _: &Gap, _: &mut StreamOutput) -> Then {
        Then::End(Code::Slow)
    }

    /// Pushes the last words of a stream that weir ends.
    fn farewell(&mut self, _: Code, _: &mut StreamOutput) {}
}

/// How a stream is kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// After so long without anything else.
    Silence(Duration),
    /// This often, whatever else is sent.
    Always(Duration),
}

/// Whether a stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    GoOn,
    /// More is to be said aside: until then events wait.
    Wait,
    /// Ends, as agreed.
    Done,
    /// Ends, for this reason.
    End(Code),
}

/// Last words to an `EventSource`: when to come back, so that not all do at once. Who was kicked is to stay away.
pub fn retry(code: Code) -> Bytes {
    let ms = if code == Code::Kicked { i32::MAX } else { fastrand::i32(1_000..4_000) };
    chunk::of(format!("retry: {ms}\n").as_bytes())
}

/// A stream of an adapter. See the [module](self).
pub struct SubscriptionStream<V> {
    subs: Subscriptions,
    voice: V,
    node: Arc<Node>,
    timer: Timer,
    registration: ConnectionRegistration,
    connected: OpenConnection,
    /// Ticks: when anything was last pushed (or, of [`Beat::Always`], the last keep-alive).
    last: u32,
    /// Events and bytes handed over since they were last added to the metrics.
    events: u32,
    bytes: u64,
    ended: bool,
}

impl<V: StreamHandler> SubscriptionStream<V> {
    pub fn new(node: &Arc<Node>, subs: Subscriptions, voice: V) -> Self {
        let mut timer = node.timers.timer(period(&voice));
        let channels = (0..subs.len() as u32).filter_map(|slot| subs.channel(slot).cloned());
        let registration =
            node.sessions.register(Transport::Sse, &Identity::anonymous(), None, ChannelSet::new(channels.collect()));
        timer.set_owner(registration.number());
        node.metrics.subscriptions[Transport::Sse].add(subs.len() as i64);
        SubscriptionStream {
            connected: node.metrics.connected(Transport::Sse),
            node: node.clone(),
            last: timer.now(),
            events: 0,
            bytes: 0,
            ended: false,
            subs,
            voice,
            registration,
            timer,
        }
    }

    /// Makes the held stream of a head. `first` are chunks.
    pub fn respond(self, head: Response<()>, first: Vec<Bytes>) -> Response<Body> {
        StreamResponse::new(self, first).respond(head)
    }

    fn tick(&mut self, blocked: bool, out: &mut StreamOutput) {
        self.report();
        out.relax();
        let Some(Beat::Silence(after) | Beat::Always(after)) = self.voice.beat() else {
            return self.timer.reset(REPORT);
        };
        let now = self.timer.now();
        let mut left = after.saturating_sub(TimerWheel::span(self.last, now));
        if left.is_zero() {
            if !blocked && !self.ended {
                out.push(self.voice.keep_alive());
            }
            self.last = now;
            left = after;
        }
        self.timer.reset(left);
    }

    /// Whether the stream goes on.
    fn then(&mut self, then: Then, out: &mut StreamOutput) -> bool {
        match then {
            Then::GoOn => return true,
            Then::Wait => {}
            Then::Done => {
                self.connected.completed();
                self.ended = true;
                out.end();
            }
            Then::End(code) => self.end(code, out),
        }
        false
    }

    fn end(&mut self, code: Code, out: &mut StreamOutput) {
        if !self.ended {
            self.ended = true;
            self.connected.closed_with(code);
            self.voice.farewell(code, out);
            out.end();
        }
    }

    fn report(&mut self) {
        self.node.metrics.delivered[Transport::Sse].add(std::mem::take(&mut self.events).into());
        self.node.metrics.delivered_bytes[Transport::Sse].add(std::mem::take(&mut self.bytes));
    }
}

fn period(voice: &impl StreamHandler) -> Duration {
    match voice.beat() {
        Some(Beat::Silence(after) | Beat::Always(after)) => after,
        None => REPORT,
    }
}

impl<V: StreamHandler> StreamSource for SubscriptionStream<V> {
    fn poll_time(&mut self, cx: &mut Context<'_>, blocked: bool, out: &mut StreamOutput) {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                Due::Leave => self.end(Code::Draining, out),
                Due::Kicked => self.end(Code::Kicked, out),
                Due::Time => self.tick(blocked, out),
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress {
        if self.ended {
            return Progress::Ended;
        }
        let before = out.len();
        let aside = self.voice.poll_aside(cx, out);
        let subs = self.subs.len() as i64;
        self.voice.tune(&mut self.subs);
        let more = self.subs.len() as i64 - subs;
        if more != 0 {
            self.node.metrics.subscriptions[Transport::Sse].add(more);
        }
        let mut turn = Progress::Idle;
        if !self.then(aside, out) {
            turn = match aside {
                Then::Wait if out.is_full() => Progress::Full,
                Then::Wait => Progress::Idle,
                _ => return Progress::Ended,
            };
        } else if self.subs.poll_turn(cx).is_ready() {
            turn = loop {
                if out.is_full() {
                    break Progress::Full;
                }
                let Some(Delivery { slot, item }) = self.subs.take() else { break Progress::Idle };
                let then = match item {
                    DeliveryItem::Events { bytes, count } => {
                        self.events += count;
                        self.bytes += bytes.len() as u64;
                        self.voice.events(slot, bytes, count, out)
                    }
                    DeliveryItem::Gap(gap) => {
                        self.node.metrics.gap(gap.reason.as_str());
                        self.voice.gap(&gap, out)
                    }
                };
                if !self.then(then, out) {
                    // What it wants to say aside it is asked for at the next turn.
                    break if then == Then::Wait { Progress::Full } else { Progress::Ended };
                }
            };
        }
        if out.len() > before && !matches!(self.voice.beat(), Some(Beat::Always(_))) {
            self.last = self.timer.now();
        }
        turn
    }

    fn connected(&mut self) -> &mut OpenConnection {
        &mut self.connected
    }

    fn timer(&mut self) -> &mut Timer {
        &mut self.timer
    }

    fn patience(&self) -> Duration {
        self.node.config.limits.stalled
    }

    fn met(&mut self, peer: SocketAddr) {
        self.registration.set_peer(peer);
    }
}

impl<V> Drop for SubscriptionStream<V> {
    fn drop(&mut self) {
        let metrics = &self.node.metrics;
        metrics.delivered[Transport::Sse].add(self.events.into());
        metrics.delivered_bytes[Transport::Sse].add(self.bytes);
        metrics.subscriptions[Transport::Sse].add(-(self.subs.len() as i64));
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        app,
        bus::Format,
        channel::Channel,
        config::{ChannelRule, Config, Keep},
        event::{Draft, DraftParts, EventData},
        metrics::Metrics,
        net::stream,
        position::Start,
    };

    static TEXT: Format = Format {
        open: chunk::open,
        event: |channel, event, out| {
            out.extend_from_slice(format!("{channel}={};", event.data_json().unwrap_or_default()).as_bytes())
        },
        close: chunk::close,
    };

    struct Test {
        beat: Option<Beat>,
        aside: Vec<Then>,
    }

    impl StreamHandler for Test {
        fn beat(&self) -> Option<Beat> {
            self.beat
        }
        fn keep_alive(&mut self) -> Bytes {
            chunk::of(b"alive;")
        }
        fn poll_aside(&mut self, _: &mut Context<'_>, out: &mut StreamOutput) -> Then {
            let Some(then) = self.aside.pop() else { return Then::GoOn };
            out.push(chunk::of(b"aside;"));
            then
        }
        fn farewell(&mut self, code: Code, out: &mut StreamOutput) {
            out.push(chunk::of(code.as_str().as_bytes()));
        }
    }

    struct Bench {
        node: Arc<Node>,
        channels: Vec<Channel>,
    }

    impl Bench {
        fn new() -> Self {
            let keep = Keep { count: 5, ..Keep::default() };
            let channels = vec![ChannelRule { pattern: "*".into(), keep }];
            let config = Config { channels, ..Config::default() };
            let node = app::node(config, None, Arc::new(Metrics::new()));
            let channels = ["a", "b"].map(|name| Channel::parse(name).unwrap()).into();
            Bench { node, channels }
        }

        async fn body(&self, beat: Option<Beat>, aside: Vec<Then>) -> Body {
            let mut subs = Subscriptions::new(&TEXT);
            for watch in self.node.bus.watch(&self.channels).await.unwrap() {
                subs.add(watch, Start::Now, None);
            }
            let held = SubscriptionStream::new(&self.node, subs, Test { beat, aside });
            held.respond(Response::new(()), vec![chunk::of(b"first;")]).into_body()
        }

        async fn publish(&self, channel: usize, text: &str) {
            let draft = Draft::new(DraftParts { data: EventData::Text(text), ..DraftParts::default() }, 1000).unwrap();
            self.node.bus.publish_one("", &self.channels[channel], draft).await.unwrap();
        }
    }

    async fn next(body: &mut Body) -> Option<String> {
        let frame = body.frame().await?.unwrap();
        Some(String::from_utf8(frame.into_data().unwrap().into()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn first_bytes_asides_events_and_keep_alive() {
        let bench = Bench::new();
        let mut body = bench.body(Some(Beat::Silence(Duration::from_secs(20))), vec![Then::GoOn]).await;
        // Published before anybody reads the body: it is subscribed already.
        bench.publish(1, "x").await;
        assert_eq!(next(&mut body).await.unwrap(), "first;");
        assert_eq!(next(&mut body).await.unwrap(), "aside;");
        assert_eq!(next(&mut body).await.unwrap(), r#"b="x";"#);
        tokio::time::sleep(Duration::from_secs(15)).await;
        bench.publish(0, "y").await;
        assert_eq!(next(&mut body).await.unwrap(), r#"a="y";"#);
        let quiet = Instant::now();
        assert_eq!(next(&mut body).await.unwrap(), "alive;");
        assert!((19..=21).contains(&quiet.elapsed().as_secs()), "{:?}", quiet.elapsed());
        assert_eq!((bench.node.timers.len(), bench.node.bus.topics().readers()), (1, 2));
        drop(body);
        assert_eq!((bench.node.timers.len(), bench.node.bus.topics().readers()), (0, 0));
        let gauge = |name: &str| bench.node.metrics.value(&format!("{name}{{transport=\"sse\"}}"));
        assert_eq!((gauge("weir_connections"), gauge("weir_subscriptions")), (0.0, 0.0));
        assert_eq!(gauge("weir_events_delivered_total"), 2.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_keep_alive_may_come_whatever_else_is_sent() {
        let bench = Bench::new();
        let mut body = bench.body(Some(Beat::Always(Duration::from_secs(20))), vec![]).await;
        assert_eq!(next(&mut body).await.unwrap(), "first;");
        let start = Instant::now();
        tokio::time::sleep(Duration::from_secs(15)).await;
        bench.publish(0, "y").await;
        assert_eq!(next(&mut body).await.unwrap(), r#"a="y";"#);
        assert_eq!(next(&mut body).await.unwrap(), "alive;");
        assert!(start.elapsed() <= Duration::from_secs(21));
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_is_as_agreed_by_a_gap_or_by_a_drain() {
        let bench = Bench::new();
        let mut done = bench.body(None, vec![Then::Done]).await;
        let mut slow = bench.body(None, vec![]).await;
        assert_eq!([next(&mut done).await, next(&mut slow).await], [Some("first;".into()), Some("first;".into())]);
        assert_eq!([next(&mut done).await, next(&mut done).await], [Some("aside;".into()), None]);
        for n in 0..9 {
            bench.publish(0, &n.to_string()).await;
        }
        assert_eq!([next(&mut slow).await, next(&mut slow).await], [Some("slow".into()), None]);
        let mut open = bench.body(None, vec![]).await;
        assert_eq!(next(&mut open).await.unwrap(), "first;");
        bench.node.timers.drain(Duration::ZERO);
        assert_eq!([next(&mut open).await, next(&mut open).await], [Some("draining".into()), None]);
    }

    #[test]
    fn an_idle_stream_is_small() {
        // A voice of four words fits what a native stream takes.
        let size = stream::size::<SubscriptionStream<Test>>() - size_of::<Test>();
        assert!(size <= 328, "{size}");
    }
}
