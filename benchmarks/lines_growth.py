"""How scoring and completing files of lines grow with their number: seconds, processor time, lines/s, peak memory.

    python benchmarks/lines_growth.py                    # 10^4, 10^5 and 10^6 lines of 16 codes below 64
    python benchmarks/lines_growth.py 100000 --codes 67

The model is tiny and knows nothing, so that what is seen is the reading, batching and writing around it; what a real
model takes is a matter of its size alone. Half of each line is given where lines are completed. Each job runs in a
process of its own, so that the peak is that job's; the first row, of ten lines, is what the peaks are to be compared
with.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

VOCAB_SIZE, LINES_PER_BLOCK = 64, 50_000


def random_lines(num_lines: int, num_codes: int) -> Iterator:
    from smalti.data.lines import Lines

    source = np.random.default_rng(0)
    for start in range(0, num_lines, LINES_PER_BLOCK):
        n = min(LINES_PER_BLOCK, num_lines - start)
        tags = pa.array([f"{index:032x}.png" for index in range(start, start + n)])
        yield Lines(tags, source.integers(0, VOCAB_SIZE, n * num_codes), np.full(n, num_codes))


def save_tiny_model(bundle: Path, num_codes: int) -> None:
    from smalti.bundle import Bundle
    from smalti.models.config import TransformerConfig
    from smalti.models.decoder_only import new_model
    from smalti.recipes.line_presets import line_layout

    layout = line_layout(num_codes, VOCAB_SIZE)
    shape = TransformerConfig(num_layers=1, d_model=32, num_heads=2, d_ff=64, max_length=layout.max_length)
    Bundle(model=new_model(layout, shape), layout=layout, name="tiny").save(bundle)


def measure(job: str, path: Path, bundle: Path) -> dict[str, float]:
    """Runs in its own process: one job, timed without the start of Python."""
    from smalti.tasks.line_files import complete_file, score_file
    from smalti.tasks.lines import LineModel

    model = LineModel.load(bundle)
    started_at, processor_s = time.perf_counter(), time.process_time()
    run = score_file if job == "score" else complete_file
    run(model, path, path.with_name(job))
    elapsed_s, processor_s = time.perf_counter() - started_at, time.process_time() - processor_s
    # Not getrusage's maximum: on Linux a child inherits that of the process that started it.
    peak_bytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {"elapsed_s": elapsed_s, "processor_s": processor_s, "peak_bytes": peak_bytes}


def measure_apart(job: str, path: Path, bundle: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", job, str(path), str(bundle)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_lines", nargs="*", type=int, default=[10**4, 10**5, 10**6])
    parser.add_argument("--codes", type=int, default=16, help="codes of each line (default %(default)s)")
    parser.add_argument("--measure", nargs=3, metavar=("JOB", "TEXT", "BUNDLE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        job, path, bundle = given.measure
        print(json.dumps(measure(job, Path(path), Path(bundle))))
        return
    from smalti.data.lines import read_lines, write_lines

    print(" ".join(f"{title:>10}" for title in ("job", "lines", "seconds", "cpu s", "lines/s", "peak MB")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "bundle", given.codes)
        for num_lines in [10, *given.num_lines]:
            for job, num_codes in (("score", given.codes), ("complete", given.codes // 2)):
                run = folder / f"{job}-{num_lines}"
                run.mkdir()
                write_lines(run / "lines.txt", random_lines(num_lines, num_codes))
                result = measure_apart(job, run / "lines.txt", folder / "bundle")
                if job == "complete":
                    assert sum(len(block.lengths) for block in read_lines(run / "complete")) == num_lines
                seconds, peak = result["elapsed_s"], result["peak_bytes"] / 1e6
                spent = f"{seconds:>10.2f} {result['processor_s']:>10.2f} {num_lines / seconds:>10,.0f}"
                print(f"{job:>10} {num_lines:>10,} {spent} {peak:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
