//! Connections that record what the hub writes to them, and a hub with a manual clock.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::{Value, value::RawValue};

use super::*;
use weir::{
    cluster::MonotonicClock,
    config::{Config, LimitsSection},
    metrics::Metrics,
};

use crate::support::test_network::{TestNetwork, TestNode};

#[derive(Default)]
pub struct RecordingPeer {
    pub calls: Mutex<Vec<ReceivedCall>>,
    /// Caller id and outcome: the result, `error CODE MESSAGE`, or `CODE EXECUTED`.
    pub answers: Mutex<Vec<(String, String)>>,
    pub late: Mutex<Vec<(String, String)>>,
    pub cancels: Mutex<Vec<CallId>>,
    pub withdrawn: Mutex<Vec<String>>,
    /// Probes that are not answered.
    pub probes: Mutex<Vec<ProbeCallback>>,
    pub written: Mutex<Option<WriteOutcome>>,
    /// Runs once, while a call is being written.
    pub meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedCall {
    pub id: Option<CallId>,
    pub name: String,
    pub params: Option<String>,
    pub meta: Option<Value>,
}

/// A connection under test and what the hub wrote to it.
pub struct Socket {
    pub hub: HubConnection,
    pub saw: Arc<RecordingPeer>,
}

/// One node, alone or in a cluster.
pub struct World {
    pub hub: Arc<Hub>,
    pub remote: RemoteNodes,
    pub metrics: Arc<Metrics>,
    pub node: Arc<TestNode>,
    pub net: Arc<TestNetwork>,
    clock: Arc<AtomicU64>,
}

impl Peer for RecordingPeer {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let meanwhile = self.meanwhile.lock().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        let written = self.written.lock().unwrap_or(WriteOutcome::Written);
        if written == WriteOutcome::Written {
            let name = match call.names {
                MethodNames::Short => call.method.to_owned(),
                MethodNames::Qualified => format!("{}/{}", call.service, call.method),
            };
            let params = call.params.map(|params| params.get().to_owned());
            let meta = call.meta.map(|meta| serde_json::to_value(meta).unwrap());
            self.calls.lock().push(ReceivedCall { id: call.id, name, params, meta });
        }
        written
    }

    fn cancel(&self, id: CallId) {
        self.cancels.lock().push(id);
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        self.answers.lock().push((tag(to), text(&answer)));
        PeerRoom::Free
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        self.late.lock().push((tag(to), text(&answer)));
        PeerRoom::Free
    }

    fn withdrawn(&self, service: &str, reason: &str) {
        self.withdrawn.lock().push(format!("{service} {reason}"));
    }

    fn probe(&self, callback: ProbeCallback) {
        self.probes.lock().push(callback);
    }
}

fn tag(tag: &CallerId) -> String {
    String::from_utf8_lossy(tag.id()).into_owned()
}

pub fn text(answer: &CallAnswer<'_>) -> String {
    match answer {
        CallAnswer::Result(result) => result.get().to_owned(),
        CallAnswer::Error(error) => format!("error {} {}", error.code, error.message),
        CallAnswer::Failed(error) => {
            let data = error.data();
            let executed = data.get("executed").and_then(Value::as_str).unwrap_or("-").to_owned();
            format!("{} {executed}", error.code().as_str())
        }
    }
}

pub fn raw(json: &str) -> &RawValue {
    serde_json::from_str(json).unwrap()
}

impl World {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(limit: impl FnOnce(&mut LimitsSection)) -> Self {
        let mut config = Config::default();
        limit(&mut config.limits);
        let clock = Arc::new(AtomicU64::new(1_000));
        let net = TestNetwork::new(MonotonicClock::Manual(clock.clone()));
        Self::join(&net, &clock, config.into())
    }

    pub fn join(net: &Arc<TestNetwork>, clock: &Arc<AtomicU64>, config: Arc<Config>) -> Self {
        let node = net.join();
        let metrics = Arc::new(Metrics::new());
        let hub = Hub::new(config, MonotonicClock::Manual(clock.clone()), node.clone(), metrics.clone());
        let remote = RemoteNodes::new(&hub);
        World { hub, remote, metrics, node, net: net.clone(), clock: clock.clone() }
    }

