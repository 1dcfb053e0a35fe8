// npm rpc-websockets: caller and subscriber. It cannot provide; tests verify that weir does not send what breaks it.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Client } from "rpc-websockets";
import { Relay, Weir, within } from "../../support/weir.mjs";

const opened = client => within("the client to open", new Promise(resolve => client.once("open", resolve)));

async function connect(t, url, options = {}) {
  const client = new Client(url, { reconnect_interval: 50, max_reconnects: 0, ...options });
  client.on("error", () => {});
  t.after(() => {
    client.setAutoReconnect(false);
    client.close();
  });
  await opened(client);
  return client;
}

test("rpc-websockets", async t => {
  const weir = await Weir.start(t);

  await t.test("calls with named and positional params", async t => {
    const client = await connect(t, weir.ws);
    assert.deepEqual(await client.call("weir/echo", { n: 1 }), { n: 1 });
    assert.deepEqual(await client.call("weir/echo", [1, 2]), [1, 2]);
    assert.equal(typeof (await client.call("weir.ping")).time, "number");
    // Its users also send the object of weir's methods as the only positional param.
    assert.equal((await client.call("weir.publish", [{ channel: "a", data: 1 }])).channel, "a");
    await assert.rejects(client.call("nobody/home", {}), { code: -32020 });
    await assert.rejects(client.call("weir.nonsense", {}), { code: -32601 });
  });

  await t.test("subscribes with on('weir.event')", async t => {
    const client = await connect(t, weir.ws);
    const events = [];
    const second = new Promise(resolve => {
      client.on("weir.event", event => {
        events.push(event);
        if (events.length === 2) resolve();
      });
    });
    const { channels } = await client.call("weir.subscribe", { channels: ["news"] });
    assert.equal(channels[0].channel, "news");
    await weir.publish("news", "one");
    await weir.publish("news", "two");
    await within("two events", second);
    assert.deepEqual(events.map(event => event.data), ["one", "two"]);
    assert.deepEqual(await client.call("weir.unsubscribe", { channels: ["news"] }), { channels: ["news"] });
  });

  await t.test("a publish as a notification is published", async t => {
    const client = await connect(t, weir.ws);
    await client.notify("weir.publish", { channel: "quiet", data: 1 });
    await client.call("weir.ping"); // the response shows that the notification was read
    const { events } = await weir.json("GET", "/v1/events?channel=quiet&wait=10s");
    assert.equal(events.length, 1);
  });

  await t.test("breaks: ids of the hub are strings and do not collide with its own", async t => {
    const client = await connect(t, weir.ws); // ids 1, 2, 3 …
    await client.call("weir.provide", { service: "mute" });
    const asked = new Promise(resolve => client.once("work", resolve));
    // The first call of the hub arrives while calls 2 … are pending. A numeric id would reject one of them.
    const own = client.call("weir/echo", ["still mine"]);
    const unanswered = weir.json("POST", "/v1/services/mute/work?timeout=200ms", { n: 1 });
    const more = Array.from({ length: 20 }, (_, n) => client.call("weir/echo", [n]));
    assert.deepEqual(await within("the method as an event", asked), { n: 1 });
    assert.deepEqual(await own, ["still mine"]);
    assert.deepEqual(await Promise.all(more), Array.from({ length: 20 }, (_, n) => [n]));
    // It emits the method as an event and cannot answer: it is not a provider.
    await assert.rejects(unanswered, /504.*timeout/);
  });

  await t.test("breaks: its own subscribe() and login() are rejected with an error that it understands", async t => {
    const client = await connect(t, weir.ws);
    await assert.rejects(client.subscribe("news"), { code: -32601 });
    await assert.rejects(client.login({ token: "x" }), { code: -32601 });
    assert.deepEqual(await client.call("weir/echo", [1]), [1]);
  });

  await t.test("reconnects after a disconnect and resumes at its position", async t => {
    const relay = await Relay.start(t, weir.port);
    const client = await connect(t, `ws://127.0.0.1:${relay.port}/v1/ws`);
    const seen = [];
    const gaps = [];
    let last;
    client.on("weir.event", event => {
      seen.push(event.data);
      last = `${event.epoch}-${event.offset}`;
    });
    client.on("weir.gap", gap => gaps.push(gap));
    const reached = n => within(`event ${n}`, new Promise(resolve => {
      const check = () => (seen.includes(n) ? resolve() : setImmediate(check));
      check();
    }));
    await client.call("weir.subscribe", { channels: ["feed"] });
    for (const n of [1, 2]) await weir.publish("feed", n);
    await reached(2);

    const again = opened(client);
    relay.cut();
    for (const n of [3, 4]) await weir.publish("feed", n); // no server listens
    await again;
    await client.call("weir.subscribe", { channels: [{ channel: "feed", after: last }] });
    await weir.publish("feed", 5);
    await reached(5);
    assert.deepEqual(seen, [1, 2, 3, 4, 5]);
    assert.deepEqual(gaps, []);
  });

  await t.test("a drain closes with a code other than 1000, so that it reconnects", async t => {
    const leaving = await Weir.start(t, { env: { WEIR__DRAIN__WINDOW: "200ms", WEIR__DRAIN__GRACE: "2s" } });
    const client = await connect(t, leaving.ws);
    const drain = new Promise(resolve => client.once("weir.drain", resolve));
    await client.call("weir.ping"); // a client that has called a weir.* method is notified
    const closed = new Promise(resolve => client.once("close", code => resolve(code)));
    leaving.kill("SIGTERM");
    const { after_ms, deadline_ms } = await within("weir.drain", drain);
    assert.equal(typeof after_ms, "number");
    assert.equal(typeof deadline_ms, "number");
    const code = await within("the close", closed);
    assert.ok(code === 1001 || code === 1012, `closed with ${code}`);
    assert.equal((await within("the exit", leaving.exited)).code, 0);
    const back = opened(client);
    await Weir.start(t, { port: leaving.port });
    await back;
    assert.deepEqual(await client.call("weir/echo", [1]), [1]);
  });
});
