//! Dispatches the messages of an [`RpcSession`]: calls and replies go to the hub as they are read; what concerns the
//! bus is [queued](super::bus_methods).

use std::{
    str::Utf8Error,
    task::{Context, Poll},
};

use serde_json::value::RawValue;

use super::{
    jsonrpc,
    jsonrpc::{RpcFrame, RpcMessage, RpcReply, RpcRequest, Unusable},
    outbox::reject,
    params,
    session::{MethodOutcome, NULL, RpcSession},
    work::{JobOrder, JobOutput},
};
use crate::{
    error::{Code, Error, Result},
    net::timer::TimerWheel,
    rpc::{
        self, AcceptedProvider, Call, CallAnswer, CallId, CallerId, HubConnection, MethodNames, ProvideRequest,
        ProviderError,
    },
};

/// Services in one answer of `weir.services`.
const MAX_SERVICES: usize = 1_000;

// === impl RpcSession: messages ===

impl RpcSession {
    /// Handles one frame or body. Returns how many answers it will get.
    pub(super) fn receive(&mut self, text: Result<&str, Utf8Error>) -> usize {
        let frame = match text {
            Ok(text) => jsonrpc::read(text),
            Err(error) => Err(Unusable { id: "null", error: Error::new(Code::ParseError, error.to_string()) }),
        };
        match frame {
            Ok(RpcFrame::One(message)) => self.message(Ok(message), 0),
            Ok(RpcFrame::Batch(messages)) => self.batch(&messages),
            Err(unusable) => self.message(Err(unusable), 0),
        }
    }

    fn batch(&mut self, messages: &[&RawValue]) -> usize {
        let most = self.node.config.limits.batch;
        let rejected = |detail: String| Error::new(Code::InvalidRequest, detail);
        let error = match messages.len() {
            0 => rejected("an empty array".to_owned()),
            n if n > most => {
                rejected(format!("a batch of {n} messages, limits.batch is {most}")).with("limit", "limits.batch")
            }
            _ => {
                let messages: Vec<_> = messages.iter().map(|message| RpcMessage::read(message.get())).collect();
                let answered = |message: &&Result<_, _>| {
                    !matches!(message, Ok(RpcMessage::Reply(_) | RpcMessage::Request(RpcRequest { id: None, .. })))
                };
                let note = self.outbox.open_batch(messages.iter().filter(answered).count());
                let answers: usize = messages.into_iter().map(|message| self.message(message, note)).sum();
                self.outbox.close_batch(note);
                return answers.min(1);
            }
        };
        self.message(Err(Unusable { id: "null", error }), 0)
    }

    /// Handles one message of the batch `note`, or of none (0).
    fn message(&mut self, message: Result<RpcMessage<'_>, Unusable<'_>>, note: u32) -> usize {
        match message {
            Ok(RpcMessage::Request(request)) => self.request(&request, note),
            Ok(RpcMessage::Reply(reply)) => {
                self.reply(&reply);
                0
            }
            Err(Unusable { id, error }) => {
                if error.code() == Code::ParseError {
                    self.count_unreadable();
                }
                reject(&self.outbox, Some(&CallerId::new(id.as_bytes()).with_note(note)), &error);
                1
            }
        }
    }

    fn request(&mut self, request: &RpcRequest<'_>, note: u32) -> usize {
        let to = request.id.map(|id| CallerId::new(id.as_bytes()).with_note(note));
        let answers = usize::from(to.is_some());
        let method = &*request.method;
        if method.starts_with("rpc.") {
            reject(&self.outbox, to.as_ref(), &unknown(method));
        } else if method.contains('/') && method != "$/cancelRequest" {
            self.short_call(method, request.params, to);
        } else {
            // Even if it is rejected: no other client uses such names.
            self.knows_weir |= method.starts_with("weir.");
            match self.weir(method, request.params, to.as_ref()) {
                Ok(MethodOutcome::Answered) => {}
                Ok(MethodOutcome::Result(json)) => {
                    if let Some(to) = &to {
                        self.outbox.answer(to, |out| jsonrpc::result(out, to.id(), &json));
                    }
                }
                Ok(MethodOutcome::Later { work, bytes, order }) => {
                    // A job holds what its params hold, such as names and tokens.
                    let bytes = request.params.map_or(0, |params| params.get().len()).max(bytes);
                    self.enqueue(to, work, bytes, order);
                }
                Err(error) => reject(&self.outbox, to.as_ref(), &error),
            }
        }
        answers
    }

    fn count_unreadable(&mut self) {
        self.node.metrics.ws_unreadable.add(1);
        let now = self.node.timers.now();
        let (count, since) = &mut self.unreadable;
        if TimerWheel::span(*since, now).as_secs() >= 60 {
            (*count, *since) = (0, now);
        }
        *count += 1;
        if *count as usize > self.node.config.limits.unreadable {
            self.outbox.close_with(Code::Protocol);
        }
    }

