-- Releases a name. A newer claim, also of the same node, stays.
--
-- KEYS  holders · exclusive holder
-- ARGV  node · fencing token, 0 for shared names
local holders, owner, me = KEYS[1], KEYS[2], ARGV[1]
if ARGV[2] == '0' then
  redis.call('HDEL', holders, me)
elseif redis.call('HGET', holders, 'f') == ARGV[2] then
  if redis.call('GET', owner) == '\1' .. me then redis.call('DEL', owner) end
  if redis.call('HGET', holders, me) == '\1x' then redis.call('HDEL', holders, me) end
end
return 1
