-- hello: a new incarnation of a worker id, and its predecessors that are fenced by it and may still hold jobs.
-- The same nonce again gets the same incarnation, so a lost reply does not make a second one.

local function predecessors(L, wid, inc)
  local found = {}
  for _, owner in ipairs(C('SMEMBERS', L .. ':ws')) do
    if string.sub(owner, 1, #wid + 1) == wid .. '.' and owner ~= wid .. '.' .. inc then
      found[#found + 1] = owner
    end
  end
  return found
end

local function hello(K, A)
  local R, L = reader(K, A)
  local wid, nonce = name_of(R, 'worker id'), matching(R, 'nonce', '^%x+$', 16)
  local info = text(R, 'info', 65536)
  done(R)
  local k = worker_key(L, wid)
  local f = C('HMGET', k, 'inc', 'sealed')
  local inc = f[1]
  if not (inc and f[2] == '0' and string.match(inc, '%.(%x+)$') == nonce) then
    inc = C('INCR', L .. ':inc') .. '.' .. nonce
    C('DEL', k)
    C('HSET', k, 'inc', inc, 'sealed', '0', 'hb', 0, 'seq', 0, 'tn', 0)
    C('SADD', L .. ':ws', wid .. '.' .. inc)
    count(L, 'hellos')
  end
  C('HSET', k, 'info', info, 'bt', now())
  return { inc, predecessors(L, wid, inc), C('HGET', k, 'seq') }
end

register('hello', hello, WRITES)