    fn weir(&mut self, method: &str, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<MethodOutcome> {
        match method {
            "weir.publish" => self.publish(params).inspect_err(|error| self.node.metrics.publish_failed(error.code())),
            "weir.call" => self.call(params, to),
            "weir.ping" => {
                let params::NoParams {} = params::read(params)?;
                Ok(MethodOutcome::Result(format!(r#"{{"time":{}}}"#, self.node.bus.now()).into_bytes()))
            }
            "weir.auth" => self.authenticate(params),
            "weir.read" => self.read(params),
            "weir.presence" => self.presence(params),
            "weir.commit" => self.commit(params),
            "weir.cancel" | "$/cancelRequest" => self.cancel(params),
            "weir.services" => {
                let params::ServicesParams { prefix } = params::read(params)?;
                let mut services = self.node.hub.services(prefix.as_deref().unwrap_or_default(), MAX_SERVICES);
                // Services that the client may not call are not listed.
                services.retain(|info| self.identity.may_see(&info.service));
                // The same shape as over HTTP.
                Ok(json(&serde_json::json!({ "services": services })))
            }
            "weir.subscribe" | "weir.unsubscribe" | "weir.provide" | "weir.withdraw" if self.over_http => {
                Err(Error::new(
                    Code::MethodNotFound,
                    format!("{method} needs a connection that stays: a WebSocket, GET /v1/ws"),
                ))
            }
            "weir.subscribe" => self.subscribe(params),
            "weir.unsubscribe" => self.unsubscribe(params),
            "weir.provide" => {
                let provides = self.hub().provided_services();
                if let Some(registration) = &self.registration {
                    registration.set_services(provides);
                }
                self.provide(params, to)
            }
            "weir.withdraw" => {
                let params::WithdrawParams { service } = params::read(params)?;
                let abandoned = self.work.as_mut().is_some_and(|work| work.abandon_registration(&service));
                let in_flight = match self.hub().withdraw(&service) {
                    Err(_) if abandoned => 0,
                    withdrawn => withdrawn?,
                };
                Ok(MethodOutcome::Result(format!(r#"{{"in_flight":{in_flight}}}"#).into_bytes()))
            }
            _ => Err(unknown(method)),
        }
    }
}

fn unknown(method: &str) -> Error {
    Error::new(Code::MethodNotFound, format!("{method} is no method of weir, nor SERVICE/METHOD"))
}

fn json(value: &impl serde::Serialize) -> MethodOutcome {
    // None of these values fails to serialize.
    MethodOutcome::Result(serde_json::to_vec(value).unwrap_or_else(|_| NULL.to_vec()))
}

// === impl RpcSession: calls ===

impl RpcSession {
    fn hub(&mut self) -> &HubConnection {
        self.hub.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()))
    }

    /// `service/method`.
    fn short_call(&mut self, name: &str, params: Option<&RawValue>, to: Option<CallerId>) {
        let permitted = Call::split(name).and_then(|(service, method)| {
            let permit = self.identity.may_call(service, method)?;
            Ok(Call { caller: permit.subject(), ..Call::new(service, method, params) })
        });
        let hub = self.hub.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()));
        match (permitted, to) {
            (Ok(call), Some(to)) => hub.call(to, &call),
            (Ok(call), None) => hub.notify(&call),
            (Err(error), to) => reject(&self.outbox, to.as_ref(), &error),
        }
    }

    /// `weir.call`.
    fn call(&mut self, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<MethodOutcome> {
        let params: params::CallParams<'_> = params::read(params)?;
        params.check()?;
        let permit = self.identity.may_call(&params.service, &params.method)?;
        let call = Call {
            caller: permit.subject(),
            timeout: params.timeout()?,
            wait: params.wait()?,
            late: params.late,
            ..Call::new(&params.service, &params.method, params.params)
        };
        let hub = self.hub.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()));
        match to {
            Some(to) => hub.call(to.clone(), &call),
            None => hub.notify(&call),
        }
        Ok(MethodOutcome::Answered)
    }

    /// Forwards a provider's answer. A reply is never answered, however malformed.
    fn reply(&mut self, reply: &RpcReply<'_>) {
        let id = reply.id.and_then(|id| CallId::parse(id.strip_prefix('"')?.strip_suffix('"')?));
        let (Some(id), Some(hub)) = (id, &self.hub) else {
            self.node.metrics.ws_ignored.add(1);
            return;
        };
        let answer = match (reply.result, reply.error) {
            (Some(result), None) => CallAnswer::Result(result),
            // Some libraries send both, with one of them null.
            (Some(result), Some(error)) if error.get() == "null" => CallAnswer::Result(result),
            (_, Some(error)) => match provider_error(error.get()) {
                Some(error) => CallAnswer::Error(error),
                None => CallAnswer::bad_reply("has an error that is not {code, message, data}"),
            },
            (None, None) => CallAnswer::bad_reply("has neither result nor error"),
        };
        if hub.reply(id, answer) == rpc::ReplyOutcome::Unmatched {
            self.node.metrics.ws_ignored.add(1);
        }
    }

    fn cancel(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let params::CancelParams { id } = params::read(params)?;
        if let Some(hub) = &self.hub {
            hub.cancel(id.get().as_bytes());
        }
        Ok(MethodOutcome::Result(NULL.to_vec()))
    }

    fn provide(&mut self, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<MethodOutcome> {
        let params: params::ProvideParams<'_> = params::read(params)?;
        params.check()?;
        let identity = self.identity.clone();
        let permit = identity.may_provide(&params.service)?;
        if self.leaving {
            return Err(Error::new(Code::Draining, "this node is shutting down"));
        }
        if matches!(params.names, params::NamesParam::Bare) && self.hub().provides_other(&params.service) {
            return Err(mixed_names());
        }
        let methods: Vec<&str> = params.methods.iter().map(|method| &**method).collect();
        let usual = ProvideRequest::new(&params.service);
        let bare = matches!(params.names, params::NamesParam::Bare);
        let providing = self.hub().provide(&ProvideRequest {
            subject: permit.subject(),
            exclusive: params.exclusive,
            takeover: params.takeover,
            concurrency: params.concurrency.unwrap_or(usual.concurrency),
            names: if bare { MethodNames::Short } else { MethodNames::Qualified },
            meta: params.meta,
            methods: &methods,
            ..usual
        });
        let service = params.service.to_string();
        match providing.try_finish() {
            Ok(provided) => {
                self.provided(to, &service, bare, provided?);
                Ok(MethodOutcome::Answered)
            }
            // Other nodes are asked first. Other requests of this session do not wait for that.
            Err(providing) => {
                let abandoned = self.work.get_or_insert_default().begin_registration(&service);
                let work = async move {
                    let provided = tokio::select! {
                        biased;
                        () = abandoned.notified() => Err(Error::new(Code::Cancelled, format!("{service} was withdrawn"))),
                        provided = providing => provided,
                    };
                    Ok(JobOutput::Provide { service, bare, provided: provided? })
                };
                Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order: JobOrder::Waits })
            }
        }
    }

    pub(super) fn provided(&mut self, to: Option<&CallerId>, service: &str, bare: bool, provided: AcceptedProvider) {
        if bare && self.hub().provides_other(service) {
            // Both were requested before the first was accepted.
            return self.take_back(to, service, &mixed_names());
        }
        if self.leaving {
            return self.take_back(to, service, &Error::new(Code::Draining, "this node is shutting down"));
        }
        if let Err(error) = self.identity.clone().may_provide(service) {
            return self.take_back(to, service, &error);
        }
        let mut answer = serde_json::json!({ "service": service, "providers": provided.providers });
        if let Some(fence) = provided.fence {
            answer["fence"] = fence.into();
        }
        if let Some(to) = to {
            self.outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
        }
        // From here on calls are forwarded, so they come after the answer.
        drop(provided);
    }

    /// Withdraws a registration before it gets a call.
    fn take_back(&mut self, to: Option<&CallerId>, service: &str, why: &Error) {
        // Cannot fail: the service is registered.
        let _ = self.hub().withdraw(service);
        reject(&self.outbox, to, why);
    }

    /// Waits until the callers that this client has answered have room for more answers.
    pub(super) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.hub.as_ref().map_or(Poll::Ready(()), |hub| hub.poll_room(cx))
    }

