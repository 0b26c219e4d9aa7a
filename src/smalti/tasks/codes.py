"""What all faces of a bundle of pictures share: pictures to codes and back, settings, receipts.

Letters: B pictures, H W rows and columns of pixels, h w of codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from smalti.bundle import Bundle, smalti_version
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import PictureConfig, to_pictures

Codes = Int[Tensor, "B h w"]


class Partial(NamedTuple):
    """A picture on its way."""

    codes: Int[Tensor, " drawn"]
    """The codes so far, in raster order."""
    picture: Image.Image
    """Their picture; what is not drawn yet is grey."""


@dataclass(frozen=True)
class PictureDecoder:
    """What makes pictures of codes, without the bundle around it, on a CPU."""

    image_tokenizer: Any
    pictures: PictureConfig
    device: ClassVar[torch.device] = torch.device("cpu")

    @property
    def image_length(self) -> int:
        """Codes of a picture."""
        rows, columns = grid_of(self)
        return rows * columns


@torch.inference_mode()
def encode_images(bundle: Bundle, images: Float[Tensor, "B 3 H W"], *, batch_size: int = 64) -> Codes:
    """Codes of images in [0, 1], on the CPU."""
    if not len(images):
        return torch.zeros(0, *grid_of(bundle), dtype=torch.long)
    device = bundle.device
    return torch.cat([bundle.image_tokenizer.encode_images(i.to(device)).cpu() for i in images.split(batch_size)])


def decode(
    bundle: Bundle | PictureDecoder, codes: Codes, *, scale: int | None = None, upscale: bool = False
) -> list[Image.Image]:
    """Pictures of codes, each enlarged `scale` times; on a CPU each decoded alone: none depends on the others. With
    `upscale` the bundle's upsampler makes them larger first."""
    assert bundle.pictures is not None
    alone = bundle.device.type == "cpu"
    images = decode_images(bundle, codes, batch_size=1 if alone else 64)
    if not upscale:
        return to_pictures(images, bundle.pictures, scale)
    assert isinstance(bundle, Bundle)
    config = drawn_pictures(bundle, upscale)
    if not len(images):
        return []
    assert bundle.upsampler is not None
    whole = (images.clamp(0, 1) * 255).round() / 255  # as it was trained on them
    return to_pictures(bundle.upsampler.upsample(whole.to(bundle.device)), config, scale)


def drawn_pictures(bundle: Bundle, upscale: bool) -> PictureConfig:
    """What drawn pictures are: the bundle's own, or with `upscale` the larger ones. Raises InputError for a bundle
    without an upsampler."""
    assert bundle.pictures is not None
    if not upscale:
        return bundle.pictures
    if bundle.upsampler is None:
        raise InputError(
            f"the bundle {bundle.name} has no upsampler; train one (smalti train upsampler), and put it into a bundle: "
            "smalti add-upsampler."
        )
    height, width = bundle.upsampler.config.output_size
    return PictureConfig(height=height, width=width)


@torch.inference_mode()
def decode_images(bundle: Bundle | PictureDecoder, codes: Codes, *, batch_size: int = 64) -> Float[Tensor, "B 3 H W"]:
    """Images of codes as the image tokenizer gives them, not clamped to [0, 1]. Raises InputError for codes of another
    shape than the grid's, or that are no whole numbers."""
    grid, pictures, device = grid_of(bundle), bundle.pictures, bundle.device
    assert pictures is not None
    if codes.shape[1:] != grid or codes.is_floating_point():
        raise InputError(
            f"codes are {tuple(codes.shape)} of {codes.dtype}; expected whole numbers of the shape "
            f"(N, {grid[0]}, {grid[1]}), such as encode and generate_codes return."
        )
    if not len(codes):
        return torch.zeros(0, 3, pictures.height, pictures.width)
    return torch.cat([bundle.image_tokenizer.decode_codes(c.to(device)).cpu() for c in codes.split(batch_size)])


def partial_picture(
    bundle: Bundle | PictureDecoder, found: list[int], scale: int | None, *, kept: Mapping[int, int] | None = None
) -> Image.Image:
    """The picture of its first codes, in raster order, and of the codes `kept` in cells behind them; what is not there
    yet is grey."""
    grid, pictures = grid_of(bundle), bundle.pictures
    assert pictures is not None
    codes = torch.tensor(found + found[:1] * (bundle.image_length - len(found)))
    known = torch.arange(bundle.image_length) < len(found)
    for cell, code in (kept or {}).items():
        codes[cell], known[cell] = code, True
    image = decode_images(bundle, codes.view(1, *grid))
    cell_height, cell_width = pictures.height // grid[0], pictures.width // grid[1]
    known = known.view(grid).repeat_interleave(cell_height, 0).repeat_interleave(cell_width, 1)
    return to_pictures(torch.where(known, image, 0.5), pictures, scale)[0]


def grid_of(bundle: Bundle | PictureDecoder) -> tuple[int, int]:
    return bundle.image_tokenizer.config.grid


def sample_config(default: SampleConfig, given: Mapping[str, Any], num_codes: int) -> SampleConfig:
    """The default with the settings that are given. Raises ValueError for one that there is not, and for an interval of
    guidance that reaches beyond a picture's codes."""
    known = [known.name for known in fields(SampleConfig)]
    for name in given:
        if name not in known:
            raise ValueError(f"sampling has no setting {name!r}; there are {', '.join(known)}.")
    config = replace(default, **given)
    start, end = config.guidance_interval
    if "guidance_interval" in given and not (start < num_codes and (end is None or end <= num_codes)):
        raise ValueError(
            f"guidance_interval is {config.guidance_interval}, but a picture has {num_codes} codes: expected 0 <= "
            f"start < {num_codes}, and an end of at most {num_codes}, or none."
        )
    return config


def receipt(bundle: Bundle, **details: Any) -> dict[str, Any]:
    """What a picture's file says of how it was made."""
    return {
        "smalti_version": smalti_version(),
        "bundle": bundle.name,
        "weights_sha256": bundle.weights_sha256,
        "weights": bundle.model.storage,
        **details,
    }
