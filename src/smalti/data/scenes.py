"""Scenes of one to four shapes, drawn and captioned by a seeded grammar, and read back exactly from their pixels.

    scene = draw_scene(stream)                       shapes, colours, sizes, places, relation, background, texture
    picture = render(scene.content)                  64×64 pixels without anything random
    caption = write_caption(scene, stream)           "two small red circles on a striped white background"
    read_picture(picture) == scene.content           connected components, nearest colours, templates of the shapes
    check(parse_caption(caption), read_picture(picture)).all

Some combinations are never drawn for training (`UNSEEN`), so that a model can be asked for what it has not seen.

Letters: H W rows and columns of a picture, 64 each. Channel values are multiples of 51, six levels.
"""

import io
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage

from smalti.data.parquet_files import ParquetReader, parquet_writer
from smalti.errors import InputError, shortened
from smalti.files import cause, new_file
from smalti.progress import Stage, stage

SIDE = 64
LATTICE = 8
"""Boxes of things begin one pixel behind its multiples, and are at least so far from each other."""

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (255, 0, 0),
    "orange": (255, 153, 0),
    "yellow": (255, 255, 0),
    "green": (0, 153, 0),
    "cyan": (0, 204, 255),
    "blue": (0, 51, 255),
    "purple": (153, 0, 204),
    "pink": (255, 102, 204),
}
BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {
    "white": ((255, 255, 255), (204, 204, 204)),
    "gray": ((153, 153, 153), (102, 102, 102)),
    "black": ((0, 0, 0), (51, 51, 51)),
    "brown": ((102, 51, 0), (153, 102, 51)),
}
"""The ground, and the shade its texture is drawn in."""
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 14, "large": 22}
"""Sides of an object's box, in pixels."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
MOST = 4
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}

UNSEEN: dict[str, frozenset[tuple]] = {
    "shape and colour": frozenset(
        {
            ("circle", "cyan"), ("square", "orange"), ("triangle", "purple"), ("diamond", "red"), ("cross", "green"),
            ("ring", "yellow"), ("square", "pink"), ("cross", "blue"),
        }
    ),
    "size and colour": frozenset({("large", "pink"), ("small", "blue")}),
    "colour and background": frozenset({("red", "black"), ("cyan", "white"), ("green", "gray"), ("yellow", "brown")}),
    "shape and count": frozenset({("circle", 4), ("triangle", 3), ("ring", 2)}),
    "shape and relation": frozenset({("square", "left of"), ("diamond", "above"), ("cross", "right of")}),
}  # fmt: skip
"""What no training scene shows together, by kind. A relation counts from both ends: where no square is said to be left
of something, nothing is said to be right of a square either."""
SPLITS = ("train", "validation", "test")


# Scenes --------------------------------------------------------------------------------------------------------


class Thing(NamedTuple):
    """One object in a picture. Read from a picture, what cannot be told is None."""

    shape: str | None
    colour: str | None
    size: str | None
    top: int
    left: int
    """The first row and column of its box."""

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column."""
        half = SIZES[self.size or "small"] / 2
        return self.top + half, self.left + half


class Content(NamedTuple):
    """All that a picture shows; things in the order of their places."""

    background: str
    texture: str
    things: tuple[Thing, ...]


class Group(NamedTuple):
    """`count` things alike, as a caption speaks of them; a size it does not mention is None."""

    shape: str
    colour: str
    size: str | None
    count: int


class Claim(NamedTuple):
    """What a caption says; None where it says nothing."""

    groups: tuple[Group, ...]
    relation: str | None
    """Of the first group to the second."""
    background: str | None
    texture: str | None

    @property
    def kind(self) -> str:
        """Which kind of scene is asked for."""
        if self.relation is not None:
            return "relation"
        total = sum(group.count for group in self.groups)
        if len(self.groups) == 1:
            return "single" if total == 1 else "count"
        return "pair" if total == 2 else "two groups"


class Scene(NamedTuple):
    """What is drawn and what is true of it: `claim` with everything said."""

    content: Content
    claim: Claim


KINDS = ("single", "relation", "count", "pair", "two groups")
_SHARES = dict(zip(KINDS, (0.15, 0.35, 0.25, 0.1, 0.15), strict=True))
_KINDS_OF = {
    "shape and count": {"count": 0.7, "two groups": 0.3},
    "shape and relation": {"relation": 1.0},
}
"""Shares of the kinds of scenes that show a kind of `UNSEEN`, where it is not the usual one."""


