"""Where digits come from: MNIST's idx files, scikit-learn's bundled digits, or the original coloured pickle.

Each reader returns the three splits; none of them shares a source digit with another, and which digit is in which
split does not depend on a seed.
"""

import gzip
import io
import pickle
import pickletools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from sklearn.datasets import load_digits

from smalti.data.digits import DIGITS, PICTURE_SIZE, ColouredDigits, SourceDigits, normalise_caption
from smalti.errors import InputError, first_line, shortened

MNIST_VALIDATION = 2000  # taken from the end of the training file
_INK = 128  # a grey value from here on is ink


# scikit-learn --------------------------------------------------------------------------------------------------


def scikit_learn_digits() -> dict[str, SourceDigits]:
    """scikit-learn's 1,797 digits of 8×8, enlarged to crisp 28×28: 1,297 to train, 200 to validate, 300 to test.

    Enlarged three times with a bicubic filter, cut at half of full ink, with two empty pixels all round. The file
    is ordered by writer, so the last digits, the test split, are by hands not seen in training.
    """
    values, targets = load_digits(return_X_y=True)
    inks, labels = np.asarray(values, np.float32).reshape(-1, 8, 8), np.asarray(targets, np.uint8)
    masks = np.zeros((len(inks), PICTURE_SIZE, PICTURE_SIZE), dtype=bool)
    for mask, ink in zip(masks, inks, strict=True):
        large = Image.fromarray(ink).resize((24, 24), Image.Resampling.BICUBIC)
        mask[2:-2, 2:-2] = np.asarray(large) > 8  # ink is 0..16
    return _cut(SourceDigits(masks, labels), validation=200, test=300)


def _cut(source: SourceDigits, *, validation: int, test: int) -> dict[str, SourceDigits]:
    """The last `test` digits, the `validation` before them, and the rest for training."""
    ends = np.cumsum([len(source.labels) - validation - test, validation])
    masks, labels = np.split(source.masks, ends), np.split(source.labels, ends)
    names = ("train", "validation", "test")
    return {name: SourceDigits(m, n) for name, m, n in zip(names, masks, labels, strict=True)}


# MNIST ---------------------------------------------------------------------------------------------------------


def read_mnist(directory: Path | str) -> dict[str, SourceDigits]:
    """MNIST's digits from a folder with its four idx files, plain or gzipped, cut at half of full ink.

    The last 2,000 digits of the training file are the validation split; the test split is the whole t10k file, however
    many digits it holds. Raises InputError naming the file and the byte offset where it is not as expected.
    """
    directory = Path(directory)
    train, test = _read_mnist_part(directory, "train"), _read_mnist_part(directory, "t10k")
    if len(train.labels) <= MNIST_VALIDATION:
        raise InputError(
            f"{directory} holds {len(train.labels)} training digits; more than {MNIST_VALIDATION} are needed, "
            "because the last of them become the validation split"
        )
    parts = _cut(train, validation=MNIST_VALIDATION, test=0)
    return {"train": parts["train"], "validation": parts["validation"], "test": test}


def _read_mnist_part(directory: Path, part: str) -> SourceDigits:
    images_path = _find_idx(directory, f"{part}-images", "idx3-ubyte")
    labels_path = _find_idx(directory, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, num_axes=3), read_idx(labels_path, num_axes=1)
    for axis, found in enumerate(images.shape[1:], start=1):
        if found != PICTURE_SIZE:
            offset = 4 + 4 * axis
            raise InputError(f"{images_path}: byte {offset}: expected pictures of 28×28, found a side of {found}")
    if len(labels) != len(images):
        raise InputError(
            f"{labels_path}: byte 4: expected {len(images)} labels, one for each picture in {images_path.name}, "
            f"found {len(labels)}; take both files from the same download"
        )
    if labels.size and labels.max() > 9:
        offset = int(np.argmax(labels > 9))
        raise InputError(f"{labels_path}: byte {8 + offset}: expected a label 0..9, found {labels[offset]}")
    return SourceDigits(images >= _INK, labels)


def _find_idx(directory: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}{ending}" for dot in "-." for ending in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory} holds no {names[0]} or {names[1]}; name the folder with MNIST's four idx files")


