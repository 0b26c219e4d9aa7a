"""Parts done by a pool of actors of a Ray cluster, through Ray Data: the extra `smalti[ray]`.

Ray gets numbers of parts and gives them back; tables are written by the actors, by our own writer, into a folder that
every machine of the cluster sees. So an actor that dies, and a part that Ray hands out twice, change nothing: a part
that is there is not done again, and one that is half done has no name yet. Ray's own parquet writer would append what
it does twice, and its tensor columns are not the table's schema.
"""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from smalti.data.parts import Job
from smalti.errors import InputError, first_line

DEADLINE_S = 900.0
"""Without a part finished, after which a job is given up: what it waits for may never come."""
PART, FAULT = "part", "fault"


class _Actor:
    """Does parts one after the other."""

    def __init__(self, job: Job, num_threads: int):
        torch.set_num_threads(num_threads)
        self.job = job

    def __call__(self, numbers: pa.Table) -> pa.Table:
        faults: list[str | None] = []
        for part in numbers[PART].to_pylist():
            try:
                if not self.job.file(part).exists():
                    self.job.do(part)
                faults.append(None)
            except InputError as error:  # for whoever asked, and not to be tried again
                faults.append(str(error))
        return numbers.append_column(FAULT, pa.array(faults, pa.string()))


def do_parts_on_ray(
    job: Job, parts: list[int], *, actors: int, cpus: int | None = None, deadline_s: float = DEADLINE_S
) -> Iterator[None]:
    """Yields behind each part. `cpus` are an actor's; by default the actors share the cluster's evenly. Joins the
    cluster that RAY_ADDRESS names, or one that is running here, or else makes one of this machine.

    Raises InputError where the cluster has too few CPUs, where no part is finished for `deadline_s`, saying what is
    waited for, or as a part does.
    """
    if not parts:
        return
    ray = _import_ray()
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": max(actors, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    try:
        total = int(ray.cluster_resources().get("CPU", 0))
        cpus = cpus or max(1, total // actors)
        if actors * cpus > total:
            raise InputError(
                f"{actors} actors of {cpus} CPUs do not fit a cluster of {total}: it would wait without end. Give "
                f"--workers {max(1, total // cpus)} or fewer, or add machines."
            )
        yield from _waited_for(_finished(ray, job, parts, actors, cpus), deadline_s, ray, actors, cpus)
    finally:
        if ours:
            ray.shutdown()


def _finished(ray: Any, job: Job, parts: list[int], actors: int, cpus: int) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A block a part: numbers go to whichever actor is free, and back one by one.
    numbers = ray.data.from_arrow([pa.table({PART: pa.array([part], pa.int64())}) for part in parts])
    done = numbers.map_batches(
        _Actor,
        fn_constructor_args=(job, cpus),
        batch_size=1,
        batch_format="pyarrow",  # as it is: numpy batches turn lists into tensors
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(parts))),
        num_cpus=cpus,
    )
    for batch in done.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _waited_for(rows: Iterator[dict[str, Any]], deadline_s: float, ray: Any, actors: int, cpus: int) -> Iterator[None]:
    """What comes of the cluster, taken by a thread, so that waiting has an end."""
    found: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def take() -> None:
        try:
            for row in rows:
                found.put(row)
            found.put(None)
        except BaseException as error:  # for the loop to raise
            found.put(error)

    threading.Thread(target=take, name="smalti-ray", daemon=True).start()
    while True:
        try:
            row = found.get(timeout=deadline_s)
        except queue.Empty:
            free = ray.available_resources().get("CPU", 0)
            raise InputError(
                f"no part was finished for {deadline_s:,.0f} s: {actors} actors want {cpus} CPUs each, and {free:g} of "
                f"the cluster's {ray.cluster_resources().get('CPU', 0):g} are free. See what holds them (ray status), "
                "or give fewer workers; what is done is kept."
            ) from None
        if row is None:
            return
        if isinstance(row, BaseException):
            raise InputError(f"Ray gave up: {first_line(row)}. Start the command again: what is done is kept.") from row
        if row[FAULT] is not None:
            raise InputError(row[FAULT])
        yield None


def _import_ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("this needs ray, which is in an extra: pip install 'smalti[ray]'.") from error
    return ray
