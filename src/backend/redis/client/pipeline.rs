//! [`Pipeline`]: the commands of one connection that wait to be sent, or for their reply.
//!
//! All callers share one stream: many commands go out in one write, and the replies come back in the same order. The
//! pipeline counts the commands that were handed to the socket: when the connection breaks, the others were surely not
//! executed.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use parking_lot::Mutex;
use redis::{Cmd, FromRedisValue, PushKind, ServerError, Value, from_redis_value};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Notify, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::resp::{self, InvalidResp};

/// How often a connection asks its server something, so that a live server is never silent for long.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);
/// A server that sends nothing for this long is dead, even if its TCP connection is not.
const SILENCE: Duration = Duration::from_secs(4);
/// How Redis up to 7.0 rejects a command in a script that the user must not run, with the code `ERR`.
const NOT_PERMITTED: &str = "The user executing the script can't run this command";
/// Bytes that are worth a write of their own.
const BATCH: usize = 4 << 10;
/// Bytes that may wait to be sent on one connection, and commands that may wait for their reply.
const MAX_BYTES: usize = 64 << 20;
const MAX_WAITING: usize = 100_000;

/// Why a command has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// Surely not executed: the command never left this process, or Redis rejected it for the moment. With the reason.
    NotExecuted(Box<str>),
    /// Perhaps executed: the command was sent, and its reply is lost.
    Unconfirmed,
    /// Redis replied with an error: `CODE details`.
    Rejected(Box<str>),
}

/// Receives what is no reply to a command. Called from the task that reads the connection: it must not block.
pub(crate) trait PushHandler: Send + Sync + 'static {
    fn on_push(&self, kind: PushKind, data: Vec<Value>);

    /// An error that is no reply: SUBSCRIBE is confirmed by pushes, but may be rejected.
    fn on_error(&self, error: &str);
}

/// For connections without subscriptions.
pub(crate) struct NoPush;

pub(super) struct Pipeline {
    state: Mutex<PipelineState>,
    /// There are bytes to send.
    wake: Notify,
    closed: CancellationToken,
}

#[derive(Default)]
struct PipelineState {
    out: Vec<u8>,
    /// One for each reply that is due, in the order of the commands; None where the reply does not matter.
    waiting: VecDeque<Option<oneshot::Sender<Result<Value, CommandError>>>>,
    /// How many of those were handed to the socket.
    sent: usize,
    /// Commands without a reply were sent: from here on an error may be about one of them.
    subscribes: bool,
    ended: bool,
}

/// The reply to a command that was queued already. Dropping it does not cancel the command.
#[must_use]
pub(crate) struct PendingReply(Result<oneshot::Receiver<Result<Value, CommandError>>, Option<CommandError>>);

// === impl CommandError ===

impl CommandError {
    /// Of a command that only reads: lost or not, nothing was changed.
    pub(crate) fn of_read(self) -> Self {
        match self {
            CommandError::Unconfirmed => CommandError::NotExecuted("the connection to Redis broke".into()),
            error => error,
        }
    }
}

impl PushHandler for NoPush {
    fn on_push(&self, _: PushKind, _: Vec<Value>) {}

    fn on_error(&self, _: &str) {}
}

// === impl PendingReply ===

impl PendingReply {
    pub(crate) async fn parse<T: FromRedisValue>(self) -> Result<T, CommandError> {
        parse(self.await?)
    }
}

impl Future for PendingReply {
    type Output = Result<Value, CommandError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Ok(receiver) => Pin::new(receiver).poll(cx).map(|reply| reply.unwrap_or(Err(CommandError::Unconfirmed))),
            Err(error) => Poll::Ready(Err(error.take().unwrap_or(CommandError::Unconfirmed))),
        }
    }
}

/// A reply as the type that its command has. Another type is an error of the server.
pub(super) fn parse<T: FromRedisValue>(reply: Value) -> Result<T, CommandError> {
    from_redis_value(reply).map_err(|error| CommandError::Rejected(format!("ERR unexpected reply: {error}").into()))
}

// === impl Pipeline ===

impl Pipeline {
    /// Runs on `stream` until it breaks or [`close`](Self::close) is called.
    pub(super) fn start(
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        handler: Arc<dyn PushHandler>,
    ) -> Arc<Self> {
        let pipeline =
            Arc::new(Pipeline { state: Mutex::default(), wake: Notify::new(), closed: CancellationToken::new() });
        let (read, write) = tokio::io::split(stream);
        tokio::spawn(write_loop(pipeline.clone(), write));
        tokio::spawn(read_loop(pipeline.clone(), read, handler));
        pipeline
    }

