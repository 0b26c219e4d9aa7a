"""Speculative Jacobi decoding: several tokens of a sequence in one pass, and the distribution of the plain sampler.

A pass runs a sequence's last token and behind it drafts of what may follow. It tells p, what is drawn from, at each of
these positions, given the drafts before it. A coupling moves each draft x, drawn from q in the pass before, to y, which
is distributed as p. Up to the first y that is not x, all are as if they were drawn one by one, and are kept; those
behind it are the drafts of the next pass, with this p as their q (arXiv:2410.01699, arXiv:2510.24211). At least one is
kept in each pass.

Why it is exact: what happens at a position, and when, hangs on earlier positions and on the position's own random
numbers. Given the earlier positions, a draft is therefore distributed as its q at any time, and y as p.

The couplings, from the one that keeps most drafts to the one that keeps the picture:

- `maximal`: x stays with probability min(1, p(x) / q(x)), else y is drawn from what p has more than q.
- `gumbel`: y = argmax(ln p + g), with the same noise g in every pass. The window does not change the picture.
- `inverse`: y is where the cumulative p passes the position's uniform number, as without drafts: the same picture.

Greedy drawing needs no random numbers, and the coupling plays no part. A new draft behind the last prediction repeats
it: what is drafted first was seen to matter little (docs/decisions.md), and this costs nothing.

Letters: R positions of all sequences drawn together, D model width, n the ids of a slot.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.engine.executors import Draws, Eager
from smalti.engine.sampling import SampleConfig, draw, guide, log_prob_of, reshape
from smalti.sequences.layout import Slot


class Drafts:
    """What a sequence is taken to go on with, and its random numbers."""

    def __init__(self, seed: int, config: SampleConfig):
        self.config, self.seed = config, seed
        self.token_ids: list[int] = []
        self.probs: list[Float[Tensor, " n"] | None] = []
        """What each was drawn from (`maximal`); None: it was not drawn, but taken."""
        self._numbers = self._generator(0)
        self._noise: dict[int, Float[Tensor, " n"]] = {}

    def _generator(self, stream: int) -> np.random.Generator:
        """Streams of their own: `TokenSequence.uniforms` come from another generator."""
        return np.random.Generator(np.random.Philox(key=[self.seed, stream]))

    def numbers(self, count: int) -> Float[Tensor, "count 2"]:
        """New numbers in [0, 1): how many were taken before hangs on the sequence alone."""
        return torch.from_numpy(self._numbers.random((count, 2)))

    def noise(self, first: int, count: int, size: int) -> list[Float[Tensor, " n"]]:
        """Gumbel noise of `count` positions from `first` on, the same whenever it is asked for."""
        for old in [position for position in self._noise if position < first]:
            del self._noise[old]
        for position in range(first, first + count):
            if position not in self._noise:
                uniforms = torch.from_numpy(self._generator(1 + position).random(size))
                self._noise[position] = -(-uniforms.log()).log()
        return [self._noise[position] for position in range(first, first + count)]

    def clear(self) -> None:
        self.token_ids, self.probs = [], []

    def go_on(self, token_ids: list[int], probs: list[Float[Tensor, " n"] | None], room: int) -> None:
        """What was drawn behind what is kept becomes the drafts, and is filled up to the window, or to the positions
        there are."""
        count = min(self.config.speculative, room)
        missing = count - len(token_ids)
        self.token_ids = (token_ids + token_ids[-1:] * missing)[:count]
        self.probs = (probs + [None] * missing)[:count]


class Window(NamedTuple):
    """The positions of one sequence that are drawn in a pass."""

    drafts: Drafts
    first: int
    """The position in its sequence that is certainly kept."""
    uniforms: list[float]
    """One for each position."""

    @property
    def size(self) -> int:
        return len(self.uniforms)


class Redrawn(NamedTuple):
    draws: Draws
    probs: Float[Tensor, "R n"] | None
    """What each was drawn from, where it is needed again."""


def redraw(
    executor: Eager,
    windows: Sequence[Window],
    hidden: Float[Tensor, "R D"],
    null_hidden: Float[Tensor, "R D"] | None,
    scales: Float[Tensor, " R"],
    slot: Slot,
    config: SampleConfig,
) -> Redrawn:
    """A token of every position of the windows, one after the other, coupled with the draft there.

    `null_hidden` is read where a scale is not 1; None: nowhere.
    """
    if config.temperature == 0 or config.coupling == "inverse":
        return Redrawn(_draw_plainly(executor, windows, hidden, null_hidden, scales, slot, config), None)
    cond = _at_least_float32(executor.logits(hidden, slot))
    logits, guided = cond, scales != 1
    if null_hidden is not None and bool(guided.any()):
        null = _at_least_float32(executor.logits(null_hidden[guided], slot))
        logits = cond.clone()
        logits[guided] = guide(cond[guided], null, scales[guided, None].to(cond.dtype))
    logits = reshape(logits, config)
    if config.coupling == "gumbel":
        noise = [row for window in windows for row in window.drafts.noise(window.first, window.size, slot.size)]
        local, probs = (logits + torch.stack(noise).to(logits.device)).argmax(-1), None
    else:
        probs = logits.softmax(-1)
        local = _couple_maximally(windows, probs, slot)
    draw_log_probs = log_prob_of(logits, local)
    log_probs = draw_log_probs if config.is_plain else log_prob_of(cond, local)
    return Redrawn(Draws(slot.token_ids(local), log_probs, draw_log_probs), probs)


def num_kept(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the drawn tokens stand: those that are as drafted, and the first that is not."""
    for number, (draft, token) in enumerate(zip(drafts, drawn, strict=False)):
        if draft != token:
            return number + 1
    return min(len(drafts) + 1, len(drawn))


