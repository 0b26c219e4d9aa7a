"""What a bundle does with pictures: draws them of captions, captions them, draws both from nothing, and tells what each
costs.

    pipe = Pipeline.load("digits")
    [picture] = pipe.generate("dark green eight on bright cyan", seed=3)
    [caption] = pipe.caption([picture])

Letters: B sequences, C H W image, h w code grid, L tokens of a caption.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from smalti.bundle import Bundle
from smalti.engine.generate import Generated, Request, generate, job_executor
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError, InputWarning, shortened
from smalti.image_files import Picture, listed, with_receipt
from smalti.likelihood import score
from smalti.prompts import PromptTokenizer
from smalti.sequences.layout import Layout, SpanValues
from smalti.tasks.clip import Clip
from smalti.tasks.codes import (
    Codes,
    Partial,
)
from smalti.tasks.face import PictureFace, seeds_of
from smalti.text_tokenizer import TextTokenizer

LIKELIHOODS = ("picture", "caption", "pmi")
"""What the model itself says: p(picture | caption), p(caption | picture), or their mutual information. A bundle that
was trained in one order alone has no p(caption | picture)."""
OWN = (*LIKELIHOODS, "both")
"""Of the model itself. "both" is p(picture | caption) · p(caption | picture): the picture says what the caption says,
and is none that the model would hardly draw."""
RERANKERS = (*OWN, "contrastive", "clip")
"""What best-of-n keeps the largest of: a likelihood, or how well caption and picture fit by the bundle's dual encoder,
or by a CLIP model of the user's."""

Pictures = Picture | Iterable[Picture]


class Scores(NamedTuple):
    """Nats of B pairs of picture and caption; the smaller the first two, the likelier."""

    picture_nll_nats: Float[Tensor, " B"]
    """−ln p(picture | caption)."""
    caption_nll_nats: Float[Tensor, " B"] | None
    """−ln p(caption | picture); None from a bundle without an order that has the picture first."""
    pmi_nats: Float[Tensor, " B"]
    """Pointwise mutual information, ln p(picture | caption) − ln p(picture): how much the caption tells."""

    def merit(self, rerank: str) -> Float[Tensor, " B"]:
        """What best-of-n keeps the largest of, in nats, by one of `OWN`."""
        if rerank in ("caption", "both"):
            assert self.caption_nll_nats is not None
            return -self.caption_nll_nats - (self.picture_nll_nats if rerank == "both" else 0)
        return {"picture": -self.picture_nll_nats, "pmi": self.pmi_nats}[rerank]


class DrawnPair(NamedTuple):
    picture: Image.Image
    caption: str


