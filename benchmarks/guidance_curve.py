"""Figures of what a bundle draws against guidance, with intervals: a U in the Fréchet distance, recall for precision.

    python benchmarks/guidance_curve.py --bundle mnist-classes --classes all --reference FOLDER --features FILE \\
        --scales 1,1.25,1.5,2,3,4 -n 2000 -o OUT [--workers 2] [--size 64]

Each scale is a `smalti sample` and a `smalti evaluate samples` with the same seeds, so that scales are paired. What is
done is not done again. Printed is a table in Markdown; OUT/guidance_curve.png draws it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

SHOWN = ("frechet", "frechet_infinity", "precision", "recall", "density", "coverage")


def smalti(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "smalti", *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(arguments: argparse.Namespace, scale: float) -> dict:
    """The card of one scale."""
    samples, card = arguments.output / f"guidance-{scale:g}.npz", arguments.output / f"card-{scale:g}"
    of_what = ["--classes", arguments.classes] if arguments.classes else ["--prompts", str(arguments.prompts)]
    if not samples.exists():
        how = ["--guidance-scale", str(scale), "--workers", str(arguments.workers), "--seed", str(arguments.seed)]
        smalti("sample", "--bundle", arguments.bundle, *of_what, "-n", str(arguments.num), "-o", str(samples), *how)
    if not card.exists():
        options = ["--size", arguments.size] if arguments.size else []
        options += ["--bundle", arguments.bundle] if arguments.features == "tokenizer" else []
        smalti("evaluate", "samples", str(samples), "--reference", str(arguments.reference), "-o", str(card),
               "--features", arguments.features, *options)  # fmt: skip
    return json.loads((card / "card.json").read_text(encoding="utf-8"))


def drawn(cards: dict[float, dict]) -> Figure:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = {"Fréchet distance": SHOWN[:2], "precision, recall, coverage": ("precision", "recall", "coverage")}
    for axes, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in names:
            found = {scale: card["figures"][name] for scale, card in cards.items() if name in card["figures"]}
            if not found:
                continue
            values = [one["value"] for one in found.values()]
            ends = [one["interval"] or [one["value"]] * 2 for one in found.values()]
            errors = [[v - low for v, (low, _) in zip(values, ends, strict=True)],
                      [high - v for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
            label = {"frechet": "as measured", "frechet_infinity": "extrapolated to n = ∞"}.get(name, name)
            axes.errorbar(list(found), values, yerr=errors, marker="o", markersize=4, capsize=3, label=label)
        axes.set_xlabel("guidance scale")
        if title == "Fréchet distance":
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--classes")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--scales", default="1,1.25,1.5,2,3,4")
    parser.add_argument("--size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("-n", "--num", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cards = {scale: measured(arguments, scale) for scale in map(float, arguments.scales.split(","))}
    print(f"| guidance | {' | '.join(SHOWN)} |\n|---|{'---|' * len(SHOWN)}")
    for scale, card in cards.items():
        found = [card["figures"].get(name) for name in SHOWN]
        cells = ["–" if one is None else f"{one['value']:.3f} ± {one['standard_error'] or 0:.3f}" for one in found]
        print(f"| {scale:g} | {' | '.join(cells)} |")
    drawn(cards).savefig(arguments.output / "guidance_curve.png", dpi=110)


if __name__ == "__main__":
    main()
