//! [`ReconnectingConnection`], a connection to one server that is made anew whenever it breaks, for as long as the lane lives.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    connection::{CommandError, PushHandler, RedisConnection},
    resp::{Command, Value},
    url::{Address, RedisUrl, TopologyKind},
};
use crate::metrics::{Label as _, Metrics, RedisConnectionKind};

/// The wait after the second failure in a row; it doubles up to...
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// ...this, each time give or take a third: many nodes must not come back in step.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// How long one sentinel may take to answer.
const SENTINEL: Duration = Duration::from_secs(1);

/// Which server a lane leads to.
#[derive(Clone, Debug)]
pub enum Target {
    /// This one.
    Address(Address),
    /// Whoever the sentinels say is the master, each time.
    Master,
}

/// Makes what listens to a connection, for each anew: what the last one still says must not pass for the next one's.
/// The number is the connection's.
pub type Ears = Arc<dyn Fn(u64) -> Arc<dyn PushHandler> + Send + Sync>;

pub struct ReconnectingConnection {
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
pub enum State {
    Up(Arc<RedisConnection>),
    /// Why, for people.
    Down(Arc<str>),
}

impl ReconnectingConnection {
    pub fn start(
        url: Arc<RedisUrl>,
        target: Target,
        name: RedisConnectionKind,
        ears: Ears,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (tx, state) = watch::channel(State::Down("not connected yet".into()));
        let task = tokio::spawn(keep(url, target, name, ears, metrics, tx));
        ReconnectingConnection { state, task }
    }

    pub fn connection(&self) -> Option<Arc<RedisConnection>> {
        match &*self.state.borrow() {
            State::Up(connection) if !connection.is_closed() => Some(connection.clone()),
            _ => None,
        }
    }

    /// Waits for a connection, until `deadline`. The error says what is in the way.
    pub async fn ready(&self, deadline: Instant) -> Result<Arc<RedisConnection>, Arc<str>> {
        if let Some(connection) = self.connection() {
            return Ok(connection);
        }
        let mut state = self.state.clone();
        let up = state.wait_for(|state| matches!(state, State::Up(connection) if !connection.is_closed()));
        if let Ok(Ok(state)) = tokio::time::timeout_at(deadline, up).await
            && let State::Up(connection) = &*state
        {
            return Ok(connection.clone());
        }
        Err(match &*self.state.borrow() {
            State::Up(_) => "the connection to Redis broke".into(),
            State::Down(reason) => reason.clone(),
        })
    }

