"""The cache of one batch on its way: prefill of ragged prefixes, steps, draws, null rows for guidance.

Letters: B rows generated together, R rows in the cache (B, or 2 B with null rows), D model width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.engine.native import NativeDecoder
from smalti.engine.packed import Stepper, make_stepper
from smalti.engine.sampling import SampleConfig, guide, log_prob_of, sample
from smalti.models.decode_state import KVCache
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Slot


class Decoder:
    """The cache of rows generated together, and their hidden states: what predicts each row's next token.

    Under guidance the null rows stand behind the conditional ones and run in the same batch. Where a step is not
    guided the null rows stay behind; when they are wanted again they catch up in one pass.
    """

    def __init__(
        self,
        model: DecoderOnly,
        prefixes: list[list[int]],
        nulls: list[list[int]],
        num_steps: int,
        executor: str | None = None,
    ):
        self.model: Stepper = make_stepper(model, num_steps, executor)
        self.num_rows = len(prefixes)
        every = prefixes + nulls
        width = max(map(len, every))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in every], device=model.device)
        starts = torch.tensor([width - len(row) for row in every], device=model.device)
        self.cache = model.new_cache(len(every), width + num_steps - 1, starts)
        self.behind: list[Int[Tensor, " B"]] = []  # tokens the null rows have not seen
        self._set(self.model.prefill(padded, self.cache))

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

    def draw(
        self,
        slot: Slot,
        rows: slice | Int[Tensor, " n"],
        uniforms: Float[Tensor, " n"],
        scales: Float[Tensor, " n"] | None,
        config: SampleConfig,
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """A token of each of the rows, its ln p under the model, and under what it was drawn from.

        `scales` guide the rows; None: no row is guided.
        """
        hidden = self.hidden[rows]
        null_hidden = None if scales is None else self.null_hidden[rows]
        if isinstance(self.model, NativeDecoder) and not config.is_filtered and config.temperature > 0:
            return self.model.draw(hidden, null_hidden, slot, uniforms, scales, config.temperature)
        cond = self.model.logits(hidden, slot).float()
        logits = cond
        if null_hidden is not None and scales is not None:
            logits = guide(cond, self.model.logits(null_hidden, slot).float(), scales[:, None])
        local, draw_log_probs = sample(logits, uniforms, config)
        log_probs = draw_log_probs if config.is_plain else log_prob_of(cond, local)
        return slot.token_ids(local), log_probs, draw_log_probs

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Row i goes on from what row rows[i] was."""
        self.cache.select(rows.to(self.model.device))
