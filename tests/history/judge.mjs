// The judge: finds every violation in the results of writers and the events of readers.
//
// It is independent of the implementation and compares histories with the guarantees (proto-docs/guarantees.md):
//   * a position has one event, the same for all readers and for its writer;
//   * a reader receives the events of a channel in order and completely, or a gap is announced in place of missing ones;
//   * no event is repeated, except after a reconnect where the transport allows it;
//   * a rejected event never appears, an unconfirmed one at most once, and a key publishes one event per log;
//   * times do not decrease;
//   * a reader that is connected at the end has read to the end;
//   * a call is executed at most once; a result means that it was, and `executed: "no"` that it was not;
//   * fencing tokens increase, and a replaced holder executes no later call.

const key = at => `${at.epoch}-${at.offset}`;

/**
 * @param writes  [{channel, id, outcome: "placed"|"no"|"maybe", at?: {epoch, offset}, keyed, by?}]: one entry per attempt, those
 *                of one connection (`by`) in the order in which they were sent
 * @param readers [{name, channel, exact, consumer, seen: [{event} | {gap} | {connected: true}], until?}]: `until` is the id that it must have received at the end
 * @param calls   [{id, asked, outcome: "result"|"error", by?, executed?}] with `asked` as the time of the request
 * @param runs    [{id, by, fence?}]: executions as recorded by providers
 * @param grants  [{by, fence, asked, granted}] of one exclusive service
 * @param lease ms that a holder may continue after a failover that loses its grant
 * @returns {violations: [string], gaps: {reason: count}, missed: number, moves: number}: moves are consumer positions that the server
 *          lost, which happens only with a lossy failover
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

/** The events according to writers: channel → position → id. */
function positions(writes, wrong) {
  const placed = new Map();
  for (const { channel, id, outcome, at } of writes) {
    if (outcome !== "placed") continue;
    record(placed, channel, at, id, "its writer", wrong);
  }
  return placed;
}

function record(placed, channel, at, id, observer, wrong) {
  let log = placed.get(channel);
  if (!log) placed.set(channel, (log = new Map()));
  const before = log.get(key(at));
  if (before === undefined) log.set(key(at), id);
  else if (before !== id) wrong(`${channel} ${key(at)} is ${before}, and according to ${observer} ${id}`);
}

/** One reader of one channel, from its first event to its last. */
function timeline(reader, placed, verdict) {
  const { name, channel, exact, seen } = reader;
  const wrong = text => verdict.violations.push(`${name} of ${channel}: ${text}`);
  let last; // position of the newest event or gap
  let expected; // after a gap: the position that must follow
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
        if (gap.missed !== null && gap.missed !== next.offset - after.offset - 1) wrong(`a gap from ${gap.after} to ${gap.next} counts ${gap.missed} missing events`);
        if (next.offset <= after.offset) wrong(`a gap leads back from ${gap.after} to ${gap.next}`);
      }
      if (gap.reason === "reset") {
        // The position is unknown: the log is read from its beginning, and events and times of before may be repeated.
        had.clear();
        time = 0;
      } else if (!reader.consumer && last && next && last.epoch === next.epoch && next.offset <= last.offset && gap.reason !== "bad_position") {
        wrong(`after ${key(last)} a gap leads back to ${gap.next}`);
      }
      expected = next;
      continue;
    }
    const { event } = entry;
    record(placed, channel, event, event.id, name, wrong);
    if (reader.consumer && (last || expected)) {
      // The server stores the position: a failover that loses the last commits moves it.
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
      // `next` of a gap is the following position; a later offset is an unannounced loss.
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
  if (reader.until !== undefined && !seen.some(entry => entry.event?.id === reader.until)) wrong(`did not read to the end (${reader.until}); its last is ${last ? key(last) : "nothing"}`);
}

/** Whether a gap that ends at `next` may be followed by `event`. In a channel without a log any event may be the first. */
function leads(next, event) {
  return next.epoch === event.epoch ? next.offset === event.offset : next.epoch === "0";
}

/** How often each write appears, over all readers. */
function appearances(writes, readers, wrong) {
  const attempts = new Map();
  for (const write of writes) {
    const known = attempts.get(write.id) ?? { channel: write.channel, outcomes: [], keyed: write.keyed };
    known.outcomes.push(write.outcome);
    attempts.set(write.id, known);
  }
  const at = new Map(); // id → the positions at which any reader received it
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
    // A failover that loses writes loses their keys, too: then the event may be published once more in another term.
    const allowed = write.keyed ? new Set(epochs).size : write.outcomes.filter(outcome => outcome !== "no").length;
    if (places.size > allowed) wrong(`${id} is at ${[...places.keys()]} after ${write.outcomes}${write.keyed ? " with one key" : ""}`);
  }
}

/** Publishes of one connection are appended in the order in which they were sent. */
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
    if (call.outcome === "result" && !times.some(run => run.by === call.by)) wrong(`call ${call.id} has a result of ${call.by}, which did not execute it`);
    if (call.outcome === "error" && call.executed === "no" && times.length) wrong(`call ${call.id} was reported as not executed (${call.code}), and was executed by ${times[0].by}`);
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
