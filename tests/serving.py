"""A server of tiny bundles on a port of this machine that is free, in a thread of the test's own process."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import uvicorn
from PIL import Image
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.serve.app import ServeConfig
from smalti.serve.run import bound_socket, make_server, make_service
from smalti.serve.worker import Served, Worker


class Running:
    """A server that runs while the block does."""

    def __init__(self, *pipes: Served, **settings: Any):
        config = ServeConfig(**({"capacity": 8, "executor": "packed", "paint_apart": False} | settings))
        self.pipes = {pipe.name: pipe for pipe in pipes or (tiny_pipeline(), tiny_bpe_pipeline())}
        self.service = make_service(list(self.pipes.values()), config)
        self.socket = bound_socket("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server: uvicorn.Server = make_server(self.service)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> Worker:
        return next(iter(self.service.workers.values()))

    def __enter__(self) -> "Running":
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, answer (of JSON: its value) and headers of a plain request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"} | (headers or {})
        content = body if isinstance(body, bytes | None) else json.dumps(body)
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            found, kind = response.read(), response.headers.get("content-type", "")
            return response.status, json.loads(found) if "json" in kind else found, dict(response.headers)
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"smalti_{name}", labels) or 0.0


class Gate:
    """Lets a worker's engine step as often as it is told, and counts."""

    def __init__(self, worker: Worker):
        self.permits, self.num_steps, self.is_open = threading.Semaphore(0), 0, False
        step = worker.engine.step

        def gated() -> Any:
            while not (self.is_open or self.permits.acquire(timeout=0.01)):
                if worker.is_closed or not worker.commands.empty():
                    return []  # the engine's thread looks for commands between steps, and so it does here
            self.num_steps += 1
            return step()

        worker.engine.step = gated  # type: ignore[method-assign]

    def let(self, num_steps: int) -> None:
        before = self.num_steps
        for _ in range(num_steps):
            self.permits.release()
        wait_until(lambda: self.num_steps >= before + num_steps)


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Fails if it does not come true."""
    ends_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends_at, "it did not come true"
        time.sleep(0.005)


def picture_of(b64_json: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    picture.load()
    return picture


def png_of(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", **options)
    return file.getvalue()
