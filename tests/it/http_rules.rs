//! Rules for every request: methods, unknown paths, CORS, host names.

use weir::compat::{
    event_stream::{Config as EventStream, SseRoute},
    ganomede::Config as Ganomede,
};

use crate::support::{Request, event::channel, eventually, weir};

#[tokio::test]
async fn allow_lists_the_methods_of_each_route() {
    let weir = weir().await;
    for (path, allow) in [
        ("/v1/events", "GET, HEAD, POST, DELETE, OPTIONS"),
        ("/v1/channels", "GET, HEAD, OPTIONS"),
        ("/v1/consumers/n", "GET, HEAD, DELETE, OPTIONS"),
        ("/v1/consumers/n/commit", "POST, OPTIONS"),
        ("/health/live", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
    ] {
        let mut expected: Vec<_> = allow.split(", ").collect();
        expected.sort_unstable();
        for reply in [weir.request("OPTIONS", path).await.expect(204), weir.request("PATCH", path).await] {
            let mut allowed: Vec<_> = reply.header("allow").unwrap().split(", ").collect();
            allowed.sort_unstable();
            assert_eq!(allowed, expected, "{path}");
            if reply.status != 204 {
                reply.expect_problem("method_not_allowed");
            }
        }
    }
}

#[tokio::test]
async fn unknown_paths_are_not_found() {
    let weir = weir().await;
    for path in [
        "/v1",
        "/v1/",
        "/v2/events",
        "/v1/events/",
        "/v1/consumers/n/take",
        "/v1/consumers/n/ack",
        "/console",
        "/index.html",
    ] {
        weir.get(path).await.expect_problem("not_found");
    }
    weir.post("/v1/consumers/n/take", "{}").await.expect_problem("not_found");
    weir.request("PUT", "/v1/consumers/n").body("{}").await.expect_problem("method_not_allowed");
    weir.request("OPTIONS", "/nowhere").await.expect_problem("not_found");
}

#[tokio::test]
async fn head_answers_headers_and_starts_nothing() {
    let weir = weir().await;
    weir.publish("a", "1").await;
    let mut client = weir.client().await;
    for path in [
        "/v1/events?channel=a&after=now&wait=55s",
        "/v1/events?channel=a&consumer=n&commit=auto",
        "/v1/channels",
        "/",
        "/health/ready",
    ] {
        client.send("HEAD", path, &[], b"").await;
        let head = client.head().await.expect(200);
        assert_eq!(head.header("cache-control"), Some("no-store"), "{path}");
        assert!(head.header("content-type").is_some());
    }
    // No body follows the heads, and the consumer was not created.
    client.get("/v1/consumers/n").await.expect_problem("not_found");
    client.send("HEAD", "/v1/events?chanel=a", &[], b"").await;
    client.head().await.expect(400);
    client.send("HEAD", "/nowhere", &[], b"").await;
    client.head().await.expect(404);
    client.get("/health/live").await.expect(200);
}

/// RFC 9110, section 8.6: the `Content-Length` is that of `GET`, or there is none.
#[tokio::test]
async fn head_answers_the_length_of_get_or_none() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse"];
            config.compat.get_mut::<Ganomede>().unwrap().secret = "s".into();
            config.compat.get_mut::<EventStream>().unwrap().routes =
                vec![SseRoute { path: "/api/{id}".into(), channels: vec!["{id}".into()] }];
        })
        .await;
    weir.publish("a", "1").await;
    for path in ["/v1/events?channel=a", "/v1/sse?channel=a", "/subscribe?channels=a", "/api/a"] {
        let mut client = weir.client().await;
        client.send("HEAD", path, &[], b"").await;
        let head = client.head().await.expect(200);
        assert_eq!((head.header("content-length"), head.header("transfer-encoding")), (None, None), "{path}");
        assert!(head.header("content-type").is_some(), "{path}");
        client.get("/health/live").await.expect(200);
    }
    for path in [
        "/",
        "/openapi.json",
        "/health/live",
        "/health/ready",
        "/v1/channels",
        "/v1/channels?channel=a",
        "/v1/connections",
        "/v1/consumers",
        "/v1/consumers/n",
        "/v1/services",
        "/v1/presence?channel=a",
        "/v1/events",
        "/v1/ws",
        "/nowhere",
        "/lastEvent?channel=a",
        "/events/v1/ping/x",
    ] {
        let get = weir.get(path).await;
        let mut client = weir.client().await;
        client.send("HEAD", path, &[], b"").await;
        let head = client.head().await.expect(get.status);
        for name in ["content-length", "content-type", "cache-control", "vary"] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
        }
        client.get("/health/live").await.expect(200);
    }
}