def _draw_plainly(
    executor: Eager,
    windows: Sequence[Window],
    hidden: Float[Tensor, "R D"],
    null_hidden: Float[Tensor, "R D"] | None,
    scales: Float[Tensor, " R"],
    slot: Slot,
    config: SampleConfig,
) -> Draws:
    """As without drafts. What is guided and what is not are two calls, as there."""
    uniforms = torch.tensor([number for window in windows for number in window.uniforms], dtype=torch.float64)
    guided: Bool[Tensor, " R"] = scales != 1
    if null_hidden is None or not bool(guided.any()):
        return executor.draw(hidden, None, slot, uniforms, None, config)
    if bool(guided.all()):
        return executor.draw(hidden, null_hidden, slot, uniforms, scales, config)
    there, elsewhere = guided.nonzero()[:, 0], (~guided).nonzero()[:, 0]
    one = executor.draw(hidden[there], null_hidden[there], slot, uniforms[there.cpu()], scales[there], config)
    other = executor.draw(hidden[elsewhere], None, slot, uniforms[elsewhere.cpu()], None, config)
    order = torch.cat((there, elsewhere)).argsort()
    return Draws(*(torch.cat(parts)[order] for parts in zip(one, other, strict=True)))


def _couple_maximally(windows: Sequence[Window], probs: Float[Tensor, "R n"], slot: Slot) -> Int[Tensor, " R"]:
    numbers = torch.cat([window.drafts.numbers(window.size) for window in windows]).to(probs.device)
    rest = probs.clone()  # what is drawn from if the draft does not stay
    stays = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
    drafted = [token for window in windows for token in _at_length(window.drafts.token_ids, window.size, -1)]
    drafts = torch.tensor(drafted, device=probs.device)
    local = slot.local(drafts)
    sources = [given for window in windows for given in _at_length(window.drafts.probs, window.size, None)]
    drawn = [number for number, source in enumerate(sources) if source is not None]
    taken = [number for number, source in enumerate(sources) if source is None and drafted[number] >= 0]
    if drawn:
        before = torch.stack([source for source in sources if source is not None])
        at = local[drawn, None]
        ratio_holds = (
            numbers[drawn, 0] * before.gather(1, at)[:, 0].double() < probs[drawn].gather(1, at)[:, 0].double()
        )
        stays[drawn] = ratio_holds
        rest[drawn] = (rest[drawn] - before).clamp(min=0)
    if taken:
        stays[taken] = numbers[taken, 0] < probs[taken, local[taken]].double()
        rest[taken, local[taken]] = 0
    # Where p and q are one but for rounding nothing may be left; such a draft stays but for rounding, too.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, probs)
    return torch.where(stays, local, draw(rest, numbers[:, 1]))


def _at_length(values: list, count: int, filler: object) -> list:
    return values[:count] + [filler] * (count - len(values))


def _at_least_float32(x: Float[Tensor, "R n"]) -> Float[Tensor, "R n"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))
