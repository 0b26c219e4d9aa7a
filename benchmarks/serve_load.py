"""The server under load and under faults, against 127.0.0.1 alone: pictures/s, latencies, memory, and what goes wrong.

    python benchmarks/serve_load.py [--bundles digits,emoji] [--seconds 10] [--memory 10000] [--faults] [--quick]

Rates of 1, 4, 16 and 64 clients stand beside two others, taken in the same rounds: the same requests drawn offline, 16
at a time by the same executor with as many threads, with pictures and receipts, and one after another by the server. A
picture's processor time, of the server's processes and of the offline one, is there because a rate on a machine that
does something else says little. Clients are in a process of their own and take part of the machine; their share is
printed.

`--faults` cuts clients off, reads slowly, sends damaged bodies, overflows the queue and kills the server, and ends with
an error if any picture is not the library's, guided as asked, or a row is left in use.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from typing import Any

PROMPTS = {
    "digits": ["dark green eight on bright cyan", "plain red two on light gray", "bright orange five on dark blue"],
    "emoji": ["woman astronaut, dark skin tone", "red heart", "cat face with tears of joy"],
}
CLIENTS = (1, 4, 16, 64)
OFFLINE = """
import json, sys, time
from smalti.tasks.images import Pipeline
bundle, executor, prompts, seconds = json.loads(sys.argv[1])
pipe = Pipeline.load(bundle)
import io
from smalti.image_files import receipt_chunks
def draw(n, seed):
    asked = [prompts[i % len(prompts)] for i in range(n)]
    for picture in pipe.generate(asked, seed=[seed + i for i in range(n)], batch_size=16):
        picture.save(io.BytesIO(), format="PNG", pnginfo=receipt_chunks(picture))
draw(16, 0)
started, used, done = time.perf_counter(), time.process_time(), 0
while time.perf_counter() < started + seconds:
    draw(64, done)
    done += 64
print(json.dumps([done / (time.perf_counter() - started), (time.process_time() - used) / done]))
"""


class Server:
    """`smalti serve` in a process of its own."""

    def __init__(self, bundles: list[str], *options: str, port: int = 0):
        command = [sys.executable, "-c", "from smalti.cli.app import main; main()", "serve", *bundles]
        self.process = subprocess.Popen([*command, "--port", str(port), *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.port = int(line.split(": ")[0].rsplit(":", 1)[1])
        self.executors = dict(re.findall(r"(\w+) \((\w+)\)", line))

    @property
    def processes(self) -> list[int]:
        """The server's, and the one that makes pictures of codes for it."""
        main = self.process.pid
        with open(f"/proc/{main}/task/{main}/children") as file:
            return [main, *map(int, file.read().split())]

    def cpu_s(self) -> float:
        """Processor time of its processes so far. Linux tells it; elsewhere it is not a number."""
        try:
            found = [_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13] for pid in self.processes]
        except OSError:
            return float("nan")
        return sum(int(ticks) for fields in found for ticks in fields) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Resident memory of its processes."""
        try:
            found = [re.search(r"VmRSS:\s*(\d+)", _read(f"/proc/{pid}/status")) for pid in self.processes]
        except OSError:
            return float("nan")
        return sum(int(match[1]) for match in found if match) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(150)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


@contextmanager
def serving(*arguments: Any, **options: Any):
    server = Server(*arguments, **options)
    try:
        yield server
    finally:
        server.stop()


class Connection:
    """A kept-alive HTTP connection, with no more machinery than a fair client needs."""

    def __init__(self, port: int):
        self.port, self.reader, self.writer = port, None, None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        return await self.send("POST", path, body)

    async def send(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        await self.start(method, path, body, kind)
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, b"".join([chunk async for chunk in self.chunks()])
        content = await self.reader.readexactly(int(headers.get("content-length", 0)))  # type: ignore[union-attr]
        if headers.get("connection") == "close":
            await self.close()
        return status, content

    async def start(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json", missing: int = 0
    ) -> None:
        """Sends a request, of which so many bytes at the end never come."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        length = len(body) + missing
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        assert self.reader is not None
        first = await self.reader.readline()
        headers = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        if not first:
            raise ConnectionError("closed")
        return int(first.split()[1]), headers

    async def chunks(self) -> AsyncIterator[bytes]:
        assert self.reader is not None
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.reader = self.writer = None


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    connection = Connection(port)
    try:
        yield connection
    finally:
        await connection.close()


