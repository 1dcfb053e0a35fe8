//! [`Session`]: from a message to what it asks for. Calls and replies go to the hub as they are read; what concerns the
//! bus is queued, so that publishes are placed in the order in which they came and nobody waits for them.

use std::{
    collections::VecDeque,
    future::ready,
    pin::Pin,
    str::Utf8Error,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, Stream},
};
use serde_json::value::RawValue;

use super::{
    Ws, jsonrpc,
    jsonrpc::{Frame, Message, Reply, Request, Unusable},
    outbox::{Outbox, refuse},
    params::{self, Publish, Wanted},
    reader::Reader,
};
use crate::{
    auth::Identity,
    bus::{Placed, PublishFailed, Watch},
    error::{Code, Error, Result},
    event::{Channel, Draft},
    metrics::Transport,
    rpc::{self, Answer, Call, CallId, Connection, Names, Provide, ProviderError, Tag},
    transport::{longpoll, wheel::Wheel},
};

/// Services in one answer of `weir.services`.
const MAX_SERVICES: usize = 1_000;

/// One client's conversation: a socket, or one request over HTTP.
pub struct Session {
    ws: Arc<Ws>,
    identity: Identity,
    outbox: Arc<Outbox>,
    /// Its hold on the hub, from the first call on.
    link: Option<Connection>,
    /// What it is subscribed to, from the first subscription on.
    pub reader: Option<Box<Reader>>,
    work: Option<Box<Work>>,
    /// Whether it knows weir's own methods, and so its notifications.
    pub knows_weir: bool,
    /// One request over HTTP: it can neither subscribe nor provide.
    held: bool,
    /// Unreadable messages since the tick.
    unreadable: (u32, u32),
}

/// What waits for the bus.
#[derive(Default)]
struct Work {
    /// One at a time, in order.
    queue: VecDeque<Job>,
    /// All at once: reads that wait for events.
    waits: Option<FuturesUnordered<BoxFuture<'static, Finished>>>,
    /// Encoded bytes of the events in the queue.
    bytes: usize,
}

struct Job {
    work: BoxFuture<'static, Finished>,
    bytes: usize,
    /// Becomes one of those that wait when its turn comes: what was published before is seen by it.
    waits: bool,
}

/// What a job came to, and whom to tell.
struct Finished {
    to: Option<Tag>,
    done: Result<Done>,
}

enum Done {
    /// JSON.
    Result(Vec<u8>),
    Subscribe(Vec<(Wanted, Watch)>),
    Unsubscribe(Vec<Channel>),
}

/// What a method of weir answers.
enum Outcome {
    /// At once, as JSON.
    Result(Vec<u8>),
    /// When the bus has done it.
    Later { work: BoxFuture<'static, Result<Done>>, bytes: usize, waits: bool },
    /// Answered already, if it is answered at all.
    Answered,
}

/// Jobs that are finished before others have their turn: a bus in memory makes none of them wait.
const TURN: usize = 64;

const NULL: &[u8] = b"null";

// === impl Session: messages ===

impl Session {
    pub fn new(ws: Arc<Ws>, identity: Identity, outbox: Arc<Outbox>, held: bool) -> Self {
        Session {
            ws,
            identity,
            outbox,
            link: None,
            reader: None,
            work: None,
            knows_weir: false,
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
        let most = self.ws.config.limits.batch;
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
                refuse(&self.outbox, Some(&Tag::new(id.as_bytes()).with_note(note)), &error);
                1
            }
        }
    }