def draw_scene(stream: random.Random, unseen: str | None = None) -> Scene:
    """A scene of the grammar, from `stream` alone, that shows a combination of this kind of `UNSEEN` and of no other;
    None: of none at all, as for training."""
    # Only `random()` is used: its numbers are the same in every version of Python.
    wanted = frozenset() if unseen is None else frozenset({unseen})
    kinds = _KINDS_OF.get(unseen, _SHARES)
    kind = _pick(stream, tuple(kinds), tuple(kinds.values()))  # first, so that no rejection changes its share
    while True:
        claim = _draw_claim(stream, kind)
        if unseen_kinds(claim) == wanted and (things := _place(claim, stream)) is not None:
            assert claim.background is not None and claim.texture is not None
            return Scene(Content(claim.background, claim.texture, things), claim)


def _draw_claim(stream: random.Random, kind: str) -> Claim:
    counts = {"single": (1,), "relation": (1, 1), "pair": (1, 1)}.get(kind)
    if kind == "count":
        counts = (_pick(stream, (2, 3, 4)),)
    elif counts is None:
        counts = _pick(stream, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)))
    groups: list[Group] = []
    for count in counts:
        group = Group(_pick(stream, SHAPES), _pick(stream, tuple(COLOURS)), _pick(stream, tuple(SIZES)), count)
        while groups and groups[0][:2] == group[:2]:  # two groups of one look would be one
            group = group._replace(shape=_pick(stream, SHAPES), colour=_pick(stream, tuple(COLOURS)))
        groups.append(group)
    relation = _pick(stream, RELATIONS) if kind == "relation" else None
    return Claim(tuple(groups), relation, _pick(stream, tuple(BACKGROUNDS)), _pick(stream, TEXTURES))


def _pick(stream: random.Random, choices: Sequence, shares: Sequence[float] | None = None):
    point = stream.random()
    if shares is None:
        return choices[int(point * len(choices))]
    for choice, end in zip(choices, itertools.accumulate(shares), strict=True):
        if point < end:
            return choice
    return choices[-1]


def _place(claim: Claim, stream: random.Random) -> tuple[Thing, ...] | None:
    """The things at free places drawn evenly, one after the other; None if there is no room left for one."""
    placed: list[Thing] = []
    for group in claim.groups:
        for _ in range(group.count):
            assert group.size is not None
            places = _places(SIZES[group.size])
            free = _are_free(places, SIZES[group.size], placed)
            if claim.relation is not None and placed:
                free &= _stand_clearly(placed[0], places + SIZES[group.size] / 2, claim.relation)
            if not free.any():
                return None
            top, left = _pick(stream, places[free]).tolist()
            placed.append(Thing(group.shape, group.colour, group.size, top, left))
    return tuple(sorted(placed, key=lambda thing: (thing.top, thing.left)))


@cache
def _places(size: int) -> Int[np.ndarray, "n 2"]:
    """Top and left of the boxes of this size on the lattice."""
    starts = range(1, SIDE - size, LATTICE)
    return np.array(list(itertools.product(starts, starts)))


def _are_free(places: Int[np.ndarray, "n 2"], size: int, placed: Sequence[Thing]) -> Bool[np.ndarray, " n"]:
    free = np.ones(len(places), dtype=bool)
    for other in placed:
        assert other.size is not None
        corner = np.array([other.top, other.left])
        ends_before = places + size + LATTICE <= corner
        begins_behind = corner + SIZES[other.size] + LATTICE <= places
        free &= (ends_before | begins_behind).any(1)
    return free


def relation_of(one: Thing, other: Thing) -> str | None:
    """How the first stands to the second: along the axis on which they are further apart, None on the diagonal."""
    down, right = (b - a for a, b in zip(one.centre, other.centre, strict=True))
    if abs(down) == abs(right):
        return None
    if abs(right) > abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def _stand_clearly(one: Thing, centres: Float[np.ndarray, "n 2"], relation: str) -> Bool[np.ndarray, " n"]:
    """Whether the relation of the first to things with these centres holds with 8 pixels to spare: nobody doubts it."""
    down, right = (centres - one.centre).T
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    forwards = along if relation in ("left of", "above") else -along
    return forwards >= abs(across) + 8


