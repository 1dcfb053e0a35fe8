//! Where origins publish: `POST /publish/` on a listener of its own, or `/grip/publish/` on the main ones. The texts are
//! Pushpin's.

use std::{sync::Arc, time::Duration};

use axum::body::Body as AxumBody;
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use super::{
    Grip, Route, Secret,
    item::{self, Item},
    mark, proxy, token,
};
use crate::{
    bus::{Format, Subscriptions},
    channel::{Channel, MAX_LABEL},
    error::{Code, Error},
    metrics::Transport,
    position::Start,
};

/// Whom keys of idempotency belong to.
const SUBJECT: &str = "grip";
/// How long an item waits for the one before it, at most.
const PATIENCE: Duration = Duration::from_secs(5);

/// How an answer is written.
#[derive(Clone, Copy)]
enum Speech {
    Text,
    Json,
}

/// Why nothing more of a request is published.
struct Refusal {
    status: StatusCode,
    text: String,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Grip {
    /// Answers a request to the publish listener.
    pub async fn publish(self: &Arc<Self>, request: Request<AxumBody>) -> Response<AxumBody> {
        let path = request.uri().path();
        let path = path.strip_suffix('/').unwrap_or(path);
        match path.strip_prefix("/grip").unwrap_or(path) {
            "/publish" => {}
            "" => return proxy::text(StatusCode::OK, "Pushpin API\n".into()),
            _ => return proxy::text(StatusCode::NOT_FOUND, "Not Found\n".into()),
        }
        let Some(speech) = Speech::of(request.headers()) else {
            let text = "Not Acceptable. Supported formats are text/plain and application/json.\n";
            return proxy::text(StatusCode::NOT_ACCEPTABLE, text.into());
        };
        if *request.method() != Method::POST {
            let text = format!("Method not allowed: {}.\n", request.method());
            let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text);
            return refusal.with(header::ALLOW, HeaderValue::from_static("POST")).respond();
        }
        match self.try_publish(request).await {
            Ok(()) => speech.published(),
            Err(refusal) => refusal.respond(),
        }
    }

    async fn try_publish(self: &Arc<Self>, request: Request<AxumBody>) -> Result<(), Refusal> {
        let (head, body) = request.into_parts();
        let allowed = self.authorized(&head.headers)?;
        let limits = &self.node.config.limits;
        let collecting = Limited::new(body, limits.publish_bytes).collect();
        let body = match tokio::time::timeout(limits.body_time, collecting).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let text = format!("Body has more than {} bytes (limits.publish_bytes).\n", limits.publish_bytes);
                return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text));
            }
            Ok(Err(_)) => return Err(Refusal::new(StatusCode::BAD_REQUEST, "Body ended early.\n")),
            Err(_) => return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "Body did not arrive in time.\n")),
        };
        let items = item::read(&body).map_err(|wrong| Refusal::new(StatusCode::BAD_REQUEST, wrong))?;
        // All of them are looked at before the first is placed.
        let mut drafts = Vec::with_capacity(items.len());
        for item in &items {
            let draft = self.draft(&allowed, item).map_err(|error| refused(&error))?;
            drafts.extend(draft.map(|(channel, draft)| (item, channel, draft)));
        }
        for (item, channel, draft) in drafts {
            self.await_previous(item, &channel).await.map_err(|error| refused(&error))?;
            let size = draft.size();
            match self.node.bus.publish_one(SUBJECT, &channel, draft).await {
                Ok(placed) if placed.duplicate => self.node.metrics.duplicates.add(1),
                Ok(_) => {
                    self.node.metrics.published[Transport::Http].add(1);
                    self.node.metrics.published_bytes[Transport::Http].add(size as u64);
                }
                // The same id again is the same item, whatever it says.
                Err(error) if error.code() == Code::KeyReused => self.node.metrics.duplicates.add(1),
                Err(error) => {
                    self.node.metrics.publish_failed(error.code());
                    return Err(refused(&error));
                }
            }
        }
        Ok(())
    }

    fn draft(&self, allowed: &[&Route], item: &Item) -> Result<Option<(Channel, crate::event::Draft)>, Error> {
        let channel = Channel::parse(&name(allowed, &item.channel))?;
        channel.writable()?;
        // An id is a key of idempotency, and may be longer.
        let key = item.id.as_deref().filter(|id| !id.is_empty());
        let key = key.map(|id| match id.len() <= MAX_LABEL && !id.contains(char::is_control) {
            true => id.to_owned(),
            false => format!("sha256:{}", token::digest(id.as_bytes())),
        });
        let draft = mark::draft(item, key.as_deref(), self.node.config.limits.event)?;
        Ok(draft.map(|draft| (channel, draft)))
    }

    /// Waits until the item that this one follows is in its place, but not for ever: it may never come.
    ///
    /// Whoever publishes this waits meanwhile, for what is acknowledged is in its place.
    async fn await_previous(&self, item: &Item, channel: &Channel) -> Result<(), Error> {
        let Some(prev) = item.prev_id.as_ref().filter(|_| !item.unordered) else { return Ok(()) };
        let is_next = |last: Option<String>| last.is_none_or(|last| last == *prev || Some(&last) == item.id.as_ref());
        if is_next(self.last_id(channel).await) {
            return Ok(());
        }
        let watches = self.node.bus.watch(std::slice::from_ref(channel)).await?;
        let mut subs = Subscriptions::new(Format::NONE);
        let slots: Vec<u32> = watches.into_iter().map(|watch| subs.add(watch, Start::Now, None).slot).collect();
        let mut alarm = std::pin::pin!(tokio::time::sleep(PATIENCE));
        let mut leaving = std::pin::pin!(self.node.draining.cancelled());
        // Looked at after the watch: what came in between wakes nobody.
        while !is_next(self.last_id(channel).await) {
            tokio::select! {
                () = std::future::poll_fn(|cx| subs.poll_changed(cx)) => {}
                () = &mut alarm => break,
                () = &mut leaving => break,
            }
            for slot in &slots {
                subs.seek(*slot, Start::Now);
            }
        }
        Ok(())
    }

    /// The routes whose channels a request may publish to.
    fn authorized(&self, headers: &HeaderMap) -> Result<Vec<&Route>, Refusal> {
        if self.routes.iter().all(|route| route.key.is_none()) {
            // A page of somebody else's must not publish by the browser of whoever looks at it.
            return match headers.contains_key(header::ORIGIN) {
                true => Err(Refusal::new(StatusCode::FORBIDDEN, "Pages may not publish without a key.\n")),
                false => Ok(self.routes.iter().collect()),
            };
        }
        let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (scheme, credentials) = header.split_once(' ').unwrap_or((header, ""));
        let credentials = credentials.trim();
        let mut why = "no route has this key";
        let mut good = |route: &&Route| {
            let Some(secret) = &route.key else { return false };
            match scheme.to_ascii_lowercase().as_str() {
                "bearer" if secret.is(credentials.as_bytes()) => true,
                "bearer" => match secret.key.verify(credentials, route.iss.as_deref()) {
                    Ok(()) => true,
                    Err(wrong) => {
                        why = wrong;
                        false
                    }
                },
                "basic" => BASE64.decode(credentials).is_ok_and(|pair| {
                    let colon = memchr::memchr(b':', &pair);
                    colon.is_some_and(|colon| secret.is(&pair[colon + 1..]))
                }),
                _ => {
                    why = "publishing asks for a key";
                    false
                }
            }
        };
        let allowed: Vec<_> = self.routes.iter().filter(|route| good(route)).collect();
        if allowed.is_empty() {
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, format!("Unauthorized: {why}.\n"));
            return Err(refusal.with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
        }
        Ok(allowed)
    }
}

