"""Models: token embeddings, the transformer, and a head of which any slice can be computed alone.

What generates and what scores sees a model only through `hidden`, `new_state`, `extend` and `logits`.

Letters: B batch, T tokens, V vocabulary, D model width, n the ids of a slot.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.documents import config_of
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.transformer import Transformer
from smalti.sequences.layout import Layout, Slot


@dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig:
    """A causal transformer over one vocabulary. Raises ValueError if the transformer is not causal."""

    vocab_size: int
    transformer: TransformerConfig
    tie_embeddings: bool = False
    """Use the embedding table as the head."""
    head_ranges: tuple[tuple[int, int], ...] | None = None
    """The ids that the head has rows for: ascending, disjoint, half-open ranges. None: all. An id that nothing predicts
    needs none: its row would never get a gradient."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 1.")
        if not self.transformer.causal or self.transformer.cross_attention:
            raise ValueError("a decoder-only model needs causal=True and cross_attention=False.")
        if self.head_ranges is not None:
            self._check_head(self.head_ranges)

    def _check_head(self, ranges: tuple[tuple[int, int], ...]) -> None:
        edges = [edge for pair in ranges for edge in pair]
        if not edges or edges != sorted(set(edges)) or not 0 <= edges[0] < edges[-1] <= self.vocab_size:
            raise ValueError(
                f"head_ranges is {ranges}; expected pairs (start, end) of token ids within 0..{self.vocab_size}, "
                "ascending, apart from each other and not empty."
            )
        if self.tie_embeddings:
            raise ValueError("tie_embeddings uses a head with rows for all ids; leave out head_ranges.")

    @property
    def head_slot(self) -> Slot:
        """The ids that the head has rows for."""
        return Slot(self.head_ranges or ((0, self.vocab_size),))

    def to_dict(self) -> dict:
        content = asdict(self)
        if self.head_ranges is None:  # as bundles and checkpoints of before there was the field
            del content["head_ranges"]
        if self.transformer.head_width is None:  # as bundles and checkpoints of before there was the field
            del content["transformer"]["head_width"]
        return content

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "DecoderOnlyConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


class DecoderOnly(nn.Module):
    """Reads `token_ids`, predicts the next one: p(token t | tokens < t)."""

    def __init__(self, config: DecoderOnlyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.transformer.d_model)
        self.transformer = Transformer(config.transformer)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if not config.tie_embeddings:
            # Drawn for all ids and then chosen from, so that weights do not depend on which rows are left out.
            drawn = nn.init.normal_(torch.empty(config.vocab_size, config.transformer.d_model), std=0.02)
            if config.head_ranges is not None:
                drawn = torch.cat([drawn[start:end] for start, end in config.head_ranges])
            self.head = nn.Parameter(drawn)

    @property
    def head_weight(self) -> Float[Tensor, "rows D"]:
        """A row for each id of `config.head_slot`, in their order."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.head

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if the layout's sequences are longer than the model takes."""
        longest, most = layout.max_length, self.config.transformer.max_length
        if longest > most:
            raise ValueError(f"the layout's sequences have up to {longest} tokens; the model takes {most}.")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences; the one at position t predicts token t + 1."""
        return self.transformer(self.embed_tokens(token_ids))

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        """Room for the keys and values of so many rows."""
        return DecodeState(
            self.config.transformer,
            capacity,
            max_length or self.config.transformer.max_length,
            device=self.device,
            dtype=self.embed_tokens.weight.dtype,
        )

    def extend(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R D"]:
        """Runs new tokens of rows, a whole prompt or one token; returns what predicts the token behind each row's last.

        Rows with fewer tokens than T are filled up on the right; `counts` tells how many are real. Raises ValueError
        where a row would get too long.
        """
        hidden = self.transformer.extend(self.embed_tokens(token_ids), state, rows, counts)
        if counts is None:
            return hidden[:, -1]
        return hidden[range(len(hidden)), [count - 1 for count in counts]]

    def can_score(self, slot: Slot) -> bool:
        """Whether the head has rows for all ids of a slot."""
        held = self.config.head_slot.ranges
        return all(any(first <= start and end <= last for first, last in held) for start, end in slot.ranges)

    def head_rows(self, slot: Slot) -> tuple[tuple[int, int], ...]:
        """The rows of `head_weight` that score a slot's ids, in their order.

        Raises ValueError, naming the ids, if the head has no rows for some of them.
        """
        if self.config.head_ranges is None:
            return slot.ranges
        if not self.can_score(slot):
            given, held = (_listed(one.ranges) for one in (slot, self.config.head_slot))
            raise ValueError(
                f"the head cannot score the ids {given}: it has rows for {held}, the ids that the model was made to "
                "predict. What it was always given it neither predicts nor scores."
            )
        rows, before = [], 0
        for first, last in self.config.head_ranges:
            rows += [
                (start - first + before, end - first + before)
                for start, end in slot.ranges
                if first <= start and end <= last
            ]
            before += last - first
        return tuple(rows)

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        """Scores of a slot's ids alone, in the slot's own numbering; None: of all V ids, −inf where the head has no
        row. Raises ValueError for a slot that the head cannot score."""
        if slot is None and self.config.head_ranges is not None:
            return self.spread(self.logits(hidden, self.config.head_slot))
        weight = self.head_weight
        if slot is not None:
            pieces = [weight[start:end] for start, end in self.head_rows(slot)]
            weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # one range is a view: nothing is copied
        return F.linear(hidden, weight.to(hidden.dtype))

    def spread(self, logits: Float[Tensor, "... rows"]) -> Float[Tensor, "... V"]:
        """Scores of all ids from those of the ids that the head has rows for; −inf for the others."""
        ids = self.config.head_slot.token_ids(torch.arange(logits.shape[-1], device=logits.device))
        return logits.new_full((*logits.shape[:-1], self.config.vocab_size), -math.inf).index_copy(-1, ids, logits)


def _listed(ranges: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{start}..{end - 1}" for start, end in ranges)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout for a while; left as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def new_model(
    layout: Layout, transformer: TransformerConfig, *, tie_embeddings: bool = False, full_head: bool = False
) -> DecoderOnly:
    """A fresh model for a layout, its head with rows for the ids that training on the layout predicts.

    `full_head` gives it rows for all ids, as a softmax over the whole vocabulary needs; tied embeddings have them
    anyway. Raises ValueError if a sequence can be longer than the transformer takes.
    """
    if layout.max_length > transformer.max_length:
        raise ValueError(
            f"the layout's sequences have up to {layout.max_length} tokens, max_length is {transformer.max_length}."
        )
    config = DecoderOnlyConfig(
        vocab_size=layout.vocabulary.size,
        transformer=transformer,
        tie_embeddings=tie_embeddings,
        head_ranges=None if full_head or tie_embeddings else _head_ranges(layout),
    )
    return DecoderOnly(config)


def _head_ranges(layout: Layout) -> tuple[tuple[int, int], ...] | None:
    """What a head needs rows for; None: all ids, also where nothing is predicted that could be another."""
    predicted = layout.predicted
    whole = ((0, layout.vocabulary.size),)
    return None if predicted is None or predicted.ranges == whole else predicted.ranges
