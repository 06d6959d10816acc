-- adopt: an incarnation re-asserts a job after the server lost its last writes: 1, or 0 when somebody else knows better.
-- It succeeds if the record is missing, or queued with no newer epoch and no longer log, or the caller's already.

local function create(L, a, t)
  C(
    'HSET', job_key(L, a.id), 'v', LAYOUT, 'tn', a.tenant, 'pr', a.class, 'dia', a.dialect, 'tak', 1, 'att', 0, 'cx', '',
    'cost', a.cost, 'qc', '0', 'in', a.prompt, 'ct', t, 'sa', t, 'fin', '', 'to', a.timeout, 'dl', t + a.timeout,
    'ttl', a.ttl, 'og', a.grace, 'ex', '', 'fr', '', 'ec', '', 'em', '', 'ik', a.idem, 'pv', a.protocol, 'vw', a.view
  )
  if a.idem ~= '' then
    C('SET', a.idem, a.hash .. ' ' .. a.id)
  end
  C('SADD', L .. ':tj:' .. a.tenant, a.id)
  C('ZADD', L .. ':ti:' .. a.tenant, t, a.id)
  C('ZADD', L .. ':dl', t + a.timeout, a.id)
  if a.grace >= 0 then
    C('ZADD', L .. ':or', t + math.max(a.grace, 5000), a.id)
  end
end

local function arguments(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local a = {
    wid = wid,
    inc = inc,
    id = job_id(R),
    epoch = number(R, 'epoch', 1, LARGEST),
    start = number(R, 'start', 0, LARGEST),
    stop_at = number(R, 'end', 0, LARGEST),
    payload = text(R, 'payload', LONGEST_BODY),
    tenant = name_of(R, 'tenant'),
    class = number(R, 'class', 1, 2),
    dialect = name_of(R, 'dialect'),
    cost = number(R, 'cost', 1, 1e9),
    timeout = number(R, 'time-out', 1, 1e11),
    ttl = number(R, 'result ttl', 1, 1e8),
    grace = number(R, 'orphan grace', -1, 1e9),
    prompt = number(R, 'prompt tokens', 0, 1e9),
    idem = matching(R, 'idempotency key', '^%x*$', 64),
    hash = matching(R, 'body hash', '^%S+$', 128),
    protocol = number(R, 'protocol', 1, 1000),
    view = text(R, 'view', LONGEST_BODY),
    body = text(R, 'body', LONGEST_BODY),
  }
  done(R)
  if a.idem ~= '' then
    a.idem = L .. ':idem:' .. a.tenant .. ':' .. a.idem
  end
  return L, a
end

local function adopt(K, A)
  local L, a = arguments(K, A)
  local refused = fence(L, a.wid, a.inc)
  if refused then
    return refused
  end
  local k, owner = job_key(L, a.id), a.wid .. '.' .. a.inc
  local f = C('HMGET', k, 'st', 'own', 'ep', 'qc', 'cost')
  local last = log_end(L, a.id)
  local is_queued = f[1] == 'queued' and tonumber(f[3]) <= a.epoch and last <= a.stop_at
  local is_mine = f[1] == 'in_progress' and f[2] == owner
  if (f[1] and not is_queued and not is_mine) or C('EXISTS', L .. ':x:' .. a.id) == 1 then
    return 0
  end
  if a.start > last then
    return redis.error_reply('GAP ' .. a.id .. ' ' .. last)
  end
  if not f[1] then
    create(L, a, now())
  elseif f[4] == '1' then
    count_unqueued(L, a.id, f[5])
    C('HINCRBY', k, 'tak', 1)
  end
  if a.payload ~= '' and a.stop_at > last then
    append(L, a.id, a.stop_at, a.payload)
  end
  C('SETNX', body_key(L, a.id), a.body)
  C('HSET', k, 'st', 'in_progress', 'own', owner, 'ep', a.epoch, 'le', last)
  if C('HGET', k, 'sa') == '' then
    C('HSET', k, 'sa', now())
  end
  C('SADD', own_key(L, owner), a.id)
  audit(L, 'adopted', a.id, owner)
  count(L, 'adopted')
  return 1
end

register('adopt', adopt, WRITES)
