"""What causes a prediction: read it off between layers, take parts away, put other parts in, change one code.

Everything is done by hooks that are gone when the block or call ends; the model itself is not changed.
Letters: B sequences, T tokens, D model width, n the ids of a slot.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smalti.inspect.attention import nats_of, nats_of_hidden
from smalti.inspect.grid import Grid
from smalti.likelihood import to_device
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import NO_SLOT, Layout, Packed, Slot

ABLATIONS = ("mean", "zero")
_PATCHED_TOGETHER = 32  # states that are put where they were in one run: what bounds its memory


# ---- between layers ----


@torch.no_grad()
def residual_stream(model: DecoderOnly, token_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T D"]]:
    """The states between layers: first the embeddings with their positions, then what each layer leaves."""
    states: list[Tensor] = []
    blocks: Any = model.transformer.blocks
    handles = [blocks[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))]
    handles += [block.register_forward_hook(lambda _, arguments, output: states.append(output)) for block in blocks]
    try:
        model.hidden(token_ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return states


@torch.no_grad()
def run_from(model: DecoderOnly, layer: int, state: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The hidden states if `state` is the residual stream before `layer` (the number of layers: behind the last): what
    comes before need not be run again. Whatever hooks there are on the layers run take part."""
    transformer, config = model.transformer, model.config.transformer
    rotation = transformer.table[: state.shape[1]] if config.positions in ("rotary", "rotary_2d") else None
    for number in range(layer, config.num_layers):
        state = transformer.blocks[number](state, rotation, None, None, None, number)
    return transformer.norm(state)


class Lens(NamedTuple):
    """What the model would predict if it ended after each layer; entry 0 is before the first, the last is the model."""

    nats: Float[Tensor, "layers T"]
    """Mean nats of the true token at each position; 0 where nothing is predicted."""
    agreement: Float[Tensor, "layers T"]
    """Share of the sequences in which the likeliest token is already the one of the whole model."""
    likeliest: Int[Tensor, "layers B T"]
    """The likeliest token at each position; the true token where nothing is predicted."""


@torch.no_grad()
def logit_lens(model: DecoderOnly, layout: Layout, packed: Packed, *, among: range | None = None) -> Lens:
    """The logit lens (nostalgebraist 2020), the final norm and the head applied to the states between layers, at every
    predicted position; the softmax is taken over what can stand there, as in the loss. The likeliest token is chosen
    from the token ids `among`, wherever one of them can stand."""
    packed = to_device(packed, model.device)
    nats, agreement, likeliest = [], [], []
    states = residual_stream(model, packed.token_ids[:, :-1])
    for state in reversed(states):  # the whole model first: the others are compared with it
        hidden = model.transformer.norm(state)
        nll = torch.zeros(packed.token_ids.shape, dtype=torch.float64, device=model.device)
        top = packed.token_ids.clone()
        for index, slot in enumerate(layout.slots):
            row, column = (packed.slot_ids[:, 1:] == index).nonzero(as_tuple=True)
            if slot.size == 1 or not model.can_score(slot) or not len(row):
                continue
            logits = model.logits(hidden[row, column], slot)
            target = slot.local(packed.token_ids[row, column + 1])
            nll[row, column + 1] = F.cross_entropy(logits.float(), target, reduction="none").double()
            if among is not None:
                ids = slot.token_ids(torch.arange(logits.shape[1], device=model.device))
                allowed = (ids >= among.start) & (ids < among.stop)
                logits = logits.masked_fill(~allowed & allowed.any(), -math.inf)
            top[row, column + 1] = slot.token_ids(logits.argmax(-1))
        nats.append(nll.mean(0))
        likeliest.append(top)
        agreement.append((top == likeliest[0]).double().mean(0))
    return Lens(*(torch.stack(found[::-1]).cpu() for found in (nats, agreement, likeliest)))


# ---- ablation ----


