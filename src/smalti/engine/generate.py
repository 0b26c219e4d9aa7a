"""Generation over a layout: prefill, then decode steps; guidance; prefix completion; streaming; best of n.

A `Request` says which order to follow and what is given of it; everything that is not given is generated, and at
each position only the ids that can stand there are computed. A model is seen through `prefill`, `decode_step` and
`logits` alone.

Randomness belongs to a sequence: its seed gives one uniform number per position, drawn up front, so the same
request gives the same tokens in any batch.

Letters: B rows generated together, S steps, T tokens, D model width, n the ids of a slot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.engine.decoder import Decoder
from smalti.engine.packed import choose_executor
from smalti.engine.sampling import SampleConfig
from smalti.models.decoder_only import DecoderOnly, evaluating
from smalti.sequences.layout import NO_SLOT, Layout, Slot
from smalti.sequences.request import Generated, Request, TokenSequence


class Step(NamedTuple):
    """What one decode step added, for the rows still running."""

    rows: Int[Tensor, " B"]
    """Which request each entry belongs to."""
    positions: Int[Tensor, " B"]
    """Where in its sequence the token stands."""
    token_ids: Int[Tensor, " B"]
    log_probs: Float[Tensor, " B"]
    """The model's own ln p of the token: temperature 1, no filter, no guidance."""
    draw_log_probs: Float[Tensor, " B"]
    """ln p under the distribution it was drawn from; equal to `log_probs` where nothing reshapes it."""


def generate(
    model: DecoderOnly,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
    executor: str | None = None,
) -> list[Generated]:
    """The requests' sequences, in their order. Raises ValueError for a request that does not fit the layout.

    `executor` is one of `fast_decode.EXECUTORS`; by default `job_executor` chooses.
    """
    sequences = [TokenSequence(layout, request) for request in requests]
    for _ in _run(model, layout, sequences, config, batch_size, executor):
        pass
    return [sequence.finished() for sequence in sequences]


def stream(
    model: DecoderOnly,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
    executor: str | None = None,
) -> Iterator[Step]:
    """The same tokens as `generate`, as they come."""
    sequences = [TokenSequence(layout, request) for request in requests]
    for rows, drawn in _run(model, layout, sequences, config, batch_size, executor):
        running = drawn.running.nonzero()[:, 0].tolist()
        positions = [drawn.positions[i] for i in running]
        values = (value[running].cpu() for value in (drawn.token_ids, drawn.log_probs, drawn.draw_log_probs))
        yield Step(torch.tensor([rows[i] for i in running]), torch.tensor(positions), *values)


def best_of(
    model: DecoderOnly,
    layout: Layout,
    requests: Sequence[Request],
    num_candidates: int,
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
) -> list[list[Generated]]:
    """For each request, candidates with the seeds seed, seed + 1, ..., the most likely under the model first."""
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1.")
    copies = [replace(request, seed=request.seed + i) for request in requests for i in range(num_candidates)]
    found = generate(model, layout, copies, config, batch_size=batch_size)
    groups = [found[i : i + num_candidates] for i in range(0, len(found), num_candidates)]
    return [sorted(group, key=lambda candidate: -candidate.log_prob) for group in groups]


