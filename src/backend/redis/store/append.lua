-- Appends events to one channel: all of them or none. Every check comes before the first write, since an error does not
-- undo earlier writes.
--
-- KEYS  meta · stream · one for each idempotency key
-- ARGV  now (0: the clock of Redis) · generation of the connection · a new epoch · PUBLISH or SPUBLISH · its channel ·
--       retention: count, age, bytes · milliseconds that idempotency keys are remembered · then for each event:
--       the number of its idempotency key among KEYS, or 0 · fingerprint · body
-- Returns {epoch, time, offset…} in the order of the events, for a duplicate with "epoch offset time" as its offset;
-- {false, n} if the key of the n-th event was used for another event.
local meta, stream = KEYS[1], KEYS[2]
local found = redis.call('HMGET', meta, 'h', 'e', 'g')
local hot, epoch = found[1], found[2]
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local version, top, last, total, check_total, check_time = 1, 0, 0, 0, 0, 0
if hot then
  version, top, last, total, check_total, check_time = struct.unpack('>I1I6I6I6I6I6', hot)
  if version ~= 1 then
    return redis.error_reply('VERSION this channel was written by a newer weir')
  end
end

-- The fast path: one event without a key.
if hot and #ARGV == 12 and #KEYS == 2 and found[3] == ARGV[2] and now < check_time and total < check_total then
  local time = now > last and now or last
  top = top + 1
  local event = '\1e' .. epoch .. struct.pack('>I6I6', time, top) .. ARGV[12]
  redis.call('XADD', stream, 'MAXLEN', '~', ARGV[6], string.format('%d-0', top), 'e', event)
  redis.call('HSET', meta, 'h',
    struct.pack('>I1I6I6I6I6I6', 1, top, time, total + #ARGV[12] + COST, check_total, check_time))
  redis.call(ARGV[4], ARGV[5], event)
  return {epoch, time, top}
end

-- Seldom: a life or a term begins, or it is time to apply retention.
local server = ARGV[2]
if hot and found[3] ~= server then server = generation(server) end
local seldom, cold = not hot or found[3] ~= server or now >= check_time, nil
local age = tonumber(ARGV[7])
if seldom then
  -- terms, previous life, absent since, born, life, marks, last read, time of the previous life's last event
  cold = redis.call('HMGET', meta, 't', 'p', 'a', 'b', 'l', 'r', 'w', 'z')
end
local watched = cold and tonumber(cold[7] or 0) or 0
local idle = hot and seldom and now > math.max(last, watched) + age + LINGER
local born = not hot or idle

-- Idempotency keys count only in the life of their events: both expire together.
local known, life = nil, nil
if #KEYS > 2 then
  known = {}
  if not born then
    life = redis.call('HGET', meta, 'l')
  end
  local mine = {}
  for n = 1, (#ARGV - 9) / 3 do
    local at = 7 + 3 * n
    local key = tonumber(ARGV[at])
    if key > 0 then
      local used = life and redis.call('GET', KEYS[key + 2])
      if used then
        local of, print, e, offset, time = string.match(used, '^1 (%S+) (%S+) (%S+) (%S+) (%S+)$')
        if of == life and now - tonumber(time) < tonumber(ARGV[9]) then
          if print ~= ARGV[at + 1] then return {false, n} end
          known[n] = e .. ' ' .. offset .. ' ' .. time
        end
      end
      if not known[n] then
        if mine[key] then
          if mine[key][1] ~= ARGV[at + 1] then return {false, n} end
          known[n] = mine[key][2]
        else
          mine[key] = {ARGV[at + 1], n}
        end
      end
    end
  end
end

if born then
  local absent = cold[3]
  if idle then
    absent = math.max(tonumber(absent or 0), tonumber(cold[4]), math.floor((math.max(last, watched) + age + LINGER) / 1000) + 1) + 1
    redis.call('HSET', meta, 'p', epoch .. ':' .. string.format('%d', top) .. ':reset')
  else
    last = tonumber(cold[8] or 0)
  end
  epoch, life, top, total = ARGV[3], ARGV[3], 0, 0
  -- The first write is one that needs memory: without memory Redis rejects only the first write of a script. The log
  -- counts as born with the next full second: a reader may have been given that second a moment ago.
  redis.call('HSET', meta, 'e', epoch, 'l', life, 'g', server,
    'b', string.format('%d', math.max(tonumber(absent or 0), math.floor(now / 1000) + 1)))
  redis.call('HDEL', meta, 't', 'r', 'd', 'w', 'z')
  redis.call('DEL', stream)
  if absent then redis.call('HSET', meta, 'a', string.format('%d', absent)) end
  cold[6] = false
elseif found[3] ~= server then
  -- Another server than at the last write: events that it never received are lost. A new term tells readers, and
  -- offsets go on.
  local terms = (cold[1] or '') .. epoch .. ':' .. string.format('%d', top) .. ','
  local _, count = string.gsub(terms, ',', '')
  for _ = 1, count - TERMS do terms = string.gsub(terms, '^[^,]*,', '') end
  epoch = ARGV[3]
  redis.call('HSET', meta, 'e', epoch, 'g', server, 't', terms)
end

local time = math.max(now, last)
local stamp = '\1e' .. epoch .. struct.pack('>I6', time)
local answer, shown, keyed = {epoch, time}, {}, false
for n = 1, (#ARGV - 9) / 3 do
  local at = 7 + 3 * n
  local before = known and known[n]
  if before then
    -- A number: the event of this batch that has the same key.
    answer[n + 2] = type(before) == 'number' and epoch .. ' ' .. string.format('%d', answer[before + 2]) .. ' ' .. string.format('%d', time) or before
  else
    top = top + 1
    local event = stamp .. struct.pack('>I6', top) .. ARGV[at + 2]
    redis.call('XADD', stream, 'MAXLEN', '~', ARGV[6], string.format('%d-0', top), 'e', event)
    total = total + #ARGV[at + 2] + COST
    answer[n + 2] = top
    shown[#shown + 1] = event
    local key = tonumber(ARGV[at])
    if key > 0 then
      redis.call('SET', KEYS[key + 2],
        string.format('1 %s %s %s %d %d', life, ARGV[at + 1], epoch, top, time), 'PX', ARGV[9])
      keyed = true
    end
  end
end
-- The life must not end before its idempotency keys: the log counts as read for as long as they are remembered.
local read = now + tonumber(ARGV[9]) - age - LINGER
if keyed and read > now then redis.call('HSET', meta, 'w', string.format('%d', read)) end

if #shown > 0 or seldom then
  if seldom or total >= check_total then
    -- Marks are where the log may be trimmed: {first offset, time of that event or earlier, bytes before it}.
    local marks = {}
    local packed = cold and cold[6]
    if not cold then packed = redis.call('HGET', meta, 'r') end
    if not packed then packed = struct.pack('>I6I6I6', 1, time, 0) end
    local place = 1
    while place < #packed do
      local offset, since, before
      offset, since, before, place = struct.unpack('>I6I6I6', packed, place)
      marks[#marks + 1] = {offset, since, before}
    end
    local keep = tonumber(ARGV[8])
    if marks[#marks][1] ~= top + 1 then marks[#marks + 1] = {top + 1, time, total} end
    local cut = false
    while #marks > 1 and ((total - marks[1][3] > keep and marks[2][1] <= top) or marks[2][2] < now - age) do
      table.remove(marks, 1)
      cut = true
    end
    if cut then redis.call('XTRIM', stream, 'MINID', string.format('%d', marks[1][1])) end
    if #marks > 16 then
      for n = #marks - 1, 2, -2 do table.remove(marks, n) end
    end
    packed = {}
    for n = 1, #marks do packed[n] = struct.pack('>I6I6I6', marks[n][1], marks[n][2], marks[n][3]) end
    redis.call('HSET', meta, 'r', table.concat(packed))
    check_total = math.min(total + math.floor(keep / 16), marks[1][3] + keep + 1)
    check_time = now + math.max(math.floor(age / 16), 1000)
    if marks[2] then check_time = math.min(check_time, marks[2][2] + age + 1) end
    check_time = math.max(check_time, now + 1)
    -- The metadata lasts longer than the events: it tells readers that come back what they missed.
    redis.call('PEXPIRE', meta, string.format('%d', 2 * age + GRACE))
    redis.call('PEXPIRE', stream, string.format('%d', age + math.floor(age / 8) + GRACE))
  end
  redis.call('HSET', meta, 'h', struct.pack('>I1I6I6I6I6I6', 1, top, #shown > 0 and time or last, total, check_total, check_time))
end

-- Last, so that no node receives an event before it can be read.
if #shown == 1 then
  redis.call(ARGV[4], ARGV[5], shown[1])
elseif #shown > 1 then
  local batch, size = {'\1b'}, 0
  for n = 1, #shown do
    batch[#batch + 1] = struct.pack('>I4', #shown[n])
    batch[#batch + 1] = shown[n]
    size = size + #shown[n]
    if size > 262144 or n == #shown then
      redis.call(ARGV[4], ARGV[5], table.concat(batch))
      batch, size = {'\1b'}, 0
    end
  end
end
return answer
