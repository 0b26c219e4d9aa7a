"""Picture files: a user's picture to the floats a tokenizer takes, floats to a picture, and the receipt in its PNG.

Letters: B batch, C H W image.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from smalti.documents import parse_json
from smalti.errors import InputError
from smalti.files import new_file
from smalti.picture_files import load_picture, upright

RECEIPT = "smalti"
"""The PNG text chunk, and the key of `PIL.Image.Image.info`, that holds how a picture was made, as JSON."""

GRID_GAP = 4
"""White pixels between the pictures of a grid."""

MAX_SIDE = 4096
"""A picture with a longer side is refused before its pixels are unpacked."""


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """The pictures a bundle reads and draws: RGB, `height` by `width` pixels."""

    height: int
    width: int
    levels: int = 256
    """How many values a channel can have: 4 for values 0, 85, 170, 255. What is drawn is rounded to them."""
    scale: int = 1
    """Drawn pictures are enlarged this many times, every pixel to a square; what is read may be so enlarged."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if max(self.height, self.width) * self.scale > MAX_SIDE:
            raise ValueError(f"pictures of {self.width}×{self.height} enlarged {self.scale} times exceed {MAX_SIDE}.")
        if not 2 <= self.levels <= 256 or 255 % (self.levels - 1):
            raise ValueError(f"levels is {self.levels}; expected 2 to 256 evenly spaced values of a byte (255 / 4 …).")


def checked_scale(config: PictureConfig, scale: int | None) -> int:
    """The scale, or the config's own. Raises ValueError if pictures would be larger than MAX_SIDE."""
    scale = config.scale if scale is None else scale
    if scale < 1 or scale * max(config.height, config.width) > MAX_SIDE:
        raise ValueError(f"scale is {scale}; expected 1 to {MAX_SIDE // max(config.height, config.width)}.")
    return scale


def to_pictures(images: Float[Tensor, "B 3 H W"], config: PictureConfig, scale: int | None = None) -> list[Image.Image]:
    """Images in [0, 1] (others are clamped) as RGB pictures, each pixel `scale` × `scale`."""
    scale = checked_scale(config, scale)
    top = config.levels - 1
    bytes_ = (images.detach().float().cpu().clamp(0, 1) * top).round().mul(255 // top).to(torch.uint8)
    bytes_ = bytes_.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in bytes_.contiguous()]


Picture = Image.Image | Path | str
"""A picture, or the path of its file."""


def listed(pictures: Picture | Iterable[Picture]) -> list[Picture]:
    """One picture, or several, as a list."""
    return [pictures] if isinstance(pictures, Picture) else list(pictures)


def to_images(pictures: Picture | Iterable[Picture], config: PictureConfig) -> Float[Tensor, "B 3 H W"]:
    """Pictures, or the paths of their files, as images in [0, 1].

    Raises InputError unless each is RGB and of the bundle's size, or that size enlarged a whole number of times with
    every pixel an even square, as smalti itself writes them.
    """
    images = [_to_image(picture, config) for picture in listed(pictures)]
    return torch.stack(images) if images else torch.zeros(0, 3, config.height, config.width)


def _to_image(picture: Picture, config: PictureConfig) -> Float[Tensor, "3 H W"]:
    if not isinstance(picture, Picture):
        raise InputError(
            f"a picture is given as {type(picture).__name__}; give a picture of Pillow or the path of a file "
            "(PIL.Image.fromarray makes one of an array)."
        )
    if isinstance(picture, Image.Image):
        name, picture = getattr(picture, "filename", "") or "the picture", upright(picture)
    else:
        name, picture = str(picture), read_picture(picture)
    wanted = f"{config.width}×{config.height}"
    if picture.mode != "RGB":
        raise InputError(
            f"{name}: mode {picture.mode}, expected RGB; convert it, for example "
            f"Image.open(path).convert('RGB').save(path)."
        )
    width, height = picture.size
    scale = width // config.width
    if scale < 1 or (width, height) != (config.width * scale, config.height * scale):
        raise InputError(
            f"{name}: {width}×{height} pixels, expected {wanted} or a whole multiple of it; resize it, for example "
            f"picture.resize(({config.width}, {config.height}), Image.Resampling.BOX)."
        )
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    small = pixels[::scale, ::scale]
    if not torch.equal(small.repeat_interleave(scale, 0).repeat_interleave(scale, 1), pixels):
        raise InputError(
            f"{name}: {width}×{height} pixels, but not {wanted} enlarged {scale} times pixel by pixel; resize it "
            f"yourself, for example picture.resize(({config.width}, {config.height}), Image.Resampling.BOX)."
        )
    return small.permute(2, 0, 1).float() / 255