    pub fn socket(&self) -> Socket {
        let saw = Arc::new(RecordingPeer::default());
        Socket { hub: HubConnection::new(&self.hub, saw.clone()), saw }
    }

    /// Takes the changes of services, as if they were published.
    pub fn take_changes(&self) -> Vec<ServiceChange> {
        let published = |change: weir::rpc::UnpublishedChange| {
            let service_change = change.change().clone();
            change.published();
            service_change
        };
        self.hub.take_changes().into_iter().map(published).collect()
    }

    pub fn sweep(&self) {
        self.hub.sweep();
        self.remote.send_heartbeats();
    }

    /// Moves the clock and sweeps.
    pub fn pass(&self, time: Duration) {
        let mut left = time.as_millis() as u64;
        while left > 0 {
            let step = left.min(3_000);
            self.clock.fetch_add(step, SeqCst);
            self.net.beat();
            left -= step;
        }
        self.sweep();
    }

    /// A socket that provides `service`, shared.
    pub fn provider(&self, service: &str) -> Socket {
        let socket = self.socket();
        drop(socket.hub.provide(&ProvideRequest::new(service)).try_finish().ok().unwrap().unwrap());
        socket
    }

    /// Asserts that nothing is left of all connections, services and calls.
    pub fn assert_empty_after_a_minute(&self) {
        self.pass(Duration::from_secs(61));
        self.pass(Duration::from_secs(1));
        assert_eq!(self.hub.counts(), HubCounts::default());
        assert_eq!(self.node.leases(), 0);
    }
}

impl Socket {
    /// `svc/method`
    pub fn call(&self, tag: &str, name: &str) {
        self.call_with(tag, name, |_| {});
    }

    pub fn call_with(&self, tag: &str, name: &str, change: impl FnOnce(&mut Call<'_>)) {
        let (service, method) = Call::split(name).unwrap();
        let params = format!("[{tag:?}]");
        let mut call = Call::new(service, method, Some(raw(&params)));
        change(&mut call);
        self.hub.call(CallerId::new(tag.as_bytes()), &call);
    }

    pub fn provide(&self, service: &str, change: impl FnOnce(&mut ProvideRequest<'_>)) -> Result<(usize, Option<u64>)> {
        let mut request = ProvideRequest::new(service);
        change(&mut request);
        let provided = self.hub.provide(&request).try_finish().unwrap_or_else(|mut asking| {
            // Another thread is releasing the name at this moment. No other node has to be queried, so it ends soon.
            let mut cx = Context::from_waker(Waker::noop());
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            loop {
                if let Poll::Ready(provided) = Pin::new(&mut asking).poll(&mut cx) {
                    return provided;
                }
                assert!(std::time::Instant::now() < deadline, "the registration needs no other node");
                std::thread::yield_now();
            }
        });
        provided.map(|provided| (provided.providers, provided.fence))
    }

    /// Replies to the `nth` call that it received.
    pub fn reply(&self, nth: usize, result: &str) -> ReplyOutcome {
        let id = self.saw.calls.lock()[nth].id.unwrap();
        self.hub.reply(id, CallAnswer::Result(raw(result)))
    }

    /// Caller ids of the calls that it received, in order.
    pub fn got(&self) -> Vec<String> {
        let calls = self.saw.calls.lock();
        calls
            .iter()
            .map(|call| serde_json::from_str::<[String; 1]>(call.params.as_ref().unwrap()).unwrap()[0].clone())
            .collect()
    }

    pub fn answers(&self) -> Vec<String> {
        self.saw.answers.lock().iter().map(|(tag, outcome)| format!("{tag}: {outcome}")).collect()
    }

    pub fn late(&self) -> Vec<String> {
        self.saw.late.lock().iter().map(|(tag, outcome)| format!("{tag}: {outcome}")).collect()
    }
}
