"""The engine: requests come and go, and every step draws one token of each that is open, or several ahead.

A request is carried out alone, whatever else runs: its seed gives one uniform number a position, drawn up front, its
settings are its own, and an executor computes a row to the same bits in any company. A guided picture is one request of
two linked rows, the second under the null condition: they enter and leave together. Where a step is not guided the null
row stays behind; when it is wanted again it catches up in one pass.

Letters: C requests there is room for, D model width, n rows drawn together.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.engine.executors import Ahead, StaticSteps, make_executor
from smalti.engine.executors.base import Token
from smalti.engine.sampling import SampleConfig
from smalti.engine.speculative import Drafts, Window, num_kept, redraw
from smalti.errors import InputError
from smalti.models.base import SequenceModel
from smalti.models.decode_state import Rows
from smalti.sequences.layout import Layout
from smalti.sequences.request import Generated, Request, TokenSequence

MOST_CONFIGS = 1024
"""Settings that are remembered beyond the requests that draw with them."""


class Event(NamedTuple):
    """A token that was drawn, or that is certain behind one that was."""

    ticket: int
    """Which request: they are numbered from 0 in the order of `submit`."""
    position: int
    """Where in its sequence the token stands."""
    token_id: int
    log_prob: float
    """The model's own ln p of the token: temperature 1, no filter, no guidance."""
    draw_log_prob: float
    """ln p under the distribution it was drawn from; equal to `log_prob` where nothing reshapes it."""


