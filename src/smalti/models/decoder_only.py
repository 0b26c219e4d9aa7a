"""Models: token embeddings, the transformer, and a head of which any slice can be computed alone.

What generates and what scores sees a model only through `hidden`, `new_state`, `extend` and `logits`.

Letters: B batch, T tokens, V vocabulary, D model width, n the ids of a slot.
"""

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

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 1.")
        if not self.transformer.causal or self.transformer.cross_attention:
            raise ValueError("a decoder-only model needs causal=True and cross_attention=False.")

    def to_dict(self) -> dict:
        content = asdict(self)
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
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.transformer.d_model))
            nn.init.normal_(self.head, std=0.02)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
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

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        """Scores of a slot's ids alone, in the slot's own numbering; None: of all V ids."""
        weight = self.head_weight
        if slot is not None:
            pieces = [weight[start:end] for start, end in slot.ranges]
            weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # one range is a view: nothing is copied
        return F.linear(hidden, weight.to(hidden.dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout for a while; left as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def new_model(layout: Layout, transformer: TransformerConfig, *, tie_embeddings: bool = False) -> DecoderOnly:
    """A fresh model for a layout. Raises ValueError if a sequence can be longer than the transformer takes."""
    if layout.max_length > transformer.max_length:
        raise ValueError(
            f"the layout's sequences have up to {layout.max_length} tokens, max_length is {transformer.max_length}."
        )
    config = DecoderOnlyConfig(
        vocab_size=layout.vocabulary.size, transformer=transformer, tie_embeddings=tie_embeddings
    )
    return DecoderOnly(config)
