//! [`SubscriptionStream`]: a response that stays open for the events of some channels.
//!
//! The caller provides [`Subscriptions`] with the shared [`Format`](crate::bus::Format) of its protocol, the head of
//! the response, the first bytes, and a [`StreamHandler`] for everything that is sent beside events. Draining, stalled
//! peers, metrics and leaving hyper are handled here, for native SSE and for all adapters.
//!
//! Watch the channels and [`add`](Subscriptions::add) them before the response is returned: then no event is missed
//! that is published after the client has read the head.

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
        timer::{Due, TICK, Timer, TimerWheel},
    },
    node::Node,
    sessions::{ChannelSet, ConnectionRegistration},
};

/// How often a stream without heartbeat reports what it has delivered.
const REPORT: Duration = Duration::from_secs(20);

/// Defines what one stream sends beside events, and how it handles events. Everything that is pushed is a whole [chunk].
pub(crate) trait StreamHandler: Send + Unpin + 'static {
    /// How often [`on_heartbeat`](Self::on_heartbeat) is called; `None` for never. Evaluated at every write and tick, so
    /// that it may change at any time; a random interval must not be drawn here.
    fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
        None
    }

    /// Pushes a heartbeat. Not called while the client does not read.
    fn on_heartbeat(&mut self, _: &mut StreamContext<'_>) {}

    /// Pushes data for this client alone, ahead of newer events; may also change the subscriptions. Leaves the task's
    /// waker where more will come from.
    fn poll_direct(&mut self, _: &mut Context<'_>, _: &mut StreamContext<'_>) -> StreamAction {
        StreamAction::Continue
    }

    /// Pushes the `count` events of one subscription, encoded by its format and shared with other streams.
    fn on_events(&mut self, stream: &mut StreamContext<'_>, _slot: u32, bytes: Bytes, _count: u32) -> StreamAction {
        stream.out.push(bytes);
        StreamAction::Continue
    }

    /// Called where events are missing, because the client read slower than the log was trimmed. A protocol that cannot
    /// report this ends the stream, so that the client notices and reconnects.
    fn on_gap(&mut self, _: &mut StreamContext<'_>, _: &Gap) -> StreamAction {
        StreamAction::Close(Code::Slow)
    }

    /// Called after the last event of each write.
    fn on_batch_end(&mut self, _: &mut StreamContext<'_>) {}

    /// The tick at which [`on_deadline`](Self::on_deadline) is to be called.
    fn deadline(&self) -> Option<u32> {
        None
    }

    /// Called when the deadline has passed and the client reads.
    fn on_deadline(&mut self, _: &mut StreamContext<'_>) {}

    /// Pushes the last chunk of a stream that weir ends.
    fn on_end(&mut self, _: &mut StreamContext<'_>, _: Code) {}
}

/// The parts of a stream that its [`StreamHandler`] may use.
pub(crate) struct StreamContext<'a> {
    pub(crate) subscriptions: &'a mut Subscriptions,
    pub(crate) out: &'a mut StreamOutput,
    /// The current tick.
    pub(crate) now: u32,
}

/// When heartbeats are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeartbeatPolicy {
    /// After this time without any other data.
    WhenIdle(Duration),
    /// At this interval, whatever else is sent.
    Periodic(Duration),
}

/// How a stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamAction {
    Continue,
    /// Events wait until [`poll_direct`](StreamHandler::poll_direct) returns `Continue`.
    Wait,
    /// The stream is complete.
    Finish,
    /// The stream ends for this reason.
    Close(Code),
}

/// The delay after which a kicked client reconnects, in milliseconds. An `EventSource` cannot be told to stay away, and a
/// client that is kicked by mistake should come back without help.
pub(crate) const KICKED_RETRY: u32 = 5 * 60 * 1000;

/// A `retry:` line that ends the stream of an `EventSource`. The delay is random, so that clients do not reconnect all
/// at once; a kicked client gets [`KICKED_RETRY`].
pub(crate) fn retry_chunk(code: Code) -> Bytes {
    let ms = if code == Code::Kicked { KICKED_RETRY } else { fastrand::u32(1_000..4_000) };
    chunk::of(format!("retry: {ms}\n").as_bytes())
}

/// A stream of events. See the [module](self).
pub(crate) struct SubscriptionStream<H> {
    subscriptions: Subscriptions,
    handler: H,
    node: Arc<Node>,
    timer: Timer,
    registration: ConnectionRegistration,
    connected: OpenConnection,
    /// The tick of the last heartbeat or, unless heartbeats are [`HeartbeatPolicy::Periodic`], of the last data.
    last: u32,
    /// Events and bytes that were pushed since they were last added to the metrics.
    events: u32,
    bytes: u64,
    ended: bool,
}

