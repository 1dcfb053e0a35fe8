-- A log nobody wrote to, nor reads, is idle so long after its last event is too old; what readers of it had is known so
-- much longer; what an event costs beside its stored body; terms remembered beside the current one.
local LINGER, GRACE, COST, TERMS = 60000, 86400000, 85, 7

-- Which server this is. A node may know it a moment late; and who was a replica meanwhile is another than before.
local function generation(said)
  local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
  return string.sub(said, 1, 16) .. string.sub(replid, 1, 16)
end