    fn request(&mut self, request: &Request<'_>, note: u32) -> usize {
        let to = request.id.map(|id| Tag::new(id.as_bytes()).with_note(note));
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
                Ok(Outcome::Later { work, bytes, waits }) => self.later(to, work, bytes, waits),
                Err(error) => refuse(&self.outbox, to.as_ref(), &error),
            }
        }
        answers
    }

    fn count_unreadable(&mut self) {
        self.ws.metrics.ws_unreadable.add(1);
        let now = self.ws.wheel.now();
        let (count, since) = &mut self.unreadable;
        if Wheel::span(*since, now).as_secs() >= 60 {
            (*count, *since) = (0, now);
        }
        *count += 1;
        if *count as usize > self.ws.config.limits.unreadable {
            self.outbox.end(Code::Protocol);
        }
    }

    fn weir(&mut self, method: &str, params: Option<&RawValue>, to: Option<&Tag>) -> Result<Outcome> {
        match method {
            "weir.publish" => self.publish(params).inspect_err(|error| self.ws.metrics.publish_failed(error.code())),
            "weir.call" => self.call(params, to),
            "weir.ping" => {
                let params::Nothing {} = params::read(params)?;
                Ok(Outcome::Result(format!(r#"{{"time":{}}}"#, self.ws.bus.now()).into_bytes()))
            }
            "weir.auth" => {
                let params::Auth { .. } = params::read(params)?;
                // There are no credentials yet: everyone is anonymous, whatever the token. The answer says so.
                Ok(json(&serde_json::json!({ "subject": "", "expires": null, "anonymous": true })))
            }
            "weir.read" => self.read(params),
            "weir.commit" => self.commit(params),
            "weir.cancel" | "$/cancelRequest" => self.cancel(params),
            "weir.services" => {
                let params::Services { prefix } = params::read(params)?;
                let mut services = self.ws.hub.services(prefix.as_deref().unwrap_or_default(), MAX_SERVICES);
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
            "weir.provide" => self.provide(params, to),
            "weir.withdraw" => {
                let params::Withdraw { service } = params::read(params)?;
                let in_flight = self.link().withdraw(&service)?;
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
    fn link(&mut self) -> &Connection {
        self.link.get_or_insert_with(|| self.ws.hub.connect(self.outbox.clone()))
    }

    /// `service/method`.
    fn short_call(&mut self, name: &str, params: Option<&RawValue>, to: Option<Tag>) {
        let permitted = Call::split(name).and_then(|(service, method)| {
            let permit = self.identity.may_call(service)?;
            Ok(Call { caller: permit.subject(), ..Call::new(service, method, params) })
        });
        let link = self.link.get_or_insert_with(|| self.ws.hub.connect(self.outbox.clone()));
        match (permitted, to) {
            (Ok(call), Some(to)) => link.call(to, &call),
            (Ok(call), None) => link.notify(&call),
            (Err(error), to) => refuse(&self.outbox, to.as_ref(), &error),
        }
    }

    /// `weir.call`.
    fn call(&mut self, params: Option<&RawValue>, to: Option<&Tag>) -> Result<Outcome> {
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
        let link = self.link.get_or_insert_with(|| self.ws.hub.connect(self.outbox.clone()));
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
            self.ws.metrics.ws_ignored.add(1);
            return;
        };
        let answer = match (reply.result, reply.error) {
            (Some(result), None) => Answer::Result(result),
            // Some libraries send both, one of them null.
            (Some(result), Some(error)) if error.get() == "null" => Answer::Result(result),
            (_, Some(error)) => match provider_error(error.get()) {
                Some(error) => Answer::Error(error),
                None => Answer::bad_reply("has an error that is not {code, message, data}"),
            },
            (None, None) => Answer::bad_reply("has neither result nor error"),
        };
        if link.reply(id, answer) == rpc::Replied::Unmatched {
            self.ws.metrics.ws_ignored.add(1);
        }
    }

    fn cancel(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Cancel { id } = params::read(params)?;
        if let Some(link) = &self.link {
            link.cancel(id.get().as_bytes());
        }
        Ok(Outcome::Result(NULL.to_vec()))
    }

    fn provide(&mut self, params: Option<&RawValue>, to: Option<&Tag>) -> Result<Outcome> {
        let asked: params::Provide<'_> = params::read(params)?;
        asked.check()?;
        let identity = self.identity.clone();
        let permit = identity.may_provide(&asked.service)?;
        if matches!(asked.names, params::Names::Bare) && self.link().provides_other(&asked.service) {
            return Err(Error::params(
                "this connection provides a service already, and could not tell their methods apart: \
                 say \"names\":\"full\"",
            ));
        }
        let methods: Vec<&str> = asked.methods.iter().map(|method| &**method).collect();
        let usual = Provide::new(&asked.service);
        let provided = self.link().provide(&Provide {
            subject: permit.subject(),
            exclusive: asked.exclusive,
            takeover: asked.takeover,
            concurrency: asked.concurrency.unwrap_or(usual.concurrency),
            names: match asked.names {
                params::Names::Bare => Names::Bare,
                params::Names::Full => Names::Full,
            },
            meta: asked.meta,
            methods: &methods,
            ..usual
        })?;
        let mut answer = serde_json::json!({ "service": &*asked.service, "providers": provided.providers });
        if let Some(fence) = provided.fence {
            answer["fence"] = fence.into();
        }
        if let Some(to) = to {
            self.outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
        }
        // Calls begin here: they come after the answer.
        drop(provided);
        Ok(Outcome::Answered)
    }

    /// No new calls come in; those in flight go on.
    pub fn withdraw_all(&self) {
        if let Some(link) = &self.link {
            link.withdraw_all();
        }
    }

    /// What it still waits for is answered: the node goes.
    pub fn cut_off(&self) {
        if let Some(link) = &self.link {
            link.cut_off();
        }
    }

    /// Whether nobody waits for this session, nor it for anybody.
    pub fn is_quiet(&self) -> bool {
        self.is_idle() && self.link.as_ref().is_none_or(Connection::is_idle)
    }
}

/// `code`, `message` and `data` of a provider's error; other members are left behind, for clients die of them.
fn provider_error(json: &str) -> Option<ProviderError<'_>> {
    #[derive(serde::Deserialize)]
    struct Wire<'a> {
        code: i64,
        #[serde(borrow, default)]
        message: Option<crate::event::Text<'a>>,
        #[serde(borrow)]
        data: Option<&'a RawValue>,
    }
    let wire: Wire<'_> = serde_json::from_str(json).ok()?;
    let message = wire.message.map(|message| message.0).unwrap_or_default();
    Some(ProviderError { code: wire.code, message, data: wire.data.map(std::borrow::Cow::Borrowed) })
}

// === impl Session: the bus ===

impl Session {
    fn publish(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let limits = &self.ws.config.limits;
        let (ws, identity) = (self.ws.clone(), self.identity.clone());
        match Publish::read(params)? {
            Publish::One(event) => {
                let (channel, draft) = event.draft(limits.event)?;
                let _ = identity.may_publish(&channel)?;
                let size = draft.size();
                let work = async move {
                    let placed = ws.bus.publish_one(identity.subject(), &channel, draft).await;
                    let placed = placed.inspect_err(|error| ws.metrics.publish_failed(error.code()))?;
                    ws.count(&placed, size);
                    let mut out = Vec::new();
                    placed.write_json(&channel, &mut out);
                    Ok(Done::Result(out))
                };
                Ok(Outcome::Later { work: Box::pin(work), bytes: size, waits: false })
            }
            Publish::Many(events) => {
                if events.is_empty() {
                    return Err(Error::params("events is empty"));
                }
                if events.len() > limits.publish_events {
                    let most = limits.publish_events;
                    return Err(Error::new(Code::TooLarge, format!("more than {most} events (limits.publish_events)"))
                        .with("limit", "limits.publish_events"));
                }
                // All are checked before any is placed.
                let mut drafts = Vec::with_capacity(events.len());
                for event in &events {
                    let (channel, draft) = event.draft(limits.event)?;
                    let _ = identity.may_publish(&channel)?;
                    drafts.push((channel, draft));
                }
                let bytes = drafts.iter().map(|(_, draft)| draft.size()).sum();
                let work = async move { publish_many(&ws, identity.subject(), drafts).await };
                Ok(Outcome::Later { work: Box::pin(work), bytes, waits: false })
            }
        }
    }

    fn subscribe(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let asked: params::Subscribe<'_> = params::read(params)?;
        let wanted = asked.wanted()?;
        let mut refused: Option<Error> = None;
        let mut names = Vec::new();
        for wanted in &wanted {
            if let Err(error) = self.identity.may_subscribe(&wanted.channel) {
                names.push(wanted.channel.as_str().to_owned());
                refused.get_or_insert(error);
            }
        }
        if let Some(error) = refused {
            return Err(error.with("channels", names));
        }
        // What is too much in any case puts no channel into use. The rest is counted when its turn comes: requests before
        // this one may still wait for theirs.
        self.has_room(wanted.len(), 0)?;
        let ws = self.ws.clone();
        let work = async move {
            let channels: Vec<Channel> = wanted.iter().map(|wanted| wanted.channel.clone()).collect();
            let watches = ws.bus.watch(&channels).await?;
            Ok(Done::Subscribe(wanted.into_iter().zip(watches).collect()))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits: false })
    }

    /// Whether `new` channels may be subscribed to beside `have`.
    fn has_room(&self, new: usize, have: usize) -> Result<()> {
        let most = self.ws.config.limits.subscriptions;
        if have + new <= most {
            return Ok(());
        }
        let detail = format!("{have} channels and {new} more, limits.subscriptions is {most}");
        Err(Error::new(Code::LimitReached, detail).with("limit", "limits.subscriptions"))
    }

    /// Subscribes by the URL, before anything is read.
    pub fn read_at_once(&mut self, begun: Vec<(Wanted, Watch)>) {
        self.begin(None, begun);
    }

    fn begin(&mut self, to: Option<&Tag>, list: Vec<(Wanted, Watch)>) {
        let batch = to.map_or(0, |to| to.note);
        let gauge = &self.ws.metrics.subscriptions[Transport::Ws];
        let reader = self.reader.get_or_insert_with(|| Box::new(Reader::new(gauge.clone())));
        let begun: Vec<_> = list.into_iter().map(|(wanted, watch)| reader.subscribe(wanted, watch, batch)).collect();
        for gap in begun.iter().filter_map(|begun| begun.gap.as_ref()) {
            self.ws.metrics.gap(gap.reason.as_str());
            if to.is_none() {
                self.outbox.send(|out| jsonrpc::notification(out, "weir.gap", gap));
            }
        }
        if let Some(to) = to {
            let answer = serde_json::json!({ "channels": begun });
            self.outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
        }
    }

    fn unsubscribe(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Unsubscribe { channels } = params::read(params)?;
        let channels = channels.iter().map(|name| Channel::parse(name)).collect::<Result<_>>()?;
        // Queued: a subscription that was asked for before may still wait for the bus.
        Ok(Outcome::Later { work: Box::pin(ready(Ok(Done::Unsubscribe(channels)))), bytes: 0, waits: false })
    }

    fn read(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let reading = longpoll::Reading::from_params(params::object(params)?, &self.ws.config.limits)?;
        reading.permit(&self.identity)?;
        let (ws, waits) = (self.ws.clone(), reading.waits());
        let work = async move {
            let answer = reading.answer(&ws.bus, &ws.draining).await?;
            let mut out = Vec::new();
            reading.write_json(&answer, &mut out);
            answer.count(&ws.metrics, Transport::Ws, out.len());
            Ok(Done::Result(out))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits })
    }

    fn commit(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Commit { consumer, after, channels } = params::read(params)?;
        let _ = self.identity.may_consume(&consumer)?;
        let names = channels.map(|names| names.iter().map(|name| Channel::parse(name)).collect::<Result<Vec<_>>>());
        let (names, ws) = (names.transpose()?, self.ws.clone());
        let (consumer, after) = (consumer.0.into_owned(), after.as_str().to_owned());
        let work = async move {
            longpoll::commit_named(&ws.bus, &consumer, names, &after).await?;
            Ok(Done::Result(NULL.to_vec()))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits: false })
    }

    /// Queues `work`.
    fn later(&mut self, to: Option<Tag>, work: BoxFuture<'static, Result<Done>>, bytes: usize, waits: bool) {
        let limits = &self.ws.config.limits;
        let queued = self.work.get_or_insert_default();
        let many = queued.len() >= limits.calls;
        if many || queued.bytes + bytes > limits.publish_bytes.max(limits.frame) {
            let limit = if many { "limits.calls" } else { "limits.publish_bytes" };
            let error = Error::new(Code::LimitReached, format!("too much of this connection waits ({limit})"));
            return refuse(&self.outbox, to.as_ref(), &error.with("limit", limit));
        }
        queued.bytes += bytes;
        let work = Box::pin(async move { Finished { to, done: work.await } });
        queued.queue.push_back(Job { work, bytes, waits });
    }

    /// Whether nothing waits for the bus.
    pub fn is_idle(&self) -> bool {
        self.work.as_ref().is_none_or(|work| work.len() == 0)
    }

    /// Does a turn of what is queued, as far as it goes. True if there is more to do at once.
    #[inline]
    pub fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        self.work.is_some() && self.poll_work(cx)
    }

    fn poll_work(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..TURN {
            // A client that asks for many pages at once would else be taken for one that does not read them. The write
            // wakes us.
            if self.outbox.is_behind() {
                return false;
            }
            let Some(finished) = self.work.as_mut().and_then(|work| work.poll(cx)) else { return false };
            self.finish(finished);
        }
        true
    }

    /// Gives back what an idle connection does not need.
    pub fn relax(&mut self) {
        if self.is_idle() {
            self.work = None;
        }
    }

    fn finish(&mut self, Finished { to, done }: Finished) {
        let outbox = &self.outbox;
        match done {
            Ok(Done::Result(result)) => {
                if let Some(to) = &to {
                    outbox.answer(to, |out| jsonrpc::result(out, to.id(), &result));
                }
            }
            Ok(Done::Subscribe(list)) => {
                let reader = self.reader.as_deref();
                let is_new = |channel| reader.is_none_or(|reader| !reader.has(channel));
                let new = list.iter().filter(|(wanted, _)| is_new(&wanted.channel)).count();
                match self.has_room(new, reader.map_or(0, Reader::len)) {
                    Ok(()) => self.begin(to.as_ref(), list),
                    Err(error) => refuse(outbox, to.as_ref(), &error),
                }
            }
            Ok(Done::Unsubscribe(mut channels)) => {
                channels.retain(|channel| self.reader.as_mut().is_some_and(|reader| reader.unsubscribe(channel)));
                if self.reader.as_ref().is_some_and(|reader| reader.len() == 0) {
                    self.reader = None;
                }
                if let Some(to) = &to {
                    let names: Vec<&str> = channels.iter().map(Channel::as_str).collect();
                    let answer = serde_json::json!({ "channels": names });
                    outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
                }
            }
            Err(error) => refuse(outbox, to.as_ref(), &error),
        }
    }
}

