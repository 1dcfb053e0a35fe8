// Real Redis servers for a test: started on free ports, killed and paused by the test, removed after it.

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs/promises";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { until } from "./weir.mjs";

const run = promisify(execFile);

export async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

/** One redis-server or redis-sentinel. */
export class Redis {
  static async start(t, args = [], { binary = "redis-server", config } = {}) {
    const redis = new Redis();
    redis.port = await freePort();
    redis.dir = await fs.mkdtemp(path.join(os.tmpdir(), "weir-redis-"));
    Object.assign(redis, { binary, args, config });
    t?.after(() => redis.remove());
    await redis.restart();
    return redis;
  }

  get url() {
    return `redis://127.0.0.1:${this.port}`;
  }

  /** Starts the server with the data on its disk, if it is configured to store any. */
  async restart() {
    const own = ["--port", this.port, "--bind", "127.0.0.1", "--dir", this.dir, "--loglevel", "warning"];
    let args = [...own, "--save", "", ...this.args];
    if (this.config) {
      // A sentinel rewrites its configuration file.
      const file = path.join(this.dir, "sentinel.conf");
      await fs.writeFile(file, `${this.config}\nport ${this.port}\nbind 127.0.0.1\ndir ${this.dir}\n`, { flag: "wx" }).catch(() => {});
      args = [file];
    }
    this.process = spawn(this.binary, args.map(String), { stdio: "ignore" });
    this.exited = once(this.process, "exit");
    await until(`${this.binary} on ${this.port}`, async () => (await this.cli("PING")).includes("PONG"));
  }

  async cli(...args) {
    const { stdout } = await run("redis-cli", ["-p", String(this.port), ...args.map(String)], { timeout: 5_000 });
    return stdout.trim();
  }

  async kill(signal = "SIGKILL") {
    this.process.kill("SIGCONT");
    this.process.kill(signal);
    await this.exited;
  }

  pause() {
    this.process.kill("SIGSTOP");
  }

  resume() {
    this.process.kill("SIGCONT");
  }

  async remove() {
    if (this.process.exitCode === null && this.process.signalCode === null) await this.kill();
    await fs.rm(this.dir, { recursive: true, force: true });
  }
}

/** A master, replicas and three sentinels with short failover timeouts. */
export class Sentinels {
  static async start(t, { replicas = 2 } = {}) {
    const group = new Sentinels();
    const master = await Redis.start(t, ["--repl-diskless-sync-delay", "0"]);
    group.servers = [master];
    for (let n = 0; n < replicas; n += 1) {
      group.servers.push(await Redis.start(t, ["--replicaof", "127.0.0.1", master.port, "--repl-diskless-sync-delay", "0"].flat()));
    }
    const config = [
      `sentinel monitor weir 127.0.0.1 ${master.port} 2`,
      "sentinel down-after-milliseconds weir 1000",
      "sentinel failover-timeout weir 3000",
      "sentinel parallel-syncs weir 2",
    ].join("\n");
    group.sentinels = [];
    for (let n = 0; n < 3; n += 1) group.sentinels.push(await Redis.start(t, [], { binary: "redis-sentinel", config }));
    await until("the replicas to be in sync", async () => (await master.cli("INFO", "replication")).includes(`connected_slaves:${replicas}`));
    await until("the sentinels to know each other", async () => {
      const views = await Promise.all(group.sentinels.map(sentinel => sentinel.cli("SENTINEL", "CKQUORUM", "weir")));
      const known = await Promise.all(group.sentinels.map(sentinel => sentinel.cli("SENTINEL", "REPLICAS", "weir")));
      return views.every(view => view.startsWith("OK 3")) && known.every(list => list.split("\n").filter(line => line === "name").length === replicas);
    });
    return group;
  }

  /** The current master. */
  async master() {
    const [, port] = (await this.sentinels[0].cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "weir")).split("\n");
    return this.servers.find(server => server.port === Number(port));
  }
}
