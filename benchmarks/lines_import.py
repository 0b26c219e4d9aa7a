"""How the import of pre-tokenized lines grows with their number: lines/s, MB/s of text, processor time, peak memory.

    python benchmarks/lines_import.py                    # 10^4, 10^5 and 10^6 lines of 67 codes below 1025
    python benchmarks/lines_import.py 5000000 --suffix .gz

Each import runs in a process of its own, so that the peak is that import's; the first row, of no more than the modules
loaded and ten lines read, is what the peaks are to be compared with.
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

from smalti.data.lines import Lines, import_lines, write_lines

NUM_CODES, VOCAB_SIZE, LINES_PER_BLOCK = 67, 1025, 50_000


def random_lines(num_lines: int) -> Iterator[Lines]:
    """Lines of uniform random codes: the hardest to compress; tags are 32 hexadecimal digits and `.png`."""
    source = np.random.default_rng(0)
    for start in range(0, num_lines, LINES_PER_BLOCK):
        n = min(LINES_PER_BLOCK, num_lines - start)
        tags = pa.array([f"{index * 0x9E3779B97F4A7C15 % 2**128:032x}.png" for index in range(start, start + n)])
        yield Lines(tags, source.integers(0, VOCAB_SIZE, n * NUM_CODES), np.full(n, NUM_CODES))


def measure(path: Path, output: Path) -> dict[str, float]:
    """Runs in its own process: one import, timed without the start of Python."""
    started_at, processor_s = time.perf_counter(), time.process_time()
    report = import_lines(path, output, show_progress=sys.stderr.isatty())
    elapsed_s, processor_s = time.perf_counter() - started_at, time.process_time() - processor_s
    # Not getrusage's maximum: on Linux a child inherits that of the process that started it.
    status = Path("/proc/self/status").read_text()
    peak_bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"num_lines": report.num_lines, "elapsed_s": elapsed_s, "processor_s": processor_s, "peak_bytes": peak_bytes}


def measure_apart(path: Path, output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), str(output)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_lines", nargs="*", type=int, default=[10**4, 10**5, 10**6])
    parser.add_argument("--suffix", default="", help="'.gz' or '.zst' to import compressed text")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("TEXT", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    titles = "lines", "text MB", "table MB", "seconds", "cpu s", "lines/s", "MB/s", "peak MB"
    print(" ".join(f"{title:>10}" for title in titles))
    for num_lines in [10, *arguments.num_lines]:
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder) / f"lines.txt{arguments.suffix}", Path(folder) / "lines.parquet"
            text_bytes = 0

            def counted(blocks: Iterator[Lines]) -> Iterator[Lines]:
                nonlocal text_bytes
                for block in blocks:
                    digits = 1 + (block.codes > 9) + (block.codes > 99) + (block.codes > 999)
                    # 36 characters of tag, a space before each code, a line feed
                    text_bytes += int(digits.sum()) + len(block.codes) + 37 * len(block.lengths)
                    yield block

            write_lines(path, counted(random_lines(num_lines)))
            result = measure_apart(path, output)
            seconds = result["elapsed_s"]
            megabytes = f"{text_bytes / 1e6:>10.1f} {output.stat().st_size / 1e6:>10.1f}"
            rates = f"{num_lines / seconds:>10,.0f} {text_bytes / seconds / 1e6:>10.1f}"
            spent = f"{seconds:>10.2f} {result['processor_s']:>10.2f}"
            print(f"{num_lines:>10,} {megabytes} {spent} {rates} {result['peak_bytes'] / 1e6:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
