// Runs the examples of README.md and proto-docs/*.md against a real weir and compares the results with the pages.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "node:test";
import { BIN, CHROMIUM_ARGS, ROOT, Socket, Weir, until, within } from "../support/weir.mjs";
import { Epochs, blocks, differs, differsText, parse } from "./markdown.mjs";

const RUNNABLE = new Set(["sh", "http", "jsonrpc", "js", "html"]);
const EXPECTED = new Set(["json", "text", "sse"]);

const pages = ["README.md", ...(existsSync(path.join(ROOT, "proto-docs")) ? readdirSync(path.join(ROOT, "proto-docs")).filter(name => name.endsWith(".md")).sort().map(name => `proto-docs/${name}`) : [])].filter(page => existsSync(path.join(ROOT, page)));

class Page {
  constructor(t, weir) {
    Object.assign(this, { t, weir, epochs: new Epochs(), sockets: new Map(), streams: [], output: "" });
  }

  /** Replaces the addresses and epochs of the page with those of this run. */
  real(text) {
    return this.epochs.fill(text).replaceAll(/(localhost|127\.0\.0\.1):8000/g, this.weir.host);
  }

  spawn(command, args, options = {}) {
    const child = spawn(command, args, {
      cwd: path.join(ROOT, "tests"), // the packages of the page's JavaScript are installed there
      detached: true, // a group of its own, so that a pipeline ends as a whole
      env: { ...process.env, PATH: `${path.dirname(BIN)}:${process.env.PATH}`, WEIR_URL: this.weir.url },
      stdio: ["ignore", "pipe", "pipe"],
      ...options,
    });
    child.text = "";
    child.faults = "";
    child.stdout.on("data", chunk => (child.text += chunk));
    child.stderr.on("data", chunk => (child.faults += chunk));
    child.ended = new Promise(resolve => child.on("close", resolve));
    this.t.after(() => {
      try {
        process.kill(-child.pid, "SIGKILL");
      } catch {
        // it has ended
      }
    });
    return child;
  }

  /** A block of commands in order. `curl -N` and `weir tail` continue in the background, as in another terminal. */
  async sh(text) {
    this.output = "";
    const commands = text.replaceAll("\\\n", " ").split("\n").filter(line => line.trim() && !line.trim().startsWith("#"));
    for (const line of commands) {
      const comment = /\s#\s+(.*)$/.exec(line)?.[1];
      const command = this.real(comment === undefined ? line : line.slice(0, line.lastIndexOf(`# ${comment}`)));
      const background = /^curl (-\w+ )*-s?N|^weir (tail|subscribe|provide) /.test(command.trim());
      if (background) {
        const before = await this.parties();
        const stream = this.spawn("bash", ["-c", command]);
        stream.read = 0;
        this.streams.push(stream);
        // It has started when it has printed something or weir counts it.
        await until(`${line} to begin`, async () => stream.text || (await this.parties()) > before);
      } else {
        const child = this.spawn("bash", ["-c", command.replace(/^curl /, "curl -sS ").replace(/\| *curl /, "| curl -sS ")]);
        const code = await within(line, child.ended, 70_000);
        assert.equal(code, 0, `${line}\n${child.faults}${child.text}`);
        this.output += child.text;
        if (!this.output.endsWith("\n")) this.output += "\n";
        // A comment that is JSON is the expected output.
        const shown = comment && parse(comment);
        if (shown && !shown[1].trim()) assert.equal(differs(shown[0], JSON.parse(child.text), this.epochs), undefined, line);
      }
    }
  }

  async parties() {
    const metrics = await this.weir.metrics();
    return [...metrics].filter(([name]) => /^weir_(rpc_providers|subscriptions)/.test(name)).reduce((sum, [, value]) => sum + value, 0);
  }