    /// Queues commands in one piece; the result is the reply to the last.
    pub(super) fn ask(&self, commands: &[&Cmd]) -> PendingReply {
        let (tx, rx) = oneshot::channel();
        let queued = self.queue(commands, |state| {
            state.waiting.extend(commands[1..].iter().map(|_| None));
            state.waiting.push_back(Some(tx));
        });
        PendingReply(queued.map(|()| rx).map_err(Some))
    }

    /// Queues a command that has no reply, as SUBSCRIBE.
    pub(super) fn send(&self, command: &Cmd) -> Result<(), CommandError> {
        self.queue(&[command], |state| state.subscribes = true)
    }

    fn queue(&self, commands: &[&Cmd], expect: impl FnOnce(&mut PipelineState)) -> Result<(), CommandError> {
        let mut state = self.state.lock();
        if state.ended || self.is_closed() {
            return Err(CommandError::NotExecuted("the connection to Redis is closed".into()));
        }
        let before = state.out.len();
        commands.iter().for_each(|command| command.write_packed_command(&mut state.out));
        if before > 0 && state.out.len() > MAX_BYTES || state.waiting.len() >= MAX_WAITING {
            state.out.truncate(before);
            return Err(CommandError::NotExecuted("too many commands wait for Redis".into()));
        }
        expect(&mut state);
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    /// Ends the connection: commands that were sent are unconfirmed, the others not executed.
    pub(super) fn close(&self) {
        self.closed.cancel();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Completes when the connection has ended.
    pub(super) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    fn end(&self) {
        self.close();
        let mut state = self.state.lock();
        let PipelineState { waiting, sent, .. } =
            std::mem::replace(&mut *state, PipelineState { ended: true, ..PipelineState::default() });
        drop(state);
        for (at, waiting) in waiting.into_iter().enumerate() {
            let error = match at < sent {
                true => CommandError::Unconfirmed,
                false => CommandError::NotExecuted("the connection to Redis broke".into()),
            };
            if let Some(waiting) = waiting {
                let _ = waiting.send(Err(error));
            }
        }
    }

    /// Hands on the values that have arrived whole. False if the connection cannot be used any more.
    fn receive_all(&self, received: &mut BytesMut, handler: &dyn PushHandler) -> bool {
        loop {
            match resp::take(received) {
                Ok(Some(value)) => {
                    if !self.receive(value, handler) {
                        return false;
                    }
                }
                Ok(None) => return true,
                Err(InvalidResp) => return false,
            }
        }
    }

    /// Hands a value on. False if it is a reply that no command waits for.
    fn receive(&self, value: Value, handler: &dyn PushHandler) -> bool {
        let reply = match value {
            Value::Push { kind, data } => {
                handler.on_push(kind, data);
                return true;
            }
            Value::ServerError(error) => Err(message(&error)),
            value => Ok(value),
        };
        let mut state = self.state.lock();
        match reply {
            Err(error) if state.subscribes => {
                drop(state);
                handler.on_error(&error);
            }
            _ if state.sent == 0 => return false,
            reply => {
                state.sent -= 1;
                let waiting = state.waiting.pop_front().flatten();
                drop(state);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(reply.map_err(CommandError::Rejected));
                }
            }
        }
        true
    }
}

async fn write_loop(pipeline: Arc<Pipeline>, mut socket: impl AsyncWrite + Unpin) {
    let writing = async {
        let mut buffer = Vec::new();
        loop {
            pipeline.wake.notified().await;
            // Other tasks that are ready may add to the same write; unless Redis is idle, or there is enough already:
            // Redis and this node are to work at the same time and not by turns.
            let gather = {
                let state = pipeline.state.lock();
                state.sent > 0 && state.out.len() < BATCH
            };
            if gather {
                tokio::task::yield_now().await;
            }
            {
                let mut state = pipeline.state.lock();
                std::mem::swap(&mut buffer, &mut state.out);
                state.sent = state.waiting.len();
            }
            if buffer.is_empty() {
                continue;
            }
            socket.write_all(&buffer).await?;
            socket.flush().await?;
            buffer.clear();
            buffer.shrink_to(1 << 20);
        }
    };
    let _: Result<(), io::Error> = tokio::select! {
        ended = writing => ended,
        () = pipeline.closed() => Ok(()),
    };
    pipeline.end();
}

async fn read_loop(pipeline: Arc<Pipeline>, mut socket: impl AsyncRead + Unpin, handler: Arc<dyn PushHandler>) {
    let mut beat = tokio::time::interval(HEARTBEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Bytes count, not whole values: a large reply may take its time.
    let mut last_read = Instant::now();
    let mut received = BytesMut::with_capacity(16 << 10);
    loop {
        tokio::select! {
            // Bytes that have arrived count before time that has passed: this process itself may have been suspended.
            biased;
            () = pipeline.closed() => break,
            read = socket.read_buf(&mut received) => {
                last_read = Instant::now();
                if !matches!(read, Ok(1..)) || !pipeline.receive_all(&mut received, &*handler) {
                    break;
                }
            }
            due = beat.tick() => {
                // This process itself stood still: the runtime may report the time before it reports the bytes that arrived.
                if due.elapsed() >= HEARTBEAT {
                    last_read = Instant::now();
                }
                if last_read.elapsed() > SILENCE {
                    break;
                }
            }
        }
    }
    pipeline.end();
}

/// The text of an error, beginning with its code. Redis 6.2 wraps the errors of commands in scripts:
/// `ERR Error running script (call to f_…): @user_script:34: … -OOM …`.
fn message(error: &ServerError) -> Box<str> {
    let details = error.details().unwrap_or_default();
    if let Some(rest) = details.strip_prefix(NOT_PERMITTED) {
        return format!("NOPERM {NOT_PERMITTED}{rest}").into();
    }
    match details.strip_prefix("Error running script").and_then(|rest| rest.split_once(": -")) {
        Some((_, inner)) => inner.into(),
        None => format!("{} {details}", error.code()).trim_end().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &[u8] = b"+OK\r\n-MOVED 7 h:1\r\n:42\r\n_\r\n$-1\r\n$3\r\na\r\n\r\n*2\r\n:1\r\n*0\r\n\
        %1\r\n+a\r\n#t\r\n=7\r\ntxt:abc\r\n,1.5\r\n>2\r\n+message\r\n$1\r\nx\r\n";

    fn replies() -> Vec<Result<Value, CommandError>> {
        vec![
            Ok(Value::Okay),
            Err(CommandError::Rejected("MOVED 7 h:1".into())),
            Ok(Value::Int(42)),
            Ok(Value::Nil),
            Ok(Value::Nil),
            Ok(Value::BulkString(b"a\r\n".to_vec())),
            Ok(Value::Array(vec![Value::Int(1), Value::Array(vec![])])),
            Ok(Value::Map(vec![(Value::SimpleString("a".into()), Value::Boolean(true))])),
            Ok(Value::VerbatimString { format: redis::VerbatimFormat::Text, text: "abc".into() }),
            Ok(Value::Double(1.5)),
        ]
    }

    struct Pushes(Mutex<Vec<(PushKind, Vec<Value>)>>);

    impl PushHandler for Pushes {
        fn on_push(&self, kind: PushKind, data: Vec<Value>) {
            self.0.lock().push((kind, data));
        }

        fn on_error(&self, error: &str) {
            panic!("{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn replies_are_parsed_in_any_pieces(cuts in prop::collection::vec(1usize..20, 0..60)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (ours, mut server) = tokio::io::duplex(1 << 10);
                let pushes = Arc::new(Pushes(Mutex::default()));
                let pipeline = Pipeline::start(ours, pushes.clone());
                let ping = redis::cmd("PING");
                let expected = replies();
                let asked: Vec<_> = expected.iter().map(|_| pipeline.ask(&[&ping])).collect();
                let mut sent = vec![0; ping.get_packed_command().len() * asked.len()];
                server.read_exact(&mut sent).await.unwrap();
                let mut rest = STREAM;
                for cut in cuts.into_iter().chain([STREAM.len()]) {
                    let (piece, after) = rest.split_at(cut.min(rest.len()));
                    rest = after;
                    server.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                for (reply, expected) in asked.into_iter().zip(expected) {
                    assert_eq!(reply.await, expected);
                }
                drop(server);
                pipeline.closed().await;
                assert_eq!(*pushes.0.lock(), [(PushKind::Message, vec![Value::BulkString(b"x".to_vec())])]);
            });
        }

        #[test]
        fn garbage_ends_the_connection_or_waits_for_more(noise in prop::collection::vec(any::<u8>(), 0..60)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (ours, mut server) = tokio::io::duplex(1 << 10);
                let pipeline = Pipeline::start(ours, Arc::new(NoPush));
                server.write_all(&noise).await.unwrap();
                drop(server);
                pipeline.closed().await;
            });
        }
    }

    #[test]
    fn errors_of_commands_in_scripts_are_unwrapped() {
        let text = |text: &'static str| match redis::parse_redis_value(format!("-{text}\r\n").as_bytes()) {
            Ok(Value::ServerError(error)) => message(&error),
            other => panic!("{other:?}"),
        };
        let old =
            "ERR Error running script (call to f_0c1e): @user_script:34: @user_script: 34: -OOM command not allowed";
        assert_eq!(&*text(old), "OOM command not allowed");
        let not_permitted = "ERR The user executing the script can't run this command or subcommand script: f_0c1e";
        assert_eq!(*text(not_permitted), not_permitted.replacen("ERR", "NOPERM", 1));
        for other in ["OOM command not allowed when used memory > 'maxmemory'. script: f_0c1e", "ERR unknown: -x"] {
            assert_eq!(&*text(other), other);
        }
    }
}