#[tokio::test]
async fn accept_chooses_the_representation_of_events() {
    let weir = weir().await;
    weir.publish("a", "1").await;
    for (accept, kind) in [
        ("*/*", "application/json"),
        ("application/json, text/event-stream;q=0.1", "application/json"),
        ("text/event-stream;q=0.4, */*;q=0.5", "application/json"),
        ("text/event-stream;q=0, */*", "application/json"),
        ("", "application/json"),
        ("text/html", "application/json"),
        ("text/event-stream", "text/event-stream"),
        ("application/json;q=0.1, text/event-stream", "text/event-stream"),
        ("application/json, text/event-stream", "text/event-stream"),
        ("application/json;q=0, text/event-stream;q=0.1", "text/event-stream"),
    ] {
        let mut client = weir.client().await;
        client.send("GET", "/v1/events?channel=a", &[("accept", accept)], b"").await;
        let head = client.head().await.expect(200);
        assert_eq!(head.header("content-type"), Some(kind), "{accept}");
        assert_eq!(head.all("vary"), "Accept, Origin");
    }
    let rejected = async |path: &str, accept| {
        weir.request("GET", path).header("accept", accept).await.expect_problem("not_acceptable");
    };
    rejected("/v1/events?channel=a", "application/json;q=0").await;
    rejected("/v1/events?channel=a", "*/*;q=0").await;
    rejected("/v1/sse?channel=a", "application/json").await;
    rejected("/v1/sse?channel=a", "text/event-stream;q=0, */*").await;
}

#[tokio::test]
async fn responses_are_not_cacheable_and_vary_by_origin() {
    let weir = weir().await;
    for reply in [
        weir.get("/v1/events?channel=a").await,
        weir.get("/nowhere").await,
        weir.get("/").await,
        weir.post("/v1/events", "{").await,
        weir.request("OPTIONS", "/v1/events").await,
    ] {
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert!(reply.all("vary").contains("Origin"));
        assert_eq!(reply.header("access-control-allow-origin"), None);
        assert!(reply.header("date").is_some());
    }
    assert_eq!(weir.get("/v1/events?channel=a").await.all("vary"), "Accept, Origin");
    assert_eq!(weir.get("/v1/events").await.all("vary"), "Accept, Origin");
}

#[tokio::test]
async fn local_origins_are_allowed() {
    let weir = weir().await;
    let own = format!("http://{}", weir.address);
    for origin in ["http://localhost:3000", "http://127.0.0.1:5173", "http://localhost", &own] {
        let reply = weir.request("GET", "/v1/events?channel=a").header("origin", origin).await.expect(200);
        assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
        assert_eq!(reply.header("access-control-expose-headers"), Some("Retry-After, traceparent"));
        assert_eq!(reply.header("access-control-allow-credentials"), None);
        let preflight = weir
            .request("OPTIONS", "/v1/events")
            .header("origin", origin)
            .header("access-control-request-method", "POST");
        let headers = "idempotency-key,traceparent,tracestate,baggage,sentry-trace,cache-control,x-requested-with";
        let reply = preflight.header("access-control-request-headers", headers).await.expect(204);
        assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
        assert!(reply.header("access-control-allow-methods").unwrap().contains("DELETE"));
        assert_eq!(reply.header("access-control-allow-headers"), Some(headers));
        assert_eq!(reply.header("access-control-max-age"), Some("600"));
        assert_eq!(reply.header("access-control-allow-private-network"), None);
        assert_eq!(reply.all("vary"), "Access-Control-Request-Method, Access-Control-Request-Headers, Origin");
        // Pages may read errors, too.
        let reply = weir.request("GET", "/v1/events").header("origin", origin).await;
        assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
    }
}

