"""Generation over a layout, offline: many requests through one engine.

A `Request` says which order to follow and what is given of it; everything that is not given is generated, and at each
position only the ids that can stand there are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from smalti.engine.engine import Engine, Event
from smalti.engine.executors import choose_executor
from smalti.engine.sampling import SampleConfig
from smalti.models.base import SequenceModel, evaluating
from smalti.sequences.layout import Layout
from smalti.sequences.request import Generated, Request


def generate(
    model: SequenceModel,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
    executor: str | None = None,
) -> list[Generated]:
    """The requests' sequences, in their order, up to `batch_size` at once.

    `executor` is one of `EXECUTORS`; by default `job_executor` chooses. Raises ValueError for a request that does not
    fit the layout.
    """
    with evaluating(model):
        engine = _engine(model, layout, requests, config, batch_size, executor)
        engine.run()
    return [engine.take(ticket) for ticket in range(len(requests))]


def stream(
    model: SequenceModel,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
    executor: str | None = None,
) -> Iterator[Event]:
    """The same tokens as `generate`, as they come; an event's ticket is the number of its request."""
    with evaluating(model):
        engine = _engine(model, layout, requests, config, batch_size, executor)
        while not engine.is_idle:
            yield from engine.step()


def best_of(
    model: SequenceModel,
    layout: Layout,
    requests: Sequence[Request],
    num_candidates: int,
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
) -> list[list[Generated]]:
    """For each request, candidates with the seeds seed, seed + 1, ..., the most likely under the model first."""
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1.")
    copies = [replace(request, seed=request.seed + i) for request in requests for i in range(num_candidates)]
    found = generate(model, layout, copies, config, batch_size=batch_size)
    groups = [found[i : i + num_candidates] for i in range(0, len(found), num_candidates)]
    return [sorted(group, key=lambda candidate: -candidate.log_prob) for group in groups]


def job_executor(model: SequenceModel, layout: Layout, num_requests: int, batch_size: int = 64) -> str:
    """What so many requests run on if nothing else is asked for."""
    with evaluating(model):
        return choose_executor(model, -(-num_requests // max(1, batch_size)) * layout.max_length)


def _engine(
    model: SequenceModel,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig,
    batch_size: int,
    executor: str | None,
) -> Engine:
    """An engine that holds all the requests."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch holds at least one sequence.")
    executor = executor or job_executor(model, layout, len(requests), batch_size)
    capacity = max(1, min(batch_size, len(requests)))
    guided_capacity = 0 if config.guidance_scale == 1 else capacity
    engine = Engine(model, layout, capacity=capacity, guided_capacity=guided_capacity, executor=executor)
    for request in requests:
        engine.submit(request, config)
    return engine
