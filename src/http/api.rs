//! The resources under `/v1`, one file each.

pub(crate) mod channels;
pub(crate) mod connections;
pub(crate) mod consumers;
pub(crate) mod events;
pub(crate) mod jsonrpc;
pub(crate) mod presence;
pub(crate) mod services;
pub(crate) mod stream;

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

use crate::{
    error::{Error, Result},
    transport::query::{Query, hex, unhex},
};

/// The content type of successful responses.
pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Default and maximum number of entries of a list.
const DEFAULT_LIMIT: u64 = 100;
const MAX_LIMIT: u64 = 1_000;

/// A response with serialized JSON.
pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Body::from(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// A response with a value as JSON.
pub(crate) fn to_json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => json(StatusCode::OK, body),
        Err(error) => Error::internal(error).into_response(),
    }
}

/// The query parameters of lists: `prefix`, `limit` and `page`.
struct Listing {
    prefix: String,
    limit: usize,
    /// The last name of the previous page.
    after: Option<String>,
}

impl Listing {
    fn take(query: &mut Query<'_>) -> Result<Self> {
        let limit = query.number("limit")?.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Error::params(format!("limit: 1 to {MAX_LIMIT}")));
        }
        let after = match query.take_nonempty("page")? {
            Some(page) => {
                let name = unhex(&page).ok_or_else(|| Error::params("page is the page of the previous response"))?;
                Some(String::from_utf8_lossy(&name).into_owned())
            }
            None => None,
        };
        let prefix = query.take("prefix")?.unwrap_or_default().into_owned();
        Ok(Listing { prefix, limit: limit as usize, after })
    }

    /// The `page` of the next request, if there are more entries. `entries` has up to one entry more than the limit, which
    /// is removed.
    fn page<T>(&self, entries: &mut Vec<T>, name: impl Fn(&T) -> &str) -> Option<String> {
        if entries.len() <= self.limit {
            return None;
        }
        entries.truncate(self.limit);
        entries.last().map(|last| hex(name(last).as_bytes()))
    }
}
