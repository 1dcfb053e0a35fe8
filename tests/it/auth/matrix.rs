//! Each operation of each route and method, by clients with the permission, with that for another name, and with none.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weir::config::{AuthSection, KeyRule, RoleRule};

use super::{bearer, hash, role, texts};
use crate::support::{Weir, weir};

/// An operation: what it needs, and how it is requested.
struct Row {
    verb: &'static str,
    /// The name that the request is about, and another name.
    name: &'static str,
    other: &'static str,
    form: Form,
}

enum Form {
    Http { method: &'static str, path: &'static str, body: &'static str, also: &'static [(&'static str, &'static str)] },
    Rpc { method: &'static str, params: &'static str, also: &'static [(&'static str, &'static str)] },
}

const fn http(
    verb: &'static str,
    name: &'static str,
    other: &'static str,
    method: &'static str,
    path: &'static str,
    body: &'static str,
) -> Row {
    Row { verb, name, other, form: Form::Http { method, path, body, also: &[] } }
}

const fn rpc(
    verb: &'static str,
    name: &'static str,
    other: &'static str,
    method: &'static str,
    params: &'static str,
) -> Row {
    Row { verb, name, other, form: Form::Rpc { method, params, also: &[] } }
}

/// `also`: further permissions that the operation needs.
const fn http_with(row: Row, more: &'static [(&'static str, &'static str)]) -> Row {
    match row.form {
        Form::Http { method, path, body, .. } => Row { form: Form::Http { method, path, body, also: more }, ..row },
        Form::Rpc { method, params, .. } => Row { form: Form::Rpc { method, params, also: more }, ..row },
    }
}

#[rustfmt::skip] // a table
const ROWS: &[Row] = &[
    http("publish", "c", "d", "POST", "/v1/events?channel=c", "1"),
    http("publish", "c", "d", "POST", "/v1/events", r#"[{"channel":"c","data":1}]"#),
    http("subscribe", "c", "d", "GET", "/v1/events?channel=c", ""),
    http("subscribe", "c", "d", "HEAD", "/v1/sse?channel=c", ""),
    http_with(http("consume", "n", "m", "GET", "/v1/events?channel=c&consumer=n", ""), &[("subscribe", "c")]),
    http("admin", "events:delete", "metrics", "DELETE", "/v1/events?channel=c", ""),
    http("subscribe", "c", "d", "GET", "/v1/channels?channel=c", ""),
    http("admin", "channels:list", "metrics", "GET", "/v1/channels", ""),
    http("presence", "c", "d", "GET", "/v1/presence?channel=c", ""),
    http("presence", "c", "d", "GET", "/v1/events?channel=$presence/c", ""),
    http("subscribe", "$services", "services", "GET", "/v1/events?channel=$services", ""),
    http("consume", "n", "m", "GET", "/v1/consumers/n", ""),
    http("consume", "n", "m", "POST", "/v1/consumers/n/commit", r#"{"after":"x"}"#),
    http_with(http("consume", "n", "m", "POST", "/v1/consumers/n/seek", r#"{"channel":"c","after":"earliest"}"#), &[("subscribe", "c")]),
    http("consume", "n", "m", "DELETE", "/v1/consumers/n", ""),
    http("admin", "consumers:list", "metrics", "GET", "/v1/consumers", ""),
    http("call", "s/m", "s/o", "POST", "/v1/services/s/m", "[]"),
    http("call", "a/b/m", "a/b/o", "POST", "/v1/services/a/b/m", "[]"),
    http("admin", "connections:list", "metrics", "GET", "/v1/connections", ""),
    http("admin", "connections:kick", "metrics", "DELETE", "/v1/connections?subject=nobody", ""),
    http("admin", "metrics", "channels:list", "GET", "/metrics", ""),
    rpc("publish", "c", "d", "weir.publish", r#"{"channel":"c","data":1}"#),
    rpc("subscribe", "c", "d", "weir.read", r#"{"channels":["c"]}"#),
    rpc("presence", "c", "d", "weir.presence", r#"{"channel":"c"}"#),
    rpc("consume", "n", "m", "weir.commit", r#"{"consumer":"n","after":"x"}"#),
    rpc("call", "s/m", "s/o", "weir.call", r#"{"service":"s","method":"m"}"#),
    rpc("call", "s/m", "s/o", "s/m", "[]"),
    rpc("subscribe", "c", "d", "weir.subscribe", r#"{"channels":["c"]}"#),
    http_with(rpc("join", "c", "d", "weir.subscribe", r#"{"channels":["c"],"present":{"client":"x"}}"#), &[("subscribe", "c")]),
    rpc("provide", "s", "o", "weir.provide", r#"{"service":"s"}"#),
];

/// Routes without a row, and the reason.
const OPEN: &[&str] = &[
    "GET /",
    "GET /openapi.json",
    "GET /health/live",
    "GET /health/ready", // no permission
    "GET /v1/services",  // lists what may be called
    "POST /v1/rpc",
    "GET /v1/ws",  // the methods have rows
    "GET /v1/sse", // the row is HEAD
];

fn key(n: usize, kind: &str) -> String {
    format!("weir_matrix_{n:04}_{kind}_of_32_characters")
}

fn grant(role: &mut RoleRule, verb: &str, name: &str) {
    let list = match verb {
        "publish" => &mut role.publish,
        "subscribe" => &mut role.subscribe,
        "join" => &mut role.join,
        "presence" => &mut role.presence,
        "consume" => &mut role.consume,
        "provide" => &mut role.provide,
        "call" => &mut role.call,
        "admin" => &mut role.admin,
        _ => panic!("{verb}"),
    };
    list.push(name.to_owned());
}

fn auth() -> AuthSection {
    let mut auth = AuthSection::default();
    for (n, row) in ROWS.iter().enumerate() {
        let (Form::Http { also, .. } | Form::Rpc { also, .. }) = row.form;
        for (kind, name) in [("granted", Some(row.name)), ("other", Some(row.other)), ("none", None)] {
            let title = format!("{kind}-{n}");
            auth.keys.push(KeyRule {
                name: title.clone(),
                hash: hash(&key(n, kind)),
                roles: texts(&[&title]),
                ..KeyRule::default()
            });
            auth.roles.push(role(&title, |role| {
                also.iter().for_each(|(verb, name)| grant(role, verb, name));
                if let Some(name) = name {
                    grant(role, row.verb, name);
                }
                if row.name == "events:delete" {
                    grant(role, "publish", "c");
                }
            }));
        }
    }
    auth
}

/// The code of the error, or `""`; other errors than those of permissions count as permitted.
async fn attempt(weir: &Weir, row: &Row, credential: Option<&str>) -> String {
    let code = match row.form {
        Form::Http { method, path, body, .. } => {
            let request = weir.request(method, path).body(body);
            let reply = match credential {
                Some(key) => bearer(request, key).await,
                None => request.await,
            };
            match reply.status {
                401 => "unauthorized".to_owned(),
                403 => "forbidden".to_owned(),
                _ => String::new(),
            }
        }
        Form::Rpc { method, params, .. } => {
            let mut socket = weir.socket().await;
            if let Some(key) = credential {
                socket.call("weir.auth", json!({ "token": key })).await;
            }
            let answer = socket.request(method, serde_json::from_str::<Value>(params).unwrap()).await;
            answer["error"]["data"]["code"].as_str().unwrap_or_default().to_owned()
        }
    };
    if matches!(&*code, "unauthorized" | "forbidden") { code } else { String::new() }
}

#[tokio::test]
async fn each_operation_needs_its_permission() {
    let weir = weir().with(|config| config.auth = auth()).await;
    for (n, row) in ROWS.iter().enumerate() {
        let name = match row.form {
            Form::Http { method, path, .. } => format!("{method} {path}"),
            Form::Rpc { method, params, .. } => format!("{method} {params}"),
        };
        assert_eq!(attempt(&weir, row, Some(&key(n, "granted"))).await, "", "{name}, granted");
        assert_eq!(attempt(&weir, row, Some(&key(n, "other"))).await, "forbidden", "{name}, another name");
        assert_eq!(attempt(&weir, row, Some(&key(n, "none"))).await, "forbidden", "{name}, no permission");
        assert_eq!(attempt(&weir, row, None).await, "unauthorized", "{name}, anonymous");
    }
    weir.idle().await;
}

#[tokio::test]
async fn each_route_has_a_row() {
    let weir = weir().await;
    let document = weir.get("/openapi.json").await.expect(200).json();
    let known: BTreeSet<String> = ROWS
        .iter()
        .filter_map(|row| match row.form {
            Form::Http { method, path, .. } => Some(format!("{method} {}", path.split('?').next().unwrap())),
            Form::Rpc { .. } => None,
        })
        .map(|route| route.replace("/n/", "/{name}/").replace("/services/s/m", "/services/{service}/{method}"))
        .map(|route| if route.ends_with("/consumers/n") { route.replace("/n", "/{name}") } else { route })
        .chain(OPEN.iter().map(|route| (*route).to_owned()))
        .collect();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in
            methods.as_object().unwrap().keys().filter(|name| ["get", "post", "put", "delete"].contains(&name.as_str()))
        {
            let route = format!("{} {path}", method.to_uppercase());
            assert!(known.contains(&route), "{route} has no row");
        }
    }
}
