"""The curves of a training run: one CSV to keep, tensorboard to watch, one PNG to show.

A row's step is the number of updates made before it was measured, so a training row stands at the step whose batch it
measured, and all rows below a step are known when a checkpoint of that step is written.
"""

import csv
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from torch.utils.tensorboard.writer import SummaryWriter

from smalti.errors import InputWarning
from smalti.files import named_failure, new_file

CSV_NAME = "curves.csv"
PNG_NAME = "curves.png"
TENSORBOARD_NAME = "tensorboard"

Parsed = TypeVar("Parsed")
Row = tuple[int, float, dict[str, float | None]]
"""Step, epoch, and the values by column; None where nothing was measured."""


class Curves:
    """Rows of named values by split ("train", "validation"). Rows from `start_step` on, of a run that was killed, are
    dropped.

    The first of `columns` is the one drawn large. `label` names the unit on the picture's axis.
    """

    def __init__(self, directory: Path, columns: Sequence[str], *, start_step: int = 0, label: str):
        self.columns, self.label = tuple(columns), label
        self.rows: dict[str, list[Row]] = {"train": [], "validation": []}
        self._path, self._png = directory / CSV_NAME, directory / PNG_NAME
        kept = _read_rows(self._path, self.columns) if start_step else []
        temporary = self._path.with_suffix(".part")
        self._file = temporary.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(("split", "step", "epoch", *self.columns))
        self._tensorboard = SummaryWriter(str(directory / TENSORBOARD_NAME), purge_step=start_step or None)
        for split, (step, epoch, values) in kept:
            if step < start_step:
                self._write(split, (step, epoch, values))
        self._file.flush()
        os.replace(temporary, self._path)  # the open file goes on under its name

    def add(self, split: str, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        self._write(split, (step, epoch, dict(values)))
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{name}/{split}", value, step)

    def _write(self, split: str, row: Row) -> None:
        self.rows[split].append(row)
        step, epoch, values = row
        self._writer.writerow((split, step, f"{epoch:.6g}", *(_written(values.get(name)) for name in self.columns)))

    def flush(self) -> None:
        """Hands what was added to the operating system, so that a killed process has left it."""
        with named_failure(self._path):
            self._file.flush()
            self._tensorboard.flush()

    def draw(self) -> None:
        """Writes the picture: the first column by minibatch and by evaluation, and the others by evaluation."""
        figure = Figure(figsize=(9, 4.5))
        axes = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.12, top=0.97)  # laying it out itself takes as long again
        steps, values = _series(self.rows["train"], self.columns[0])
        axes[0].plot(steps, values, color="0.75", linewidth=0.6, label="training, each minibatch")
        axes[0].plot(steps, _smoothed(values), color="C0", linewidth=1.2, label="training, running mean")
        axes[0].plot(
            *_series(self.rows["validation"], self.columns[0]), "o-", color="C3", markersize=3, label="validation"
        )
        axes[0].set(xlabel="step", ylabel=self.label)
        for index, name in enumerate(self.columns[1:]):
            steps, values = _series(self.rows["validation"], name)
            axes[1].plot(steps, values, "o-", color=f"C{index + 1}", markersize=3, label=f"validation, {name}")
        axes[1].set(xlabel="step", ylabel="nats per token of the part")
        for ax in axes:
            ax.grid(alpha=0.3)
            ax.legend()
        with new_file(self._png, force=True) as temporary:
            figure.savefig(temporary, format="png", dpi=110)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _written(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _read_rows(path: Path, columns: Sequence[str]) -> list[tuple[str, Row]]:
    def parsed(split: str, step: str, epoch: str, *values: str) -> tuple[str, Row]:
        named = {name: float(value) if value else None for name, value in zip(columns, values, strict=True)}
        split = "validation" if split == "test" else split  # as earlier versions called it
        return split, (int(step), float(epoch), named)

    rows = read_csv_rows(path, ("split", "step", "epoch", *columns), parsed)
    return [row for row in rows if row[0] in ("train", "validation")]


def read_csv_rows(path: Path, header: Sequence[str], parsed: Callable[..., Parsed]) -> list[Parsed]:
    """What `parsed`, which raises ValueError where it cannot, makes of the fields of every row of a run's CSV file;
    none if there is no file. A kill can leave the last row cut off; any other row that is no such row, and a file with
    another header, is passed over with a warning."""
    if not path.exists():
        return []
    first, *lines = path.read_bytes().decode(errors="replace").splitlines() or [""]
    if first.split(",") != list(header):
        warnings.warn(
            InputWarning(f"{path} has another header than this run writes; its rows are left out."), stacklevel=2
        )
        return []
    found, damaged = [], []
    for number, line in enumerate(lines, 2):
        fields = line.replace('"', "").split(",", len(header) - 1)
        try:
            found.append(parsed(*fields))
        except (ValueError, TypeError):
            damaged.append(number)
    if damaged and damaged != [len(lines) + 1]:
        warnings.warn(
            InputWarning(f"{path}: line {damaged[0]} is damaged; {len(damaged)} such rows are left out."), stacklevel=2
        )
    return found


def _series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    points = [(step, value) for step, _, values in rows if (value := values.get(name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential running mean over about 2 % of all points, its start corrected for having seen few."""
    keep = 1 - 1 / max(1.0, 0.02 * len(values))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


class CsvLog:
    """A CSV file of rows by step; rows after step `keep_to`, of an earlier start of the run, are dropped."""

    def __init__(self, path: Path, columns: list[str], *, keep_to: int):
        kept = [row for row in read_csv_rows(path, columns, _row) if int(row[0]) <= keep_to]
        with new_file(path, force=True) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *kept])
        self.path, self.columns = path, columns

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A row of the values that are there, by column; others are left empty, or out."""
        row = [values.get(name) for name in self.columns[1:]]
        with named_failure(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([step, *("" if value is None else value for value in row)])


def _row(step: str, *values: str) -> list[str]:
    int(step)  # the first column of every table of a run
    return [step, *values]


def read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a `CsvLog` file by name; an empty field is NaN."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [_number(row[i]) for row in rows if i < len(row)] for i, name in enumerate(header)}


def _number(text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # a warning, or a damaged value
        return math.nan
