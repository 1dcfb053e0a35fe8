//! [`WaitingItems`]: published items whose predecessors are not stored yet.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use crate::{channel::Channel, event::Draft};

/// How long an item waits for its predecessor, which may never be published.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bounds of what waits: bytes of all channels, and items of one channel.
const MAX_BYTES: usize = 16 << 20;
const MAX_ITEMS: usize = 1_000;
/// Memory of an item beside its event, including its part of the task and the watch of its channel.
const ITEM_COST: usize = 1024;

/// A valid item, to be stored in its channel.
#[derive(Debug)]
pub(super) struct AcceptedItem {
    pub(super) channel: Channel,
    pub(super) id: Option<String>,
    /// The item that must be stored before it, if it has to wait for one.
    pub(super) prev_id: Option<String>,
    pub(super) draft: Draft,
}

/// Items by channel. A channel has a queue as long as a task stores its items.
#[derive(Default)]
pub(super) struct WaitingItems(Mutex<WaitingState>);

#[derive(Default)]
struct WaitingState {
    channels: HashMap<Channel, ItemQueue>,
    bytes: usize,
}

struct ItemQueue {
    /// In the order of arrival, with the times at which they are stored in any case.
    items: Vec<(Instant, AcceptedItem)>,
    changed: Arc<Notify>,
}

/// What became of an item that has to wait.
pub(super) enum Enqueued {
    Waiting,
    /// It is the first one of its channel: a task must take the items of the channel until there are none. The task is
    /// notified of further items.
    First(Arc<Notify>),
    /// An item with the same id waits already.
    Duplicate,
    /// Too much waits.
    Full(AcceptedItem),
}

/// The next step of the task of a channel.
pub(super) enum NextItem {
    Ready(AcceptedItem),
    /// No item is ready before this time.
    Later(Instant),
    /// The channel has no queue any more.
    Done,
}

impl AcceptedItem {
    /// Whether it can be stored after `last`, the id of the newest item of the channel if that has one.
    pub(super) fn is_next(&self, last: Option<&str>) -> bool {
        let Some(prev) = self.prev_id.as_deref() else { return true };
        last.is_none_or(|last| last == prev || Some(last) == self.id.as_deref())
    }

    fn size(&self) -> usize {
        self.draft.size() + ITEM_COST
    }
}

/// Reorders the items of one request so that each one follows its predecessor, if that is among them.
pub(super) fn in_order(items: Vec<AcceptedItem>) -> Vec<AcceptedItem> {
    let ids = items.iter().enumerate().filter_map(|(at, item)| Some(((&item.channel, item.id.as_deref()?), at)));
    let places: HashMap<(&Channel, &str), usize> = ids.collect();
    let mut order = Vec::with_capacity(items.len());
    let mut seen = vec![false; items.len()];
    for first in 0..items.len() {
        let (start, mut next) = (order.len(), Some(first));
        while let Some(at) = next.filter(|at| !std::mem::replace(&mut seen[*at], true)) {
            order.push(at);
            let item = &items[at];
            next = item.prev_id.as_deref().and_then(|prev| places.get(&(&item.channel, prev)).copied());
        }
        order[start..].reverse();
    }
    let mut items: Vec<Option<AcceptedItem>> = items.into_iter().map(Some).collect();
    order.into_iter().filter_map(|at| items[at].take()).collect()
}

impl WaitingItems {
    pub(super) fn enqueue(&self, item: AcceptedItem) -> Enqueued {
        let mut state = self.0.lock();
        let WaitingState { channels, bytes } = &mut *state;
        if *bytes + item.size() > MAX_BYTES {
            return Enqueued::Full(item);
        }
        let deadline = Instant::now() + PATIENCE;
        match channels.entry(item.channel.clone()) {
            Entry::Vacant(free) => {
                *bytes += item.size();
                let changed = Arc::new(Notify::new());
                free.insert(ItemQueue { items: vec![(deadline, item)], changed: changed.clone() });
                Enqueued::First(changed)
            }
            Entry::Occupied(mut queue) => {
                let queue = queue.get_mut();
                if item.id.is_some() && queue.items.iter().any(|(_, other)| other.id == item.id) {
                    return Enqueued::Duplicate;
                }
                if queue.items.len() >= MAX_ITEMS {
                    return Enqueued::Full(item);
                }
                *bytes += item.size();
                queue.items.push((deadline, item));
                queue.changed.notify_one();
                Enqueued::Waiting
            }
        }
    }

