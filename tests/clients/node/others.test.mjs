// npm simple-jsonrpc-js and vscode-jsonrpc: callers and providers.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createRequire } from "node:module";
import { test } from "node:test";
import { AbstractMessageReader, AbstractMessageWriter, CancellationTokenSource, createMessageConnection } from "vscode-jsonrpc/node";
import WebSocket from "ws";
import { Weir, until, within } from "../../support/weir.mjs";

const SimpleJsonRpc = createRequire(import.meta.url)("simple-jsonrpc-js");

async function socket(t, weir) {
  const ws = new WebSocket(weir.ws);
  t.after(() => ws.terminate());
  await within("the socket to open", once(ws, "open"));
  return ws;
}

async function simple(t, weir) {
  const ws = await socket(t, weir);
  const rpc = new SimpleJsonRpc();
  rpc.toStream = text => ws.send(text);
  ws.on("message", data => rpc.messageHandler(data.toString()));
  return rpc;
}

test("simple-jsonrpc-js", async t => {
  const weir = await Weir.start(t);

  await t.test("calls and provides, by name and by position", async t => {
    const provider = await simple(t, weir);
    provider.on("add", ["a", "b"], (a, b) => a + b);
    await provider.call("weir.provide", { service: "math" });
    const caller = await simple(t, weir);
    assert.equal(await caller.call("math/add", { a: 1, b: 2 }), 3);
    assert.equal(await caller.call("math/add", [1, 2]), 3);
    assert.equal(await weir.json("POST", "/v1/services/math/add", [3, 4]), 7);
  });

  await t.test("subscribes with on('weir.event', 'pass')", async t => {
    const rpc = await simple(t, weir);
    const event = new Promise(resolve => rpc.on("weir.event", "pass", resolve));
    await rpc.call("weir.subscribe", { channels: ["news"] });
    await weir.publish("news", "hello");
    assert.equal((await within("the event", event)).data, "hello");
  });

  await t.test("breaks: its responses to unknown notifications are ignored", async t => {
    const rpc = await simple(t, weir); // no weir.event handler
    await rpc.call("weir.subscribe", { channels: ["noise"] });
    for (let n = 0; n < 30; n += 1) await weir.publish("noise", n); // more than the limit of invalid messages in a minute
    const ignored = async () => [...(await weir.metrics())].find(([name]) => name.startsWith("weir_ws_ignored_total"))?.[1] ?? 0;
    await until("thirty answers to be ignored", async () => (await ignored()) >= 30);
    assert.deepEqual(await rpc.call("weir/echo", [1]), [1]);
  });
});

/** The transport of vscode-ws-jsonrpc: one message per frame, without Content-Length. */
class Reader extends AbstractMessageReader {
  constructor(ws) {
    super();
    this.ws = ws;
  }
  listen(callback) {
    this.ws.on("message", data => callback(JSON.parse(data.toString())));
    this.ws.on("close", () => this.fireClose());
    return { dispose() {} };
  }
}
class Writer extends AbstractMessageWriter {
  constructor(ws) {
    super();
    this.ws = ws;
  }
  async write(message) {
    this.ws.send(JSON.stringify(message));
  }
  end() {}
}

async function vscode(t, weir) {
  const ws = await socket(t, weir);
  const connection = createMessageConnection(new Reader(ws), new Writer(ws));
  connection.listen();
  t.after(() => connection.dispose());
  return connection;
}

test("vscode-jsonrpc", async t => {
  const weir = await Weir.start(t);

  await t.test("a call with id 0 is answered", async t => {
    const connection = await vscode(t, weir);
    assert.deepEqual(await within("the answer to id 0", connection.sendRequest("weir/echo", { n: 1 })), { n: 1 });
  });

  await t.test("provides and subscribes", async t => {
    const provider = await vscode(t, weir);
    provider.onRequest("greet", ({ name }) => `hello ${name}`);
    await provider.sendRequest("weir.provide", { service: "hello" });
    assert.equal(await weir.json("POST", "/v1/services/hello/greet", { name: "weir" }), "hello weir");
    const event = new Promise(resolve => provider.onNotification("weir.event", resolve));
    await provider.sendRequest("weir.subscribe", { channels: ["news"] });
    await weir.publish("news", 1);
    assert.equal((await within("the event", event)).data, 1);
  });

  await t.test("breaks: its $/cancelRequest cancels a call", async t => {
    const provider = await vscode(t, weir);
    const asked = new Promise(resolve => provider.onRequest("wait", () => new Promise(() => resolve())));
    const cancelled = new Promise(resolve => provider.onNotification("weir.cancel", resolve));
    await provider.sendRequest("weir.provide", { service: "patience", meta: true });
    const caller = await vscode(t, weir);
    const source = new CancellationTokenSource();
    const call = caller.sendRequest("patience/wait", {}, source.token);
    const refused = assert.rejects(call, { code: -32024 });
    await within("the call to arrive", asked);
    source.cancel();
    await within("the call to be cancelled", refused);
    assert.match((await within("weir.cancel", cancelled)).id, /^w:/);
  });
});
