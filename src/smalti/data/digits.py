"""Coloured, captioned digits: pictures of 28×28×3 integers 0..3 with captions such as
"dark green eight on bright cyan", in the format of Berkeley CS294-158 (spring 2024, homework 1, question 6).

A picture shows one digit in one colour on one uniform background; a caption is always the six words
`<shade> <colour> <digit> on <shade> <colour>`. Channel values are *levels* 0..3; a PNG holds level × 85, a float
image level / 3.

Letters: N pictures. Every picture is 28 rows by 28 columns.
"""

import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from smalti.data.parquet_files import ParquetReader, parquet_writer
from smalti.errors import InputError
from smalti.files import cause
from smalti.progress import Stage, stage

Colour = tuple[int, int, int]

PICTURE_SIZE = 28
LEVEL_STEP = 85  # 3 levels × 85 = 255
SPLITS = ("train", "validation", "test")
SHADES = ("plain", "light", "dark", "bright", "normal")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# (red, green, blue) levels of every name. Values marked * were measured on published figures of the original
# data; the rest are ours. Not every shade of every colour is named: the 4×4×4 cube has 64 colours, too few for
# 5 × 15 names, and a name is given only where a free colour is left that a reader would call so.
COLORS: dict[tuple[str, str], Colour] = {
    ("plain", "red"): (2, 0, 0),
    ("light", "red"): (3, 1, 1),
    ("dark", "red"): (2, 0, 1),  # *
    ("bright", "red"): (3, 0, 1),
    ("normal", "red"): (3, 0, 0),  # *
    ("plain", "green"): (0, 3, 0),  # *
    ("light", "green"): (1, 3, 1),  # *
    ("dark", "green"): (1, 2, 1),  # *
    ("bright", "green"): (1, 3, 0),
    ("normal", "green"): (0, 2, 0),
    ("plain", "blue"): (0, 0, 3),  # *
    ("light", "blue"): (2, 3, 3),  # *
    ("dark", "blue"): (0, 0, 2),  # *
    ("bright", "blue"): (0, 1, 3),
    ("normal", "blue"): (0, 1, 2),
    ("plain", "yellow"): (3, 3, 1),  # *
    ("light", "yellow"): (3, 3, 2),
    ("dark", "yellow"): (1, 2, 0),  # *
    ("bright", "yellow"): (3, 3, 0),  # *
    ("normal", "yellow"): (2, 2, 0),
    ("plain", "cyan"): (0, 2, 3),
    ("light", "cyan"): (1, 3, 3),  # *
    ("dark", "cyan"): (0, 1, 1),
    ("bright", "cyan"): (0, 3, 3),  # *
    ("normal", "cyan"): (1, 2, 3),
    ("plain", "magenta"): (3, 1, 2),  # *
    ("light", "magenta"): (3, 1, 3),
    ("dark", "magenta"): (1, 0, 2),  # *
    ("bright", "magenta"): (3, 0, 3),  # *
    ("normal", "magenta"): (2, 0, 3),
    ("plain", "orange"): (3, 1, 0),  # *
    ("light", "orange"): (3, 2, 1),  # *
    ("plain", "purple"): (2, 0, 2),  # *
    ("light", "purple"): (2, 1, 3),  # *
    ("dark", "purple"): (1, 1, 2),  # *
    ("bright", "purple"): (2, 2, 3),  # *
    ("normal", "purple"): (1, 0, 3),
    ("plain", "pink"): (3, 2, 2),
    ("light", "pink"): (3, 2, 3),  # *
    ("dark", "pink"): (2, 1, 1),
    ("bright", "pink"): (3, 0, 2),
    ("normal", "pink"): (2, 1, 2),
    ("plain", "brown"): (2, 1, 0),  # *
    ("light", "brown"): (2, 2, 1),
    ("dark", "brown"): (1, 0, 0),
    ("normal", "brown"): (1, 1, 0),
    ("light", "gray"): (2, 2, 2),  # *
    ("dark", "gray"): (1, 1, 1),  # *
    ("plain", "black"): (0, 0, 0),  # *
    ("plain", "white"): (3, 3, 3),  # *
    ("plain", "gold"): (3, 2, 0),  # *
    ("plain", "turquoise"): (0, 2, 2),  # *
    ("light", "turquoise"): (1, 3, 2),  # *
    ("dark", "turquoise"): (1, 2, 2),  # *
    ("bright", "turquoise"): (0, 3, 2),
    ("normal", "turquoise"): (0, 2, 1),
}
COLOUR_WORDS = tuple(dict.fromkeys(colour for _, colour in COLORS))

# Two colours are told apart at a glance when their levels differ by at least this much, summed over the three
# channels (one channel from end to end, or one step in all three). The original data has closer pairs.
MIN_COLOUR_DISTANCE = 3