  /** Requests and responses: `METHOD path  body`, header lines, then `STATUS body`. */
  async http(text) {
    const lines = text.split("\n").filter(line => line.trim());
    while (lines.length) {
      const request = /^(GET|POST|PUT|DELETE|HEAD|OPTIONS) (\S+)(?:\s+(.*))?$/.exec(lines.shift());
      assert.ok(request, `a request line was expected before ${lines[0]}`);
      const headers = {};
      let body = request[3] ?? "";
      while (lines.length && !/^\d{3}\b/.test(lines[0])) {
        const header = /^([A-Za-z-]+): (.*)$/.exec(lines[0]);
        if (header && !body) headers[header[1]] = this.real(header[2]);
        else body += `${body && "\n"}${lines[0]}`;
        lines.shift();
      }
      const answer = await fetch(this.weir.url + this.real(request[2]), { method: request[1], headers, body: body ? this.real(body) : undefined });
      const real = await answer.text();
      if (!lines.length) continue; // the page does not show it
      const [, status, rest] = /^(\d{3})\s*(.*)$/.exec(lines.shift());
      assert.equal(answer.status, Number(status), `${request[0]}\n${real}`);
      let expected = rest;
      while (lines.length && !/^(GET|POST|PUT|DELETE|HEAD|OPTIONS) \S/.test(lines[0])) {
        const header = /^([A-Za-z-]+): (.*)$/.exec(lines[0]);
        if (header) assert.equal(differsText(header[2], answer.headers.get(header[1]) ?? "(absent)", this.epochs), undefined, `${request[0]}\n${header[1]}`);
        else expected += `\n${lines[0]}`;
        lines.shift();
      }
      const wanted = parse(expected);
      if (wanted) {
        assert.equal(differs(wanted[0], JSON.parse(real), this.epochs), undefined, request[0]); // text after the JSON is a remark
      } else if (expected.trim() && expected.trim() !== "…") assert.equal(differsText(expected.trim(), real, this.epochs), undefined, request[0]);
    }
  }

  /** Messages: `→` is sent, `←` must be received. A line of one word names the socket of the following lines. */
  async jsonrpc(text) {
    let name = "client";
    for (const line of text.split("\n")) {
      const arrow = /^\s*([→←])\s*(.*)$/.exec(line);
      if (!arrow) {
        const speaker = /^(\w+):?$/.exec(line.trim());
        if (speaker) name = speaker[1];
        continue;
      }
      if (!this.sockets.has(name)) this.sockets.set(name, await Socket.open(this.t, this.weir.ws));
      const socket = this.sockets.get(name);
      const message = parse(arrow[2]);
      assert.ok(message, `not JSON: ${line}`);
      const length = arrow[2].length - message[1].length;
      const remark = message[1];
      if (arrow[1] === "→") {
        // Hub ids of the page are bound to real ones: `"w:1a"` is the id that was received.
        socket.send(this.hub(this.real(arrow[2].slice(0, length))));
      } else {
        const seen = [];
        const matches = ({ text }) => {
          const real = JSON.parse(text);
          const expected = this.named(message[0], real);
          const epochs = Object.assign(new Epochs(), { real: new Map(this.epochs.real) });
          const why = differs(expected, real, epochs);
          if (why) seen.push(why);
          else this.epochs.real = epochs.real;
          return !why;
        };
        await socket.text(matches, line).catch(error => {
          throw new Error(`${line}${remark && ""}\n${seen.join("\n")}`, { cause: error });
        });
      }
    }
  }

  /** Binds a hub id of the page to the real one: in `id` of a forwarded request and in later references. */
  named(expected, real) {
    this.ids ??= new Map();
    const swap = (one, two) => {
      if (one && two && typeof one === "object" && typeof two === "object" && /^w:/.test(one.id) && /^w:/.test(two.id)) {
        if (!this.ids.has(one.id)) this.ids.set(one.id, two.id);
        if (this.ids.get(one.id) === two.id) return { ...one, id: two.id };
      }
      return one;
    };
    const swapped = swap(expected, real);
    return swapped?.params?.id ? { ...swapped, params: swap(swapped.params, real?.params) } : swapped;
  }

  hub(text) {
    return text.replace(/"w:[^"]*"/g, id => JSON.stringify(this.ids?.get(JSON.parse(id)) ?? JSON.parse(id)));
  }

  /** A program that runs to the end of the page. */
  async js(text) {
    const before = await this.parties();
    const child = this.spawn(process.execPath, ["--input-type=module", "-e", this.real(text)]);
    await until("the program to be connected", async () => {
      assert.equal(child.exitCode, null, child.faults);
      return (await this.parties()) > before;
    });
  }

