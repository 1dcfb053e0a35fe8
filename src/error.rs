//! [`Error`] and its [`Code`], with the HTTP status, JSON-RPC number and WebSocket close code of each.
//!
//! The table is documented in `proto-docs/errors.md`. Codes are stable; new ones may be added.

use std::{borrow::Cow, fmt, time::Duration};

use serde_json::{Map, Value};

/// A stable, machine-readable reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Not valid JSON.
    ParseError,
    /// JSON that is not a request; an empty batch; a batch that is too long.
    InvalidRequest,
    /// A missing, unknown or malformed member or parameter.
    InvalidParams,
    /// `after` is not a valid position.
    InvalidPosition,
    Unauthorized,
    TokenExpired,
    Forbidden,
    /// No such route or consumer.
    NotFound,
    /// No such `weir.*` method, no `/` in the name, or an error of the provider.
    MethodNotFound,
    MethodNotAllowed,
    NotAcceptable,
    Conflict,
    WrongMode,
    LeaseLost,
    /// The same idempotency key with another body.
    KeyReused,
    /// Another provider holds the service exclusively.
    ServiceTaken,
    TooLarge,
    /// A browser's body that is not declared as JSON.
    UnsupportedMediaType,
    /// The provider replied with an error.
    ServiceError,
    UpgradeRequired,
    RateLimited,
    /// The number of subscriptions, calls in flight or consumers.
    LimitReached,
    Cancelled,
    Internal,
    /// The provider was lost after the call was written.
    ProviderGone,
    /// The reply has neither a result nor an error, or is too large.
    BadReply,
    NoProvider,
    Busy,
    /// The event was not placed.
    BusUnavailable,
    Overloaded,
    Draining,
    Timeout,
    /// The event may have been placed: retry with the same key.
    Unconfirmed,
    // The following only end connections.
    DeadPeer,
    Slow,
    Replaced,
    Kicked,
    Protocol,
}

/// Whether a client may retry the same request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Yes, after `retry_after_ms`.
    Yes,
    /// Only with an idempotency key, or if the method is idempotent.
    Key,
    /// Not before something has changed.
    No,
}

/// Whether the request may have been executed. By HTTP status, 503 is `No`; 502 and 504 are `Maybe`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executed {
    No,
    Maybe,
}

struct CodeInfo {
    name: &'static str,
    title: &'static str,
    http: u16,
    rpc: i32,
    close: u16,
    retry: Retry,
}

impl Code {
    /// Every code, in the order of the documented table.
    pub const ALL: [Code; 38] = {
        use Code::*;
        [
            ParseError,
            InvalidRequest,
            InvalidParams,
            InvalidPosition,
            Unauthorized,
            TokenExpired,
            Forbidden,
            NotFound,
            MethodNotFound,
            MethodNotAllowed,
            NotAcceptable,
            Conflict,
            WrongMode,
            LeaseLost,
            KeyReused,
            ServiceTaken,
            TooLarge,
            UnsupportedMediaType,
            ServiceError,
            UpgradeRequired,
            RateLimited,
            LimitReached,
            Cancelled,
            Internal,
            ProviderGone,
            BadReply,
            NoProvider,
            Busy,
            BusUnavailable,
            Overloaded,
            Draining,
            Timeout,
            Unconfirmed,
            DeadPeer,
            Slow,
            Replaced,
            Kicked,
            Protocol,
        ]
    };

