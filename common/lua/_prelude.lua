-- What all functions share: reading of arguments, key names, and the few transitions that several functions make.
-- Every function reads and checks all of its arguments before its first write: a Lua error does not undo writes.

local function C(...) -- redis.call does not exist yet while the library is being loaded
  return redis.call(...)
end

local QUEUE_WIDTH = 8 -- entries a dispatch stream is fed up to; fairness is decided before it
local FEED_LIMIT = 64 -- backlog entries looked at in one call, so that one call never holds the server for long
local FAILED_TTL = 7 * 86400 -- seconds that a failed job can be redriven
local CARD_TTL = 3600 -- seconds that a model's card outlives its last worker
local SEALED_TTL = 3600 -- seconds that a sealed worker id remembers it, so that a late caller hears FENCED
local BELL_TTL, BELL_LENGTH = 60, 8
local AUDIT_LENGTH = 10000
local FULL_NUMERATOR, FULL_DENOMINATOR = 8, 10 -- of maxmemory: more than this and submissions are refused
local SERVED_MS, SERVED_CACHE_MS = 30000, 10000
local LONGEST_BODY = 64 * 1024 * 1024
local LARGEST = 1e13
local LAYOUT = 1 -- of the job record

local function now()
  local t = C('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- arguments

local function bad(what)
  error(redis.error_reply('BADARG ' .. what))
end

local function reader(K, A)
  if #K ~= 1 or not string.match(K[1], '^{[a-z2-7]+}$') then
    bad('one key, the tag of the lane')
  end
  return { A = A, i = 0 }, K[1]
end

local function text(R, name, longest)
  R.i = R.i + 1
  local value = R.A[R.i]
  if value == nil then
    bad(name .. ' is missing')
  end
  if #value > longest then
    bad(name .. ' is too long')
  end
  return value
end

local function number(R, name, low, high)
  local value = text(R, name, 20)
  local parsed = string.match(value, '^%-?%d+$') and tonumber(value)
  if not parsed or parsed < low or parsed > (high or LARGEST) then
    bad(name .. ' is no number in its range')
  end
  return parsed
end

local function matching(R, name, pattern, longest)
  local value = text(R, name, longest)
  if not string.match(value, pattern) then
    bad(name .. ' is malformed')
  end
  return value
end

local function job_id(R)
  local id = matching(R, 'job id', '^[a-z2-7]+%.?%d*$', 40)
  if #id < 28 then
    bad('job id is too short')
  end
  return id
end

local function name_of(R, name)
  return matching(R, name, '^[%w_-]+$', 64)
end

local function optional_name(R, name)
  return matching(R, name, '^[%w_-]*$', 64)
end

local function incarnation(R)
  return name_of(R, 'worker id'), matching(R, 'incarnation', '^%d+%.%x+$', 40)
end

local function done(R)
  if R.i ~= #R.A then
    bad('too many arguments')
  end
end

-- keys; common/keys.py has the same names for processes

local function job_key(L, id)
  return L .. ':j:' .. id
end

local function log_key(L, id)
  return L .. ':o:' .. id
end

local function body_key(L, id)
  return L .. ':r:' .. id
end

local function worker_key(L, wid)
  return L .. ':w:' .. wid
end

local function own_key(L, owner)
  return L .. ':own:' .. owner
end

-- reading

local function log_end(L, id)
  local last = C('XREVRANGE', log_key(L, id), '+', '-', 'COUNT', 1)
  return last[1] and tonumber(string.match(last[1][1], '^%d+')) or 0
end

local function job_row(L, id)
  local k = job_key(L, id)
  local row = C(
    'HMGET', k, 'st', 'tn', 'pr', 'dia', 'ep', 'tak', 'own', 'cx', 'in',
    'ct', 'sa', 'fin', 'dl', 'ex', 'fr', 'ec', 'em', 'vw'
  )
  if not row[1] then
    return false
  end
  row[19] = log_end(L, id)
  return row
end

local function taken_row(L, id)
  local f = C('HMGET', job_key(L, id), 'ep', 'att', 'cx', 'dl', 'vw')
  local body = C('GET', body_key(L, id))
  return { id, f[1], f[2], log_end(L, id), f[3], f[4], body, f[5], C('SMEMBERS', L .. ':sub:' .. id) }
end

-- An incarnation is alive while it is its worker id's newest one and nobody has sealed it. A number above the newest
-- that is known here was given out by writes that the server has lost since.
local function refusal(inc, newest, sealed)
  if newest == inc then
    return sealed ~= '0' and 'FENCED sealed'
  end
  if not newest or tonumber(string.match(newest, '^%d+')) < tonumber(string.match(inc, '^%d+')) then
    return 'UNKNOWN incarnation'
  end
  return 'FENCED superseded'
end

local function fence(L, wid, inc)
  local f = C('HMGET', worker_key(L, wid), 'inc', 'sealed')
  local why = refusal(inc, f[1], f[2])
  return why and redis.error_reply(why)
end

local function is_alive(L, wid, inc)
  return not fence(L, wid, inc)
end

local function each_incarnation(L, visit)
  for _, owner in ipairs(C('SMEMBERS', L .. ':ws')) do
    local wid, inc = string.match(owner, '^([^.]+)%.(.+)$')
    local f = C('HMGET', worker_key(L, wid), 'inc', 'sealed', 'hb', 'dr', 'info', 'stats')
    visit(wid, inc, not refusal(inc, f[1], f[2]), f, C('SCARD', own_key(L, owner)))
  end
end

-- telling

local function tell(L, id, verb, state, n)
  local message = cmsgpack.pack({ 1, verb, id, state, n })
  for _, gateway in ipairs(C('SMEMBERS', L .. ':sub:' .. id)) do
    C('PUBLISH', L .. ':gw:' .. gateway, message)
  end
end

local function control(L, owner, verb, id, gateway)
  C('XADD', L .. ':ctl:' .. owner, '*', 'v', verb, 'j', id, 'g', gateway)
end

local function ring(L)
  local k = L .. ':bell'
  C('LPUSH', k, '1')
  C('LTRIM', k, 0, BELL_LENGTH - 1)
  C('EXPIRE', k, BELL_TTL)
end

local function audit(L, event, id, detail)
  C('XADD', L .. ':ev', 'MAXLEN', '~', AUDIT_LENGTH, '*', 'e', event, 'j', id, 'd', detail)
end

local function count(L, what, n)
  C('HINCRBY', L .. ':m', what, n or 1)
end

-- queues

-- Start-time fair queueing: the tenant with the smallest virtual time goes first and pays its job's tokens. One whose
-- backlog ran empty keeps its place, and so its debt, until the others have caught up with it. `extra` entries more than
-- usual are fed, for a worker that must leave so many.
local function feed(L, class, extra)
  local q, vt, vf = L .. ':q:' .. class, L .. ':vt:' .. class, L .. ':vf:' .. class
  for _ = 1, FEED_LIMIT do
    if C('XLEN', q) >= QUEUE_WIDTH + (extra or 0) then
      return
    end
    local first = C('ZRANGE', vt, 0, 0, 'WITHSCORES')
    if #first == 0 then
      C('DEL', vf)
      return
    end
    local tenant, time = first[1], tonumber(first[2])
    local id = C('LPOP', L .. ':bk:' .. class .. ':' .. tenant)
    if not id then
      C('ZREM', vt, tenant)
    else
      local f = C('HMGET', job_key(L, id), 'st', 'cost')
      if f[1] == 'queued' then
        C('XADD', q, '*', 'j', id)
        C('ZADD', vt, time + tonumber(f[2]), tenant)
        C('SET', vf, time)
      end
    end
  end
end

local function enqueue(L, id, class, tenant)
  local vt = L .. ':vt:' .. class
  C('RPUSH', L .. ':bk:' .. class .. ':' .. tenant, id)
  if not C('ZSCORE', vt, tenant) then
    C('ZADD', vt, C('GET', L .. ':vf:' .. class) or 0, tenant)
  end
  feed(L, class)
  ring(L)
end

local function count_queued(L, id, cost)
  C('HSET', job_key(L, id), 'qc', '1')
  C('INCRBY', L .. ':qtok', cost)
end

local function count_unqueued(L, id, cost)
  C('HSET', job_key(L, id), 'qc', '0')
  if C('DECRBY', L .. ':qtok', cost) <= 0 then
    C('DEL', L .. ':qtok')
  end
end

-- transitions of a job

-- Failed jobs keep everything for as long as they can be redriven; all others drop the body at once.
local function terminal(L, id, state, reason, code, message)
  local k, t = job_key(L, id), now()
  local f = C('HMGET', k, 'tn', 'cost', 'qc', 'own', 'ttl', 'ik')
  local keep = tonumber(f[5])
  if f[3] == '1' then
    count_unqueued(L, id, f[2])
  end
  if f[4] ~= '' then
    C('SREM', own_key(L, f[4]), id)
  end
  if state == 'failed' then
    keep = math.max(keep, FAILED_TTL)
    C('ZADD', L .. ':dlq', t, id)
    C('EXPIRE', body_key(L, id), keep)
  else
    C('DEL', body_key(L, id))
  end
  C(
    'HSET', k, 'st', state, 'own', '', 'fin', t, 'ex', t + keep * 1000,
    'fr', reason or '', 'ec', code or '', 'em', message or ''
  )
  C('EXPIRE', k, keep)
  C('EXPIRE', log_key(L, id), keep)
  if f[6] ~= '' then
    C('EXPIRE', f[6], keep)
  end
  C('SREM', L .. ':tj:' .. f[1], id)
  C('ZREM', L .. ':dl', id)
  C('ZREM', L .. ':or', id)
  C('ZADD', L .. ':xp', t + keep * 1000, id .. ':' .. f[1])
  audit(L, state, id, code or '')
  count(L, state)
  tell(L, id, 'E', state, log_end(L, id))
  for _, gateway in ipairs(C('SMEMBERS', L .. ':sub:' .. id)) do
    C('SREM', L .. ':gj:' .. gateway, id)
  end
  C('DEL', L .. ':sub:' .. id)
end

-- A queued job ends at once; the worker of a running one is asked to, and whatever it answers becomes `reason`.
local function stop(L, id, reason)
  local k = job_key(L, id)
  local f = C('HMGET', k, 'st', 'own', 'cx')
  if f[1] == 'queued' then
    terminal(L, id, reason)
  elseif f[1] == 'in_progress' then
    if f[3] == '' then
      C('HSET', k, 'cx', reason)
      f[3] = reason
    end
    control(L, f[2], f[3] == 'expired' and 'expire' or 'cancel', id, '')
  end
end

local function append(L, id, stop_at, payload)
  C('XADD', log_key(L, id), stop_at .. '-0', 'd', payload)
end

-- A job leaves its worker alive: appends what was shown of it, then ends or queues it. With `charge` the attempt counts
-- unless the log grew in it: a stream that moves is never to blame for its workers' deaths.
local function put_back(L, id, start, stop_at, payload, charge, max_attempts)
  local k = job_key(L, id)
  local f = C('HMGET', k, 'own', 'cx', 'dl', 'cost', 'pr', 'att', 'le', 'tak')
  local last = log_end(L, id)
  if payload ~= '' and start <= last and stop_at > last then
    append(L, id, stop_at, payload)
    last = stop_at
  end
  C('SREM', own_key(L, f[1]), id)
  C('HSET', k, 'own', '')
  if f[2] ~= '' then
    return terminal(L, id, f[2])
  elseif tonumber(f[3]) <= now() then
    return terminal(L, id, 'expired')
  end
  local attempts = tonumber(f[6])
  if charge then
    attempts = last > tonumber(f[7]) and 0 or attempts + 1
  end
  C('HSET', k, 'att', attempts)
  if charge and attempts >= max_attempts then
    return terminal(L, id, 'failed', '', 'poison', attempts .. ' workers died while running this job')
  end
  C('HSET', k, 'st', 'queued')
  count_queued(L, id, f[4])
  local followed = C('SCARD', L .. ':sub:' .. id) > 0
  local class = attempts > 0 and 's' or followed and '0' or f[5]
  C('XADD', L .. ':q:' .. class, '*', 'j', id)
  audit(L, charge and 'requeued' or 'released', id, attempts)
  count(L, charge and 'requeued' or 'released')
  tell(L, id, 'S', 'queued', tonumber(f[8]))
  ring(L)
end

-- The last gateway to leave a job whose client waits starts the grace after which nobody wants it any more.
local function leave(L, id, gateway, shortest_grace)
  C('SREM', L .. ':gj:' .. gateway, id)
  if C('SREM', L .. ':sub:' .. id, gateway) == 0 then
    return
  end
  local f = C('HMGET', job_key(L, id), 'st', 'own', 'og')
  if f[1] == 'in_progress' then
    control(L, f[2], 'detach', id, gateway)
  end
  local grace = tonumber(f[3] or -1)
  if grace < 0 or C('SCARD', L .. ':sub:' .. id) > 0 then
    return
  end
  grace = math.max(grace, shortest_grace)
  if grace == 0 then
    stop(L, id, 'cancelled')
  else
    C('ZADD', L .. ':or', now() + grace, id)
  end
end

local function follow(L, id, gateway)
  C('SADD', L .. ':sub:' .. id, gateway)
  C('SADD', L .. ':gj:' .. gateway, id)
  C('HSETNX', L .. ':gws', gateway, 0)
  C('ZREM', L .. ':or', id)
end

local function register(name, callback, flags)
  redis.register_function({ function_name = 'fleet_' .. name .. '_' .. VERSION, callback = callback, flags = flags })
end

local WRITES = { 'allow-oom' } -- finishing work is never refused for lack of memory
local READS = { 'no-writes' }
