// MicroStream clients: the events of the library over the real socket.io-client.

import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import { test } from "node:test";
import { io } from "socket.io-client";
import WebSocket from "ws";
import { MicroStream } from "../../support/microstream.mjs";
import { Socket, Weir, until, within } from "../../support/weir.mjs";

const ON = { args: ["--compat", "microstream"] };
const started = (t, env = {}) => Weir.start(t, { ...ON, env });
const handlers = {
  add: ({ a, b }) => ({ sum: a + b }),
  echo: data => data ?? {},
  fail: () => { throw new Error("broken"); },
  nothing: () => undefined,
  silent: () => MicroStream.SILENCE,
  double: ({ bytes }) => ({ twice: { bytes: Buffer.concat([bytes, bytes]) }, list: [bytes] }),
};

/** Asserts that everything clients held is released. */
const empty = weir => until("every gauge to be zero", async () => {
  const metrics = await weir.metrics();
  return ['weir_connections{transport="socketio"}', "weir_rpc_services", "weir_rpc_providers", "weir_rpc_in_flight"].every(name => metrics.get(name) === 0);
});

for (const [how, options] of Object.entries({
  "polling, then an upgrade": {},
  "polling only": { transports: ["polling"] },
  "websocket only": { transports: ["websocket"] },
})) {
  test(`requests and responses: ${how}`, async t => {
    const weir = await started(t);
    const a = await MicroStream.connect(t, weir.url, "A", handlers, options);
    const b = await MicroStream.connect(t, weir.url, "B", handlers, options);
    const transport = options.transports?.[0] ?? "websocket";
    await until("the transport", () => a.transport === transport && b.transport === transport);

    assert.deepEqual(await b.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
    assert.deepEqual(await a.request("B", "add", { a: 1, b: 2 }), { sum: 3 });
    assert.deepEqual(await a.request("A", "echo", { self: true }), { self: true }, "a service may call itself");
    for (const data of [5, "text", [1, [2]], false, { deep: { é: "\u{1f600}" } }]) assert.deepEqual(await b.request("A", "echo", data), data);
    assert.deepEqual(await b.request("A", "echo"), {});
    assert.deepEqual(await b.request("A", "nothing"), {}, "a response that is nothing does not kill its requester");

    await t.test("the payload is forwarded unmodified with unknown members", async () => {
      a.requests.length = 0;
      b.socket.emit("request", { targetService: "A", sibling: 1, payload: { id: "r1", event: "echo", data: null, extra: [1] } });
      assert.deepEqual(await a.got(), [{ id: "r1", event: "echo", data: null, extra: [1] }]);
      await until("the response", () => b.late.find(({ id }) => id === "r1"));
    });

    await t.test("buffers are received as buffers, also nested ones", async () => {
      const bytes = Buffer.from([0, 1, 255]);
      const { twice, list } = await b.request("A", "double", { bytes });
      assert.ok(Buffer.isBuffer(twice.bytes) && Buffer.isBuffer(list[0]));
      assert.deepEqual([...twice.bytes, ...list[0]], [0, 1, 255, 0, 1, 255, 0, 1, 255]);
      assert.deepEqual(await b.request("A", "echo", { text: '{"_placeholder":true,"num":0}', bytes }), { text: '{"_placeholder":true,"num":0}', bytes });
    });

    await t.test("errors", async () => {
      const error = (...request) => b.request(...request).then(() => assert.fail("no error"), error => error);
      assert.deepEqual(await error("ZZ", "add", {}, "r2"), {
        code: "TARGET_SERVICE_NOT_FOUND", message: 'Service "ZZ" not found', errorData: { targetService: "ZZ", requestID: "r2" },
      });
      assert.deepEqual(await error("A", "nope", {}, "r3"), {
        code: "EVENT_NOT_FOUND", message: 'Event "nope" not found', errorData: { event: "nope", requestID: "r3", serviceName: "A" },
      });
      assert.deepEqual(await error("A", "fail", {}, "r4"), {
        code: "INTERNAL_SERVER_ERROR", message: "Internal server error", errorData: { event: "fail", requestID: "r4", error: "broken" },
      });
    });

    await t.test("900 kB", async () => {
      const large = { text: "é".repeat(450_000) };
      assert.deepEqual(await b.request("A", "echo", large), large);
      const bytes = Buffer.alloc(600_000, 7);
      assert.deepEqual((await b.request("A", "echo", { bytes })).bytes, bytes);
    });

    await t.test("a thousand requests arrive in order", async () => {
      a.requests.length = 0;
      const answers = await Promise.all(Array.from({ length: 1_000 }, (_, n) => b.request("A", "echo", { n })));
      assert.deepEqual(a.requests.map(({ data }) => data.n), Array.from({ length: 1_000 }, (_, n) => n));
      assert.deepEqual(answers.map(({ n }) => n), Array.from({ length: 1_000 }, (_, n) => n));
    });

    await t.test("a name is free as soon as its client disconnects", async () => {
      a.close();
      const again = await MicroStream.connect(t, weir.url, "A", handlers, options);
      assert.deepEqual(await b.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
      again.close();
    });

    b.close();
    await empty(weir);
  });
}

test("MicroStream clients may use any event name, other clients any method name", async t => {
  const weir = await started(t);
  const names = ["user/get", "", "a\nb", "x".repeat(300), "toString", "é", "weir.publish", "/"];
  const a = await MicroStream.connect(t, weir.url, "shop/v1", Object.fromEntries(names.map(name => [name, () => ({ name })])));
  const b = await MicroStream.connect(t, weir.url, "B");
  for (const name of names) assert.deepEqual(await b.request("shop/v1", name, {}), { name });
  const socket = await weir.socket(t);
  assert.deepEqual(await socket.call("weir.call", { service: "shop/v1", method: "user/get" }), { name: "user/get" });
  assert.deepEqual(await weir.json("POST", "/v1/services/shop/v1/%C3%A9", {}), { name: "é" });
  assert.equal(a.requests.length, names.length + 2);
});

test("calls from JSON-RPC and HTTP", async t => {
  const weir = await started(t);
  await MicroStream.connect(t, weir.url, "A", {
    ...handlers,
    own: () => ({ error: { code: "OUT_OF_STOCK", message: "none left", errorData: { item: 7 } } }),
    odd: () => ({ error: true, more: 1 }),
    bytes: ({ in: bytes }) => ({ out: Buffer.from(bytes).reverse() }),
  });
  const socket = await weir.socket(t);
  assert.deepEqual(await socket.call("A/add", { a: 1, b: 2 }), { sum: 3 });
  assert.deepEqual(await socket.call("A/echo", [1, 2]), [1, 2]);
  assert.deepEqual(await socket.call("A/echo"), {});
  assert.deepEqual(await socket.call("A/nothing"), {});
  assert.deepEqual(await socket.call("A/bytes", { in: { _base64: "AQID" } }), { out: { _base64: "AwIB" } });
  assert.deepEqual(await weir.json("POST", "/v1/services/A/add", { a: 2, b: 2 }), { sum: 4 });
  const error = async (...call) => (await socket.request(...call)).error;
  assert.deepEqual(await error("A/own"), { code: -32000, message: "none left", data: { code: "OUT_OF_STOCK", errorData: { item: 7 } } });
  const unknown = await error("A/nope");
  assert.deepEqual([unknown.code, unknown.message, unknown.data.code], [-32601, 'Event "nope" not found', "EVENT_NOT_FOUND"]);
  assert.deepEqual([(await error("A/fail")).code, (await error("A/odd")).data], [-32603, { microstream: { error: true, more: 1 } }]);
  const { services } = await weir.json("GET", "/v1/services?prefix=A");
  assert.deepEqual(services, [{ service: "A", providers: 1, in_flight: 0, exclusive: true }]);
  assert.equal((await error("weir.provide", { service: "A" })).data.code, "service_taken");
});

test("calls to JSON-RPC providers", async t => {
  const weir = await started(t);
  const b = await MicroStream.connect(t, weir.url, "B");
  assert.deepEqual(await b.request("weir", "echo", { x: [1] }), { x: [1] });
  const provider = await weir.socket(t);
  await provider.call("weir.provide", { service: "math" });
  const serve = async answer => {
    const call = await provider.next(({ id }) => typeof id === "string" && id.startsWith("w:"), "the call");
    provider.send({ jsonrpc: "2.0", id: call.id, ...answer });
    return call;
  };
  const call = async (data, answer) => {
    const [response, call] = await Promise.all([b.request("math", "user/add", data).catch(error => ({ error })), serve(answer)]);
    assert.equal(call.method, "user/add");
    return [call.params, response];
  };
  assert.deepEqual(await call({ a: 1 }, { result: 3 }), [{ a: 1 }, 3]);
  assert.deepEqual(await call([1], { result: null }), [[1], {}]);
  assert.deepEqual(await call(5, { result: [1] }), [[5], [1]]);
  assert.deepEqual(await call("x", { result: "" }).then(([params]) => params), ["x"]);
  assert.deepEqual(await call(undefined, { result: { _base64: "AQI=" } }), [undefined, Buffer.from([1, 2])]);
  assert.deepEqual(await call({ x: Buffer.from([255]) }, { result: true }), [{ x: { _base64: "/w==" } }, true]);
  const fails = async error => (await call({}, { error }))[1].error;
  const missing = await fails({ code: -32601, message: "no add" });
  assert.deepEqual([missing.code, missing.message, missing.errorData.targetService], ["EVENT_NOT_FOUND", "no add", "math"]);
  assert.equal((await fails({ code: -32603, message: "oh" })).code, "INTERNAL_SERVER_ERROR");
  const own = await fails({ code: 42, message: "no such user", data: { user: 7 } });
  assert.deepEqual([own.code, own.message, own.errorData.code, own.errorData.data], ["SERVICE_ERROR", "no such user", 42, { user: 7 }]);
  assert.deepEqual(await fails({ code: 1, message: "m", data: { code: "MINE", errorData: 5 } }), { code: "MINE", message: "m", errorData: 5 });
  const taken = new MicroStream(t, weir.url, "math");
  assert.equal((await taken.refused()).data.code, "DUPLICATE_SERVICE_REGISTRATION", "also by what is no client of MicroStream");
});

test("a duplicate is rejected with the error of the original", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const refusal = {
    code: "DUPLICATE_SERVICE_REGISTRATION",
    message: "Duplicate Service Registration Name! A service with the same name is already registered.",
    errorData: { serviceName: "A" },
  };
  for (const transports of [["polling"], ["websocket"]]) {
    const error = await new MicroStream(t, weir.url, "A", handlers, { transports }).refused();
    assert.equal(error.message, "DUPLICATE_SERVICE_REGISTRATION");
    assert.deepEqual(error.data, refusal);
  }
  assert.deepEqual(a.disconnects, [], "the first client keeps its name");
  const b = await MicroStream.connect(t, weir.url, "B");
  assert.deepEqual(await b.request("A", "add", { a: 1, b: 2 }), { sum: 3 });

  await t.test("only one client without a name is accepted", async () => {
    await MicroStream.connect(t, weir.url, undefined);
    const second = await new MicroStream(t, weir.url, undefined).refused();
    assert.deepEqual(second.data, { ...refusal, errorData: {} });
  });

  await t.test("reserved names are rejected", async () => {
    const error = await new MicroStream(t, weir.url, "$x").refused();
    assert.deepEqual([error.message, error.data.code, error.data.errorData.serviceName], ["INVALID_PARAMS", "INVALID_PARAMS", "$x"]);
  });
});

test("a client without heartbeats is disconnected, and its name is free", async t => {
  const weir = await started(t, { WEIR__COMPAT__MICROSTREAM__HEARTBEAT_TIMEOUT: "1500ms", WEIR__COMPAT__MICROSTREAM__SWEEP: "500ms" });
  for (const transports of [["polling"], ["websocket"]]) {
    const mute = await MicroStream.connect(t, weir.url, "mute", handlers, { transports, heartbeat: 0 });
    const lively = await MicroStream.connect(t, weir.url, "lively", handlers, { transports, heartbeat: 300 });
    await until("the eviction", () => mute.disconnects.length);
    assert.deepEqual([mute.disconnects, lively.disconnects], [["io server disconnect"], []]);
    const error = await lively.request("mute", "add", {}).catch(error => error);
    assert.equal(error.code, "TARGET_SERVICE_NOT_FOUND");
    mute.socket.connect();
    await mute.connected();
    assert.deepEqual(await lively.request("mute", "add", { a: 1, b: 2 }), { sum: 3 });
    mute.close();
    lively.close();
  }
  await empty(weir);
});

test("a kicked client does not reconnect", async t => {
  const weir = await started(t);
  for (const transports of [["polling"], ["websocket"]]) {
    const a = await MicroStream.connect(t, weir.url, "A", handlers, { transports });
    const { connections } = await weir.json("GET", "/v1/connections");
    assert.deepEqual(connections.map(({ transport, services }) => [transport, services]), [["socketio", ["A"]]]);
    assert.deepEqual(await weir.json("DELETE", `/v1/connections?id=${connections[0].id}`), { kicked: 1 });
    await until("the disconnect", () => a.disconnects.length);
    assert.deepEqual([a.disconnects, a.socket.active], [["io server disconnect"], false]);
    await empty(weir);
  }
});

test("requests to a provider that disconnects end with the timeout of the requester", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const b = await MicroStream.connect(t, weir.url, "B", handlers, { timeout: 1_000 });
  const lost = b.request("A", "silent", {}).catch(error => error);
  await a.got();
  a.socket.io.engine.close();
  await until("its end", () => a.disconnects.length);
  a.close();
  assert.deepEqual(await lost, { code: "REQUEST_TIMEOUT" });
  assert.deepEqual(b.late, []);
  const error = await b.request("A", "echo", {}, "r9").catch(error => error);
  assert.equal(error.code, "TARGET_SERVICE_NOT_FOUND");
});

