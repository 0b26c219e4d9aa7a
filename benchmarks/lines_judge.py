"""Completions of lines before an independent judge: which strategy and temperature is likeliest to pass for real?

    python benchmarks/lines_judge.py lines.parquet held_out.parquet -o out/judge --prefix 24
    python benchmarks/lines_judge.py lines.parquet held_out.parquet -o out/judge --prefix 24 --bundle digits

Two models are trained on two halves of the lines that share no line: A, which completes, and B, the judge, of another
size and seed. The first codes of held-out lines are completed by A in every way, and B says how likely what was added
is, in nats per added token, beside what it says of the true continuations. Nearest to the true ones is what B finds as
likely as the real; lowest is what B finds likeliest. `share` tells apart likely from dull: how many different
completions there are among all lines, and how often a code is the likeliest one of its place (over all true lines).

With --bundle, whose image tokenizer made the lines, the completions are decoded, and the digit classifier says how sure
it is of what it reads (the mean of its largest probability), and how often it reads the digit of the true picture.
Runs that were stopped go on; everything that is done is read from the output folder.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from smalti.data.line_rows import write_rows
from smalti.data.lines import split_rows, table_lines, write_lines
from smalti.data.tokens import TokenTable
from smalti.recipes import LinesRecipe, load_recipe
from smalti.systems.lines import train_lines
from smalti.tasks.line_files import LIKELIHOOD_SUFFIX, complete_file
from smalti.tasks.lines import CompleteConfig, LineModel

WAYS = {
    "sample, T 1.0": CompleteConfig(temperature=1.0),
    "sample, T 0.9": CompleteConfig(temperature=0.9),
    "sample, T 0.8": CompleteConfig(temperature=0.8),
    "sample, T 0.6": CompleteConfig(temperature=0.6),
    "sample, top-p 0.9": CompleteConfig(temperature=1.0, top_p=0.9),
    "greedy": CompleteConfig(strategy="greedy"),
    "beam of 8": CompleteConfig(strategy="beam", beam_width=8),
    "best of 4": CompleteConfig(strategy="best-of-n", temperature=1.0, num_candidates=4),
    "best of 16": CompleteConfig(strategy="best-of-n", temperature=1.0, num_candidates=16),
}


def halves(data: Path, output: Path) -> list[Path]:
    """Two tables that share no line."""
    paths = [output / f"half_{name}.parquet" for name in "ab"]
    if not all(path.exists() for path in paths):
        table = TokenTable.open(data)
        output.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, split_rows(table, 0.5, seed=1), strict=True):
            path.unlink(missing_ok=True)
            write_rows(path, table, rows)
    return paths


def train(name: str, data: Path, validation: Path, output: Path, settings: Sequence[str]) -> LineModel:
    recipe = load_recipe("lines", [f"data={data}", f"validation={validation}", f"output={output / name}", *settings])
    assert isinstance(recipe, LinesRecipe)
    return LineModel.load(train_lines(recipe, command=f"benchmarks/lines_judge.py, {name}"))


def read_codes(path: Path) -> np.ndarray:
    return np.array([[int(word) for word in line.split()[1:]] for line in path.read_text().splitlines()])


def own_nats(path: Path) -> float:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return -sum(float(row["log_prob"]) for row in rows) / sum(int(row["num_added"]) for row in rows)


def judge(judge_model: LineModel, codes: np.ndarray, num_given: int) -> tuple[float, float]:
    """B's nats per added token, with the standard error over lines."""
    nats = judge_model.score(torch.from_numpy(codes), torch.full((len(codes),), codes.shape[1]))
    lines = nats[:, num_given:].mean(1)
    return float(lines.mean()), float(lines.std() / len(lines) ** 0.5)


class PictureJudge:
    """Reads the digits of decoded lines."""

    def __init__(self, bundle: str, truth: np.ndarray):
        from smalti.evaluate.digits import load_digit_classifier
        from smalti.tasks.images import Pipeline

        self.pipe, self.classifier = Pipeline.load(bundle), load_digit_classifier()
        self.true_digits = self.read(truth)[0]

    def read(self, codes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Each line's digit, and the probability the classifier gives it."""
        from smalti.data.digits import read_colours

        images = self.pipe.decode_images(torch.from_numpy(codes).view(-1, *self.pipe.grid)).clamp(0, 1)
        levels = (images * 3).round().byte().permute(0, 2, 3, 1).numpy()
        with torch.inference_mode():
            probabilities = self.classifier(torch.from_numpy(read_colours(levels).mask).float()).softmax(1)
        sureness, digits = probabilities.max(1)
        return digits, sureness

    def columns(self, codes: np.ndarray) -> str:
        digits, sureness = self.read(codes)
        same = (digits == self.true_digits).float().mean()
        return f"{float(sureness.mean()):10.4f}{float(same):10.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="token table of lines to train both on")
    parser.add_argument("held_out", type=Path, help="token table whose prefixes are completed")
    parser.add_argument("settings", nargs="*", help="changes to the recipe of both models, key=value")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/judge"), help="folder for all of it")
    parser.add_argument("--prefix", type=int, required=True, help="codes given of each line")
    parser.add_argument("--lines", type=int, default=1000, help="held-out lines (default %(default)s)")
    parser.add_argument("--presets", default="1M,3M", help="presets of A and B (default %(default)s)")
    parser.add_argument("--bundle", help="bundle of digits whose image tokenizer made the lines")
    given = parser.parse_intermixed_args()

    held_out, output = TokenTable.open(given.held_out), given.output
    a_preset, b_preset = given.presets.split(",")
    half_a, half_b = halves(given.data, output)
    model = train("model_a", half_a, given.held_out, output, [f"preset={a_preset}", "train.seed=0", *given.settings])
    other = train("model_b", half_b, given.held_out, output, [f"preset={b_preset}", "train.seed=1", *given.settings])

    rows = np.arange(min(given.lines, len(held_out)))
    truth = held_out.batch(rows).image_tokens
    prefixes = output / f"prefixes_{given.prefix}.txt"
    write_lines(prefixes, table_lines(held_out, rows, num_codes=given.prefix), force=True)
    pictures = PictureJudge(given.bundle, truth) if given.bundle else None
    commonest = np.array([np.bincount(column).argmax() for column in truth.T])[given.prefix :]

    def show(name: str, codes: np.ndarray, own: str) -> None:
        nats, error = judge(other, codes, given.prefix)
        added = codes[:, given.prefix :]
        distinct, common = len(np.unique(added, axis=0)) / len(added), float((added == commonest).mean())
        seen = pictures.columns(codes) if pictures else ""
        print(f"{name:20}{own:>10}{nats:10.4f} ±{error:7.4f}{distinct:10.3f}{common:10.3f}{seen}", flush=True)

    more = f"{'sureness':>10}{'same digit':>11}" if pictures else ""
    print(f"\n{'completions':20}{'A nats':>10}{'B nats':>10}{'':9}{'distinct':>10}{'commonest':>10}{more}")
    show("true continuations", truth, f"{judge(model, truth, given.prefix)[0]:.4f}")
    for name, config in WAYS.items():
        done = output / f"{name.replace(' ', '_').replace(',', '')}.txt"
        complete_file(model, prefixes, done, replace(config, seed=0), force=True, show_progress=False)
        side = done.with_name(done.name + LIKELIHOOD_SUFFIX)
        show(name, read_codes(done), f"{own_nats(side):.4f}")


if __name__ == "__main__":
    main()
