"""Every reader of files and settings, with good samples to damage.

A reader is handed a folder of its own and one damaged input; it may end well or raise InputError, nothing else. What a
`prepare` makes once (a bundle round a config, a folder round a table) lies in the folder and is not damaged.
"""

import contextlib
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import mutations as m
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import typer.main
import yaml
from PIL import Image
from tiny_bundle import BPE_CAPTIONS, BPE_CONFIG, tiny_bpe_pipeline, tiny_pipeline
from tiny_lines import random_codes, tiny_line_model, write_text

from smalti import bundle
from smalti.cli import app as cli
from smalti.data.captions import read_captions
from smalti.data.digit_sources import read_coloured_pickle, read_idx
from smalti.data.digits import source_of
from smalti.data.lines import read_lines
from smalti.data.pair_sources import open_pairs
from smalti.data.pairs import PairTable
from smalti.data.picture_sets import PictureSet
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.errors import InputError
from smalti.evaluate.report import ReportConfig, find_report
from smalti.image_files import PictureConfig, read_picture, read_receipts, save_picture, to_images
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.interop.huggingface import export_llama, read_llama
from smalti.interop.verifying import read_arrays
from smalti.recipes import claim_folder, load_recipe, shipped_recipes
from smalti.sequences.layout import Layout, parse_order
from smalti.tasks.images import Pipeline
from smalti.tasks.line_files import _Parts
from smalti.tasks.lines import LineModel
from smalti.tasks.replay import replay
from smalti.text_tokenizer import TextTokenizer
from smalti.training.checkpoint import load_checkpoint, save_checkpoint
from smalti.training.curves import Curves
from smalti.training.image_tokenizer import CsvLog, read_columns
from smalti.weight_files import read_config, read_weights


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`share` is its part of a run's time against the others."""

    samples: Callable[[Path], list[bytes]]
    mutate: m.Mutator
    read: Callable[[Path, bytes], object]
    share: float = 1.0


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    return lambda folder, content: read(_put(folder, name, content))


def _written(write: Callable[[Path], object], name: str = "sample") -> Callable[[Path], list[bytes]]:
    def samples(folder: Path) -> list[bytes]:
        path = folder / name
        write(path)
        content = path.read_bytes()
        path.unlink()
        return [content]

    return samples


# Pictures and digits ---------------------------------------------------------------------------------------------


def _idx(_: Path) -> list[bytes]:
    pictures = np.arange(3 * 28 * 28, dtype=np.uint8).tobytes()
    plain = bytes([0, 0, 8, 3]) + np.array([3, 28, 28], ">u4").tobytes() + pictures
    import gzip

    return [plain, gzip.compress(plain, mtime=0)]


def _pickled(_: Path) -> list[bytes]:
    pictures, captions = np.zeros((3, 28, 28, 3), np.uint8), ["dark red one on dark blue"] * 3
    return [
        pickle.dumps([pictures, pictures, captions, captions], protocol=2),
        pickle.dumps([pictures, pictures, np.array(captions, object), captions], protocol=4),
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
    ]


