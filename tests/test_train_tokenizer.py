"""Training an image tokenizer: exact resume after kill -9, what a run writes, its figures by hand, its errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqvae import VQVAEConfig
from smalti.training import run
from smalti.training.checkpoint import latest_checkpoint, load_checkpoint, load_run
from smalti.training.image_tokenizer import (
    TrainTokenizerConfig,
    draw_reconstructions,
    evaluate_reconstruction,
    train_tokenizer,
)

MODEL = VQVAEConfig(
    image_size=10,
    patch_size=5,
    width=8,
    encoder_blocks=1,
    decoder_blocks=1,
    num_heads=2,
    quantizer=QuantizerConfig(codebook_size=13, code_dim=3, kmeans_rounds=2, restart_below=1.0, ema_decay=0.9),
)
TRAINING = TrainTokenizerConfig(
    num_steps=23,
    batch_size=7,
    warmup_steps=3,
    max_value=3,
    held_out_pictures=11,
    evaluate_every=10,
    sample_every=15,
    checkpoint_every=5,
    log_every=3,
)


def pictures(count, seed):
    """Channel values 0 and, one time in four, 3."""
    return 3 * (np.random.default_rng(seed).random((count, 10, 10, 3)) < 0.25).astype(np.uint8)


def train(directory, model=MODEL, config=TRAINING):
    return train_tokenizer(pictures(31, 0), pictures(17, 1), model, config, directory, show_progress=False)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    directory = tmp_path_factory.mktemp("finished")
    train(directory)
    return directory


def state_of(directory):
    path = latest_checkpoint(directory)
    assert path is not None
    return load_checkpoint(path)


def assert_same_end(one, other):
    one, other = state_of(one), state_of(other)
    assert one.step == other.step == TRAINING.num_steps
    for ours, theirs in ((one.weights, other.weights), (one.training_state["model"], other.training_state["model"])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_writes_its_logs_pictures_checkpoints_and_image_tokenizer(finished):
    training, evaluation = rows(finished / "training.csv"), rows(finished / "evaluation.csv")
    assert [int(row[0]) for row in training[1:]] == [3, 6, 9, 12, 15, 18, 21]
    assert [int(row[0]) for row in evaluation[1:]] == [0, 10, 20, 23]
    assert evaluation[0] == ["step", "mse", "psnr_db", "exact_pixels", "codebook_usage", "perplexity", "dead_codes"]
    assert sorted(path.name for path in finished.glob("step_*")) == ["step_00000020", "step_00000023"]
    assert sorted(path.name for path in (finished / "reconstructions").iterdir()) == [
        f"step_{step:08d}.png" for step in (0, 15, 23)
    ]
    with Image.open(finished / "curves.png") as curves:
        assert curves.size == (1200, 350)
    assert list(finished.glob("events.out.tfevents.*"))

    loaded = load_image_tokenizer(finished / "image_tokenizer")
    last = state_of(finished)
    assert loaded.config == MODEL
    assert all(torch.equal(tensor, last.weights[name]) for name, tensor in loaded.state_dict().items())
    report = evaluate_reconstruction(loaded, torch.from_numpy(pictures(17, 1))[:11], 3)
    assert [float(value) for value in evaluation[-1][1:]] == pytest.approx(list(report))


def test_the_seed_decides_the_weights(finished, tmp_path):
    short = replace(TRAINING, num_steps=2, log_every=0, evaluate_every=0, sample_every=0)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tmp_path / name, config=replace(short, seed=seed))
    a, b, c = (state_of(tmp_path / name).weights for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["patches_in.weight"], c["patches_in.weight"])


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import test_train_tokenizer
test_train_tokenizer.train(sys.argv[2])
"""


