-- A log nobody wrote to, nor reads, is idle so long after its last event is too old; what readers of it had is known so
-- much longer; what an event costs beside its stored body; terms remembered beside the current one.
local LINGER, GRACE, COST, TERMS = 60000, 86400000, 85, 7
