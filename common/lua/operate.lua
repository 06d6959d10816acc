-- What operators and workers say about a lane: announce and retire its model, drain a worker, redrive and erase jobs.

local ERASED_TTL = 3600 -- seconds in which an erased job cannot come back by a late resubmission or adoption

local function announce(K, A)
  local R, L = reader(K, A)
  local card, fingerprint = text(R, 'card', LONGEST_BODY), matching(R, 'fingerprint', '^%x+$', 64)
  done(R)
  local known = C('GET', L .. ':fp')
  if known and known ~= fingerprint then
    for _, owner in ipairs(C('SMEMBERS', L .. ':ws')) do
      if is_alive(L, string.match(owner, '^([^.]+)%.(.+)$')) then
        return redis.error_reply('OTHERMODEL live workers serve another model in this lane')
      end
    end
    C('DEL', L .. ':ad')
  end
  C('SET', L .. ':model', card, 'EX', CARD_TTL)
  C('SET', L .. ':fp', fingerprint, 'EX', CARD_TTL)
  return 1
end

local function retire(K, A)
  local R, L = reader(K, A)
  done(R)
  return C('DEL', L .. ':model', L .. ':fp', L .. ':ad') > 0 and 1 or 0
end

local function drain(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  done(R)
  if not is_alive(L, wid, inc) then
    return 0
  end
  C('HSET', worker_key(L, wid), 'dr', '1')
  control(L, wid .. '.' .. inc, 'drain', '', '')
  return 1
end

-- A failed job starts again where its log ends, with a new time-out and no grace: an operator wants it, not a client.
local function redrive(K, A)
  local R, L = reader(K, A)
  local id, token = job_id(R), matching(R, 'token', '^%x+$', 32)
  done(R)
  local k = job_key(L, id)
  local f = C('HMGET', k, 'st', 'tn', 'pr', 'cost', 'to', 'ik', 'ct', 'tk')
  if f[8] == token then
    return 1
  end
  if f[1] ~= 'failed' or C('EXISTS', body_key(L, id)) == 0 then
    return 0
  end
  local deadline = now() + tonumber(f[5])
  for _, key in ipairs({ k, body_key(L, id), log_key(L, id) }) do
    C('PERSIST', key)
  end
  if f[6] ~= '' then
    C('PERSIST', f[6])
  end
  C('ZREM', L .. ':dlq', id)
  C('ZREM', L .. ':xp', id .. ':' .. f[2])
  C('SADD', L .. ':tj:' .. f[2], id)
  C('ZADD', L .. ':ti:' .. f[2], f[7], id)
  C('ZADD', L .. ':dl', deadline, id)
  C(
    'HSET', k, 'st', 'queued', 'att', 0, 'cx', '', 'og', -1, 'dl', deadline, 'fin', '', 'ex', '',
    'fr', '', 'ec', '', 'em', '', 'tk', token
  )
  count_queued(L, id, f[4])
  audit(L, 'redriven', id, '')
  count(L, 'redriven')
  enqueue(L, id, f[3], f[2])
  return 1
end

-- An empty tenant means any: for operators. The token tells a repeated call from a second one.
local function erase(K, A)
  local R, L = reader(K, A)
  local id, tenant, token = job_id(R), optional_name(R, 'tenant'), matching(R, 'token', '^%x+$', 32)
  done(R)
  if C('GET', L .. ':x:' .. id) == token then
    return 1
  end
  local k = job_key(L, id)
  local f = C('HMGET', k, 'st', 'tn', 'own', 'ik')
  if not f[1] or (tenant ~= '' and tenant ~= f[2]) then
    return 0
  end
  if f[1] == 'in_progress' then
    control(L, f[3], 'cancel', id, '')
  end
  if f[1] == 'queued' or f[1] == 'in_progress' then
    terminal(L, id, 'cancelled')
  end
  C('DEL', k, body_key(L, id), log_key(L, id), L .. ':sub:' .. id)
  if f[4] ~= '' then
    C('DEL', f[4])
  end
  C('ZREM', L .. ':ti:' .. f[2], id)
  C('ZREM', L .. ':xp', id .. ':' .. f[2])
  C('ZREM', L .. ':dlq', id)
  C('SET', L .. ':x:' .. id, token, 'EX', ERASED_TTL)
  count(L, 'erased')
  return 1
end

register('announce', announce, WRITES)
register('retire', retire, WRITES)
register('drain', drain, WRITES)
register('redrive', redrive, WRITES)
register('erase', erase, WRITES)
