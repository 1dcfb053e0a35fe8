//! Header fields between client, proxy and origin.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};

/// Optional features of the proxy, for the origin.
const FEATURES: HeaderValue =
    HeaderValue::from_static("status, link:next, filter:skip-self, filter:skip-users, filter:require-sub");

/// Hop-by-hop fields (RFC 9110, section 7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Removes the fields of a client that have other characters than letters, digits and hyphens in their names. Origins that
/// follow CGI read `Grip_Sig` as `Grip-Sig`, so they could be taken for fields of a proxy.
fn strip_ambiguous(headers: &mut HeaderMap) {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let ambiguous: Vec<_> = headers.keys().filter(|name| !name.as_str().bytes().all(is_plain)).cloned().collect();
    for name in ambiguous {
        headers.remove(name);
    }
}

/// Replaces a repeated `Content-Length` by one, or by none if the values differ (RFC 9112, section 6.3).
pub(super) fn merge_content_length(headers: &mut HeaderMap) {
    let lines = headers.get_all(header::CONTENT_LENGTH).iter().map(|line| line.to_str().unwrap_or_default());
    let mut values: Vec<&str> = lines.flat_map(|line| line.split(',')).map(str::trim).collect();
    if values.len() < 2 {
        return;
    }
    values.dedup();
    match (values.len(), HeaderValue::from_str(values[0])) {
        (1, Ok(value)) => drop(headers.insert(header::CONTENT_LENGTH, value)),
        _ => drop(headers.remove(header::CONTENT_LENGTH)),
    }
}

/// Removes what is no trailer from the trailers of a client or an origin (RFC 9110, section 6.5.1).
pub(super) fn strip_trailers(trailers: &mut HeaderMap) {
    strip_hop_by_hop(trailers);
    strip_ambiguous(trailers);
    strip_grip(trailers);
    for name in [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::HOST, header::TRAILER] {
        trailers.remove(name);
    }
}

/// Removes the `Grip-…` fields, which are for proxy and origin only.
pub(super) fn strip_grip(headers: &mut HeaderMap) {
    let grip: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("grip-")).cloned().collect();
    for name in grip {
        headers.remove(name);
    }
}

/// Whether a client requests a WebSocket.
///
/// No other protocol is forwarded: after an upgrade to HTTP/2, a client could send requests with a `Grip-Sig` of its own.
pub(super) fn wants_websocket(headers: &HeaderMap) -> bool {
    let has = |name: HeaderName, wanted: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, "websocket")
}

/// Turns the header of a client's request into that of the request to the origin.
pub(super) fn prepare_request(headers: &mut HeaderMap, uri: &Uri, peer: Option<IpAddr>, signature: HeaderValue) {
    // The proxy forwards trailers, so it may announce that it accepts them.
    let trailers =
        headers.get_all(header::TE).iter().any(|value| value.to_str().is_ok_and(|te| te.contains("trailers")));
    let websocket = wants_websocket(headers);
    strip_hop_by_hop(headers);
    strip_ambiguous(headers);
    strip_grip(headers);
    merge_content_length(headers);
    // The server of the client's connection has responded to it.
    headers.remove(header::EXPECT);
    // Published items are appended to the response unencoded.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if websocket {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    } else if trailers {
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    // HTTP/2 may split the field (RFC 9113, section 8.2.3); HTTP/1 servers expect one.
    if headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let cookies: Vec<_> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        if let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
            headers.insert(header::COOKIE, joined);
        }
    }
    // The authority of HTTP/2.
    if let Some(Ok(host)) = uri.authority().map(|host| HeaderValue::from_str(host.as_str())) {
        headers.insert(header::HOST, host);
    }
    if let Some(peer) = peer {
        let forwarded = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
        let mut addresses: Vec<String> = forwarded.map(str::to_owned).collect();
        addresses.push(peer.to_canonical().to_string());
        if let Ok(value) = HeaderValue::from_str(&addresses.join(", ")) {
            headers.insert("x-forwarded-for", value);
        }
    }
    // A TLS terminator in front of weir has set the true protocol.
    headers.entry("x-forwarded-proto").or_insert(HeaderValue::from_static("http"));
    if let Some(host) = headers.get(header::HOST).cloned() {
        headers.entry("x-forwarded-host").or_insert(host);
    }
    sign(headers, signature);
}

/// Adds the fields by which an origin recognises the proxy.
pub(super) fn sign(headers: &mut HeaderMap, signature: HeaderValue) {
    headers.insert("grip-sig", signature);
    headers.insert("grip-feature", FEATURES);
}

/// Tells the origin the last item of a channel that the client has.
pub(super) fn append_last_id(headers: &mut HeaderMap, channel: &str, id: Option<&String>) {
    if let Some(Ok(value)) = id.map(|id| HeaderValue::try_from(format!("{channel}; last-id={id}"))) {
        headers.append("grip-last", value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn requests_to_the_origin_are_signed_and_have_no_hop_by_hop_fields() {
        let mut map = headers(&[
            ("host", "example.com"),
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("grip-sig", "forged"),
            ("grip-last", "a; last-id=1"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("accept-encoding", "gzip"),
            ("te", "trailers, deflate"),
            ("grip_sig", "forged"),
            ("x_forwarded_for", "10.0.0.9"),
            ("x.user", "admin"),
            ("content-length", "3"),
            ("content-length", "3, 3"),
            ("upgrade", "websocket"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]);
        let peer = Some("::ffff:127.0.0.1".parse().unwrap());
        prepare_request(&mut map, &Uri::from_static("/"), peer, HeaderValue::from_static("sig"));
        let features = map.remove("grip-feature");
        assert_eq!(features, Some(FEATURES));
        let expected = headers(&[
            ("host", "example.com"),
            ("x-forwarded-for", "10.0.0.1, 127.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "example.com"),
            ("accept-encoding", "identity"),
            ("content-length", "3"),
            ("connection", "te"),
            ("te", "trailers"),
            ("cookie", "a=1; b=2"),
            ("grip-sig", "sig"),
        ]);
        assert_eq!(map, expected);
    }

    #[test]
    fn only_websocket_upgrades_are_forwarded() {
        assert!(wants_websocket(&headers(&[("upgrade", "WebSocket"), ("connection", "keep-alive, Upgrade")])));
        assert!(!wants_websocket(&headers(&[("upgrade", "websocket")])));
        let smuggled = [("upgrade", "h2c"), ("connection", "Upgrade, HTTP2-Settings"), ("http2-settings", "x")];
        let mut map = headers(&smuggled);
        assert!(!wants_websocket(&map));
        prepare_request(&mut map, &Uri::from_static("/"), None, HeaderValue::from_static("sig"));
        assert!(!map.contains_key("upgrade") && !map.contains_key("connection") && !map.contains_key("http2-settings"));
    }
}
