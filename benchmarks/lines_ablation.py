"""What each regularisation gives on a small set of lines: the recipe's, without one at a time, and without any.

    python benchmarks/lines_ablation.py lines.parquet --rows 8000 -o out/ablation num_epochs=30

trains the recipe `lines` (with the settings given) on so many rows of a table: as it is, with each of dropout, token
dropout, weight decay and EMA off, without all four, and with nanoGPT's settings. It prints the best validation nats per
token of each, how it differs from the recipe's, and the epoch it was reached in. All runs share the split, the order of
the rows and the number of steps. A run that was stopped goes on; finished ones are read from their folders.
"""

import argparse
import csv
from pathlib import Path

from smalti.recipes import LinesRecipe, load_recipe
from smalti.systems.lines import train_lines

OFF = {
    "dropout": ["model.dropout=0"],
    "token dropout": ["train.token_dropout=0"],
    "weight decay": ["train.weight_decay=0"],
    "EMA": ["train.ema_decay=0"],
}
"""The settings that switch each regularisation off."""
NANOGPT = [
    "model.dropout=0.2",
    "learning_rate_width=null",
    "train.learning_rate=1e-3",
    "train.final_share=0.1",
    "train.warmup_steps=100",
    "train.weight_decay=0.1",
    "train.betas=[0.9, 0.99]",
    "train.ema_decay=0",
    "train.token_dropout=0",
]
"""nanoGPT's for a small set (config/train_shakespeare_char.py and the defaults of train.py); same model, same steps."""


def best_evaluation(curves: Path) -> tuple[float, float]:
    """Lowest validation nats per token of a run, and the epoch."""
    with curves.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    best = min(rows, key=lambda row: float(row["nats_per_token"]))
    return float(best["nats_per_token"]), float(best["epoch"])


def cut_table(data: Path, num_rows: int, output: Path) -> Path:
    """The first rows of a table as one of their own."""
    import numpy as np

    from smalti.data.line_rows import write_rows
    from smalti.data.tokens import TokenTable

    path = output / f"first_{num_rows}.parquet"
    if not path.exists():
        table = TokenTable.open(data)
        output.mkdir(parents=True, exist_ok=True)
        write_rows(path, table, np.arange(min(num_rows, len(table))))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="token table of lines")
    parser.add_argument("settings", nargs="*", help="changes to the recipe, key=value, for every run")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ablation"), help="folder for the runs")
    parser.add_argument("--rows", type=int, default=8000, help="rows of the table to use (default %(default)s)")
    given = parser.parse_intermixed_args()
    data = cut_table(given.data, given.rows, given.output)
    everything_off = [setting for settings in OFF.values() for setting in settings]
    runs = {
        "all (the recipe)": [],
        **{f"without {name}": settings for name, settings in OFF.items()},
        "none": everything_off,
        "nanoGPT's settings": NANOGPT,
    }
    print(f"{'regularisation':24}{'nats/token':>12}{'difference':>12}{'epoch':>8}")
    reference = None
    for name, changes in runs.items():
        folder = given.output / name.replace(" ", "_").translate(str.maketrans("", "", "()'"))
        recipe = load_recipe("lines", [f"data={data}", f"output={folder}", *given.settings, *changes])
        assert isinstance(recipe, LinesRecipe)
        train_lines(recipe, command=f"benchmarks/lines_ablation.py, {name}", show_progress=False)
        nats, epoch = best_evaluation(folder / "model" / "curves.csv")
        reference = nats if reference is None else reference
        print(f"{name:24}{nats:12.4f}{nats - reference:+12.4f}{epoch:8.1f}", flush=True)


if __name__ == "__main__":
    main()
