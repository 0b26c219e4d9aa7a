"""Opening a token table of millions of rows, and how fast its loader is: rows/s, seconds, memory.

    python benchmarks/token_table.py                # 3 million rows of 32 codes with captions, as CC3M's
    python benchmarks/token_table.py 300000 --batch-size 64

Each measurement runs in a process of its own. Peak memory counts the process's own pages; the pages of the
memory-mapped file that it has touched are printed apart, since the system takes those back when it needs them.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from smalti.data.loader import batches, prefetch
from smalti.data.tokens import TokenTable, token_rows, write_token_table

NUM_CODES, CODEBOOK_SIZE, TEXT_VOCAB_SIZE = 32, 4096, 25_895
ROWS_PER_BATCH = 50_000
NUM_STEPS = 2_000


def random_rows(num_rows: int) -> Iterator[pa.RecordBatch]:
    source = np.random.default_rng(0)
    for start in range(0, num_rows, ROWS_PER_BATCH):
        n = min(ROWS_PER_BATCH, num_rows - start)
        ends = np.cumsum(source.integers(5, 20, n))
        text_tokens = np.split(source.integers(0, TEXT_VOCAB_SIZE, ends[-1]), ends[:-1])
        texts = ["a river has burst its banks and has spread out onto arable farmland alongside"] * n
        keys = [f"{row:09d}" for row in range(start, start + n)]
        yield token_rows(keys, source.integers(0, CODEBOOK_SIZE, (n, NUM_CODES)), text_tokens, texts)


def own_and_mapped_mb() -> tuple[float, float]:
    status = Path("/proc/self/status").read_text()
    own, mapped = (int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return own, mapped


def measure(path: Path, batch_size: int) -> dict[str, float]:
    started_at, open_cpu_s = time.perf_counter(), time.process_time()
    table = TokenTable.open(path, image_length=NUM_CODES, image_vocab_size=CODEBOOK_SIZE)
    open_s, open_cpu_s = time.perf_counter() - started_at, time.process_time() - open_cpu_s
    stream = prefetch(map(table.batch, batches(len(table), batch_size, seed=0)))
    next(stream)
    started_at, read_cpu_s = time.perf_counter(), time.process_time()
    num_rows = sum(len(batch.image_tokens) for batch in itertools.islice(stream, NUM_STEPS))
    read_s, read_cpu_s = time.perf_counter() - started_at, time.process_time() - read_cpu_s
    own_mb, mapped_mb = own_and_mapped_mb()
    return {
        "open s": open_s,
        "open cpu s": open_cpu_s,
        "rows/s": num_rows / read_s,
        "rows/cpu s": num_rows / read_cpu_s,
        "own MB": own_mb,
        "mapped MB": mapped_mb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_rows", nargs="*", type=int, default=[30_000, 300_000, 3_000_000])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--measure", type=Path, metavar="TABLE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.batch_size)))
        return
    print(f"batches of {arguments.batch_size}, {NUM_STEPS} of them, {NUM_CODES} codes and a caption a row")
    titles = "rows", "MB", "opening", "open s", "open cpu s", "rows/s", "rows/cpu s", "own MB", "mapped MB"
    print(" ".join(f"{title:>10}" for title in titles))
    for num_rows in arguments.num_rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.parquet"
            write_token_table(path, random_rows(num_rows), {"codebook_size": CODEBOOK_SIZE})
            for opening in ("first", "again"):
                command = [sys.executable, __file__, "--measure", str(path), "--batch-size", str(arguments.batch_size)]
                environment = os.environ | {"XDG_CACHE_HOME": folder}
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
                result = json.loads(output)
                figures = " ".join(f"{value:>10,.{2 if value < 100 else 0}f}" for value in result.values())
                print(f"{num_rows:>10,} {path.stat().st_size / 1e6:>10.0f} {opening:>10} {figures}", flush=True)


if __name__ == "__main__":
    main()