    #[rustfmt::skip]
    const fn info(self) -> CodeInfo {
        use Retry::{Key, No, Yes};
        const fn info(name: &'static str, title: &'static str, http: u16, rpc: i32, close: u16, retry: Retry) -> CodeInfo {
            CodeInfo { name, title, http, rpc, close, retry }
        }
        match self {
            Code::ParseError => info("parse_error", "Invalid JSON", 400, -32700, 4502, No),
            Code::InvalidRequest => info("invalid_request", "Invalid request", 400, -32600, 0, No),
            Code::InvalidParams => info("invalid_params", "Invalid parameters", 400, -32602, 0, No),
            Code::InvalidPosition => info("invalid_position", "Invalid position", 400, -32030, 0, No),
            Code::Unauthorized => info("unauthorized", "Missing or invalid credentials", 401, -32001, 4500, No),
            Code::TokenExpired => info("token_expired", "Token expired", 401, -32002, 4003, No),
            Code::Forbidden => info("forbidden", "Not permitted", 403, -32003, 4501, No),
            Code::NotFound => info("not_found", "Not found", 404, -32004, 0, No),
            Code::MethodNotFound => info("method_not_found", "Method not found", 404, -32601, 0, No),
            Code::MethodNotAllowed => info("method_not_allowed", "Method not allowed", 405, -32600, 0, No),
            Code::NotAcceptable => info("not_acceptable", "Not acceptable", 406, -32600, 0, No),
            Code::Conflict => info("conflict", "Conflict", 409, -32031, 0, No),
            Code::WrongMode => info("wrong_mode", "Wrong consumer mode", 409, -32032, 0, No),
            Code::LeaseLost => info("lease_lost", "Lease lost", 409, -32033, 0, No),
            Code::KeyReused => info("key_reused", "Idempotency key reused", 409, -32034, 0, No),
            Code::ServiceTaken => info("service_taken", "Service already provided", 409, -32025, 0, No),
            Code::TooLarge => info("too_large", "Too large", 413, -32005, 1009, No),
            Code::UnsupportedMediaType => info("unsupported_media_type", "Unsupported media type", 415, -32600, 0, No),
            Code::ServiceError => info("service_error", "Service error", 422, -32000, 0, No),
            Code::UpgradeRequired => info("upgrade_required", "Upgrade required", 426, -32600, 0, No),
            Code::RateLimited => info("rate_limited", "Too many requests", 429, -32006, 4002, Yes),
            Code::LimitReached => info("limit_reached", "Limit reached", 429, -32007, 0, No),
            Code::Cancelled => info("cancelled", "Call cancelled", 499, -32024, 0, Key),
            Code::Internal => info("internal", "Internal error", 500, -32603, 1011, Key),
            Code::ProviderGone => info("provider_gone", "Provider disconnected", 502, -32022, 0, Key),
            Code::BadReply => info("bad_reply", "Invalid reply of the provider", 502, -32026, 0, Key),
            Code::NoProvider => info("no_provider", "No provider", 503, -32020, 0, Yes),
            Code::Busy => info("busy", "All providers busy", 503, -32021, 0, Yes),
            Code::BusUnavailable => info("bus_unavailable", "Bus unavailable", 503, -32010, 0, Yes),
            Code::Overloaded => info("overloaded", "Overloaded", 503, -32011, 1013, Yes),
            Code::Draining => info("draining", "Draining", 503, -32012, 1012, Yes),
            Code::Timeout => info("timeout", "Timeout", 504, -32023, 0, Key),
            Code::Unconfirmed => info("unconfirmed", "Publish unconfirmed", 504, -32013, 0, Key),
            Code::DeadPeer => info("dead_peer", "Peer timeout", 408, -32603, 4000, Yes),
            Code::Slow => info("slow", "Slow consumer", 408, -32603, 4001, Yes),
            Code::Replaced => info("replaced", "Replaced by another connection", 409, -32603, 4004, Yes),
            Code::Kicked => info("kicked", "Closed by an administrator", 403, -32603, 4503, No),
            Code::Protocol => info("protocol", "Protocol violation", 400, -32600, 4502, No),
        }
    }

    /// The name in every protocol, as `no_provider`.
    pub const fn as_str(self) -> &'static str {
        self.info().name
    }

    /// A short sentence for `title` of RFC 9457.
    pub const fn title(self) -> &'static str {
        self.info().title
    }

    /// HTTP status. Of the codes that only end connections, only the status of `kicked` is ever sent.
    pub const fn status(self) -> u16 {
        self.info().http
    }

    /// JSON-RPC error number.
    pub const fn number(self) -> i32 {
        self.info().rpc
    }

    /// WebSocket close code, if the code can end a connection. Clients reconnect up to 4499, but not from 4500 on.
    pub const fn close(self) -> Option<u16> {
        match self.info().close {
            0 => None,
            code => Some(code),
        }
    }

    pub const fn retry(self) -> Retry {
        self.info().retry
    }

    /// Whether the request may have been executed, for the codes that leave it open.
    pub const fn executed(self) -> Option<Executed> {
        match self.status() {
            503 => Some(Executed::No),
            502 | 504 => Some(Executed::Maybe),
            _ => None,
        }
    }
}

impl Executed {
    pub const fn as_str(self) -> &'static str {
        match self {
            Executed::No => "no",
            Executed::Maybe => "maybe",
        }
    }
}

