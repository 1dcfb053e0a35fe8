//! [`PubSub`]: subscriptions that outlive connections. A channel that is wanted is subscribed to, again after every break
//! and wherever a Cluster moves it, in batches; and it is said each time, since what was published in between is lost.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    connection::{PushHandler, RedisConnection},
    reconnect::{ReconnectingConnection, State as LaneState, Target},
    resp::{Command, Value},
    topology::{ErrorReply, Topology},
    url::Address,
};
use crate::metrics::{Label as _, RedisConnectionKind};

/// Channels asked for, and not confirmed, before more are.
const BATCH: usize = 512;
/// What was not confirmed by then is asked for again.
const CONFIRM: Duration = Duration::from_secs(2);

/// Who listens. Called from the task that reads the connection: it must not wait.
pub trait PubSubHandler: Send + Sync + 'static {
    /// A message, in the order of its channel.
    fn heard(&self, channel: &Bytes, message: Bytes);

    /// From here on nothing is missed, until it is called again: then something may have been.
    fn subscribed(&self, channel: &Bytes);
}

pub struct PubSub {
    topology: Arc<Topology>,
    listener: Arc<dyn PubSubHandler>,
    name: RedisConnectionKind,
    state: Mutex<State>,
    router: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    wanted: HashMap<Bytes, Want>,
    routes: BTreeMap<Address, Route>,
}

struct Want {
    /// The server it is subscribed to on, once somebody has its slot.
    place: Option<Address>,
    asked: Asked,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// It waits for its turn.
    No,
    /// On this connection, at that time, where it was not confirmed yet...
    Sent(u64, Instant),
    /// ...or was.
    Done(u64),
}

/// The lane to one server.
struct Route {
    lane: Arc<ReconnectingConnection>,
    connection: Option<Arc<RedisConnection>>,
    todo: VecDeque<Bytes>,
    /// Asked for on this connection, not confirmed.
    open: usize,
    /// There is something to do, or room to do it.
    wake: Arc<Notify>,
    worker: JoinHandle<()>,
}

/// Listens to one connection.
struct Hearing {
    pubsub: Weak<PubSub>,
    place: Address,
    number: u64,
}

impl PubSub {
    pub fn start(topology: Arc<Topology>, name: RedisConnectionKind, listener: Arc<dyn PubSubHandler>) -> Arc<Self> {
        let pubsub = Arc::new(PubSub { topology, listener, name, state: Mutex::default(), router: Mutex::default() });
        *pubsub.router.lock() = Some(tokio::spawn(follow(Arc::downgrade(&pubsub), pubsub.topology.changes())));
        pubsub
    }

    /// Wants a channel. Its [`subscribed`](PubSubHandler::subscribed) comes when it is so.
    pub fn subscribe(self: &Arc<Self>, channel: Bytes) {
        let mut state = self.state.lock();
        if !state.wanted.contains_key(&channel) {
            state.wanted.insert(channel.clone(), Want { place: None, asked: Asked::No });
            self.place(&mut state, channel);
        }
    }

    /// No longer wants it. False if its subscription is being made: then it stays, for what comes back would not be
    /// told from what a next one waits for.
    pub fn unsubscribe(&self, channel: &[u8]) -> bool {
        let mut state = self.state.lock();
        match state.wanted.get(channel) {
            None => true,
            Some(Want { asked: Asked::Sent(..), .. }) => false,
            Some(_) => {
                if let Some((channel, want)) = state.wanted.remove_entry(channel) {
                    self.quit(&mut state, &channel, &want);
                }
                true
            }
        }
    }

    /// Whether nothing of the channel is missed now.
    pub fn is_subscribed(&self, channel: &[u8]) -> bool {
        let state = self.state.lock();
        let Some(Want { place: Some(place), asked: Asked::Done(on) }) = state.wanted.get(channel) else { return false };
        let connection = state.routes.get(place).and_then(|route| route.connection.as_ref());
        connection.is_some_and(|connection| connection.number == *on && !connection.is_closed())
    }

    /// Ends the connection that a channel is subscribed on: another is made.
    pub fn replace(&self, channel: &[u8]) {
        let state = self.state.lock();
        let place = state.wanted.get(channel).and_then(|want| want.place.as_ref());
        if let Some(route) = place.and_then(|place| state.routes.get(place)) {
            route.lane.replace();
        }
    }

    /// Channels wanted: for tests that count what is left.
    pub fn wanted(&self) -> usize {
        self.state.lock().wanted.len()
    }

