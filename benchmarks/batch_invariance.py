"""Whether the same seed gives the same picture in any batch, on any number of threads, with and without the library.

    python benchmarks/batch_invariance.py [-n 700] [--bundle digits] [--batch-sizes 64 7 1] [--threads 1 2]

Draws n pictures of a bundle in batches of each size, on each number of threads, by the native decoder and by torch
alone, each with the instructions of this processor and with AVX2 at the most, and counts how many differ from those of
the first batch size on the first number of threads: in a code, or in a pixel. Each setting is a process of its own.
Exits 1 if any differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from smalti.data.digits import COLOUR_PAIRS, DIGITS
from smalti.image_files import RECEIPT
from smalti.tasks.images import Pipeline

EMOJI = ["woman astronaut, dark skin tone", "cat face", "man cook", "thumbs up, light skin tone", "red heart"]
AVX2 = {"SMALTI_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def prompts(bundle: str, n: int) -> list[str]:
    if bundle != "digits":
        return [EMOJI[i % len(EMOJI)] for i in range(n)]
    generator = np.random.default_rng(0)
    pairs = [COLOUR_PAIRS[i] for i in generator.integers(len(COLOUR_PAIRS), size=n)]
    digits = [DIGITS[i] for i in generator.integers(len(DIGITS), size=n)]
    return [f"{' '.join(one)} {digit} on {' '.join(other)}" for (one, other), digit in zip(pairs, digits, strict=True)]


def draw(bundle: str, n: int, batch_size: int, threads: int, path: Path) -> None:
    torch.set_num_threads(threads)
    pictures = Pipeline.load(bundle).generate(prompts(bundle, n), seed=range(n), batch_size=batch_size)
    receipts = [json.loads(picture.info[RECEIPT]) for picture in pictures]
    np.savez(
        path,
        codes=[receipt["codes"] for receipt in receipts],
        pixels=[np.asarray(picture) for picture in pictures],
        executor=receipts[0]["executor"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", type=int, default=700)
    parser.add_argument("--bundle", default="digits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 7, 1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        return draw(args.bundle, args.n, args.batch_sizes[0], args.threads[0], args.draw)
    total = 0
    print(f"{'instructions':14}{'executor':10}{'threads':>8}{'batch':>7}{'differ in codes':>17}{'in pixels':>11}")
    for native in ("1", "0"):
        for limit in ({}, AVX2):
            total += compare(args, native, limit)
    sys.exit(1 if total else 0)


def compare(args: argparse.Namespace, native: str, limit: dict[str, str]) -> int:
    first, total = None, 0
    for threads in args.threads:
        for batch_size in args.batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "drawn.npz"
                command = [sys.executable, __file__, "-n", str(args.n), "--bundle", args.bundle, "--draw", str(path)]
                command += ["--batch-sizes", str(batch_size), "--threads", str(threads)]
                subprocess.run(command, check=True, env=os.environ | limit | {"SMALTI_NATIVE": native})
                found = dict(np.load(path))
            first = first or found
            differ = [int((found[k] != first[k]).reshape(args.n, -1).any(1).sum()) for k in ("codes", "pixels")]
            total += sum(differ)
            name = "avx2" if limit else "all"
            print(f"{name:14}{found['executor']!s:10}{threads:8}{batch_size:7}{differ[0]:17}{differ[1]:11}", flush=True)
    return total


if __name__ == "__main__":
    main()
