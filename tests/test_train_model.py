"""The training loop: what it computes, that it stops and goes on exactly, and that every setting does something."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import FIXED, OPEN, SHAPE, VOCABULARY, arrays

from smalti import precision
from smalti.errors import InputError
from smalti.likelihood import evaluate_nll
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.loss import slot_nll, slot_targets, token_nll
from smalti.sequences.layout import Layout
from smalti.training import token_model as module
from smalti.training.checkpoint import latest_checkpoint
from smalti.training.curves import Curves
from smalti.training.run import update_average
from smalti.training.token_model import (
    TokenArrays,
    TrainConfig,
    draw_orders,
    evaluate,
    learning_rate,
    make_micro_batch,
    make_optimizer,
    micro_batches,
    pack_rows,
    part_names,
    train_model,
    with_choices,
)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes most of the time of runs as short as these; the test of the curves does it."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(Curves, "draw", lambda self: None)


PLAIN = replace(SHAPE, dropout=0.0)
PLAINLY = {"precision": "float32", "compile": False}
SHORT = TrainConfig(num_steps=4, batch_size=6, **PLAINLY)
COUNTED = Layout.parse(VOCABULARY, {"one": "<bos> (text{3}) <image> image{5}"})


def run(directory, config=SHORT, *, shape=SHAPE, layout=FIXED, train=None, validation=None, **options):
    train = arrays(29) if train is None else train
    validation = arrays(5, seed=1) if validation is None else validation
    return train_model(shape, layout, train, validation, config, directory, show_progress=False, **options)


def weights_of(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def rows_of(directory):
    with (Path(directory) / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def packed_rows(layout, num_rows=8, seed=3):
    orders = draw_orders([order.weight for order in layout.orders.values()], num_rows, seed, 0)
    return pack_rows(layout, arrays(num_rows, seed), np.arange(num_rows), orders)


# The loss


@pytest.mark.parametrize("full_softmax", [False, True])
@pytest.mark.parametrize("layout", [FIXED, OPEN, COUNTED], ids=["fixed", "open", "counted"])
def test_grouped_loss_is_the_oracle_at_the_counted_positions_with_its_gradients(layout, full_softmax):
    torch.manual_seed(0)
    model = new_model(layout, PLAIN, full_head=full_softmax)
    packed = packed_rows(layout)

    expected = token_nll(model, packed, layout.slots, full_softmax=full_softmax)[packed.counted]
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = make_micro_batch(layout, packed, full_softmax=full_softmax)
    found = slot_nll(model, batch.token_ids, batch.targets, layout.slots)
    found.sum().backward()

    torch.testing.assert_close(found.sum(), expected.sum())
    torch.testing.assert_close(found.sort().values, expected[expected > 0].sort().values)
    assert batch.counts.sum() == packed.counted.sum()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("layout", [FIXED, OPEN, COUNTED], ids=["fixed", "open", "counted"])
def test_each_part_gets_the_nats_of_its_own_tokens(layout):
    torch.manual_seed(0)
    model = new_model(layout, PLAIN)
    packed = packed_rows(layout)
    batch = make_micro_batch(layout, packed, full_softmax=False)
    nll = slot_nll(model, batch.token_ids, batch.targets, layout.slots)
    found = torch.zeros(3).index_add_(0, batch.parts, nll)

    oracle = token_nll(model, packed, layout.slots) * packed.counted
    for part, (name, segment) in enumerate(VOCABULARY.segments.items()):
        inside = (packed.token_ids >= segment.offset) & (packed.token_ids < segment.end)
        torch.testing.assert_close(found[part], oracle[inside].sum(), msg=name)
        assert batch.counts[part] == (inside & packed.counted).sum()
    assert part_names(layout) == ["markers", "picture", "caption"]


def test_a_slot_of_one_id_is_no_target_unless_the_softmax_is_full():
    packed = packed_rows(FIXED)
    assert sum(len(target.rows) for target in slot_targets(packed, FIXED.slots)) == 8 * (1 + 3 + 5)
    assert sum(len(target.rows) for target in slot_targets(packed, FIXED.slots, full_softmax=True)) == 8 * 10


def test_training_mode_without_dropout_and_evaluation_give_one_loss():
    torch.manual_seed(0)
    model = new_model(FIXED, PLAIN).train()
    packed = packed_rows(FIXED)
    batch = make_micro_batch(FIXED, packed, full_softmax=False)
    training = slot_nll(model, batch.token_ids, batch.targets, FIXED.slots).sum() / batch.counts.sum()
    assert training.item() == pytest.approx(evaluate_nll(model, FIXED, [packed])["total"].nats_per_token, rel=1e-6)


def test_late_dropout_begins_with_the_share_of_steps_that_is_asked_for(tmp_path):
    losses = {}
    for name, dropout, dropout_from in (("none", 0.0, 0.0), ("late", 0.5, 0.5), ("always", 0.5, 0.0)):
        config = TrainConfig(num_steps=6, batch_size=4, dropout_from=dropout_from, compile=False)
        shape = replace(PLAIN, dropout=dropout)
        train_model(shape, FIXED, arrays(20), arrays(4, seed=1), config, tmp_path / name, show_progress=False)
        rows = (tmp_path / name / "curves.csv").read_text().splitlines()
        losses[name] = [row.split(",")[3] for row in rows if row.startswith("train")]
    assert losses["late"][:3] == losses["none"][:3] != losses["always"][:3]
    assert losses["late"][3] != losses["none"][3]


# Batches


@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=4),
    num_rows=st.integers(1, 41),
    seed=st.integers(0, 99),
    step=st.integers(0, 10**6),
)
def test_every_batch_holds_each_order_by_its_weight(weights, num_rows, seed, step):
    orders = draw_orders(weights, num_rows, seed, step)
    assert (np.diff(orders) >= 0).all() and len(orders) == num_rows
    shares = np.array(weights) / sum(weights) * num_rows
    counts = np.bincount(orders, minlength=len(weights))
    assert (np.abs(counts - shares) < 1 + 1e-9).all()
    assert (orders == draw_orders(weights, num_rows, seed, step)).all()


def test_two_equal_orders_get_half_of_every_batch_and_unequal_ones_their_share_on_average():
    for step in range(50):
        assert np.bincount(draw_orders([1, 1], 32, 7, step)).tolist() == [16, 16]
    counts = sum(np.bincount(draw_orders([3, 7, 1], 5, 7, step), minlength=3) for step in range(4000))
    np.testing.assert_allclose(counts / counts.sum(), [3 / 11, 7 / 11, 1 / 11], atol=0.006)


@pytest.mark.parametrize("layout", [FIXED, OPEN], ids=["fixed", "open"])
def test_processes_and_micro_batches_cut_up_the_same_batch(layout):
    def sequences(num_micro_batches, world_size):
        config = replace(SHORT, batch_size=12, num_micro_batches=num_micro_batches)
        found = []
        for rank in range(world_size):
            stream = micro_batches(layout, arrays(29), config, start_step=2, rank=rank, world_size=world_size)
            pieces = next(stream)
            assert [len(piece.token_ids) for piece in pieces] == [12 // num_micro_batches // world_size] * len(pieces)
            found += [tuple(row) for piece in pieces for row in piece.token_ids.tolist()]
        longest = max(map(len, found))
        return sorted(row + (0,) * (longest - len(row)) for row in found)

    assert sequences(1, 1) == sequences(3, 1) == sequences(1, 2) == sequences(2, 3)


def test_a_fixed_layout_gives_the_same_rows_in_every_step():
    config = replace(SHORT, batch_size=8, num_micro_batches=2)
    stream = micro_batches(FIXED, arrays(29), config, start_step=0, rank=0, world_size=1)
    pieces = [piece for _ in range(9) for piece in next(stream)]
    for piece in pieces:
        for target, first in zip(piece.targets, pieces[0].targets, strict=True):
            assert target.slot == first.slot and torch.equal(target.rows, first.rows)


def test_a_stream_started_later_goes_on_where_the_step_number_says():
    whole = micro_batches(OPEN, arrays(29), SHORT, start_step=0, rank=0, world_size=1)
    expected = [next(whole) for _ in range(9)][7][0]
    later = next(micro_batches(OPEN, arrays(29), SHORT, start_step=7, rank=0, world_size=1))[0]
    assert torch.equal(later.token_ids, expected.token_ids)


def test_captions_are_left_empty_only_before_their_pictures_and_others_in_each_step():
    config = replace(SHORT, batch_size=60, caption_dropout=0.3)
    start = {VOCABULARY.special("<text>"): "t2i", VOCABULARY.special("<image>"): "i2t"}
    found = {"t2i": [], "i2t": []}
    stream = micro_batches(OPEN, arrays(29), config, start_step=0, rank=0, world_size=1)
    for (piece,) in itertools.islice(stream, 40):
        for row in piece.token_ids.tolist():
            order = start[row[1]]
            words = [token for token in row[2:] if token >= VOCABULARY["text"].offset]
            found[order].append(len(words))
    assert set(found["i2t"]) == {3} and set(found["t2i"]) == {0, 3}
    assert np.mean([not num for num in found["t2i"]]) == pytest.approx(0.3, abs=0.05)


def test_where_no_caption_can_be_empty_none_is_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"caption_dropout is 0.1, but no caption can be left empty"):
        run(tmp_path, replace(SHORT, caption_dropout=0.1))


def test_the_sampler_sees_the_averaged_model_on_its_way_and_changes_nothing(tmp_path):
    seen = []

    def sampler(model, step):
        torch.rand(3)
        seen.append((step, weights_of(model).clone()))

    config = replace(SHORT, ema_decay=0.5)
    plain = run(tmp_path / "plain", config)
    watched = run(tmp_path / "watched", config, sampler=sampler, sample_every=3)
    assert [step for step, _ in seen] == [0, 3, 4]
    assert torch.equal(weights_of(plain), weights_of(watched))
    assert torch.equal(seen[-1][1], weights_of(watched)) and not torch.equal(seen[0][1], seen[1][1])


# Small pure pieces


def test_learning_rates_worked_by_hand():
    config = TrainConfig(num_steps=8, learning_rate=0.5, schedule="cosine", warmup_steps=4, final_share=0.2)
    rates = [learning_rate(step, 8, config) for step in range(8)]
    # After the warm-up 0.5 · (0.2 + 0.8 · (1 + cos(π k / 3)) / 2) at k = 0, 1, 2, 3.
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.4, 0.2, 0.1])
    assert [learning_rate(step, 8, replace(config, schedule="constant")) for step in (0, 5)] == [0.125, 0.5]


def test_only_matrices_decay():
    model = new_model(FIXED, PLAIN)
    decayed, plain = make_optimizer(model, replace(SHORT, weight_decay=0.1), torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_average_moves_by_its_share():
    averaged, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    before = averaged.weight.detach().clone()
    update_average(averaged, model, step=8, decay=0.9)  # (1 + 8) / (10 + 8) = 0.5
    torch.testing.assert_close(averaged.weight, 0.5 * before + 0.5 * model.weight)
    before = averaged.weight.detach().clone()
    update_average(averaged, model, step=10**6, decay=0.9)
    torch.testing.assert_close(averaged.weight, 0.9 * before + 0.1 * model.weight)


def test_one_step_is_adam_by_hand(tmp_path):
    torch.manual_seed(0)
    model = new_model(FIXED, PLAIN)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    batch = next(micro_batches(FIXED, arrays(29), SHORT, start_step=0, rank=0, world_size=1))[0]
    (slot_nll(model, batch.token_ids, batch.targets, FIXED.slots).sum() / (6 * 10)).backward()
    # Adam's first step: the moments, unbiased, are g and g².
    expected = [p - 1e-3 * q.grad / (q.grad.abs() + 1e-8) for p, q in zip(start, model.parameters(), strict=True)]
    model.zero_grad()
    trained = run(tmp_path, replace(SHORT, num_steps=1), shape=model)
    for parameter, wanted in zip(trained.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, atol=2e-6, rtol=0)


def test_evaluation_weighs_orders():
    torch.manual_seed(0)
    model = new_model(OPEN, PLAIN)
    pairs = arrays(7)
    total = {"nats": 0.0, "tokens": 0.0}
    for index, order in enumerate(OPEN.orders.values()):
        packed = pack_rows(OPEN, pairs, np.arange(7), np.full(7, index))
        nll = token_nll(model, packed, OPEN.slots).detach()
        total["nats"] += order.weight * float(nll[packed.counted].sum())
        total["tokens"] += order.weight * int(packed.counted.sum())
    found = evaluate(model, OPEN, pairs, 7)
    assert found["nats_per_token"] == pytest.approx(total["nats"] / total["tokens"], rel=1e-5)


# A whole run


def test_curves_state_what_they_count_and_start_before_training(tmp_path):
    digits = Layout.parse(
        VOCABULARY, {"a": "<bos> <text> text{3} <image> image{5}", "b": "<bos> <image> image{5} <text> text{3}"}
    )
    run(tmp_path, TrainConfig(num_epochs=2, batch_size=6, ema_decay=0.9, **PLAINLY), layout=digits)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["split", "step", "epoch", "nats_per_token", "markers", "picture", "caption"]
    steps = {split: [int(row["step"]) for row in rows if row["split"] == split] for split in ("train", "validation")}
    # Two epochs of 29 rows are 58 rows, so 10 batches of 6; the first epoch ends in the fifth.
    assert steps == {"train": list(range(10)), "validation": [0, 5, 10]}
    for row in rows:
        parts = 2 * float(row["markers"]) + 5 * float(row["picture"]) + 3 * float(row["caption"])
        assert float(row["nats_per_token"]) == pytest.approx(parts / 10, rel=1e-5)
    untrained = (math.log(2) + 5 * math.log(17) + 3 * math.log(7)) / 10
    assert float(rows[0]["nats_per_token"]) == pytest.approx(untrained, rel=0.02)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert module._label(digits).endswith("(10 a sequence: 5 picture, 2 markers, 3 caption)")

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("nats_per_token/validation")]
    assert logged == pytest.approx(
        [float(row["nats_per_token"]) for row in rows if row["split"] == "validation"], rel=1e-6
    )


def test_eight_examples_are_memorised(tmp_path):
    one = Layout.parse(VOCABULARY, {"one": "<bos> text{3} image{5}"})
    shape = TransformerConfig(num_layers=1, d_model=32, num_heads=2, d_ff=64, max_length=9)
    pairs = TokenArrays(arrays(8).image_tokens, np.stack(np.unravel_index(np.arange(8) * 41, (7, 7, 7)), axis=1))
    config = TrainConfig(num_steps=120, batch_size=8, learning_rate=1e-2, schedule="cosine", **PLAINLY)
    run(tmp_path, config, shape=shape, layout=one, train=pairs, validation=pairs)
    # Which of the eight comes is all there is to learn: ln 8 nats a sequence.
    assert float(rows_of(tmp_path)[-1]["nats_per_token"]) == pytest.approx(math.log(8) / 8, abs=0.02)


def test_neither_the_callers_random_numbers_nor_a_process_group_are_touched(tmp_path):
    class Watching(TokenArrays):
        def batch(self, rows):
            assert not torch.distributed.is_initialized()
            return super().batch(rows)

    before = torch.get_rng_state()
    pairs = arrays(29)
    model = run(tmp_path, train=Watching(pairs.image_tokens, pairs.text_tokens))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


class CountWaits(TorchDispatchMode):
    """Counts what makes a program wait for the device: reading a number, or a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.num_waits += func in waits
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_a_number(tmp_path):
    waits = []
    for num_steps in (3, 23):
        config = TrainConfig(num_steps=num_steps, batch_size=2, max_grad_norm=0.5, ema_decay=0.9)
        with CountWaits() as mode:
            run(tmp_path / str(num_steps), config, train=arrays(64))
        waits.append(mode.num_waits)
    assert waits[0] == waits[1]