impl<H: StreamHandler> SubscriptionStream<H> {
    /// A stream of the channels that it has subscribed to.
    pub(crate) fn new(
        node: &Arc<Node>,
        identity: &Identity,
        remote: Option<SocketAddr>,
        subscriptions: Subscriptions,
        handler: H,
    ) -> Self {
        let channels = (0..subscriptions.len() as u32).filter_map(|slot| subscriptions.channel(slot).cloned());
        let channels = ChannelSet::new(channels.collect());
        Self::for_channels(node, identity, remote, channels, subscriptions, handler)
    }

    /// `remote` is the client's address, where the stream runs inside hyper and cannot find out. `channels` are those that
    /// the handler has subscribed to, or will.
    pub(crate) fn for_channels(
        node: &Arc<Node>,
        identity: &Identity,
        remote: Option<SocketAddr>,
        channels: ChannelSet,
        subscriptions: Subscriptions,
        handler: H,
    ) -> Self {
        let first = period(&handler, node).unwrap_or_else(|| TimerWheel::ticks(REPORT));
        let mut timer = node.timers.timer(TICK * first);
        let registration = node.sessions.register(Transport::Sse, identity, remote, channels);
        timer.set_owner(registration.number());
        node.metrics.subscriptions[Transport::Sse].add(subscriptions.len() as i64);
        SubscriptionStream {
            connected: node.metrics.connected(Transport::Sse),
            node: node.clone(),
            last: timer.now(),
            events: 0,
            bytes: 0,
            ended: false,
            subscriptions,
            handler,
            registration,
            timer,
        }
    }

    /// Completes the response whose head is `head`. `first` are chunks.
    pub(crate) fn respond(self, head: Response<()>, first: Vec<Bytes>) -> Response<Body> {
        StreamResponse::new(self, first).respond(head)
    }

    /// The handler, and what it may use.
    fn parts<'a>(&'a mut self, out: &'a mut StreamOutput) -> (&'a mut H, StreamContext<'a>) {
        (&mut self.handler, StreamContext { now: self.timer.now(), subscriptions: &mut self.subscriptions, out })
    }

    fn tick(&mut self, blocked: bool, out: &mut StreamOutput) {
        self.report();
        out.shrink();
        let now = self.timer.now();
        let silent = blocked || self.ended;
        if period(&self.handler, &self.node).is_some_and(|period| now.saturating_sub(self.last) >= period) {
            self.last = now;
            if !silent {
                let (handler, mut stream) = self.parts(out);
                handler.on_heartbeat(&mut stream);
            }
        }
        if !silent && self.handler.deadline().is_some_and(|at| now >= at) {
            let (handler, mut stream) = self.parts(out);
            handler.on_deadline(&mut stream);
        }
        let next = match period(&self.handler, &self.node) {
            Some(period) => self.last.saturating_add(period),
            None => now + TimerWheel::ticks(REPORT),
        };
        let next = self.handler.deadline().map_or(next, |at| next.min(at));
        self.timer.reset(TimerWheel::span(now, next));
    }

    fn poll_events(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress {
        if self.subscriptions.poll_turn(cx).is_pending() {
            return Progress::Idle;
        }
        let progress = loop {
            if out.is_full() {
                break Progress::Full;
            }
            let Some(Delivery { slot, item }) = self.subscriptions.take() else { break Progress::Idle };
            let action = match item {
                DeliveryItem::Events { bytes, count } => {
                    self.events += count;
                    self.bytes += bytes.len() as u64;
                    let (handler, mut stream) = self.parts(out);
                    handler.on_events(&mut stream, slot, bytes, count)
                }
                DeliveryItem::Gap(gap) => {
                    self.node.metrics.gap(gap.reason.as_str());
                    let (handler, mut stream) = self.parts(out);
                    handler.on_gap(&mut stream, &gap)
                }
            };
            if !self.apply(action, out) {
                // The handler is polled again at the next turn.
                return if action == StreamAction::Wait { Progress::Full } else { Progress::Ended };
            }
        };
        let (handler, mut stream) = self.parts(out);
        handler.on_batch_end(&mut stream);
        if let Some(at) = self.handler.deadline() {
            self.timer.shorten(TimerWheel::span(self.timer.now(), at));
        }
        progress
    }

    /// Whether events may follow.
    fn apply(&mut self, action: StreamAction, out: &mut StreamOutput) -> bool {
        match action {
            StreamAction::Continue => return true,
            StreamAction::Wait => {}
            StreamAction::Finish => {
                self.connected.completed();
                self.ended = true;
                out.finish();
            }
            StreamAction::Close(code) => self.end(code, out),
        }
        false
    }

    fn end(&mut self, code: Code, out: &mut StreamOutput) {
        if !self.ended {
            self.ended = true;
            self.connected.closed_with(code);
            let (handler, mut stream) = self.parts(out);
            handler.on_end(&mut stream, code);
            out.finish();
        }
    }

    fn report(&mut self) {
        let (events, bytes) = (std::mem::take(&mut self.events), std::mem::take(&mut self.bytes));
        self.node.metrics.events_delivered(Transport::Sse, events.into(), bytes);
    }
}

