"""Words and pictures: which word a picture's codes look at, what a contradicted word costs and where, and what becomes
of a picture when one word's keys and values are those of another.

For bundles that read captions as text ids before the picture, decoder-only or with a text encoder.

Letters: P prompts, L text ids of a caption, h w code grid, N heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import InputError, shortened
from smalti.inspect.attention import attention_weights
from smalti.models.decode_state import DecodeState
from smalti.models.decoder_only import DecoderOnly
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.models.loss import token_nll
from smalti.sequences.layout import Marker, Slot, SpanValues
from smalti.tasks.images import Pipeline


class Difference(NamedTuple):
    """Two captions of as many text ids that differ in one."""

    ids: Int[Tensor, "2 L"]
    place: int
    """The differing id, counted from 0."""


def difference(pipe: Pipeline, caption: str, other: str) -> Difference:
    """Where two captions differ. Raises InputError unless it is in one text id alone."""
    one, two = (pipe.text_tokenizer.encode(text) for text in (caption, other))
    places = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) != len(two) or len(places) != 1:
        raise InputError(
            f"{shortened(repr(caption))} and {shortened(repr(other))} differ in {len(places)} of {len(one)} and "
            f"{len(two)} text ids; give two captions that differ in one."
        )
    return Difference(torch.tensor([one, two]), places[0])


# Swapping keys and values --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What of one caption is replaced by the same of the other, in every layer."""

    keys: bool = True
    values: bool = True
    following: int | None = 0
    """So many tokens of the caption behind the differing one as well, which have read it; None: all of them, and the
    marker that follows."""
    word: bool = True
    """Whether the differing token itself is swapped."""


@torch.inference_mode()
def swapped_codes(pipe: Pipeline, caption: str, other: str, swaps: Sequence[Swap]) -> Int[Tensor, "rows h w"]:
    """The likeliest codes, one after the other, of `caption`, of `other`, and of `caption` after each swap.

    Of a model with a text encoder the keys and values are those that cross-attention looks at. Raises InputError as
    `difference` does.
    """
    found = difference(pipe, caption, other)
    num = 2 + len(swaps)
    ids = found.ids[[0, 1] + [0] * len(swaps)]
    model: Any = pipe.model
    if isinstance(model, DecoderOnly):
        return _drawn_decoder_only(pipe, model, ids, found, swaps)
    if isinstance(model, EncoderDecoder):
        return _drawn_encoder_decoder(pipe, model, ids, found, swaps, num)
    raise InputError(f"{pipe.name} is a {type(model).__name__}; words are swapped in models that read text ids.")


def _drawn_decoder_only(
    pipe: Pipeline, model: DecoderOnly, ids: Int[Tensor, "rows L"], found: Difference, swaps: Sequence[Swap]
) -> Int[Tensor, "rows h w"]:
    order = pipe.bundle.order("text", "image")
    num, L = ids.shape
    spans = {"text": SpanValues(ids, torch.full((num,), L)), "image": _no_codes(pipe, num)}
    packed = pipe.layout.pack(order, spans)
    token_ids, (start, first) = packed.token_ids, _positions(pipe, order, L)
    slot = pipe.layout.slots[int(packed.slot_ids[0, first])]
    state = model.new_state(num, first + pipe.bundle.image_length)
    hidden = model.extend(state, slice(0, num), token_ids[:, :first])
    # What the last token has made of the caption before the swap is made anew: it is run again behind swapped ones.
    for row, swap in enumerate(swaps, 2):
        places = _places(swap, start + found.place, first)
        for both in state.both:
            for part, wanted in enumerate((swap.keys, swap.values)):
                if wanted:
                    both[part, row][:, places] = both[part, 1][:, places]
    if swaps:
        hidden = _run_last_again(model, state, token_ids[:, first - 1 : first], swaps, first)
    return _greedy(pipe, slot, lambda codes: model.extend(state, slice(0, num), codes), hidden)


def _run_last_again(
    model: DecoderOnly, state: DecodeState, last: Int[Tensor, "rows 1"], swaps: Sequence[Swap], first: int
) -> Float[Tensor, "rows D"]:
    """What predicts the first code, from keys and values as they are now. Rows whose swap goes up to the last token
    keep what was swapped there."""
    kept = [both[:, :, :, first - 1].clone() for both in state.both]
    state.lengths = [length - 1 for length in state.lengths]
    hidden = model.extend(state, slice(0, len(last)), last)
    whole = [row for row, swap in enumerate(swaps, 2) if swap.following is None]
    for both, before in zip(state.both, kept, strict=True):
        for part, wanted in enumerate(("keys", "values")):
            for row in whole:
                if getattr(swaps[row - 2], wanted):
                    both[part, row, :, first - 1] = before[part, row]
    return hidden


def _places(swap: Swap, place: int, first: int) -> list[int]:
    end = first if swap.following is None else min(place + 1 + swap.following, first)
    return list(range(place if swap.word else place + 1, end))


def _drawn_encoder_decoder(
    pipe: Pipeline,
    model: EncoderDecoder,
    ids: Int[Tensor, "rows L"],
    found: Difference,
    swaps: Sequence[Swap],
    num: int,
) -> Int[Tensor, "rows h w"]:
    order = pipe.bundle.order("text", "image")
    L = ids.shape[1]
    spans = {"text": SpanValues(ids, torch.full((num,), L)), "image": _no_codes(pipe, num)}
    packed = pipe.layout.pack(order, spans)
    token_ids, first = packed.token_ids, _positions(pipe, order, L).image
    slot = pipe.layout.slots[int(packed.slot_ids[0, first])]
    context = model.encode(token_ids[:, : first - 1])
    for row, swap in enumerate(swaps, 2):
        places = _places(swap, found.place, first - 1)
        for held, wanted in ((context.keys, swap.keys), (context.values, swap.values)):
            for layer in held:
                if wanted:
                    layer[row][:, places] = layer[1][:, places]
    decoded = token_ids[:, first - 1 : first]

    def step(codes: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows D"]:
        nonlocal decoded
        decoded = torch.cat([decoded, codes], dim=1)
        return model.decode(decoded, context)[:, -1]

    return _greedy(pipe, slot, step, model.decode(decoded, context)[:, -1])


def _no_codes(pipe: Pipeline, num: int) -> SpanValues:
    """Codes that only stand where others will be drawn."""
    length = pipe.bundle.image_length
    return SpanValues(torch.zeros(num, length, dtype=torch.long), torch.full((num,), length))


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

    Raises InputError for a model that is not decoder-only.
    """
    if not isinstance(pipe.model, DecoderOnly):
        raise InputError(f"attention to text is told of decoder-only models; {pipe.name} has a text encoder.")
    order = pipe.bundle.order("text", "image")
    words = torch.tensor([pipe.text_tokenizer.encode(caption)])
    L = words.shape[1]
    image = SpanValues(codes.reshape(1, -1), torch.tensor([codes.numel()]))
    packed = pipe.layout.pack(order, {"text": SpanValues(words, torch.tensor([L])), "image": image})
    start, first = _positions(pipe, order, L)
    weights = torch.stack([layer[0] for layer in attention_weights(pipe.model, packed.token_ids)])
    return weights[:, :, first - 1 : first - 1 + codes.numel(), start : start + L]
