//! [`Session`]: from a message to what it asks for. Calls and replies go to the hub as they are read; what concerns the
//! bus is queued as [work](super::work).

use std::{str::Utf8Error, sync::Arc};

use futures_util::future::BoxFuture;
use serde_json::value::RawValue;

use super::{
    jsonrpc,
    jsonrpc::{Frame, Message, Reply, Request, Unusable},
    outbox::{Outbox, refuse},
    params,
    reader::Reader,
    work::{Done, Manner, Work},
};
use crate::{
    auth::Identity,
    error::{Code, Error, Result},
    net::timer::TimerWheel,
    node::Node,
    rpc::{
        self, AcceptedProvider, Call, CallAnswer, CallId, CallerId, HubConnection, MethodNames, ProvideRequest,
        ProviderError,
    },
    sessions::ConnectionRegistration,
};

/// Services in one answer of `weir.services`.
const MAX_SERVICES: usize = 1_000;

/// One client's conversation: a socket, or one request over HTTP.
pub struct Session {
    pub(super) node: Arc<Node>,
    pub(super) identity: Identity,
    pub(super) outbox: Arc<Outbox>,
    /// Its hold on the hub, from the first call on.
    link: Option<HubConnection>,
    /// What it is subscribed to, from the first subscription on.
    pub reader: Option<Box<Reader>>,
    pub(super) work: Option<Box<Work>>,
    /// Whether it knows weir's own methods, and so its notifications.
    pub knows_weir: bool,
    /// The node goes, and this session with it: it provides nothing any more.
    leaving: bool,
    /// Where it is listed; a request over HTTP is not.
    pub(super) registration: Option<ConnectionRegistration>,
    /// One request over HTTP: it can neither subscribe nor provide.
    held: bool,
    /// Unreadable messages since the tick.
    unreadable: (u32, u32),
}

/// What a method of weir answers.
pub(super) enum Outcome {
    /// At once, as JSON.
    Result(Vec<u8>),
    /// When the bus has done it.
    Later { work: BoxFuture<'static, Result<Done>>, bytes: usize, manner: Manner },
    /// Answered already, if it is answered at all.
    Answered,
}

pub(super) const NULL: &[u8] = b"null";

// === impl Session: messages ===

impl Session {
    pub fn new(node: Arc<Node>, identity: Identity, outbox: Arc<Outbox>, held: bool) -> Self {
        Session {
            node,
            identity,
            outbox,
            link: None,
            reader: None,
            work: None,
            knows_weir: false,
            leaving: false,
            registration: None,
            held,
            unreadable: (0, 0),
        }
    }

    /// Takes one frame or body. Returns how many answers it will get.
    pub fn receive(&mut self, text: Result<&str, Utf8Error>) -> usize {
        let frame = match text {
            Ok(text) => jsonrpc::read(text),
            Err(error) => Err(Unusable { id: "null", error: Error::new(Code::ParseError, error.to_string()) }),
        };
        match frame {
            Ok(Frame::One(message)) => self.message(Ok(message), 0),
            Ok(Frame::Batch(messages)) => self.batch(&messages),
            Err(unusable) => self.message(Err(unusable), 0),
        }
    }

    fn batch(&mut self, messages: &[&RawValue]) -> usize {
        let most = self.node.config.limits.batch;
        let refused = |detail: String| Error::new(Code::InvalidRequest, detail);
        let error = match messages.len() {
            0 => refused("an empty array".to_owned()),
            n if n > most => {
                refused(format!("a batch of {n} messages, limits.batch is {most}")).with("limit", "limits.batch")
            }
            _ => {
                let messages: Vec<_> = messages.iter().map(|message| Message::read(message.get())).collect();
                let answered = |message: &&Result<_, _>| {
                    !matches!(message, Ok(Message::Reply(_) | Message::Request(Request { id: None, .. })))
                };
                let note = self.outbox.open_batch(messages.iter().filter(answered).count());
                let answers: usize = messages.into_iter().map(|message| self.message(message, note)).sum();
                self.outbox.close_batch(note);
                return answers.min(1);
            }
        };
        self.message(Err(Unusable { id: "null", error }), 0)
    }