class Engine:
    """Carries out requests on rows of one state.

    `capacity` requests run at once, of which `guided_capacity` (by default all) may be guided; more wait their turn.
    `executor` names one of `EXECUTORS`; by default the first that takes a job of any length. Raises InputError if the
    executor cannot take the model, ValueError for a model in training mode.
    """

    def __init__(
        self,
        model: SequenceModel,
        layout: Layout,
        *,
        capacity: int = 64,
        guided_capacity: int | None = None,
        executor: str | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; an engine has room for at least one request.")
        if model.training:
            raise ValueError("the model is in training mode; call its eval() first.")
        model.check_layout(layout)
        self.layout, self.capacity = layout, capacity
        self.executor = make_executor(model, executor)
        self.static = self.executor if isinstance(self.executor, StaticSteps) else None
        # The rows of the requests stand from `first` on, upwards, their null rows before it, downwards: together, and
        # each by themselves, they are side by side.
        self.first = capacity if guided_capacity is None else min(guided_capacity, capacity)
        with torch.inference_mode():
            self.state = self.executor.new_state(self.first + capacity, layout.max_length)
            self.hidden: Float[Tensor, "rows D"] = torch.zeros(0)
        self.ahead: dict[int, Float[Tensor, "k D"]] = {}
        """Of rows that ran drafts: the hidden states of the last token that is certain and of the drafts."""
        self.active: list[_Running] = []  # number i is in row first + i
        self.guided: list[_Running] = []  # the null row of number j is first − 1 − j
        self.waiting: deque[_Running] = deque()
        self.finished: dict[int, TokenSequence] = {}
        self.configs: dict[SampleConfig, int] = {}
        self.num_configs = self.num_tickets = 0
        self.speculates = False  # whether any request ever asked for drafts

    @property
    def is_idle(self) -> bool:
        return not self.active and not self.waiting

    def submit(self, request: Request, config: SampleConfig = SampleConfig()) -> int:  # noqa: B008 (frozen)
        """Takes a request in; returns its ticket. Raises ValueError for one that does not fit the layout, or lacks the
        null condition that guidance needs, or wants a span that the model was only ever given."""
        number = self._number(config)
        sequence = TokenSequence(self.layout, request)
        for one in (sequence, sequence.null):
            if one is not None:
                self.executor.model.check_request(one)
        reasons = self.executor.why_no_drafts(self.executor.model) if config.speculative else []
        if reasons:
            raise InputError(f"speculative {config.speculative}: {'; '.join(reasons)}.")
        running = _Running(self.num_tickets, sequence, config, number)
        if running.is_guided and not self.first:
            raise ValueError("this engine was made without room for guided requests (guided_capacity=0).")
        self.num_tickets += 1
        self.speculates |= bool(config.speculative)
        if running.sequence.is_finished:
            self.finished[running.ticket] = running.sequence
        else:
            self.waiting.append(running)
        return running.ticket

    def _number(self, config: SampleConfig) -> int:
        """Tells settings apart. A server sees ever new ones: those of requests that are gone are forgotten."""
        if config not in self.configs:
            if len(self.configs) >= MOST_CONFIGS:
                self.configs = {running.config: running.number for running in (*self.active, *self.waiting)}
            self.configs[config] = self.num_configs
            self.num_configs += 1
        return self.configs[config]

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Forgets a request, finished or not; its rows are free at once. Raises KeyError for a ticket there is not."""
        for running in self.waiting:
            if running.ticket == ticket:
                self.waiting.remove(running)
                return
        for running in self.active:
            if running.ticket == ticket:
                self._leave([running])
                return
        del self.finished[ticket]

    def take(self, ticket: int) -> Generated:
        """A finished sequence, which the engine then forgets. Raises KeyError if it is not finished."""
        return self.finished.pop(ticket).finished()

    def step(self) -> list[Event]:
        """Draws a token of every open request, and what is certain behind it."""
        with torch.inference_mode():
            self._enter()
            before = [(running, len(running.drawn)) for running in self.active]
            self._advance(most=1)
        return [event for running, start in before for event in running.events(start)]

    @torch.inference_mode()
    def run(self) -> None:
        """Carries out everything that was submitted."""
        while not self.is_idle:
            self._enter()
            self._advance()

    def _advance(self, most: int | None = None) -> None:
        """A token of every request that has its rows, or as many as all draw alike, at most so many."""
        if not self.active:
            return
        least = 2 if self.static is None else 1
        if most is None or most >= least:
            num_tokens = self._num_alike() if most is None else min(most, self._num_alike())
            if num_tokens >= least:
                self._draw_alike(num_tokens)
                return
        self._extend()
        if any([self._draw(group) for group in self._groups()]):  # a list: every group draws
            self._leave([running for running in self.active if running.sequence.is_finished])

    def _enter(self) -> None:
        while self.waiting and len(self.active) < self.capacity:
            running = self.waiting[0]
            if running.is_guided:
                if len(self.guided) == self.first:
                    return
                running.null_row = self.first - 1 - len(self.guided)
                assert running.sequence.null is not None
                self.state.begin(running.null_row, running.sequence.null.features)
                self.guided.append(running)
            running.row = self.first + len(self.active)
            self.state.begin(running.row, running.sequence.features)
            self.active.append(self.waiting.popleft())

    def _leave(self, leaving: Sequence["_Running"]) -> None:
        """Takes requests out; the last ones take the rows that get free."""
        for running in reversed(leaving):
            for row in (running.row, running.null_row):
                if row >= 0 and not running.is_finite:
                    self.state.clear(row)
            if running.is_guided:
                self._fill(self.guided, running, "null_row")
            self._fill(self.active, running, "row")
            if running.sequence.is_finished:
                self.finished[running.ticket] = running.sequence

    def _fill(self, held: list["_Running"], leaving: "_Running", row: str) -> None:
        last = held.pop()
        if last is leaving:
            return
        source, target = getattr(last, row), getattr(leaving, row)
        self.state.copy([source], [target])
        if len(self.hidden):
            self.hidden[target] = self.hidden[source]
        setattr(last, row, target)
        held[held.index(leaving)] = last

    def _extend(self) -> None:
        """Runs what the rows have not seen, where it is needed for what is drawn next."""
        nulls = [running for running in reversed(self.guided) if running.wants_null]
        rows = [running.null_row for running in nulls] + [running.row for running in self.active]
        seen = self.state.lengths[self.first : self.first + len(self.active)]
        tokens = [running.null_pending(self.state.lengths[running.null_row]) for running in nulls]
        tokens += [running.token_ids[length:] for running, length in zip(self.active, seen, strict=True)]
        drafts = [running.run_drafts for running in (*nulls, *self.active)] if self.speculates else [[]] * len(rows)
        together: Rows = slice(rows[0], rows[-1] + 1) if len(nulls) in (0, len(self.guided)) else rows
        counts = list(map(len, tokens))
        self.ahead = {}
        if not any(drafts) and counts.count(1) == len(counts):
            self._run(together, tokens)
            return
        if all(drafts):
            self._run_ahead(together, list(zip(rows, tokens, drafts, strict=True)))
            return
        pending = list(zip(rows, tokens, drafts, strict=True))
        one = [(row, new) for row, new, ahead in pending if not ahead and len(new) == 1]
        more = [(row, new) for row, new, ahead in pending if not ahead and len(new) > 1]
        drafted = [one_row for one_row in pending if one_row[2]]
        if one:
            self._run([row for row, _ in one], [new for _, new in one])
        if more:
            self._run_once(more)
        if drafted:
            self._run_ahead([row for row, _, _ in drafted], drafted)

    def _run(self, rows: Rows, tokens: list[list[int]]) -> None:
        hidden = self.executor.extend(self.state, rows, tokens)
        if not len(self.hidden):
            self.hidden = hidden.new_zeros(self.state.capacity, hidden.shape[1])
        self.hidden[rows] = hidden

    def _run_ahead(self, rows: Rows, ahead: list[tuple[int, list[int], list[int]]]) -> None:
        """Runs what rows have not seen, and drafts behind it."""
        hidden = self.executor.extend_all(self.state, rows, [tokens + drafts for _, tokens, drafts in ahead])
        end = 0
        for row, tokens, drafts in ahead:
            start, end = end + len(tokens) - 1, end + len(tokens) + len(drafts)
            self.ahead[row] = hidden[start:end]

    def _run_once(self, pending: list[tuple[int, list[int]]]) -> None:
        """Runs several tokens of rows; a beginning that several share, as the candidates of a prompt do, once."""
        same: dict[tuple, int] = {}
        rows, tokens, copies = [], [], []
        for row, new in pending:
            if self.state.lengths[row] == 0:
                source = same.setdefault((id(self.state.conditions[row]), *new), row)
                if source != row:
                    copies.append((source, row))
                    continue
            rows.append(row)
            tokens.append(new)
        self._run(rows, tokens)
        if copies:
            sources, targets = map(list, zip(*copies, strict=True))
            self.state.copy(sources, targets)
            self.hidden[targets] = self.hidden[sources]

    def _groups(self) -> list[list["_Running"]]:
        """Requests that draw from one slot with the same settings, guided or not."""
        keys = [running.keys[running.at] for running in self.active]
        if keys.count(keys[0]) == len(keys):  # as a rule
            return [self.active]
        groups: dict[int, list[_Running]] = {}
        for running, key in zip(self.active, keys, strict=True):
            groups.setdefault(key, []).append(running)
        return list(groups.values())

    def _draw(self, group: list["_Running"]) -> bool:
        """Draws a token of each, or several; whether any of them is finished."""
        first = group[0]
        if first.drafts is not None:
            return self._draw_ahead(group)
        slot = self.layout.slots[first.slot_ids[first.at]]
        hidden, null_hidden, scales = self.hidden[self._rows_of(group)], None, None
        if first.scales[first.at] != 1:
            null_hidden = self.hidden[[running.null_row for running in group]]
            scales = _scales([running.scales[running.at] for running in group], hidden.device)
        uniforms = torch.tensor([running.uniforms[running.at] for running in group], dtype=torch.float64)
        drawn = self.executor.draw(hidden, null_hidden, slot, uniforms, scales, first.config)
        is_finished = False
        for running, token in zip(group, drawn.rows(), strict=True):
            if running.goes_on[running.at] and token[0] != running.stop:  # as a rule
                running.add([token])
            else:
                is_finished |= running.push(token)
        return is_finished

    def _num_alike(self) -> int:
        """How many tokens all that run draw from one slot, guided or not, with the same settings."""
        if not self.active or self.speculates:
            return 0
        if self.static is None:
            keys = {running.keys[running.at] for running in self.active}
        elif all(map(self._has_one_to_run, self.active)):
            keys = {running.slot_key for running in self.active}  # each row has its own settings
        else:
            return 0
        return min(running.num_alike[running.at] for running in self.active) if len(keys) == 1 else 0

    def _has_one_to_run(self, running: "_Running") -> bool:
        """Whether all that its rows have not seen is its last token. A null condition may begin with another one."""
        lengths, last = self.state.lengths, running.token_ids[-1:]
        if running.wants_null and running.null_pending(lengths[running.null_row]) != last:
            return False
        return running.token_ids[lengths[running.row] :] == last

    def _draw_alike(self, num_tokens: int) -> None:
        """Draws so many tokens of all that run; what is known of them beforehand is looked up once for all."""
        first = self.active[0]
        slot = self.layout.slots[first.slot_ids[first.at]]
        ahead = [slice(running.at, running.at + num_tokens) for running in self.active]
        taken = list(zip(self.active, ahead, strict=True))
        uniforms = (
            torch.tensor([running.uniforms[part] for running, part in taken], dtype=torch.float64).t().contiguous()
        )
        null_rows, scales = [], None
        if first.wants_null:  # and so do all
            null_rows = [running.null_row for running in self.active]
            scales = _scales([running.scales[part] for running, part in taken]).t().contiguous()
        rows = slice(self.first, self.first + len(self.active))
        last_ids = [running.token_ids[-1] for running in self.active]
        configs = [running.config for running in self.active]
        alike = Ahead(rows, null_rows, last_ids, slot, uniforms, scales, configs)
        drawn = self._draw_one_by_one(alike) if self.static is None else self.static.draw_ahead(self.state, alike)
        is_finished = False
        for running, tokens in zip(self.active, zip(*drawn, strict=True), strict=True):
            if running.goes_on[running.at + num_tokens - 1]:
                running.add(tokens)
            else:
                running.add(tokens[:-1])
                is_finished |= running.push(tokens[-1])
        if is_finished:
            self._leave([running for running in self.active if running.sequence.is_finished])

    def _draw_one_by_one(self, ahead: Ahead) -> list[list[Token]]:
        """Tokens of all that run, step by step: the host hands each on to the next."""
        null_rows, scales = ahead.null_rows, ahead.scales
        if scales is not None:
            scales = scales.to(self.executor.model.device)
        together = slice(self.first - len(null_rows), ahead.rows.stop)
        # Which request's token each of the rows runs next.
        order = [self.active.index(running) for running in reversed(self.guided)] if null_rows else []
        self._extend()
        drawn: list[list[Token]] = []
        for number, uniforms in enumerate(ahead.uniforms):
            if number:
                tokens = [[token[0]] for token in drawn[-1]]
                self._run(together, [tokens[i] for i in order] + tokens)
            draws = self.executor.draw(
                self.hidden[ahead.rows],
                self.hidden[null_rows] if null_rows else None,
                ahead.slot,
                uniforms,
                None if scales is None else scales[number],
                ahead.configs[0],
            )
            drawn.append(draws.rows())
        return drawn

    def _draw_ahead(self, group: list["_Running"]) -> bool:
        """Draws at the positions of the drafts, and keeps what stands; whether any of the requests is finished."""
        first = group[0]
        slot = self.layout.slots[first.slot_ids[first.at]]
        windows = [running.window for running in group]
        hidden = torch.cat([self._hidden_ahead(running.row) for running in group])
        given = [scale for running in group for scale in running.scales[running.at :][: 1 + len(running.run_drafts)]]
        scales = _scales(given, hidden.device)
        null_hidden = None
        if any(running.wants_null for running in group):
            null_hidden = torch.cat(
                [
                    self._hidden_ahead(running.null_row) if running.wants_null else self._hidden_ahead(running.row)
                    for running in group
                ]
            )
        found = redraw(self.executor, windows, hidden, null_hidden, scales, slot, first.config)
        tokens, probs, finished, start = found.draws.rows(), found.probs, False, 0
        for running, window in zip(group, windows, strict=True):
            end = start + window.size
            sources: list[Tensor | None] = [None] * window.size if probs is None else [*probs[start:end]]
            finished |= self._keep(running, tokens[start:end], sources)
            start = end
        return finished

    def _keep(self, running: "_Running", drawn: list[tuple[int, float, float]], probs: list[Tensor | None]) -> bool:
        """Adds what stands of what was drawn, takes back what was run for the rest; whether the sequence is
        finished."""
        drafts, num_run = running.drafts, len(running.run_drafts)
        assert drafts is not None
        running.saw_all_finite &= all(math.isfinite(log_prob) for _, log_prob, _ in drawn)
        kept, room = num_kept(drafts.token_ids, [token for token, _, _ in drawn]), running.room
        for row, ran in ((running.row, True), (running.null_row, running.wants_null)):
            if ran:
                self.state.lengths[row] -= num_run - (kept - 1)
        left = [token for token, _, _ in drawn[kept:]] or [drawn[-1][0]] * (room > kept)
        drafts.go_on(left, probs[kept:] or [None] * len(left), room - kept)
        # a list: every token is added
        return any([running.push(token) for token in drawn[:kept]])

    def _hidden_ahead(self, row: int) -> Float[Tensor, "k D"]:
        return self.ahead[row] if row in self.ahead else self.hidden[row : row + 1]

    def _rows_of(self, group: list["_Running"]) -> Rows:
        if len(group) == len(self.active):
            return slice(self.first, self.first + len(group))
        return [running.row for running in group]


class _Running:
    """A request on its way through the engine."""

    def __init__(self, ticket: int, sequence: TokenSequence, config: SampleConfig, number: int):
        self.ticket, self.sequence, self.config, self.number = ticket, sequence, config, number
        self.row = self.null_row = -1
        self.token_ids: list[int] = list(sequence.token_ids)
        self.num_given = len(self.token_ids)
        self.drawn: list[tuple[int, float, float]] = []
        """What was added, with its ln p under the model and under what it was drawn from."""
        self.num_settled = 0
        self.null_ids: list[int] = []
        self.is_guided = not sequence.is_finished and config.guidance_scale != 1
        if self.is_guided:
            self.null_ids = _null_of(sequence).token_ids
        self.drafts = Drafts(sequence.seed, config) if config.speculative else None
        self.saw_all_finite = True  # at drafts that did not stand, too
        if not sequence.is_finished:
            self._plan()

    @property
    def room(self) -> int:
        """How many positions can be drawn ahead: those of this slot. Behind a marker that ends a span, where it stands
        is not known, so there is one alone."""
        return self.rooms[self.at]

    @property
    def run_drafts(self) -> list[int]:
        """The drafts to be run: not the one behind which this slot has no position."""
        return [] if self.drafts is None else self.drafts.token_ids[: self.room - 1]

    @property
    def window(self) -> Window:
        assert self.drafts is not None
        uniforms = self.uniforms[self.at : self.at + 1 + len(self.run_drafts)]
        return Window(self.drafts, len(self.token_ids), uniforms)

    @property
    def slot_key(self) -> tuple[int, bool]:
        """The slot that is drawn from next, and whether guided."""
        return self.slot_ids[self.at], self.scales[self.at] != 1

    @property
    def wants_null(self) -> bool:
        """Whether any of the positions that are drawn next is guided."""
        if self.drafts is None:
            return self.scales[self.at] != 1
        return any(scale != 1 for scale in self.scales[self.at : self.at + 1 + len(self.run_drafts)])

    @property
    def is_finite(self) -> bool:
        """Whether neither of its rows has held what is not: the null row shows in what is drawn from alone."""
        return self.saw_all_finite and math.isfinite(sum(sum(token[1:]) for token in self.drawn))

    def null_pending(self, num_seen: int) -> list[int]:
        """What the null row has not seen: behind its own beginning, the same tokens."""
        given = len(self.null_ids)
        if num_seen >= given:
            return self.token_ids[self.num_given + num_seen - given :]
        return self.null_ids + self.token_ids[self.num_given :]

    def events(self, start: int) -> list[Event]:
        return [
            Event(self.ticket, self.num_given + number, *self.drawn[number]) for number in range(start, len(self.drawn))
        ]

    def _plan(self) -> None:
        """Reads what the sequence generates next."""
        plan = self.sequence.plan()
        self.forced, self.slot_ids, self.stop = plan.forced, plan.slot_ids, plan.stop
        self.at, self.end = 0, len(plan.forced)
        self.goes_on = [forced < 0 for forced in plan.forced[1:]] + [False]
        """For each token, whether the next one is drawn, unless it is the one that stops."""
        self.uniforms: list[float] = self.sequence.uniforms[len(self.token_ids) :].tolist()
        self.scales = [1.0] * self.end
        if self.is_guided:
            self.scales = [
                1.0 if forced >= 0 else self.config.guidance_at(*step)
                for forced, step in zip(plan.forced, plan.steps, strict=True)
            ]
        most = len(self.sequence.layout.slots)
        self.keys = [
            2 * (self.number * most + slot_id) + (scale != 1)
            for slot_id, scale in zip(plan.slot_ids, self.scales, strict=True)
        ]

        self.num_alike = self._num_alike()
        self.rooms = [] if self.drafts is None else self._rooms()

    def _ends(self) -> list[bool]:
        """Of each slot, whether the span may end by what is drawn from it."""
        return [any(start <= self.stop < end for start, end in slot.ranges) for slot in self.sequence.layout.slots]

    def _num_alike(self) -> list[int]:
        """For each coming position, how many from there on are drawn with its key, and are sure to be."""
        ends = self._ends()
        found = [0] * (self.end + 1)
        for at in range(self.end - 1, -1, -1):
            if self.forced[at] < 0 and not ends[self.slot_ids[at]]:
                goes_on = self.goes_on[at] and self.keys[at] == self.keys[at + 1]
                found[at] = 1 + (found[at + 1] if goes_on else 0)
        return found

    def _rooms(self) -> list[int]:
        """For each coming position, how many from there on draw from its slot, one after the other."""
        ends = self._ends()
        rooms = [1] * self.end
        for at in range(self.end - 2, -1, -1):
            slot_id, behind = self.slot_ids[at], self.slot_ids[at + 1]
            if slot_id == behind and not ends[slot_id] and max(self.forced[at : at + 2]) < 0:
                rooms[at] += rooms[at + 1]
        return rooms

    def add(self, tokens: Sequence[tuple[int, float, float]]) -> None:
        """Adds tokens behind which another one is drawn."""
        self.drawn.extend(tokens)
        self.token_ids.extend(token[0] for token in tokens)
        self.at += len(tokens)

    def push(self, token: tuple[int, float, float]) -> bool:
        """Adds a token, and all that is certain behind it; whether the sequence is finished."""
        while True:
            self.drawn.append(token)
            self.token_ids.append(token[0])
            self.at += 1
            if self.at == self.end or token[0] == self.stop:
                self.sequence.push_all(self.drawn[self.num_settled :])
                self.num_settled = len(self.drawn)
                if self.sequence.is_finished:
                    return True
                self._plan()
            if self.forced[self.at] < 0:
                return False
            token = (self.forced[self.at], 0.0, 0.0)


def _scales(numbers: Sequence[Any], device: torch.device | str = "cpu") -> Float[Tensor, "..."]:
    """In float32 whatever was given: a scale of 3 is a whole number in Python."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _null_of(sequence: TokenSequence) -> TokenSequence:
    if sequence.null is None:
        raise ValueError("guidance needs a null condition in every request (Request.null).")
    ahead = sequence.plan().slot_ids
    if sequence.null.plan().slot_ids[: len(ahead)] != ahead:
        raise ValueError(f"the null condition leaves other spans: {sequence.null.order}, not {sequence.order}.")
    return sequence.null
