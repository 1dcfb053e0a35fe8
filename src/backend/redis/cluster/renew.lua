-- Renews a claim, also one that Redis has lost, unless another node has claimed the name since.
--
-- KEYS  holders · exclusive holder
-- ARGV  node · its previous id, or the same · fencing token, 0 for shared names · milliseconds after which an
--       exclusive claim expires · milliseconds that the fencing token is remembered
-- Returns 1, or 0 if another node holds the name, or held it since.
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
  if before ~= me then redis.call('HDEL', holders, before) end
  redis.call('HSET', holders, 'f', string.format('%d', fence), me, '\1x')
  redis.call('SET', owner, '\1' .. me, 'PX', ARGV[4])
end
redis.call('PEXPIRE', holders, ARGV[5])
return 1
