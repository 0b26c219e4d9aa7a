"""Work that lies in parts beside its output, each a file that is written whole: what was stopped or killed at any
moment is done again where a part is missing, and nowhere else. Parts are done by this process, by others of this
machine, or by actors of a Ray cluster; who does them, and how often, changes nothing in them.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from smalti.documents import read_json
from smalti.errors import InputError
from smalti.files import lock_of, locked, write_json

MANIFEST = "manifest.json"


class Job(Protocol):
    """What a process needs to do a part; it is pickled for other processes."""

    def file(self, part: int) -> Path:
        """Where a part lies."""
        ...

    def do(self, part: int) -> None:
        """Writes a part, whole or not at all."""
        ...


def parts_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def remove_leftovers(output: Path, last: Path | None = None) -> None:
    """What a run left that was killed behind its last step, when its output was whole: the file `last` is written last,
    by default the output itself. Parts that are newer than it belong to a run with `force`."""
    folder, last = parts_folder(output), last or output
    lock = lock_of(folder)
    if not last.is_file() or not (folder.exists() or lock.exists()):
        return
    with suppress(InputError), locked(lock, output):  # held by another process: the output is refused behind this
        written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
        if folder.is_dir() and max(written, default=0) <= last.stat().st_mtime_ns:
            shutil.rmtree(folder)


def claim(
    folder: Path,
    manifest: dict[str, Any],
    require_same: Callable[[dict[str, Any], dict[str, Any]], None],
    check: Callable[[Path], None],
    *,
    force: bool,
) -> dict[str, Any]:
    """Makes the folder of parts, or checks that the parts in it are of this run: `require_same` raises InputError where
    the manifest found there is another, `check` where a part is damaged. With `force` others are removed. Returns the
    manifest that the folder has."""
    manifest = json.loads(json.dumps(manifest))
    path = folder / MANIFEST
    if path.exists():
        try:
            found = read_json(path, f"remove the folder {folder}, or start anew with --force")
            if found != manifest:
                require_same(found, manifest)
            for part in sorted(folder.glob("*.parquet")):
                check(part)
            return found
        except InputError:
            if not force:
                raise
    shutil.rmtree(folder, ignore_errors=True)
    write_json(path, manifest)
    return manifest


def do_parts(
    job: Job, parts: list[int], *, workers: int = 0, num_threads: int | None = None, ray: bool = False
) -> Iterator[None]:
    """Does these parts and yields behind each: by so many processes, or by as many actors of a Ray cluster; by this
    process if there are none. `num_threads` are a process's; by default processes share the machine's evenly."""
    if ray:
        from smalti.data.ray_parts import do_parts_on_ray

        yield from do_parts_on_ray(job, parts, actors=max(1, workers))
    elif not workers:
        with _threads(num_threads or torch.get_num_threads()):
            yield from map(job.do, parts)
    else:
        yield from _do_in_processes(job, parts, workers, num_threads or max(1, (os.cpu_count() or 1) // workers))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _do_in_processes(job: Job, parts: list[int], workers: int, num_threads: int) -> Iterator[None]:
    if not parts:
        return
    others = set(multiprocessing.active_children())
    # a fresh interpreter: threads of torch do not survive a fork
    pool = ProcessPoolExecutor(
        min(workers, len(parts)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job, num_threads, os.getpid()),
    )
    try:
        yield from pool.map(_do_in_worker, parts)
    except Exception:
        raise
    except BaseException:  # stopped: what the workers are at may take minutes, and is done again
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker_job: Job | None = None


def _start_worker(job: Job, num_threads: int, parent: int) -> None:
    global _worker_job
    _worker_job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: the command says so, a worker just ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(num_threads)


def _end_with(parent: int) -> None:
    """A worker whose command was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do_in_worker(part: int) -> None:
    assert _worker_job is not None
    _worker_job.do(part)
