-- A request has ended: what it used counts in place of what it had reserved. The second time it does nothing.
--   KEYS  open requests of its worker
--   ARGV  worker, number, now ('' for the server's clock), then unit and amount, as often as known;
--         a unit that is not named was used as reserved
local reserved = redis.call('HGET', KEYS[1], ARGV[2])
if not reserved then
    return 0
end
local now = tonumber(ARGV[3])
if not now then
    now = tonumber(redis.call('TIME')[1])
end
local used = {}
for index = 4, #ARGV, 2 do
    used[ARGV[index]] = ARGV[index + 1]
end
for _, each in ipairs(cjson.decode(reserved)) do
    local key, kind, amount = each[1], each[2], each[3]
    local unit = string.match(key, '|([^|]*)|[^|]*|[^|]*$')
    if kind ~= 'q' and redis.call('HEXISTS', key, 'r:' .. ARGV[1]) == 1 then
        if tonumber(amount) > 0 then  -- "-0" is no number there
            redis.call('HINCRBY', key, 'r:' .. ARGV[1], '-' .. amount)
        end
        if kind == 'b' then
            redis.call('HINCRBY', key, 'u', used[unit] or amount)
        elseif kind == 't' then
            redis.call('HINCRBY', key, 's:' .. math.floor(now), used[unit] or amount)
        end
    end
end
redis.call('HDEL', KEYS[1], ARGV[2])
return 1
