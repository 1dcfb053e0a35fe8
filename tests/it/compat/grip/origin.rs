//! An origin: an HTTP server whose responses the test writes byte for byte.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// A listening server and the requests that it has received.
pub struct Origin {
    pub address: SocketAddr,
    exchanges: mpsc::UnboundedReceiver<Exchange>,
}

/// One request and the connection that waits for its response.
pub struct Exchange {
    pub head: String,
    pub body: Vec<u8>,
    socket: TcpStream,
    back: mpsc::UnboundedSender<TcpStream>,
}

impl Origin {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tx, exchanges) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (back, mut returned) = mpsc::unbounded_channel();
            loop {
                let socket = tokio::select! {
                    Ok((socket, _)) = listener.accept() => socket,
                    Some(socket) = returned.recv() => socket,
                };
                let (tx, back) = (tx.clone(), back.clone());
                tokio::spawn(async move {
                    if let Some(exchange) = read(socket, back).await {
                        let _ = tx.send(exchange);
                    }
                });
            }
        });
        Origin { address, exchanges }
    }

    /// The next request.
    pub async fn next(&mut self) -> Exchange {
        let next = tokio::time::timeout(std::time::Duration::from_secs(20), self.exchanges.recv());
        next.await.expect("a request in time").unwrap()
    }

    /// Whether no request has arrived.
    pub fn is_quiet(&mut self) -> bool {
        self.exchanges.try_recv().is_err()
    }
}

async fn read(mut socket: TcpStream, back: mpsc::UnboundedSender<TcpStream>) -> Option<Exchange> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let body = bytes.split_off(end);
    let head = String::from_utf8(bytes).unwrap();
    Some(Exchange { head, body, socket, back })
}

impl Exchange {
    /// The value of a header of the request.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.find_map(|(given, value)| given.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The first line, without the version.
    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap().trim_end_matches(" HTTP/1.1")
    }

    /// Reads the first `length` bytes of the body.
    pub async fn body(&mut self, length: usize) -> &[u8] {
        while self.body.len() < length {
            assert!(self.socket.read_buf(&mut self.body).await.unwrap() > 0, "the body ended early");
        }
        &self.body
    }

    /// Reads up to the end of a chunked body.
    pub async fn chunks(&mut self) -> &[u8] {
        while !self.body.ends_with(b"\r\n0\r\n\r\n") {
            assert!(self.socket.read_buf(&mut self.body).await.unwrap() > 0, "the body ended early");
        }
        &self.body
    }

    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).await.unwrap();
    }

    pub async fn read(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        let n = self.socket.read(&mut bytes).await.unwrap_or(0);
        bytes.truncate(n);
        bytes
    }

    /// Responds with status 200 and accepts the next request of the connection.
    pub async fn answer(mut self, headers: &[(&str, &str)], body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        let mut head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        self.write(head + "\r\n").await;
        self.write(body).await;
        self.done();
    }

    /// Accepts the next request of the connection.
    pub fn done(self) {
        let _ = self.back.send(self.socket);
    }

    /// Waits until the proxy has closed the connection.
    pub async fn is_cancelled(&mut self) -> bool {
        tokio::time::timeout(std::time::Duration::from_secs(20), self.read()).await.expect("a close in time").is_empty()
    }
}
