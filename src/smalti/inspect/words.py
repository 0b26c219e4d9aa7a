"""Words and pictures: which word a picture's codes look at, what a contradicted word costs and where, and what becomes
of a picture when one word's keys and values are those of another.

For bundles that read captions as text ids before the picture, decoder-only or with a text encoder.

Letters: P prompts, L text ids of a caption, h w code grid, N heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import InputError, shortened
from smalti.inspect.attention import attention_weights
from smalti.models.decoder_only import DecoderOnly
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.models.loss import token_nll
from smalti.models.transformer import CrossAttention
from smalti.sequences.layout import Marker, Packed, Slot, SpanValues
from smalti.tasks.images import Pipeline


class DifferingIds(NamedTuple):
    """Two captions of as many text ids that differ in some."""

    ids: Int[Tensor, "2 L"]
    places: tuple[int, ...]
    """The differing ids, counted from 0."""


def difference(pipe: Pipeline, caption: str, other: str, num_words: int = 1) -> DifferingIds:
    """Where two captions differ. Raises InputError unless it is in so many text ids."""
    one, two = (pipe.text_tokenizer.encode(text) for text in (caption, other))
    places = tuple(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    if len(one) != len(two) or len(places) != num_words:
        raise InputError(
            f"{shortened(repr(caption))} and {shortened(repr(other))} differ in {len(places)} of {len(one)} and "
            f"{len(two)} text ids; give two captions that differ in {'one' if num_words == 1 else num_words}."
        )
    return DifferingIds(torch.tensor([one, two]), places)


# Swapping keys and values --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What of one caption is replaced by the same of the other, in every layer."""

    keys: bool = True
    values: bool = True
    following: int | None = 0
    """So many tokens of the caption behind a differing one as well, which have read it; None: all of them, and the
    marker that follows."""
    preceding: int | None = 0
    """So many before it, which only a text encoder lets read it; None: all of them."""
    word: bool = True
    """Whether the differing tokens themselves are swapped."""


@torch.inference_mode()
def swapped_codes(
    pipe: Pipeline, captions: Sequence[str], others: Sequence[str], swaps: Sequence[Swap], num_words: int = 1
) -> Int[Tensor, "P rows h w"]:
    """The likeliest codes, one after the other: of each caption, of the other one, and of the caption after each swap.
    Each two captions differ in `num_words` text ids.

    Of a model with a text encoder the keys and values are those that cross-attention looks at. Raises InputError as
    `difference` does, and if captions have different numbers of text ids.
    """
    found = [difference(pipe, *pair, num_words) for pair in zip(captions, others, strict=True)]
    if len({one.ids.shape[1] for one in found}) != 1:
        raise InputError(
            f"{len(found)} captions have different numbers of text ids; give those of one length together."
        )
    model, each = pipe.model, 2 + len(swaps)
    ids = torch.cat([one.ids[[0, 1] + [0] * len(swaps)] for one in found])  # (P * rows, L)
    rows = [
        _Swapped(swap, each * i + row, each * i + 1, one.places)
        for i, one in enumerate(found)
        for row, swap in enumerate(swaps, 2)
    ]
    if isinstance(model, DecoderOnly):
        codes = _drawn_decoder_only(pipe, model, ids, rows)
    elif isinstance(model, EncoderDecoder):
        codes = _drawn_encoder_decoder(pipe, model, ids, rows)
    else:
        raise InputError(f"{pipe.name} is a {type(model).__name__}; words are swapped in models that read text ids.")
    return codes.unflatten(0, (-1, each))


class _Swapped(NamedTuple):
    """A row that gets something of another one."""

    swap: Swap
    row: int
    source: int
    places: tuple[int, ...]
    """Of the differing ids in the caption."""

    def positions(self, text: int, end: int) -> list[int]:
        """What is swapped of a sequence whose caption begins at `text`, up to `end`."""
        before, behind = self.swap.preceding, self.swap.following
        found: set[int] = set()
        for place in (text + place for place in self.places):
            first = text if before is None else max(place - before, text)
            found.update(range(first, end if behind is None else min(place + 1 + behind, end)))
        return sorted(found if self.swap.word else found - {text + place for place in self.places})


