-- Marks a log as read, so that it does not expire; and begins a new term if the server is another one than at the last
-- write: writes may be lost, and readers must learn of it even if nothing else is published.
--
-- KEYS  meta
-- ARGV  now (0: the clock of Redis) · generation of the connection · a new epoch · PUBLISH or SPUBLISH · its channel ·
--       retention: age
-- Returns the generation of the log, or 0 if there is no log.
local meta = KEYS[1]
local found = redis.call('HMGET', meta, 'h', 'e', 'g', 't', 'w')
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
if not found[1] then return 0 end
local version, top, last = struct.unpack('>I1I6I6', found[1])
if version ~= 1 then return 0 end
local age = tonumber(ARGV[6])
if now > math.max(last, tonumber(found[5] or 0)) + age + LINGER then return 0 end
redis.call('HSET', meta, 'w', string.format('%d', math.max(now, tonumber(found[5] or 0))))
redis.call('PEXPIRE', meta, string.format('%d', 2 * age + GRACE))
local server = ARGV[2]
if found[3] ~= server then server = generation(server) end
if found[3] ~= server then
  local terms = (found[4] or '') .. found[2] .. ':' .. string.format('%d', top) .. ','
  local _, count = string.gsub(terms, ',', '')
  for _ = 1, count - TERMS do terms = string.gsub(terms, '^[^,]*,', '') end
  redis.call('HSET', meta, 'e', ARGV[3], 'g', server, 't', terms)
  redis.call(ARGV[4], ARGV[5], '\1x')
end
return server
