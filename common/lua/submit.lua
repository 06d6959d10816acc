-- submit: OK / DUP / CONFLICT / BUSY / QUOTA / NOWORKER, or the error FULL.
-- One id or one idempotency key never makes two jobs. The only function that is refused when memory is short.

local function is_full()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then
    return false -- a server that hides INFO still refuses by itself at its limit
  end
  local used, limit = tonumber(string.match(info, 'used_memory:(%d+)')), tonumber(string.match(info, 'maxmemory:(%d+)'))
  return used and limit and limit > 0 and used * FULL_DENOMINATOR > limit * FULL_NUMERATOR
end

local function is_served(L, t)
  local up = tonumber(C('GET', L .. ':up') or 0)
  if t - up < SERVED_CACHE_MS then
    return true
  end
  for _, owner in ipairs(C('SMEMBERS', L .. ':ws')) do
    local wid, inc = string.match(owner, '^([^.]+)%.(.+)$')
    local f = C('HMGET', worker_key(L, wid), 'inc', 'sealed', 'bt')
    if not refusal(inc, f[1], f[2]) then
      up = math.max(up, tonumber(f[3]))
    end
  end
  if up > 0 then
    C('SET', L .. ':up', up, 'PX', 2 * SERVED_MS)
  end
  return t - up < SERVED_MS
end

-- A job that is there with the caller's own token was made by this very call, whose reply was lost.
local function known(L, a)
  if a.idem ~= '' then
    local value = C('GET', a.idem)
    if value then
      local hash, id = string.match(value, '^(%S+) (%S+)$')
      local f = C('HMGET', job_key(L, id), 'st', 'tk')
      if f[1] and hash ~= a.hash then
        return { 'CONFLICT', id, f[1] }
      elseif f[1] then
        return { f[2] == a.token and 'OK' or 'DUP', id, f[1] }
      end
    end
  end
  local f = C('HMGET', job_key(L, a.id), 'st', 'vw', 'tk')
  if f[1] then
    if f[2] == '' then
      C('HSET', job_key(L, a.id), 'vw', a.view)
    end
    return { f[3] == a.token and 'OK' or 'DUP', a.id, f[1] }
  end
  return C('EXISTS', L .. ':x:' .. a.id) == 1 and { 'DUP', a.id, 'cancelled' }
end

local function refused(L, a, t)
  if a.needs_worker == 1 and a.grace >= 0 and not is_served(L, t) then
    return { 'NOWORKER' }
  end
  local queued = tonumber(C('GET', L .. ':qtok') or 0)
  if queued > 0 and queued + a.cost > a.max_queued then
    local rate = tonumber(C('HGET', L .. ':rate', 'per_s') or 0)
    local excess = queued + a.cost - a.max_queued
    return { 'BUSY', rate > 0 and math.ceil(excess * 1000 / rate) or 1000 }
  end
  if C('SCARD', L .. ':tj:' .. a.tenant) >= a.max_jobs then
    return { 'QUOTA' }
  end
end

local function arguments(K, A)
  local R, L = reader(K, A)
  local a = {
    id = job_id(R),
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
    gateway = optional_name(R, 'gateway'),
    max_queued = number(R, 'token limit', 0, LARGEST),
    max_jobs = number(R, 'job limit', 0, LARGEST),
    protocol = number(R, 'protocol', 1, 1000),
    view = text(R, 'view', LONGEST_BODY),
    body = text(R, 'body', LONGEST_BODY),
    token = matching(R, 'token', '^%x+$', 32),
    needs_worker = number(R, 'needs worker', 0, 1),
  }
  done(R)
  if a.idem ~= '' then
    a.idem = L .. ':idem:' .. a.tenant .. ':' .. a.idem
  end
  return L, a
end

local function submit(K, A)
  local L, a = arguments(K, A)
  local t = now()
  local answer = known(L, a) or refused(L, a, t)
  if answer then
    return answer
  end
  if is_full() then
    return redis.error_reply('FULL more than 80 % of the memory limit is used')
  end
  C(
    'HSET', job_key(L, a.id), 'v', LAYOUT, 'st', 'queued', 'tn', a.tenant, 'pr', a.class, 'dia', a.dialect, 'ep', 0,
    'tak', 0, 'att', 0, 'own', '', 'cx', '', 'cost', a.cost, 'in', a.prompt, 'ct', t, 'sa', '', 'fin', '',
    'to', a.timeout, 'dl', t + a.timeout, 'ttl', a.ttl, 'og', a.grace, 'ex', '', 'fr', '', 'ec', '', 'em', '',
    'ik', a.idem, 'pv', a.protocol, 'le', 0, 'tk', a.token, 'vw', a.view
  )
  C('SET', body_key(L, a.id), a.body)
  if a.idem ~= '' then
    C('SET', a.idem, a.hash .. ' ' .. a.id)
  end
  C('SADD', L .. ':tj:' .. a.tenant, a.id)
  C('ZADD', L .. ':ti:' .. a.tenant, t, a.id)
  C('ZADD', L .. ':dl', t + a.timeout, a.id)
  if a.gateway ~= '' then
    follow(L, a.id, a.gateway)
  elseif a.grace >= 0 then
    C('ZADD', L .. ':or', t + a.grace, a.id)
  end
  count_queued(L, a.id, a.cost)
  count(L, 'submitted')
  enqueue(L, a.id, a.class, a.tenant)
  return { 'OK', a.id, 'queued' }
end

register('submit', submit)
