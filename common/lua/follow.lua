-- cancel, attach and detach: at once when the job is queued, through the control list of its worker when it runs.

local function cancel(K, A)
  local R, L = reader(K, A)
  local id = job_id(R)
  done(R)
  if C('HGET', job_key(L, id), 'cx') == '' then
    stop(L, id, 'cancelled')
  end
  return job_row(L, id)
end

local function attach(K, A)
  local R, L = reader(K, A)
  local id, gateway = job_id(R), name_of(R, 'gateway')
  done(R)
  local f = C('HMGET', job_key(L, id), 'st', 'own')
  if f[1] == 'queued' or f[1] == 'in_progress' then
    follow(L, id, gateway)
    if f[1] == 'in_progress' then
      control(L, f[2], 'attach', id, gateway)
    end
  end
  return job_row(L, id)
end

local function detach(K, A)
  local R, L = reader(K, A)
  local id, gateway = job_id(R), name_of(R, 'gateway')
  done(R)
  leave(L, id, gateway, 0)
  return 1
end

register('cancel', cancel, WRITES)
register('attach', attach, WRITES)
register('detach', detach, WRITES)