def unseen_kinds(claim: Claim) -> frozenset[str]:
    """The kinds of `UNSEEN` of which the claim shows a combination."""
    found = set()
    for group in claim.groups:
        pairs = {
            "shape and colour": (group.shape, group.colour),
            "size and colour": (group.size, group.colour),
            "colour and background": (group.colour, claim.background),
            "shape and count": (group.shape, group.count),
        }
        found |= {kind for kind, pair in pairs.items() if pair in UNSEEN[kind]}
    if claim.relation is not None:
        one, other = claim.groups
        told = {(one.shape, claim.relation), (other.shape, INVERSE[claim.relation])}
        found |= {"shape and relation"} if told & UNSEEN["shape and relation"] else set()
    return frozenset(found)


# Captions ------------------------------------------------------------------------------------------------------


def write_caption(scene: Scene, stream: random.Random) -> str:
    """One of the many captions of a scene: shapes, colours, counts and relation always, sizes mostly, and where it is
    drawn background and texture, only one, or neither."""
    claim = scene.claim
    named = [_group_words(group, stream) for group in claim.groups]
    if claim.relation is not None:
        said = f"{named[0]} {_pick(stream, _PHRASES[claim.relation])} {named[1]}"
    else:
        said = _pick(stream, (" and ", " with ")).join(named)
    opening = _pick(stream, ("", "a picture of "), (0.75, 0.25))
    return f"{opening}{said}{_background_words(claim, stream)}"


