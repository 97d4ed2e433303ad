-- Reserve for one request against all its accounts, or none.
--   KEYS  worker, its open requests, accounts
--   ARGV  worker, number, now ('' for the server's clock), seconds that a silent worker is believed to live,
--         then for each account: kind, cap, amount, Unix time until which it is kept
--   kind  b budget, t tokens of a minute, q requests of a minute, c concurrent
-- Returns {1, what each account has counted now …}; {0, index of the account that refuses, what it has counted,
-- seconds until enough has left the minute or -1}; {2, index} for a budget that this server does not know.
local worker, number, ttl = ARGV[1], ARGV[2], tonumber(ARGV[4])
local now = tonumber(ARGV[3])
if not now then
    local time = redis.call('TIME')
    now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local second = math.floor(now)
local seen = {[worker] = now}
local counted = {}

local function last_seen(name)
    if seen[name] == nil then
        seen[name] = tonumber(redis.call('GET', '{penstock}:w:' .. name) or 0)
    end
    return seen[name]
end

for index = 3, #KEYS do
    local at = 4 + (index - 3) * 4
    local kind, cap, amount = ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local fields = redis.call('HGETALL', KEYS[index])
    if kind == 'b' and #fields == 0 then
        return {2, index - 3}
    end
    local sum, slots = 0, {}
    for field = 1, #fields, 2 do
        local name, value = fields[field], tonumber(fields[field + 1])
        local mark, rest = string.sub(name, 1, 2), string.sub(name, 3)
        if mark == 'u' then
            sum = sum + value
        elseif mark == 's:' then
            local slot = tonumber(rest)
            if slot < second - 60 then
                redis.call('HDEL', KEYS[index], name)
            else
                sum = sum + value
                slots[#slots + 1] = {slot, value}
            end
        elseif mark == 'r:' then
            local silent = now - last_seen(rest)
            if kind == 'b' or silent < ttl or (kind == 't' and silent < ttl + 61) then
                sum = sum + value
            elseif silent > ttl + 61 then
                redis.call('HDEL', KEYS[index], name)
            end
        end
    end
    if sum + amount > cap then
        local frees, left = -1, sum
        table.sort(slots, function(a, b) return a[1] < b[1] end)
        for _, slot in ipairs(slots) do
            left = left - slot[2]
            if left + amount <= cap then
                frees = slot[1] + 61 - now
                break
            end
        end
        return {0, index - 3, tostring(sum), tostring(frees)}
    end
    counted[index - 2] = sum + amount
end

local open = {}
for index = 3, #KEYS do
    local at = 4 + (index - 3) * 4
    local kind, amount, keep = ARGV[at + 1], ARGV[at + 3], ARGV[at + 4]
    local field = kind == 'q' and 's:' .. second or 'r:' .. worker
    redis.call('HINCRBY', KEYS[index], field, amount)
    redis.call('EXPIREAT', KEYS[index], keep)
    open[#open + 1] = {KEYS[index], kind, amount}
end
redis.call('HSET', KEYS[2], number, cjson.encode(open))
redis.call('SET', KEYS[1], string.format('%.3f', now), 'EX', math.ceil(ttl) + 122)
local answer = {1}
for index, sum in ipairs(counted) do
    answer[index + 1] = string.format('%.0f', sum)
end
return answer