def _drawn_decoder_only(
    pipe: Pipeline, model: DecoderOnly, ids: Int[Tensor, "rows L"], swapped: Sequence[_Swapped]
) -> Int[Tensor, "rows h w"]:
    packed, (text, first), slot = _packed(pipe, ids)
    state = model.new_state(len(ids), first + pipe.bundle.image_length)
    every = slice(0, len(ids))
    model.extend(state, every, packed.token_ids[:, :first])
    for one in swapped:
        positions = one.positions(text, first)
        for both in state.both:
            for part, wanted in enumerate((one.swap.keys, one.swap.values)):
                if wanted:
                    both[part, one.row][:, positions] = both[part, one.source][:, positions]
    # The last token is run again, since it is what predicts the first code, from keys and values as they are now. Where
    # the swap reaches up to it, its own are kept as they were swapped.
    kept = [both[:, :, :, first - 1].clone() for both in state.both]
    state.lengths = [length - 1 for length in state.lengths]
    hidden = model.extend(state, every, packed.token_ids[:, first - 1 : first])
    for one in swapped:
        for both, before in zip(state.both, kept, strict=True):
            for part, wanted in enumerate((one.swap.keys, one.swap.values)):
                if wanted and one.swap.following is None:
                    both[part, one.row, :, first - 1] = before[part, one.row]
    return _greedy(pipe, slot, lambda codes: model.extend(state, every, codes), hidden)


