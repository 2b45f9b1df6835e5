-- For wrk: posts the files FOLDER/0.jpg ... FOLDER/(COUNT-1).jpg in turn. Usage:
-- wrk ... -s post.lua URL -- FOLDER COUNT [NAME: VALUE ...], with the headers, by default of a JPEG.
-- Requests are built once; sending one costs a table look-up.

local requests, count, at = {}, 0, 0

function init(arguments)
  local folder = arguments[1]
  count = tonumber(arguments[2])
  local headers = {["Content-Type"] = "image/jpeg"}
  for position = 3, #arguments do
    local name, value = arguments[position]:match("^(.-): (.*)$")
    headers[name] = value
  end
  for number = 0, count - 1 do
    local file = assert(io.open(folder .. "/" .. number .. ".jpg", "rb"))
    requests[number] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
end

function request()
  at = (at + 1) % count
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "status": %d, "connect": %d, "read": %d, "write": %d, "timeout": %d, ' ..
    '"p50_ms": %f, "p99_ms": %f}\n',
    summary.requests, summary.duration / 1e6, errors.status, errors.connect, errors.read, errors.write, errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