@pytest.mark.slow  # processes that import torch
def test_killed_and_started_again_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    """Killed with SIGKILL as soon as a checkpoint of an odd step is there, while later steps run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, env=environment)
    while latest_checkpoint(tmp_path) is None and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = latest_checkpoint(tmp_path)
    assert stopped is not None and load_checkpoint(stopped).step >= 5

    train(tmp_path)
    assert_same_end(tmp_path, finished)
    assert rows(tmp_path / "training.csv") == rows(finished / "training.csv")
    assert rows(tmp_path / "evaluation.csv") == rows(finished / "evaluation.csv")


@pytest.mark.parametrize("stop_before_step", [6, 22])
def test_stopped_anywhere_and_started_again_ends_the_same(finished, tmp_path, monkeypatch, stop_before_step):
    learning_rate_at = TrainTokenizerConfig.learning_rate_at

    def stopping(config, step):
        if step == stop_before_step:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    monkeypatch.setattr(TrainTokenizerConfig, "learning_rate_at", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    torch.randn(100)  # leaves the global generator elsewhere
    train(tmp_path)
    assert_same_end(tmp_path, finished)
    assert rows(tmp_path / "training.csv") == rows(finished / "training.csv")
    assert rows(tmp_path / "evaluation.csv") == rows(finished / "evaluation.csv")


def test_a_finished_run_started_again_changes_nothing(finished):
    before = rows(finished / "evaluation.csv")
    train(finished)
    assert rows(finished / "evaluation.csv") == before


def test_a_run_begun_before_a_setting_was_known_is_the_same_run(finished, monkeypatch):
    """It has no `new_entries`, which is None by default; and one that is set is another run."""
    before = rows(finished / "evaluation.csv")
    latest = latest_checkpoint(finished)
    assert latest is not None
    earlier = load_run(latest)
    earlier["model"]["quantizer"].pop("new_entries", None)
    earlier["model"]["quantizer"]["later_removed"] = None
    monkeypatch.setattr(run, "load_run", lambda path: earlier)
    train(finished)
    assert rows(finished / "evaluation.csv") == before
    with pytest.raises(InputError, match=r"other settings.*new_entries"):
        train(finished, model=replace(MODEL, quantizer=replace(MODEL.quantizer, new_entries="squared_distance")))


def test_another_run_in_the_same_folder_is_refused(finished):
    with pytest.raises(
        InputError, match=r"holds a run with other settings \(training.num_steps is 23 there, 29 here\)"
    ):
        train(finished, config=replace(TRAINING, num_steps=29))
    with pytest.raises(InputError, match=r"model.width is 8 there, 16 here"):
        train(finished, model=replace(MODEL, width=16))


def test_an_unwritable_folder_is_refused_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(TrainTokenizerConfig, "learning_rate_at", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(InputError, match=r"cannot be written: .* is a file, not a folder"):
        train(tmp_path / "file" / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainTokenizerConfig, "learning_rate_at", lambda *_: math.nan)
    with pytest.raises(InputError, match=r"the loss of step 3 is nan: .* lower learning_rate \(0\.003\)"):
        train(tmp_path)


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"training pictures are \(4, 10, 10\) of torch.uint8; expected \(N, H, W, C\)"
    ):
        train_tokenizer(pictures(4, 0)[..., 0], pictures(4, 0), MODEL, TRAINING, tmp_path)
    with pytest.raises(InputError, match=r"held-out pictures reach 4, above max_value 3"):
        train_tokenizer(pictures(4, 0), pictures(4, 0) + 1, MODEL, TRAINING, tmp_path)


class Fixed(torch.nn.Module):
    """Encodes every picture as code 1 and decodes to fixed pictures."""

    def __init__(self, decoded):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))
        self.decoded = decoded
        self.config = replace(MODEL, image_size=5)

    def encode_images(self, images):
        return torch.ones(len(images), 1, 1, dtype=torch.long)

    def decode_codes(self, codes):
        return self.decoded[: len(codes)]


def test_figures_of_a_case_worked_by_hand():
    """One picture of 5 x 5 black pixels; one channel of one pixel is decoded as 2.4 levels of 3, one as -7: mean square
    0.64 / 75 after clamping, and 24 of 25 pixels are exact."""
    decoded = torch.zeros(1, 3, 5, 5)
    decoded[0, 1, 2, 3] = 0.8
    decoded[0, 0, 0, 0] = -7
    report = evaluate_reconstruction(Fixed(decoded), torch.zeros(1, 5, 5, 3, dtype=torch.uint8), 3)
    assert report.mse == pytest.approx(0.64 / 75)
    assert report.psnr_db == pytest.approx(10 * math.log10(75 / 0.64))
    assert report.exact_pixels == 24 / 25
    assert (report.codebook_usage, report.perplexity, report.dead_codes) == (1 / 13, 1.0, 12)


def test_batches_of_any_size_give_the_same_figures(finished):
    image_tokenizer = load_image_tokenizer(finished / "image_tokenizer")
    held_out = torch.from_numpy(pictures(17, 2))
    whole = evaluate_reconstruction(image_tokenizer, held_out, 3)
    assert list(evaluate_reconstruction(image_tokenizer, held_out, 3, batch_size=5)) == pytest.approx(list(whole))


def test_reconstruction_sheet_has_pictures_above_their_reconstructions(tmp_path):
    decoded = torch.full((9, 3, 5, 5), 1 / 3)
    black = torch.zeros(9, 5, 5, 3, dtype=torch.uint8)
    draw_reconstructions(Fixed(decoded), black, 3, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        sheet = np.asarray(picture)
    zoom, cell = 96 // 5, 7 * (96 // 5)
    assert sheet.shape == (4 * cell, 8 * cell, 3)
    assert (sheet[: 5 * zoom, : 5 * zoom] == 0).all() and (sheet[cell : cell + 5 * zoom, : 5 * zoom] == 85).all()
    # the ninth picture opens a second pair of rows; beside it the sheet is white
    assert (sheet[2 * cell : 2 * cell + 5 * zoom, : 5 * zoom] == 0).all() and (sheet[2 * cell :, cell:] == 255).all()


def test_learning_rate_rises_evenly_and_falls_by_a_cosine():
    config = TrainTokenizerConfig(num_steps=110, warmup_steps=10, learning_rate=2.0)
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(9) == pytest.approx(2.0)
    assert config.learning_rate_at(10) == pytest.approx(2.0)
    assert config.learning_rate_at(60) == pytest.approx(1.0)
    assert config.learning_rate_at(109) == pytest.approx(1 + math.cos(math.pi * 0.99))


def test_averaged_weights_are_the_running_mean(tmp_path):
    """Decay min(0.5, (1 + n) / (10 + n)) at update n; the first update copies."""
    config = replace(TRAINING, num_steps=3, checkpoint_every=1, keep_checkpoints=3, ema_decay=0.5, evaluate_every=0)
    train(tmp_path, config=config)
    states = [load_checkpoint(tmp_path / f"step_{step:08d}") for step in (1, 2, 3)]
    mean = states[0].training_state["model"]["palette.weight"]
    for update, state in enumerate(states[1:], start=1):
        mean = torch.lerp(mean, state.training_state["model"]["palette.weight"], 1 - (1 + update) / (10 + update))
        torch.testing.assert_close(state.weights["palette.weight"], mean)


def test_training_lowers_the_loss_without_bf16_too(tmp_path):
    config = replace(
        TRAINING, num_steps=40, precision="float32", learning_rate=1e-2, checkpoint_every=0, evaluate_every=0
    )
    train(tmp_path, config=config)
    losses = [float(row[2]) for row in rows(tmp_path / "training.csv")[1:]]
    assert losses[-1] < 0.6 * losses[0]


def test_settings_survive_json():
    read = json.loads(json.dumps(TRAINING.__dict__))
    assert TrainTokenizerConfig(**read) == TRAINING


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be more than 0"),
        ({"log_every": -1}, "log_every is -1; it must be at least 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must be more than 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0; expected a number in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainTokenizerConfig(**settings)
