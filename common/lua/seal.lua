-- seal: the incarnation is dead for ever, if its heartbeat is still the one that was seen (-1 asks for no comparison).
-- bury: the keys of a dead incarnation go once it owns nothing.

local function seal(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local seen = number(R, 'heartbeat', -1)
  done(R)
  local k = worker_key(L, wid)
  local f = C('HMGET', k, 'inc', 'sealed', 'hb', 'bt')
  if f[1] ~= inc or f[2] ~= '0' then
    return 1
  end
  if seen ~= -1 and seen ~= tonumber(f[3]) then
    return 0
  end
  C('HSET', k, 'sealed', '1')
  C('SET', L .. ':up', f[4], 'PX', 2 * SERVED_MS)
  audit(L, 'sealed', '', wid .. '.' .. inc)
  count(L, 'sealed')
  return 1
end

local function bury(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  done(R)
  local owner, k = wid .. '.' .. inc, worker_key(L, wid)
  if is_alive(L, wid, inc) or C('SCARD', own_key(L, owner)) > 0 then
    return 0
  end
  C('DEL', L .. ':wal:' .. owner, L .. ':ctl:' .. owner)
  C('SREM', L .. ':ws', owner)
  if C('HGET', k, 'inc') == inc then
    C('HDEL', k, 'info', 'stats', 'ra', 'lo')
    C('EXPIRE', k, SEALED_TTL)
  end
  return 1
end

register('seal', seal, WRITES)
register('bury', bury, WRITES)
