"""Settings of a training: whether two starts of a run have the same, and the ranges that are told all at once."""

from dataclasses import dataclass, replace

import pytest

from smalti.training.settings import as_json, check_ranges, first_difference


@dataclass(frozen=True, kw_only=True)
class Part:
    width: int
    newer: float = 0.5
    open: int | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = Part(width=3)
    newest: tuple[int, ...] = (1, 2)
    precision: str = "auto"
    device: str = "cpu"


HERE = Whole(part=Part(width=4))


@pytest.mark.parametrize(
    ("there", "difference"),
    [
        (as_json(HERE), None),
        ({"part": {"width": 4}}, None),  # from before there were the other settings
        ({"part": {"width": 4, "newer": 0.5, "removed": None}}, None),
        ({"part": {"width": 4}, "device": "cuda", "precision": "bfloat16"}, None),
        ({}, "part is None there, {'width': 4, 'newer': 0.5, 'open': None} here"),
        ({"part": {"width": 3}}, "part.width is 3 there, 4 here"),
        ({"part": {"width": 4, "newer": 0.25}}, "part.newer is 0.25 there, 0.5 here"),
        ({"part": {"width": 4, "removed": 1}}, "part.removed is 1 there, None here"),
        ({"part": {"width": 4}, "newest": [2, 1]}, "newest is [2, 1] there, [1, 2] here"),
    ],
)
def test_a_setting_that_an_earlier_version_did_not_have_is_the_same_at_its_default(there, difference):
    assert first_difference(there, HERE) == difference


def test_a_setting_that_an_earlier_version_did_not_have_differs_elsewhere():
    for changed in (replace(HERE, newest=(3,)), replace(HERE, part=Part(width=4, newer=1.0))):
        assert "None there" in (first_difference({"part": {"width": 4}}, changed) or "")


def test_settings_out_of_range_are_named_together():
    part = Part(width=0, newer=1.5)
    check_ranges(part, positive="newer open")
    with pytest.raises(
        ValueError, match=r"^width is 0; it must be more than 0\. newer is 1\.5; expected a share in \[0, 1\]\.$"
    ):
        check_ranges(part, positive="width open", shares="newer")