test("a late response is delivered; forged, unknown and repeated ones are dropped", async t => {
  const weir = await started(t, { WEIR__RPC__TIMEOUT: "200ms" });
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const b = await MicroStream.connect(t, weir.url, "B", handlers, { timeout: 600 });
  const thief = await MicroStream.connect(t, weir.url, "thief", handlers);
  const late = b.request("A", "silent", {}, "late").catch(error => error);
  await a.got();
  thief.socket.emit("response", { id: "late", response: { stolen: true } });
  assert.deepEqual(await thief.request("weir", "echo", {}), {}, "after which the theft has been seen");
  assert.deepEqual(await late, { code: "REQUEST_TIMEOUT" });
  a.socket.emit("response", { id: "late", response: { at: "last" }, extra: 1 });
  await until("the late response", () => b.late.length);
  a.socket.emit("response", { id: "late", response: { twice: true } });
  a.socket.emit("response", { id: "unknown", response: {} });
  assert.deepEqual(await a.request("B", "echo", { still: "here" }), { still: "here" });
  assert.deepEqual(b.late, [{ id: "late", response: { at: "last" } }]);
});

test("equal ids of two requesters are kept apart", async t => {
  const weir = await started(t);
  const asked = [];
  const a = await MicroStream.connect(t, weir.url, "A", { hold: (data, { id }) => (asked.push([id, data]), MicroStream.SILENCE) });
  const [b, c] = [await MicroStream.connect(t, weir.url, "B"), await MicroStream.connect(t, weir.url, "C")];
  const answers = [b.request("A", "hold", { of: "b" }, "same"), c.request("A", "hold", { of: "c" }, "same")];
  await until("both requests", () => asked.length === 2);
  for (const [id, data] of asked.reverse()) a.socket.emit("response", { id, response: data });
  assert.deepEqual(await Promise.all(answers), [{ of: "b" }, { of: "c" }]);
});

