-- A request hands over a part of what it has reserved to another one of its worker. The accounts see no change.
-- The second time it does nothing.
--   KEYS  open requests of the worker
--   ARGV  number, number of the other one, then unit and amount; a unit that is not named stays, but for
--         "concurrent", which goes over: it is counted once for both
local reserved = redis.call('HGET', KEYS[1], ARGV[1])
if not reserved or redis.call('HEXISTS', KEYS[1], ARGV[2]) == 1 then
    return 0
end
local most = {concurrent = '1'}
for index = 3, #ARGV, 2 do
    most[ARGV[index]] = ARGV[index + 1]
end
local stays, goes = {}, {}
for _, each in ipairs(cjson.decode(reserved)) do
    local key, kind, amount = each[1], each[2], tonumber(each[3])
    local unit = string.match(key, '|([^|]*)|[^|]*|[^|]*$')
    local part = 0
    if kind ~= 'q' and most[unit] then
        part = math.min(amount, tonumber(most[unit]))
    end
    stays[#stays + 1] = {key, kind, string.format('%.0f', amount - part)}
    goes[#goes + 1] = {key, kind, string.format('%.0f', part)}
end
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(stays), ARGV[2], cjson.encode(goes))
return 1
