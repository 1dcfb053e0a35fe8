// Clients that record results and events for the judge. Each one reconnects to another node after every error and
// retries until the end of the run.

import { setMaxListeners } from "node:events";
import { setTimeout as pause } from "node:timers/promises";
import WebSocket from "ws";

const next = list => list[Math.floor(Math.random() * list.length)];
const at = event => ({ epoch: event.epoch, offset: event.offset });

/** The state that all clients of one run share: addresses, timeouts and histories. */
export class Run {
  constructor({ urls, patience = 8_000, name = Math.random().toString(36).slice(2, 8) }) {
    Object.assign(this, { urls, patience, name });
    this.history = { writes: [], readers: [], calls: [], runs: [], grants: [] };
    this.writing = true;
    this.over = new AbortController();
    setMaxListeners(0, this.over.signal);
    this.tasks = [];
    this.troubles = new Map();
    this.ids = 0;
  }

  get isOver() {
    return this.over.signal.aborted;
  }

  url() {
    return next(this.urls);
  }

  id() {
    return `${this.name}-${(this.ids += 1)}`;
  }

  /** Counts errors by kind: a run without errors has not tested much. */
  trouble(kind) {
    this.troubles.set(kind, (this.troubles.get(kind) ?? 0) + 1);
  }

  /** Repeats `work` until the run is over; exceptions count as errors. */
  keep(kind, work, going = () => !this.isOver) {
    this.tasks.push((async () => {
      while (going()) {
        try {
          await work();
        } catch (error) {
          if (this.isOver) break;
          this.trouble(`${kind}: ${reason(error)}`);
          await pause(50 + Math.random() * 150);
        }
      }
    })());
  }

  async stop() {
    this.over.abort();
    await Promise.all(this.tasks);
  }

  signal(patience = this.patience) {
    return AbortSignal.any([AbortSignal.timeout(patience), this.over.signal]);
  }

  async json(method, url, body, headers = {}) {
    const response = await fetch(url, { method, headers, body, signal: AbortSignal.timeout(this.patience) });
    const text = await response.text();
    return { status: response.status, ok: response.ok, body: text ? JSON.parse(text) : null };
  }
}

const reason = error => error.code ?? error.cause?.code ?? (error.name === "Error" ? error.message : error.name);

// --- writers ---

/** Publishes over HTTP, one event after the other; with a key it retries unconfirmed ones. */
export function writer(run, { channel, keyed, every }) {
  const by = keyed ? undefined : run.id();
  run.keep("publish", async () => {
    await pause(every * (0.5 + Math.random()));
    if (run.writing) await publish(run, channel, run.id(), keyed, by);
  }, () => run.writing);
}

/** Publishes one event, and with a key retries until it is published. Resolves with whether it is. */
export async function publish(run, channel, id, keyed, by) {
  const query = `channel=${encodeURIComponent(channel)}${keyed ? `&key=${id}` : ""}`;
  for (;;) {
    const write = { channel, id, keyed, by, outcome: "maybe" };
    run.history.writes.push(write);
    try {
      const { status, ok, body } = await run.json("POST", `${run.url()}/v1/events?${query}`, JSON.stringify({ id }));
      if (ok) Object.assign(write, { outcome: "placed", at: at(body), duplicate: body.duplicate });
      else {
        if (body.executed === "no") write.outcome = "no";
        run.trouble(`publish: ${status} ${body.code}`);
      }
    } catch (error) {
      run.trouble(`publish: ${reason(error)}`);
    }
    if (write.outcome === "placed" || !keyed || run.isOver) return write.outcome === "placed";
    await pause(100 + Math.random() * 200);
  }
}

