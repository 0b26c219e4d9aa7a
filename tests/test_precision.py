"""Precision: chosen by what the processor multiplies in, kept by a run that goes on, and known by its older name."""

import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_families import SHORT as GAN
from test_train_families import folder_of
from test_train_families import scenes as discs
from test_train_families import train as train_gan
from test_train_tokenizer import TRAINING as SMALL
from test_train_tokenizer import train as train_small
from torch._inductor.runtime.cache_dir_utils import cache_dir
from training_runs import FIXED, SHAPE, arrays

from smalti import precision as module
from smalti.errors import InputError, InputWarning
from smalti.evaluate.digits import ClassifierConfig
from smalti.precision import autocast, compute_precision, resolve_precision, with_precision
from smalti.recipes import claim_folder, load_recipe, shipped_recipes
from smalti.training.checkpoint import CHECKSUMS_FILE, STATE_FILE, latest_checkpoint, load_run
from smalti.training.settings import FREE, OLD_NAMES
from smalti.training.token_model import TrainConfig, train_model

CPU = torch.device("cpu")


def on_a_processor(monkeypatch, isa, *, with_bf16):
    monkeypatch.setattr(module.processor, "instruction_set", lambda: isa)
    monkeypatch.setattr(module.processor, "multiplies_bfloat16", lambda: with_bf16)


