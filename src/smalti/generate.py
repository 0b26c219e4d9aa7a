"""Generation over a layout: prefill, then decode steps; guidance; prefix completion; streaming; beams; best of n.

A `Request` says which order to follow and what is given of it; everything that is not given is generated, and at
each position only the ids that can stand there are computed. A model is seen through `prefill`, `decode_step` and
`logits` alone.

Randomness belongs to a sequence: its seed gives one uniform number per position, drawn up front, so the same
request gives the same tokens in any batch.

Letters: B rows generated together, S steps, T tokens, D model width, n the ids of a slot.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.fast_decode import PackedDecoder, make_stepper
from smalti.layout import NO_SLOT, Layout, Marker, Order, Slot, Span
from smalti.models import DecoderOnly
from smalti.sampling import SampleConfig, guide, log_prob_of, sample
from smalti.transformer import KVCache


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate."""

    order: str | None = None
    """Name of the layout's order; None lets the model choose by its first marker."""
    given: Mapping[str, Int[Tensor, " L"]] = field(default_factory=dict)
    """Each segment's own numbers, from 0: whole spans, or the beginning of the first span that is not whole."""
    seed: int = 0
    null: "Request | None" = None
    """What guidance steers away from: the same spans ahead, under another condition or none."""


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


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A finished sequence."""

    order: str
    token_ids: Int[Tensor, " T"]
    spans: dict[str, Int[Tensor, " L"]]
    """Each segment's own numbers, given and generated."""
    log_probs: Float[Tensor, " T"]
    """The model's own ln p of each generated token; 0 where a token was given or the only one possible."""
    draw_log_probs: Float[Tensor, " T"]

    @property
    def log_prob(self) -> float:
        """The model's own ln p of all that was generated."""
        return float(self.log_probs.double().sum())


def generate(
    model: DecoderOnly,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
) -> list[Generated]:
    """The requests' sequences, in their order. Raises ValueError for a request that does not fit the layout."""
    sequences = [_Sequence(layout, request) for request in requests]
    for _ in _run(model, layout, sequences, config, batch_size):
        pass
    return [sequence.finished() for sequence in sequences]


def stream(
    model: DecoderOnly,
    layout: Layout,
    requests: Sequence[Request],
    config: SampleConfig = SampleConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 64,
) -> Iterator[Step]:
    """The same tokens as `generate`, as they come."""
    sequences = [_Sequence(layout, request) for request in requests]
    for rows, drawn in _run(model, layout, sequences, config, batch_size):
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
    copies = [replace(request, seed=request.seed + i) for request in requests for i in range(num_candidates)]
    found = generate(model, layout, copies, config, batch_size=batch_size)
    groups = [found[i : i + num_candidates] for i in range(0, len(found), num_candidates)]
    return [sorted(group, key=lambda candidate: -candidate.log_prob) for group in groups]


