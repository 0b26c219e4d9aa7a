"""Pictures and captions in files as people have them: nothing is lost in silence, and every error says what to do."""

import gzip
import io
import json
import re
import tarfile
import tracemalloc
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti.cli.app import run
from smalti.data.captions import read_captions
from smalti.data.pair_sources import open_pairs
from smalti.data.pairs import PairTable, Record, decode_picture
from smalti.data.picture_sets import PictureSet
from smalti.errors import InputError, InputWarning
from smalti.image_files import PictureConfig, read_picture, to_images

CAPTIONS = ["a one", "a two", "a three"]


def pixels(seed: int, rows: int = 5, columns: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def read(source: Path, **options: str) -> list[Record]:
    found = open_pairs(source, **options)
    records = list(found.records())
    assert len(records) == len(found)
    for start in range(len(records)):  # a run that goes on anywhere sees the same
        assert next(iter(found.records(start))) == records[start]
    return records


def captions(source: Path, **options: str) -> list[str | None]:
    return [record.caption for record in read(source, **options)]


def faults(records: Iterable[Record]) -> list[str | None]:
    return [record.fault for record in records]


# Pictures as cameras store them ----------------------------------------------------------------------------------


def turned(orientation: int, file_format: str) -> bytes:
    """A picture's file whose EXIF says how to turn it so that it is `pixels(0)`."""
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored, exif, buffer = Image.fromarray(pixels(0)), Image.Exif(), io.BytesIO()
    stored = stored.transpose(turn_back[orientation]) if orientation in turn_back else stored
    exif[0x0112] = orientation
    stored.save(buffer, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright_wherever_they_are_read(tmp_path: Path, orientation: int) -> None:
    for file_format in ("PNG", "WEBP", "TIFF"):
        content = turned(orientation, file_format)
        np.testing.assert_array_equal(decode_picture(content), pixels(0))
        path = tmp_path / f"a.{file_format.lower()}"
        path.write_bytes(content)
        np.testing.assert_array_equal(np.asarray(read_picture(path)), pixels(0))
        config = PictureConfig(height=5, width=7)
        assert (to_images(Image.open(path), config) == to_images(path, config)).all()
    np.testing.assert_array_equal(np.asarray(PictureSet(tmp_path).picture(0)), pixels(0))


def test_broken_exif_stops_no_picture(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff no such thing")
    np.testing.assert_array_equal(decode_picture(buffer.getvalue()), pixels(0))


# Shards ----------------------------------------------------------------------------------------------------------


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_samples_are_cut_at_the_first_dot_as_webdataset_does(tmp_path: Path) -> None:
    members = [
        (f"./0/s{i}.{end}", png(i) if "png" in end else f"n {i}") for i in range(2) for end in ("in.png", "out.txt")
    ]
    records = read(tar(tmp_path / "a.tar", *members))
    assert [(r.key, r.caption, r.encoded) for r in records] == [(f"./0/s{i}", f"n {i}", png(i)) for i in range(2)]


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("22.05.png", "22.05.txt", "22.06.png", "22.06.txt"), "4 members have the key 22 .*rename the members"),
        (("a.png", "a.txt", "a.v2.png", "a.v2.txt"), r"4 members have the key a \(a.png, a.txt, a.v2.png, a.v2.txt\)"),
        (("a.left.png", "a.right.png", "a.txt"), "whether a.left.png or a.right.png is meant: call that one a.png"),
        (("a.png", "a.cls"), r"no member is a caption \(.txt or .json\): it has a.png, a.cls"),
        (("a.heic", "a.txt"), "no member is a picture .*it has a.heic, a.txt"),
    ],
)
def test_a_sample_that_is_not_one_picture_and_caption_says_what_it_has(tmp_path: Path, names, fault) -> None:
    shard = tar(tmp_path / "a.tar", *[(name, png(0)) for name in names], ("b.png", png(1)), ("b.txt", "whole"))
    broken, whole = read(shard)
    assert broken.fault is not None and whole.caption == "whole"
    assert re.search(fault, broken.fault)


def test_which_of_several_pictures_is_taken_is_said(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("a.mask.png", png(9)), ("a.png", png(0)), ("a.txt", "x"))
    with pytest.warns(
        InputWarning, match=r"1 samples have several pictures; .*a\.png is taken and a\.mask\.png passed"
    ):
        (record,) = read(shard)
    assert record.encoded == png(0)


