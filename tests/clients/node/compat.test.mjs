// Clients of ganomede-events, node-sse-server and @fanoutio/eventstream, unmodified: npm ganomede-events, npm eventsource
// and Chromium's EventSource.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import http from "node:http";
import net from "node:net";
import { createRequire } from "node:module";
import { test } from "node:test";
import { EventSource } from "eventsource";
import { chromium } from "playwright-core";
import { CHROMIUM_ARGS, PATIENCE, Relay, Weir, until, within } from "../../support/weir.mjs";

// The library cannot be loaded without it.
process.env.API_SECRET ??= "s3cret";
// Loaded by `import` it would treat itself as the main program and start a server.
const { Client, IndexerClient } = createRequire(import.meta.url)("ganomede-events");

const SECRET = "s3cret";

/** A ganomede client that records its events. */
function ganomede(t, weir, clientId, { secret = SECRET, channels = [] } = {}) {
  const agent = new http.Agent({ keepAlive: true });
  const client = new Client(clientId, { secret, hostname: "127.0.0.1", port: weir.port, agent });
  const received = { client, events: [], errors: [], cycles: 0 };
  client.on("error", error => received.errors.push(error));
  client.on("cycle", () => (received.cycles += 1));
  const listener = event => received.events.push(event);
  for (const channel of channels) client.on(channel, listener);
  received.stop = () => {
    for (const channel of channels) client.removeListener(channel, listener);
    agent.destroy();
  };
  t.after(received.stop);
  received.send = (channel, event) =>
    within("the answer to send", new Promise((resolve, reject) => {
      client.send(channel, event, (error, sent) => (error ? reject(error) : resolve(sent)));
    }));
  received.ids = () => received.events.map(event => event.id);
  return received;
}

const serve = (t, options = {}) =>
  Weir.start(t, { ...options, args: ["--compat", "ganomede"], env: { API_SECRET: SECRET, POLL_TIMEOUT: "2000", ...options.env } });

test("npm ganomede-events", async t => {
  const weir = await serve(t);

  await t.test("events are received once and in order", async t => {
    const one = ganomede(t, weir, "one", { channels: ["users/v1"] });
    const two = ganomede(t, weir, "two", { channels: ["users/v1"] });
    const sent = await one.send("users/v1", { from: "test", type: "add", data: { name: "é" } });
    assert.deepEqual({ ...sent, timestamp: 0 }, { id: 1, timestamp: 0, type: "add", from: "test", data: { name: "é" } });
    await one.send("users/v1", { from: "test", type: "bare" });
    await weir.publish("users/v1", "native");
    for (const received of [one, two]) {
      await until("three events", () => received.events.length >= 3);
      assert.deepEqual(received.ids(), [1, 2, 3]);
      assert.deepEqual(received.events[0], sent);
      assert.ok(!("data" in received.events[1]));
      assert.deepEqual([received.events[2].type, received.events[2].from, received.events[2].data], ["message", "", { value: "native" }]);
    }
    // Empty polls wait, and nothing is repeated.
    const before = one.cycles;
    await until("an empty cycle", () => one.cycles > before);
    assert.deepEqual(one.ids(), [1, 2, 3]);
    assert.deepEqual(one.errors, []);
  });

  await t.test("a clientId resumes at its position on any connection", async t => {
    const first = ganomede(t, weir, "batch/7", { channels: ["jobs"] });
    for (let n = 1; n <= 3; n += 1) await first.send("jobs", { from: "test", type: "job", data: { n } });
    await until("three jobs", () => first.events.length === 3);
    // The next poll acknowledges the events.
    await until("the acknowledgement", async () =>
      (await weir.json("GET", "/v1/consumers/batch..2f7")).channels[0].lag === 0);
    first.stop();
    await first.send("jobs", { from: "test", type: "job", data: { n: 4 } }).catch(() => weir.publish("jobs", { n: 4 }));
    const second = ganomede(t, weir, "batch/7", { channels: ["jobs"] });
    await until("the fourth", () => second.events.length > 0);
    assert.deepEqual(second.ids(), [4]);
  });

  await t.test("latest and indices", async t => {
    const received = ganomede(t, weir, "reader");
    for (const user of ["ann", "bob", "ann"]) await received.send("bans", { from: "test", type: "ban", data: { user } });
    const latest = await within("latest", new Promise((resolve, reject) =>
      received.client.getLatestEvents("bans", 2, (error, events) => (error ? reject(error) : resolve(events)))));
    assert.deepEqual(latest.map(event => event.id), [2, 3]);
    const indexer = new IndexerClient({ protocol: "http", hostname: "127.0.0.1", port: weir.port, secret: SECRET });
    const ask = (method, ...args) =>
      within(method, new Promise(resolve => indexer[method](...args, (error, result) => resolve([error, result]))));
    assert.deepEqual(await ask("createIndex", "bans-by-user", "bans", "data.user"), [null, "OK"]);
    const [, found] = await ask("getIndexEvents", "bans-by-user", "ann");
    assert.deepEqual(found.rows.map(event => event.id), [3, 1]);
    const [unknown] = await ask("getIndexEvents", "nope", "ann");
    assert.deepEqual([unknown.statusCode, unknown.restCode], [404, "NotFound"]);
  });

  await t.test("errors are reported as errors, and retries are delayed", async t => {
    const stranger = ganomede(t, weir, "stranger", { secret: "wrong", channels: ["users/v1"] });
    const start = Date.now();
    await until("four errors", () => stranger.errors.length >= 4);
    assert.ok(Date.now() - start >= 4 * 250, "asked again at once");
    const [error] = stranger.errors;
    assert.deepEqual([error.statusCode, error.restCode, error.name], [401, "InvalidCredentialsError", "InvalidCredentialsError"]);
    const bad = ganomede(t, weir, "bad");
    await assert.rejects(bad.send("x".repeat(300), { from: "f", type: "t" }), { statusCode: 400, restCode: "InvalidContent" });
  });
});

