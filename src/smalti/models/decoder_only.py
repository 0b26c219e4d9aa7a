"""Models: token embeddings, the transformer, and a head of which any slice can be computed alone.

What generates and what scores sees a model only through `hidden`, `new_state`, `extend` and `logits`.

Letters: B batch, T tokens, V vocabulary, D model width, n the ids of a slot, or the features of a row, C
their channels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.documents import config_of
from smalti.models.base import Inputs, check_drawable, last_of
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.stored_weights import StoredWeight, check_storable, storage_of, store_linears
from smalti.models.transformer import Transformer
from smalti.sequences.layout import Layout, Slot, Span
from smalti.sequences.request import TokenSequence
from smalti.sequences.vocabulary import FEATURE


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
    feature_width: int | None = None
    """Channels of the features that stand in the prefix of every sequence, in place of token ids, at most
    `transformer.prefix_length` of them; None: there are none."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 1.")
        if not self.transformer.causal or self.transformer.cross_attention:
            raise ValueError("a decoder-only model needs causal=True and cross_attention=False.")
        if self.head_ranges is not None:
            self._check_head(self.head_ranges)
        if self.feature_width is not None and min(self.feature_width, self.transformer.prefix_length) < 1:
            raise ValueError(
                f"feature_width is {self.feature_width} and prefix_length {self.transformer.prefix_length}; features "
                "need at least 1 channel and a prefix of at least 1."
            )

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
        if self.feature_width is None:
            del content["feature_width"]
        if self.transformer.head_width is None:  # as bundles and checkpoints of before there was the field
            del content["transformer"]["head_width"]
        if not self.transformer.normformer:
            del content["transformer"]["normformer"]
        return content

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "DecoderOnlyConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


NO_FEATURES = "a row of this model begins with features; state.begin(row, features) gives them."


class FeatureProjection(nn.Module):
    """Features to the transformer's width (LlamaGen, gpt.py, CaptionEmbedder), and those that stand for none given."""

    null_features: Float[Tensor, "P C"]

    def __init__(self, width: int, num_features: int, d_model: int):
        super().__init__()
        self.first = nn.Linear(width, d_model, bias=False)
        self.second = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("null_features", torch.randn(num_features, width) / math.sqrt(width))
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.second(F.gelu(self.first(features), approximate="tanh"))