def test_the_same_name_twice_is_a_fault_and_both_are_counted(tmp_path: Path) -> None:
    pairs = [
        (f"{key}.{end}", png(i) if end == "png" else f"{i}") for i, key in enumerate("aaba") for end in ("png", "txt")
    ]
    first, second, other, third = read(tar(tmp_path / "a.tar", *pairs))
    assert (first.caption, other.caption) == ("0", "2")
    assert second.fault == "the shard holds a.png twice, as members 1 and 3: rename one"
    assert third.fault is not None and "a.png twice" in third.fault


def test_members_that_stand_apart_are_one_fault_that_says_how_to_sort(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("a.png", png(0)), ("b.png", png(1)), ("b.txt", "whole"), ("a.txt", "apart"))
    apart, whole = read(shard)
    assert apart.fault is not None and whole.caption == "whole"
    assert "a.png is member 1, a.txt is member 4" in apart.fault and "--sort=name" in apart.fault
    with pytest.raises(InputError, match=r"a\.tar: a: its members do not lie side by side"):
        tokenize(shard, tmp_path)


def test_hidden_and_stray_members_are_counted(tmp_path: Path) -> None:
    shard = tar(
        tmp_path / "a.tar",
        ("README", "hello"),
        ("._a.png", b"\0\5\x16\7"),
        ("a.png", png(0)),
        ("a.json", '{"TEXT": "in fields", "captions": ["more"]}'),
        ("__MACOSX/._a.png", b"junk"),
        ("index.json", "{}"),
    )
    with pytest.warns(InputWarning) as said:
        assert captions(shard) == ["in fields"]
    assert "2 hidden members passed over (the first: ._a.png)" in str(said[0].message)
    assert "2 members that are no part of a sample passed over (the first: README)" in str(said[1].message)


def test_links_and_empty_shards_are_named(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.txt": b"a", "b.txt": b"b"}
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.LNKTYPE, "c.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.png"
            archive.addfile(link)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.warns(
        InputWarning, match=r"2 links without content \(pack with tar -h --hard-dereference\) passed over"
    ):
        records = read(tmp_path / "links.tar")
    assert [(record.key, record.fault is None) for record in records] == [("a", True), ("b", False)]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"empty\.tar: no member is part of a picture with a caption"):
        read(tmp_path / "empty.tar")


def test_a_shard_of_another_name_or_cut_short_says_what_to_do(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("a.png", png(0)), ("a.txt", b"a"), ("b.png", png(1)), ("b.txt", b"b"))
    (tmp_path / "a.zip").write_bytes(shard.read_bytes())
    with pytest.raises(InputError, match=r"a\.zip is a tar archive: give it a name that ends in \.tar\."):
        read(tmp_path / "a.zip")
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(
        InputError, match=r"a\.tar is not a whole tar file: (?!it is a tar).*fetch or make the shard again"
    ):
        read(shard)


def test_a_shard_that_goes_on_behind_its_end_is_refused(tmp_path: Path) -> None:
    one, two = (tar(tmp_path / f"{i}.tar", (f"{i}.png", png(i)), (f"{i}.txt", "x")) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(InputError, match=r"0\.tar goes on behind its end: .*join them with tar -A"):
        open_pairs(one)
    content = bytearray(two.read_bytes())
    content[1024:1030] = b"\xff" * 6  # the header of the second member
    two.write_bytes(content)
    with pytest.raises(InputError, match=r"1\.tar"):
        open_pairs(two)


# Folders and their tables ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    return tmp_path / "pictures"


def test_hidden_files_are_passed_over_and_counted_in_every_reader(folder: Path) -> None:
    for name in (".ipynb_checkpoints", ".thumbnails", "@eaDir"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(png(9))
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "._t.parquet").write_bytes(b"junk")
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"n {i}")
    with pytest.warns(InputWarning, match=r"4 hidden files passed over \(the first: \._0\.png\)"):
        assert len(PictureSet(folder)) == 3
    with pytest.warns(InputWarning) as said:
        assert captions(folder) == ["n 0", "n 1", "n 2"]
    assert sorted(str(warning.message).split(": ")[1][:14] for warning in said) == ["1 hidden files", "4 hidden files"]


