//! `weir provide`: a service that a command answers, or an echo.

use std::{
    collections::HashMap,
    io,
    process::Stdio,
    time::{Duration, Instant},
};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, header};
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
    Backoff, Failure, Lenient, Target,
    client::{Client, USER_AGENT, answer},
    connect::{Stream, connect},
    note,
};

/// A reply larger than any node takes would end the connection of every other call with it.
const LARGEST: usize = 16 << 20;
/// A connection that held so long was a good one: the next loss begins with a short wait again.
const STEADY: Duration = Duration::from_secs(10);
/// Pings come every 25 s unless weir is told otherwise; after this nobody is there any more.
const SILENCE: Duration = Duration::from_secs(120);
/// How long the node may take to accept the connection, and to answer `weir.provide`.
const HANDSHAKE: Duration = Duration::from_secs(30);

pub type Socket = WebSocketStream<Box<dyn Stream>>;

/// What is offered, and who answers.
pub struct Offer {
    pub service: String,
    pub concurrency: u32,
    pub exclusive: bool,
    pub timeout: Duration,
    /// Program and arguments, one text for the shell, or nothing for an echo.
    pub command: Vec<String>,
}

/// Provides until a signal comes, through lost connections. The first signal lets running calls finish.
pub async fn provide(client: &Client, offer: &Offer) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let mut backoff = Backoff::default();
    let mut connected = false;
    loop {
        let begun = Instant::now();
        let mut session = tokio::select! {
            session = Session::open(client, offer, connected) => session,
            () = stop.wait() => return Ok(()),
        };
        let ended = match &mut session {
            Ok(session) => {
                connected = true;
                session.serve(offer, &mut stop).await
            }
            Err(failure) => Err(std::mem::replace(failure, Failure::OutputClosed)),
        };
        let reason = match ended {
            Ok(()) => return Ok(()),
            Err(Failure::Unavailable(reason)) if connected => reason,
            // Refused, or nobody there the first time: a wrong URL should say so at once.
            Err(other) => return Err(other),
        };
        if begun.elapsed() > STEADY {
            backoff.reset();
        }
        let asked = session.ok().and_then(|session| session.come_back);
        let wait = asked.unwrap_or_else(|| backoff.next());
        note(format_args!("{reason}; again in {:.1}s", wait.as_secs_f32()));
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.wait() => return Ok(()),
        }
    }
}

/// One connection that provides the service.
struct Session {
    socket: Socket,
    running: JoinSet<Option<(Box<RawValue>, Reply)>>,
    /// Calls by the text of their id, to end those that are cancelled.
    calls: HashMap<Box<str>, AbortHandle>,
    /// When the node asked to come back.
    come_back: Option<Duration>,
}

/// What a call comes to.
enum Reply {
    Result(Box<RawValue>),
    Error(Value),
}

/// Whatever the node sends.
#[derive(Deserialize)]
struct Incoming<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: Option<String>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<Value>,
    #[serde(default)]
    meta: Meta,
}

#[derive(Default, Deserialize)]
struct Meta {
    #[serde(default)]
    caller: Option<String>,
}

#[derive(Serialize)]
struct Outgoing<'a> {
    jsonrpc: &'static str,
    id: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a Value>,
}

// === impl Session ===

impl Session {
    /// Connects and offers the service. `again` says that a connection of ours may still hold the name.
    async fn open(client: &Client, offer: &Offer, again: bool) -> Result<Self, Failure> {
        let late = |_| Failure::Unavailable("the node does not answer".into());
        let socket = timeout(HANDSHAKE, upgrade(client)).await.map_err(late)??;
        let mut session = Session { socket, running: JoinSet::new(), calls: HashMap::new(), come_back: None };
        let mut params = json!({
            "service": offer.service, "exclusive": offer.exclusive, "concurrency": offer.concurrency, "meta": true,
        });
        if offer.exclusive && again {
            params["takeover"] = true.into();
        }
        session.request("provide", "weir.provide", &params).await?;
        timeout(HANDSHAKE, session.accepted(offer, again)).await.map_err(late)??;
        Ok(session)
    }

