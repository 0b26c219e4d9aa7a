"""Coloured, captioned digits: names and colours, captions, the colour rule, sources, tables."""

import codecs
import gzip
import io
import itertools
import json
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smalti.data import digit_sources, digits
from smalti.data.digit_sources import read_coloured_pickle, read_idx, read_mnist, scikit_learn_digits
from smalti.data.digits import (
    COLORS,
    COLOUR_PAIRS,
    DIGITS,
    CaptionContent,
    ColouredDigits,
    ColouringConfig,
    DistortionConfig,
    SourceDigits,
    colour_digits,
    distort_masks,
    images_to_levels,
    levels_to_images,
    parse_caption,
    read_colours,
    words,
    write_digits,
)
from smalti.data.pairs import PairTable
from smalti.errors import InputError

# Measured on the original data's published figures: rows of name: red, green, blue.
MEASURED = """
dark red 201, normal red 300, plain green 030, light green 131, dark green 121, plain blue 003, light blue 233,
dark blue 002, plain yellow 331, dark yellow 120, bright yellow 330, light cyan 133, bright cyan 033,
plain magenta 312, dark magenta 102, bright magenta 303, plain orange 310, light orange 321, plain purple 202,
light purple 213, dark purple 112, bright purple 223, light pink 323, plain brown 210, light gray 222, dark gray 111,
plain black 000, plain white 333, plain gold 320, plain turquoise 022, light turquoise 132, dark turquoise 122
"""


def make_source(num: int, seed: int = 0) -> SourceDigits:
    stream = np.random.default_rng(seed)
    masks = np.zeros((num, 28, 28), dtype=bool)
    masks[:, 3:23, 5:21] = stream.random((num, 20, 16)) < 0.3
    masks[:, 11, 13] = True
    return SourceDigits(masks, stream.integers(10, size=num).astype(np.uint8))


# ---- names ----


def test_measured_colours_keep_their_values() -> None:
    for entry in MEASURED.replace("\n", " ").split(","):
        shade, colour, levels = entry.split()
        assert COLORS[shade, colour] == tuple(int(level) for level in levels)


def test_every_name_has_a_colour_of_its_own() -> None:
    assert len(set(COLORS.values())) == len(COLORS) == 56
    assert set(itertools.chain(*COLORS.values())) == {0, 1, 2, 3}


def test_the_words_are_those_of_the_original_captions() -> None:
    assert len(words()) == len(set(words())) == 5 + 15 + 10 + 1
    assert {word for name in COLORS for word in name} | {*DIGITS, "on"} == set(words())
    assert "eight" in words() and "eigth" not in words()


def test_two_colours_of_a_picture_always_differ_visibly() -> None:
    distances = [sum(abs(a - b) for a, b in zip(COLORS[f], COLORS[b], strict=True)) for f, b in COLOUR_PAIRS]
    assert min(distances) == digits.MIN_COLOUR_DISTANCE == 3
    assert len(set(COLOUR_PAIRS)) == len(COLOUR_PAIRS) == 2380
    assert {f for f, _ in COLOUR_PAIRS} == {b for _, b in COLOUR_PAIRS} == set(COLORS)


# ---- captions ----


def test_a_caption_worked_by_hand() -> None:
    content = parse_caption("dark green eight on bright cyan")
    assert content == CaptionContent((1, 2, 1), 8, (0, 3, 3))
    assert parse_caption(" Dark  green eigth on bright cyan") == content