# Every setting does something

CHANGES = {
    "num_epochs": 1.0,
    "num_steps": 5,
    "batch_size": 4,
    "num_micro_batches": 2,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "final_share": 0.5,
    "weight_decay": 0.1,
    "betas": (0.8, 0.999),
    "max_grad_norm": 1e-3,
    "ema_decay": 0.9,
    "precision": "bfloat16",
    "compile": True,
    "full_softmax": True,
    "dropout_from": 0.5,
    "token_dropout": 0.5,
    "caption_dropout": 0.5,
    "patience": 9,
    "seed": 1,
    "evaluation_rows": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What a run leaves: final weights, number of forward passes, compilations, validation losses, checkpoints."""

    def observe(config, monkeypatch, layout):
        directory = tmp_path_factory.mktemp("run")
        forwards, compiled = [], []
        forward = module.NextTokenLoss.forward
        monkeypatch.setattr(module.NextTokenLoss, "forward", lambda *a: forwards.append(1) or forward(*a))
        monkeypatch.setattr(torch, "compile", lambda loss: compiled.append(1) or loss)
        model = run(directory, config, layout=layout)
        losses = [row["nats_per_token"] for row in rows_of(directory) if row["split"] == "validation"]
        saved = sorted(path.name for path in (directory / "checkpoints").iterdir())
        return {
            "weights": weights_of(model).tolist(),
            "forwards": len(forwards),
            "compiled": len(compiled),
            "losses": losses,
            "saved": saved,
            "keeps the best": (directory / "best").exists(),
        }

    return observe


def test_the_table_of_changes_is_complete():
    elsewhere = {
        "permuted",  # of a RAR: test_train_classes
        "decay_from",  # of the schedule "exponential"
        "sharding",  # of several processes, and these change no number: test_sharded_training
        "tensor_parallel",
        "recompute",
    }
    assert set(CHANGES) == {field.name for field in fields(TrainConfig)} - elsewhere


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_has_an_effect(name, observed, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)  # no warning where it is emulated
    base = replace(SHORT, schedule="cosine") if name == "final_share" else SHORT
    base = replace(base, checkpoint_every=2) if name == "keep_checkpoints" else base
    layout = OPEN if name == "caption_dropout" else FIXED
    changed = replace(base, **({"num_steps": None} if name == "num_epochs" else {}), **{name: CHANGES[name]})
    with monkeypatch.context() as patch:
        before = observed(base, patch, layout)
    with monkeypatch.context() as patch:
        after = observed(changed, patch, layout)
    differing = {key for key in before if before[key] != after[key]}
    expected = {"num_micro_batches": "forwards", "compile": "compiled", "evaluation_rows": "losses"}
    expected |= {"checkpoint_every": "saved", "keep_checkpoints": "saved", "patience": "keeps the best"}
    assert expected.get(name, "weights") in differing
    if name in ("compile", "evaluation_rows", "checkpoint_every", "keep_checkpoints"):
        assert "weights" not in differing


def test_what_is_left_open_is_decided_by_hardware_and_length(monkeypatch):
    def chosen(num_steps, *, layout=FIXED, bf16=True, compiler=True, dtype=torch.float32):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: bf16)
        monkeypatch.setattr(module, "_has_cpp_compiler", lambda: compiler)
        config = TrainConfig(num_steps=num_steps, batch_size=100)
        found = with_choices(config, layout, num_steps, torch.device("cpu"), parameters_dtype=dtype)
        return found.precision == "bfloat16", found.compile

    long = 10**7 // 1000  # of 100 sequences with 10 tokens and one before them
    assert chosen(long) == (True, True)
    assert chosen(100) == (True, False)
    assert chosen(long, layout=OPEN) == (True, False)
    assert chosen(long, compiler=False) == (True, False)
    assert chosen(long, bf16=False) == (False, True)
    assert chosen(long, dtype=torch.float64) == (False, True)
    given = replace(SHORT, precision="float32")
    assert with_choices(given, FIXED, 10**9, torch.device("cpu"), parameters_dtype=torch.float32) == given


def test_compiled_training_takes_the_same_steps(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", replace(SHORT, num_steps=2), shape=PLAIN)
    # Traced whole, forward and backward; writing and compiling C++ for it would take half a minute.
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    compiled = run(tmp_path / "compiled", replace(SHORT, num_steps=2, compile=True), shape=PLAIN)
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), atol=1e-5, rtol=0)


# Stopping and going on


def in_process_of_its_own(name, directory):
    script = Path(__file__).with_name("training_runs.py")
    command = [sys.executable, str(script), name, str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            report, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            raise
    assert process.returncode == 0, report
    return report


@pytest.mark.slow  # processes that import torch
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    report = in_process_of_its_own("resume", tmp_path)
    assert "status -9" in report
    whole, killed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt")
    for name in whole:
        assert torch.equal(whole[name], killed[name]), (name, report)
    assert (tmp_path / "killed/curves.csv").read_text() == (tmp_path / "whole/curves.csv").read_text()


def test_two_processes_train_as_one_on_the_joined_batch(tmp_path):
    in_process_of_its_own("distributed", tmp_path)
    for layout in ("fixed", "open"):
        one, two = (torch.load(tmp_path / folder / layout / "final.pt") for folder in ("one", "two"))
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-7, rtol=0)
        for left, right in zip(rows_of(tmp_path / "one" / layout), rows_of(tmp_path / "two" / layout), strict=True):
            assert left["split"] == right["split"] and left["step"] == right["step"]
            assert float(left["nats_per_token"]) == pytest.approx(float(right["nats_per_token"]), rel=1e-6)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = run(tmp_path)
    curves = (tmp_path / "curves.csv").read_text()
    again = run(tmp_path, train=arrays(29, seed=5))
    assert torch.equal(weights_of(first), weights_of(again))
    assert (tmp_path / "curves.csv").read_text() == curves


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_checkpoint_holds_the_weights_that_are_returned(tmp_path, ema_decay):
    from safetensors.torch import load_file

    model = run(tmp_path, replace(SHORT, ema_decay=ema_decay))
    saved = load_file(latest_checkpoint(tmp_path / "checkpoints") / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], tensor)


def test_going_on_with_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        InputError,
        match=r"a run with other settings \(training.learning_rate is 0.001 there, 0.1 here\): resume it with the same",
    ):
        run(tmp_path, replace(SHORT, learning_rate=0.1))
    with pytest.raises(InputError, match=r"other settings \(data.num_rows is 29 there, 30 here\)"):
        run(tmp_path, train=arrays(30))
    with pytest.raises(InputError, match=r"holds a run already: resume it, or give a new folder"):
        run(tmp_path, resume=False)


# Errors


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"taken cannot be written: .*taken is a file, not a folder"):
        run(tmp_path / "taken")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    model = new_model(FIXED, PLAIN)
    torch.nn.init.constant_(model.head, math.inf)
    with pytest.raises(InputError, match=r"the loss of step 0 is nan: .* lower learning_rate"):
        run(tmp_path, shape=model)
    assert latest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_epochs is None and num_steps None; give one of them and not both"),
        (
            {"num_steps": 3, "num_epochs": 2},
            "num_epochs is 2 and num_steps 3; give one of them and not both: the other is null",
        ),
        ({"num_steps": 3, "schedule": "linear"}, "schedule 'linear' is unknown; choose one of constant, cosine"),
        ({"num_steps": 3, "batch_size": 0}, "batch_size is 0; it must be more than 0"),
        ({"num_steps": 3, "learning_rate": -1}, "learning_rate is -1; it must be more than 0"),
        ({"num_steps": 3, "warmup_steps": -1}, "warmup_steps is -1; it must be at least 0"),
        ({"num_steps": 3, "ema_decay": 1.0}, "ema_decay is 1.0; expected a number in [0, 1)"),
        ({"num_steps": 3, "betas": (0.9, 1.0)}, "betas is 1.0; expected a number in [0, 1)"),
        ({"num_steps": 3, "final_share": 1.5}, "final_share is 1.5; expected a share in [0, 1]"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings)
    assert message in str(error.value)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 6 is not divisible by 1 processes × 4 micro-batches; use 8"):
        run(tmp_path, replace(SHORT, num_micro_batches=4))


def test_a_layout_that_counts_nothing_is_refused(tmp_path):
    nothing = Layout.parse(VOCABULARY, {"one": "<bos> (text{3})"})
    with pytest.raises(ValueError, match=r"counts no position that has to be predicted"):
        run(tmp_path, layout=nothing)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="no rows to train on"):
        run(tmp_path, train=TokenArrays(np.zeros((0, 5), np.int64), np.zeros((0, 3), np.int64)))
    with pytest.raises(InputError, match="no rows to validate with"):
        run(tmp_path, validation=TokenArrays(np.zeros((0, 5), np.int64), np.zeros((0, 3), np.int64)))


def test_a_run_begun_with_rows_for_all_ids_goes_on_with_them(tmp_path):
    """And a smaller head learns what those rows learn: the others never get a gradient."""
    torch.manual_seed(SHORT.seed)
    whole = run(tmp_path / "whole", shape=new_model(FIXED, PLAIN, full_head=True))
    again = run(tmp_path / "whole", shape=PLAIN)
    assert again.config == whole.config and whole.config.head_ranges is None
    assert torch.equal(again.head, whole.head)
    smaller = run(tmp_path / "smaller", shape=PLAIN)
    rows = smaller.config.head_slot.token_ids(torch.arange(len(smaller.head)))
    assert smaller.config.head_ranges == FIXED.predicted.ranges and len(rows) < FIXED.vocabulary.size
    assert torch.allclose(smaller.head, whole.head[rows], rtol=0, atol=1e-5)
    for (name, found), (_, expected) in zip(smaller.named_parameters(), whole.named_parameters(), strict=True):
        assert name == "head" or torch.allclose(found, expected, rtol=0, atol=1e-5)