/** Publishes one event to each of several channels in one request. */
export function batcher(run, { channels, every }) {
  run.keep("batch", async () => {
    await pause(every * (0.5 + Math.random()));
    const events = channels.map(channel => ({ channel, data: { id: run.id() } }));
    const writes = events.map(event => ({ channel: event.channel, id: event.data.id, outcome: "maybe" }));
    run.history.writes.push(...writes);
    const { status, ok, body } = await run.json("POST", `${run.url()}/v1/events`, JSON.stringify(events));
    const placed = ok ? body : body.placed ?? [];
    for (const [n, write] of writes.entries()) {
      if (placed[n]) Object.assign(write, { outcome: "placed", at: at(placed[n]) });
      else if (body.executed === "no") write.outcome = "no";
    }
    if (!ok) run.trouble(`batch: ${status} ${body.code}`);
  }, () => run.writing);
}

/** Publishes over a WebSocket with several in flight; they are appended in the order in which they were sent. */
export function pipeliner(run, { channel, every, depth = 8 }) {
  run.keep("ws publish", () => conversation(run, async socket => {
    const by = run.id();
    while (run.writing && !run.isOver) {
      await pause(every * depth * (0.5 + Math.random()));
      const answers = Array.from({ length: depth }, () => {
        const id = run.id();
        const write = { channel, id, by, outcome: "maybe" };
        run.history.writes.push(write);
        return socket.request("weir.publish", { channel, data: { id } }).then(
          result => Object.assign(write, { outcome: "placed", at: at(result) }),
          error => {
            if (error.data?.executed === "no") write.outcome = "no";
            run.trouble(`ws publish: ${error.data?.code ?? reason(error)}`);
            if (!error.data) throw error;
          },
        );
      });
      await Promise.all(answers);
    }
  }), () => run.writing);
}

// --- readers ---

function log(run, name, channel, exact, consumer = false) {
  const reader = { name, channel, exact, consumer, seen: [] };
  run.history.readers.push(reader);
  return reader;
}

const seen = event => ({ event: { epoch: event.epoch, offset: event.offset, id: event.data?.id, time: event.time } });

/** A stream (SSE) of one channel, which is exact, or of several, which may repeat events after a reconnect. */
export function streamer(run, { name, channels }) {
  const logs = new Map(channels.map(channel => [channel, log(run, name, channel, channels.length === 1)]));
  const query = channels.map(channel => `channel=${encodeURIComponent(channel)}`).join("&");
  let last;
  run.keep("sse", async () => {
    const opening = new AbortController();
    const stop = () => opening.abort();
    run.over.signal.addEventListener("abort", stop);
    let patience = setTimeout(stop, run.patience);
    try {
      const headers = last === undefined ? {} : { "last-event-id": last };
      const start = last === undefined ? "&after=earliest" : "";
      const response = await fetch(`${run.url()}/v1/sse?${query}${start}`, { headers, signal: opening.signal });
      if (!response.ok) throw new Error(`status ${response.status}`);
      for (const reader of logs.values()) reader.seen.push({ connected: true });
      let text = "";
      let block = {};
      for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
        clearTimeout(patience);
        patience = setTimeout(stop, run.patience);
        text += chunk;
        const lines = text.split("\n");
        text = lines.pop();
        for (const line of lines) {
          if (line !== "") {
            const colon = line.indexOf(":");
            if (colon > 0) block[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
            continue;
          }
          // As in an EventSource, the id applies when its block is complete.
          if (block.id !== undefined) last = block.id;
          if (block.data !== undefined && block.event === undefined) {
            const event = JSON.parse(block.data);
            logs.get(event.channel).seen.push(seen(event));
          } else if (block.event === "weir.gap") {
            const gap = JSON.parse(block.data);
            logs.get(gap.channel).seen.push({ gap });
          } else if (block.event === "weir.retry") {
            run.trouble(`sse: ${JSON.parse(block.data).code}`);
          }
          block = {};
        }
      }
    } finally {
      clearTimeout(patience);
      run.over.signal.removeEventListener("abort", stop);
      opening.abort();
    }
    await pause(20 + Math.random() * 100);
  });
}

