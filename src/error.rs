//! [`Error`] and its [`Code`], with the HTTP status, JSON-RPC number and WebSocket close code of each.
//!
//! The table is documented in `proto-docs/errors.md`. Codes are stable; new ones may be added.

use std::{borrow::Cow, fmt, time::Duration};

use serde_json::{Map, Value};

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
pub(crate) enum Executed {
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

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident($name:literal, $title:literal, $http:literal, $rpc:literal, $close:literal, $retry:ident),)+) => {
        /// A stable, machine-readable reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $code,)+
        }

        impl Code {
            /// Every code, in the order of the documented table.
            pub const ALL: [Code; [$(Code::$code,)+].len()] = [$(Code::$code,)+];

            const fn info(self) -> CodeInfo {
                let (name, title, http, rpc, close, retry) = match self {
                    $(Code::$code => ($name, $title, $http, $rpc, $close, Retry::$retry),)+
                };
                CodeInfo { name, title, http, rpc, close, retry }
            }
        }
    };
}

// Name, title, HTTP status, JSON-RPC number, WebSocket close code (0: none), retry.
codes! {
    /// Not valid JSON.
    ParseError("parse_error", "Invalid JSON", 400, -32700, 4502, No),
    /// JSON that is not a request; an empty batch; a batch that is too long.
    InvalidRequest("invalid_request", "Invalid request", 400, -32600, 0, No),
    /// A missing, unknown or malformed member or parameter.
    InvalidParams("invalid_params", "Invalid parameters", 400, -32602, 0, No),
    /// `after` is not a valid position.
    InvalidPosition("invalid_position", "Invalid position", 400, -32030, 0, No),
    Unauthorized("unauthorized", "Missing or invalid credentials", 401, -32001, 4500, No),
    TokenExpired("token_expired", "Token expired", 401, -32002, 4003, No),
    Forbidden("forbidden", "Not permitted", 403, -32003, 4501, No),
    /// No such route or consumer.
    NotFound("not_found", "Not found", 404, -32004, 0, No),
    /// No such `weir.*` method, no `/` in the name, or an error of the provider.
    MethodNotFound("method_not_found", "Method not found", 404, -32601, 0, No),
    MethodNotAllowed("method_not_allowed", "Method not allowed", 405, -32600, 0, No),
    NotAcceptable("not_acceptable", "Not acceptable", 406, -32600, 0, No),
    Conflict("conflict", "Conflict", 409, -32031, 0, No),
    WrongMode("wrong_mode", "Wrong consumer mode", 409, -32032, 0, No),
    LeaseLost("lease_lost", "Lease lost", 409, -32033, 0, No),
    /// The same idempotency key with another body.
    KeyReused("key_reused", "Idempotency key reused", 409, -32034, 0, No),
    /// Another provider holds the service exclusively.
    ServiceTaken("service_taken", "Service already provided", 409, -32025, 0, No),
    TooLarge("too_large", "Too large", 413, -32005, 1009, No),
    /// A browser's body that is not declared as JSON.
    UnsupportedMediaType("unsupported_media_type", "Unsupported media type", 415, -32600, 0, No),
    /// The provider replied with an error.
    ServiceError("service_error", "Service error", 422, -32000, 0, No),
    UpgradeRequired("upgrade_required", "Upgrade required", 426, -32600, 0, No),
    RateLimited("rate_limited", "Too many requests", 429, -32006, 4002, Yes),
    /// The number of subscriptions, calls in flight or consumers.
    LimitReached("limit_reached", "Limit reached", 429, -32007, 0, No),
    Cancelled("cancelled", "Call cancelled", 499, -32024, 0, Key),
    Internal("internal", "Internal error", 500, -32603, 1011, Key),
    /// A transfer coding that weir does not have.
    NotImplemented("not_implemented", "Not implemented", 501, -32600, 0, No),
    /// The provider was lost after the call was written.
    ProviderGone("provider_gone", "Provider disconnected", 502, -32022, 0, Key),
    /// The reply has neither a result nor an error, or is too large.
    BadReply("bad_reply", "Invalid reply of the provider", 502, -32026, 0, Key),
    NoProvider("no_provider", "No provider", 503, -32020, 0, Yes),
    Busy("busy", "All providers busy", 503, -32021, 0, Yes),
    /// The credentials cannot be verified now.
    AuthUnavailable("auth_unavailable", "Authentication unavailable", 503, -32014, 1013, Yes),
    /// The event was not stored.
    BusUnavailable("bus_unavailable", "Bus unavailable", 503, -32010, 0, Yes),
    Overloaded("overloaded", "Overloaded", 503, -32011, 1013, Yes),
    Draining("draining", "Draining", 503, -32012, 1012, Yes),
    Timeout("timeout", "Timeout", 504, -32023, 0, Key),
    /// The event may have been stored: retry with the same key.
    Unconfirmed("unconfirmed", "Publish unconfirmed", 504, -32013, 0, Key),
    // The following only end connections.
    DeadPeer("dead_peer", "Peer timeout", 408, -32603, 4000, Yes),
    Slow("slow", "Slow consumer", 408, -32603, 4001, Yes),
    Replaced("replaced", "Replaced by another connection", 409, -32603, 4004, Yes),
    Kicked("kicked", "Closed by an administrator", 403, -32603, 4503, No),
    Protocol("protocol", "Protocol violation", 400, -32600, 4502, No),
}

