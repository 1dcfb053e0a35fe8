// @fanoutio/eventstream, @fanoutio/serve-grip and @fanoutio/grip, unmodified, in an Express app behind weir.

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { EventStream } from "@fanoutio/eventstream";
import { Channel, HttpResponseFormat, HttpStreamFormat, Item, Publisher } from "@fanoutio/grip";
import { ServeGrip } from "@fanoutio/serve-grip";
import { EventSource } from "eventsource";
import express from "express";
import { chromium } from "playwright-core";
import { CHROMIUM_ARGS, Weir, until, within } from "../../support/weir.mjs";

/** An app on a free port. */
async function serve(t, app) {
  const server = app.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  t.after(() => server.closeAllConnections());
  return `http://127.0.0.1:${server.address().port}`;
}

/** weir before an app. The app is created when the publishing address is known. */
async function behind(t, { route = {}, env = {} } = {}, make) {
  // The ports of the app and of weir must be known first.
  const app = express();
  const origin = await serve(t, app);
  const fields = Object.entries({ origin, ...route }).map(([key, value]) => `${key} = ${JSON.stringify(value)}`);
  const weir = await Weir.start(t, {
    args: ["--compat", "grip"],
    env: {
      WEIR__COMPAT__GRIP__LISTEN: "127.0.0.1:0",
      WEIR__COMPAT__GRIP__PUBLISH_LISTEN: "127.0.0.1:0",
      WEIR__COMPAT__GRIP__ROUTES: `[{ ${fields.join(", ")} }]`,
      ...env,
    },
  });
  const [, proxy, publish] = weir.addresses();
  await make(app, { proxy, publish });
  return { weir, proxy, publish, origin };
}

/** A stream that records events of the types `names`. */
async function listen(t, url, names = ["message"]) {
  const source = new EventSource(url);
  t.after(() => source.close());
  const stream = { source, received: [] };
  for (const name of names) source.addEventListener(name, event => stream.received.push([name, event.data]));
  stream.receives = count => until(`${count} events at ${url}`, () => stream.received.length >= count && stream.received);
  await within(`${url} to open`, once(source, "stream-open"));
  return stream;
}

for (const [how, grip, route] of [
  ["without a key", publish => ({ control_uri: publish }), {}],
  ["as a URI with an issuer and a key", publish => `${publish}/?iss=realm&key=secret`, { key: "secret", iss: "realm" }],
  ["with a key in base64", publish => `${publish}/?iss=realm&key=base64:AAECAwQ=`, { key: "base64:AAECAwQ=" }],
  ["with a bare key", publish => ({ control_uri: publish, key: "secret", verify_key: "secret" }), { key: "secret" }],
  ["with user and password", publish => ({ control_uri: publish, user: "u", pass: "secret" }), { key: "secret" }],
]) {
  test(`EventStream in Express, ${how}`, async t => {
    let stream;
    const { weir, proxy } = await behind(t, { route }, (app, { publish }) => {
      stream = new EventStream({ grip: grip(publish) });
      app.get("/api/:id", stream("{id}"));
      app.get("/api/:id/and/:other", stream("{id}", "{other}"));
    });
    const one = await listen(t, `${proxy}/api/a`);
    const two = await listen(t, `${proxy}/api/a/and/b`);
    // Events published right after the opening are not lost.
    await stream.publishEvent("a", { event: "message", data: { n: 1, text: "ü\n" } });
    await stream.publishEvent("b", { event: "message", data: "only b" });
    await stream.publishEvent("a", { event: "message", data: null });
    const a1 = ["message", JSON.stringify({ n: 1, text: "ü\n" })];
    assert.deepEqual(await one.receives(2), [a1, ["message", "null"]]);
    const received = await two.receives(3);
    // Order is guaranteed within a channel.
    assert.deepEqual(received.filter(([, data]) => data !== '"only b"'), [a1, ["message", "null"]]);
    assert.ok(received.some(([, data]) => data === '"only b"'));
    // The native API reads the same events.
    const { events } = await weir.json("GET", "/v1/events?channel=events-a");
    assert.deepEqual(events.map(({ type, data, meta }) => [type, data, meta]), [
      ["message", { n: 1, text: "ü\n" }, undefined],
      ["message", null, undefined],
    ]);
    // The stream receives events of the native API.
    await weir.publish("events-a", { from: "elsewhere" }, "&type=message");
    assert.deepEqual((await one.receives(3))[2], ["message", '{"from":"elsewhere"}']);
    one.source.close();
    two.source.close();
    await weir.watched("events-a", 0);
  });
}

