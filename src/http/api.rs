//! The resources under `/v1`, one file each.

pub mod channels;
pub mod connections;
pub mod consumers;
pub mod events;
pub mod jsonrpc;
pub mod presence;
pub mod services;
pub mod stream;

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

use crate::{
    error::{Error, Result},
    transport::query::{Query, hex, unhex},
};

/// The content type of every answer that succeeds.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Entries of a list where nothing else is said, and at most.
const DEFAULT_LIMIT: u64 = 100;
const MAX_LIMIT: u64 = 1_000;

/// Answers JSON that is already written.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Body::from(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// Answers a value.
pub fn to_json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => json(StatusCode::OK, body),
        Err(error) => Error::internal(error).into_response(),
    }
}

/// `prefix`, `limit` and `page` of every list.
struct Listing {
    prefix: String,
    limit: usize,
    /// The last name of the page before.
    after: Option<String>,
}

impl Listing {
    fn take(query: &mut Query<'_>) -> Result<Self> {
        let limit = query.number("limit")?.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Error::params(format!("limit: 1 to {MAX_LIMIT}")));
        }
        let after = match query.take("page")? {
            Some(page) => {
                let name = unhex(&page).ok_or_else(|| Error::params("page is what the last answer called page"))?;
                Some(String::from_utf8_lossy(&name).into_owned())
            }
            None => None,
        };
        let prefix = query.take("prefix")?.unwrap_or_default().into_owned();
        Ok(Listing { prefix, limit: limit as usize, after })
    }

    /// What to give as `page` next. Asked of a list that was read one entry longer than it is shown, and cuts that off.
    fn page<T>(&self, entries: &mut Vec<T>, name: impl Fn(&T) -> &str) -> Option<String> {
        if entries.len() <= self.limit {
            return None;
        }
        entries.truncate(self.limit);
        entries.last().map(|last| hex(name(last).as_bytes()))
    }
}
