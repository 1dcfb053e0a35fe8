-- Adds the name of a new consumer, if there is room.
--
-- KEYS  names of all consumers
-- ARGV  name · maximum of names
-- Returns 1, or 0 if there is no room.
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 1 end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], 0, ARGV[1])
return 1