test("npm ganomede-events over a restart of the memory bus", async t => {
  const weir = await serve(t);
  const received = ganomede(t, weir, "survivor", { channels: ["orders"] });
  for (let n = 1; n <= 3; n += 1) await received.send("orders", { from: "test", type: "t", data: { n } });
  await until("three events", () => received.events.length === 3);
  await weir.kill();
  const again = await serve(t, { port: weir.port });
  // Ids restart; the client still requests events after the third.
  await again.publish("orders", { n: 4 });
  await until("the event of the new log", () => received.events.length === 4, 2 * PATIENCE);
  assert.deepEqual([received.events[3].id, received.events[3].data], [1, { n: 4 }]);
  await again.publish("orders", { n: 5 });
  await until("the next", () => received.events.length === 5);
  assert.deepEqual(received.events[4].data, { n: 5 });
});

/** An EventSource that records events of these types. */
function listen(t, url, names, Source = EventSource) {
  const source = new Source(url);
  t.after(() => source.close());
  const received = { source, events: [], opens: 0, errors: 0 };
  for (const name of ["message", ...names]) source.addEventListener(name, event => received.events.push([name, JSON.parse(event.data || "null")]));
  source.onopen = () => (received.opens += 1);
  source.onerror = () => (received.errors += 1);
  received.of = name => received.events.filter(([given]) => given === name).map(([, data]) => data);
  return received;
}

const publish = (weir, events) => weir.json("POST", "/publish", { events }, { "content-type": "application/json" });

test("node-sse-server's browsers", async t => {
  const args = ["--compat", "node-sse"];
  const weir = await Weir.start(t, { args });
  const names = ["registered", "lastEvent", "online-presence", "greeting"];

  await t.test("npm eventsource registers, receives events and reconnects", async t => {
    const relay = await Relay.start(t, weir.port);
    const received = listen(t, `${relay.url}/subscribe?channels=a,b&clientId=me`, names);
    await until("presence", () => received.of("online-presence").length === 1);
    assert.deepEqual(received.events.map(([name]) => name), ["registered", "lastEvent", "lastEvent", "online-presence"]);
    assert.deepEqual(JSON.parse(received.of("registered")[0].payload), { clientId: "me" });
    await publish(weir, [
      { channelName: "a", type: "greeting", payload: JSON.stringify({ text: "hi" }) },
      { channelName: "b", type: "message", payload: "x" },
    ]);
    await until("two events", () => received.of("greeting").length === 1 && received.of("message").length === 1);
    assert.deepEqual(received.of("greeting")[0], { channelName: "a", type: "greeting", payload: '{"text":"hi"}' });
    relay.cut();
    await until("the second registration", () => received.of("registered").length === 2);
    const last = received.of("lastEvent").slice(2).find(event => event.channelName === "a");
    assert.deepEqual(JSON.parse(last.payload), { type: "greeting", payload: '{"text":"hi"}' });
  });

  await t.test("Chromium, on a page of another origin", async t => {
    const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: CHROMIUM_ARGS });
    t.after(() => browser.close());
    const server = http.createServer((_, response) => response.setHeader("content-type", "text/html").end("<!doctype html>"));
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    t.after(() => server.closeAllConnections());
    t.after(() => server.close());
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    await page.evaluate(url => {
      window.received = [];
      const source = new EventSource(`${url}/subscribe?channels=page&clientId=browser`);
      for (const name of ["registered", "lastEvent", "online-presence", "greeting"])
        source.addEventListener(name, event => window.received.push([name, JSON.parse(event.data)]));
    }, weir.url);
    const names = () => page.evaluate(() => window.received.map(([name]) => name));
    await until("presence in the page", async () => (await names()).includes("online-presence"));
    // A page can publish, too: the preflight allows its headers.
    const status = await page.evaluate(async url => {
      const body = JSON.stringify({ events: [{ channelName: "page", type: "greeting", payload: "from the page" }] });
      return (await fetch(`${url}/publish`, { method: "POST", headers: { "content-type": "application/json", "x-a": "b" }, body })).status;
    }, weir.url);
    assert.equal(status, 200);
    await until("the greeting", async () => (await names()).includes("greeting"));
    const [, greeting] = await page.evaluate(() => window.received.find(([name]) => name === "greeting"));
    assert.deepEqual(greeting, { channelName: "page", type: "greeting", payload: "from the page" });
  });
});

