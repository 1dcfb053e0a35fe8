//! Links between two nodes: order, losses, bounds and the wire format of batches.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use proptest::prelude::*;
use weir::cluster::{
    BatchOutcome, Inbox, InboxEvent, MessageKind, NodeId, PeerLinks, Priority, ReceiveOutcome, SendOutcome,
};

const KIND: MessageKind = MessageKind::Calls;

/// One end of a link. Every message is a call that is never answered: it is open at one end and held at the other.
struct LinkEnd {
    id: NodeId,
    links: PeerLinks,
    inbox: Inbox,
    got: Vec<u64>,
    open: BTreeSet<u64>,
    held: BTreeSet<u64>,
}

impl LinkEnd {
    fn new(id: u64) -> Self {
        let links = PeerLinks::new(NodeId(id));
        let inbox = links.inbox(KIND);
        let (got, open, held) = Default::default();
        LinkEnd { id: NodeId(id), links, inbox, got, open, held }
    }

    fn read(&mut self) {
        let number = |body: Bytes| u64::from_le_bytes(body[..].try_into().unwrap());
        for event in self.inbox.take() {
            match event {
                InboxEvent::Message { body, .. } => {
                    let call = number(body);
                    self.got.push(call);
                    self.held.insert(call);
                }
                InboxEvent::Returned { body, .. } => assert!(self.open.remove(&number(body))),
                InboxEvent::LinkLost { .. } => {
                    self.open.clear();
                    self.held.clear();
                }
            }
        }
    }

    fn send(&mut self, to: NodeId, call: u64) {
        self.read();
        assert_eq!(self.links.send(to, KIND, Priority::Normal, &call.to_le_bytes()), SendOutcome::Queued);
        self.open.insert(call);
    }
}

#[derive(Clone, Debug)]
enum LinkStep {
    Send { from: usize },
    Carry { from: usize, how: u8 },
}

fn step() -> impl Strategy<Value = LinkStep> {
    prop_oneof![
        (0..2usize).prop_map(|from| LinkStep::Send { from }),
        (0..2usize, 0..12u8).prop_map(|(from, how)| LinkStep::Carry { from, how }),
    ]
}

fn carry(ends: &mut [LinkEnd; 2], from: usize, how: u8) -> bool {
    let Some(batch) = ends[from].links.next_batch() else { return false };
    assert_eq!(batch.to, ends[1 - from].id);
    let (sender, receiver) = (&ends[from].links, &ends[1 - from].links);
    match how {
        // Lost, though the carrier believes that it arrived.
        0 => sender.complete(&batch, BatchOutcome::Delivered),
        // The outcome is unknown: it did not arrive, or it did.
        1 => sender.complete(&batch, BatchOutcome::Unknown),
        2 => {
            receiver.receive(&batch.bytes);
            sender.complete(&batch, BatchOutcome::Unknown);
        }
        // Sent twice.
        3 => {
            receiver.receive(&batch.bytes);
            receiver.receive(&batch.bytes);
            sender.complete(&batch, BatchOutcome::Delivered);
        }
        _ => {
            assert_eq!(receiver.receive(&batch.bytes), ReceiveOutcome::Accepted);
            sender.complete(&batch, BatchOutcome::Delivered);
        }
    }
    ends.iter_mut().for_each(LinkEnd::read);
    true
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]
    /// And in the end, each end holds exactly the calls that are open at the other.
    #[test]
    fn messages_arrive_in_order_and_at_most_once(steps in prop::collection::vec(step(), 1..80)) {
        let mut ends = [LinkEnd::new(1), LinkEnd::new(2)];
        ends[0].links.add_peer(NodeId(2));
        ends[1].links.add_peer(NodeId(1));
        let mut calls = 0;
        for step in steps {
            match step {
                LinkStep::Send { from } => {
                    calls += 1;
                    let to = ends[1 - from].id;
                    ends[from].send(to, calls);
                }
                LinkStep::Carry { from, how } => {
                    carry(&mut ends, from, how);
                }
            }
        }
        // A message from each end reveals what was lost.
        for _ in 0..2 {
            for from in [0, 1, 0] {
                calls += 1;
                let to = ends[1 - from].id;
                ends[from].send(to, calls);
                while carry(&mut ends, from, 9) || carry(&mut ends, 1 - from, 9) {}
            }
        }
        for from in 0..2 {
            prop_assert_eq!(&ends[from].open, &ends[1 - from].held);
            prop_assert!(ends[from].open.contains(&calls) || from == 1, "an intact link delivers messages");
            prop_assert!(ends[from].got.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", ends[from].got);
        }
    }
}

/// Two peers that know each other's lives.
fn connected() -> (PeerLinks, PeerLinks) {
    let (one, two) = (PeerLinks::new(NodeId(1)), PeerLinks::new(NodeId(2)));
    one.add_peer(NodeId(2));
    two.add_peer(NodeId(1));
    two.send(NodeId(1), MessageKind::Connections, Priority::Normal, b"");
    exchange(&one, &two);
    (one, two)
}

/// Delivers until nothing is left. Returns the number of batches.
fn exchange(one: &PeerLinks, two: &PeerLinks) -> usize {
    let mut count = 0;
    loop {
        let before = count;
        for (from, to) in [(one, two), (two, one)] {
            while let Some(batch) = from.next_batch() {
                assert_eq!(to.receive(&batch.bytes), ReceiveOutcome::Accepted);
                from.complete(&batch, BatchOutcome::Delivered);
                count += 1;
                assert!(count < 100, "the ends restart each other without end");
            }
        }
        if count == before {
            return count;
        }
    }
}

