"""Muon: a matrix moves by its momentum made orthogonal, so that no direction of it is left behind (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon). For the matrices between layers; embeddings, heads, norms and biases are
AdamW's, beside it.

`torch.optim.Muon` computes in bfloat16, which most processors only emulate, and takes one matrix at a time. Here it is
float32, matrices of a shape together.

Letters: M matrices of one shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that is iterated on the singular values: steepest at 0, with values from 0.7 to 1.2 for
singular values from 0.01 to 1 after five iterations (Jordan)."""
ADAM_RMS = 0.2
"""Root mean square of what Adam moves an entry by at the learning rate 1; Muon is scaled to it, so that both take one
learning rate (arXiv:2502.16982, §2.2)."""


def orthogonalise(matrices: Float[Tensor, "M R C"]) -> Float[Tensor, "M R C"]:
    """About U Vᵀ of each matrix U S Vᵀ: Newton–Schulz iterations, which leave singular values near 1."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix costs less
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is at most this norm
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices alone; weight decay is AdamW's. Raises ValueError for a parameter that is no matrix."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if odd := [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim != 2]:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {odd[0]}; give that to AdamW.")

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = orthogonalise(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                rate = group["lr"] * ADAM_RMS * max(rows, columns) ** 0.5  # U Vᵀ has a mean square of 1 / max(R, C)
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, parameter: Tensor, share: float) -> Tensor:
        """Nesterov's: the average of the gradients so far, moved once more towards the newest."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        average = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(gradient, 1 - share)
        return gradient.lerp(average, share)


class Optimizers:
    """Several optimizers, each with parameters of its own, stepped as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(index)])
