//! `/v1/services`: lists services and calls their methods.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{Request, StatusCode, request::Parts},
    response::Response,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{json, to_json};
use crate::{
    auth::Identity,
    error::{Code, Error, Result},
    http::{
        error::problem,
        extract::{check_declared_json, read_body},
        schema::ProblemSchema,
    },
    json::without_bom,
    node::Node,
    rpc::{Call, CallError, ProviderError, ServiceInfo, call_once},
    transport::query::{Query, decode},
};

/// `GET /v1/services`.
#[utoipa::path(get, path = "/v1/services", operation_id = "listServices", tag = "services",
    description = "Lists the services that have a provider.",
    params(("prefix" = Option<String>, Query, description = "Returns only names with this prefix.")),
    responses(
        (status = 200, description = "The services that the client may call.", body = Services),
        (status = "4XX", description = "`invalid_params`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    let prefix = query.take("prefix")?.unwrap_or_default();
    query.finish()?;
    let mut services = node.hub.services(&prefix, node.config.limits.services);
    // A client sees only the services that it may call.
    services.retain(|info| identity.may_see(&info.service));
    Ok(to_json(&Services { services }))
}

/// `POST /v1/services/{service}/{method}`.
#[utoipa::path(post, path = "/v1/services/{service}/{method}", operation_id = "callService", tag = "services",
    description = "Calls a method. The body holds the params: an object, an array, or nothing. The response body is the result. The path is \
        split at its last `/`, so a service name can contain `/`. Closing the connection cancels the call.",
    params(
        ("service" = String, Path, example = "weir", pattern = "^[A-Za-z][A-Za-z0-9._-]{0,60}$"),
        ("method" = String, Path, example = "echo", pattern = "^[A-Za-z][A-Za-z0-9._-]{0,60}$"),
        ("timeout" = Option<String>, Query, description = "Default 30s, maximum 10m.", pattern = "^([1-9][0-9]{0,3}ms|[1-9][0-9]?s|[1-9]m)$", example = "5s"),
    ),
    request_body(description = "Params.", content = Option<crate::http::schema::Params>, content_type = "application/json"),
    responses(
        (status = 200, description = "The result, byte for byte as sent by the provider.", body = serde_json::Value, content_type = "application/json"),
        (status = "4XX", description = "`parse_error`, `invalid_params`, `method_not_found`, `forbidden`, `too_large`, `unsupported_media_type`; \
            `service_error` (422): the provider returned the error in `error`; its `data.status` overrides the status.",
            body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`no_provider`, `busy` (503): the call was not executed. `timeout` (504), `provider_gone`, `bad_reply` (502): \
            the call may have been executed. `internal`.", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn call(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Result<Response> {
    let (head, body) = request.into_parts();
    check_declared_json(&head.headers)?;
    let mut query = Query::parse(head.uri.query())?;
    let timeout = query.duration("timeout")?;
    query.finish()?;
    let path = decode(head.uri.path().strip_prefix("/v1/services/").unwrap_or_default(), false)?;
    let (service, method) = Call::split(&path)?;
    let permit = identity.may_call(service, method)?;
    let limits = &node.config.limits;
    let body = read_body(body, limits.frame, "limits.frame", limits.body_time).await?;
    let traceparent = head.headers.get("traceparent").and_then(|value| value.to_str().ok());
    let call = Call {
        caller: permit.subject(),
        traceparent: traceparent.filter(|value| !value.is_empty()),
        timeout,
        ..Call::new(service, method, params(&body)?)
    };
    match call_once(&node.hub, &call).await {
        Ok(result) => Ok(json(StatusCode::OK, Box::<str>::from(result).into_string())),
        Err(CallError::Weir(error)) => Err(error),
        Err(CallError::Provider(error)) => Ok(provider_error(&error)),
    }
}

/// Parses the params, if there are any.
fn params(body: &[u8]) -> Result<Option<&RawValue>> {
    if body.trim_ascii().is_empty() {
        return Ok(None);
    }
    let params: &RawValue =
        serde_json::from_slice(without_bom(body)).map_err(|error| Error::new(Code::ParseError, error.to_string()))?;
    match params.get() {
        "null" => Ok(None),
        text if text.starts_with(['{', '[']) => Ok(Some(params)),
        _ => Err(Error::params("params are an object, an array, or nothing")),
    }
}

/// The response to an error of the provider, which is in the member `error`, unmodified.
fn provider_error(error: &ProviderError<'_>) -> Response {
    let code = match error.code {
        -32601 => Code::MethodNotFound,
        -32602 => Code::InvalidParams,
        -32603 => Code::Internal,
        _ => Code::ServiceError,
    };
    let summary = Error::new(code, error.message.clone().into_owned());
    problem(&summary, error.data.as_deref().and_then(status), Some(("error", error.to_raw().get().as_bytes())))
}

/// `data.status`, if it is an error status.
fn status(data: &RawValue) -> Option<u16> {
    #[derive(Deserialize)]
    struct ErrorData {
        status: u16,
    }
    // serde would also deserialize the struct from an array.
    let ErrorData { status } = data.get().starts_with('{').then(|| serde_json::from_str(data.get()).ok())??;
    (400..600).contains(&status).then_some(status)
}

#[derive(Serialize, ToSchema)]
struct Services {
    services: Vec<ServiceInfo>,
}
