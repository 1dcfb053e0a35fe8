-- Says that a node is up.
--
-- KEYS  session
-- ARGV  milliseconds that it lasts
-- Answers its revision if Redis knows all that was told, else nil; and the time, Unix microseconds.
local time = redis.call('TIME')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {redis.call('HGET', KEYS[1], 'r'), string.format('%d', time[1] * 1000000 + time[2])}
