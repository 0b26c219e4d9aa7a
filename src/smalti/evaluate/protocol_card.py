"""The card of a measurement: its figures and all that they depend on, as JSON and as Markdown; and two cards compared.

A figure is worth what its protocol says: which weights looked at the pictures, how these were resized, how many there
were on either side and how they were drawn. The card holds the bootstrap's replicates, so that two cards alone tell
whether two models differ by more than chance.
"""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from rich.table import Table

from smalti.bundle import smalti_version
from smalti.devices import choose_device
from smalti.documents import read_json
from smalti.errors import InputError, shortened
from smalti.evaluate.confidence import LEVEL, Difference, Figure, difference
from smalti.evaluate.feature_networks import INCEPTION, FeatureNetwork
from smalti.evaluate.protocols import Protocol
from smalti.evaluate.samples import FALLING, FIGURES, GIVEN, OF_INCEPTION, Figures, MeasureConfig, Measured
from smalti.files import refuse_existing, write_text

CARD_FILES = ("card.json", "card.md")
KIND = "smalti protocol card"
MEND = "give the folder or the card.json that smalti evaluate samples wrote"
DRAWN_SUFFIX = ".card.json"
"""Behind the name of a set of samples: how smalti sample drew it."""

DECISIVE = (
    "protocol",
    "features",
    "reference.sha256",
    "reference.num",
    "reference.size",
    "samples.num",
    "samples.size",
)
"""Fields that must be alike for two figures to compare."""
IGNORED = (
    "command",
    "made",
    "figures",
    "extrapolation",
    "notes",
    "samples.path",
    "samples.sha256",
    "reference.path",
    *(f"samples.drawn.{name}" for name in ("made", "sha256", "command", "layout", "pictures_per_part")),
)
PAIRING = ("seed", "labels", "classes", "prompts", "per_prompt", "num")
"""Fields of two drawings that make picture i of one and of the other a pair."""


def drawn_card(path: Path) -> dict[str, Any] | None:
    """What stands beside a set of samples of how it was drawn. Raises InputError if that is of other pictures."""
    beside = path.with_name(path.name + DRAWN_SUFFIX)
    if not beside.is_file():
        return None
    return read_json(beside, f"remove {beside}, or draw the samples again")


