"""Adafactor: of the squared gradients of a matrix only the means of rows and columns are kept (Shazeer & Stern 2018,
arXiv:1804.04235), here with Parti's settings (arXiv:2206.10789, §3): a first moment, kept in int8; a constant β₂;
decoupled weight decay; and the learning rate as it is given.

`torch.optim.Adafactor` has no first moment, a β₂ that rises towards 1, and multiplies the learning rate by the size of
the parameter. After one step from zeros, with those differences taken out, both agree, and a test says so.

Letters: R rows, C columns of a matrix.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

EPS = 1e-30
"""Added to squared gradients (their ε₁)."""
CLIP = 1.0
"""Root mean square to which an update is cut (their d)."""
LARGEST = 127


class Adafactor(torch.optim.Optimizer):
    """Memory for a matrix of R rows and C columns: R · C bytes and 2 R + C numbers, where Adam has 2 R · C numbers.

    Tensors of other than two dimensions have all their squares. Both moments are divided by 1 − βᵗ, as Adam's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                step = int(state.get("step", 0)) + 1
                state["step"] = step
                update = parameter.grad / _root(state, parameter.grad, beta2, step)
                update /= max(1.0, float(update.square().mean().sqrt()) / CLIP)
                if beta1:
                    update = _averaged(state, update, beta1, step)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _root(state: dict[str, Any], gradient: Tensor, beta2: float, step: int) -> Tensor:
    """The root of the running mean of squared gradients; of a matrix, of the product of its rows' and columns' means
    over the mean of all."""
    squares, correction = gradient.square().add_(EPS), 1 - beta2**step
    if gradient.ndim != 2:
        mean = state.setdefault("squares", torch.zeros_like(gradient)).lerp_(squares, 1 - beta2)
        return (mean / correction).sqrt_()
    rows = state.setdefault("rows", gradient.new_zeros(len(gradient))).lerp_(squares.mean(1), 1 - beta2)
    columns = state.setdefault("columns", gradient.new_zeros(gradient.shape[1])).lerp_(squares.mean(0), 1 - beta2)
    shares = (rows / rows.mean()).sqrt_()
    return torch.outer(shares, (columns / correction).sqrt_())


def _averaged(state: dict[str, Any], update: Tensor, beta1: float, step: int) -> Tensor:
    """The running mean of updates, kept in int8."""
    mean = update * (1 - beta1)
    if "moment" in state:
        mean += expanded(state["moment"], state["scales"]) * beta1
    state["moment"], state["scales"] = compressed(mean)
    return mean / (1 - beta1**step)


def compressed(values: Float[Tensor, "..."]) -> tuple[Int8[Tensor, "..."], Float[Tensor, "..."]]:
    """Whole numbers from −127 to 127, and the scale of each row (of each number's tensor, where it has no rows)."""
    dims = list(range(1, values.ndim)) or [0]
    scales = values.abs().amax(dims, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(values.dtype).tiny)
    return (values / scales).round_().to(torch.int8), scales


def expanded(moment: Int8[Tensor, "..."], scales: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return moment * scales
