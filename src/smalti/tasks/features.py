"""What a bundle does that reads captions as features of a text encoder: draws pictures of them, and tells what a
picture costs given its caption.

    pipe = FeaturePipeline.load("out/t2i/bundle", text_encoder="flan-t5-xl")
    [picture] = pipe.generate("a red fox in the snow", seed=3)

Features of a prompt are kept in the user's cache: who draws of it again need not load the text encoder.

Letters: B pictures, h w of codes, n features of a caption, C channels of a feature.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smalti.bundle import Bundle
from smalti.engine.generate import Request, generate, job_executor
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError, InputWarning
from smalti.files import user_cache
from smalti.image_files import listed, with_receipt
from smalti.likelihood import score
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import SpanValues
from smalti.sequences.vocabulary import FEATURES
from smalti.tasks.codes import (
    Codes,
    Partial,
    receipt,
)
from smalti.tasks.face import PictureFace, seeds_of
from smalti.tasks.images import Pictures, Pipeline, Scores
from smalti.text_features import FeatureCache, Features, TextEncoder, prepared


class FeaturePipeline(PictureFace):
    """A bundle that draws pictures of captions, which it reads as features of a text encoder. `load` reads one.

    `text_encoder` is that of the bundle unless another place of it is given; only if one is given, and `fetch`, it may
    be fetched from the hub. It is looked for when the first caption is to be read. Raises InputError for a bundle
    without features, or without an image tokenizer.
    """

    def __init__(self, bundle: Bundle, text_encoder: str | Path | TextEncoder | None = None, *, fetch: bool = True):
        super().__init__(bundle)
        if not bundle.reads_features:
            raise InputError(
                f"{bundle.name} is a bundle of {bundle.kind}, which reads no features; smalti info says what it holds."
            )
        if not bundle.can_draw_features or bundle.pictures is None:
            raise InputError(
                f"{bundle.name} is a bundle of {bundle.kind}, so it makes no pictures: import it again with "
                "--image-tokenizer."
            )
        assert isinstance(bundle.model, DecoderOnly)
        self.reader: DecoderOnly = bundle.model
        self.image_tokenizer, self.sampling = bundle.image_tokenizer, bundle.sampling
        self._given_encoder, self._may_fetch = text_encoder, fetch and text_encoder is not None

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "auto",
        dtype: str = "auto",
        weights: str = "float32",
        text_encoder: str | Path | None = None,
    ) -> Self:
        """A bundle from its folder, or by a hub's `owner/name` (see `Bundle.load`), and the folder of its text encoder,
        or the hub's `owner/name` to fetch it (default: what the bundle names)."""
        return cls(Bundle.load(name, device=device, dtype=dtype, weights=weights), text_encoder)

    # Captions --------------------------------------------------------------------------------------------------

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Raises InputError if it is not there, or is not the one that the bundle was made with."""
        if isinstance(self._given_encoder, TextEncoder):
            return self._given_encoder
        known = self.bundle.text_encoder
        name = self._given_encoder or (None if known is None else known.name)
        if name is None:
            raise InputError(
                f"{self.name} reads captions as {self.reader.config.feature_width} features a token, and does not say "
                "of which text encoder: give the folder of a T5 encoder by --text-encoder."
            )
        encoder = TextEncoder(
            name,
            max_length=self.reader.num_features,
            device=self.bundle.device,
            fetch=self._may_fetch,
        )
        if encoder.width != self.reader.config.feature_width:
            raise InputError(
                f"the text encoder {name} makes {encoder.width} features a token, the model of {self.name} reads "
                f"{self.reader.config.feature_width}: give the one it was trained with."
            )
        if known is not None and known.sha256 not in (None, encoder.sha256):
            raise InputError(
                f"the text encoder {name} has sha256 {encoder.sha256}, {self.name} was trained with {known.sha256}: "
                "give that one by --text-encoder."
            )
        return encoder

    @cached_property
    def _cache(self) -> FeatureCache:
        return FeatureCache(user_cache("features"), self.text_encoder)

    def num_tokens(self, caption: str) -> int:
        """As the text encoder reads it; none of an empty caption."""
        known = self.bundle.text_encoder
        text = prepared(caption, cleaned=known is None or known.cleaned)
        return self.text_encoder.num_tokens(text) if text else 0

    def encoder_receipt(self, captions: Sequence[str]) -> dict[str, Any]:
        """What a receipt says of the text encoder; of captions that are all empty none was asked."""
        if not any(map(str.strip, captions)):
            return {}
        return {"text_encoder": self.text_encoder.name, "text_encoder_sha256": self.text_encoder.sha256}

    def features(self, captions: Sequence[str]) -> list[Features]:
        """What the model reads of each caption. An empty one is no caption: it gives the null condition's, all of them.
        One warning counts captions that are cut to what the model takes."""
        known = self.bundle.text_encoder
        texts = [prepared(caption, cleaned=known is None or known.cleaned) for caption in captions]
        made: dict[str, Features] = {"": self.reader.null_features(self.reader.num_features).cpu()}
        if any(texts):
            # Each by itself, so that a prompt's features never depend on those beside it.
            filled = self._cache.fill(texts, batch_size=1, keep=False)
            made |= {text: self._cache[text] for text in texts if text}
            if filled.num_cut:
                one = filled.num_captions == 1
                which = "the caption was" if one else f"{filled.num_cut} of {filled.num_captions} captions were"
                warnings.warn(
                    f"{which} cut to {self.reader.num_features} tokens, as many as this bundle takes; the longest has "
                    f"{filled.longest}.",
                    InputWarning,
                    stacklevel=3,
                )
        return [made[text] for text in texts]

    # Pictures --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        negative_prompt: str | None = None,
        scale: int | None = None,
        upscale: bool = False,
        batch_size: int = 64,
        **sampling: Any,
    ) -> list[Image.Image]:
        """`n` pictures of each prompt, those of one prompt together, each enlarged `scale` times;
        with `upscale` by the bundle's upsampler before that.

        Picture i of a prompt is drawn with the seed `seed + i`; `seed` may be one for each prompt. Guidance steers away
        from pictures of no caption, or from those of `negative_prompt`. `sampling` are fields of `SampleConfig`. Every
        picture carries its receipt in `info["smalti"]`.
        """
        self.check_drawn_size(scale, upscale)  # before the work, not after it
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.sample_config(self.sampling.picture, sampling)
        executor = job_executor(self.model, self.layout, len(prompts) * n, batch_size)
        requests = self._requests(prompts, seed, n, negative_prompt, config)
        codes = self._draw(requests, config, batch_size, executor)
        shared: dict[str, Any] = {"negative_prompt": negative_prompt, "sampling": asdict(config), "executor": executor}
        shared |= self.upscale_receipt(upscale) | self.encoder_receipt([*prompts, negative_prompt or ""])
        repeated = [prompt for prompt in prompts for _ in range(n)]
        return [
            with_receipt(
                picture,
                receipt(
                    self.bundle,
                    task="generate",
                    prompt=prompt,
                    seed=request.seed,
                    codes=found.flatten().tolist(),
                    **shared,
                ),
            )
            for picture, prompt, request, found in zip(
                self.decode(codes, scale=scale, upscale=upscale), repeated, requests, codes, strict=True
            )
        ]

    def generate_codes(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        negative_prompt: str | None = None,
        batch_size: int = 64,
        executor: str | None = None,
        **sampling: Any,
    ) -> Codes:
        """The codes of what `generate` draws. `executor` is one of `EXECUTORS`; by default as there."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.sample_config(self.sampling.picture, sampling)
        return self._draw(self._requests(prompts, seed, n, negative_prompt, config), config, batch_size, executor)

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
        yield from self._streamed(self.prompt_request(prompt, seed, negative_prompt, config), config, scale)

    def picture_request(
        self, features: Features, seed: int, negative: Features | None, config: SampleConfig
    ) -> Request:
        """A picture of a caption's features, and what guidance steers away from: the features of a negative prompt, or
        as many of those that stand for no caption."""
        order = self.bundle.order(FEATURES, "image")
        null = None
        if config.guidance_scale != 1:
            steered_from = self.reader.null_features(len(features)) if negative is None else negative
            null = Request(order=order, features=steered_from)
        elif negative is not None:
            raise InputError(
                "negative_prompt steers by guidance, and guidance_scale is 1, which is none; raise it, for example to "
                "7.5."
            )
        return Request(order=order, features=features, seed=seed, null=null)

    def prompt_request(self, prompt: str, seed: int, negative_prompt: str | None, config: SampleConfig) -> Request:
        """What draws the picture of a prompt."""
        [request] = self._requests([prompt], seed, 1, negative_prompt, config)
        return request

    def _requests(
        self,
        prompts: Sequence[str],
        seed: int | Sequence[int],
        n: int,
        negative_prompt: str | None,
        config: SampleConfig,
    ) -> list[Request]:
        """One for every picture to draw."""
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1.")
        seeds = seeds_of(seed, len(prompts), "prompts")
        captions = [*prompts] if negative_prompt is None else [*prompts, negative_prompt]
        features = self.features(captions)
        negative = None if negative_prompt is None else features.pop()
        firsts = [
            self.picture_request(one, first, negative, config) for one, first in zip(features, seeds, strict=True)
        ]
        # The pictures of a prompt share its features, so that what they begin with is computed once.
        return [replace(first, seed=first.seed + i) for first in firsts for i in range(n)]

    def _draw(self, requests: Sequence[Request], config: SampleConfig, batch_size: int, executor: str | None) -> Codes:
        found = generate(self.model, self.layout, requests, config, batch_size=batch_size, executor=executor)
        return self._codes(found)

    # Likelihood ------------------------------------------------------------------------------------------------

    def score(self, pictures: Pictures, captions: str | Sequence[str], *, batch_size: int = 64) -> Scores:
        """What each picture costs given its caption, in nats, and how much the caption tells of it. There is no
        p(caption | picture)."""
        pictures, captions = listed(pictures), [captions] if isinstance(captions, str) else captions
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions; give one caption a picture.")
        codes = self.encode(pictures, batch_size=batch_size)
        return self.score_codes(codes, self.features(captions), batch_size=batch_size)

    def score_codes(self, codes: Codes, features: Sequence[Features], *, batch_size: int = 64) -> Scores:
        """`score` of codes and features. Without a caption a picture stands behind as many null features."""
        if not len(codes):
            return Scores(torch.zeros(0), None, torch.zeros(0))
        given = self.nats(codes, features, batch_size=batch_size)
        none = self.nats(codes, [self.reader.null_features(len(one)) for one in features], batch_size=batch_size)
        return Scores(given, None, none - given)

    def nats(self, codes: Codes, features: Sequence[Features], *, batch_size: int = 64) -> Float[Tensor, " B"]:
        """−ln p(picture | features) of each picture's codes."""
        lengths = torch.full((len(codes),), self.bundle.image_length)
        return score(
            self.model,
            self.layout,
            self.bundle.order(FEATURES, "image"),
            {"image": SpanValues(codes.flatten(1), lengths)},
            features=[one.cpu() for one in features],
            segments=["image"],
            batch_size=batch_size,
        )["image"]


def captions_face(
    bundle: Bundle, text_encoder: str | Path | None = None, *, fetch: bool = True
) -> Pipeline | FeaturePipeline:
    """What draws captions with a bundle, as it reads them (see `FeaturePipeline`). Raises InputError if it does not,
    and for a text encoder that it has no use for."""
    if bundle.reads_features:
        return FeaturePipeline(bundle, text_encoder, fetch=fetch)
    if text_encoder is not None:
        raise InputError(
            f"{bundle.name} is a bundle of {bundle.kind}, which reads captions without a text encoder; leave out "
            "--text-encoder."
        )
    return Pipeline(bundle)