def _encoded(size: tuple[int, int] = (5, 7), file_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(*size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format)
    return buffer.getvalue()


def _drawn(folder: Path) -> list[bytes]:
    pipe = tiny_pipeline()
    pipe.save(folder / "bundle")
    whole = pipe.generate("dark green eight on bright cyan", seed=4, guidance_scale=2.0, guidance_interval=(3, 40))[0]
    save_picture(whole, folder / "whole.png")
    completed = pipe.complete(folder / "whole.png", rows=3, seed=1)
    save_picture(completed[0], folder / "completed.png")
    return [(folder / name).read_bytes() for name in ("whole.png", "completed.png")]


class _Drawn(Exception):
    """The receipt was taken for whole: drawing it is the model's work, not the reader's."""


def _replay(folder: Path, content: bytes) -> None:
    path = _put(folder, "a.png", content)
    replay(path, folder / "bundle")


PICTURES = PictureConfig(height=28, width=28, levels=4)


def _picture(folder: Path, content: bytes) -> None:
    path = _put(folder, "a.png", content)
    read_picture(path)
    to_images(path, PICTURES)
    read_receipts(path)


def _several_formats(folder: Path) -> list[bytes]:
    return [_encoded((28, 28), kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")]


# Tables ----------------------------------------------------------------------------------------------------------


def _tokens(path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 37, (60, 9))
    rows = token_rows([f"k{i}" for i in range(60)], codes, codes[:, :4], [f"text {i}" for i in range(60)])
    write_token_table(path, [rows], {"codebook_size": 37, "grid": [3, 3]})


def _odd_tokens(folder: Path) -> list[bytes]:
    """Tables that other programs write: other types of list, of number, of text; no checksums."""
    lists, keys, texts = [[1, 2, 3], [4, 5, 6]] * 5, [f"k{i}" for i in range(10)], ["a", "b"] * 5
    columns = {
        "int32": pa.array(lists, pa.list_(pa.int32())),
        "uint64": pa.array(lists, pa.list_(pa.uint64())),
        "large": pa.array(lists, pa.large_list(pa.int64())),
        "fixed": pa.array(lists, pa.list_(pa.int64(), 3)),
    }
    found = []
    for column in columns.values():
        table = pa.table({"__key__": keys, "image_tokens": column, "text_tokens": column, "text": texts})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=4)
        found.append(buffer.getvalue())
    return found


def _read_tokens(folder: Path, content: bytes) -> None:
    table = TokenTable.open(_put(folder, "t.parquet", content))
    rows = np.arange(len(table))
    table.batch(rows), table.keys(rows), table.texts(rows)


def _token_samples(folder: Path) -> list[bytes]:
    return _written(_tokens)(folder) + _odd_tokens(folder)


def _pair_table(folder: Path) -> list[bytes]:
    table = pa.table(
        {
            "__key__": [f"key-{row}" for row in range(11)],
            "image": [_encoded() for _ in range(11)],
            "caption": [f"caption {row}" for row in range(11)],
        }
    )
    found = []
    for checksum in (True, False):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=3, write_page_checksum=checksum)
        found.append(buffer.getvalue())
    return found


def _read_pairs(folder: Path, content: bytes) -> None:
    path = _put(folder, "t.parquet", content)
    PairTable(path).read()


def _read_picture_set(folder: Path, content: bytes) -> None:
    pictures = PictureSet(_put(folder, "t.parquet", content))
    for row in range(len(pictures)):
        pictures.picture(row)


def _read_source(folder: Path, content: bytes) -> None:
    source = open_pairs(_put(folder, "t.parquet", content))
    assert len(list(source.records())) == len(source), "records were lost in silence"


def _tar(_: Path) -> list[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for row in range(3):
            members = {"png": _encoded(), "txt": b"a caption", "json": json.dumps({"caption": "x"}).encode()}
            for suffix, held in members.items():
                info = tarfile.TarInfo(f"{row:03d}.{suffix}")
                info.size = len(held)
                archive.addfile(info, io.BytesIO(held))
    return [buffer.getvalue()]


def _read_tar(folder: Path, content: bytes) -> None:
    source = open_pairs(_put(folder, "t.tar", content))
    assert len(list(source.records())) == len(source)


# Text ------------------------------------------------------------------------------------------------------------

CSV = b'file_name,caption\na.png,a dog\nb.png,"a cat, two"\nc.png,caf\xc3\xa9\n'
JSON_LINES = b'{"file_name": "a.png", "caption": "a dog"}\n{"file_name": "b.png", "caption": "a cat"}\n'


def _read_folder(name: str, folder: Path, content: bytes) -> None:
    pairs = folder / "pairs"
    if not pairs.is_dir():
        pairs.mkdir()
        (pairs / "a.png").write_bytes(_encoded())
    _put(pairs, name, content)
    list(open_pairs(pairs).records())


COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"id": i, "image_id": 1 + i // 2, "caption": f"caption {i}"} for i in range(4)],
    }
).encode()
OBJECTS = b'[{"file_name": "a.png", "caption": "a dog"}, {"file_name": "b.png", "caption": "a cat"}]'
SEPARATED = [
    CSV,
    CSV.replace(b",", b";").replace(b'"a cat; two"', b"a cat"),
    b"image_name| comment_number| comment\na.png| 0| a dog\na.png| 1| two dogs\n",
    b"a dog\thttp://example.org/a.jpg\n\" a cat\thttp://example.org/b.jpg\n",
    b"\xef\xbb\xbf" + CSV,
    CSV.decode().encode("utf-16"),
]  # fmt: skip


