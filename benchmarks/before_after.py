"""Training and sampling of this code beside those of another checkout, in turn, in one run.

    python benchmarks/before_after.py OTHER_CHECKOUT [--rounds 15] [--threads 2]

One process for each checkout prepares what that checkout's `digits_speed.py` calls ours (a training step at every
precision the processor has, sampling at three batch sizes on every path); then the two take turns, each contestant for
about `--seconds` in a round, so that what slows the machine slows both. Printed are the median rates and the median of
the ratios of the rounds. It asserts nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parents[1]


def work(threads: int, clock: Callable[[], float]) -> None:
    """In a process of its own, with one checkout on the path: for every number read, that contestant's time."""
    import digits_speed as own
    import torch

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    bench, contestants = own.Bench(device, quick=False), []
    for bf16 in bench.precisions:
        step = own.train_ours(device, bf16, False, False, native=True)
        contestants.append((f"train {'bf16' if bf16 else 'fp32'} native", own.BATCH * own.LENGTH, step))
    for path in ("native", "torch", "plain"):
        for batch_size in (1, 9, 64):
            run = own.sample_ours(device, batch_size, path)
            contestants.append((f"sample {path}, batch {batch_size}", batch_size * own.SAMPLED, run))
    for _, _, run in contestants:
        run()
    print(json.dumps([(name, tokens) for name, tokens, _ in contestants]), flush=True)
    for line in sys.stdin:
        index, seconds = line.split()
        run, started_at, times = contestants[int(index)][2], clock(), 0
        while clock() - started_at < float(seconds):
            run()
            times += 1
        print((clock() - started_at) / times, flush=True)


def start(checkout: Path, options: list[str]) -> subprocess.Popen:
    paths = os.pathsep.join(str(checkout / folder) for folder in ("src", "benchmarks"))
    command = [sys.executable, str(Path(__file__).resolve()), "--work", *options]
    environment = {**os.environ, "PYTHONPATH": paths}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout)


def ask(worker: subprocess.Popen, index: int, seconds: float) -> float:
    assert worker.stdin and worker.stdout
    print(index, seconds, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout, which counts as before")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="contestants with this in their name")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count processor time instead of the clock's: with --threads 1, what a busy machine still measures fairly",
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        # The folder of this file stands before PYTHONPATH: the checkout's own benchmark is meant.
        sys.path.remove(str(Path(__file__).resolve().parent))
        work(args.threads, time.process_time if args.processor_time else time.perf_counter)
        return
    options = ["--threads", str(args.threads), *(["--processor-time"] if args.processor_time else [])]
    workers = [start(args.other.resolve(), options), start(HERE, options)]
    lists = [json.loads(worker.stdout.readline()) for worker in workers]
    names = [name for name, _ in lists[1]]
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for round_index in range(args.rounds):
        for index, name in enumerate(names):
            if args.only not in name:
                continue
            for which in (0, 1) if round_index % 2 else (1, 0):
                seconds[name][which].append(ask(workers[which], index, args.seconds))
    print(f"{'':28}{'before':>12}{'after':>12}{'after / before':>16}   (slowest–fastest round)")
    for name, tokens in lists[1]:
        if args.only not in name:
            continue
        before, after = seconds[name]
        ratios = sorted(b / a for b, a in zip(before, after, strict=True))
        rates = (f"{tokens / statistics.median(times):12,.0f}" for times in (before, after))
        print(f"{name:28}{''.join(rates)}{statistics.median(ratios):16.3f}   ({ratios[0]:.2f}–{ratios[-1]:.2f})")
    for worker in workers:
        assert worker.stdin
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