    /// Takes one message of the batch `note`, or of none (0).
    fn message(&mut self, message: Result<Message<'_>, Unusable<'_>>, note: u32) -> usize {
        match message {
            Ok(Message::Request(request)) => self.request(&request, note),
            Ok(Message::Reply(reply)) => {
                self.reply(&reply);
                0
            }
            Err(Unusable { id, error }) => {
                if error.code() == Code::ParseError {
                    self.count_unreadable();
                }
                refuse(&self.outbox, Some(&CallerId::new(id.as_bytes()).with_note(note)), &error);
                1
            }
        }
    }

    fn request(&mut self, request: &Request<'_>, note: u32) -> usize {
        let to = request.id.map(|id| CallerId::new(id.as_bytes()).with_note(note));
        let answers = usize::from(to.is_some());
        let method = &*request.method;
        if method.starts_with("rpc.") {
            refuse(&self.outbox, to.as_ref(), &unknown(method));
        } else if method.contains('/') && method != "$/cancelRequest" {
            self.short_call(method, request.params, to);
        } else {
            // Counted as knowing weir even if it is refused: nobody else says such names.
            self.knows_weir |= method.starts_with("weir.");
            match self.weir(method, request.params, to.as_ref()) {
                Ok(Outcome::Answered) => {}
                Ok(Outcome::Result(json)) => {
                    if let Some(to) = &to {
                        self.outbox.answer(to, |out| jsonrpc::result(out, to.id(), &json));
                    }
                }
                Ok(Outcome::Later { work, bytes, manner }) => self.later(to, work, bytes, manner),
                Err(error) => refuse(&self.outbox, to.as_ref(), &error),
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
            self.outbox.end(Code::Protocol);
        }
    }

    fn weir(&mut self, method: &str, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<Outcome> {
        match method {
            "weir.publish" => self.publish(params).inspect_err(|error| self.node.metrics.publish_failed(error.code())),
            "weir.call" => self.call(params, to),
            "weir.ping" => {
                let params::Nothing {} = params::read(params)?;
                Ok(Outcome::Result(format!(r#"{{"time":{}}}"#, self.node.bus.now()).into_bytes()))
            }
            "weir.auth" => {
                let params::Auth { .. } = params::read(params)?;
                // There are no credentials yet: everyone is anonymous, whatever the token. The answer says so.
                Ok(json(&serde_json::json!({ "subject": "", "expires": null, "anonymous": true })))
            }
            "weir.read" => self.read(params),
            "weir.presence" => self.presence(params),
            "weir.commit" => self.commit(params),
            "weir.cancel" | "$/cancelRequest" => self.cancel(params),
            "weir.services" => {
                let params::Services { prefix } = params::read(params)?;
                let mut services = self.node.hub.services(prefix.as_deref().unwrap_or_default(), MAX_SERVICES);
                // What one may not call is none of one's business.
                services.retain(|info| self.identity.may_call(&info.service).is_ok());
                // As over HTTP.
                Ok(json(&serde_json::json!({ "services": services })))
            }
            "weir.subscribe" | "weir.unsubscribe" | "weir.provide" | "weir.withdraw" if self.held => Err(Error::new(
                Code::MethodNotFound,
                format!("{method} needs a connection that stays: a WebSocket, GET /v1/ws"),
            )),
            "weir.subscribe" => self.subscribe(params),
            "weir.unsubscribe" => self.unsubscribe(params),
            "weir.provide" => {
                let provides = self.link().provided_services();
                if let Some(registration) = &self.registration {
                    registration.set_services(provides);
                }
                self.provide(params, to)
            }
            "weir.withdraw" => {
                let params::Withdraw { service } = params::read(params)?;
                let given_up = self.work.as_mut().is_some_and(|work| work.give_up(&service));
                let in_flight = match self.link().withdraw(&service) {
                    Err(_) if given_up => 0,
                    withdrawn => withdrawn?,
                };
                Ok(Outcome::Result(format!(r#"{{"in_flight":{in_flight}}}"#).into_bytes()))
            }
            _ => Err(unknown(method)),
        }
    }
}

fn unknown(method: &str) -> Error {
    Error::new(Code::MethodNotFound, format!("{method} is no method of weir, nor SERVICE/METHOD"))
}

fn json(value: &impl serde::Serialize) -> Outcome {
    // Of what is answered here nothing fails to serialise.
    Outcome::Result(serde_json::to_vec(value).unwrap_or_else(|_| NULL.to_vec()))
}

// === impl Session: calls ===

impl Session {
    fn link(&mut self) -> &HubConnection {
        self.link.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()))
    }

    /// `service/method`.
    fn short_call(&mut self, name: &str, params: Option<&RawValue>, to: Option<CallerId>) {
        let permitted = Call::split(name).and_then(|(service, method)| {
            let permit = self.identity.may_call(service)?;
            Ok(Call { caller: permit.subject(), ..Call::new(service, method, params) })
        });
        let link = self.link.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()));
        match (permitted, to) {
            (Ok(call), Some(to)) => link.call(to, &call),
            (Ok(call), None) => link.notify(&call),
            (Err(error), to) => refuse(&self.outbox, to.as_ref(), &error),
        }
    }

    /// `weir.call`.
    fn call(&mut self, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<Outcome> {
        let asked: params::Call<'_> = params::read(params)?;
        asked.check()?;
        let permit = self.identity.may_call(&asked.service)?;
        let call = Call {
            caller: permit.subject(),
            timeout: asked.timeout()?,
            wait: asked.wait()?,
            late: asked.late,
            ..Call::new(&asked.service, &asked.method, asked.params)
        };
        let link = self.link.get_or_insert_with(|| HubConnection::new(&self.node.hub, self.outbox.clone()));
        match to {
            Some(to) => link.call(to.clone(), &call),
            None => link.notify(&call),
        }
        Ok(Outcome::Answered)
    }

    /// Passes a provider's answer on. Never answered itself, whatever it is.
    fn reply(&mut self, reply: &Reply<'_>) {
        let id = reply.id.and_then(|id| CallId::parse(id.strip_prefix('"')?.strip_suffix('"')?));
        let (Some(id), Some(link)) = (id, &self.link) else {
            self.node.metrics.ws_ignored.add(1);
            return;
        };
        let answer = match (reply.result, reply.error) {
            (Some(result), None) => CallAnswer::Result(result),
            // Some libraries send both, one of them null.
            (Some(result), Some(error)) if error.get() == "null" => CallAnswer::Result(result),
            (_, Some(error)) => match provider_error(error.get()) {
                Some(error) => CallAnswer::Error(error),
                None => CallAnswer::bad_reply("has an error that is not {code, message, data}"),
            },
            (None, None) => CallAnswer::bad_reply("has neither result nor error"),
        };
        if link.reply(id, answer) == rpc::ReplyOutcome::Unmatched {
            self.node.metrics.ws_ignored.add(1);
        }
    }

    fn cancel(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Cancel { id } = params::read(params)?;
        if let Some(link) = &self.link {
            link.cancel(id.get().as_bytes());
        }
        Ok(Outcome::Result(NULL.to_vec()))
    }

    fn provide(&mut self, params: Option<&RawValue>, to: Option<&CallerId>) -> Result<Outcome> {
        let asked: params::Provide<'_> = params::read(params)?;
        asked.check()?;
        let identity = self.identity.clone();
        let permit = identity.may_provide(&asked.service)?;
        if self.leaving {
            return Err(Error::new(Code::Draining, "this node is leaving"));
        }
        if matches!(asked.names, params::Names::Bare) && self.link().provides_other(&asked.service) {
            return Err(two_bare());
        }
        let methods: Vec<&str> = asked.methods.iter().map(|method| &**method).collect();
        let usual = ProvideRequest::new(&asked.service);
        let bare = matches!(asked.names, params::Names::Bare);
        let providing = self.link().provide(&ProvideRequest {
            subject: permit.subject(),
            exclusive: asked.exclusive,
            takeover: asked.takeover,
            concurrency: asked.concurrency.unwrap_or(usual.concurrency),
            names: if bare { MethodNames::Short } else { MethodNames::Qualified },
            meta: asked.meta,
            methods: &methods,
            ..usual
        });
        let service = asked.service.to_string();
        match providing.try_finish() {
            Ok(provided) => {
                self.provided(to, &service, bare, provided?);
                Ok(Outcome::Answered)
            }
            // Other nodes are asked first, and nobody waits for that but who asked.
            Err(providing) => {
                let given_up = self.work.get_or_insert_default().registers(&service);
                let work = async move {
                    let provided = tokio::select! {
                        biased;
                        () = given_up.notified() => Err(Error::new(Code::Cancelled, format!("{service} was withdrawn"))),
                        provided = providing => provided,
                    };
                    Ok(Done::Provide { service, bare, provided: provided? })
                };
                Ok(Outcome::Later { work: Box::pin(work), bytes: 0, manner: Manner::Waits })
            }
        }
    }

    pub(super) fn provided(&mut self, to: Option<&CallerId>, service: &str, bare: bool, provided: AcceptedProvider) {
        if bare && self.link().provides_other(service) {
            // It asked for both before the first was there.
            return self.unprovide(to, service, &two_bare());
        }
        if self.leaving {
            return self.unprovide(to, service, &Error::new(Code::Draining, "this node is leaving"));
        }
        let mut answer = serde_json::json!({ "service": service, "providers": provided.providers });
        if let Some(fence) = provided.fence {
            answer["fence"] = fence.into();
        }
        if let Some(to) = to {
            self.outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
        }
        // Calls begin here: they come after the answer.
        drop(provided);
    }

    /// Takes a registration back before it gets a call.
    fn unprovide(&mut self, to: Option<&CallerId>, service: &str, why: &Error) {
        // It does provide it, so this cannot fail.
        let _ = self.link().withdraw(service);
        refuse(&self.outbox, to, why);
    }

    /// No new calls come in; those in flight go on.
    pub fn withdraw_all(&mut self) {
        self.leaving = true;
        if let Some(link) = &self.link {
            link.withdraw_all();
        }
    }

    /// What it still waits for is answered: the node goes.
    pub fn cut_off(&self) {
        if let Some(link) = &self.link {
            link.fail_in_flight();
        }
    }

    /// Whether nobody waits for this session, nor it for anybody.
    pub fn is_quiet(&self) -> bool {
        self.is_idle() && self.link.as_ref().is_none_or(HubConnection::is_idle)
    }
}

fn two_bare() -> Error {
    Error::params(
        "this connection provides a service already, and could not tell their methods apart: say \"names\":\"full\"",
    )
}

/// `code`, `message` and `data` of a provider's error; other members are left behind, for clients die of them.
fn provider_error(json: &str) -> Option<ProviderError<'_>> {
    #[derive(serde::Deserialize)]
    struct Wire<'a> {
        code: i64,
        #[serde(borrow, default)]
        message: Option<crate::json::JsonStr<'a>>,
        #[serde(borrow)]
        data: Option<&'a RawValue>,
    }
    let wire: Wire<'_> = serde_json::from_str(json).ok()?;
    let message = wire.message.map(|message| message.0).unwrap_or_default();
    Some(ProviderError { code: wire.code, message, data: wire.data.map(std::borrow::Cow::Borrowed) })
}
