// Chromium: EventSource, WebSocket, fetch, CORS, and the page at `/`.

import assert from "node:assert/strict";
import { once } from "node:events";
import http from "node:http";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";
import { CHROMIUM_ARGS, Relay, Weir, until, within } from "../../support/weir.mjs";

let browser;

before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [
      ...CHROMIUM_ARGS,
      // Foreign host names that resolve to this machine: one for a foreign page and one for DNS rebinding.
      "--host-resolver-rules=MAP *.example 127.0.0.1",
    ],
  });
});
after(() => browser?.close());

/** A page in a context of its own, whose console messages and errors are recorded. */
async function open(t, url) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.lines = [];
  page.faults = [];
  page.on("console", message => (message.type() === "error" ? page.faults : page.lines).push(message.text()));
  page.on("pageerror", error => page.faults.push(String(error)));
  await page.goto(url);
  return page;
}

/** An empty page on an origin other than that of weir. */
async function elsewhere(t, html = "<!doctype html><title>elsewhere</title>") {
  const server = http.createServer((_, response) => response.setHeader("content-type", "text/html").end(html));
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  t.after(() => server.closeAllConnections());
  return server.address().port;
}

/** In the page: a stream that records its events in `window.received`. */
const listen = (page, url) =>
  page.evaluate(url => {
    const received = (window.received = { data: [], opens: 0, named: [], states: [] });
    const source = (window.source = new EventSource(url));
    source.onmessage = event => received.data.push(JSON.parse(event.data).data);
    source.addEventListener("weir.open", () => (received.opens += 1));
    for (const name of ["weir.gap", "weir.retry"]) source.addEventListener(name, event => received.named.push([name, JSON.parse(event.data)]));
    source.onerror = () => received.states.push(source.readyState);
  }, url);
const received = page => page.evaluate(() => window.received);
const receives = (page, what, probe) => until(what, async () => probe(await received(page)));

test("the page at / subscribes, publishes and calls", async t => {
  const weir = await Weir.start(t);
  const page = await open(t, `${weir.url}/`);
  assert.match(await page.title(), /weir/);
  const log = what => until(`${what} on the page`, async () => (await page.innerText("#log")).includes(what));
  await log("weir.open");
  await weir.publish("hello", { text: "from the test" });
  await log("from the test");
  await page.fill("#publish input", '{"text":"from the page"}');
  await page.click("#publish button");
  await log('"data":{"text":"from the page"}');
  assert.deepEqual((await weir.json("GET", "/v1/events?channel=hello")).events.map(event => event.data.text), ["from the test", "from the page"]);
  await page.click("#call button");
  await log('200 {"n":1}');
  await page.fill("#watch input", "other");
  await page.click("#watch button");
  await weir.watched("other");
  await weir.publish("other", "elsewhere");
  await log("elsewhere");
  assert.deepEqual(page.faults, []);
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
});

test("EventSource", async t => {
  const weir = await Weir.start(t);

  await t.test("after repeated disconnects, one before the first event, nothing is lost or repeated", async t => {
    const relay = await Relay.start(t, weir.port);
    const page = await open(t, `${relay.url}/health/live`);
    await listen(page, "/v1/sse?channel=orders");
    await receives(page, "the opening", ({ opens }) => opens === 1);
    relay.refuse(true);
    relay.cut();
    await weir.publish("orders", 0);
    relay.refuse(false);
    await receives(page, "the event that was missed", ({ data }) => data.length === 1);
    for (let n = 1; n < 20; n += 1) {
      if (n === 10) relay.cut();
      await weir.publish("orders", n);
    }
    await receives(page, "all events", ({ data }) => data.length >= 20);
    const { data, named } = await received(page);
    assert.deepEqual(data, Array.from({ length: 20 }, (_, n) => n));
    assert.deepEqual(named, []);
  });

  await t.test("it reconnects after a drain and a restart and receives a reset", async t => {
    const first = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "2s" } });
    const page = await open(t, `${first.url}/health/live`);
    await listen(page, "/v1/sse?channel=life");
    await receives(page, "the opening", ({ opens }) => opens === 1);
    await first.publish("life", "first");
    await receives(page, "the first event", ({ data }) => data.length === 1);
    first.kill("SIGTERM");
    await receives(page, "weir.retry", ({ named }) => named.some(([name, data]) => name === "weir.retry" && data.code === "draining"));
    assert.equal((await within("the exit", first.exited)).code, 0);
    const second = await Weir.start(t, { port: first.port });
    await second.publish("life", "second");
    await receives(page, "the second event", ({ data }) => data.length === 2);
    const { data, named, states } = await received(page);
    assert.deepEqual(data, ["first", "second"]);
    assert.equal(named.find(([name]) => name === "weir.gap")?.[1].reason, "reset");
    assert.ok(!states.includes(2), "the browser gave up");
  });

  await t.test("it reconnects after a kill and receives a reset", async t => {
    const first = await Weir.start(t);
    const page = await open(t, `${first.url}/health/live`);
    await listen(page, "/v1/sse?channel=killed");
    await receives(page, "the opening", ({ opens }) => opens === 1);
    await first.kill();
    const second = await Weir.start(t, { port: first.port });
    await second.publish("killed", "back");
    await receives(page, "the event", ({ data }) => data.includes("back"));
  });
});

