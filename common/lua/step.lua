-- step: everything an engine step has to say, in one call.
-- FENCED, UNKNOWN, GAP (nothing written), or {duplicate, controls, jobs lost, gateways that nobody hears}.

local CONTROL_LIMIT = 64
local FINAL = { completed = true, failed = true, cancelled = true, expired = true }

local function span(R)
  local item = { id = job_id(R), epoch = tostring(number(R, 'epoch', 0, LARGEST)) }
  item.start = number(R, 'start', 0, LARGEST)
  item.stop_at = number(R, 'end', item.start, LARGEST)
  item.payload = text(R, 'payload', LONGEST_BODY)
  return item
end

local function arguments(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local a = {
    wid = wid,
    inc = inc,
    owner = wid .. '.' .. inc,
    step = number(R, 'step', 1, LARGEST),
    previous = number(R, 'previous step', 0, LARGEST),
    oldest = number(R, 'oldest step', 0, LARGEST),
    frame = text(R, 'frame', LONGEST_BODY),
    cursor = matching(R, 'cursor', '^%d+%-%d+$', 40),
    stats = text(R, 'stats', 65536),
    gateways = {},
    chunks = {},
    finishes = {},
  }
  for i = 1, number(R, 'number of gateways', 0, 4096) do
    a.gateways[i] = { name = name_of(R, 'gateway'), frame = text(R, 'gateway frame', LONGEST_BODY) }
  end
  for i = 1, number(R, 'number of chunks', 0, 65536) do
    a.chunks[i] = span(R)
  end
  for i = 1, number(R, 'number of finishes', 0, 65536) do
    local item = span(R)
    item.state, item.reason = text(R, 'state', 32), optional_name(R, 'finish reason')
    item.code, item.message = text(R, 'error code', 64), text(R, 'error message', 4096)
    if not FINAL[item.state] then
      bad('state is not final')
    end
    a.finishes[i] = item
  end
  done(R)
  return L, a
end

-- Which spans may be written. A job that is not the caller's is lost to it; a span that begins beyond the log's end would
-- leave a hole; one that ends before it was written already.
local function plan(L, a)
  local owned, ends, lost, gap = {}, {}, {}, nil
  local function check(item)
    if owned[item.id] == nil then
      local f = C('HMGET', job_key(L, item.id), 'own', 'ep', 'st')
      owned[item.id] = f[1] == a.owner and f[2] == item.epoch and f[3] == 'in_progress'
      ends[item.id] = owned[item.id] and log_end(L, item.id)
      if not owned[item.id] then
        lost[#lost + 1] = item.id
      end
    end
    item.owned = owned[item.id]
    if not item.owned then
      return
    end
    local last = ends[item.id]
    if item.payload == '' then
      item.start = item.stop_at
    end
    if item.start > last then
      gap = gap or ('GAP ' .. item.id .. ' ' .. last)
    elseif item.stop_at > last then
      item.is_new = true
      ends[item.id] = item.stop_at
    end
  end
  for _, item in ipairs(a.chunks) do
    check(item)
  end
  for _, item in ipairs(a.finishes) do
    check(item)
  end
  return lost, gap
end

local function write_frame(L, a)
  local wal, silent = L .. ':wal:' .. a.owner, {}
  if a.frame ~= '' then
    C('XADD', wal, 'MINID', '~', a.oldest .. '-0', a.step .. '-0', 'f', a.frame)
  else
    C('XTRIM', wal, 'MINID', a.oldest .. '-0')
  end
  for _, gateway in ipairs(a.gateways) do
    if C('PUBLISH', L .. ':gw:' .. gateway.name, gateway.frame) == 0 then
      silent[#silent + 1] = gateway.name
    end
  end
  return silent
end

-- A cancel that came before the end wins over it; text and usage stay.
local function finish(L, item)
  local reason = C('HGET', job_key(L, item.id), 'cx')
  if reason ~= '' then
    terminal(L, item.id, reason)
  else
    terminal(L, item.id, item.state, item.reason, item.code, item.message)
  end
end

local function controls(L, a)
  local k, found = L .. ':ctl:' .. a.owner, {}
  C('XTRIM', k, 'MINID', a.cursor)
  for i, entry in ipairs(C('XRANGE', k, '(' .. a.cursor, '+', 'COUNT', CONTROL_LIMIT)) do
    found[i] = { entry[1], entry[2][2], entry[2][4], entry[2][6] }
  end
  return found
end

local function step(K, A)
  local L, a = arguments(K, A)
  local k = worker_key(L, a.wid)
  local f = C('HMGET', k, 'inc', 'sealed', 'seq', 'hb', 'lo')
  local why = refusal(a.inc, f[1], f[2])
  if why then
    return redis.error_reply(why)
  end
  local last = tonumber(f[3])
  if a.step <= last then
    C('HSET', k, 'hb', f[4] + 1, 'bt', now())
    return { 1, controls(L, a), f[5] and f[5] ~= '' and cmsgpack.unpack(f[5]) or {}, {} }
  end
  if a.previous ~= last then
    return redis.error_reply('GAP step ' .. last)
  end
  local lost, gap = plan(L, a)
  if gap then
    return redis.error_reply(gap)
  end
  local silent = write_frame(L, a)
  for _, item in ipairs(a.chunks) do
    if item.is_new then
      append(L, item.id, item.stop_at, item.payload)
    end
  end
  for _, item in ipairs(a.finishes) do
    if item.is_new then
      append(L, item.id, item.stop_at, item.payload)
    end
    if item.owned then
      finish(L, item)
    end
  end
  C('HSET', k, 'hb', f[4] + 1, 'bt', now(), 'seq', a.step, 'lo', #lost > 0 and cmsgpack.pack(lost) or '')
  if a.stats ~= '' then
    C('HSET', k, 'stats', a.stats)
  end
  return { 0, controls(L, a), lost, silent }
end

register('step', step, WRITES)