test("input that crashed the original is ignored", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  for (const event of ["request", "response", "heartbeat", "unknown"]) {
    for (const data of [undefined, null, 7, "x", [], {}, { payload: 7 }, { targetService: "A" }, { targetService: "A", payload: {} }, { targetService: {}, payload: { id: {} } }]) {
      data === undefined ? a.socket.emit(event) : a.socket.emit(event, data);
    }
  }
  a.socket.emit("request", { targetService: "A", payload: { id: "acked", event: "echo", data: 1 } }, () => assert.fail("never acknowledged"));
  await until("the response", () => a.late.some(({ id }) => id === "acked"));
  assert.deepEqual(await a.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
  assert.deepEqual(a.disconnects, []);
});

test("a message over maxPayload disconnects only its sender", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  for (const transports of [["polling"], ["websocket"]]) {
    const big = await MicroStream.connect(t, weir.url, "big", {}, { transports, reconnection: false });
    big.request("A", "echo", "x".repeat(1_000_001)).catch(() => {});
    await until("the disconnect", () => big.disconnects.length);
    assert.match(big.disconnects[0], /^transport (close|error)$/);
  }
  assert.deepEqual(await a.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
  a.close();
  await empty(weir);
});

test("clients reconnect after a restart and get their names", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const b = await MicroStream.connect(t, weir.url, "B", handlers);
  // During an upgrade the library would notice a disconnect only by a missing ping.
  await until("both upgrades", () => a.transport === "websocket" && b.transport === "websocket");
  await weir.kill();
  await until("both to have noticed", () => a.disconnects.length && b.disconnects.length);
  const kept = b.request("A", "add", { a: 1, b: 2 }).catch(error => error); // the client queues it until it is connected
  await Weir.start(t, { ...ON, port: weir.port });
  await a.connected();
  const answer = await kept;
  if (answer.code) assert.equal(answer.code, "TARGET_SERVICE_NOT_FOUND", "b was back before a");
  assert.deepEqual(await until("an answer", () => b.request("A", "add", { a: 1, b: 2 })), { sum: 3 });
});

