"""RAR: pictures from class labels, each token told which cell comes next (arXiv:2411.00776; bytedance/1d-tokenizer,
modeling/rar.py).

Its sequences are `<start> (label{1}) image{L}`, the cells in raster order or, in training, in any other. A token
carries the embedding of its own position and a second one of the position that it is followed by. Every block, and the
norm before the head, is modulated by the label's embedding and one of the token's number in the sequence (adaLN-zero,
arXiv:2212.09748). The head knows codes alone.

Letters: B batch, R rows of a state, T tokens, D model width, L codes of a picture, n the ids of a slot.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.documents import config_of
from smalti.models.base import Inputs, check_drawable, check_own_layout, inputs_of, last_of
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Places, Rows
from smalti.models.stored_weights import StoredLinear, StoredWeight, check_storable, storage_of, store_linears
from smalti.models.transformer import Attention, FeedForward, Norm
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import TokenSequence
from smalti.sequences.vocabulary import SPECIAL, Vocabulary

PREFIX = 2
"""The start token and the label."""
START = "<start>"
BEGINNING = "a row begins with the start token and its label together."


@dataclass(frozen=True, kw_only=True)
class RARConfig:
    """Sizes of a RAR. Raises ValueError where they do not fit together."""

    codebook_size: int
    num_classes: int
    num_codes: int
    """Codes of a picture, L."""
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_sizes(self)
        for name in ("codebook_size", "num_classes", "num_codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        _ = self.transformer

    @property
    def transformer(self) -> TransformerConfig:
        """Of the blocks, without their modulation."""
        return TransformerConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            max_length=PREFIX + self.num_codes,
            norm_eps=1e-6,
            qk_norm=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    @property
    def layout(self) -> Layout:
        """What its sequences are made of. Label `num_classes` says that no class is given: the null condition."""
        sizes = {"image": self.codebook_size, SPECIAL: [START], "label": self.num_classes + 1}
        return Layout.parse(Vocabulary(sizes), {"label to image": f"{START} (label{{1}}) image{{{self.num_codes}}}"})

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "RARConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


PRESETS = {
    # RAR, table 2, for 256 codes of 1,024 and the 1,000 classes of ImageNet.
    name: RARConfig(
        codebook_size=1024, num_classes=1000, num_codes=256, num_layers=layers, d_model=width, num_heads=16, d_ff=wide
    )
    for name, layers, width, wide in (
        ("rar-b", 24, 768, 3072),
        ("rar-l", 24, 1024, 4096),
        ("rar-xl", 32, 1280, 5120),
        ("rar-xxl", 40, 1408, 6144),
    )
}


class AdaptiveBlock(nn.Module):
    """A block whose two norms are shifted and scaled, and whose two halves are weighted, by what modulates it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.modulation = nn.Linear(config.d_model, 6 * config.d_model)
        self.dropout = config.dropout

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        modulating: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "..."] | None,
        places: Places | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        shift, scale, gate, shift_wide, scale_wide, gate_wide = self.modulation(F.silu(modulating)).chunk(6, dim=-1)
        attended = self.attention(self.attention_norm(x) * (1 + scale) + shift, None, mask, places, layer)
        x = x + gate * self._drop(attended)
        return x + gate_wide * self._drop(self.feed_forward(self.feed_forward_norm(x) * (1 + scale_wide) + shift_wide))

    def _drop(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return F.dropout(x, self.dropout, self.training)


class RAR(nn.Module):
    """p(code | the codes before it in the order, the cell it stands in, the label)."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.config = config
        blocks = config.transformer
        D, num_positions = config.d_model, blocks.max_length
        self.vocab_size = config.layout.vocabulary.size
        self.embed_tokens = nn.Embedding(self.vocab_size, D)
        self.positions = nn.Embedding(num_positions, D)
        self.target_positions = nn.Embedding(num_positions, D)
        self.steps = nn.Embedding(num_positions, D)
        self.blocks = nn.ModuleList(AdaptiveBlock(blocks) for _ in range(config.num_layers))
        self.modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, config.codebook_size)
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if "modulation" in name:  # adaLN-zero: every block begins as the identity
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def storage(self) -> str:
        """How the weights are stored, one of STORAGES."""
        return storage_of(self)

    def store_weights(self, storage: str) -> None:
        """Stores the matrices in fewer bits from now on, for generation and scoring alone; embeddings stay. Raises
        ValueError unless the weights are float32 and not stored yet."""
        check_storable(self, self.embed_tokens.weight.dtype, storage)
        if storage == "float32":
            return
        self.requires_grad_(False)
        store_linears(self, storage)

    @property
    def stored_head(self) -> StoredWeight | None:
        return self.head.stored if isinstance(self.head, StoredLinear) else None

    @property
    def head_weight(self) -> Float[Tensor, "codes D"]:
        return self.head.weight if self.stored_head is None else self.stored_head.expanded()

    @property
    def head_bias(self) -> Float[Tensor, " codes"]:
        return self.head.bias

    def position_table(self) -> Float[Tensor, "T D"]:
        """What is added to the token at each place of a sequence in raster order."""
        steps = torch.arange(self.config.transformer.max_length, device=self.device)
        return self.positions.weight + self._told(self._raster_targets(steps))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError unless the layout is the model's own."""
        check_own_layout("a RAR", self.config.layout, layout)

    def check_request(self, sequence: TokenSequence) -> None:
        check_drawable(self, sequence)

    def hidden(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences in the order in which they are visited.

        `positions` and `targets`, by default those of raster order, are numbered as in it: the start token 0, the label
        1, cell c of the picture c + 2. A target of −1 is none, as for the start token and behind the last code. Raises
        ValueError for sequences without a label.
        """
        token_ids, positions, targets, features = inputs_of(inputs)
        if features is not None:
            raise ValueError("features are given; a RAR reads token ids alone.")
        T = token_ids.shape[1]
        if not PREFIX <= T <= self.config.transformer.max_length:
            most = self.config.transformer.max_length
            raise ValueError(f"the sequences have {T} tokens; a RAR reads {PREFIX} (start, label) to {most}.")
        steps = torch.arange(T, device=token_ids.device)
        positions = steps if positions is None else positions
        targets = self._raster_targets(steps) if targets is None else targets
        labels = self.embed_tokens(token_ids[:, 1:PREFIX])
        return self._run(token_ids, positions, targets, steps, labels)

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        blocks = self.config.transformer
        dtype = self.embed_tokens.weight.dtype
        return DecodeState(blocks, capacity, max_length or blocks.max_length, device=self.device, dtype=dtype)

    def extend(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R D"]:
        """New tokens of rows, in raster order. A row begins with the start token and its label together."""
        return last_of(self.extend_all(state, rows, token_ids, counts), counts)

    def extend_all(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R T D"]:
        """`extend`, returning what predicts the token behind each of the new ones."""
        T = token_ids.shape[1]
        counts_or_all = T if counts is None else counts
        state.check_room(rows, counts_or_all, self.config.transformer.max_length)
        indices = state.indices(rows)
        fresh = [i for i, row in enumerate(indices) if state.lengths[row] == 0]
        if fresh and min([T] if counts is None else [counts[i] for i in fresh]) < PREFIX:
            raise ValueError(BEGINNING)
        for i in fresh:
            state.conditions[indices[i]] = self.embed_tokens(token_ids[i, 1])
        labels = torch.stack([self._label(state, row) for row in indices])[:, None]
        places = Places(state, rows, T, counts)
        steps = places.slots.clamp(max=self.config.transformer.max_length - 1)  # what fills up needs some step too
        hidden = self._run(token_ids, steps, self._raster_targets(steps), steps, labels, places)
        state.advance(rows, counts_or_all)
        return hidden

    def begin(self, state: DecodeState, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Gives rows that begin their label. Raises ValueError as `extend` does."""
        for row, new in zip(rows, tokens, strict=True):
            if state.lengths[row] == 0:
                if len(new) < PREFIX:
                    raise ValueError(BEGINNING)
                state.conditions[row] = self.embed_tokens.weight[new[1]]

    def can_score(self, slot: Slot) -> bool:
        return all(end <= self.config.codebook_size for _, end in slot.ranges)

    def head_rows(self, slot: Slot) -> tuple[tuple[int, int], ...]:
        """The rows of the head that score a slot's ids. Raises ValueError if it has none for some of them."""
        if not self.can_score(slot):
            raise ValueError(f"a RAR scores codes alone, ids 0..{self.config.codebook_size - 1}, not {slot.ranges}.")
        return slot.ranges

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        if slot is None:
            codes = self.head(hidden)
            return F.pad(codes, (0, self.vocab_size - codes.shape[-1]), value=-torch.inf)
        rows = [slice(start, end) for start, end in self.head_rows(slot)]
        weight, bias = (torch.cat([whole[part] for part in rows]) for whole in (self.head_weight, self.head_bias))
        return F.linear(hidden, weight.to(hidden.dtype), bias)

    def _raster_targets(self, steps: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        told = (steps > 0) & (steps + 1 < self.config.transformer.max_length)
        return torch.where(told, steps + 1, -1)

    def _told(self, targets: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        return self.target_positions(targets.clamp(min=0)).where(targets[..., None] >= 0, 0)

    def _label(self, state: DecodeState, row: int) -> Float[Tensor, " D"]:
        label = state.conditions[row]
        assert label is not None
        return label

    def _run(
        self,
        token_ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "..."],
        targets: Int[Tensor, "..."],
        steps: Int[Tensor, "..."],
        labels: Float[Tensor, "B 1 D"],
        places: Places | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = self.embed_tokens(token_ids) + self.positions(positions) + self._told(targets)
        modulating = labels + self.steps(steps)
        mask = None if places is None else places.mask()
        for layer, block in enumerate(self.blocks):
            x = block(x, modulating, mask, places, layer)
        scale, shift = self.modulation(F.silu(modulating)).chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=self.config.transformer.norm_eps) * (1 + scale) + shift


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)  # torch's trunc_normal_ cuts at ±2, a hundred deviations away
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
