//! A client that speaks HTTP/1 and reads server-sent events by the letter, over a bare socket.

use serde_json::Value;
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::start::soon;

pub struct Client {
    pub socket: TcpStream,
    pub raw: Vec<u8>,
    pub text: Vec<u8>,
    /// `None` before the head was read.
    pub chunked: Option<bool>,
    pub ended: bool,
    pub id: String,
    pub retry: Option<u64>,
    pub comments: usize,
}

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

impl Client {
    pub fn new(socket: TcpStream) -> Self {
        let (id, raw, text) = Default::default();
        Client { socket, raw, text, chunked: None, ended: false, id, retry: None, comments: 0 }
    }

    /// False at the end of the connection.
    pub async fn fill(&mut self) -> bool {
        soon(self.socket.read_buf(&mut self.raw)).await.is_ok_and(|n| n > 0)
    }

    /// The head of the next response, in lower case.
    pub async fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.raw.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8(self.raw.drain(..end + 4).collect()).unwrap().to_lowercase();
                self.chunked = Some(head.contains("transfer-encoding: chunked"));
                return head;
            }
            assert!(self.fill().await, "closed instead of a head");
        }
    }

    /// The body of a response with a length.
    pub async fn body(&mut self, head: &str) -> String {
        let length = head.split("content-length: ").nth(1).unwrap().split('\r').next().unwrap().parse().unwrap();
        while self.raw.len() < length {
            assert!(self.fill().await);
        }
        String::from_utf8(self.raw.drain(..length).collect()).unwrap()
    }

    /// Moves whole chunks to `text`.
    pub fn unchunk(&mut self) {
        if self.chunked != Some(true) {
            self.text.append(&mut self.raw);
            return;
        }
        while let Some(line) = self.raw.windows(2).position(|two| two == b"\r\n") {
            let size = usize::from_str_radix(std::str::from_utf8(&self.raw[..line]).unwrap(), 16).unwrap();
            if self.raw.len() < line + 4 + size {
                return;
            }
            assert_eq!(&self.raw[line + 2 + size..line + 4 + size], b"\r\n");
            self.text.extend_from_slice(&self.raw[line + 2..line + 2 + size]);
            self.raw.drain(..line + 4 + size);
            if size == 0 {
                self.ended = true;
                assert!(self.raw.is_empty(), "more after the end");
                return;
            }
        }
    }

    /// The next event as a browser dispatches it; `None` at the end of the stream.
    pub async fn block(&mut self) -> Option<Block> {
        if self.chunked.is_none() {
            let head = self.head().await;
            assert!(head.starts_with("http/1.1 200 "), "{head}");
        }
        let (mut event, mut data, mut lines) = (String::new(), String::new(), 0);
        loop {
            self.unchunk();
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(self.text.drain(..=end).collect()).unwrap();
                let line = line.trim_end_matches('\n');
                assert!(!line.contains('\r'));
                if line.is_empty() {
                    // Nothing is sent that some client takes for an empty event.
                    assert!(lines > 0, "an empty block");
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
        self.block().await.expect("the stream has ended")
    }

    pub async fn opening(&mut self) -> Block {
        let block = self.next().await;
        assert_eq!(block.event, "weir.open", "{block:?}");
        assert!((1000..4000).contains(&self.retry.unwrap()));
        block
    }

    /// Whether the server has closed the connection, however.
    pub async fn closed(&mut self) {
        while self.fill().await {}
    }
}