def _code_arrays(folder: Path) -> list[bytes]:
    codes, found = random_codes(12), []
    for dtype in (np.int64, np.uint16, ">i4"):
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(codes).astype(dtype))
        found.append(buffer.getvalue())
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, codes=np.asarray(codes))
        found.append(buffer.getvalue())
    return found


def _mutate_arrays(random: Random, content: bytes) -> bytes:
    return m.mutate_zip(random, content) if content[:2] == b"PK" else m.flip_bytes(random, content)


def _code_json(folder: Path) -> list[bytes]:
    rows = np.asarray(random_codes(6)).tolist()
    return [
        b"".join(json.dumps({"class_id": i, "tokens": row}).encode() + b"\n" for i, row in enumerate(rows)),
        b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    ]


def _mutate_json_lines(random: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    row = random.randrange(len(lines) - 1)
    lines[row] = m.mutate_json(random, lines[row])
    return b"\n".join(lines)


def _lines(folder: Path) -> list[bytes]:
    import gzip

    path = write_text(folder / "lines.txt", random_codes(12))
    plain = path.read_bytes()
    write_text(folder / "lines.txt.zst", random_codes(12))
    return [plain, plain, plain, gzip.compress(plain, mtime=0), (folder / "lines.txt.zst").read_bytes()]


def _mutate_lines(random: Random, content: bytes) -> bytes:
    return (
        m.flip_bytes(random, content) if content[:1] in b"\x1f\x28" and len(content) > 3 and content[1:2] in b"\x8b\xb5"
        else m.mutate_words(random, content)
    )  # fmt: skip


def _curves(folder: Path, content: bytes) -> None:
    _put(folder, "curves.csv", content)
    Curves(folder, ["nats_per_token", "picture"], start_step=3, label="nats").close()


def _csv_log(folder: Path, content: bytes) -> None:
    path = _put(folder, "evaluation.csv", content)
    CsvLog(path, ["step", "psnr_db"], keep_to=3)
    read_columns(path)


# Configs and states ----------------------------------------------------------------------------------------------


@cache
def _bundle_folder(folder: Path, kind: str) -> Path:
    made = folder / "bundle"
    if kind == "words":
        tiny_bpe_pipeline().save(made)
    elif kind == "digits":
        tiny_pipeline().save(made)
    else:
        tiny_line_model().save(made)
    return made


def _member(kind: str, name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_bundle_folder(folder, kind) / name).read_bytes()]


def _load_bundle(kind: str, name: str, folder: Path, content: bytes) -> None:
    made = _bundle_folder(folder, kind)
    path = _put(made, name, content)
    if name != "config.json":  # its checksum is right again
        config = json.loads((made / "config.json").read_bytes())
        config["sha256"][name] = hashlib.sha256(content).hexdigest()
        (made / "config.json").write_text(json.dumps(config))
    load = LineModel.load if kind == "lines" else Pipeline.load
    load(made)
    if name == "config.json" and path.exists():
        bundle.Bundle.load(made)


