"""Adafactor against torch's where both agree, against sums written out, and with its first moment in bytes."""

import math

import pytest
import torch

from smalti.training.adafactor import Adafactor, compressed, expanded
from smalti.training.token_model import TrainConfig, learning_rate

SHAPES = ((5, 7), (11,))


def parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_is_torchs(shape):
    """But for the size of the parameter, by which torch multiplies its learning rate."""
    ours, theirs = parameter(shape), parameter(shape)
    size = float(ours.detach().square().mean().sqrt())
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    before = ours.detach().clone()
    Adafactor([ours], lr=0.01, betas=(0.0, 0.96)).step()
    torch.optim.Adafactor([theirs], lr=0.01, eps=(1e-30, 1e-3)).step()
    assert torch.allclose((ours - before) * size, theirs - before, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_the_formula_written_out(shape):
    one = parameter(shape)
    optimizer = Adafactor([one], lr=0.02, betas=(0.9, 0.96), weight_decay=0.1)
    expected, generator = one.detach().clone(), torch.Generator().manual_seed(2)
    rows = columns = squares = moment = 0.0
    for step in range(1, 6):
        one.grad = gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        power = gradient**2 + 1e-30
        if len(shape) == 2:
            rows = 0.96 * rows + 0.04 * power.mean(1)
            columns = 0.96 * columns + 0.04 * power.mean(0)
            mean = rows[:, None] * columns[None] / rows.mean()
        else:
            mean = squares = 0.96 * squares + 0.04 * power
        update = gradient / (mean / (1 - 0.96**step)).sqrt()
        update /= max(1.0, float((update**2).mean().sqrt()))
        moment = 0.9 * moment + 0.1 * update
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * moment / (1 - 0.9**step)
    # the moment is kept in 127 steps either way: off by no more than their sum
    assert torch.allclose(one, expected, atol=5 * 0.02 / 127)
    assert not torch.equal(one, expected)


def test_the_first_moment_takes_a_byte_a_number():
    values = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 3, 6)[:, None]
    moment, scales = compressed(values)
    assert moment.dtype == torch.int8 and scales.shape == (6, 1)
    assert bool(((expanded(moment, scales) - values).abs() <= 0.501 * scales).all())
    assert not compressed(torch.zeros(3, 4))[0].any()
    one = parameter((6, 50))
    one.grad = torch.ones_like(one)
    optimizer = Adafactor([one], lr=0.1)
    optimizer.step()
    state = optimizer.state[one]
    held = sum(value.numel() * value.itemsize for value in state.values() if isinstance(value, torch.Tensor))
    assert held == 6 * 50 + (6 + 50 + 6) * 8


def test_going_on_from_a_saved_state_is_never_having_stopped():
    def run(steps: range, one: torch.nn.Parameter, optimizer: Adafactor) -> None:
        for step in steps:
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step)).to(one)
            optimizer.step()

    whole, first, second = (torch.nn.Parameter(parameter((5, 7)).detach().float()) for _ in range(3))
    optimizer = Adafactor([whole], lr=0.1)
    run(range(6), whole, optimizer)
    optimizer = Adafactor([first], lr=0.1)
    run(range(3), first, optimizer)
    second.data.copy_(first.data)
    resumed = Adafactor([second], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    run(range(3, 6), second, resumed)
    assert torch.equal(second, whole)


def test_the_schedule_is_the_papers():
    """Parti, §3: 5,000 updates of warm-up to 4.5e-5, constant to 85,000, then lr(t) = 4.5e-5 · 0.025^((t − 85,000) /
    365,000)."""
    config = TrainConfig(
        num_steps=450_000,
        learning_rate=4.5e-5,
        schedule="exponential",
        warmup_steps=5000,
        decay_from=85 / 450,
        final_share=0.025,
    )
    found = {step: learning_rate(step, 450_000, config) for step in (0, 2499, 5000, 84_999, 85_000, 267_500, 450_000)}
    assert found[0] == pytest.approx(4.5e-5 / 5000) and found[2499] == pytest.approx(4.5e-5 / 2)
    assert found[5000] == found[84_999] == 4.5e-5 and found[85_000] == pytest.approx(4.5e-5)
    assert found[267_500] == pytest.approx(4.5e-5 * math.sqrt(0.025))
    assert found[450_000] == pytest.approx(1.125e-6)
