// nginx with the configuration of proto-docs/proxy.md, before weir, with Chromium, a WebSocket and `weir doctor`.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "node:test";
import { chromium } from "playwright-core";
import { blocks } from "../../docs/markdown.mjs";
import { BIN, CHROMIUM_ARGS, ROOT, Socket, Weir, until } from "../../support/weir.mjs";

const NGINX = ["/usr/sbin/nginx", "/usr/local/sbin/nginx", "/usr/bin/nginx"].find(existsSync);
const HOST = "weir.example.com";
const settings = { WEIR__SERVER__HOSTS: HOST };

/** A port that is free now. nginx cannot choose one itself. */
const freePort = () =>
  new Promise(resolve => {
    const server = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });

/** nginx before the weir at `upstream`, as the page configures it after `change`. */
async function nginx(t, upstream, change = text => text) {
  const port = await freePort();
  const folder = mkdtempSync(path.join(tmpdir(), "weir-nginx-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  const [page] = blocks(path.join(ROOT, "proto-docs/proxy.md")).filter(block => block.lang === "nginx");
  const text = change(page.text).replaceAll("127.0.0.1:8000", `127.0.0.1:${upstream}`).replace("listen 80;", `listen 127.0.0.1:${port};`);
  mkdirSync(path.join(folder, "tmp"));
  const folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(name => `${name}_temp_path ${folder}/tmp/${name};`);
  writeFileSync(
    path.join(folder, "nginx.conf"),
    `daemon off; master_process off; pid ${folder}/pid; error_log ${folder}/error.log;
     events {}
     http {
       ${folders.join(" ")}
       log_format statuses '$status $uri'; access_log ${folder}/access.log statuses;
       ${text}
     }`,
  );
  const child = spawn(NGINX, ["-p", folder, "-e", path.join(folder, "error.log"), "-c", path.join(folder, "nginx.conf")], { stdio: ["ignore", "ignore", "pipe"] });
  let faults = "";
  child.stderr.on("data", chunk => (faults += chunk));
  t.after(() => child.kill("SIGKILL"));
  await until("nginx to listen", async () => {
    assert.equal(child.exitCode, null, faults);
    return (await fetch(`http://127.0.0.1:${port}/`).catch(() => undefined)) !== undefined;
  });
  /** Answered requests, as `200 /v1/sse`. */
  const answers = () => readFileSync(path.join(folder, "access.log"), "utf8").split("\n").filter(Boolean);
  return { port, url: `http://${HOST}:${port}`, answers };
}

/** A page at the proxy that records what its stream receives. */
async function streaming(t, url) {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [...CHROMIUM_ARGS, `--host-resolver-rules=MAP ${HOST} 127.0.0.1`],
  });
  t.after(() => browser.close());
  const page = await browser.newPage();
  await page.goto(`${url}/health/live`);
  await page.evaluate(() => {
    window.received = [];
    window.states = [];
    const source = (window.source = new EventSource("/v1/sse?channel=orders"));
    source.onmessage = event => window.received.push(JSON.parse(event.data).data);
    source.onerror = () => window.states.push(source.readyState);
  });
  return page;
}

const skip = NGINX ? false : "nginx is not installed";

test("an EventSource outlives a restart of weir behind nginx, which answers 200 with a retry time", { skip }, async t => {
  const weir = await Weir.start(t, { env: settings });
  const proxy = await nginx(t, weir.port);
  const page = await streaming(t, proxy.url);
  await weir.watched("orders");
  await weir.publish("orders", "before");
  await until("the first event", () => page.evaluate(() => window.received.length === 1));

  await weir.kill();
  const away = () => proxy.answers().filter(line => line === "200 /v1/sse").length;
  // The stream that broke is logged too.
  await until("two attempts of the browser while weir is away", () => away() >= 3, 60_000);
  assert.ok(!(await page.evaluate(() => window.states)).includes(2), "the EventSource has not closed");
  const again = await Weir.start(t, { port: weir.port, env: settings });
  await again.watched("orders");
  await again.publish("orders", "after");
  await until("the event after the restart", () => page.evaluate(() => window.received.includes("after")));
  assert.deepEqual(await page.evaluate(() => window.received), ["before", "after"]);
});

test("without that, the 502 of nginx ends an EventSource for good", { skip }, async t => {
  const weir = await Weir.start(t, { env: settings });
  const proxy = await nginx(t, weir.port, text => text.replace(/error_page .*/, ""));
  const page = await streaming(t, proxy.url);
  await weir.watched("orders");
  await weir.kill();
  await until("the EventSource to close", () => page.evaluate(() => window.source.readyState === EventSource.CLOSED), 60_000);
  assert.ok(proxy.answers().includes("502 /v1/sse"));
});

test("a page without a change to the proxy opens a new EventSource at its position", { skip }, async t => {
  const weir = await Weir.start(t, { env: settings });
  const proxy = await nginx(t, weir.port, text => text.replace(/error_page .*/, ""));
  const page = await streaming(t, proxy.url);
  await page.evaluate(() => window.source.close());
  const [html] = blocks(path.join(ROOT, "proto-docs/proxy.md")).filter(block => block.lang === "html");
  const script = html.text.replace(/<\/?script>/g, "").replaceAll("http://localhost:8000", proxy.url).replace("console.log(", "window.received.push(");
  await page.addScriptTag({ content: script });
  await weir.watched("orders");
  await weir.publish("orders", 1);
  await until("the first event", () => page.evaluate(() => window.received.length === 1));
  await weir.kill();
  await until("a 502", () => proxy.answers().includes("502 /v1/sse"), 60_000);
  const again = await Weir.start(t, { port: weir.port, env: settings });
  await again.watched("orders");
  await again.publish("orders", 2);
  await until("the event after the restart", () => page.evaluate(() => window.received.length === 2));
});

test("errors of weir pass nginx unchanged, and so do WebSockets, polls and large bodies", { skip }, async t => {
  const weir = await Weir.start(t, { env: settings });
  const proxy = await nginx(t, weir.port);
  const rejected = await fetch(`http://127.0.0.1:${proxy.port}/v1/sse`);
  assert.equal(rejected.status, 400);
  assert.equal((await rejected.json()).code, "invalid_params");
  const socket = await Socket.open(t, `ws://127.0.0.1:${proxy.port}/v1/ws`, [], { headers: { host: HOST } });
  assert.deepEqual(await socket.call("weir/echo", [1]), [1]);
  const doctor = spawnSync(BIN, ["doctor", `http://127.0.0.1:${proxy.port}`], { encoding: "utf8" });
  assert.equal(doctor.status, 0, doctor.stderr);
});
