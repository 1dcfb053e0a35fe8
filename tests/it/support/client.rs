//! A small HTTP/1.1 client that hides nothing and mends nothing.

use std::{
    future::{Future, IntoFuture},
    net::SocketAddr,
    pin::Pin,
    time::Duration,
};

use bytes::Bytes;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Longer than anything that works takes, so that what does not work fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(20);

/// One connection.
pub struct Client {
    socket: TcpStream,
    host: String,
    /// Read and not consumed.
    buffer: Vec<u8>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// A request to be sent: await it.
#[must_use]
pub struct Request {
    address: SocketAddr,
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        Client { socket, host: address.to_string(), buffer: Vec::new() }
    }

    /// Writes bytes as they are.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Writes a request without waiting for its answer.
    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut out = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            out += &format!("Host: {}\r\n", self.host);
        }
        for (name, value) in headers {
            out += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() || method == "POST" {
            out += &format!("Content-Length: {}\r\n", body.len());
        }
        out += "\r\n";
        let mut out = out.into_bytes();
        out.extend_from_slice(body);
        self.write(out).await;
    }

    pub async fn get(&mut self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await;
        self.reply().await
    }

    pub async fn post(&mut self, path: &str, body: &str) -> Reply {
        self.send("POST", path, &[], body.as_bytes()).await;
        self.reply().await
    }

    /// Reads the head of an answer; the body is still to come.
    pub async fn head(&mut self) -> Reply {
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            assert!(self.fill().await, "the connection ended in a head: {:?}", String::from_utf8_lossy(&self.buffer));
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Reply { status, headers: lines.map(header).collect(), body: Bytes::new() }
    }

    /// Reads one whole answer to something other than HEAD.
    pub async fn reply(&mut self) -> Reply {
        let mut reply = self.head().await;
        if reply.header("transfer-encoding") == Some("chunked") {
            let mut body = Vec::new();
            while let Some(chunk) = self.chunk().await {
                body.extend_from_slice(&chunk);
            }
            reply.body = body.into();
        } else if let Some(length) = reply.header("content-length") {
            let length = length.parse().unwrap();
            while self.buffer.len() < length {
                assert!(self.fill().await, "the connection ended in a body");
            }
            reply.body = self.buffer.drain(..length).collect::<Vec<_>>().into();
        } else if !matches!(reply.status, 204 | 304) {
            while self.fill().await {}
            reply.body = std::mem::take(&mut self.buffer).into();
        }
        reply
    }

    /// Reads one chunk; `None` is the last.
    pub async fn chunk(&mut self) -> Option<Bytes> {
        let line = loop {
            if let Some(at) = find(&self.buffer, b"\r\n") {
                break at;
            }
            assert!(self.fill().await, "the connection ended in a chunk");
        };
        let size = std::str::from_utf8(&self.buffer[..line]).unwrap().to_owned();
        let size = usize::from_str_radix(&size, 16).unwrap();
        while self.buffer.len() < line + 2 + size + 2 {
            assert!(self.fill().await, "the connection ended in a chunk");
        }
        let chunk = self.buffer[line + 2..line + 2 + size].to_vec();
        self.buffer.drain(..line + 2 + size + 2);
        (size > 0).then(|| chunk.into())
    }

    /// Reads so many bytes as they are.
    pub async fn read(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert!(self.fill().await, "the connection ended early");
        }
        self.buffer.drain(..length).collect()
    }

    /// Whether the server has closed the connection, without an answer or after the last one.
    pub async fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && !self.fill().await
    }

    /// Reads some more. False at the end of the connection.
    async fn fill(&mut self) -> bool {
        let read = tokio::time::timeout(PATIENCE, self.socket.read_buf(&mut self.buffer)).await;
        matches!(read.expect("an answer in time"), Ok(1..))
    }
}

impl Request {
    pub fn new(address: SocketAddr, method: &'static str, path: String) -> Self {
        Request { address, method, path, headers: Vec::new(), body: Bytes::new() }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }
}

impl IntoFuture for Request {
    type Output = Reply;
    type IntoFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let mut client = Client::connect(self.address).await;
            let headers: Vec<_> = self.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
            client.send(self.method, &self.path, &headers, &self.body).await;
            if self.method == "HEAD" { client.head().await } else { client.reply().await }
        })
    }
}

impl Reply {
    /// The first header of a name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }

    /// All headers of a name, joined by commas as they may be.
    pub fn all(&self, name: &str) -> String {
        let values = self.headers.iter().filter(|(given, _)| given.eq_ignore_ascii_case(name));
        values.map(|(_, value)| &**value).collect::<Vec<_>>().join(", ")
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Panics unless the status is this.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self
    }

    /// Panics unless this is a problem document of that code, with the status that belongs to it.
    #[track_caller]
    pub fn refused(self, code: &str) -> Value {
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], self.status, "{problem}");
        assert_eq!(problem["type"], format!("urn:weir:error:{code}"));
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let known = weir::error::Code::ALL.into_iter().find(|known| known.as_str() == code).expect("a known code");
        if code != "service_error" && code != "method_not_found" {
            assert_eq!(self.status, known.status(), "{problem}");
        }
        problem
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}
