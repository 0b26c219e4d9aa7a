"""The service: routes, keys, bounds, deadlines. A request becomes a job of a `Worker`; who waits for a job that nobody
can answer any more gives it up.

No path, name or address of a request reaches the file system: bundles are loaded when the server starts, the files of
the page are read then too, and a receipt's bundle is known by the hash of its weights.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smalti.bundle import smalti_version
from smalti.documents import parse_json
from smalti.errors import InputError
from smalti.serve import answers
from smalti.serve.metrics import Metrics
from smalti.serve.openai_api import (
    ApiError,
    Body,
    CaptionRequest,
    ChoiceRequest,
    EditRequest,
    ImageRequest,
    ReplayRequest,
    ScoreRequest,
    parsed,
)
from smalti.serve.painter import Painter
from smalti.serve.worker import Job, PartialAnswer, QueueFull, Served, Worker
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.images import Pipeline

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
MAX_FORM_FIELDS = 64
BODY_SECONDS = 30
"""A request that takes longer to send is given up."""
SLOW_READER_SECONDS = 10
"""How long after its deadline a stream may take to be read."""
OPEN_ROUTES = ("/healthz", "/", "/page.js", "/page.css")
"""What needs no key: it tells nothing but that the server runs."""
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server is run. The defaults are those of the command line."""

    capacity: int = 64
    """Sequences that a bundle draws at once."""
    max_queue: int = 256
    """Sequences that may wait for a row."""
    deadline_s: float = 120.0
    """After so long nobody waits for an answer; a request may ask for less."""
    max_requests: int = 512
    """Requests that are open at once, with what is sent of them in memory."""
    executor: str | None = None
    paint_apart: bool = True
    """Whether pictures of codes are made in a process of their own, where there is more than one processor."""
    api_key: str | None = None
    text_encoder: str | None = None
    """Folder of the T5 encoder of bundles that read captions as features, or the hub's owner/name; None: what each
    names."""

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("max_queue", 0), ("max_requests", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.deadline_s <= 86400:
            raise ValueError(f"deadline_s is {self.deadline_s}; expected seconds up to a day.")
        if self.api_key == "":
            raise ValueError("the API key is empty: anybody could send it.")


class Service:
    """What the routes share."""

    def __init__(self, workers: Sequence[Worker], painter: Painter, metrics: Metrics, config: ServeConfig):
        self.workers = {worker.name: worker for worker in workers}
        self.painter, self.metrics, self.config = painter, metrics, config
        self.started_at = int(time.time())
        metrics.start(list(self.workers))

    def worker(self, model: str | None) -> Worker:
        """The bundle of that name; the first if none is named."""
        if model is None:
            return next(iter(self.workers.values()))
        if model not in self.workers:
            raise ApiError(
                404,
                f"The model {model!r} is not served here; there are {', '.join(self.workers)}.",
                param="model",
                code="model_not_found",
            )
        return self.workers[model]

    def deadline(self, asked_s: float | None) -> float:
        """When nobody waits any more, by the event loop's clock."""
        seconds = self.config.deadline_s if asked_s is None else min(asked_s, self.config.deadline_s)
        return asyncio.get_running_loop().time() + seconds

    async def answer(self, request: Request, worker: Worker, job: Job, deadline: float) -> Any:
        """The job's answer. Given up where the client is gone or the deadline has passed."""
        submit(worker, job)
        try:
            return await _unless_gone(request, job.answer(), deadline)
        finally:
            worker.give_up(job)

    def described(self, worker: Worker) -> dict[str, Any]:
        """A model as the API lists it, with what a client needs to know to draw with it."""
        pipe = worker.pipe
        config = pipe.sampling.picture
        about = {
            "width": pipe.pictures.width,
            "height": pipe.pictures.height,
            "scale": pipe.pictures.scale,
            "grid": list(pipe.grid),
            "can_caption": pipe.bundle.can_caption,
            "can_edit": isinstance(pipe, Pipeline) and pipe.has_patches,
            "executor": worker.executor,
            **_prompts_of(pipe),
            "temperature": config.temperature,
            "guidance_scale": config.guidance_scale,
            "weights_sha256": pipe.weights_sha256,
            "smalti_version": smalti_version(),
        }
        return {"id": worker.name, "object": "model", "created": self.started_at, "owned_by": "smalti", "smalti": about}


def _prompts_of(pipe: Served) -> dict[str, Any]:
    """What may be asked for: so many tokens, or one of the classes, by its number or name."""
    if isinstance(pipe, ClassPipeline):
        return {"num_classes": pipe.classes.num, "class_names": pipe.classes.names}
    if isinstance(pipe, FeaturePipeline):
        return {"max_prompt_tokens": pipe.reader.num_features}
    return {"max_prompt_tokens": pipe.layout[pipe.bundle.order("text", "image")].span("text").length}


def create_app(service: Service) -> FastAPI:
    """The application. Its workers start and end with it."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        for worker in service.workers.values():
            worker.start()
        yield
        for worker in service.workers.values():
            await asyncio.to_thread(worker.close)
        await asyncio.to_thread(service.painter.close)

    app = FastAPI(title="smalti", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _error)
    app.add_exception_handler(ValueError, _error)  # InputError too: what a bundle or its settings do not take
    app.add_exception_handler(HTTPException, _error)
    app.add_exception_handler(Exception, _error)
    app.add_exception_handler(ClientGone, _error)
    _add_api(app, service)
    _add_own(app, service)
    _add_page(app)
    app.add_middleware(Guard, service=service)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    """What OpenAI's API has too."""

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.described(one) for one in service.workers.values()]})

    @app.get("/v1/models/{model}")
    async def model(model: str) -> Response:
        return JSONResponse(service.described(service.worker(model)))

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        body = await _json(request, ImageRequest)
        worker, deadline, features = service.worker(body.model), service.deadline(body.deadline_s), None
        if isinstance(worker.pipe, FeaturePipeline):
            features = await service.answer(request, worker, answers.features_job(worker.pipe, body), deadline)
        checked = answers.CheckedRequest(worker, body, features=features)
        return await _draw(service, request, checked, body, "image_generation", deadline)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        body, image, mask = await _edit_form(request)
        worker, deadline = service.worker(body.model), service.deadline(body.deadline_s)
        upload = await service.answer(request, worker, answers.upload_job(worker, image, mask), deadline)
        return await _draw(service, request, answers.CheckedRequest(worker, body, upload), body, "image_edit", deadline)