def job_executor(model: DecoderOnly, layout: Layout, num_requests: int, batch_size: int = 64) -> str:
    """What so many requests run on if nothing else is asked for."""
    with evaluating(model):
        return choose_executor(model, -(-num_requests // max(1, batch_size)) * layout.max_length)


class _Drawn(NamedTuple):
    """One step of a batch."""

    running: Bool[Tensor, " B"]
    positions: list[int]
    token_ids: Int[Tensor, " B"]
    log_probs: Float[Tensor, " B"]
    draw_log_probs: Float[Tensor, " B"]


def _run(
    model: DecoderOnly,
    layout: Layout,
    sequences: list[TokenSequence],
    config: SampleConfig,
    batch_size: int,
    executor: str | None,
) -> Iterator[tuple[list[int], _Drawn]]:
    """Plan by plan, in batches of sequences that have about as many tokens behind them."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch holds at least one sequence.")
    rows = [row for row, sequence in enumerate(sequences) if not sequence.is_finished]
    executor = executor or job_executor(model, layout, len(rows), batch_size)
    with evaluating(model):
        while rows:
            rows.sort(key=lambda row: (len(sequences[row].token_ids), row))
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                for drawn in _run_batch(model, layout, [sequences[row] for row in chunk], config, executor):
                    yield chunk, drawn
            rows = [row for row in rows if not sequences[row].is_finished]


@torch.inference_mode()
def _run_batch(
    model: DecoderOnly, layout: Layout, batch: list[TokenSequence], config: SampleConfig, executor: str
) -> Iterator[_Drawn]:
    """Carries out the plans of a batch, then pushes what was drawn onto its sequences."""
    stage = _Stage(layout, batch, config, model.device)
    nulls = _null_prefixes(batch) if stage.is_guided_anywhere else []
    decoder = Decoder(model, [sequence.token_ids for sequence in batch], nulls, stage.num_steps, executor)
    running = torch.ones(len(batch), dtype=torch.bool, device=model.device)
    steps: list[_Drawn] = []
    for step in range(stage.num_steps):
        if stage.ends_early:  # rows end at their own steps: by a marker drawn, or by a shorter plan
            running = running & (stage.slot_ids[:, step] != NO_SLOT)
            if not running.any():
                break
        token_ids, log_probs, draw_log_probs = stage.pick(decoder, step)
        steps.append(_Drawn(running, stage.positions(step), token_ids, log_probs, draw_log_probs))
        yield steps[-1]
        if stage.ends_early:
            running = running & (token_ids != stage.stops)
        if step + 1 < stage.num_steps:
            decoder.step(token_ids, guided=stage.is_guided(step + 1))
    counts = torch.stack([drawn.running for drawn in steps], dim=1).sum(1).tolist()
    token_rows = torch.stack([drawn.token_ids for drawn in steps], dim=1).tolist()
    log_prob_rows = torch.stack([drawn.log_probs for drawn in steps], dim=1).tolist()
    draw_rows = torch.stack([drawn.draw_log_probs for drawn in steps], dim=1).tolist()
    for sequence, count, *rows in zip(batch, counts, token_rows, log_prob_rows, draw_rows, strict=True):
        for token, log_prob, draw_log_prob in islice(zip(*rows, strict=True), count):
            sequence.push(token, log_prob, draw_log_prob)


def _null_prefixes(batch: list[TokenSequence]) -> list[list[int]]:
    prefixes = []
    for sequence in batch:
        if sequence.null is None:
            raise ValueError("guidance needs a null condition in every request (Request.null).")
        ahead = sequence.plan().slot_ids
        if sequence.null.plan().slot_ids[: len(ahead)] != ahead:
            raise ValueError(f"the null condition leaves other spans: {sequence.null.order}, not {sequence.order}.")
        prefixes.append(sequence.null.token_ids)
    return prefixes


class _Stage:
    """The plans of a batch side by side, as tensors; the steps of one batch until they are carried out."""

    def __init__(self, layout: Layout, batch: list[TokenSequence], config: SampleConfig, device: torch.device):
        plans = [sequence.plan() for sequence in batch]
        self.layout, self.config = layout, config
        self.lengths = [len(sequence.token_ids) for sequence in batch]
        self.num_steps = max(len(plan.slot_ids) for plan in plans)
        self.slot_ids = _table([plan.slot_ids for plan in plans], self.num_steps, NO_SLOT, device)
        self.forced = _table([plan.forced for plan in plans], self.num_steps, 0, device)
        self.stops = torch.tensor([plan.stop for plan in plans], device=device)
        self.ends_early = bool((self.stops >= 0).any()) or bool((self.slot_ids == NO_SLOT).any())
        uniforms = [sequence.uniforms[len(sequence.token_ids) :] for sequence in batch]
        self.uniforms = torch.nn.utils.rnn.pad_sequence(uniforms, batch_first=True).to(device)
        self.scales = torch.ones(self.forced.shape, device=device)
        if config.guidance_scale != 1:
            scales = [[config.guidance_at(*step) for step in plan.steps] for plan in plans]
            self.scales = _table(scales, self.num_steps, 1.0, device)
            self.scales[self.forced >= 0] = 1.0  # nothing is drawn there
        self._guided = (self.scales != 1).any(0).tolist()
        # Columns in which all rows do the same are the rule: one slot, one head, no grouping.
        self._same_slot = [row[0] if len(set(row)) == 1 else None for row in self.slot_ids.T.tolist()]
        self._all_forced = (self.forced >= 0).all(0).tolist()

    @property
    def is_guided_anywhere(self) -> bool:
        return any(self._guided)

    def is_guided(self, step: int) -> bool:
        return self._guided[step]

    def positions(self, step: int) -> list[int]:
        return [length + step for length in self.lengths]

    def pick(self, decoder: Decoder, step: int) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The token of each row at a step, with its ln p under the model and under what it was drawn from."""
        forced = self.forced[:, step]
        if self._all_forced[step]:
            zeros = torch.zeros(len(forced), device=forced.device)
            return forced, zeros, zeros
        same = self._same_slot[step]
        if same is not None:
            return self._draw(decoder, step, self.layout.slots[same], slice(None))
        token_ids, log_probs, draw_log_probs = forced.clamp(min=0), *torch.zeros(2, len(forced), device=forced.device)
        slot_ids = torch.where(forced < 0, self.slot_ids[:, step], NO_SLOT)
        for slot_id in set(slot_ids.tolist()) - {NO_SLOT}:
            rows = (slot_ids == slot_id).nonzero()[:, 0]
            drawn = self._draw(decoder, step, self.layout.slots[slot_id], rows)
            for held, new in zip((token_ids, log_probs, draw_log_probs), drawn, strict=True):
                held[rows] = new
        return token_ids, log_probs, draw_log_probs

    def _draw(
        self, decoder: Decoder, step: int, slot: Slot, rows: slice | Int[Tensor, " R"]
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
        scales = self.scales[rows, step] if self._guided[step] else None
        return decoder.draw(slot, rows, self.uniforms[rows, step], scales, self.config)


def _table(rows: list[list], width: int, fill: float, device: torch.device) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