def read_picture(path: Path | str) -> Image.Image:
    """The picture in a file, upright. Raises InputError naming the file if it is missing, no picture, cut short or too
    large."""
    try:
        return load_picture(path, max_side=MAX_SIDE)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give the path of a picture.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; give the path of a picture in it.") from error
    except InputError as error:
        raise InputError(
            f"{path} cannot be read as a picture ({error}); give a whole picture file, such as a PNG."
        ) from error


def save_picture(picture: Image.Image, path: Path | str, *, force: bool = False) -> None:
    """Writes a PNG, with the receipt of a picture that `Pipeline` drew in a text chunk.

    Raises InputError if the file exists (unless `force`) or the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are written as PNG; give a name that ends in .png.")
    with new_file(path, force=force) as temporary:
        picture.save(temporary, format="PNG", pnginfo=receipt_chunks(picture))


def receipt_chunks(picture: Image.Image) -> PngImagePlugin.PngInfo:
    """What a PNG file holds beside the pixels: the receipt, if the picture has one."""
    chunks = PngImagePlugin.PngInfo()
    if RECEIPT in picture.info:
        chunks.add_itxt(RECEIPT, picture.info[RECEIPT])
    return chunks


def with_receipt(picture: Image.Image, receipt: Mapping[str, Any]) -> Image.Image:
    """The picture itself, its `info` now holding the receipt that `save_picture` writes."""
    picture.info[RECEIPT] = json.dumps(dict(receipt), ensure_ascii=False)
    return picture


def grid_columns(num_pictures: int) -> int:
    """Columns of the grid nearest to a square."""
    return math.isqrt(max(num_pictures - 1, 0)) + 1


def grid_size(num_pictures: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of the grid of pictures of one size. Raises ValueError if it would be larger than MAX_SIDE."""
    columns = grid_columns(num_pictures)
    rows = -(-num_pictures // columns)
    size = columns * (width + GRID_GAP) - GRID_GAP, rows * (height + GRID_GAP) - GRID_GAP
    if max(size) > MAX_SIDE:
        raise ValueError(f"the grid would be {size[0]}×{size[1]} pixels, more than {MAX_SIDE} a side; write fewer.")
    return size


def to_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size as one, row by row with white between; its receipt holds those of all.

    Raises ValueError if there are none, or the sides would be longer than MAX_SIDE.
    """
    if not pictures:
        raise ValueError("a grid needs at least one picture.")
    width, height = pictures[0].size
    columns = grid_columns(len(pictures))
    grid = Image.new("RGB", grid_size(len(pictures), width, height), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        grid.paste(picture, (column * (width + GRID_GAP), row * (height + GRID_GAP)))
    receipts = [json.loads(picture.info[RECEIPT]) for picture in pictures if RECEIPT in picture.info]
    return with_receipt(grid, {"pictures": receipts}) if len(receipts) == len(pictures) else grid


def read_receipts(picture: Image.Image | Path | str) -> list[dict[str, Any]]:
    """The receipts of a picture, or of all pictures of a grid, row by row. Raises InputError if it has none."""
    receipt = read_receipt(picture)
    receipts = receipt.get("pictures", [receipt])
    if not isinstance(receipts, list) or not receipts or not all(isinstance(one, dict) for one in receipts):
        name = "the picture" if isinstance(picture, Image.Image) else str(picture)
        raise InputError(f"{name}: its receipt is damaged: the entry 'pictures' is not a list of receipts.")
    return receipts


def read_receipt(picture: Image.Image | Path | str) -> dict[str, Any]:
    """How a picture was made: prompt, seed, settings, weights hash, codes; of a grid, see `read_receipts`.

    Raises InputError if it does not say.
    """
    name = "the picture" if isinstance(picture, Image.Image) else str(picture)
    picture = picture if isinstance(picture, Image.Image) else read_picture(picture)
    if RECEIPT not in picture.info:
        raise InputError(
            f"{name} has no receipt: it was not drawn by smalti, or another program wrote it anew and dropped it."
        )
    written = picture.info[RECEIPT]
    if not isinstance(written, str | bytes):
        raise InputError(f"{name}: its receipt is damaged: it is no text; draw the picture again.")
    return parse_json(written, f"{name}: its receipt is damaged: what it holds", "draw the picture again")