async def _draw(
    service: Service,
    request: Request,
    drawn: answers.CheckedRequest,
    body: ImageRequest,
    name: str,
    deadline: float | None = None,
) -> Response:
    deadline = deadline or service.deadline(body.deadline_s)
    job, worker = drawn.job(), drawn.worker
    if not body.stream:
        return JSONResponse(await service.answer(request, worker, job, deadline))
    shared = {"background": "opaque", "quality": "auto", "output_format": drawn.format, "size": drawn.size}

    async def events() -> AsyncIterator[bytes]:
        while True:
            try:
                found = await _by(deadline, job.next())
            except Exception as error:
                yield _event("error", _api_error(error).content)
                return
            now = {"created_at": int(time.time()), **shared}
            if isinstance(found, PartialAnswer):
                kind = f"{name}.partial_image"
                yield _event(kind, {"type": kind, **found.answer, "partial_image_index": found.number, **now})
                continue
            kind = f"{name}.completed"
            yield _event(kind, {"type": kind, **found["data"][0], **now, "usage": found["usage"]})
            return

    submit(worker, job)
    return EventStream(events(), lambda: worker.give_up(job), deadline + SLOW_READER_SECONDS)


def submit(worker: Worker, job: Job) -> None:
    """Takes a job in. Raises ApiError 429 where there is no room."""
    try:
        worker.submit(job)
    except QueueFull as full:
        raise ApiError(
            429,
            f"The queue of {worker.name} is full; try again in {full.retry_after_s} s.",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(full.retry_after_s)},
        ) from full