    /// Takes the next item of a channel whose newest stored item has the id `last`, or whose patience has ended at `now`.
    pub(super) fn take(&self, channel: &Channel, last: Option<&str>, now: Instant) -> NextItem {
        let mut state = self.0.lock();
        let WaitingState { channels, bytes } = &mut *state;
        let Some(ItemQueue { items, .. }) = channels.get_mut(channel) else { return NextItem::Done };
        let Some((deadline, _)) = items.first() else {
            channels.remove(channel);
            return NextItem::Done;
        };
        let Some(mut at) = items.iter().position(|(deadline, item)| item.is_next(last) || *deadline <= now) else {
            return NextItem::Later(*deadline);
        };
        if last.is_none_or(|last| items[at].1.prev_id.as_deref() != Some(last)) {
            // Its predecessor may wait, too. Items that name each other end the search.
            for _ in 0..items.len() {
                let prev = items[at].1.prev_id.as_ref();
                let Some(before) = items.iter().position(|(_, other)| other.id.as_ref() == prev && prev.is_some())
                else {
                    break;
                };
                at = before;
            }
        }
        let (_, item) = items.remove(at);
        *bytes -= item.size();
        NextItem::Ready(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::DraftParts;

    fn item(channel: &str, id: &str, prev: Option<&str>) -> AcceptedItem {
        AcceptedItem {
            channel: Channel::parse(channel).unwrap(),
            id: Some(id.to_owned()),
            prev_id: prev.map(str::to_owned),
            draft: Draft::new(DraftParts::default(), 1000).unwrap(),
        }
    }

    /// The ids that are taken at once.
    fn taken(waiting: &WaitingItems, mut last: Option<String>, now: Instant) -> Vec<String> {
        let mut ids = Vec::new();
        while let NextItem::Ready(item) = waiting.take(&Channel::parse("a").unwrap(), last.as_deref(), now) {
            last = item.id.clone();
            ids.extend(item.id);
        }
        ids
    }

    #[test]
    fn items_of_a_request_are_ordered_by_channel() {
        let items =
            [("a", "3", "2"), ("b", "3", "2"), ("a", "1", "0"), ("a", "2", "1"), ("b", "x", "y"), ("b", "y", "x")];
        let items = items.map(|(channel, id, prev)| item(channel, id, Some(prev))).into();
        let order: Vec<_> =
            in_order(items).iter().map(|item| format!("{}{}", item.channel, item.id.as_ref().unwrap())).collect();
        assert_eq!(order, ["a1", "a2", "a3", "b3", "by", "bx"]);
    }

    #[test]
    fn waiting_items_are_taken_in_their_order() {
        let waiting = WaitingItems::default();
        let now = Instant::now();
        for (id, prev) in [("4", "3"), ("9", "8"), ("3", "2"), ("10", "9"), ("2", "1")] {
            assert!(!matches!(waiting.enqueue(item("a", id, Some(prev))), Enqueued::Full(_) | Enqueued::Duplicate));
        }
        assert!(matches!(waiting.enqueue(item("a", "4", Some("3"))), Enqueued::Duplicate));
        assert!(matches!(waiting.enqueue(item("b", "4", Some("3"))), Enqueued::First(_)));
        assert_eq!(taken(&waiting, Some("0".into()), now), Vec::<String>::new());
        assert_eq!(taken(&waiting, Some("1".into()), now), ["2", "3", "4"]);
        // The predecessor of 9 does not arrive.
        assert_eq!(taken(&waiting, Some("4".into()), now + PATIENCE * 2), ["9", "10"]);
        assert!(waiting.0.lock().channels.len() == 1, "the queue of b");
    }

    #[test]
    fn the_first_of_a_chain_is_taken_when_the_patience_ends() {
        let waiting = WaitingItems::default();
        for (id, prev) in [("3", "2"), ("2", "1"), ("x", "y"), ("y", "x")] {
            let _ = waiting.enqueue(item("a", id, Some(prev)));
        }
        let ids = taken(&waiting, Some("0".into()), Instant::now() + PATIENCE * 2);
        assert_eq!((&ids[..2], ids.len()), (&["2".to_owned(), "3".to_owned()][..], 4));
    }

    #[test]
    fn waiting_items_are_bounded_in_bytes_and_number() {
        let waiting = WaitingItems::default();
        let full = |channel: usize| {
            let enqueue = |n: usize| waiting.enqueue(item(&channel.to_string(), &n.to_string(), Some("none")));
            (0..).take_while(|n| !matches!(enqueue(*n), Enqueued::Full(_))).count()
        };
        assert_eq!(full(0), MAX_ITEMS);
        let all: usize = (1..100).map(full).sum();
        assert!((all + MAX_ITEMS) * ITEM_COST <= MAX_BYTES && all * ITEM_COST > MAX_BYTES / 2, "{all}");
    }
}
