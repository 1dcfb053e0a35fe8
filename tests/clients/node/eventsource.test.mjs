// npm eventsource (an EventSource as specified) and @microsoft/fetch-event-source.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";
import { EventSource } from "eventsource";
import { Relay, Weir, until, within } from "../../support/weir.mjs";

// The library is made for browsers and needs only these two globals.
globalThis.window ??= globalThis;
globalThis.document ??= { hidden: false, addEventListener() {}, removeEventListener() {} };
const { fetchEventSource } = createRequire(import.meta.url)("@microsoft/fetch-event-source");

/** Opens a stream that records its events. */
function listen(t, url, names = ["weir.gap", "weir.retry", "weir.position"]) {
  const sent = []; // the Last-Event-ID of every request
  const source = new EventSource(url, {
    fetch(input, init) {
      sent.push(init.headers["Last-Event-ID"] ?? null);
      return fetch(input, init);
    },
  });
  t.after(() => source.close());
  const stream = { source, sent, data: [], ids: [], opens: [], named: [], errors: [] };
  source.onmessage = event => {
    stream.data.push(event.data);
    stream.ids.push(event.lastEventId);
  };
  source.addEventListener("weir.open", event => stream.opens.push(event));
  for (const name of names) source.addEventListener(name, event => stream.named.push([name, JSON.parse(event.data)]));
  source.onerror = event => stream.errors.push(event);
  stream.values = () => stream.data.map(text => JSON.parse(text).data);
  stream.opened = count => until(`opening ${count}`, () => stream.opens.length >= count);
  stream.receives = count => until(`${count} events`, () => stream.data.length >= count);
  return stream;
}