/// A failed request: a [`Code`], a sentence for humans, and data for the client's next step.
#[derive(Clone, Debug)]
pub struct Error(Box<ErrorDetails>);

#[derive(Clone, Debug)]
struct ErrorDetails {
    code: Code,
    detail: Cow<'static, str>,
    executed: Option<Executed>,
    retry_after: Option<Duration>,
    data: Map<String, Value>,
}

impl Error {
    /// `detail` is a sentence for humans that names the mistake and its remedy. It must not contain a secret.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        let retry_after = match code {
            Code::BusUnavailable | Code::Overloaded | Code::Draining => Some(Duration::from_secs(2)),
            Code::NoProvider | Code::Busy | Code::RateLimited => Some(Duration::from_secs(1)),
            _ => None,
        };
        Error(Box::new(ErrorDetails {
            code,
            detail: detail.into(),
            executed: code.executed(),
            retry_after,
            data: Map::new(),
        }))
    }

    /// A parameter is missing, unknown or malformed.
    pub fn params(detail: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Code::InvalidParams, detail)
    }

    /// A bug. Logs `cause` under an id that the response contains; the cause itself is not sent.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let id = format!("{:08x}", fastrand::u32(..));
        tracing::error!(%id, %cause, "internal error");
        Error::new(Code::Internal, format!("internal error {id}; the log of this node has the cause")).with("id", id)
    }

    pub fn executed(mut self, executed: Executed) -> Self {
        self.0.executed = Some(executed);
        self
    }

    /// Adds a member beside `code`: to `data` over JSON-RPC, to the problem document over HTTP.
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.data.insert(name.to_owned(), value.into());
        self
    }

    pub fn code(&self) -> Code {
        self.0.code
    }

    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    pub(crate) fn is_executed(&self) -> Option<Executed> {
        self.0.executed
    }

    pub fn retry_after_ms(&self) -> Option<u64> {
        self.0.retry_after.map(|after| after.as_millis() as u64)
    }

    /// `code`, `executed`, `retry_after_ms` and the members that [`with`](Self::with) added: `error.data` of JSON-RPC, and
    /// the extension members of a problem document.
    pub fn data(&self) -> Map<String, Value> {
        let mut data = Map::new();
        data.insert("code".into(), self.code().as_str().into());
        if let Some(executed) = self.0.executed {
            data.insert("executed".into(), executed.as_str().into());
        }
        if let Some(ms) = self.retry_after_ms() {
            data.insert("retry_after_ms".into(), ms.into());
        }
        data.extend(self.0.data.clone());
        data
    }

    /// The `error` member of a JSON-RPC response: exactly `code`, `message` and `data`.
    /// Some clients end the connection over any other member (jsonrpsee rejects unknown fields).
    pub(crate) fn to_rpc(&self) -> Value {
        serde_json::json!({ "code": self.code().number(), "message": self.detail(), "data": self.data() })
    }

    /// An RFC 9457 problem document.
    pub(crate) fn to_problem(&self) -> Value {
        let code = self.code();
        let mut problem = Map::new();
        problem.insert("type".into(), format!("urn:weir:error:{}", code.as_str()).into());
        problem.insert("title".into(), code.title().into());
        problem.insert("status".into(), code.status().into());
        problem.insert("detail".into(), self.detail().into());
        problem.extend(self.data());
        Value::Object(problem)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code().as_str(), self.detail())
    }
}

impl std::error::Error for Error {}

/// The result of most operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_numbers_are_distinct() {
        let names: HashSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        let own: Vec<_> =
            Code::ALL.iter().map(|code| code.number()).filter(|n| (-32099..=-32001).contains(n)).collect();
        assert_eq!(own.len(), own.iter().collect::<HashSet<_>>().len());
    }

    #[test]
    fn the_status_implies_whether_a_request_was_executed() {
        assert_eq!(Code::NoProvider.executed(), Some(Executed::No));
        assert_eq!(Code::Timeout.executed(), Some(Executed::Maybe));
        assert_eq!(Code::InvalidParams.executed(), None);
    }

    #[test]
    fn an_rpc_error_has_three_members() {
        let error = Error::new(Code::Busy, "all providers are busy").with("service", "jwt").to_rpc();
        let members: Vec<_> = error.as_object().unwrap().keys().collect();
        assert_eq!(members, ["code", "message", "data"]);
        assert_eq!(error["data"]["executed"], "no");
        assert_eq!(error["data"]["service"], "jwt");
    }
}
