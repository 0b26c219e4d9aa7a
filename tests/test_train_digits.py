"""The digits system from data to report: it goes on where it was stopped, and ends where it would have ended."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from smalti.cli import app as cli
from smalti.data.digit_sources import scikit_learn_digits
from smalti.data.digits import SourceDigits
from smalti.errors import InputError
from smalti.evaluate import report
from smalti.evaluate.digits import DigitClassifier
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.recipes import load_recipe
from smalti.systems import digits as system
from smalti.systems import stages
from smalti.tasks.images import Pipeline
from smalti.training.checkpoint import load_checkpoint

SETTINGS = [
    "data.colouring.colourings=1",
    "image_tokenizer.model.width=8",
    "image_tokenizer.model.num_heads=2",
    "image_tokenizer.model.quantizer.codebook_size=23",
    "image_tokenizer.train.num_steps=5",
    "image_tokenizer.train.batch_size=8",
    "model.num_layers=1",
    "model.d_model=12",
    "model.num_heads=2",
    "model.d_ff=17",
    "train.num_epochs=2",
    "train.batch_size=8",
    "train.checkpoint_every=3",
    "evaluate.num_prompts=3",
    "evaluate.num_captions=3",
    "evaluate.num_pairs=2",
    "evaluate.best_of=[1, 2]",
]


@pytest.fixture(scope="module", autouse=True)
def few_digits_and_any_judge():
    few = {name: SourceDigits(d.masks[:24], d.labels[:24]) for name, d in scikit_learn_digits().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "scikit_learn_digits", lambda: few)
        patch.setattr(report, "load_digit_classifier", lambda _: DigitClassifier().eval())
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, few_digits_and_any_judge) -> Path:
    """The folder of a run that was never stopped."""
    return train(tmp_path_factory.mktemp("whole") / "run").parent


@pytest.fixture
def copied(whole: Path, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def train(output: Path, *settings: str) -> Path:
    recipe = load_recipe("demo", [*SETTINGS, *settings, f"output={output}"])
    return system.train_digits(recipe, command="smalti train demo", show_progress=False)


def test_a_run_has_everything_and_running_again_changes_nothing(whole: Path):
    bundle = whole / "bundle"
    names = {path.name for path in whole.iterdir()}
    assert names >= {"report.md", "report.json", "text_conditioned.png", "image_conditioned.png", "unconditional.png"}
    assert (whole / "model" / "curves.png").exists()
    pipe = Pipeline.load(bundle)
    assert pipe.name == "run"
    found = json.loads((whole / "report.json").read_text())
    assert found["weights_sha256"] == pipe.weights_sha256 and found["command"] == "smalti train demo"
    assert len(pipe.bundle.figures) == len(found["rows"])
    watched = [path for path in whole.rglob("*") if path.is_file() and "bundle" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in watched}
    train(whole)
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    again = Pipeline.load(bundle)
    assert again.weights_sha256 == pipe.weights_sha256 and again.bundle.figures == pipe.bundle.figures


@pytest.mark.parametrize("stage", ["tokenize_pairs", "train_model", "draw_galleries"])
def test_a_run_stopped_at_any_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch, whole: Path, stage: str):
    class Stopped(BaseException):
        """Like a kill: nothing in between catches it."""

    def stop(*_: object, **__: object):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(system if hasattr(system, stage) else stages, stage, stop)
        with pytest.raises(Stopped):
            train(tmp_path / "stopped")
    resumed = Pipeline.load(train(tmp_path / "stopped"))
    assert resumed.weights_sha256 == Pipeline.load(whole / "bundle").weights_sha256


def test_another_recipe_in_the_same_folder_is_refused(copied: Path):
    with pytest.raises(InputError, match=r"a run with other settings \(model.num_layers is 1 there, 2 here; see "):
        train(copied, "model.num_layers=2")
    assert load_checkpoint(sorted((copied / "model" / "checkpoints").glob("step_*"))[-1]).step == 6


def test_a_trained_image_tokenizer_can_be_given(tmp_path, whole: Path):
    bundle = train(tmp_path / "two", f"image_tokenizer.path={whole / 'image_tokenizer'}", "train.seed=1")
    assert not (tmp_path / "two" / "image_tokenizer_training").exists()
    given, used = (Pipeline.load(path).image_tokenizer.state_dict() for path in (whole / "bundle", bundle))
    assert all(tensor.equal(given[name]) for name, tensor in used.items())


def test_tokens_of_another_image_tokenizer_are_refused(copied: Path):
    other = load_image_tokenizer(copied / "image_tokenizer")
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    save_image_tokenizer(other, copied / "image_tokenizer")
    with pytest.raises(
        InputError, match=r"train\.parquet was made with another tokenizer: image_tokenizer_sha256 .* Remove"
    ):
        train(copied)


def test_the_command_says_what_to_open_and_try(copied: Path, capsys):
    assert cli.run(["train", "demo", "--quiet", *SETTINGS, f"output={copied}"]) == 0
    out = capsys.readouterr().out
    assert f"Open {copied}/report.md" in out
    assert re.search(rf"smalti generate .* --bundle {copied / 'bundle'}", out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonesuch"], "there is no recipe 'nonesuch'"),
        (["demo", "train.learning_rat=1"], "did you mean train.learning_rate"),
        (["demo", "train.batch_size=many"], "train.batch_size is 'many'"),
        (["demo", "batch"], "'batch' is no setting; write key=value"),
        (["digits", "data.path=/nonesuch"], "/nonesuch holds no train-images"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, capsys, arguments: list[str], message: str):
    assert cli.run(["train", *arguments, "--quiet", f"output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
