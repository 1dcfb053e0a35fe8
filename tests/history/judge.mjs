// The judge: from what writers were told and what readers saw, everything that must not have happened.
//
// It knows nothing of how weir works; it holds the histories against what weir promises (proto-docs/guarantees.md):
//   * a position holds one event, the same for everybody, and the one whose writer was told so;
//   * a reader sees the events of a channel in order and without a hole, or a gap is announced where one is;
//   * nothing comes twice, but where a transport says it may after a reconnect;
//   * what was refused never appears, what was unconfirmed at most once, a key places one event per life of the log;
//   * time does not go back;
//   * who still reads at the end has read to the end;
//   * a call runs at most once; its result means that it ran, and `executed: "no"` that it did not;
//   * fences grow, and who was replaced runs nothing that was asked for afterwards.

const key = at => `${at.epoch}-${at.offset}`;

/**
 * @param writes  [{channel, id, outcome: "placed"|"no"|"maybe", at?: {epoch, offset}, keyed, by?}]: one entry per attempt, those
 *                of one connection (`by`) in the order in which they were sent
 * @param readers [{name, channel, exact, consumer, seen: [{event} | {gap} | {connected: true}], until?}]: `until` is the id it must have seen at last
 * @param calls   [{id, asked, outcome: "result"|"error", by?, executed?}] with `asked` a time
 * @param runs    [{id, by, fence?}]: executions as providers noted them
 * @param grants  [{by, fence, asked, granted}] of one exclusive name
 * @param lease ms that a holder may go on after the Redis that knew of it is gone: a failover that loses the grant lets another in
 * @returns {violations: [string], gaps: {reason: count}, missed: number, moves: number}: moves are places of consumers that the server
 *          lost, which only a lossy failover may do
 */
export function judge({ writes = [], readers = [], calls = [], runs = [], grants = [] }, { lease = 0 } = {}) {
  const verdict = { violations: [], gaps: {}, missed: 0, moves: 0 };
  const wrong = text => verdict.violations.push(text);
  const placed = positions(writes, wrong);
  for (const reader of readers) timeline(reader, placed, verdict);
  appearances(writes, readers, wrong);
  order(writes, wrong);
  judgeCalls(calls, runs, wrong);
  judgeFences(grants, calls, runs, lease, wrong);
  return verdict;
}

/** What lies where, as far as writers were told: channel → position → id. */
function positions(writes, wrong) {
  const placed = new Map();
  for (const { channel, id, outcome, at } of writes) {
    if (outcome !== "placed") continue;
    lay(placed, channel, at, id, "its writer", wrong);
  }
  return placed;
}

function lay(placed, channel, at, id, who, wrong) {
  let log = placed.get(channel);
  if (!log) placed.set(channel, (log = new Map()));
  const before = log.get(key(at));
  if (before === undefined) log.set(key(at), id);
  else if (before !== id) wrong(`${channel} ${key(at)} is ${before}, and to ${who} it is ${id}`);
}

/** One reader of one channel, from its first sight to its last. */
function timeline(reader, placed, verdict) {
  const { name, channel, exact, seen } = reader;
  const wrong = text => verdict.violations.push(`${name} of ${channel}: ${text}`);
  let last; // position of the newest event or gap
  let expected; // after a gap: the position that must come
  let time = 0;
  let reconnected = false; // since the last new event
  const had = new Set();
  for (const entry of seen) {
    if (entry.connected) {
      reconnected = true;
      continue;
    }
    if (entry.gap) {
      const { gap } = entry;
      verdict.gaps[gap.reason] = (verdict.gaps[gap.reason] ?? 0) + 1;
      verdict.missed += gap.missed ?? 0;
      const [after, next] = [gap.after && parse(gap.after), parse(gap.next)];
      if (after && next && after.epoch === next.epoch) {
        if (gap.missed !== null && gap.missed !== next.offset - after.offset - 1) wrong(`a gap from ${gap.after} to ${gap.next} says that ${gap.missed} are missing`);
        if (next.offset <= after.offset) wrong(`a gap leads back from ${gap.after} to ${gap.next}`);
      }
      if (gap.reason === "reset") {
        // "Nobody here knows where you were": what is read again from its beginning is announced with it, and so are the
        // times that it had.
        had.clear();
        time = 0;
      } else if (!reader.consumer && last && next && last.epoch === next.epoch && next.offset <= last.offset && gap.reason !== "bad_position") {
        wrong(`after ${key(last)} a gap leads back to ${gap.next}`);
      }
      expected = next;
      continue;
    }
    const { event } = entry;
    lay(placed, channel, event, event.id, name, wrong);
    if (reader.consumer && (last || expected)) {
      // Its place is the server's: a failover that loses the last commits moves it.
      const follows = expected ? leads(expected, event) : last.epoch === event.epoch && event.offset === last.offset + 1;
      if (!follows && !reconnected) verdict.moves += 1;
      [last, expected, time, reconnected] = [event, undefined, event.time, false];
      continue;
    }
    if (had.has(key(event))) {
      if (exact || !reconnected) wrong(`${key(event)} came twice${exact ? "" : " without a reconnect"}`);
      continue;
    }
    had.add(key(event));
    if (expected) {
      // A gap's `next` is where it goes on; an offset beyond it is a hole that was not told.
      if (!leads(expected, event)) wrong(`after a gap to ${key(expected)} came ${key(event)}`);
    } else if (last && last.epoch !== event.epoch) {
      wrong(`from ${key(last)} to ${key(event)} without a gap`);
    } else if (last && event.offset !== last.offset + 1) {
      wrong(`after ${key(last)} came ${key(event)}, and no gap`);
    }
    if (last?.epoch === event.epoch && event.time < time) wrong(`time goes back at ${key(event)}: ${event.time} after ${time}`);
    time = event.time;
    [last, expected, reconnected] = [event, undefined, false];
  }
  if (reader.until !== undefined && !seen.some(entry => entry.event?.id === reader.until)) wrong(`never came to the end (${reader.until}); its last is ${last ? key(last) : "nothing"}`);
}

