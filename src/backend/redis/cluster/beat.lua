-- Renews the session of a node.
--
-- KEYS  session
-- ARGV  milliseconds after which it expires
-- Returns the revision of the session, or nil if it is not complete; the time, Unix microseconds; and 1 if Redis takes
-- writes.
local time = redis.call('TIME')
local renewed = type(redis.pcall('PEXPIRE', KEYS[1], ARGV[1])) == 'number'
-- Changes are written even to a Redis that has lost the session: only a whole session has the header 'v'.
local known = redis.call('HMGET', KEYS[1], 'v', 'r')
return {known[1] and known[2], string.format('%d', time[1] * 1000000 + time[2]), renewed and 1 or 0}
