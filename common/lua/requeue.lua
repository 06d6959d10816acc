-- requeue: a job of a dead incarnation, with the tail that was replayed from its write-ahead stream. 1, or 0 if it is no
-- longer that incarnation's. release: the living owner gives it back itself.

local function tail(R)
  local start = number(R, 'start', 0, LARGEST)
  return start, number(R, 'end', start, LARGEST), text(R, 'payload', LONGEST_BODY)
end

local function requeue(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local id = job_id(R)
  local start, stop_at, payload = tail(R)
  local max_attempts = number(R, 'attempts', 1, 1e6)
  done(R)
  if is_alive(L, wid, inc) then
    return redis.error_reply('NOTSEALED ' .. wid .. '.' .. inc)
  end
  local owner = wid .. '.' .. inc
  local f = C('HMGET', job_key(L, id), 'st', 'own')
  if f[1] ~= 'in_progress' or f[2] ~= owner then
    C('SREM', own_key(L, owner), id)
    return 0
  end
  put_back(L, id, start, stop_at, payload, true, max_attempts)
  return 1
end

local function release(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local id, epoch = job_id(R), number(R, 'epoch', 0, LARGEST)
  local start, stop_at, payload = tail(R)
  local charge, max_attempts = number(R, 'count', 0, 1), number(R, 'attempts', 1, 1e6)
  done(R)
  local refused = fence(L, wid, inc)
  if refused then
    return refused
  end
  local f = C('HMGET', job_key(L, id), 'st', 'own', 'ep')
  if f[1] ~= 'in_progress' or f[2] ~= wid .. '.' .. inc or tonumber(f[3]) ~= epoch then
    return 0
  end
  put_back(L, id, start, stop_at, payload, charge == 1, max_attempts)
  return 1
end

register('requeue', requeue, WRITES)
register('release', release, WRITES)
