"""`smalti tokenize` by actors of a Ray cluster of this machine, beside as many processes: pictures a second.

    python benchmarks/ray_parts.py [--workers 2] [--pictures 4096] [--rounds 3] [--quick]

Random pictures of 256 × 256 through a small VQGAN, parts of 128, in turns; a cluster that is up already, as it is where
jobs come one after the other. Processes and actors are started anew for every job, and both are counted. Needs
smalti[ray].
"""

import argparse
import io
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from smalti.data.tokenize_pairs import TokenizeConfig, tokenize_pairs
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig


def write(path: Path, num: int, size: int) -> None:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(num):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    keys = [f"{row:06d}" for row in range(num)]
    pq.write_table(pa.table({"__key__": keys, "image": pictures, "caption": keys}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    import ray

    ray.init(num_cpus=given.workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    num, size = (1024, 64) if given.quick else (given.pictures, 256)
    torch.manual_seed(0)
    sizes = dict(channels=32, encoder_multipliers=(1, 1, 2), decoder_multipliers=(1, 1, 2), image_size=(size, size))
    tokenizer = VQGAN(VQGANConfig(encoder_attention_levels=(), decoder_attention_levels=(), **sizes)).eval()
    config = TokenizeConfig(records_per_part=128, batch_size=64, workers=given.workers)
    took: dict[str, list[float]] = {"processes": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.parquet"
        write(pairs, num, size)
        tables = {}
        for number in range(given.rounds):
            for name in took:
                output = Path(folder) / f"{name}-{number}.parquet"
                started_at = time.perf_counter()
                how = replace(config, ray=name == "ray")
                tokenize_pairs(pairs, output, tokenizer, None, how, show_progress=False)
                took[name].append(time.perf_counter() - started_at)
                tables[name] = output.read_bytes()
        same = tables["ray"] == tables["processes"]
    ray.shutdown()
    for name, seconds in took.items():
        ratios = sorted(base / own for base, own in zip(took["processes"], seconds, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:10} {num / statistics.median(seconds):9,.1f} pictures/s, {spread} of the processes")
    print(f"the tables are {'the same, byte for byte' if same else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