    pub(super) fn abandon_wait(&self) {
        if let Some(hub) = &self.hub {
            hub.abandon_wait();
        }
    }

    /// Withdraws all services: no new calls come in, those in flight go on.
    pub(super) fn withdraw_all(&mut self) {
        self.leaving = true;
        if let Some(hub) = &self.hub {
            hub.withdraw_all();
        }
    }

    /// Fails the calls that are in flight, as the drain has lasted too long.
    pub(super) fn fail_in_flight(&self) {
        if let Some(hub) = &self.hub {
            hub.fail_in_flight();
        }
    }

    /// Whether no request of the client and no call to it is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        self.is_idle() && self.hub.as_ref().is_none_or(HubConnection::is_idle)
    }
}

fn mixed_names() -> Error {
    Error::params(
        "this connection provides a service already, and could not tell their methods apart: say \"names\":\"full\"",
    )
}

/// `code`, `message` and `data` of a provider's error. Other members are dropped, as some clients reject them.
fn provider_error(json: &str) -> Option<ProviderError<'_>> {
    #[derive(serde::Deserialize)]
    struct ProviderErrorJson<'a> {
        code: i64,
        #[serde(borrow, default)]
        message: Option<crate::json::JsonStr<'a>>,
        #[serde(borrow)]
        data: Option<&'a RawValue>,
    }
    let wire: ProviderErrorJson<'_> = serde_json::from_str(json).ok()?;
    let message = wire.message.map(|message| message.0).unwrap_or_default();
    Some(ProviderError { code: wire.code, message, data: wire.data.map(std::borrow::Cow::Borrowed) })
}