    /// What happens to it.
    pub fn changes(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Ends the connection, so that another is made.
    pub fn replace(&self) {
        if let State::Up(connection) = &*self.state.borrow() {
            connection.close();
        }
    }
}

impl Drop for ReconnectingConnection {
    fn drop(&mut self) {
        self.task.abort();
        // Nobody else holds it for long, and what it carries has nobody to come back to.
        self.replace();
    }
}

async fn keep(
    url: Arc<RedisUrl>,
    target: Target,
    name: RedisConnectionKind,
    ears: Ears,
    metrics: Arc<Metrics>,
    state: watch::Sender<State>,
) {
    let title = format!("weir-{}", name.value());
    let mut wait = Duration::ZERO;
    let mut said: Option<String> = None;
    let mut first = true;
    loop {
        let opened = match find(&url, &target).await {
            Ok(address) => RedisConnection::open(&url, &address, &title, &*ears).await,
            Err(reason) => Err(reason),
        };
        match opened {
            Ok(connection) => {
                let connection = Arc::new(connection);
                if !first {
                    metrics.redis_reconnects[name].add(1);
                    tracing::info!(lane = name.value(), server = %connection.address, "connected to Redis again");
                }
                (first, said) = (false, None);
                let since = Instant::now();
                if state.send(State::Up(connection.clone())).is_err() {
                    return;
                }
                connection.closed().await;
                tracing::warn!(lane = name.value(), server = %connection.address, "the connection to Redis is lost");
                let _ = state.send(State::Down("the connection to Redis is lost".into()));
                // At once, unless it never holds.
                if since.elapsed() > LONGEST_WAIT {
                    wait = Duration::ZERO;
                }
            }
            Err(reason) => {
                // Once for each reason, not every two seconds.
                if said.as_ref() != Some(&reason) {
                    tracing::warn!(lane = name.value(), %reason, "cannot connect to Redis");
                    said = Some(reason.clone());
                }
                let _ = state.send(State::Down(reason.into()));
            }
        }
        sleep(wait.mul_f64(0.67 + 0.66 * fastrand::f64())).await;
        wait = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT * 3 / 4);
    }
}

async fn find(url: &RedisUrl, target: &Target) -> Result<Address, String> {
    match (target, &url.kind) {
        (Target::Address(address), _) | (Target::Master, TopologyKind::Standalone(address)) => Ok(address.clone()),
        (Target::Master, TopologyKind::Sentinel { .. }) => master(url).await,
        (Target::Master, TopologyKind::Cluster(_)) => Err("a Redis Cluster has no single master".into()),
    }
}

/// Asks all sentinels who the master is, and believes what most of those say that answer: one that was cut off together
/// with an old master still names that.
pub async fn master(url: &RedisUrl) -> Result<Address, String> {
    let TopologyKind::Sentinel { sentinels, master } = &url.kind else { return Err("there are no sentinels".into()) };
    let asked = sentinels.iter().map(|sentinel| async move {
        let answer = timeout(SENTINEL, master_of(url, sentinel, master)).await;
        answer.unwrap_or_else(|_| Err(format!("{sentinel}: no answer")))
    });
    let mut asked: FuturesUnordered<_> = asked.collect();
    let (mut named, mut reasons) = (Vec::new(), Vec::new());
    while let Some(answer) = asked.next().await {
        match answer {
            Ok(address) => named.push(address),
            Err(reason) => reasons.push(reason),
        }
        // What the others say, and may need a second for, makes no difference.
        if let Some(address) = most(&named, sentinels.len()) {
            return Ok(address.clone());
        }
    }
    match most(&named, named.len()) {
        Some(address) => Ok(address.clone()),
        None if named.is_empty() => Err(reasons.join("; ")),
        None => Err(format!("the sentinels name different masters: {}", join(&named))),
    }
}

async fn master_of(url: &RedisUrl, sentinel: &Address, name: &str) -> Result<Address, String> {
    let connection = RedisConnection::open_guide(url, sentinel).await?;
    match connection.ask(&Command::new("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name)).await {
        Ok(Value::List(parts)) => match (parts.first().and_then(Value::text), parts.get(1).and_then(Value::int)) {
            (Some(host), Some(port)) => {
                Ok(Address { host: host.into(), port: u16::try_from(port).unwrap_or_default() })
            }
            _ => Err(format!("{sentinel} answers nonsense")),
        },
        Ok(_) => Err(format!("{sentinel} knows no master {name:?}")),
        Err(CommandError::Rejected(error)) => Err(format!("{sentinel}: {error}")),
        Err(_) => Err(format!("{sentinel}: the connection broke")),
    }
}

/// What more than half of so many say.
pub fn most<T: PartialEq>(said: &[T], of: usize) -> Option<&T> {
    said.iter().find(|one| 2 * said.iter().filter(|other| other == one).count() > of)
}

fn join(addresses: &[Address]) -> String {
    addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A sentinel that names a master, whatever it is asked; or that never answers.
    async fn sentinel(names: Option<u16>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut asked = [0; 1000];
                    while let Ok(1..) = socket.read(&mut asked).await {
                        if let Some(port) = names {
                            let port = port.to_string();
                            let answer = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
                            let _ = socket.write_all(answer.as_bytes()).await;
                        }
                    }
                });
            }
        });
        port
    }

    async fn named_by(sentinels: &[Option<u16>]) -> Result<u16, String> {
        let mut at = Vec::new();
        for names in sentinels {
            at.push(format!("127.0.0.1:{}", sentinel(*names).await));
        }
        let url = RedisUrl::parse(&format!("redis+sentinel://{}/weir", at.join(","))).unwrap();
        master(&url).await.map(|address| address.port)
    }

    #[tokio::test]
    async fn most_of_the_sentinels_are_believed() {
        let (old, new) = (Some(7001), Some(7002));
        for _ in 0..10 {
            assert_eq!(named_by(&[old, new, new]).await, Ok(7002));
        }
        assert_eq!(named_by(&[old, old, new, new, new]).await, Ok(7002));
        assert_eq!(named_by(&[new, new, None]).await, Ok(7002), "of those that answer");
        assert_eq!(named_by(&[None, None, new]).await, Ok(7002), "of those that answer");
        let split = named_by(&[old, new]).await.unwrap_err();
        assert!(split.contains("different masters"), "{split}");
        let away = named_by(&[None]).await.unwrap_err();
        assert!(away.contains("no answer"), "{away}");
    }
}
