"""Muon: against singular values, against torch's own, and in the training loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_runs import FIXED, SHAPE, arrays

from smalti.errors import InputError
from smalti.models.decoder_only import new_model
from smalti.training import run
from smalti.training.checkpoint import latest_checkpoint, load_checkpoint, load_run
from smalti.training.curves import Curves
from smalti.training.muon import Muon, orthogonalise
from smalti.training.token_model import TrainConfig, make_optimizer, train_model


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Curves, "draw", lambda self: None)


RUN = TrainConfig(
    num_steps=5, batch_size=6, precision="float32", compile=False, optimizer="muon", weight_decay=0.1, ema_decay=0.9
)


def by_singular_values(matrix):
    """U p(S / ‖S‖) Vᵀ, the polynomial applied five times to the singular values themselves, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v, s


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (5, 5)])
def test_orthogonalising_changes_the_singular_values_alone(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for matrix, found in zip(matrices, orthogonalise(matrices), strict=True):
        expected, singular_values = by_singular_values(matrix)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
        assert singular_values.min() > 0.6 and singular_values.max() < 1.3  # so it is near U Vᵀ


def test_no_gradient_means_no_move():
    assert torch.equal(orthogonalise(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_two_steps_worked_out_by_singular_values():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7, 2), (3, 5))]
    expected = [weight.detach().double() for weight in weights]
    averages = [torch.zeros_like(weight) for weight in expected]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.3, momentum=0.8)
    for _ in range(2):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            gradient = weight.grad.double()
            averages[i] = 0.8 * averages[i] + 0.2 * gradient
            update, _ = by_singular_values(0.2 * gradient + 0.8 * averages[i])
            scale = 0.2 * max(weight.shape) ** 0.5
            expected[i] = (1 - 0.1 * 0.3) * expected[i] - 0.1 * scale * update
        optimizer.step()
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_it_is_torchs_muon_but_for_its_rounding_to_bfloat16():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6, 4))] for _ in range(2))
    settings: Any = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01)  # entries moved by some 0.06


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"not a parameter of shape \(3,\); give that to AdamW"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1)


def test_the_matrices_of_the_blocks_are_muons_and_all_else_adamws():
    model = new_model(FIXED, SHAPE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, RUN, torch.device("cpu")).param_groups
    matrices, decayed, plain = ([names[parameter] for parameter in group["params"]] for group in groups)
    inner = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    assert sorted(matrices) == sorted(f"transformer.blocks.{i}.{name}.weight" for i in range(2) for name in inner)
    assert set(decayed) == {"embed_tokens.weight", "transformer.positions.weight", "head"}
    assert len(matrices) + len(decayed) + len(plain) == len(names)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert {group["lr"] for group in groups} == {RUN.learning_rate}


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    class Stops(type(arrays(1))):
        reads_left = 7

        def batch(self, rows):
            Stops.reads_left -= 1
            if Stops.reads_left < 0:
                raise KeyboardInterrupt
            return super().batch(rows)

    train, validation, config = arrays(29), arrays(5, seed=1), replace(RUN, checkpoint_every=2)

    def run(folder, pairs):
        model = train_model(SHAPE, FIXED, pairs, validation, config, tmp_path / folder, show_progress=False)
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    whole = run("whole", train)
    with pytest.raises(KeyboardInterrupt):
        run("cut", Stops(train.image_tokens, train.text_tokens))
    found = latest_checkpoint(tmp_path / "cut/checkpoints")
    assert found is not None and load_checkpoint(found).step == 2
    assert torch.equal(run("cut", train), whole)


def test_runs_from_before_there_was_a_choice_go_on_with_adamw_alone(tmp_path, monkeypatch):
    train, validation, adamw = arrays(29), arrays(5, seed=1), replace(RUN, optimizer="adamw")
    train_model(SHAPE, FIXED, train, validation, adamw, tmp_path, show_progress=False)
    begun = load_run(sorted((tmp_path / "checkpoints").glob("step_*"))[-1])
    del begun["training"]["optimizer"]
    monkeypatch.setattr(run, "load_run", lambda path: begun)
    train_model(SHAPE, FIXED, train, validation, adamw, tmp_path, show_progress=False)
    with pytest.raises(InputError, match=r"other settings \(training.optimizer is None there, muon here\)"):
        train_model(SHAPE, FIXED, train, validation, RUN, tmp_path, show_progress=False)
