//! A TCP proxy that can be interrupted, before a Redis or before a node.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    Forward,
    /// Closes all connections, new ones too.
    Close,
    /// Keeps all connections open and forwards nothing, as if a cable was pulled out.
    Blackhole,
    /// Forwards what clients send and holds back what the server sends.
    HoldReplies,
}

pub struct TcpProxy {
    pub port: u16,
    upstream: Arc<AtomicU16>,
    mode: Arc<watch::Sender<ProxyMode>>,
    resets: Arc<watch::Sender<u64>>,
    task: JoinHandle<()>,
}

impl TcpProxy {
    /// Starts a proxy before a port of this machine.
    pub async fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mode = Arc::new(watch::Sender::new(ProxyMode::Forward));
        let upstream = Arc::new(AtomicU16::new(upstream));
        let resets = Arc::new(watch::Sender::new(0));
        let task = tokio::spawn({
            let (mode, upstream, resets) = (mode.clone(), upstream.clone(), resets.clone());
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let upstream = SocketAddr::from(([127, 0, 0, 1], upstream.load(SeqCst)));
                    tokio::spawn(forward(client, upstream, mode.subscribe(), resets.subscribe()));
                }
            }
        });
        TcpProxy { port, upstream, mode, resets, task }
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    pub fn redis_url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Sends new connections to another port. Connections that exist stay.
    pub fn redirect(&self, port: u16) {
        self.upstream.store(port, SeqCst);
    }

    /// Closes all connections and sends new ones to another port.
    pub fn move_to(&self, port: u16) {
        self.redirect(port);
        self.set(ProxyMode::Forward);
        self.disconnect();
    }

    /// Closes all connections. New ones are accepted.
    pub fn disconnect(&self) {
        self.resets.send_modify(|n| *n += 1);
    }

    pub fn set(&self, mode: ProxyMode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(
    client: TcpStream,
    upstream: SocketAddr,
    mut mode: watch::Receiver<ProxyMode>,
    mut resets: watch::Receiver<u64>,
) {
    if *mode.borrow() == ProxyMode::Close {
        return;
    }
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, mode.clone(), |mode| {
        matches!(mode, ProxyMode::Forward | ProxyMode::HoldReplies)
    });
    let down = pump(server_read, client_write, mode.clone(), |mode| mode == ProxyMode::Forward);
    tokio::select! {
        _ = up => {}
        _ = down => {}
        _ = mode.wait_for(|mode| *mode == ProxyMode::Close) => {}
        _ = resets.changed() => {}
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut mode: watch::Receiver<ProxyMode>,
    open: fn(ProxyMode) -> bool,
) {
    let mut buf = vec![0; 16 * 1024];
    loop {
        let Ok(n @ 1..) = from.read(&mut buf).await else { return };
        // Bytes in flight when the proxy was interrupted are lost if it closes then, as on a real network.
        if mode.wait_for(|mode| open(*mode)).await.is_err() || to.write_all(&buf[..n]).await.is_err() {
            return;
        }
    }
}
