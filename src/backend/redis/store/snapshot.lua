-- Returns the state of a log, and events of it. Writes nothing.
--
-- KEYS  meta · stream
-- ARGV  now (0: the clock of Redis) · retention: count, age · where to begin (after, earliest, last, none) · epoch ·
--       offset, or the number of events for last · maximum of events · maximum of bytes
-- Returns {now, hot, epoch, generation, terms, previous life, absent since, born, trimmed to, marks, last read,
--          newest offset that is too old, event…}.
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local found = redis.call('HMGET', KEYS[1], 'h', 'e', 'g', 't', 'p', 'a', 'b', 'd', 'r', 'w')
local answer = {string.format('%d', now)}
for n = 1, 10 do answer[n + 1] = found[n] end
answer[12] = 0
local hot = found[1]
if not hot or ARGV[4] == 'none' then return answer end
local version, top, last, total = struct.unpack('>I1I6I6I6', hot)
if version ~= 1 then return answer end

-- What retention excludes, whether or not it is trimmed already.
local oldest, marked, size = now - tonumber(ARGV[3]), math.max(1, top - tonumber(ARGV[2]) + 1), 0
if last < oldest then return answer end
local marks, place, before = found[9] or '', 1, nil
while place < #marks do
  local offset, since, sum
  offset, since, sum, place = struct.unpack('>I6I6I6', marks, place)
  if not before then before = {offset, sum} end
  if place == 19 or since < oldest then marked = math.max(marked, offset) end
end
local from = marked
if ARGV[4] == 'last' then
  from = math.max(from, top - tonumber(ARGV[6]) + 1)
elseif ARGV[4] == 'after' and (ARGV[5] == found[2] or ARGV[5] == '*' or string.find(found[4] or '', ARGV[5] .. ':', 1, true)) then
  from = math.max(from, tonumber(ARGV[6]) + 1)
end

-- Events that are too old, and not yet trimmed. Events are in the order of their times.
local function old(offset)
  local event = redis.call('XRANGE', KEYS[2], string.format('%d', offset), '+', 'COUNT', 1)[1]
  return event and struct.unpack('>I6', event[2][2], 9) < oldest
end
if from <= top and old(from) then
  local low, high = from, top
  while high - low > 1 do
    local middle = math.floor((low + high) / 2)
    if old(middle) then low = middle else high = middle end
  end
  answer[12] = low
  from = high
end

local most, room = tonumber(ARGV[7]), tonumber(ARGV[8])
-- The mean size of all events says nothing about the next ones: a few at first, and more as long as they are small,
-- since the whole result of an XRANGE is in memory.
local mean, most_at_once = before and (total - before[2]) / math.max(1, top - before[1] + 1) or 1024, 8
while from <= top and most > 0 and room >= 0 do
  local count = math.max(1, math.min(most, most_at_once, math.ceil(room / math.max(1, mean))))
  local page, held = redis.call('XRANGE', KEYS[2], string.format('%d', from), '+', 'COUNT', count), 0
  for n = 1, #page do
    local event = page[n][2][2]
    answer[#answer + 1] = event
    held = held + #event + COST
    most = most - 1
    from = tonumber(string.match(page[n][1], '^%d+')) + 1
    if held > room then break end
  end
  if #page < count then break end
  room, mean, most_at_once = room - held, held / #page, math.min(32, 2 * most_at_once)
end
return answer
