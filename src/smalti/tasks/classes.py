"""What a bundle of classes does: draws pictures of them, and tells what a picture costs given its class.

    pipe = ClassPipeline.load("out/c2i/bundle")
    [picture] = pipe.generate(207, seed=3, guidance_scale=2.0)

Letters: B pictures, H W rows and columns of pixels, h w of codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smalti.bundle import LABEL, Bundle
from smalti.engine.generate import Request, generate, job_executor
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import PictureConfig, checked_scale, with_receipt
from smalti.likelihood import score
from smalti.sequences.layout import SpanValues
from smalti.tasks.codes import Codes, Partial
from smalti.tasks.face import PictureFace, seeds_of

CLASS = "generate class"
"""The task that receipts of its pictures name."""


class ClassPipeline(PictureFace):
    """A bundle that draws pictures of classes. `load` reads one.

    One without an image tokenizer draws and scores codes; asked for pictures, it raises InputError. So does `load` for
    a bundle without classes.
    """

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        classes = bundle.classes
        if classes is None:
            raise InputError(
                f"{bundle.name} is a bundle of {bundle.kind}, which knows no classes; smalti info says what it holds."
            )
        self.classes, self.sampling = classes, bundle.sampling

    @property
    def image_tokenizer(self) -> Any:
        return self._with_pictures().image_tokenizer

    @property
    def pictures(self) -> PictureConfig:
        pictures = self._with_pictures().pictures
        assert pictures is not None
        return pictures

    def _with_pictures(self) -> Bundle:
        """The bundle. Raises InputError if it has no image tokenizer."""
        if self.bundle.image_tokenizer is None:
            raise InputError(
                f"{self.name} draws codes of classes, and has no image tokenizer to make pictures of them: import it "
                "again with --image-tokenizer, or take the codes alone (ClassPipeline.generate_codes)."
            )
        return self.bundle

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's codes; one row, where no image tokenizer says how they stand."""
        return (1, self.bundle.image_length) if self.bundle.image_tokenizer is None else super().grid

    def generate(
        self,
        classes: str | int | Sequence[str | int],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        scale: int | None = None,
        batch_size: int = 64,
        **sampling: Any,
    ) -> list[Image.Image]:
        """`n` pictures of each class, given by its number or name, those of one class together.

        Picture i of a class is drawn with the seed `seed + i`; `seed` may be one for each class. `sampling` are fields
        of `SampleConfig`; guidance steers away from pictures of no class. Every picture carries its receipt in
        `info["smalti"]`. Raises InputError for a class there is not, and for guidance without a null condition.
        """
        checked_scale(self.pictures, scale)  # before the work, not after it
        labels, seeds = self._labels_and_seeds(classes, seed, n)
        config = self.sample_config(self.sampling.picture, sampling)
        executor = job_executor(self.model, self.layout, len(labels), batch_size)
        codes = self._draw(labels, seeds, config, batch_size, executor)
        shared = {"sampling": asdict(config), "executor": executor}
        return [
            with_receipt(picture, self.class_receipt(label, drawn_seed, found, **shared))
            for picture, label, drawn_seed, found in zip(
                self.decode(codes, scale=scale), labels, seeds, codes, strict=True
            )
        ]

    def generate_codes(
        self,
        classes: str | int | Sequence[str | int],
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        batch_size: int = 64,
        executor: str | None = None,
        **sampling: Any,
    ) -> Codes:
        """The codes of what `generate` draws. `executor` is one of `EXECUTORS`; by default as there."""
        labels, seeds = self._labels_and_seeds(classes, seed, n)
        return self._draw(labels, seeds, self.sample_config(self.sampling.picture, sampling), batch_size, executor)

    def stream(
        self, class_: str | int, *, seed: int = 0, scale: int | None = None, **sampling: Any
    ) -> Iterator[Partial]:
        """The picture of a class as it comes, code by code; the last is what `generate` returns."""
        checked_scale(self.pictures, scale)
        config = self.sample_config(self.sampling.picture, sampling)
        request = self.class_request(self.classes.find(class_), seed, config)
        yield from self._streamed(request, config, scale)

    def score_codes(self, codes: Codes, labels: Sequence[int | None], *, batch_size: int = 64) -> Float[Tensor, " B"]:
        """−ln p(picture | class) of each picture's codes, in nats; None stands for no class. Raises InputError for
        that where the model has no null condition."""
        numbers = [self._null_label() if label is None else label for label in labels]
        ones = torch.ones(len(codes), dtype=torch.long)
        spans = {
            LABEL: SpanValues(torch.tensor(numbers).view(-1, 1), ones),
            "image": SpanValues(codes.flatten(1), ones * self.bundle.image_length),
        }
        return score(self.model, self.layout, self._order, spans, segments=["image"], batch_size=batch_size)["image"]

    def decode(self, codes: Codes, *, scale: int | None = None) -> list[Image.Image]:
        self._with_pictures()
        return super().decode(codes, scale=scale)

    def decode_images(self, codes: Codes, *, batch_size: int = 64) -> Float[Tensor, "B 3 H W"]:
        self._with_pictures()
        return super().decode_images(codes, batch_size=batch_size)

    @property
    def _order(self) -> str:
        return self.bundle.order(LABEL, "image")

    def _null_label(self) -> int:
        if self.bundle.null_label is None:
            raise InputError(
                f"{self.name} was trained without a null condition, so there is nothing that guidance could steer away "
                "from; leave it at 1."
            )
        return self.bundle.null_label

    def class_request(self, label: int, seed: int, config: SampleConfig) -> Request:
        """What draws the picture of a class. Raises InputError for guidance without a null condition."""
        null = None
        if config.guidance_scale != 1:
            null = Request(order=self._order, given={LABEL: torch.tensor([self._null_label()])})
        return Request(order=self._order, given={LABEL: torch.tensor([label])}, seed=seed, null=null)

    def class_receipt(self, label: int, seed: int, codes: Codes, **settings: Any) -> dict[str, Any]:
        """How the picture of a class was made."""
        name = None if self.classes.names is None else self.classes.names[label]
        drawn = codes.flatten().tolist()
        return self.receipt(task=CLASS, label=label, class_name=name, seed=seed, codes=drawn, **settings)

    def _draw(
        self, labels: Sequence[int], seeds: Sequence[int], config: SampleConfig, batch_size: int, executor: str | None
    ) -> Codes:
        requests = [self.class_request(label, seed, config) for label, seed in zip(labels, seeds, strict=True)]
        found = generate(self.model, self.layout, requests, config, batch_size=batch_size, executor=executor)
        return self._codes(found)

    def _labels_and_seeds(
        self, classes: str | int | Sequence[str | int], seed: int | Sequence[int], n: int
    ) -> tuple[list[int], list[int]]:
        """Label and seed of every picture to draw."""
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1.")
        asked = [classes] if isinstance(classes, str | int | Integral) else list(classes)
        seeds = seeds_of(seed, len(asked), "classes")
        labels = [self.classes.find(one) for one in asked]
        return (
            [label for label in labels for _ in range(n)],
            [first + i for first in seeds for i in range(n)],
        )
