"""TransformerLens' names for what goes on inside a model: `run_with_cache`, `blocks.{i}.hook_resid_post` and others.

    hooked = HookedModel(bundle.model)
    logits, cache = hooked.run_with_cache(token_ids)
    cache["pattern", 0]  # (B, N, T, T)
    hooked.run_with_hooks(token_ids, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: 0 * value)])

The names are those of TransformerLens 2 (Nanda and Bloom 2022; its docs list them under "HookedTransformer" and
`utils.get_act_name`), the values those of the model itself. It holds no weights of its own and folds nothing into
them: norms keep their scales and the residual stream is not centred, as with `from_pretrained_no_processing`.
Letters: B sequences, T tokens, V vocabulary, N heads, M key-value heads, Dh head width.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import InputError
from smalti.inspect.attention import attend
from smalti.models.decoder_only import DecoderOnly

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
SUBLAYERS = ("hook_attn_out", "hook_mlp_out")
ATTENTION = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z")
NORMS = ("ln1.hook_normalized", "ln2.hook_normalized")
READ_ONLY = ("attn.hook_pattern", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_resid_mid")
"""Computed beside the model, by the written-out attention, or between two of its parts: to be read, not changed."""
_SHORT = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
    "z": "attn.hook_z", "pattern": "attn.hook_pattern", "attn": "attn.hook_pattern",
    "normalized1": "ln1.hook_normalized", "normalized2": "ln2.hook_normalized",
}  # fmt: skip

Hook = Callable[[Tensor, "HookPoint"], Tensor | None]
NamesFilter = Callable[[str], bool] | str | Sequence[str] | None


@dataclass(frozen=True)
class HookPoint:
    """What a hook is told besides the value."""

    name: str

    def layer(self) -> int:
        return int(self.name.split(".")[1])


class Cache(Mapping[str, Tensor]):
    """Activations by name; also by what they are and the layer, as `cache["resid_post", 2]`, the last being −1."""

    def __init__(self, found: dict[str, Tensor], num_layers: int):
        self._found, self._num_layers = found, num_layers

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        return self._found[key if isinstance(key, str) else act_name(key[0], key[1] % self._num_layers)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def act_name(name: str, layer: int | None = None) -> str:
    """The full name of an activation: `act_name("resid_post", 2)` is "blocks.2.hook_resid_post". Raises KeyError if
    there is none."""
    if name in ("embed", "hook_embed"):
        return "hook_embed"
    if layer is None and name in ("normalized", "ln_final.hook_normalized"):
        return "ln_final.hook_normalized"
    full = _SHORT.get(name, name)
    if layer is None or full not in (*RESIDUAL, *SUBLAYERS, *ATTENTION, *NORMS):
        known = ", ".join(_SHORT)
        raise KeyError(f"there is no activation {name!r} of layer {layer}; there are {known}, each of a layer.")
    return f"blocks.{layer}.{full}"


class HookedModel:
    """A decoder-only model with TransformerLens' names. The model itself is not changed; hooks are gone when a call
    ends."""

    def __init__(self, model: DecoderOnly):
        if not isinstance(model, DecoderOnly):
            raise InputError(
                f"a {type(model).__name__} has no plain blocks to hook; names are given to decoder-only models alone."
            )
        self.model = model

    @property
    def hook_names(self) -> list[str]:
        """All names, in the order in which the values come to be."""
        config = self.model.config.transformer
        names = ["hook_embed"]
        for layer in range(config.num_layers):
            of_layer = ("hook_resid_pre", "ln1.hook_normalized", *ATTENTION, "hook_attn_out", "hook_resid_mid")
            of_layer += ("ln2.hook_normalized", "hook_mlp_out", "hook_resid_post")
            names += [f"blocks.{layer}.{name}" for name in of_layer]
        return [*names, "ln_final.hook_normalized"]

    @torch.no_grad()
    def run_with_cache(
        self, token_ids: Int[Tensor, "B T"], *, names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "B T V"], Cache]:
        """The model's logits of all ids, −inf for those never predicted, and every activation that `names_filter` names
        (None: all)."""
        wanted, found = self._named(names_filter), {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            found[hook.name] = value.detach()

        logits = self.run_with_hooks(token_ids, fwd_hooks=[(name, keep) for name in wanted])
        ordered = {name: found[name] for name in wanted}
        return logits, Cache(ordered, self.model.config.transformer.num_layers)

    @torch.no_grad()
    def run_with_hooks(
        self, token_ids: Int[Tensor, "B T"], *, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Hook]] = ()
    ) -> Float[Tensor, "B T V"]:
        """The logits; on the way each hook is given its value, and what it returns (None: nothing) goes on in its
        place. Raises KeyError for an unknown name, InputError for a new value where values can only be read."""
        with self.hooks(fwd_hooks):
            return self.model.logits(self.model.hidden(token_ids.to(self.model.device)))

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Hook]]) -> Iterator[None]:
        """Within the block the hooks are in place, whoever runs the model."""
        with ExitStack() as stack:
            for names, hook in fwd_hooks:
                for name in self._named(names):
                    stack.callback(self._register(name, hook).remove)
            yield

    def _named(self, names_filter: NamesFilter) -> list[str]:
        names = self.hook_names
        if names_filter is None:
            return names
        if callable(names_filter):
            return [name for name in names if names_filter(name)]
        asked = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in asked:
            if name not in names:
                raise KeyError(f"there is no hook point {name!r}; there are {', '.join(names[:12])}, ... (hook_names).")
        return [name for name in names if name in asked]

    def _register(self, name: str, hook: Hook) -> Any:
        transformer, point = self.model.transformer, HookPoint(name)
        if name == "hook_embed":
            return self.model.embed_tokens.register_forward_hook(_output(hook, point))
        if name == "ln_final.hook_normalized":
            return transformer.norm.register_forward_hook(_output(hook, point))
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        assert found is not None
        block: Any = transformer.blocks[int(found[1])]
        what = found[2]
        if what == "hook_resid_pre":
            return block.register_forward_pre_hook(_first(hook, point))
        if what == "hook_resid_post":
            return block.register_forward_hook(_output(hook, point))
        if what == "hook_attn_out":
            return block.attention.register_forward_hook(_output(hook, point))
        if what == "hook_mlp_out":
            return block.feed_forward.register_forward_hook(_output(hook, point))
        if what == "ln1.hook_normalized":
            return block.attention_norm.register_forward_hook(_output(hook, point))
        if what == "ln2.hook_normalized":
            return block.feed_forward_norm.register_forward_hook(_output(hook, point))
        if what == "hook_resid_mid":
            return block.feed_forward_norm.register_forward_pre_hook(_first(hook, point, read_only=True))
        if what == "attn.hook_z":
            return block.attention.out.register_forward_pre_hook(_mixed(hook, point, block.attention.config))
        return block.attention.register_forward_pre_hook(_beside(hook, point, what.removeprefix("attn.hook_")))


def _output(hook: Hook, point: HookPoint) -> Callable:
    return lambda _, __, output: hook(output, point)


def _first(hook: Hook, point: HookPoint, *, read_only: bool = False) -> Callable:
    def run(_: object, arguments: tuple) -> tuple | None:
        new = hook(arguments[0], point)
        if new is not None and read_only:
            _refuse(point)
        return None if new is None else (new, *arguments[1:])

    return run


def _mixed(hook: Hook, point: HookPoint, config: Any) -> Callable:
    """z: what the heads mixed, (B, T, N, Dh), before the output projection."""

    def run(_: object, arguments: tuple) -> tuple | None:
        heads = arguments[0].unflatten(-1, (config.num_heads, config.head_dim))
        new = hook(heads, point)
        return None if new is None else (new.flatten(-2),)

    return run


def _beside(hook: Hook, point: HookPoint, what: str) -> Callable:
    """Attention computed again, written out, from the same input."""

    def run(attention: Any, arguments: tuple) -> None:
        x, rotation, mask = arguments[:3]
        if what == "pattern":
            value = attend(attention, x, rotation, mask).weights
        else:
            config = attention.config
            parts = attention.qkv(x).split((config.q_width, config.kv_width, config.kv_width), dim=-1)
            value = parts["qkv".index(what)].unflatten(-1, (-1, config.head_dim))  # (B, T, N or M, Dh)
            if config.qk_norm and what != "v":
                value = (attention.q_norm if what == "q" else attention.k_norm)(value)
        if hook(value, point) is not None:
            _refuse(point)

    return run


def _refuse(point: HookPoint) -> None:
    raise InputError(
        f"{point.name} can be read, but not changed: it is computed beside the model, or between two of its parts. "
        "Change hook_resid_pre, attn.hook_z, hook_attn_out, hook_mlp_out or hook_resid_post instead."
    )