@contextmanager
def ablated(
    model: DecoderOnly,
    *,
    heads: Sequence[tuple[int, int]] = (),
    attentions: Sequence[int] = (),
    feed_forwards: Sequence[int] = (),
    layers: Sequence[int] = (),
    kind: str = "mean",
) -> Iterator[None]:
    """Within the block the model runs without these heads (layer, head), these layers' attention or feed-forward, or
    whole layers.

    "mean" puts the batch's mean at each position in place of what a head or sublayer gives, so that only what depends
    on the sequence is lost; "zero" puts nothing. A whole layer is always skipped. Raises ValueError for what the model
    does not have.
    """
    if kind not in ABLATIONS:
        raise ValueError(f"kind {kind!r} is unknown; choose one of {', '.join(ABLATIONS)}.")
    config = model.config.transformer
    blocks: Any = model.transformer.blocks
    for layer in (*(layer for layer, _ in heads), *attentions, *feed_forwards, *layers):
        if not 0 <= layer < config.num_layers:
            raise ValueError(f"there is no layer {layer}; the model has layers 0..{config.num_layers - 1}.")
    for _, head in heads:
        if not 0 <= head < config.num_heads:
            raise ValueError(f"there is no head {head}; a layer has heads 0..{config.num_heads - 1}.")

    def without(x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x) if kind == "mean" else torch.zeros_like(x)

    def without_head(head: int) -> Callable:
        def hook(_: object, arguments: tuple[Tensor]) -> tuple[Tensor]:
            mixed = arguments[0].clone()  # (B, T, N * Dh), the heads side by side
            own = slice(head * config.head_dim, (head + 1) * config.head_dim)
            mixed[..., own] = without(mixed[..., own])
            return (mixed,)

        return hook

    with ExitStack() as stack:
        for layer, head in heads:
            stack.callback(blocks[layer].attention.out.register_forward_pre_hook(without_head(head)).remove)
        for layer in attentions:
            handle = blocks[layer].attention.register_forward_hook(lambda _, __, output: without(output))
            stack.callback(handle.remove)
        for layer in feed_forwards:
            handle = blocks[layer].feed_forward.register_forward_hook(lambda _, __, output: without(output))
            stack.callback(handle.remove)
        for layer in layers:
            handle = blocks[layer].register_forward_hook(lambda _, arguments, __: arguments[0])
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True, kw_only=True)
class AblationLosses:
    """Nats per code, and what each missing part adds to it."""

    whole: float
    heads: Float[Tensor, "layers N"]
    attentions: Float[Tensor, " layers"]
    feed_forwards: Float[Tensor, " layers"]
    layers: Float[Tensor, " layers"]


@torch.no_grad()
def ablation_losses(model: DecoderOnly, layout: Layout, packed: Packed, positions: range) -> AblationLosses:
    """How much the mean nats of the tokens at `positions` rise without each head, sublayer and layer."""
    config = model.config.transformer
    packed = to_device(packed, model.device)
    states = residual_stream(model, packed.token_ids[:, :-1])

    def loss(layer: int, **parts: Any) -> float:
        with ablated(model, **parts):  # layers before the ablated one give what they always give
            hidden = run_from(model, layer, states[layer])
            return float(nats_of_hidden(model, layout, packed, hidden)[:, positions].mean())

    whole = loss(config.num_layers)
    numbers = range(config.num_layers)
    return AblationLosses(
        whole=whole,
        heads=torch.tensor(
            [[loss(layer, heads=[(layer, head)]) - whole for head in range(config.num_heads)] for layer in numbers]
        ),
        attentions=torch.tensor([loss(layer, attentions=[layer]) - whole for layer in numbers]),
        feed_forwards=torch.tensor([loss(layer, feed_forwards=[layer]) - whole for layer in numbers]),
        layers=torch.tensor([loss(layer, layers=[layer]) - whole for layer in numbers]),
    )


# ---- activation patching ----


