"""Pictures of scenes read back exactly: connected components, nearest colours, templates of the shapes.

    read_picture(render(scene.content)) == scene.content
    check(parse_caption(caption), read_picture(picture)).all

Letters: H W rows and columns of a picture, 64 each; h w those of a component.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from smalti.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Claim,
    Content,
    Thing,
    is_shaded,
    relation_of,
    shape_mask,
)

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
    distances = np.abs(rgb[:, None] - _palette()).sum(-1, dtype=np.int16)  # (values, colours of things and grounds)
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
    templates, areas, keys = _templates(frame)
    both = templates @ padded.ravel().astype(np.float32)
    likeness = both / (areas + padded.sum() - both)
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
def _grounds() -> tuple[Sequence[tuple[str, str]], Int[np.ndarray, "16 pixels"]]:
    """Names of all backgrounds with their textures, and their pixels as indices into the palette."""
    names = [(background, texture) for background in BACKGROUNDS for texture in TEXTURES]
    pixels = [
        np.where(is_shaded(texture), 1, 0).ravel() + len(COLOURS) + 2 * list(BACKGROUNDS).index(background)
        for background, texture in names
    ]
    return names, np.stack(pixels)


@cache
def _templates(
    frame: int,
) -> tuple[Float[np.ndarray, "n pixels"], Float[np.ndarray, " n"], list[tuple[str, str, int, int]]]:
    """Every shape and size at the places in a frame where it may stand, two pixels each way around the middle; their
    areas; and what each is."""
    masks, keys = [], []
    for shape, (size, side) in itertools.product(SHAPES, SIZES.items()):
        middle = (frame - side) // 2
        for row, column in itertools.product(range(middle - 2, middle + 3), repeat=2):
            canvas = np.zeros((frame, frame), dtype=np.float32)
            canvas[row : row + side, column : column + side] = shape_mask(shape, size)
            masks.append(canvas.ravel())
            keys.append((shape, size, row, column))
    templates = np.stack(masks)
    return templates, templates.sum(1), keys


# Checking ------------------------------------------------------------------------------------------------------

CATEGORIES = ("shape", "colour", "size", "count", "relation", "background", "texture")
ATTRIBUTES = ("shape", "colour", "size", "background", "texture")


@dataclass(frozen=True, kw_only=True)
class Check:
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
        return not any(getattr(self, name) is False for name in CATEGORIES)

    @property
    def attributes(self) -> bool:
        """Whether shapes, colours, sizes, background and texture are all right."""
        return not any(getattr(self, name) is False for name in ATTRIBUTES)


def check(claim: Claim, content: Content) -> Check:
    """Holds a claim against what a picture shows.

    The things are matched with those claimed so that most is right. `count` is right if there are as many things as
    claimed; a thing that is claimed and not there has neither shape nor colour nor size.
    """
    wanted = [group for group in claim.groups for _ in range(group.num)]
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