test("a drain waits for requests in flight and closes clients so that they reconnect", async t => {
  const weir = await started(t, { WEIR__DRAIN__WINDOW: "0s" });
  const once = { reconnection: false };
  const a = await MicroStream.connect(t, weir.url, "A", handlers, { transports: ["websocket"], ...once });
  const b = await MicroStream.connect(t, weir.url, "B", {}, { transports: ["websocket"], ...once });
  const polls = await MicroStream.connect(t, weir.url, "polls", {}, { transports: ["polling"], ...once });
  const answer = b.request("A", "silent", {}, "r1");
  await a.got();
  weir.process.kill("SIGTERM");
  await until("unused sessions to be closed", () => polls.disconnects.length);
  assert.deepEqual([a.disconnects, b.disconnects], [[], []]);
  a.socket.emit("response", { id: "r1", response: { done: true } });
  assert.deepEqual(await answer, { done: true });
  await until("the end", () => a.disconnects.length && b.disconnects.length);
  for (const client of [a, b, polls]) assert.match(client.disconnects[0], /^transport (close|error)$/);
  assert.equal((await within("the process to end", weir.exited)).code, 0);
});

// --- Engine.IO without the library ---

const get = async (weir, query, options = {}) => {
  const answer = await fetch(`${weir.url}/socket.io/${query}`, options);
  return { status: answer.status, text: await answer.text(), headers: answer.headers };
};
const POLL = "?EIO=4&transport=polling";
const open = async (weir, more = "") => JSON.parse((await get(weir, POLL + more)).text.slice(1)).sid;