test("from another origin", async t => {
  const weir = await Weir.start(t);
  const port = await elsewhere(t);

  for (const host of ["127.0.0.1", "localhost"]) {
    await t.test(`on another port of ${host} a page can stream, publish, call and open sockets`, async t => {
      const page = await open(t, `http://${host}:${port}/`);
      await listen(page, `${weir.url}/v1/sse?channel=cors-${host}`);
      await receives(page, "the opening", ({ opens }) => opens === 1);
      const placed = await page.evaluate(async url => {
        const answer = await fetch(url, {
          method: "POST",
          headers: { "content-type": "application/json", "idempotency-key": "k1", traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" },
          body: '{"n":1}',
        });
        return { status: answer.status, body: await answer.json() };
      }, `${weir.url}/v1/events?channel=cors-${host}`);
      assert.equal(placed.status, 201);
      await receives(page, "the event", ({ data }) => data.length === 1);
      const resumed = await page.evaluate(async ([url, id]) => {
        const answer = await fetch(url, { headers: { accept: "text/event-stream", "last-event-id": id } });
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = "";
        while (!text.includes('"n":1')) text += (await reader.read()).value;
        await reader.cancel();
        return text;
      }, [`${weir.url}/v1/sse?channel=cors-${host}`, `${placed.body.epoch}-0`]);
      assert.match(resumed, /event: weir\.open/);
      const retry = await page.evaluate(async url => {
        const answer = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: "{}" });
        return [answer.status, answer.headers.get("retry-after")];
      }, `${weir.url}/v1/services/nobody/home`);
      assert.equal(retry[0], 503);
      assert.match(retry[1], /^\d+$/);
      const pong = await page.evaluate(url => new Promise((resolve, reject) => {
        const ws = new WebSocket(url, "weir.v1");
        ws.onopen = () => ws.send('{"jsonrpc":"2.0","id":1,"method":"weir/echo","params":[1]}');
        ws.onmessage = event => resolve(event.data);
        ws.onclose = event => reject(new Error(`closed with ${event.code}`));
      }), weir.ws);
      assert.deepEqual(JSON.parse(pong).result, [1]);
    });
  }

  await t.test("a foreign page can neither read, publish nor open sockets", async t => {
    const page = await open(t, `http://shop.example:${port}/`);
    const top = async () => (await weir.json("GET", "/v1/channels?channel=private")).top ?? 0;
    await weir.publish("private", "secret");
    const before = await top();
    const outcome = await page.evaluate(async ([url, ws]) => {
      const attempt = async run => {
        try {
          return await run();
        } catch (error) {
          return error.name;
        }
      };
      return {
        read: await attempt(async () => (await fetch(`${url}/v1/events?channel=private`)).text()),
        publish: await attempt(async () => (await fetch(`${url}/v1/events?channel=private`, { method: "POST", headers: { "content-type": "application/json" }, body: "1" })).status),
        simple: await attempt(async () => (await fetch(`${url}/v1/events?channel=private`, { method: "POST", mode: "no-cors", body: "1" })).type),
        form: await attempt(async () => (await fetch(`${url}/v1/services/weir/echo`, { method: "POST", mode: "no-cors", body: new URLSearchParams({ a: 1 }) })).type),
        stream: await new Promise(resolve => {
          const source = new EventSource(`${url}/v1/sse?channel=private&last=1`);
          source.onmessage = event => resolve(event.data);
          source.onerror = () => source.readyState === 2 && resolve("closed");
        }),
        socket: await new Promise(resolve => {
          const socket = new WebSocket(ws);
          socket.onopen = () => socket.send('{"jsonrpc":"2.0","id":1,"method":"weir.publish","params":{"channel":"private","data":1}}');
          socket.onclose = event => resolve([event.code, event.reason]);
        }),
      };
    }, [weir.url, weir.ws]);
    assert.equal(outcome.read, "TypeError");
    assert.equal(outcome.publish, "TypeError");
    assert.equal(outcome.simple, "opaque"); // sent without a preflight and rejected: nothing is published
    assert.equal(outcome.stream, "closed");
    assert.deepEqual(outcome.socket, [4501, "forbidden"]); // not 1006, which has no reason
    assert.equal(await top(), before);
  });

  await t.test("a foreign name that resolves to this machine (DNS rebinding) is rejected", async t => {
    await weir.publish("rebound", "secret");
    const page = await open(t, `http://rebind.example:${weir.port}/v1/events?channel=rebound`);
    assert.ok(!(await page.content()).includes("secret"));
    const status = await page.evaluate(async () => (await fetch("/v1/events?channel=rebound")).status);
    assert.equal(status, 403);
  });
});

test("a drain notifies a WebSocket and closes it with a code other than 1006", async t => {
  const weir = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "1s" } });
  const page = await open(t, `${weir.url}/health/live`);
  await page.evaluate(url => new Promise((resolve, reject) => {
    window.ws = new WebSocket(url);
    ws.onerror = () => reject(new Error("no connection"));
    window.got = [];
    ws.onmessage = event => window.got.push(JSON.parse(event.data)) && resolve();
    ws.onclose = event => (window.end = { code: event.code, reason: event.reason, clean: event.wasClean });
    ws.onopen = () => ws.send('{"jsonrpc":"2.0","id":1,"method":"weir.ping"}');
  }), weir.ws);
  weir.kill("SIGTERM");
  const end = await until("the close", () => page.evaluate(() => window.end));
  assert.ok(end.code === 1001 || end.code === 1012, `closed with ${end.code}`);
  assert.equal(end.clean, true);
  assert.deepEqual((await page.evaluate(() => window.got)).slice(1).map(message => message.method), ["weir.drain"]);
});