class DecoderOnly(nn.Module):
    """Reads `token_ids`, predicts the next one: p(token t | tokens < t)."""

    def __init__(self, config: DecoderOnlyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.transformer.d_model)
        self.transformer = Transformer(config.transformer)
        self.stored_head: StoredWeight | None = None
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if not config.tie_embeddings:
            # Drawn for all ids and then chosen from, so that weights do not depend on which rows are left out.
            drawn = nn.init.normal_(torch.empty(config.vocab_size, config.transformer.d_model), std=0.02)
            if config.head_ranges is not None:
                drawn = torch.cat([drawn[start:end] for start, end in config.head_ranges])
            self.head = nn.Parameter(drawn)
        if config.feature_width is not None:
            self.features = FeatureProjection(
                config.feature_width, config.transformer.prefix_length, config.transformer.d_model
            )

    @property
    def head_weight(self) -> Float[Tensor, "rows D"]:
        """A row for each id of `config.head_slot`, in their order."""
        if self.stored_head is not None:
            return self.stored_head.expanded()
        return self.embed_tokens.weight if self.config.tie_embeddings else self.head

    @property
    def storage(self) -> str:
        """How the weights are stored, one of STORAGES."""
        return storage_of(self)

    def store_weights(self, storage: str) -> None:
        """Stores the matrices in fewer bits from now on, for generation and scoring alone. Embeddings stay, and so does
        a head that is tied to them. Raises ValueError unless the weights are float32 and not stored yet."""
        check_storable(self, self.embed_tokens.weight.dtype, storage)
        if storage == "float32":
            return
        self.requires_grad_(False)
        store_linears(self.transformer, storage)
        if not self.config.tie_embeddings:
            self.stored_head = StoredWeight(self.head, storage)
            del self.head

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if the layout's sequences are longer than the model takes, or of another kind."""
        longest, most = layout.max_length, self.config.transformer.max_length
        if longest > most:
            raise ValueError(f"the layout's sequences have up to {longest} tokens; the model takes {most}.")
        check_positions(layout, self.config.transformer)
        for order in layout.orders.values():
            found = 0 if order.features is None else order.features.length
            if found != self.num_features:
                raise ValueError(
                    f"order {order.name!r} ({order}) has {found} features; the model reads {self.num_features}."
                )

    def check_request(self, sequence: TokenSequence) -> None:
        """Raises ValueError if something is to be drawn that the model was only ever given, or for features of another
        width than the model's."""
        check_drawable(self, sequence)
        found, width = sequence.features, self.config.feature_width
        if found is not None and found.shape[1] != width:
            raise ValueError(f"the features are {found.shape[1]} wide; the model reads {width}.")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences; the one at position t predicts token t + 1.

        Of a model that reads features, the last one stands at prefix_length − 1 unless `Inputs` has other positions.
        """
        if isinstance(inputs, Tensor):
            return self.transformer(self.embed_tokens(inputs))
        token_ids, positions = inputs.token_ids, inputs.positions
        x = self._embedded(token_ids, inputs.features)
        if positions is None and inputs.features is not None:
            given = (token_ids == FEATURE).sum(1, keepdim=True)
            positions = torch.arange(token_ids.shape[1], device=token_ids.device) + self.num_features - given
        return self.transformer(x, positions=positions)

    def _embedded(
        self, token_ids: Int[Tensor, "B T"], features: Float[Tensor, "B n C"] | None
    ) -> Float[Tensor, "B T D"]:
        if features is None:
            return self.embed_tokens(token_ids)
        if self.config.feature_width is None:
            raise ValueError("features are given; this model reads token ids alone (feature_width is None).")
        x = self.embed_tokens(token_ids.clamp(min=0))
        ahead = min(features.shape[1], x.shape[1])
        projected = self.features(features[:, :ahead].to(x.dtype))
        begun = torch.where(token_ids[:, :ahead, None] == FEATURE, projected, x[:, :ahead])
        return torch.cat((begun, x[:, ahead:]), dim=1)

    @property
    def num_features(self) -> int:
        """Features that the prefix of a sequence has room for; 0: the model reads none."""
        return 0 if self.config.feature_width is None else self.config.transformer.prefix_length

    def null_features(self, num_features: int) -> Float[Tensor, "n C"]:
        """What stands for so many features where none are given: the last of the prefix, as a caption's are."""
        return self.features.null_features[-num_features:]

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
        return last_of(self.extend_all(state, rows, token_ids, counts), counts)

    def extend_all(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R T D"]:
        """`extend`, returning what predicts the token behind each of the new ones."""
        if self.config.feature_width is None:
            return self.transformer.extend(self.embed_tokens(token_ids), state, rows, counts)
        return self._extend_with_features(state, rows, token_ids, counts)

    def _extend_with_features(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None
    ) -> Float[Tensor, "R T D"]:
        """A row's features are its condition in the state. Those it has fewer of than the prefix takes would stand on
        the left, where nothing sees them: they are left out, and positions run ahead of slots by as many."""
        given = [state.conditions[row] for row in state.indices(rows)]
        starts = [state.lengths[row] for row in state.indices(rows)]
        if any(one is None for one in given):
            raise ValueError(NO_FEATURES)
        held = [one for one in given if one is not None]
        features = None
        if bool((token_ids == FEATURE).any()):
            features = token_ids.new_zeros(*token_ids.shape, held[0].shape[1], dtype=self.embed_tokens.weight.dtype)
            for i, (one, start) in enumerate(zip(held, starts, strict=True)):
                new = one[start : start + token_ids.shape[1]]
                features[i, : len(new)] = new
        prefix = self.config.transformer.prefix_length
        ahead = torch.tensor([prefix - len(one) for one in held], device=token_ids.device)
        x = self._embedded(token_ids, features)
        return self.transformer.extend(x, state, rows, counts, ahead=ahead)

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
        if slot is None:
            return F.linear(hidden, self.head_weight.to(hidden.dtype))
        pieces = [self._head_piece(start, end) for start, end in self.head_rows(slot)]
        weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # one range is a view: nothing is copied
        return F.linear(hidden, weight.to(hidden.dtype))

    def _head_piece(self, start: int, end: int) -> Float[Tensor, "n D"]:
        if self.stored_head is not None:
            return self.stored_head.expanded(slice(start, end))
        return self.head_weight[start:end]

    def spread(self, logits: Float[Tensor, "... rows"]) -> Float[Tensor, "... V"]:
        """Scores of all ids from those of the ids that the head has rows for; −inf for the others."""
        ids = self.config.head_slot.token_ids(torch.arange(logits.shape[-1], device=logits.device))
        return logits.new_full((*logits.shape[:-1], self.config.vocab_size), -math.inf).index_copy(-1, ids, logits)


def _listed(ranges: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{start}..{end - 1}" for start, end in ranges)


def check_positions(layout: Layout, transformer: TransformerConfig) -> None:
    """Raises ValueError if 2-D rotary positions are asked for behind a span of open length: a picture's cells have to
    stand where the table has them."""
    if transformer.positions != "rotary_2d":
        return
    for order in layout.orders.values():
        ended = [index for index, part in enumerate(order.parts) if isinstance(part, Span) and part.end]
        if ended and any(isinstance(part, Span) for part in order.parts[ended[0] + 1 :]):
            raise ValueError(
                f"order {order.name!r} ({order}): 2-D rotary positions need a picture that always begins at one "
                f"position, and {order.parts[ended[0]]} before it has an open length. Use positions 'rotary', or a "
                "span of fixed length."
            )


def new_model(
    layout: Layout,
    transformer: TransformerConfig,
    *,
    tie_embeddings: bool = False,
    full_head: bool = False,
    feature_width: int | None = None,
) -> DecoderOnly:
    """A fresh model for a layout, its head with rows for the ids that training on the layout predicts.

    `full_head` gives it rows for all ids, as a softmax over the whole vocabulary needs; tied embeddings have them
    anyway. `feature_width` is that of the layout's features, if it has any. Raises ValueError if a sequence can be
    longer than the transformer takes, and where layout and transformer do not fit together.
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
        feature_width=feature_width,
    )
    model = DecoderOnly(config)
    model.check_layout(layout)
    return model


def _head_ranges(layout: Layout) -> tuple[tuple[int, int], ...] | None:
    """What a head needs rows for; None: all ids, also where nothing is predicted that could be another."""
    predicted = layout.predicted
    whole = ((0, layout.vocabulary.size),)
    return None if predicted is None or predicted.ranges == whole else predicted.ranges