test("an event published right after the opening is never lost", async t => {
  let stream;
  const { proxy } = await behind(t, {}, (app, { publish }) => {
    stream = new EventStream({ grip: { control_uri: publish } });
    app.get("/api/:id", stream("{id}"));
  });
  for (let round = 0; round < 25; round += 1) {
    const one = await listen(t, `${proxy}/api/room${round}`);
    await stream.publishEvent(`room${round}`, { event: "message", data: round });
    assert.deepEqual(await one.receives(1), [["message", String(round)]]);
    one.source.close();
  }
});

test("errors of EventStream are forwarded, and its own bytes come first", async t => {
  const { proxy } = await behind(t, {}, (app, { publish }) => {
    const stream = new EventStream({ grip: { control_uri: publish } });
    app.get("/api/none", stream(" "));
    app.get("/api/:id", stream("{id}"));
  });
  const ask = (path, headers) => fetch(proxy + path, { headers });
  const refused = await ask("/api/a", { accept: "application/json" });
  assert.deepEqual([refused.status, await refused.text()], [406, "Not Acceptable.\n"]);
  const error = await ask("/api/a", { "last-event-id": "error" });
  assert.deepEqual([error.status, await error.text()], [400, "last-event-id header may not be 'error'.\n"]);
  const none = await ask("/api/none", {});
  assert.deepEqual([none.status, await none.text()], [400, "No specified channels.\n"]);
  // A forged signature of the client is replaced by that of the proxy.
  const answer = await ask("/api/a", { "grip-sig": "forged" });
  assert.equal(answer.headers.get("content-type"), "text/event-stream");
  assert.deepEqual([...answer.headers.keys()].filter(name => name.startsWith("grip-")), []);
  const reader = answer.body.getReader();
  const { value } = await within("the first bytes", reader.read());
  assert.equal(Buffer.from(value).toString(), "event: stream-open\ndata: \n\n");
  await reader.cancel();
});

test("publishing with a wrong key fails with the documented error", async t => {
  const route = { key: "secret", iss: "realm" };
  const { publish } = await behind(t, { route }, () => {});
  const item = new Item(new HttpStreamFormat("x"));
  const refusal = grip => assert.rejects(new Publisher(grip).publish("a", item), error => error.context.statusCode === 401);
  await refusal(`${publish}/`);
  await refusal(`${publish}/?iss=realm&key=wrong`);
  await refusal(`${publish}/?iss=other&key=secret`);
  await refusal({ control_uri: publish, key: "wrong" });
  await refusal({ control_uri: publish, user: "u", pass: "wrong" });
  await new Publisher(`${publish}/?iss=realm&key=secret`).publish("a", item);
});

