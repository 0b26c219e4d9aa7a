"""Scenes: a grammar whose pictures are read back exactly, whose captions say what is true, and whose held-out
combinations training never shows."""

import random
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from smalti.cli.app import run
from smalti.data.pairs import PairTable
from smalti.data.scene_reading import CATEGORIES, check, read_picture
from smalti.data.scene_tables import ScenesConfig, scene_row, write_scenes
from smalti.data.scenes import (
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    UNSEEN,
    Claim,
    Content,
    Group,
    Thing,
    draw_scene,
    parse_caption,
    relation_of,
    render,
    shape_mask,
    unseen_kinds,
)
from smalti.errors import InputError

NUM = 240


@pytest.fixture(scope="module")
def rows():
    return [scene_row("train", i, 3) for i in range(NUM)] + [scene_row("test", i, 3) for i in range(NUM)]


@pytest.fixture(scope="module")
def read(rows):
    return [read_picture(render(row.scene.content)) for row in rows]


def test_a_rendered_picture_is_read_back_exactly(rows, read):
    assert [row.scene.content for row in rows] == read
    assert {row.scene.claim.kind for row in rows} == set(KINDS)


def test_a_caption_is_right_of_its_picture_and_seldom_of_another(rows, read):
    claims = [parse_caption(row.caption) for row in rows]
    assert all(check(claim, content).all for claim, content in zip(claims, read, strict=True))
    other = np.random.default_rng(0).permutation(len(rows))
    checks = [check(claim, read[i]) for claim, i in zip(claims, other, strict=True)]
    assert np.mean([found.all for found in checks]) < 0.02
    rates = {name: np.mean([getattr(c, name) for c in checks if getattr(c, name) is not None]) for name in CATEGORIES}
    assert abs(rates["background"] - 1 / 4) < 0.1 and abs(rates["texture"] - 1 / 4) < 0.1  # four of each
    assert rates["shape"] < 0.15 and rates["colour"] < 0.15


def test_a_caption_says_nothing_that_is_not_true(rows):
    for row in rows:
        said, truth = parse_caption(row.caption), row.scene.claim
        assert said.relation == truth.relation and said.background in (None, truth.background)
        assert said.texture in (None, truth.texture)
        for group, true in zip(said.groups, truth.groups, strict=True):
            assert group._replace(size=true.size) == true and group.size in (None, true.size)
    assert len({row.caption for row in rows}) > 0.95 * len(rows)


def test_what_is_kept_unseen_is_in_no_training_scene_and_in_every_other_test_scene(rows):
    assert not any(unseen_kinds(row.scene.claim) for row in rows[:NUM])
    tests = rows[NUM:]
    assert [row.unseen for row in tests] == [list(UNSEEN)[i // 2 % len(UNSEEN)] if i % 2 else None for i in range(NUM)]
    for row in tests:
        assert unseen_kinds(row.scene.claim) == ({row.unseen} if row.unseen else set())
        if row.unseen:
            assert unseen_kinds(parse_caption(row.caption)) == {row.unseen}


def test_each_value_alone_is_seen_in_training():
    groups = [group for i in range(400) for group in scene_row("train", i, 0).scene.claim.groups]
    assert {group.shape for group in groups} == set(SHAPES) and {group.colour for group in groups} == set(COLOURS)
    for shape in SHAPES:
        assert len({group.colour for group in groups if group.shape == shape}) >= 6


def test_a_relation_counts_from_both_ends():
    def claim(one: str, relation: str, other: str) -> Claim:
        groups = (Group(one, "green", "small", 1), Group(other, "purple", "small", 1))
        return Claim(groups, relation, "white", "plain")

    assert unseen_kinds(claim("square", "left of", "ring")) == {"shape and relation"}
    assert unseen_kinds(claim("ring", "right of", "square")) == {"shape and relation"}
    assert not unseen_kinds(claim("ring", "left of", "square"))


def test_things_stand_apart_and_as_they_are_said_to():
    for seed in range(60):
        content, claim = draw_scene(random.Random(str(seed)))
        boxes = [(t.top, t.left, t.top + SIZES[t.size or ""], t.left + SIZES[t.size or ""]) for t in content.things]
        for i, one in enumerate(boxes):
            assert min(one) > 0 and max(one) < 64
            for other in boxes[:i]:
                assert max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3]) >= 8
        if claim.relation is not None:
            of = {(t.shape, t.colour): t for t in content.things}
            one, other = (of[group.shape, group.colour] for group in claim.groups)
            assert relation_of(one, other) == claim.relation


def test_the_same_seed_gives_the_same_scene_and_another_another():
    assert scene_row("train", 5, 0) == scene_row("train", 5, 0)
    assert len({scene_row(split, 5, seed).scene for split in ("train", "validation") for seed in (0, 1)}) == 4


def test_a_scene_by_hand():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[10:24, 20:34][shape_mask("cross", "small")] = COLOURS["red"]
    picture[40:62, 2:24][shape_mask("ring", "large")] = COLOURS["blue"]
    things = (Thing("cross", "red", "small", 10, 20), Thing("ring", "blue", "large", 40, 2))
    assert read_picture(picture) == Content("white", "plain", things)
    claim = parse_caption("a small red cross above a blue circle on a striped white background")
    found = check(claim, Content("white", "plain", things))
    assert asdict(found) == {
        "shape": False, "colour": True, "size": True, "count": True, "relation": True, "background": True,
        "texture": False,
    }  # fmt: skip
    assert not found.all and not found.attributes