    async fn accepted(&mut self, offer: &Offer, again: bool) -> Result<(), Failure> {
        loop {
            let text = self.next().await?;
            let Ok(message) = serde_json::from_str::<Incoming<'_>>(&text) else { continue };
            if let Some(error) = message.error {
                let code = error["data"]["code"].as_str().unwrap_or("error");
                let reason = format!("{code}: {}", error["message"].as_str().unwrap_or("no reason given"));
                // The connection that we lost may hold the name for as long as the node believes in it.
                let passing = matches!(code, "draining" | "overloaded" | "rate_limited" | "bus_unavailable")
                    || (again && code == "service_taken");
                return Err(if passing { Failure::Unavailable(reason) } else { Failure::Refused(reason) });
            }
            if let Some(result) = message.result {
                let result: Value = serde_json::from_str(result.get()).unwrap_or_default();
                let providers = result["providers"].as_u64().unwrap_or(1);
                note(format_args!("providing {} ({providers} in all)", offer.service));
                return Ok(());
            }
            // The first call can come before the answer.
            self.message(&text, offer).await?;
        }
    }

    async fn serve(&mut self, offer: &Offer, stop: &mut Stop) -> Result<(), Failure> {
        let mut leaving = false;
        loop {
            if leaving && self.running.is_empty() {
                let close = self.socket.close(None);
                let _ = timeout(Duration::from_secs(2), close).await;
                return Ok(());
            }
            tokio::select! {
                message = self.socket.next() => {
                    if let Some(text) = text(message)? {
                        self.message(&text, offer).await?;
                    }
                }
                Some(done) = self.running.join_next() => self.finished(done).await?,
                () = stop.wait() => {
                    if leaving {
                        return Ok(());
                    }
                    leaving = true;
                    note(format_args!("leaving; {} calls to finish, once more to leave them", self.running.len()));
                    self.request("withdraw", "weir.withdraw", &json!({ "service": offer.service })).await?;
                }
                () = sleep(SILENCE) => return Err(Failure::Unavailable("the node is silent".into())),
            }
        }
    }