@given(st.sampled_from(COLOUR_PAIRS), st.integers(0, 9))
def test_every_caption_is_read(pair: tuple[tuple[str, str], tuple[str, str]], digit: int) -> None:
    foreground, background = pair
    caption = f"{' '.join(foreground)} {DIGITS[digit]} on {' '.join(background)}"
    assert parse_caption(caption) == CaptionContent(COLORS[foreground], digit, COLORS[background])
    assert len(caption.split()) == 6 and set(caption.split()) <= set(words())


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("dark green eight", "does not have the six words"),
        ("dark green eight in bright cyan", "does not have the six words"),
        ("dark green ate on bright cyan", "'ate' is no digit; use one of zero, one"),
        ("dark green seven on bright cyam", "'cyam' is no colour; did you mean cyan"),
        ("drak green seven on bright cyan", "'drak' is no shade; did you mean dark"),
        ("dark green seven on bright gray", "there is no bright gray; gray is light or dark"),
    ],
)
def test_a_caption_that_does_not_fit_names_the_word(caption: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_caption(caption)


# ---- colours of pictures ----


def test_colours_and_mask_are_read_back_from_every_pair_of_colours() -> None:
    mask = make_source(1).masks[0]
    colours = np.array([(COLORS[f], COLORS[b]) for f, b in COLOUR_PAIRS], np.uint8)
    reading = read_colours(np.where(mask[..., None], colours[:, :1, None], colours[:, 1:, None]))
    np.testing.assert_array_equal(reading.foreground, colours[:, 0])
    np.testing.assert_array_equal(reading.background, colours[:, 1])
    assert (reading.mask == mask).all()


def test_the_colour_rule_by_brute_force_on_noise() -> None:
    pictures = np.random.default_rng(5).choice(4, size=(7, 28, 28, 3), p=[0.6, 0.2, 0.1, 0.1]).astype(np.uint8)
    reading = read_colours(pictures)
    for picture, foreground, background, mask in zip(pictures, *reading, strict=True):
        pixels = {(y, x): tuple(map(int, picture[y, x])) for y in range(28) for x in range(28)}
        border = [colour for (y, x), colour in pixels.items() if not (0 < y < 27 and 0 < x < 27)]
        assert len(border) == 108
        # min of (-count, colour): the most frequent, then the smallest
        expected_background = min(set(border), key=lambda c: (-border.count(c), c))
        others = [colour for colour in pixels.values() if colour != expected_background]
        expected_foreground = min(set(others), key=lambda c: (-others.count(c), c))
        assert (tuple(foreground), tuple(background)) == (expected_foreground, expected_background)
        for (y, x), colour in pixels.items():
            near = sum((a - b) ** 2 for a, b in zip(colour, expected_foreground, strict=True))
            far = sum((a - b) ** 2 for a, b in zip(colour, expected_background, strict=True))
            assert mask[y, x] == (near < far)


def test_a_few_wrong_pixels_do_not_change_what_is_read() -> None:
    mask = make_source(1).masks[0]
    picture = np.where(mask[..., None], np.uint8([0, 0, 3]), np.uint8([3, 3, 0]))[None]
    picture[0, 0, :9] = (2, 3, 1)  # on the border, nearer to the background
    picture[0, 11, 13] = (1, 0, 3)  # inside the digit, nearer to the foreground
    reading = read_colours(picture)
    assert reading.foreground.tolist() == [[0, 0, 3]] and reading.background.tolist() == [[3, 3, 0]]
    np.testing.assert_array_equal(reading.mask[0], mask)


def test_a_picture_of_one_colour_has_no_foreground() -> None:
    reading = read_colours(np.full((2, 28, 28, 3), 2, np.uint8))
    assert reading.foreground.tolist() == reading.background.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert not reading.mask.any()


def test_png_values_are_not_taken_for_levels() -> None:
    with pytest.raises(InputError, match=r"levels 0..3, found 255; divide PNG values by 85"):
        read_colours(np.full((1, 28, 28, 3), 255, np.uint8))


def test_levels_to_images_and_back() -> None:
    pictures = np.random.default_rng(2).integers(4, size=(5, 2, 7, 3)).astype(np.uint8)
    images = levels_to_images(pictures)
    assert images.shape == (5, 3, 2, 7)
    assert images[4, 2, 1, 6].item() == pytest.approx(pictures[4, 1, 6, 2] / 3)
    np.testing.assert_array_equal(images_to_levels(images * 1.02 - 0.01), pictures)


# ---- colouring ----


def test_colouring_keeps_the_digit_and_says_so() -> None:
    source = make_source(31)
    coloured = colour_digits(source, "train", ColouringConfig(seed=3, colourings=2))
    reading = read_colours(coloured.pictures)
    contents = [parse_caption(caption) for caption in coloured.captions]
    np.testing.assert_array_equal(reading.mask, np.concatenate([source.masks] * 2))
    np.testing.assert_array_equal([c.digit for c in contents], np.concatenate([source.labels] * 2))
    np.testing.assert_array_equal(reading.foreground, [c.foreground for c in contents])
    np.testing.assert_array_equal(reading.background, [c.background for c in contents])


def test_colouring_is_decided_by_seed_and_split() -> None:
    source = make_source(11)
    first = colour_digits(source, "train", ColouringConfig(seed=3)).captions
    assert first == colour_digits(source, "train", ColouringConfig(seed=3)).captions
    assert first != colour_digits(source, "train", ColouringConfig(seed=4)).captions
    assert first != colour_digits(source, "test", ColouringConfig(seed=3)).captions


def test_all_colours_occur_about_equally_often() -> None:
    captions = colour_digits(make_source(5000), "train", ColouringConfig()).captions
    foregrounds = [" ".join(caption.split()[:2]) for caption in captions]
    expected = {" ".join(name): 0.0 for name in COLORS}
    for foreground, _ in COLOUR_PAIRS:
        expected[" ".join(foreground)] += 5000 / len(COLOUR_PAIRS)
    for name, mean in expected.items():
        assert abs(foregrounds.count(name) - mean) < 5 * mean**0.5


def test_held_out_digits_are_drawn_once_and_as_they_are() -> None:
    source = make_source(31)
    config = ColouringConfig(seed=3, colourings=5, distortion=DistortionConfig())
    for split in ("validation", "test"):
        found, plain = (colour_digits(source, split, c) for c in (config, ColouringConfig(seed=3)))
        np.testing.assert_array_equal(found.pictures, plain.pictures)
        assert found.captions == plain.captions


def test_distortion_changes_no_colour_and_is_decided_by_the_seed() -> None:
    source = scikit_learn_digits()["train"]
    source = SourceDigits(source.masks[:40], source.labels[:40])
    configs = [ColouringConfig(seed=seed, colourings=2, distortion=DistortionConfig()) for seed in (3, 3, 4)]
    first, again, other = (colour_digits(source, "train", config) for config in configs)
    plain = colour_digits(source, "train", ColouringConfig(seed=3, colourings=2))
    assert first.captions == plain.captions
    np.testing.assert_array_equal(first.pictures, again.pictures)
    bent, straight = (read_colours(drawn.pictures).mask for drawn in (first, plain))
    assert (bent[:40] != bent[40:]).any(axis=(1, 2)).all()  # each time that a digit is drawn, otherwise
    assert (bent != read_colours(other.pictures).mask).any()
    common, either = (bent & straight).sum(axis=(1, 2)), (bent | straight).sum(axis=(1, 2))
    assert 0.5 < (common / either).mean() < 0.95  # and still the same digit


def test_a_mask_is_bent_about_its_middle() -> None:
    rows, columns = np.mgrid[:28, :28] - 13.5
    bar = (abs(rows) < 9) & (abs(columns) < 3)
    masks = np.repeat(bar[None], 60, axis=0)
    still = DistortionConfig(rotation=0, shear=0, scaling=0)
    np.testing.assert_array_equal(distort_masks(masks, still, seed=0), masks)

    def moments(config: DistortionConfig) -> np.ndarray:
        """Of each bent bar: area, middle's row and column, spread of rows and columns, slant (columns over rows)."""
        ink = distort_masks(masks, config, seed=0).reshape(60, -1).astype(float)
        area = ink.sum(1)
        row, column = ink @ rows.ravel() / area, ink @ columns.ravel() / area
        spread = [np.sqrt(ink @ (places**2).ravel() / area) for places in (rows, columns)]
        slant = (ink @ (rows * columns).ravel()) / (ink @ (rows**2).ravel())
        return np.stack([area, row, column, *spread, slant])

    area, row, column, *_, slant = moments(DistortionConfig(rotation=20, shear=0, scaling=0))
    assert max(abs(row).max(), abs(column).max()) < 0.5 and abs(area / bar.sum() - 1).max() < 0.1
    assert 0.25 < abs(slant).max() <= np.tan(np.deg2rad(21)) and slant.min() < 0 < slant.max()
    *_, slant = moments(DistortionConfig(rotation=0, shear=0.3, scaling=0))
    assert 0.2 < abs(slant).max() <= 0.31
    *_, high, wide, slant = moments(DistortionConfig(rotation=0, shear=0, scaling=0.3))
    assert abs(slant).max() < 0.01 and abs(np.corrcoef(high, wide)[0, 1]) < 0.5
    straight = moments(still)[3:5, :1]
    ratios = np.stack([high, wide]) / straight
    assert (ratios.min(1) < 0.85).all() and (ratios.max(1) > 1.15).all() and abs(ratios - 1).max() < 0.4


@pytest.mark.parametrize(("change", "message"), [({"rotation": 180}, "rotation 180"), ({"scaling": -0.1}, "outside")])
def test_distortion_config_is_checked(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistortionConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": -1}, "seed -1"), ({"colourings": 0}, "colourings 0 must be 1 to")]
)
def test_colouring_config_is_checked(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColouringConfig(**change)


# ---- tables ----


def make_splits() -> dict[str, SourceDigits | ColouredDigits]:
    return {split: make_source(num, seed) for seed, (split, num) in enumerate((("train", 13), ("test", 5)))}


def test_tables_hold_what_was_coloured(tmp_path: Path) -> None:
    config = ColouringConfig(seed=7)
    paths = write_digits(tmp_path / "new", "made", make_splits(), config, show_progress=False)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["test.parquet", "train.parquet"]
    for split, source in make_splits().items():
        assert isinstance(source, SourceDigits)
        expected = colour_digits(source, split, config)
        table = pq.read_table(paths[split])
        assert table.column_names == ["__key__", "image", "caption"]
        assert len(set(table["__key__"].to_pylist())) == len(source.labels)
        assert table["caption"].to_pylist() == expected.captions
        for png, picture in zip(table["image"].to_pylist(), expected.pictures, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), picture * 85)


def test_the_table_says_how_it_was_made(tmp_path: Path) -> None:
    paths = write_digits(tmp_path, "made", make_splits(), ColouringConfig(seed=7, colourings=3), show_progress=False)
    note = json.loads(pq.read_schema(paths["train"]).metadata[b"smalti.digits"])
    assert (note["source"], note["seed"], note["colourings"], note["source_digits"]) == ("made", 7, 3, 13)


def test_writing_again_leaves_finished_tables_alone(tmp_path: Path) -> None:
    paths = write_digits(tmp_path, "made", make_splits(), show_progress=False)
    before = {split: path.stat() for split, path in paths.items()}
    paths["test"].unlink()
    write_digits(tmp_path, "made", make_splits(), show_progress=False)
    after = paths["train"].stat()
    assert (after.st_ino, after.st_mtime_ns) == (before["train"].st_ino, before["train"].st_mtime_ns)
    assert paths["test"].exists()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_digits(tmp_path / "one", "made", make_splits(), show_progress=False)
    second = write_digits(tmp_path / "two", "made", make_splits(), show_progress=False)
    assert first["train"].read_bytes() == second["train"].read_bytes()


def test_other_tables_are_not_overwritten_without_force(tmp_path: Path) -> None:
    write_digits(tmp_path, "made", make_splits(), ColouringConfig(seed=1), show_progress=False)
    with pytest.raises(
        InputError, match=r"train.parquet exists and was made with seed 1, not 2; choose another folder"
    ):
        write_digits(tmp_path, "made", make_splits(), ColouringConfig(seed=2), show_progress=False)
    other = {**make_splits(), "train": make_source(13, seed=9)}
    with pytest.raises(InputError, match="made with source_sha256"):
        write_digits(tmp_path, "made", other, ColouringConfig(seed=1), show_progress=False)
    paths = write_digits(tmp_path, "made", make_splits(), ColouringConfig(seed=2), force=True, show_progress=False)
    assert json.loads(pq.read_schema(paths["train"]).metadata[b"smalti.digits"])["seed"] == 2


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("mine")
    with pytest.raises(InputError, match="is not a table of digits"):
        write_digits(tmp_path, "made", make_splits(), show_progress=False)
    assert (tmp_path / "train.parquet").read_text() == "mine"


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the digits to .*file/inside: .*/file is a file, not a folder"):
        write_digits(tmp_path / "file" / "inside", "made", make_splits(), show_progress=False)


def test_a_failure_while_writing_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits, "picture_to_png", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_digits(tmp_path, "made", make_splits(), show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_coloured_digits_are_written_as_they_are(tmp_path: Path) -> None:
    coloured = ColouredDigits(np.full((1, 28, 28, 3), 2, np.uint8), ["rare mauve one on dark red"])
    paths = write_digits(tmp_path, "pickle", {"test": coloured}, show_progress=False)
    assert PairTable(paths["test"]).read().captions == coloured.captions


# ---- scikit-learn ----


def test_scikit_learn_digits_are_crisp_and_split() -> None:
    splits = scikit_learn_digits()
    assert {split: len(source.labels) for split, source in splits.items()} == {
        "train": 1297,
        "validation": 200,
        "test": 300,
    }
    for source in splits.values():
        assert source.masks.shape[1:] == (28, 28) and set(source.labels) == set(range(10))
        share_of_ink = source.masks.mean(axis=(1, 2))
        assert share_of_ink.min() > 0.03 and share_of_ink.max() < 0.5
        assert not source.masks[:, [0, 1, -2, -1]].any() and not source.masks[:, :, [0, 1, -2, -1]].any()
    everything = np.concatenate([source.masks for source in splits.values()]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) >= 1790  # next to no two digits look the same, across splits or within


# ---- idx files ----

NUM_VALIDATION = 5


@pytest.fixture
def small_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the made-up sources small."""
    monkeypatch.setattr(digit_sources, "MNIST_VALIDATION", NUM_VALIDATION)


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_mnist(directory: Path, num_train: int = 11, num_test: int = 7, **changed: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    stream = np.random.default_rng(1)
    for part, num in (("train", num_train), ("t10k", num_test)):
        images, labels = stream.integers(256, size=(num, 28, 28)), stream.integers(10, size=num)
        (directory / f"{part}-images-idx3-ubyte").write_bytes(changed.get(f"{part}_images", idx_bytes(images)))
        content = changed.get(f"{part}_labels", idx_bytes(labels))
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    return directory


@pytest.mark.usefixtures("small_validation")
def test_mnist_is_read_plain_and_gzipped(tmp_path: Path) -> None:
    splits = read_mnist(write_mnist(tmp_path))
    assert {split: len(source.labels) for split, source in splits.items()} == {
        "train": 6,
        "validation": 5,
        "test": 7,
    }
    stream = np.random.default_rng(1)
    images, labels = stream.integers(256, size=(11, 28, 28)), stream.integers(10, size=11)
    np.testing.assert_array_equal(splits["train"].masks, images[:6] > 127)
    np.testing.assert_array_equal(splits["validation"].labels, labels[6:])


def test_idx_arrays_come_back(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    (tmp_path / "a.gz").write_bytes(idx_bytes(values))  # plain in spite of its name
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz", num_axes=3), values)


GOOD = idx_bytes(np.zeros((3, 2, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"byte 0: expected the idx magic number 00000803, found nothing"),
        (b"\0\0\x08\x01" + GOOD[4:], r"byte 0: expected the idx magic number 00000803, found 00000801"),
        (GOOD[:11], r"byte 11: the file ends in its header, expected 16 bytes"),
        (GOOD[:-1], r"byte 27: expected 28 bytes for the shape 3×2×2 its header states, found 27"),
        (GOOD + b"x", r"byte 28: expected 28 bytes for the shape 3×2×2 its header states, found 29"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"found 16"),
        (gzip.compress(GOOD, mtime=0)[:-9], r"gzip data is damaged or cut short after byte \d+"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 30, r"gzip data is damaged or cut short after byte 0"),
    ],
)
def test_a_broken_idx_file_names_file_and_byte(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"broken: .*{message}"):
        read_idx(path, num_axes=3)


@pytest.mark.usefixtures("small_validation")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t10k_labels": idx_bytes(np.zeros(6))}, r"t10k-labels-idx1-ubyte.gz: byte 4: expected 7 labels.*found 6"),
        (
            {"t10k_labels": idx_bytes(np.arange(7) + 4)},
            r"t10k-labels-idx1-ubyte.gz: byte 14: expected a label 0..9, found 10",
        ),
        (
            {"t10k_images": idx_bytes(np.zeros((7, 28, 27)))},
            r"t10k-images-idx3-ubyte: byte 12: .*28×28, found a side of 27",
        ),
        ({"train_images": b"PK"}, r"train-images-idx3-ubyte: byte 0"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_mnist(write_mnist(tmp_path, **changed))


@pytest.mark.usefixtures("small_validation")
def test_missing_mnist_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        read_mnist(tmp_path)
    with pytest.raises(InputError, match="holds 5 training digits; more than 5 are needed"):
        read_mnist(write_mnist(tmp_path, num_train=5))


def test_real_mnist(shared_dir: Path) -> None:
    splits = read_mnist(shared_dir / "data" / "mnist")
    assert {split: len(s.labels) for split, s in splits.items()} == {"train": 58000, "validation": 2000, "test": 5000}
    assert splits["test"].labels[:9].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5]
    coloured = colour_digits(splits["test"], "test", ColouringConfig())
    reading = read_colours(coloured.pictures)  # also digits that touch the border
    np.testing.assert_array_equal(reading.mask, splits["test"].masks)
    contents = [parse_caption(caption) for caption in coloured.captions]
    np.testing.assert_array_equal(reading.background, [content.background for content in contents])


# ---- the original pickle ----

NUM_PICKLED = 8


def pickled_items(captions_as: type) -> list[object]:
    stream = np.random.default_rng(3)
    pictures = [stream.integers(4, size=(num, 28, 28, 3)).astype(np.uint8) for num in (NUM_PICKLED, 2)]
    captions = [["light purple seven on dark yellow"] * NUM_PICKLED, ["dark gray eigth on plain brown"] * 2]
    return [*pictures, *(captions_as(c) if captions_as is list else np.array(c, captions_as) for c in captions)]


@pytest.mark.usefixtures("small_validation")
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("captions_as", [list, str, object])
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_the_original_pickle_is_read(tmp_path: Path, protocol: int, captions_as: type, core: bytes) -> None:
    path = tmp_path / "digits.pkl"
    items = pickled_items(captions_as)
    content = pickle.dumps(items, protocol)
    if core == b"numpy.core":
        content = rename_module(content, protocol)
    path.write_bytes(content)
    splits = read_coloured_pickle(path)
    assert {split: len(s.captions) for split, s in splits.items()} == {"train": 3, "validation": 5, "test": 2}
    np.testing.assert_array_equal(np.concatenate([splits["train"].pictures, splits["validation"].pictures]), items[0])
    np.testing.assert_array_equal(splits["test"].pictures, items[1])
    assert splits["test"].captions == ["dark gray eight on plain brown"] * 2


def rename_module(content: bytes, protocol: int) -> bytes:
    """The same pickle as NumPy before 2.0 would have written it."""
    old = content.replace(b"numpy._core", b"numpy.core")
    if protocol >= 4:  # these hold the name's length, and frames of stated length: mend both
        old = old.replace(b"\x8c\x16numpy.core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = old.replace(b"\x8c\x13numpy.core.numeric", b"\x8c\x12numpy.core.numeric")
        old = pickle.PROTO + bytes([protocol]) + without_frames(content, old)
    return old


def without_frames(content: bytes, renamed: bytes) -> bytes:
    frames = [
        (position, argument) for opcode, argument, position in pickletools.genops(content) if opcode.name == "FRAME"
    ]
    bare = renamed[2:]
    for _, length in frames:
        bare = bare.replace(b"\x95" + length.to_bytes(8, "little"), b"", 1)
    return bare


@pytest.mark.usefixtures("small_validation")
def test_scalars_and_fortran_order_are_read(tmp_path: Path) -> None:
    items = pickled_items(list)
    items[0] = np.asfortranarray(items[0])
    items[3] = [np.str_(caption) for caption in items[3]]  # type: ignore[union-attr]
    path = tmp_path / "digits.pkl"
    path.write_bytes(pickle.dumps(items, 2))
    splits = read_coloured_pickle(path)
    np.testing.assert_array_equal(splits["train"].pictures, np.asarray(items[0])[:3])
    assert splits["test"].captions[1] == "dark gray eight on plain brown"


class Attack:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.usefixtures("small_validation")
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Attack(exec, "raise SystemExit"), r"refuses builtins.exec"),
        (Attack(getattr, "", "join"), r"refuses builtins.getattr"),
        (Path("x"), rf"refuses {re.escape(type(Path('x')).__module__)}.PosixPath"),  # which module varies with Python
        (Attack(np.load, "x"), r"refuses numpy.load"),
        (Attack(codecs.encode, "x", "rot13"), r"refuses the encoding 'rot13'"),
        (np.array([1j]), r"refuses arrays of 'c16'"),
        (np.array([np.array([1j]), None], dtype=object), r"refuses arrays of 'c16'|refuses an object of type NoneType"),
        ({"a": 1}, r"refuses an object of type dict"),
    ],
)
def test_everything_else_in_a_pickle_is_refused_by_name(tmp_path: Path, item: object, message: str) -> None:
    path = tmp_path / "digits.pkl"
    path.write_bytes(pickle.dumps([item, *pickled_items(list)[1:]]))
    with pytest.raises(InputError, match=f"digits.pkl: {message}"):
        read_coloured_pickle(path)


@pytest.mark.usefixtures("small_validation")
def test_a_broken_or_different_pickle_says_so(tmp_path: Path) -> None:
    path = tmp_path / "digits.pkl"
    items = pickled_items(list)
    for content, message in [
        (pickle.dumps(items)[:500], "not a readable pickle"),
        (b"not a pickle", "not a readable pickle"),
        (pickle.dumps(items[:3]), "expected a list of four items"),
        (pickle.dumps([items[0], items[1], items[2], items[3][:1]]), "test: found 2 pictures but 1 captions"),  # type: ignore[index]
        (pickle.dumps([items[0], items[1], items[2], ["one two"] * 2]), "test caption 0: expected <shade>"),
        (pickle.dumps([items[0] * 85, *items[1:]]), "train pictures: expected levels 0..3, found 0..255"),  # type: ignore[operator]
        (pickle.dumps([items[0][:, 1:], *items[1:]]), r"expected integers \(N, 28, 28, 3\), found uint8"),  # type: ignore[index]
        (pickle.dumps([*items[:2], [["a"], "b"], items[3]]), "train captions: no array can be made of them"),
        (pickle.dumps([*items[:3], ["a" * 10**5] * 2]), "test caption 0: expected <shade>.{80,300}$"),
        (b"F" + b"x" * 10**5 + b"\n.", "not a readable pickle .{100,500}$"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_coloured_pickle(path)
    with pytest.raises(InputError, match=r"cannot read .*absent.pkl: "):
        read_coloured_pickle(tmp_path / "absent.pkl")
