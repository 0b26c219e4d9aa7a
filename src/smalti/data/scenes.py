"""Scenes of one to four shapes, drawn and captioned by a seeded grammar.

    scene = draw_scene(stream)                       shapes, colours, sizes, places, relation, background, texture
    picture = render(scene.content)                  64×64 pixels without anything random
    caption = write_caption(scene, stream)           "two small red circles on a striped white background"

`scene_reading` reads such pictures back exactly, `scene_tables` writes many. Some combinations are never drawn for
training (`UNSEEN`), so that a model can be asked for what it has not seen.

Letters: H W rows and columns of a picture, 64 each; n places. Channel values are multiples of 51, six levels.
"""

import itertools
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from smalti.errors import InputError, shortened

SIDE = 64
LATTICE = 8
"""Boxes of things begin one pixel behind its multiples, and are at least so far from each other. None is in the first
row of cells, which is plain ground: an image tokenizer with cells of this size can keep the colours there."""

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
    """`num` things alike, as a caption speaks of them; a size it does not mention is None."""

    shape: str
    colour: str
    size: str | None
    num: int


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
        total = sum(group.num for group in self.groups)
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
    kinds = _KINDS_OF.get(unseen or "", _SHARES)
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
        for _ in range(group.num):
            assert group.size is not None
            places = _places(SIZES[group.size])
            free = _are_free(places, SIZES[group.size], placed)
            if claim.relation is not None and placed:
                free &= _stand_clearly(placed[0], places + SIZES[group.size] / 2, claim.relation)
            if not free.any():
                return None
            top, left = _pick(stream, places[free].tolist())
            placed.append(Thing(group.shape, group.colour, group.size, top, left))
    return tuple(sorted(placed, key=lambda thing: (thing.top, thing.left)))


@cache
def _places(size: int) -> Int[np.ndarray, "n 2"]:
    """Top and left of the boxes of this size on the lattice."""
    starts = range(1, SIDE - size, LATTICE)
    return np.array(list(itertools.product(starts[1:], starts)))


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
            "shape and count": (group.shape, group.num),
        }
        found |= {kind for kind, pair in pairs.items() if pair in UNSEEN[kind]}
    if claim.relation is not None:
        one, other = claim.groups
        told = {(one.shape, claim.relation), (other.shape, INVERSE[claim.relation])}
        found |= {"shape and relation"} if told & UNSEEN["shape and relation"] else set()
    return frozenset(found)


# Captions ------------------------------------------------------------------------------------------------------


def write_caption(scene: Scene, stream: random.Random, complete: float = 0.0) -> str:
    """One of the many captions of a scene: shapes, colours, counts and relation always, sizes mostly, and where it is
    drawn background and texture, only one, or neither. A share `complete` of all captions leaves nothing out."""
    claim = scene.claim
    says_all = complete > 0 and stream.random() < complete
    named = [_group_words(group, stream, says_all) for group in claim.groups]
    if claim.relation is not None:
        said = f"{named[0]} {_pick(stream, _PHRASES[claim.relation])} {named[1]}"
    else:
        said = _pick(stream, (" and ", " with ")).join(named)
    opening = _pick(stream, ("", "a picture of "), (0.75, 0.25))
    return f"{opening}{said}{_background_words(claim, stream, says_all)}"


def _group_words(group: Group, stream: random.Random, says_all: bool) -> str:
    words = [group.size] if group.size and (says_all or stream.random() < 0.75) else []
    words += [group.colour, group.shape if group.num == 1 else PLURALS[group.shape]]
    if group.num > 1:
        return " ".join([list(COUNTS)[group.num - 1], *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([_pick(stream, (article, "one"), (0.85, 0.15)), *words])


def _background_words(claim: Claim, stream: random.Random, says_all: bool) -> str:
    choices = ("both", "background", "texture", "neither")
    said = "both" if says_all else _pick(stream, choices, (0.6, 0.2, 0.1, 0.1))
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
    if sum(group.num for group in groups) > MOST:
        raise InputError(f"{shortened(repr(caption))} asks for more than {MOST} things; ask for fewer.")
    relation = _RELATION_OF.get(parts[4] or "")
    if relation is not None and any(group.num > 1 for group in groups):
        raise InputError(f"{shortened(repr(caption))}: a relation stands between two single things, not groups.")
    return Claim(groups, relation, parts[10], parts[9])


def is_caption(text: str) -> bool:
    """Whether a text is a caption of the grammar."""
    try:
        parse_caption(text)
    except InputError:
        return False
    return True


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
    return np.where(is_shaded(texture)[..., None], shade, plain)


def is_shaded(texture: str) -> Bool[np.ndarray, "H W"]:
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
