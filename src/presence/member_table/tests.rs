//! A randomized test against a simple model, and single cases.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;
use crate::presence::PresentClient;

fn channel() -> Channel {
    Channel::parse("a").unwrap()
}

fn info(info: u8) -> MemberInfo {
    let info = serde_json::value::to_raw_value(&info).unwrap();
    PresentClient::new("x", Some(&info), 100).unwrap().info("", "ws", 7)
}

fn at(offset: u64) -> Position {
    Position { epoch: "k3Vq00".parse().unwrap(), offset }
}

#[derive(Clone, Debug)]
enum TableStep {
    Enter(u8),
    Leave(u8),
    Remote(u8, u8, bool),
    NodeDies(u8),
    Snapshot(u8, Vec<u8>),
    Wait(u64),
    Announce(bool),
}

fn step() -> impl Strategy<Value = TableStep> {
    prop_oneof![
        4 => (0..4u8).prop_map(TableStep::Enter),
        3 => (0..4u8).prop_map(TableStep::Leave),
        4 => (0..2u8, 0..4u8, any::<bool>()).prop_map(|(node, client, held)| TableStep::Remote(node, client, held)),
        1 => (0..2u8).prop_map(TableStep::NodeDies),
        1 => (0..2u8, prop::collection::vec(0..4u8, 0..4)).prop_map(|(node, clients)| TableStep::Snapshot(node, clients)),
        6 => prop_oneof![1..50u64, 200..300u64].prop_map(TableStep::Wait),
        1 => any::<bool>().prop_map(TableStep::Announce),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A difference is announced when it has lasted for the debounce time, not before and not later, and in the end both
    /// states are equal.
    #[test]
    fn differences_are_announced_once_they_have_lasted(steps in prop::collection::vec(step(), 1..120)) {
        let mut table = MemberTable::default();
        table.set_announcing(true, 0);
        let mut announcing = true;
        let mut announcing_since = 0;
        let (mut now, mut offset, mut announced_at) = (1_000, 0, 0);
        // The model: the holders of each client, since when it is held or not, and the announced clients.
        let mut leases: HashMap<u8, Vec<(u64, Arc<str>)>> = HashMap::new();
        let mut remote: BTreeSet<(u8, u8)> = BTreeSet::new();
        let mut stable: HashMap<u8, (bool, u64)> = HashMap::new();
        let mut announced: BTreeSet<String> = BTreeSet::new();
        let name = |client: u8| (channel(), Arc::<str>::from(client.to_string()));
        for step in steps {
            match step {
                TableStep::Enter(client) => leases.entry(client).or_default().push(table.add_lease(&channel(), &client.to_string(), info(0), now)),
                TableStep::Leave(client) => {
                    if let Some((number, client)) = leases.get_mut(&client).and_then(Vec::pop) {
                        table.remove_lease((channel(), client), number, now);
                    }
                }
                TableStep::Remote(node, client, held) => {
                    table.set_held_by_node(NodeId(node.into()), name(client), held.then(|| info(0)), now);
                    if held { remote.insert((node, client)); } else { remote.remove(&(node, client)); }
                }
                TableStep::NodeDies(node) => {
                    table.remove_node(NodeId(node.into()), now);
                    remote.retain(|(by, _)| *by != node);
                }
                TableStep::Snapshot(node, clients) => {
                    table.begin_snapshot(NodeId(node.into()));
                    clients.iter().for_each(|client| table.set_held_by_node(NodeId(node.into()), name(*client), Some(info(0)), now));
                    table.end_snapshot(NodeId(node.into()), now);
                    remote.retain(|(by, _)| *by != node);
                    remote.extend(clients.iter().map(|client| (node, *client)));
                }
                TableStep::Wait(time) => now += time,
                TableStep::Announce(on) => {
                    if on && !announcing {
                        announcing_since = now;
                    }
                    announcing = on;
                    table.set_announcing(on, now);
                }
            }
            for client in 0..4 {
                let held = leases.get(&client).is_some_and(|leases| !leases.is_empty()) || remote.iter().any(|(_, it)| *it == client);
                let (was, since) = stable.entry(client).or_insert((false, 0));
                if *was != held {
                    (*was, *since) = (held, now);
                }
            }
            for change in table.take_due(now, 100) {
                prop_assert!(announcing);
                let client = change.client.to_string();
                let (held, since) = stable[&client.parse().unwrap()];
                prop_assert_eq!(change.info.is_some(), held);
                prop_assert!(now >= since + DEBOUNCE, "announced after {} ms", now - since);
                prop_assert!(if held { announced.insert(client) } else { announced.remove(&client) }, "announced twice");
                offset += 1;
                announced_at = now;
                table.set_announced((channel(), change.client), change.info, now);
                table.set_position(&channel(), at(offset), now);
            }
            table.sweep(now);
            for (client, (held, since)) in &stable {
                let lasted = announcing && now >= since.max(&announcing_since) + DEBOUNCE;
                prop_assert!(!lasted || announced.contains(&client.to_string()) == *held, "not announced in time");
            }
            let page = table.page(&channel(), None, 100, 1 << 20);
            let listed: BTreeSet<String> = page.members.iter().map(|(client, _)| client.to_string()).collect();
            prop_assert_eq!(&listed, &announced);
            prop_assert_eq!((page.count, table.announced_count()), (announced.len(), announced.len()));
            prop_assert!(page.position == (offset > 0).then(|| at(offset)) || (announced.is_empty() && now >= announced_at + EMPTY_RETENTION));
            prop_assert!(table.due.len() <= 4 && table.empty.len() <= 1);
            prop_assert!(announcing || table.next_due().is_none());
        }
        // All members leave.
        table.set_announcing(true, now);
        for (number, client) in leases.into_values().flatten() {
            table.remove_lease((channel(), client), number, now);
        }
        (0..2).for_each(|node| table.remove_node(NodeId(node), now));
        now += 2 * DEBOUNCE;
        for change in table.take_due(now, 100) {
            prop_assert!(change.info.is_none());
            table.set_announced((channel(), change.client), None, now);
            table.set_position(&channel(), at(offset), now);
        }
        prop_assert_eq!((table.lease_count(), table.announced_count(), table.channel_count(), table.next_due()), (0, 0, 0, None));
        table.sweep(now + EMPTY_RETENTION);
        prop_assert_eq!((table.channels.len(), table.empty.len()), (0, 0));
    }
}

#[test]
fn changes_of_own_leases_are_sent_to_peers() {
    let mut table = MemberTable::default();
    // Without peers nothing is queued.
    let (number, client) = table.add_lease(&channel(), "c", info(1), 0);
    assert!(!table.has_unsent());
    assert_eq!(table.held_by_leases().count(), 1);
    table.set_has_peers(true);
    let (second, _) = table.add_lease(&channel(), "c", info(2), 1);
    table.remove_lease((channel(), client.clone()), number, 2);
    let unsent = table.take_unsent();
    assert_eq!(unsent.len(), 1);
    assert!(unsent[0].1.as_ref().unwrap().equals_but_since(&info(2)));
    table.set_held_by_node(NodeId(1), (channel(), "d".into()), Some(info(3)), 3);
    assert!(!table.has_unsent(), "only the other node sends what it holds");
    table.remove_lease((channel(), client), second, 4);
    assert_eq!(table.take_unsent(), [((channel(), "c".into()), None)]);
    // Equal infos share one allocation.
    table.set_announced((channel(), "d".into()), Some(Arc::new(info(3))), 5);
    let (_, _, announced) = table.announced().next().unwrap();
    assert_eq!(Arc::strong_count(announced), 2);
    table.remove_node(NodeId(1), 6);
    assert_eq!((table.announced_count(), table.channel_count()), (1, 1));
    table.clear_announced(7);
    assert_eq!((table.announced_count(), table.channel_count()), (0, 0));
}

#[test]
fn the_position_of_an_empty_channel_is_kept_for_a_while() {
    let mut table = MemberTable::default();
    let name = (channel(), Arc::<str>::from("c"));
    let known = |table: &MemberTable| table.page(&channel(), None, 1, 1).position;
    table.set_announced(name.clone(), Some(Arc::new(info(1))), 0);
    table.set_position(&channel(), at(7), 0);
    table.set_announced(name.clone(), None, 10);
    table.set_position(&channel(), at(8), 10);
    table.sweep(EMPTY_RETENTION - 1);
    assert_eq!((known(&table), table.channel_count()), (Some(at(8)), 0));
    // A member in between restarts the time, and the channel is queued only once.
    table.set_announced(name.clone(), Some(Arc::new(info(1))), 20_000);
    table.set_announced(name, None, 20_010);
    table.set_position(&channel(), at(10), 20_010);
    table.set_position(&channel(), at(9), 20_010);
    table.sweep(EMPTY_RETENTION + 19_000);
    assert_eq!((known(&table), table.empty.len()), (Some(at(10)), 1));
    table.sweep(EMPTY_RETENTION + 20_010);
    assert_eq!((known(&table), table.channels.len(), table.empty.len()), (None, 0, 0));
}
