"""The native training kernel: whatever the shape, it is the plain loss but for the rounding of its products."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import FIXED, OPEN, arrays

from smalti import native
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.loss import slot_nll
from smalti.precision import compute_precision
from smalti.processor import LEVELS, instruction_set, multiplies_bfloat16
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.training import token_model as module
from smalti.training.native_loss import make_native_loss, why_not
from smalti.training.token_model import TrainConfig, make_loss, make_micro_batch, pack_rows, train_model, with_choices

pytestmark = pytest.mark.usefixtures("native_kernels")

CPU = torch.device("cpu")
SHAPE = TransformerConfig(num_layers=2, d_model=64, num_heads=2, d_ff=96, max_length=12)
LLAMA = replace(SHAPE, norm="rms", feed_forward="swiglu", bias=False, positions="rotary")
KINDS = {
    "gpt": SHAPE,
    "llama": LLAMA,
    "grouped keys": replace(LLAMA, d_model=128, num_heads=8, num_kv_heads=2),
    "narrow heads": replace(SHAPE, d_model=96, num_heads=4, feed_forward="gelu_tanh"),
    "grid": replace(LLAMA, positions="rotary_2d", grid=(3, 4), prefix_length=0),
    "no layers but one": replace(SHAPE, num_layers=1, feed_forward="relu", positions="sinusoidal"),
    "no positions": replace(SHAPE, feed_forward="tanh", positions="none"),
}


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request):
    if request.param == "bfloat16" and not multiplies_bfloat16():
        pytest.skip("the processor has no bfloat16 products")
    return request.param


def native_loss(model, precision="float32"):
    loss = make_native_loss(model, precision)
    assert loss is not None
    return loss


def model_of(shape, layout=FIXED, **options):
    """With weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = new_model(layout, shape, **options).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(layout=FIXED, num_rows=7, *, full_softmax=False):
    orders = np.arange(num_rows) % len(layout.orders)
    return make_micro_batch(
        layout, pack_rows(layout, arrays(num_rows), np.arange(num_rows), np.sort(orders)), full_softmax=full_softmax
    )


def gradients(model, nats, weights):
    model.zero_grad()
    (nats * weights.to(nats.dtype)).sum().backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def compare(model, layout, batch, precision):
    """The kernel is as near to float64 as torch is in this precision, in every gradient and all losses, with any weight
    on a loss."""
    loss = native_loss(model, precision)
    weights = torch.rand(len(batch.parts), generator=torch.Generator().manual_seed(1)) / len(batch.parts)
    exact = deepcopy(model).double()
    nats = {"exact": slot_nll(exact, batch.token_ids, batch.targets, layout.slots)}
    found = {"exact": gradients(exact, nats["exact"], weights)}
    with compute_precision(CPU, precision):
        nats["torch"] = slot_nll(model, batch.token_ids, batch.targets, layout.slots)
    found["torch"] = gradients(model, nats["torch"], weights)
    nats["native"] = loss(batch.token_ids, batch.targets, layout.slots)
    found["native"] = gradients(model, nats["native"], weights)

    def error(kind, name=None):
        value, expected = (nats[k].detach() if name is None else found[k][name] for k in (kind, "exact"))
        return float((value - expected).norm() / expected.norm())

    least = {"float32": 2e-6, "bfloat16": 5e-3}[precision]  # 2e-6: a few roundings of float32
    assert error("native") < max(1.5 * error("torch"), least)
    for name in found["exact"]:
        assert error("native", name) < max(2 * error("torch", name), least), name


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_plain_path(kind, precision):
    compare(model_of(KINDS[kind]), FIXED, batch_of(), precision)


@pytest.mark.parametrize("full_softmax", [False, True])
@pytest.mark.parametrize("layout", [FIXED, OPEN], ids=["fixed", "ragged and partly counted"])
def test_every_slot_and_length_is_covered(layout, full_softmax, precision):
    model = model_of(SHAPE, layout, full_head=full_softmax)
    compare(model, layout, batch_of(layout, 11, full_softmax=full_softmax), precision)
    if not full_softmax:
        whole = batch_of(layout, 3, full_softmax=True)
        with pytest.raises(ValueError, match=r"\(full_softmax\) needs a head with rows for all ids"):
            native_loss(model, precision)(whole.token_ids, whole.targets, layout.slots)


def test_tied_embeddings_get_both_gradients(precision):
    compare(model_of(SHAPE, tie_embeddings=True), FIXED, batch_of(), precision)