def colour_distance(one: Colour, other: Colour) -> int:
    """Sum over the channels of the absolute difference of levels, 0..9."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


COLOUR_PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = tuple(
    (foreground, background)
    for foreground in COLORS
    for background in COLORS
    if colour_distance(COLORS[foreground], COLORS[background]) >= MIN_COLOUR_DISTANCE
)


# Captions ------------------------------------------------------------------------------------------------------


class CaptionContent(NamedTuple):
    """What a caption says: the digit 0..9 and the levels of its colour and of the background's."""

    foreground: Colour
    digit: int
    background: Colour


def words() -> list[str]:
    """The 31 words of all captions: shades, colours, digits, "on"."""
    return [*SHADES, *COLOUR_WORDS, *DIGITS, "on"]


def normalise_caption(caption: str) -> str:
    """The caption with single spaces, lower case, and the original data's "eigth" written "eight"."""
    return " ".join("eight" if word == "eigth" else word for word in caption.lower().split())


def parse_caption(caption: str) -> CaptionContent:
    """What a caption says. Raises InputError naming the word that does not fit, with near ones."""
    found = normalise_caption(caption).split()
    if len(found) != 6 or found[3] != "on":
        raise InputError(
            f"caption {caption!r} does not have the six words <shade> <colour> <digit> on <shade> <colour>; "
            'write for example "dark green eight on bright cyan"'
        )
    if found[2] not in DIGITS:
        raise InputError(f"caption {caption!r}: {found[2]!r} is no digit; {_suggest(found[2], DIGITS)}")
    foreground, background = _colour(found[0], found[1], caption), _colour(found[4], found[5], caption)
    return CaptionContent(foreground, DIGITS.index(found[2]), background)


def _colour(shade: str, colour: str, caption: str) -> Colour:
    if shade not in SHADES:
        raise InputError(f"caption {caption!r}: {shade!r} is no shade; {_suggest(shade, SHADES)}")
    if colour not in COLOUR_WORDS:
        raise InputError(f"caption {caption!r}: {colour!r} is no colour; {_suggest(colour, COLOUR_WORDS)}")
    if (shade, colour) not in COLORS:
        known = [s for s in SHADES if (s, colour) in COLORS]
        raise InputError(f"caption {caption!r}: there is no {shade} {colour}; {colour} is {' or '.join(known)}")
    return COLORS[shade, colour]


def _suggest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(known)}"


# Pictures ------------------------------------------------------------------------------------------------------


class ColourReading(NamedTuple):
    """The two colours read from each picture and which pixels are the digit's."""

    foreground: UInt8[np.ndarray, "N 3"]
    background: UInt8[np.ndarray, "N 3"]
    mask: Bool[np.ndarray, "N 28 28"]


def read_colours(pictures: UInt8[np.ndarray, "N 28 28 3"]) -> ColourReading:
    """The background and foreground colour of pictures of levels 0..3, and the digit's mask.

    The background is the most frequent colour of the 108 border pixels; the foreground is the most frequent other
    colour of the whole picture (the background itself, with an empty mask, if there is no other). Of equally
    frequent colours the one with the smallest (red, green, blue) is taken. The mask holds the pixels strictly
    nearer (squared distance of levels) to the foreground than to the background, so a few pixels of a third colour
    do not tear the digit. Raises InputError unless levels are 0..3.
    """
    if pictures.size and pictures.max() > 3:
        raise InputError(
            f"pictures of digits hold levels 0..3, found {pictures.max()}; divide PNG values by {LEVEL_STEP}"
        )
    indices = pictures.astype(np.int64) @ np.array([16, 4, 1])  # (N, 28, 28), colours as numbers 0..63
    border = np.ones((PICTURE_SIZE, PICTURE_SIZE), dtype=bool)
    border[1:-1, 1:-1] = False
    background = _count_colours(indices[:, border]).argmax(axis=1)
    others = _count_colours(indices.reshape(len(indices), -1))
    others[np.arange(len(others)), background] = 0
    foreground = np.where(others.any(axis=1), others.argmax(axis=1), background)
    foreground, background = _levels_of(foreground), _levels_of(background)
    to_foreground = _squared_distance(pictures, foreground)
    return ColourReading(foreground, background, to_foreground < _squared_distance(pictures, background))


def _count_colours(indices: Int[np.ndarray, "N P"]) -> Int[np.ndarray, "N 64"]:
    rows = np.arange(len(indices))[:, None] * 64
    return np.bincount((indices + rows).ravel(), minlength=64 * len(indices)).reshape(-1, 64)


