//! A WebSocket client that shows every message.

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, client::IntoClientRequest, http::HeaderValue, http::Response},
};

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Socket {
    stream: WebSocketStream<TcpStream>,
    /// Came while something else was waited for.
    kept: VecDeque<Value>,
    next_id: u64,
}

/// What the handshake came to.
pub type Shaken = Result<(Socket, Response<Option<Vec<u8>>>), Response<Option<Vec<u8>>>>;

impl Socket {
    pub async fn open(at: SocketAddr) -> Self {
        Self::open_at(at, "/v1/ws").await
    }

    pub async fn open_at(at: SocketAddr, path: &str) -> Self {
        Self::shake(at, path, &[]).await.map(|(socket, _)| socket).expect("a handshake")
    }

    /// With headers of the caller's choice.
    pub async fn shake(at: SocketAddr, path: &str, headers: &[(&'static str, &str)]) -> Shaken {
        let mut request = format!("ws://{at}{path}").into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let tcp = TcpStream::connect(at).await.unwrap();
        match soon(client_async(request, tcp)).await {
            Ok((stream, response)) => Ok((Socket { stream, kept: VecDeque::new(), next_id: 0 }, response)),
            Err(Error::Http(response)) => Err(*response),
            Err(error) => panic!("handshake: {error}"),
        }
    }

    pub async fn send(&mut self, text: impl Into<String>) {
        self.stream.send(Message::text(text.into())).await.unwrap();
    }

    pub async fn json(&mut self, message: Value) {
        self.send(message.to_string()).await;
    }

    pub async fn raw(&mut self, message: Message) {
        self.stream.send(message).await.unwrap();
    }

    /// Queues without writing it out.
    pub async fn feed(&mut self, text: impl Into<String>) {
        self.stream.feed(Message::text(text.into())).await.unwrap();
    }

    pub async fn flush(&mut self) {
        self.stream.flush().await.unwrap();
    }

    /// The text of the next message.
    pub async fn text(&mut self) -> String {
        loop {
            match soon(self.stream.next()).await {
                Some(Ok(Message::Text(text))) => return text.as_str().to_owned(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("instead of a text: {other:?}"),
            }
        }
    }

    /// The next message, whatever it is.
    pub async fn message(&mut self) -> Message {
        soon(self.stream.next()).await.unwrap().unwrap()
    }

    /// The next message.
    pub async fn next(&mut self) -> Value {
        match self.kept.pop_front() {
            Some(kept) => kept,
            None => serde_json::from_str(&self.text().await).unwrap(),
        }
    }

    /// The next message that `wanted` picks; others are kept.
    pub async fn pick(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.kept.iter().position(&wanted) {
            return self.kept.remove(at).unwrap();
        }
        loop {
            let message: Value = serde_json::from_str(&self.text().await).unwrap();
            if wanted(&message) {
                return message;
            }
            self.kept.push_back(message);
        }
    }

    /// The answer to a request, whole.
    pub async fn ask(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = format!("t{}", self.next_id);
        self.json(json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await;
        self.pick(|message| message["id"] == id.as_str()).await
    }

    /// The result of a request that succeeds.
    pub async fn ok(&mut self, method: &str, params: Value) -> Value {
        let answer = self.ask(method, params).await;
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    /// The error of a request that fails.
    pub async fn refused(&mut self, method: &str, params: Value) -> Value {
        let answer = self.ask(method, params).await;
        assert!(answer.get("result").is_none(), "{method}: {answer}");
        answer["error"].clone()
    }

    pub async fn provide(&mut self, service: &str) {
        self.ok("weir.provide", json!({ "service": service })).await;
    }

    /// The next request of the hub.
    pub async fn request(&mut self) -> Value {
        self.pick(|message| message.get("method").is_some()).await
    }

    pub async fn reply(&mut self, request: &Value, result: Value) {
        self.json(json!({ "jsonrpc": "2.0", "id": request["id"], "result": result })).await;
    }

    /// The next event or other notification of weir, and its params.
    pub async fn notice(&mut self, method: &str) -> Value {
        self.pick(|message| message["method"] == method).await["params"].clone()
    }

    /// Nothing else has come, up to now.
    pub async fn quiet(&mut self) {
        // What was sent before this answer has come before it.
        self.ok("weir/echo", json!({})).await;
        assert!(self.kept.is_empty(), "{:?}", self.kept);
    }

    /// Reads to the end: the close code and reason.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            match soon(self.stream.next()).await {
                Some(Ok(Message::Close(Some(frame)))) => {
                    let end = (frame.code.into(), frame.reason.as_str().to_owned());
                    while let Some(Ok(_)) = soon(self.stream.next()).await {}
                    return end;
                }
                Some(Ok(Message::Text(text))) => {
                    self.kept.push_back(serde_json::from_str(text.as_str()).unwrap());
                }
                Some(Ok(Message::Close(None))) => return (1005, String::new()),
                Some(Ok(_)) => {}
                other => panic!("instead of a close: {other:?}"),
            }
        }
    }

    pub async fn close(&mut self, code: u16) {
        let frame = tokio_tungstenite::tungstenite::protocol::CloseFrame { code: code.into(), reason: "".into() };
        self.stream.close(Some(frame)).await.unwrap();
    }

    /// The bare connection.
    pub fn tcp(self) -> TcpStream {
        self.stream.into_inner()
    }
}

/// The names of an object's members, sorted.
pub fn members(object: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("nothing came")
}

/// Waits for a condition that nothing announces.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