class Pipeline(PictureFace):
    """A bundle that draws pictures of captions, and what it does. `load` reads one.

    Raises InputError for a bundle without both tokenizers, or without an order that has the caption first.
    """

    def __init__(self, bundle: Bundle):
        text_tokenizer = bundle.text_tokenizer
        if bundle.pictures is None or not isinstance(text_tokenizer, TextTokenizer | PromptTokenizer):
            raise InputError(
                f"{bundle.name} is a bundle of {bundle.kind}, not of pictures with captions; smalti info says what it "
                "holds."
            )
        super().__init__(bundle)
        self.clip: Clip | None = None
        """What reranks by "clip": of the user's, and not part of the bundle."""
        self.image_tokenizer, self.text_tokenizer = bundle.image_tokenizer, text_tokenizer
        self.sampling = bundle.sampling

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the bundle to the hub's `owner/name`; returns its address. Needs the extra "hub"."""
        return self.bundle.push_to_hub(repository, private=private)

    # Pictures from captions ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        best_of: int = 1,
        rerank: str | None = None,
        negative_prompt: str | None = None,
        scale: int | None = None,
        upscale: bool = False,
        batch_size: int = 64,
        **sampling: Any,
    ) -> list[Image.Image]:
        """`n` pictures of each prompt, those of one prompt together, each enlarged `scale` times; with `upscale` by the
        bundle's upsampler before that.

        Picture i of a prompt is drawn with the seed `seed + i`, whatever else is asked for; `seed` may be one for each
        prompt. With `best_of` m > 1 it is the best, by `rerank` (see RERANKERS; by default the first of `rerankers`),
        of m pictures drawn with the seeds from `seed + i · m` on. Guidance steers away from pictures without a caption,
        or from those of `negative_prompt`. `sampling` are fields of `SampleConfig`. Every picture carries its receipt
        in `info["smalti"]`. Raises InputError for unknown words.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check_drawn_size(scale, upscale)  # before the work, not after it
        config = self.sample_config(self.sampling.picture, sampling)
        executor = self.executor(len(prompts) * n * best_of, batch_size)
        drawn = self._draw_pictures(prompts, config, seed, n, best_of, rerank, negative_prompt, batch_size, executor)
        codes = self._codes([found for _, found in drawn])
        pictures = self.decode(codes, scale=scale, upscale=upscale)
        shared = {"negative_prompt": negative_prompt, "sampling": asdict(config), "executor": executor}
        shared |= self.upscale_receipt(upscale)
        if best_of > 1:
            shared |= {"best_of": best_of, "rerank": rerank or self.rerankers[0]}
        repeated = [prompt for prompt in prompts for _ in range(n)]
        return [
            with_receipt(
                picture,
                self.receipt(task="generate", prompt=prompt, seed=drawn_seed, codes=found.flatten().tolist(), **shared),
            )
            for picture, prompt, (drawn_seed, _), found in zip(pictures, repeated, drawn, codes, strict=True)
        ]

    def generate_codes(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        best_of: int = 1,
        rerank: str | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 64,
        executor: str | None = None,
        **sampling: Any,
    ) -> Codes:
        """The codes of what `generate` draws. `executor` is one of `EXECUTORS`; by default as there."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.sample_config(self.sampling.picture, sampling)
        drawn = self._draw_pictures(prompts, config, seed, n, best_of, rerank, negative_prompt, batch_size, executor)
        return self._codes([found for _, found in drawn])

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        negative_prompt: str | None = None,
        scale: int | None = None,
        **sampling: Any,
    ) -> Iterator[Partial]:
        """The picture of a prompt as it comes, code by code; the last is what `generate` returns."""
        config = self.sample_config(self.sampling.picture, sampling)
        request = self.picture_request(self.whole(prompt), seed, negative_prompt, config)
        yield from self._streamed(request, config, scale)

    def _draw_pictures(
        self,
        prompts: list[str],
        config: SampleConfig,
        seed: int | Sequence[int],
        n: int,
        best_of: int,
        rerank: str | None,
        negative_prompt: str | None,
        batch_size: int,
        executor: str | None,
    ) -> list[tuple[int, Generated]]:
        """Each kept sequence with the seed it was drawn from."""
        self.check_drawing(n, best_of, rerank)
        seeds = seeds_of(seed, len(prompts), "prompts")
        requests = [
            self.picture_request(words, first + i, negative_prompt, config)
            for words, first in zip(self._all_whole(prompts), seeds, strict=True)
            for i in range(n * best_of)
        ]
        found = generate(self.model, self.layout, requests, config, batch_size=batch_size, executor=executor)
        seeded = [(request.seed, drawn) for request, drawn in zip(requests, found, strict=True)]
        if best_of == 1:
            return seeded
        return [seeded[i] for i in self.best(found, best_of, rerank, batch_size)]

    def picture_request(
        self, words: Int[Tensor, " L"], seed: int, negative_prompt: str | None, config: SampleConfig
    ) -> Request:
        """A picture of a whole caption, with what guidance steers away from if there is any."""
        order = self.bundle.order("text", "image")
        request = Request(order=order, given={"text": words}, seed=seed)
        if config.guidance_scale == 1:
            if negative_prompt is not None:
                raise InputError(
                    f"negative_prompt {negative_prompt!r} steers by guidance, and guidance_scale is 1, which is none; "
                    "raise it, for example to 2."
                )
            return request
        if negative_prompt is not None:
            return replace(request, null=Request(order=order, given={"text": self.whole(negative_prompt)}))
        return replace(request, null=self.uncaptioned(words))

    def check_drawing(self, n: int, best_of: int, rerank: str | None) -> None:
        """Raises InputError or ValueError for numbers of pictures and candidates that cannot be."""
        if n < 1 or best_of < 1:
            raise ValueError(f"n is {n} and best_of {best_of}; both must be at least 1.")
        if rerank is not None and rerank not in RERANKERS:
            raise ValueError(f"rerank {rerank!r} is unknown; choose one of {', '.join(RERANKERS)}.")
        if rerank is not None and best_of == 1:
            raise InputError(f"rerank {rerank!r} has one picture to choose from; give best_of 2 or more as well.")
        if rerank is not None and rerank not in self.rerankers:
            lacks = {
                "contrastive": "no dual encoder (reranker/)",
                "clip": "no CLIP model: name its folder, --clip FOLDER",
            }.get(rerank, "no order with image before text")
            raise InputError(
                f"the bundle {self.name} has {lacks}, so it cannot rerank by {rerank!r}; "
                f"choose one of {', '.join(self.rerankers)}."
            )

    @property
    def rerankers(self) -> tuple[str, ...]:
        """Those of RERANKERS that this bundle has; the first is taken where none is named."""
        return self.bundle.rerankers if self.clip is None else ("clip", *self.bundle.rerankers)

    def best(self, found: Sequence[Generated], best_of: int, rerank: str | None, batch_size: int) -> list[int]:
        """Which of every `best_of` sequences is kept."""
        words = [sequence.spans["text"] for sequence in found]
        merit = self.merit(self._codes(found), words, rerank or self.rerankers[0], batch_size=batch_size)
        return [i * best_of + int(best) for i, best in enumerate(merit.view(-1, best_of).argmax(1))]

    def merit(
        self, codes: Codes, words: Sequence[Int[Tensor, " L"]], rerank: str, *, batch_size: int = 64
    ) -> Float[Tensor, " B"]:
        """What best-of-n keeps the largest of, by one of `rerankers`, for codes and the text ids of their captions."""
        if rerank == "pmi":
            return self.score_codes(codes, words, batch_size=batch_size).merit(rerank)
        if rerank in OWN:  # no more passes than these need
            given = {"picture": ("text", "image"), "caption": ("image", "text")}
            asked = given.values() if rerank == "both" else [given[rerank]]
            nats = [self._nats(codes, words, order, order[1:], batch_size)[order[1]] for order in asked]
            return -torch.stack(nats).sum(0)
        found = []
        for start in range(0, len(codes), batch_size):
            part = slice(start, start + batch_size)
            if rerank == "contrastive":
                assert self.bundle.reranker is not None
                found.append(self.bundle.reranker.fit(codes[part].flatten(1), words[part]))
            else:
                assert self.clip is not None
                captions = [self.text_tokenizer.decode(ids.tolist()) for ids in words[part]]
                found.append(self.clip.fit(self.decode(codes[part], scale=1), captions))
        return torch.cat(found) if found else torch.zeros(0)

    # Captions from pictures, both from nothing -----------------------------------------------------------------

    def caption(self, pictures: Pictures, *, seed: int = 0, batch_size: int = 64, **sampling: Any) -> list[str]:
        """A caption of each picture (or of the picture in each file), by default the likeliest word at each place.

        Raises InputError for a picture of the wrong size or mode.
        """
        codes = self.encode(pictures, batch_size=batch_size)
        return self.caption_codes(codes, seed=seed, batch_size=batch_size, **sampling)

    def caption_codes(self, codes: Codes, *, seed: int = 0, batch_size: int = 64, **sampling: Any) -> list[str]:
        """`caption` of codes."""
        config = self.sample_config(self.sampling.caption, sampling)
        requests = [self.caption_request(row, seed, config) for row in codes]
        found = generate(self.model, self.layout, requests, config, batch_size=batch_size)
        return [self.text(sequence) for sequence in found]

    def caption_request(self, codes: Int[Tensor, "h w"], seed: int, config: SampleConfig) -> Request:
        """A caption of a picture's codes."""
        null = None if config.guidance_scale == 1 else Request(order=self.bundle.order("text", "image"))
        return Request(order=self.bundle.order("image", "text"), given={"image": codes.flatten()}, seed=seed, null=null)

    def pairs(self, n: int, seed: int = 0, *, scale: int | None = None, **settings: Any) -> list[DrawnPair]:
        """`n` pictures with captions, both from nothing; `settings` are those of `pair_codes`."""
        codes, captions = self.pair_codes(n, seed, **settings)
        return [DrawnPair(*pair) for pair in zip(self.decode(codes, scale=scale), captions, strict=True)]

    def pair_codes(
        self,
        n: int,
        seed: int = 0,
        *,
        order: str | None = None,
        best_of: int = 1,
        rerank: str | None = None,
        batch_size: int = 64,
        **sampling: Any,
    ) -> tuple[Codes, list[str]]:
        """Codes and captions of `n` pairs, pair i drawn with the seed `seed + i`; with `best_of` m > 1, the best of m
        with the seeds from `seed + i · m` on. `order` names the layout's order to follow; by default the model chooses.
        Drawn from the model's own distribution unless `sampling` says otherwise. With guidance the caption comes first
        and the picture is guided by it."""
        config = self.sample_config(SampleConfig(), sampling)
        self.check_drawing(n, best_of, rerank)
        guided = config.guidance_scale != 1
        if guided and order not in (None, self.bundle.order("text", "image")):
            raise ValueError(f"guidance needs the caption before the picture; order {order!r} has it after.")
        order = self.bundle.order("text", "image") if guided else order
        requests = [Request(order=order, seed=seed + i) for i in range(n * best_of)]
        unguided = replace(config, guidance_scale=1.0)
        found = generate(self.model, self.layout, requests, unguided, batch_size=batch_size)
        if guided:
            words = [sequence.spans["text"] for sequence in found]
            requests = [self.picture_request(w, seed + i, None, config) for i, w in enumerate(words)]
            found = generate(self.model, self.layout, requests, config, batch_size=batch_size)
        if best_of > 1:
            found = [found[i] for i in self.best(found, best_of, rerank, batch_size)]
        return self._codes(found), [self.text(sequence) for sequence in found]

    # Completing what is begun ----------------------------------------------------------------------------------

    def complete(
        self,
        picture: Image.Image | Path | str,
        *,
        rows: int,
        caption: str | None = None,
        seed: int = 0,
        n: int = 1,
        scale: int | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """`n` pictures that keep the first `rows` rows of the picture's codes and draw the rest, to fit `caption` if
        one is given. Guidance needs a caption."""
        if not 0 <= rows <= self.grid[0]:
            raise ValueError(f"rows is {rows}; expected 0 to {self.grid[0]}, the rows of codes in a picture.")
        kept = self.encode([picture])[0, :rows]
        config = self.sample_config(self.sampling.picture if caption else SampleConfig(), sampling)
        executor = self.executor(n)
        codes = self.complete_codes(kept, caption=caption, seed=seed, n=n, executor=executor, **asdict(config))
        sampling = asdict(config)
        details = {"task": "complete", "prompt": caption, "rows": rows, "sampling": sampling, "executor": executor}
        return [
            with_receipt(drawn, self.receipt(seed=seed + i, codes=row.flatten().tolist(), **details))
            for i, (drawn, row) in enumerate(zip(self.decode(codes, scale=scale), codes, strict=True))
        ]

    def complete_codes(
        self,
        kept: Int[Tensor, "rows w"],
        *,
        caption: str | None = None,
        seed: int = 0,
        n: int = 1,
        executor: str | None = None,
        **sampling: Any,
    ) -> Codes:
        """The codes of what `complete` draws below the rows of codes `kept`."""
        config = self.sample_config(self.sampling.picture if caption else SampleConfig(), sampling)
        _check_completing(n, config, caption is not None)
        request = self.complete_request(kept, caption, seed, config)
        requests = [replace(request, seed=seed + i) for i in range(n)]
        return self._codes(generate(self.model, self.layout, requests, config, executor=executor))

    def complete_request(
        self, kept: Int[Tensor, "rows w"], caption: str | None, seed: int, config: SampleConfig
    ) -> Request:
        """A picture that begins with rows of codes."""
        words = None if caption is None else self.whole(caption)
        alone = replace(self.uncaptioned(words, image=kept.flatten()), seed=seed)
        if words is None:
            return alone
        given = {"text": words, "image": kept.flatten()}
        null = None if config.guidance_scale == 1 else alone
        return Request(order=self.bundle.order("text", "image"), given=given, seed=seed, null=null)

    def complete_caption(self, beginning: str, *, seed: int = 0, n: int = 1, **sampling: Any) -> list[str]:
        """`n` captions that start with the given words, which may be none. Raises InputError if the bundle has not
        learned how captions go on without a picture."""
        config = self.sample_config(SampleConfig(), sampling)
        _check_completing(n, config, False)
        layout, given = self._captions_alone(), {"text": self._words(beginning)}
        [order] = layout.orders
        requests = [Request(order=order, given=given, begun="text", seed=seed + i) for i in range(n)]
        return [self.text(sequence) for sequence in generate(self.model, layout, requests, config)]

    def _captions_alone(self) -> Layout:
        """The order that learns p(caption), up to the caption's end: no picture is drawn behind it."""
        for order in self.layout.orders.values():
            if order.spans[0].segment == "text" and order.spans[0].counted:
                parts = order.parts[: order.parts.index(order.spans[0]) + 1]
                return Layout(self.layout.vocabulary, [replace(order, parts=parts)])
        instead = "; it draws pictures of whole captions: smalti generate."
        if self.bundle.can_caption:
            order = self.bundle.order("image", "text")
            instead = f"; its order {order!r} writes captions of a picture: smalti caption PICTURE."
        raise InputError(
            f"the bundle {self.name} cannot complete a caption by itself, it never learned p(caption): in its orders a "
            f"caption that comes first is given, not learned{instead}"
        )

    # Likelihood ------------------------------------------------------------------------------------------------

    def score(self, pictures: Pictures, captions: str | Sequence[str], *, batch_size: int = 64) -> Scores:
        """What each picture and its caption cost given the other, in nats. Raises InputError for unknown words."""
        pictures, captions = listed(pictures), [captions] if isinstance(captions, str) else captions
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions; give one caption a picture.")
        words = self._all_whole(captions)
        return self.score_codes(self.encode(pictures, batch_size=batch_size), words, batch_size=batch_size)

    def score_codes(self, codes: Codes, words: Sequence[Int[Tensor, " L"]], *, batch_size: int = 64) -> Scores:
        """`score` of codes and text ids."""
        text_first = self._nats(codes, words, ("text", "image"), ("image",), batch_size)
        image_first, empty = None, self._empty_caption_order()
        if empty is None or self.bundle.has_order("image", "text"):
            image_first = self._nats(codes, words, ("image", "text"), ("image", "text"), batch_size)
        caption_nll_nats = None if image_first is None else image_first["text"]
        alone = image_first
        if empty is not None:
            nothing = [self._null_of(len(ids)) for ids in words]
            alone = self._nats(codes, nothing, ("text", "image"), ("image",), batch_size)
        assert alone is not None
        return Scores(text_first["image"], caption_nll_nats, alone["image"] - text_first["image"])

    def _nats(
        self,
        codes: Codes,
        words: Sequence[Int[Tensor, " L"]],
        order: tuple[str, str],
        segments: Sequence[str],
        batch_size: int,
    ) -> dict[str, Float[Tensor, " B"]]:
        """What each of these segments costs in sequences with the spans of `order`, in nats."""
        if not len(codes):
            return dict.fromkeys(segments, torch.zeros(0))
        lengths = torch.tensor([len(ids) for ids in words])
        spans = {
            "image": SpanValues(codes.flatten(1), torch.full((len(codes),), self.bundle.image_length)),
            "text": SpanValues(nn.utils.rnn.pad_sequence(list(words), batch_first=True), lengths),
        }
        name = self.bundle.order(*order)
        return score(self.model, self.layout, name, spans, segments=tuple(segments), batch_size=batch_size)

    # Pictures and codes ----------------------------------------------------------------------------------------

    def executor(self, num_requests: int, batch_size: int = 64) -> str:
        """What draws so many pictures; their receipts name it."""
        return job_executor(self.model, self.layout, num_requests, batch_size)

    # Small things ----------------------------------------------------------------------------------------------

    def text(self, sequence: Generated) -> str:
        """The caption that a sequence has."""
        return self.text_tokenizer.decode(sequence.spans["text"].tolist())

    def _null_of(self, length: int) -> Int[Tensor, " L"]:
        """What stands for a caption of so many tokens where there is none."""
        return torch.tensor(self.text_tokenizer.null_of(length), dtype=torch.long)

    def _words(self, caption: str) -> Int[Tensor, " L"]:
        return torch.tensor(self.text_tokenizer.encode(caption), dtype=torch.long)

    def whole(self, caption: str) -> Int[Tensor, " L"]:
        """The numbers of a caption that must be whole. Raises InputError for unknown words."""
        return self._all_whole([caption])[0]

    def _all_whole(self, captions: Sequence[str]) -> list[Int[Tensor, " L"]]:
        """The numbers of captions that must be whole: of a shorter one the model would make up the rest. One warning
        counts those that are cut."""
        span = self.layout[self.bundle.order("text", "image")].span("text")
        found, lengths = [], []
        for caption in captions:
            words = self._words(caption)
            if span.end is None and len(words) != span.length:
                raise InputError(
                    f"caption {shortened(caption)!r} has {len(words)} words; this bundle's captions have {span.length}."
                )
            lengths.append(len(words))
            if len(words) > span.length:
                kept = self.text_tokenizer.encode_within(caption, span.length).numbers
                words = torch.tensor(kept, dtype=torch.long)
            found.append(words)
        num_cut = sum(length > span.length for length in lengths)
        if num_cut:
            which = "the caption was" if len(captions) == 1 else f"{num_cut} of {len(captions)} captions were"
            warnings.warn(
                f"{which} cut to {span.length} tokens, as many as this bundle takes; the longest has {max(lengths)}.",
                InputWarning,
                stacklevel=4,
            )
        return found

    def uncaptioned(self, words: Int[Tensor, " L"] | None = None, **given: Int[Tensor, " L"]) -> Request:
        """A picture without a caption, what guidance of one of `words` steers away from: behind an empty caption where
        captions may have any length (or what stands for one of that length), else in the order that has the picture
        first."""
        if (order := self._empty_caption_order()) is not None:
            return Request(order=order, given={"text": self._null_of(0 if words is None else len(words)), **given})
        return Request(order=self.bundle.order("image", "text"), given=given)

    def _empty_caption_order(self) -> str | None:
        """The order with the caption first, if its captions may be empty."""
        if not self.bundle.has_order("text", "image"):
            return None
        order = self.layout[self.bundle.order("text", "image")]
        return order.name if order.span("text").end is not None else None


def _check_completing(n: int, config: SampleConfig, captioned: bool) -> None:
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1.")
    if config.guidance_scale != 1 and not captioned:
        raise InputError(
            f"guidance_scale is {config.guidance_scale}, but guidance follows the caption of a picture, and none is "
            "given: add one, or leave the guidance out."
        )
