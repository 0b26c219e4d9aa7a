"""From logits to ids: pure functions. There is one sampler, and this is it.

The order is guide, temperature, filter, draw. Randomness comes in as one uniform number per token, and the token is
the inverse of the cumulative distribution at that number: what a sequence draws depends only on its own random numbers,
not on the rest of the batch, and it costs a tenth of `torch.multinomial` on a CPU.

Letters: B batch, n the ids of a slot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")
COUPLINGS = ("maximal", "gumbel", "inverse")
MOST_DRAFTS = 1024


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to draw. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely ids whose probability reaches p."""
    min_p: float = 0.0
    """Keep ids at least min_p times as likely as the most likely one (arXiv:2407.01082)."""
    guidance_scale: float = 1.0
    """guided = null + scale · (cond − null): 1 is off, 0 is unconditional (arXiv:2207.12598, on logits)."""
    guidance_schedule: str = "constant"
    """How the scale grows from 1 over a span: constant at once, linear, or cosine."""
    guidance_power: float = 1.0
    """The schedule's time t becomes t^power: with "cosine" this is RAR's power-cosine (arXiv:2411.00776)."""
    guidance_interval: tuple[int, int | None] = (0, None)
    """Tokens [start, end) of a span are guided, the others conditional; the second pass is skipped there."""

    speculative: int = 0
    """Draft so many tokens ahead and verify them in one pass; 0 is off. The distribution stays what it is."""
    coupling: str = "maximal"
    """How drafts are verified (`engine/speculative.py`): maximal keeps the most; with gumbel the picture does not
    depend on `speculative`; with inverse it is the picture that is drawn without drafts."""

    def __post_init__(self) -> None:
        _check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "a share in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "a share in [0, 1]")
        # beyond it, the difference of two logits would leave the range of float32
        _check(abs(self.guidance_scale) <= 1e30, "guidance_scale", self.guidance_scale, "a number within ±1e30")
        _check(self.guidance_schedule in SCHEDULES, "guidance_schedule", self.guidance_schedule, ", ".join(SCHEDULES))
        _check(self.guidance_power > 0, "guidance_power", self.guidance_power, "more than 0")
        start, end = self.guidance_interval
        fine = start >= 0 and (end is None or end >= start)
        _check(fine, "guidance_interval", self.guidance_interval, "0 <= start <= end, end may be None")
        fine = 0 <= self.speculative <= MOST_DRAFTS
        _check(fine, "speculative", self.speculative, f"0 (off) to {MOST_DRAFTS} drafts")
        _check(self.coupling in COUPLINGS, "coupling", self.coupling, ", ".join(COUPLINGS))

    def guidance_at(self, step: int, num_steps: int) -> float:
        """The scale for token `step` of a span of `num_steps`; exactly 1 where the null pass is not needed."""
        start, end = self.guidance_interval
        if step < start or (end is not None and step >= end):
            return 1.0
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        time = (step / num_steps) ** self.guidance_power
        grown = time if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * time)) / 2
        return 1 + (self.guidance_scale - 1) * grown

    @property
    def is_filtered(self) -> bool:
        """Whether some ids may be dropped."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_plain(self) -> bool:
        """Whether what is drawn from is the model's own distribution."""
        return not self.is_filtered and self.temperature == 1 and self.guidance_scale == 1