def asked(bundle: str, number: int, **more: Any) -> bytes:
    prompts = PROMPTS[bundle]
    body = {"model": bundle, "prompt": prompts[number % len(prompts)], "seed": number, **more}
    return json.dumps(body).encode()


# Load ----------------------------------------------------------------------------------------------------------


async def load(server: Server, bundle: str, num_clients: int, seconds: float) -> dict[str, float]:
    """Clients that each ask for one picture after the other."""
    latencies: list[float] = []
    ends_at = time.perf_counter() + seconds

    async def client(number: int) -> None:
        async with connected(server.port) as connection:
            count = 0
            while time.perf_counter() < ends_at or not count:
                started = time.perf_counter()
                seed = number * 100_000 + count
                status, content = await connection.post("/v1/images/generations", asked(bundle, seed))
                assert status == 200, content
                latencies.append(time.perf_counter() - started)
                count += 1

    started, used, own = time.perf_counter(), server.cpu_s(), time.process_time()
    await asyncio.gather(*(client(i) for i in range(num_clients)))
    elapsed = time.perf_counter() - started
    ordered = sorted(latencies)
    return {
        "rate": len(latencies) / elapsed,
        "cpu_s": (server.cpu_s() - used) / len(latencies),
        "client_cpu_s": (time.process_time() - own) / len(latencies),
        "p50_s": statistics.median(ordered),
        "p95_s": ordered[int(0.95 * (len(ordered) - 1))],
    }


async def first_partials(server: Server, bundle: str, num_clients: int, num_each: int) -> float:
    """Median seconds to the first of three partial pictures, of streams side by side."""
    found: list[float] = []

    async def client(number: int) -> None:
        async with connected(server.port) as connection:
            for i in range(num_each):
                started, is_first = time.perf_counter(), True
                body = asked(bundle, number * 1000 + i, stream=True, partial_images=3)
                await connection.start("POST", "/v1/images/generations", body)
                await connection.head()
                async for _ in connection.chunks():
                    if is_first:
                        found.append(time.perf_counter() - started)
                        is_first = False

    await asyncio.gather(*(client(i) for i in range(num_clients)))
    return statistics.median(found)


def offline(bundle: str, executor: str, seconds: float) -> tuple[float, float]:
    """Pictures/s and processor seconds a picture, in a process of its own."""
    argument = json.dumps([bundle, executor, PROMPTS[bundle], seconds])
    done = subprocess.run([sys.executable, "-c", OFFLINE, argument], stdout=subprocess.PIPE, text=True, check=True)
    rate, cpu_s = json.loads(done.stdout)
    return rate, cpu_s


def measure_load(server: Server, bundle: str, seconds: float, rounds: int) -> None:
    found: dict[int, list[dict[str, float]]] = {clients: [] for clients in CLIENTS}
    alone = []
    for _ in range(rounds):
        alone.append(offline(bundle, server.executors[bundle], seconds))
        for clients in CLIENTS:
            found[clients].append(asyncio.run(load(server, bundle, clients, seconds)))
    rate, cpu_s = (statistics.median(column) for column in zip(*alone, strict=True))
    print(f"\n{bundle}, executor {server.executors[bundle]}, {rounds} rounds of {seconds:g} s, medians")
    print(f"  offline, 16 at a time: {rate:7.1f} pictures/s, {1e3 * cpu_s:6.1f} ms of processor time a picture")
    medians = {
        clients: {name: statistics.median(one[name] for one in rows) for name in rows[0]}
        for clients, rows in found.items()
    }
    for clients, row in medians.items():
        print(
            f"  {clients:3d} clients: {row['rate']:7.1f} pictures/s, {row['rate'] / rate:5.2f} of offline, "
            f"{row['rate'] / medians[1]['rate']:5.2f} of one after another; p50 {1e3 * row['p50_s']:6.0f} ms, p95 "
            f"{1e3 * row['p95_s']:6.0f} ms; processor {1e3 * row['cpu_s']:6.1f} ms a picture, "
            f"{cpu_s / row['cpu_s']:4.2f} of offline's, clients {1e3 * row['client_cpu_s']:4.1f} ms"
        )
    for clients in (1, 16):
        seconds_to = asyncio.run(first_partials(server, bundle, clients, 4))
        print(f"  {clients:3d} streams: first partial picture after {1e3 * seconds_to:.0f} ms (median)")