test("serve-grip: items answer held responses, or they time out", async t => {
  let serveGrip;
  const { weir, proxy } = await behind(t, { route: { key: "secret" } }, (app, { publish }) => {
    serveGrip = new ServeGrip({ grip: `${publish}/?iss=realm&key=secret`, gripProxyRequired: true });
    app.use(serveGrip);
    app.get("/wait/:seconds", (request, response) => {
      assert.ok(request.grip.isSigned);
      const instruct = response.grip.startInstruct();
      instruct.addChannel("answers");
      instruct.setHoldLongPoll(Number(request.params.seconds));
      instruct.setStatus(202);
      response.set("x-origin", "1").json({ timeout: true });
    });
  });
  const waiting = fetch(`${proxy}/wait/55`);
  await weir.watched("answers");
  await serveGrip.getPublisher().publishHttpResponse("answers", '{"answer":42}');
  const answer = await waiting;
  assert.deepEqual([answer.status, await answer.json()], [200, { answer: 42 }]);
  assert.equal(answer.headers.get("x-origin"), "1");

  const other = fetch(`${proxy}/wait/55`);
  await weir.watched("answers");
  const format = new HttpResponseFormat({ code: 410, reason: "Gone", headers: { "x-item": "2" }, body: Buffer.from([0, 255]) });
  await serveGrip.getPublisher().publish("answers", new Item(format));
  const gone = await other;
  assert.deepEqual([gone.status, gone.headers.get("x-item"), [...new Uint8Array(await gone.arrayBuffer())]], [410, "2", [0, 255]]);

  const late = await fetch(`${proxy}/wait/1`);
  assert.deepEqual([late.status, await late.json()], [202, { timeout: true }]);
  await weir.watched("answers", 0);
});

test("all forms of a published item are equivalent", async t => {
  const { weir, proxy, publish } = await behind(t, {}, app => {
    app.get("/raw", (_, response) => response.set({ "grip-hold": "stream", "grip-channel": "raw" }).end("open\n"));
  });
  const abort = new AbortController();
  const answer = await fetch(`${proxy}/raw`, { signal: abort.signal });
  const chunks = [];
  const reading = (async () => {
    for await (const chunk of answer.body) chunks.push(Buffer.from(chunk));
  })();
  const publisher = new Publisher({ control_uri: publish });
  const binary = Buffer.from(Array.from({ length: 256 }, (_, n) => n));
  await publisher.publishHttpStream("raw", "plain text, no block\r\n");
  await publisher.publish("raw", new Item(new HttpStreamFormat(binary)));
  for (let n = 0; n < 2; n += 1) await publisher.publish("raw", new Item(new HttpStreamFormat("once;"), "id-1"));
  await publisher.publish("raw", new Item(new HttpStreamFormat(null, true)));
  await within("the end of the stream", reading);
  const expected = Buffer.concat([Buffer.from("open\nplain text, no block\r\n"), binary, Buffer.from("once;")]);
  assert.deepEqual(Buffer.concat(chunks), expected);
  const { events } = await weir.json("GET", "/v1/events?channel=raw");
  assert.deepEqual(events.map(event => event.type), ["grip", "grip", "grip", "grip"]);
  assert.equal(events[0].data, "plain text, no block\r\n");
  assert.equal(events[1].data_base64, binary.toString("base64"));
});

test("a page in Chromium is served and streamed through the same proxy", async t => {
  let stream;
  const { weir, proxy } = await behind(t, { route: { key: "secret" } }, (app, { publish }) => {
    stream = new EventStream({ grip: `${publish}/?iss=realm&key=secret` });
    app.get("/", (_, response) => response.type("html").send("<!doctype html><title>a page</title>"));
    app.get("/api/:id", stream("{id}"));
  });
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: CHROMIUM_ARGS });
  t.after(() => browser.close());
  const page = await browser.newPage();
  await page.goto(proxy);
  const opened = page.evaluate(() => {
    window.received = [];
    window.source = new EventSource("/api/a");
    window.source.onmessage = event => window.received.push(event.data);
    return new Promise(resolve => window.source.addEventListener("stream-open", () => resolve(true)));
  });
  assert.ok(await within("the stream to open", opened));
  await stream.publishEvent("a", { event: "message", data: { text: "hello" } });
  await weir.publish("events-a", "from a service", "&type=message");
  await until("two events in the page", () => page.evaluate(() => window.received.length >= 2));
  assert.deepEqual(await page.evaluate(() => window.received), ['{"text":"hello"}', '"from a service"']);
  await page.evaluate(() => window.source.close());
  await weir.watched("events-a", 0);
});
