"""Training on lines: what reaches the model, the split, early stopping, token dropout, and a run from end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_lines import random_codes, write_text

from smalti.cli.app import run
from smalti.data.line_rows import TableRows, rows_not_in
from smalti.data.lines import import_lines
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.models.config import TransformerConfig
from smalti.recipes import LinesRecipe, load_recipe
from smalti.recipes.line_presets import LINE_PRESETS, LinePreset, line_layout
from smalti.systems.lines import learning_rate_for, read_data
from smalti.tasks.lines import LineModel
from smalti.training import token_model as module
from smalti.training.curves import Curves
from smalti.training.token_model import TokenArrays, TrainConfig, drop_tokens, micro_batches, train_model

LENGTH, VOCAB_SIZE = 5, 7
LAYOUT = line_layout(LENGTH, VOCAB_SIZE)
SHAPE = TransformerConfig(num_layers=1, d_model=10, num_heads=2, d_ff=13, max_length=LAYOUT.max_length, dropout=0.1)
SHORT = TrainConfig(num_epochs=6, batch_size=4, learning_rate=0.03, precision="float32", compile=False)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of the time of runs as short as these."""
    monkeypatch.setattr(Curves, "draw", lambda self: None)


def arrays(num_rows, seed=0):
    codes = random_codes(num_rows, length=LENGTH, vocab_size=VOCAB_SIZE, seed=seed)
    return TokenArrays(codes, np.zeros((num_rows, 0), np.int64))


def table_of(path, codes, tag="picture"):
    import_lines(write_text(path.with_suffix(".txt"), codes, tag=tag), path, VOCAB_SIZE, force=True)
    return TokenTable.open(path)


def weights_of(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


# What reaches the model


def test_tags_never_reach_the_model(tmp_path):
    codes = random_codes(11, length=LENGTH, vocab_size=VOCAB_SIZE)
    config = replace(SHORT, token_dropout=0.3)

    def tensors(tag):
        table = table_of(tmp_path / f"{tag}.parquet", codes, tag)
        stream = micro_batches(LAYOUT, TableRows(table, np.arange(11)), config, start_step=0, rank=0, world_size=1)
        found = [next(stream)[0] for _ in range(5)]
        kept = [t for piece in found for t in (piece.token_ids, piece.parts, *(x.local for x in piece.targets))]
        return [t.numpy().tobytes() for t in kept]

    assert tensors("picture") == tensors("000d1f2aa107dbed4cea301effa6e0d8")


def test_a_split_never_parts_equal_lines_and_a_validation_file_takes_its_lines_out(tmp_path):
    codes = random_codes(30, length=LENGTH, vocab_size=VOCAB_SIZE).repeat(2, axis=0)
    table_of(tmp_path / "lines.parquet", codes)
    recipe = load_recipe("lines", [f"data={tmp_path}/lines.parquet", f"output={tmp_path}/out", "held_out=0.3"])
    assert isinstance(recipe, LinesRecipe)
    data = read_data(recipe)
    assert (data.length, data.vocab_size) == (LENGTH, VOCAB_SIZE)
    train, held = (
        {tuple(row) for row in pairs.batch(np.arange(len(pairs))).image_tokens.tolist()}
        for pairs in (data.train, data.validation)
    )
    assert len(data.train) + len(data.validation) == 60 and held and not train & held
    assert (tmp_path / "out" / "validation.parquet").exists()

    given = table_of(tmp_path / "given.parquet", codes[:4])
    data = read_data(recipe.model_copy(update={"validation": tmp_path / "given.parquet"}))
    table = TokenTable.open(tmp_path / "lines.parquet")
    assert data.train.rows.tolist() == rows_not_in(table, given).tolist() == list(range(4, 60))


# Token dropout


def test_token_dropout_replaces_codes_by_codes_and_nothing_else():
    vocabulary = LAYOUT.vocabulary
    token_ids = torch.tensor([[0, 3, 1, 7, 2, 5]])
    uniforms = torch.tensor([[[0.0, 0.99], [0.1, 0.5], [0.4, 0.5], [0.29, 0.0], [0.3, 0.0], [0.0, 0.999]]])
    # Ids 1 to 7 are the codes 0 to 6. Dropped are those with a first number below 0.3, but the marker; the second
    # picks the code: ⌊0.5 · 7⌋ = 3, 0, ⌊0.999 · 7⌋ = 6.
    assert drop_tokens(vocabulary, token_ids, 0.3, uniforms).tolist() == [[0, 4, 1, 1, 2, 7]]


def test_token_dropout_keeps_the_targets_and_follows_from_seed_and_step():
    def pieces(share, *, start_step=0, num_micro_batches=1):
        config = replace(SHORT, token_dropout=share, num_micro_batches=num_micro_batches)
        stream = micro_batches(LAYOUT, arrays(40), config, start_step=start_step, rank=0, world_size=1)
        return [next(stream) for _ in range(30 - start_step)]

    plain, dropped, again = pieces(0.0), pieces(0.4), pieces(0.4, start_step=7)
    changed = total = 0
    for (before,), (after,) in zip(plain, dropped, strict=True):
        assert all(torch.equal(a.local, b.local) for a, b in zip(before.targets, after.targets, strict=True))
        assert torch.equal(before.token_ids[:, 0], after.token_ids[:, 0])
        assert 1 <= after.token_ids[:, 1:].min() <= after.token_ids.max() <= VOCAB_SIZE
        changed += int((before.token_ids != after.token_ids).sum())
        total += after.token_ids[:, 1:].numel()
    expected = 0.4 * (1 - 1 / VOCAB_SIZE)  # one in seven is replaced by itself
    assert changed / total == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / total))
    assert all(torch.equal(a[0].token_ids, b[0].token_ids) for a, b in zip(again, dropped[7:], strict=True))
    for (whole,), halves in zip(dropped, pieces(0.4, num_micro_batches=2), strict=True):
        assert torch.equal(whole.token_ids[0::2], halves[0].token_ids)
        assert torch.equal(whole.token_ids[1::2], halves[1].token_ids)


