//! Errors of the `redis` crate as findings of the report.

use redis::RedisError;

/// The error reply of Redis, or the error of the connection.
pub(super) fn reason(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        _ => error.to_string(),
    }
}

/// Whether Redis rejects the credentials, or they lack a permission.
pub(super) fn is_rejected(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"))
        || error.kind() == redis::ErrorKind::AuthenticationFailed
}

/// The remedy for a server that cannot be reached.
pub(super) fn remedy(error: &RedisError) -> &'static str {
    if is_rejected(error) {
        "put user and password into the URL: redis://user:password@host"
    } else if error.is_timeout() {
        "is the address correct, and does a firewall block the port?"
    } else {
        "start it, or correct the URL; with TLS it begins with rediss://"
    }
}
