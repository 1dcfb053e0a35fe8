//! A wire between one weir and its Redis that can be cut.

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

/// What the wire does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Whole,
    /// Connections are closed, new ones too.
    Cut,
    /// Everything stays open, and nothing goes through: a cable that was pulled out.
    Silent,
    /// What weir says goes through, what Redis answers does not.
    Deaf,
}

pub struct Proxy {
    pub port: u16,
    upstream: Arc<AtomicU16>,
    wire: Arc<watch::Sender<Wire>>,
    cuts: Arc<watch::Sender<u64>>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub async fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Arc::new(watch::Sender::new(Wire::Whole));
        let upstream = Arc::new(AtomicU16::new(upstream));
        let cuts = Arc::new(watch::Sender::new(0));
        let task = tokio::spawn({
            let (wire, upstream, cuts) = (wire.clone(), upstream.clone(), cuts.clone());
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let upstream = SocketAddr::from(([127, 0, 0, 1], upstream.load(SeqCst)));
                    tokio::spawn(carry(client, upstream, wire.subscribe(), cuts.subscribe()));
                }
            }
        });
        Proxy { port, upstream, wire, cuts, task }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Where new connections go.
    pub fn lead_to(&self, port: u16) {
        self.upstream.store(port, SeqCst);
    }

    /// Closes the connections there are. New ones go where it leads to now.
    pub fn move_to(&self, port: u16) {
        self.lead_to(port);
        self.set(Wire::Whole);
        self.cuts.send_modify(|n| *n += 1);
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    client: TcpStream,
    upstream: SocketAddr,
    mut wire: watch::Receiver<Wire>,
    mut cuts: watch::Receiver<u64>,
) {
    if *wire.borrow() == Wire::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, wire.clone(), |wire| matches!(wire, Wire::Whole | Wire::Deaf));
    let down = pump(server_read, client_write, wire.clone(), |wire| wire == Wire::Whole);
    tokio::select! {
        _ = up => {}
        _ = down => {}
        _ = wire.wait_for(|wire| *wire == Wire::Cut) => {}
        _ = cuts.changed() => {}
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut wire: watch::Receiver<Wire>,
    open: fn(Wire) -> bool,
) {
    let mut buf = vec![0; 16 * 1024];
    loop {
        let Ok(n @ 1..) = from.read(&mut buf).await else { return };
        // What was on its way when the wire was interrupted stays lost if it is cut, as on a real one.
        if wire.wait_for(|wire| open(*wire)).await.is_err() || to.write_all(&buf[..n]).await.is_err() {
            return;
        }
    }
}