def test_sequences_longer_than_one_block_and_several_groups(precision):
    layout = Layout.parse(Vocabulary({"special": ["<bos>"], "image": 50}), {"one": "<bos> image{70}"})
    generator = np.random.default_rng(0)
    pairs = module.TokenArrays(generator.integers(0, 50, (9, 70)), np.zeros((9, 0), dtype=np.int64))
    batch = make_micro_batch(
        layout, pack_rows(layout, pairs, np.arange(9), np.zeros(9, dtype=np.int64)), full_softmax=False
    )
    compare(model_of(replace(SHAPE, max_length=71), layout), layout, batch, precision)


def test_processors_without_tiles_compute_the_same(monkeypatch):
    if not multiplies_bfloat16():
        pytest.skip("the processor has no bfloat16 products")
    model, batch = model_of(SHAPE), batch_of()
    found = []
    for compiler in (native._compiler(), [*(native._compiler() or []), "-mno-amx-bf16"]):
        monkeypatch.setenv("CXX", " ".join(compiler or []))
        monkeypatch.setattr(native, "_loaded", {})
        nats = native_loss(model, "bfloat16")(batch.token_ids, batch.targets, FIXED.slots)
        found.append({"nats": nats.detach(), **gradients(model, nats, torch.ones(len(nats)))})
    for name, expected in found[0].items():  # sums in another order, so now and then another rounding
        assert float((found[1][name] - expected).norm() / expected.norm()) < 5e-3, name


def test_results_are_the_same_bits_for_any_number_of_threads(precision):
    model, batch = model_of(SHAPE), batch_of(num_rows=61)
    loss, found, before = native_loss(model, precision), [], torch.get_num_threads()
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        try:
            nats = loss(batch.token_ids, batch.targets, FIXED.slots)
            found.append((nats.detach(), gradients(model, nats, torch.ones(len(nats)))))
        finally:
            torch.set_num_threads(before)
    for nats, gradient in found[1:]:
        assert torch.equal(nats, found[0][0])
        assert all(torch.equal(gradient[name], found[0][1][name]) for name in gradient)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_older_processors_compute_the_same_within_rounding(isa, monkeypatch):
    """Vectors of other widths; all of it for a processor that this one can stand for."""
    if instruction_set() not in LEVELS or LEVELS.index(instruction_set()) < LEVELS.index(isa):
        pytest.skip(f"the processor has no {isa}")
    model, batch, found = model_of(LLAMA), batch_of(num_rows=21), []
    for asked in (instruction_set(), isa):
        monkeypatch.setenv("SMALTI_ISA", asked)
        monkeypatch.setattr(native, "_loaded", {})
        nats = native_loss(model)(batch.token_ids, batch.targets, FIXED.slots)
        found.append({"nats": nats.detach(), **gradients(model, nats, torch.ones(len(nats)))})
    for name, expected in found[0].items():
        assert float((found[1][name] - expected).norm() / expected.norm()) < 2e-6, name


def test_gradients_of_micro_batches_add_up_in_any_order(precision):
    model, batches = model_of(SHAPE), [batch_of(num_rows=n) for n in (4, 7)]
    loss = native_loss(model, precision)
    alone = [
        gradients(model, n, torch.ones(len(n))) for n in (loss(b.token_ids, b.targets, FIXED.slots) for b in batches)
    ]
    model.zero_grad()
    first, second = (loss(b.token_ids, b.targets, FIXED.slots).sum() for b in batches)  # both are open at a time
    first.backward()
    second.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), alone[0][name] + alone[1][name])


def test_hooks_of_parameters_see_their_gradients():
    """DistributedDataParallel exchanges gradients from such hooks."""
    model, batch, seen = model_of(SHAPE), batch_of(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    native_loss(model)(batch.token_ids, batch.targets, FIXED.slots).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_gradients_can_be_taken_once():
    batch = batch_of()
    nats = native_loss(model_of(SHAPE))(batch.token_ids, batch.targets, FIXED.slots).sum()
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError):  # autograd's own
        nats.backward()


def test_dropout_follows_the_seed_and_ends_with_training():
    model, batch = model_of(replace(SHAPE, dropout=0.25)), batch_of(num_rows=40)
    loss = native_loss(model)

    def nats(seed):
        torch.manual_seed(seed)
        return loss(batch.token_ids, batch.targets, FIXED.slots).detach()

    assert torch.equal(nats(1), nats(1)) and not torch.equal(nats(1), nats(2))
    model.eval()
    assert torch.equal(nats(1), nats(2))


