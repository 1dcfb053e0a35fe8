-- Goes on holding a name, also one that Redis has forgotten if nobody had it since.
--
-- KEYS  holders · exclusive holder
-- ARGV  node · who the node was before, or itself · fence, 0 of shared names · milliseconds that an exclusive name is held
--       · milliseconds that the fence is remembered
-- Answers 1, or 0 if somebody else has it, or had it.
local holders, owner, me, before, fence = KEYS[1], KEYS[2], ARGV[1], ARGV[2], tonumber(ARGV[3])
local has = redis.call('GET', owner)
local mine = has == '\1' .. me or has == '\1' .. before
if has and not mine then return 0 end
if fence == 0 then
  if has then return 0 end
  redis.call('HDEL', holders, before)
  redis.call('HSET', holders, me, '\1')
else
  if tonumber(redis.call('HGET', holders, 'f') or 0) > fence then return 0 end
  for _, node in ipairs(redis.call('HKEYS', holders)) do
    if node ~= 'f' and node ~= me and node ~= before then return 0 end
  end
  redis.call('HSET', holders, 'f', string.format('%d', fence))
  redis.call('SET', owner, '\1' .. me, 'PX', ARGV[4])
end
redis.call('PEXPIRE', holders, ARGV[5])
return 1