def _image_tokenizer(folder: Path, content: bytes) -> None:
    made = folder / "image_tokenizer"
    if not made.exists():
        save_image_tokenizer(tiny_pipeline().image_tokenizer, made)
    _put(made, "config.json", content)
    load_image_tokenizer(made)


def _image_tokenizer_configs(folder: Path) -> list[bytes]:
    made = folder / "other"
    save_image_tokenizer(tiny_pipeline().image_tokenizer, made)
    return [(made / "config.json").read_bytes()]


def _llama(folder: Path) -> list[bytes]:
    bundle_folder = folder / "words"
    tiny_bpe_pipeline().save(bundle_folder)
    export_llama(bundle_folder, folder / "llama")
    return [(folder / "llama" / "config.json").read_bytes()]


def _read_llama(folder: Path, content: bytes) -> None:
    _put(folder / "llama", "config.json", content)
    read_llama(folder / "llama")


def _text_tokenizers(_: Path) -> list[bytes]:
    trained, _ = TextTokenizer.train(BPE_CAPTIONS, BPE_CONFIG)
    return [tiny_pipeline().text_tokenizer.to_json().encode(), trained.to_json().encode()]


@cache
def _demo() -> Any:
    return load_recipe("demo")


def _run_state(folder: Path) -> list[bytes]:
    claim_folder(_demo(), folder, free=())
    return [(folder / "recipe.json").read_bytes()]


def _claim(folder: Path, content: bytes) -> None:
    _put(folder, "recipe.json", content)
    claim_folder(_demo(), folder, free=())


JOB = {"input": "00", "bundle": "00", "lines_per_piece": 1024}


def _open_job(folder: Path, content: bytes) -> None:
    made = folder / ".scores.part"
    made.mkdir(exist_ok=True)
    _put(made, "job.json", content)
    _Parts.open(folder / "scores", JOB, folder / "summary.json", [], force=False)


def _open_part(folder: Path, content: bytes) -> None:
    made = folder / ".scores.part"
    if not made.exists():
        made.mkdir()
        (made / "job.json").write_text(json.dumps(JOB))
    _put(made, "00000000.npz", content)
    for arrays in _Parts(made).read():
        arrays["line_nats"], arrays["lengths"]


def _parts(folder: Path) -> list[bytes]:
    buffer = io.BytesIO()
    places = {"place_sums": np.zeros(7), "place_squares": np.zeros(7)}
    np.savez(buffer, line_nats=np.zeros(4), lengths=np.ones(4, np.int64), **places)
    return [buffer.getvalue()]


def _report(_: Path) -> list[bytes]:
    return [
        json.dumps(
            {
                "rows": [],
                "config": {"num_prompts": 1, "num_captions": 1, "num_pairs": 1, "best_of": [1], "seed": 0},
                "weights_sha256": "00",
            }
        ).encode()
    ]


# Weights ---------------------------------------------------------------------------------------------------------


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"model.a": torch.rand(3, 5, generator=generator), "model.b": torch.rand(7, generator=generator)}


def _torch_files(_: Path) -> list[bytes]:
    found = []
    for content, kind in (({"model": _weights(), "epoch": 3}, True), (_weights(), True), (_weights(), False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=kind)
        found.append(buffer.getvalue())
    return found


def _mutate_torch(random: Random, content: bytes) -> bytes:
    return m.mutate_zip(random, content) if content[:2] == b"PK" else m.flip_bytes(random, content)


def _arrays(_: Path) -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, image=np.zeros((2, 3), np.float32), indices=np.arange(5))
        found.append(buffer.getvalue())
    return found


def _checkpoint(name: str, folder: Path) -> list[bytes]:
    made = save_checkpoint(folder / "checkpoints", 12, _weights(), {"run": {"a": 1}, "optimizer": {"b": torch.ones(3)}})
    return [(made / name).read_bytes()]