impl Code {
    /// The name in every protocol, as `no_provider`.
    pub const fn as_str(self) -> &'static str {
        self.info().name
    }

    /// A short sentence for `title` of RFC 9457.
    pub(crate) const fn title(self) -> &'static str {
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
    pub(crate) const fn executed(self) -> Option<Executed> {
        match self.status() {
            503 => Some(Executed::No),
            502 | 504 => Some(Executed::Maybe),
            _ => None,
        }
    }
}

impl Executed {
    pub(crate) const fn as_str(self) -> &'static str {
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
    read_only: bool,
    data: Map<String, Value>,
}

impl Error {
    /// `detail` is a sentence for humans that names the mistake and its remedy. It must not contain a secret.
    pub(crate) fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        let retry_after = match code {
            Code::AuthUnavailable | Code::BusUnavailable | Code::Overloaded | Code::Draining => {
                Some(Duration::from_secs(2))
            }
            Code::NoProvider | Code::Busy | Code::RateLimited => Some(Duration::from_secs(1)),
            _ => None,
        };
        Error(Box::new(ErrorDetails {
            code,
            detail: detail.into(),
            executed: code.executed(),
            retry_after,
            read_only: false,
            data: Map::new(),
        }))
    }

    /// A parameter is missing, unknown or malformed.
    pub(crate) fn params(detail: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Code::InvalidParams, detail)
    }

    /// A bug. Logs `cause` under an id that the response contains; the cause itself is not sent.
    pub(crate) fn internal(cause: impl fmt::Display) -> Self {
        let id = format!("{:08x}", fastrand::u32(..));
        tracing::error!(%id, %cause, "internal error");
        Error::new(Code::Internal, format!("internal error {id}; the log of this node has the cause")).with("id", id)
    }

    pub(crate) fn executed(mut self, executed: Executed) -> Self {
        self.0.executed = Some(executed);
        self
    }

    /// Adds a member beside `code`: to `data` over JSON-RPC, to the problem document over HTTP.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.data.insert(name.to_owned(), value.into());
        self
    }

    /// Marks the error of a store that rejects writes for now and can still be read.
    pub(crate) fn read_only(mut self) -> Self {
        self.0.read_only = true;
        self
    }

    /// Whether the store rejects writes for now and can still be read: a read goes on without what it could not store.
    pub(crate) fn is_read_only(&self) -> bool {
        self.0.read_only
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

    pub(crate) fn retry_after_ms(&self) -> Option<u64> {
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