/// Both ends begin new lives at the same time, repeatedly.
#[test]
fn two_ends_that_break_at_once_agree_on_a_link() {
    let (one, two) = connected();
    let inboxes = [one.inbox(KIND), two.inbox(KIND)];
    for round in 0..20 {
        // Batches for former lives are still in flight.
        let mut late = Vec::new();
        for (from, to) in [(&one, NodeId(2)), (&two, NodeId(1))] {
            from.send(to, KIND, Priority::Normal, b"late");
            if let Some(batch) = from.next_batch() {
                from.complete(&batch, if round % 3 == 0 { BatchOutcome::Delivered } else { BatchOutcome::Unknown });
                late.push((to, batch));
            }
            if round % 2 == 0 {
                from.remove_peer(to);
                from.add_peer(to);
            }
        }
        for (to, batch) in late {
            if to == NodeId(1) { &one } else { &two }.receive(&batch.bytes);
        }
        exchange(&one, &two);
        inboxes.iter().for_each(|inbox| drop(inbox.take()));
        for (n, (from, to)) in [(&one, NodeId(2)), (&two, NodeId(1))].into_iter().enumerate() {
            from.send(to, KIND, Priority::Normal, b"x");
            exchange(&one, &two);
            let got = inboxes[1 - n].take();
            let message = InboxEvent::Message { from: NodeId(1 + n as u64), body: b"x"[..].into() };
            assert_eq!(got.back(), Some(&message), "{round}: {got:?}");
        }
    }
}

#[test]
fn undelivered_messages_are_returned_in_order() {
    let ((one, _two), two) = (connected(), NodeId(2));
    let inbox = one.inbox(KIND);
    assert_eq!(one.send(NodeId(3), KIND, Priority::High, b"x"), SendOutcome::NoSuchNode);
    for message in ["a", "b"] {
        one.send(two, KIND, Priority::Normal, message.as_bytes());
    }
    let batch = one.next_batch().unwrap();
    assert!(one.next_batch().is_none(), "one batch at a time");
    one.send(two, KIND, Priority::Normal, b"c");
    one.send(two, MessageKind::Presence, Priority::Normal, b"not yours");
    one.complete(&batch, BatchOutcome::Undelivered);
    let mut expected: VecDeque<_> =
        ["a", "b", "c"].map(|message| InboxEvent::Returned { to: two, body: message.into() }).into();
    expected.push_back(InboxEvent::LinkLost { peer: two, gone: true });
    assert_eq!(inbox.take(), expected);
    assert_eq!(one.send(two, KIND, Priority::High, b"x"), SendOutcome::NoSuchNode);
    assert!(!one.has_peer(two) && !one.has_peer(NodeId(3)));
}

#[test]
fn an_unsent_batch_is_returned_with_its_link_and_not_sent_later() {
    for gone in [true, false] {
        let ((one, _two), two) = (connected(), NodeId(2));
        let inbox = one.inbox(KIND);
        one.send(two, KIND, Priority::Normal, b"a");
        let batch = one.next_batch().unwrap();
        assert!(one.begin_send(&batch));
        if !gone {
            one.not_sent(&batch);
        }
        one.remove_peer(two);
        let back = (!gone).then_some(InboxEvent::Returned { to: two, body: b"a"[..].into() });
        let lost = InboxEvent::LinkLost { peer: two, gone: true };
        assert_eq!(inbox.take(), back.into_iter().chain([lost]).collect::<VecDeque<_>>());
        assert!(!one.begin_send(&batch));
        one.complete(&batch, BatchOutcome::Undelivered);
        assert!(inbox.take().is_empty());
    }
}

#[test]
fn send_queues_are_bounded_and_a_large_message_has_its_own_batch() {
    let ((one, _two), two) = (connected(), NodeId(2));
    let large = vec![7; 1 << 20];
    let mut taken = 0;
    while one.send(two, KIND, Priority::Normal, &large) == SendOutcome::Queued {
        taken += 1;
    }
    assert_eq!(taken, 3);
    assert_eq!(one.send(two, KIND, Priority::High, &large), SendOutcome::Queued);
    let mut batches = 0;
    while let Some(batch) = one.next_batch() {
        assert!(batch.bytes.len() < large.len() + 100);
        one.complete(&batch, BatchOutcome::Delivered);
        batches += 1;
    }
    assert_eq!(batches, 4);
}

#[test]
fn other_versions_break_the_link_and_unknown_kinds_are_skipped() {
    let (one, two) = connected();
    let inbox = two.inbox(KIND);
    one.send(NodeId(2), KIND, Priority::Normal, b"a");
    let mut bytes = one.next_batch().unwrap().bytes.to_vec();
    assert_eq!(PeerLinks::new(NodeId(3)).receive(&bytes.clone().into()), ReceiveOutcome::UnknownSender(NodeId(1)));
    // An unknown kind before a known one.
    let mut more = bytes[..25].to_vec();
    more.extend_from_slice(&[99, 2, 0, 0, 0, 1, 2]);
    more.extend_from_slice(&bytes[25..]);
    two.receive(&more.into());
    assert_eq!(inbox.take(), [InboxEvent::Message { from: NodeId(1), body: "a".into() }]);
    bytes[0] = 2;
    assert_eq!(two.receive(&bytes.into()), ReceiveOutcome::Accepted);
    assert_eq!(inbox.take(), [InboxEvent::LinkLost { peer: NodeId(1), gone: false }]);
    assert_eq!(two.next_batch().unwrap().bytes.len(), 25, "the other end has to learn the new life");
    for garbage in ["", "x", "01234567890123456789012345678"] {
        assert_ne!(two.receive(&garbage.into()), ReceiveOutcome::Accepted);
    }
}