def _read_checkpoint(name: str, folder: Path, content: bytes) -> None:
    made = folder / "checkpoints" / "step_00000012"
    original = made.with_suffix(".whole")
    if not original.exists():
        original.write_bytes((made / name).read_bytes())
    _put(made, name, content)
    found = load_checkpoint(made)
    if content != original.read_bytes():
        weights = _weights()
        same = set(found.weights) == set(weights) and all(torch.equal(weights[n], found.weights[n]) for n in weights)
        same &= found.training_state["run"] == {"a": 1} and torch.equal(
            found.training_state["optimizer"]["b"], torch.ones(3)
        )
        assert same, "a damaged checkpoint was taken with other values"


# Settings --------------------------------------------------------------------------------------------------------


def _recipes(_: Path) -> list[bytes]:
    return [path.read_bytes() for path in shipped_recipes().values()]


def _read_recipe(folder: Path, content: bytes) -> None:
    load_recipe(_put(folder, "recipe.yaml", content))


OVERRIDES = [b"\n".join([b"digits", b"train.learning_rate=1e-3", b"model.preset=digits", b"seed=3", b"batch_size=4"]),
             b"\n".join([b"vqgan", b"pictures=x", b"train.steps=10", b"losses.perceptual=0.1"])]  # fmt: skip


def _override(folder: Path, content: bytes) -> None:
    name, *settings = content.decode("utf-8", "surrogateescape").split("\n")
    load_recipe(name.split("\x00")[0] or "digits", settings)


