-- adapters: what a lane is to offer beside its base model. put registers one, settle is a worker's word on it, drop removes
-- it. A registration is named by its token: who speaks of one that was dropped or replaced changes nothing.

local MOST_ADAPTERS = 1024
local LONGEST_SOURCE = 4096 -- bytes

local function adapter_name(R)
  return matching(R, 'adapter', '^[%w_][%w._/-]*$', 96)
end

local function where(R, name)
  return matching(R, name, '^%C*$', LONGEST_SOURCE)
end

local function finding(R)
  return matching(R, 'digest', '^%x*$', 32), number(R, 'rank', 0, 65536), where(R, 'place')
end

local function registered(L, name)
  local packed = C('HGET', L .. ':ad', name)
  return packed and cmsgpack.unpack(packed)
end

local function keep(L, name, entry)
  local packed = cmsgpack.pack(entry)
  C('HSET', L .. ':ad', name, packed)
  C('EXPIRE', L .. ':ad', CARD_TTL)
  return packed
end

local function tell_workers(L)
  each_incarnation(L, function(wid, inc, alive)
    if alive then
      control(L, wid .. '.' .. inc, 'adapters', '', '')
    end
  end)
end

local function is_served_beside(L, own)
  local found = false
  each_incarnation(L, function(wid, _, alive)
    found = found or (alive and wid ~= own)
  end)
  return found
end

-- The same weights are the same adapter wherever they lie; as long as nobody has looked, the same source is.
local function is_same(entry, source, digest)
  if entry.digest ~= '' and digest ~= '' then
    return entry.digest == digest
  end
  return entry.source == source
end

-- An operator has no worker id and no digest. A worker that brings an adapter has looked at it already, and replaces one
-- that no other living worker can serve.
local function put(K, A)
  local R, L = reader(K, A)
  local name, source = adapter_name(R), where(R, 'source')
  local token, wid = matching(R, 'token', '^%x+$', 32), optional_name(R, 'worker id')
  local digest, rank, place = finding(R)
  done(R)
  local entry = registered(L, name)
  if entry and entry.token ~= token then
    if entry.state ~= 'failed' and not is_same(entry, source, digest) and (wid == '' or is_served_beside(L, wid)) then
      return { 'TAKEN', cmsgpack.pack(entry) }
    elseif entry.state == 'failed' or not is_same(entry, source, digest) then
      entry = false
    end
  end
  if entry and (entry.state ~= 'loading' or digest == '') then
    return { 'OK', cmsgpack.pack(entry) }
  elseif C('HEXISTS', L .. ':ad', name) == 0 and C('HLEN', L .. ':ad') >= MOST_ADAPTERS then
    return { 'FULL', '' }
  end
  entry = entry or { source = source, token = token, created = now(), error = '' }
  entry.state = digest == '' and 'loading' or 'ready'
  entry.digest, entry.rank, entry.place = digest, rank, place
  audit(L, 'adapter_' .. entry.state, '', name)
  tell_workers(L)
  return { 'OK', keep(L, name, entry) }
end

-- The first word counts. Answers what stands now, nothing when the registration is gone.
local function settle(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local name, token = adapter_name(R), matching(R, 'token', '^%x+$', 32)
  local digest, rank, place = finding(R)
  local problem = text(R, 'error', 4096)
  done(R)
  if problem == '' and digest == '' then
    bad('neither digest nor error')
  end
  local refused = fence(L, wid, inc)
  if refused then
    return refused
  end
  local entry = registered(L, name)
  if not entry or entry.token ~= token then
    return false
  elseif entry.state ~= 'loading' then
    return cmsgpack.pack(entry)
  end
  entry.state = problem == '' and 'ready' or 'failed'
  entry.digest, entry.rank, entry.place, entry.error = digest, rank, place, problem
  audit(L, 'adapter_' .. entry.state, '', name)
  return keep(L, name, entry)
end

-- 0 only if another registration has the name by now.
local function drop(K, A)
  local R, L = reader(K, A)
  local name, token = adapter_name(R), matching(R, 'token', '^%x+$', 32)
  done(R)
  local entry = registered(L, name)
  if entry and entry.token ~= token then
    return 0
  elseif entry then
    C('HDEL', L .. ':ad', name)
    audit(L, 'adapter_dropped', '', name)
    tell_workers(L)
  end
  return 1
end

register('adapter_put', put, WRITES)
register('adapter_settle', settle, WRITES)
register('adapter_drop', drop, WRITES)
