-- Places events with the times that they had, behind the offset where the log must end. What retention lets go of, the next
-- append does.
--
-- KEYS  meta · stream
-- ARGV  now (0: the clock of Redis) · generation · a fresh epoch · how to publish · where · age · top · then for each event:
--       time · body
-- Answers {epoch, time…}; {false, top} if the log ends elsewhere.
local meta, stream = KEYS[1], KEYS[2]
local found = redis.call('HMGET', meta, 'h', 'e', 'g', 'a', 'b', 'r', 'w', 't')
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local version, top, last, total = 1, 0, 0, 0
local epoch, marks = found[2], found[6]
if found[1] then
  version, top, last, total = struct.unpack('>I1I6I6I6', found[1])
  if version ~= 1 then
    return redis.error_reply('VERSION this channel was written by a newer weir')
  end
end
local born = not found[1]
if top ~= tonumber(ARGV[7]) then return {false, top} end
if born then
  epoch, marks = ARGV[3], false
  redis.call('HSET', meta, 'e', epoch, 'l', epoch, 'g', ARGV[2],
    'b', string.format('%d', math.max(tonumber(found[4] or 0), math.floor(now / 1000) + 1)))
  redis.call('HDEL', meta, 't', 'r', 'd', 'w', 'z')
  redis.call('DEL', stream)
elseif found[3] ~= ARGV[2] then
  local terms = (found[8] or '') .. epoch .. ':' .. string.format('%d', top) .. ','
  local _, count = string.gsub(terms, ',', '')
  for _ = 1, count - TERMS do terms = string.gsub(terms, '^[^,]*,', '') end
  epoch = ARGV[3]
  redis.call('HSET', meta, 'e', epoch, 'g', ARGV[2], 't', terms)
end
local answer = {epoch}
marks = marks or ''
for at = 8, #ARGV, 2 do
  last = math.max(last, math.min(now, tonumber(ARGV[at])))
  -- A mark for each call: so exactly can it be let go of.
  if at == 8 then marks = marks .. struct.pack('>I6I6I6', top + 1, last, total) end
  top = top + 1
  local event = '\1e' .. epoch .. struct.pack('>I6I6', last, top) .. ARGV[at + 1]
  redis.call('XADD', stream, string.format('%d-0', top), 'e', event)
  total = total + #ARGV[at + 1] + COST
  answer[#answer + 1] = last
end
-- Everything is due at the next append. The log is young, however old its events are.
redis.call('HSET', meta, 'r', marks, 'w', string.format('%d', now), 'h', struct.pack('>I1I6I6I6I6I6', 1, top, last, total, 0, 0))
redis.call('PEXPIRE', meta, string.format('%d', 2 * tonumber(ARGV[6]) + GRACE))
redis.call('PEXPIRE', stream, string.format('%d', tonumber(ARGV[6]) + GRACE))
redis.call(ARGV[4], ARGV[5], '\1x')
return answer
