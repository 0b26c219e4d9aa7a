"""Two threads a bundle: one steps the engine and does nothing else, one has answers made of what was drawn.

Jobs come from an event loop and their results go back to it. Whatever a job asks for, the engine's thread looks for new
and given-up jobs before every step: a job that is given up leaves its rows, the guided one of a pair with its null row,
before the next token of anybody is drawn.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from smalti.engine.engine import Engine
from smalti.engine.sampling import SampleConfig
from smalti.errors import first_line
from smalti.sequences.request import Generated, Request
from smalti.serve.metrics import Metrics
from smalti.serve.openai_api import ApiError
from smalti.serve.painter import Painter
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.images import Pipeline

_log = logging.getLogger(__name__)

IDLE_SECONDS = 0.1
"""How long the engine's thread waits for a job at most before it looks whether it is to end."""


class QueueFull(Exception):
    """There is no room for a job now; `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: int):
        self.retry_after_s = retry_after_s
        super().__init__("the queue is full")


class EngineFailed(Exception):
    """A fault of ours: what was being drawn is lost, and the engine starts anew."""


class EngineRequest(NamedTuple):
    """What a job has the engine draw."""

    request: Request
    config: SampleConfig


Served = Pipeline | ClassPipeline | FeaturePipeline
"""What a server draws with."""


class PartialAnswer(NamedTuple):
    """A partial picture of a job, as its `partial` made it."""

    number: int
    answer: Any


class Job:
    """Sequences that are drawn for one answer, or none where the answer needs no drawing.

    `finish` makes the answer of the finished sequences, `partial` of a picture's first codes each time as many as in
    `marks` are there; both run on the bundle's second thread.
    """

    def __init__(
        self,
        drawings: Sequence[EngineRequest],
        finish: Callable[[list[Generated]], Any],
        *,
        partial: Callable[[list[int]], Any] | None = None,
        marks: Sequence[int] = (),
    ):
        self.drawings, self.finish, self.partial, self.marks = list(drawings), finish, partial, deque(marks)
        self.size = max(1, len(self.drawings))
        self.loop = asyncio.get_running_loop()
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.started_at = time.perf_counter()
        self.is_over = False  # read and written by the event loop alone
        self.given_up = False
        self.found: dict[int, Generated] = {}
        self.codes: list[int] = []
        self.num_partials = 0
        self.work: deque[Callable[[], Any]] = deque()

    async def next(self) -> Any:
        """The next partial picture, or the answer. Raises what went wrong."""
        message = await self.messages.get()
        if isinstance(message, BaseException):
            raise message
        return message

    async def answer(self) -> Any:
        """The answer, without what comes before it."""
        while isinstance(found := await self.next(), PartialAnswer):
            pass
        return found


class Worker:
    """A bundle's engine and its two threads. Its methods are called from the event loop.

    `capacity` sequences are drawn at once; `max_queue` more may wait. Work that is no drawing counts as one sequence.
    """

    def __init__(
        self,
        pipe: Served,
        metrics: Metrics,
        painter: Painter,
        *,
        capacity: int,
        max_queue: int,
        executor: str | None = None,
    ):
        self.pipe, self.metrics, self.painter, self.name = pipe, metrics, painter, pipe.name
        self.capacity, self.limit = capacity, capacity + max_queue
        self.new_engine = lambda: Engine(pipe.model, pipe.layout, capacity=capacity, executor=executor)
        self.engine = self.new_engine()
        self.executor = self.engine.executor.name
        self.steps, self.tokens = (counter.labels(self.name) for counter in (metrics.steps, metrics.tokens))
        self.pending = 0
        self.job_s = 1.0  # a moving average
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.tickets: dict[int, tuple[Job, int]] = {}
        self.ready: deque[Job] = deque()  # jobs with work for the second thread
        self.changed = threading.Condition()
        self.is_closed = False
        for gauge, read in (
            ("queue", lambda: len(self.engine.waiting)),
            ("pending", lambda: self.pending),
            ("rows", lambda: self.rows_in_use),
            ("capacity", lambda: capacity),
        ):
            metrics.watch(self.name, gauge, read)
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._draw, self._make_answers)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Ends both threads; jobs that are not done are never answered."""
        self.is_closed = True
        self.commands.put(lambda: None)
        with self.changed:
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    @property
    def rows_in_use(self) -> int:
        return len(self.engine.active) + len(self.engine.guided)

    # From the event loop ---------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Takes a job in. Raises QueueFull if there is no room for all of it; nothing of it is done then."""
        if self.pending + job.size > self.limit:
            self.metrics.refusals.labels(self.name).inc()
            raise QueueFull(self._retry_after_s())
        self.pending += job.size
        if job.drawings:
            self.commands.put(lambda: self._enter(job))
        else:
            self._hand_over(job, lambda: job.finish([]))

    def give_up(self, job: Job) -> None:
        """Forgets a job that nobody waits for; its rows are free before the next step. Of one that is over, nothing."""
        if not job.is_over:
            job.given_up = True
            self.commands.put(lambda: self._cancel(job))
            self.metrics.cancellations.labels(self.name).inc()
            self._end(job)

    def _end(self, job: Job, message: Any = None) -> None:
        if not job.is_over:
            job.is_over = True
            self.pending -= job.size
            job.messages.put_nowait(message)

    def _retry_after_s(self) -> int:
        """When some of what is ahead is done: as long as jobs took of late."""
        return max(1, min(60, round(self.job_s)))

    # The engine's thread ---------------------------------------------------------------------------------------

    def _draw(self) -> None:
        while not self.is_closed:
            self._obey()
            if self.engine.is_idle:
                continue
            try:
                events = self.engine.step()
                self._take(events)
            except Exception as error:
                _log.exception("the engine of %s failed; it starts anew", self.name)
                self._start_anew(error)

    def _obey(self) -> None:
        """Does what the event loop asked for; waits for it where there is nothing to draw."""
        if self.engine.is_idle:
            with contextlib.suppress(queue.Empty):
                self.commands.get(timeout=IDLE_SECONDS)()
        while not self.commands.empty():  # this thread alone takes from it
            self.commands.get()()

    def _enter(self, job: Job) -> None:
        if job.given_up:
            return
        entered: list[int] = []
        try:
            for number, (request, config) in enumerate(job.drawings):
                entered.append(self.engine.submit(request, config))
                self.tickets[entered[-1]] = job, number
        except Exception as error:  # what does not fit the layout is found here
            self._cancel(job)
            self._fail(job, error)
            return
        if job.marks:
            job.codes = job.drawings[0].request.given.get("image", torch.zeros(0)).tolist()
        self._take_finished()

    def _cancel(self, job: Job) -> None:
        for ticket in [ticket for ticket, (owner, _) in self.tickets.items() if owner is job]:
            del self.tickets[ticket]
            self.engine.cancel(ticket)

    def _take(self, events: Sequence[Any]) -> None:
        self.steps.inc()
        self.tokens.inc(len(events))
        image = self.pipe.layout.vocabulary["image"]
        for event in events:
            job, _ = self.tickets[event.ticket]
            if job.marks and image.offset <= event.token_id < image.end:
                job.codes.append(event.token_id - image.offset)
                if len(job.codes) >= job.marks[0]:
                    job.marks.popleft()
                    self._hand_over(job, self._partial_of(job, list(job.codes)))
        self._take_finished()

    def _take_finished(self) -> None:
        for ticket in list(self.engine.finished):
            job, number = self.tickets.pop(ticket)
            job.found[number] = self.engine.take(ticket)
            if len(job.found) == len(job.drawings):
                found = [job.found[i] for i in range(len(job.drawings))]
                self._hand_over(job, lambda job=job, found=found: job.finish(found))

    def _partial_of(self, job: Job, codes: list[int]) -> Callable[[], Any]:
        number, partial = job.num_partials, job.partial
        job.num_partials += 1
        assert partial is not None
        return lambda: PartialAnswer(number, partial(codes))

    def _start_anew(self, error: Exception) -> None:
        for job in {id(job): job for job, _ in self.tickets.values()}.values():
            self._fail(job, EngineFailed(f"the engine failed: {first_line(error)}"))
        self.tickets.clear()
        self.engine = self.new_engine()

    # The thread that makes answers -----------------------------------------------------------------------------

    def _hand_over(self, job: Job, work: Callable[[], Any]) -> None:
        with self.changed:
            job.work.append(work)
            if len(job.work) == 1:
                self.ready.append(job)
            self.changed.notify()

    def _make_answers(self) -> None:
        while not self.is_closed:
            with self.changed:
                if not self.ready:
                    self.changed.wait(IDLE_SECONDS)
                    continue
                job = self.ready.popleft()
                work = job.work[0]
            if not job.given_up:
                try:
                    self._post(job, work())
                except Exception as error:  # the job's, and not the thread's
                    self._fail(job, error)
            with self.changed:  # one piece of work a turn: many partial pictures of one job hold up nobody
                job.work.popleft()
                if job.work:
                    self.ready.append(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, ValueError | ApiError):  # those tell the user what to do
            self.metrics.failures.labels(self.name).inc()
        self._post(job, error)

    def _post(self, job: Job, message: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            job.loop.call_soon_threadsafe(self._receive, job, message)

    def _receive(self, job: Job, message: Any) -> None:
        if job.is_over:
            return
        elapsed_s = time.perf_counter() - job.started_at
        if isinstance(message, PartialAnswer):
            if message.number == 0:
                self.metrics.first_partial.labels(self.name).observe(elapsed_s)
            job.messages.put_nowait(message)
            return
        if not isinstance(message, Exception):
            self.metrics.seconds.labels(self.name).observe(elapsed_s)
            self.job_s += 0.1 * (elapsed_s - self.job_s)
        self._end(job, message)
