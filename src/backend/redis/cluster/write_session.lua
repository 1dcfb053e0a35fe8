-- Replaces a session in one step: a reader finds the old one or the new one.
--
-- KEYS  session
-- ARGV  milliseconds after which it expires · fields and values
redis.call('DEL', KEYS[1])
for from = 2, #ARGV, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, from, math.min(from + 999, #ARGV)))
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