/** Whether a gap that ends at `next` is followed by `event`. Where a channel had no log, any is the first. */
function leads(next, event) {
  return next.epoch === event.epoch ? next.offset === event.offset : next.epoch === "0";
}

/** How often each write appears, whoever saw it. */
function appearances(writes, readers, wrong) {
  const attempts = new Map();
  for (const write of writes) {
    const known = attempts.get(write.id) ?? { channel: write.channel, outcomes: [], keyed: write.keyed };
    known.outcomes.push(write.outcome);
    attempts.set(write.id, known);
  }
  const at = new Map(); // id → the positions where somebody saw it
  for (const { seen } of readers) {
    for (const { event } of seen) {
      if (!event) continue;
      if (!at.has(event.id)) at.set(event.id, new Map());
      at.get(event.id).set(key(event), event);
    }
  }
  for (const [id, places] of at) {
    const write = attempts.get(id);
    if (!write) {
      wrong(`${id} was seen and never written`);
      continue;
    }
    if (write.outcomes.every(outcome => outcome === "no")) {
      wrong(`${id} was refused, and seen at ${[...places.keys()]}`);
      continue;
    }
    const epochs = [...places.values()].map(place => place.epoch);
    // A key dies with the writes that a failover loses: then its event may be placed once more, in another term.
    const allowed = write.keyed ? new Set(epochs).size : write.outcomes.filter(outcome => outcome !== "no").length;
    if (places.size > allowed) wrong(`${id} is at ${[...places.keys()]} after ${write.outcomes}${write.keyed ? " with one key" : ""}`);
  }
}

/** Publishes of one connection are placed in the order in which they were sent. */
function order(writes, wrong) {
  const last = new Map();
  for (const { channel, by, outcome, at, duplicate } of writes) {
    if (by === undefined || outcome !== "placed" || duplicate) continue;
    const before = last.get(`${by} ${channel}`);
    if (before?.epoch === at.epoch && at.offset <= before.offset) wrong(`${by} wrote to ${channel} first ${key(before)} and then ${key(at)}`);
    last.set(`${by} ${channel}`, at);
  }
}

function judgeCalls(calls, runs, wrong) {
  const ran = new Map();
  for (const run of runs) ran.set(run.id, [...(ran.get(run.id) ?? []), run]);
  for (const [id, times] of ran) if (times.length > 1) wrong(`call ${id} ran ${times.length} times, by ${times.map(run => run.by)}`);
  for (const call of calls) {
    const times = ran.get(call.id) ?? [];
    if (call.outcome === "result" && !times.some(run => run.by === call.by)) wrong(`call ${call.id} has a result of ${call.by}, who did not run it`);
    if (call.outcome === "error" && call.executed === "no" && times.length) wrong(`call ${call.id} was said not to have run (${call.code}), and ran by ${times[0].by}`);
  }
}

function judgeFences(grants, calls, runs, lease, wrong) {
  const inOrder = [...grants].sort((a, b) => a.granted - b.granted);
  for (const [n, later] of inOrder.entries()) {
    for (const earlier of inOrder.slice(0, n)) {
      if (earlier.fence === later.fence) wrong(`${earlier.by} and ${later.by} both have fence ${later.fence}`);
      if (earlier.granted < later.asked && later.fence < earlier.fence) wrong(`fence ${later.fence} was granted after ${earlier.fence}`);
    }
  }
  const asked = new Map(calls.map(call => [call.id, call.asked]));
  for (const run of runs.filter(run => run.fence !== undefined)) {
    const since = asked.get(run.id);
    const newer = inOrder.find(grant => grant.fence > run.fence && grant.granted + lease < since);
    if (newer) wrong(`call ${run.id} ran under fence ${run.fence}, though ${newer.fence} had been granted before it was made`);
  }
}

function parse(position) {
  const at = position.lastIndexOf("-");
  return { epoch: position.slice(0, at), offset: Number(position.slice(at + 1)) };
}