#[tokio::test]
async fn foreign_origins_are_rejected() {
    let weir = weir().await;
    for origin in [
        "https://evil.example",
        "null",
        "https://localhost:3000",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "file://",
        "\u{e9}",
    ] {
        let with = |method, path: &str| {
            weir.request(method, path).header("origin", origin).header("content-type", "application/json")
        };
        let reply = with("GET", "/v1/events?channel=a").await.expect(200);
        assert_eq!(reply.header("access-control-allow-origin"), None, "{origin}");
        let reply = with("OPTIONS", "/v1/events").header("access-control-request-method", "POST").await.expect(204);
        assert_eq!(reply.header("access-control-allow-methods"), None, "{origin}");
        let problem = with("POST", "/v1/events?channel=a").body("1").await.expect_problem("forbidden");
        assert_eq!(problem["permission"], "origin");
        with("DELETE", "/v1/events?channel=a").await.expect_problem("forbidden");
    }
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 0);
    let open = weir::config::Config::default();
    assert!(open.cors.origins.is_empty());
}

#[tokio::test]
async fn every_route_answers_the_preflight_of_an_allowed_page() {
    let weir = weir().with(|config| config.cors.origins = vec!["https://shop.example".into()]).await;
    for path in [
        "/v1/events",
        "/v1/sse?channel=a",
        "/v1/rpc",
        "/v1/presence?channel=a",
        "/v1/services",
        "/v1/services/a/b",
        "/v1/consumers/n/commit",
        "/v1/consumers/n",
        "/v1/channels",
        "/v1/connections",
        "/health/ready",
        "/metrics",
        "/openapi.json",
    ] {
        let preflight = |origin| {
            weir.request("OPTIONS", path)
                .header("origin", origin)
                .header("access-control-request-method", "GET")
                .header("access-control-request-headers", "x-anything")
                .header("access-control-request-private-network", "true")
        };
        let reply = preflight("https://shop.example").await.expect(204);
        assert_eq!(reply.header("access-control-allow-origin"), Some("https://shop.example"), "{path}");
        assert_eq!(reply.header("access-control-allow-headers"), Some("x-anything"), "{path}");
        assert_eq!(reply.header("access-control-allow-methods"), reply.header("allow"), "{path}");
        assert_eq!(reply.header("access-control-allow-private-network"), Some("true"), "{path}");
        let denied = preflight("https://evil.example").await.expect(204);
        assert!(!denied.headers.iter().any(|(name, _)| name.starts_with("access-control-")), "{path}");
    }
}

