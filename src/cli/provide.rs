//! `weir provide`: provides a service whose calls a command executes.

use std::{
    collections::HashMap,
    io,
    process::Stdio,
    time::{Duration, Instant},
};

use futures_util::{SinkExt as _, StreamExt as _};
use http::header;
use rustix::process::{Pid, kill_process_group};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    signal::unix::{Signal, SignalKind, signal},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest as _, protocol::frame::coding::CloseCode},
};

use super::{
    args::ProvideArgs,
    backoff::Backoff,
    client::{NodeClient, NodeResponse},
    connect::{NodeStream, connect},
    json_or_text::JsonOrText,
    request_target::RequestTarget,
};
use crate::{
    json::parse_owned,
    terminal::{Failure, note},
};

/// Maximum size of a result in bytes. A larger message than the node accepts would end the connection, and all its calls.
const MAX_BYTES: usize = 16 << 20;
/// A connection that lasted longer resets the back-off.
const STABLE: Duration = Duration::from_secs(10);
/// A connection without a message for so long is dead. The default interval of pings is 25 s.
const SILENCE: Duration = Duration::from_secs(120);
/// Timeout of the connection, and of the response to `weir.provide`.
const HANDSHAKE: Duration = Duration::from_secs(30);

pub(super) type NodeSocket = WebSocketStream<Box<dyn NodeStream>>;

/// Provides the service until a signal, and reconnects after a lost connection. The first signal lets running calls finish.
pub(super) async fn provide(client: &NodeClient, args: &ProvideArgs) -> Result<(), Failure> {
    let mut stop = StopSignals::new()?;
    let mut backoff = Backoff::default();
    let mut connected = false;
    loop {
        let began = Instant::now();
        let mut connection = tokio::select! {
            connection = ProviderConnection::open(client, args, connected) => connection,
            () = stop.wait() => return Ok(()),
        };
        let ended = match &mut connection {
            Ok(connection) => {
                connected = true;
                connection.serve(args, &mut stop).await
            }
            Err(failure) => Err(std::mem::replace(failure, Failure::OutputClosed)),
        };
        let reason = match ended {
            Ok(()) => return Ok(()),
            Err(Failure::Unavailable(reason)) if connected => reason,
            // Not retried: a rejection, or the first connection fails, probably because the URL is wrong.
            Err(other) => return Err(other),
        };
        if began.elapsed() > STABLE {
            backoff.reset();
        }
        let requested = connection.ok().and_then(|connection| connection.retry_after);
        let wait = requested.unwrap_or_else(|| backoff.next());
        note(format_args!("{reason}; retrying in {:.1}s", wait.as_secs_f32()));
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.wait() => return Ok(()),
        }
    }
}

/// A connection that provides the service.
struct ProviderConnection {
    socket: NodeSocket,
    running: JoinSet<Option<(Box<RawValue>, CallReply)>>,
    /// Running calls by the JSON of their id, to abort those that are cancelled.
    calls: HashMap<Box<str>, AbortHandle>,
    /// The delay before the next connection that the node requested.
    retry_after: Option<Duration>,
}

/// The outcome of a call.
enum CallReply {
    Result(Box<RawValue>),
    Error(Value),
}

/// A request, notification or response of the node.
#[derive(Deserialize)]
struct ServerMessage<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: Option<String>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<Value>,
    #[serde(default)]
    meta: CallerMeta,
}

#[derive(Default, Deserialize)]
struct CallerMeta {
    #[serde(default)]
    caller: Option<String>,
}

#[derive(Serialize)]
struct ReplyMessage<'a> {
    jsonrpc: &'static str,
    id: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a Value>,
}

// === impl ProviderConnection ===