def read_idx(path: Path | str, *, num_axes: int) -> UInt8[np.ndarray, "..."]:
    """The array of bytes in an idx file (the format of MNIST), plain or gzipped by its content, not its name.

    Raises InputError naming the file and the byte offset (after unpacking) of what is wrong.
    """
    path = Path(path)
    content = _read_unpacked(path)
    header_bytes = 4 + 4 * num_axes
    magic = bytes([0, 0, 8, num_axes])  # 8 says unsigned bytes, the last byte the number of axes
    if content[:4] != magic:
        raise InputError(
            f"{path}: byte 0: expected the idx magic number {magic.hex()}, found {content[:4].hex() or 'nothing'}"
        )
    if len(content) < header_bytes:
        raise InputError(
            f"{path}: byte {len(content)}: the file ends in its header, expected {header_bytes} bytes of it"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_axes, offset=4))
    expected = header_bytes + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        where = min(len(content), expected)
        raise InputError(
            f"{path}: byte {where}: expected {expected} bytes for the shape {'×'.join(map(str, shape))} its header "
            f"states, found {len(content)}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_unpacked(path: Path) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        if not packed:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    parts: list[bytes] = []
    try:
        with gzip.open(path) as unpacked:
            while part := unpacked.read(1 << 20):
                parts.append(part)
    except (EOFError, OSError, zlib.error) as error:
        done = sum(map(len, parts))
        raise InputError(
            f"{path}: the gzip data is damaged or cut short after byte {done} of its content ({error}); "
            "fetch the file again"
        ) from error
    return b"".join(parts)


# The original pickle -------------------------------------------------------------------------------------------


def read_coloured_pickle(path: Path | str) -> dict[str, ColouredDigits]:
    """The pictures and captions of the original `colored_mnist_with_text.pkl`.

    The file holds [train pictures, test pictures, train captions, test captions]; the last 2,000 of the training
    ones become the validation split. Read by an unpickler that can build lists, strings and arrays of numbers or
    strings and nothing else; no code named in the file is ever looked up. "eigth" is read as "eight". The captions
    are the file's own, so a colour they name may differ from `digits.COLORS` where that table is ours. Raises
    InputError naming whatever else is in the file.
    """
    path = Path(path)
    content = _unpickle(path)
    if not isinstance(content, list | tuple) or len(content) != 4:
        raise InputError(f"{path}: expected a list of four items: train and test pictures, train and test captions")
    train = _check_coloured(path, "train", content[0], content[2])
    test = _check_coloured(path, "test", content[1], content[3])
    if len(train.captions) <= MNIST_VALIDATION:
        raise InputError(f"{path}: {len(train.captions)} training pictures; more than {MNIST_VALIDATION} are needed")
    end = len(train.captions) - MNIST_VALIDATION
    return {
        "train": ColouredDigits(train.pictures[:end], train.captions[:end]),
        "validation": ColouredDigits(train.pictures[end:], train.captions[end:]),
        "test": test,
    }


def _check_coloured(path: Path, part: str, pictures: object, captions: object) -> ColouredDigits:
    pictures = _array(path, f"{part} pictures", pictures)
    if pictures.shape[1:] != (PICTURE_SIZE, PICTURE_SIZE, 3) or pictures.dtype.kind not in "ui":
        raise InputError(
            f"{path}: {part} pictures: expected integers (N, 28, 28, 3), found {pictures.dtype} {pictures.shape}"
        )
    if pictures.size and (pictures.min() < 0 or pictures.max() > 3):
        raise InputError(f"{path}: {part} pictures: expected levels 0..3, found {pictures.min()}..{pictures.max()}")
    lines = [normalise_caption(str(caption)) for caption in _array(path, f"{part} captions", captions).ravel()]
    if len(lines) != len(pictures):
        raise InputError(f"{path}: {part}: found {len(pictures)} pictures but {len(lines)} captions")
    for row, line in enumerate(lines):
        found = line.split()
        if len(found) != 6 or found[3] != "on" or found[2] not in DIGITS:
            raise InputError(
                f"{path}: {part} caption {row}: expected <shade> <colour> <digit> on <shade> <colour>, found "
                f"{shortened(line)!r}"
            )
    return ColouredDigits(pictures.astype(np.uint8), lines)


def _array(path: Path, what: str, content: object) -> np.ndarray:
    try:
        return np.asarray(content)
    except ValueError as error:  # lists of several lengths
        raise InputError(f"{path}: {what}: no array can be made of them: {first_line(error)}") from error


def _unpickle(path: Path) -> object:
    try:
        content = path.read_bytes()
        _check_opcodes(content)
        return _plain(_ArrayUnpickler(io.BytesIO(content)).load())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"{path}: not a readable pickle ({type(error).__name__}: {first_line(error)}); fetch the file again"
        ) from error


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError if a pickle states more bytes than it holds, or numbers its memo beyond its length: unpickling
    would take the memory for them first."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"memo {argument} in a pickle of {len(content)} bytes")


class _StoredDtype:
    """Stands in for `numpy.dtype`, so that nothing from the file reaches NumPy's own unpickling."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.byte_order = str(code), "|"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.byte_order = str(state[1])

    def dtype(self) -> np.dtype:
        dtype = np.dtype(self.code)
        if dtype.kind not in "biufUS":
            raise InputError(f"refuses arrays of {shortened(self.code)!r}; admits numbers and strings")
        return dtype if self.byte_order == "|" else dtype.newbyteorder(self.byte_order)  # type: ignore[arg-type]


class _StoredArray:
    """Stands in for a `numpy.ndarray` until its stored state is known."""

    def __init__(self, *_: object) -> None:
        self.content: object = None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, shape, stored, is_fortran, content = state
        assert isinstance(stored, _StoredDtype)
        if isinstance(content, list):  # an array of objects: those the unpickler admits, in one flat list
            self.content = [_plain(item) for item in content]
        else:
            self.content = _from_bytes(content, stored, shape, "F" if is_fortran else "C").content


def _from_bytes(content: object, stored: _StoredDtype, shape: object, order: str) -> _StoredArray:
    array = _StoredArray()
    array.content = np.frombuffer(content, stored.dtype()).reshape(shape, order=order)  # type: ignore[call-overload]
    return array


def _scalar(stored: _StoredDtype, content: bytes) -> object:
    return np.frombuffer(content, stored.dtype())[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, through which old pickles store bytes."""
    if encoding != "latin1":
        raise InputError(f"refuses the encoding {shortened(encoding)!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _StoredArray,
    ("numpy", "dtype"): _StoredDtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy renamed it in 2.0
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _StoredArray
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _from_bytes


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _ADMITTED:
            raise InputError(
                f"refuses {shortened(f'{module}.{name}')}: only arrays, lists and strings are read from a pickle"
            )
        return _ADMITTED[module, name]


def _plain(item: object) -> object:
    """The item with stand-ins replaced by what they stand for."""
    if isinstance(item, _StoredArray):
        return item.content
    if isinstance(item, list | tuple):
        return [_plain(part) for part in item]
    if isinstance(item, str | int | float):
        return item
    raise InputError(
        f"refuses an object of type {type(item).__name__}: only arrays, lists and strings are read from a pickle"
    )
