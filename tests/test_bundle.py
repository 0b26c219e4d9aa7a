"""The one loaded thing: what it can do, what it is loaded as, and that files are read once and checked on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_bundle import save_tiny_bundle, tiny_bpe_pipeline, tiny_pipeline
from tiny_lines import tiny_line_model

import smalti
from smalti import weights
from smalti.bundle import CONFIG, Bundle, read_config, shipped_bundles
from smalti.errors import InputError
from smalti.tasks.images import Pipeline
from smalti.tasks.lines import LineModel


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_tiny_bundle(tmp_path / "tiny")


def states(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {**bundle.model.state_dict(), **{f"it.{k}": t for k, t in bundle.image_tokenizer.state_dict().items()}}


def as_version_1(folder: Path, kind: str | None) -> None:
    """The config as smalti 0.1 wrote it: bundles of lines and of token ids had a kind and fewer entries."""
    config = json.loads((folder / CONFIG).read_text())
    config |= {"format_version": 1, "model": config["model"]["config"]}
    if kind is not None:
        config = {"kind": kind, **{name: config[name] for name in config.keys() - {"sampling", "about"}}}
    (folder / CONFIG).write_text(json.dumps(config))


# What it can do --------------------------------------------------------------------------------------------------


def test_what_a_bundle_can_do_follows_from_its_parts():
    both, words, lines = tiny_pipeline().bundle, tiny_bpe_pipeline().bundle, tiny_line_model().bundle
    alone = Bundle(model=both.model, layout=both.layout)
    able = [(b.can_draw, b.can_caption, b.is_lines, b.kind) for b in (both, words, lines, alone)]
    assert able == [
        (True, True, False, "pictures"),
        (True, False, False, "pictures"),
        (False, False, True, "lines"),
        (False, False, False, "token ids alone"),
    ]
    with pytest.raises(InputError, match="is a bundle of token ids alone, not of pictures with captions"):
        Pipeline(alone)
    with pytest.raises(InputError, match="is a bundle of token ids alone, not of lines"):
        LineModel(alone)
    with pytest.raises(ValueError, match="an image tokenizer and the config of its pictures go together"):
        Bundle(model=both.model, layout=both.layout, image_tokenizer=both.image_tokenizer)


# What it is loaded as --------------------------------------------------------------------------------------------


def test_bundles_of_version_1_load_as_the_same_and_are_saved_as_version_2(tmp_path):
    path = tmp_path / "text.json"
    tiny_bpe_pipeline().text_tokenizer.save(path)
    words = tiny_bpe_pipeline().bundle
    made = {
        None: tiny_pipeline().bundle,
        "lines": tiny_line_model().bundle,
        "tokens": Bundle(model=words.model, layout=words.layout, text_tokenizer=path),
    }
    for kind, bundle in made.items():
        folder = tmp_path / str(kind)
        bundle.save(folder)
        as_version_1(folder, kind)
        loaded = Bundle.load(folder)
        assert loaded.weights_sha256 == bundle.weights_sha256 and loaded.kind == bundle.kind
        assert loaded.layout.to_dict() == bundle.layout.to_dict() and loaded.figures == bundle.figures
        assert type(loaded.text_tokenizer) is type(bundle.text_tokenizer)
        loaded.save(tmp_path / "again", force=True)
        assert json.loads((tmp_path / "again" / CONFIG).read_text())["format_version"] == 2
    as_version_1(tmp_path / "again", "voices")
    with pytest.raises(InputError, match="a bundle of 'voices' is unknown"):
        Bundle.load(tmp_path / "again")


def test_the_older_shipped_bundles_are_of_version_1_still():
    for name, version in (("digits", 1), ("emoji", 1), ("mnist-classes", 2)):
        folder = shipped_bundles()[name]
        assert json.loads((folder / CONFIG).read_text())["format_version"] == version
        assert read_config(folder)["model"]["family"] == "decoder_only"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_arrive_whole_in_the_type_asked_for(tmp_path, monkeypatch, half: bool, dtype: str):
    bundle = tiny_pipeline().bundle
    bundle.save(tmp_path / "tiny", half=half)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 104)  # tensors of many chunks, and chunks that no tensor fills
    monkeypatch.setattr(weights, "SERIAL_NUMBERS", 7)
    loaded = Bundle.load(tmp_path / "tiny", device="cpu", dtype=dtype)
    assert (str(loaded.dtype), loaded.device.type) == (f"torch.{dtype}", "cpu")
    found = states(loaded)
    for name, tensor in states(bundle).items():
        expected = tensor.half().float() if half and tensor.is_floating_point() else tensor
        wanted = loaded.dtype if tensor.is_floating_point() and not name.startswith("it.") else tensor.dtype
        assert found[name].dtype == wanted and torch.equal(found[name], expected.to(wanted)), name
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    [picture] = Pipeline(loaded).generate("dark green eight on bright cyan")
    assert picture.size == (56, 56)
    assert (loaded.weights_sha256 == bundle.weights_sha256) == (not half and dtype == "float32")


def test_on_meta_there_are_shapes_and_no_weights(saved: Path):
    loaded = Bundle.load(saved, device="meta", dtype="bfloat16")
    assert loaded.model.num_parameters == tiny_pipeline().model.num_parameters and loaded.dtype == torch.bfloat16
    assert all(tensor.is_meta for tensor in states(loaded).values())


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"device": "abacus"}, "device 'abacus' is unknown; give one of auto, cpu, cuda, mps"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown; choose one of auto, float32, bfloat16"),
    ],
)
def test_devices_and_types_that_there_are_not_are_named(saved: Path, asked: dict, message: str):
    with pytest.raises(InputError, match=message):
        Bundle.load(saved, **asked)


# Read once, and checked ------------------------------------------------------------------------------------------


def test_weights_are_read_once_and_hashed_in_memory_when_asked(saved: Path, monkeypatch):
    hashed = []
    file_sha256, weights_sha256 = weights.file_sha256, weights.weights_sha256
    monkeypatch.setattr(weights, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    monkeypatch.setattr(
        "smalti.bundle.weights_sha256", lambda *modules: hashed.append("memory") or weights_sha256(*modules)
    )
    loaded = Bundle.load(saved)
    assert sorted(hashed) == ["config.json", "text_tokenizer.json"]
    assert loaded.weights_sha256 == loaded.weights_sha256 == tiny_pipeline().weights_sha256
    assert hashed.count("memory") == 2  # once of the tiny one


@pytest.mark.parametrize("name", ["model.safetensors", "image_tokenizer/model.safetensors"])
def test_every_flipped_byte_of_the_weights_is_told_as_damage(saved: Path, name: str):
    whole = (saved / name).read_bytes()
    for at in [0, 9, 40, *range(100, len(whole), len(whole) // 20), len(whole) - 1]:
        (saved / name).write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"model\.safetensors \(\d+ bytes\) is damaged or was changed"):
            Bundle.load(saved)
    (saved / name).write_bytes(whole)
    assert Bundle.load(saved).name == "tiny"


def test_a_checksum_of_another_file_or_of_none_is_refused(saved: Path):
    config = json.loads((saved / CONFIG).read_text())
    for sha256 in ("0" * 64, "", 7, None):
        config["sha256"]["model.safetensors"] = sha256
        (saved / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"model\.safetensors"):
            Bundle.load(saved)


# Public names ----------------------------------------------------------------------------------------------------


def test_public_names_are_there_and_cost_nothing_until_used():
    assert smalti.Pipeline is Pipeline and smalti.Bundle is Bundle
    for name in smalti._HOME_OF:
        assert getattr(smalti, name).__name__ == name and name in dir(smalti)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        smalti.Pipelin  # noqa: B018
    code = "import smalti, sys; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
