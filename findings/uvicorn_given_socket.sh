#!/bin/bash
# uvicorn serves a socket from the standard library's create_server: every answer waits for Nagle's algorithm.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uvicorn==0.54.0 h11==0.16.0
cd "$work"
venv/bin/python - <<'PYTHON'
import asyncio, http.client, platform, socket, statistics, threading, time
import uvicorn

servers = {}
async def app(scope, receive, send):
    await receive()
    [connection] = servers[scope["server"][1]].server_state.connections
    told = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": b"1" if told else b"0"})
def of_protocol(listening):
    server = uvicorn.Server(uvicorn.Config(app, http="h11", lifespan="off", log_level="error", loop="asyncio"))
    servers[listening.getsockname()[1]] = server
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    client, times, told = http.client.HTTPConnection(*listening.getsockname(), timeout=20), [], ""
    for _ in range(20):
        began = time.perf_counter()
        client.request("GET", "/")
        told = client.getresponse().read().decode()
        times.append(time.perf_counter() - began)
    server.should_exit = True
    print(f"proto of the listening socket {listening.proto}: TCP_NODELAY {told}, median {1e3 * statistics.median(times):.1f} ms")
    return told
print("uvicorn", uvicorn.__version__, "on Python", platform.python_version())
other = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
other.bind(("127.0.0.1", 0))
other.listen()
found = [of_protocol(socket.create_server(("127.0.0.1", 0))), of_protocol(other)]
raise SystemExit(found != ["0", "1"])
PYTHON
