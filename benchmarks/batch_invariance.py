"""Whether the same seed gives the same picture in any batch, on any number of threads, with and without the library.

    python benchmarks/batch_invariance.py [-n 700] [--bundle digits] [--batch-sizes 64 7 1] [--threads 1 2]
        [--executors native packed] [--instructions all avx2]

Draws n pictures of a bundle in batches of each size, on each number of threads, by each executor: the native decoder,
and torch alone (SMALTI_NATIVE=0), each with the instructions of this processor and with AVX2 at the most. Counts how
many differ from those of the first batch size on the first number of threads: in a code, or in a pixel. Each setting is
a process of its own. Exits 1 if any differs. The executor `eager` promises nothing; asked for, it counts like the rest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from smalti.data.digits import COLOUR_PAIRS, DIGITS
from smalti.engine.executors import EXECUTORS
from smalti.tasks.images import Pipeline

EMOJI = ["woman astronaut, dark skin tone", "cat face", "man cook", "thumbs up, light skin tone", "red heart"]
INSTRUCTIONS = {
    "all": {},
    "avx2": {"SMALTI_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def prompts(bundle: str, n: int) -> list[str]:
    if bundle != "digits":
        return [EMOJI[i % len(EMOJI)] for i in range(n)]
    generator = np.random.default_rng(0)
    pairs = [COLOUR_PAIRS[i] for i in generator.integers(len(COLOUR_PAIRS), size=n)]
    digits = [DIGITS[i] for i in generator.integers(len(DIGITS), size=n)]
    return [f"{' '.join(one)} {digit} on {' '.join(other)}" for (one, other), digit in zip(pairs, digits, strict=True)]


def draw(bundle: str, n: int, batch_size: int, threads: int, executor: str, path: Path) -> None:
    torch.set_num_threads(threads)
    pipe = Pipeline.load(bundle)
    codes = pipe.generate_codes(prompts(bundle, n), seed=range(n), batch_size=batch_size, executor=executor)
    np.savez(path, codes=codes.numpy(), pixels=[np.asarray(picture) for picture in pipe.decode(codes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", type=int, default=700)
    parser.add_argument("--bundle", default="digits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 7, 1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--executors", nargs="+", default=["native", "packed"], choices=list(EXECUTORS))
    parser.add_argument("--instructions", nargs="+", default=list(INSTRUCTIONS), choices=list(INSTRUCTIONS))
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        return draw(args.bundle, args.n, args.batch_sizes[0], args.threads[0], args.executors[0], args.draw)
    total = 0
    print(f"{'instructions':14}{'executor':10}{'threads':>8}{'batch':>7}{'differ in codes':>17}{'in pixels':>11}")
    for instructions in args.instructions:
        for executor in args.executors:
            total += compare(args, instructions, executor)
    print(f"{total} differ.")
    sys.exit(1 if total else 0)


def compare(args: argparse.Namespace, instructions: str, executor: str) -> int:
    """Prints a line for each number of threads and batch size; returns how many pictures differ."""
    first, total = None, 0
    environment = os.environ | INSTRUCTIONS[instructions] | {"SMALTI_NATIVE": str(int(executor == "native"))}
    for threads in args.threads:
        for batch_size in args.batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "drawn.npz"
                command = [sys.executable, __file__, "-n", str(args.n), "--bundle", args.bundle, "--draw", str(path)]
                command += ["--batch-sizes", str(batch_size), "--threads", str(threads), "--executors", executor]
                subprocess.run(command, check=True, env=environment)
                found = dict(np.load(path))
            first = first or found
            differ = {key: (found[key] != first[key]).reshape(args.n, -1).any(1) for key in first}
            total += int((differ["codes"] | differ["pixels"]).sum())
            codes, pixels = differ["codes"].sum(), differ["pixels"].sum()
            print(f"{instructions:14}{executor:10}{threads:8}{batch_size:7}{codes:17}{pixels:11}", flush=True)
    return total


if __name__ == "__main__":
    main()