def _levels_of(indices: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 3"]:
    return np.stack([indices // 16, indices // 4 % 4, indices % 4], axis=1).astype(np.uint8)


def _squared_distance(
    pictures: UInt8[np.ndarray, "N 28 28 3"], colours: UInt8[np.ndarray, "N 3"]
) -> Int[np.ndarray, "N 28 28"]:
    difference = pictures.astype(np.int8) - colours[:, None, None].astype(np.int8)
    return (difference * difference).sum(axis=-1)


def levels_to_images(pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[Tensor, "N 3 H W"]:
    """Levels 0..3 as the float images in [0, 1] that image tokenizers take."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 3


def images_to_levels(images: Float[Tensor, "N 3 H W"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Float images rounded to the nearest level 0..3; values outside [0, 1] are clamped."""
    levels = (images.detach().float().clamp(0, 1) * 3).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def picture_to_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The PNG file of one picture of levels 0..3, each written as level × 85."""
    buffer = io.BytesIO()
    Image.fromarray(picture * np.uint8(LEVEL_STEP)).save(buffer, format="PNG")
    return buffer.getvalue()


# Colouring source digits ---------------------------------------------------------------------------------------


class SourceDigits(NamedTuple):
    """Uncoloured digits of one split: where the ink is, and which digit 0..9 it is."""

    masks: Bool[np.ndarray, "N 28 28"]
    labels: UInt8[np.ndarray, " N"]


class ColouredDigits(NamedTuple):
    """Pictures of levels 0..3 and their captions."""

    pictures: UInt8[np.ndarray, "N 28 28 3"]
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class DistortionConfig:
    """How far a digit may be distorted each time that it is drawn, each way; drawn evenly. Angles in degrees, the rest
    as shares: a scaling of 0.1 draws width and height each from 0.9 to 1.1."""

    rotation: float = 10.0
    shear: float = 0.15
    scaling: float = 0.1

    def __post_init__(self) -> None:
        for name, limit in (("rotation", 180), ("shear", 1), ("scaling", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, {limit})")


@dataclass(frozen=True, kw_only=True)
class ColouringConfig:
    """How source digits are coloured.

    `seed` (0 .. 2³²-1) draws the colours. Every digit of the training split is drawn `colourings` times, each time in
    a pair of colours drawn anew (use more for a small source), and distorted as `distortion` says, if it is given.
    Held-out digits are drawn once and as they are, so that in what is measured none counts twice.
    """

    seed: int = 0
    colourings: int = 1
    distortion: DistortionConfig | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is outside 0 .. {2**32 - 1}")
        if not 1 <= self.colourings <= len(COLOUR_PAIRS):
            raise ValueError(f"colourings {self.colourings} must be 1 to {len(COLOUR_PAIRS)}, the pairs of colours")


def colour_digits(source: SourceDigits, split: str, config: ColouringConfig) -> ColouredDigits:
    """Every source digit, in the training split `config.colourings` times, in a pair of colours drawn evenly from
    `COLOUR_PAIRS`.

    The colours depend on the seed, the split's name and the digit's position only.
    """
    # RandomState's streams are frozen by NumPy's compatibility promise; those of Generator may change.
    stream = np.random.RandomState([config.seed, SPLITS.index(split)])
    colourings = config.colourings if split == "train" else 1
    masks = np.tile(source.masks, (colourings, 1, 1))  # all digits once, then all again: any first few differ
    labels = np.tile(source.labels, colourings)
    if config.distortion is not None and split == "train":
        masks = distort_masks(masks, config.distortion, config.seed)
    pairs = [COLOUR_PAIRS[i] for i in stream.randint(len(COLOUR_PAIRS), size=len(labels))]
    colours = np.array([[COLORS[f], COLORS[b]] for f, b in pairs], dtype=np.uint8).reshape(-1, 2, 3)
    pictures = np.where(masks[..., None], colours[:, 0, None, None], colours[:, 1, None, None])
    captions = [f"{f[0]} {f[1]} {DIGITS[n]} on {b[0]} {b[1]}" for (f, b), n in zip(pairs, labels, strict=True)]
    return ColouredDigits(pictures, captions)


def distort_masks(
    masks: Bool[np.ndarray, "N 28 28"], config: DistortionConfig, seed: int
) -> Bool[np.ndarray, "N 28 28"]:
    """Each mask turned, sheared and scaled about its middle by amounts of its own, with edges as crisp as before."""
    # a stream of its own: with distortion or without, the colours are the same
    turn, slant, wide, high = np.random.RandomState([seed, len(SPLITS)]).uniform(-1, 1, size=(4, len(masks)))
    angle, none = np.deg2rad(config.rotation * turn), np.zeros(len(masks))
    rotation = _matrices(np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle))
    shear = _matrices(none + 1, config.shear * slant, none, none + 1)
    scaling = _matrices(1 / (1 + config.scaling * wide), none, none, 1 / (1 + config.scaling * high))
    back = rotation @ shear @ scaling  # from a new pixel's place to the old one, (N, 2, 2)
    middle = np.full((2, 1), PICTURE_SIZE / 2)
    coefficients = np.concatenate([back, middle - back @ middle], axis=2).reshape(-1, 6).tolist()
    distorted = np.empty_like(masks)
    for mask, new, six in zip(masks, distorted, coefficients, strict=True):
        ink = Image.fromarray(mask * np.uint8(255))
        new[:] = np.asarray(ink.transform(ink.size, Image.Transform.AFFINE, six, Image.Resampling.BILINEAR)) > 127
    return distorted


def _matrices(*entries: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N 2 2"]:
    return np.stack(entries, axis=1).reshape(-1, 2, 2)


# Tables --------------------------------------------------------------------------------------------------------

_METADATA_KEY = b"smalti.digits"
_SCHEMA = pa.schema([("__key__", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
_ROWS_PER_GROUP = 4096


def write_digits(
    directory: Path | str,
    source: str,
    splits: Mapping[str, SourceDigits | ColouredDigits],
    config: ColouringConfig = ColouringConfig(),
    *,
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Writes `train.parquet`, `validation.parquet` and `test.parquet` into `directory`; returns their paths.

    `source` and `splits` come from one of the readers in `smalti.data.digit_sources`; source digits are coloured here
    by `config`, coloured ones are taken as they are. Each table has the columns `__key__`, `image` (PNG) and
    `caption`, and a note of how it was made, so that a table already made the same way is left alone. Raises
    InputError if a file is there that was made otherwise (unless `force`) or if writing fails.
    """
    directory = Path(directory)
    paths = {split: directory / f"{split}.parquet" for split in splits}
    notes = {split: _note(source, split, content, config) for split, content in splits.items()}
    missing = [split for split in splits if force or not _is_made(paths[split], notes[split])]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split in missing:
            content = splits[split]
            coloured = colour_digits(content, split, config) if isinstance(content, SourceDigits) else content
            with stage(f"{split} digits", len(coloured.captions), unit="picture", show=show_progress) as progress:
                _write_table(paths[split], split, coloured, notes[split], progress)
    except OSError as error:
        raise InputError(
            f"cannot write the digits to {directory}: {cause(error)}; "
            "choose a folder that can be written, with some 40 MB free"
        ) from error
    return paths


def _note(
    source: str, split: str, content: SourceDigits | ColouredDigits, config: ColouringConfig
) -> dict[str, object]:
    digest = hashlib.sha256(content[0].tobytes())
    drawn: dict[str, object] = {}
    if isinstance(content, SourceDigits):
        digest.update(content.labels.tobytes())
        drawn = {name: value for name, value in asdict(config).items() if value is not None}
    else:
        digest.update("\n".join(content.captions).encode())
    names = json.dumps([(*name, *colour) for name, colour in COLORS.items()])
    return {
        "source": source,
        "split": split,
        "source_digits": len(content[0]),
        "source_sha256": digest.hexdigest(),
        "colours_sha256": hashlib.sha256(names.encode()).hexdigest(),
        **drawn,
    }


def source_of(path: Path | str) -> str | None:
    """Where the digits of a table come from, as `write_digits` was told; None if it does not say."""
    try:
        note = json.loads(_note_of(path))
    except (InputError, ValueError):
        return None
    return note.get("source") if isinstance(note, dict) else None


def _note_of(path: Path | str) -> bytes:
    return (ParquetReader(path).schema.metadata or {}).get(_METADATA_KEY, b"null")


def _is_made(path: Path, note: dict[str, object]) -> bool:
    """Whether the table is there, made as `note` says. Raises InputError if another file is in its place."""
    if not path.exists():
        return False
    try:
        found = json.loads(_note_of(path))
    except (InputError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} exists and is not a table of digits; choose another folder or overwrite with force")
    differing = [key for key in {**note, **found} if note.get(key) != found.get(key)]
    if differing:
        first = differing[0]
        raise InputError(
            f"{path} exists and was made with {first} {found.get(first)!r}, not {note.get(first)!r}; "
            "choose another folder or overwrite with force"
        )
    return True


def _write_table(path: Path, split: str, content: ColouredDigits, note: dict[str, object], progress: Stage) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(note).encode()})
    try:
        with parquet_writer(temporary, schema) as writer:
            for table in _row_groups(split, content, schema):
                writer.write_table(table)
                progress.advance(len(table))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _row_groups(split: str, content: ColouredDigits, schema: pa.Schema) -> Iterator[pa.Table]:
    for start in range(0, len(content.captions), _ROWS_PER_GROUP):
        captions = content.captions[start : start + _ROWS_PER_GROUP]
        keys = [f"{split}-{row:06d}" for row in range(start, start + len(captions))]
        images = [picture_to_png(picture) for picture in content.pictures[start : start + len(captions)]]
        yield pa.table([keys, images, captions], schema=schema)