def make_card(
    figures: Figures,
    samples: Measured,
    reference: Measured,
    network: FeatureNetwork | None,
    protocol: Protocol,
    config: MeasureConfig,
    command: str,
) -> dict[str, Any]:
    """The card, ready to be written."""
    titles = FIGURES | (OF_INCEPTION if network is not None and network.name == INCEPTION else {})
    drawn = drawn_card(Path(samples.about["path"]))
    if drawn is not None and drawn.get("sha256") not in (None, samples.about["sha256"]):
        raise InputError(
            f"{samples.about['path']}{DRAWN_SUFFIX} says how other pictures were drawn: their SHA-256 differs. Remove "
            "it, if the pictures were made in another way."
        )
    return {
        "kind": KIND,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "figures": {
            name: {
                "title": titles[name],
                "value": figure.value,
                "standard_error": figure.standard_error,
                "interval": None if figure.interval is None else list(figure.interval),
                "over": figure.over,
                "replicates": list(figure.replicates),
            }
            for name, figure in figures.found.items()
        },
        "protocol": asdict(protocol),
        "features": {
            "name": GIVEN if network is None else network.name,
            "sha256": None if network is None else network.sha256,
            "resizer": "none" if network is None else network.resizer,
            "width": samples.pooled.width,
            "dtype": "float32, sums in float64",
        },
        "device": str(choose_device()),
        "samples": samples.about | {"drawn": drawn},
        "reference": reference.about,
        "bootstrap": {
            "num_replicates": figures.num_replicates,
            "seed": config.seed,
            "level": LEVEL,
            "most_neighbours": config.most_neighbours,
        },
        "extrapolation": None if figures.extrapolation is None else asdict(figures.extrapolation),
        "notes": list(figures.notes),
        "versions": {
            "smalti": smalti_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }


def write_card(card: Mapping[str, Any], folder: Path, *, force: bool = False) -> None:
    """Writes CARD_FILES. Raises InputError if one exists, unless `force`."""
    refuse_existing([folder / name for name in CARD_FILES], force=force)
    write_text(folder / CARD_FILES[0], json.dumps(card, indent=1, ensure_ascii=False) + "\n", force=force)
    write_text(folder / CARD_FILES[1], card_text(card), force=force)


def read_card(path: Path | str) -> dict[str, Any]:
    """Raises InputError naming the file for what is no card."""
    path = Path(path)
    path = path / CARD_FILES[0] if path.is_dir() else path
    card = read_json(path, MEND)
    figures = card.get("figures")
    whole = card.get("kind") == KIND and isinstance(figures, dict) and figures
    if not whole or not all(_is_figure(figure) for figure in figures.values()):
        raise InputError(f"{path} is no protocol card; {MEND}.")
    return card


def _is_figure(figure: Any) -> bool:
    if not isinstance(figure, dict) or not isinstance(figure.get("value"), int | float):
        return False
    replicates = figure.get("replicates")
    return isinstance(replicates, list) and all(isinstance(one, int | float) for one in replicates)


def figures_table(card: Mapping[str, Any]) -> Table:
    table = Table("figure", "value", "standard error", f"{LEVEL:.0%} interval", box=None)
    for row in _figure_rows(card):
        table.add_row(*row)
    return table


def _figure_rows(card: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for figure in card["figures"].values():
        error, interval = figure["standard_error"], figure["interval"]
        yield (
            figure["title"],
            number(figure["value"]),
            "–" if error is None else f"{error:.2g}",
            "–" if interval is None else f"{number(interval[0])} to {number(interval[1])}",
        )


def number(value: float) -> str:
    """With four digits that tell."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def card_text(card: Mapping[str, Any]) -> str:
    """In Markdown."""
    lines = [f"`{card['command']}`\n", f"| figure | value | standard error | {LEVEL:.0%} interval |\n|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _figure_rows(card)]
    over = sorted({figure["title"] for figure in card["figures"].values() if figure["over"] == "reference"})
    replicates = card["bootstrap"]["num_replicates"]
    if replicates:
        lines.append(
            f"\nIntervals: bootstrap of {replicates} replicates over the samples, the reference as it is"
            + (f"; of {' and '.join(over)} over the reference's pictures." if over else ".")
        )
    if extrapolation := card["extrapolation"]:
        sizes = ", ".join(f"{size:,}" for size in extrapolation["sizes"])
        lines.append(f"The extrapolation is a line in 1/n through the mean distances of parts of {sizes} samples.")
    lines += [f"\n**Note**: {note}." for note in card["notes"]]
    lines.append("\n| field | |\n|---|---|")
    shown = {name: value for name, value in fields_of(card).items() if not name.startswith(("figures", "notes"))}
    lines += [
        f"| {name} | {_cell(value)} |"
        for name, value in shown.items()
        if not name.startswith(("extrapolation", "command", "kind"))
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, 120).replace("|", "\\|")


def fields_of(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every field by its path, as `samples.drawn.seed`."""
    found: dict[str, Any] = {}
    for name, value in card.items():
        if isinstance(value, Mapping):
            found |= fields_of(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


# Two cards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CardComparison:
    """Two cards side by side."""

    names: tuple[str, str]
    different: dict[str, tuple[Any, Any]]
    """Fields that differ, by their paths."""
    decisive: tuple[str, ...]
    """Of them, those for which the figures do not compare."""
    figures: dict[str, tuple[Figure, Figure, Difference]]
    titles: dict[str, str]
    paired: bool

    def fields_table(self) -> Table:
        table = Table("field", *self.names, "", box=None)
        for name, (ours, theirs) in self.different.items():
            table.add_row(name, _cell(ours), _cell(theirs), "not comparable" if name in self.decisive else "")
        return table

    def figures_table(self) -> Table:
        table = Table("figure", *self.names, "difference", "standard error", "p", "", box=None)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, (ours, theirs, apart) in self.figures.items():
            error = "–" if apart.standard_error is None else f"{apart.standard_error:.2g}"
            p = apart.p_value
            shown = "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"
            values = number(ours.value), number(theirs.value), f"{apart.value:+.4g}"
            yield self.titles[name], *values, error, shown, self.verdict(name)

    def verdict(self, name: str) -> str:
        """In words, on the level of 5 % of each figure by itself."""
        ours, theirs, apart = self.figures[name]
        if self.decisive:
            return "not comparable"
        if apart.p_value is None:
            return "noise not known"
        if apart.p_value >= 1 - LEVEL:
            return "within noise"
        better = (theirs.value < ours.value) == (name in FALLING)
        return f"{self.names[better]} is better"

    def text(self) -> str:
        """In Markdown."""
        lines = [f"{self.how}\n"]
        if self.different:
            lines.append(f"| field | {' | '.join(self.names)} | |\n|---|---|---|---|")
            lines += [
                f"| {name} | {_cell(ours)} | {_cell(theirs)} | {'not comparable' if name in self.decisive else ''} |"
                for name, (ours, theirs) in self.different.items()
            ]
        head = f"| figure | {' | '.join(self.names)} | difference | standard error | p | |"
        lines.append(f"\n{head}\n{'|---' * 7}|")
        lines += [f"| {' | '.join(row)} |" for row in self._rows()]
        return "\n".join(lines) + "\n"

    @property
    def how(self) -> str:
        """What the test is of, and what stands against it."""
        if self.decisive:
            return f"The figures do not compare, as these fields differ: {', '.join(self.decisive)}."
        if self.paired:
            return "Paired: picture i of both has the same seed and condition, and replicates resample both alike."
        return "Not paired: the two sets of samples are independent, and their variances add up."


def compare_cards(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: tuple[str, str]) -> CardComparison:
    """Raises InputError if they have no figure in common."""
    left, right = fields_of(ours), fields_of(theirs)
    different = {
        name: (left.get(name), right.get(name))
        for name in left | right
        if left.get(name) != right.get(name) and not _begins(name, IGNORED)
    }
    paired = _are_pairs(ours, theirs)
    common = [name for name in FIGURES if name in ours["figures"] and name in theirs["figures"]]
    if not common:
        raise InputError(f"{names[0]} and {names[1]} have no figure in common.")
    figures = {}
    for name in common:
        one, other = _figure(ours["figures"][name]), _figure(theirs["figures"][name])
        same = paired or (one.over == other.over == "reference" and _same(left, right, "reference.sha256", "bootstrap"))
        figures[name] = one, other, difference(one, other, paired=same)
    return CardComparison(
        names=names,
        different=different,
        decisive=tuple(name for name in different if _begins(name, DECISIVE)),
        figures=figures,
        titles={name: str(ours["figures"][name].get("title", name)) for name in common},
        paired=paired,
    )


def _figure(values: Mapping[str, Any]) -> Figure:
    replicates = tuple(map(float, values["replicates"]))
    return Figure(value=float(values["value"]), replicates=replicates, over=str(values.get("over", "samples")))


def _are_pairs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether picture i of both was drawn with the same seed and condition, and resampled alike."""
    left, right = fields_of(ours), fields_of(theirs)
    drawn = [f"samples.drawn.{name}" for name in PAIRING]
    known = left.get("samples.drawn.seed") is not None
    return known and _same(left, right, "samples.num", "bootstrap", *drawn)


def _same(left: Mapping[str, Any], right: Mapping[str, Any], *beginnings: str) -> bool:
    return all(left.get(name) == right.get(name) for name in left | right if _begins(name, beginnings))  # pyright: ignore


def _begins(name: str, beginnings: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in beginnings)
