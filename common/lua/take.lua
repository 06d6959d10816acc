-- take: FENCED, or up to n jobs: delete, owner and epoch at once; the expired are dropped on the way.
-- The same request number repeats its answer. Suspects wait in their own stream, so they never block the others.

local LOOK_LIMIT = 256
local BATCH_SHARE = 10 -- every tenth job is taken from the batch class first, so that it never starves

local function suspects_held(L, owner)
  local held = 0
  for _, id in ipairs(C('SMEMBERS', own_key(L, owner))) do
    if tonumber(C('HGET', job_key(L, id), 'att') or 0) > 0 then
      held = held + 1
    end
  end
  return held
end

local function begin(L, id, owner, cost)
  local k = job_key(L, id)
  C('HINCRBY', k, 'ep', 1)
  local taken = C('HINCRBY', k, 'tak', 1)
  C('HSET', k, 'st', 'in_progress', 'own', owner, 'le', log_end(L, id))
  if C('HGET', k, 'sa') == '' then
    C('HSET', k, 'sa', now())
  end
  count_unqueued(L, id, cost)
  count(L, 'taken_tokens', cost)
  C('SADD', own_key(L, owner), id)
  tell(L, id, 'S', 'in_progress', taken)
end

-- An entry that this worker is too old for stays; one whose job is no longer queued goes.
local function pull(L, class, want, owner, protocol, out)
  local q, from, looked, left = L .. ':q:' .. class, '-', 0, 0
  while want > 0 and looked < LOOK_LIMIT do
    if class ~= 's' and class ~= 0 then
      feed(L, class, left)
    end
    local entries = C('XRANGE', q, from, '+', 'COUNT', want)
    if #entries == 0 then
      return
    end
    for _, entry in ipairs(entries) do
      local id = entry[2][2]
      local f = C('HMGET', job_key(L, id), 'st', 'dl', 'cost', 'pv')
      looked = looked + 1
      if f[1] == 'queued' and tonumber(f[4]) > protocol then
        from, left = '(' .. entry[1], left + 1
      else
        C('XDEL', q, entry[1])
        if f[1] == 'queued' and tonumber(f[2]) <= now() then
          terminal(L, id, 'expired')
        elseif f[1] == 'queued' then
          begin(L, id, owner, f[3])
          out[#out + 1] = id
          want = want - 1
        end
      end
    end
  end
end

local function again(L, owner, answer)
  local rows = {}
  for _, pair in ipairs(cmsgpack.unpack(answer)) do
    local f = C('HMGET', job_key(L, pair[1]), 'own', 'ep')
    if f[1] == owner and f[2] == pair[2] then
      rows[#rows + 1] = taken_row(L, pair[1])
    end
  end
  return rows
end

local function take(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local max, request = number(R, 'jobs', 0, 4096), number(R, 'request', 0, LARGEST)
  local max_suspects, protocol = number(R, 'suspects', 0, 4096), number(R, 'protocol', 1, 1000)
  done(R)
  local refused = fence(L, wid, inc)
  if refused then
    return refused
  end
  local k, owner = worker_key(L, wid), wid .. '.' .. inc
  local f = C('HMGET', k, 'rq', 'ra', 'dr', 'tn')
  if f[1] == tostring(request) then
    return again(L, owner, f[2])
  end
  local ids = {}
  if f[3] ~= '1' then
    if (tonumber(f[4]) % BATCH_SHARE) + max >= BATCH_SHARE then
      pull(L, 2, math.min(max, 1), owner, protocol, ids)
    end
    pull(L, 0, max - #ids, owner, protocol, ids)
    if max_suspects > 0 and C('XLEN', L .. ':q:s') > 0 then
      local room = max_suspects - suspects_held(L, owner)
      pull(L, 's', math.min(room, max - #ids), owner, protocol, ids)
    end
    pull(L, 1, max - #ids, owner, protocol, ids)
    pull(L, 2, max - #ids, owner, protocol, ids)
  end
  local rows, answer = {}, {}
  for i, id in ipairs(ids) do
    rows[i] = taken_row(L, id)
    answer[i] = { id, rows[i][2] }
  end
  C('HSET', k, 'rq', request, 'ra', cmsgpack.pack(answer), 'tn', tonumber(f[4]) + #ids)
  return rows
end

register('take', take, WRITES)
