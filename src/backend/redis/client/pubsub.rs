//! [`PubSub`]: subscriptions that outlive connections. A wanted channel is subscribed to, in batches, again after every
//! break and wherever a Cluster moves it; each time the handler is told, since messages in between are lost.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use redis::{PushKind, Value, cmd};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    connection::RedisConnection,
    error_reply::ErrorReply,
    pipeline::PushHandler,
    reconnect::{ConnectTo, ReconnectState, ReconnectingConnection},
    topology::Topology,
    url::Address,
};
use crate::metrics::{MetricLabel as _, RedisConnectionKind};

/// Subscriptions that may be unconfirmed before more are sent.
const BATCH: usize = 512;
/// A subscription that is not confirmed within this is sent again.
const CONFIRM: Duration = Duration::from_secs(2);

/// Called from the task that reads the connection: it must not block.
pub trait PubSubHandler: Send + Sync + 'static {
    /// A message, in the order of its channel.
    fn on_message(&self, channel: &[u8], message: Bytes);

    /// From here on no message is missed, until this is called again: messages before that may have been.
    fn on_subscribed(&self, channel: &[u8]);
}

pub struct PubSub {
    topology: Arc<Topology>,
    handler: Arc<dyn PubSubHandler>,
    kind: RedisConnectionKind,
    state: Mutex<PubSubState>,
    router: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct PubSubState {
    subscriptions: HashMap<Bytes, RedisSubscription>,
    routes: BTreeMap<Address, PubSubRoute>,
}

#[derive(Clone)]
struct RedisSubscription {
    /// The server to subscribe on; none while no server owns the slot.
    server: Option<Address>,
    stage: SubscribeStage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SubscribeStage {
    /// Waits for its turn.
    Queued,
    /// Sent on the connection with this number, at that time, and not confirmed yet.
    Sent(u64, Instant),
    Confirmed(u64),
}

/// The subscriptions on one server.
struct PubSubRoute {
    reconnecting: Arc<ReconnectingConnection>,
    connection: Option<Arc<RedisConnection>>,
    queue: VecDeque<Bytes>,
    /// Sent on this connection and not confirmed.
    unconfirmed: usize,
    /// There is something to send, or room to send it.
    wake: Arc<Notify>,
    worker: JoinHandle<()>,
}

/// Handles the pushes of one connection.
struct RoutePushHandler {
    pubsub: Weak<PubSub>,
    server: Address,
    number: u64,
}

impl PubSub {
    pub fn start(topology: Arc<Topology>, kind: RedisConnectionKind, handler: Arc<dyn PubSubHandler>) -> Arc<Self> {
        let pubsub = Arc::new(PubSub { topology, handler, kind, state: Mutex::default(), router: Mutex::default() });
        *pubsub.router.lock() = Some(tokio::spawn(follow(Arc::downgrade(&pubsub), pubsub.topology.changes())));
        pubsub
    }

    /// Adds a channel. [`on_subscribed`](PubSubHandler::on_subscribed) is called when Redis has confirmed it.
    pub fn subscribe(self: &Arc<Self>, channel: Bytes) {
        let mut state = self.state.lock();
        if !state.subscriptions.contains_key(&channel) {
            let subscription = RedisSubscription { server: None, stage: SubscribeStage::Queued };
            state.subscriptions.insert(channel.clone(), subscription);
            self.enqueue(&mut state, channel);
        }
    }

    /// Removes a channel. False, and nothing is done, while its subscription is unconfirmed: its confirmation could not
    /// be told from that of a later subscription.
    pub fn unsubscribe(&self, channel: &[u8]) -> bool {
        let mut state = self.state.lock();
        match state.subscriptions.get(channel) {
            None => true,
            Some(RedisSubscription { stage: SubscribeStage::Sent(..), .. }) => false,
            Some(_) => {
                if let Some((channel, subscription)) = state.subscriptions.remove_entry(channel) {
                    self.send_unsubscribe(&mut state, &channel, &subscription);
                }
                true
            }
        }
    }

    /// Whether the channel is subscribed to on a connection that is up.
    pub fn is_subscribed(&self, channel: &[u8]) -> bool {
        let state = self.state.lock();
        let Some(RedisSubscription { server: Some(server), stage: SubscribeStage::Confirmed(on) }) =
            state.subscriptions.get(channel)
        else {
            return false;
        };
        let connection = state.routes.get(server).and_then(|route| route.connection.as_ref());
        connection.is_some_and(|connection| connection.number == *on && !connection.is_closed())
    }

    /// Replaces the connection that a channel is subscribed on.
    pub(crate) fn reconnect(&self, channel: &[u8]) {
        let state = self.state.lock();
        let server = state.subscriptions.get(channel).and_then(|subscription| subscription.server.as_ref());
        if let Some(route) = server.and_then(|server| state.routes.get(server)) {
            route.reconnecting.replace();
        }
    }