    async fn message(&mut self, text: &str, offer: &Offer) -> Result<(), Failure> {
        let Ok(Incoming { id, method: Some(method), params, meta, .. }) = serde_json::from_str::<Incoming<'_>>(text)
        else {
            return Ok(());
        };
        match (method.as_str(), id) {
            ("weir.cancel", None) => {
                #[derive(Deserialize)]
                struct Cancel<'a> {
                    #[serde(borrow)]
                    id: &'a RawValue,
                }
                let cancel = params.and_then(|params| serde_json::from_str::<Cancel<'_>>(params.get()).ok());
                if let Some(call) = cancel.and_then(|cancel| self.calls.remove(cancel.id.get())) {
                    call.abort();
                }
            }
            ("weir.drain", None) => {
                let asked: Value =
                    params.map_or(Value::Null, |params| serde_json::from_str(params.get()).unwrap_or_default());
                self.come_back = asked["after_ms"].as_u64().map(Duration::from_millis);
            }
            ("weir.withdrawn", None) => {
                return Err(Failure::Refused(format!("{} was taken over by another provider", offer.service)));
            }
            (_, Some(id)) if self.running.len() >= offer.concurrency as usize => {
                let busy = Reply::Error(json!({ "code": -32021, "message": "at its concurrency" }));
                self.reply(id, &busy).await?;
            }
            (_, id) => {
                let work = Work::new(offer, &method, params, meta);
                let owned = id.map(ToOwned::to_owned);
                let key = id.map(|id| Box::<str>::from(id.get()));
                let task = self.running.spawn(async move {
                    let reply = work.run().await;
                    // Without an id nobody wants to know.
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
        done: Result<Option<(Box<RawValue>, Reply)>, tokio::task::JoinError>,
    ) -> Result<(), Failure> {
        // An error is a call that was cancelled.
        if let Ok(Some((id, reply))) = done {
            self.calls.remove(id.get());
            self.reply(&id, &reply).await?;
        }
        Ok(())
    }

    async fn reply(&mut self, id: &RawValue, reply: &Reply) -> Result<(), Failure> {
        let (result, error) = match reply {
            Reply::Result(result) => (Some(&**result), None),
            Reply::Error(error) => (None, Some(error)),
        };
        self.send(&Outgoing { jsonrpc: "2.0", id, result, error }).await
    }

    async fn request(&mut self, id: &str, method: &str, params: &Value) -> Result<(), Failure> {
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await
    }

    async fn send(&mut self, message: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(message).map_err(|error| Failure::Failed(error.to_string()))?;
        match timeout(SILENCE, self.socket.send(Message::text(text))).await {
            Ok(sent) => sent.map_err(broken),
            Err(_) => Err(Failure::Unavailable("the node takes nothing".into())),
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
pub async fn upgrade(client: &Client) -> Result<Socket, Failure> {
    let url = client.base.ws(&Target::new("/v1/ws"));
    let mut request = url.into_client_request().map_err(|error| Failure::Usage(error.to_string()))?;
    request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    if let Some(token) = client.token() {
        request.headers_mut().insert(header::AUTHORIZATION, token.clone());
    }
    let stream = connect(&client.base).await?;
    match client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            answer(response.status().as_u16(), body)?;
            Err(Failure::Failed(format!("HTTP status {} where a WebSocket should be", response.status())))
        }
        Err(error) => Err(broken(error)),
    }
}

/// Text of a message, or nothing for what is not for us; the end of the connection is an error.
fn text(message: Option<Result<Message, tungstenite::Error>>) -> Result<Option<String>, Failure> {
    match message {
        Some(Ok(Message::Text(text))) => Ok(Some(text.as_str().to_owned())),
        Some(Ok(Message::Close(Some(close)))) => {
            let reason = format!("closed by the node: {} {}", u16::from(close.code), close.reason);
            // From 4500 on coming back makes no sense.
            Err(match u16::from(close.code) >= 4500 || close.code == CloseCode::Policy {
                true => Failure::Refused(reason),
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

// === Work ===

/// One call to answer.
struct Work {
    /// None echoes.
    command: Option<Command>,
    params: Option<Box<RawValue>>,
    timeout: Duration,
}

impl Work {
    fn new(offer: &Offer, method: &str, params: Option<&RawValue>, meta: Meta) -> Self {
        let command = match offer.command.as_slice() {
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
            command.env("WEIR_SERVICE", &offer.service).env("WEIR_METHOD", method);
            command.env("WEIR_CALLER", meta.caller.as_deref().unwrap_or_default());
            // The token is ours; what the command prints goes to callers.
            command.env_remove("WEIR_TOKEN");
            // Ctrl-C is for us: running calls finish.
            command.process_group(0);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            command
        });
        Work { command, params: params.map(ToOwned::to_owned), timeout: offer.timeout }
    }

    async fn run(self) -> Reply {
        let Some(command) = self.command else {
            return Reply::Result(self.params.unwrap_or_else(|| RawValue::NULL.to_owned()));
        };
        match timeout(self.timeout, execute(command, self.params.as_deref())).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => Reply::Error(json!({ "code": -32000, "message": format!("the command: {error}") })),
            Err(_) => Reply::Error(json!({ "code": -32000, "message": "the command took too long" })),
        }
    }
}

async fn execute(mut command: Command, params: Option<&RawValue>) -> io::Result<Reply> {
    let mut child = command.spawn()?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id as i32)));
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let write = async {
        if let (Some(mut stdin), Some(params)) = (stdin, params) {
            // A command that does not read its params is welcome.
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
            Some(stdout) => stdout.take(LARGEST as u64 + 1).read_to_end(&mut printed).await.map(drop),
            None => Ok(()),
        }
    };
    // Together: a command may print before it has read everything.
    let (written, read) = tokio::join!(write, read);
    written?;
    read?;
    if printed.len() > LARGEST {
        return Err(io::Error::other("printed more than 16 MiB"));
    }
    let status = child.wait().await?;
    // Reaped: the number may soon be somebody else's.
    group.0 = None;
    let text = String::from_utf8_lossy(&printed);
    let text = text.trim();
    if status.success() {
        return Ok(Reply::Result(match text {
            "" => RawValue::NULL.to_owned(),
            text => serde_json::value::to_raw_value(&Lenient::of(text)).map_err(io::Error::other)?,
        }));
    }
    // A command may say why it failed the way JSON-RPC does.
    let said: Value = serde_json::from_str(text).unwrap_or_default();
    if let (Some(code), Some(message)) = (said["code"].as_i64(), said["message"].as_str()) {
        let mut error = json!({ "code": code, "message": message });
        if let Some(data) = said.get("data") {
            error["data"] = data.clone();
        }
        return Ok(Reply::Error(error));
    }
    Ok(Reply::Error(json!({ "code": -32000, "message": format!("the command failed ({status})") })))
}

/// A command and all that it started; ended when dropped, as when its call is cancelled.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Fails if they have all ended by themselves.
            let _ = kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

fn ignore_broken_pipe(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}

// === Stop ===

/// SIGINT and SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::Failed(format!("signals: {error}")));
        Ok(Stop { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