/// A browser sends these requests for an image, a form or an `EventSource` of any page, without asking first.
#[tokio::test]
async fn pages_of_other_origins_change_nothing() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse", "microstream"];
            config.compat.get_mut::<Ganomede>().unwrap().secret = "s3cret".into();
        })
        .await;
    for event in ["1", "2"] {
        weir.publish("a", event).await;
    }
    let changes = [
        "/v1/events?channel=a&consumer=n&commit=auto",
        "/v1/events?channel=a&%63onsumer=n&commit=auto",
        "/v1/events?channel=a&c%6fnsume%72=n&commit=auto",
        "/v1/events?commit=auto&consumer=n&&channel=a",
        "/v1/events?channel=a&consumer=n&start=now",
        "/v1/sse?channel=a&present=ann",
        "/v1/sse?channel=a&p%72esent=ann",
        "/events/v1/events?clientId=n&channel=a&after=1&secret=s3cret",
        "/events/v1/events?%63lientId=n&channel=a&after=1&secret=s3cret",
        "/subscribe?channels=a&clientId=7",
        "/socket.io/?EIO=4&transport=polling",
    ];
    for path in changes {
        for (name, value) in [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site"), ("origin", "null")]
        {
            weir.request("GET", path).header(name, value).await.expect(403);
        }
    }
    weir.get("/v1/consumers/n").await.expect_problem("not_found");
    assert_eq!(weir.get("/v1/presence?channel=a").await.json()["count"], 0);
    assert_eq!(weir.get("/v1/connections").await.json()["connections"], serde_json::json!([]));
    for (path, body) in [
        ("/publish", r#"{"events":[{"channelName":"a","type":"t","payload":"p"}]}"#),
        ("/events/v1/events?secret=s3cret", r#"{"clientId":"n","channel":"a","from":"f","type":"t"}"#),
        ("/socket.io/?EIO=4&transport=polling", "40"),
        ("/v1/events?channel=a", "3"),
        ("/v1/rpc", r#"{"jsonrpc":"2.0","method":"weir.publish","params":{"channel":"a"}}"#),
        ("/v1/services/weir/echo", "{}"),
        ("/v1/consumers/n/commit", "{}"),
    ] {
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"] {
            let post = weir.request("POST", path).header("content-type", kind).header("origin", "https://evil.example");
            post.body(body).await.expect(403);
        }
    }
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 2);
    // What only reads is answered, but without the headers with which the page could see it.
    for path in ["/v1/events?channel=a", "/v1/events?channel=a&_consumer=n", "/health/ready", "/v1/services"] {
        let reply = weir.request("GET", path).header("origin", "https://evil.example").await.expect(200);
        assert_eq!(reply.header("access-control-allow-origin"), None);
    }
    // The pages of this machine, and other clients, may do all of this.
    weir.request("GET", changes[0]).header("origin", "http://localhost:3000").await.expect(200);
    weir.get(changes[7]).await.expect(200);
    weir.get(changes[10]).await.expect(200);
}

#[tokio::test]
async fn configured_origins_are_allowed() {
    let weir = weir().with(|config| config.cors.origins = vec!["https://*.shop.example".into()]).await;
    let post = |origin: &str| {
        weir.request("POST", "/v1/events?channel=a")
            .header("origin", origin)
            .header("content-type", "application/json")
            .body("1")
    };
    let reply = post("https://www.shop.example").await.expect(201);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://www.shop.example"));
    post("https://shop.example.evil").await.expect_problem("forbidden");
}

#[tokio::test]
async fn only_host_names_of_this_machine_are_accepted() {
    let weir = weir().await;
    for host in ["localhost:8000", "127.0.0.1", "[::1]:1", "weir.localhost"] {
        weir.request("GET", "/v1/events?channel=a").header("host", host).await.expect(200);
    }
    for host in ["evil.example", "10.0.0.1:8000", "localhost.evil.example"] {
        for path in ["/v1/events?channel=a", "/", "/health/live", "/nowhere"] {
            let problem = weir.request("GET", path).header("host", host).await.expect_problem("forbidden");
            assert_eq!(problem["permission"], "host");
            let detail = problem["detail"].as_str().unwrap();
            assert!(detail.contains("Host header") && detail.contains("server.hosts"), "{detail}");
        }
    }
    let mut client = weir.client().await;
    client.write("GET /health/live HTTP/1.1\r\n\r\n").await;
    client.response().await.expect_problem("invalid_request");
    // HTTP/1.0 requests need no host.
    client.write("GET /health/live HTTP/1.0\r\n\r\n").await;
    client.response().await.expect(200);
}

#[tokio::test]
async fn a_proxy_on_the_same_machine_may_forward_the_host_of_its_clients() {
    let weir = weir().with(|config| config.server.hosts = vec!["weir.example".into()]).await;
    let page = |method, path: &str| {
        weir.request(method, path)
            .header("host", "weir.example")
            .header("origin", "https://weir.example")
            .header("content-type", "application/json")
    };
    page("POST", "/v1/events?channel=a").body("1").await.expect(201);
    let reply = page("GET", "/v1/events?channel=a&consumer=n").await.expect(200);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://weir.example"));
    weir.request("GET", "/").header("host", "other.example").await.expect_problem("forbidden");
    // If the proxy replaces the Host, the browser still confirms that the page has the origin of the request.
    let replaced = weir.request("POST", "/v1/events?channel=a").header("sec-fetch-site", "same-origin");
    replaced
        .header("origin", "https://weir.example")
        .header("content-type", "application/json")
        .body("2")
        .await
        .expect(201);
}

#[tokio::test]
async fn requests_of_browsers_must_declare_a_json_content_type() {
    let weir = weir().await;
    let post = |path: &str, headers: &[(&str, &str)], body: &'static str| {
        headers.iter().fold(weir.request("POST", path), |request, (name, value)| request.header(name, value)).body(body)
    };
    let origin = ("origin", "http://localhost:3000");
    for path in ["/v1/events?channel=a", "/v1/consumers/n/commit"] {
        post(path, &[origin, ("content-type", "text/plain")], "1").await.expect_problem("unsupported_media_type");
        post(path, &[origin], "1").await.expect_problem("unsupported_media_type");
        post(path, &[("cookie", "a=b"), ("content-type", "application/x-www-form-urlencoded")], "1")
            .await
            .expect_problem("unsupported_media_type");
    }
    post("/v1/events?channel=a", &[origin, ("content-type", "application/json; charset=utf-8")], "1").await.expect(201);
    post("/v1/events", &[("cookie", "a=b"), ("content-type", "application/x-ndjson")], "{\"channel\":\"a\"}")
        .await
        .expect(201);
    post("/v1/events?channel=a", &[("content-type", "text/plain")], "1").await.expect(201);
}

