"""Pictures of any size, from a folder or a parquet table, cut to one size for training and measuring.

Cropping, resizing and flipping are done in Pillow, by worker processes. What a training step sees is a function of
(seed, step) alone: neither the number of workers nor an interruption changes it.

Letters: N pictures, H W rows and columns.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalti.data import arrow_types
from smalti.data.loader import batches
from smalti.data.pairs import decode_picture
from smalti.data.parquet_files import ParquetReader
from smalti.data.tar_shards import PICTURE_SUFFIXES as SUFFIXES
from smalti.errors import InputError
from smalti.file_kinds import refuse_pipe, visible


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """How pictures are read. `min_crop` is the least share of the largest possible crop's side that a training crop
    has (1: always the largest, at a random place); `flip` mirrors every second picture, at random.
    `held_out_pictures` counts the pictures measured, taken from the training pictures where no others are given.
    `workers` are processes that read ahead, at most as many as there are cores; with 0 the training loop reads.
    """

    min_crop: float = 0.8
    flip: bool = True
    held_out_pictures: int = 500
    workers: int = 1

    def __post_init__(self):
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop is {self.min_crop}; it must lie in (0, 1].")
        if self.held_out_pictures < 2:
            raise ValueError(f"held_out_pictures is {self.held_out_pictures}; it must be at least 2.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must not be negative.")


class PictureSet:
    """The encoded pictures of a folder, with its subfolders and sorted by path, or of a parquet table's column
    `image` (bytes, or the {bytes, path} pairs of Hugging Face data sets).

    A table's pictures are held in memory as they are encoded. Raises InputError if there are none.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._files: list[Path] = []
        self._column: pa.ChunkedArray | None = None
        if self.path.is_dir():
            found = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES)
            self._files = visible(found, self.path)
            if not self._files:
                raise InputError(f"{self.path} holds no pictures; expected files ending in {', '.join(SUFFIXES)}.")
        else:
            self._column = _read_column(self.path)

    def __len__(self) -> int:
        return len(self._files) if self._column is None else len(self._column)

    @property
    def files(self) -> tuple[Path, ...]:
        """Of a folder, in the order of the rows."""
        return tuple(self._files)

    def picture(self, row: int) -> Image.Image:
        """The picture of a row, RGB. Raises InputError naming the file, or the file and row."""
        name = str(self._files[row]) if self._column is None else f"{self.path}: row {row}"
        try:
            if self._column is None:
                refuse_pipe(self._files[row])
                encoded = self._files[row].read_bytes()
            else:
                encoded, fault = arrow_types.encoded_picture(self._column[row].as_py())
                if encoded is None:
                    raise InputError(fault or "there is no picture")
            return Image.fromarray(decode_picture(encoded))
        except (InputError, OSError) as error:
            raise InputError(f"{name}: {error}") from error

    def fitted(self, rows: Sequence[int], image_size: tuple[int, int]) -> UInt8[Tensor, "N H W 3"]:
        """The given rows, each cut to its largest centred crop of the wanted shape and resized."""
        return torch.from_numpy(np.stack([np.asarray(fit(self.picture(row), image_size)) for row in rows]))


def fit(picture: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """The largest centred crop with the proportions of `image_size` (rows, columns), resized to it."""
    width, height = _largest_crop(picture, image_size)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return _cut(picture, left, top, width, height, image_size)


def random_fit(
    picture: Image.Image, image_size: tuple[int, int], config: PicturesConfig, random: np.random.Generator
) -> Image.Image:
    """A crop at a random place, of a random size between `min_crop` times the largest and the largest, resized and
    perhaps mirrored. Always draws four numbers."""
    share, across, down, mirror = random.random(4)
    scale = config.min_crop + (1 - config.min_crop) * share
    width, height = (scale * side for side in _largest_crop(picture, image_size))
    cut = _cut(picture, across * (picture.width - width), down * (picture.height - height), width, height, image_size)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if config.flip and mirror < 0.5 else cut


def training_batches(
    pictures: PictureSet,
    rows: Int64[np.ndarray, " n"],
    image_size: tuple[int, int],
    batch_size: int,
    config: PicturesConfig,
    seed: int,
    start_step: int = 0,
) -> Iterator[UInt8[Tensor, "B H W 3"]]:
    """The batches of the given rows from `start_step` on, without end. Raises InputError for a picture that cannot be
    read, at its place."""
    dataset = _Batches(pictures, rows, image_size, config, seed)
    places = enumerate(batches(len(rows), batch_size, seed, start_step), start_step)
    loader = DataLoader(
        dataset,
        batch_size=None,  # an item is a whole batch
        sampler=places,
        num_workers=min(config.workers, os.cpu_count() or 1),
        collate_fn=_unchanged,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Batches(Dataset):
    """Item (step, places) is the batch of that step. What goes wrong with a picture is returned, not raised: a
    worker's exception would come back with the worker's traceback in its message."""

    def __init__(
        self, pictures: PictureSet, rows: np.ndarray, image_size: tuple[int, int], config: PicturesConfig, seed: int
    ):
        self.pictures, self.rows, self.image_size, self.config, self.seed = pictures, rows, image_size, config, seed

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Tensor | InputError:
        step, places = item
        cut = []
        try:
            for i, row in enumerate(self.rows[places]):
                random = np.random.default_rng([self.seed, step, i])
                picture = random_fit(self.pictures.picture(int(row)), self.image_size, self.config, random)
                cut.append(np.asarray(picture))
        except InputError as error:
            return error
        return torch.from_numpy(np.stack(cut))


def _unchanged(batch: Any) -> Any:
    return batch


def _largest_crop(picture: Image.Image, image_size: tuple[int, int]) -> tuple[float, float]:
    """Width and height of the largest box with the proportions of `image_size` that the picture holds."""
    rows, columns = image_size
    width = min(picture.width, picture.height * columns / rows)
    return width, width * rows / columns


def _cut(
    picture: Image.Image, left: float, top: float, width: float, height: float, image_size: tuple[int, int]
) -> Image.Image:
    rows, columns = image_size
    # Rounding must not carry the box beyond the picture.
    left, top = max(0.0, left), max(0.0, top)
    box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    if box == (0, 0, columns, rows):
        return picture
    return picture.resize((columns, rows), Image.Resampling.BICUBIC, box=box)


def _read_column(path: Path) -> pa.ChunkedArray:
    if not path.exists():
        raise InputError(f"there is no {path}; give a folder of pictures or a parquet table.")
    try:
        reader = ParquetReader(path)
    except InputError as error:
        raise InputError(f"{error} Give a folder of pictures or a parquet table.") from error
    reader.require_columns(["image"], "Pictures are read from a column of encoded files, or give a folder.")
    arrow_types.require_pictures(reader.schema.field("image").type, path, "image")
    column = reader.column("image")
    if not len(column):
        raise InputError(f"{path} holds no rows.")
    return column