impl ProviderConnection {
    /// Connects and provides the service. `again`: the node may still hold the previous connection of this command.
    async fn open(client: &NodeClient, args: &ProvideArgs, again: bool) -> Result<Self, Failure> {
        let late = |_| Failure::Unavailable("the node does not respond".into());
        let socket = timeout(HANDSHAKE, upgrade(client)).await.map_err(late)??;
        let mut connection =
            ProviderConnection { socket, running: JoinSet::new(), calls: HashMap::new(), retry_after: None };
        let mut params = json!({
            "service": args.service, "exclusive": args.exclusive, "concurrency": args.concurrency, "meta": true,
        });
        if args.exclusive && again {
            params["takeover"] = true.into();
        }
        connection.request("provide", "weir.provide", &params).await?;
        timeout(HANDSHAKE, connection.accepted(args, again)).await.map_err(late)??;
        Ok(connection)
    }

    async fn accepted(&mut self, args: &ProvideArgs, again: bool) -> Result<(), Failure> {
        loop {
            let text = self.next().await?;
            let Ok(message) = serde_json::from_str::<ServerMessage<'_>>(&text) else { continue };
            if let Some(error) = message.error {
                let code = error["data"]["code"].as_str().unwrap_or("error");
                let reason = format!("{code}: {}", error["message"].as_str().unwrap_or("no reason given"));
                // The service is taken until the node detects that the previous connection is dead.
                let temporary = matches!(code, "draining" | "overloaded" | "rate_limited" | "bus_unavailable")
                    || (again && code == "service_taken");
                return Err(if temporary { Failure::Unavailable(reason) } else { Failure::Rejected(reason) });
            }
            if let Some(result) = message.result {
                let result: Value = serde_json::from_str(result.get()).unwrap_or_default();
                let providers = result["providers"].as_u64().unwrap_or(1);
                note(format_args!("providing {} ({providers} in total)", args.service));
                return Ok(());
            }
            // A call can arrive before the response.
            self.message(&text, args).await?;
        }
    }

    async fn serve(&mut self, args: &ProvideArgs, stop: &mut StopSignals) -> Result<(), Failure> {
        let mut draining = false;
        loop {
            if draining && self.running.is_empty() {
                let close = self.socket.close(None);
                let _ = timeout(Duration::from_secs(2), close).await;
                return Ok(());
            }
            tokio::select! {
                message = self.socket.next() => {
                    if let Some(text) = text(message)? {
                        self.message(&text, args).await?;
                    }
                }
                Some(done) = self.running.join_next() => self.finished(done).await?,
                () = stop.wait() => {
                    if draining {
                        return Ok(());
                    }
                    draining = true;
                    note(format_args!("shutting down after {} running calls; a second signal aborts them", self.running.len()));
                    self.request("withdraw", "weir.withdraw", &json!({ "service": args.service })).await?;
                }
                () = sleep(SILENCE) => return Err(Failure::Unavailable("the node is silent".into())),
            }
        }
    }

    async fn message(&mut self, text: &str, args: &ProvideArgs) -> Result<(), Failure> {
        let Ok(ServerMessage { id, method: Some(method), params, meta, .. }) =
            serde_json::from_str::<ServerMessage<'_>>(text)
        else {
            return Ok(());
        };
        match (method.as_str(), id) {
            ("weir.cancel", None) => {
                #[derive(Deserialize)]
                struct CancelledCall<'a> {
                    #[serde(borrow)]
                    id: &'a RawValue,
                }
                let cancel = params.and_then(|params| serde_json::from_str::<CancelledCall<'_>>(params.get()).ok());
                if let Some(call) = cancel.and_then(|cancel| self.calls.remove(cancel.id.get())) {
                    call.abort();
                }
            }
            ("weir.drain", None) => {
                let params: Value =
                    params.map_or(Value::Null, |params| serde_json::from_str(params.get()).unwrap_or_default());
                self.retry_after = params["after_ms"].as_u64().map(Duration::from_millis);
            }
            ("weir.withdrawn", None) => {
                return Err(Failure::Rejected(format!("{} was taken over by another provider", args.service)));
            }
            (_, Some(id)) if self.running.len() >= args.concurrency as usize => {
                let busy = CallReply::Error(json!({ "code": -32021, "message": "the concurrency limit is reached" }));
                self.reply(id, &busy).await?;
            }
            (_, id) => {
                let run = CommandRun::new(args, &method, params, meta);
                let owned = id.map(ToOwned::to_owned);
                let key = id.map(|id| Box::<str>::from(id.get()));
                let task = self.running.spawn(async move {
                    let reply = run.reply().await;
                    // A notification has no reply.
                    owned.map(|id| (id, reply))
                });
                if let Some(key) = key {
                    self.calls.insert(key, task);
                }
            }
        }
        Ok(())
    }

