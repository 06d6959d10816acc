-- write: a key outside of lanes, where the server's own command would be refused for lack of memory.

local COMMANDS = { SET = true, SADD = true, HSET = true }

local function write(K, A)
  if #K ~= 1 or not string.match(K[1], '^fleet:[%w:_-]+$') or not COMMANDS[A[1]] or #A < 2 then
    bad('a key of the fleet and one of its commands')
  end
  return C(A[1], K[1], unpack(A, 2))
end

register('write', write, WRITES)
