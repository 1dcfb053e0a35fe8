// Tests of the judge: a correct history passes, and each kind of violation is found.

import assert from "node:assert/strict";
import { test } from "node:test";
import { judge } from "./judge.mjs";

const event = (offset, id = `w${offset}`, epoch = "e1", time = offset) => ({ event: { epoch, offset, id, time } });
const gap = (reason, after, next, missed = null) => ({ gap: { reason, after, next, missed } });
const placed = (offset, id = `w${offset}`, epoch = "e1", keyed = false) => ({ channel: "c", id, outcome: "placed", at: { epoch, offset }, keyed });
const reader = (seen, more = {}) => ({ name: "r", channel: "c", exact: true, seen, ...more });
const writes = [1, 2, 3, 4].map(offset => placed(offset));

function finds(what, history) {
  const { violations } = judge(history);
  assert.equal(violations.length, 1, `${what}: ${JSON.stringify(violations)}`);
  assert.match(violations[0], what);
}

test("a correct history passes", () => {
  const seen = [event(1), event(2), { connected: true }, event(3), event(4)];
  assert.deepEqual(judge({ writes, readers: [reader(seen, { until: "w4" })] }), { violations: [], gaps: {}, missed: 0, moves: 0 });
});

test("an announced loss passes and is counted", () => {
  const failover = [...writes, placed(3, "x3", "e2")];
  const seen = [event(1), event(2), gap("failover", "e1-2", "e2-3"), event(3, "x3", "e2")];
  assert.deepEqual(judge({ writes: failover, readers: [reader(seen, { until: "x3" })] }), { violations: [], gaps: { failover: 1 }, missed: 0, moves: 0 });
  const trimmed = [event(1), gap("trimmed", "e1-1", "e1-4", 2), event(4)];
  assert.deepEqual(judge({ writes, readers: [reader(trimmed)] }), { violations: [], gaps: { trimmed: 1 }, missed: 2, moves: 0 });
});

test("a reset may lead back to the beginning, other gaps may not", () => {
  const again = reason => [event(1), event(2), gap(reason, "e1-2", "e1-1"), event(1, "w1", "e1", 2)];
  assert.deepEqual(judge({ writes, readers: [reader([event(1), event(2), gap("reset", "e9-2", "e1-1"), event(1)])] }).violations, []);
  assert.match(judge({ writes, readers: [reader(again("failover"))] }).violations.join(), /leads back/);
});

test("a consumer position that moved is counted", () => {
  const moved = reader([event(1), event(2), event(1), event(2)], { exact: false, consumer: true });
  assert.deepEqual(judge({ writes, readers: [moved] }), { violations: [], gaps: {}, missed: 0, moves: 1 });
});

test("a repeat after a reconnect passes where it is allowed", () => {
  const seen = [event(1), event(2), { connected: true }, event(2), event(3)];
  assert.deepEqual(judge({ writes, readers: [reader(seen, { exact: false })] }).violations, []);
  finds(/came twice/, { writes, readers: [reader(seen)] });
  finds(/came twice without a reconnect/, { writes, readers: [reader([event(1), event(1)], { exact: false })] });
});

test("missing, misordered and wrong events are found", () => {
  finds(/after e1-1 came e1-3, and no gap/, { writes, readers: [reader([event(1), event(3)])] });
  finds(/after e1-2 came e1-1, and no gap/, { writes, readers: [reader([event(2, "w2", "e1", 1), event(1)])] });
  finds(/without a gap/, { writes: [...writes, placed(2, "x2", "e2")], readers: [reader([event(1), event(2, "x2", "e2")])] });
  finds(/after a gap to e1-3 came e1-4/, { writes, readers: [reader([event(1), gap("trimmed", "e1-1", "e1-3", 1), event(4)])] });
  finds(/counts 7 missing events/, { writes, readers: [reader([event(1), gap("trimmed", "e1-1", "e1-3", 7), event(3)])] });
  finds(/time goes back/, { writes, readers: [reader([event(1), event(2, "w2", "e1", 0)])] });
  finds(/did not read to the end/, { writes, readers: [reader([event(1)], { until: "w4" })] });
  finds(/is w2, and according to r w9/, { writes: [...writes, { channel: "c", id: "w9", outcome: "maybe" }], readers: [reader([event(1), event(2, "w9")])] });
  finds(/is a, and according to its writer b/, { writes: [placed(1, "a"), placed(1, "b")] });
});

test("writes that must not appear are found", () => {
  const maybe = { channel: "c", id: "m", outcome: "maybe" };
  const no = { channel: "c", id: "n", outcome: "no" };
  finds(/was refused, and seen/, { writes: [no], readers: [reader([event(1, "n")])] });
  finds(/seen and never written/, { readers: [reader([event(1, "?")])] });
  finds(/m is at e1-1,e1-2/, { writes: [maybe], readers: [reader([event(1, "m"), event(2, "m")])] });
  finds(/wrote to c first e1-2 and then e1-1/, { writes: [{ ...placed(2), by: "s" }, { ...placed(1), by: "s" }] });
  const keyed = [{ ...maybe, keyed: true }, placed(2, "m", "e1", true)];
  finds(/with one key/, { writes: keyed, readers: [reader([event(1, "m"), event(2, "m")])] });
  const again = [placed(1, "m", "e1", true), placed(1, "m", "e2", true)];
  assert.deepEqual(judge({ writes: again, readers: [reader([event(1, "m"), gap("failover", "e1-0", "e2-1"), event(1, "m", "e2")])] }).violations, []);
});

test("calls executed twice or not at all are found", () => {
  const result = { id: 1, asked: 1, outcome: "result", by: "p" };
  assert.deepEqual(judge({ calls: [result], runs: [{ id: 1, by: "p" }] }).violations, []);
  finds(/ran 2 times/, { calls: [result], runs: [{ id: 1, by: "p" }, { id: 1, by: "q" }] });
  finds(/which did not execute it/, { calls: [result] });
  finds(/reported as not executed/, { calls: [{ id: 1, asked: 1, outcome: "error", executed: "no", code: "busy" }], runs: [{ id: 1, by: "p" }] });
});

test("fencing tokens that do not protect are found", () => {
  const first = { by: "p", fence: 5, asked: 0, granted: 1 };
  const second = { by: "q", fence: 6, asked: 2, granted: 3 };
  assert.deepEqual(judge({ grants: [first, second] }).violations, []);
  finds(/was granted after/, { grants: [first, { ...second, fence: 4 }] });
  finds(/both have fence 5/, { grants: [first, { ...second, fence: 5 }] });
  const late = { id: 1, asked: 4, outcome: "error", executed: "maybe" };
  finds(/ran under fence 5, though 6/, { grants: [first, second], calls: [late], runs: [{ id: 1, by: "p", fence: 5 }] });
  const history = { grants: [first, second], calls: [late], runs: [{ id: 1, by: "p", fence: 5 }] };
  assert.deepEqual(judge(history, { lease: 1 }).violations, []);
});