    async fn finished(
        &mut self,
        done: Result<Option<(Box<RawValue>, CallReply)>, tokio::task::JoinError>,
    ) -> Result<(), Failure> {
        // An error means that the call was cancelled.
        if let Ok(Some((id, reply))) = done {
            self.calls.remove(id.get());
            self.reply(&id, &reply).await?;
        }
        Ok(())
    }

    async fn reply(&mut self, id: &RawValue, reply: &CallReply) -> Result<(), Failure> {
        let (result, error) = match reply {
            CallReply::Result(result) => (Some(&**result), None),
            CallReply::Error(error) => (None, Some(error)),
        };
        self.send(&ReplyMessage { jsonrpc: "2.0", id, result, error }).await
    }

    async fn request(&mut self, id: &str, method: &str, params: &Value) -> Result<(), Failure> {
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await
    }

    async fn send(&mut self, message: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(message).map_err(|error| Failure::Failed(error.to_string()))?;
        match timeout(SILENCE, self.socket.send(Message::text(text))).await {
            Ok(sent) => sent.map_err(broken),
            Err(_) => Err(Failure::Unavailable("the node reads nothing".into())),
        }
    }

    async fn next(&mut self) -> Result<String, Failure> {
        loop {
            if let Some(text) = text(self.socket.next().await)? {
                return Ok(text);
            }
        }
    }
}

/// Opens a WebSocket to the node.
pub(super) async fn upgrade(client: &NodeClient) -> Result<NodeSocket, Failure> {
    let url = client.base.ws(&RequestTarget::new("/v1/ws"));
    let mut request = url.into_client_request().map_err(|error| Failure::Usage(error.to_string()))?;
    request.headers_mut().insert(header::USER_AGENT, client.user_agent.clone());
    if let Some(token) = client.token() {
        request.headers_mut().insert(header::AUTHORIZATION, token.clone());
    }
    let stream = connect(&client.base).await?;
    match client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => {
            let (head, body) = response.into_parts();
            NodeResponse::new(&head, body.unwrap_or_default().into()).into_json()?;
            Err(Failure::Failed(format!("HTTP status {}, but not a WebSocket; is this a weir node?", head.status)))
        }
        Err(error) => Err(broken(error)),
    }
}

/// The text of a message; `None` for other frames. The end of the connection is an error.
fn text(message: Option<Result<Message, tungstenite::Error>>) -> Result<Option<String>, Failure> {
    match message {
        Some(Ok(Message::Text(text))) => Ok(Some(text.as_str().to_owned())),
        Some(Ok(Message::Close(Some(close)))) => {
            let reason = format!("closed by the node: {} {}", u16::from(close.code), close.reason);
            // Close codes from 4500 on are permanent.
            Err(match u16::from(close.code) >= 4500 || close.code == CloseCode::Policy {
                true => Failure::Rejected(reason),
                false => Failure::Unavailable(reason),
            })
        }
        Some(Ok(Message::Close(None))) | None => Err(Failure::Unavailable("closed by the node".into())),
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(broken(error)),
    }
}

fn broken(error: tungstenite::Error) -> Failure {
    Failure::Unavailable(format!("connection lost: {error}"))
}

// === CommandRun ===

