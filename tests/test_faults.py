"""Damage, full disks, kills and second processes: nothing is lost in silence, and every error says what to do."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from tiny_bundle import save_tiny_bundle, tiny_bpe_pipeline, tiny_pipeline
from tiny_lines import random_codes, tiny_line_model, write_text

from smalti.arrays import read_npz
from smalti.bounds import MAX_CANDIDATES, MAX_PICTURES, MAX_VOCABULARY
from smalti.cli import app as cli
from smalti.data.lines import import_lines
from smalti.data.parts import claim
from smalti.data.tokenize_pairs import _check, _require_same
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.documents import MAX_DEPTH, config_of, parse_json, parse_yaml, read_json
from smalti.errors import InputError, InputWarning
from smalti.files import lock_of, locked, new_file, write_json
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.interop.commands import KINDS, export_weights
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnlyConfig
from smalti.recipes import claim_folder, load_recipe
from smalti.systems.stages import stored_image_tokenizer
from smalti.tasks.images import Pipeline
from smalti.tasks.line_files import complete_file, score_file
from smalti.tasks.lines import LineModel
from smalti.training.checkpoint import load_checkpoint, run_lock, save_checkpoint
from smalti.training.curves import read_csv_rows
from smalti.weight_files import read_weights
from smalti.weights import load_module

RUNS = Path(__file__).with_name("fault_runs.py")


# Documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON: it is empty; save it again"),
        ("[" * 100_000, "it nests too deep"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), f"nested more than {MAX_DEPTH} deep"),
        ('{"a": 18446744073709551616}', "the number 18446744073709551616 is beyond 64 bits"),
        ('{"a": "\\ud800"}', "is not valid Unicode"),
        ("[1]", "holds a list, expected a mapping of names to values"),
        ("null", "holds nothing, expected a mapping"),
    ],
)
def test_odd_json_is_an_error_of_one_line(text: str, message: str):
    with pytest.raises(InputError) as error:
        parse_json(text, "a.json", "save it again", kind=list if text.startswith("[[") else dict)
    assert message in str(error.value) and len(str(error.value)) < 300 and str(error.value).count("\n") == 0


DOUBLED = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: !!bool abc", "is not YAML: "),
        ("a: !!timestamp 9999-99-99", "is not YAML: "),
        ("a: " + "[" * 10**6, f"line 1: not YAML: values are nested more than {MAX_DEPTH} deep"),
        ("- " * 5000, f"nested more than {MAX_DEPTH} deep"),
        ("a: &a [*a]", "nested more than"),
        (DOUBLED, "it holds more than 1,000,000 values"),
        ("a: 1\n? [b]\n: 2", "line 2: not YAML: "),
        ("x" * 2**21, "at most 1,048,576 are read as YAML"),
    ],
)
def test_odd_yaml_is_an_error_of_one_line(text: str, message: str):
    with pytest.raises(InputError) as error:
        parse_yaml(text, "a.yaml", "write a recipe")
    assert message in str(error.value) and str(error.value).endswith("write a recipe.")


def test_what_is_read_is_what_was_written(tmp_path):
    content = {"a": [1, 2.5, None, True, "é"], "b": {"c": {}}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", "") == content
    assert parse_yaml(yaml.safe_dump(content), "", "") == content


def test_fields_of_configs_have_their_own_types_and_sizes_have_bounds():
    good = DecoderOnlyConfig(
        vocab_size=7, transformer=TransformerConfig(num_layers=1, d_model=4, num_heads=1, d_ff=3, max_length=5)
    ).to_dict()
    assert config_of(DecoderOnlyConfig, good, "").to_dict() == good
    for name, value, messages in (
        ("norm_eps", "x", ("model: transformer.norm_eps: ", "; found 'x'")),
        ("num_layers", 1.5, ("model: transformer.num_layers: ", "; found 1.5")),
        ("bias", "yes", ("model: transformer.bias: ", "; found 'yes'")),
        ("num_layers", 10**6, ("num_layers is 1000000; at most 1024 is possible",)),
        ("d_model", 2**40, ("d_model is 1099511627776; at most 2147483647 is possible",)),
        ("warmth", 1, ("unknown field transformer.warmth",)),
    ):
        changed = {**good, "transformer": {**good["transformer"], name: value}}
        with pytest.raises(InputError) as error:
            config_of(DecoderOnlyConfig, changed, "model")
        assert all(message in str(error.value) for message in messages)


# Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("vocab_size", 2**31 - 1), ("d_ff", 2**30), ("max_length", 2**31 - 1)])
def test_sizes_that_the_weights_do_not_bear_out_take_no_memory(tmp_path, name: str, size: int):
    made = tmp_path / "bundle"
    tiny_line_model().save(made)
    config = json.loads((made / "config.json").read_text())
    model = config["model"]["config"]
    section = model if name in model else model["transformer"]
    section[name] = size
    (made / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="holds far fewer numbers than the config beside it asks for"):
        LineModel.load(made)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * (
        1024 if sys.platform == "linux" else 2**20
    )


def test_sequences_longer_than_the_model_are_refused(tmp_path):
    tiny_line_model().save(tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    config["layout"]["orders"]["lines"][0] = "<bos> image{999999}"
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"sequences have up to 1000000 tokens; the model takes 8"):
        LineModel.load(tmp_path / "bundle")


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="the tensor b holds numbers that are not finite"):
        load_module(lambda: torch.nn.ParameterDict(tensors), tmp_path / "w.safetensors")


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path):
    made = save_checkpoint(tmp_path, 3, {"w": torch.rand(5)}, {"run": {"a": 1}, "b": torch.rand(5)})
    for name in ("model.safetensors", "training_state.pt", "checksums.json"):
        whole = (made / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            (made / name).write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(InputError, match=r"remove the folder .*step_00000003"):
                load_checkpoint(made)
        (made / name).write_bytes(whole)
    assert load_checkpoint(made).step == 3
    (made / "checksums.json").unlink()  # as earlier versions saved
    assert load_checkpoint(made).step == 3


def test_image_tokenizers_carry_the_checksum_of_their_weights(tmp_path):
    save_image_tokenizer(tiny_pipeline().image_tokenizer, tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"model\.safetensors \(\d+ bytes\) is damaged or was changed"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.eye(3).to_sparse(), r"the tensor model\.w is of the layout torch.sparse_coo; save it dense"),
        (None, r"is quantized; save it in floating point"),
        (torch.ones(1).expand(2**26), r"would fill 268,435,456 bytes with the 4 there are"),
        (torch.ones(2, dtype=torch.complex64), r"holds torch.complex64; weights are real numbers"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_named(tmp_path, tensor, message: str):
    if tensor is None:
        with warnings.catch_warnings(action="ignore"):  # on its way out of torch, but it is in the files that there are
            tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with warnings.catch_warnings(action="ignore"):
        torch.save({"model.w": tensor}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message), warnings.catch_warnings(action="ignore"):
        read_weights(tmp_path / "w.pt")


def test_a_flipped_byte_in_a_file_of_torch_save_is_found(tmp_path):
    weights = {"model.w": torch.rand(64), "model.b": torch.rand(64)}
    torch.save(weights, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    at = whole.find(weights["model.w"].numpy().tobytes()) + 7
    (tmp_path / "w.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    with pytest.raises(InputError, match=r"the record .*data/\d is damaged, its checksum is not the one noted"):
        read_weights(tmp_path / "w.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(tmp_path / "plain.pt").tensors["model.w"], weights["model.w"])


def test_a_zip_file_whose_list_is_damaged_is_named(tmp_path):
    torch.save({"model.w": torch.rand(4)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    at = whole.rfind(b"PK\x01\x02")  # the last entry of the list at the end
    (tmp_path / "w.pt").write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
    with pytest.raises(InputError, match=r"w\.pt cannot be read as a PyTorch weight file: it is cut short or damaged"):
        read_weights(tmp_path / "w.pt")


def test_files_of_an_old_torch_are_read_and_lengths_beyond_their_end_take_no_memory(tmp_path):
    path, weights = tmp_path / "w.pt", {"model.w": torch.rand(64), "model.b": torch.rand(64)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    found = read_weights(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    whole = path.read_bytes()
    at = whole.find(b"X\x07\x00\x00\x00model.w")  # BINUNICODE with its length in 4 bytes
    assert at > 0
    damaged = whole[: at + 1] + b"\xff\xff\xff\x7f" + whole[at + 5 :]
    # With an empty list of contents at its end, zipfile takes it for an archive; torch does not.
    for content in (damaged, damaged + b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(InputError, match=r"w\.pt"):
            read_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()


def test_a_page_of_zeros_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "z.npz", a=np.zeros(2**26, np.float64))
    with pytest.raises(InputError, match=r"would unpack to 536,\d+,\d+ bytes"):
        read_npz(tmp_path / "z.npz", "fetch it again")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_npz_names_that_stand_for_two_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"a": np.arange(2), "a.npy": np.arange(3)})
    with pytest.raises(InputError, match=r"a\.npz: the name a\.npy stands for two arrays; fetch it again\."):
        read_npz(tmp_path / "a.npz", "fetch it again")
    np.savez(tmp_path / "b.npz", b=np.arange(2))
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as archive:
        archive.writestr("b.npy", archive.read("b.npy"))
    with pytest.raises(InputError, match=r"b\.npz: the name b stands for two arrays"):
        read_npz(tmp_path / "b.npz", "fetch it again")
    np.savez(tmp_path / "c.npz", **{"c.npy": np.arange(3)})
    assert read_npz(tmp_path / "c.npz", "fetch it again")["c.npy"].tolist() == [0, 1, 2]


def test_npz_arrays_of_another_byte_order_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([1, 300], ">i4"), b=np.array([0.5], ">f8"))
    found = read_npz(tmp_path / "a.npz", "fetch it again")
    assert found["a"].tolist() == [1, 300] and found["b"].tolist() == [0.5]
    assert all(array.dtype.isnative for array in found.values())


# States of runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", '{"input": ', "[]", "null", "[" * 5000])
def test_a_damaged_state_is_named_with_what_to_remove_and_force_begins_anew(tmp_path, content: str):
    model, path = tiny_line_model(), write_text(tmp_path / "lines.txt", random_codes(5))
    folder = tmp_path / "scores" / ".scores.part"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(content)
    with pytest.raises(InputError, match=r"scores.part/job\.json.*remove the folder .*scores\.part, or .* --force"):
        score_file(model, path, tmp_path / "scores")
    assert score_file(model, path, tmp_path / "scores", force=True).num_lines == 5
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "lacking"])
def test_a_damaged_part_is_named_and_made_again_by_force_or_when_removed(tmp_path, monkeypatch, damage: str):
    monkeypatch.setattr("smalti.tasks.line_files.LINES_PER_PIECE", 2)
    model, path = tiny_line_model(), write_text(tmp_path / "lines.txt", random_codes(5))
    complete_file(model, path, tmp_path / "whole.txt")
    monkeypatch.setattr("smalti.tasks.line_files.write_lines", lambda *_, **__: 1 / 0)  # stopped before the result
    part = tmp_path / ".c.txt.part" / "00000001.npz"
    for mend in ("force", "remove"):
        with pytest.raises(ZeroDivisionError):
            complete_file(model, path, tmp_path / "c.txt")
        whole = part.read_bytes()
        content = {"empty": b"", "cut": whole[:-30], "flipped": whole[:99] + b"\xff" + whole[100:], "lacking": b""}
        part.write_bytes(content[damage])
        if damage == "lacking":
            np.savez(part, lengths=np.zeros(2, np.int64))
        with pytest.raises(InputError, match=r"00000001\.npz.*remove it to have this part made again, or .* --force"):
            complete_file(model, path, tmp_path / "c.txt")
        if mend == "remove":
            part.unlink()
            monkeypatch.undo()
            monkeypatch.setattr("smalti.tasks.line_files.LINES_PER_PIECE", 2)
            complete_file(model, path, tmp_path / "c.txt")
        else:
            with pytest.raises(ZeroDivisionError):
                complete_file(model, path, tmp_path / "c.txt", force=True)
    assert (tmp_path / "c.txt").read_text() == (tmp_path / "whole.txt").read_text()


def test_a_damaged_recipe_of_a_run_is_named(tmp_path):
    claim_folder(load_recipe("demo"), tmp_path, free=())
    (tmp_path / "recipe.json").write_text("")
    with pytest.raises(InputError, match=r"recipe\.json is not JSON: it is empty; remove this file if the run there"):
        claim_folder(load_recipe("demo"), tmp_path, free=())


def test_what_a_run_made_and_cannot_read_may_be_removed(tmp_path):
    folder = tmp_path / "image_tokenizer"
    save_image_tokenizer(tiny_pipeline().image_tokenizer, folder)
    (folder / "config.json").write_text("")
    with pytest.raises(InputError, match=r"config\.json is not JSON: it is empty.*remove .*image_tokenizer: the next"):
        stored_image_tokenizer(folder, lambda: tiny_pipeline().image_tokenizer)
    shutil.rmtree(folder)
    assert (
        stored_image_tokenizer(folder, lambda: tiny_pipeline().image_tokenizer).config
        == tiny_pipeline().image_tokenizer.config
    )


def _claim(parts: Path, manifest: dict, tokens: Path, *, force: bool) -> None:
    claim(parts, manifest, partial(_require_same, tokens=tokens), _check, force=force)


@pytest.mark.parametrize("content", ["", "[]", '{"source": 1, "tokenizers": {}}'])
def test_a_damaged_manifest_of_a_tokenizing_is_named_and_force_begins_anew(tmp_path, content: str):
    tokens, parts = tmp_path / "t.parquet", tmp_path / ".t.parquet.parts"
    manifest = {"source": "s", "settings": {}, "tokenizers": {}}
    _claim(parts, manifest, tokens, force=False)
    _claim(parts, manifest, tokens, force=False)  # goes on
    (parts / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"(manifest\.json.* or|the unfinished .*) start anew with --force|--force"):
        _claim(parts, manifest, tokens, force=False)
    _claim(parts, manifest, tokens, force=True)
    (parts / "00000000.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000000\.parquet is not a whole parquet file"):
        _claim(parts, manifest, tokens, force=False)
    _claim(parts, manifest, tokens, force=True)
    assert [path.name for path in parts.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("damage", ["empty", "cut", "in a page"])
def test_a_damaged_part_of_a_tokenizing_says_what_to_remove_and_force_begins_anew(tmp_path, damage: str):
    tokens, parts = tmp_path / "t.parquet", tmp_path / ".t.parquet.parts"
    manifest = {"source": "s", "settings": {}, "tokenizers": {}}
    _claim(parts, manifest, tokens, force=False)
    part = parts / "00000000.parquet"
    write_token_table(part, [token_rows(["a", "b"], np.arange(98).reshape(2, 49))], {"skipped": []})
    _claim(parts, manifest, tokens, force=False)  # goes on
    whole = part.read_bytes()
    part.write_bytes({"empty": b"", "cut": whole[:-30], "in a page": whole[:40] + b"\0" * 30 + whole[70:]}[damage])
    with pytest.raises(InputError, match=r"00000000\.parquet.* remove .*00000000\.parquet: the next start makes it"):
        _claim(parts, manifest, tokens, force=False)
    _claim(parts, manifest, tokens, force=True)
    assert not part.exists()


@pytest.mark.parametrize("name", ["n" * 1000, "\0", "../outside"])
def test_what_no_file_of_a_bundle_can_be_called_is_not_there(tmp_path, name: str):
    (tmp_path / "outside").write_text("")
    folder = save_tiny_bundle(tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"][name] = "00"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"bundle lacks .{1,200}$"):
        Pipeline.load(folder)


def test_a_bundle_with_a_damaged_config_is_replaced_by_force(tmp_path):
    made = save_tiny_bundle(tmp_path / "bundle")
    (made / "config.json").write_text("")
    with pytest.raises(InputError, match=r"config\.json is not JSON: it is empty; fetch or save the bundle again"):
        Pipeline.load(made)
    tiny_pipeline().save(made, force=True)
    assert Pipeline.load(made).name == "tiny"


def test_rows_of_a_damaged_table_of_curves_are_kept_but_for_the_bad_ones(tmp_path):
    path = tmp_path / "evaluation.csv"

    def parsed(step: str, value: str) -> tuple[int, float]:
        return int(step), float(value)

    path.write_text("step,psnr_db\n0,1\n1,2\n2")  # as a kill leaves it
    assert read_csv_rows(path, ("step", "psnr_db"), parsed) == [(0, 1.0), (1, 2.0)]
    path.write_bytes(b"step,psnr_db\n0,1\n1,\xff\n2,3\n")
    with pytest.warns(InputWarning, match=r"line 3 is damaged; 1 such rows are left out"):
        assert read_csv_rows(path, ("step", "psnr_db"), parsed) == [(0, 1.0), (2, 3.0)]


# Full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(num_bytes: int = 3000) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses the write as a full disk does. It ends before pytest
    writes what came of the test, perhaps to a longer file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_during_an_export_is_one_line(tmp_path, exportable, kind: str, suffix: str):
    made = exportable(kind)
    out = tmp_path / "out"
    out.mkdir()
    message = rf"w\{suffix}: (the file grew beyond what is allowed|no space left on its disk); free some"
    with full_disk(), pytest.raises(InputError, match=message):
        export_weights(kind, made, out / f"w{suffix}")
    assert list(out.iterdir()) == []


@pytest.fixture(scope="module")
def exportable(tmp_path_factory):
    """A small image tokenizer that each layout can hold, saved."""
    from dataclasses import replace

    from test_import_commands import DEEPUL_CONFIG, TINY_TITOK, TINY_VQGAN, VIT_CONFIG
    from test_seed_voken import CONFIGS

    from smalti.image_tokenizers.quantizer import QuantizerConfig
    from smalti.image_tokenizers.titok import TiTok
    from smalti.image_tokenizers.vit_vqgan import ViTVQGAN
    from smalti.image_tokenizers.vqgan import VQGAN

    codes = QuantizerConfig(codebook_size=31, code_dim=5, update="gradient")
    vqgan = replace(
        TINY_VQGAN, quantizer=replace(codes, l2_normalised=True), image_size=(8, 8), encoder_attention_levels=(1,)
    )
    from smalti.interop import deepul, ibq, open_magvit2, vit_vqgan

    makers = {
        "llamagen-vq": lambda: VQGAN(vqgan),
        "taming": lambda: VQGAN(replace(vqgan, quantizer=codes)),
        "maskgit-vq": lambda: VQGAN(replace(TINY_TITOK.proxy, quantizer=codes)),
        "titok": lambda: TiTok(replace(TINY_TITOK, mixed_latents=True)),
        "vit-vqgan": lambda: ViTVQGAN(vit_vqgan.LAYOUT.read_config(VIT_CONFIG)),
        "deepul": lambda: deepul.LAYOUT.build(deepul.LAYOUT.read_config(DEEPUL_CONFIG)),
        "ibq": lambda: ibq.LAYOUT.build(ibq.LAYOUT.read_config(CONFIGS["ibq"])),
        "open-magvit2": lambda: open_magvit2.LAYOUT.build(open_magvit2.LAYOUT.read_config(CONFIGS["open-magvit2"])),
    }

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        save_image_tokenizer(makers[kind](), folder)
        return folder

    return make


def test_a_full_disk_spoils_nothing_that_is_written(tmp_path):
    pipe = tiny_pipeline()
    pipe.save(tmp_path / "bundle")
    before = (tmp_path / "bundle" / "config.json").read_bytes()
    codes = np.random.default_rng(0).integers(0, 37, (3000, 49))
    rows = token_rows([f"k{row}" for row in range(3000)], codes)
    for write, name in (
        (lambda: pipe.save(tmp_path / "bundle", force=True), "bundle"),
        (lambda: write_token_table(tmp_path / "t.parquet", [rows], {}), "t.parquet"),
        (lambda: write_text(tmp_path / "l.txt", codes), "l.txt"),
        (lambda: tiny_bpe_pipeline().text_tokenizer.save(tmp_path / "pieces.json"), "pieces.json"),
    ):
        with full_disk(), pytest.raises(InputError, match=rf"{name}.*the file grew beyond what is allowed"):
            write()
    with full_disk():
        pipe.text_tokenizer.save(tmp_path / "words.json")  # small enough
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "words.json"]
    assert (tmp_path / "bundle" / "config.json").read_bytes() == before


def test_a_full_disk_of_temporary_files_says_which_it_is(tmp_path, monkeypatch):
    lines = write_text(tmp_path / "l.txt", np.random.default_rng(0).integers(0, 37, (3000, 49)))
    import_lines(lines, tmp_path / "t.parquet")
    advice = rf"cannot be written in {re.escape(tempfile.gettempdir())}: .*(no space left|grew beyond).*; set TMPDIR"
    with (
        full_disk(),
        pytest.raises(InputError, match=rf"opening the table .*t\.parquet needs temporary files.*{advice}"),
    ):
        TokenTable.open(tmp_path / "t.parquet")
    with full_disk(), pytest.raises(InputError, match=rf"u\.parquet needs temporary files.*{advice}"):
        import_lines(lines, tmp_path / "u.parquet")
    monkeypatch.setattr("smalti.data.tokens.KEEP_IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    message = r"t\.parquet cannot be unpacked in .*cache.*: .*(no space left|grew beyond).*Set XDG_CACHE_HOME"
    with full_disk(), pytest.raises(InputError, match=message):
        TokenTable.open(tmp_path / "t.parquet")
    assert [path.suffix for path in (tmp_path / "cache" / "smalti" / "tables").iterdir()] == [".lock"]
    assert len(TokenTable.open(tmp_path / "t.parquet")) == 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "l.txt", "t.parquet"]


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(3)}, {})
    message = r"cannot save .* of step 2 .* the run can go on from step_00000001"
    with full_disk(), pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path, 2, {"w": torch.zeros(3000)}, {})
    assert load_checkpoint(tmp_path / "step_00000001").step == 1


# Two processes ---------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing_in_the_way(tmp_path):
    path = tmp_path / "a.json"
    with new_file(path) as temporary:
        temporary.write_text("first")
        with (
            pytest.raises(InputError, match=rf"a\.json is being written by the process {os.getpid()}: wait"),
            new_file(path, force=True),
        ):
            pass
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    pid = os.fork()
    if pid == 0:
        with new_file(path, force=True) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 3  # what the killed one left: its file and its lock
    write_json(path, 1, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_appeared_meanwhile_is_not_written_over(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match="exists already"), new_file(path) as temporary:
        temporary.write_text("second")
        path.write_text("first")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_run_holds_its_folder(tmp_path):
    settings = ["output=" + str(tmp_path / "run"), "data=" + str(tmp_path / "t.parquet")]
    import_lines(write_text(tmp_path / "l.txt", random_codes(40)), tmp_path / "t.parquet")
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"):
        assert cli.run(["train", "lines", *settings, "--quiet"]) == 2
    prefixes = write_text(tmp_path / "p.txt", random_codes(3))
    with (
        locked(lock_of(tmp_path / ".c.txt.part"), tmp_path / "c.txt"),
        pytest.raises(InputError, match=r"c\.txt is being written by the process"),
    ):
        complete_file(tiny_line_model(), prefixes, tmp_path / "c.txt")
    assert list((tmp_path / "run").iterdir()) == []


# Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data", "export-lines", "TABLE", "-o", "OUT", "--code-offset", str(2**63 - 3)], "cannot stand in a line"),
        (
            ["data", "export-lines", "TABLE", "-o", "OUT", "--code-offset", str(2**31 - 3)],
            "beyond 2147483647, the",
        ),
        (["data", "export-lines", "TABLE", "-o", "OUT", "--after", str(2**70)], "cannot stand in a line"),
        (["data", "digits", "OUT", "--colourings", "1000000"], "colourings 1000000 must be 1 to"),
        (["tokenize", "TABLE", "-o", "OUT", "--size", "100000000x9"], "rows and columns of 1 to 4096"),
        (
            ["evaluate", "tokenizer", "TABLE", "TABLE", "--size", "100000000x9"],
            "rows and columns of 1 to 4096",
        ),
        (
            ["train", "text-tokenizer", "CAPTIONS", "-o", "OUT", "--text-size", "999999999"],
            f"at most {MAX_VOCABULARY} is",
        ),
        (["generate", "x", "-o", "OUT.png", "-n", "1000000"], f"{MAX_PICTURES}. Try smalti generate --help."),
        (["generate", "x", "-o", "OUT.png", "--best-of", "100000"], f"{MAX_CANDIDATES}. Try smalti generate --help."),
        (["generate", "dark red one on dark blue", "-o", "OUT.png", "-n", "10000", "--grid"], "more than 4096 a side"),
        (["complete", "x", "--beam-width", "100000"], f"{MAX_CANDIDATES}. Try smalti complete --help."),
        (["generate", "w" * 10**6, "-o", "OUT.png", "--bundle", "digits"], "words outside the vocabulary"),
        (["generate", "dark red", "-o", "OUT.png", "--seed", "9" * 10**6], "Invalid value for '--seed"),
        (["train", "digits", "bf16=!!bool abc"], "'bf16=!!bool abc' is not YAML"),
        (["train", "digits", f"{'w' * 10**6}.x=1"], "there are system, "),
        (["train", "digits", f"model.{'w' * 10**6}=1"], "there are model.num_layers, "),
        (["train", "w" * 10**6], "there is no recipe"),
        (["caption", "w" * 10**5], "File name too long"),
        (["caption", "\x1b[31mred"], "there is no file \\x1b[31mred"),
    ],
)
def test_every_number_has_a_bound_that_it_can_mean(tmp_path, capsys, arguments: list[str], message: str):
    _small_inputs(tmp_path)
    names = {"TABLE": tmp_path / "t.parquet", "CAPTIONS": tmp_path / "c.txt", "OUT": tmp_path / "out"}
    given = [str(names.get(word, tmp_path / word if word == "OUT.png" else word)) for word in arguments]
    began = time.process_time()
    assert cli.run(given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error) < 2000 and "\x1b" not in error
    assert not (tmp_path / "out").exists() and time.process_time() - began < 20


def _small_inputs(folder: Path) -> None:
    codes = random_codes(5)
    write_token_table(folder / "t.parquet", [token_rows([f"k{i}" for i in range(5)], codes)], {"codebook_size": 11})
    (folder / "c.txt").write_text("a dog\na cat\n")


# Kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", ["importing", "completing", "tokenizing", "training"])
def test_what_is_stopped_at_random_moments_ends_as_if_it_never_was(tmp_path, name: str, sent: str):
    done = subprocess.run(
        [sys.executable, str(RUNS), name, sent, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {"SIGKILL": {-9}, "SIGINT": {130}, "SIGTERM": {143, -15}}[sent]  # a signal before the first line of ours
    assert found["codes"][-1] in (0, 2) and len(found["codes"]) > 1
    assert set(found["codes"][:-1]) <= expected | ({-2} if sent == "SIGINT" else set())
    assert found["other"] == found["hidden"] == [], f"{found}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_completing_stopped_behind_its_last_result_ends_again(tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.tasks.line_files.LINES_PER_PIECE", 8)
    tiny_line_model().save(tmp_path / "bundle")
    path = write_text(tmp_path / "prefixes.txt", random_codes(20), np.arange(20) % 8)
    command = ["complete", str(path), "-o", str(tmp_path / "c.txt"), "--bundle", str(tmp_path / "bundle")]
    assert cli.run(command) == 0
    whole = (tmp_path / "c.txt").read_bytes()
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.txt.log_probs.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("smalti.tasks.line_files._Parts.remove", lambda self: None)
        assert cli.run(command) == 0
    assert cli.run(command) == 0 and (tmp_path / "c.txt").read_bytes() == whole
    assert not list(tmp_path.glob(".*.part"))
    assert cli.run(command) == 2  # it is whole, and somebody's


@pytest.mark.parametrize("left", [["00000001.npz", "written.json"], ["written.json"], []])
def test_a_completing_stopped_while_it_removes_its_parts_leaves_none_behind_the_next(tmp_path, capsys, left: list[str]):
    tiny_line_model().save(tmp_path / "bundle")
    path = write_text(tmp_path / "prefixes.txt", random_codes(20), np.arange(20) % 8)
    command = ["complete", str(path), "-o", str(tmp_path / "c.txt"), "--bundle", str(tmp_path / "bundle")]
    assert cli.run(command) == 0
    (tmp_path / ".c.txt.part").mkdir()
    for name in left:
        (tmp_path / ".c.txt.part" / name).write_text("{}")
    assert cli.run(command) == 2 and "c.txt exists already" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.part"))
