-- Claims a name, or returns its holders.
--
-- KEYS  holders · exclusive holder
-- ARGV  node · 1 for exclusive · milliseconds after which an exclusive claim expires · milliseconds that the fencing
--       token is remembered · nodes that announced the name, in case Redis has lost it
-- Returns 1 and the fencing token (0 for shared names), or 0 and the nodes that hold the name.
local holders, owner, me, exclusive = KEYS[1], KEYS[2], ARGV[1], ARGV[2] == '1'
-- The clock of Redis was set back: the key of a dead node would expire only when the clock is there again.
if redis.call('PTTL', owner) > tonumber(ARGV[3]) then redis.call('PEXPIRE', owner, ARGV[3]) end
local has = redis.call('GET', owner)
local holder = has and string.sub(has, 2)
local others = {}
if holder and holder ~= me then others[1] = holder end
-- An exclusive holder is recorded here too: its key is lost before its time if the clock is set forward.
local recorded = redis.call('HGETALL', holders)
for n = 1, #recorded, 2 do
  local node = recorded[n]
  if node ~= 'f' and node ~= me and node ~= holder and (exclusive or recorded[n + 1] == '\1x') then
    others[#others + 1] = node
  end
end
if exclusive and #recorded == 0 then
  for n = 5, #ARGV do others[#others + 1] = ARGV[n] end
end
if #others > 0 then return {0, unpack(others, 1, math.min(#others, 1000))} end
local fence = 0
if exclusive then
  local time = redis.call('TIME')
  fence = math.max(time[1] * 1000000 + time[2], tonumber(redis.call('HGET', holders, 'f') or 0) + 1)
  redis.call('HSET', holders, 'f', string.format('%d', fence), me, '\1x')
  redis.call('SET', owner, '\1' .. me, 'PX', ARGV[3])
else
  redis.call('DEL', owner)
  redis.call('HSET', holders, me, '\1')
end
redis.call('PEXPIRE', holders, ARGV[4])
return {1, string.format('%d', fence)}