/// The ticks between heartbeats.
fn period(handler: &impl StreamHandler, node: &Node) -> Option<u32> {
    let (HeartbeatPolicy::WhenIdle(after) | HeartbeatPolicy::Periodic(after)) = handler.heartbeat(node)?;
    Some(TimerWheel::ticks(after))
}

impl<H: StreamHandler> StreamSource for SubscriptionStream<H> {
    fn poll_timer(&mut self, cx: &mut Context<'_>, blocked: bool, out: &mut StreamOutput) {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                Due::Leave => self.end(Code::Draining, out),
                Due::Kicked(code) => self.end(code, out),
                Due::Time => self.tick(blocked, out),
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress {
        if self.ended {
            return Progress::Ended;
        }
        let (before, subscribed) = (out.len(), self.subscriptions.len() as i64);
        let (handler, mut stream) = self.parts(out);
        let action = handler.poll_direct(cx, &mut stream);
        let more = self.subscriptions.len() as i64 - subscribed;
        if more != 0 {
            self.node.metrics.subscriptions[Transport::Sse].add(more);
        }
        let progress = if self.apply(action, out) {
            self.poll_events(cx, out)
        } else {
            match action {
                StreamAction::Wait if out.is_full() => Progress::Full,
                StreamAction::Wait => Progress::Idle,
                _ => return Progress::Ended,
            }
        };
        if out.len() > before && !matches!(self.handler.heartbeat(&self.node), Some(HeartbeatPolicy::Periodic(_))) {
            self.last = self.timer.now();
        }
        progress
    }

    fn connected(&mut self) -> &mut OpenConnection {
        &mut self.connected
    }

    fn timer(&mut self) -> &mut Timer {
        &mut self.timer
    }

    fn stall_timeout(&self) -> Duration {
        self.node.config.limits.stalled
    }

    fn set_peer(&mut self, peer: SocketAddr) {
        self.registration.set_peer(peer);
    }
}

impl<H> Drop for SubscriptionStream<H> {
    fn drop(&mut self) {
        let metrics = &self.node.metrics;
        metrics.events_delivered(Transport::Sse, self.events.into(), self.bytes);
        metrics.subscriptions[Transport::Sse].add(-(self.subscriptions.len() as i64));
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

    struct TestHandler {
        heartbeat: Option<HeartbeatPolicy>,
        /// Replaces `heartbeat` when direct data is pushed.
        later: Option<HeartbeatPolicy>,
        actions: Vec<StreamAction>,
    }

    impl StreamHandler for TestHandler {
        fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
            self.heartbeat
        }
        fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
            stream.out.push(chunk::of(b"alive;"));
        }
        fn poll_direct(&mut self, _: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
            let Some(action) = self.actions.pop() else { return StreamAction::Continue };
            stream.out.push(chunk::of(b"direct;"));
            self.heartbeat = self.later.or(self.heartbeat);
            action
        }
        fn on_end(&mut self, stream: &mut StreamContext<'_>, code: Code) {
            stream.out.push(chunk::of(code.as_str().as_bytes()));
        }
    }

    struct Fixture {
        node: Arc<Node>,
        channels: Vec<Channel>,
    }

    impl Fixture {
        fn new() -> Self {
            let keep = Keep { count: 5, ..Keep::default() };
            let channels = vec![ChannelRule { pattern: "*".into(), keep }];
            let config = Config { channels, ..Config::default() };
            let node = app::open_node(config);
            let channels = ["a", "b"].map(|name| Channel::parse(name).unwrap()).into();
            Fixture { node, channels }
        }

        async fn body(&self, heartbeat: Option<HeartbeatPolicy>, actions: Vec<StreamAction>) -> Body {
            self.respond(TestHandler { heartbeat, later: None, actions }).await
        }