def _group_words(group: Group, stream: random.Random) -> str:
    words = [group.size] if group.size and stream.random() < 0.75 else []
    words += [group.colour, group.shape if group.count == 1 else PLURALS[group.shape]]
    if group.count > 1:
        return " ".join([list(COUNTS)[group.count - 1], *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([_pick(stream, (article, "one"), (0.85, 0.15)), *words])


def _background_words(claim: Claim, stream: random.Random) -> str:
    said = _pick(stream, ("both", "background", "texture", "neither"), (0.6, 0.2, 0.1, 0.1))
    if said == "neither":
        return ""
    words = {"both": (claim.texture, claim.background), "background": (claim.background,), "texture": (claim.texture,)}
    before = _pick(stream, ("on a", "against a"), (0.75, 0.25))
    return f" {before} {' '.join(map(str, words[said]))} background"


_GROUP = (
    rf"(?:(a|an|{'|'.join(COUNTS)}) )?(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) "
    rf"({'|'.join([*SHAPES, *PLURALS.values()])})"
)
_BETWEEN = "|".join(sorted((p for phrases in _PHRASES.values() for p in phrases), key=len, reverse=True))
_CAPTION = re.compile(
    rf"(?:a picture of )?{_GROUP}(?: (and|with|{_BETWEEN}) {_GROUP})?"
    rf"(?: (?:on|against) (?:a )?(?:({'|'.join(TEXTURES)}) )?(?:({'|'.join(BACKGROUNDS)})(?: background)?|background))?"
)
_RELATION_OF = {phrase: relation for relation, phrases in _PHRASES.items() for phrase in phrases}


def parse_caption(caption: str) -> Claim:
    """What a caption says. Raises InputError, with an example, for one that is none of the grammar's."""
    text = " ".join(caption.lower().replace(",", " ").replace(".", " ").split())
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise InputError(
            f"{shortened(repr(caption))} is no caption of a scene; write for example "
            '"two small red circles and a large blue square on a striped white background", or '
            '"a green ring to the left of an orange cross".'
        )
    parts = match.groups()
    groups = (_group(parts[:4]),) if parts[4] is None else (_group(parts[:4]), _group(parts[5:9]))
    if sum(group.count for group in groups) > MOST:
        raise InputError(f"{shortened(repr(caption))} asks for more than {MOST} things; ask for fewer.")
    relation = _RELATION_OF.get(parts[4] or "")
    if relation is not None and any(group.count > 1 for group in groups):
        raise InputError(f"{shortened(repr(caption))}: a relation stands between two single things, not groups.")
    return Claim(groups, relation, parts[10], parts[9])


def _group(words: Sequence[str | None]) -> Group:
    count, size, colour, shape = words
    assert colour is not None and shape is not None
    singular = shape if shape in SHAPES else next(one for one, many in PLURALS.items() if many == shape)
    return Group(singular, colour, size, COUNTS.get(count or "one", 1))


# Pictures ------------------------------------------------------------------------------------------------------


def render(content: Content) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of what is shown. Nothing in it is random."""
    picture = ground(content.background, content.texture).copy()
    for thing in content.things:
        assert thing.shape is not None and thing.colour is not None and thing.size is not None
        mask = shape_mask(thing.shape, thing.size)
        box = picture[thing.top : thing.top + len(mask), thing.left : thing.left + len(mask)]
        box[mask] = COLOURS[thing.colour]
    return picture


@cache
def ground(background: str, texture: str) -> UInt8[np.ndarray, "H W 3"]:
    """A picture without things. Textures repeat every 8 pixels."""
    plain, shade = np.array(BACKGROUNDS[background], dtype=np.uint8)
    return np.where(_is_shaded(texture)[..., None], shade, plain)


def _is_shaded(texture: str) -> Bool[np.ndarray, "H W"]:
    rows, columns = np.indices((SIDE, SIDE)) % 8
    return {
        "plain": np.zeros((SIDE, SIDE), dtype=bool),
        "striped": rows >= 4,
        "dotted": (abs(rows - 3.5) < 2) & (abs(columns - 3.5) < 2),
        "checkered": (rows >= 4) ^ (columns >= 4),
    }[texture]


@cache
def shape_mask(shape: str, size: str) -> Bool[np.ndarray, "side side"]:
    """Which pixels of its box a shape covers."""
    side = SIZES[size]
    centres = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.abs(centres)[None, :], centres[:, None]
    radius = np.hypot(x, y)
    covered = {
        "circle": radius <= 1,
        "square": np.maximum(x, abs(y)) <= 0.9,
        "triangle": x <= (y + 1) / 2,
        "diamond": x + abs(y) <= 1,
        "cross": np.minimum(x, abs(y)) <= 0.34,
        "ring": (radius <= 1) & (radius >= 0.5),
    }[shape]
    return np.broadcast_to(covered, (side, side))


# Reading pictures ----------------------------------------------------------------------------------------------

_SMALLEST = 40
"""Pixels of a component below which it is a speck; the smallest object has 98."""
_PUREST = 0.75
"""Share of a component's pixels that must be nearest to one colour."""
_LIKENESS = 0.65
"""Intersection over union with a template from which a component has a shape. A circle and a ring share 0.75, but each
has a template that fits better."""
_FAR = 120
"""Distance of a pixel from the ground, summed over channels, beyond which it counts no more against it."""


def read_picture(picture: UInt8[np.ndarray, "H W 3"]) -> Content:
    """What a picture shows: of a rendered one exactly what was rendered, of a blurred one what is nearest.

    The background and its texture are those whose picture without things is nearest; things are connected components
    of what is nearer to an object's colour than to the ground. What has no single colour, or no known shape, has None
    there: two things grown together are one of no shape. Raises ValueError for another size than 64×64.
    """
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a picture of a scene is {SIDE}×{SIDE}×3, not {'×'.join(map(str, picture.shape))}.")
    names, grounds = _grounds()
    packed = picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    values, inverse = np.unique(packed.ravel(), return_inverse=True)  # few: distances are taken once for each
    rgb = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1)
    distances = np.abs(rgb[:, None] - _palette()).sum(-1)  # (values, colours of things and of grounds)
    from_grounds = distances[inverse, grounds]  # (16, H * W)
    nearest = int(np.minimum(from_grounds, _FAR).sum(1).argmin())
    from_things = distances[:, : len(COLOURS)]
    colour = from_things.argmin(1)[inverse].reshape(SIDE, SIDE)
    is_thing = (from_things.min(1)[inverse] < from_grounds[nearest]).reshape(SIDE, SIDE)
    labels, num = ndimage.label(is_thing)  # pyright: ignore
    things = []
    for label, box in zip(range(1, num + 1), ndimage.find_objects(labels), strict=True):
        mask = labels[box] == label
        if mask.sum() >= _SMALLEST:
            things.append(_read_thing(mask, colour[box], box[0].start, box[1].start))
    background, texture = names[nearest]
    return Content(background, texture, tuple(sorted(things, key=lambda thing: (thing.top, thing.left))))


def _read_thing(mask: Bool[np.ndarray, "h w"], colour: Int[np.ndarray, "h w"], top: int, left: int) -> Thing:
    counts = np.bincount(colour[mask], minlength=len(COLOURS))
    named = list(COLOURS)[int(counts.argmax())] if counts.max() >= _PUREST * counts.sum() else None
    # The component in a frame as large as the largest template, its box in the middle.
    frame = max(SIZES.values()) + 4
    (rows, columns), half = mask.shape, frame // 2
    if max(rows, columns) > frame:
        return Thing(None, named, None, top, left)
    padded = np.zeros((frame, frame), dtype=bool)
    down, right = half - rows // 2, half - columns // 2
    padded[down : down + rows, right : right + columns] = mask
    templates, keys = _templates(frame)
    both = templates @ padded.ravel().astype(np.float32)
    likeness = both / (templates.sum(1) + padded.sum() - both)
    best = int(likeness.argmax())
    shape, size, row, column = keys[best]
    if likeness[best] < _LIKENESS:
        shape = None
    return Thing(shape, named, size, top - down + row, left - right + column)


@cache
def _palette() -> Int[np.ndarray, "colours 3"]:
    """The colours of things, then of grounds, each with its shade."""
    return np.array([*COLOURS.values(), *itertools.chain(*BACKGROUNDS.values())])


@cache
def _grounds() -> tuple[list[tuple[str, str]], Int[np.ndarray, "16 pixels"]]:
    """Names of all backgrounds with their textures, and their pixels as indices into the palette."""
    names = list(itertools.product(BACKGROUNDS, TEXTURES))
    pixels = [
        np.where(_is_shaded(texture), 1, 0).ravel() + len(COLOURS) + 2 * list(BACKGROUNDS).index(background)
        for background, texture in names
    ]
    return names, np.stack(pixels)


@cache
def _templates(frame: int) -> tuple[Float[np.ndarray, "n pixels"], list[tuple[str, str, int, int]]]:
    """Every shape and size at the places in a frame where it may stand, two pixels each way around the middle."""
    masks, keys = [], []
    for shape, (size, side) in itertools.product(SHAPES, SIZES.items()):
        middle = (frame - side) // 2
        for row, column in itertools.product(range(middle - 2, middle + 3), repeat=2):
            canvas = np.zeros((frame, frame), dtype=np.float32)
            canvas[row : row + side, column : column + side] = shape_mask(shape, size)
            masks.append(canvas.ravel())
            keys.append((shape, size, row, column))
    return np.stack(masks), keys


# Checking ------------------------------------------------------------------------------------------------------

CATEGORIES = ("shape", "colour", "size", "count", "relation", "background", "texture")
ATTRIBUTES = ("shape", "colour", "size", "background", "texture")


class Check(NamedTuple):
    """What of a claim is right in a picture; None where nothing is claimed. A size counts where it is said."""

    shape: bool
    colour: bool
    size: bool | None
    count: bool
    relation: bool | None
    background: bool | None
    texture: bool | None

    @property
    def all(self) -> bool:
        return not any(right is False for right in self)

    @property
    def attributes(self) -> bool:
        """Whether shapes, colours, sizes, background and texture are all right."""
        return not any(getattr(self, name) is False for name in ATTRIBUTES)


def check(claim: Claim, content: Content) -> Check:
    """Holds a claim against what a picture shows.

    The things are matched with those claimed so that most is right. `count` is right if there are as many things as
    claimed; a thing that is claimed and not there has neither shape nor colour nor size.
    """
    wanted = [group for group in claim.groups for _ in range(group.count)]
    found = list(content.things)[: len(wanted) + 2]
    found += [None] * max(0, len(wanted) - len(found))

    def merit(chosen: Sequence[Thing | None]) -> tuple[int, bool]:
        matches = sum(
            3 * (thing.shape == group.shape) + 3 * (thing.colour == group.colour) + (thing.size == group.size)
            for group, thing in zip(wanted, chosen, strict=True)
            if thing is not None
        )
        return matches, _related(claim, chosen) is True

    chosen = max(itertools.permutations(found, len(wanted)), key=merit)
    paired = list(zip(wanted, chosen, strict=True))
    sizes = [thing is not None and thing.size == group.size for group, thing in paired if group.size is not None]
    return Check(
        shape=all(thing is not None and thing.shape == group.shape for group, thing in paired),
        colour=all(thing is not None and thing.colour == group.colour for group, thing in paired),
        size=all(sizes) if sizes else None,
        count=len(content.things) == len(wanted),
        relation=_related(claim, chosen),
        background=None if claim.background is None else claim.background == content.background,
        texture=None if claim.texture is None else claim.texture == content.texture,
    )


def _related(claim: Claim, chosen: Sequence[Thing | None]) -> bool | None:
    if claim.relation is None:
        return None
    one, other = chosen
    return one is not None and other is not None and relation_of(one, other) == claim.relation


# Tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """How many scenes are drawn, and from which seed (0 .. 2³²-1).

    Training and validation scenes show nothing of `UNSEEN`. Of the test scenes every other one does, of each kind in
    turn, and its caption says it.
    """

    num_train: int = 100_000
    num_validation: int = 2_000
    num_test: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is outside 0 .. {2**32 - 1}.")
        for name in ("num_train", "num_validation", "num_test"):
            if not 1 <= getattr(self, name) <= 10**8:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {10**8:,}.")


class Row(NamedTuple):
    """One pair of a table."""

    scene: Scene
    caption: str
    unseen: str | None
    """The kind of `UNSEEN` that it shows."""


def scene_row(split: str, index: int, seed: int) -> Row:
    """The pair number `index` of a split: a function of these three alone."""
    stream = random.Random(f"smalti scenes {seed} {split} {index}")  # seeded by the text's SHA-512
    wanted = list(UNSEEN)[index // 2 % len(UNSEEN)] if split == "test" and index % 2 else None
    while True:
        scene = draw_scene(stream, wanted)
        caption = write_caption(scene, stream)
        if wanted is None or unseen_kinds(parse_caption(caption)) == {wanted}:  # it says so
            return Row(scene, caption, wanted)


_METADATA_KEY = b"smalti.scenes"
_SCHEMA = pa.schema(
    [(name, pa.string() if name != "image" else pa.binary()) for name in ("__key__", "image", "caption", "kind")]
    + [("unseen", pa.string())]
)
_ROWS_PER_GROUP = 4096


def write_scenes(
    directory: Path | str,
    config: ScenesConfig = ScenesConfig(),
    *,
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Writes `train.parquet`, `validation.parquet` and `test.parquet` into `directory`; returns their paths.

    Columns: `__key__`, `image` (PNG), `caption`, `kind` (of KINDS), and `unseen`, the kind of what training lacks, or
    empty. A table that was made the same way is left alone. Raises InputError if a file is there that was made
    otherwise (unless `force`), or if writing fails.
    """
    directory = Path(directory)
    sizes = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
    paths = {split: directory / f"{split}.parquet" for split in sizes}
    notes = {split: _note(split, num, config.seed) for split, num in sizes.items()}
    missing = [split for split in sizes if force or not _is_made(paths[split], notes[split])]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split in missing:
            with stage(f"{split} scenes", sizes[split], unit="picture", show=show_progress) as progress:
                _write_table(paths[split], split, sizes[split], config.seed, notes[split], progress)
    except OSError as error:
        raise InputError(
            f"cannot write the scenes to {directory}: {cause(error)}; choose a folder that can be written, with some "
            f"{max(1, sum(sizes.values()) // 2000)} MB free."
        ) from error
    return paths


def _note(split: str, num: int, seed: int) -> dict[str, object]:
    held_out = {kind: sorted(map(list, pairs)) for kind, pairs in UNSEEN.items()}
    return {"version": 1, "split": split, "num": num, "seed": seed, "unseen": held_out}


def _is_made(path: Path, note: Mapping[str, object]) -> bool:
    """Whether the table is there, made as `note` says. Raises InputError if another file is in its place."""
    if not path.exists():
        return False
    try:
        found = json.loads((ParquetReader(path).schema.metadata or {}).get(_METADATA_KEY, b"null"))
    except (InputError, ValueError):
        found = None
    if found == note:
        return True
    raise InputError(f"{path} exists and was made otherwise; name another folder, or add --force to replace it.")


def _write_table(path: Path, split: str, num: int, seed: int, note: Mapping[str, object], progress: Stage) -> None:
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(note).encode()})
    with new_file(path, force=True) as temporary, parquet_writer(temporary, schema) as writer:
        for start in range(0, num, _ROWS_PER_GROUP):
            indices = range(start, min(start + _ROWS_PER_GROUP, num))
            rows = [scene_row(split, index, seed) for index in indices]
            columns = {
                "__key__": [f"{split}-{index:08d}" for index in indices],
                "image": [to_png(render(row.scene.content)) for row in rows],
                "caption": [row.caption for row in rows],
                "kind": [row.scene.claim.kind for row in rows],
                "unseen": [row.unseen or "" for row in rows],
            }
            writer.write_table(pa.table(columns, schema=schema))
            progress.update(indices.stop)


def to_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A picture's PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
