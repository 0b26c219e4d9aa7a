"""Plans: published sizes, formulas worked by hand, memory that a real step takes, and layouts that follow from both."""

import json
from dataclasses import replace

import pytest
import torch

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.models.config import TransformerConfig
from smalti.planning import probe
from smalti.planning.footprint import Task, example, footprint, make_model
from smalti.planning.gpus import GPUS, TRAINING_EFFICIENCY, find_gpu
from smalti.planning.layouts import Footprints, choose_layout
from smalti.planning.plan import cache_bytes_per_row, make_plan
from smalti.planning.subjects import Assumed, find_subject
from smalti.recipes import shipped_recipes
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.training.token_model import TrainConfig

LAYOUT = Layout.parse(Vocabulary({"image": 96, "label": 11}), {"class": "label{1} image{36}"})
SHAPE = TransformerConfig(
    num_layers=5, d_model=48, num_heads=4, d_ff=80, max_length=37, norm="rms", feed_forward="swiglu", bias=False,
    positions="rotary",
)  # fmt: skip
SMALL = Task(SHAPE, LAYOUT, TrainConfig(num_steps=10, batch_size=8))


def plain_numbers(layers: int = 5) -> tuple[int, int]:
    """Parameters in a layer, and products of a sequence's forward and backward pass, by hand."""
    D, F, T = 48, 80, 36  # what predicts a code: label and 35 codes
    block = 4 * D * D + 3 * D * F
    attention = 2 * 2 * T * T * D  # scores and values, all T × T of them
    forward = T * layers * 2 * block + layers * attention + T * 2 * D * 96  # the head has rows for codes alone
    backward = 2 * (T * layers * 2 * block + T * 2 * D * 96) + layers * attention * 5 // 2
    return block + 2 * D, forward + backward


def test_products_and_parameters_are_those_worked_by_hand():
    block, flops = plain_numbers()
    found = footprint(SMALL, 3, precision="float32")
    whole = 5 * block + 48 + 107 * 48 + 96 * 48
    assert found.num_parameters == whole and found.block_parameters == block and found.in_blocks == 5 * block
    assert found.flops == pytest.approx(3 * flops, rel=1e-12)
    assert found.weights_bytes == pytest.approx(4 * whole, rel=0.05) and found.gradients_bytes == 4 * whole
    assert 8 * whole <= found.optimizer_bytes < 8 * whole + 100_000  # and what the step has not let go of


def test_a_deep_model_is_the_sum_of_its_layers():
    """Two depths in place of all: what a run of the whole model finds."""
    deep = footprint(SMALL, 2, precision="float32")
    whole = footprint(SMALL._replace(shape=replace(SHAPE, num_layers=3)), 2, precision="float32")
    shallow = footprint(SMALL._replace(shape=replace(SHAPE, num_layers=2)), 2, precision="float32")
    assert deep.flops == pytest.approx(whole.flops + 2 * (whole.flops - shallow.flops))
    assert deep.activations_bytes == pytest.approx(
        whole.activations_bytes + 2 * (whole.activations_bytes - shallow.activations_bytes)
    )


def test_recomputed_activations_are_a_layers_input():
    """With so many rows that they outweigh a layer's gradients."""
    B, T, D = 64, 36, 48
    three = SMALL._replace(shape=replace(SHAPE, num_layers=3))
    kept, again = (footprint(three, B, precision="float32", recompute=on) for on in (False, True))
    fewer = footprint(SMALL._replace(shape=replace(SHAPE, num_layers=2)), B, precision="float32", recompute=True)
    one_more = again.activations_bytes - fewer.activations_bytes
    gradients = 4 * plain_numbers()[0]
    assert 4 * B * T * D - gradients <= one_more <= 4 * B * T * D
    assert again.activations_bytes < 0.5 * kept.activations_bytes


def test_activations_are_what_autograd_keeps():
    """Beside it: the storages that a real step saves for its backward pass."""
    piece, model = example(SMALL, 4), make_model(SMALL).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype.is_floating_point:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    from smalti.models.loss import slot_nll

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll = slot_nll(model, piece.token_ids, piece.targets, LAYOUT.slots)
    nll.sum().backward()
    found = footprint(SMALL, 4, precision="float32").activations_bytes
    assert sum(saved.values()) < found < 1.6 * sum(saved.values())


@pytest.mark.parametrize(("name", "parameters"), [("llamagen-b", 110_888_448), ("parti-350m", 385_809_408)])
def test_presets_have_their_published_sizes(name, parameters):
    subject = find_subject(name)
    found = footprint(subject.task, 1, precision="float32", sharded=True)
    assert round(found.num_parameters) == parameters
    length = subject.task.layout.max_length
    # Six products a parameter and token, and attention; an encoder reads captions alone.
    assert 0.4 < found.flops / length / (6 * parameters) < 1.3


