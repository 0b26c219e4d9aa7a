"""Codes drawn given all others, those behind them too: what a model that draws in raster order cannot do by itself.

The target is the distribution that the sampler draws from, given what is kept: of sequences x that agree with the kept
tokens, π(x) ∝ Π q_j(x_j | x_<j) over the positions from the first drawn one on. At a drawn position q_j is what
`SampleConfig` draws from; at a kept one it is that without its filters, so that nothing kept is impossible.

- Particles: sequential importance resampling (Gordon et al. 1993). Each of N particles draws as the model draws, and is
  weighted by what the kept tokens cost it. Where the weights become uneven, the particles are resampled by them. One of
  them, by its weight, is the result: drawn from π in the limit of large N.
- Gibbs: each drawn code is drawn again given all others. Of the current code and N − 1 new ones from q_i one is chosen
  by its weight, Π_{j>i} q_j (iterated importance resampling, Andrieu et al. 2010, section 4): π is left as it is, for
  any N. Where there are no more than N codes all are weighed instead, which is the conditional distribution itself.

Letters: R chains (pictures), N particles of each, L positions that come, n ids of a slot, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.engine.executors import Eager, make_executor
from smalti.engine.generate import job_executor
from smalti.engine.sampling import SampleConfig, draw, guide, reshape, sample
from smalti.errors import InputError
from smalti.models.base import SequenceModel, evaluating
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import Request, TokenSequence

MOST_PARTICLES = 1024
MOST_SWEEPS = 1000
ROWS_AT_ONCE = 1024
_STREAM = 2**40
"""Of random numbers: `TokenSequence.uniforms` and drafts have others of the same seed."""


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """How hard to look for what fits to both sides. Raises ValueError for numbers out of range."""

    num_particles: int = 32
    num_sweeps: int = 1
    """How often each drawn code is drawn again given all others, after the particles."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_particles <= MOST_PARTICLES:
            raise ValueError(f"num_particles is {self.num_particles}; expected 2 to {MOST_PARTICLES}.")
        if not 0 <= self.num_sweeps <= MOST_SWEEPS:
            raise ValueError(f"num_sweeps is {self.num_sweeps}; expected 0 to {MOST_SWEEPS}.")


