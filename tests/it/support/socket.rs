//! A WebSocket client that speaks JSON-RPC and shows every message.

use std::{collections::VecDeque, net::SocketAddr};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, client::IntoClientRequest, http::HeaderValue, http::Response},
};

use super::in_time;

pub struct Socket {
    stream: WebSocketStream<TcpStream>,
    /// Received while the test waited for another message.
    skipped: VecDeque<Value>,
    next_id: u64,
}

/// The socket and the response that opened it, or the response that did not.
pub type Handshake = Result<(Socket, Response<Option<Vec<u8>>>), Response<Option<Vec<u8>>>>;

impl Socket {
    pub async fn open(address: SocketAddr) -> Self {
        Self::open_at(address, "/v1/ws").await
    }

    pub async fn open_at(address: SocketAddr, path: &str) -> Self {
        Self::handshake(address, path, &[]).await.map(|(socket, _)| socket).expect("a handshake")
    }

    /// With headers of the caller's choice.
    pub async fn handshake(address: SocketAddr, path: &str, headers: &[(&'static str, &str)]) -> Handshake {
        let mut request = format!("ws://{address}{path}").into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let tcp = TcpStream::connect(address).await.unwrap();
        match in_time(client_async(request, tcp)).await {
            Ok((stream, response)) => Ok((Socket { stream, skipped: VecDeque::new(), next_id: 0 }, response)),
            Err(Error::Http(response)) => Err(*response),
            Err(error) => panic!("handshake: {error}"),
        }
    }

    pub async fn send(&mut self, text: impl Into<String>) {
        self.send_frame(Message::text(text.into())).await;
    }

    pub async fn send_json(&mut self, message: Value) {
        self.send(message.to_string()).await;
    }

    pub async fn send_frame(&mut self, message: Message) {
        self.stream.send(message).await.unwrap();
    }

    /// Queues a message without writing it to the connection.
    pub async fn feed(&mut self, text: impl Into<String>) {
        self.feed_frame(Message::text(text.into())).await;
    }

    pub async fn feed_frame(&mut self, message: Message) {
        self.stream.feed(message).await.unwrap();
    }

    pub async fn flush(&mut self) {
        self.stream.flush().await.unwrap();
    }

    /// The text of the next message, skipped ones left out.
    pub async fn text(&mut self) -> String {
        loop {
            match in_time(self.stream.next()).await {
                Some(Ok(Message::Text(text))) => return text.as_str().to_owned(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("not a text: {other:?}"),
            }
        }
    }

    /// The next frame, whatever its kind.
    pub async fn frame(&mut self) -> Message {
        in_time(self.stream.next()).await.unwrap().unwrap()
    }

    /// The next message.
    pub async fn next(&mut self) -> Value {
        match self.skipped.pop_front() {
            Some(message) => message,
            None => serde_json::from_str(&self.text().await).unwrap(),
        }
    }

    /// The first message for which `condition` holds. Messages before it are kept for later calls.
    pub async fn next_where(&mut self, condition: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.skipped.iter().position(&condition) {
            return self.skipped.remove(at).unwrap();
        }
        loop {
            let message: Value = serde_json::from_str(&self.text().await).unwrap();
            if condition(&message) {
                return message;
            }
            self.skipped.push_back(message);
        }
    }

    /// Sends a request and returns the whole response.
    pub async fn request(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = format!("t{}", self.next_id);
        self.send_json(json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await;
        self.next_where(|message| message["id"] == id.as_str()).await
    }

    /// The result of a request that succeeds.
    pub async fn call(&mut self, method: &str, params: Value) -> Value {
        let response = self.request(method, params).await;
        assert!(response.get("error").is_none(), "{method}: {response}");
        response["result"].clone()
    }

    /// The error of a request that fails.
    pub async fn call_error(&mut self, method: &str, params: Value) -> Value {
        let response = self.request(method, params).await;
        assert!(response.get("result").is_none(), "{method}: {response}");
        response["error"].clone()
    }

    pub async fn provide(&mut self, service: &str) {
        self.call("weir.provide", json!({ "service": service })).await;
    }

    /// The next request or notification of the hub.
    pub async fn next_request(&mut self) -> Value {
        self.next_where(|message| message.get("method").is_some()).await
    }

    pub async fn reply(&mut self, request: &Value, result: Value) {
        self.send_json(json!({ "jsonrpc": "2.0", "id": request["id"], "result": result })).await;
    }

    /// The params of the next notification of that method.
    pub async fn notification(&mut self, method: &str) -> Value {
        self.next_where(|message| message["method"] == method).await["params"].clone()
    }

    /// Asserts that nothing else was received so far.
    pub async fn expect_nothing(&mut self) {
        // What was sent before this response is received before it.
        self.call("weir/echo", json!({})).await;
        assert!(self.skipped.is_empty(), "{:?}", self.skipped);
    }

    /// Reads to the end and returns the close code and reason.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            match in_time(self.stream.next()).await {
                Some(Ok(Message::Close(Some(frame)))) => {
                    let end = (frame.code.into(), frame.reason.as_str().to_owned());
                    while let Some(Ok(_)) = in_time(self.stream.next()).await {}
                    return end;
                }
                Some(Ok(Message::Text(text))) => {
                    self.skipped.push_back(serde_json::from_str(text.as_str()).unwrap());
                }
                Some(Ok(Message::Close(None))) => return (1005, String::new()),
                Some(Ok(_)) => {}
                other => panic!("not a close: {other:?}"),
            }
        }
    }

    pub async fn close(&mut self, code: u16) {
        let frame = tokio_tungstenite::tungstenite::protocol::CloseFrame { code: code.into(), reason: "".into() };
        self.stream.close(Some(frame)).await.unwrap();
    }

    /// The TCP connection below.
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
