//! [`RedisConnection`], one connection to one server, for as long as it lasts.
//!
//! Everybody's commands go out in one stream, many in one write, and the answers come back in the same order. A connection
//! knows which commands have left this process: when it breaks, what never left was surely not done.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::{Notify, oneshot},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{self, ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::ServerName},
};
use tokio_util::sync::CancellationToken;

use super::{
    resp::{self, Command, Value},
    url::{Address, RedisUrl},
};

/// A server that is asked this often whether it still is who it was...
const BEAT: Duration = Duration::from_secs(1);
/// ...and says nothing for so long is away, whatever its TCP says.
const SILENCE: Duration = Duration::from_secs(4);
const CONNECT: Duration = Duration::from_secs(4);
/// What is worth a write of its own.
const BATCH: usize = 4 << 10;
/// What one connection may hold of what waits to be sent, and how many answers it may wait for.
const MAX_BYTES: usize = 64 << 20;
const MAX_WAITING: usize = 100_000;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// It was surely not done: it never left this process, or Redis said so.
    NotExecuted(Box<str>),
    /// It may have been done: it was sent, and the answer is lost.
    Unconfirmed,
    /// Redis answered with an error.
    Rejected(Box<str>),
}

/// What a connection hears that nobody asked for.
pub trait PushHandler: Send + Sync + 'static {
    /// A push: its kind first, as `message`.
    fn push(&self, items: Vec<Value>);

    /// An error that is no answer: SUBSCRIBE is answered by pushes, but may be refused.
    fn refused(&self, error: &str);
}

/// For connections without subscriptions.
pub struct NoPush;

impl PushHandler for NoPush {
    fn push(&self, _: Vec<Value>) {}

    fn refused(&self, _: &str) {}
}

/// What a server said of itself when we connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerIdentity {
    /// Another one whenever the process was started, or made master again: what it had before may be lost since.
    pub generation: Box<str>,
    pub version: (u16, u16),
    /// It may forget what it likes when its memory is full.
    pub evicts: bool,
    /// Its clock when we connected, Unix milliseconds.
    pub time: u64,
    /// From this second on it has been the one that is written to; as far as we can know.
    pub since: u64,
}

pub struct RedisConnection {
    /// No other connection of this process has it.
    pub number: u64,
    pub address: Address,
    pub server: ServerIdentity,
    /// When that was.
    opened: Instant,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something is there to be sent.
    wake: Notify,
    closed: CancellationToken,
}

#[derive(Default)]
struct State {
    out: Vec<u8>,
    /// Who waits for an answer, in the order of the commands.
    waiting: VecDeque<Option<oneshot::Sender<Result<Value, CommandError>>>>,
    /// How many of those have been handed to the socket.
    sent: usize,
    /// From the first command on that is not answered, an error is not the answer to what waits.
    told: bool,
    ended: bool,
}

/// An answer that is on its way. Dropped, nobody hears it; the command is done all the same.
#[must_use]
pub struct Answer(Result<oneshot::Receiver<Result<Value, CommandError>>, Option<CommandError>>);

impl Future for Answer {
    type Output = Result<Value, CommandError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Ok(receiver) => {
                // Who answers is not dropped without an answer; if it were, nobody would know what became of it.
                Pin::new(receiver).poll(cx).map(|got| got.unwrap_or(Err(CommandError::Unconfirmed)))
            }
            Err(fault) => Poll::Ready(Err(fault.take().unwrap_or(CommandError::Unconfirmed))),
        }
    }
}

fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl RedisConnection {
    /// Connects, and asks the server who it is. Fails with a sentence.
    pub async fn open(
        url: &RedisUrl,
        address: &Address,
        name: &str,
        ears: &(dyn Fn(u64) -> Arc<dyn PushHandler> + Send + Sync),
    ) -> Result<Self, String> {
        let opening = async {
            let stream = connect(url, address).await.map_err(|error| format!("{address}: {error}"))?;
            let number = next_number();
            let mut connection = RedisConnection::over(stream, address.clone(), number, ears(number));
            connection.server = connection.greet(url, name).await?;
            connection.opened = Instant::now();
            tokio::spawn(watch(connection.shared.clone(), connection.server.generation.clone()));
            Ok(connection)
        };
        tokio::time::timeout(CONNECT, opening).await.unwrap_or_else(|_| Err(format!("{address}: no answer")))
    }

    /// As [`open`](Self::open), for somebody who only knows where others are: a sentinel, or any server of a Cluster.
    pub async fn open_guide(url: &RedisUrl, address: &Address) -> Result<Self, String> {
        let opening = async {
            let stream = connect(url, address).await.map_err(|error| format!("{address}: {error}"))?;
            let connection = RedisConnection::over(stream, address.clone(), next_number(), Arc::new(NoPush));
            // A sentinel has logins of its own, and most have none.
            if url.is_cluster() {
                connection.hello(url, "weir-guide").await?;
            }
            Ok(connection)
        };
        tokio::time::timeout(CONNECT, opening).await.unwrap_or_else(|_| Err(format!("{address}: no answer")))
    }

    fn over(stream: Box<dyn Stream>, address: Address, number: u64, ear: Arc<dyn PushHandler>) -> Self {
        let shared =
            Arc::new(Shared { state: Mutex::default(), wake: Notify::new(), closed: CancellationToken::new() });
        let (read, write) = tokio::io::split(stream);
        tokio::spawn(write_loop(shared.clone(), write));
        tokio::spawn(read_loop(shared.clone(), read, ear));
        let server = ServerIdentity { generation: "".into(), version: (0, 0), evicts: false, time: 0, since: 0 };
        RedisConnection { number, address, server, opened: Instant::now(), shared }
    }

    fn why(&self, what: &str, fault: CommandError) -> String {
        let at = &self.address;
        match fault {
            CommandError::Rejected(error) => format!("{at} refuses {what}: {error}"),
            CommandError::NotExecuted(reason) => format!("{at}: {reason}"),
            CommandError::Unconfirmed => format!("{at}: the connection broke at {what}"),
        }
    }

    async fn hello(&self, url: &RedisUrl, name: &str) -> Result<(), String> {
        let mut hello = Command::new("HELLO").arg("3");
        if let Some(password) = &url.password {
            hello = hello.arg("AUTH").arg(url.user.as_deref().unwrap_or("default")).arg(password);
        }
        let hello = hello.arg("SETNAME").arg(name);
        match self.ask(&hello).await {
            Ok(_) => Ok(()),
            Err(CommandError::Rejected(error))
                if error.starts_with("ERR unknown command") || error.starts_with("NOPROTO") =>
            {
                Err(format!("{} is too old: weir needs Redis 6.2 or newer, or Valkey", self.address))
            }
            Err(fault) => Err(self.why("HELLO", fault)),
        }
    }

    async fn greet(&self, url: &RedisUrl, name: &str) -> Result<ServerIdentity, String> {
        let at = &self.address;
        let said = |what: &str, fault: CommandError| self.why(what, fault);
        self.hello(url, name).await?;
        if url.database > 0 {
            let select = Command::new("SELECT").int(url.database.into());
            self.ask(&select).await.map_err(|fault| said("SELECT", fault))?;
        }
        let info = self.ask(&Command::new("INFO")).await.map_err(|fault| said("INFO", fault))?;
        let time = self.ask(&Command::new("TIME")).await.map_err(|fault| said("TIME", fault))?;
        let info = info.text().unwrap_or_default();
        let field = |name: &str| field(info, name);
        let version = field("redis_version").unwrap_or_default();
        let mut numbers = version.split('.').map(|part| part.parse().unwrap_or_default());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        // Valkey calls itself Redis 7.2.4 in this field.
        let needed = if url.is_cluster() { (7, 0) } else { (6, 2) };
        if version < needed {
            let (major, minor) = needed;
            let what = if url.is_cluster() { "a Redis Cluster (sharded pub/sub)" } else { "Redis" };
            let (is, of) = version;
            return Err(format!("{at} is Redis {is}.{of}: of {what} weir needs {major}.{minor} or newer, or Valkey"));
        }
        let clustered = field("redis_mode") == Some("cluster") || field("cluster_enabled") == Some("1");
        if clustered && !url.is_cluster() {
            return Err(format!("{at} is part of a Redis Cluster: write redis-cluster://{at}"));
        }
        if !clustered && url.is_cluster() {
            return Err(format!("{at} is not part of a Redis Cluster: write redis://{at}"));
        }
        if field("role") != Some("master") {
            return Err(format!("{at} is a replica now, not the master"));
        }
        let generation =
            generation(field("run_id"), field("master_replid")).ok_or(format!("{at} does not say who it is"))?;
        let limited = field("maxmemory").is_some_and(|bytes| bytes != "0");
        let evicts = limited && field("maxmemory_policy").is_some_and(|policy| policy != "noeviction");
        let parts = time.list().unwrap_or_default();
        let part = |n: usize| parts.get(n).and_then(Value::int).unwrap_or_default();
        // One that was made master, and not started as such, does not say when.
        let uptime = field("uptime_in_seconds").and_then(|text| text.parse().ok()).unwrap_or(0);
        let born_master = field("second_repl_offset") == Some("-1");
        let since = part(0).saturating_sub(if born_master { uptime } else { 0 }) + 1;
        Ok(ServerIdentity { generation, version, evicts, time: part(0) * 1000 + part(1) / 1000, since })
    }

    /// Sends a command that is answered.
    pub fn ask(&self, command: &Command) -> Answer {
        self.shared.ask(&[command])
    }

    /// Sends a command right behind another whose answer does not matter, as `ASKING`.
    pub fn ask_after(&self, first: &Command, command: &Command) -> Answer {
        self.shared.ask(&[first, command])
    }

    /// Sends a command that is answered by pushes, as `SUBSCRIBE`.
    pub fn tell(&self, command: &Command) -> Result<(), CommandError> {
        let mut state = self.shared.state.lock();
        self.shared.room(&state, command.size())?;
        command.write(&mut state.out);
        state.told = true;
        drop(state);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// What the clock of the server showed at a moment, Unix milliseconds; never less than when we connected.
    pub fn time_at(&self, moment: Instant) -> u64 {
        self.server.time + moment.saturating_duration_since(self.opened).as_millis() as u64
    }

    /// How long we have been connected.
    pub fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// Ends it: what was sent is lost, what was not is away.
    pub fn close(&self) {
        self.shared.closed.cancel();
    }

    pub fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }

    /// Waits for the end of it.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
}

