"""How far a long command is: a bar on a terminal, elsewhere a line of text at most every 15 seconds, on stderr.

    with stage("image tokenizer", 1500, unit="step", show=True) as progress:
        for ...:
            progress.advance(note=f"loss {loss:.3f}")

A stage says where it begins and ends, and its line comes from a thread, so that a step of a minute is seen to run.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from smalti.stopping import end_if_stopped

LINE_EVERY_S = 15.0
Item = TypeVar("Item")
Clock = Callable[[], float]


def duration(seconds: float) -> str:
    """Words for a time: "45 s", "1 min 10 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Stage:
    """How far one stage is, in units such as "step". Without a unit it is told in percent, and without a total by the
    time alone."""

    def __init__(
        self,
        name: str,
        total: float | None = None,
        *,
        unit: str = "step",
        completed: float = 0,
        watch: "Callable[[Stage], str | None] | None" = None,
        clock: Clock = time.perf_counter,
    ):
        self.name, self.total, self.unit, self.clock = name, total, unit, clock
        self.first = self.completed = completed
        self.note = ""
        self.started_at = clock()
        self._first_moved: tuple[float, float] | None = None
        self.watch = watch
        self.on_say: Callable[[str], None] = lambda line: None
        self.on_update: Callable[[], None] = lambda: None

    # ---- what the work calls ----

    def update(self, completed: float, note: str | None = None) -> None:
        """So many are done; `note` are some words on how it goes, which stay until there are others. Ends the command
        if it was asked to stop."""
        end_if_stopped()
        if completed > self.completed and self._first_moved is None:
            self._first_moved = self.clock(), completed
        self.completed = completed
        self.note = self.note if note is None else note
        if self.watch is not None and (line := self.watch(self)) is not None:
            self.say(line)
        self.on_update()

    def advance(self, num: float = 1, note: str | None = None) -> None:
        self.update(self.completed + num, note)

    def say(self, line: str) -> None:
        """A line of its own, above the bar on a terminal; nothing if progress is not shown."""
        self.on_say(line)

    # ---- what is shown ----

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.started_at

    @property
    def rate(self) -> float | None:
        """Units a second in this start of the stage; as soon as there are others, without the first, which waits for
        all that is made ready."""
        began_at, before = self._moved
        done, elapsed_s = self.completed - before, self.clock() - began_at
        return done / elapsed_s if done > 0 and elapsed_s > 0 else None

    @property
    def _moved(self) -> tuple[float, float]:
        """From when, and from how many on, the rate is taken."""
        first = self._first_moved
        return (self.started_at, self.first) if first is None or self.completed <= first[1] else first

    @property
    def left_s(self) -> float | None:
        rate = self.rate
        return None if self.total is None or rate is None else max(0.0, self.total - self.completed) / rate

    def beginning(self) -> str:
        if self.total is None or not self.unit:
            return f"{self.name} …"
        onward = f", {_count(self.completed)} done before" if self.completed else ""
        return f"{self.name}: {_count(self.total)} {_plural(self.unit, self.total)}{onward}"

    def line(self) -> str:
        """As "image tokenizer: step 340 of 1,500 (23 %), 11.2 steps/s, loss 0.412, 1 min 44 s left"."""
        return f"{self.name}: {', '.join(self._facts())}"

    def ending(self) -> str:
        done = self.completed - self.first
        count = f"{_count(done)} {_plural(self.unit, done)} in " if done and self.unit else ""
        return ", ".join(filter(None, (f"{self.name}: done, {count}{duration(self.elapsed_s)}", self.note)))

    def state(self) -> str:
        """What stands beside a bar."""
        return " · ".join(self._facts(short=True))

    def _facts(self, *, short: bool = False) -> Iterator[str]:
        if self.total and not self.unit:
            yield (
                f"{100 * self.completed / self.total:.0f} %" if self.completed else f"{duration(self.elapsed_s)} so far"
            )
        elif self.total:
            done, total = _count(self.completed), _count(self.total)
            share = f"{100 * self.completed / self.total:.0f} %"
            yield f"{done}/{total} {_plural(self.unit, 2)}" if short else f"{self.unit} {done} of {total} ({share})"
        elif self.completed:
            yield f"{_count(self.completed)} {_plural(self.unit, self.completed)}"
        else:
            yield f"{duration(self.elapsed_s)} so far"
        if (rate := self.rate) is not None and self.unit:
            yield f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} {_plural(self.unit, 2)}/s"
        if self.note:
            yield self.note
        if (left_s := self.left_s) is not None:
            yield f"{duration(left_s)} left"


def _count(number: float) -> str:
    return f"{number:.3g}" if number % 1 and number < 100 else f"{number:,.0f}"


def _plural(unit: str, number: float) -> str:
    return unit if number == 1 or unit.isupper() else f"{unit}s"


# What is shown, and where -------------------------------------------------------------------------------------------


@contextmanager
def stage(
    name: str,
    total: float | None = None,
    *,
    unit: str = "step",
    completed: float = 0,
    show: bool = True,
    watch: Callable[[Stage], str | None] | None = None,
) -> Iterator[Stage]:
    """A stage of `total` units, `completed` of them by an earlier start. What `watch` returns for the stage after an
    update is said."""
    progress = Stage(name, total, unit=unit, completed=completed, watch=watch if show else None)
    if not show:
        yield progress
        return
    console = Console(stderr=True)
    with _bar(progress, console) if sys.stderr.isatty() and not console.is_dumb_terminal else _lines(progress):
        yield progress


def track(items: Iterable[Item], name: str, *, unit: str, show: bool, total: float | None = None) -> Iterator[Item]:
    """The items, as a stage that each of them advances by one."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with stage(name, total, unit=unit, show=show) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def _lines(progress: Stage) -> Iterator[None]:
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_EVERY_S):
            _print(progress.line())

    _print(progress.beginning())
    progress.on_say = _print
    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    _print(progress.ending())


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _State(ProgressColumn):
    def __init__(self, progress: Stage):
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text(self.progress.state())


@contextmanager
def _bar(progress: Stage, console: Console) -> Iterator[None]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), _State(progress))
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(progress.name, total=progress.total)
        bars.update(task, completed=progress.completed)
        progress.on_say = lambda line: bars.console.print(line, markup=False, highlight=False)
        progress.on_update = lambda: bars.update(task, completed=progress.completed)
        yield
