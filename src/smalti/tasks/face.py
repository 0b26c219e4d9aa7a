"""What every face of a bundle has: the bundle by name, loaded and saved; and what those of pictures have.

Letters: B pictures, H W rows and columns of pixels, h w of codes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smalti.bundle import Bundle
from smalti.engine.generate import Generated, Request, stream
from smalti.engine.sampling import SampleConfig
from smalti.image_files import Picture, PictureConfig, checked_scale, to_images
from smalti.image_tokenizers.titok import TiTok
from smalti.tasks.codes import (
    Codes,
    Partial,
    decode,
    decode_images,
    drawn_pictures,
    encode_images,
    grid_of,
    partial_picture,
    receipt,
    sample_config,
)


class Face:
    """A bundle as people use it. Each kind of bundle has a face of its own, which adds what can be done with it."""

    def __init__(self, bundle: Bundle):
        self.bundle, self.model, self.layout = bundle, bundle.model, bundle.layout

    @classmethod
    def load(
        cls, name: str | Path, *, device: torch.device | str = "auto", dtype: str = "auto", weights: str = "float32"
    ) -> Self:
        """A bundle from its folder, by the name of one that ships, or by a hub's `owner/name` (see `Bundle.load`)."""
        return cls(Bundle.load(name, device=device, dtype=dtype, weights=weights))

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def weights_sha256(self) -> str:
        """What receipts know the bundle by."""
        return self.bundle.weights_sha256

    def save(self, directory: Path | str, *, half: bool = False, force: bool = False) -> None:
        """Writes the bundle as a folder (see `Bundle.save`)."""
        self.bundle.save(directory, half=half, force=force)


class PictureFace(Face):
    """A bundle that draws pictures as codes of its image tokenizer."""

    @property
    def pictures(self) -> PictureConfig:
        """What its pictures are."""
        assert self.bundle.pictures is not None
        return self.bundle.pictures

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's codes."""
        return grid_of(self.bundle)

    @property
    def has_patches(self) -> bool:
        """Whether a code stands for the patch of its cell. TiTok's stand for the whole picture."""
        return not isinstance(self.bundle.image_tokenizer, TiTok)

    def receipt(self, **details: Any) -> dict[str, Any]:
        """How a picture was made: what is known of the bundle, and the details."""
        return receipt(self.bundle, **details)

    def encode(self, pictures: Picture | Iterable[Picture], *, batch_size: int = 64) -> Codes:
        """Codes of pictures or picture files. Raises InputError for a picture of the wrong size or mode."""
        return self.encode_images(to_images(pictures, self.pictures), batch_size=batch_size)

    def encode_images(self, images: Float[Tensor, "B 3 H W"], *, batch_size: int = 64) -> Codes:
        """Codes of images in [0, 1], on the CPU."""
        return encode_images(self.bundle, images, batch_size=batch_size)

    def decode(self, codes: Codes, *, scale: int | None = None, upscale: bool = False) -> list[Image.Image]:
        """Pictures of codes, each enlarged `scale` times; on a CPU each decoded alone: none depends on the others. With
        `upscale` the bundle's upsampler makes them larger first, and `scale` is 1 by default."""
        return decode(self.bundle, codes, scale=scale, upscale=upscale)

    def check_drawn_size(self, scale: int | None, upscale: bool) -> None:
        """Raises InputError without an upsampler that makes pictures larger, ValueError if they would get too large."""
        checked_scale(drawn_pictures(self.bundle, upscale) if upscale else self.pictures, scale)

    def upscale_receipt(self, upscale: bool) -> dict[str, Any]:
        """What a receipt says of how a picture was made larger."""
        return {"upsampler_sha256": self.bundle.upsampler_sha256} if upscale else {}

    def decode_images(self, codes: Codes, *, batch_size: int = 64) -> Float[Tensor, "B 3 H W"]:
        """Images of codes as the image tokenizer gives them, not clamped to [0, 1]. Raises InputError for codes of
        another shape than the grid's, or that are no whole numbers."""
        return decode_images(self.bundle, codes, batch_size=batch_size)

    def sample_config(self, default: SampleConfig, given: Mapping[str, Any]) -> SampleConfig:
        """The default with the settings that are given. Raises ValueError for unknown ones, and for an interval of
        guidance beyond a picture's codes."""
        return sample_config(default, given, self.bundle.image_length)

    def _codes(self, found: Sequence[Generated]) -> Codes:
        rows = [sequence.spans["image"].view(self.grid) for sequence in found]
        return torch.stack(rows) if rows else torch.zeros(0, *self.grid, dtype=torch.long)

    def _streamed(self, request: Request, config: SampleConfig, scale: int | None) -> Iterator[Partial]:
        """The picture of a request as it comes, code by code."""
        offset, found = self.layout.vocabulary["image"].offset, []
        for step in stream(self.model, self.layout, [request], config):
            found.append(step.token_id - offset)
            yield Partial(torch.tensor(found), partial_picture(self.bundle, found, scale))


def seeds_of(seed: int | Sequence[int], num: int, what: str) -> list[int]:
    """A seed for each of what is asked for: one for all, or one each. Raises ValueError for another number of them."""
    seeds = [int(seed)] * num if isinstance(seed, int | Integral) else [int(one) for one in seed]
    if len(seeds) != num:
        raise ValueError(f"{len(seeds)} seeds for {num} {what}; give one for all, or one each.")
    return seeds
