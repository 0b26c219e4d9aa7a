"""Where a model looks: attention weights, heads named by what they do, surprise by position, the reach of its context.

Letters: B sequences, T tokens, N heads, M key-value heads, Dh head width, layers.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.inspect.grid import OUTSIDE, Grid
from smalti.likelihood import to_device
from smalti.models.decoder_only import DecoderOnly
from smalti.models.loss import nll_of_hidden
from smalti.models.transformer import Attention, rotate
from smalti.sequences.layout import Layout, Packed

DOMINANT = 1 / 3
"""A head is named for a pattern that gets at least this share of its attention..."""
NEAR = "near"
"""The cells around the one that is predicted, up to two to the left; a head is named so where no single cell is."""
CLEAR_EXCESS = 2.0
"""... and at least so many times what attention spread evenly would give it."""
DIFFUSE = 0.7
"""A head whose entropy is at least this share of that of even attention is diffuse."""


class Attended(NamedTuple):
    weights: Float[Tensor, "B N T T"]
    """Row t: how token t's attention is shared out among the tokens up to it; each row sums to 1."""
    output: Float[Tensor, "B T D"]


def attend(
    attention: Attention,
    x: Float[Tensor, "B T D"],
    rotation: Float[Tensor, "... T half 2"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Attended:
    """Self-attention written out, without a cache: the weights, and the output that the module itself gives."""
    config = attention.config
    B, T, _ = x.shape
    q, k, v = attention.qkv(x).split((config.q_width, config.kv_width, config.kv_width), dim=-1)
    q = q.view(B, T, config.num_heads, config.head_dim).transpose(1, 2)  # (B, N, T, Dh)
    k = k.view(B, T, config.kv_heads, config.head_dim).transpose(1, 2)  # (B, M, T, Dh)
    v = v.view(B, T, config.kv_heads, config.head_dim).transpose(1, 2)
    if config.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    group = config.num_heads // config.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(config.head_dim)
    allowed = mask
    if allowed is None and config.causal:
        allowed = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1)
    return Attended(weights, attention.out((weights @ v).transpose(1, 2).reshape(B, T, config.q_width)))


@torch.no_grad()
def attention_weights(model: DecoderOnly, token_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B N T T"]]:
    """The attention of every layer to these sequences. The model may be in use by other threads meanwhile."""
    found: list[Tensor] = []
    thread = threading.get_ident()

    def note(module: Attention, arguments: tuple) -> None:
        if threading.get_ident() != thread:
            return
        x, rotation, mask, _, _ = arguments
        found.append(attend(module, x, rotation, mask).weights)

    blocks: Any = model.transformer.blocks
    handles = [block.attention.register_forward_pre_hook(note) for block in blocks]
    try:
        model.hidden(token_ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


# ---- heads by pattern ----


@dataclass(frozen=True, kw_only=True)
class Head:
    """What one head does, measured over the tokens that read a code."""

    layer: int
    head: int
    name: str
    """The pattern that dominates, "diffuse", or "mixed"; "position 6": the seventh code, whatever is read."""
    shares: dict[str, float]
    """Share of the attention that each pattern gets. Patterns can overlap."""
    excess: dict[str, float]
    """The same over what even attention to all tokens so far would give."""


def pattern_masks(num_tokens: int, first_code: int, grid: Grid | None) -> dict[str, Bool[Tensor, "T T"]]:
    """For each pattern, which token a query (row) would look at. The code at `first_code` is the line's position 0.

    A query at position p reads p's code and predicts the next one: "row above next" is the cell above the one that is
    predicted. Without a grid only the patterns of a line are there.
    """
    place = torch.arange(num_tokens)
    masks = {
        "start": (place == 0).expand(num_tokens, -1).clone(),
        "itself": place[:, None] == place,
        "previous token": place[:, None] - 1 == place,
        "two back": place[:, None] - 2 == place,
    }
    if grid is None:
        return masks
    of_read = {"row above": (-1, 0), "above left": (-1, -1), "two rows above": (-2, 0)}
    of_next = {"row above next": (-1, 0), "above right of next": (-1, 1), "two rows above next": (-2, 0)}
    for ahead, steps in enumerate((of_read, of_next)):
        for name, (down, right) in steps.items():
            masks[name] = _step_mask(num_tokens, first_code, grid.neighbours(down, right).tolist(), ahead=ahead)
    masks[NEAR] = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for down, right in ((0, -1), (0, -2), (-1, -1), (-1, 0), (-1, 1)):
        masks[NEAR] |= _step_mask(num_tokens, first_code, grid.neighbours(down, right).tolist(), ahead=1)
    return masks


def _step_mask(num_tokens: int, first_code: int, neighbours: list[int], *, ahead: int) -> Bool[Tensor, "T T"]:
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for position, neighbour in enumerate(neighbours):
        query, key = first_code + position - ahead, first_code + neighbour
        if neighbour != OUTSIDE and 0 <= key <= query < num_tokens:
            mask[query, key] = True
    return mask


def name_heads(
    model: DecoderOnly,
    token_ids: Int[Tensor, "B T"],
    first_code: int,
    grid: Grid | None = None,
    *,
    attended: list[Float[Tensor, "B N T T"]] | None = None,
) -> list[Head]:
    """Every head with the pattern it follows. Queries are the tokens from the second code on; a pattern is measured
    on the queries that have the token it means. `attended` are the sequences' `attention_weights`, where they are
    known."""
    T = token_ids.shape[1]
    masks = pattern_masks(T, first_code, grid)
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    queries = torch.arange(first_code + 1, T)
    found = []
    for layer, weights in enumerate(attention_weights(model, token_ids) if attended is None else attended):
        mean = weights.mean(0).cpu()  # (N, T, T)
        entropy = torch.special.entr(weights).sum(-1).mean(0).cpu()[:, queries]  # (N, queries)
        evenness = (entropy / torch.log(queries + 1.0)).mean(1)
        repeated = _to_equal_codes(weights, token_ids, queries)
        for head in range(len(mean)):
            shares, excess = {}, {}
            for name, mask in masks.items():
                able = queries[mask[queries].any(1)]
                if len(able):
                    shares[name] = float((mean[head] * mask).sum(1)[able].mean())
                    excess[name] = shares[name] / float((even * mask).sum(1)[able].mean())
            if repeated is not None:
                shares["same code"] = float(repeated[head])
                excess["same code"] = float(repeated[head] / repeated[-1])
            place = _favourite_place(mean[head], queries, first_code)
            shares[f"position {place - first_code}"] = float(mean[head, queries[queries >= place], place].mean())
            excess[f"position {place - first_code}"] = shares[f"position {place - first_code}"] / float(
                even[queries[queries >= place], place].mean()
            )
            name = _head_name(shares, excess, float(evenness[head]))
            found.append(Head(layer=layer, head=head, name=name, shares=shares, excess=excess))
    return found


def _to_equal_codes(
    weights: Float[Tensor, "B N T T"], token_ids: Int[Tensor, "B T"], queries: Int[Tensor, " Q"]
) -> Float[Tensor, " heads_and_even"] | None:
    """The attention each head gives to earlier tokens equal to the query's, over the queries that have some; last,
    what even attention would give. None if no query has one."""
    T = token_ids.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool).tril(-1)
    equal = (token_ids[:, :, None] == token_ids[:, None]).cpu() & earlier  # (B, T, T)
    able = equal.any(-1)
    able[:, : int(queries[0])] = False
    if not able.any():
        return None
    attended = (weights.cpu() * equal[:, None]).sum(-1).transpose(1, 2)[able].mean(0)  # (N,)
    even = (equal.sum(-1) / torch.arange(1, T + 1))[able].mean()
    return torch.cat([attended, even[None]])


def _favourite_place(mean: Float[Tensor, "T T"], queries: Int[Tensor, " Q"], first_code: int) -> int:
    """The code's place that most attention goes to whatever the query; at least a third of the queries must be able
    to look there."""
    reachable = range(first_code, int(queries[len(queries) * 2 // 3]) + 1)
    return max(reachable, key=lambda place: float(mean[queries[queries >= place], place].mean()))


def _head_name(shares: dict[str, float], excess: dict[str, float], evenness: float) -> str:
    clear = [name for name in shares if shares[name] >= DOMINANT and excess[name] >= CLEAR_EXCESS]
    single = [name for name in clear if name != NEAR]
    if clear:
        return max(single or clear, key=lambda name: shares[name])
    return "diffuse" if evenness >= DIFFUSE else "mixed"


def attention_by_offset(mean: Float[Tensor, "N T T"], first_code: int, grid: Grid) -> Float[Tensor, "N down right"]:
    """Mean attention of a query by how far the cell it looks at is from the cell it predicts, summed per query and
    averaged over the queries that can look there: entry (h − 1 − d, w − 1 + r) is d rows above, r columns right."""
    h, w = grid.rows, grid.columns
    total, able = torch.zeros(len(mean), h, 2 * w - 1), torch.zeros(h, 2 * w - 1)
    cells = grid.cells
    for position, (row, column) in enumerate(cells.tolist()):
        query = first_code + position - 1
        if row == OUTSIDE or not first_code <= query < mean.shape[1]:
            continue
        for other in range(query - first_code + 1):
            up, right = row - cells[other, 0], cells[other, 1] - column
            if cells[other, 0] != OUTSIDE and up >= 0:
                total[:, h - 1 - up, w - 1 + right] += mean[:, query, first_code + other]
                able[h - 1 - up, w - 1 + right] += 1
    return total / able.clamp(min=1)


def attention_by_lag(mean: Float[Tensor, "N T T"], num_lags: int) -> Float[Tensor, "N lags"]:
    """Mean attention by how many tokens back it goes, 0 being the query itself, over the queries that reach there."""
    lags = range(min(num_lags, mean.shape[1]))
    return torch.stack([mean.diagonal(-lag, 1, 2).mean(-1) for lag in lags], dim=-1)


# ---- surprise ----


class PositionNats(NamedTuple):
    """−ln p of the tokens at each position."""

    mean: Float[Tensor, " T"]
    standard_error: Float[Tensor, " T"]


def nats_by_position(model: DecoderOnly, layout: Layout, packed: Packed, *, batch_size: int = 64) -> PositionNats:
    """The surprise map: nats at each position of the sequences, 0 where nothing is to be predicted."""
    return by_position(nats_of(model, layout, packed, batch_size=batch_size))


def by_position(nats: Float[Tensor, "B T"]) -> PositionNats:
    """The same of nats that are known."""
    return PositionNats(nats.mean(0), nats.std(0) / math.sqrt(len(nats)))


@torch.no_grad()
def nats_of(model: DecoderOnly, layout: Layout, packed: Packed, *, batch_size: int = 64) -> Float[Tensor, "B T"]:
    """−ln p of every token, in float64."""
    batches = hidden_by_batch(model, packed, batch_size=batch_size)
    return torch.cat([nats_of_hidden(model, layout, part, hidden) for part, hidden in batches])


@torch.no_grad()
def nats_of_hidden(
    model: DecoderOnly, layout: Layout, packed: Packed, hidden: Float[Tensor, "B T_1 D"]
) -> Float[Tensor, "B T"]:
    """The same of sequences whose hidden states are known, but for the last token's."""
    return nll_of_hidden(model, hidden, packed, layout.slots).double().cpu()


@torch.no_grad()
def hidden_by_batch(
    model: DecoderOnly, packed: Packed, *, batch_size: int = 64
) -> Iterator[tuple[Packed, Float[Tensor, "b T_1 D"]]]:
    """A few sequences after the other, on the model's device, and their hidden states, but for the last token's."""
    for start in range(0, len(packed.token_ids), batch_size):
        part = to_device(packed.map(itemgetter(slice(start, start + batch_size))), model.device)
        yield part, model.hidden(part.token_ids[:, :-1])


@torch.no_grad()
def loss_by_context(
    model: DecoderOnly,
    layout: Layout,
    packed: Packed,
    lengths: Sequence[int],
    targets: Sequence[int],
    *,
    batch_size: int = 64,
) -> Float[Tensor, "contexts targets"]:
    """Mean nats of the tokens at the positions `targets` if the model sees, besides the first token of the sequence,
    only the last `lengths` tokens before each.

    What is hidden is hidden from all layers, so nothing leaks through intermediate tokens. A model trained on whole
    sequences has not seen such gaps: the figures say what it uses, not what a model made for short contexts would get.
    """
    found = torch.zeros(len(lengths), len(targets), dtype=torch.float64)
    for i, length in enumerate(lengths):
        for j, target in enumerate(targets):
            found[i, j] = _nats_with_context(model, layout, packed, length, target, batch_size)
    return found


def _nats_with_context(
    model: DecoderOnly, layout: Layout, packed: Packed, length: int, target: int, batch_size: int
) -> float:
    place = torch.arange(target, device=model.device)
    visible = place[(place >= target - length) | (place == 0)]  # the others need not be run at all
    slot_id = int(packed.slot_ids[0, target])
    slot = layout.slots[slot_id]
    total = 0.0
    for start in range(0, len(packed.token_ids), batch_size):
        token_ids = packed.token_ids[start : start + batch_size].to(model.device)
        hidden = model.transformer(model.embed_tokens(token_ids[:, visible]), positions=visible)[:, -1]
        local = slot.local(token_ids[:, target])
        total += float(F.cross_entropy(model.logits(hidden, slot).double(), local, reduction="sum"))
    return total / len(packed.token_ids)