test("EventStream clients with configured routes", async t => {
  const routes = '[{ path = "/api/events/{id}", channels = ["events-{id}", "all"] }]';
  const weir = await Weir.start(t, { env: { WEIR__COMPAT__SSE__ROUTES: routes } });
  const received = listen(t, `${weir.url}/api/events/7`, ["stream-open", "created"]);
  await until("stream-open", () => received.opens === 1);
  await weir.watched("events-7");
  await weir.publish("events-7", { n: 1 }, "&type=created");
  await weir.publish("all", { n: 2 });
  await until("both", () => received.of("created").length === 1 && received.of("message").length === 1);
  assert.deepEqual([received.of("created")[0], received.of("message")[0]], [{ n: 1 }, { n: 2 }]);
  assert.equal((await fetch(`${weir.url}/api/events/7`, { headers: { accept: "application/json" } })).status, 406);
});

/** A Redis for one test, and the settings of a weir that uses it. */
async function redis(t) {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  await new Promise(resolve => server.close(resolve));
  const child = spawn("redis-server", ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"], { stdio: "ignore" });
  t.after(() => child.kill("SIGKILL"));
  await until("Redis", () => new Promise(resolve => {
    const socket = net.connect(port, "127.0.0.1", () => resolve(socket.destroy()));
    socket.on("error", () => resolve(false));
  }));
  return { REDIS_EVENTS_PORT_6379_TCP_ADDR: "127.0.0.1", REDIS_EVENTS_PORT_6379_TCP_PORT: String(port), url: `redis://127.0.0.1:${port}` };
}

test("on Redis, after a restart and between nodes", async t => {
  const { url, ...env } = await redis(t);
  // The environment variables of the original select the Redis.
  const weir = await serve(t, { env });
  const browsers = await Weir.start(t, {
    args: ["--compat", "node-sse"],
    env: { WEIR__BUS__BACKEND: "redis", WEIR__BUS__REDIS__URL: url },
  });
  const page = listen(t, `${browsers.url}/subscribe?channels=orders`, ["registered", "lastEvent", "t"]);
  await until("the page", () => page.of("lastEvent").length === 1);
  const received = ganomede(t, weir, "survivor", { channels: ["orders"] });
  for (let n = 1; n <= 3; n += 1) await received.send("orders", { from: "test", type: "t", data: { n } });
  await until("three events", () => received.events.length === 3 && page.of("t").length === 3);
  assert.deepEqual(page.of("t").map(event => event.payload), ['{"n":1}', '{"n":2}', '{"n":3}']);
  await weir.kill();
  await publish(browsers, [{ channelName: "orders", type: "t", payload: "meanwhile" }]);
  await serve(t, { port: weir.port, env });
  await until("the missed events", () => received.events.length === 4, 2 * PATIENCE);
  assert.deepEqual([received.events[3].id, received.events[3].data], [4, { value: "meanwhile" }]);
  const last = await browsers.json("GET", "/lastEvent?channel=orders");
  assert.deepEqual(JSON.parse(last.response), { type: "t", payload: "meanwhile" });
});