def test_a_thing_too_many_or_too_few_is_a_wrong_count():
    ring = Thing("ring", "red", "small", 1, 1)
    both = Content("black", "plain", (ring, ring._replace(top=33)))
    assert not check(parse_caption("a red ring"), both).count and check(parse_caption("two red rings"), both).all
    three = check(parse_caption("three red rings"), both)
    assert not three.count and not three.shape
    assert not check(parse_caption("a red ring"), Content("black", "plain", ())).shape


def test_noise_does_not_change_what_is_read_and_things_grown_together_have_no_shape(rows):
    noise = np.random.default_rng(0)
    for row in rows[:40]:
        picture = render(row.scene.content).astype(int)
        noisy = np.clip(picture + noise.integers(-20, 21, picture.shape), 0, 255).astype(np.uint8)
        found = read_picture(noisy)
        assert [t[:3] for t in found.things] == [t[:3] for t in row.scene.content.things]
        assert (found.background, found.texture) == (row.scene.content.background, row.scene.content.texture)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[10:20, 5:60] = COLOURS["red"]
    assert [(t.shape, t.colour) for t in read_picture(picture).things] == [(None, "red")]
    with pytest.raises(ValueError, match="64×64×3, not 32×64×3"):
        read_picture(picture[:32])


@pytest.mark.parametrize(
    ("caption", "claim"),
    [
        ("Red circle", Claim((Group("circle", "red", None, 1),), None, None, None)),
        ("a picture of three small pink rings.", Claim((Group("ring", "pink", "small", 3),), None, None, None)),
        (
            "an orange cross to the right of a blue square, on a plain gray background",
            Claim((Group("cross", "orange", None, 1), Group("square", "blue", None, 1)), "right of", "gray", "plain"),
        ),
        (
            "two red crosses and one cyan circle on striped black",
            Claim((Group("cross", "red", None, 2), Group("circle", "cyan", None, 1)), None, "black", "striped"),
        ),
        ("a red ring on a dotted background", Claim((Group("ring", "red", None, 1),), None, None, "dotted")),
    ],
)
def test_captions_as_people_write_them(caption: str, claim: Claim):
    assert parse_caption(caption) == claim


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dog", "'a dog' is no caption of a scene; write for example"),
        ("", "is no caption of a scene"),
        ("three red rings and two blue squares", "asks for more than 4 things"),
        ("two red rings left of a blue square", "a relation stands between two single things"),
        ("a red ring " * 9999, "is no caption of a scene"),
    ],
)
def test_what_is_no_caption_is_refused(caption: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_caption(caption)


def test_complete_captions_leave_nothing_out_and_change_no_picture():
    plain, said = ([scene_row("train", i, 3, complete) for i in range(60)] for complete in (0.0, 0.5))
    assert [row.scene for row in plain] == [row.scene for row in said]

    def is_complete(caption: str) -> bool:
        claim = parse_caption(caption)
        return None not in (claim.background, claim.texture, *(group.size for group in claim.groups))

    # by chance 0.6 of the grounds and 0.75 of each size are named: 39 % of the plain captions or so leave nothing out
    assert sum(is_complete(row.caption) for row in plain) < 32 < sum(is_complete(row.caption) for row in said) < 56
    assert all(is_complete(scene_row("train", i, 3, 1.0).caption) for i in range(20))


def test_the_command_writes_tables_once(tmp_path, capsys):
    command = ["data", "scenes", str(tmp_path / "out"), "--rows", "12", "--held-out", "6", "--quiet"]
    assert run(command) == 0
    said = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in said] == ["train.parquet", "validation.parquet", "test.parquet"]
    pairs = PairTable(said[0]).read()
    assert pairs.captions == [scene_row("train", i, 0).caption for i in range(12)]
    assert (pairs.pictures[3] == render(scene_row("train", 3, 0).scene.content)).all()
    table = pq.read_table(said[2])
    assert table["unseen"].to_pylist() == [scene_row("test", i, 0).unseen or "" for i in range(6)]
    before = [(tmp_path / "out" / name).stat().st_mtime_ns for name in ("train.parquet", "test.parquet")]
    assert run(command) == 0 and before == [
        (tmp_path / "out" / name).stat().st_mtime_ns for name in ("train.parquet", "test.parquet")
    ]
    assert run([*command, "--seed", "1"]) == 2
    assert "was made otherwise" in capsys.readouterr().err
    assert run([*command, "--seed", "1", "--force"]) == 0
    assert PairTable(said[0]).read().captions[0] == scene_row("train", 0, 1).caption


def test_numbers_out_of_range_are_refused(tmp_path):
    for given in ({"num_train": 0}, {"seed": -1}, {"num_test": 10**9}, {"complete_captions": 1.5}):
        with pytest.raises(ValueError, match=next(iter(given))):
            ScenesConfig(**given)
    (tmp_path / "train.parquet").write_bytes(b"none")
    with pytest.raises(InputError, match="made otherwise"):
        write_scenes(tmp_path, ScenesConfig(num_train=1, num_validation=1, num_test=1), show_progress=False)
    assert (tmp_path / "train.parquet").read_bytes() == b"none"
