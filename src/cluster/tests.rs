use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    test_network::{TTL, TestNetwork, TestNode},
    *,
};

const KIND: MessageKind = MessageKind::Calls;

/// One end of a link. Every mail is a call that is never answered: it is open at one end and held at the other.
struct End {
    id: NodeId,
    links: PeerLinks,
    inbox: Inbox,
    got: Vec<u64>,
    open: BTreeSet<u64>,
    held: BTreeSet<u64>,
}

impl End {
    fn new(id: u64) -> Self {
        let links = PeerLinks::new(NodeId(id));
        let inbox = links.inbox(KIND);
        let (got, open, held) = Default::default();
        End { id: NodeId(id), links, inbox, got, open, held }
    }

    fn read(&mut self) {
        let number = |mail: Bytes| u64::from_le_bytes(mail[..].try_into().unwrap());
        for incoming in self.inbox.take() {
            match incoming {
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
enum Step {
    Send { from: usize },
    Carry { from: usize, how: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..2usize).prop_map(|from| Step::Send { from }),
        (0..2usize, 0..12u8).prop_map(|(from, how)| Step::Carry { from, how }),
    ]
}

fn carry(ends: &mut [End; 2], from: usize, how: u8) -> bool {
    let Some(batch) = ends[from].links.next_batch() else { return false };
    assert_eq!(batch.to, ends[1 - from].id);
    let (sender, receiver) = (&ends[from].links, &ends[1 - from].links);
    match how {
        // Lost on the way, though the carrier believes that it arrived.
        0 => sender.complete(&batch, BatchOutcome::Delivered),
        // Nobody knows: arrived, or not.
        1 => sender.complete(&batch, BatchOutcome::Unknown),
        2 => {
            receiver.receive(&batch.bytes);
            sender.complete(&batch, BatchOutcome::Unknown);
        }
        // Tried twice.
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
    ends.iter_mut().for_each(End::read);
    true
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]
    /// In order, at most once; and in the end what one believes to be with the other is with the other.
    #[test]
    fn mail_keeps_its_promise(steps in prop::collection::vec(step(), 1..80)) {
        let mut ends = [End::new(1), End::new(2)];
        ends[0].links.add_peer(NodeId(2));
        ends[1].links.add_peer(NodeId(1));
        let mut calls = 0;
        for step in steps {
            match step {
                Step::Send { from } => {
                    calls += 1;
                    let to = ends[1 - from].id;
                    ends[from].send(to, calls);
                }
                Step::Carry { from, how } => {
                    carry(&mut ends, from, how);
                }
            }
        }
        // A beat from each end shows what is missing.
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
            prop_assert!(ends[from].open.contains(&calls) || from == 1, "a link that is whole carries mail");
            prop_assert!(ends[from].got.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", ends[from].got);
        }
    }
}

/// Two that know each other's lives.
fn met() -> (PeerLinks, PeerLinks) {
    let (one, two) = (PeerLinks::new(NodeId(1)), PeerLinks::new(NodeId(2)));
    one.add_peer(NodeId(2));
    two.add_peer(NodeId(1));
    two.send(NodeId(1), MessageKind::Connections, Priority::Normal, b"");
    exchange(&one, &two);
    (one, two)
}

/// Carries until there is nothing left. How many batches.
fn exchange(one: &PeerLinks, two: &PeerLinks) -> usize {
    let mut count = 0;
    loop {
        let before = count;
        for (from, to) in [(one, two), (two, one)] {
            while let Some(batch) = from.next_batch() {
                assert_eq!(to.receive(&batch.bytes), ReceiveOutcome::Accepted);
                from.complete(&batch, BatchOutcome::Delivered);
                count += 1;
                assert!(count < 100, "they never come to an end");
            }
        }
        if count == before {
            return count;
        }
    }
}

/// Each of two ends begins anew while the other does, again and again: they find each other all the same.
#[test]
fn two_that_break_at_once_do_not_chase_each_other() {
    let (one, two) = met();
    let inboxes = [one.inbox(KIND), two.inbox(KIND)];
    for round in 0..20 {
        // What each has sent to what the other was is still on its way.
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
            let mail = InboxEvent::Message { from: NodeId(1 + n as u64), body: b"x"[..].into() };
            assert_eq!(got.back(), Some(&mail), "{round}: {got:?}");
        }
    }
}

#[test]
fn what_nobody_takes_comes_back_whole_and_in_order() {
    let ((one, _two), two) = (met(), NodeId(2));
    let inbox = one.inbox(KIND);
    assert_eq!(one.send(NodeId(3), KIND, Priority::High, b"x"), SendOutcome::NoSuchNode);
    for mail in ["a", "b"] {
        one.send(two, KIND, Priority::Normal, mail.as_bytes());
    }
    let batch = one.next_batch().unwrap();
    assert!(one.next_batch().is_none(), "one batch at a time");
    one.send(two, KIND, Priority::Normal, b"c");
    one.send(two, MessageKind::Presence, Priority::Normal, b"not yours");
    one.complete(&batch, BatchOutcome::Undelivered);
    let mut expected: VecDeque<_> =
        ["a", "b", "c"].map(|mail| InboxEvent::Returned { to: two, body: mail.into() }).into();
    expected.push_back(InboxEvent::LinkLost { peer: two, gone: true });
    assert_eq!(inbox.take(), expected);
    assert_eq!(one.send(two, KIND, Priority::High, b"x"), SendOutcome::NoSuchNode);
    assert!(!one.has_peer(two) && !one.has_peer(NodeId(3)));
}

#[test]
fn what_has_not_gone_out_comes_back_with_its_link_and_does_not_go_any_more() {
    for gone in [true, false] {
        let ((one, _two), two) = (met(), NodeId(2));
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
fn what_waits_is_bounded_and_large_mails_travel_alone() {
    let ((one, _two), two) = (met(), NodeId(2));
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
fn batches_of_another_version_break_the_link_and_topics_of_one_are_left_out() {
    let (one, two) = met();
    let inbox = two.inbox(KIND);
    one.send(NodeId(2), KIND, Priority::Normal, b"a");
    let mut bytes = one.next_batch().unwrap().bytes.to_vec();
    assert_eq!(PeerLinks::new(NodeId(3)).receive(&bytes.clone().into()), ReceiveOutcome::UnknownSender(NodeId(1)));
    // A topic that this version does not know, before one that it does.
    let mut more = bytes[..25].to_vec();
    more.extend_from_slice(&[99, 2, 0, 0, 0, 1, 2]);
    more.extend_from_slice(&bytes[25..]);
    two.receive(&more.into());
    assert_eq!(inbox.take(), [InboxEvent::Message { from: NodeId(1), body: "a".into() }]);
    bytes[0] = 2;
    assert_eq!(two.receive(&bytes.into()), ReceiveOutcome::Accepted);
    assert_eq!(inbox.take(), [InboxEvent::LinkLost { peer: NodeId(1), gone: false }]);
    assert_eq!(two.next_batch().unwrap().bytes.len(), 25, "the other end has to learn of it");
    for garbage in ["", "x", "01234567890123456789012345678"] {
        assert_ne!(two.receive(&garbage.into()), ReceiveOutcome::Accepted);
    }
}

// === several nodes in one process ===

struct World {
    net: Arc<TestNetwork>,
    now: Arc<AtomicU64>,
}

impl World {
    fn new() -> Self {
        let now = Arc::new(AtomicU64::new(1_000));
        World { net: TestNetwork::new(MonotonicClock::Manual(now.clone())), now }
    }

    fn pass(&self, ms: u64) {
        self.now.fetch_add(ms, SeqCst);
        self.net.beat();
    }
}

fn claim(node: &TestNode, name: &str, how: Claim) -> Result<Lease, ClaimError> {
    futures_util::FutureExt::now_or_never(node.claim(name, how)).unwrap()
}

#[test]
fn names_are_shared_or_exclusive_and_fences_grow() {
    let world = World::new();
    let (a, b) = (world.net.join(), world.net.join());
    let (one, two) = (claim(&a, "x", Claim::Shared).unwrap(), claim(&b, "x", Claim::Shared).unwrap());
    assert_eq!(claim(&a, "x", Claim::Exclusive).err(), Some(ClaimError::Held(vec![b.id()])));
    drop(two);
    let own = claim(&a, "x", Claim::Exclusive).unwrap();
    drop(one);
    assert_eq!((own.fence(), own.is_valid()), (Some(1), true), "the lease that it replaced takes nothing away");
    assert_eq!(claim(&b, "x", Claim::Shared).err(), Some(ClaimError::Held(vec![a.id()])));
    drop(own);
    assert_eq!(world.net.names(), 0);
    assert_eq!(claim(&b, "x", Claim::Exclusive).unwrap().fence(), Some(2));
    assert_eq!((a.leases(), b.leases(), world.net.names()), (0, 0, 0));
}

#[test]
fn an_exclusive_name_stops_before_it_can_be_taken_and_stands_again_if_it_was_not() {
    let world = World::new();
    let (a, b) = (world.net.join(), world.net.join());
    let own = claim(&a, "x", Claim::Exclusive).unwrap();
    for _ in 0..5 {
        world.pass(3_000);
        assert!(own.is_valid());
    }
    a.cut(true);
    world.pass(TTL - 2_001);
    assert!(own.is_valid());
    world.pass(1);
    assert!(!own.is_valid() && !own.is_lost());
    assert!(matches!(claim(&b, "x", Claim::Exclusive), Err(ClaimError::Held(_))));
    a.cut(false);
    world.pass(0);
    assert!(own.is_valid());
    a.cut(true);
    world.pass(TTL);
    let other = claim(&b, "x", Claim::Exclusive).unwrap();
    assert_eq!(other.fence(), Some(2));
    a.cut(false);
    let before = a.id();
    world.pass(0);
    assert!(own.is_lost() && !own.is_valid() && other.is_valid());
    assert_ne!(a.id(), before, "it comes back as another");
    drop(own);
    assert!(other.is_valid() && world.net.names() == 1);
}

#[test]
fn everybody_learns_who_is_up_and_who_holds_what() {
    let world = World::new();
    let a = world.net.join();
    let (members, roster) = (a.members(), a.roster("s:"));
    let b = world.net.join();
    assert_eq!(members.take(), [Member { node: b.id(), up: true }]);
    let lease = claim(&b, "s:x", Claim::Shared).unwrap();
    let hidden = claim(&b, "other", Claim::Shared).unwrap();
    hidden.set_info(Some("no".into()));
    assert_eq!(roster.take(), []);
    lease.set_info(Some("1".into()));
    lease.set_info(Some("2".into()));
    let told = roster.take();
    assert_eq!((told.len(), told[0].info.as_deref()), (1, Some(&b"2"[..])));
    assert_eq!(a.roster("s:").take(), told, "who asks later is told what there is");
    drop(lease);
    assert!(roster.take()[0].info.is_none());
    world.net.kill(&b);
    world.pass(TTL - 1);
    assert_eq!(members.take(), []);
    world.pass(1);
    assert_eq!(members.take(), [Member { node: b.id(), up: false }]);
}
