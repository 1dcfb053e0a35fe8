-- Claims a name, or returns its holders.
--
-- KEYS  holders · exclusive holder
-- ARGV  node · 1 for exclusive · milliseconds after which an exclusive claim expires · milliseconds that the fencing
--       token is remembered
-- Returns 1 and the fencing token (0 for shared names), or 0 and the nodes that hold the name.
local holders, owner, me, exclusive = KEYS[1], KEYS[2], ARGV[1], ARGV[2] == '1'
local has = redis.call('GET', owner)
local others = {}
if has and has ~= '\1' .. me then others[1] = string.sub(has, 2) end
if exclusive then
  for _, node in ipairs(redis.call('HKEYS', holders)) do
    if node ~= 'f' and node ~= me then others[#others + 1] = node end
  end
end
if #others > 0 then return {0, unpack(others, 1, math.min(#others, 1000))} end
local fence = 0
if exclusive then
  local time = redis.call('TIME')
  fence = math.max(time[1] * 1000000 + time[2], tonumber(redis.call('HGET', holders, 'f') or 0) + 1)
  redis.call('HSET', holders, 'f', string.format('%d', fence))
  redis.call('HDEL', holders, me)
  redis.call('SET', owner, '\1' .. me, 'PX', ARGV[3])
else
  redis.call('DEL', owner)
  redis.call('HSET', holders, me, '\1')
end
redis.call('PEXPIRE', holders, ARGV[4])
return {1, string.format('%d', fence)}
