"""What a caption does to a picture: nats of each patch with and without it, and which word moves which patch.

Causes, by intervention: a word is taken away, or another stands in its place, and every patch is scored again. Nothing
is read but likelihoods of whole sequences, so any model of pictures with captions can be asked, whatever it is made of.
Letters: B pictures, h w code grid, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bundle import Bundle
from smalti.engine.generate import generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.likelihood import to_device
from smalti.models.base import evaluating
from smalti.models.loss import token_nll
from smalti.sequences.layout import SpanValues
from smalti.sequences.request import Request

MAX_OTHERS = 4
"""Other words that are tried in the place of each."""


class CaptionGain(NamedTuple):
    """Nats of each patch."""

    given: Float[Tensor, "B h w"]
    """−ln p(code | caption, codes before)."""
    alone: Float[Tensor, "B h w"]
    """−ln p(code | codes before), by the order or the empty caption that the model learned it with."""


class WordEffect(NamedTuple):
    """What one word of a caption does."""

    place: int
    """Its number in the caption."""
    word: str
    instead: tuple[str, ...]
    """What stood in its place; "" where it was taken away."""
    nats: Float[Tensor, "h w"]
    """How much more each patch costs then, on average: above 0, the word made the patch likelier."""

    @property
    def total(self) -> float:
        return float(self.nats.sum())


def patch_nats(
    bundle: Bundle, codes: Int[Tensor, "B h w"], captions: Sequence[str], *, batch_size: int = 64
) -> Float[Tensor, "B h w"]:
    """−ln p of every code, given its picture's caption and the codes before, in nats.

    Raises InputError for a bundle that draws no pictures of captions, a caption that is not as long as they must be, or
    unknown words.
    """
    _check(bundle)
    return _nats(bundle, bundle.order("text", "image"), codes, [_words(bundle, text) for text in captions], batch_size)


def caption_gain(
    bundle: Bundle, codes: Int[Tensor, "B h w"], captions: Sequence[str], *, batch_size: int = 64
) -> CaptionGain:
    """What each patch costs with its caption and without. Raises as `patch_nats` does."""
    given = patch_nats(bundle, codes, captions, batch_size=batch_size)
    order, words = bundle.order("text", "image"), [_words(bundle, text) for text in captions]
    if _may_be_empty(bundle):
        words = [_nothing(bundle, len(ids)) for ids in words]
    else:  # the caption comes behind the picture, which does not see it
        order = bundle.order("image", "text")
    return CaptionGain(given, _nats(bundle, order, codes, words, batch_size))


def word_effects(
    bundle: Bundle,
    codes: Int[Tensor, "h w"],
    caption: str,
    *,
    others: Sequence[str] = (),
    batch_size: int = 64,
) -> list[WordEffect]:
    """The effect of each word of a caption on each patch of its picture, in the order of the words.

    A word is taken away where captions may have any length. In its place stand also words that `others`, captions of as
    many words, have there, up to MAX_OTHERS different ones. A word that can neither be taken away nor be replaced is
    left out. Raises InputError as `patch_nats` does, or where that is so of all.
    """
    words = caption.split()
    changed: list[tuple[int, str, str]] = []
    _check(bundle)
    for place, word in enumerate(words):
        instead = [""] if _may_be_empty(bundle) and len(words) > 1 else []
        there = [split[place] for split in map(str.split, others) if len(split) == len(words)]
        instead += [other for other in dict.fromkeys(there) if other != word][:MAX_OTHERS]
        for other in instead:
            text = " ".join([*words[:place], *([other] if other else []), *words[place + 1 :]])
            changed.append((place, other, text))
    if not changed:
        raise InputError(
            f"captions of {bundle.name} have a fixed length, so no word can be taken away; give other captions of "
            f"{len(words)} words (others=[...]) that have other ones in their places."
        )
    texts = [caption, *(text for _, _, text in changed)]
    nats = patch_nats(bundle, codes[None].expand(len(texts), -1, -1), texts, batch_size=batch_size)
    effects = []
    for place, word in enumerate(words):
        rows = [row for row, (at, _, _) in enumerate(changed) if at == place]
        if not rows:
            continue
        moved = (nats[[1 + row for row in rows]] - nats[0]).mean(0)
        effects.append(WordEffect(place, word, tuple(changed[row][1] for row in rows), moved))
    return effects


def drawn_codes(bundle: Bundle, captions: Sequence[str], *, seed: int = 0) -> Int[Tensor, "B h w"]:
    """Pictures drawn from captions as the model holds them likely, without guidance; picture i with the seed
    `seed + i`. Raises as `patch_nats` does."""
    _check(bundle)
    order = bundle.order("text", "image")
    requests = [
        Request(order=order, given={"text": _words(bundle, text)}, seed=seed + number)
        for number, text in enumerate(captions)
    ]
    found = generate(bundle.model, bundle.layout, requests, SampleConfig())
    return torch.stack([sequence.spans["image"] for sequence in found]).view(-1, *bundle.image_tokenizer.config.grid)


@torch.no_grad()
def _nats(
    bundle: Bundle, order: str, codes: Int[Tensor, "B h w"], words: Sequence[Int[Tensor, " L"]], batch_size: int
) -> Float[Tensor, "B h w"]:
    layout, model = bundle.layout, bundle.model
    segment, found = layout.vocabulary["image"], []
    with evaluating(model):
        for start in range(0, len(codes), batch_size):
            some, text = codes[start : start + batch_size].flatten(1).cpu(), words[start : start + batch_size]
            spans = {
                "image": SpanValues(some, torch.full((len(some),), some.shape[1])),
                "text": SpanValues(
                    nn.utils.rnn.pad_sequence(list(text), batch_first=True), torch.tensor([len(ids) for ids in text])
                ),
            }
            packed = to_device(layout.pack(order, spans), model.device)
            nll = token_nll(model, packed, layout.slots).double()
            inside = (packed.token_ids >= segment.offset) & (packed.token_ids < segment.end)
            found.append(nll[inside].view(some.shape).cpu())
    return torch.cat(found).view(codes.shape) if found else torch.zeros(codes.shape, dtype=torch.float64)


def _check(bundle: Bundle) -> None:
    if not bundle.can_draw:
        raise InputError(
            f"{bundle.name} is a bundle of {bundle.kind}, not of pictures drawn from captions; smalti info says what "
            "it holds."
        )


def _may_be_empty(bundle: Bundle) -> bool:
    """Whether captions have any length, none included."""
    return bundle.layout[bundle.order("text", "image")].span("text").end is not None


def _nothing(bundle: Bundle, length: int) -> Int[Tensor, " L"]:
    tokenizer = bundle.text_tokenizer
    assert tokenizer is not None
    return torch.tensor(tokenizer.null_of(length), dtype=torch.long)  # type: ignore[union-attr]


def _words(bundle: Bundle, caption: str) -> Int[Tensor, " L"]:
    tokenizer, span = bundle.text_tokenizer, bundle.layout[bundle.order("text", "image")].span("text")
    assert tokenizer is not None
    ids = torch.tensor(tokenizer.encode(caption), dtype=torch.long)  # type: ignore[union-attr]
    if len(ids) > span.length or (span.end is None and len(ids) != span.length):
        exactly = "at most" if span.end is not None else "exactly"
        raise InputError(
            f"caption {caption!r} has {len(ids)} tokens; captions of {bundle.name} have {exactly} {span.length}."
        )
    return ids
