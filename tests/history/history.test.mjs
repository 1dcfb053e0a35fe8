// Clients of every transport during failures of real nodes and Redis, and the judge.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Relay, Weir, until } from "../support/weir.mjs";
import { chaos } from "./chaos.mjs";
import { finish, start, summary } from "./check.mjs";

const published = run => run.history.writes.filter(write => write.outcome === "placed").length;

function assertNoViolations(run, verdict) {
  assert.deepEqual(verdict.violations, [], summary(run, verdict));
  const { calls, readers } = run.history;
  assert.ok(published(run) > 100, "few events were published");
  assert.ok(calls.some(call => call.outcome === "result"), "no call was answered");
  assert.ok(readers.every(reader => reader.seen.length > 10), "a reader received few events");
}

test("one node in memory whose clients are disconnected repeatedly", async t => {
  const weir = await Weir.start(t, { env: { WEIR__SSE__HEARTBEAT: "1s" } });
  const relay = await Relay.start(t, weir.port);
  const run = start({ urls: [relay.url], patience: 5_000 });
  for (let n = 0; n < 8; n += 1) {
    const before = published(run);
    await until("a hundred more events to be published", () => published(run) > before + 100);
    relay.cut();
  }
  const verdict = await finish(run);
  assertNoViolations(run, verdict);
  assert.deepEqual(verdict.gaps, {}, "nothing was lost, so there is no gap");
  assert.ok(run.troubles.size > 0, "no client noticed a disconnect");
});

// The same seed causes the same faults in the same order. A failure can be reproduced with
// node tests/history/chaos.mjs --seed … --faults …
for (const { what, ...how } of [
  { what: "nodes killed and cut off, connections and scripts lost", seed: 6, seconds: 15, faults: ["kill-node", "cut-network", "flush-scripts", "kill-connections"] },
  { what: "Redis killed and restarted, keys lost", seed: 7, seconds: 12, faults: ["restart-redis", "lose-key"] },
  { what: "a master that fails or pauses, and a failover", seed: 8, seconds: 10, redis: "sentinel", faults: ["failover"] },
]) {
  test(`three nodes on one Redis: ${what}`, async t => {
    const { run, verdict, done } = await chaos(t, how);
    assertNoViolations(run, verdict);
    assert.ok(done.size > 0, "no fault was caused");
  });
}