def measure_memory(server: Server, bundle: str, num_requests: int) -> None:
    """Resident memory over many requests of ever new settings."""

    async def ask(first: int, count: int) -> None:
        numbers = iter(range(first, first + count))

        async def client() -> None:
            async with connected(server.port) as connection:
                for number in numbers:
                    body = asked(bundle, number, temperature=0.5 + number * 1e-6, guidance_scale=2 + number * 1e-6)
                    status, content = await connection.post("/v1/images/generations", body)
                    assert status == 200, content

        await asyncio.gather(*(client() for _ in range(16)))

    warm = max(200, num_requests // 10)
    asyncio.run(ask(0, warm))
    before = server.rss_mb()
    asyncio.run(ask(warm, num_requests))
    after = server.rss_mb()
    print(f"\nmemory: {before:.1f} MiB behind {warm} requests")
    print(f"        {after:.1f} MiB behind {num_requests} more, {after / before - 1:+.1%}")


# Faults --------------------------------------------------------------------------------------------------------


class Faults:
    """Things that go wrong at once with requests whose answers are known."""

    def __init__(self, server: Server, bundle: str, generator: random.Random):
        self.server, self.bundle, self.random = server, bundle, generator
        self.numbers = list(range(40))
        self.checked = self.wrong = 0
        self.truth: dict[int, list[int]] = {}

    def learn(self) -> None:
        """What the library draws, by the server's executor, each with a guidance of its own."""
        from smalti.tasks.images import Pipeline

        pipe = Pipeline.load(self.bundle)
        executor = self.server.executors[self.bundle]
        for number in self.numbers:
            settings = self.settings(number)
            prompt = PROMPTS[self.bundle][number % 3]
            codes = pipe.generate_codes(prompt, seed=number, executor=executor, **settings)
            self.truth[number] = codes.flatten().tolist()

    @staticmethod
    def settings(number: int) -> dict[str, float]:
        return {"guidance_scale": 1.0 + number % 4}

    async def check(self, connection: Connection, number: int) -> None:
        """Asks for one whose answer is known."""
        status, content = await connection.post(
            "/v1/images/generations", asked(self.bundle, number, **self.settings(number))
        )
        if status == 429:
            return
        found = json.loads(content)["data"][0]["smalti"] if status == 200 else content
        self.checked += 1
        self.wrong += status != 200 or found["codes"] != self.truth[number]

    async def keep_checking(self, during: Awaitable[Any]) -> None:
        """Good clients beside bad ones."""
        work = asyncio.ensure_future(during)

        async def client(offset: int) -> None:
            async with connected(self.server.port) as connection:
                number = offset
                while not work.done():
                    await self.check(connection, self.numbers[number % len(self.numbers)])
                    number += 3

        await asyncio.gather(work, *(client(i) for i in range(3)))

    async def many(self, count: int, side_by_side: int, one: Callable[[int], Awaitable[Any]]) -> None:
        numbers = iter(range(count))

        async def worker() -> None:
            for number in numbers:
                await one(number)

        await asyncio.gather(*(worker() for _ in range(side_by_side)))

    async def cut_off(self, number: int) -> None:
        """A client that goes away at some time: within its request, while it waits, or while it reads."""
        async with connected(self.server.port) as connection:
            body = asked(self.bundle, number, stream=bool(number % 2), partial_images=6 if number % 2 else None)
            missing = self.random.randrange(1, len(body)) if number % 5 == 0 else 0
            sent = body[: len(body) - missing]
            await connection.start("POST", "/v1/images/generations", sent, missing=missing)
            await asyncio.sleep(self.random.expovariate(20))

    async def read_slowly(self, number: int) -> None:
        async with connected(self.server.port) as connection:
            body = asked(self.bundle, number, stream=True, partial_images=20)
            await connection.start("POST", "/v1/images/generations", body)
            assert connection.reader is not None
            for _ in range(30):
                if not await connection.reader.read(256):
                    break
                await asyncio.sleep(0.05)

    async def damaged(self, number: int) -> None:
        """A body of which some bytes are others: an answer of any kind but a fault of the server."""
        body = bytearray(asked(self.bundle, number, n=1, best_of=1, top_k=5, top_p=0.9, size="auto"))
        for _ in range(self.random.randint(1, 6)):
            at = self.random.randrange(len(body))
            body[at : at + self.random.randint(0, 2)] = self.random.randbytes(self.random.randint(0, 3))
        path = self.random.choice(["images/generations", "caption", "score", "replay", "choices", "images/edits"])
        kind = "multipart/form-data; boundary=x" if self.random.random() < 0.1 else "application/json"
        async with connected(self.server.port) as connection:
            status, content = await connection.send("POST", f"/v1/{path}", bytes(body), kind)
        self.checked += 1
        if status >= 500 or (status >= 400 and b'"error"' not in content):
            self.wrong += 1
            print("  wrong answer:", status, content[:200], bytes(body))

    async def rows_in_use(self) -> float:
        async with connected(self.server.port) as connection:
            _, content = await connection.send("GET", "/metrics")
        values = re.findall(rb"^smalti_(?:rows_in_use|pending){.*} (\S+)$", content, re.MULTILINE)
        return sum(map(float, values))

    async def quiet(self) -> bool:
        """Whether nothing is in use, soon after the last client has gone."""
        for _ in range(200):
            if not await self.rows_in_use():
                return True
            await asyncio.sleep(0.1)
        return False


def measure_faults(bundle: str, quick: bool) -> int:
    """How many things went wrong that must not."""
    scale = 20 if quick else 1
    faults = 0
    with serving([bundle], "--capacity", "16", "--max-queue", "48") as server:
        run = Faults(server, bundle, random.Random(0))
        run.learn()
        for name, count, side_by_side, one in (
            ("clients cut off", 1000 // scale, 32, run.cut_off),
            ("slow readers", 64 // min(scale, 4), 32, run.read_slowly),
            ("damaged bodies", 10_000 // scale, 16, run.damaged),
            ("clients of a full queue", 500 // scale, 200, lambda number: _one(run, number)),
        ):
            run.checked = run.wrong = 0
            asyncio.run(run.keep_checking(run.many(count, side_by_side, one)))
            quiet = asyncio.run(run.quiet())
            left = "no row" if quiet else "A ROW"
            print(f"  {count} {name}: {run.checked} answers checked, {run.wrong} wrong, {left} left in use")
            faults += run.wrong + (not quiet)
        faults += asyncio.run(_kill(run))
        server.process.wait(10)
    with serving([bundle], port=server.port) as again:
        run.server, run.checked, run.wrong = again, 0, 0
        asyncio.run(_check_all(run))
        print(f"  started again at its port: {run.checked} answers checked, {run.wrong} wrong")
        faults += run.wrong
    return faults


async def _one(run: Faults, number: int) -> None:
    async with connected(run.server.port) as connection:
        await run.check(connection, run.numbers[number % len(run.numbers)])


async def _check_all(run: Faults) -> None:
    await asyncio.gather(*(_one(run, number) for number in run.numbers))


async def _kill(run: Faults) -> int:
    """Kills the server under load; how many clients were told something that is not so."""
    errors, wrong_before = 0, run.wrong

    async def client(number: int) -> None:
        nonlocal errors
        try:
            while True:
                await _one(run, number)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            errors += 1

    clients = [asyncio.ensure_future(client(i)) for i in range(16)]
    await asyncio.sleep(1)
    run.server.process.send_signal(signal.SIGKILL)
    await asyncio.wait_for(asyncio.gather(*clients), 30)
    wrong = run.wrong - wrong_before
    print(f"  killed under load: {errors} of 16 clients got an error, {wrong} a wrong answer")
    return wrong + (errors != 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", default="digits,emoji")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0, metavar="REQUESTS", help="10000 for the whole measure")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the faults, one short round")
    options = parser.parse_args()
    bundles = options.bundles.split(",")
    if options.faults:
        print("faults:")
        if faults := sum(measure_faults(bundle, options.quick) for bundle in bundles[:1]):
            raise SystemExit(f"{faults} things went wrong")
        return
    with serving(bundles) as server:
        for bundle in bundles:
            seconds, rounds = (2.0, 1) if options.quick else (options.seconds, options.rounds)
            measure_load(server, bundle, seconds, rounds)
        if options.memory:
            measure_memory(server, bundles[0], options.memory)


if __name__ == "__main__":
    main()
