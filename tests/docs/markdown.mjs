// Reads the blocks of a page in order and compares results with them. The conventions are in ../README.md.

import { readFileSync } from "node:fs";

/** Fenced blocks of a page: {lang, text, line, skip}. `skip` is the reason in a `<!-- not run: … -->` just before. */
export function blocks(file) {
  const found = [];
  let open, skip;
  readFileSync(file, "utf8").split("\n").forEach((line, index) => {
    const fence = /^(`{3,}|~{3,})\s*(\S*)\s*$/.exec(line);
    if (open) {
      if (fence && !fence[2] && fence[1].startsWith(open.fence)) {
        found.push({ ...open, text: open.lines.join("\n") });
        open = skip = undefined;
      } else open.lines.push(line);
    } else if (fence) {
      open = { fence: fence[1], lang: fence[2], line: index + 1, skip, lines: [] };
    } else {
      const comment = /^<!--\s*not run:\s*(.*?)\s*-->$/.exec(line);
      if (comment) skip = comment[1];
      else if (line.trim()) skip = undefined;
    }
  });
  if (open) throw new Error(`${file}:${open.line}: a block that is never closed`);
  return found;
}

// Wildcards of expected values.
const ANY = "\uE000any";
const REST = "\uE000rest";

/**
 * Parses JSON in which `…` may stand for a value (`"time":…`), for the rest of an object or array (`{…}`, `[1,…]`),
 * or for a part of a string (`"00-…"`). Returns [value, rest of the text], or undefined if the text is not JSON.
 */
export function parse(text) {
  let at = 0;
  const space = () => {
    while (/\s/.test(text[at] ?? "")) at += 1;
  };
  const fail = () => {
    throw new SyntaxError(`not JSON at ${JSON.stringify(text.slice(at, at + 20))}`);
  };
  const value = () => {
    space();
    const rest = text.slice(at);
    if (rest[0] === "…") return (at += 1), ANY;
    if (rest[0] === "{" || rest[0] === "[") return container(rest[0]);
    const scalar = /^("(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])|true|false|null)/.exec(rest);
    if (!scalar) fail();
    at += scalar[0].length;
    return JSON.parse(scalar[0]);
  };
  const container = opening => {
    const object = opening === "{";
    const made = object ? {} : [];
    const closing = object ? "}" : "]";
    at += 1;
    for (let first = true; ; first = false) {
      space();
      if (text[at] === closing) return (at += 1), made;
      if (!first) {
        if (text[at] !== ",") fail();
        at += 1;
        space();
      }
      const rest = new RegExp(`^…\\s*\\${closing}`).test(text.slice(at));
      if (rest) {
        at += 1;
        object ? (made[REST] = true) : made.push(REST);
      } else if (object) {
        const name = value();
        space();
        if (typeof name !== "string" || text[at] !== ":") fail();
        at += 1;
        made[name] = value();
      } else made.push(value());
    }
  };
  try {
    const parsed = value();
    return [parsed, text.slice(at)];
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Epochs differ from run to run: an epoch of the page such as `k3Vq` is bound to the first real one in its place. */
export class Epochs {
  constructor() {
    this.real = new Map();
  }

  same(written, real) {
    if (!this.real.has(written)) this.real.set(written, real);
    return this.real.get(written) === real;
  }

  /** Replaces the epochs of the page in a command with the real ones. */
  fill(text) {
    return text.replace(/(?<![\w-])([\w]{1,6})(?=-\d+(?![\w-]))/g, written => this.real.get(written) ?? written).replace(/("epoch":\s*")([\w]{1,6})(")/g, (_, a, written, b) => a + (this.real.get(written) ?? written) + b);
  }
}

const POSITION = /^([\w-]{1,6})-(\d+)$/;

/** How `real` differs from the page, or undefined. Times, epochs and `…` need not be equal. */
export function differs(expected, real, epochs, path = "$") {
  const no = () => `${path}: expected ${JSON.stringify(expected)}, got ${JSON.stringify(real)}`;
  if (expected === ANY) return undefined;
  if (typeof expected === "string") return typeof real === "string" && sameText(expected, real, epochs, path.endsWith(".epoch")) ? undefined : no();
  if (typeof expected === "number") {
    if (typeof real !== "number") return no();
    const time = expected >= 1e12 && real >= 1e12; // Unix milliseconds
    return time || expected === real || /_ms$/.test(path) ? undefined : no();
  }
  if (expected === null || typeof expected !== "object") return expected === real ? undefined : no();
  if (Array.isArray(expected)) {
    if (!Array.isArray(real)) return no();
    const open = expected.at(-1) === REST;
    const items = open ? expected.slice(0, -1) : expected;
    if (open ? real.length < items.length : real.length !== items.length) return no();
    return items.map((item, index) => differs(item, real[index], epochs, `${path}[${index}]`)).find(Boolean);
  }
  if (real === null || typeof real !== "object" || Array.isArray(real)) return no();
  const open = expected[REST];
  for (const name of Object.keys(expected)) if (name !== REST && !(name in real)) return `${path}: ${name} is missing in ${JSON.stringify(real)}`;
  if (!open) for (const name of Object.keys(real)) if (!(name in expected)) return `${path}: ${name} is not on the page: ${JSON.stringify(real)}`;
  return Object.keys(expected).filter(name => name !== REST).map(name => differs(expected[name], real[name], epochs, `${path}.${name}`)).find(Boolean);
}

function sameText(expected, real, epochs, isEpoch = false) {
  if (isEpoch) return epochs.same(expected, real);
  const [one, two] = [POSITION.exec(expected), POSITION.exec(real)];
  if (one && two) {
    if (one[1] === "0" || two[1] === "0") return one[1] === two[1]; // 0-<Unix seconds>: a channel without a log
    return one[2] === two[2] && epochs.same(one[1], two[1]);
  }
  if (!expected.includes("…")) return expected === real;
  const pattern = expected.split("…").map(part => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("[^]*");
  return new RegExp(`^${pattern}$`).test(real);
}

/** Compares output as text: line by line; JSON within a line as JSON, `field: value` of SSE and headers as such. */
export function differsText(expected, real, epochs) {
  const trim = text => text.replace(/\s+$/, "").split("\n");
  const wanted = trim(expected);
  const lines = trim(real);
  for (const [index, line] of wanted.entries()) {
    if (line === "…") return undefined; // the rest is not compared
    const why = lines[index] === undefined ? `expected ${JSON.stringify(line)}, got the end` : differsLine(line, lines[index], epochs);
    if (why) return `line ${index + 1}: ${why}`;
  }
  if (lines.length > wanted.length) return `output that is not on the page: ${JSON.stringify(lines[wanted.length])}`;
  return undefined;
}

function differsLine(expected, real, epochs) {
  const field = /^([\w-]+): ?(.*)$/.exec(expected);
  const other = /^([\w-]+): ?(.*)$/.exec(real);
  if (field && other) {
    if (field[1].toLowerCase() !== other[1].toLowerCase()) return `expected ${expected}, got ${real}`;
    if (/^(retry|retry-after)$/i.test(field[1])) return /^\d+$/.test(other[2]) ? undefined : `expected a number, got ${real}`;
    return differsLine(field[2], other[2], epochs);
  }
  const [one, two] = [parse(expected), parse(real)];
  if (one && two && !one[1].trim() && !two[1].trim()) return differs(one[0], two[0], epochs);
  return sameText(expected, real, epochs) ? undefined : `expected ${JSON.stringify(expected)}, got ${JSON.stringify(real)}`;
}