def test_token_dropout_lies_within_a_share():
    with pytest.raises(ValueError, match=r"token_dropout is 1.0; expected a number in \[0, 1\)"):
        TrainConfig(num_steps=1, token_dropout=1.0)


# Stopping early


def scripted(monkeypatch, losses):
    """Makes the evaluations of a run give these losses, epoch by epoch; returns the weights each one saw."""
    seen = []

    def evaluate(model, layout, pairs, num_rows, **_):
        seen.append(weights_of(model).clone())
        return {"nats_per_token": losses[len(seen) - 1], "markers": None, "picture": losses[len(seen) - 1]}

    monkeypatch.setattr(module, "evaluate", evaluate)
    return seen


def test_training_stops_when_validation_has_stalled_and_returns_the_best(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [3.0, 2.0, 1.0, 1.5, 1.0, 0.5])
    config = replace(SHORT, patience=2)
    model = train_model(SHAPE, LAYOUT, arrays(8), arrays(3, 1), config, tmp_path, show_progress=False)
    assert len(seen) == 5  # an equal loss is no lower one
    assert torch.equal(weights_of(model), seen[2])
    again = train_model(SHAPE, LAYOUT, arrays(8), arrays(3, 1), config, tmp_path, show_progress=False)
    assert len(seen) == 5 and torch.equal(weights_of(again), seen[2])


def test_without_patience_the_last_weights_are_returned(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [3.0, 2.0, 1.0, 1.5, 1.0, 1.5, 2.0])
    model = train_model(SHAPE, LAYOUT, arrays(8), arrays(3, 1), SHORT, tmp_path, show_progress=False)
    assert len(seen) == 7 and torch.equal(weights_of(model), seen[6])
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("stop", [3, 9, 16])
def test_a_stopped_run_with_patience_and_dropout_ends_as_if_it_had_not_been(tmp_path, stop):
    config = replace(
        SHORT, num_epochs=9, patience=3, token_dropout=0.2, ema_decay=0.9, checkpoint_every=3, learning_rate=0.1
    )
    train, validation = arrays(24), arrays(5, 1)

    class Stops(TokenArrays):
        reads_left = stop

        def batch(self, rows):
            Stops.reads_left -= 1
            if Stops.reads_left < 0:
                raise KeyboardInterrupt
            return super().batch(rows)

    whole = train_model(SHAPE, LAYOUT, train, validation, config, tmp_path / "whole", show_progress=False)
    cut = Stops(train.image_tokens, train.text_tokens)
    with pytest.raises(KeyboardInterrupt):
        train_model(SHAPE, LAYOUT, cut, validation, config, tmp_path / "cut", show_progress=False)
    resumed = train_model(SHAPE, LAYOUT, train, validation, config, tmp_path / "cut", show_progress=False)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert (tmp_path / "whole/curves.csv").read_text() == (tmp_path / "cut/curves.csv").read_text()


def test_a_checkpoint_knows_whether_tokens_were_dropped(tmp_path):
    train, validation = arrays(8), arrays(3, 1)
    config = replace(SHORT, num_epochs=1, token_dropout=0.2)
    train_model(SHAPE, LAYOUT, train, validation, config, tmp_path, show_progress=False)
    with pytest.raises(InputError, match=r"other settings \(training.token_dropout is 0\.2 there, 0\.0 here\)"):
        train_model(SHAPE, LAYOUT, train, validation, replace(config, token_dropout=0.0), tmp_path, show_progress=False)