/** Subscriptions of one WebSocket, resumed at the position of each channel. */
export function subscriber(run, { name, channels }) {
  const logs = new Map(channels.map(channel => [channel, log(run, name, channel, true)]));
  const positions = new Map();
  run.keep("ws", () => conversation(run, async socket => {
    const record = (kind, params) => {
      logs.get(params.channel).seen.push(kind === "weir.gap" ? { gap: params } : seen(params));
      positions.set(params.channel, kind === "weir.gap" ? before(params.next) : `${params.epoch}-${params.offset}`);
    };
    const early = [];
    let ready = false;
    socket.notified = (method, params) => {
      if (method !== "weir.event" && method !== "weir.gap") return;
      if (ready) record(method, params);
      else early.push([method, params]);
    };
    for (const reader of logs.values()) reader.seen.push({ connected: true });
    const wanted = channels.map(channel => ({ channel, after: positions.get(channel) ?? "earliest" }));
    const { channels: begun } = await socket.request("weir.subscribe", { channels: wanted });
    for (const { channel, position, gap } of begun) {
      if (gap) record("weir.gap", gap);
      else if (!positions.has(channel)) positions.set(channel, position);
    }
    ready = true;
    for (const [method, params] of early) record(method, params);
    await socket.closed;
  }));
}

/** The position before `next`. */
function before(next) {
  const dash = next.lastIndexOf("-");
  const epoch = next.slice(0, dash);
  return epoch === "0" ? next : `${epoch}-${Number(next.slice(dash + 1)) - 1}`;
}

/** Long-polls with a token, or with a consumer whose position the server stores. */
export function poller(run, { name, channels, consumer }) {
  const logs = new Map(channels.map(channel => [channel, log(run, name, channel, false, consumer !== undefined)]));
  const query = channels.map(channel => `channel=${encodeURIComponent(channel)}`).join("&");
  let after;
  run.keep(consumer ? "consumer" : "poll", async () => {
    const place = [consumer && `consumer=${consumer}`, after !== undefined && `after=${encodeURIComponent(after)}`].filter(Boolean);
    const url = `${run.url()}/v1/events?${[query, "wait=2s", ...place].join("&")}`;
    try {
      const response = await fetch(url, { signal: run.signal() });
      const body = await response.json();
      if (!response.ok) throw new Error(`${response.status} ${body.code}`);
      for (const gap of body.gaps) logs.get(gap.channel).seen.push({ gap });
      for (const event of body.events) logs.get(event.channel).seen.push(seen(event));
      after = body.next;
    } catch (error) {
      // The next response may repeat the lost one; a consumer starts at the position of the server.
      if (consumer) after = undefined;
      for (const reader of logs.values()) reader.seen.push({ connected: true });
      throw error;
    }
  });
}

// --- callers and providers ---

/** Provides `service` on any node; with `exclusive` it retries until granted, and records the fence. */
export function provider(run, { name, service, exclusive }) {
  run.keep(`provider`, () => conversation(run, async socket => {
    let fence;
    socket.requested = (method, params) => {
      run.history.runs.push({ id: params.id, by: name, fence });
      return { by: name };
    };
    for (;;) {
      const asked = Date.now();
      try {
        const granted = await socket.request("weir.provide", { service, exclusive });
        if (exclusive) {
          fence = granted.fence;
          run.history.grants.push({ by: name, fence, asked, granted: Date.now() });
        }
      } catch (error) {
        if (!error.data) throw error;
        if (error.data.code !== "service_taken") run.trouble(`provide: ${error.data.code}`);
        await pause(200 + Math.random() * 300);
        continue;
      }
      // Held until the socket closes or the name is lost, and withdrawn from time to time, so that others get it.
      const lost = new Promise(resolve => (socket.notified = method => method === "weir.withdrawn" && resolve()));
      const turn = exclusive ? pause(3_000 + Math.random() * 3_000) : new Promise(() => {});
      const why = await Promise.race([lost.then(() => "lost"), socket.closed, turn.then(() => "turn")]);
      if (why === "turn") await socket.request("weir.withdraw", { service });
      else if (why !== "lost") return;
    }
  }));
}

