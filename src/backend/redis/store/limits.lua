-- LINGER  milliseconds after which a log without writes and readers expires, once its last event is too old
-- GRACE   milliseconds for which the previous life of a log is remembered, for readers that come back
-- COST    bytes of an event beside its stored body
-- TERMS   terms that are remembered beside the current one
local LINGER, GRACE, COST, TERMS = 60000, 86400000, 85, 7

-- The generation of this server. That of the connection may be outdated: a server that was a replica meanwhile has
-- another.
local function generation(connected)
  local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
  return string.sub(connected, 1, 16) .. string.sub(replid, 1, 16)
end
