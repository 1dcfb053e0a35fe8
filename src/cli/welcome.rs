//! The text that weir prints when it starts on a terminal.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The welcome text, with example commands for the first of `addresses`, the bound addresses.
pub fn welcome(addresses: &[SocketAddr], bus: &str, loopback_only: bool) -> String {
    let urls: Vec<String> = addresses.iter().map(|address| format!("http://{}", reachable(*address))).collect();
    let all = urls.join(" ");
    let url = urls.first().map_or("", String::as_str);
    let version = env!("CARGO_PKG_VERSION");
    let access = if loopback_only { "this machine only" } else { "all machines" };
    format!(
        "\
weir {version}  {bus} bus  {all}   access: {access}, without authentication

  watch    curl -N '{url}/v1/sse?channel=hello'       or open {url}/
  publish  curl '{url}/v1/events?channel=hello' -d '{{\"text\":\"hi\"}}'
  call     curl '{url}/v1/services/weir/echo' -d '{{\"n\":1}}'
"
    )
}

/// The loopback address in place of `0.0.0.0` or `::`, to which some systems cannot connect.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_welcome_text() {
        let text = welcome(&["127.0.0.1:8000".parse().unwrap()], "memory", true);
        let expected = "\
weir 0.1.0  memory bus  http://127.0.0.1:8000   access: this machine only, without authentication

  watch    curl -N 'http://127.0.0.1:8000/v1/sse?channel=hello'       or open http://127.0.0.1:8000/
  publish  curl 'http://127.0.0.1:8000/v1/events?channel=hello' -d '{\"text\":\"hi\"}'
  call     curl 'http://127.0.0.1:8000/v1/services/weir/echo' -d '{\"n\":1}'
"
        .replace("0.1.0", env!("CARGO_PKG_VERSION"));
        assert_eq!(text, expected);
        let open = welcome(&["0.0.0.0:1".parse().unwrap(), "[::]:2".parse().unwrap()], "memory", false);
        assert!(
            open.contains("  http://127.0.0.1:1 http://[::1]:2   access: all machines, without authentication\n"),
            "{open}"
        );
    }
}
