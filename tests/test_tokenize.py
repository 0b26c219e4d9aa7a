"""Pictures with captions from every kind of source to one table of tokens, through stops and broken records."""

import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from smalti.cli.app import run
from smalti.data import tokenize_pairs as tokenize_pairs_module
from smalti.data.pair_sources import open_pairs
from smalti.data.tokenize_pairs import (
    TokenizeConfig,
    fit,
    one_ahead,
    require_tokenizers,
    tokenize_pairs,
    tokenizer_metadata,
)
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqvae import VQVAE, VQVAEConfig
from smalti.text_tokenizer import BPEConfig, TextTokenizer

NUM = 13
PICTURES = np.random.default_rng(0).integers(256, size=(NUM, 28, 28, 3)).astype(np.uint8)
CAPTIONS = [f"picture number {row}, Straße {row * row}" for row in range(NUM)]
SMALL_PARTS = TokenizeConfig(records_per_part=3, batch_size=2)


def image_tokenizer(seed: int = 0) -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantizer = QuantizerConfig(codebook_size=37, code_dim=5, update="gradient")
        config = VQVAEConfig(width=8, num_heads=2, encoder_blocks=1, decoder_blocks=1, quantizer=quantizer)
        return VQVAE(config).eval()


@pytest.fixture(scope="module")
def tokenizers() -> tuple[VQVAE, TextTokenizer]:
    return image_tokenizer(), TextTokenizer.train(CAPTIONS, BPEConfig(image_size=37, text_size=280))[0]


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, pictures: list[bytes | None]) -> Path:
    keys = [f"p{row:02d}" for row in range(NUM)]
    pq.write_table(pa.table({"__key__": keys, "image": pictures, "caption": CAPTIONS}), path, row_group_size=4)
    return path


