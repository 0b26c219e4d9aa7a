"""The order of rows: every row once an epoch, resumed from the step alone."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.data.loader import batches, prefetch, row_order


def take(iterator, count: int) -> list[list[int]]:
    return [rows.tolist() for rows in itertools.islice(iterator, count)]


@given(num_rows=st.integers(1, 50), epoch=st.integers(0, 3), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_of_its_seed(num_rows: int, epoch: int, seed: int) -> None:
    order = row_order(num_rows, epoch, seed)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_rows))
    assert np.array_equal(order, row_order(num_rows, epoch, seed))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(row_order(101, epoch, seed)) for epoch in range(5) for seed in range(3)}
    assert len(orders) == 15


@given(num_rows=st.integers(1, 23), batch_size=st.integers(1, 37), seed=st.integers(0, 9))
def test_the_stream_is_the_epochs_joined(num_rows: int, batch_size: int, seed: int) -> None:
    """Also when a batch is larger than the table, or reaches over the end of an epoch."""
    stream = list(itertools.chain(*take(batches(num_rows, batch_size, seed), 7)))
    epochs = [row_order(num_rows, epoch, seed) for epoch in range(len(stream) // num_rows + 1)]
    assert stream == np.concatenate(epochs)[: len(stream)].tolist()


@given(num_rows=st.integers(1, 23), batch_size=st.integers(1, 37), start_step=st.integers(0, 11))
def test_a_later_start_is_the_rest_of_the_stream(num_rows: int, batch_size: int, start_step: int) -> None:
    whole = take(batches(num_rows, batch_size, 3), start_step + 5)
    assert take(batches(num_rows, batch_size, 3, start_step), 5) == whole[start_step:]


def test_three_million_rows() -> None:
    (rows,) = take(batches(3_000_017, 1_000_003, seed=5, start_step=7), 1)
    # 7 * 1,000,003 = 2 * 3,000,017 + 999,987: the third epoch.
    assert rows == row_order(3_000_017, 2, 5)[999_987 : 999_987 + 1_000_003].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "num_rows 0 and batch_size 4 must be at least 1"),
        ((9, 0, 0), "num_rows 9 and batch_size 0 must be at least 1"),
        ((9, 4, 0, -1), "start_step -1 at least 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(*arguments)


@given(count=st.integers(0, 13), num_ready=st.integers(1, 5))
def test_prefetch_keeps_items_and_order(count: int, num_ready: int) -> None:
    assert list(prefetch(range(count), num_ready)) == list(range(count))


def test_prefetch_works_ahead_but_not_further_than_asked() -> None:
    made: list[int] = []
    third = threading.Event()

    def items():
        for item in itertools.count():
            made.append(item)
            if item == 2:
                third.set()
            yield item

    iterator = prefetch(items(), num_ready=3)
    assert next(iterator) == 0
    assert third.wait(timeout=30)  # made while nobody asked
    assert len(made) <= 4
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "smalti-prefetch"]


def test_prefetch_raises_where_the_item_would_have_been() -> None:
    iterator = prefetch(1 / (3 - item) for item in range(5))
    assert [next(iterator) for _ in range(3)] == [1 / 3, 1 / 2, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(iterator)


def test_prefetch_needs_room_for_one() -> None:
    with pytest.raises(ValueError, match="num_ready 0 must be at least 1"):
        prefetch([1], num_ready=0)
