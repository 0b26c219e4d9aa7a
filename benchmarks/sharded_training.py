"""Weights in shares on two processes of this machine, beside one process with as many threads: tokens a second.

    python benchmarks/sharded_training.py [--processes 2] [--threads 2] [--steps 12] [--rounds 3] [--quick]

A LlamaGen of 8 layers of 512, operator by operator in float32; by gloo, the one process, DDP and FSDP2 in turns. Each
process has threads / processes of the threads. Ratios are of one round, the median of all with the least and the
most. Beside the rate by the clock stands that by processor time, of all
processes together, which other programs on the machine disturb less; it does not see waiting. `--quick` takes a smaller
model, and leaves out DDP.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any


def work(given: argparse.Namespace) -> None:
    """One process of a contestant: prints tokens a second, by the clock and by processor time."""
    import numpy as np
    import torch

    from smalti.models.config import LLAMAGEN, TransformerConfig
    from smalti.sequences.layout import Layout
    from smalti.sequences.vocabulary import Vocabulary
    from smalti.training import token_model
    from smalti.training.token_model import TokenArrays, TrainConfig

    torch.set_num_threads(given.threads // int(os.environ.get("WORLD_SIZE", "1")))
    layers, width, rows = (4, 256, 8) if given.quick else (8, 512, 16)
    layout = Layout.parse(Vocabulary({"image": 1024, "label": 11}), {"class": "label{1} image{256}"})
    sizes: dict[str, Any] = {"num_layers": layers, "d_model": width, "num_heads": width // 64, "d_ff": width * 11 // 4}
    shape = TransformerConfig(max_length=257, grid=(16, 16), prefix_length=1, **sizes, **LLAMAGEN)
    config = TrainConfig(
        num_steps=given.steps, batch_size=rows, precision="float32", compile=False, max_grad_norm=1.0, evaluation_rows=2
    )
    if given.sharding != "one":
        config = replace(config, sharding=given.sharding)
    rng = np.random.default_rng(0)
    data = TokenArrays(rng.integers(0, 1024, (64, 256)), rng.integers(0, 10, (64, 1)))
    took: list[float] = []
    worked: list[float] = []
    real = token_model.train_step

    def timed(*arguments: Any) -> Any:
        started_at, worked_before = time.perf_counter(), time.process_time()
        found = real(*arguments)
        took.append(time.perf_counter() - started_at)
        worked.append(time.process_time() - worked_before)
        return found

    token_model.train_step = timed
    folder = os.environ["RUN_FOLDER"]
    token_model.train_model(shape, layout, data, data, config, folder, show_progress=False)
    if os.environ.get("RANK", "0") == "0":
        tokens, size = rows * 257, int(os.environ.get("WORLD_SIZE", "1"))
        print(tokens / statistics.median(took[2:]), tokens / (size * statistics.median(worked[2:])))


def tokens_per_s(given: argparse.Namespace, sharding: str) -> tuple[float, float]:
    own = ["--sharding", sharding, "--threads", str(given.threads), "--steps", str(given.steps)]
    own += ["--quick"] if given.quick else []
    start = [sys.executable]
    if sharding != "one":
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.processes}"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"RUN_FOLDER": folder, "SMALTI_NATIVE": "0"}
        environment["OMP_NUM_THREADS"] = str(given.threads if sharding == "one" else given.threads // given.processes)
        done = subprocess.run([*start, __file__, *own], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    by_clock, by_processor = map(float, done.stdout.split()[-2:])
    return by_clock, by_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sharding", choices=("one", "none", "full"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sharding:
        work(given)
        return
    names = {"one": "one process", "none": f"{given.processes} processes, DDP", "full": f"{given.processes}, FSDP2"}
    if given.quick:
        del names["none"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            found[name].append(tokens_per_s(given, name))
    for name, label in names.items():
        clock, processor = (statistics.median(column) for column in zip(*found[name], strict=True))
        pairs = zip(found[name], found["one"], strict=True)
        ratios = zip(*((own / base for own, base in zip(*pair, strict=True)) for pair in pairs), strict=True)
        by_clock, by_processor = (
            f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in ratios
        )
        print(
            f"{label:22} {clock:9,.0f} tokens/s, {by_clock} of one process; {processor:9,.0f} tokens a second of the "
            f"processor, {by_processor}",
            flush=True,
        )


if __name__ == "__main__":
    main()