def _add_own(app: FastAPI, service: Service) -> None:
    """What only smalti has."""

    @app.post("/v1/caption")
    async def caption(request: Request) -> Response:
        body = await _json(request, CaptionRequest)
        worker, deadline = service.worker(body.model), service.deadline(body.deadline_s)
        if not worker.pipe.bundle.can_caption:
            raise ApiError(400, f"{worker.name} writes no captions: it never learned p(caption | picture).")
        codes = await service.answer(
            request, worker, answers.codes_job(worker, answers.file_bytes(body.image)), deadline
        )
        return JSONResponse(await service.answer(request, worker, answers.caption_job(worker, body, codes), deadline))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await _json(request, ScoreRequest)
        worker, deadline = service.worker(body.model), service.deadline(body.deadline_s)
        job = answers.score_job(worker, body, answers.file_bytes(body.image))
        return JSONResponse(await service.answer(request, worker, job, deadline))

    @app.post("/v1/replay")
    async def replay(request: Request) -> Response:
        body = await _json(request, ReplayRequest)
        worker, deadline = service.worker(body.model), service.deadline(body.deadline_s)
        reading = answers.receipts_job(worker, answers.file_bytes(body.image))
        picture, receipts = await service.answer(request, worker, reading, deadline)
        worker = answers.worker_of_receipts(list(service.workers.values()), receipts)
        requests = await service.answer(request, worker, answers.requests_job(worker, receipts), deadline)
        job = answers.replay_job(worker, picture, receipts, requests)
        return JSONResponse(await service.answer(request, worker, job, deadline))

    @app.post("/v1/choices")
    async def choices(request: Request) -> Response:
        body = await _json(request, ChoiceRequest)
        worker, deadline = service.worker(body.model), service.deadline(body.deadline_s)
        return JSONResponse(await service.answer(request, worker, answers.choice_job(worker, body), deadline))

    @app.get("/healthz")
    async def health() -> Response:
        broken = [worker.name for worker in service.workers.values() if not worker.is_alive]
        status = {"status": "broken", "models": broken} if broken else {"status": "ok"}
        return JSONResponse(status, 503 if broken else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("smalti.serve") / "page"
    for route, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

        def serve(content: bytes = content, kind: str = kind, headers: dict[str, str] = headers) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

        app.add_api_route(route, serve, methods=["GET"], response_model=None)


# Reading requests ----------------------------------------------------------------------------------------------


async def _json(request: Request, kind: type[Body]) -> Body:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the body as JSON, with Content-Type: application/json.")
    return parsed(kind, parse_json(await request.body(), "the body", "send a JSON object"))


async def _edit_form(request: Request) -> tuple[EditRequest, bytes, bytes | None]:
    """The fields, the picture, and the mask, if there is one."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "Send the picture in a form, with Content-Type: multipart/form-data.")
    files: dict[str, bytes] = {}
    fields: dict[str, Any] = {}
    async with request.form(max_files=3, max_fields=MAX_FORM_FIELDS, max_part_size=2**16) as form:
        for name, value in form.multi_items():
            if name in files or name in fields or (name == "image[]" and "image" in files):
                raise ApiError(400, f"{name!r} is given more than once; one is edited at a time.", param=name)
            if isinstance(value, str):
                fields[name] = value
            elif name in ("image", "image[]", "mask"):
                files["mask" if name == "mask" else "image"] = await value.read()
            else:
                raise ApiError(400, f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    body = parsed(EditRequest, fields)
    if "image" not in files:
        raise ApiError(400, "Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
    return body, files["image"], files.get("mask")


class ClientGone(Exception):
    """Nobody is there to read the answer."""


async def _by(deadline: float, waiting: Awaitable[Found]) -> Found:
    try:
        async with asyncio.timeout_at(deadline):
            return await waiting
    except TimeoutError as error:
        raise ApiError(
            504, "The deadline passed before the answer was there.", kind="timeout_error", code="deadline_exceeded"
        ) from error


async def _unless_gone(request: Request, waiting: Awaitable[Found], deadline: float) -> Found:
    """What is waited for, unless the client goes away."""
    answer, gone = asyncio.ensure_future(_by(deadline, waiting)), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Answers -------------------------------------------------------------------------------------------------------


def _event(name: str, content: dict[str, Any]) -> bytes:
    """As server-sent events are written."""
    return f"event: {name}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """Server-sent events, until all are sent, the client is gone, or it reads too slowly; then `close` is called."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], deadline: float):
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self.events, self.close, self.deadline = events, close, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_disconnected(receive))]
        try:
            async with asyncio.timeout_at(self.deadline):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=dict(error.headers or {}))
    if isinstance(error, ValueError):  # what was asked for does not fit the bundle: it is told in words
        return ApiError(400, str(error) if isinstance(error, InputError) else " ".join(str(error).split()))
    if isinstance(error, ClientGone):
        return ApiError(499, "The client is gone.")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed at this request; its log says where.", kind="server_error")


async def _error(_: Request, error: Exception) -> Response:
    found = _api_error(error)
    return JSONResponse(found.content, found.status, headers=found.headers)


class Guard:
    """What every request passes before a route sees it: how many are open, the key, the size of its body; counts its
    answer."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service, self.num_open = app, service, 0
        key = service.config.api_key
        self.key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.num_open += 1
        try:
            self._check(scope)
            await self.app(scope, await _whole_body(scope, receive), counted)
        except ApiError as error:
            await JSONResponse(error.content, error.status, headers=error.headers)(scope, receive, counted)
        except ClientGone:
            status = 499
        except Exception:
            status = 500
            raise
        finally:
            self.num_open -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        if self.num_open > self.service.config.max_requests:
            raise ApiError(
                429, "Too many requests are open.", kind="rate_limit_error", code="too_many_requests",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        if self.key is None or scope["path"] in OPEN_ROUTES:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self.key):
            raise ApiError(
                401, "Incorrect API key: send it as Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing takes equal time."""
    return hashlib.sha256(key).digest()


async def _whole_body(scope: Scope, receive: Receive) -> Receive:
    """Reads the body within its bounds; what is returned gives it in one piece, and then waits for the client to go."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    too_large = ApiError(413, f"The body is larger than {MAX_BODY_BYTES:,} bytes.", code="body_too_large")
    if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS} s.", code="body_too_slow") from error
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replayed