#[tokio::test]
async fn admin_routes_move_to_the_admin_listener() {
    let weir = weir().with(|config| config.admin.listen = Some(([127, 0, 0, 1], 0).into())).await;
    let [clients, admin] = weir.addresses[..] else { panic!("{:?}", weir.addresses) };
    let get = |address, path: &str| Request::new(address, "GET", path);
    for path in ["/metrics", "/v1/channels", "/v1/connections", "/v1/consumers"] {
        let problem = get(clients, path).await.expect_problem("not_found");
        assert!(problem["detail"].as_str().unwrap().contains("admin.listen"), "{problem}");
        get(admin, path).await.expect(200);
    }
    Request::new(clients, "DELETE", "/v1/events?channel=a").await.expect_problem("method_not_allowed");
    Request::new(clients, "POST", "/v1/events?channel=a").body("1").await.expect(201);
    get(clients, "/v1/events?channel=a&consumer=n").await.expect(200);
    get(clients, "/v1/consumers/n").await.expect(200);
    Request::new(clients, "DELETE", "/v1/consumers/n").await.expect_problem("method_not_allowed");
    Request::new(admin, "DELETE", "/v1/consumers/n").await.expect(204);
    Request::new(admin, "DELETE", "/v1/events?channel=a").await.expect(204);
    for path in ["/v1/events?channel=a", "/"] {
        get(clients, path).await.expect(200);
        assert!(matches!(get(admin, path).await.status, 404 | 405), "{path}");
    }
    for address in [clients, admin] {
        get(address, "/health/ready").await.expect(200);
    }
}

#[tokio::test]
async fn shutdown_answers_long_polls_and_closes_every_connection() {
    let weir = weir().with(|config| config.drain.window = std::time::Duration::ZERO).await;
    let mut poll = weir.client().await;
    poll.send("GET", "/v1/events?channel=a&wait=55s", &[], b"").await;
    let mut idle = weir.client().await;
    idle.get("/health/ready").await.expect(200);
    let waits = async || weir.bus().inspect(&channel("a")).await.unwrap().readers > 0;
    eventually("the poll waits", waits).await;
    weir.shut_down();
    assert_eq!(poll.response().await.expect(200).json()["events"], serde_json::json!([]));
    assert!(poll.is_closed().await && idle.is_closed().await);
    let connections = weir.connections().clone();
    weir.stopped().await;
    assert!(connections.is_empty());
}

#[tokio::test]
async fn request_heads_are_limited() {
    let weir = weir().await;
    let header = weir.request("GET", "/health/live").header("x-long", &"x".repeat(20_000)).await;
    assert_eq!(header.status, 431);
    let path = weir.get(format!("/v1/events?_={}", "x".repeat(70_000))).await;
    assert!(matches!(path.status, 414 | 431), "{}", path.status);
    let many = (0..300).map(|n| format!("_{n}=1&")).collect::<String>();
    weir.get(format!("/v1/events?{many}")).await.expect_problem("invalid_params");
}