@torch.inference_mode()
def beam_search(
    model: DecoderOnly, layout: Layout, requests: Sequence[Request], beam_width: int, *, batch_size: int = 64
) -> list[list[Generated]]:
    """For each request, the `beam_width` likeliest sequences a beam finds, the likeliest first; nothing is random.

    Searches through spans of fixed length; raises ValueError where an open span (`{..n}`) is to be generated.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width is {beam_width}; a beam holds at least one sequence.")
    sequences = [_Sequence(layout, request) for request in requests]
    found: dict[int, list[Generated]] = {}
    groups: dict[tuple, list[int]] = {}
    for row, sequence in enumerate(sequences):
        plan = sequence.plan()
        if plan.stop >= 0 or sequence.chooses_order:
            raise ValueError(f"beam search needs a given order and spans of fixed length, not {sequence.order}.")
        groups.setdefault((tuple(plan.slot_ids), len(sequence.token_ids)), []).append(row)
    per_batch = max(1, batch_size // beam_width)
    for rows in groups.values():
        for start in range(0, len(rows), per_batch):
            chunk = rows[start : start + per_batch]
            beams = _beam(model, layout, [sequences[row] for row in chunk], beam_width)
            found.update(zip(chunk, beams, strict=True))
    return [found[row] for row in range(len(requests))]


def _beam(model: DecoderOnly, layout: Layout, batch: list["_Sequence"], width: int) -> list[list[Generated]]:
    """Beams of sequences that have the same plan. Rows b·width .. b·width + width − 1 are sequence b's beam."""
    plan, B = batch[0].plan(), len(batch)
    decoder = _Decoder(model, [sequence.token_ids for sequence in batch for _ in range(width)], [], len(plan.slot_ids))
    scores = torch.full((B, width), -torch.inf, dtype=torch.float64)
    scores[:, 0] = 0  # all of a beam starts as one sequence
    tokens = torch.zeros(B * width, 0, dtype=torch.long)
    log_probs = torch.zeros(B * width, 0)
    for step, (slot_id, forced) in enumerate(zip(plan.slot_ids, plan.forced, strict=True)):
        parents = torch.arange(B * width)
        added, new = torch.zeros(B * width), torch.full((B * width,), forced)
        if forced < 0:
            slot = layout.slots[slot_id]
            step_log_probs = decoder.model.logits(decoder.hidden, slot).float().log_softmax(-1).cpu()  # (B * width, n)
            total = scores[:, :, None] + step_log_probs.view(B, width, -1).double()
            scores, best = total.flatten(1).topk(width, dim=-1)
            parents = (best // slot.size + torch.arange(B)[:, None] * width).flatten()
            local = (best % slot.size).flatten()
            new, added = slot.token_ids(local), step_log_probs[parents, local]
            decoder.select(parents)
        tokens = torch.cat((tokens[parents], new[:, None]), dim=1)
        log_probs = torch.cat((log_probs[parents], added[:, None]), dim=1)
        if step + 1 < len(plan.slot_ids):
            decoder.step(new.to(model.device), guided=False)
    return [
        [_with_tokens(sequence, tokens[row], log_probs[row]) for row in range(b * width, (b + 1) * width)]
        for b, sequence in enumerate(batch)
    ]


def _with_tokens(sequence: "_Sequence", token_ids: Int[Tensor, " S"], log_probs: Float[Tensor, " S"]) -> Generated:
    whole = copy(sequence)
    whole.token_ids = sequence.token_ids + token_ids.tolist()
    whole.log_probs = whole.draw_log_probs = sequence.log_probs + log_probs.tolist()
    return whole.finished()


class _Plan(NamedTuple):
    """What a sequence generates next, up to the first span whose length is open."""

    slot_ids: list[int]
    """The slot of each coming position."""
    forced: list[int]
    """The token there, if only one is possible; else −1."""
    steps: list[tuple[int, int]]
    """Each position's number in its span, and the span's length: what a guidance schedule runs on."""
    stop: int
    """The marker that ends the plan early; −1 if none."""


class _Sequence:
    """One request on its way: what it holds so far, and what may come next."""

    def __init__(self, layout: Layout, request: Request):
        self.layout = layout
        self.orders = list(layout.orders.values()) if request.order is None else [layout[request.order]]
        if request.order is None and request.given:
            raise ValueError("a request that gives something names its order.")
        generator = torch.Generator().manual_seed(request.seed)
        self.uniforms = torch.rand(layout.max_length, generator=generator, dtype=torch.float64)
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.draw_log_probs: list[float] = []
        self.part = 0  # the part the next token belongs to
        self.filled = 0  # tokens that part has already
        self.null: _Sequence | None = None
        self._give(dict(request.given))
        if request.null is not None:
            self.null = _Sequence(layout, request.null)

    @property
    def order(self) -> Order:
        return self.orders[0]

    @property
    def is_finished(self) -> bool:
        return self.part == len(self.order.parts)

    @property
    def chooses_order(self) -> bool:
        """Whether the next token decides which order this is."""
        return self._differ_at(self.part)

    def _differ_at(self, part: int) -> bool:
        return len(self.orders) > 1 and len({order.parts[part] for order in self.orders}) > 1

    def plan(self) -> _Plan:
        """What comes next: to the end, or through the first open span, or just the marker that picks the order."""
        plan = _Plan([], [], [], -1)
        for index in range(self.part, len(self.order.parts)):
            part = self.order.parts[index]
            slot_id = self.layout.slot_index(self.order.name, index)
            if isinstance(part, Marker):
                chosen = self._differ_at(index)
                forced = -1 if chosen else self.layout.vocabulary.special(part.special)
                _plan_tokens(plan, slot_id, [(0, 1)], forced)
                if chosen:
                    return plan
                continue
            coming = range(self.filled if index == self.part else 0, part.length)
            _plan_tokens(plan, slot_id, [(step, part.length) for step in coming], -1)
            if part.end is not None:
                stop = self.layout.vocabulary.special(part.end)
                _plan_tokens(plan, self.layout.end_slot_index(part), [(0, 1)], stop)
                return plan._replace(stop=stop)
        return plan

    def push(self, token: int, log_prob: float = 0.0, draw_log_prob: float = 0.0) -> None:
        """Appends a token and moves on to the next part where this one is full or ended. The null follows."""
        if self.chooses_order:
            special = self.layout.vocabulary.special
            self.orders = [o for o in self.orders if special(str(o.parts[self.part])) == token]
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        self.draw_log_probs.append(draw_log_prob)
        if self.null is not None:
            self.null.push(token)
        part = self.order.parts[self.part]
        self.filled += 1
        if isinstance(part, Marker):
            full = True
        elif part.end is None:
            full = self.filled == part.length
        else:
            full = token == self.layout.vocabulary.special(part.end)
        if full:
            self.part, self.filled = self.part + 1, 0

    def finished(self) -> Generated:
        token_ids = torch.tensor(self.token_ids, dtype=torch.long)
        spans = {}
        for span in self.order.spans:
            segment = self.layout.vocabulary[span.segment]
            inside = (token_ids >= segment.offset) & (token_ids < segment.end)
            spans[span.segment] = token_ids[inside] - segment.offset
        return Generated(
            order=self.order.name,
            token_ids=token_ids,
            spans=spans,
            log_probs=torch.tensor(self.log_probs),
            draw_log_probs=torch.tensor(self.draw_log_probs),
        )

    def _give(self, given: dict[str, Int[Tensor, " L"]]) -> None:
        """Pushes what is certain: markers, and given spans as far as they reach."""
        while not self.is_finished and not self.chooses_order:
            part = self.order.parts[self.part]
            if isinstance(part, Marker):
                self.push(self.layout.vocabulary.special(part.special))
            elif part.segment not in given or not self._give_span(part, given.pop(part.segment)):
                break
        if given:
            raise ValueError(
                f"{sorted(given)} cannot be given: order {self.order.name!r} ({self.order}) has no such span, "
                "or a span before it is not given whole."
            )
        if not self.token_ids and not self.chooses_order:
            raise ValueError(
                f"order {self.order.name!r} ({self.order}) has nothing to start from: give its first span."
            )

    def _give_span(self, span: Span, numbers: Int[Tensor, " L"]) -> bool:
        """Pushes a span's given tokens; whether the span is whole now. A given open span always is."""
        size = self.layout.vocabulary[span.segment].size
        if numbers.numel() > span.length:
            raise ValueError(f"{numbers.numel()} {span.segment} tokens are given; the layout takes {span.length}.")
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
            raise ValueError(f"a given {span.segment} token is outside 0..{size - 1}: {numbers.tolist()}.")
        for token in self.layout.vocabulary.ids(span.segment, numbers).tolist():
            self.push(token)
        if span.end is not None:
            self.push(self.layout.vocabulary.special(span.end))
        return span.end is not None or numbers.numel() == span.length


def _plan_tokens(plan: _Plan, slot_id: int, steps: list[tuple[int, int]], forced: int) -> None:
    plan.slot_ids.extend([slot_id] * len(steps))
    plan.forced.extend([forced] * len(steps))
    plan.steps.extend(steps)


class _Drawn(NamedTuple):
    """One step of a batch."""

    running: Bool[Tensor, " B"]
    positions: list[int]
    token_ids: Int[Tensor, " B"]
    log_probs: Float[Tensor, " B"]
    draw_log_probs: Float[Tensor, " B"]


def _run(
    model: DecoderOnly, layout: Layout, sequences: list[_Sequence], config: SampleConfig, batch_size: int
) -> Iterator[tuple[list[int], _Drawn]]:
    """Plan by plan, in batches of sequences that have about as many tokens behind them."""
    rows = [row for row, sequence in enumerate(sequences) if not sequence.is_finished]
    while rows:
        rows.sort(key=lambda row: (len(sequences[row].token_ids), row))
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            for drawn in _run_batch(model, layout, [sequences[row] for row in chunk], config):
                yield chunk, drawn
        rows = [row for row in rows if not sequences[row].is_finished]


@torch.inference_mode()
def _run_batch(model: DecoderOnly, layout: Layout, batch: list[_Sequence], config: SampleConfig) -> Iterator[_Drawn]:
    """Carries out the plans of a batch, then pushes what was drawn onto its sequences."""
    stage = _Stage(layout, batch, config, model.device)
    nulls = _null_prefixes(batch) if stage.is_guided_anywhere else []
    decoder = _Decoder(model, [sequence.token_ids for sequence in batch], nulls, stage.num_steps)
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
    columns = zip(*(torch.stack(values, dim=1).tolist() for values in list(zip(*steps, strict=True))[2:]), strict=True)
    counts = torch.stack([drawn.running for drawn in steps], dim=1).sum(1).tolist()
    for sequence, count, (token_ids, log_probs, draw_log_probs) in zip(batch, counts, columns, strict=True):
        for i in range(count):
            sequence.push(token_ids[i], log_probs[i], draw_log_probs[i])


def _null_prefixes(batch: list[_Sequence]) -> list[list[int]]:
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

    def __init__(self, layout: Layout, batch: list[_Sequence], config: SampleConfig, device: torch.device):
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

    def pick(
        self, decoder: "_Decoder", step: int
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
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
        self, decoder: "_Decoder", step: int, slot: Slot, rows: slice | Int[Tensor, " R"]
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
        cond = decoder.model.logits(decoder.hidden[rows], slot).float()
        logits = cond
        if self._guided[step]:
            null = decoder.model.logits(decoder.null_hidden[rows], slot).float()
            logits = guide(cond, null, self.scales[rows, step, None])
        local, draw_log_probs = sample(logits, self.uniforms[rows, step], self.config)
        log_probs = draw_log_probs if self.config.is_plain else log_prob_of(cond, local)
        return slot.token_ids(local), log_probs, draw_log_probs


def _table(rows: list[list], width: int, fill: float, device: torch.device) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


class _Decoder:
    """Owns the cache. Under guidance the null rows stand behind the conditional ones and run in the same batch.

    Where a step is not guided the null rows stay behind; when they are wanted again they catch up in one pass.
    """

    def __init__(self, model: DecoderOnly, prefixes: list[list[int]], nulls: list[list[int]], num_steps: int):
        self.model: DecoderOnly | PackedDecoder = make_stepper(model, num_steps)
        self.num_rows = len(prefixes)
        every = prefixes + nulls
        width = max(map(len, every))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in every], device=model.device)
        starts = torch.tensor([width - len(row) for row in every], device=model.device)
        self.cache = model.new_cache(len(every), width + num_steps - 1, starts)
        self.behind: list[Int[Tensor, " B"]] = []  # tokens the null rows have not seen
        self._set(model.prefill(padded, self.cache))

    def _set(self, hidden: Float[Tensor, "R D"]) -> None:
        self.hidden, self.null_hidden = hidden[: self.num_rows], hidden[self.num_rows :]

    def step(self, token_ids: Int[Tensor, " B"], *, guided: bool) -> None:
        """Runs one token of each row, also through the null rows if what it predicts is guided."""
        if not len(self.null_hidden):
            self._set(self.model.decode_step(token_ids, self.cache))
        elif guided and not self.behind:
            self._set(self.model.decode_step(token_ids.repeat(2), self.cache))
        else:
            self.behind.append(token_ids)
            self._step_apart(token_ids, guided)

    def _step_apart(self, token_ids: Int[Tensor, " B"], guided: bool) -> None:
        cond: KVCache = self.cache.rows(0, self.num_rows)
        self.hidden = self.model.decode_step(token_ids, cond)
        if guided:
            null = self.cache.rows(self.num_rows, 2 * self.num_rows)
            null.length = cond.length - len(self.behind)
            self.null_hidden = self.model.prefill(torch.stack(self.behind, dim=1), null)
            self.behind = []
        self.cache.length = cond.length

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Row i goes on from what row rows[i] was."""
        self.cache.select(rows.to(self.model.device))
