#!/usr/bin/env node
// Publishes to a deployment of weir, reads by every transport, calls services, and judges the history.
//
//   node tests/history/check.mjs --url http://a:8000 --url http://b:8000 --for 60
//
// Each client moves between the nodes; cause any failure meanwhile (tests/history/chaos.mjs does). Channels, services
// and consumers have unique names, so any deployment can be used. Exits with 0 if no guarantee was violated.

import { writeFile } from "node:fs/promises";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import * as clients from "./clients.mjs";
import { judge } from "./judge.mjs";

/** Starts all clients. They run until `stop`. */
export function start({ urls, patience, channels = 4, every = 40 }) {
  const run = new clients.Run({ urls, patience });
  run.channels = Array.from({ length: channels }, (_, n) => `history-${run.name}-{${n}}`);
  for (const [n, channel] of run.channels.entries()) {
    clients.writer(run, { channel, every, keyed: n % 2 === 1 });
    clients.writer(run, { channel, every, keyed: n % 2 === 0 });
    clients.pipeliner(run, { channel, every });
    clients.streamer(run, { name: `sse-${n}`, channels: [channel] });
  }
  clients.batcher(run, { channels: run.channels, every: every * 2 });
  clients.streamer(run, { name: "sse-all", channels: run.channels });
  for (const n of [1, 2]) clients.subscriber(run, { name: `ws-${n}`, channels: run.channels });
  clients.poller(run, { name: "poll", channels: run.channels });
  clients.poller(run, { name: "poll-one", channels: run.channels.slice(0, 1) });
  clients.poller(run, { name: "consumer", channels: run.channels, consumer: `history-${run.name}` });
  const [shared, exclusive] = [`history-shared-${run.name}`, `history-exclusive-${run.name}`];
  for (const n of [1, 2, 3]) clients.provider(run, { name: `shared-${n}`, service: shared });
  for (const n of [1, 2, 3]) clients.provider(run, { name: `exclusive-${n}`, service: exclusive, exclusive: true });
  for (const service of [shared, exclusive]) for (const ws of [true, false]) clients.caller(run, { service, every, ws });
  return run;
}

/** Publishes the last events, waits up to `patience` ms until every reader has received them, and judges. */
export async function finish(run, patience = 30_000, rules = {}) {
  const deadline = Date.now() + patience;
  run.writing = false;
  const last = new Map();
  await Promise.all(run.channels.map(async channel => {
    const id = run.id();
    last.set(channel, id);
    // If this does not succeed before the run ends, its readers count as late.
    await clients.publish(run, channel, id, true);
  }));
  for (const reader of run.history.readers) reader.until = last.get(reader.channel);
  const done = reader => reader.seen.some(entry => entry.event?.id === reader.until);
  while (!run.history.readers.every(done) && Date.now() < deadline) await pause(50);
  await run.stop();
  return judge(run.history, rules);
}

/** A summary of the run in a few lines. */
export function summary(run, verdict) {
  const { writes, readers, calls, grants } = run.history;
  const count = (list, what) => list.filter(what).length;
  const troubles = [...run.troubles].sort((a, b) => b[1] - a[1]).map(([kind, n]) => `${n} × ${kind}`);
  return [
    `${count(writes, write => write.outcome === "placed")} events placed, ${count(writes, write => write.outcome === "no")} refused, ${count(writes, write => write.outcome === "maybe")} unconfirmed`,
    `${readers.reduce((sum, reader) => sum + count(reader.seen, entry => entry.event), 0)} events seen by ${readers.length} readers`,
    `${count(calls, call => call.outcome === "result")} calls answered, ${count(calls, call => call.executed === "no")} surely not run, ${count(calls, call => call.outcome === "error" && call.executed !== "no")} perhaps; ${grants.length} exclusive grants`,
    `gaps announced: ${Object.entries(verdict.gaps).map(([reason, n]) => `${n} × ${reason}`).join(", ") || "none"}`,
    `troubles: ${troubles.join(", ") || "none"}`,
    verdict.violations.length ? `VIOLATIONS (${verdict.violations.length}):\n  ${verdict.violations.slice(0, 50).join("\n  ")}` : "no violations",
  ].join("\n");
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { values } = parseArgs({
    options: {
      url: { type: "string", multiple: true, default: ["http://127.0.0.1:8000"] },
      for: { type: "string", default: "30" },
      channels: { type: "string", default: "4" },
      every: { type: "string", default: "40" },
      keep: { type: "string" }, // a file for the history
      patience: { type: "string", default: "30" },
    },
  });
  const run = start({ urls: values.url, channels: Number(values.channels), every: Number(values.every), patience: values.patience * 1000 });
  await pause(values.for * 1000);
  const verdict = await finish(run, values.patience * 1000);
  console.log(summary(run, verdict));
  if (values.keep) await writeFile(values.keep, JSON.stringify(run.history));
  process.exitCode = verdict.violations.length ? 1 : 0;
}
