-- Circuits as all processes know them: looks at them, or applies one change, tells it to all and answers how
-- that circuit is now. Times are milliseconds, and by this server's clock alone: others hear how long is left.
--
-- look:      KEYS  each circuit's hash, last the sorted set of workers by when they looked;  ARGV  'look', worker
-- a change:  KEYS  the hash;  ARGV  what happened, its figures, the upstream's id, the channel
--
-- Answers are views: version (0: nothing is known), failures, is_open, open_for, backoff_for, drained, trial,
-- trial_for, granted. A version is larger than all before it, so that of two views one is known for the later.

local FORGOTTEN = 8 * 24 * 3600 * 1000 -- after so long without a word of an upstream
local GONE = 10 * 1000 -- a worker that did not look for so long
local FIELDS = { 'version', 'failures', 'open', 'backoff', 'drained', 'trial', 'lease' }

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- `open` is when an open circuit is due, 0 while it is closed; `lease` until when `trial` may run.
local function read(key)
  local found, circuit = redis.call('HMGET', key, unpack(FIELDS)), {}
  for number, field in ipairs(FIELDS) do
    circuit[field] = field == 'trial' and (found[number] or '') or (tonumber(found[number]) or 0)
  end
  if circuit.lease <= now then
    circuit.trial, circuit.lease = '', 0
  end
  return circuit
end

local function view(circuit, granted)
  local function left(time)
    return math.max(0, time - now)
  end
  return {
    circuit.version, circuit.failures, circuit.open > 0 and 1 or 0, left(circuit.open), left(circuit.backoff),
    circuit.drained, circuit.trial, left(circuit.lease), granted and 1 or 0
  }
end

if ARGV[1] == 'look' then
  local views = {}
  for number = 1, #KEYS - 1 do
    views[number] = view(read(KEYS[number]))
    if views[number][1] > 0 and redis.call('PTTL', KEYS[number]) < FORGOTTEN / 2 then
      redis.call('PEXPIRE', KEYS[number], FORGOTTEN)
    end
  end
  redis.call('ZADD', KEYS[#KEYS], now, ARGV[2])
  redis.call('ZREMRANGEBYSCORE', KEYS[#KEYS], '-inf', now - GONE)
  redis.call('PEXPIRE', KEYS[#KEYS], FORGOTTEN)
  return views
end

-- Each takes the circuit and its figures, and tells whether it changed; a second true grants a trial.
local happened = {}

function happened.failed(circuit, threshold, cooldown)
  if circuit.open > 0 then
    return false
  end
  circuit.failures = circuit.failures + 1
  circuit.open = circuit.failures >= tonumber(threshold) and now + cooldown or 0
  return true
end

-- The trial failed.
function happened.reopened(circuit, token, cooldown)
  if circuit.open == 0 or circuit.trial ~= token then
    return false
  end
  circuit.failures, circuit.open, circuit.trial, circuit.lease = circuit.failures + 1, now + cooldown, '', 0
  return true
end

function happened.closed(circuit)
  -- Also where nothing is known: what others remember must not open it again.
  local changed = circuit.version == 0 or circuit.failures > 0 or circuit.open > 0 or circuit.backoff > now
  circuit.failures, circuit.open, circuit.backoff, circuit.trial, circuit.lease = 0, 0, 0, '', 0
  return changed
end

function happened.recovered(circuit)
  local changed = circuit.open == 0 and circuit.failures > 0
  circuit.failures = changed and 0 or circuit.failures
  return changed
end

-- The trial was given back undecided.
function happened.returned(circuit, token)
  local changed = circuit.trial == token
  if changed then
    circuit.trial, circuit.lease = '', 0
  end
  return changed
end

-- Of several backoffs the one that ends last holds.
function happened.backed_off(circuit, token, seconds)
  local changed = happened.returned(circuit, token)
  if now + seconds > circuit.backoff then
    circuit.backoff, changed = now + seconds, true
  end
  return changed
end

-- May the trial begin? A server that was restarted empty believes who remembers that the circuit is open.
function happened.trial(circuit, token, lease)
  if circuit.version == 0 then
    circuit.open = now
  end
  local free = circuit.open > 0 and circuit.open <= now and circuit.backoff <= now and circuit.trial == ''
  if free then
    circuit.trial, circuit.lease = token, now + lease
  end
  return free, free
end

-- The cooldown has become shorter, perhaps.
function happened.limited(circuit, cooldown)
  local latest = now + cooldown
  local changed = circuit.open > latest or circuit.backoff > latest
  circuit.open, circuit.backoff = math.min(circuit.open, latest), math.min(circuit.backoff, latest)
  return changed
end

function happened.renewed(circuit, token, lease)
  if circuit.trial == token then
    redis.call('HSET', KEYS[1], 'lease', now + lease)
  end
  return false
end

function happened.drained(circuit, draining)
  local changed = circuit.version == 0 or circuit.drained ~= tonumber(draining)
  circuit.drained = tonumber(draining)
  return changed
end

-- What a process remembers of a circuit, where this server was restarted empty; open_for is -1 if closed.
function happened.restored(circuit, failures, open_for, backoff_for, drained)
  if circuit.version > 0 then
    return false
  end
  circuit.failures, circuit.drained = tonumber(failures), tonumber(drained)
  circuit.open = tonumber(open_for) >= 0 and now + open_for or 0
  circuit.backoff = now + backoff_for
  return true
end

local circuit = read(KEYS[1])
local changed, granted = happened[ARGV[1]](circuit, unpack(ARGV, 2, #ARGV - 2))
if not changed then
  return { view(circuit) }
end
circuit.version = math.max(now, circuit.version + 1)
for _, field in ipairs(FIELDS) do
  redis.call('HSET', KEYS[1], field, circuit[field])
end
redis.call('PEXPIRE', KEYS[1], FORGOTTEN)
-- Who may not publish here is understood a second later all the same.
redis.pcall('PUBLISH', ARGV[#ARGV], cjson.encode({ id = ARGV[#ARGV - 1], view = view(circuit) }))
return { view(circuit, granted) }