def _drawn_encoder_decoder(
    pipe: Pipeline, model: EncoderDecoder, ids: Int[Tensor, "rows L"], swapped: Sequence[_Swapped]
) -> Int[Tensor, "rows h w"]:
    packed, (text, first), slot = _packed(pipe, ids)
    context = model.encode(packed.token_ids[:, : first - 1])
    for one in swapped:
        positions = one.positions(text, first - 1)
        for held, wanted in ((context.keys, one.swap.keys), (context.values, one.swap.values)):
            for layer in held:
                if wanted:
                    layer[one.row][:, positions] = layer[one.source][:, positions]
    decoded = packed.token_ids[:, first - 1 : first]

    def step(codes: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows D"]:
        nonlocal decoded
        decoded = torch.cat([decoded, codes], dim=1)
        return model.decode(decoded, context)[:, -1]

    return _greedy(pipe, slot, step, model.decode(decoded, context)[:, -1])


def _packed(pipe: Pipeline, ids: Int[Tensor, "rows L"]) -> tuple[Packed, "_Positions", Slot]:
    """Sequences of captions with codes that only stand where others will be drawn, and the slot of these."""
    order, (rows, L), length = pipe.bundle.order("text", "image"), ids.shape, pipe.bundle.image_length
    codes = SpanValues(torch.zeros(rows, length, dtype=torch.long), torch.full((rows,), length))
    packed = pipe.layout.pack(order, {"text": SpanValues(ids, torch.full((rows,), L)), "image": codes})
    positions = _positions(pipe, order, L)
    return packed, positions, pipe.layout.slots[int(packed.slot_ids[0, positions.image])]


class _Positions(NamedTuple):
    """Where the caption's first id and the picture's first code stand."""

    text: int
    image: int


def _positions(pipe: Pipeline, order: str, num_text: int) -> _Positions:
    """Of a sequence whose caption has so many ids."""
    found, before = {}, 0
    for part in pipe.layout[order].parts:
        if isinstance(part, Marker):
            before += 1
            continue
        found[part.segment] = before
        before += (num_text if part.segment == "text" else part.length) + (part.end is not None)
    return _Positions(found["text"], found["image"])


def _greedy(
    pipe: Pipeline, slot: Slot, step: Callable[[Tensor], Tensor], hidden: Float[Tensor, "rows D"]
) -> Int[Tensor, "rows h w"]:
    """The likeliest code of each row, one after the other; `step` runs token ids and gives what predicts the next."""
    offset = pipe.layout.vocabulary["image"].offset
    codes = [pipe.model.logits(hidden, slot).argmax(-1, keepdim=True)]
    while len(codes) < pipe.bundle.image_length:
        codes.append(pipe.model.logits(step(codes[-1] + offset), slot).argmax(-1, keepdim=True))
    return torch.cat(codes, dim=1).view(-1, *pipe.grid)


# Surprise and attention ----------------------------------------------------------------------------------------


@torch.inference_mode()
def picture_nats(pipe: Pipeline, codes: Int[Tensor, "B h w"], captions: Sequence[str]) -> Float[Tensor, "B h w"]:
    """Nats of every code of pictures given their captions."""
    order = pipe.bundle.order("text", "image")
    found = []
    for picture, caption in zip(codes, captions, strict=True):
        words = torch.tensor([pipe.text_tokenizer.encode(caption)])
        length = torch.tensor([words.shape[1]])
        image = SpanValues(picture.view(1, -1), torch.tensor([picture.numel()]))
        packed = pipe.layout.pack(order, {"text": SpanValues(words, length), "image": image})
        nats = token_nll(pipe.model, packed, pipe.layout.slots)
        first = _positions(pipe, order, words.shape[1]).image
        found.append(nats[0, first : first + picture.numel()].view(picture.shape))
    return torch.stack(found)


@torch.inference_mode()
def attention_to_text(pipe: Pipeline, codes: Int[Tensor, "h w"], caption: str) -> Float[Tensor, "layers N cells L"]:
    """How much of its attention each cell of a picture, when it is predicted, gives to each text id of its caption.
    Of a model with a text encoder this is cross-attention, whose rest goes to the marker behind the caption.

    Raises InputError for a model that is neither.
    """
    if not isinstance(pipe.model, DecoderOnly | EncoderDecoder):
        raise InputError(
            f"{pipe.name} is a {type(pipe.model).__name__}; attention is told of models that read text ids."
        )
    order = pipe.bundle.order("text", "image")
    words = torch.tensor([pipe.text_tokenizer.encode(caption)])
    L = words.shape[1]
    image = SpanValues(codes.reshape(1, -1), torch.tensor([codes.numel()]))
    packed = pipe.layout.pack(order, {"text": SpanValues(words, torch.tensor([L])), "image": image})
    start, first = _positions(pipe, order, L)
    if isinstance(pipe.model, EncoderDecoder):
        weights = _cross_attention(pipe.model, packed.token_ids[:, : first - 1], packed.token_ids[:, first - 1 : -1])
        return weights[..., start : start + L]
    weights = torch.stack([layer[0] for layer in attention_weights(pipe.model, packed.token_ids)])
    return weights[:, :, first - 1 : first - 1 + codes.numel(), start : start + L]


def _cross_attention(
    model: EncoderDecoder, text: Int[Tensor, "1 S"], decoded: Int[Tensor, "1 M"]
) -> Float[Tensor, "layers N M S"]:
    """The weights with which every layer looks from the decoder's inputs at a caption with its marker."""
    context, found = model.encode(text), []

    def note(module: CrossAttention, arguments: tuple) -> None:
        x, _, layer = arguments
        config, keys = module.config, context.keys[layer]  # (1, N, S, Dh)
        q = module.q(x).view(*x.shape[:2], config.num_heads, config.head_dim).transpose(1, 2)
        found.append((q @ keys.transpose(-2, -1) / math.sqrt(config.head_dim)).softmax(-1)[0])

    modules = [module for module in model.modules() if isinstance(module, CrossAttention)]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        model.decode(decoded, context)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)