@pytest.mark.parametrize(
    ("asked", "with_bf16", "begun", "found", "warned"),
    [
        ("auto", True, None, "bfloat16", None),
        ("auto", False, None, "float32", None),
        ("auto", True, "float32", "float32", None),
        ("auto", False, "bfloat16", "bfloat16", "The run began in bfloat16 and keeps it"),
        ("float32", True, None, "float32", None),
        ("float32", False, None, "float32", None),
        ("bfloat16", True, None, "bfloat16", None),
        ("bfloat16", False, None, "bfloat16", "times as long as in float32.*precision=auto takes float32 here"),
    ],
)
def test_what_is_asked_for_and_what_the_processor_can_do_decide(monkeypatch, asked, with_bf16, begun, found, warned):
    on_a_processor(monkeypatch, "amx" if with_bf16 else "avx2", with_bf16=with_bf16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_precision(asked, CPU, begun=begun) == found
    assert [warning.category for warning in caught] == ([InputWarning] if warned else [])
    if warned:
        with pytest.warns(InputWarning, match=f"avx2.*{warned}"):
            resolve_precision(asked, CPU, begun=begun)


def test_a_gpu_is_asked_for_itself(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.append(given) or True)
    on_a_processor(monkeypatch, "avx2", with_bf16=False)
    assert resolve_precision("auto", "cuda:1") == "bfloat16"
    assert asked == [{"including_emulation": False}]


@pytest.mark.parametrize("make", [TrainConfig, type(SMALL), type(GAN), ClassifierConfig])
def test_an_unknown_precision_is_refused_by_every_config(make):
    required = {"num_steps": 1} if make is TrainConfig else {}
    with pytest.raises(ValueError, match="precision is 'bf16'; choose one of auto, float32, bfloat16"):
        make(**required, precision="bf16")


def test_products_are_taken_in_the_precision_that_was_resolved():
    a = torch.rand(3, 5)
    for context in (autocast, compute_precision):
        with context(CPU, "bfloat16"):
            assert (a @ a.T).dtype == torch.bfloat16
        with context(CPU, "float32"):
            assert (a @ a.T).dtype == torch.float32
        with pytest.raises(ValueError, match="resolve it"):
            context(CPU, "auto")


# The older name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bf16", "found"), [(True, "bfloat16"), (False, "float32"), (None, "auto")])
def test_bf16_is_read_as_the_precision_it_meant(tmp_path, bf16, found):
    assert with_precision({"steps": 3, "bf16": bf16}) == {"steps": 3, "precision": found}
    text = json.dumps(bf16)
    assert load_recipe("demo", [f"train.bf16={text}"]).train.precision == found
    written = tmp_path / "mine.yaml"
    content = shipped_recipes()["demo"].read_text()
    written.write_text(content.replace("\ntrain:\n", f"\ntrain:\n  bf16: {text}\n"))
    assert load_recipe(written).train.precision == found
    assert load_recipe(written, ["train.bf16=true"]).train.precision == "bfloat16"


def test_one_word_sets_the_precision_of_all_that_is_trained():
    for setting in ("precision=float32", "bf16=false"):
        recipe = load_recipe("demo", [setting])
        assert (recipe.train.precision, recipe.image_tokenizer.train.precision) == ("float32", "float32")
    recipe = load_recipe("demo", ["image_tokenizer.train.precision=float32"])
    assert (recipe.train.precision, recipe.image_tokenizer.train.precision) == ("auto", "float32")


def test_neither_both_names_nor_anything_else_is_taken(tmp_path):
    with pytest.raises(InputError, match="old name of precision; give one of them"):
        with_precision({"bf16": True, "precision": "auto"})
    with pytest.raises(InputError, match="bf16 is 'yes'; expected true, false or null"):
        load_recipe("demo", ["train.bf16='yes'"])
    with pytest.raises(InputError, match="train: precision is 'half'; choose one of"):
        load_recipe("demo", ["train.precision=half"])


def test_a_folder_of_before_goes_on_by_its_recipe(tmp_path):
    recipe = load_recipe("demo")
    claim_folder(recipe, tmp_path, free=())
    path = tmp_path / "recipe.json"
    found = json.loads(path.read_text())
    for section, bf16 in ((found["train"], None), (found["image_tokenizer"]["train"], True)):
        del section["precision"]
        section["bf16"] = bf16
    path.write_text(json.dumps(found))
    claim_folder(recipe, tmp_path, free=())
    claim_folder(load_recipe("demo", ["image_tokenizer.train.precision=bfloat16"]), tmp_path, free=())
    with pytest.raises(InputError, match=r"image_tokenizer.train.precision is bfloat16 there, float32 here"):
        claim_folder(load_recipe("demo", ["image_tokenizer.train.precision=float32"]), tmp_path, free=())


# Runs that go on ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("scenes"), discs(21))


def token_model(directory, scenes, precision):
    config = TrainConfig(num_steps=4, batch_size=6, checkpoint_every=2, precision=precision, compile=False)
    return train_model(SHAPE, FIXED, arrays(29), arrays(5, seed=1), config, directory, show_progress=False)


def small_tokenizer(directory, scenes, precision):
    return train_small(directory, config=replace(SMALL, num_steps=4, checkpoint_every=2, precision=precision))


def gan_tokenizer(directory, scenes, precision):
    config = replace(GAN, num_steps=4, checkpoint_every=2, evaluate_every=0, precision=precision)
    return train_gan(directory, scenes, None, config)


@pytest.mark.parametrize(
    ("training", "folder", "older"),
    [
        (token_model, "checkpoints", False),
        (token_model, "checkpoints", True),
        (small_tokenizer, ".", True),
        (gan_tokenizer, ".", True),
    ],
)
def test_a_run_keeps_the_precision_it_began_with(tmp_path, monkeypatch, scenes, training, folder, older):
    """Begun where bfloat16 is multiplied, perhaps by an earlier version, and resumed where it is emulated."""
    on_a_processor(monkeypatch, "amx", with_bf16=True)
    whole = training(tmp_path / "run", scenes, "auto").state_dict()
    shutil.rmtree(latest_checkpoint(tmp_path / "run" / folder))
    left = latest_checkpoint(tmp_path / "run" / folder)
    assert load_run(left)["training"]["precision"] == "bfloat16"
    if older:
        in_old_words(left, OLD_WORDS[training])
    on_a_processor(monkeypatch, "avx2", with_bf16=False)
    with pytest.raises(InputError, match=r"precision.*bfloat16.*float32"):
        training(tmp_path / "run", scenes, "float32")
    with pytest.warns(InputWarning, match="The run began in bfloat16 and keeps it"):
        again = training(tmp_path / "run", scenes, "auto").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    afresh = training(tmp_path / "other", scenes, "auto").state_dict()
    assert not all(torch.equal(tensor, afresh[name]) for name, tensor in whole.items())


def of_token_model(run):
    """All settings in one row, model and layout as text, and none of those that change nothing."""
    later = ("optimizer", "token_dropout", "caption_dropout", "patience", "evaluation_rows")
    settings = {name: value for name, value in run["training"].items() if name not in (*later, *FREE)}
    texts = {name: json.dumps(run[name], sort_keys=True) for name in ("model", "layout")}
    return settings | texts | run["data"] | {"betas": tuple(settings["betas"])}


def of_tokenizer(run):
    training = {old: run["training"].pop(new) for old, new in OLD_NAMES.items()} | run["training"]
    if "data" in run:
        run["pictures"]["num_training"] = run.pop("data")["num_rows"]
    else:
        del training["betas"], training["final_share"]
    sections = (run | {"training": training}).items()
    return {name: {key: value for key, value in part.items() if value is not None} for name, part in sections}


OLD_WORDS = {token_model: of_token_model, small_tokenizer: of_tokenizer, gan_tokenizer: of_tokenizer}


def in_old_words(checkpoint, translate):
    """Turns what a checkpoint says of its run into what earlier versions wrote."""
    path = checkpoint / STATE_FILE
    state = torch.load(path, weights_only=True)
    state["run"]["training"]["bf16"] = state["run"]["training"].pop("precision") == "bfloat16"
    state["run"] = translate(state["run"])
    torch.save(state, path)
    (checkpoint / CHECKSUMS_FILE).unlink()
    assert not {"precision", "num_rows", "ema_decay"} & set(state["run"].get("training", {}))


def test_what_is_compiled_is_kept_apart_for_each_kind_of_processor(monkeypatch, tmp_path):
    """torch does not by itself: what was compiled for one ended processes on another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(module.processor, "torch_capability", lambda capability=capability: capability)
        module.processor.separate_compile_cache()
        found.append(Path(cache_dir()))
    assert found[0] != found[1] and {folder.parent for folder in found} == {tmp_path}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    module.processor.separate_compile_cache()
    assert Path(cache_dir()) == tmp_path / "own"
