//! Random lives of members against the simplest account of them.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;
use crate::presence::Client;

fn channel() -> Channel {
    Channel::parse("a").unwrap()
}

fn about(info: u8) -> About {
    let info = serde_json::value::to_raw_value(&info).unwrap();
    Client::read("x", Some(&info), 100).unwrap().about("", "ws", 7)
}

fn at(offset: u64) -> Position {
    Position { epoch: "k3Vq00".parse().unwrap(), offset }
}

#[derive(Clone, Debug)]
enum Act {
    Enter(u8),
    Leave(u8),
    Far(u8, u8, bool),
    Dies(u8),
    Says(u8, Vec<u8>),
    Time(u64),
    Lead(bool),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..4u8).prop_map(Act::Enter),
        3 => (0..4u8).prop_map(Act::Leave),
        4 => (0..2u8, 0..4u8, any::<bool>()).prop_map(|(node, client, here)| Act::Far(node, client, here)),
        1 => (0..2u8).prop_map(Act::Dies),
        1 => (0..2u8, prop::collection::vec(0..4u8, 0..4)).prop_map(|(node, clients)| Act::Says(node, clients)),
        6 => prop_oneof![1..50u64, 200..300u64].prop_map(Act::Time),
        1 => any::<bool>().prop_map(Act::Lead),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// What is announced is what has lasted for a window, nothing else, and at once when it has; and in the end it is what is.
    #[test]
    fn what_is_announced_is_what_lasted(acts in prop::collection::vec(act(), 1..120)) {
        let mut book = Book::default();
        book.lead(true, 0);
        let mut leading = true;
        let mut led_since = 0;
        let (mut now, mut offset, mut told_at) = (1_000, 0, 0);
        // The account: who holds a client, since when that is so or not so, who was announced.
        let mut leases: HashMap<u8, Vec<(u64, Arc<str>)>> = HashMap::new();
        let mut far: BTreeSet<(u8, u8)> = BTreeSet::new();
        let mut stable: HashMap<u8, (bool, u64)> = HashMap::new();
        let mut told: BTreeSet<String> = BTreeSet::new();
        let name = |client: u8| (channel(), Arc::<str>::from(client.to_string()));
        for act in acts {
            match act {
                Act::Enter(client) => leases.entry(client).or_default().push(book.enter(&channel(), &client.to_string(), about(0), now)),
                Act::Leave(client) => {
                    if let Some((number, client)) = leases.get_mut(&client).and_then(Vec::pop) {
                        book.leave((channel(), client), number, now);
                    }
                }
                Act::Far(node, client, here) => {
                    book.hear(NodeId(node.into()), name(client), here.then(|| about(0)), now);
                    if here { far.insert((node, client)); } else { far.remove(&(node, client)); }
                }
                Act::Dies(node) => {
                    book.forget(NodeId(node.into()), now);
                    far.retain(|(by, _)| *by != node);
                }
                Act::Says(node, clients) => {
                    book.begin_all(NodeId(node.into()));
                    clients.iter().for_each(|client| book.hear(NodeId(node.into()), name(*client), Some(about(0)), now));
                    book.end_all(NodeId(node.into()), now);
                    far.retain(|(by, _)| *by != node);
                    far.extend(clients.iter().map(|client| (node, *client)));
                }
                Act::Time(time) => now += time,
                Act::Lead(lead) => {
                    if lead && !leading {
                        led_since = now;
                    }
                    leading = lead;
                    book.lead(lead, now);
                }
            }
            for client in 0..4 {
                let here = leases.get(&client).is_some_and(|leases| !leases.is_empty()) || far.iter().any(|(_, it)| *it == client);
                let (was, since) = stable.entry(client).or_insert((false, 0));
                if *was != here {
                    (*was, *since) = (here, now);
                }
            }
            for change in book.due(now, 100) {
                prop_assert!(leading);
                let client = change.client.to_string();
                let (here, since) = stable[&client.parse().unwrap()];
                prop_assert_eq!(change.about.is_some(), here);
                prop_assert!(now >= since + WINDOW, "announced after {} ms", now - since);
                prop_assert!(if here { told.insert(client) } else { told.remove(&client) }, "announced twice");
                offset += 1;
                told_at = now;
                book.told((channel(), change.client), change.about, now);
                book.upto(&channel(), at(offset), now);
            }
            book.sweep(now);
            for (client, (here, since)) in &stable {
                let lasted = leading && now >= since.max(&led_since) + WINDOW;
                prop_assert!(!lasted || told.contains(&client.to_string()) == *here, "not announced in time");
            }
            let page = book.page(&channel(), None, 100, 1 << 20);
            let listed: BTreeSet<String> = page.members.iter().map(|(client, _)| client.to_string()).collect();
            prop_assert_eq!(&listed, &told);
            prop_assert_eq!((page.count, book.members()), (told.len(), told.len()));
            prop_assert!(page.at == (offset > 0).then(|| at(offset)) || (told.is_empty() && now >= told_at + KEPT));
            prop_assert!(book.due.len() <= 4 && book.deserted.len() <= 1);
            prop_assert!(leading || book.next_due().is_none());
        }
        // Everybody goes.
        book.lead(true, now);
        for (number, client) in leases.into_values().flatten() {
            book.leave((channel(), client), number, now);
        }
        (0..2).for_each(|node| book.forget(NodeId(node), now));
        now += 2 * WINDOW;
        for change in book.due(now, 100) {
            prop_assert!(change.about.is_none());
            book.told((channel(), change.client), None, now);
            book.upto(&channel(), at(offset), now);
        }
        prop_assert_eq!((book.own(), book.members(), book.channels(), book.next_due()), (0, 0, 0, None));
        book.sweep(now + KEPT);
        prop_assert_eq!((book.rooms.len(), book.deserted.len()), (0, 0));
    }
}

