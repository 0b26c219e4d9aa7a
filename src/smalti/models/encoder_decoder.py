"""Parti: a text encoder and a picture decoder, joined by cross-attention (arXiv:2206.10789, §2.2 and §3).

Its sequences are `(text{..n}) <eot> <sot> image{L}`. The encoder reads the caption and the marker behind it, so that an
empty caption, the null condition, is a vector that is learned; nothing of it stands in the decoder. Input t of the
decoder, `<sot>` or the code before, stands at cell t of the picture, the cell that it predicts: its position is that
cell's row and column. The keys and values that cross-attention looks at are computed once for a caption, and shared by
all rows of a decode state that have it.

What the paper leaves open is decided as in docs/parti.md: pre-norm blocks, row and column positions that are added,
ReLU, no biases.

Letters: B batch, R rows of a state, T tokens, S tokens of a caption with its marker, M inputs of the decoder, D model
width, L codes of a picture, K codebook entries, n the ids of a slot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.bounds import MAX_CELLS, MAX_TABLE, check_sizes
from smalti.documents import config_of
from smalti.models.base import Inputs, check_drawable, check_own_layout, inputs_of, last_of
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import SLOT_BLOCK, DecodeState, Places, Rows
from smalti.models.stored_weights import check_storable, storage_of, store_linears
from smalti.models.transformer import Context, RowContexts, Transformer
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import TokenSequence
from smalti.sequences.vocabulary import SPECIAL, Vocabulary

END_OF_TEXT, START = "<eot>", "<sot>"
ORDER = "text to image"


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Sizes of a text encoder and a picture decoder. Raises ValueError where they do not fit together."""

    text_size: int
    """Ids of text."""
    max_text: int = 128
    """Most ids of a caption."""
    codebook_size: int
    grid: tuple[int, int]
    """Rows and columns of a picture's codes."""
    encoder_layers: int
    decoder_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    feed_forward: str = "relu"
    bias: bool = False
    """Biases in the linear layers."""
    local_kernel: int | None = None
    """Rows and columns of the decoder's window, odd: an input sees those before it whose cells lie in the window about
    its own (see `local_mask`). None: it sees all of them."""
    dropout: float = 0.1
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "encoder_layers", "decoder_layers")
        for name in ("text_size", "max_text", "codebook_size", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if min(self.grid) < 1 or self.num_codes > MAX_CELLS:
            raise ValueError(
                f"grid is {self.grid}; expected rows and columns, at least 1 and at most {MAX_CELLS} cells."
            )
        if self.local_kernel is not None and (self.local_kernel < 1 or self.local_kernel % 2 == 0):
            raise ValueError(f"local_kernel is {self.local_kernel}; expected an odd number, such as 11, or none.")
        if self.local_kernel is not None and self.num_codes**2 > MAX_TABLE:
            raise ValueError(f"local_kernel is for pictures of up to {int(MAX_TABLE**0.5)} codes; grid is {self.grid}.")
        _ = self.encoder, self.decoder

    @property
    def num_codes(self) -> int:
        """Codes of a picture, L."""
        return self.grid[0] * self.grid[1]

    @property
    def encoder(self) -> TransformerConfig:
        return self._transformer(self.encoder_layers, self.max_text + 1, causal=False)

    @property
    def decoder(self) -> TransformerConfig:
        return self._transformer(self.decoder_layers, self.num_codes, cross_attention=True)

    def _transformer(
        self, num_layers: int, max_length: int, *, causal: bool = True, cross_attention: bool = False
    ) -> TransformerConfig:
        return TransformerConfig(
            num_layers=num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            max_length=max_length,
            feed_forward=self.feed_forward,
            bias=self.bias,
            positions="none",
            causal=causal,
            cross_attention=cross_attention,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    @property
    def layout(self) -> Layout:
        """What its sequences are made of."""
        sizes = {"text": self.text_size, SPECIAL: [END_OF_TEXT, START], "image": self.codebook_size}
        line = f"(text{{..{self.max_text}}}) {END_OF_TEXT} {START} image{{{self.num_codes}}}"
        return Layout.parse(Vocabulary(sizes), {ORDER: line})

    @property
    def start_id(self) -> int:
        """The token id of `<sot>`: text and its marker come before."""
        return self.text_size + 1

    @property
    def vocab_size(self) -> int:
        return self.text_size + 2 + self.codebook_size

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "EncoderDecoderConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


def _shape(encoder_layers: int, decoder_layers: int, d_model: int, num_heads: int) -> dict[str, int]:
    """Feed-forwards are four times as wide as the model (Parti, §2.2)."""
    return dict(
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=4 * d_model,
    )


PRESETS: dict[str, dict[str, int]] = {
    # Parti, table 1; parameters with 16,000 ids of text and 32 × 32 codes of 8,192.
    "parti-350m": _shape(12, 12, 1024, 16),  # 385,809,408
    "parti-750m": _shape(12, 36, 1024, 16),  # 788,610,048
    "parti-3b": _shape(12, 36, 2048, 32),  # 3,087,169,536
    "parti-20b": _shape(16, 64, 4096, 64),  # 20,536,389,632
    # For two cores. Parameters of the blocks alone: what the rest takes depends on the vocabularies.
    "parti-1m": _shape(2, 4, 128, 4),  # 1,445,888
    "parti-4m": _shape(3, 6, 192, 4),  # 4,875,264
    "parti-12m": _shape(4, 8, 256, 8),  # 11,550,720
    "parti-27m": _shape(3, 10, 384, 6),  # 28,929,024
}


def preset_config(name: str, **sizes: object) -> EncoderDecoderConfig:
    """A preset, for vocabularies and a grid, with some fields changed. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"encoder-decoder preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return EncoderDecoderConfig(**{**PRESETS[name], **sizes})  # type: ignore[arg-type]


def local_mask(grid: tuple[int, int], kernel: int) -> Bool[Tensor, "L L"]:
    """True where the input at one cell sees that at another: convolution-shaped causal attention (DALL-E,
    arXiv:2102.12092, App. B.1; Parti, §2.2), without wrapping over the picture's edges.

    Of a kernel of 2R + 1, a cell sees itself and those before it in raster order that are at most R rows and R columns
    away.
    """
    rows, columns = grid
    reach = kernel // 2
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    behind = (row[:, None] - row).abs() <= reach
    beside = (column[:, None] - column).abs() <= reach
    return behind & beside & torch.ones(rows * columns, rows * columns, dtype=torch.bool).tril()


class _Begun(NamedTuple):
    """New tokens of rows without what the encoder reads."""

    codes: Int[Tensor, "R M"]
    counts: list[int] | None
    """How many of each row are real; None: all."""
    num_text: list[int]
    """How many of each row's new tokens came before them."""


class EncoderDecoder(nn.Module):
    """p(code | the caption, the codes before it)."""

    visible: Bool[Tensor, "L S"]

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        D, (rows, columns) = config.d_model, config.grid
        self.embed_text = nn.Embedding(config.text_size + 1, D)
        """The last row is `<eot>`'s."""
        self.text_positions = nn.Embedding(config.max_text + 1, D)
        self.encoder = Transformer(config.encoder)
        self.embed_codes = nn.Embedding(config.codebook_size + 1, D)
        """The last row is `<sot>`'s."""
        self.row_positions = nn.Embedding(rows, D)
        self.column_positions = nn.Embedding(columns, D)
        self.decoder = Transformer(config.decoder)
        self.head = nn.Linear(D, config.codebook_size, bias=False)
        for part in (self.embed_text, self.text_positions, self.embed_codes, self.row_positions, self.column_positions):
            nn.init.normal_(part.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.local_kernel is not None:
            visible = local_mask(config.grid, config.local_kernel)
            # slots of a state come in whole blocks
            visible = F.pad(visible, (0, -config.num_codes % SLOT_BLOCK))
            self.register_buffer("visible", visible, persistent=False)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.embed_codes.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def storage(self) -> str:
        """How the weights are stored, one of STORAGES."""
        return storage_of(self)

    def store_weights(self, storage: str) -> None:
        """Stores the matrices in fewer bits from now on, for generation and scoring alone; embeddings stay. Raises
        ValueError unless the weights are float32 and not stored yet."""
        check_storable(self, self.embed_codes.weight.dtype, storage)
        if storage != "float32":
            self.requires_grad_(False)
            store_linears(self, storage)

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError unless the layout is the model's own."""
        check_own_layout("this encoder-decoder", self.config.layout, layout)

    def check_request(self, sequence: TokenSequence) -> None:
        check_drawable(self, sequence)

    # Whole sequences -------------------------------------------------------------------------------------------

    def hidden(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences; the one at position t predicts token t + 1. What stands before `<sot>`
        predicts nothing, and is zero. Raises ValueError for a sequence without `<sot>`."""
        token_ids, positions, _, features = inputs_of(inputs)
        if features is not None or positions is not None:
            raise ValueError("features or positions are given; an encoder-decoder reads token ids alone.")
        starts = self._starts(token_ids)
        T, first, last = token_ids.shape[1], min(starts), max(starts)
        begins = torch.tensor(starts, device=token_ids.device)
        context = self.encode(token_ids[:, :last], begins)
        M = min(T - first, self.config.num_codes)
        columns = begins[:, None] + torch.arange(M, device=token_ids.device)
        decoded = self.decode(token_ids.gather(1, columns.clamp(max=T - 1)), context)
        return torch.stack(
            [F.pad(row, (0, 0, start, T - start - M)) for row, start in zip(decoded, starts, strict=True)]
        )

    def _starts(self, token_ids: Int[Tensor, "B T"]) -> list[int]:
        """Where each row's `<sot>` stands."""
        is_start = token_ids == self.config.start_id
        if not bool(is_start.any(1).all()):
            raise ValueError(f"a sequence has no {START} (id {self.config.start_id}), behind which the decoder begins.")
        return is_start.int().argmax(1).tolist()

    def encode(self, text: Int[Tensor, "B S"], lengths: Int[Tensor, " B"] | None = None) -> Context:
        """What the decoder sees of captions with their `<eot>`, of which the first `lengths` ids are real."""
        S = text.shape[1]
        real = mask = None
        if lengths is not None:
            real = torch.arange(S, device=text.device) < lengths[:, None]
            text, mask = text.where(real, self.config.text_size), real[:, None, None]
        x = self.embed_text(text) + self.text_positions.weight[:S]
        return self.decoder.context(self.encoder(x, mask=mask), real)

    def decode(self, token_ids: Int[Tensor, "B M"], context: Context) -> Float[Tensor, "B M D"]:
        """Hidden states of the decoder's first M inputs, `<sot>` and codes."""
        M = token_ids.shape[1]
        x = self._embedded(token_ids, torch.arange(M, device=token_ids.device))
        mask = None if self.config.local_kernel is None else self.visible[:M, :M]
        return self.decoder(x, context=context, mask=mask)

    def _embedded(self, token_ids: Int[Tensor, "B M"], cells: Int[Tensor, "..."]) -> Float[Tensor, "B M D"]:
        config = self.config
        codes = token_ids - config.start_id - 1
        codes = codes.where(codes >= 0, config.codebook_size)  # <sot>, and what fills up
        rows = torch.div(cells, config.grid[1], rounding_mode="floor")
        return self.embed_codes(codes) + self.row_positions(rows) + self.column_positions(cells % config.grid[1])

    # Steps -----------------------------------------------------------------------------------------------------

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        """Room for the decoder's keys and values of so many rows."""
        L, dtype = self.config.num_codes, self.embed_codes.weight.dtype
        return DecodeState(self.config.decoder, capacity, min(max_length or L, L), device=self.device, dtype=dtype)

    def extend(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R D"]:
        """New tokens of rows. A row begins with its whole caption, `<eot>` and `<sot>` together."""
        begun = self._begin(state, rows, token_ids, counts)
        return last_of(self._decode_new(state, rows, begun), begun.counts)

    def extend_all(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R T D"]:
        """`extend`, returning what predicts the token behind each of the new ones."""
        begun = self._begin(state, rows, token_ids, counts)
        decoded = self._decode_new(state, rows, begun)
        if not any(begun.num_text):
            return decoded
        found = decoded.new_zeros(*token_ids.shape, decoded.shape[2])
        for i, before in enumerate(begun.num_text):
            new = decoded[i, : token_ids.shape[1] - before]
            found[i, before : before + len(new)] = new
        return found

    def _begin(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None
    ) -> _Begun:
        """Encodes the captions of rows that begin."""
        indices = state.indices(rows)
        if all(state.lengths[row] for row in indices):
            return _Begun(token_ids, None if counts is None else list(counts), [0] * len(indices))
        new = [row if counts is None else row[:count] for row, count in _with_counts(token_ids.tolist(), counts)]
        num_text = [
            0 if state.lengths[row] else self._num_text(tokens) for row, tokens in zip(indices, new, strict=True)
        ]
        codes = [tokens[before:] for tokens, before in zip(new, num_text, strict=True)]
        found = list(map(len, codes))
        for row, tokens, before in zip(indices, new, num_text, strict=True):
            if before:
                state.begin_encoded(row, before, self._context(state, tuple(tokens[:before])))
        longest = max(found)
        filled = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in codes], device=token_ids.device)
        return _Begun(filled, None if min(found) == longest else found, num_text)

    def _num_text(self, tokens: list[int]) -> int:
        if self.config.start_id not in tokens:
            raise ValueError(f"a row begins with its whole caption, {END_OF_TEXT} and {START} together.")
        return tokens.index(self.config.start_id)

    def _context(self, state: DecodeState, text: tuple[int, ...]) -> Context:
        """Encoded alone, so that it does not depend on what else is drawn; kept for others that begin with it."""
        if text not in state.contexts:
            while len(state.contexts) >= max(2, state.capacity):
                del state.contexts[next(iter(state.contexts))]
            state.contexts[text] = self.encode(torch.tensor([text], device=self.device))
        return state.contexts[text]

    def _decode_new(self, state: DecodeState, rows: Rows, begun: _Begun) -> Float[Tensor, "R M D"]:
        config, M = self.config, begun.codes.shape[1]
        each = M if begun.counts is None else begun.counts
        state.check_room(rows, each, config.num_codes)
        places = Places(state, rows, M, begun.counts)
        cells = places.slots.clamp(max=config.num_codes - 1)  # what fills up needs some cell too
        mask = None
        if config.local_kernel is not None:
            mask = self.visible[cells, : places.width]
            mask = mask if mask.ndim == 2 else mask[:, None]
        x = self._embedded(begun.codes, cells)
        hidden = self.decoder(x, places=places, context=self._row_contexts(state, rows), mask=mask)
        state.advance(rows, each)
        return hidden

    def _row_contexts(self, state: DecodeState, rows: Rows) -> RowContexts:
        contexts = [state.conditions[row] for row in state.indices(rows)]
        last = state.row_contexts
        if last is None or len(last.contexts) != len(contexts) or any(map(_differ, last.contexts, contexts)):
            state.row_contexts = RowContexts(contexts)
        return state.row_contexts

    # Scores ----------------------------------------------------------------------------------------------------

    def can_score(self, slot: Slot) -> bool:
        first = self.config.start_id + 1
        return all(first <= start and end <= self.vocab_size for start, end in slot.ranges)

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        first = self.config.start_id + 1
        if slot is not None and not self.can_score(slot):
            raise ValueError(
                f"an encoder-decoder scores codes alone, ids {first}..{self.vocab_size - 1}, not {slot.ranges}: what "
                "is text it was given."
            )
        scores = self.head(hidden)
        if slot is None:
            return F.pad(scores, (first, 0), value=-torch.inf)
        if slot.size == self.config.codebook_size:
            return scores
        return torch.cat([scores[..., start - first : end - first] for start, end in slot.ranges], dim=-1)


def _with_counts(tokens: list[list[int]], counts: Sequence[int] | None) -> Iterator[tuple[list[int], int]]:
    return zip(tokens, [len(row) for row in tokens] if counts is None else counts, strict=True)


def _differ(one: object, other: object) -> bool:
    return one is not other