test("an unresponsive client is replaced by its successor", async t => {
  const weir = await started(t, { WEIR__COMPAT__MICROSTREAM__PROBE: "500ms" });
  const b = await MicroStream.connect(t, weir.url, "B");
  const replaced = async name => {
    const heir = await MicroStream.connect(t, weir.url, name, handlers);
    assert.deepEqual(await b.request(name, "add", { a: 1, b: 2 }), { sum: 3 });
    heir.close();
  };
  // Both are connected and do not answer pings.
  const socket = await Socket.open(t, `${weir.url.replace("http", "ws")}/socket.io/?EIO=4&transport=websocket&serviceName=A`);
  socket.send("40");
  await socket.text(({ text }) => text.startsWith("40"), "to be connected");
  await replaced("A");
  const sid = await open(weir, "&serviceName=P");
  await get(weir, `${POLL}&sid=${sid}`, { method: "POST", body: "40" });
  await replaced("P");
  assert.equal((await get(weir, `${POLL}&sid=${sid}`)).text, '{"code":1,"message":"Session ID unknown"}');
  b.close();
  await empty(weir);
});

test("the handshake, headers and errors of Engine.IO, byte for byte", async t => {
  const weir = await started(t);
  const { status, text, headers } = await get(weir, `${POLL}&serviceName=A`);
  assert.equal(status, 200);
  assert.match(text, /^0\{"sid":"[\w-]{20}","upgrades":\["websocket"\],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000\}$/);
  assert.equal(headers.get("content-type"), "text/plain; charset=UTF-8");
  assert.equal(headers.get("cache-control"), "no-store");
  assert.equal(headers.get("access-control-allow-origin"), "*");
  const sid = JSON.parse(text.slice(1)).sid;
  const posted = await get(weir, `${POLL}&sid=${sid}`, { method: "POST", body: "40" });
  assert.deepEqual([posted.status, posted.text, posted.headers.get("content-type")], [200, "ok", "text/html"]);
  assert.match((await get(weir, `${POLL}&sid=${sid}`)).text, /^40\{"sid":"[\w-]{20}"\}$/);
  for (const [query, code, message, options] of [
    ["?EIO=3&transport=polling", 5, "Unsupported protocol version"],
    ["?transport=polling", 5, "Unsupported protocol version"],
    ["?EIO=4&transport=carrier-pigeon", 0, "Transport unknown"],
    ["", 0, "Transport unknown"],
    [`${POLL}&sid=unknown`, 1, "Session ID unknown"],
    [POLL, 2, "Bad handshake method", { method: "POST", body: "40" }],
    ["?EIO=4&transport=websocket", 3, "Bad request"],
    [`?EIO=4&transport=websocket&sid=${sid}`, 3, "Bad request"],
  ]) {
    const answer = await get(weir, query, options);
    assert.deepEqual([answer.status, answer.text], [400, `{"code":${code},"message":"${message}"}`], query);
    assert.deepEqual([answer.headers.get("content-type"), answer.headers.get("access-control-allow-origin")], ["application/json", "*"]);
  }
  const preflight = await get(weir, POLL, { method: "OPTIONS", headers: { Origin: "http://a.example", "Access-Control-Request-Headers": "x-a" } });
  assert.deepEqual(
    [preflight.status, ...["methods", "headers", "origin"].map(name => preflight.headers.get(`access-control-allow-${name}`)), preflight.headers.get("vary")],
    [204, "GET,HEAD,PUT,PATCH,POST,DELETE", "x-a", "*", "Access-Control-Request-Headers"],
  );
  assert.equal((await fetch(`${weir.url}/socket.io`)).status, 404);
});