/** Calls `service` through random nodes, over HTTP or a WebSocket. */
export function caller(run, { service, every, ws }) {
  const note = (call, error) => {
    Object.assign(call, { outcome: "error", executed: error.executed ?? "maybe", code: error.code });
    run.trouble(`call: ${error.code}`);
  };
  const begin = () => {
    const call = { id: run.id(), asked: Date.now(), outcome: "error", executed: "maybe" };
    run.history.calls.push(call);
    return call;
  };
  if (!ws) {
    return run.keep("call", async () => {
      await pause(every * (0.5 + Math.random()));
      const call = begin();
      const { ok, body } = await run.json("POST", `${run.url()}/v1/services/${service}/run?timeout=5s`, JSON.stringify({ id: call.id }));
      if (ok) Object.assign(call, { outcome: "result", by: body.by });
      else note(call, body);
    }, () => run.writing);
  }
  run.keep("ws call", () => conversation(run, async socket => {
    while (run.writing && !run.isOver) {
      await pause(every * (0.5 + Math.random()));
      const call = begin();
      try {
        const { by } = await socket.request("weir.call", { service, method: "run", params: { id: call.id }, timeout: "5s" });
        Object.assign(call, { outcome: "result", by });
      } catch (error) {
        if (!error.data) throw error;
        note(call, error.data);
      }
    }
  }), () => run.writing);
}

// --- a JSON-RPC socket ---

/** Opens a socket to any node and runs `work` with it. Ends when either ends. */
async function conversation(run, work) {
  const ws = new WebSocket(`${run.url().replace(/^http/, "ws")}/v1/ws`, { handshakeTimeout: run.patience });
  const waiting = new Map();
  const socket = { notified: () => {}, requested: () => null };
  let lastInput = Date.now();
  let failed;
  socket.closed = new Promise((_, reject) => (failed = reject));
  socket.closed.catch(() => {});
  const end = error => {
    failed(error);
    for (const { reject } of waiting.values()) reject(error);
    waiting.clear();
    ws.terminate();
  };
  ws.on("error", end);
  ws.on("close", (code, text) => end(Object.assign(new Error(`closed ${code} ${text}`), { code: `close ${code}` })));
  const ended = () => end(new Error("the run is over"));
  run.over.signal.addEventListener("abort", ended);
  // A paused node neither answers nor closes connections.
  const watch = setInterval(() => {
    if (Date.now() - lastInput > run.patience) end(Object.assign(new Error("silence"), { code: "silence" }));
    else if (ws.readyState === WebSocket.OPEN) ws.ping();
  }, run.patience / 4);
  ws.on("pong", () => (lastInput = Date.now()));
  ws.on("message", text => {
    lastInput = Date.now();
    const message = JSON.parse(text);
    if (message.method === undefined) {
      const { resolve, reject } = waiting.get(message.id) ?? {};
      waiting.delete(message.id);
      if (message.error) reject?.(Object.assign(new Error(message.error.message), message.error));
      else resolve?.(message.result);
    } else if (message.id === undefined) {
      socket.notified(message.method, message.params);
    } else {
      ws.send(JSON.stringify({ jsonrpc: "2.0", id: message.id, result: socket.requested(message.method, message.params) }));
    }
  });
  let ids = 0;
  socket.request = (method, params) => new Promise((resolve, reject) => {
    if (ws.readyState !== WebSocket.OPEN) return reject(Object.assign(new Error("not open"), { code: "not open" }));
    ids += 1;
    waiting.set(ids, { resolve, reject });
    ws.send(JSON.stringify({ jsonrpc: "2.0", id: ids, method, params }));
  });
  try {
    await Promise.race([new Promise(resolve => ws.once("open", resolve)), socket.closed]);
    await Promise.race([work(socket), socket.closed]);
  } finally {
    clearInterval(watch);
    run.over.signal.removeEventListener("abort", ended);
    ws.terminate();
  }
}