  /** A page with a script, in Chromium, with a separate weir, so that its events do not affect the rest of the page. */
  async html(text) {
    const weir = await Weir.start(this.t);
    const { chromium } = await import("playwright-core");
    const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: CHROMIUM_ARGS });
    this.t.after(() => browser.close());
    const page = await browser.newPage();
    const logged = [];
    page.on("console", async message => {
      for (const value of message.args()) logged.push(JSON.stringify(await value.jsonValue().catch(() => message.text())));
    });
    // Served from another port of this machine, as by a development server.
    const html = text.replaceAll(/(localhost|127\.0\.0\.1):8000/g, weir.host);
    const server = http.createServer((_, response) => response.setHeader("content-type", "text/html").end(html));
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    this.t.after(() => server.close());
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const channel = /channel=([\w-]+)/.exec(text)?.[1];
    assert.ok(channel, "the page follows no channel");
    await weir.watched(channel);
    await weir.publish(channel, { from: "a test" });
    await until("the event in the page's console", () => logged.some(line => line.includes("a test")));
  }

  async expect(block) {
    if (block.lang === "sse") {
      const stream = this.streams.at(-1);
      assert.ok(stream, "no stream was started before");
      const wanted = block.text.replace(/^:\n/gm, "");
      let why;
      await until("the stream", () => {
        const text = stream.text.slice(stream.read).replace(/^:\n/gm, "").replace(/^\n+/, "");
        const blocks = wanted.trim().split("\n\n").length;
        const part = text.split("\n\n").slice(0, blocks).join("\n\n");
        const epochs = Object.assign(new Epochs(), { real: new Map(this.epochs.real) });
        why = differsText(wanted, part, epochs);
        if (!why) {
          this.epochs.real = epochs.real;
          stream.read = stream.text.lastIndexOf(part.split("\n").at(-1)) + part.split("\n").at(-1).length;
        }
        return !why;
      }, 5_000).catch(() => assert.fail(`${why}\nthe stream printed:\n${stream.text.slice(stream.read)}`));
    } else if (block.lang === "json") {
      const wanted = parse(block.text);
      assert.ok(wanted, "the block is not JSON");
      assert.equal(differs(wanted[0], JSON.parse(this.output), this.epochs), undefined);
    } else {
      assert.equal(differsText(block.text, this.output, this.epochs), undefined);
    }
  }
}

/** The first configuration that a page shows is that of its weir. */
function configured(t, found) {
  const settings = found.find(block => block.lang === "toml" && block.skip === undefined);
  if (!settings) return [];
  const folder = mkdtempSync(path.join(tmpdir(), "weir-docs-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const file = path.join(folder, "weir.toml");
  writeFileSync(file, settings.text);
  return ["--config", file];
}

for (const name of pages) {
  test(name, async t => {
    const found = blocks(path.join(ROOT, name));
    if (!found.some(block => RUNNABLE.has(block.lang) && !block.skip)) return t.diagnostic("nothing to run");
    const weir = await Weir.start(t, { args: configured(t, found) });
    const page = new Page(t, weir);
    let previous;
    for (const block of found) {
      const where = `${name}:${block.line} ${block.lang}`;
      if (block.skip !== undefined) {
        t.diagnostic(`${where}: not run: ${block.skip}`);
        previous = undefined;
      } else if (RUNNABLE.has(block.lang)) {
        await t.test(where, () => page[block.lang](block.text));
        previous = block.lang;
      } else if (block.lang === "sse" || (EXPECTED.has(block.lang) && previous === "sh")) {
        await t.test(`${where} (output)`, () => page.expect(block));
      } else if (block.lang === "json") {
        await t.test(where, () => assert.ok(parse(block.text), "not JSON"));
      }
    }
  });
}

test("the comparison of values", async t => {
  await t.test("parse", () => {
    assert.deepEqual(parse('{"a":1} remark'), [{ a: 1 }, " remark"]);
    assert.equal(parse("a browser's stream"), undefined);
    assert.equal(parse("{a}"), undefined);
    assert.ok(parse('{"a":…,"b":[1,…],…}'));
  });
  await t.test("differs", () => {
    const epochs = new Epochs();
    const same = (expected, real) => differs(parse(expected)[0], real, epochs);
    assert.equal(same('{"epoch":"k3Vq","offset":1,"time":1763640000123}', { epoch: "Xy-_12", offset: 1, time: 1800000000000 }), undefined);
    assert.equal(epochs.fill("after=k3Vq-41&x=1"), "after=Xy-_12-41&x=1");
    assert.ok(same('{"position":"k3Vq-2"}', { position: "other1-2" }));
    assert.equal(same('{"position":"k3Vq-2"}', { position: "Xy-_12-2" }), undefined);
    assert.ok(same('{"a":1}', { a: 1, b: 2 }));
    assert.equal(same('{"a":1,…}', { a: 1, b: 2 }), undefined);
    assert.equal(same('{"t":"00-…"}', { t: "00-abc" }), undefined);
    assert.ok(same("[1]", [1, 2]));
    assert.ok(same('{"n":1763640000123}', { n: 7 }));
  });
});