def test_dropout_takes_its_share():
    model = model_of(replace(SHAPE, num_layers=1, dropout=0.25))
    with torch.no_grad():  # what the layers add is nothing: a position's gradient is 0 where it was dropped
        for name in ("attention.out", "feed_forward.down"):
            linear = model.get_submodule(f"transformer.blocks.0.{name}")
            linear.weight.zero_()
            linear.bias.zero_()
    batch = batch_of(num_rows=1)
    native_loss(model)(batch.token_ids, batch.targets, FIXED.slots).sum().backward()
    gradient = model.transformer.positions.weight.grad
    gradient = gradient[gradient.any(dim=1)]  # where something was predicted: 9 positions of 64 numbers
    assert len(gradient) == 9
    assert float((gradient == 0).double().mean()) == pytest.approx(0.25, abs=0.06)


def test_the_gradient_under_dropout_is_the_slope_of_the_loss(precision):
    model, batch = model_of(replace(SHAPE, dropout=0.25)), batch_of(num_rows=20)
    loss = native_loss(model, precision)

    def total(seed=5):
        torch.manual_seed(seed)
        return loss(batch.token_ids, batch.targets, FIXED.slots).sum()

    total().backward()
    for name in ("embed_tokens", "transformer.blocks.0.attention.out", "transformer.blocks.1.feed_forward.down"):
        weight = model.get_submodule(name).weight
        direction = weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight.add_(direction, alpha=0.1)
            above = total()
            weight.sub_(direction, alpha=0.2)
            below = total()
            weight.add_(direction, alpha=0.1)
        assert float(above - below) / 0.2 == pytest.approx(float(weight.grad.norm()), rel=0.05), name


def test_numbers_that_are_not_finite_are_not_hidden(precision):
    model, batch = model_of(SHAPE), batch_of()
    with torch.no_grad():
        model.transformer.blocks[0].feed_forward.up.weight.fill_(float("nan"))
    assert native_loss(model, precision)(batch.token_ids, batch.targets, FIXED.slots).isnan().all()


@pytest.mark.parametrize(
    "shape, reason",
    [
        (replace(SHAPE, d_model=48), "d_model 48"),
        (replace(SHAPE, attention_dropout=0.1), "dropout"),
        (replace(SHAPE, qk_norm=True), "normed"),
        (replace(SHAPE, head_width=2 * SHAPE.head_dim), "not as wide as d_model"),
        (replace(SHAPE, max_length=1000), "longer"),
    ],
)
def test_what_is_not_covered_is_named_and_left_to_torch(shape, reason):
    model = new_model(FIXED, shape)
    assert reason in (why_not(model) or "")
    assert make_native_loss(model) is None
    assert "float32" in (why_not(new_model(FIXED, SHAPE).double()) or "")


def test_length_and_precision_alone_decide_so_that_a_run_goes_on_as_it_began(caplog, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss: loss)
    model = model_of(SHAPE)
    native_loss(model)

    def path(num_steps, **settings):
        asked = TrainConfig(num_steps=num_steps, batch_size=100, **settings)
        chosen = with_choices(asked, FIXED, num_steps, CPU, parameters_dtype=torch.float32)
        caplog.clear()
        with caplog.at_level("INFO", logger=module.__name__):
            made = make_loss(model, FIXED, asked, chosen, num_steps)
        assert len(caplog.messages) == 1
        return made.native is not None, caplog.messages[0]

    assert path(10**6, precision="float32") == (True, "training by the native kernel in float32")
    assert not path(10)[0]
    if multiplies_bfloat16():
        assert path(10**6) == (True, "training by the native kernel in bfloat16")
    assert path(10**6, compile=True, precision="float32")[1] == "training by torch.compile in float32"


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(tmp_path, monkeypatch):
    native_loss(model_of(SHAPE))
    monkeypatch.setattr(module, "NATIVE_FROM_TOKENS", 0)
    config = TrainConfig(
        num_steps=6, batch_size=6, num_micro_batches=2, checkpoint_every=2, precision="float32", compile=False
    )
    shape = replace(SHAPE, dropout=0.1)

    def run(directory):
        return train_model(shape, FIXED, arrays(29), arrays(5, seed=1), config, directory, show_progress=False)

    whole = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    rows, reads = arrays(29), []

    class Stopping(module.TokenArrays):
        def batch(self, chosen):
            reads.append(1)
            if len(reads) > 8:
                raise Stop
            return rows.batch(chosen)

    stopping = Stopping(rows.image_tokens, rows.text_tokens)
    with pytest.raises(Stop):
        train_model(shape, FIXED, stopping, arrays(5, seed=1), config, tmp_path / "cut", show_progress=False)
    again = run(tmp_path / "cut")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
