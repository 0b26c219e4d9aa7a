"""What every executor of a model's steps does, and the plain one, which is the oracle of the others.

Letters: R rows, T tokens (`tokens`: of all rows together), D model width, n the ids of a slot.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.engine.sampling import SampleConfig, guide, log_prob_of, sample
from smalti.models.base import SequenceModel
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Slot

Token: TypeAlias = tuple[int, float, float]
"""An id that was drawn, its ln p under the model, and under what it was drawn from."""


class Draws(NamedTuple):
    """A token of each of R rows."""

    token_ids: Int[Tensor, " R"]
    log_probs: Float[Tensor, " R"]
    """The model's own ln p of the token: temperature 1, no filter, no guidance."""
    draw_log_probs: Float[Tensor, " R"]
    """ln p under the distribution it was drawn from; equal to `log_probs` where nothing reshapes it."""

    def rows(self) -> list[Token]:
        """Row by row, on the host. A device is waited for once."""
        if self.token_ids.device.type == "cpu":
            return list(zip(*(values.tolist() for values in self), strict=True))
        together = torch.stack([values.double() for values in self]).tolist()
        return [(int(token_id), *log_probs) for token_id, *log_probs in zip(*together, strict=True)]


def why_not_plain(model: SequenceModel) -> list[str]:
    """What keeps an executor that reaches into a decoder-only model, and embeds token ids itself, from a model."""
    if not isinstance(model, DecoderOnly):
        return [f"it knows decoder-only models of plain blocks, not {type(model).__name__}"]
    reasons = [] if model.config.feature_width is None else ["it reads token ids, no features"]
    body = model.config.transformer
    return reasons + unknown_blocks(body)


def unknown_blocks(config: TransformerConfig) -> list[str]:
    """What of a transformer's blocks only `eager` knows, in words."""
    reasons = ["it has no norms within attention and feed-forward (normformer)"] if config.normformer else []
    return reasons + (["it has no GEGLU"] if config.feed_forward == "geglu" else [])


class Eager:
    """The model itself, operator by operator. The weights must not change meanwhile, and no gradient passes through."""

    name: ClassVar[str] = "eager"

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        """Everything that keeps this executor from a job of so many decode steps (None: as many as may be), in words.

        It depends on the model, the machine and the job alone, never on what the process did before.
        """
        return []

    @classmethod
    def why_no_drafts(cls, model: SequenceModel) -> list[str]:
        """Everything that keeps this executor from running drafts ahead, in words."""
        if hasattr(model, "extend_all"):
            return []
        return [f"{type(model).__name__} tells of the last token it runs alone (it has no extend_all)"]

    def __init__(self, model: SequenceModel):
        self.model = model

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        return self.model.new_state(capacity, max_length)

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R D"]:
        """Runs each row's new tokens, one or more; returns what predicts the token behind its last.

        Raises ValueError where a row would get too long.
        """
        token_ids, counts = filled_up_on_the_right(tokens)
        return self.model.extend(state, rows, token_ids.to(self.model.device), counts)

    def extend_all(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "tokens D"]:
        """`extend`, returning what predicts the token behind each of the new ones, row after row."""
        token_ids, counts = filled_up_on_the_right(tokens)
        hidden = self.model.extend_all(state, rows, token_ids.to(self.model.device), counts)
        if counts is None:
            return hidden.flatten(0, 1)
        return torch.cat([of_row[:count] for of_row, count in zip(hidden, counts, strict=True)])

    def logits(self, hidden: Float[Tensor, "R D"], slot: Slot | None = None) -> Float[Tensor, "R n"]:
        """Scores of a slot's ids, in the slot's own numbering; None: of all ids."""
        return self.model.logits(hidden, slot)

    def draw(
        self,
        hidden: Float[Tensor, "R D"],
        null_hidden: Float[Tensor, "R D"] | None,
        slot: Slot,
        uniforms: Float[Tensor, " R"],
        scales: Float[Tensor, " R"] | None,
        config: SampleConfig,
    ) -> Draws:
        """A token of each row at its uniform number. `null_hidden` and `scales` guide, and are given together."""
        cond = self.logits(hidden, slot).float()
        logits = cond
        if null_hidden is not None and scales is not None:
            logits = guide(cond, self.logits(null_hidden, slot).float(), scales[:, None])
        local, draw_log_probs = sample(logits, uniforms.to(logits.device), config)
        log_probs = draw_log_probs if config.is_plain else log_prob_of(cond, local)
        return Draws(slot.token_ids(local), log_probs, draw_log_probs)


def filled_up_on_the_right(tokens: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "R T"], list[int] | None]:
    """Rows of tokens as a table, with how many of each row are real; None: all."""
    counts = [len(row) for row in tokens]
    if min(counts) == max(counts):
        return torch.tensor(tokens), None
    return torch.tensor(list(zip_longest(*tokens, fillvalue=0))).t().contiguous(), counts
