"""Opening a token table of millions of rows, and how fast its loader is beside the model it feeds: rows/s, memory.

    python benchmarks/token_table.py                # 3 million rows of 32 codes with captions, as CC3M's
    python benchmarks/token_table.py 300000 --batch-size 64
    python benchmarks/token_table.py 3000000 --keep out/table   # the table stays, and is found there the next time

Each measurement runs in a process of its own. Peak memory counts the process's own pages; the pages of the
memory-mapped file that it has touched are printed apart, since the system takes those back when it needs them. The
model is that of the recipe cc3m, which takes training steps on batches of the same table; the stream is the same file
read through `datasets`, as from the hub.
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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from smalti.data.loader import batches, prefetch
from smalti.data.streams import TokenStream
from smalti.data.tokens import TokenTable, token_rows, write_token_table

NUM_CODES, CODEBOOK_SIZE, TEXT_VOCAB_SIZE = 32, 4096, 25_895
ROWS_PER_BATCH = 50_000
NUM_STEPS = 2_000
TRAINING_STEPS, TRAINING_BATCH = 8, 64


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


def measure_stream(folder: Path, batch_size: int) -> dict[str, float]:
    started_at = time.perf_counter()
    stream = TokenStream.open(str(folder), image_length=NUM_CODES, image_vocab_size=CODEBOOK_SIZE)
    open_s = time.perf_counter() - started_at
    places = (np.arange(step * batch_size, (step + 1) * batch_size) for step in range(NUM_STEPS))
    ready = prefetch(map(stream.batch, places))
    started_at = time.perf_counter()
    num_rows = sum(len(batch.image_tokens) for batch in ready)
    return {
        "open s": open_s,
        "rows/s": num_rows / (time.perf_counter() - started_at),
        "own MB": own_and_mapped_mb()[0],
    }


def measure_training(path: Path) -> dict[str, float]:
    """Rows and tokens a second of training steps of the recipe's model, after one to warm up."""
    # here, so that the memory of the other measurements is their own
    import torch

    from smalti.models.decoder_only import new_model
    from smalti.precision import compute_precision
    from smalti.recipes import load_recipe
    from smalti.sequences.layout import Layout
    from smalti.text_tokenizer import BPEConfig
    from smalti.training.token_model import NextTokenLoss, make_optimizer, micro_batches, with_choices

    recipe = load_recipe("cc3m")
    vocabulary = BPEConfig(text_size=recipe.text_size, specials=recipe.layout.specials).vocabulary
    layout = Layout.parse(vocabulary, recipe.layout.orders)
    device = torch.device("cpu")
    model = new_model(layout, recipe.model).train()
    config = replace(recipe.train, batch_size=TRAINING_BATCH)
    config = with_choices(config, layout, TRAINING_STEPS, device, parameters_dtype=torch.float32)
    loss_module, optimizer = NextTokenLoss(model, layout), make_optimizer(model, config, device)
    steps = prefetch(micro_batches(layout, TokenTable.open(path), config, start_step=0, rank=0, world_size=1))
    num_tokens, started_at = 0, 0.0
    for step, [piece] in enumerate(itertools.islice(steps, TRAINING_STEPS + 1)):
        if step == 1:
            num_tokens, started_at = 0, time.perf_counter()
        with compute_precision(device, config.precision):
            loss_module(piece.token_ids, piece.targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += int(piece.counts.sum())
    elapsed_s = time.perf_counter() - started_at
    return {
        "parameters": model.num_parameters,
        "rows/s": TRAINING_STEPS * TRAINING_BATCH / elapsed_s,
        "counted tokens/s": num_tokens / elapsed_s,
    }


MEASUREMENTS = {"table": measure, "stream": measure_stream, "training": measure_training}


def in_a_process(name: str, path: Path, batch_size: int, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, str(path), "--batch-size", str(batch_size)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def figures(results: dict[str, float]) -> str:
    return " ".join(f"{value:>10,.{2 if value < 100 else 0}f}" for value in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_rows", nargs="*", type=int, default=[300_000, 3_000_000])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the table of the last size stays")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, path = arguments.measure
        options = {} if name == "training" else {"batch_size": arguments.batch_size}
        print(json.dumps(MEASUREMENTS[name](Path(path), **options)))
        return
    print(f"batches of {arguments.batch_size}, {NUM_STEPS} of them, {NUM_CODES} codes and a caption a row")
    titles = "rows", "MB", "opening", "open s", "open cpu s", "rows/s", "rows/cpu s", "own MB", "mapped MB"
    print(" ".join(f"{title:>10}" for title in titles))
    for num_rows in arguments.num_rows:
        keep = arguments.keep if num_rows == arguments.num_rows[-1] else None
        with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
            cache, path = Path(folder) / "cache", Path(folder) / "table" / "train.parquet"
            if not path.exists():
                write_token_table(path, random_rows(num_rows), {"codebook_size": CODEBOOK_SIZE})
            for opening in ("again",) if cache.exists() else ("first", "again"):
                found = in_a_process("table", path, arguments.batch_size, cache)
                mb = path.stat().st_size / 1e6
                print(f"{num_rows:>10,} {mb:>10.0f} {opening:>10} {figures(found)}", flush=True)
            streamed = in_a_process("stream", path.parent, arguments.batch_size, cache)
            print(f"as a stream: {json.dumps({name: round(value, 2) for name, value in streamed.items()})}", flush=True)
            trained = in_a_process("training", path, arguments.batch_size, cache)
            loader, stream = (rate["rows/s"] / trained["rows/s"] for rate in (found, streamed))
            print(
                f"training {trained['parameters']:,.0f} parameters in batches of {TRAINING_BATCH}: "
                f"{trained['rows/s']:,.1f} rows/s, {trained['counted tokens/s']:,.0f} counted tokens/s. As many rows a "
                f"second, the loader gives {loader:,.0f} times, the stream {stream:,.0f} times.",
                flush=True,
            )


if __name__ == "__main__":
    main()
