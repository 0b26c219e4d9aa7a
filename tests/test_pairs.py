"""Tables of pictures and captions: what is read, and what is said about files that cannot be."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti.data.pairs import PairTable, decode_picture
from smalti.errors import InputError

PICTURES = np.random.default_rng(0).integers(256, size=(11, 5, 7, 3)).astype(np.uint8)
CAPTIONS = [f"caption {row}" for row in range(11)]


def encode(picture: np.ndarray, file_format: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(buffer, format=file_format)
    return buffer.getvalue()


def write_table(path: Path, columns: dict[str, object] | None = None, rows_per_group: int = 3) -> Path:
    columns = {
        "__key__": [f"key-{row}" for row in range(11)],
        "image": [encode(picture) for picture in PICTURES],
        "caption": CAPTIONS,
        **(columns or {}),
    }
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    pq.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    return path


def test_a_table_is_read_whole(tmp_path: Path) -> None:
    pairs = PairTable(write_table(tmp_path / "t.parquet")).read()
    assert pairs.keys == [f"key-{row}" for row in range(11)]
    assert pairs.captions == CAPTIONS
    assert pairs.pictures.dtype == np.uint8
    np.testing.assert_array_equal(pairs.pictures, PICTURES)


def test_a_table_is_read_by_row_group(tmp_path: Path) -> None:
    table = PairTable(write_table(tmp_path / "t.parquet"))
    assert (len(table), table.num_row_groups) == (11, 4)
    group = list(table.row_group(2))
    assert [pair.caption for pair in group] == CAPTIONS[6:9]
    np.testing.assert_array_equal(group[1].picture, PICTURES[7])
    assert [pair.key for pair in table] == [f"key-{row}" for row in range(11)]


def test_rows_without_keys_are_numbered_across_row_groups(tmp_path: Path) -> None:
    table = PairTable(write_table(tmp_path / "t.parquet", {"__key__": None}))
    assert [pair.key for pair in table] == [f"{row:08d}" for row in range(11)]
    assert next(table.row_group(3)).key == "00000009"


def test_columns_may_have_other_names_and_the_hub_form(tmp_path: Path) -> None:
    hub = [{"bytes": encode(picture), "path": "x.png"} for picture in PICTURES]
    path = write_table(tmp_path / "t.parquet", {"image": None, "caption": None, "picture": hub, "text": CAPTIONS})
    pairs = PairTable(path, image_column="picture", caption_column="text").read()
    assert pairs.captions == CAPTIONS
    np.testing.assert_array_equal(pairs.pictures, PICTURES)


def test_pictures_of_different_sizes_are_read_one_by_one_only(tmp_path: Path) -> None:
    images = [encode(picture[: 5 - row % 2]) for row, picture in enumerate(PICTURES)]
    table = PairTable(write_table(tmp_path / "t.parquet", {"image": images}))
    assert [pair.picture.shape for pair in table][:2] == [(5, 7, 3), (4, 7, 3)]
    with pytest.raises(InputError, match=r"t.parquet: row 1: the picture is 4×7 but the first is 5×7"):
        table.read()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": None, "words": CAPTIONS, "more": CAPTIONS}, "no column is known to be the captions; it has words"),
        ({"image": None, "jpg": [b""] * 11}, r"has no column 'image'; it .*--image-column; pictures may be in jpg"),
        ({"image": CAPTIONS}, r"column 'image' holds string, expected encoded pictures \(binary"),
        ({"caption": list(range(11))}, r"column 'caption' holds int64, expected text \(string\)"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairTable(write_table(tmp_path / "t.parquet", columns))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", None, "row 7: column 'image' is empty"),
        ("caption", None, "row 7: column 'caption' is empty"),
        ("image", b"", r"row 7: the 0 bytes are not a whole picture \(of no format that is known\)$"),
        ("image", b"GIF89a, not really", "row 7: the 18 bytes are not a whole picture"),
        ("image", encode(PICTURES[7])[:-60], r"row 7: the \d+ bytes are not a whole picture"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, column: str, value: object, message: str) -> None:
    values: list[object] = list(CAPTIONS) if column == "caption" else [encode(picture) for picture in PICTURES]
    values[7] = value
    table = PairTable(write_table(tmp_path / "t.parquet", {column: values}))
    with pytest.raises(InputError, match=f"t.parquet: {message}"):
        table.read()


def test_a_flipped_byte_never_passes_for_another_picture(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet")
    good = path.read_bytes()
    images = pq.ParquetFile(path).metadata.row_group(2).column(1)
    num_refused = 0
    for offset in range(images.dictionary_page_offset, images.data_page_offset, 13):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 0xFF]) + good[offset + 1 :])
        table = PairTable(path)
        assert len(list(table.row_group(1))) == 3
        try:
            np.testing.assert_array_equal(table.read().pictures, PICTURES)
        except InputError as error:
            assert "t.parquet: row group 2 (of 0 to 3) is damaged: " in str(error)
            num_refused += 1
    assert num_refused > 30


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_table(tmp_path / "t.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"t.parquet is not a whole parquet file: .*fetch it again"):
        PairTable(path)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*absent.parquet"):
        PairTable(tmp_path / "absent.parquet")
    pq.write_table(pq.read_table(write_table(tmp_path / "t.parquet")).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"empty.parquet holds no rows"):
        PairTable(tmp_path / "empty.parquet").read()


def test_grey_palette_and_jpeg_become_rgb() -> None:
    grey = PICTURES[0, :, :, 0]
    np.testing.assert_array_equal(decode_picture(encode(grey)), np.repeat(grey[..., None], 3, axis=2))
    two = np.where(PICTURES[0, :, :, :1] > 127, np.uint8([255, 0, 85]), np.uint8([0, 170, 255]))
    np.testing.assert_array_equal(
        decode_picture(encode(two, mode="P")), np.asarray(Image.fromarray(two).convert("P").convert("RGB"))
    )
    assert decode_picture(encode(PICTURES[0], "JPEG")).shape == (5, 7, 3)


def test_transparency_is_laid_on_white() -> None:
    picture = np.zeros((1, 3, 4), np.uint8)
    picture[0, :, 3] = (0, 51, 255)  # black, from clear to opaque: white · (1 - alpha)
    np.testing.assert_array_equal(decode_picture(encode(picture))[0, :, 0], [255, 204, 0])


def test_a_mode_without_plain_colours_is_refused() -> None:
    with pytest.raises(InputError, match=r"mode I;16; expected 8-bit colours, grey or a palette"):
        decode_picture(encode(np.zeros((2, 3), np.uint16)))


def test_real_emoji(shared_dir: Path) -> None:
    pairs = PairTable(shared_dir / "data" / "emoji" / "test.parquet").read()
    assert pairs.pictures.shape == (150, 128, 128, 3)
    assert len(set(pairs.captions)) == 150
