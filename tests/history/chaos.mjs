#!/usr/bin/env node
// Three nodes on one Redis, clients on each, and a failure every few seconds; then the judge.
//
//   node tests/history/chaos.mjs --for 60 --seed 7                     every fault of one Redis
//   node tests/history/chaos.mjs --redis sentinel --faults failover    only this fault
//
// The same seed causes the same faults in the same order. Exits with 0 if no guarantee was violated.

import { writeFile } from "node:fs/promises";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { freePort, Redis, Sentinels } from "../support/redis.mjs";
import { Relay, until, Weir } from "../support/weir.mjs";
import { finish, start, summary } from "./check.mjs";

/** The faults. After a `lossy` one readers may receive gaps, after the others they must not. */
export const FAULTS = {
  "kill-node": { async do(world) {
    const node = world.pick(world.nodes);
    await node.weir.kill();
    await pause(world.ms(200, 2_000));
    await node.start();
  } },
  "leave-node": { async do(world) {
    const node = world.pick(world.nodes);
    await node.weir.kill("SIGTERM");
    await node.start();
  } },
  "stop-node": { async do(world) {
    const node = world.pick(world.nodes);
    node.weir.process.kill("SIGSTOP");
    await pause(world.ms(500, 14_000));
    node.weir.process.kill("SIGCONT");
  } },
  "cut-network": { only: "standalone", async do(world) {
    const { relay } = world.pick(world.nodes);
    relay.refuse(true);
    relay.cut();
    await pause(world.ms(200, 4_000));
    relay.refuse(false);
  } },
  "kill-connections": { async do(world) {
    for (const kind of ["pubsub", "normal"]) await (await world.master()).cli("CLIENT", "KILL", "TYPE", kind);
  } },
  "flush-scripts": { async do(world) {
    await (await world.master()).cli("SCRIPT", "FLUSH");
  } },
  "pause-redis": { async do(world) {
    const master = await world.master();
    master.pause();
    // Shorter than the time after which sentinels start a failover.
    await pause(world.redis === "sentinel" ? 400 : world.ms(500, 6_000));
    master.resume();
  } },
  "restart-redis": { only: "standalone", lossy: true, async do(world) {
    const master = await world.master();
    await master.kill();
    await pause(world.ms(100, 2_000));
    await master.restart();
  } },
  "lose-key": { lossy: true, async do(world) {
    const master = await world.master();
    const keys = (await master.cli("--scan", "--pattern", `*history-*`)).split("\n").filter(Boolean);
    if (keys.length) await master.cli("DEL", world.pick(keys));
  } },
  "failover": { only: "sentinel", lossy: true, async do(world) {
    const master = await world.master();
    const sleeping = world.ms(0, 2) < 1;
    if (sleeping) master.pause();
    else await master.kill();
    await until("another master", async () => (await world.master()) !== master);
    // The old master returns, acts as master for a moment and is reconfigured.
    if (sleeping) master.resume();
    else await master.restart();
    await until("the old master to follow", async () => (await master.cli("INFO", "replication")).includes("master_link_status:up"));
  } },
};

/** How long a lease lasts that cannot be renewed, in ms. */
const LEASE = 10_000;

/** One deployment that can be disturbed. */
class World {
  static async start(t, { redis = "standalone", nodes = 3, seed = 1, env = {} }) {
    const world = new World();
    Object.assign(world, { redis, nodes: [], random: seeded(seed) });
    if (redis === "standalone") {
      const server = await Redis.start(t, ["--appendonly", "yes", "--appendfsync", "everysec"]);
      world.master = async () => server;
    } else {
      const group = await Sentinels.start(t);
      world.master = () => group.master();
      world.group = group;
    }
    for (let n = 0; n < nodes; n += 1) {
      const node = { port: await freePort() };
      if (redis === "standalone") node.relay = await Relay.start(t, (await world.master()).port);
      const url = node.relay ? `redis://127.0.0.1:${node.relay.port}` : sentinelUrl(world.group);
      node.start = async () => {
        node.weir = await Weir.start(t, {
          port: node.port,
          env: { WEIR__BUS__BACKEND: "redis", WEIR__BUS__REDIS__URL: url, WEIR__SSE__HEARTBEAT: "1s", WEIR__DRAIN__WINDOW: "1s", WEIR__DRAIN__GRACE: "3s", ...env },
        });
      };
      await node.start();
      world.nodes.push(node);
    }
    return world;
  }

  get urls() {
    return this.nodes.map(node => `http://127.0.0.1:${node.port}`);
  }

  pick(list) {
    return list[Math.floor(this.random() * list.length)];
  }

  /** Random milliseconds between the two, more often small. */
  ms(least, most) {
    return least + this.random() ** 2 * (most - least);
  }
}

const sentinelUrl = group => `redis+sentinel://${group.sentinels.map(sentinel => `127.0.0.1:${sentinel.port}`).join(",")}/weir`;

function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    // mulberry32
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Causes faults for `seconds` and judges. Gaps count as violations if no fault was lossy. */
export async function chaos(t, { redis = "standalone", seed = 1, seconds = 30, faults, nodes = 3, say = () => {}, load = {} }) {
  const names = faults ?? Object.keys(FAULTS).filter(name => (FAULTS[name].only ?? redis) === redis);
  const world = await World.start(t, { redis, seed, nodes });
  const run = start({ urls: world.urls, patience: 5_000, ...load });
  const deadline = Date.now() + seconds * 1000;
  const done = new Map();
  await pause(1_000);
  while (Date.now() < deadline && names.length) {
    const name = world.pick(names);
    const began = Date.now();
    await FAULTS[name].do(world);
    done.set(name, (done.get(name) ?? 0) + 1);
    say(`${((began - deadline) / 1000 + seconds).toFixed(1)} s: ${name}, ${Date.now() - began} ms`);
    await pause(world.ms(300, 3_000));
  }
  await pause(Math.max(0, deadline - Date.now()));
  const lossy = [...done.keys()].some(name => FAULTS[name].lossy);
  const verdict = await finish(run, 40_000, { lease: lossy ? LEASE : 0 });
  if (!lossy && verdict.moves) verdict.violations.push(`no fault was lossy, but a consumer position moved ${verdict.moves} times`);
  if (!lossy && Object.keys(verdict.gaps).length) verdict.violations.push(`no fault was lossy, but gaps were announced: ${JSON.stringify(verdict.gaps)}`);
  return { run, verdict, done, world };
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { values } = parseArgs({
    options: {
      for: { type: "string", default: "60" },
      seed: { type: "string", default: String(Math.floor(Math.random() * 1e9)) },
      redis: { type: "string", default: "standalone" },
      nodes: { type: "string", default: "3" },
      faults: { type: "string" },
      every: { type: "string", default: "40" },
      keep: { type: "string" }, // a file for the history
    },
  });
  const cleanups = [];
  const t = { after: work => cleanups.unshift(work) };
  console.log(`seed ${values.seed}`);
  try {
    const { run, verdict, world } = await chaos(t, {
      redis: values.redis, seed: Number(values.seed), seconds: Number(values.for), nodes: Number(values.nodes),
      faults: values.faults?.split(",").filter(Boolean), say: console.log, load: { every: Number(values.every) },
    });
    console.log(summary(run, verdict));
    if (values.keep) await writeFile(values.keep, JSON.stringify(run.history));
    if (verdict.violations.length) for (const node of world.nodes) console.log(`--- log of ${node.port}\n${node.weir.log.slice(-3000)}`);
    process.exitCode = verdict.violations.length ? 1 : 0;
  } finally {
    for (const work of cleanups) await work();
  }
  process.exit();
}
