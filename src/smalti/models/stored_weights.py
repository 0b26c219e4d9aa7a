"""Weights stored in fewer bits than they are computed with: half or a quarter of the memory, and of the time to read.

The matrices of the blocks and the head are stored; embeddings, norms and biases, a small part, stay in float32, and so
do all activations and sums. bfloat16 rounds each weight by at most 1/256 of it; int8 is a whole number from −127 to
127 and a scale of its output's own, so that it is off by at most 1/254 of the output's largest weight.

Letters: n outputs, k inputs of a matrix.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STORAGES = ("float32", "bfloat16", "int8")
LARGEST = 127


class StoredWeight(nn.Module):
    """A matrix of weights as it is stored."""

    scales: Float[Tensor, " n"] | None

    def __init__(self, weight: Float[Tensor, "n k"], storage: str):
        super().__init__()
        weight = weight.detach().float()
        scales = None
        if storage == "int8":
            scales = weight.abs().amax(1) / LARGEST
            scales[scales == 0] = 1
            values = (weight / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        else:
            values = weight.to(torch.bfloat16)
        self.storage = storage
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def expanded(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows k"]:
        """Some outputs' weights as numbers to compute with."""
        weight = self.values[rows].to(dtype)
        return weight if self.scales is None else weight * self.scales[rows, None].to(dtype)


class StoredLinear(nn.Module):
    """`nn.Linear` with a stored weight, which is expanded at each use."""

    def __init__(self, linear: nn.Linear, storage: str):
        super().__init__()
        self.stored = StoredWeight(linear.weight, storage)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        return F.linear(x, self.stored.expanded(dtype=x.dtype), self.bias)


def storage_of(model: nn.Module) -> str:
    """How a model's matrices are stored, one of STORAGES."""
    stored = [module.storage for module in model.modules() if isinstance(module, StoredWeight)]
    return stored[0] if stored else "float32"


def check_storable(model: nn.Module, dtype: torch.dtype, storage: str) -> None:
    """Raises ValueError unless `storage` is one of STORAGES, and the weights, computed with as `dtype`, are float32 and
    not stored in fewer bits yet."""
    if storage not in STORAGES:
        raise ValueError(f"weights {storage!r} is unknown; choose one of {', '.join(STORAGES)}.")
    if (found := storage_of(model)) != "float32" or dtype != torch.float32:
        raise ValueError(
            f"the weights are {dtype if found == 'float32' else found}; only those of float32 can be stored as "
            f"{storage}."
        )


def store_linears(blocks: nn.Module, storage: str) -> None:
    """Replaces every `nn.Linear` within by one with a stored weight."""
    for module in blocks.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, StoredLinear(child, storage))
