//! A small HTTP/1.1 client that hides nothing and corrects nothing.

use std::{
    future::{Future, IntoFuture},
    net::SocketAddr,
    pin::Pin,
};

use bytes::Bytes;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::in_time;

/// One connection.
pub struct Client {
    pub socket: TcpStream,
    host: String,
    /// Received and not yet consumed.
    buffer: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Response {
    /// `HTTP/1.1` or `HTTP/1.0`.
    pub version: String,
    pub status: u16,
    /// Names are in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// A request, sent on a connection of its own when awaited.
#[must_use]
pub struct Request {
    address: SocketAddr,
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

/// The JSON at a path.
pub async fn get_json(address: SocketAddr, path: &str) -> Value {
    Request::new(address, "GET", path).await.expect(200).json()
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Client::new(TcpStream::connect(address).await.unwrap())
    }

    /// On a socket that is connected already.
    pub fn new(socket: TcpStream) -> Self {
        let host = socket.peer_addr().unwrap().to_string();
        Client { socket, host, buffer: Vec::new() }
    }

    /// Writes bytes as they are.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Writes a request and does not wait for the response.
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

    pub async fn get(&mut self, path: &str) -> Response {
        self.send("GET", path, &[], b"").await;
        self.response().await
    }

    pub async fn post(&mut self, path: &str, body: &str) -> Response {
        self.send("POST", path, &[], body.as_bytes()).await;
        self.response().await
    }

    /// Reads the head of a response and leaves its body.
    pub async fn head(&mut self) -> Response {
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            assert!(self.fill().await, "the connection ended in a head: {:?}", String::from_utf8_lossy(&self.buffer));
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let mut first = lines.next().unwrap().split(' ');
        let (version, status) = (first.next().unwrap().to_owned(), first.next().unwrap().parse().unwrap());
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Response { version, status, headers: lines.map(header).collect(), body: Bytes::new() }
    }

    /// Reads one whole response to a request other than HEAD.
    pub async fn response(&mut self) -> Response {
        let mut response = self.head().await;
        if response.header("transfer-encoding") == Some("chunked") {
            let mut body = Vec::new();
            while let Some(chunk) = self.chunk().await {
                body.extend_from_slice(&chunk);
            }
            response.body = body.into();
        } else if let Some(length) = response.header("content-length") {
            response.body = self.read(length.parse().unwrap()).await.into();
        } else if !matches!(response.status, 204 | 304) {
            while self.fill().await {}
            response.body = self.take().into();
        }
        response
    }

    /// Reads one chunk of a body. `None` is the last one.
    pub async fn chunk(&mut self) -> Option<Bytes> {
        loop {
            if let Some(chunk) = self.take_chunk() {
                return (!chunk.is_empty()).then_some(chunk);
            }
            assert!(self.fill().await, "the connection ended in a chunk");
        }
    }

    /// Reads chunks until they have `length` bytes or more.
    pub async fn chunks(&mut self, length: usize) -> String {
        let mut text = Vec::new();
        while text.len() < length {
            text.extend_from_slice(&self.chunk().await.expect("the body goes on"));
        }
        String::from_utf8(text).unwrap()
    }

    /// Reads `length` bytes as they are.
    pub async fn read(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert!(self.fill().await, "the connection ended early");
        }
        self.buffer.drain(..length).collect()
    }

    /// Whether the server has closed the connection, with nothing more to read.
    pub async fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && !self.fill().await
    }

    /// Reads until the server has closed the connection.
    pub async fn closed(&mut self) {
        while self.fill().await {}
    }

    /// Reads some bytes into the buffer. False at the end of the connection.
    pub async fn fill(&mut self) -> bool {
        matches!(in_time(self.socket.read_buf(&mut self.buffer)).await, Ok(1..))
    }

    /// Everything that was received and not consumed.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// One chunk, if a whole one was received. The last one is empty.
    pub fn take_chunk(&mut self) -> Option<Bytes> {
        let line = find(&self.buffer, b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&self.buffer[..line]).unwrap(), 16).unwrap();
        let end = line + 2 + size;
        if self.buffer.len() < end + 2 {
            return None;
        }
        assert_eq!(&self.buffer[end..end + 2], b"\r\n");
        let chunk = self.buffer[line + 2..end].to_vec();
        self.buffer.drain(..end + 2);
        Some(chunk.into())
    }
}

impl Request {
    pub fn new(address: SocketAddr, method: &'static str, path: impl Into<String>) -> Self {
        Request { address, method, path: path.into(), headers: Vec::new(), body: Bytes::new() }
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
    type Output = Response;
    type IntoFuture = Pin<Box<dyn Future<Output = Response> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let mut client = Client::connect(self.address).await;
            let headers: Vec<_> = self.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
            client.send(self.method, &self.path, &headers, &self.body).await;
            if self.method == "HEAD" { client.head().await } else { client.response().await }
        })
    }
}

impl Response {
    /// The first header of a name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }

    /// All headers of a name, joined by commas (RFC 9110, section 5.3).
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

    /// Panics unless the response has this status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self
    }

    /// Panics unless this is a problem document (RFC 9457) with that code and the status that belongs to it.
    #[track_caller]
    pub fn expect_problem(self, code: &str) -> Value {
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
