-- What gateways and operators read: records, states of many jobs, lists, workers, queues, dead letters.

local SCAN_LIMIT = 5000
local SCAN_PAGE = 100

local function record(K, A)
  local R, L = reader(K, A)
  local id = job_id(R)
  done(R)
  return job_row(L, id)
end

local function states(K, A)
  local R, L = reader(K, A)
  local ids = {}
  for i = 1, #A do
    ids[i] = job_id(R)
  end
  local rows = {}
  for i, id in ipairs(ids) do
    local f = C('HMGET', job_key(L, id), 'st', 'tak')
    rows[i] = f[1] and { f[1], f[2], log_end(L, id) }
  end
  return rows
end

-- The tenant's jobs before (created, after), newest first; jobs of one millisecond are ordered by id.
local function list(K, A)
  local R, L = reader(K, A)
  local tenant, status = name_of(R, 'tenant'), optional_name(R, 'status')
  local limit, created = number(R, 'limit', 1, 1001), number(R, 'created', 0, LARGEST)
  local after = matching(R, 'after', '^[a-z2-7]*%.?%d*$', 40)
  done(R)
  local newest, rows = created > 0 and created or '+inf', {}
  for offset = 0, SCAN_LIMIT - 1, SCAN_PAGE do
    local page = C('ZREVRANGEBYSCORE', L .. ':ti:' .. tenant, newest, '-inf', 'WITHSCORES', 'LIMIT', offset, SCAN_PAGE)
    for i = 1, #page, 2 do
      local id = page[i]
      local is_older = tonumber(page[i + 1]) ~= created or id < after
      local state = is_older and C('HGET', job_key(L, id), 'st')
      if state and (status == '' or status == state) then
        rows[#rows + 1] = { id, job_row(L, id) }
        if #rows == limit then
          return rows
        end
      end
    end
    if #page < 2 * SCAN_PAGE then
      break
    end
  end
  return rows
end

local function workers(K, A)
  local R, L = reader(K, A)
  done(R)
  local rows = {}
  each_incarnation(L, function(wid, inc, alive, f, owned)
    if alive then
      rows[#rows + 1] = { wid, inc, f[4] or 0, owned, f[5], f[6] or '' }
    end
  end)
  return rows
end

local function queue(K, A)
  local R, L = reader(K, A)
  done(R)
  local running, living = 0, 0
  each_incarnation(L, function(_, _, alive, _, owned)
    running = running + owned
    living = living + (alive and 1 or 0)
  end)
  local rows = {
    'queued', C('ZCARD', L .. ':dl') - running,
    'queued_tokens', C('GET', L .. ':qtok') or 0,
    'running', running,
    'workers', living,
    'dead_letters', C('ZCARD', L .. ':dlq'),
    'tokens_per_s', C('HGET', L .. ':rate', 'per_s') or 0,
  }
  for _, value in ipairs(C('HGETALL', L .. ':m')) do
    rows[#rows + 1] = value
  end
  return rows
end

local function dead_letters(K, A)
  local R, L = reader(K, A)
  local limit = number(R, 'limit', 1, 10000)
  done(R)
  local rows, page = {}, C('ZREVRANGE', L .. ':dlq', 0, limit - 1, 'WITHSCORES')
  for i = 1, #page, 2 do
    local f = C('HMGET', job_key(L, page[i]), 'st', 'ec', 'em')
    if f[1] == 'failed' then
      rows[#rows + 1] = { page[i], page[i + 1], f[2], f[3] }
    end
  end
  return rows
end

register('record', record, READS)
register('states', states, READS)
register('list', list, READS)
register('workers', workers, READS)
register('queue', queue, READS)
register('dead_letters', dead_letters, READS)
