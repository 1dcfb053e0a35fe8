// The wire format, byte for byte: input that no library sends, and output that would break libraries.

import assert from "node:assert/strict";
import { test } from "node:test";
import WebSocket from "ws";
import { Socket, Weir, within } from "../../support/weir.mjs";

test("the wire", async t => {
  const weir = await Weir.start(t);

  await t.test("a caller's id comes back byte for byte", async t => {
    const socket = await weir.socket(t);
    const ids = ["0", "1", "-1", "1.5", "9007199254740993", "123456789012345678901234567890", "1e3", "null", '""', '"w:1"', '"ä\\u00e4\\n"', '"a b"'];
    for (const id of ids) {
      socket.send(`{"jsonrpc":"2.0","id":${id},"method":"weir/echo","params":[1]}`);
      const text = await socket.text(undefined, `the answer to ${id}`);
      assert.ok(text.includes(`"id":${id},`) || text.includes(`"id":${id}}`), `${id} in ${text}`);
      assert.deepEqual(JSON.parse(text).result, [1]);
    }
  });

  await t.test("similar ids of several callers of a provider come back byte for byte", async t => {
    const provider = await weir.socket(t);
    await provider.call("weir.provide", { service: "same" });
    const callers = await Promise.all(Array.from({ length: 5 }, () => weir.socket(t)));
    for (const caller of callers) for (const id of ["1", '"1"', "1.0"]) caller.send(`{"jsonrpc":"2.0","id":${id},"method":"same/m","params":[${callers.indexOf(caller)}]}`);
    const ids = new Set();
    for (let n = 0; n < 15; n += 1) {
      const call = await provider.next(message => message.method === "m", "a call");
      assert.deepEqual(Object.keys(call).sort(), ["id", "jsonrpc", "method", "params"]);
      assert.match(call.id, /^w:/);
      ids.add(call.id);
      provider.send({ jsonrpc: "2.0", id: call.id, result: call.params[0] });
    }
    assert.equal(ids.size, 15);
    for (const [index, caller] of callers.entries()) {
      const answers = [await caller.text(), await caller.text(), await caller.text()];
      for (const id of ["1", '"1"', "1.0"]) assert.ok(answers.some(text => text.includes(`"id":${id},`) || text.includes(`"id":${id}}`)), `${id} in ${answers}`);
      for (const text of answers) assert.equal(JSON.parse(text).result, index);
    }
  });

  await t.test("only a batch is answered with an array", async t => {
    const socket = await weir.socket(t);
    socket.send([
      { jsonrpc: "2.0", id: 1, method: "weir/echo", params: [1] },
      { jsonrpc: "2.0", method: "weir/echo", params: [2] },
      { jsonrpc: "2.0", id: 3, method: "weir.nonsense" },
      1,
    ]);
    const answers = await socket.next(Array.isArray, "the answer to a batch");
    assert.equal(answers.length, 3);
    assert.deepEqual(answers.find(answer => answer.id === 1).result, [1]);
    assert.equal(answers.find(answer => answer.id === 3).error.code, -32601);
    assert.equal(answers.find(answer => answer.id === null).error.code, -32600);
    // A batch of notifications has no response, not even an empty array.
    socket.send([{ jsonrpc: "2.0", method: "weir/echo", params: [2] }]);
    socket.send([]);
    const empty = await socket.next();
    assert.ok(!Array.isArray(empty));
    assert.equal(empty.error.code, -32600);
    assert.equal(empty.id, null);
    // Events are always single messages, never an array.
    await socket.call("weir.subscribe", { channels: ["burst"] });
    await weir.json("POST", "/v1/events", Array.from({ length: 50 }, (_, n) => ({ channel: "burst", data: n })));
    for (let n = 0; n < 50; n += 1) assert.equal((await socket.next(m => m.method === "weir.event")).params.data, n);
  });

  await t.test("errors have only code, message and data, whatever the provider sends", async t => {
    const provider = await weir.socket(t);
    await provider.call("weir.provide", { service: "odd" });
    const caller = await weir.socket(t);
    const ask = async answer => {
      const response = caller.request("odd/m", {});
      const call = await provider.next(message => message.method === "m", "the call");
      provider.send({ jsonrpc: "2.0", id: call.id, ...answer });
      return response;
    };
    const { error } = await ask({ error: { code: 7, message: "m", data: { a: 1 }, stack: "secret", extra: 1 }, trace: 1 });
    assert.deepEqual(error, { code: 7, message: "m", data: { a: 1 } });
    const bare = await ask({ error: { code: 8, message: "m" } });
    assert.deepEqual(bare.error, { code: 8, message: "m" });
    assert.deepEqual(Object.keys(bare).sort(), ["error", "id", "jsonrpc"]);
    const bad = await ask({});
    assert.equal(bad.error?.data.code, "bad_reply");
    const nul = await ask({ result: null });
    assert.ok("result" in nul && nul.result === null && !("error" in nul));
  });

  await t.test("unexpected messages are not answered", async t => {
    const socket = await weir.socket(t);
    for (const stray of [
      { jsonrpc: "2.0", id: "w:999", result: 1 },
      { jsonrpc: "2.0", id: 1, result: 1 },
      { jsonrpc: "2.0", id: 1, error: { code: 1, message: "x" } },
      { jsonrpc: "2.0", error: { code: 1, message: "x" } },
      { jsonrpc: "2.0", id: null, error: { code: 1, message: "x" } },
      { jsonrpc: "2.0", method: "weir.nonsense" },
      { jsonrpc: "2.0", method: "nobody/home", params: [] },
    ]) socket.send(stray);
    await socket.call("weir.ping");
    assert.deepEqual(socket.messages, []);
  });

  await t.test("JSON in binary frames is accepted and answered as text", async t => {
    const socket = await weir.socket(t);
    socket.send(Buffer.from('{"jsonrpc":"2.0","id":1,"method":"weir/echo","params":["ä"]}'));
    const index = await within("an answer", new Promise(resolve => socket.waiting.push({ wanted: () => true, resolve })));
    assert.equal(index.binary, false);
    assert.deepEqual(JSON.parse(index.text).result, ["ä"]);
  });

  await t.test("the first known subprotocol is chosen, and unknown ones are rejected", async t => {
    for (const [offered, chosen] of [[["weir.v1"], "weir.v1"], [["mqtt", "weir.jsonrpc"], "weir.jsonrpc"], [["jsonrpc", "weir.v1"], "jsonrpc"], [[], ""]]) {
      const socket = await weir.socket(t, offered);
      assert.equal(socket.ws.protocol, chosen, `of ${offered}`);
    }
    const ws = new WebSocket(weir.ws, ["mqtt"]);
    ws.on("error", () => {});
    const status = await within("the refusal", new Promise(resolve => ws.on("unexpected-response", (_, response) => resolve(response.statusCode))));
    assert.equal(status, 400);
    ws.terminate();
  });

  await t.test("invalid JSON is answered, and more than twenty in a minute end the connection", async t => {
    const socket = await weir.socket(t);
    socket.send("{nonsense");
    const answer = await socket.next();
    assert.equal(answer.error.code, -32700);
    assert.equal(answer.id, null);
    assert.deepEqual(await socket.call("weir/echo", [1]), [1]); // still open
    for (let n = 0; n < 25; n += 1) if (socket.ws.readyState === WebSocket.OPEN) socket.send("{nonsense");
    assert.equal((await within("the close", socket.closed)).code, 4502);
  });

  await t.test("a message that is too large closes with 1009", async t => {
    const socket = await weir.socket(t);
    socket.send(JSON.stringify({ jsonrpc: "2.0", id: 1, method: "weir/echo", params: ["x".repeat(1_200_000)] }));
    assert.equal((await within("the close", socket.closed)).code, 1009);
  });

  await t.test("a connection that uses no weir.* method receives nothing unsolicited, not even the drain", async t => {
    const leaving = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "1s" } });
    const silent = await leaving.socket(t);
    assert.deepEqual(await silent.call("weir/echo", [1]), [1]); // calls a service, never a weir.*
    const knowing = await leaving.socket(t);
    await knowing.call("weir.ping");
    leaving.kill("SIGTERM");
    const [one, two] = await within("both closes", Promise.all([silent.closed, knowing.closed]));
    for (const { code } of [one, two]) assert.ok(code === 1001 || code === 1012, `closed with ${code}`);
    assert.deepEqual(silent.messages, []);
    assert.deepEqual(knowing.messages.map(message => JSON.parse(message.text).method), ["weir.drain"]);
  });

  await t.test("query parameters subscribe a socket at once", async t => {
    await weir.publish("log", 1);
    await weir.publish("log", 2);
    const socket = await Socket.open(t, `${weir.ws}?channel=log&last=1`);
    assert.equal((await socket.next(m => m.method === "weir.event")).params.data, 2);
    await weir.publish("log", 3);
    assert.equal((await socket.next(m => m.method === "weir.event")).params.data, 3);
  });

  await t.test("1,000 publishes of one connection are appended in order, requests and notifications alike", async t => {
    const socket = await weir.socket(t);
    for (let n = 0; n < 1000; n += 1) socket.send({ jsonrpc: "2.0", ...(n % 2 ? { id: n } : {}), method: "weir.publish", params: { channel: "order", data: n } });
    await socket.next(message => message.id === 999, "the last answer");
    const seen = [];
    let after = "earliest";
    while (seen.length < 1000) {
      const page = await weir.json("GET", `/v1/events?channel=order&after=${after}&limit=1000&wait=5s`);
      assert.ok(page.events.length > 0);
      seen.push(...page.events.map(event => event.data));
      after = page.next;
    }
    assert.deepEqual(seen, Array.from({ length: 1000 }, (_, n) => n));
  });

  await t.test("calls of one connection to one provider keep their order", async t => {
    const provider = await weir.socket(t);
    await provider.call("weir.provide", { service: "ordered" });
    const caller = await weir.socket(t);
    for (let n = 0; n < 900; n += 1) caller.send({ jsonrpc: "2.0", id: n, method: "ordered/m", params: [n] });
    for (let n = 0; n < 900; n += 1) assert.deepEqual((await provider.next(m => m.method === "m")).params, [n]);
  });

  await t.test("calls over the limit are answered limit_reached, and the socket is still read", async t => {
    const both = await weir.socket(t); // caller and provider on one socket would deadlock if weir stopped reading
    await both.call("weir.provide", { service: "self", concurrency: 2000 });
    for (let n = 0; n < 1100; n += 1) both.send({ jsonrpc: "2.0", id: `c${n}`, method: "self/m", params: [n] });
    const refused = await both.next(message => message.error !== undefined, "a refusal");
    assert.equal(refused.error.data.code, "limit_reached");
    const first = await both.next(message => message.method === "m");
    both.send({ jsonrpc: "2.0", id: first.id, result: "done" });
    assert.equal((await both.next(message => message.id === `c${first.params[0]}`)).result, "done");
  });
});