impl Drop for RedisConnection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Sends commands; the answer is that to the last.
    fn ask(&self, commands: &[&Command]) -> Answer {
        let mut state = self.state.lock();
        if let Err(fault) = self.room(&state, commands.iter().map(|command| command.size()).sum()) {
            return Answer(Err(Some(fault)));
        }
        let (tx, rx) = oneshot::channel();
        for command in commands {
            command.write(&mut state.out);
        }
        for _ in 1..commands.len() {
            state.waiting.push_back(None);
        }
        state.waiting.push_back(Some(tx));
        drop(state);
        self.wake.notify_one();
        Answer(Ok(rx))
    }

    fn room(&self, state: &State, bytes: usize) -> Result<(), CommandError> {
        if state.ended || self.closed.is_cancelled() {
            return Err(CommandError::NotExecuted("the connection to Redis is closed".into()));
        }
        if state.out.len() + bytes > MAX_BYTES.max(bytes) || state.waiting.len() >= MAX_WAITING {
            return Err(CommandError::NotExecuted("too much waits for Redis".into()));
        }
        Ok(())
    }

    /// Tells everybody who waits.
    fn end(&self) {
        self.closed.cancel();
        let mut state = self.state.lock();
        state.ended = true;
        let sent = std::mem::take(&mut state.sent);
        let waiting = std::mem::take(&mut state.waiting);
        state.out = Vec::new();
        drop(state);
        for (at, waiting) in waiting.into_iter().enumerate() {
            let fault = match at < sent {
                true => CommandError::Unconfirmed,
                false => CommandError::NotExecuted("the connection to Redis broke".into()),
            };
            if let Some(waiting) = waiting {
                let _ = waiting.send(Err(fault));
            }
        }
    }
}

async fn write_loop(shared: Arc<Shared>, mut socket: impl AsyncWrite + Unpin) {
    let writing = async {
        let mut buffer = Vec::new();
        loop {
            shared.wake.notified().await;
            // Who else is about to ask may do it in the same write; unless Redis has nothing to do, or enough is there:
            // it and this node are to work at the same time and not by turns.
            let gather = {
                let state = shared.state.lock();
                state.sent > 0 && state.out.len() < BATCH
            };
            if gather {
                tokio::task::yield_now().await;
            }
            {
                let mut state = shared.state.lock();
                std::mem::swap(&mut buffer, &mut state.out);
                state.sent = state.waiting.len();
            }
            if buffer.is_empty() {
                continue;
            }
            socket.write_all(&buffer).await?;
            socket.flush().await?;
            buffer.clear();
            if buffer.capacity() > 1 << 20 {
                buffer = Vec::new();
            }
        }
    };
    let _: Result<(), io::Error> = tokio::select! {
        ended = writing => ended,
        () = shared.closed.cancelled() => Ok(()),
    };
    shared.end();
}

/// Ends a connection to a server that is no longer the master that it was: what is published there may be heard by nobody,
/// and what it lost as a replica must begin a new term. Connections that nobody writes to would never notice.
async fn watch(shared: Arc<Shared>, generation: Box<str>) {
    let ask = Command::new("INFO").arg("replication");
    loop {
        tokio::select! {
            () = shared.closed.cancelled() => return,
            () = tokio::time::sleep(BEAT) => {}
        }
        let Ok(info) = shared.ask(&[&ask]).await else { continue };
        let info = info.text().unwrap_or_default();
        let replid = field(info, "master_replid").map(short);
        if field(info, "role") != Some("master") || replid.is_none_or(|replid| !generation.ends_with(replid)) {
            shared.closed.cancel();
        }
    }
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim_end)
}

