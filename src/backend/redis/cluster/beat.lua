-- Says that a node is up.
--
-- KEYS  session
-- ARGV  milliseconds that it lasts
-- Answers its revision if Redis knows all that was told, else nil; and the time, Unix microseconds.
local time = redis.call('TIME')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
-- What has changed is written by itself, also to a Redis that has forgotten the rest: the whole has a header.
local known = redis.call('HMGET', KEYS[1], 'v', 'r')
return {known[1] and known[2], string.format('%d', time[1] * 1000000 + time[2])}
