// npm json-rpc-2.0: caller, subscriber and provider on one socket, without an adapter.

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { JSONRPCClient, JSONRPCErrorException, JSONRPCServer, JSONRPCServerAndClient } from "json-rpc-2.0";
import WebSocket from "ws";
import { Weir, within } from "../../support/weir.mjs";

async function connect(t, weir) {
  const ws = new WebSocket(weir.ws);
  t.after(() => ws.terminate());
  const rpc = new JSONRPCServerAndClient(new JSONRPCServer({ errorListener() {} }), new JSONRPCClient(m => ws.send(JSON.stringify(m))));
  ws.on("message", m => rpc.receiveAndSend(JSON.parse(m)));
  await within("the socket to open", once(ws, "open"));
  rpc.ws = ws;
  return rpc;
}

test("json-rpc-2.0", async t => {
  const weir = await Weir.start(t);

  await t.test("provides a service that HTTP and sockets call", async t => {
    const provider = await connect(t, weir);
    provider.addMethod("add", ([a, b]) => a + b);
    assert.deepEqual(await provider.request("weir.provide", { service: "math" }), { service: "math", providers: 1 });

    assert.equal(await weir.json("POST", "/v1/services/math/add", [1, 2]), 3);
    const caller = await connect(t, weir);
    assert.equal(await caller.request("math/add", [20, 22]), 42);
    assert.equal(await caller.request("weir.call", { service: "math", method: "add", params: [2, 3] }), 5);
    // A service may call itself over the socket that provides it: two id tables, no collision.
    assert.equal(await provider.request("math/add", [4, 5]), 9);
  });

  await t.test("its errors reach the caller unmodified", async t => {
    const provider = await connect(t, weir);
    provider.addMethod("find", () => {
      throw new JSONRPCErrorException("no such user", 42, { id: 7 });
    });
    provider.addMethod("crash", () => {
      throw new Error("boom");
    });
    await provider.request("weir.provide", { service: "users" });
    const caller = await connect(t, weir);

    await assert.rejects(caller.request("users/find", {}), { message: "no such user", code: 42, data: { id: 7 } });
    await assert.rejects(caller.request("users/crash", {}), { message: "boom" });
    await assert.rejects(caller.request("users/absent", {}), { code: -32601 });
    const answer = await fetch(`${weir.url}/v1/services/users/find`, { method: "POST", body: "{}" });
    assert.equal(answer.status, 422);
    assert.equal(answer.headers.get("content-type"), "application/problem+json");
    const problem = await answer.json();
    assert.equal(problem.code, "service_error");
    assert.deepEqual(problem.error, { code: 42, message: "no such user", data: { id: 7 } });
  });

  await t.test("undefined results are null in both directions", async t => {
    const provider = await connect(t, weir);
    provider.addMethod("nothing", () => undefined);
    await provider.request("weir.provide", { service: "void" });
    const caller = await connect(t, weir);
    assert.equal(await caller.request("void/nothing"), null);
    assert.equal(await weir.json("POST", "/v1/services/void/nothing"), null);
    // A response with neither result nor error makes this library throw and leaves its call pending.
    await caller.request("weir.publish", { channel: "void", data: 1 });
    const { next } = await caller.request("weir.read", { channels: ["void"], consumer: "void" });
    assert.equal(await caller.request("weir.commit", { consumer: "void", after: next }), null);
  });

  await t.test("ignores the extra member of a provider that asked for meta", async t => {
    const provider = await connect(t, weir);
    const seen = [];
    provider.addMethodAdvanced("who", async request => {
      seen.push(request);
      return { jsonrpc: "2.0", id: request.id, result: "ok" };
    });
    await provider.request("weir.provide", { service: "meta", meta: true });
    const caller = await connect(t, weir);
    assert.equal(await caller.request("meta/who", { a: 1 }), "ok");
    assert.deepEqual(Object.keys(seen[0]).sort(), ["id", "jsonrpc", "meta", "method", "params"]);
    assert.equal(typeof seen[0].meta.deadline_ms, "number");

    await provider.request("weir.withdraw", { service: "meta" });
    await provider.request("weir.provide", { service: "plain" });
    provider.addMethodAdvanced("bare", async request => {
      seen.push(request);
      return { jsonrpc: "2.0", id: request.id, result: "ok" };
    });
    assert.equal(await caller.request("plain/bare", { a: 1 }), "ok");
    assert.deepEqual(Object.keys(seen[1]).sort(), ["id", "jsonrpc", "method", "params"]);
    assert.match(seen[1].id, /^w:/);
  });

  await t.test("it subscribes with a handler of the method weir.event", async t => {
    const rpc = await connect(t, weir);
    const events = [];
    const third = new Promise(resolve => {
      rpc.addMethod("weir.event", event => {
        events.push(event);
        if (events.length === 3) resolve();
      });
    });
    await weir.publish("orders", { id: 1 });
    await rpc.request("weir.subscribe", { channels: [{ channel: "orders", after: "earliest" }] });
    await rpc.request("weir.publish", { channel: "orders", type: "created", data: { id: 2 } });
    await weir.publish("orders", { id: 3 });
    await within("three events", third);
    assert.deepEqual(events.map(event => [event.offset, event.data.id]), [[1, 1], [2, 2], [3, 3]]);
    assert.equal(events[1].type, "created");
  });

  await t.test("1,000 calls in flight on one socket are answered", async t => {
    const provider = await connect(t, weir);
    provider.addMethod("double", ({ n }) => n * 2);
    await provider.request("weir.provide", { service: "twice" });
    const caller = await connect(t, weir);
    const results = await Promise.all(Array.from({ length: 1000 }, (_, n) => caller.request("twice/double", { n })));
    assert.deepEqual(results, Array.from({ length: 1000 }, (_, n) => n * 2));
  });

  await t.test("calls to a provider that disconnects fail at once", async t => {
    const provider = await connect(t, weir);
    provider.addMethod("hang", () => {
      provider.ws.terminate();
      return new Promise(() => {});
    });
    await provider.request("weir.provide", { service: "doomed" });
    const caller = await connect(t, weir);
    await assert.rejects(within("provider_gone", caller.request("doomed/hang", {})), {
      code: -32022,
      data: { code: "provider_gone", executed: "maybe" },
    });
  });

  await t.test("a call times out with an error, and its late reply is dropped", async t => {
    const provider = await connect(t, weir);
    let answer;
    provider.addMethod("slow", () => new Promise(resolve => (answer = () => resolve("late"))));
    await provider.request("weir.provide", { service: "lazy" });
    const caller = await connect(t, weir);
    const late = new Promise(resolve => caller.addMethod("weir.late", resolve));
    const call = { jsonrpc: "2.0", id: "my own id", method: "weir.call" };
    const response = await caller.requestAdvanced({ ...call, params: { service: "lazy", method: "slow", timeout: "100ms", late: true } });
    assert.equal(response.error.code, -32023);
    assert.deepEqual(response.error.data, { code: "timeout", executed: "maybe" });
    answer();
    assert.deepEqual(await within("weir.late", late), { id: "my own id", result: "late" });
  });
});
