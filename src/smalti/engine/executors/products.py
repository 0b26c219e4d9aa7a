"""Products of torch whose rows do not depend, to the last bit, on how many there are, and on how many threads.

A library's product may sum in another order for other numbers of rows. What it does here is found by trying.

Letters: B batch, D width, S slots, Dh head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.models.decode_state import SLOT_BLOCK

MOST_ROWS = 64
"""Rows of one product."""
QUERIES = 8
"""Tokens of a row that attend at once in a prefill."""


class ProductRows(NamedTuple):
    """A product's rows do not depend on their number where it is a multiple of `step`, `most` at the most."""

    step: int
    most: int


ROW_BY_ROW = ProductRows(1, 1)
"""What holds for any library."""


@cache
def product_rows(inputs: int, outputs: int, dtype: torch.dtype) -> ProductRows:
    """Found by trying: numbers of rows, and places of a row, for which the library rounds alike on one thread.

    The order of a sum does not depend on the numbers, so that one product of random ones tells.
    """
    with one_thread():
        x, weight, addend = _random_product(inputs, outputs, dtype)
        whole = torch.addmm(addend, x, weight), torch.mm(x, weight)
        shifted = torch.addmm(addend.roll(1, 0), x.roll(1, 0), weight), torch.mm(x.roll(1, 0), weight)
        if not all(torch.equal(one.roll(1, 0), other) for one, other in zip(whole, shifted, strict=True)):
            return ROW_BY_ROW
        for step in (1, 4, 8, 16, 32):
            if _agree(x, weight, addend, whole, step):
                return ProductRows(step, MOST_ROWS)
    return ProductRows(MOST_ROWS, MOST_ROWS)


@cache
def threads_agree(inputs: int, outputs: int, dtype: torch.dtype, num_threads: int) -> bool:
    """Whether so many threads, the number now in use, round as one does."""
    if num_threads == 1:
        return True
    step, most = product_rows(inputs, outputs, dtype)
    x, weight, addend = _random_product(inputs, outputs, dtype)
    x, addend = x[:most], addend[:most]
    with one_thread():
        whole = torch.addmm(addend, x, weight), torch.mm(x, weight)
    return _agree(x, weight, addend, whole, step)


@cache
def attention_agrees(kv_heads: int, num_heads: int, head_dim: int, dtype: torch.dtype, num_threads: int) -> bool:
    """Whether the batched products of attention do not depend on how many there are, on the threads now in use."""
    generator = torch.Generator().manual_seed(0)
    B, group = 16, num_heads // kv_heads
    keys = torch.randn(B * kv_heads, SLOT_BLOCK, head_dim, generator=generator, dtype=dtype)

    def attend(q: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        keys_here = keys[: num_rows * kv_heads]
        scores = torch.baddbmm(q.new_zeros(1, 1, SLOT_BLOCK), q, keys_here.transpose(1, 2), alpha=0.3)
        return scores, torch.bmm(scores, keys_here)

    for queries in (group, QUERIES * group):
        q = torch.randn(B * kv_heads, queries, head_dim, generator=generator, dtype=dtype)
        with one_thread():
            whole = attend(q, B)
        for num_rows in (1, 2, 3, 4, 7, 8, B):
            found = attend(q[: num_rows * kv_heads], num_rows)
            if not all(torch.equal(a, b[: len(a)]) for a, b in zip(found, whole, strict=True)):
                return False
    return True


@cache
def slot_step(head_dim: int, dtype: torch.dtype) -> int:
    """Slots that attention is rounded up to: 16, if a sum over them is that over a whole block whose other slots add
    zeros, else a block."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, QUERIES, head_dim, generator=generator, dtype=dtype)
    keys = torch.randn(4, SLOT_BLOCK, head_dim, generator=generator, dtype=dtype)
    step = 16
    for width in range(step, SLOT_BLOCK, step):
        for length, queries in product((1, width - step + 1, width), (1, QUERIES)):
            mask = q.new_zeros(1, 1, SLOT_BLOCK)
            mask[:, :, length:] = torch.finfo(dtype).min
            found = [
                torch.bmm(
                    torch.baddbmm(mask[:, :, :w], q[:, :queries], keys[:, :w].transpose(1, 2), alpha=0.3).softmax(-1),
                    keys[:, :w],
                )
                for w in (width, SLOT_BLOCK)
            ]
            if not torch.equal(*found):
                return SLOT_BLOCK
    return step


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators on one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(shapes: set[tuple[int, ...]], dtype: torch.dtype) -> ProductRows:
    """What holds for products of all the shapes."""
    found = [product_rows(*shape, dtype) for shape in sorted(shapes)]
    return ROW_BY_ROW if ROW_BY_ROW in found else ProductRows(max(rows.step for rows in found), MOST_ROWS)


def _random_product(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (MOST_ROWS, inputs), (outputs, inputs), (MOST_ROWS, outputs)
    x, weight, addend = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, weight.t(), addend


def _agree(x: Tensor, weight: Tensor, addend: Tensor, whole: tuple[Tensor, Tensor], step: int) -> bool:
    """Whether every multiple of `step` rows, from the first on and up to the last, gives the rows of the whole."""
    for num_rows in range(step, len(x) + 1, step):
        for rows in (slice(num_rows), slice(len(x) - num_rows, None)):
            found = torch.addmm(addend[rows], x[rows], weight), torch.mm(x[rows], weight)
            if not all(torch.equal(one, other[rows]) for one, other in zip(found, whole, strict=True)):
                return False
    return True


def filled_up(number: int, step: int) -> int:
    return -(-number // step) * step
