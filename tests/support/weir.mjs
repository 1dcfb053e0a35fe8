// A real weir for a test: started on a free port and stopped with the test.

import { spawn } from "node:child_process";
import { once } from "node:events";
import net from "node:net";
import path from "node:path";
import { fileURLToPath } from "node:url";
import WebSocket from "ws";

export const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
export const BIN = process.env.WEIR_BIN ?? path.join(process.env.CARGO_TARGET_DIR ?? path.join(ROOT, "target"), "debug/weir");

/** How long a test waits for a condition, in ms. CI has two busy cores. */
export const PATIENCE = 20_000;

/** Chromium as root, without a screen and without requests to the servers of its vendor. */
export const CHROMIUM_ARGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];

/** Resolves with the first truthy value of `probe`. Rejects with `what` if there is none in time. */
export async function until(what, probe, patience = PATIENCE) {
  const deadline = Date.now() + patience;
  let last;
  for (;;) {
    try {
      const value = await probe();
      if (value) return value;
      last = undefined;
    } catch (error) {
      last = error;
    }
    if (Date.now() > deadline) throw new Error(`waited ${patience} ms for ${what}`, { cause: last });
    await new Promise(resolve => setTimeout(resolve, 10));
  }
}

/** `promise`, or a rejection with `what` if it does not settle in time. */
export function within(what, promise, patience = PATIENCE) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${patience} ms for ${what}`)), patience);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

export class Weir {
  /**
   * Starts `weir serve` and waits until it is ready. `env` are `WEIR__…` settings.
   * With a test context the process ends with the test.
   */
  static async start(t, { port = 0, env = {}, args = [] } = {}) {
    const weir = new Weir();
    weir.log = "";
    // Settings of the developer's environment are not inherited.
    const inherited = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("WEIR_")));
    weir.process = spawn(BIN, ["serve", "--listen", `127.0.0.1:${port}`, ...args], {
      cwd: path.join(ROOT, "tests"), // there is no config.toml
      env: { ...inherited, ...env },
      stdio: ["ignore", "pipe", "pipe"],
    });
    weir.exited = once(weir.process, "exit").then(([code, signal]) => ({ code, signal }));
    weir.process.on("error", error => (weir.log += `${error}\n`));
    for (const stream of [weir.process.stdout, weir.process.stderr]) stream.on("data", chunk => (weir.log += chunk));
    t?.after(() => weir.kill());
    try {
      weir.port = await until("weir's address in its log", () => {
        if (weir.process.exitCode !== null || !weir.process.pid) throw new Error(`weir ended at start:\n${weir.log}`);
        return Number(/http:\/\/127\.0\.0\.1:([1-9]\d*)/.exec(weir.log)?.[1] ?? 0);
      });
      weir.host = `127.0.0.1:${weir.port}`;
      weir.url = `http://${weir.host}`;
      weir.ws = `ws://${weir.host}/v1/ws`;
      await until("weir to be ready", async () => (await fetch(`${weir.url}/health/ready`)).ok);
    } catch (error) {
      weir.kill();
      throw new Error(`${error.message}\n${weir.log}`, { cause: error });
    }
    return weir;
  }

  /** URLs of its listeners in the order of the configuration: the main ones, then those of adapters. */
  addresses() {
    return this.log.split("\n").filter(line => line.includes("listening")).map(line => /http:\/\/[^\s"\\]+/.exec(line)[0]);
  }

  kill(signal = "SIGKILL") {
    if (this.process.exitCode === null && this.process.signalCode === null) this.process.kill(signal);
    return this.exited;
  }

  /** Sends a request with an optional JSON body and returns the JSON of the response. Fails unless the status is 2xx. */
  async json(method, path, body, headers = {}) {
    const response = await fetch(this.url + path, {
      method,
      headers,
      body: body === undefined ? undefined : typeof body === "string" ? body : JSON.stringify(body),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return text ? JSON.parse(text) : null;
  }

  publish(channel, data, query = "") {
    return this.json("POST", `/v1/events?channel=${encodeURIComponent(channel)}${query}`, JSON.stringify(data));
  }

  async readers(channel) {
    return (await this.json("GET", `/v1/channels?channel=${encodeURIComponent(channel)}`)).readers;
  }

  /** Resolves when the channel has `count` readers, which receive every event published afterwards. */
  watched(channel, count = 1) {
    return until(`${count} readers of ${channel}`, async () => (await this.readers(channel)) === count);
  }

  /** All samples of /metrics: `name{labels}` → number. */
  async metrics() {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    const samples = new Map();
    for (const line of text.split("\n")) {
      const match = /^([a-zA-Z_:][^\s{]*(?:\{.*\})?) (\S+)$/.exec(line);
      if (match) samples.set(match[1], Number(match[2]));
    }
    return samples;
  }

  /** A JSON-RPC socket without a client library. */
  socket(t, protocols = [], query = "") {
    return Socket.open(t, this.ws + query, protocols);
  }
}

/** A WebSocket that queues its messages, which a test can wait for one at a time. */
export class Socket {
  static async open(t, url, protocols = [], options = {}) {
    const socket = new Socket();
    socket.messages = [];
    socket.waiting = [];
    socket.ws = new WebSocket(url, protocols, options);
    socket.ws.on("message", (data, binary) => {
      const message = { text: data.toString(), binary };
      const index = socket.waiting.findIndex(waiter => waiter.wanted(message));
      if (index < 0) socket.messages.push(message);
      else socket.waiting.splice(index, 1)[0].resolve(message);
    });
    socket.ws.on("error", error => (socket.error = error));
    socket.closed = new Promise(resolve => socket.ws.on("close", (code, reason) => resolve({ code, reason: reason.toString() })));
    t?.after(() => socket.ws.terminate());
    await within(`${url} to open`, once(socket.ws, "open"));
    return socket;
  }

  send(message) {
    this.ws.send(typeof message === "string" || Buffer.isBuffer(message) ? message : JSON.stringify(message));
  }

  /** The first message for which `wanted` is true. Others stay in the queue. */
  async text(wanted = () => true, what = "a message") {
    const index = this.messages.findIndex(wanted);
    if (index >= 0) return this.messages.splice(index, 1)[0].text;
    return within(what, new Promise(resolve => this.waiting.push({ wanted, resolve }))).then(message => message.text);
  }

  async next(wanted = () => true, what = "a message") {
    return JSON.parse(await this.text(message => wanted(JSON.parse(message.text)), what));
  }

  /** Sends a request and resolves with the whole response. */
  request(method, params, id = (this.id = (this.id ?? 0) + 1)) {
    this.send({ jsonrpc: "2.0", id, method, params });
    return this.next(message => message.id === id && !("method" in message), `the answer to ${method}`);
  }

  async call(method, params) {
    const response = await this.request(method, params);
    if (response.error) throw Object.assign(new Error(response.error.message), response.error);
    return response.result;
  }
}

/** A TCP proxy before weir that a test can interrupt. */
export class Relay {
  static async start(t, port) {
    const relay = new Relay();
    relay.pairs = new Set();
    relay.refusing = false;
    relay.count = 0;
    relay.server = net.createServer(client => {
      if (relay.refusing) return client.destroy();
      relay.count += 1;
      const upstream = net.connect(port, "127.0.0.1");
      const pair = [client, upstream];
      relay.pairs.add(pair);
      client.pipe(upstream).pipe(client);
      for (const end of pair) {
        end.on("error", () => {});
        end.on("close", () => {
          relay.pairs.delete(pair);
          for (const other of pair) other.destroy();
        });
      }
    });
    relay.server.listen(0, "127.0.0.1");
    await once(relay.server, "listening");
    relay.port = relay.server.address().port;
    relay.url = `http://127.0.0.1:${relay.port}`;
    t?.after(() => {
      relay.cut();
      relay.server.close();
    });
    return relay;
  }

  /** Resets every connection in both directions. */
  cut() {
    for (const pair of this.pairs) for (const end of pair) end.resetAndDestroy();
  }

  /** While refusing, new connections are closed at once, as if no server listened. */
  refuse(refusing) {
    this.refusing = refusing;
  }
}