/// As much of an id as keeps servers apart.
fn short(id: &str) -> &str {
    id.get(..16).unwrap_or(id)
}

/// As `limits.lua` makes it.
fn generation(run_id: Option<&str>, replid: Option<&str>) -> Option<Box<str>> {
    let (run_id, replid) = (run_id.filter(|id| !id.is_empty())?, replid.filter(|id| !id.is_empty())?);
    Some(format!("{}{}", short(run_id), short(replid)).into())
}

async fn read_loop(shared: Arc<Shared>, mut socket: impl AsyncRead + Unpin, ear: Arc<dyn PushHandler>) {
    let mut received = BytesMut::with_capacity(16 << 10);
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            // What has come counts before the time that has passed: this process may have been asleep itself.
            biased;
            () = shared.closed.cancelled() => break,
            read = socket.read_buf(&mut received) => match read {
                Ok(1..) => {
                    heard = Instant::now();
                    if !shared.hear(&mut received, &*ear) {
                        break;
                    }
                }
                Ok(0) | Err(_) => break,
            },
            _ = beat.tick() => {
                if heard.elapsed() > SILENCE {
                    break;
                }
            }
        }
    }
    shared.end();
}

impl Shared {
    /// Hands out what has come. False if it cannot be understood.
    fn hear(&self, received: &mut BytesMut, ear: &dyn PushHandler) -> bool {
        loop {
            let value = match resp::take(received) {
                Ok(Some(value)) => value,
                Ok(None) => return true,
                Err(_) => return false,
            };
            match value {
                Value::Push(items) => ear.push(items),
                value => {
                    let mut state = self.state.lock();
                    if let Value::Error(error) = &value
                        && state.told
                    {
                        drop(state);
                        ear.refused(error);
                        continue;
                    }
                    if state.sent == 0 {
                        return false;
                    }
                    state.sent -= 1;
                    let waiting = state.waiting.pop_front().flatten();
                    drop(state);
                    if let Some(waiting) = waiting {
                        let answer = match value {
                            Value::Error(error) => Err(CommandError::Rejected(unwrapped(error))),
                            value => Ok(value),
                        };
                        let _ = waiting.send(answer);
                    }
                }
            }
        }
    }
}

/// Redis 6.2 wraps what a command in a script fails with: `ERR Error running script (call to f_…): @user_script:34: … -OOM …`.
fn unwrapped(error: Box<str>) -> Box<str> {
    match error.strip_prefix("ERR Error running script").and_then(|rest| rest.split_once(": -")) {
        Some((_, inner)) => inner.into(),
        None => error,
    }
}

async fn connect(url: &RedisUrl, address: &Address) -> io::Result<Box<dyn Stream>> {
    let tcp = TcpStream::connect((&*address.host, address.port)).await?;
    tcp.set_nodelay(true)?;
    if !url.tls {
        return Ok(Box::new(tcp));
    }
    let name = ServerName::try_from(address.host.to_string()).map_err(io::Error::other)?;
    Ok(Box::new(TlsConnector::from(tls()?).connect(name, tcp).await.map_err(explained)?))
}

/// Why there is no TLS, for whoever has to mend it.
fn explained(error: io::Error) -> io::Error {
    use rustls::{CertificateError as Bad, Error::InvalidCertificate};
    match error.get_ref().and_then(|error| error.downcast_ref()) {
        Some(InvalidCertificate(Bad::UnknownIssuer)) => io::Error::other(
            "nobody whom this machine trusts has signed its certificate: SSL_CERT_FILE names a file of those to trust",
        ),
        Some(InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. })) => {
            io::Error::other("its certificate is for another name")
        }
        Some(InvalidCertificate(why)) => io::Error::other(format!("its certificate is refused: {why:?}")),
        _ => error,
    }
}

fn tls() -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err(io::Error::other(
            "no certificates to trust on this machine: install ca-certificates, or set SSL_CERT_FILE",
        ));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_in_a_script_fails_with() {
        let old =
            "ERR Error running script (call to f_0c1e): @user_script:34: @user_script: 34: -OOM command not allowed";
        assert_eq!(&*unwrapped(old.into()), "OOM command not allowed");
        for other in ["OOM command not allowed when used memory > 'maxmemory'. script: f_0c1e", "ERR unknown: -x"] {
            assert_eq!(&*unwrapped(other.into()), other);
        }
    }
}
