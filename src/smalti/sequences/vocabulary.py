"""What the token ids mean: named, contiguous segments laid end to end.

A vocabulary is written once, as `{"special": ["<bos>", ...], "image": 1024, "text": 31}`, in the order of the
ids. Whoever needs to know where picture codes start asks here; nobody adds offsets of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

SPECIAL = "special"
"""The one segment whose ids have names: the markers that stand between spans."""

FEATURES = "features"
"""The one segment without ids: vectors, as a text encoder makes them of a caption, stand in their place."""
FEATURE = -1
"""What stands in a sequence of token ids where a feature stands."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Ids `offset` up to, not including, `offset + size`."""

    name: str
    size: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.size


class Vocabulary:
    """Segments by name, in id order. `sizes` gives each segment's size, or the names of the special ids.

    Raises ValueError for an empty segment, a repeated special, or names outside the segment "special".
    """

    def __init__(self, sizes: Mapping[str, int | Sequence[str]]):
        self.segments: dict[str, Segment] = {}
        self.specials: dict[str, int] = {}
        self.size = 0
        for name, content in sizes.items():
            names = _special_names(name, content)
            size = content if isinstance(content, int) else len(names)
            if size < 1 and name != FEATURES:
                raise ValueError(f"vocabulary segment {name!r} has size {size}; a segment holds at least one id.")
            if size and name == FEATURES:
                raise ValueError(f"the segment {FEATURES!r} has size {size}; features are not ids, so it is 0.")
            self.segments[name] = Segment(name=name, size=size, offset=self.size)
            self.specials.update({special: self.size + i for i, special in enumerate(names)})
            self.size += size

    def __getitem__(self, name: str) -> Segment:
        if name not in self.segments:
            raise ValueError(f"no vocabulary segment {name!r}; there are {', '.join(self.segments)}.")
        return self.segments[name]

    def __contains__(self, name: str) -> bool:
        return name in self.segments

    def __eq__(self, other: object) -> bool:
        # not the dicts of `to_dict`: those are equal in any order, but the order is what gives the ids
        return isinstance(other, Vocabulary) and (self.segments, self.specials) == (other.segments, other.specials)

    def __repr__(self) -> str:
        parts = (
            f"{s.name} {s.offset}..{s.end - 1}" if s.size else f"{s.name} (no ids)" for s in self.segments.values()
        )
        return f"Vocabulary({', '.join(parts)})"

    def special(self, name: str) -> int:
        """The id of a special. Raises ValueError, listing the specials there are."""
        if name not in self.specials:
            raise ValueError(f"no special {name!r} in the vocabulary; there are {', '.join(self.specials) or 'none'}.")
        return self.specials[name]

    def ids(self, segment: str, local: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Token ids of a segment's local ids (codes, text ids), which count from 0."""
        return local + self[segment].offset

    def local(self, segment: str, token_ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """A segment's own numbers from token ids; the inverse of `ids`."""
        return token_ids - self[segment].offset

    def to_dict(self) -> dict[str, int | list[str]]:
        """The form the constructor takes, ready for JSON."""
        return {
            name: list(self.specials) if name == SPECIAL else segment.size for name, segment in self.segments.items()
        }


def _special_names(name: str, content: int | Sequence[str]) -> list[str]:
    if isinstance(content, int):
        if name == SPECIAL:
            raise ValueError(f'the segment "{SPECIAL}" is given as the list of its names, not as a size ({content}).')
        return []
    if name != SPECIAL:
        raise ValueError(f'segment {name!r} is given as names; only the segment "{SPECIAL}" has them. Give its size.')
    if len(set(content)) != len(content):
        raise ValueError(f"a special is named twice in {list(content)}.")
    return list(content)
