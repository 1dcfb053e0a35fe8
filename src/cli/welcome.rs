//! What a person sees when weir starts on a terminal: three lines to paste.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The start page. `addresses` are those that are really listened on; the first is the one to paste.
pub fn welcome(addresses: &[SocketAddr], bus: &str, loopback_only: bool) -> String {
    let urls: Vec<String> = addresses.iter().map(|address| format!("http://{}", reachable(*address))).collect();
    let all = urls.join(" ");
    let url = urls.first().map_or("", String::as_str);
    let version = env!("CARGO_PKG_VERSION");
    let open = if loopback_only { "open to this machine only, no keys" } else { "open to everybody, no keys" };
    format!(
        "\
weir {version}  {bus} bus  {all}   {open}

  watch    curl -N '{url}/v1/sse?channel=hello'       or open {url}/
  publish  curl '{url}/v1/events?channel=hello' -d '{{\"text\":\"hi\"}}'
  call     curl '{url}/v1/services/weir/echo' -d '{{\"n\":1}}'
"
    )
}

/// Every address of this machine can be reached as localhost; nobody can connect to `0.0.0.0` everywhere.
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
    fn the_start_page() {
        let page = welcome(&["127.0.0.1:8000".parse().unwrap()], "memory", true);
        let expected = "\
weir 0.1.0  memory bus  http://127.0.0.1:8000   open to this machine only, no keys

  watch    curl -N 'http://127.0.0.1:8000/v1/sse?channel=hello'       or open http://127.0.0.1:8000/
  publish  curl 'http://127.0.0.1:8000/v1/events?channel=hello' -d '{\"text\":\"hi\"}'
  call     curl 'http://127.0.0.1:8000/v1/services/weir/echo' -d '{\"n\":1}'
"
        .replace("0.1.0", env!("CARGO_PKG_VERSION"));
        assert_eq!(page, expected);
        let open = welcome(&["0.0.0.0:1".parse().unwrap(), "[::]:2".parse().unwrap()], "memory", false);
        assert!(open.contains("  http://127.0.0.1:1 http://[::1]:2   open to everybody, no keys\n"), "{open}");
    }
}