    /// Queues a channel at the server that owns its slot.
    fn enqueue(self: &Arc<Self>, state: &mut PubSubState, channel: Bytes) {
        let server = self.topology.owner_address(&channel);
        let Some(subscription) = state.subscriptions.get_mut(&channel) else { return };
        subscription.stage = SubscribeStage::Queued;
        subscription.server = server.as_ref().map(|(server, _)| server.clone());
        let Some((server, connect_to)) = server else { return };
        let route = state.routes.entry(server.clone()).or_insert_with(|| PubSubRoute::start(self, server, &connect_to));
        // Ahead of those that come back after a break: a reader waits for this one now.
        route.queue.push_front(channel);
        route.wake.notify_one();
    }

    fn send_unsubscribe(&self, state: &mut PubSubState, channel: &Bytes, subscription: &RedisSubscription) {
        let route = subscription.server.as_ref().and_then(|server| state.routes.get_mut(server));
        let (Some(route), SubscribeStage::Sent(on, _) | SubscribeStage::Confirmed(on)) = (route, subscription.stage)
        else {
            return;
        };
        let Some(connection) = route.connection.as_ref().filter(|connection| connection.number == on) else { return };
        let verb = if self.topology.is_cluster() { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" };
        // If it cannot be sent, the connection ends, and the subscription with it.
        let _ = connection.send(cmd(verb).arg(&**channel));
        if matches!(subscription.stage, SubscribeStage::Sent(..)) {
            route.unconfirmed -= 1.min(route.unconfirmed);
            route.wake.notify_one();
        }
    }

    /// Another server is the master, or owns some of the slots.
    fn reroute(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if !self.topology.is_cluster() {
            state.routes.values().for_each(|route| route.reconnecting.replace());
            return;
        }
        let moved = state.subscriptions.iter().filter(|(channel, subscription)| {
            self.topology.owner_address(channel).map(|(server, _)| server) != subscription.server
        });
        let moved: Vec<_> = moved.map(|(channel, subscription)| (channel.clone(), subscription.clone())).collect();
        for (channel, subscription) in moved {
            self.send_unsubscribe(&mut state, &channel, &subscription);
            self.enqueue(&mut state, channel);
        }
        let PubSubState { subscriptions, routes } = &mut *state;
        let used: HashSet<&Address> = subscriptions.values().filter_map(|of| of.server.as_ref()).collect();
        routes.retain(|server, _| used.contains(server));
    }

    /// A route has a new connection, on which nothing is subscribed yet.
    fn on_connected(&self, server: &Address, connection: Arc<RedisConnection>) {
        let mut state = self.state.lock();
        let PubSubState { subscriptions, routes } = &mut *state;
        let Some(route) = routes.get_mut(server) else { return };
        route.connection = Some(connection);
        route.unconfirmed = 0;
        route.queue.clear();
        for (channel, subscription) in subscriptions {
            if subscription.server.as_ref() == Some(server) {
                subscription.stage = SubscribeStage::Queued;
                route.queue.push_back(channel.clone());
            }
        }
    }

    /// Sends as many subscriptions as there is room for. True if some are unconfirmed.
    fn send_subscribes(&self, server: &Address) -> bool {
        let mut state = self.state.lock();
        let PubSubState { subscriptions, routes } = &mut *state;
        let Some(route) = routes.get_mut(server) else { return false };
        let Some(connection) = route.connection.clone() else { return false };
        let (mut subscribe, mut any, now) = (cmd("SUBSCRIBE"), false, Instant::now());
        while route.unconfirmed < BATCH {
            let Some(channel) = route.queue.pop_front() else { break };
            let Some(subscription) = subscriptions.get_mut(&channel) else { continue };
            if subscription.server.as_ref() != Some(server) || subscription.stage != SubscribeStage::Queued {
                continue;
            }
            subscription.stage = SubscribeStage::Sent(connection.number, now);
            route.unconfirmed += 1;
            if self.topology.is_cluster() {
                // The channels of one command must share a slot.
                let _ = connection.send(cmd("SSUBSCRIBE").arg(&*channel));
            } else {
                subscribe.arg(&*channel);
                any = true;
            }
        }
        if any {
            let _ = connection.send(&subscribe);
        }
        route.unconfirmed > 0
    }

    /// Queues again the subscriptions that were not confirmed in time. Returns when the next one is due.
    fn retry_unconfirmed(&self, server: &Address) -> Option<Instant> {
        let mut state = self.state.lock();
        let PubSubState { subscriptions, routes } = &mut *state;
        let route = routes.get_mut(server)?;
        let (now, mut next) = (Instant::now(), None);
        for (channel, subscription) in subscriptions {
            let SubscribeStage::Sent(_, at) = subscription.stage else { continue };
            if subscription.server.as_ref() != Some(server) {
                continue;
            }
            let due = at + CONFIRM;
            if due <= now {
                subscription.stage = SubscribeStage::Queued;
                route.unconfirmed -= 1.min(route.unconfirmed);
                route.queue.push_back(channel.clone());
            } else {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
        }
        next
    }

    fn on_confirmed(&self, server: &Address, number: u64, channel: &[u8]) {
        let mut state = self.state.lock();
        let PubSubState { subscriptions, routes } = &mut *state;
        let Some(subscription) = subscriptions.get_mut(channel).filter(|of| of.server.as_ref() == Some(server)) else {
            return;
        };
        if !matches!(subscription.stage, SubscribeStage::Sent(on, _) if on == number) {
            return;
        }
        subscription.stage = SubscribeStage::Confirmed(number);
        if let Some(route) = routes.get_mut(server) {
            route.unconfirmed -= 1.min(route.unconfirmed);
            if route.unconfirmed == 0 || !route.queue.is_empty() {
                route.wake.notify_one();
            }
        }
        drop(state);
        self.handler.on_subscribed(channel);
    }

    /// The server ended a subscription, because its slot has moved.
    fn on_unsubscribed(self: &Arc<Self>, server: &Address, number: u64, channel: &[u8]) {
        let mut state = self.state.lock();
        let Some((channel, subscription)) = state.subscriptions.get_key_value(channel) else { return };
        if subscription.server.as_ref() == Some(server) && subscription.stage == SubscribeStage::Confirmed(number) {
            let channel = channel.clone();
            self.enqueue(&mut state, channel);
            self.topology.doubt();
        }
    }
}

impl Drop for PubSub {
    fn drop(&mut self) {
        if let Some(router) = self.router.lock().take() {
            router.abort();
        }
    }
}

impl PubSubRoute {
    fn start(pubsub: &Arc<PubSub>, server: Address, connect_to: &ConnectTo) -> Self {
        let wake = Arc::new(Notify::new());
        let handlers = {
            let (pubsub, server) = (Arc::downgrade(pubsub), server.clone());
            Arc::new(move |number| -> Arc<dyn PushHandler> {
                Arc::new(RoutePushHandler { pubsub: pubsub.clone(), server: server.clone(), number })
            })
        };
        let reconnecting = Arc::new(pubsub.topology.connect(connect_to, pubsub.kind, handlers));
        let worker = tokio::spawn(subscribe(Arc::downgrade(pubsub), server, reconnecting.changes(), wake.clone()));
        PubSubRoute { reconnecting, connection: None, queue: VecDeque::new(), unconfirmed: 0, wake, worker }
    }
}

impl Drop for PubSubRoute {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

/// Follows the slots of a Cluster, and the master of Sentinel.
async fn follow(pubsub: Weak<PubSub>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        let Some(pubsub) = pubsub.upgrade() else { return };
        pubsub.reroute();
    }
}

/// Subscribes on one server, as there is room, and again on each new connection.
async fn subscribe(
    pubsub: Weak<PubSub>,
    server: Address,
    mut changes: watch::Receiver<ReconnectState>,
    wake: Arc<Notify>,
) {
    let mut number = 0;
    // Not reset by each wake-up: those may be frequent.
    let mut due: Option<Instant> = None;
    loop {
        let unconfirmed = {
            let Some(pubsub) = pubsub.upgrade() else { return };
            let up = match &*changes.borrow_and_update() {
                ReconnectState::Up(connection) if connection.number != number => Some(connection.clone()),
                _ => None,
            };
            if let Some(connection) = up {
                number = connection.number;
                due = None;
                pubsub.on_connected(&server, connection);
            }
            pubsub.send_subscribes(&server)
        };
        let at = Instant::now() + CONFIRM;
        due = unconfirmed.then(|| due.unwrap_or(at));
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = wake.notified() => {}
            () = sleep_until(due.unwrap_or(at)), if unconfirmed => {
                let Some(pubsub) = pubsub.upgrade() else { return };
                due = pubsub.retry_unconfirmed(&server);
            }
        }
    }
}

// === impl RoutePushHandler ===

impl PushHandler for RoutePushHandler {
    fn on_push(&self, kind: PushKind, data: Vec<Value>) {
        let Some(pubsub) = self.pubsub.upgrade() else { return };
        let mut data = data.into_iter();
        let Some(Value::BulkString(channel)) = data.next() else { return };
        match kind {
            PushKind::Message | PushKind::SMessage => {
                if let Some(Value::BulkString(message)) = data.next() {
                    pubsub.handler.on_message(&channel, message.into());
                }
            }
            PushKind::Subscribe | PushKind::SSubscribe => pubsub.on_confirmed(&self.server, self.number, &channel),
            PushKind::SUnsubscribe => pubsub.on_unsubscribed(&self.server, self.number, &channel),
            _ => {}
        }
    }

    fn on_error(&self, error: &str) {
        let Some(pubsub) = self.pubsub.upgrade() else { return };
        match ErrorReply::parse(error, &self.server) {
            ErrorReply::Moved(slot, address) => pubsub.topology.moved(slot, &address),
            ErrorReply::TryAgain | ErrorReply::Ask(_) => pubsub.topology.doubt(),
            // A subscription that is not confirmed is sent again.
            _ => tracing::warn!(lane = pubsub.kind.value(), error, "Redis rejects a subscription"),
        }
    }
}