def write_folder(path: Path, pictures: list[bytes | None], captions: str) -> Path:
    path.mkdir()
    for row, picture in enumerate(pictures):
        if picture is not None:
            (path / f"p{row:02d}.png").write_bytes(picture)
    rows = [(f"p{row:02d}.png", caption) for row, caption in enumerate(CAPTIONS)]
    if captions == "txt":
        for name, caption in rows:
            (path / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    elif captions == "jsonl":
        lines = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows]
        (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    else:
        lines = [f'"{caption}",{name}\n' for name, caption in rows]
        (path / "captions.csv").write_text("caption,file_name\n" + "".join(lines), encoding="utf-8")
    return path


def write_shards(path: Path, pictures: list[bytes | None]) -> Path:
    path.mkdir()
    for shard, (start, end) in enumerate(((0, 5), (5, 6), (6, NUM))):
        with tarfile.open(path / f"shard-{shard}.tar", "w") as archive:
            for row in range(start, end):
                as_json = row % 2
                caption = json.dumps({"caption": CAPTIONS[row]}) if as_json else CAPTIONS[row]
                members = {".png": pictures[row], ".json" if as_json else ".txt": caption.encode(), ".cls": b"0"}
                for suffix, content in members.items():
                    if content is not None:
                        info = tarfile.TarInfo(f"p{row:02d}{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return path


WRITERS = {
    "parquet": lambda folder, pictures: write_parquet(folder / "pairs.parquet", pictures),
    "jsonl": lambda folder, pictures: write_folder(folder / "pairs", pictures, "jsonl"),
    "csv": lambda folder, pictures: write_folder(folder / "pairs", pictures, "csv"),
    "txt": lambda folder, pictures: write_folder(folder / "pairs", pictures, "txt"),
    "tar": lambda folder, pictures: write_shards(folder / "pairs", pictures),
}


def rows_of(path: Path) -> dict[str, tuple]:
    """Every row by its key; fails if a key comes twice."""
    table = pq.read_table(path).to_pylist()
    rows = {row["__key__"]: (row["image_tokens"], row["text_tokens"], row["text"]) for row in table}
    assert len(rows) == len(table)
    return rows


def expected_rows(tokenizers, left_out: tuple[int, ...] = ()) -> dict[str, tuple]:
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        codes = [tokenizers[0].encode_images(image[None]).flatten().tolist() for image in images]
    return {
        f"p{row:02d}": (codes[row], tokenizers[1].encode(CAPTIONS[row]), CAPTIONS[row])
        for row in range(NUM)
        if row not in left_out
    }


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_source_gives_the_same_table(tokenizers, tmp_path, kind):
    pairs = WRITERS[kind](tmp_path, [png(picture) for picture in PICTURES])
    out = tmp_path / "tokens.parquet"
    report = tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    assert report[:3] == (NUM, [], 0)
    assert rows_of(out) == expected_rows(tokenizers)
    assert list(rows_of(out)) == sorted(rows_of(out))
    table = TokenTable.open(out, image_length=49, image_vocab_size=37, text_vocab_size=280)
    assert table.metadata == tokenizer_metadata(*tokenizers)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_starts_anywhere(tmp_path, kind):
    source = open_pairs(WRITERS[kind](tmp_path, [png(picture) for picture in PICTURES]))
    everything = list(source.records())
    assert len(source) == len(everything) == NUM
    for start in range(NUM + 1):
        assert list(source.records(start)) == everything[start:]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_broken_picture_is_named_and_stops_or_is_skipped(tokenizers, tmp_path, kind):
    pictures: list[bytes | None] = [png(picture) for picture in PICTURES]
    pictures[4], pictures[7] = b"not a picture", pictures[7][:90]
    left_out = [4, 7]
    if kind in ("parquet", "jsonl", "csv"):  # where a record can lack its picture
        pictures[0] = None
        left_out = [0, 4, 7]
    pairs, out = WRITERS[kind](tmp_path, pictures), tmp_path / "tokens.parquet"
    name = {"parquet": f"row {left_out[0]}", "tar": "shard-0.tar: p04"}.get(kind, f"p{left_out[0]:02d}.png")
    with pytest.raises(InputError, match=f"{name}: (there is no picture|the 13 bytes are not a whole picture)"):
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    assert not out.exists()
    skipping = TokenizeConfig(records_per_part=3, batch_size=2, on_error="skip")
    report = tokenize_pairs(pairs, out, *tokenizers, skipping, show_progress=False, force=True)
    assert report.num_rows == NUM - len(left_out)
    assert name in report.skipped[0][0]
    assert len(report.skipped) == len(left_out)
    assert rows_of(out) == expected_rows(tokenizers, tuple(left_out))


def test_a_picture_of_another_size_is_broken_unless_all_are_resized(tokenizers, tmp_path):
    pictures = [png(picture) for picture in PICTURES]
    pictures[5] = png(np.zeros((60, 30, 3), np.uint8))
    pairs, out = WRITERS["txt"](tmp_path, pictures), tmp_path / "tokens.parquet"
    with pytest.raises(InputError, match=r"p05\.png: the picture is 60×30, the first 28×28 .* give a size"):
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    resized = TokenizeConfig(size=(28, 28))
    assert tokenize_pairs(pairs, out, *tokenizers, resized, show_progress=False, force=True).num_rows == NUM
    same = expected_rows(tokenizers, (5,))
    assert {key: row for key, row in rows_of(out).items() if key != "p05"} == same


def test_fit_takes_the_middle():
    picture = np.zeros((4, 10, 3), np.uint8)
    picture[:, 3:7] = 200
    assert (fit(picture, (4, 4)) == 200).all()
    assert fit(picture, (2, 5)).shape == (2, 5, 3)
    assert fit(picture.transpose(1, 0, 2), (8, 8)).shape == (8, 8, 3)
    same = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (fit(same, (4, 4)) == same).all()


def test_long_captions_are_cut_and_counted(tokenizers, tmp_path):
    pairs, out = WRITERS["parquet"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "tokens.parquet"
    lengths = [len(tokenizers[1].encode(caption)) for caption in CAPTIONS]
    most = sorted(lengths)[4]
    config = TokenizeConfig(records_per_part=5, max_text_length=most)
    report = tokenize_pairs(pairs, out, *tokenizers, config, show_progress=False)
    assert report.num_cut == sum(length > most for length in lengths) > 0
    assert max(len(row[1]) for row in rows_of(out).values()) == most
    assert [row[2] for row in rows_of(out).values()] == CAPTIONS  # the text itself stays whole


def test_without_a_text_tokenizer_the_text_is_kept(tokenizers, tmp_path):
    pairs, out = WRITERS["jsonl"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "tokens.parquet"
    tokenize_pairs(pairs, out, tokenizers[0], None, show_progress=False)
    expected = {key: (codes, [], text) for key, (codes, _, text) in expected_rows(tokenizers).items()}
    assert rows_of(out) == expected


def status_of_a_run_killed_after(num_batches: int, pairs, out, tokenizers) -> int:
    """Runs in a forked process, which kills itself when it has written so many batches."""
    child = os.fork()
    if child == 0:
        write, left = tokenize_pairs_module.write_token_table, [num_batches]

        def killed_write(path, batches, *rest, **options):
            def until_killed():
                for batch in batches:
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    yield batch

            return write(path, until_killed(), *rest, **options)

        tokenize_pairs_module.write_token_table = killed_write
        try:
            tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_run_goes_on_without_duplicates_or_losses(tokenizers, tmp_path):
    pairs, out = WRITERS["tar"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "tokens.parquet"
    folder = tmp_path / ".tokens.parquet.parts"
    finished = []
    for batches_before_the_kill in (3, 4):
        assert status_of_a_run_killed_after(batches_before_the_kill, pairs, out, tokenizers) == -signal.SIGKILL
        assert not out.exists()
        finished.append({file.name: os.stat(file).st_mtime_ns for file in folder.glob("[0-9]*.parquet")})
    assert len(finished[0]) == 1 and len(finished[1]) == 3
    report = tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    assert report[:3] == (NUM, [], 0)
    assert rows_of(out) == expected_rows(tokenizers)
    assert list(rows_of(out)) == sorted(rows_of(out))
    assert finished[0].items() <= finished[1].items()  # what was whole was not done again
    assert not folder.exists()


def interrupted(pairs: Path, out: Path, tokenizers, monkeypatch, config: TokenizeConfig = SMALL_PARTS) -> None:
    """A run that stops when all parts are done but the table is not."""

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("smalti.data.tokenize_pairs._join", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize_pairs(pairs, out, *tokenizers, config, show_progress=False)


def test_what_a_run_leaves_that_is_killed_behind_its_last_step_is_removed(tokenizers, tmp_path, monkeypatch):
    """And what belongs to a run that was to replace the table is not."""
    pairs, out = WRITERS["parquet"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "t.parquet"
    parts, lock = tmp_path / ".t.parquet.parts", tmp_path / ".t.parquet.parts.lock"
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_pairs_module.shutil, "rmtree", lambda *_, **__: None)
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    lock.write_text("1234567")
    whole = out.read_bytes()
    assert list(parts.iterdir())
    for _ in range(2):
        with pytest.raises(InputError, match="exists already"):
            tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
        assert not parts.exists() and not lock.exists() and out.read_bytes() == whole
        lock.write_text("1234567")  # killed a little later
    parts.mkdir()
    (parts / "00000000.parquet").write_bytes(b"newer than the table")
    os.utime(parts / "00000000.parquet", ns=(2 * out.stat().st_mtime_ns,) * 2)
    with pytest.raises(InputError, match="exists already"):
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    assert list(parts.iterdir())


def test_parts_of_another_tokenizer_are_refused_naming_both(tokenizers, tmp_path, monkeypatch):
    pairs, out = WRITERS["parquet"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "tokens.parquet"
    interrupted(pairs, out, tokenizers, monkeypatch)
    other = (image_tokenizer(seed=1), tokenizers[1])
    one, two = (tokenizer_metadata(*pair)["image_tokenizer_sha256"] for pair in (tokenizers, other))
    with pytest.raises(InputError, match=f"another tokenizer: image_tokenizer_sha256 {one}, now {two}"):
        tokenize_pairs(pairs, out, *other, SMALL_PARTS, show_progress=False)
    with pytest.raises(InputError, match="begun with other settings"):
        tokenize_pairs(pairs, out, *tokenizers, TokenizeConfig(records_per_part=4), show_progress=False)
    write_parquet(pairs, [png(255 - p) for p in PICTURES])
    with pytest.raises(InputError, match="begun with other pictures and captions"):
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    tokenize_pairs(pairs, out, *other, SMALL_PARTS, show_progress=False, force=True)
    assert TokenTable.open(out).metadata["image_tokenizer_sha256"] == two
    with pytest.raises(InputError, match="made with another tokenizer"):
        require_tokenizers(TokenTable.open(out).metadata, tokenizer_metadata(*tokenizers), out, "Tokenize again.")


def test_what_was_skipped_is_not_passed_over_by_a_run_that_stops(tokenizers, tmp_path, monkeypatch):
    pictures: list[bytes | None] = [png(picture) for picture in PICTURES]
    pictures[4] = b"not a picture"
    pairs, out = WRITERS["parquet"](tmp_path, pictures), tmp_path / "tokens.parquet"
    interrupted(pairs, out, tokenizers, monkeypatch, TokenizeConfig(records_per_part=3, on_error="skip"))
    with pytest.raises(InputError, match=r"there is no table .*: 1 broken records, the first: .*row 4: the 13 bytes"):
        tokenize_pairs(pairs, out, *tokenizers, SMALL_PARTS, show_progress=False)
    skipping = TokenizeConfig(records_per_part=3, on_error="skip")
    assert tokenize_pairs(pairs, out, *tokenizers, skipping, show_progress=False).num_rows == NUM - 1


def test_one_ahead_gives_every_item_once_and_what_went_wrong_in_its_turn():
    def items():
        yield from (None, 1, 1, [])
        raise ValueError("after four")

    given = one_ahead(items())
    assert [next(given) for _ in range(4)] == [None, 1, 1, []]
    with pytest.raises(ValueError, match="after four"):
        next(given)
    assert list(one_ahead([])) == []


def test_several_processes_write_the_same_table(tokenizers, tmp_path):
    pairs, out = WRITERS["jsonl"](tmp_path, [png(p) for p in PICTURES]), tmp_path / "tokens.parquet"
    config = TokenizeConfig(records_per_part=3, workers=2)
    report = tokenize_pairs(pairs, out, *tokenizers, config, show_progress=False)
    assert report[:3] == (NUM, [], 0)
    assert 0 < report.time.reading_s < report.time.processor_s  # of both processes together
    assert rows_of(out) == expected_rows(tokenizers)


def test_a_text_tokenizer_in_another_process_still_reads_typed_markers_as_text(tokenizers):
    import pickle

    sent = pickle.loads(pickle.dumps(tokenizers[1]))
    assert sent.encode("<|endofimage|>") == tokenizers[1].encode("<|endofimage|>")
    assert len(sent.encode("<|endofimage|>")) > 5


def test_sources_that_are_none(tmp_path, tokenizers):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        open_pairs(tmp_path / "empty")
    with pytest.raises(InputError, match="no pictures with captions at"):
        open_pairs(tmp_path / "nothing*.tar")
    shards = WRITERS["tar"](tmp_path, [png(p) for p in PICTURES])
    whole = (shards / "shard-2.tar").read_bytes()
    (shards / "shard-2.tar").write_bytes(whole[: len(whole) // 2 - 300])
    with pytest.raises(InputError, match=r"shard-2\.tar is not a whole tar file"):
        tokenize_pairs(shards, tmp_path / "out.parquet", *tokenizers, show_progress=False)
    shutil.copy(write_parquet(tmp_path / "a.parquet", [png(p) for p in PICTURES]), shards)
    with pytest.raises(InputError, match="holds parquet tables and tar shards"):
        open_pairs(shards)
    folder = WRITERS["csv"](tmp_path / "empty", [png(p) for p in PICTURES])
    (folder / "captions.csv").write_text("caption,of\na dog,p00.png\n")
    with pytest.raises(InputError, match="no column names the pictures; it has caption, of"):
        open_pairs(folder)
    (folder / "captions.csv").write_text("file_name,note,id\np00.png,a,1\n")
    with pytest.raises(InputError, match="no column is known to be the captions; it has note, id"):
        open_pairs(folder)
    (folder / "more.jsonl").write_text("")
    with pytest.raises(InputError, match=r"several tables of captions \(captions.csv, more.jsonl\)"):
        open_pairs(folder)


def test_all_records_broken(tokenizers, tmp_path):
    pairs = WRITERS["parquet"](tmp_path, [b"no"] * NUM)
    with pytest.raises(InputError, match=r"there is no table .*: 13 broken records, the first: .*row 0"):
        config = TokenizeConfig(on_error="skip")
        tokenize_pairs(pairs, tmp_path / "out.parquet", *tokenizers, config, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_error": "ignore"}, "choose one of stop, skip"),
        ({"size": (0, 3)}, "rows and columns of 1 to 4096"),
        ({"records_per_part": 0}, "records_per_part is 0"),
        ({"max_text_length": -1}, "max_text_length is -1"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizeConfig(**changes)


def test_tokenize_through_the_command_line(tokenizers, tmp_path, capsys):
    pictures: list[bytes | None] = [png(picture) for picture in PICTURES]
    pictures[4] = b"not a picture"
    pairs, out = WRITERS["tar"](tmp_path, pictures), tmp_path / "tokens.parquet"
    save_image_tokenizer(tokenizers[0], tmp_path / "image_tokenizer")
    tokenizers[1].save(tmp_path / "words.json")
    command = ["tokenize", f"{pairs}/*.tar", "-o", str(out), "--image-tokenizer", str(tmp_path / "image_tokenizer")]
    command += ["--text-tokenizer", str(tmp_path / "words.json"), "--max-text-length", "8", "--size", "28x28"]
    assert run(command) == 2
    assert "shard-0.tar: p04: the 13 bytes are not a whole picture" in capsys.readouterr().err
    assert run([*command[:-2], "--on-error", "skip"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert run([*command, "--on-error", "skip"]) == 0
    printed = capsys.readouterr()
    assert "12 rows, 1 skipped; processors " in printed.out
    assert "skipped: " in printed.err and "p04" in printed.err
    assert "of 12 captions were cut to 8 tokens" in printed.err
    assert run([*command, "--on-error", "skip"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*command[:4], "--bundle", "x", "--image-tokenizer", "y", "--force"]) == 2
    assert "both name an image tokenizer" in capsys.readouterr().err
    assert run([*command, "--force", "--size", "big"]) == 2
    assert "expected ROWSxCOLUMNS" in capsys.readouterr().err