/// The channel of the bus that a publisher means: the prefix of its route is put before it, as before the names in holds,
/// unless it is there already. Who could be of several routes without saying so names channels in full.
fn name(allowed: &[&Route], name: &str) -> String {
    let there = allowed.iter().any(|route| !route.prefix.is_empty() && name.starts_with(&route.prefix));
    match allowed {
        [route] if !there => format!("{}{name}", route.prefix),
        _ => name.to_owned(),
    }
}

impl Secret {
    /// Whether this is the key, as it is configured or as it is.
    fn is(&self, given: &[u8]) -> bool {
        token::is_same(given, self.text.as_bytes()) || token::is_same(given, &self.bytes)
    }
}

/// What the publisher of an item that cannot be placed is told.
fn refused(error: &Error) -> Refusal {
    let status = match error.code() {
        // All that is wrong with an item is a wrong format.
        Code::InvalidParams | Code::InvalidRequest => StatusCode::BAD_REQUEST,
        code => StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
    };
    let what = if status == StatusCode::BAD_REQUEST { "Invalid format" } else { "Not published" };
    let refusal = Refusal::new(status, format!("{what}: {}\n", error.detail()));
    match error.retry_after_ms() {
        Some(ms) => refusal.with(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000).max(1))),
        None => refusal,
    }
}

impl Refusal {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Refusal { status, text: text.into(), header: None }
    }

    fn with(self, name: HeaderName, value: HeaderValue) -> Self {
        Refusal { header: Some((name, value)), ..self }
    }

    fn respond(self) -> Response<AxumBody> {
        let mut response = proxy::text(self.status, self.text);
        response.headers_mut().extend(self.header);
        response
    }
}

impl Speech {
    /// The first that is acceptable; none if nothing is.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).peekable();
        if accept.peek().is_none() {
            return Some(Speech::Text);
        }
        let kinds =
            accept.flat_map(|value| value.split(',')).map(|kind| kind.split(';').next().unwrap_or_default().trim());
        kinds
            .filter_map(|kind| match kind {
                "text/plain" | "text/*" | "*/*" => Some(Speech::Text),
                "application/json" | "application/*" => Some(Speech::Json),
                _ => None,
            })
            .next()
    }

    fn published(self) -> Response<AxumBody> {
        match self {
            Speech::Text => proxy::text(StatusCode::OK, "Published\n".into()),
            Speech::Json => {
                let mut response = proxy::text(StatusCode::OK, "{\"message\":\"Published\"}\n".into());
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
        }
    }
}
