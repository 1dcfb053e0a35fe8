-- Reads the head of a session.
--
-- KEYS  session
-- ARGV  milliseconds after which it expires at the latest
-- Returns its header and its revision, or nil.

-- The clock of Redis was set back: the key of a dead node would expire only when the clock is there again.
if redis.call('PTTL', KEYS[1]) > tonumber(ARGV[1]) then redis.pcall('PEXPIRE', KEYS[1], ARGV[1]) end
return redis.call('HMGET', KEYS[1], 'v', 'r')