test("frames, byte for byte, and a pending poll", async t => {
  const weir = await started(t);
  const sid = await open(weir, "&serviceName=A");
  const say = body => get(weir, `${POLL}&sid=${sid}`, { method: "POST", body });
  const poll = async () => (await get(weir, `${POLL}&sid=${sid}`)).text;
  await say("40");
  await poll();
  const held = poll();
  await say('42["request",{"targetService":"A","payload":{"id":"r1","event":"e","data":{"x":1}}}]');
  assert.equal(await held, '42["request",{"id":"r1","event":"e","data":{"x":1}}]');
  await say('42["response",{"id":"r1","response":{"ok":true},"more":1}]\u001e42["request",{"targetService":"ZZ","payload":{"id":"r2"}}]');
  assert.equal(await poll(), [
    '42["response",{"id":"r1","response":{"ok":true}}]',
    '42["response",{"id":"r2","response":{"error":{"code":"TARGET_SERVICE_NOT_FOUND","message":"Service \\"ZZ\\" not found","errorData":{"targetService":"ZZ","requestID":"r2"}}}}]',
  ].join("\u001e"));
  await say('451-["request",{"targetService":"A","payload":{"id":"r3","data":{"_placeholder":true,"num":0}}}]\u001ebAQI=');
  assert.equal(await poll(), '451-["request",{"id":"r3","data":{"_placeholder":true,"num":0}}]\u001ebAQI=');
  await say('42["response",{"id":"r3"}]');
  assert.equal(await poll(), '42["response",{"id":"r3","response":{}}]');

  await t.test("two concurrent polls end the session, as in the original", async () => {
    const one = poll();
    await until("the first poll to wait", async () => (await weir.metrics()).get('weir_connections{transport="socketio"}') === 1);
    const two = await get(weir, `${POLL}&sid=${sid}`);
    const texts = [await one, two.text];
    assert.ok(texts.includes('{"code":3,"message":"Bad request"}') && texts.includes("6"), texts.join());
    assert.equal((await poll()), '{"code":1,"message":"Session ID unknown"}');
    await empty(weir);
  });
});

