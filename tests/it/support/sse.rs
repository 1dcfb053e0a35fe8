//! Clients of streams: one that parses server-sent events by the letter, and one that compares text.

use std::net::SocketAddr;

use serde_json::Value;

use super::{Client, Response};

/// A stream of server-sent events as the standard parses it (WHATWG HTML, section 9.2.6), and stricter where clients
/// are.
pub struct EventStream {
    pub client: Client,
    /// Of the body, decoded from chunks and not yet parsed.
    pub text: Vec<u8>,
    /// `None` before the head was read.
    chunked: Option<bool>,
    /// Whether the last chunk was received.
    pub ended: bool,
    pub id: String,
    pub retry: Option<u64>,
    pub comments: usize,
}

/// What the standard calls an event: a block of fields.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub id: String,
    pub event: String,
    pub data: String,
}

impl Block {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap()
    }

    pub fn offset(&self) -> u64 {
        self.json()["offset"].as_u64().unwrap()
    }
}

impl EventStream {
    /// On a connection whose next response is the stream.
    pub fn new(client: Client) -> Self {
        let (id, text) = Default::default();
        EventStream { client, text, chunked: None, ended: false, id, retry: None, comments: 0 }
    }

    /// Asks for a stream and does not wait for it.
    pub async fn open(address: SocketAddr, query: &str) -> Self {
        Self::request(address, &format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await
    }

    /// As [`open`](Self::open), resumed after an id.
    pub async fn resume(address: SocketAddr, query: &str, id: &str) -> Self {
        let head = format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\nlast-event-id: {id}\r\n\r\n");
        Self::request(address, &head).await
    }

    /// As [`open`](Self::open), with a request of any form.
    pub async fn request(address: SocketAddr, bytes: &str) -> Self {
        let mut client = Client::connect(address).await;
        client.write(bytes).await;
        Self::new(client)
    }

    /// A stream that has begun: its first block was read.
    pub async fn opened(address: SocketAddr, query: &str) -> Self {
        let mut stream = Self::open(address, query).await;
        stream.opening().await;
        stream
    }

    /// The head of the response.
    pub async fn head(&mut self) -> Response {
        let head = self.client.head().await;
        self.chunked = Some(head.header("transfer-encoding") == Some("chunked"));
        head
    }

    /// Reads some more into `text`. False at the end of the connection.
    pub async fn fill(&mut self) -> bool {
        let more = self.client.fill().await;
        self.decode();
        more
    }

    /// Moves what was received to `text`.
    fn decode(&mut self) {
        if self.chunked != Some(true) {
            self.text.append(&mut self.client.take());
            return;
        }
        while let Some(chunk) = self.client.take_chunk() {
            self.text.extend_from_slice(&chunk);
            if chunk.is_empty() {
                self.ended = true;
                assert!(self.client.take().is_empty(), "bytes after the last chunk");
                return;
            }
        }
    }

    /// The next event as a browser dispatches it; `None` at the end of the stream.
    pub async fn block(&mut self) -> Option<Block> {
        if self.chunked.is_none() {
            let head = self.head().await;
            assert_eq!((head.version.as_str(), head.status), ("HTTP/1.1", 200), "{head:?}");
        }
        let (mut event, mut data, mut lines) = (String::new(), String::new(), 0);
        self.decode();
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(self.text.drain(..=end).collect()).unwrap();
                let line = line.trim_end_matches('\n');
                assert!(!line.contains('\r'));
                if line.is_empty() {
                    // Some clients dispatch a block without data as an empty event.
                    assert!(lines > 0, "a block without data");
                    return Some(Block { id: self.id.clone(), event, data });
                }
                let (field, value) = line.split_once(':').unwrap();
                let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
                match field {
                    "" => self.comments += 1,
                    "retry" => self.retry = value.parse().ok(),
                    "event" => event = value,
                    "id" => self.id = value,
                    "data" => {
                        data += if lines > 0 { "\n" } else { "" };
                        data += &value;
                        lines += 1;
                    }
                    _ => panic!("unknown field {line:?}"),
                }
            } else if self.ended || !self.fill().await {
                return None;
            }
        }
    }

    pub async fn next(&mut self) -> Block {
        self.block().await.expect("the stream goes on")
    }

    pub async fn opening(&mut self) -> Block {
        let block = self.next().await;
        assert_eq!(block.event, "weir.open", "{block:?}");
        assert!((1000..4000).contains(&self.retry.unwrap()));
        block
    }

    /// Reads until the server has closed the connection.
    pub async fn closed(&mut self) {
        self.client.closed().await;
    }
}

/// A stream of any format, compared as text.
pub struct TextStream {
    client: Client,
    pub head: Response,
    /// Received and not yet compared.
    pub text: String,
}

impl TextStream {
    pub async fn open(address: SocketAddr, path: &str) -> Self {
        let mut client = Client::connect(address).await;
        client.send("GET", path, &[], b"").await;
        let head = client.head().await.expect(200);
        TextStream { client, head, text: String::new() }
    }

    /// Reads exactly this text.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> impl Future<Output = ()> {
        let at = std::panic::Location::caller();
        async move {
            while self.text.len() < text.len() {
                assert!(self.fill().await, "ended after {:?} ({at})", self.text);
            }
            let rest = self.text.split_off(text.len());
            assert_eq!(self.text, text, "{at}");
            self.text = rest;
        }
    }

    /// Reads until `condition` holds for the text, which stays.
    pub async fn read_until(&mut self, condition: impl Fn(&str) -> bool) -> &str {
        while !condition(&self.text) {
            assert!(self.fill().await, "ended after {:?}", self.text);
        }
        &self.text
    }

    /// Drops what was received.
    pub fn skip(&mut self) {
        self.text.clear();
    }

    /// Reads to the end.
    pub async fn rest(mut self) -> String {
        while self.fill().await {}
        self.text
    }

    /// False at the end of the body.
    async fn fill(&mut self) -> bool {
        let Some(chunk) = self.client.chunk().await else { return false };
        self.text += std::str::from_utf8(&chunk).unwrap();
        true
    }
}