def num_steps(layout: Layout, requests: Sequence[Request], config: SampleConfig, resampling: ResampleConfig) -> int:
    """How often `resample` calls `on_step`."""
    forced = TokenSequence(layout, requests[0]).plan().forced
    steps = len(forced) + resampling.num_sweeps * sum(token < 0 for token in forced)
    return steps * -(-len(requests) // _chains_at_once(config, resampling))


def _chains_at_once(config: SampleConfig, resampling: ResampleConfig) -> int:
    rows_each = (resampling.num_particles + 1) * (2 if config.guidance_scale != 1 else 1)
    return max(1, ROWS_AT_ONCE // rows_each)


@torch.inference_mode()
def resample(
    model: SequenceModel,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig,
    resampling: ResampleConfig = ResampleConfig(),
    *,
    start: Int[Tensor, "R L"] | None = None,
    executor: str | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Int[Tensor, "R L"]:
    """The token ids of each request behind what is given, each drawn with the request's own seed.

    The requests are alike: the same order, as much given, the same positions kept. With `start`, token ids that agree
    with what is kept, the sweeps begin there and there are no particles. Raises ValueError for a request that does not
    fit the layout, or that draws a span of open length; InputError for temperature 0, at which there is nothing to
    choose from.
    """
    if config.temperature == 0:
        raise InputError("temperature 0 draws one and the same code again and again; resampling needs more than 0.")
    executor = executor or job_executor(model, layout, len(requests) * resampling.num_particles, ROWS_AT_ONCE)
    at_once, found = _chains_at_once(config, resampling), []
    with evaluating(model):
        runner = make_executor(model, executor)
        for first in range(0, len(requests), at_once):
            part = slice(first, first + at_once)
            chains = _Chains(runner, layout, requests[part], config, resampling.num_particles)
            tokens = chains.particles(on_step) if start is None else start[part].clone()
            for _ in range(resampling.num_sweeps):
                tokens = chains.sweep(tokens, on_step)
            found.append(tokens)
    return torch.cat(found)


def _shape_of(sequence: TokenSequence) -> tuple:
    """What requests that run together have in common."""
    plan = sequence.plan()
    return tuple(plan.slot_ids), tuple(token < 0 for token in plan.forced)


class _Chains:
    """Rows of one state: of each chain the one that holds what is settled, and behind those of all chains their
    particles. Null rows stand behind all of them, in the same order."""

    def __init__(self, runner: Eager, layout: Layout, requests: Sequence[Request], config: SampleConfig, N: int):
        self.runner, self.config, self.R, self.N = runner, config, len(requests), N
        sequences = [TokenSequence(layout, request) for request in requests]
        for sequence in sequences:
            runner.model.check_request(sequence)
        self.plan = sequences[0].plan()
        if self.plan.stop >= 0 or sequences[0].chooses_order:
            raise ValueError(f"resampling needs a given order and spans of fixed length, not {sequences[0].order}.")
        if len({_shape_of(sequence) for sequence in sequences}) > 1:
            raise ValueError("the requests are not alike: they draw other positions.")
        self.slots = [layout.slots[slot_id] for slot_id in self.plan.slot_ids]
        self.kept = torch.tensor([sequence.plan().forced for sequence in sequences])  # (R, L), −1 where drawn
        self.is_drawn = [forced < 0 for forced in self.plan.forced]
        self.numbers = [np.random.Generator(np.random.Philox(key=[one.seed, _STREAM])) for one in sequences]
        self.is_guided = config.guidance_scale != 1
        self.begun = [sequences]
        if self.is_guided:
            if any(one.null is None for one in sequences):
                raise ValueError("guidance needs a null condition in every request (Request.null).")
            self.begun.append([one.null for one in sequences if one.null is not None])
        self.state = runner.new_state(len(self.begun) * self.R * (N + 1), layout.max_length)

    # Both ways to draw -----------------------------------------------------------------------------------------

    def particles(self, on_step: Callable[[], object]) -> Int[Tensor, "R L"]:
        """One of N particles of each chain, by its weight."""
        self._settle_given()
        hidden = self._spread()
        weights = torch.zeros(self.R, self.N, dtype=torch.float64)
        tokens = torch.zeros(self.R * self.N, 0, dtype=torch.long)
        for at, slot in enumerate(self.slots):
            if self.is_drawn[at]:
                logits = self._logits(hidden, at)
                local, _ = sample(logits, self._uniforms(self.N).flatten().to(logits.device), self.config)
                new = slot.token_ids(local).cpu()
            else:
                new = self.kept[:, at].repeat_interleave(self.N)
                if slot.size > 1:
                    weights = weights + self._log_probs(self._logits(hidden, at), new, slot, at).view(self.R, self.N)
                    parents, uneven = self._resampled(weights)
                    if uneven.any():
                        hidden, tokens = self._follow(parents, hidden), tokens[parents.flatten()]
                        weights[uneven] = 0.0
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            if at + 1 < len(self.slots):
                hidden = self._push(new)
            on_step()
        chosen = draw(weights.softmax(1), self._uniforms(1)[:, 0])
        return tokens.view(self.R, self.N, -1)[torch.arange(self.R), chosen]

    def sweep(self, tokens: Int[Tensor, "R L"], on_step: Callable[[], object]) -> Int[Tensor, "R L"]:
        """Each drawn code of each chain drawn again given all others, in raster order."""
        tokens = tokens.clone()
        self._settle_given()
        num_settled = 0
        for at in (at for at, drawn in enumerate(self.is_drawn) if drawn):
            self._settle(tokens[:, num_settled:at])
            num_settled = at
            tokens[:, at] = self._drawn_again(tokens, at)
            on_step()
        return tokens

    def _drawn_again(self, tokens: Int[Tensor, "R L"], at: int) -> Int[Tensor, " R"]:
        slot, last = self.slots[at], len(self.slots) - 1
        hidden = self._spread()
        logits = self._logits(hidden, at)
        log_probs = reshape(logits, self.config).log_softmax(-1).cpu().double()
        if slot.size <= self.N:  # every code there is; rows beyond them weigh nothing
            local = torch.arange(self.N).clamp(max=slot.size - 1).repeat(self.R, 1)
            weights = log_probs.view(self.R, self.N, -1)[:, 0].gather(1, local)
            weights[:, slot.size :] = -torch.inf
        else:
            local = sample(logits, self._uniforms(self.N).flatten().to(logits.device), self.config)[0].cpu()
            local = local.view(self.R, self.N)
            local[:, 0] = slot.local(tokens[:, at])
            weights = torch.zeros(self.R, self.N, dtype=torch.float64)
        candidates = slot.token_ids(local)
        new = candidates.flatten()
        for behind in range(at + 1, last + 1):
            hidden = self._push(new)
            new = tokens[:, behind].repeat_interleave(self.N)
            if self.slots[behind].size > 1:
                logits = self._logits(hidden, behind)
                weights += self._log_probs(logits, new, self.slots[behind], behind).view(self.R, self.N)
        chosen = draw(weights.softmax(1), self._uniforms(1)[:, 0])
        return candidates[torch.arange(self.R), chosen]

    # Rows of the state -----------------------------------------------------------------------------------------

    def _firsts(self) -> list[int]:
        """Where the rows of each kind begin: conditional ones and, if there are, null ones."""
        return [kind * self.R * (self.N + 1) for kind in range(len(self.begun))]

    def _settle_given(self) -> None:
        self.settled = []
        for first, sequences in zip(self._firsts(), self.begun, strict=True):
            for row, sequence in enumerate(sequences):
                self.state.begin(first + row, sequence.features)
            given = [sequence.token_ids for sequence in sequences]
            self.settled.append(self.runner.extend(self.state, slice(first, first + self.R), given))

    def _settle(self, tokens: Int[Tensor, "R k"]) -> None:
        if tokens.shape[1]:
            for kind, first in enumerate(self._firsts()):
                rows = slice(first, first + self.R)
                self.settled[kind] = self.runner.extend(self.state, rows, tokens.tolist())

    def _spread(self) -> list[Float[Tensor, "rows D"]]:
        """Every particle becomes what is settled of its chain."""
        for first in self._firsts():
            sources = [first + chain for chain in range(self.R) for _ in range(self.N)]
            self.state.copy(sources, range(first + self.R, first + self.R * (self.N + 1)))
        return [hidden.repeat_interleave(self.N, 0) for hidden in self.settled]

    def _push(self, tokens: Int[Tensor, " rows"]) -> list[Float[Tensor, "rows D"]]:
        given = tokens[:, None].tolist()
        starts = [first + self.R for first in self._firsts()]
        return [self.runner.extend(self.state, slice(start, start + len(given)), given) for start in starts]

    def _follow(
        self, parents: Int[Tensor, "R N"], hidden: list[Float[Tensor, "rows D"]]
    ) -> list[Float[Tensor, "rows D"]]:
        flat = parents.flatten()
        for first in self._firsts():
            start = first + self.R
            self.state.copy((flat + start).tolist(), range(start, start + len(flat)))
        return [of_kind[flat.to(of_kind.device)] for of_kind in hidden]

    # Distributions ---------------------------------------------------------------------------------------------

    def _logits(self, hidden: list[Float[Tensor, "rows D"]], at: int) -> Float[Tensor, "rows n"]:
        """Of the slot's ids, guided."""
        cond = self.runner.logits(hidden[0], self.slots[at]).float()
        scale = self.config.guidance_at(*self.plan.steps[at]) if self.is_guided else 1.0
        return cond if scale == 1 else guide(cond, self.runner.logits(hidden[1], self.slots[at]).float(), scale)

    def _log_probs(
        self, logits: Float[Tensor, "rows n"], token_ids: Int[Tensor, " rows"], slot: Slot, at: int
    ) -> Float[Tensor, " rows"]:
        """ln q of a token of each row: filtered where it is drawn, else not."""
        logits = reshape(logits, self.config) if self.is_drawn[at] else logits / self.config.temperature
        local = slot.local(token_ids).to(logits.device)
        return logits.double().log_softmax(-1).gather(1, local[:, None])[:, 0].cpu()

    def _resampled(self, weights: Float[Tensor, "R N"]) -> tuple[Int[Tensor, "R N"], Bool[Tensor, " R"]]:
        """The particles that go on, and in which chains they are others: those whose weights are uneven, worth less
        than N / 2 equal ones. Systematically: one goes on as often as points u, u + 1, … fall into its share of N."""
        shares = weights.softmax(1)
        uneven = shares.square().sum(1) * self.N > 2
        parents = torch.arange(self.R * self.N).view(self.R, self.N)
        for chain in uneven.nonzero()[:, 0].tolist():  # a chain takes a number only where it needs one
            points = (torch.arange(self.N) + self.numbers[chain].random()) / self.N
            passed = torch.searchsorted(shares[chain].cumsum(0), points, right=True).clamp(max=self.N - 1)
            parents[chain] = chain * self.N + passed
        return parents, uneven

    def _uniforms(self, count: int) -> Float[Tensor, "R count"]:
        """New numbers in [0, 1) of each chain: how many were taken before depends on the chain alone."""
        return torch.from_numpy(np.stack([numbers.random(count) for numbers in self.numbers]))
