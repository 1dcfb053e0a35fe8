//! [`GanomedeBody`]: the body of a request, parsed by its content type.

use axum::{
    body::Bytes,
    http::{StatusCode, header, request::Parts as Head},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use indexmap::IndexMap;
use md5::{Digest as _, Md5};
use serde_json::value::RawValue;

use super::wire::GanomedeError;
use crate::{
    compat::form::Form,
    json::{JsonStr, read_json_str, without_bom},
};

pub(super) enum GanomedeBody<'a> {
    Nothing,
    Form(Form<'a>),
    Json(IndexMap<JsonStr<'a>, &'a RawValue>),
}

impl<'a> GanomedeBody<'a> {
    pub(super) fn read(head: &Head, body: &'a Bytes) -> Result<Self, GanomedeError> {
        if body.is_empty() {
            return Ok(GanomedeBody::Nothing);
        }
        if let Some(claimed) = head.headers.get("content-md5") {
            let digest = BASE64.encode(Md5::digest(body));
            if claimed != digest.as_str() {
                let claimed = String::from_utf8_lossy(claimed.as_bytes()).into_owned();
                let message = format!("Content-MD5 '{claimed}' didn't match '{digest}'");
                return Err(GanomedeError::new(StatusCode::BAD_REQUEST, "BadDigest", message));
            }
        }
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let text = std::str::from_utf8(without_bom(body));
        if kind == "application/json" || kind.ends_with("+json") {
            let invalid = |error: &dyn std::fmt::Display| GanomedeError::invalid(format!("Invalid JSON: {error}"));
            let text = text.map_err(|error| invalid(&error))?;
            let json: &RawValue = serde_json::from_str(text).map_err(|error| invalid(&error))?;
            // Only members of an object are ever looked up.
            return Ok(serde_json::from_str(json.get()).map_or(GanomedeBody::Nothing, GanomedeBody::Json));
        }
        Ok(match text {
            Ok(text) if kind == "application/x-www-form-urlencoded" => GanomedeBody::Form(Form::parse(text)),
            _ => GanomedeBody::Nothing,
        })
    }

    fn member(&self, name: &str) -> Option<&'a RawValue> {
        let GanomedeBody::Json(members) = self else { return None };
        members.get(&JsonStr(name.into())).copied()
    }

    /// A member that is a string and not empty.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let text = match self {
            GanomedeBody::Nothing => None,
            GanomedeBody::Form(form) => form.text(name).map(str::to_owned),
            GanomedeBody::Json(_) => {
                let value = self.member(name)?.get();
                value.starts_with('"').then(|| read_json_str(value).into_owned())
            }
        };
        text.filter(|text| !text.is_empty())
    }

    /// `data`, which must be an object or an array if it is present.
    pub(super) fn data(&self) -> Result<Option<&'a RawValue>, GanomedeError> {
        let invalid = || GanomedeError::invalid("Invalid data");
        match self {
            GanomedeBody::Nothing => Ok(None),
            // A form has text, or `data[…]`, which the original reads as an object of strings.
            GanomedeBody::Form(form) if form.has("data") => Err(invalid()),
            GanomedeBody::Form(_) => Ok(None),
            GanomedeBody::Json(_) => match self.member("data") {
                Some(data) if data.get().starts_with(['{', '[']) => Ok(Some(data)),
                Some(_) => Err(invalid()),
                None => Ok(None),
            },
        }
    }
}