def _mutate_overrides(random: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    row = random.randrange(1, len(lines))
    key, _, value = lines[row].partition(b"=")
    odd = random.choice(m.YAML_ODD) if random.random() < 0.6 else json.dumps(m.odd_value(random))
    encoded = odd.encode("utf-8", errors="surrogatepass")
    if random.random() < 0.25:
        key = m.flip_bytes(random, key)
    lines[row] = key + b"=" + (encoded if random.random() < 0.8 else m.flip_bytes(random, value))
    return b"\n".join(lines)


LAYOUTS = [
    b"<bos> <end of image> text{6} <end of text> image{49}",
    b"(text{..64}) <|startofimage|> image{32} <|endofimage|>",
    b"text{..11} <|startofimage|> image{49} <|endofimage|>",
]
LAYOUT_ODD = ("<bos>", "<", ">", "text{6}", "image{0}", "text{..}", "(text{3}", "image{999999999999}", "{", "}", "()",
              "text{..5}", "<|startofimage|>", "x{1}", "image{1}", "text{-1}", "<>", "image{4294967296}")  # fmt: skip


def _layout(_: Path, content: bytes) -> None:
    line = content.decode("utf-8", "surrogateescape")
    specials = ["<bos>", "<end of image>", "<end of text>", "<|startofimage|>", "<|endofimage|>"]
    described = {"vocabulary": {"special": specials, "image": 37, "text": 31}, "orders": {"a": [line, 1.0]}}
    try:
        parse_order(line)
        Layout.from_dict(described)
    except ValueError as error:  # what a recipe or a bundle makes an InputError of
        if type(error) is not ValueError and not isinstance(error, InputError):
            raise


def _mutate_layout(random: Random, content: bytes) -> bytes:
    if random.random() < 0.2:
        return m.flip_bytes(random, content)
    return m.mutate_words(random, content.replace(b"\n", b" "), LAYOUT_ODD)


COMMANDS = [
    ["generate", "dark red one on dark blue", "-o", "OUT.png", "--seed", "1"],
    ["generate", "dark red", "-o", "OUT.png", "-n", "2", "--grid", "--scale", "3", "--temperature", "0.5", "--bundle",
     "BUNDLE"],
    ["generate", "dark red one on dark blue", "-o", "OUT.png", "--best-of", "2", "--guidance-scale", "2", "--bundle",
     "BUNDLE", "--top-k", "2", "--min-p", "0.1", "--guidance-schedule", "linear", "--negative-prompt", "dark blue"],
    ["complete", "dark", "-n", "1", "--temperature", "1", "--top-k", "3", "--top-p", "0.5", "--bundle", "BUNDLE"],
    ["complete", "--picture", "PICTURE", "--rows", "3", "-o", "OUT.png", "--bundle", "BUNDLE"],
    ["complete", "LINES", "-o", "OUT.txt", "--strategy", "beam", "--beam-width", "2", "--bundle", "LINE_BUNDLE"],
    ["score", "LINES", "-o", "OUT", "--batch-size", "2", "--bundle", "LINE_BUNDLE"],
    ["score", "PICTURE", "dark red one on dark blue", "--bundle", "BUNDLE", "--json"],
    ["replay", "PICTURE", "--bundle", "BUNDLE", "-o", "OUT.png"],
    ["inspect", "LINE_BUNDLE", "-o", "OUT", "--data", "MISSING", "--lines", "2"],
    ["data", "digits", "OUT", "--mnist", "MISSING", "--seed", "1", "--colourings", "1"],
    ["data", "import-lines", "LINES", "-o", "OUT.parquet", "--vocab-size", "11", "--length", "7", "--skip-bad", "1"],
    ["data", "export-lines", "TABLE", "-o", "OUT.txt", "--num-codes", "3", "--max-rows", "2", "--before", "0",
     "--after", "5,distinct", "--code-offset", "1"],
    ["train", "text-tokenizer", "CAPTIONS", "-o", "OUT.json", "--image-size", "7", "--text-size", "260"],
    ["train", "digits", "data.path=/nonesuch", "output=OUT", "train.learning_rate=x"],
    ["evaluate", "tokenizer", "MISSING", "MISSING", "--num", "2", "--size", "8x8"],
    ["tokenize", "MISSING", "-o", "OUT.parquet", "--size", "8x8", "--max-text-length", "3", "--workers", "0"],
    ["info", "digits"],
    ["caption", "MISSING", "--temperature", "1"],
    ["baselines", "TABLE", "TABLE", "--max-rows", "3"],
    ["import", "taming", "MISSING", "-o", "OUT"],
    ["export", "hf", "MISSING", "OUT"],
]  # fmt: skip
CHEAP = {"--seed", "--scale", "--temperature", "--top-k", "--top-p", "--guidance-scale", "--vocab-size", "--length",
         "--skip-bad", "--num-codes", "--max-rows", "--before", "--after", "--code-offset", "--size", "--num", "-n",
         "--max-text-length", "--image-size", "--text-size", "--colourings", "--best-of", "-o", "--rows", "--min-p",
         "--beam-width", "--batch-size", "--guidance-schedule", "--strategy"}  # fmt: skip
LARGE = ("0", "-1", "1", "9223372036854775807", "9223372036854775808", "9223372036854775800", "1e400", "nan", "-0",
         "100000000", "1000000", "inf", "999999999999x9", "0x0", "", "x", "1,2,x", "١", "65x", "🎉", "x" * 100_000,
         "\x1b[31m")  # fmt: skip


_make_command = typer.main.get_command


def _arguments(_: Path) -> list[bytes]:
    return ["\0".join(command).encode() for command in COMMANDS]


def _mutate_arguments(random: Random, content: bytes) -> bytes:
    words = content.split(b"\0")
    places = [i for i, word in enumerate(words[:-1]) if word.decode() in CHEAP]
    kind = random.random()
    if places and kind < 0.7:
        words[random.choice(places) + 1] = random.choice(LARGE).encode()
    elif kind < 0.8:
        del words[random.randrange(1, len(words))]
    else:
        odd = random.choice((*LARGE, *m.TEXTS)).replace("\0", "")
        words[random.randrange(1, len(words))] = odd.encode("utf-8", "surrogatepass")
    return b"\0".join(words)


@cache
def _command(app: typer.Typer) -> Any:
    return _make_command(app)


def _run_command(folder: Path, content: bytes) -> None:
    made = folder / "given"
    if not made.exists():
        made.mkdir()
        write_text(made / "lines.txt", random_codes(12))
        _tokens(made / "t.parquet")
        (made / "c.txt").write_text("a dog\na cat\n")
        pipe = tiny_pipeline()
        pipe.save(made / "bundle")
        save_picture(pipe.generate("dark green eight on bright cyan", seed=4)[0], made / "p.png")
        tiny_line_model().save(made / "line_bundle")
    names = {"LINES": "lines.txt", "TABLE": "t.parquet", "CAPTIONS": "c.txt", "MISSING": "missing",
             "BUNDLE": "bundle", "LINE_BUNDLE": "line_bundle", "PICTURE": "p.png"}  # fmt: skip
    words = content.decode("utf-8", "surrogateescape").split("\0")
    given = [str(made / names[word]) if word in names else word for word in words]
    given = [str(folder / word) if word.startswith("OUT") else word for word in given]
    output = io.StringIO()
    typer.main.get_command = _command  # made of the annotations once, not for every input
    with contextlib.redirect_stderr(output):
        code = cli.run(given)
    assert code in (0, 1, 2), f"exit code {code}"
    longest = max(map(len, output.getvalue().splitlines()), default=0)
    assert longest < 2000, f"a line of {longest} characters: {output.getvalue()[:200]}"


READERS: dict[str, Reader] = {
    "idx": Reader(samples=_idx, mutate=m.flip_bytes, read=_file("a.idx", partial(read_idx, num_axes=3))),
    "pickle": Reader(samples=_pickled, mutate=m.flip_bytes, read=_file("a.pkl", read_coloured_pickle)),
    "picture": Reader(samples=_several_formats, mutate=m.flip_bytes, read=_picture),
    "receipt": Reader(samples=_drawn, mutate=m.mutate_png, read=_replay, share=3),
    "tokens": Reader(samples=_token_samples, mutate=m.mutate_parquet, read=_read_tokens, share=2),
    "pairs": Reader(samples=_pair_table, mutate=m.mutate_parquet, read=_read_pairs, share=2),
    "pair source": Reader(samples=_pair_table, mutate=m.mutate_parquet, read=_read_source),
    "picture set": Reader(samples=_pair_table, mutate=m.mutate_parquet, read=_read_picture_set),
    "captions parquet": Reader(
        samples=_pair_table, mutate=m.mutate_parquet, read=_file("c.parquet", partial(read_captions, column="caption"))
    ),
    "digits note": Reader(samples=_pair_table, mutate=m.mutate_parquet, read=_file("t.parquet", source_of)),
    "tar": Reader(samples=_tar, mutate=m.mutate_tar, read=_read_tar, share=2),
    "captions csv": Reader(samples=lambda _: [CSV], mutate=m.mutate_words, read=_file("c.csv", read_captions)),
    "captions tables": Reader(samples=lambda _: SEPARATED, mutate=m.mutate_words, read=_file("c.csv", read_captions)),
    "captions json": Reader(
        samples=lambda _: [COCO, OBJECTS], mutate=m.mutate_json, read=_file("c.json", read_captions)
    ),
    "folder json": Reader(
        samples=lambda _: [COCO, OBJECTS], mutate=m.mutate_json, read=partial(_read_folder, "captions.json")
    ),
    "code arrays": Reader(
        samples=_code_arrays, mutate=_mutate_arrays, read=_file("c.npy", lambda path: list(read_lines(path)))
    ),
    "code json": Reader(
        samples=_code_json, mutate=_mutate_json_lines, read=_file("c.jsonl", lambda path: list(read_lines(path)))
    ),
    "captions jsonl": Reader(
        samples=lambda _: [JSON_LINES], mutate=m.mutate_words, read=_file("c.jsonl", read_captions)
    ),
    "folder csv": Reader(samples=lambda _: [CSV], mutate=m.mutate_words, read=partial(_read_folder, "c.csv")),
    "folder jsonl": Reader(
        samples=lambda _: [JSON_LINES], mutate=m.mutate_words, read=partial(_read_folder, "metadata.jsonl")
    ),
    "lines": Reader(
        samples=_lines, mutate=_mutate_lines, read=_file("l.txt", lambda path: list(read_lines(path))), share=2
    ),
    "curves": Reader(
        samples=lambda _: [b"split,step,epoch,nats_per_token,picture\ntrain,0,0,1.5,2\ntest,1,0.5,,1\ntrain,2,1,1,1\n"],
        mutate=m.mutate_words,
        read=_curves,
    ),
    "evaluation csv": Reader(
        samples=lambda _: [b"step,psnr_db\n0,12.5\n1,13\n2,\n"], mutate=m.mutate_words, read=_csv_log
    ),
    "bundle config": Reader(
        samples=_member("words", "config.json"),
        mutate=m.mutate_json,
        read=partial(_load_bundle, "words", "config.json"),
        share=2,
    ),
    "lines bundle config": Reader(
        samples=_member("lines", "config.json"),
        mutate=m.mutate_json,
        read=partial(_load_bundle, "lines", "config.json"),
        share=2,
    ),
    "bundle weights": Reader(
        samples=_member("lines", "model.safetensors"),
        mutate=m.mutate_safetensors,
        read=partial(_load_bundle, "lines", "model.safetensors"),
        share=2,
    ),
    "image tokenizer": Reader(samples=_image_tokenizer_configs, mutate=m.mutate_json, read=_image_tokenizer),
    "text tokenizer": Reader(
        samples=_text_tokenizers, mutate=m.mutate_json, read=_file("t.json", TextTokenizer.load), share=0.5
    ),
    "llama config": Reader(samples=_llama, mutate=m.mutate_json, read=_read_llama),
    "recipe state": Reader(samples=_run_state, mutate=m.mutate_json, read=_claim),
    "job": Reader(samples=lambda _: [json.dumps(JOB).encode()], mutate=m.mutate_json, read=_open_job),
    "part": Reader(samples=_parts, mutate=m.mutate_zip, read=_open_part),
    "report": Reader(
        samples=_report,
        mutate=m.mutate_json,
        read=_file("report.json", lambda path: find_report(path.parent, "00", ReportConfig())),
    ),
    "foreign json": Reader(
        samples=_image_tokenizer_configs, mutate=m.mutate_json, read=_file("c.json", read_config), share=0.5
    ),
    "foreign yaml": Reader(samples=_recipes, mutate=m.mutate_yaml, read=_file("c.yaml", read_config)),
    "safetensors": Reader(
        samples=lambda _: [safetensors.torch.save(_weights())],
        mutate=m.mutate_safetensors,
        read=_file("w.safetensors", read_weights),
    ),
    "torch": Reader(samples=_torch_files, mutate=_mutate_torch, read=_file("w.pt", read_weights), share=2),
    "npz": Reader(samples=_arrays, mutate=m.mutate_zip, read=_file("io.npz", read_arrays)),
    "checkpoint weights": Reader(
        samples=partial(_checkpoint, "model.safetensors"),
        mutate=m.mutate_safetensors,
        read=partial(_read_checkpoint, "model.safetensors"),
    ),
    "checkpoint state": Reader(
        samples=partial(_checkpoint, "training_state.pt"),
        mutate=m.mutate_zip,
        read=partial(_read_checkpoint, "training_state.pt"),
    ),
    "recipe": Reader(samples=_recipes, mutate=m.mutate_yaml, read=_read_recipe, share=2),
    "overrides": Reader(samples=lambda _: OVERRIDES, mutate=_mutate_overrides, read=_override),
    "layout": Reader(samples=lambda _: LAYOUTS, mutate=_mutate_layout, read=_layout, share=2),
    "arguments": Reader(samples=_arguments, mutate=_mutate_arguments, read=_run_command, share=3),
}


def _unused() -> Any:
    return bundle, yaml
