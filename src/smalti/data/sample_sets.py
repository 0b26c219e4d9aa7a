"""Pictures to be measured, read some at a time however many there are.

What one finds them in: an `.npz` with the array `arr_0` as ADM's scripts write it, bytes of (N, H, W, 3); a folder or a
parquet table of pictures; or MNIST's folder of idx files. Of an `.npz` nothing is unpickled, and nothing unpacked
ahead.

Letters: N pictures, B some of them, H W rows and columns.
"""

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.data.labelled_pictures import Labelled, open_labelled
from smalti.data.picture_sets import PictureSet, fit
from smalti.errors import InputError, first_line, shortened
from smalti.weights import file_sha256

PICTURES = "arr_0"
MEND = "expected arr_0 of bytes, (N, rows, columns, 3), as smalti sample and ADM's scripts write it"


class SampleSet(ABC):
    """Pictures of one size, in an order. Raises InputError naming what cannot be read, at opening or as they come."""

    def __init__(self, path: Path, num: int, size: tuple[int, int]):
        self.path, self.num, self.size = path, num, size

    def __len__(self) -> int:
        return self.num

    @property
    def sha256(self) -> str:
        """Of the file; of a folder, of its files' names and contents."""
        if self.path.is_file():
            return file_sha256(self.path)
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(self.path)} {file_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @abstractmethod
    def batches(self, batch_size: int, start: int = 0) -> Iterator[UInt8[Tensor, "B H W 3"]]:
        """The pictures from `start` on; the last batch may be smaller."""


def open_samples(path: Path | str, *, size: tuple[int, int] | None = None, split: str | None = None) -> SampleSet:
    """The pictures at a path. `size` cuts each to its largest centred crop of that shape and resizes it (bicubic),
    which an `.npz` is not; `split` is of MNIST's folder, "test" by default."""
    path = Path(path)
    if path.is_dir() and any(path.glob("*-idx3-ubyte*")):
        return _OfClasses(path, size, split or "test")
    if split is not None:
        raise InputError(f"{path} has no splits, as MNIST's folder has; leave out the split {split}.")
    if path.suffix.lower() == ".npz":
        found = _OfNpz(path)
        if size not in (None, found.size):
            raise InputError(
                f"{path} holds pictures of {_sides(found.size)}, and they are measured as they are: to resize them "
                "would be another protocol. Leave out the size, or give the pictures as files."
            )
        return found
    return _OfFiles(path, size)


def holds_pictures(path: Path) -> bool:
    """Whether an `.npz` has pictures. Raises InputError for what is no zip archive."""
    return PICTURES in npz_names(path)


def npz_names(path: Path) -> list[str]:
    """The names of an `.npz` file's arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; {MEND}.") from error
    except Exception as error:  # zipfile raises nearly anything
        raise InputError(f"{path} is no whole .npz file: {first_line(error)}; {MEND}.") from error


class _Header(NamedTuple):
    num: int
    size: tuple[int, int]
    dtype: Any


class _OfNpz(SampleSet):
    def __init__(self, path: Path):
        if PICTURES not in (names := npz_names(path)):
            has = ", ".join(map(shortened, names[:8])) or "none"
            raise InputError(f"{path} has no array {PICTURES}; it has {has}. Sets of pictures: {MEND}.")
        with _opened(path) as file:
            header = _read_header(file, path)
        super().__init__(path, header.num, header.size)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[UInt8[Tensor, "B H W 3"]]:
        each = self.size[0] * self.size[1] * 3
        with _opened(self.path) as file:
            _read_header(file, self.path)
            for first in range(0, self.num, batch_size):
                num = min(batch_size, self.num - first)
                if first + num <= start:
                    _read(file, num * each, self.path)
                    continue
                content = np.frombuffer(_read(file, num * each, self.path), np.uint8).reshape(num, *self.size, 3)
                yield torch.from_numpy(content[max(0, start - first) :].copy())
            try:
                file.read(1)  # at the end zipfile compares the checksum
            except zipfile.BadZipFile as error:
                raise InputError(f"{self.path}: {PICTURES} in it is damaged; fetch or draw it again.") from error


class _opened:
    """The file of `arr_0` in an archive."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)

    def __enter__(self) -> IO[bytes]:
        self.file = self.archive.open(f"{PICTURES}.npy" if f"{PICTURES}.npy" in self.archive.namelist() else PICTURES)
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.archive.close()


def _read_header(file: IO[bytes], path: Path) -> _Header:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(file)
    except Exception as error:
        raise InputError(f"{path}: {PICTURES} in it is no array of numpy: {first_line(error)}; {MEND}.") from error
    if dtype != np.uint8:
        how = ": (255 * pictures).round().astype('uint8') makes bytes of values in [0, 1]" if dtype.kind == "f" else ""
        raise InputError(f"{path}: {PICTURES} holds {dtype}, expected uint8{how}. {MEND[0].upper()}{MEND[1:]}.")
    if len(shape) != 4 or shape[3] != 3 or is_fortran or min(shape[1:3], default=0) < 1:
        hint = ""
        if len(shape) == 4 and shape[1] == 3:
            hint = " Transpose it: pictures.transpose(0, 2, 3, 1)."
        elif len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
            hint = " Grey pictures go in as three equal channels: numpy.repeat(…, 3, axis=-1)."
        raise InputError(f"{path}: {PICTURES} is of the shape {tuple(shape)}; {MEND}.{hint}")
    if shape[0] < 1:
        raise InputError(f"{path}: {PICTURES} holds no pictures.")
    return _Header(shape[0], (shape[1], shape[2]), dtype)


def _read(file: IO[bytes], num_bytes: int, path: Path) -> bytes:
    try:
        content = file.read(num_bytes)
    except Exception as error:
        raise InputError(
            f"{path}: {PICTURES} in it is damaged: {first_line(error)}; fetch or draw it again."
        ) from error
    if len(content) < num_bytes:
        raise InputError(f"{path}: {PICTURES} in it ends early; fetch or draw it again.")
    return content


class _OfFiles(SampleSet):
    def __init__(self, path: Path, size: tuple[int, int] | None):
        self.pictures, self.fitted_size = PictureSet(path), size
        first = self.pictures.picture(0)
        super().__init__(path, len(self.pictures), size or (first.height, first.width))

    def batches(self, batch_size: int, start: int = 0) -> Iterator[UInt8[Tensor, "B H W 3"]]:
        for first in range(start, self.num, batch_size):
            rows = range(first, min(first + batch_size, self.num))
            yield torch.from_numpy(np.stack([self._picture(row) for row in rows]))

    def _picture(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        picture = self.pictures.picture(row)
        if self.fitted_size is not None:
            return np.asarray(fit(picture, self.fitted_size))
        if (picture.height, picture.width) != self.size:
            where = self.pictures.files[row] if self.pictures.files else f"{self.path}: row {row}"
            raise InputError(
                f"{where} is of {_sides((picture.height, picture.width))}, the first picture of {_sides(self.size)}; "
                "give pictures of one size, or --size ROWSxCOLUMNS, to which all are cropped and resized."
            )
        return np.asarray(picture)


class _OfClasses(SampleSet):
    def __init__(self, path: Path, size: tuple[int, int] | None, split: str):
        found = open_labelled(path)
        assert isinstance(found, dict)
        if split not in found:
            raise InputError(f"{path} has no split {shortened(split)!r}; there are {', '.join(found)}.")
        self.labelled: Labelled = found[split]
        first = self.labelled.picture(0)
        super().__init__(path, len(self.labelled), size or (first.height, first.width))
        self.split = split

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{super().sha256} {self.split}".encode()).hexdigest()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[UInt8[Tensor, "B H W 3"]]:
        for first in range(start, self.num, batch_size):
            rows = range(first, min(first + batch_size, self.num))
            yield torch.from_numpy(self.labelled.images(rows, self.size))


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]} (rows × columns)"