#[test]
fn others_hear_what_they_do_not_know() {
    let mut book = Book::default();
    // Nobody to hear it: nothing is kept.
    let (number, client) = book.enter(&channel(), "c", about(1), 0);
    assert!(!book.has_news());
    assert_eq!(book.all_own().count(), 1);
    book.set_others(true);
    let (second, _) = book.enter(&channel(), "c", about(2), 1);
    book.leave((channel(), client.clone()), number, 2);
    let news = book.news();
    assert_eq!(news.len(), 1);
    assert!(news[0].1.as_ref().unwrap().says(&about(2)));
    book.hear(NodeId(1), (channel(), "d".into()), Some(about(3)), 3);
    assert!(!book.has_news(), "that is another's to tell");
    book.leave((channel(), client), second, 4);
    assert_eq!(book.news(), [((channel(), "c".into()), None)]);
    // What was announced and is heard again is kept once.
    book.told((channel(), "d".into()), Some(Arc::new(about(3))), 5);
    let (_, _, told) = book.all_told().next().unwrap();
    assert_eq!(Arc::strong_count(told), 2);
    book.forget(NodeId(1), 6);
    assert_eq!((book.members(), book.channels()), (1, 1));
    book.untell(7);
    assert_eq!((book.members(), book.channels()), (0, 0));
}

#[test]
fn an_empty_channel_is_known_for_a_while() {
    let mut book = Book::default();
    let name = (channel(), Arc::<str>::from("c"));
    let known = |book: &Book| book.page(&channel(), None, 1, 1).at;
    book.told(name.clone(), Some(Arc::new(about(1))), 0);
    book.upto(&channel(), at(7), 0);
    book.told(name.clone(), None, 10);
    book.upto(&channel(), at(8), 10);
    book.sweep(KEPT - 1);
    assert_eq!((known(&book), book.channels()), (Some(at(8)), 0));
    // Somebody was here again meanwhile: it is kept from then on, and not twice.
    book.told(name.clone(), Some(Arc::new(about(1))), 20_000);
    book.told(name, None, 20_010);
    book.upto(&channel(), at(10), 20_010);
    book.upto(&channel(), at(9), 20_010);
    book.sweep(KEPT + 19_000);
    assert_eq!((known(&book), book.deserted.len()), (Some(at(10)), 1));
    book.sweep(KEPT + 20_010);
    assert_eq!((known(&book), book.rooms.len(), book.deserted.len()), (None, 0, 0));
}
