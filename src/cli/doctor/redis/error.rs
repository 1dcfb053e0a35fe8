//! Errors of the `redis` crate as findings of the report.

use redis::RedisError;

/// The error reply of Redis, or what happened to the connection.
pub(super) fn reason(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        _ => error.to_string(),
    }
}

/// Whether Redis rejects the credentials, or what they may do.
pub(super) fn is_rejected(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"))
        || error.kind() == redis::ErrorKind::AuthenticationFailed
}

/// What to change, for a server that cannot be reached.
pub(super) fn remedy(error: &RedisError) -> &'static str {
    if is_rejected(error) {
        "name user and password in the URL: redis://user:password@host"
    } else if error.is_timeout() {
        "is the address right, and does a firewall block the port?"
    } else {
        "start it, or name where it is; with TLS the URL begins with rediss://"
    }
}
