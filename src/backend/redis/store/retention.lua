-- Stores the retention rules of a node, and returns those of the others.
--
-- KEYS  rules of all nodes
-- ARGV  node · its rules · milliseconds that they count
-- Returns the rules of all others.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Where Redis rejects writes, the others are read all the same.
redis.pcall('HSET', KEYS[1], ARGV[1], string.format('1 %d ', now + ARGV[3]) .. ARGV[2])
redis.pcall('PEXPIRE', KEYS[1], ARGV[3])
local all, others = redis.call('HGETALL', KEYS[1]), {}
for n = 1, #all, 2 do
  local version, till, rules = string.match(all[n + 1], '^(%d+) (%d+) (.*)$')
  if tonumber(till) < now then
    redis.pcall('HDEL', KEYS[1], all[n])
  elseif version == '1' and all[n] ~= ARGV[1] then
    others[#others + 1] = rules
  end
end
return others
