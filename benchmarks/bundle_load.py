"""How long a bundle takes to load, beside reading its file once, and how much memory at the most.

    python benchmarks/bundle_load.py [--gigabytes 3] [--dtype float32 bfloat16] [--repeats 3] [--folder DIR]

Makes a bundle of random float32 weights, as wide as LlamaGen-L, in a temporary folder, and loads it as `Bundle.load`
does; beside it the file is read once and hashed, and loaded by safetensors, whose tensors are then summed: before that
they are promises of the file system. Each is a process of its own, of which the fastest time counts; the first reading
brings the file into the system's cache. Memory is the process's peak beyond what it had before, over the bytes of the
weights in memory. The aims are 1 × the time of reading once, and 1.15 × the memory.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from smalti.bundle import WEIGHTS, Bundle
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary

WIDTH, CODES, CLASSES = 1024, 16384, 1000


def make(folder: Path, gigabytes: float) -> None:
    layout = Layout.parse(Vocabulary({"label": CLASSES, "image": CODES}), {"classes": "(label{1}) image{256}"})
    num_layers = max(1, round((gigabytes * 1e9 / 4 - 2 * (CODES + CLASSES) * WIDTH) / (12 * WIDTH**2)))
    shape = TransformerConfig(
        num_layers=num_layers, d_model=WIDTH, num_heads=16, d_ff=8 * WIDTH // 3, max_length=layout.max_length,
        bias=False, norm="rms", feed_forward="swiglu", positions="rotary",
    )  # fmt: skip
    model = DecoderOnly(DecoderOnlyConfig(vocab_size=layout.vocabulary.size, transformer=shape))
    Bundle(model=model, layout=layout, name="random").save(folder)


def measure(what: str, folder: Path) -> dict[str, float]:
    """Seconds, and the peak of memory over the bytes of the weights."""
    num_bytes, before = (folder / WEIGHTS).stat().st_size, peak_bytes()
    started_at = time.perf_counter()
    if what == "read":
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
        with (folder / WEIGHTS).open("rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                digest.update(buffer[:num_read])
        digest.hexdigest()
    elif what == "load_file":
        sum(float(tensor.sum()) for tensor in load_file(folder / WEIGHTS).values())
    else:
        dtype = what.removeprefix("Bundle.load, ")
        loaded = Bundle.load(folder, device="cpu", dtype=dtype)
        num_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        assert str(loaded.dtype) == f"torch.{dtype}"
    return {"seconds": time.perf_counter() - started_at, "memory": (peak_bytes() - before) / num_bytes}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure == "make":
        return make(args.folder, args.gigabytes)
    if args.measure:
        return print(json.dumps(measure(args.measure, args.folder)))
    with tempfile.TemporaryDirectory(dir=args.folder) as directory:
        folder = Path(directory) / "bundle"
        command = [sys.executable, __file__, "--folder", str(folder)]  # a process starts with its parent's peak
        subprocess.run([*command, "--gigabytes", str(args.gigabytes), "--measure", "make"], check=True)
        size = (folder / WEIGHTS).stat().st_size
        print(f"{size / 1e9:.2f} GB of float32 weights, torch {torch.__version__}, {torch.get_num_threads()} threads")
        print(f"{'':24}{'seconds':>9}{'× reading once':>16}{'memory × weights':>18}")
        whats = ["read", "load_file", *(f"Bundle.load, {dtype}" for dtype in args.dtype)]
        found: dict[str, list[dict[str, float]]] = {what: [] for what in whats}
        for _ in range(args.repeats):  # in turn: what else the machine does meets all alike
            for what in whats:
                done = subprocess.run([*command, "--measure", what], check=True, capture_output=True, text=True)
                found[what].append(json.loads(done.stdout))
        once = min(row["seconds"] for row in found["read"])
        for what, rows in found.items():
            seconds, memory = min(row["seconds"] for row in rows), max(row["memory"] for row in rows)
            name = {"read": "read once and hashed", "load_file": "safetensors, summed"}.get(what, what)
            print(f"{name:24}{seconds:9.2f}{seconds / once:16.2f}{memory:18.2f}")


if __name__ == "__main__":
    main()