TABLES = {
    "metadata.csv": "file_name, caption\n0.png, one\n1.png, two\n",
    "results.csv": "image_name| comment_number| comment\n0.png| 0| one\n1.png| 0| two\n",
    "a.csv": "image;caption\n0.png;one\n1.png;two\n",
    "a.tsv": "caption\tfile_name\none\t0.png\ntwo\t1.png\n",
    "train/metadata.jsonl": '{"file_name": "0.png", "text": "one"}\n{"file_name": "1.png", "text": "two"}\n',
    "captions.json": '[{"file_name": "0.png", "text": "one"}, {"file_name": "1.png", "text": "two"}]',
    "windows.csv": "file_name,caption\ntrain\\0.png,one\ntrain\\1.png,two\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("ignore:.*its fields are separated by:smalti.errors.InputWarning")
def test_tables_beside_pictures(folder: Path, name: str) -> None:
    (folder / "train").mkdir()
    for i in range(2):
        (folder / "train" / f"{i}.png").write_bytes(png(i))
    (folder / name).write_text(TABLES[name])
    records = read(folder)
    assert [(record.caption, record.encoded) for record in records] == [("one", png(0)), ("two", png(1))]


def test_coco_captions_are_a_record_each(folder: Path) -> None:
    images: list[dict] = [{"id": 70 + i, "file_name": f"{i}.png"} for i in range(3)]
    images.append({"id": [70], "file_name": "not an id.png"})
    annotations = [{"id": k, "image_id": 70 + k % 3, "caption": f"c {k}"} for k in range(6)]
    annotations.append({"id": 9, "image_id": 999, "caption": "of no picture"})
    (folder / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "0.json").write_text('{"url": "what is noted beside one picture is no table"}')
    records = read(folder)
    assert [(record.key, record.caption) for record in records[:6]] == [(str(k % 3), f"c {k}") for k in range(6)]
    assert records[6].fault is not None and "annotation 6" in records[6].name and "names no picture" in records[6].fault
    assert read_captions(folder / "captions_val2017.json") == [f"c {k}" for k in range(6)] + ["of no picture"]


def test_rows_that_are_faulty_are_counted_one_by_one(folder: Path) -> None:
    rows = [
        {"file_name": "0.png", "text": ["a", "b"]},
        {"text": "no file"},
        {"file_name": "1.png", "text": None},
        {"file_name": "absent.png", "text": "c"},
        {"file_name": "2", "text": "d"},
        {"file_name": "n" * 1000, "text": "e"},
        {"file_name": "/", "text": "f"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read(folder)
    assert [record.caption for record in records] == ["a", "b", None, None, "c", "d", "e", None]
    found = faults(records)
    assert found[:2] == [None, None]
    assert "it names no picture: 'file_name' is None" in str(found[2]) and "line 2" in records[2].name
    assert "line 3: 'text' is None, expected a caption" in str(found[3])
    assert "there is no picture absent.png, which" in str(found[4]) and "line 4" in str(found[4])
    assert "but 2.png: write the ending there too" in str(found[5])
    assert "there is no picture nnn" in str(found[6]) and len(str(found[6])) < 300
    assert "it names no picture" in str(found[7])


def test_captions_that_are_not_utf8_name_file_and_line(folder: Path) -> None:
    (folder / "0.txt").write_bytes("café".encode("latin-1"))
    assert faults(read(folder))[0] == "0.txt is not UTF-8 text (byte 3 is 0xe9); save it as UTF-8"
    (folder / "metadata.csv").write_bytes("file_name,caption\n0.png,a\n1.png,café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"metadata\.csv, line 3: it is not UTF-8 text \(byte 9 .*iconv"):
        open_pairs(folder)


# Tables of captions ----------------------------------------------------------------------------------------------

CC3M = ["a harbour in the rain", '"home is where the boat is" sign', '" the old mill', 'sign that says open "']


def lines_of(*rows: tuple[str, ...], delimiter: str = "\t") -> str:
    return "".join(delimiter.join(row) + "\n" for row in rows)


def test_quotes_are_text_in_tsv_and_a_missing_header_is_recognised(tmp_path: Path) -> None:
    rows = [(caption, f"http://example.org/{i}.jpg") for i, caption in enumerate(CC3M)]
    (tmp_path / "a.tsv").write_text(lines_of(("caption", "url"), *rows))
    assert read_captions(tmp_path / "a.tsv") == CC3M
    (tmp_path / "b.tsv").write_text(lines_of(*rows))
    with pytest.warns(InputWarning, match="it has no header line; its columns are taken for caption and url"):
        assert read_captions(tmp_path / "b.tsv") == CC3M
    (tmp_path / "c.tsv").write_text(lines_of(*[(str(i), *row) for i, row in enumerate(rows)]))
    with pytest.raises(InputError, match=r"it has 1, 2, 3: name one of them by --caption-column. Its first line looks"):
        read_captions(tmp_path / "c.tsv")
    with pytest.warns(InputWarning, match="is taken for a row; the columns have no names"):
        assert read_captions(tmp_path / "c.tsv", "2") == CC3M
    (tmp_path / "d.tsv").write_text(lines_of(("caption", "url"), rows[0], ("one field",)))
    with pytest.raises(InputError, match=r"d\.tsv, line 3: the row has 1 fields, the header 2"):
        read_captions(tmp_path / "d.tsv")


def test_another_delimiter_is_recognised_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image;caption\n0.jpg;a thing, number 0\n1.jpg;a thing\n")
    with pytest.warns(InputWarning, match="its fields are separated by semicolons"):
        assert read_captions(tmp_path / "a.csv") == ["a thing, number 0", "a thing"]
    (tmp_path / "b.csv").write_text("name|words\n0.jpg|a thing\n")
    with pytest.raises(InputError, match=r"the header line 'name\|words' is one field .*--delimiter '\|', or ','"):
        read_captions(tmp_path / "b.csv")
    assert read_captions(tmp_path / "b.csv", "words", delimiter="|") == ["a thing"]
    (tmp_path / "c.csv").write_text("caption:url\na thing:0.jpg\n")
    (tmp_path / "d.csv").write_text("a thing\nanother thing\n")
    for name in (
        "b.csv",
        "c.csv",
        "d.csv",
    ):  # a whole line is no caption, nor is the first one a header, unless so said
        with pytest.raises(InputError, match=r"its one column is called .* name it by --caption-column.*header line"):
            read_captions(tmp_path / name, delimiter=",")
    assert read_captions(tmp_path / "b.csv", "name|words", delimiter=",") == ["0.jpg|a thing"]
    with pytest.warns(InputWarning, match="is taken for a row"):
        assert read_captions(tmp_path / "d.csv", "1") == ["a thing", "another thing"]
    (tmp_path / "f.tsv").write_text("a door\tdoors\n")
    with pytest.raises(InputError, match=r"no column is known to be the captions.*If the first line is a row already"):
        read_captions(tmp_path / "f.tsv")
    (tmp_path / "g.tsv").write_text("caption\turl\n", encoding="utf-16-le")
    with pytest.raises(InputError, match="line 1: it holds null bytes"):
        read_captions(tmp_path / "g.tsv")
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(b"caption\na\n"))
    with pytest.raises(InputError, match=r"h\.csv\.gz: it is a gzip-compressed file: unpack it"):
        read_captions(tmp_path / "h.csv.gz")


def test_a_quote_that_is_never_closed_names_its_line(tmp_path: Path) -> None:
    rows = [(f"caption number {i}", "x") for i in range(9000)]
    longest = "a field is longer than 131,072 letters; is a quote never closed?"
    for number, reason in ((20, "a quote that opens there is never closed"), (9000, longest)):
        (tmp_path / "a.csv").write_text(
            lines_of(("caption", "url"), ("a", "x"), ('"b', "x"), *rows[:number], delimiter=",")
        )
        with pytest.raises(InputError, match=r"a\.csv, line 3: .*" + re.escape(reason)):
            read_captions(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('caption,url\n"quiet street,x\ntwo dogs,x\nbread",x\n')
    with pytest.warns(InputWarning, match="1 of its rows have line breaks within quotes, the first from line 2 on"):
        assert len(read_captions(tmp_path / "b.csv")) == 1


def test_unicode_text_of_excel_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("caption\turl\ncafé\tx\n", encoding="utf-16")
    assert read_captions(tmp_path / "a.tsv") == ["café"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_a_table_that_is_something_else_says_what(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<!doctype html><html>sign in</html>")
    with pytest.raises(InputError, match="is a web page"):
        read_captions(tmp_path / name)


# Arrow types -----------------------------------------------------------------------------------------------------

PICTURES = [png(i) for i in range(3)]
PAIR_COLUMNS = {
    "large": (pa.array(PICTURES, pa.large_binary()), pa.array(CAPTIONS, pa.large_string())),
    "views": (pa.array(PICTURES, pa.binary_view()), pa.array(CAPTIONS, pa.string_view())),
    "dictionaries": (pa.array(PICTURES).dictionary_encode(), pa.array(CAPTIONS).dictionary_encode()),
    "structs": (pa.array([{"bytes": p, "path": None} for p in PICTURES]), pa.array(CAPTIONS)),
}


@pytest.mark.parametrize("kind", PAIR_COLUMNS)
def test_every_arrow_type_of_pictures_and_text_is_read_by_all_readers(tmp_path: Path, kind: str) -> None:
    image, caption = PAIR_COLUMNS[kind]
    pq.write_table(pa.table({"image": image, "caption": caption}), tmp_path / "t.parquet", row_group_size=2)
    assert [(r.caption, r.encoded) for r in read(tmp_path / "t.parquet")] == list(zip(CAPTIONS, PICTURES, strict=True))
    assert read_captions(tmp_path / "t.parquet") == CAPTIONS
    assert [pair.caption for pair in PairTable(tmp_path / "t.parquet")] == CAPTIONS
    np.testing.assert_array_equal(np.asarray(PictureSet(tmp_path / "t.parquet").picture(2)), pixels(2))


def test_lists_of_captions_are_a_pair_each(tmp_path: Path) -> None:
    several = [["a", "b"], None, ["c"]]
    pq.write_table(pa.table({"image": PICTURES, "captions": several}), tmp_path / "t.parquet", row_group_size=2)
    records = read(tmp_path / "t.parquet")
    assert [(r.key, r.caption) for r in records] == [
        ("00000000", "a"), ("00000000", "b"), ("00000001", None), ("00000002", "c"),
    ]  # fmt: skip
    assert faults(records)[2] == "its caption is empty, or not UTF-8 text"
    assert len(PairTable(tmp_path / "t.parquet")) == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": pa.nulls(3)}, r"t\.parquet: column 'caption' holds null, expected text .*every row is empty"),
        ({"caption": [b"a", b"b", b"c"]}, r"t\.parquet: column 'caption' holds binary, expected text"),
        ({"caption": CAPTIONS, "image": [[p] for p in PICTURES]}, "column 'image' holds list<.*>, expected encoded"),
        ({"caption": CAPTIONS, "__key__": [0.5, 1.5, 2.5]}, "column '__key__' holds double, expected names"),
    ],
)
def test_every_refusal_names_file_column_and_type(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table({"image": PICTURES, **columns}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        open_pairs(tmp_path / "t.parquet")


def test_paths_without_pictures_and_text_that_is_none_are_faults(tmp_path: Path) -> None:
    paths = pa.array([{"bytes": None, "path": "0.png"}, {"bytes": png(1), "path": None}])
    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"image": paths, "caption": text}), tmp_path / "t.parquet")
    found = faults(read(tmp_path / "t.parquet"))
    assert "there is only the path '0.png', not the picture itself" in str(found[0])
    assert found[1] == "its caption is empty, or not UTF-8 text"


# The command line ------------------------------------------------------------------------------------------------


def tokenize(pairs: Path, folder: Path, on_error: str = "stop"):
    from test_tokenize import image_tokenizer

    from smalti.data.tokenize_pairs import TokenizeConfig, tokenize_pairs

    config = TokenizeConfig(on_error=on_error, size=(28, 28))
    return tokenize_pairs(pairs, folder / "t.parquet", image_tokenizer(), None, config, show_progress=False)


def test_rows_out_and_skipped_are_rows_in(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,caption\n0.png,one\nabsent.png,two\n1.png,\n2.png,four\n")
    report = tokenize(folder, tmp_path, "skip")
    assert (report.num_rows, len(report.skipped), report.num_empty) == (3, 1, 1)
    assert "there is no picture absent.png" in report.skipped[0][1]


def test_debug_shows_what_caused_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(30))
    command = ["train", "text-tokenizer", str(tmp_path / "a.parquet"), "-o", str(tmp_path / "t.json")]
    assert run(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(["--debug", *command]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "ArrowInvalid" in said and said.splitlines()[-1].startswith("error: ")
    assert run(command) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_warnings_of_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("image;caption\n0.jpg;a thing\n")
    with warnings.catch_warnings():
        command = ["train", "text-tokenizer", str(tmp_path / "a.csv"), "-o", str(tmp_path / "t.json")]
        assert run([*command, "--image-size", "4", "--text-size", "256"]) == 0
    assert "its fields are separated by semicolons" in capsys.readouterr().err.splitlines()[0]


def test_a_tar_whose_header_says_a_huge_size_takes_no_memory_for_it(tmp_path):
    """A long name of 8 GB, says the header of a file of 1.5 KB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.tar is not a whole tar file"):
        open_pairs(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