/// The execution of one call.
struct CommandRun {
    /// `None` echoes the params.
    command: Option<Command>,
    params: Option<Box<RawValue>>,
    timeout: Duration,
}

impl CommandRun {
    fn new(args: &ProvideArgs, method: &str, params: Option<&RawValue>, meta: CallerMeta) -> Self {
        let command = match args.command.as_slice() {
            [] => None,
            [line] => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(line);
                Some(shell)
            }
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments);
                Some(command)
            }
        };
        let command = command.map(|mut command| {
            command.env("WEIR_SERVICE", &args.service).env("WEIR_METHOD", method);
            command.env("WEIR_CALLER", meta.caller.as_deref().unwrap_or_default());
            // The output of the command is sent to callers and must not leak the token.
            command.env_remove("WEIR_TOKEN");
            // A process group of its own, so that Ctrl-C does not reach it and running calls finish.
            command.process_group(0);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            command
        });
        CommandRun { command, params: params.map(ToOwned::to_owned), timeout: args.timeout }
    }

    async fn reply(self) -> CallReply {
        let Some(command) = self.command else {
            return CallReply::Result(self.params.unwrap_or_else(|| RawValue::NULL.to_owned()));
        };
        match timeout(self.timeout, execute(command, self.params.as_deref())).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => {
                CallReply::Error(json!({ "code": -32000, "message": format!("the command failed: {error}") }))
            }
            Err(_) => CallReply::Error(json!({ "code": -32000, "message": "the command exceeded its timeout" })),
        }
    }
}

async fn execute(mut command: Command, params: Option<&RawValue>) -> io::Result<CallReply> {
    let mut child = command.spawn()?;
    let mut group = ProcessGroup(child.id().and_then(|id| Pid::from_raw(id as i32)));
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let write = async {
        if let (Some(mut stdin), Some(params)) = (stdin, params) {
            // A command need not read its params.
            match stdin.write_all(params.get().as_bytes()).await {
                Ok(()) => stdin.write_all(b"\n").await.or_else(ignore_broken_pipe),
                Err(error) => ignore_broken_pipe(error),
            }
        } else {
            Ok(())
        }
    };
    let mut printed = Vec::new();
    let read = async {
        match stdout {
            Some(stdout) => stdout.take(MAX_BYTES as u64 + 1).read_to_end(&mut printed).await.map(drop),
            None => Ok(()),
        }
    };
    // Concurrently, because a command can fill the output pipe before it has read its input.
    let (written, read) = tokio::join!(write, read);
    written?;
    read?;
    if printed.len() > MAX_BYTES {
        return Err(io::Error::other("printed more than 16 MiB"));
    }
    let status = child.wait().await?;
    // The process is reaped and its id can be reused, so the group must not be killed.
    group.0 = None;
    let text = String::from_utf8_lossy(&printed);
    let text = text.trim();
    if status.success() {
        return Ok(CallReply::Result(match text {
            "" => RawValue::NULL.to_owned(),
            text => serde_json::value::to_raw_value(&JsonOrText::of(text)).map_err(io::Error::other)?,
        }));
    }
    // A failed command can print a JSON-RPC error.
    let printed: Value = parse_owned(text.as_bytes()).unwrap_or_default();
    if let (Some(code), Some(message)) = (printed["code"].as_i64(), printed["message"].as_str()) {
        let mut error = json!({ "code": code, "message": message });
        if let Some(data) = printed.get("data") {
            error["data"] = data.clone();
        }
        return Ok(CallReply::Error(error));
    }
    Ok(CallReply::Error(json!({ "code": -32000, "message": format!("the command failed ({status})") })))
}

/// The process group of a command, killed on drop: a cancelled call drops it.
struct ProcessGroup(Option<Pid>);

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Fails if all processes have exited.
            let _ = kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

fn ignore_broken_pipe(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}

// === StopSignals ===

/// The signals SIGINT and SIGTERM.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::Failed(format!("signals: {error}")));
        Ok(StopSignals { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
