"""The cache of one batch on its way: prefill of ragged prefixes, steps, null rows for guidance.

Letters: B rows generated together, R rows in the cache (B, or 2 B with null rows), D model width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.fast_decode import FastDecoder, make_stepper
from smalti.models import DecoderOnly
from smalti.transformer import KVCache


class Decoder:
    """The cache of rows generated together, and their hidden states: what predicts each row's next token.

    Under guidance the null rows stand behind the conditional ones and run in the same batch. Where a step is not
    guided the null rows stay behind; when they are wanted again they catch up in one pass.
    """

    def __init__(self, model: DecoderOnly, prefixes: list[list[int]], nulls: list[list[int]], num_steps: int):
        self.model: DecoderOnly | FastDecoder = make_stepper(model, num_steps)
        self.num_rows = len(prefixes)
        every = prefixes + nulls
        width = max(map(len, every))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in every], device=model.device)
        starts = torch.tensor([width - len(row) for row in every], device=model.device)
        self.cache = model.new_cache(len(every), width + num_steps - 1, starts)
        self.behind: list[Int[Tensor, " B"]] = []  # tokens the null rows have not seen
        self._set(model.prefill(padded, self.cache))

    def _set(self, hidden: Float[Tensor, "R D"]) -> None:
        self.hidden, self.null_hidden = hidden[: self.num_rows], hidden[self.num_rows :]

    def step(self, token_ids: Int[Tensor, " B"], *, guided: bool) -> None:
        """Runs one token of each row, also through the null rows if what it predicts is guided."""
        if not len(self.null_hidden):
            self._set(self.model.decode_step(token_ids, self.cache))
        elif guided and not self.behind:
            self._set(self.model.decode_step(token_ids.repeat(2), self.cache))
        else:
            self.behind.append(token_ids)
            self._step_apart(token_ids, guided)

    def _step_apart(self, token_ids: Int[Tensor, " B"], guided: bool) -> None:
        cond: KVCache = self.cache.rows(0, self.num_rows)
        self.hidden = self.model.decode_step(token_ids, cond)
        if guided:
            null = self.cache.rows(self.num_rows, 2 * self.num_rows)
            null.length = cond.length - len(self.behind)
            self.null_hidden = self.model.prefill(torch.stack(self.behind, dim=1), null)
            self.behind = []
        self.cache.length = cond.length

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Row i goes on from what row rows[i] was."""
        self.cache.select(rows.to(self.model.device))
