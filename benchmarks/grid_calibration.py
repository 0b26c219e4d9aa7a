"""How often `smalti inspect` is right about a grid, by how sure it says it is.

    smalti tokenize DIGITS.parquet -o digits.parquet --bundle digits
    smalti tokenize EMOJI.parquet -o emoji.parquet --bundle emoji --size 64
    python benchmarks/grid_calibration.py digits.parquet=7x7 emoji.parquet=8x8 --cases 100

Each case takes lines of one of the tables, at random and of a random number, arranges them in one of the ways of
ARRANGEMENTS, and asks. Right is: of a named order, every pair of neighbours, up to mirroring, turning and transposing;
of a map without a name, nine in ten of them; of lines without a grid, that there is none.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from smalti.data.tokens import TokenTable
from smalti.inspect.grid import Grid, GridFinding, infer_grid, reading_order

ARRANGEMENTS = (
    "raster",
    "column-major",
    "snake",
    "spiral",
    "permuted columns",
    "permuted cells",
    "raster, specials anywhere",
    "permuted columns, specials anywhere",
    "no grid: positions unrelated",
    "no grid: a chain",
    "no grid: bags of codes",
)
SURE = 0.95


@dataclass(frozen=True, kw_only=True)
class Case:
    arrangement: str
    lines: Int64[np.ndarray, "N L"]
    edges: frozenset[tuple[int, int]] | None
    """Pairs of positions that are neighbours in the picture; None: there is no grid."""


def arranged(pictures: Int64[np.ndarray, "N h w"], arrangement: str, generator: np.random.Generator) -> Case:
    """The pictures as lines."""
    N, h, w = pictures.shape
    if arrangement.startswith("no grid"):
        return Case(arrangement=arrangement, lines=_without_grid(pictures, arrangement, generator), edges=None)
    order = arrangement.split(",")[0]
    cells = np.arange(h * w)
    if order in ("snake", "spiral"):
        cells = np.array(reading_order(order, h, w))
    elif order == "column-major":
        cells = cells.reshape(h, w).T.ravel()
    elif order == "permuted columns":
        cells = cells.reshape(h, w)[:, generator.permutation(w)].ravel()
    elif order == "permuted cells":
        cells = generator.permutation(h * w)
    lines, places = pictures.reshape(N, -1)[:, cells], np.arange(h * w)
    if "specials" in arrangement:
        lines, places = _with_specials(lines, generator)
    position = np.empty(h * w, int)
    position[cells] = places
    picture = Grid(rows=h, columns=w, order="raster")
    edges = frozenset(tuple(sorted(int(position[cell]) for cell in edge)) for edge in picture.edges)
    return Case(arrangement=arrangement, lines=lines, edges=edges)  # type: ignore[arg-type]


def _with_specials(
    lines: Int64[np.ndarray, "N n"], generator: np.random.Generator
) -> tuple[Int64[np.ndarray, "N L"], Int64[np.ndarray, " n"]]:
    """One to three constants and, half of the time, the number of different codes, each anywhere in the line."""
    N, n = lines.shape
    foreign = int(lines.max()) + 1
    specials = [np.full(N, foreign + number) for number in range(int(generator.integers(1, 4)))]
    if generator.random() < 0.5:
        ordered = np.sort(lines, axis=1)
        specials.append(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1))
    columns, cells = list(lines.T), list(range(n))
    for special in specials:
        place = int(generator.integers(len(columns) + 1))
        columns.insert(place, special)
        cells.insert(place, -1)
    cell = np.array(cells)
    return np.stack(columns, axis=1), np.argsort(np.where(cell < 0, n, cell), kind="stable")[:n]


def _without_grid(
    pictures: Int64[np.ndarray, "N h w"], arrangement: str, generator: np.random.Generator
) -> Int64[np.ndarray, "N L"]:
    lines = pictures.reshape(len(pictures), -1)
    if arrangement.endswith("unrelated"):
        return np.stack([generator.permutation(column) for column in lines.T], axis=1)
    if arrangement.endswith("bags of codes"):  # each line keeps its codes, in an order of its own
        return generator.permuted(lines, axis=1)
    found = generator.choice(lines.ravel(), lines.shape)  # each code is mostly the one before it
    for place in range(1, lines.shape[1]):
        same = generator.random(len(lines)) < 0.7
        found[:, place] = np.where(same, found[:, place - 1], found[:, place])
    return found


def is_right(case: Case, found: GridFinding) -> bool:
    if case.edges is None or found.grid is None:
        return case.edges is None and found.grid is None
    if found.grid.order == "map":
        return len(found.grid.edges & case.edges) >= 0.9 * len(case.edges)
    return found.grid.edges == case.edges


def cases(tables: list[Int64[np.ndarray, "N h w"]], numbers: range, least: int, seed: int) -> Iterator[Case]:
    for number in numbers:
        generator = np.random.default_rng([seed, number])
        pictures = tables[(number // len(ARRANGEMENTS)) % len(tables)]
        chosen = generator.permutation(len(pictures))[: int(generator.integers(least, len(pictures) + 1))]
        yield arranged(pictures[chosen], ARRANGEMENTS[number % len(ARRANGEMENTS)], generator)


def print_table(found: list[tuple[str, float, bool]]) -> None:
    print(f"\n| arrangement | cases | right | said at least {SURE:.0%} | right of those |\n|---|---|---|---|---|")
    for name in (*ARRANGEMENTS, "all"):
        rows = [(confidence, right) for arrangement, confidence, right in found if name in (arrangement, "all")]
        sure = [right for confidence, right in rows if confidence >= SURE]
        print(f"| {name} | {len(rows)} | {sum(right for _, right in rows)} | {len(sure)} | {sum(sure)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE=HxW", help="token tables of pictures, with their grids")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first case: several processes can share them"
    )
    parser.add_argument("--least-lines", type=int, default=2000, help="fewest lines of a case")
    parser.add_argument("--most-lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tables = []
    for given in arguments.tables:
        path, _, shape = given.rpartition("=")
        h, w = map(int, shape.split("x"))
        table = TokenTable.open(Path(path), image_length=h * w)
        rows = np.random.default_rng(arguments.seed).permutation(len(table))[: arguments.most_lines]
        tables.append(table.batch(rows).image_tokens.reshape(-1, h, w))
    found = []
    numbers = range(arguments.start, arguments.cases)
    for number, case in zip(numbers, cases(tables, numbers, arguments.least_lines, arguments.seed), strict=True):
        started_at = time.process_time()
        finding = infer_grid(case.lines, int(case.lines.max()) + 1, seed=arguments.seed)
        right = is_right(case, finding)
        found.append((case.arrangement, finding.confidence, right))
        shown = str(finding.grid)[:60]
        elapsed_s = time.process_time() - started_at
        print(
            f"{number:3} {case.arrangement}, {len(case.lines)} lines: {shown}, {finding.confidence:.2f}, "
            f"{'right' if right else 'WRONG'}, {elapsed_s:.1f} s",
            flush=True,
        )
    print_table(found)


if __name__ == "__main__":
    main()