test("a client that disconnects during a poll is gone at once", async t => {
  const weir = await started(t);
  const sid = await open(weir, "&serviceName=A");
  await get(weir, `${POLL}&sid=${sid}`, { method: "POST", body: "40" });
  await get(weir, `${POLL}&sid=${sid}`);
  const poll = net.connect(weir.port, "127.0.0.1");
  await within("the connection", once(poll, "connect"));
  await new Promise(resolve => poll.write(`GET /socket.io/${POLL}&sid=${sid} HTTP/1.1\r\nHost: ${weir.host}\r\n\r\n`, resolve));
  // The poll is pending when this request has been answered.
  for (let n = 0; n < 5; n += 1) assert.equal((await get(weir, `${POLL}&sid=${sid}`, { method: "POST", body: "6" })).text, "ok");
  assert.equal((await weir.metrics()).get("weir_rpc_providers"), 1);
  poll.destroy();
  await empty(weir);
});

test("invalid packets end only their session", async t => {
  const weir = await started(t);
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const texts = [
    "", "9", "2", "5", "b!", "4", "47", "4x", "42{", '42["request"', "42{}", "42[]", "44{}", "40/", "4510000-[]", '451-["request",{}]\u001e40',
    '451-["request",{"_placeholder":true,"num":9}]\u001ebAQI=', "bAQI=", "\u001e", "42[1", "41/other", '42/other,["request",{}]',
  ];
  for (const text of texts) {
    const sid = await open(weir, "&serviceName=G");
    const say = body => get(weir, `${POLL}&sid=${sid}`, { method: "POST", body });
    await say("40");
    const answer = await say(text);
    assert.deepEqual([answer.status, answer.text], [400, '{"code":3,"message":"Bad request"}'], JSON.stringify(text));
    assert.equal((await say("40")).text, '{"code":1,"message":"Session ID unknown"}', JSON.stringify(text));
  }
  for (const message of [...texts.filter(text => !/\u001e|^b/.test(text)), Buffer.from([1, 2]), "1"]) {
    const socket = new WebSocket(`${weir.url.replace("http", "ws")}/socket.io/?EIO=4&transport=websocket&serviceName=H`);
    t.after(() => socket.terminate());
    await within("the socket", once(socket, "message"));
    socket.send("40");
    socket.send(message);
    await within(`the end after ${message}`, once(socket, "close"));
  }
  const bytes = await open(weir);
  const octets = await get(weir, `${POLL}&sid=${bytes}`, { method: "POST", body: "40", headers: { "content-type": "application/octet-stream" } });
  assert.equal(octets.status, 400);
  assert.deepEqual(await a.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
  a.close();
  await empty(weir);
});

test("other namespaces are rejected", async t => {
  const weir = await started(t);
  const socket = io(`${weir.url}/admin`, { forceNew: true, reconnection: false });
  t.after(() => socket.disconnect());
  const [error] = await within("the refusal", once(socket, "connect_error"));
  assert.equal(error.message, "Invalid namespace");
});

test("clients that do not answer pings are disconnected", async t => {
  const weir = await started(t, { WEIR__COMPAT__MICROSTREAM__PING: "500ms", WEIR__COMPAT__MICROSTREAM__PING_TIMEOUT: "500ms" });
  const a = await MicroStream.connect(t, weir.url, "A", handlers);
  const mute = new WebSocket(`${weir.url.replace("http", "ws")}/socket.io/?EIO=4&transport=websocket&serviceName=M`);
  t.after(() => mute.terminate());
  const messages = [];
  mute.on("message", data => messages.push(data.toString()));
  await within("the socket", once(mute, "open"));
  mute.send("40");
  await within("the end", once(mute, "close"));
  assert.equal(messages.at(-1), "2");
  assert.match(messages[0], /"upgrades":\[\],"pingInterval":500,"pingTimeout":500/);
  await open(weir, "&serviceName=P"); // a session that never polls
  await until("the session that does not poll to be closed", async () => (await weir.metrics()).get('weir_connections{transport="socketio"}') === 1);
  assert.deepEqual(a.disconnects, []);
  assert.deepEqual(await a.request("A", "add", { a: 1, b: 2 }), { sum: 3 });
});

test("a failed upgrade does not affect the polls", async t => {
  const weir = await started(t);
  const sid = await open(weir, "&serviceName=A");
  const say = body => get(weir, `${POLL}&sid=${sid}`, { method: "POST", body });
  const poll = async () => (await get(weir, `${POLL}&sid=${sid}`)).text;
  await say("40");
  await poll();
  const url = `${weir.url.replace("http", "ws")}/socket.io/?EIO=4&transport=websocket&sid=${sid}`;
  const held = poll();
  const socket = new WebSocket(url);
  await within("the socket", once(socket, "open"));
  socket.send("2probe");
  const [probe] = await within("the probe", once(socket, "message"));
  assert.equal(probe.toString(), "3probe");
  assert.equal(await held, "6", "the held poll is let go");
  socket.terminate();
  await until("polls to wait again", async () => {
    const waiting = poll();
    await say('42["request",{"targetService":"A","payload":{"id":"r1","event":"e"}}]');
    return (await waiting).includes("r1");
  });

  const second = new WebSocket(url);
  t.after(() => second.terminate());
  await within("the second socket", once(second, "open"));
  second.send("2probe");
  await within("the probe", once(second, "message"));
  await say('42["request",{"targetService":"A","payload":{"id":"r2","event":"e"}}]');
  const messages = [];
  second.on("message", data => messages.push(data.toString()));
  second.send("5");
  await until("the limit of unread packets", () => messages.some(text => text.includes("r2")));
  assert.equal((await get(weir, `${POLL}&sid=${sid}`)).text, '{"code":3,"message":"Bad request"}');
});