        async fn respond(&self, handler: TestHandler) -> Body {
            let mut subs = Subscriptions::new(&TEXT);
            for watch in self.node.bus.watch(&self.channels).await.unwrap() {
                subs.add(watch, Start::Now, None);
            }
            let held = SubscriptionStream::new(&self.node, &Identity::open(false), None, subs, handler);
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
    async fn first_bytes_direct_data_events_and_heartbeat() {
        let fixture = Fixture::new();
        let mut body =
            fixture.body(Some(HeartbeatPolicy::WhenIdle(Duration::from_secs(20))), vec![StreamAction::Continue]).await;
        // Published before the body is first read: it is subscribed already.
        fixture.publish(1, "x").await;
        assert_eq!(next(&mut body).await.unwrap(), "first;");
        assert_eq!(next(&mut body).await.unwrap(), "direct;");
        assert_eq!(next(&mut body).await.unwrap(), r#"b="x";"#);
        tokio::time::sleep(Duration::from_secs(15)).await;
        fixture.publish(0, "y").await;
        assert_eq!(next(&mut body).await.unwrap(), r#"a="y";"#);
        let quiet = Instant::now();
        assert_eq!(next(&mut body).await.unwrap(), "alive;");
        assert!((19..=21).contains(&quiet.elapsed().as_secs()), "{:?}", quiet.elapsed());
        assert_eq!((fixture.node.timers.len(), fixture.node.bus.topics().readers()), (1, 2));
        drop(body);
        assert_eq!((fixture.node.timers.len(), fixture.node.bus.topics().readers()), (0, 0));
        let gauge = |name: &str| fixture.node.metrics.value(&format!("{name}{{transport=\"sse\"}}"));
        assert_eq!((gauge("weir_connections"), gauge("weir_subscriptions")), (0.0, 0.0));
        assert_eq!(gauge("weir_events_delivered_total"), 2.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_periodic_heartbeat_is_sent_whatever_else_is() {
        let fixture = Fixture::new();
        let mut body = fixture.body(Some(HeartbeatPolicy::Periodic(Duration::from_secs(20))), vec![]).await;
        assert_eq!(next(&mut body).await.unwrap(), "first;");
        let start = Instant::now();
        tokio::time::sleep(Duration::from_secs(15)).await;
        fixture.publish(0, "y").await;
        assert_eq!(next(&mut body).await.unwrap(), r#"a="y";"#);
        assert_eq!(next(&mut body).await.unwrap(), "alive;");
        assert!(start.elapsed() <= Duration::from_secs(21));
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_that_is_set_later_is_not_sent_early() {
        let fixture = Fixture::new();
        for before in [None, Some(HeartbeatPolicy::WhenIdle(Duration::from_secs(10)))] {
            let later = Some(HeartbeatPolicy::WhenIdle(Duration::from_secs(55)));
            let mut body =
                fixture.respond(TestHandler { heartbeat: before, later, actions: vec![StreamAction::Continue] }).await;
            assert_eq!(next(&mut body).await.unwrap(), "first;");
            assert_eq!(next(&mut body).await.unwrap(), "direct;");
            let start = Instant::now();
            assert_eq!(next(&mut body).await.unwrap(), "alive;");
            assert!((54..=56).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_by_its_handler_by_a_gap_or_by_a_drain() {
        let fixture = Fixture::new();
        let mut done = fixture.body(None, vec![StreamAction::Finish]).await;
        let mut slow = fixture.body(None, vec![]).await;
        assert_eq!([next(&mut done).await, next(&mut slow).await], [Some("first;".into()), Some("first;".into())]);
        assert_eq!([next(&mut done).await, next(&mut done).await], [Some("direct;".into()), None]);
        for n in 0..9 {
            fixture.publish(0, &n.to_string()).await;
        }
        assert_eq!([next(&mut slow).await, next(&mut slow).await], [Some("slow".into()), None]);
        let mut open = fixture.body(None, vec![]).await;
        assert_eq!(next(&mut open).await.unwrap(), "first;");
        fixture.node.timers.drain(Duration::ZERO);
        assert_eq!([next(&mut open).await, next(&mut open).await], [Some("draining".into()), None]);
    }

    #[test]
    fn an_idle_stream_is_small() {
        // A handler of 40 bytes more fits the allocation of a native stream.
        let size = stream::task_size::<SubscriptionStream<TestHandler>>() - size_of::<TestHandler>();
        assert!(size <= 328, "{size}");
    }
}
