"""Pictures of classes: a folder with one folder for each class, a parquet table with a label, or MNIST's idx files.

Letters: N pictures, H W rows and columns of pixels, L codes of a picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8
from PIL import Image

from smalti.data.digit_sources import read_mnist
from smalti.data.digits import DIGITS, SourceDigits
from smalti.data.parquet_files import ParquetReader
from smalti.data.picture_sets import PictureSet, fit
from smalti.data.tokens import token_rows, write_token_table
from smalti.errors import InputError, shortened
from smalti.progress import stage

CROP_RATIO = 1.1
"""Of ten crops: how much larger than a crop the picture is resized (LlamaGen, extract_codes_c2i.py)."""
BATCH_SIZE = 256


@dataclass(frozen=True)
class Labelled:
    """Pictures of known classes."""

    pictures: "PictureSet | SourceDigits"
    rows: Int64[np.ndarray, " N"]
    labels: Int64[np.ndarray, " N"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, number: int) -> Image.Image:
        """RGB. Raises InputError naming what cannot be read."""
        row = int(self.rows[number])
        if isinstance(self.pictures, PictureSet):
            return self.pictures.picture(row)
        return Image.fromarray(self.pictures.masks[row].astype(np.uint8) * np.uint8(255)).convert("RGB")

    def images(self, numbers: Sequence[int], size: tuple[int, int]) -> UInt8[np.ndarray, "n H W 3"]:
        """These pictures, each cut to its largest centred crop of the wanted shape and resized."""
        return np.stack([np.asarray(fit(self.picture(number), size)) for number in numbers])

    def some(self, numbers: Int64[np.ndarray, " n"]) -> "Labelled":
        return replace(self, rows=self.rows[numbers], labels=self.labels[numbers])


def open_labelled(path: Path) -> Labelled | dict[str, Labelled]:
    """The pictures of a source: of MNIST's folder the splits "train" and "test", of others all of them.

    Raises InputError if it is none, a picture lies in no class's folder, or there are fewer than two classes.
    """
    if path.is_dir() and any(path.glob("*-idx3-ubyte*")):
        splits = read_mnist(path)
        return {name: _labelled(splits[name], splits[name].labels, DIGITS) for name in ("train", "test")}
    pictures = PictureSet(path)
    if path.is_dir():
        return _of_folders(path, pictures)
    return _of_table(path, pictures)


def split(found: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Training pictures and those held out, at least one for each class."""
    order = np.random.default_rng([seed, 0]).permutation(len(found))
    held_out = max(len(found.names), round(share * len(found)))
    if held_out >= len(found):
        raise InputError(f"there are {len(found)} pictures, too few to hold {held_out} of them out.")
    return found.some(np.sort(order[held_out:])), found.some(np.sort(order[:held_out]))


def write_codes(
    found: Labelled, path: Path, image_tokenizer: Any, size: tuple[int, int], *, ten_crop: bool, show_progress: bool
) -> None:
    """The pictures' codes as a token table, with the label in place of the text; of `ten_crop` ten rows a picture."""

    def batches() -> Iterator[pa.RecordBatch]:
        with stage(f"encoding {path.stem}", len(found), unit="picture", show=show_progress) as progress:
            for start in range(0, len(found), BATCH_SIZE):
                chosen = range(start, min(start + BATCH_SIZE, len(found)))
                cut = [crop for n in chosen for crop in _crops(found.picture(n), size, ten_crop)]
                repeated = np.repeat(found.labels[start : start + len(chosen)], len(cut) // len(chosen))
                images = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
                with torch.inference_mode():
                    codes = [image_tokenizer.encode_images(part).flatten(1) for part in images.split(BATCH_SIZE)]
                keys = [f"{n}-{i}" for n in chosen for i in range(len(cut) // len(chosen))]
                yield token_rows(keys, torch.cat(codes).numpy(), repeated[:, None])
                progress.advance(len(chosen))

    write_token_table(path, batches(), {"classes": list(found.names), "ten_crop": ten_crop})


def _crops(picture: Image.Image, size: tuple[int, int], ten_crop: bool) -> list[np.ndarray]:
    """The largest centred crop; or the four corners and the centre of the picture made a tenth larger, and these
    mirrored."""
    if not ten_crop:
        return [np.asarray(fit(picture, size))]
    rows, columns = size
    larger = fit(picture, (round(rows * CROP_RATIO), round(columns * CROP_RATIO)))
    down, right = larger.height - rows, larger.width - columns
    places = [(0, 0), (right, 0), (0, down), (right, down), (right // 2, down // 2)]
    cut = [np.asarray(larger.crop((x, y, x + columns, y + rows))) for x, y in places]
    return [*cut, *(one[:, ::-1] for one in cut)]


def _labelled(pictures: "PictureSet | SourceDigits", labels: Any, names: Sequence[str]) -> Labelled:
    return Labelled(pictures, np.arange(len(labels)), np.asarray(labels).astype(np.int64), tuple(names))


def _of_folders(path: Path, pictures: PictureSet) -> Labelled:
    folders = []
    for file in pictures.files:
        inside = file.relative_to(path).parts
        if len(inside) < 2:
            raise InputError(f"{file} lies in no class's folder: put it into one, {path}/CLASS/{file.name}.")
        folders.append(inside[0])
    return _numbered(path, pictures, folders)


def _of_table(path: Path, pictures: PictureSet) -> Labelled:
    reader = ParquetReader(path)
    reader.require_columns(["label"], "Classes are read from it: whole numbers, or names.")
    labels = reader.column("label").to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, str | int) or isinstance(label, bool) or (isinstance(label, int) and label < 0):
            raise InputError(
                f"{path}: row {row}: label is {shortened(repr(label))}; expected a name, or a number from 0."
            )
    if all(isinstance(label, int) for label in labels):
        if max(labels) >= max(len(labels), 2):
            raise InputError(f"{path}: a label is {max(labels)}, but there are {len(labels)} pictures.")
        names = [str(number) for number in range(max(labels) + 1)]
        return _require_classes(path, _labelled(pictures, labels, names))
    return _numbered(path, pictures, [str(label) for label in labels])


def _numbered(path: Path, pictures: PictureSet, classes: Sequence[str]) -> Labelled:
    names = sorted(set(classes))
    number = {name: i for i, name in enumerate(names)}
    return _require_classes(path, _labelled(pictures, [number[name] for name in classes], names))


def _require_classes(path: Path, found: Labelled) -> Labelled:
    if len(found.names) < 2:
        raise InputError(
            f"{path} holds pictures of {len(found.names)} class, {', '.join(found.names)}; expected two or more."
        )
    return found
