-- mine: what the server thinks this incarnation owns. body: one owned job as `take` gives it.

local function mine(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  done(R)
  local refused = fence(L, wid, inc)
  if refused then
    return refused
  end
  local rows = {}
  for _, id in ipairs(C('SMEMBERS', own_key(L, wid .. '.' .. inc))) do
    local f = C('HMGET', job_key(L, id), 'ep', 'cx', 'dl')
    rows[#rows + 1] = { id, f[1], f[2], f[3] }
  end
  return rows
end

local function body(K, A)
  local R, L = reader(K, A)
  local wid, inc = incarnation(R)
  local id = job_id(R)
  done(R)
  local refused = fence(L, wid, inc)
  if refused then
    return refused
  end
  return C('HGET', job_key(L, id), 'own') == wid .. '.' .. inc and taken_row(L, id)
end

register('mine', mine, READS)
register('body', body, READS)
