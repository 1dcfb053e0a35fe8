-- The cursors of one consumer, in one hash: field 's' is when it was last used, 'c:' and a channel its position there.
--
-- KEYS  consumer
-- ARGV  now (0: the clock of Redis) · milliseconds after which it expires · the operation: seen; show; get, channel; or
--       set, channel, expected position, new position, maximum of channels, whether the consumer may be new
-- Returns {now, 'ok', …} with the time of the last use, all fields, or the position; or {now, reason, position}.
local key, idle = KEYS[1], tonumber(ARGV[2])
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local text = string.format('%d', now)
local seen = redis.call('HGET', key, 's')
local forgotten = seen and now - tonumber(seen) > idle
if ARGV[3] == 'seen' then
  return {text, 'ok', not forgotten and seen or ''}
elseif ARGV[3] == 'show' then
  return {text, 'ok', forgotten and {} or redis.call('HGETALL', key)}
end
local field = 'c:' .. ARGV[4]
local known = not forgotten and redis.call('HGET', key, field) or ''
if ARGV[3] == 'set' then
  if known ~= ARGV[5] then return {text, 'moved', known} end
  if (not seen or forgotten) and ARGV[8] ~= '1' then return {text, 'new', known} end
  if forgotten then redis.call('DEL', key) end
  if known == '' and redis.call('HLEN', key) > tonumber(ARGV[7]) then return {text, 'full', known} end
  redis.call('HSET', key, field, ARGV[6], 's', text)
  known = ARGV[6]
elseif seen and not forgotten then
  -- Reading renews the consumer where Redis takes writes, and works where it does not.
  redis.pcall('HSET', key, 's', text)
else
  return {text, 'ok', known}
end
redis.pcall('PEXPIRE', key, string.format('%d', idle))
return {text, 'ok', known}