def test_a_large_model_is_laid_out_in_shares_and_a_small_one_is_not():
    """LlamaGen-3B's width and depth are those of its preset; counted once, in two shallow runs."""
    subject = find_subject("llamagen-3b", ["batch_size=64"])
    h100, footprints = find_gpu("h100"), Footprints(subject.task, "bfloat16")
    one, why = choose_layout(subject.task, h100, 1, footprints)
    assert one is not None and one.sharding == "none" and one.memory.total < h100.memory_bytes
    small = replace(h100, memory_bytes=24e9)
    none, why = choose_layout(subject.task, small, 1, footprints)
    assert none is None and "all weights on every device needs" in why[0] and "22 are free" in why[0]
    shared, why = choose_layout(subject.task, small, 8, footprints)
    assert shared is not None and shared.sharding == "full" and "train.sharding=full" in shared.settings
    assert any("needs" in reason for reason in why)
    state = shared.memory.weights + shared.memory.gradients + shared.memory.optimizer
    assert state == pytest.approx(16 * 3_096_659_200 / 8, rel=0.02)
    flops = footprints(sharded=True, tensor_parallel=1, recompute=False).flops * 64
    least_s = flops / 8 / h100.bfloat16_flops / TRAINING_EFFICIENCY
    assert shared.step_s >= least_s * 0.999
    odd, why = choose_layout(subject.task, h100, 3, footprints)
    assert odd is None and "a batch of 64 is not divisible by 3" in why[0]


def test_a_cache_row_is_keys_and_values():
    task = find_subject("llamagen-b").task
    assert cache_bytes_per_row(task) == 2 * 12 * 768 * 2 * 320  # 257 tokens in whole blocks of 64


def test_every_gpu_names_its_source():
    assert all(gpu.source and gpu.memory_bytes_per_s < gpu.bfloat16_flops for gpu in GPUS.values())


def test_a_plan_of_a_recipe_measures_here_and_counts_there(monkeypatch):
    monkeypatch.setattr("smalti.planning.probe.PROBE_S", 0.5)
    subject = find_subject("c2i", ["train.batch_size=4"], Assumed(num_rows=100))
    made = make_plan(subject, gpus=[find_gpu("h100")], device_counts=[1], price=2.0)
    assert made.num_steps == 3000 and made.here is not None and made.here.step_s > 0
    assert made.here.days == pytest.approx(3000 * made.here.step_s / 86_400)
    assert made.here.peak_bytes >= sum(made.here.memory[part] for part in ("weights", "optimizer", "average"))
    [first] = made.gpus
    assert first.cost == pytest.approx(2.0 * first.days * 24) and first.num_devices == 1
    assert {drawn.device.split(",")[0] for drawn in made.drawing} == {"cpu", "NVIDIA H100 SXM 80GB"}
    json.dumps(made.to_dict())


def test_a_probe_steps_as_the_training_will(monkeypatch):
    """Recomputing, in micro-batches, with an average: each is a part of a step's time."""
    seen = []

    def step(state, loss, pieces, *_):
        seen.append((state.model.transformer.recomputes, len(pieces), state.averaged is not None))

    monkeypatch.setattr(probe, "train_step", step)
    train = replace(SMALL.train, batch_size=4, num_micro_batches=2, recompute=True, ema_decay=0.9, compile=False)
    probe.probe_training(SMALL._replace(train=train), 10, torch.device("cpu"))
    assert seen and set(seen) == {(True, 2, True)}


def test_a_second_micro_batch_begins_with_all_gradients():
    """The logits are most of what it holds, and at their gradient none of the first one's has gone."""
    shape, train = replace(SHAPE, num_layers=2), replace(SMALL.train, evaluation_rows=1)
    one, two = (
        footprint(SMALL._replace(shape=shape, train=replace(train, num_micro_batches=number)), 16, precision="float32")
        for number in (1, 2)
    )
    assert two.peak_bytes == pytest.approx(two.state_bytes + two.activations_bytes)
    assert one.activations_bytes == two.activations_bytes and one.peak_bytes < two.peak_bytes
    assert one.state_bytes == two.state_bytes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_has_a_subject_or_says_why_not(name):
    settings = ["data=photos"] if name == "t2i" else []
    try:
        subject = find_subject(name, settings, Assumed())
    except InputError as error:
        assert "alone; a plan is for trainings of transformers" in str(error)
        return
    task = subject.task
    with torch.device("meta"):
        model = make_model(task)
    assert model.num_parameters > 0 and task.layout.max_length <= 10_000
    if name.startswith("scenes"):
        assert subject.num_rows == 100_000 and subject.is_guided


def test_the_command_prints_a_plan(capsys):
    assert run(["plan", "llamagen-b", "--no-measure", "--devices", "1", "--gpu", "h200", "--price", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == 110_888_448 and found["gpus"][0]["gpu"] == "NVIDIA H200 SXM 141GB"
    assert found["gpus"][0]["cost"] > 0 and found["here"] is None
    assert run(["plan", "rar-none", "--no-measure"]) == 2
    assert run(["plan", "vqgan", "--no-measure"]) == 2
    assert "trains an image tokenizer alone" in capsys.readouterr().err
    assert run(["plan", "llamagen-b", "--devices", "none"]) == 2 and run(["plan", "llamagen-b", "--gpu", "tpu"]) == 2
    assert run(["plan", "llamagen-b", "train.epochs=3"]) == 2