impl Work {
    fn len(&self) -> usize {
        self.queue.len() + self.waits.as_ref().map_or(0, FuturesUnordered::len)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Option<Finished> {
        while let Some(job) = self.queue.front_mut() {
            if job.waits {
                let Some(job) = self.queue.pop_front() else { break };
                self.waits.get_or_insert_default().push(job.work);
                continue;
            }
            let Poll::Ready(finished) = job.work.as_mut().poll(cx) else { break };
            self.bytes -= job.bytes;
            self.queue.pop_front();
            return Some(finished);
        }
        match Pin::new(self.waits.as_mut()?).poll_next(cx) {
            Poll::Ready(finished) => finished,
            Poll::Pending => None,
        }
    }
}

async fn publish_many(ws: &Ws, subject: &str, drafts: Vec<(Channel, Draft)>) -> Result<Done> {
    let names: Vec<(Channel, usize)> = drafts.iter().map(|(channel, draft)| (channel.clone(), draft.size())).collect();
    let (placed, failed) = match ws.bus.publish(subject, drafts).await {
        Ok(placed) => (placed.into_iter().map(Some).collect(), None),
        Err(PublishFailed { error, placed }) => (placed, Some(error)),
    };
    let mut out = vec![b'['];
    for ((channel, size), placed) in names.iter().zip(&placed) {
        if out.len() > 1 {
            out.push(b',');
        }
        match placed {
            Some(placed) => {
                ws.count(placed, *size);
                placed.write_json(channel, &mut out);
            }
            None => out.extend_from_slice(NULL),
        }
    }
    out.push(b']');
    match failed {
        None => Ok(Done::Result(out)),
        Some(error) => {
            ws.metrics.publish_failed(error.code());
            Err(error.with("placed", serde_json::from_slice::<serde_json::Value>(&out).unwrap_or_default()))
        }
    }
}

impl Ws {
    fn count(&self, placed: &Placed, size: usize) {
        if placed.duplicate {
            self.metrics.duplicates.add(1);
        } else {
            self.metrics.published[Transport::Ws].add(1);
            self.metrics.published_bytes[Transport::Ws].add(size as u64);
        }
    }
}
