"""A training whose weights, gradients and optimizer lie in shares on several devices: FSDP2, and tensor parallel.

With `fully_shard` every process holds a share of each tensor and gathers a layer's weights while it computes it. With
tensor parallel, beside that, a group of processes computes each layer together: every one has some heads and a part of
the feed-forward. Both work on whatever is made of `Attention`, `CrossAttention` and `FeedForward`, so on all families.

Projections that are fused (queries, keys and values in one matrix; gate and up in one) are taken apart first: a share
of the fused matrix would hold no whole heads. Names of tensors then depend on neither number of processes, so that
checkpoints of shares (`checkpoint.py`) are read by any other number; `split` and `join` translate from and to the names
of a plain model.

Imported where a training has shares: torch's part of it takes two seconds.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from smalti.models.transformer import Attention, CrossAttention, FeedForward
from smalti.precision import BFLOAT16, FLOAT32
from smalti.training.distributed import DATA, TENSOR, Processes, blocks_of

_log = logging.getLogger("torch.distributed.tensor._redistribute")


class SplitLinear(nn.Module):
    """A linear layer whose output is that of several, side by side."""

    def __init__(self, linear: nn.Linear, sizes: Mapping[str, int]):
        super().__init__()
        weights = linear.weight.split(list(sizes.values()))
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(list(sizes.values()))
        for name, weight, bias in zip(sizes, weights, biases, strict=True):
            part = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.weight.requires_grad)
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def _fused(module: nn.Module) -> tuple[str, dict[str, int]] | None:
    """The fused projection of a module, with the sizes of what is in it."""
    if isinstance(module, Attention):
        config = module.config
        return "qkv", {"q": config.q_width, "k": config.kv_width, "v": config.kv_width}
    if isinstance(module, CrossAttention):
        return "kv", {"k": module.config.q_width, "v": module.config.q_width}
    if isinstance(module, FeedForward) and module.kind == "swiglu":
        return "up", {"gate": module.down.in_features, "up": module.down.in_features}
    return None


# Shares --------------------------------------------------------------------------------------------------------


Parts = dict[str, dict[str, int]]
"""Name of a fused tensor: names and sizes of what is in it."""


def fused_parts(model: nn.Module) -> Parts:
    """The tensors of a plain model that are taken apart where it lies in shares."""
    found: Parts = {}
    for path, module in model.named_modules():
        if (fused := _fused(module)) is not None:
            name, sizes = fused
            prefix = f"{path}.{name}" if path else name
            for tensor, _ in getattr(module, name).named_parameters():
                found[f"{prefix}.{tensor}"] = {f"{prefix}.{part}.{tensor}": size for part, size in sizes.items()}
    return found


def split(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Whole tensors by the names of the shares, from those of the plain model. What is not as long as the fused tensor
    is for all of its parts, such as an optimizer's count of steps."""
    found = {}
    for name, tensor in tensors.items():
        if name not in parts:
            found[name] = tensor
        elif not tensor.ndim:
            found |= {part: tensor.clone() for part in parts[name]}
        else:
            found |= dict(zip(parts[name], tensor.split(list(parts[name].values())), strict=True))
    return found


def join(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Whole tensors by the names of the plain model, from those of the shares."""
    found = dict(tensors)
    for name, inside in parts.items():
        if inside.keys() <= found.keys():
            held = [found.pop(part) for part in inside]
            found[name] = torch.cat(held) if held[0].ndim else held[0]
    return found


class Shares:
    """A model taken apart in shares. The model that is given becomes this process's share of it."""

    def __init__(self, model: nn.Module, processes: Processes):
        assert processes.mesh is not None
        _log.setLevel(logging.ERROR)  # it finds our two groups of processes worth a warning at each norm
        self.processes, self.model = processes, model
        self.parts = fused_parts(model)
        for module in list(model.modules()):
            if (found := _fused(module)) is not None:
                name, sizes = found
                setattr(module, name, SplitLinear(getattr(module, name), sizes))
        if processes.tensor_parallel > 1:
            for module in list(model.modules()):
                _share_layer(module, processes.mesh[TENSOR])

    def wrap(self, loss: nn.Module, *methods: str, precision: str = FLOAT32) -> None:
        """Shards a module around the model; its weights are whole, in `precision`, within its `forward` and these
        methods. Gradients are summed in float32."""
        assert self.processes.mesh is not None
        gathered = MixedPrecisionPolicy()
        if precision == BFLOAT16:  # tables of positions stay as they are
            gathered = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # An encoder's output becomes keys and values before the layers that look at them are reached.
        ahead = [module.kv for module in self.model.modules() if isinstance(module, CrossAttention)]
        for module in (*ahead, *blocks_of(self.model), loss):
            fully_shard(module, mesh=self.processes.mesh[DATA], mp_policy=gathered)
        for method in methods:
            register_fsdp_forward_method(loss, method)

    def whole(self, *, keep: bool = True) -> dict[str, Tensor]:
        """All tensors of the plain model, on the host, gathered from all processes; if not `keep`, gathered for the
        others alone."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            gathered = whole_tensor(tensor)
            if keep:
                found[name] = gathered.cpu()
        return join(found, self.parts)

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """`nn.utils.clip_grad_norm_`, for shares."""
        held = [parameter for parameter in parameters if parameter.grad is not None]
        norm = total_norm([cast(Tensor, parameter.grad) for parameter in held])
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([own_share(cast(Tensor, p.grad)) for p in held], scale)  # pyright: ignore


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gathered from all processes, if it lies in shares."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, whole: Tensor) -> None:
    """Puts a tensor, which every process has, into its shares."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            moved = whole.to(target.device, target.dtype)
            whole = distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(whole)


def _share_layer(module: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallel: of attention the heads are shared out, of a feed-forward its width; what follows is summed."""
    size, columns, rows = mesh.size(), ColwiseParallel(), RowwiseParallel()
    if isinstance(module, Attention | CrossAttention):
        config = module.config
        for name, heads in (("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads)):
            if heads % size:
                raise ValueError(f"{name} {heads} is not divisible by tensor_parallel {size}.")
        if config.attention_dropout:
            raise ValueError("attention_dropout is not for tensor_parallel: heads would drop alike; set it to 0.")
        plan: dict[str, Any] = {"out": rows}
        if isinstance(module, Attention):
            plan |= {"qkv.q": columns, "qkv.k": columns, "qkv.v": columns}
            if config.qk_norm:  # a norm's weights are every head's: their gradients are summed over the processes
                heads = SequenceParallel(sequence_dim=1, use_local_output=True)
                plan |= {"q_norm": heads, "k_norm": heads}
        else:
            plan |= {"q": columns, "kv.k": columns, "kv.v": columns}
        parallelize_module(module, mesh, plan)
        module.config = replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=config.kv_heads // size,
            head_width=config.head_dim,
        )
    elif isinstance(module, FeedForward):
        if module.down.in_features % size:
            raise ValueError(f"d_ff {module.down.in_features} is not divisible by tensor_parallel {size}.")
        up = {"up.gate": columns, "up.up": columns} if module.kind == "swiglu" else {"up": columns}
        parallelize_module(module, mesh, {**up, "down": rows})


# Gradients -----------------------------------------------------------------------------------------------------


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, whatever shares they lie in."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    norms = [whole_tensor(nn.utils.get_total_norm(group)) for group in groups.values()]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