def _check(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {value}; expected {expected}.")


def guide(
    cond: Float[Tensor, "B n"], null: Float[Tensor, "B n"], scale: float | Float[Tensor, "B 1"]
) -> Float[Tensor, "B n"]:
    """null + scale · (cond − null)."""
    return null + scale * (cond - null)


def filter_logits(
    logits: Float[Tensor, "B n"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "B n"]:
    """Logits with what the filters drop set to −inf; top-k first, then top-p of what is left, then min-p.

    Exactly k survive top-k even among equals (the lower ids). The most likely id always survives.
    """
    if top_k and top_k < logits.shape[-1]:
        # a stable sort, not topk: among equal logits topk's choice depends on the shape of the batch
        dropped = logits.sort(dim=-1, descending=True, stable=True).indices[:, top_k:]
        logits = logits.scatter(-1, dropped, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.double().softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the more likely ones; 0 for the first, which so always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    if min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits


def draw(probs: Float[Tensor, "B n"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The id at which the cumulative distribution passes the row's uniform number in [0, 1); NaN draws the last id."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    # The sum is 1 only up to rounding; staying a hair below it keeps the last id from being drawn at probability 0.
    passed = uniforms[:, None] * (cumulative[:, -1:] * (1 - 2**-52))
    return torch.searchsorted(cumulative, passed, right=True)[:, 0].clamp(max=probs.shape[1] - 1)


def reshape(logits: Float[Tensor, "B n"], config: SampleConfig) -> Float[Tensor, "B n"]:
    """Logits at a temperature other than 0, filtered."""
    if config.temperature != 1:
        logits = logits / config.temperature
    return filter_logits(logits, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)


def sample(
    logits: Float[Tensor, "B n"], uniforms: Float[Tensor, " B"], config: SampleConfig
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draws an id per row from logits that are already guided; with the log-probability it was drawn with."""
    if config.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    probs = reshape(logits, config).softmax(-1)
    ids = draw(probs, uniforms)
    return ids, probs.gather(-1, ids[:, None])[:, 0].log()


def log_prob_of(logits: Float[Tensor, "B n"], ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """ln softmax(logits) at one id per row."""
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


# ---- the same with settings in tensors, for steps that are captured or compiled once and serve all settings ----


class Settings(NamedTuple):
    """`SampleConfig` of each row."""

    temperature: Float[Tensor, "B 1"]
    """0 is greedy."""
    top_k: Float[Tensor, "B 1"]
    top_p: Float[Tensor, "B 1"]
    """Infinite where all are kept: sums of probabilities may reach 1 early."""
    log_min_p: Float[Tensor, "B 1"]

    @classmethod
    def of(cls, table: Float[Tensor, "rows 2 B"]) -> "Settings":
        """The settings that stand in the first two rows of a table, as `settings_of` made them."""
        (temperature, top_k), (top_p, log_min_p) = table[:2, :, :, None]
        return cls(temperature.float(), top_k, top_p, log_min_p.float())


def settings_of(configs: Sequence[SampleConfig]) -> Float[Tensor, "2 2 B"]:
    """The settings of rows in numbers."""
    rows = [
        (
            config.temperature,
            config.top_k or math.inf,
            config.top_p if config.top_p < 1 else math.inf,
            math.log(config.min_p) if config.min_p else -math.inf,
        )
        for config in configs
    ]
    return torch.tensor(rows, dtype=torch.float64).t().reshape(2, 2, -1)


def filter_rows(logits: Float[Tensor, "B n"], settings: Settings) -> Float[Tensor, "B n"]:
    """`filter_logits` with each row's own settings, by one sort."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.arange(logits.shape[-1], device=logits.device) >= settings.top_k
    probs = ordered.masked_fill(dropped, -math.inf).double().softmax(-1)
    dropped |= probs.cumsum(-1) - probs >= settings.top_p
    dropped |= ordered < ordered[:, :1] + settings.log_min_p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)


def sample_rows(
    logits: Float[Tensor, "B n"], uniforms: Float[Tensor, " B"], settings: Settings, *, filtered: bool
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """`sample` with each row's own settings; `filtered`: whether any of them drops ids."""
    is_greedy = settings.temperature == 0
    warm = logits / settings.temperature.masked_fill(is_greedy, 1.0)
    probs = (filter_rows(warm, settings) if filtered else warm).softmax(-1)
    ids = torch.where(is_greedy[:, 0], logits.argmax(-1), draw(probs, uniforms))
    log_probs = probs.gather(-1, ids[:, None])[:, 0].log()
    return ids, log_probs.masked_fill(is_greedy[:, 0], 0.0)