    /// Puts a wanted channel on the way to whoever has its slot.
    fn place(self: &Arc<Self>, state: &mut State, channel: Bytes) {
        let place = self.topology.place_of(&channel);
        let Some(want) = state.wanted.get_mut(&channel) else { return };
        let Some((place, target)) = place else {
            *want = Want { place: None, asked: Asked::No };
            return;
        };
        *want = Want { place: Some(place.clone()), asked: Asked::No };
        let route = state.routes.entry(place.clone()).or_insert_with(|| Route::start(self, place, &target));
        // Before those that come back after a break: somebody waits for this one now.
        route.todo.push_front(channel);
        route.wake.notify_one();
    }

    /// Unsubscribes where it is, if it is anywhere.
    fn quit(&self, state: &mut State, channel: &Bytes, want: &Want) {
        let route = want.place.as_ref().and_then(|place| state.routes.get_mut(place));
        let (Some(route), Asked::Sent(on, _) | Asked::Done(on)) = (route, want.asked) else { return };
        let Some(connection) = route.connection.as_ref().filter(|connection| connection.number == on) else { return };
        let verb = if self.topology.url.is_cluster() { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" };
        // If it does not go out, the connection is at its end and the subscription with it.
        let _ = connection.tell(&Command::new(verb).arg(channel));
        if matches!(want.asked, Asked::Sent(..)) {
            route.open -= 1.min(route.open);
            route.wake.notify_one();
        }
    }

    /// Somebody else is the master, or has some of the slots.
    fn reroute(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if !self.topology.url.is_cluster() {
            // Another master: whoever the lane leads to now is not it.
            state.routes.values().for_each(|route| route.lane.replace());
            return;
        }
        let mut moved = Vec::new();
        for (channel, want) in &state.wanted {
            if self.topology.place_of(channel).map(|(place, _)| place) != want.place {
                moved.push(channel.clone());
            }
        }
        for channel in moved {
            let Some(want) = state.wanted.get(&channel) else { continue };
            let was = Want { place: want.place.clone(), asked: want.asked };
            self.quit(&mut state, &channel, &was);
            self.place(&mut state, channel);
        }
        let State { wanted, routes, .. } = &mut *state;
        let used: std::collections::HashSet<&Address> =
            wanted.values().filter_map(|want| want.place.as_ref()).collect();
        routes.retain(|place, _| used.contains(place));
    }

    /// A route has a new connection: everything on it begins anew.
    fn up(&self, place: &Address, connection: Arc<RedisConnection>) {
        let mut state = self.state.lock();
        let State { wanted, routes } = &mut *state;
        let Some(route) = routes.get_mut(place) else { return };
        route.connection = Some(connection);
        route.open = 0;
        route.todo.clear();
        for (channel, want) in wanted {
            if want.place.as_ref() == Some(place) {
                want.asked = Asked::No;
                route.todo.push_back(channel.clone());
            }
        }
    }

    /// Asks for as many channels as there is room for. True if some are not confirmed.
    fn pump(&self, place: &Address) -> bool {
        let sharded = self.topology.url.is_cluster();
        let mut state = self.state.lock();
        let State { wanted, routes } = &mut *state;
        let Some(route) = routes.get_mut(place) else { return false };
        let Some(connection) = route.connection.clone() else { return false };
        let (mut all, mut any, now) = (Command::new("SUBSCRIBE"), false, Instant::now());
        while route.open < BATCH {
            let Some(channel) = route.todo.pop_front() else { break };
            let Some(want) = wanted.get_mut(&channel) else { continue };
            if want.place.as_ref() != Some(place) || want.asked != Asked::No {
                continue;
            }
            want.asked = Asked::Sent(connection.number, now);
            route.open += 1;
            if sharded {
                // Those of one command must be of one slot.
                let _ = connection.tell(&Command::new("SSUBSCRIBE").arg(&channel));
            } else {
                all.push(&channel);
                any = true;
            }
        }
        if any {
            let _ = connection.tell(&all);
        }
        route.open > 0
    }

    /// Once more, what was asked for and not confirmed in time. Says when to look again, if something is still open.
    fn repeat(&self, place: &Address) -> Option<Instant> {
        let mut state = self.state.lock();
        let State { wanted, routes } = &mut *state;
        let route = routes.get_mut(place)?;
        let (now, mut next) = (Instant::now(), None);
        for (channel, want) in wanted {
            let Asked::Sent(_, at) = want.asked else { continue };
            if want.place.as_ref() != Some(place) {
                continue;
            }
            let due = at + CONFIRM;
            if due <= now {
                want.asked = Asked::No;
                route.open -= 1.min(route.open);
                route.todo.push_back(channel.clone());
            } else {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
        }
        next
    }

    fn confirmed(&self, place: &Address, number: u64, channel: &Bytes) {
        let mut state = self.state.lock();
        let State { wanted, routes } = &mut *state;
        let Some(want) = wanted.get_mut(channel).filter(|want| want.place.as_ref() == Some(place)) else { return };
        if !matches!(want.asked, Asked::Sent(on, _) if on == number) {
            return;
        }
        want.asked = Asked::Done(number);
        if let Some(route) = routes.get_mut(place) {
            route.open -= 1.min(route.open);
            if route.open == 0 || !route.todo.is_empty() {
                route.wake.notify_one();
            }
        }
        drop(state);
        self.listener.subscribed(channel);
    }

    /// The server ended a subscription: its slot was handed over.
    fn dropped(self: &Arc<Self>, place: &Address, number: u64, channel: &Bytes) {
        let mut state = self.state.lock();
        let want = state.wanted.get(channel);
        if want.is_some_and(|want| want.place.as_ref() == Some(place) && want.asked == Asked::Done(number)) {
            self.place(&mut state, channel.clone());
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

impl Route {
    fn start(pubsub: &Arc<PubSub>, place: Address, target: &Target) -> Self {
        let wake = Arc::new(Notify::new());
        let ears = {
            let (pubsub, place) = (Arc::downgrade(pubsub), place.clone());
            Arc::new(move |number| -> Arc<dyn PushHandler> {
                Arc::new(Hearing { pubsub: pubsub.clone(), place: place.clone(), number })
            })
        };
        let lane = Arc::new(pubsub.topology.lane(target, pubsub.name, ears));
        let worker = tokio::spawn(work(Arc::downgrade(pubsub), place, lane.changes(), wake.clone()));
        Route { lane, connection: None, todo: VecDeque::new(), open: 0, wake, worker }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

/// Follows the slots of a Cluster.
async fn follow(pubsub: Weak<PubSub>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        let Some(pubsub) = pubsub.upgrade() else { return };
        pubsub.reroute();
    }
}

/// Subscribes on one lane, as there is room, and again on each new connection.
async fn work(pubsub: Weak<PubSub>, place: Address, mut changes: watch::Receiver<LaneState>, wake: Arc<Notify>) {
    let mut number = 0;
    // Not from the last wake on: others may come all the time.
    let mut due: Option<Instant> = None;
    loop {
        let open = {
            let Some(pubsub) = pubsub.upgrade() else { return };
            let up = match &*changes.borrow_and_update() {
                LaneState::Up(connection) if connection.number != number => Some(connection.clone()),
                _ => None,
            };
            if let Some(connection) = up {
                number = connection.number;
                due = None;
                pubsub.up(&place, connection);
            }
            pubsub.pump(&place)
        };
        let at = match open {
            true => *due.get_or_insert_with(|| Instant::now() + CONFIRM),
            false => {
                due = None;
                Instant::now() + CONFIRM
            }
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = wake.notified() => {}
            () = sleep_until(at), if open => {
                let Some(pubsub) = pubsub.upgrade() else { return };
                due = pubsub.repeat(&place);
            }
        }
    }
}

// === impl Hearing ===

impl PushHandler for Hearing {
    fn push(&self, items: Vec<Value>) {
        let Some(pubsub) = self.pubsub.upgrade() else { return };
        let mut items = items.into_iter();
        let (Some(Value::Bytes(kind)), Some(Value::Bytes(channel))) = (items.next(), items.next()) else { return };
        match &*kind {
            b"message" | b"smessage" => {
                if let Some(Value::Bytes(message)) = items.next() {
                    pubsub.listener.heard(&channel, message);
                }
            }
            b"subscribe" | b"ssubscribe" => pubsub.confirmed(&self.place, self.number, &channel),
            b"sunsubscribe" => pubsub.dropped(&self.place, self.number, &channel),
            _ => {}
        }
    }

    fn refused(&self, error: &str) {
        let Some(pubsub) = self.pubsub.upgrade() else { return };
        match ErrorReply::of(error) {
            ErrorReply::Moved(slot, address) => pubsub.topology.moved(slot, &address),
            ErrorReply::NotNow | ErrorReply::Ask(_) => pubsub.topology.doubt(),
            // What is not confirmed is asked for again.
            _ => tracing::warn!(lane = pubsub.name.value(), error, "Redis refuses a subscription"),
        }
    }
}