@contextmanager
def patched(
    model: DecoderOnly, layer: int, positions: Int[Tensor, " B"], states: Float[Tensor, "B D"]
) -> Iterator[None]:
    """Within the block, row b of the batch has `states[b]` at its position `positions[b]` in the residual stream
    before layer `layer` (the number of layers: behind the last)."""

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[torch.arange(len(x), device=x.device), positions.to(x.device)] = states.to(x.dtype)
        return x

    blocks: Any = model.transformer.blocks
    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(lambda _, arguments: (put(arguments[0]), *arguments[1:]))
    else:
        handle = blocks[-1].register_forward_hook(lambda _, __, output: put(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def identity_patch_error(model: DecoderOnly, token_ids: Int[Tensor, "B T"]) -> float:
    """The largest change of any output when every state, layer by layer and token by token, is put where it was: 0, or
    patching itself does something and its maps mean nothing."""
    token_ids = token_ids.to(model.device)
    last, worst = model.config.transformer.num_layers - 1, 0.0
    for start in range(0, token_ids.shape[1], _PATCHED_TOGETHER):
        positions = torch.arange(start, min(start + _PATCHED_TOGETHER, token_ids.shape[1]))
        for line in token_ids:
            rows = line.expand(len(positions), -1)  # in row i the state at positions[i] is put
            whole, states = model.hidden(rows), residual_stream(model, rows)
            for layer, state in enumerate(states):
                with patched(model, layer, positions, state[torch.arange(len(positions)), positions]):
                    again = run_from(model, min(layer, last), states[min(layer, last)])
                worst = max(worst, float((again - whole).abs().max()))
    return worst


@torch.no_grad()
def patching_map(
    model: DecoderOnly,
    layout: Layout,
    packed: Packed,
    source: int,
    target: int,
    position: int,
) -> Float[Tensor, "layers T"]:
    """How much of the difference between two sequences' predictions each state carries.

    Row `target` runs with one state, before layer l at token t, taken from row `source`. Entry (l, t) is
    1 − KL(p_source ‖ p_patched) / KL(p_source ‖ p_target) of the distributions for `position`: 1, the prediction is
    now the source's; 0, nothing changed; below 0, it moved away. The last row is behind the last layer. NaN where the
    two predict the same from the beginning, to 1e-9 nats.
    """
    slot = layout.slots[int(packed.slot_ids[target, position])]
    both = packed.token_ids[[source, target], :position].to(model.device)
    states = residual_stream(model, both)
    plain = _log_probs(model, model.transformer.norm(states[-1]), slot)  # (2, n)
    apart = _divergence(plain[:1], plain[1:])
    last = model.config.transformer.num_layers - 1
    found = torch.zeros(len(states), position, dtype=torch.float64)
    for layer, state in enumerate(states):
        below = states[min(layer, last)][1:].expand(position, -1, -1)
        with patched(model, layer, torch.arange(position), state[0]):
            hidden = run_from(model, min(layer, last), below)
        left = _divergence(plain[:1], _log_probs(model, hidden, slot))
        found[layer] = torch.where(apart > 1e-9, 1 - left / apart.clamp(min=1e-12), torch.nan).cpu()
    return found


def _log_probs(model: DecoderOnly, hidden: Float[Tensor, "B T D"], slot: Slot) -> Float[Tensor, "B n"]:
    """Of what stands behind the last token."""
    return model.logits(hidden[:, -1], slot).double().log_softmax(-1)


def _divergence(log_p: Float[Tensor, "... n"], log_q: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """KL(p ‖ q) in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ---- changing codes ----


@torch.no_grad()
def change_map(
    model: DecoderOnly, layout: Layout, packed: Packed, position: int, token_ids: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """How far predictions move if the token at `position` is another one: KL(before ‖ after) in nats of the
    distributions for each position; exactly 0 up to and at `position`."""
    packed = to_device(packed, model.device)
    changed = packed.token_ids.clone()
    changed[:, position] = token_ids.to(model.device)
    before, after = (model.hidden(ids[:, :-1])[:, position:] for ids in (packed.token_ids, changed))
    return _moved(model, layout, packed, position, before, after)


def _moved(
    model: DecoderOnly,
    layout: Layout,
    packed: Packed,
    position: int,
    before: Float[Tensor, "B later D"],
    after: Float[Tensor, "B later D"],
) -> Float[Tensor, "B T"]:
    """KL(before ‖ after) by position, from the hidden states from `position` on."""
    moved = torch.zeros(packed.token_ids.shape, dtype=torch.float64, device=model.device)
    for index, slot in enumerate(layout.slots):
        row, column = (packed.slot_ids[:, position + 1 :] == index).nonzero(as_tuple=True)
        if slot.size > 1 and model.can_score(slot) and len(row):
            log_p, log_q = (
                model.logits(hidden[row, column], slot).double().log_softmax(-1) for hidden in (before, after)
            )
            moved[row, column + position + 1] = _divergence(log_p, log_q)
    return moved.cpu()


@torch.no_grad()
def influence(
    model: DecoderOnly, layout: Layout, packed: Packed, positions: Sequence[int], *, seed: int = 0
) -> Float[Tensor, "changed T"]:
    """Mean of `change_map` over the sequences, the code at each of `positions` being replaced by the one another
    sequence has there: only changes that the data holds possible."""
    generator = torch.Generator().manual_seed(seed)
    B, T = packed.token_ids.shape
    shift = 1 + int(torch.randint(B - 1, (1,), generator=generator))
    packed = to_device(packed, model.device)
    others = packed.token_ids.roll(shift, 0)
    before = model.hidden(packed.token_ids[:, :-1])
    state, rows = model.new_state(B, T), slice(0, B)
    model.extend_all(state, rows, packed.token_ids[:, :-1])
    found = {}
    for position in sorted(positions, reverse=True):  # what stands before the changed token is kept, and not run again
        differs = (others[:, position] != packed.token_ids[:, position]).nonzero()[:, 0]
        if not len(differs) or position == T - 1:
            found[position] = torch.zeros(T, dtype=torch.float64)
            continue
        state.lengths = [position] * B
        changed = torch.cat([others[:, position, None], packed.token_ids[:, position + 1 : -1]], dim=1)
        after = model.extend_all(state, rows, changed)
        chosen = packed.map(itemgetter(differs))
        later = before[differs, position:], after[differs]
        found[position] = _moved(model, layout, chosen, position, *later).mean(0)
    return torch.stack([found[position] for position in positions])


def influence_by_offset(moved: Float[Tensor, "L L"], grid: Grid, *, reach: int = 3) -> Float[Tensor, "below across"]:
    """Mean of `influence` (its rows and columns being the line's positions) by rows below the changed cell, 0..reach,
    and columns to its right, −reach..reach; NaN where no cell is read after the changed one."""
    total = torch.zeros(reach + 1, 2 * reach + 1, dtype=torch.float64)
    count = torch.zeros_like(total)
    for down in range(reach + 1):
        for right in range(-reach, reach + 1):
            there = torch.from_numpy(grid.neighbours(down, right))
            changed = (there > torch.arange(len(there))).nonzero()[:, 0]  # read later, and in the grid
            total[down, right + reach] = moved[changed, there[changed]].sum()
            count[down, right + reach] = len(changed)
    return total / torch.where(count > 0, count, torch.nan)


class SwapCost(NamedTuple):
    nats: float
    """Mean rise of a line's nats, over the lines changed; near 0 or below if the model holds the codes for the same."""
    num_changed: int


def swap_cost(
    model: DecoderOnly,
    layout: Layout,
    packed: Packed,
    code: int,
    other: int,
    *,
    nats: Float[Tensor, "B T"] | None = None,
    seed: int = 0,
) -> SwapCost:
    """What it costs in nats to put `other` for one occurrence of `code`, drawn at random in each line that has it: the
    surprise at the changed place and everything that follows from it. At most 64 lines are changed. `nats` are those of
    the sequences as they are, where they are known."""
    offset = layout.vocabulary["image"].offset
    is_code = (packed.token_ids == code + offset) & (packed.slot_ids != NO_SLOT)
    lines = is_code.any(1).nonzero()[:64, 0]
    if not len(lines):
        return SwapCost(float("nan"), 0)
    chosen = packed.map(itemgetter(lines))
    generator = torch.Generator().manual_seed(seed)
    where = torch.multinomial(is_code[lines].float(), 1, generator=generator)[:, 0]
    changed = chosen.token_ids.clone()
    changed[torch.arange(len(lines)), where] = other + offset
    after = nats_of(model, layout, chosen._replace(token_ids=changed)).sum(1)
    before = (nats_of(model, layout, chosen) if nats is None else nats[lines]).sum(1)
    return SwapCost(float((after - before).mean()), len(lines))
