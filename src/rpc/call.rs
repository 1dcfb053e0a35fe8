//! A call on its way to a provider: as the caller made it, as it is forwarded, and as it waits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::value::RawValue;

use crate::error::{Code, Error, Result};

/// A call as a transport received it.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub(crate) service: &'a str,
    pub(crate) method: &'a str,
    pub(crate) params: Option<&'a RawValue>,
    /// Subject of the caller, from its permit.
    pub caller: &'a str,
    pub traceparent: Option<&'a str>,
    /// None: the configured one.
    pub timeout: Option<Duration>,
    /// How long to wait for a provider, even of a service that never had one. None: the configured time, and only if
    /// the service had a provider within the last minute.
    pub wait: Option<Duration>,
    /// A reply after the deadline is delivered by [`Peer::late`](super::Peer::late).
    pub late: bool,
    /// The call in the protocol of an adapter, JSON, for providers of the same protocol; others receive `method` and
    /// `params`. The adapter decides what is a method name then.
    pub(crate) as_sent: Option<&'a RawValue>,
}

/// A call or notification without what depends on its provider.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallRequest<'a> {
    pub(super) method: &'a str,
    pub(super) params: Option<&'a RawValue>,
    pub(super) as_sent: Option<&'a RawValue>,
    pub(super) caller: &'a str,
    pub(super) traceparent: Option<&'a str>,
    /// Milliseconds.
    pub(super) wait: Option<u64>,
    pub(super) late: bool,
}

/// A [`CallRequest`] that waits for a provider.
pub(super) struct StoredRequest {
    method: Box<str>,
    params: Option<Box<RawValue>>,
    as_sent: Option<Box<RawValue>>,
    caller: Box<str>,
    traceparent: Option<Box<str>>,
    wait: Option<u64>,
    late: bool,
    _permit: WaitPermit,
}

/// Counts the calls that wait for a provider on this node, and their bytes.
#[derive(Debug, Default)]
pub(super) struct WaitingRoom {
    calls: AtomicUsize,
    bytes: AtomicUsize,
}

/// The share of one waiting call in the [`WaitingRoom`], released on drop.
pub(super) struct WaitPermit {
    room: Arc<WaitingRoom>,
    bytes: usize,
}

impl<'a> Call<'a> {
    /// An anonymous call with the configured timeout.
    pub fn new(service: &'a str, method: &'a str, params: Option<&'a RawValue>) -> Self {
        Call {
            service,
            method,
            params,
            caller: "",
            traceparent: None,
            timeout: None,
            wait: None,
            late: false,
            as_sent: None,
        }
    }

    /// Splits the name of a call at its last `/`. `method_not_found` if there is none.
    pub fn split(name: &str) -> Result<(&str, &str)> {
        name.rsplit_once('/').ok_or_else(|| {
            Error::new(Code::MethodNotFound, format!("{name} is neither a method of weir nor SERVICE/METHOD"))
        })
    }
}

impl<'a> CallRequest<'a> {
    pub(super) fn new(call: &Call<'a>) -> Self {
        let Call { method, params, as_sent, caller, traceparent, .. } = *call;
        let wait = call.wait.map(|wait| wait.as_millis() as u64);
        CallRequest { method, params, as_sent, caller, traceparent, wait, late: call.late }
    }

    pub(super) fn store(&self, permit: WaitPermit) -> Box<StoredRequest> {
        Box::new(StoredRequest {
            method: self.method.into(),
            params: self.params.map(ToOwned::to_owned),
            as_sent: self.as_sent.map(ToOwned::to_owned),
            caller: self.caller.into(),
            traceparent: self.traceparent.map(Into::into),
            wait: self.wait,
            late: self.late,
            _permit: permit,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let json: usize = [self.params, self.as_sent].into_iter().flatten().map(|json| json.get().len()).sum();
        self.method.len() + json + self.caller.len() + self.traceparent.map_or(0, str::len)
    }
}

impl StoredRequest {
    pub(super) fn request(&self) -> CallRequest<'_> {
        CallRequest {
            method: &self.method,
            params: self.params.as_deref(),
            as_sent: self.as_sent.as_deref(),
            caller: &self.caller,
            traceparent: self.traceparent.as_deref(),
            wait: self.wait,
            late: self.late,
        }
    }
}

impl WaitingRoom {
    /// None: the room is full.
    pub(super) fn acquire(self: &Arc<Self>, bytes: usize, max_calls: usize, max_bytes: usize) -> Option<WaitPermit> {
        let permit = WaitPermit { room: self.clone(), bytes };
        let calls = self.calls.fetch_add(1, Relaxed) + 1;
        let bytes = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        (calls <= max_calls && bytes <= max_bytes).then_some(permit)
    }
}

impl Drop for WaitPermit {
    fn drop(&mut self) {
        self.room.calls.fetch_sub(1, Relaxed);
        self.room.bytes.fetch_sub(self.bytes, Relaxed);
    }
}
