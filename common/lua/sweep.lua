-- sweep: what only time brings: deadlines, abandoned jobs, gateways that are gone, indexes of expired records.
-- Does at most `limit` of each and tells how many of the most frequent kind it did, whether the lane has a card, how many
-- unfinished jobs it has, and the heartbeats of all its incarnations. Anybody may call it at any time.

local REMIND_MS = 5000 -- a running job past its deadline is reminded of it this often
local GATEWAY_GONE_MS = 2000 -- a subscription may be away that long before its gateway counts as gone
local GONE_GRACE_MS = 5000 -- least grace of the jobs of a gateway that is gone: its clients need time to come back

local function due(k, t, limit)
  return C('ZRANGEBYSCORE', k, '-inf', t, 'LIMIT', 0, limit)
end

local function sweep_deadlines(L, t, limit)
  local ids = due(L .. ':dl', t, limit)
  for _, id in ipairs(ids) do
    local state = C('HGET', job_key(L, id), 'st')
    if state == 'in_progress' then
      C('ZADD', L .. ':dl', t + REMIND_MS, id)
    else
      C('ZREM', L .. ':dl', id)
    end
    stop(L, id, 'expired')
  end
  return #ids
end

local function sweep_orphans(L, t, limit)
  local ids = due(L .. ':or', t, limit)
  for _, id in ipairs(ids) do
    C('ZREM', L .. ':or', id)
    if C('SCARD', L .. ':sub:' .. id) == 0 then
      stop(L, id, 'cancelled')
    end
  end
  return #ids
end

local function sweep_gateways(L, t, limit)
  local all, num_left = C('HGETALL', L .. ':gws'), 0
  for i = 1, #all, 2 do
    local gateway, since = all[i], tonumber(all[i + 1])
    local heard = C('PUBSUB', 'NUMSUB', L .. ':gw:' .. gateway)[2]
    if heard > 0 then
      if since ~= 0 then
        C('HSET', L .. ':gws', gateway, 0)
      end
    elseif since == 0 then
      C('HSET', L .. ':gws', gateway, t)
    elseif t - since >= GATEWAY_GONE_MS then
      for _, id in ipairs(C('SRANDMEMBER', L .. ':gj:' .. gateway, limit)) do
        leave(L, id, gateway, GONE_GRACE_MS)
        num_left = num_left + 1
      end
      if C('EXISTS', L .. ':gj:' .. gateway) == 0 then
        C('HDEL', L .. ':gws', gateway)
      end
    end
  end
  return num_left
end

local function sweep_expired(L, t, limit)
  local members = due(L .. ':xp', t, limit)
  for _, member in ipairs(members) do
    local id, tenant = string.match(member, '^([^:]+):(.+)$')
    C('ZREM', L .. ':xp', member)
    C('ZREM', L .. ':ti:' .. tenant, id)
    C('ZREM', L .. ':dlq', id)
  end
  return #members
end

-- Tokens that workers took per second, smoothed: how long a refused client should wait.
local function sweep_rate(L, t)
  local f = C('HMGET', L .. ':rate', 't', 'taken', 'per_s')
  local taken = tonumber(C('HGET', L .. ':m', 'taken_tokens') or 0)
  local elapsed = t - tonumber(f[1] or 0)
  if elapsed >= 1000 then
    local fresh = f[1] and math.max(taken - tonumber(f[2]), 0) * 1000 / elapsed or 0
    local smooth = math.floor(0.7 * tonumber(f[3] or 0) + 0.3 * fresh)
    C('HSET', L .. ':rate', 't', t, 'taken', taken, 'per_s', smooth)
    C('EXPIRE', L .. ':rate', CARD_TTL)
  end
end

local function beats(L)
  local rows, is_served = {}, false
  each_incarnation(L, function(wid, inc, alive, f, owned)
    is_served = is_served or alive
    rows[#rows + 1] = { wid, inc, alive and 1 or 0, alive and f[3] or 0, owned }
  end)
  if is_served then
    C('EXPIRE', L .. ':model', CARD_TTL)
    C('EXPIRE', L .. ':fp', CARD_TTL)
    C('EXPIRE', L .. ':ad', CARD_TTL)
  end
  return rows
end

local function sweep(K, A)
  local R, L = reader(K, A)
  local limit = number(R, 'limit', 1, 1000)
  done(R)
  local t = now()
  local most = math.max(
    sweep_deadlines(L, t, limit),
    sweep_orphans(L, t, limit),
    sweep_gateways(L, t, limit),
    sweep_expired(L, t, limit)
  )
  sweep_rate(L, t)
  local rows = beats(L)
  return { most, C('EXISTS', L .. ':model'), C('ZCARD', L .. ':dl'), rows }
end

register('sweep', sweep, WRITES)
