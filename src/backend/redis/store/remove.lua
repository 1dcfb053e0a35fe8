-- Removes the events before a position, or the log.
--
-- KEYS  meta · stream
-- ARGV  now (0: the clock of Redis) · PUBLISH or SPUBLISH · its channel · epoch · offset (0: the log) · retention: age
-- Returns 1, or 0 if that is no position of the log as it is.
local meta = KEYS[1]
local found = redis.call('HMGET', meta, 'h', 'e', 't', 'r', 'a', 'b', 'w')
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local offset, age = tonumber(ARGV[5]), tonumber(ARGV[6])
local gone = not found[1]
local version, top, last, total
if not gone then
  version, top, last, total = struct.unpack('>I1I6I6I6', found[1])
  if version ~= 1 then
    return redis.error_reply('VERSION this channel was written by a newer weir')
  end
  gone = now > math.max(last, tonumber(found[7] or 0)) + age + LINGER
end
if gone then return offset == 0 and 1 or 0 end

if offset == 0 then
  local absent = math.max(tonumber(found[5] or 0), tonumber(found[6]), math.floor(now / 1000) + 1) + 1
  redis.call('DEL', KEYS[2])
  redis.call('HDEL', meta, 'h', 'e', 'g', 't', 'r', 'd', 'w', 'l', 'b')
  redis.call('HSET', meta, 'p', found[2] .. ':' .. string.format('%d', top) .. ':deleted',
    'a', string.format('%d', absent), 'z', string.format('%d', last))
  redis.call('PEXPIRE', meta, string.format('%d', 2 * age + GRACE))
else
  local known = ARGV[4] == found[2] or string.find(found[3] or '', ARGV[4] .. ':', 1, true)
  if not known or offset > top + 1 then return 0 end
  local marks, place, mark = {}, 1, nil
  local packed = found[4] or ''
  while place < #packed do
    local at, since, before
    at, since, before, place = struct.unpack('>I6I6I6', packed, place)
    if at <= offset then
      mark = {offset, since, before}
    else
      marks[#marks + 1] = struct.pack('>I6I6I6', at, since, before)
    end
  end
  -- Without a mark the log was trimmed beyond that position before.
  if mark then
    table.insert(marks, 1, struct.pack('>I6I6I6', mark[1], mark[2], mark[3]))
    redis.call('XTRIM', KEYS[2], 'MINID', string.format('%d', offset))
    redis.call('HSET', meta, 'r', table.concat(marks), 'd', string.format('%d', offset))
  end
end
redis.call(ARGV[2], ARGV[3], '\1x')
return 1
