"""Time and memory of importing a large checkpoint, and of opening the bundle that it becomes.

    python benchmarks/checkpoint_import.py [--shape llamagen-3b] [--dtype bfloat16] [--folder DIR]

Writes LlamaGen's tensors with random values, a few megabytes at a time, to a safetensors file; imports it with
`smalti import llamagen`, and opens the bundle, each in a process of its own. Printed are seconds, beside reading the
file once and writing the bundle's weights once, and the peak of memory over the bytes of the weights in float32, which
is what the bundle holds. Takes up to three times those bytes of disk. The aim is 1.15 × the memory.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from smalti.models.config import PRESETS

CODES, LABELS, NUM_CODES = 16384, 1001, 576
BYTES = {"bfloat16": 2, "float32": 4}
NAMES = {"bfloat16": "BF16", "float32": "F32"}
AT_ONCE = 2**22
IMPORT = "from smalti.cli.app import main; main()"
OPEN = "import sys; from smalti.bundle import Bundle; Bundle.load(sys.argv[1], device='cpu')"


def shapes(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """LlamaGen's tensors of a preset, by name."""
    size = PRESETS[name]
    d, wide = size["d_model"], size["d_ff"]
    yield "cls_embedding.embedding_table.weight", (LABELS, d)
    yield "tok_embeddings.weight", (CODES, d)
    for layer in range(size["num_layers"]):
        yield f"layers.{layer}.attention.wqkv.weight", (3 * d, d)
        yield f"layers.{layer}.attention.wo.weight", (d, d)
        for matrix, shape in (("w1", (wide, d)), ("w3", (wide, d)), ("w2", (d, wide))):
            yield f"layers.{layer}.feed_forward.{matrix}.weight", shape
        for norm in ("attention_norm", "ffn_norm"):
            yield f"layers.{layer}.{norm}.weight", (d,)
    yield "norm.weight", (d,)
    yield "output.weight", (CODES, d)


def write(path: Path, name: str, dtype: str) -> int:
    """The checkpoint; returns how many numbers it has."""
    header, end = {}, 0
    for key, shape in shapes(name):
        start, end = end, end + torch.Size(shape).numel() * BYTES[dtype]
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    numbers = end // BYTES[dtype]
    some = 0.02 * torch.randn(AT_ONCE, generator=torch.Generator().manual_seed(0))
    piece = some.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in range(0, end, len(piece)):
            file.write(piece[: end - start])
    return numbers


def measured(program: str, *arguments: str) -> tuple[float, float]:
    """Seconds and the peak of memory, in bytes, of a process."""
    tail = "import resource as r, sys; print(r.getrusage(r.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    body = f"import atexit; atexit.register(lambda: exec({tail!r}))\n{program}"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", body, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - began, int(done.stderr.split()[-1]) * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llamagen-3b", choices=[name for name in PRESETS if "llamagen" in name])
    parser.add_argument("--dtype", default="bfloat16", choices=list(BYTES))
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as directory:
        checkpoint, bundle = Path(directory) / "model.safetensors", Path(directory) / "bundle"
        numbers = write(checkpoint, args.shape, args.dtype)
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        print(f"{args.shape}: {numbers:,} parameters, {numbers * BYTES[args.dtype] / 1e9:.1f} GB in {args.dtype}")
        if 4 * numbers * 1.3 > free:
            raise SystemExit("SKIPPED: this machine has too little memory for it.")
        began = time.perf_counter()
        with checkpoint.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
        read_s = time.perf_counter() - began
        command = ["import", "llamagen", str(checkpoint), "-o", str(bundle), "--image-size", "384", "--quiet"]
        nothing = measured("import smalti.bundle")[1]
        for what, (seconds, peak) in (
            ("import", measured(IMPORT, *command)),
            ("open", measured(OPEN, str(bundle))),
        ):
            print(
                f"{what:8}{seconds:8.1f} s (reading the checkpoint once {read_s:.1f} s), peak memory "
                f"{(peak - nothing) / (4 * numbers):.2f} × the weights in float32"
            )


if __name__ == "__main__":
    main()