test("npm eventsource", async t => {
  const weir = await Weir.start(t, { env: { WEIR__SSE__HEARTBEAT: "1s" } });

  await t.test("onmessage receives every event, typed or not, after a weir.open with an id", async t => {
    const stream = listen(t, `${weir.url}/v1/sse?channel=orders`);
    await stream.opened(1);
    assert.deepEqual(JSON.parse(stream.opens[0].data).channels[0].channel, "orders");
    assert.notEqual(stream.opens[0].lastEventId, "");
    await weir.publish("orders", { id: 7 }, "&type=created");
    await weir.publish("orders", { id: 8 });
    await stream.receives(2);
    assert.deepEqual(stream.values(), [{ id: 7 }, { id: 8 }]);
    assert.equal(JSON.parse(stream.data[0]).type, "created");
    for (const [index, id] of stream.ids.entries()) {
      const event = JSON.parse(stream.data[index]);
      assert.equal(id, `${event.epoch}-${event.offset}`);
    }
  });

  await t.test("a stream that is disconnected before its first event loses nothing", async t => {
    const relay = await Relay.start(t, weir.port);
    const stream = listen(t, `${relay.url}/v1/sse?channel=early`);
    await stream.opened(1);
    relay.refuse(true);
    relay.cut();
    await weir.publish("early", "while away");
    relay.refuse(false);
    await stream.receives(1);
    assert.deepEqual(stream.values(), ["while away"]);
    assert.equal(stream.sent[0], null);
    assert.equal(stream.sent.at(-1), stream.opens[0].lastEventId);
    assert.deepEqual(stream.named, []);
  });

  await t.test("after repeated disconnects every event is received once and in order", async t => {
    const relay = await Relay.start(t, weir.port);
    // `after` of the URL is sent again with each reconnect; Last-Event-ID takes precedence.
    const stream = listen(t, `${relay.url}/v1/sse?channel=cut&after=earliest`);
    await stream.opened(1);
    for (let n = 0; n < 30; n += 1) {
      if (n % 10 === 5) relay.cut();
      await weir.publish("cut", n);
    }
    await stream.receives(30);
    assert.deepEqual(stream.values(), Array.from({ length: 30 }, (_, n) => n));
    assert.deepEqual(stream.named, []);
  });

  await t.test("several channels resume with their token", async t => {
    const relay = await Relay.start(t, weir.port);
    const channels = Array.from({ length: 20 }, (_, n) => `many-${n}`);
    const stream = listen(t, `${relay.url}/v1/sse?ids=all&${channels.map(name => `channel=${name}`).join("&")}`);
    await stream.opened(1);
    for (const [n, channel] of channels.entries()) {
      if (n === 10) relay.cut();
      await weir.publish(channel, n);
    }
    await stream.receives(20);
    assert.deepEqual(new Set(stream.values()), new Set(channels.keys()));
    assert.deepEqual(stream.named, []);
  });

  await t.test("heartbeats are never events", async t => {
    const stream = listen(t, `${weir.url}/v1/sse?channel=still`);
    await stream.opened(1);
    // A second stream counts bytes to notice heartbeats.
    const beats = await fetch(`${weir.url}/v1/sse?channel=still`);
    const reader = beats.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while ((text.match(/^:\n/gm) ?? []).length < 3) text += (await within("a heartbeat", reader.read())).value;
    await reader.cancel();
    assert.doesNotMatch(text, /^:\n\n/m);
    await weir.publish("still", "real");
    await stream.receives(1);
    assert.deepEqual(stream.values(), ["real"]);
  });

  await t.test("filtered events advance the position with weir.position", async t => {
    const stream = listen(t, `${weir.url}/v1/sse?channel=filtered&type=wanted`);
    await stream.opened(1);
    await weir.publish("filtered", 1, "&type=other");
    await until("weir.position", () => stream.named.some(([name]) => name === "weir.position"));
    await weir.publish("filtered", 2, "&type=wanted");
    await stream.receives(1);
    assert.deepEqual(stream.values(), [2]);
  });

  await t.test("trimmed events are a gap before newer events", async t => {
    const relay = await Relay.start(t, weir.port);
    const stream = listen(t, `${relay.url}/v1/sse?channel=trim`);
    await stream.opened(1);
    await weir.publish("trim", 1);
    await stream.receives(1);
    relay.refuse(true);
    relay.cut();
    const placed = [];
    for (const n of [2, 3, 4]) placed.push(await weir.publish("trim", n));
    await weir.json("DELETE", `/v1/events?channel=trim&before=${placed[2].epoch}-${placed[2].offset}`);
    relay.refuse(false);
    await stream.receives(2);
    assert.deepEqual(stream.values(), [1, 4]);
    const [[name, gap]] = stream.named;
    assert.equal(name, "weir.gap");
    assert.equal(gap.reason, "deleted");
    assert.equal(gap.missed, 2);
    assert.equal(gap.next, `${placed[2].epoch}-${placed[2].offset}`);
  });

  await t.test("format=data sends named events with bare data, and text line by line", async t => {
    const stream = listen(t, `${weir.url}/v1/sse?channel=html&format=data`);
    const rows = [];
    stream.source.addEventListener("row", event => rows.push(event.data));
    await stream.opened(1);
    await weir.publish("html", "<li>\n one\n</li>", "&type=row");
    await weir.publish("html", { a: 1 });
    await stream.receives(1);
    await until("the row", () => rows.length === 1);
    assert.deepEqual(rows, ["<li>\n one\n</li>"]);
    assert.deepEqual(stream.data, ['{"a":1}']);
  });

  await t.test("after a restart of the server the stream continues and receives a reset", async t => {
    const first = await Weir.start(t);
    const stream = listen(t, `${first.url}/v1/sse?channel=life`);
    await stream.opened(1);
    await first.publish("life", 1);
    await stream.receives(1);
    await first.kill();
    const second = await Weir.start(t, { port: first.port });
    await second.publish("life", 2);
    await stream.receives(2);
    assert.deepEqual(stream.values(), [1, 2]);
    assert.equal(stream.named.find(([name]) => name === "weir.gap")?.[1].reason, "reset");
  });

  await t.test("a drain is announced, and the stream reconnects without loss", async t => {
    const first = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "2s" } });
    const stream = listen(t, `${first.url}/v1/sse?channel=drain`);
    await stream.opened(1);
    first.kill("SIGTERM");
    await until("weir.retry", () => stream.named.some(([name]) => name === "weir.retry"));
    const [, retry] = stream.named.find(([name]) => name === "weir.retry");
    assert.equal(retry.code, "draining");
    assert.ok(retry.after_ms > 0);
    assert.equal((await within("the exit", first.exited)).code, 0);
    const second = await Weir.start(t, { port: first.port });
    await stream.opened(2);
    await second.publish("drain", "hello again");
    await stream.receives(1);
    assert.deepEqual(stream.values(), ["hello again"]);
  });

  await t.test("permanent errors are a status, which ends an EventSource", async t => {
    for (const query of ["", "?channel=a&chanel=b", "?channels=a"]) {
      const stream = listen(t, `${weir.url}/v1/sse${query}`);
      await until("the end", () => stream.source.readyState === EventSource.CLOSED);
      assert.equal(stream.errors.at(-1).code, 400, query);
    }
  });

  await t.test("an invalid Last-Event-ID is a gap and not an error", async () => {
    const answer = await fetch(`${weir.url}/v1/sse?channel=odd`, { headers: { accept: "text/event-stream", "last-event-id": "nonsense!" } });
    assert.equal(answer.status, 200);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (!/event: weir\.gap\ndata: .*\n\n/.test(text)) text += (await within("the gap", reader.read())).value;
    await reader.cancel();
    assert.match(text, /"reason":"bad_position"/);
  });
});

