//! Random operations in random order: every call has exactly one answer, and nothing is left at the end.

use std::{collections::HashMap, sync::atomic::AtomicBool};

use proptest::prelude::*;

use super::{
    fake::{RecordingPeer, Socket, World, raw},
    *,
};

const SERVICES: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Debug)]
enum Step {
    Connect,
    Provide {
        socket: usize,
        service: usize,
        exclusive: bool,
        takeover: bool,
        concurrency: u32,
        meta: bool,
    },
    Withdraw {
        socket: usize,
        service: usize,
    },
    Call {
        socket: usize,
        service: usize,
        timeout: u64,
        wait: Option<u64>,
        late: bool,
    },
    Notify {
        socket: usize,
        service: usize,
    },
    /// To one of the latest calls that it received, perhaps not for the first time.
    Reply {
        socket: usize,
        back: usize,
        how: u8,
    },
    /// A reply with the id of a call of another provider.
    Intrude {
        socket: usize,
        victim: usize,
    },
    Cancel {
        socket: usize,
        back: usize,
    },
    Writes {
        socket: usize,
        written: u8,
    },
    Drop {
        socket: usize,
    },
    Pass {
        ms: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let (socket, service) = (0..8usize, 0..SERVICES.len());
    prop_oneof![
        2 => Just(Step::Connect),
        4 => (socket.clone(), service.clone(), any::<bool>(), any::<bool>(), 1..4u32, any::<bool>()).prop_map(
            |(socket, service, exclusive, takeover, concurrency, meta)| {
                let exclusive = exclusive && service == 0;
                Step::Provide { socket, service, exclusive, takeover: takeover && exclusive, concurrency, meta }
            }
        ),
        1 => (socket.clone(), service.clone()).prop_map(|(socket, service)| Step::Withdraw { socket, service }),
        12 => (socket.clone(), service.clone(), 1..5_000u64, prop::option::of(0..5_000u64), any::<bool>())
            .prop_map(|(socket, service, timeout, wait, late)| Step::Call { socket, service, timeout, wait, late }),
        1 => (socket.clone(), service).prop_map(|(socket, service)| Step::Notify { socket, service }),
        10 => (socket.clone(), 0..4usize, 0..4u8).prop_map(|(socket, back, how)| Step::Reply { socket, back, how }),
        1 => (socket.clone(), socket.clone()).prop_map(|(socket, victim)| Step::Intrude { socket, victim }),
        2 => (socket.clone(), 0..4usize).prop_map(|(socket, back)| Step::Cancel { socket, back }),
        1 => (socket.clone(), 0..4u8).prop_map(|(socket, written)| Step::Writes { socket, written }),
        1 => socket.prop_map(|socket| Step::Drop { socket }),
        3 => (1..3_000u64).prop_map(|ms| Step::Pass { ms }),
    ]
}

struct Run {
    world: World,
    alive: Vec<Socket>,
    /// Closed connections, and how many answers they had received when they were closed.
    dead: Vec<(Arc<RecordingPeer>, usize)>,
    calls: usize,
    /// Calls that each open socket made, by its index in `alive`.
    made: Vec<Vec<String>>,
}

impl Run {
    fn pick(&self, socket: usize) -> Option<usize> {
        (!self.alive.is_empty()).then(|| socket % self.alive.len())
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Connect if self.alive.len() < 8 => {
                self.alive.push(self.world.socket());
                self.made.push(Vec::new());
            }
            Step::Connect => {}
            Step::Pass { ms } => self.world.pass(Duration::from_millis(ms)),
            Step::Provide { socket, service, exclusive, takeover, concurrency, meta } => {
                let Some(at) = self.pick(socket) else { return };
                // The registration may be rejected.
                let _ = self.alive[at].provide(SERVICES[service], |request| {
                    (request.exclusive, request.takeover, request.concurrency, request.meta) =
                        (exclusive, takeover, concurrency, meta);
                });
            }
            Step::Withdraw { socket, service } => {
                let Some(at) = self.pick(socket) else { return };
                let _ = self.alive[at].hub.withdraw(SERVICES[service]);
            }
            Step::Call { socket, service, timeout, wait, late } => {
                let Some(at) = self.pick(socket) else { return };
                let tag = self.calls.to_string();
                self.calls += 1;
                self.made[at].push(tag.clone());
                self.alive[at].call_with(&tag, &format!("{}/x", SERVICES[service]), |call| {
                    call.timeout = Some(Duration::from_millis(timeout));
                    call.wait = wait.map(Duration::from_millis);
                    call.late = late;
                });
            }
            Step::Notify { socket, service } => {
                let Some(at) = self.pick(socket) else { return };
                self.alive[at].hub.notify(&Call::new(SERVICES[service], "n", None));
            }
            Step::Reply { socket, back, how } => {
                let Some(at) = self.pick(socket) else { return };
                let Some((id, tag)) = nth_last(&self.alive[at].saw, back) else { return };
                self.alive[at].hub.reply(
                    id,
                    match how {
                        0 => CallAnswer::bad_reply("is empty"),
                        1 => CallAnswer::Error(ProviderError { code: 1, message: tag.as_str().into(), data: None }),
                        _ => CallAnswer::Result(raw(&tag)),
                    },
                );
            }
            Step::Intrude { socket, victim } => {
                let (Some(at), Some(victim)) = (self.pick(socket), self.pick(victim)) else { return };
                let Some((id, _)) = nth_last(&self.alive[victim].saw, 0) else { return };
                if at != victim {
                    let replied = self.alive[at].hub.reply(id, CallAnswer::Result(raw(r#""intruder""#)));
                    assert_eq!(replied, ReplyOutcome::Unmatched);
                }
            }
            Step::Cancel { socket, back } => {
                let Some(at) = self.pick(socket) else { return };
                let Some(tag) = self.made[at].iter().rev().nth(back) else { return };
                assert!(self.alive[at].hub.cancel(tag.as_bytes()) <= 1);
            }
            Step::Writes { socket, written } => {
                let Some(at) = self.pick(socket) else { return };
                let written = [None, None, Some(WriteOutcome::Full), Some(WriteOutcome::Gone)][usize::from(written)];
                *self.alive[at].saw.written.lock() = written;
            }
            Step::Drop { socket } => {
                let Some(at) = self.pick(socket) else { return };
                self.drop(at);
            }
        }
        self.world.hub.assert_consistent();
    }

    fn drop(&mut self, at: usize) {
        let Socket { hub, saw } = self.alive.swap_remove(at);
        self.made.swap_remove(at);
        drop(hub);
        let answers = saw.answers.lock().len();
        self.dead.push((saw, answers));
    }

    fn end(mut self) {
        // Longer than any deadline.
        self.world.pass(Duration::from_secs(6));
        assert_eq!((self.world.hub.counts().pending, self.world.hub.counts().waiting), (0, 0));
        for (socket, made) in self.alive.iter().zip(&self.made) {
            let mut answered: Vec<_> = socket.saw.answers.lock().iter().map(|(tag, _)| tag.clone()).collect();
            let mut made = made.clone();
            answered.sort();
            made.sort();
            assert_eq!(answered, made, "one answer to each call");
            assert_eq!(socket.hub.in_flight(), 0);
        }
        while !self.alive.is_empty() {
            self.drop(0);
        }
        let mut written = HashMap::new();
        for (saw, answers) in &self.dead {
            assert_eq!(saw.answers.lock().len(), *answers, "closed connections receive nothing");
            for (tag, outcome) in saw.answers.lock().iter().chain(saw.late.lock().iter()) {
                let own = [format!("[{tag:?}]"), format!("error 1 [{tag:?}]")].contains(outcome);
                assert!(
                    own || outcome.ends_with(" no") || outcome.ends_with(" maybe"),
                    "{tag} was answered with {outcome}"
                );
            }
            for call in saw.calls.lock().iter().filter(|call| call.id.is_some()) {
                *written.entry(call.params.clone().unwrap()).or_insert(0) += 1;
            }
        }
        assert!(written.values().all(|times| *times == 1), "no call is written twice");
        for (saw, _) in &self.dead {
            for (tag, outcome) in saw.answers.lock().iter().filter(|(_, outcome)| outcome.ends_with(" no")) {
                assert!(
                    !written.contains_key(&format!("[{tag:?}]")),
                    "{tag} was answered with {outcome}, and was written"
                );
            }
        }
        self.world.assert_empty_after_a_minute();
    }
}

fn nth_last(saw: &RecordingPeer, back: usize) -> Option<(CallId, String)> {
    let calls = saw.calls.lock();
    let call = calls.iter().rev().filter(|call| call.id.is_some()).nth(back)?;
    Some((call.id?, call.params.clone()?))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn one_answer_each(steps in prop::collection::vec(step(), 1..200)) {
        let mut run = Run { world: World::new(), alive: Vec::new(), dead: Vec::new(), calls: 0, made: Vec::new() };
        for _ in 0..3 {
            run.step(Step::Connect);
        }
        for step in steps {
            run.step(step);
        }
        run.end();
    }
}

/// The same guarantees with concurrent callers, providers that come and go, and sweeps.
#[test]
fn one_answer_each_with_threads() {
    let world = Arc::new(World::new());
    let over = Arc::new(AtomicBool::new(false));
    let providers: Vec<_> = (0..3)
        .map(|n| {
            let (world, over) = (world.clone(), over.clone());
            std::thread::spawn(move || {
                let mut written = Vec::new();
                for round in 0u64.. {
                    if over.load(Relaxed) {
                        break;
                    }
                    let socket = world.socket();
                    let _ = socket.provide("a", |request| {
                        (request.concurrency, request.meta) = (4 + n, round % 2 == 0);
                    });
                    let mut seen = 0;
                    for _ in 0..200 {
                        let calls = socket.saw.calls.lock()[seen..].to_vec();
                        seen += calls.len();
                        for call in &calls {
                            let (Some(id), Some(params)) = (call.id, &call.params) else { continue };
                            socket.hub.reply(id, CallAnswer::Result(raw(params)));
                        }
                        std::thread::yield_now();
                    }
                    if round % 3 == 0 {
                        let _ = socket.hub.withdraw("a");
                    }
                    let saw = socket.saw.clone();
                    drop(socket);
                    written.extend(
                        saw.calls.lock().iter().filter(|call| call.id.is_some()).map(|call| call.params.clone()),
                    );
                }
                written
            })
        })
        .collect();
    let callers: Vec<_> = (0..3)
        .map(|n| {
            let world = world.clone();
            std::thread::spawn(move || {
                let socket = world.socket();
                let mut made = 0;
                while made < 3_000 {
                    let room = socket.hub.in_flight() < 16;
                    if room {
                        let tag = format!("{n}-{made}");
                        socket.call_with(&tag, "a/x", |call| {
                            (call.late, call.timeout) = (made % 2 == 0, Some(Duration::from_millis(50)));
                        });
                        if made % 7 == 0 {
                            socket.hub.cancel(tag.as_bytes());
                        }
                        made += 1;
                    } else {
                        std::thread::yield_now();
                    }
                }
                socket
            })
        })
        .collect();
    let sweep = {
        let (world, over) = (world.clone(), over.clone());
        std::thread::spawn(move || {
            while !over.load(Relaxed) {
                world.pass(Duration::from_millis(1));
                std::thread::yield_now();
            }
        })
    };
    let sockets: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
    over.store(true, Relaxed);
    let written: Vec<_> = providers.into_iter().flat_map(|provider| provider.join().unwrap()).collect();
    sweep.join().unwrap();
    world.pass(Duration::from_secs(1));
    for socket in &sockets {
        let answers = socket.saw.answers.lock();
        let tags: std::collections::HashSet<_> = answers.iter().map(|(tag, _)| tag).collect();
        assert_eq!((tags.len(), answers.len(), socket.hub.in_flight()), (3_000, 3_000, 0));
        for (tag, outcome) in answers.iter() {
            assert!(!outcome.starts_with('[') || *outcome == format!("[{tag:?}]"), "{tag} was answered with {outcome}");
        }
    }
    let distinct: std::collections::HashSet<_> = written.iter().collect();
    assert_eq!(distinct.len(), written.len(), "no call is written twice");
    drop(sockets);
    world.assert_empty_after_a_minute();
}
