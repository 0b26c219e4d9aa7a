"""Which rows a training step sees, as a pure function of the step; and a thread that keeps batches ready.

The training set is an endless stream: epoch after epoch, each a fresh permutation of all rows. Step s takes the
stream's places [s * batch_size, (s + 1) * batch_size), so every batch is full, no row is left out, and the step number
alone says where to go on.
"""

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sized
from functools import lru_cache
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from smalti.data.streams import TokenStream

Item = TypeVar("Item")


def row_order(num_rows: int, epoch: int, seed: int) -> Int64[np.ndarray, " rows"]:
    """The order in which this epoch reads all rows: a permutation of 0 to num_rows - 1 drawn from (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batches(
    num_rows: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[Int64[np.ndarray, " batch_size"]]:
    """The row numbers of each step from `start_step` on, without end. Raises ValueError for sizes that cannot be."""
    if num_rows < 1 or batch_size < 1 or start_step < 0:
        raise ValueError(
            f"num_rows {num_rows} and batch_size {batch_size} must be at least 1, start_step {start_step} at least 0."
        )
    return _batches(num_rows, batch_size, seed, start_step)


def _batches(num_rows: int, batch_size: int, seed: int, start_step: int) -> Iterator[Int64[np.ndarray, " batch_size"]]:
    # Two epochs are needed at once only while a batch reaches from one into the next.
    order = lru_cache(maxsize=2)(lambda epoch: row_order(num_rows, epoch, seed))
    first = start_step * batch_size
    while True:
        epochs, places = np.divmod(np.arange(first, first + batch_size), num_rows)
        yield np.concatenate([order(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)])
        first += batch_size


def step_rows(pairs: Sized, batch_size: int, seed: int, start_step: int) -> Iterator[Int64[np.ndarray, " n"]]:
    """The rows of each step's batch from `start_step` on, without end, as `pairs` number them: see `batches`. A stream
    shuffles itself, so of it they are the next places."""
    if not isinstance(pairs, TokenStream):
        return batches(len(pairs), batch_size, seed, start_step)
    return (np.arange(step * batch_size, (step + 1) * batch_size) for step in itertools.count(start_step))


def prefetch(items: Iterable[Item], num_ready: int = 4) -> Generator[Item, None, None]:
    """The same items in the same order, up to `num_ready` of them made ahead by one thread, so that a loop over
    `prefetch(map(table.batch, batches(...)))` does not wait for its data.

    Whatever making an item raises is raised at its place in the loop. The thread ends with the items, or when the
    iterator is closed or no longer used.
    """
    if num_ready < 1:
        raise ValueError(f"num_ready {num_ready} must be at least 1.")
    return _prefetch(items, num_ready)


def _prefetch(items: Iterable[Item], num_ready: int) -> Generator[Item, None, None]:
    ready: deque[Item] = deque()
    failures: list[BaseException] = []
    finished = False
    changed = threading.Condition()

    def work() -> None:
        nonlocal finished
        try:
            for item in items:
                with changed:
                    ready.append(item)
                    changed.notify_all()
                    changed.wait_for(lambda: len(ready) < num_ready or finished)
                    if finished:
                        return
        except BaseException as error:  # for the loop to raise, where it can be seen
            failures.append(error)
        with changed:
            finished = True
            changed.notify_all()

    thread = threading.Thread(target=work, name="smalti-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ready or finished)
                if not ready:
                    break
                item = ready.popleft()
                changed.notify_all()
            yield item
        if failures:
            raise failures[0]
    finally:
        with changed:
            finished = True
            changed.notify_all()
        thread.join()