test("fetch-event-source", async t => {
  const weir = await Weir.start(t, { env: { WEIR__SSE__HEARTBEAT: "1s", WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "2s" } });

  function follow(t, url, options = {}) {
    const control = new AbortController();
    t.after(() => control.abort());
    const stream = { messages: [], opens: 0, control };
    stream.done = fetchEventSource(url, {
      signal: control.signal,
      openWhenHidden: true,
      onmessage: message => (message.event === "weir.open" ? (stream.opens += 1) : stream.messages.push(message)),
      // The recipe of proto-docs/sse.md.
      onclose() {
        throw new Error("again");
      },
      ...options,
    });
    return stream;
  }

  await t.test("breaks: heartbeats never reach onmessage with empty data", async t => {
    const stream = follow(t, `${weir.url}/v1/sse?channel=a`);
    await until("the opening", () => stream.opens === 1);
    const beats = await fetch(`${weir.url}/v1/sse?channel=a`);
    const reader = beats.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while ((text.match(/^:\n/gm) ?? []).length < 3) text += (await within("a heartbeat", reader.read())).value;
    await reader.cancel();
    await weir.publish("a", 1);
    await until("the event", () => stream.messages.length > 0);
    assert.deepEqual(stream.messages.map(message => JSON.parse(message.data).data), [1]);
  });

  await t.test("breaks: under `Connection: close` Node's fetch takes a cut for a clean end, so weir does not say it", async t => {
    const relay = await Relay.start(t, weir.port);
    const stream = follow(t, `${relay.url}/v1/sse?channel=b`, { onclose: undefined }); // without the recipe
    await until("the opening", () => stream.opens === 1);
    await weir.publish("b", 1);
    relay.cut();
    await weir.publish("b", 2);
    await until("both", () => stream.messages.length === 2);
    assert.deepEqual(stream.messages.map(message => JSON.parse(message.data).data), [1, 2]);
  });

  await t.test("breaks: a clean end is `done`, so weir announces it and the recipe throws", async t => {
    const first = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "100ms", WEIR__DRAIN__GRACE: "2s" } });
    const without = follow(t, `${first.url}/v1/sse?channel=c`, { onclose: undefined });
    const recipe = follow(t, `${first.url}/v1/sse?channel=c`);
    await until("both openings", () => without.opens === 1 && recipe.opens === 1);
    first.kill("SIGTERM");
    await within("the stream without the recipe to end", without.done);
    assert.equal(without.messages.at(-1).event, "weir.retry");
    await within("the exit", first.exited);
    const second = await Weir.start(t, { port: first.port });
    await until("the recipe's second opening", () => recipe.opens === 2);
    await second.publish("c", "again");
    await until("the event", () => recipe.messages.some(message => message.event === ""));
  });
});
