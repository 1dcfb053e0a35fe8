//! `GET /openapi.json`: the document of all operations, which are described at their handlers.

use std::sync::LazyLock;

use axum::response::Response;
use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;
use utoipa::OpenApi;

use super::{
    admin, api,
    schema::{
        EventSchema, GapSchema, NewEvent, PageName, PageSchema, PlacedSchema, PositionSchema, PresentChannelName,
        ProblemSchema,
    },
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "weir",
        description = "One bus with three transports. Streams (`/v1/sse`) and WebSockets (`/v1/ws`) cannot be described fully in OpenAPI.\n\n\
            A position is `EPOCH-OFFSET`. A duration has a unit: `500ms`, `5s`, `2m`. Errors are problem documents (RFC 9457) with a stable `code`. \
            Unknown parameters are rejected unless they begin with `_`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    paths(
        api::events::publish_by_route,
        api::events::get_by_route,
        api::events::delete,
        api::stream::get,
        api::channels::get,
        api::connections::list,
        api::connections::kick,
        api::consumers::list,
        api::consumers::get,
        api::consumers::delete,
        api::consumers::commit,
        api::consumers::seek,
        api::services::list,
        api::services::call,
        api::jsonrpc::post,
        api::presence::get,
        admin::live,
        admin::ready,
        admin::metrics,
        document,
    ),
    components(schemas(
        EventSchema,
        NewEvent,
        PlacedSchema,
        PageSchema,
        GapSchema,
        ProblemSchema,
        PresentChannelName,
        // Only parameters refer to these, whose schemas are not collected.
        PageName,
        PositionSchema
    ))
)]
struct Document;

/// `GET /openapi.json`.
#[utoipa::path(get, path = "/openapi.json", operation_id = "getOpenApi", tag = "operations", description = "This document.",
    responses((status = 200, description = "The document.", content_type = "application/json", body = std::collections::BTreeMap<String, Value>)))]
pub(crate) async fn document() -> Response {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        let mut document = serde_json::to_value(Document::openapi()).unwrap_or_default();
        let operations = document["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
        let operations = operations.filter_map(Value::as_object_mut).flat_map(|path| path.values_mut());
        operations.filter_map(|it| it.get_mut("parameters")?.as_array_mut()).flatten().for_each(never_null);
        document.to_string().into()
    });
    api::json(StatusCode::OK, TEXT.clone())
}

/// Removes `null` from the types of a parameter: an optional query parameter can be absent, but not null.
fn never_null(parameter: &mut Value) {
    let schema = &mut parameter["schema"];
    if let Some(types) = schema["type"].as_array() {
        schema["type"] = types[0].clone();
    }
    let described =
        schema["oneOf"].as_array().and_then(|either| either.iter().find(|one| one["type"] != "null")).cloned();
    if let Some(described) = described {
        *schema = described;
    }
}
