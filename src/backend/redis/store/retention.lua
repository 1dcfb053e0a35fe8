-- Says what a node keeps, and hears what the others do.
--
-- KEYS  what nodes keep
-- ARGV  which node · its rules · milliseconds that they count
-- Answers the rules of all others.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Where no memory is left the others can be heard all the same.
redis.pcall('HSET', KEYS[1], ARGV[1], string.format('1 %d ', now + ARGV[3]) .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local all, others = redis.call('HGETALL', KEYS[1]), {}
for n = 1, #all, 2 do
  local version, till, rules = string.match(all[n + 1], '^(%d+) (%d+) (.*)$')
  if tonumber(till) < now then
    redis.call('HDEL', KEYS[1], all[n])
  elseif version == '1' and all[n] ~= ARGV[1] then
    others[#others + 1] = rules
  end
end
return others