# From table to bundle


def test_the_learning_rate_falls_with_the_width():
    recipe = load_recipe("lines", ["learning_rate=2e-3"])
    assert isinstance(recipe, LinesRecipe)
    shape = TransformerConfig(num_layers=1, d_model=512, num_heads=8, d_ff=8, max_length=5)
    assert learning_rate_for(recipe, shape) == pytest.approx(2e-3 / 4)
    assert learning_rate_for(recipe.model_copy(update={"learning_rate_width": None}), shape) == 2e-3


def test_lines_become_a_bundle_and_a_report(tmp_path, capsys, monkeypatch):
    tiny = LinePreset(num_layers=1, d_model=16, num_heads=2, tokens_from=0)
    monkeypatch.setitem(LINE_PRESETS, "1M", tiny)
    source = np.random.default_rng(0)
    codes = source.integers(0, VOCAB_SIZE, (600, 1)) * np.ones((1, LENGTH), np.int64)  # each line repeats its code ...
    codes[:, -2:] = source.integers(0, VOCAB_SIZE, (600, 2))  # ... but for the last two
    table_of(tmp_path / "lines.parquet", codes)
    settings = ["num_epochs=null", "num_steps=120", "held_out=0.3", "warmup_steps=5", "batch_size=32", "patience=1000"]
    settings += ["learning_rate=0.02", "learning_rate_width=null", "dropout=0", "token_dropout=0", "ema_decay=0.8"]
    arguments = ["train", "lines", f"data={tmp_path}/lines.parquet", f"output={tmp_path}/out", *settings, "--quiet"]
    assert run(arguments) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = {row["name"]: row["nats_per_token"] for row in report["rows"]}
    ours = next(nats for name, nats in rows.items() if name.startswith("out ("))
    # The first code and the last two cost ln 7, the others nothing. A bigram cannot tell the others from the last.
    best = 3 * math.log(7) / LENGTH
    assert ours == pytest.approx(best, abs=0.1)
    assert rows["bigram (Kneser-Ney)"] > best + 0.15 and rows["uniform"] == pytest.approx(math.log(7))
    model = LineModel.load(tmp_path / "out/bundle")
    assert model.bundle.figures["validation nats per token"].startswith(f"{ours:.4f}")
    assert "| uniform | 1.9459 |" in (tmp_path / "out/report.md").read_text()
    capsys.readouterr()
    written = (tmp_path / "out/report.json").stat().st_mtime_ns
    assert run(arguments) == 0  # nothing is left to do
    assert (tmp_path / "out/report.json").stat().st_mtime_ns == written
    assert LineModel.load(tmp_path / "out/bundle").bundle.figures == model.bundle.figures
    assert run([*arguments, "seed=1"]) == 2
    assert "holds a run with other settings (train.seed is 0 there, 1 here; see" in capsys.readouterr().err
    held_out, bundle = str(tmp_path / "out/validation.parquet"), str(tmp_path / "out/bundle")
    capsys.readouterr()
    assert run(["baselines", str(tmp_path / "lines.parquet"), held_out, "--bundle", bundle]) == 0
    assert f"{ours:.4f}" in capsys.readouterr().out
    assert run(["score", held_out, "--bundle", bundle, "-o", str(tmp_path / "scores")]) == 0
    assert f"{ours:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "no lines are given: give the table of smalti data import-lines, data=lines.parquet"),
        (["data=TMP/ragged.parquet"], "has lines of different lengths"),
        (["data=TMP/lines.parquet", "vocab_size=5"], "expected 0 to 4"),
        (["data=TMP/lines.parquet", "validation=TMP/lines.parquet"], "nothing is left to train on"),
        (["data=TMP/lines.parquet", "held_out=0"], "held_out is 0; it must be more than 0"),
        (["data=TMP/lines.parquet", "preset=2M"], "preset '2M' is unknown; choose one of auto, 1M"),
        (["data=TMP/lines.parquet", "drop=0.1"], "there is no setting drop; did you mean"),
        (["data=TMP/lines.parquet", "out=there"], "there is no setting out; did you mean output"),
    ],
)
def test_mistakes_are_explained(settings, message, tmp_path, capsys):
    codes = random_codes(9, length=LENGTH, vocab_size=VOCAB_SIZE)
    table_of(tmp_path / "lines.parquet", codes)
    ragged = write_text(tmp_path / "ragged.txt", codes, np.arange(9) % 3 + 1)
    import_lines(ragged, tmp_path / "ragged.parquet", VOCAB_SIZE, LENGTH, allow_short=True)
    settings = [setting.replace("TMP", str(tmp_path)) for setting in settings]
    assert run(["train", "lines", *settings, *([] if "out=there" in settings else [f"output={tmp_path}/out"])]) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(line.startswith("comparing lines") for line in before)
