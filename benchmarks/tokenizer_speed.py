"""How fast image tokenizers encode and decode pictures of 256 x 256, and what share of the machine's limit that is.

    python benchmarks/tokenizer_speed.py [--model vq-16] [--part networks] [--threads 2] [--json FILE]

VQ-16 (LlamaGen's sizes), TiTok-L-32 and ViT-VQGAN-Small with random weights, at batch 1 and 4, in fp32 and bf16, and
VQ-16 also as peers run it: channels first and all distances to the codes. The rates of the machine that they are
held against are measured in the same process. Then the nearest of 16,384 codes of width 8 for 1,024 vectors, by one
matrix product and as the difference of all pairs' distances (the form of taming-transformers and of LlamaGen), and what
`smalti tokenize` spends on decoding PNGs. Each figure is the median of the rounds. It prints and asserts nothing.
"""

import argparse
import gc
import io
import json
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from smalti.data.pairs import decode_picture
from smalti.image_tokenizers.quantizer import nearest
from smalti.image_tokenizers.titok import PRESETS as TITOK
from smalti.image_tokenizers.titok import TiTok
from smalti.image_tokenizers.vit_vqgan import PRESETS as VIT_VQGAN
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN
from smalti.image_tokenizers.vqgan import PRESETS as VQGAN_PRESETS
from smalti.image_tokenizers.vqgan import VQGAN

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vq-16": lambda: VQGAN(VQGAN_PRESETS["vq-16"]),
    "titok-l-32": lambda: TiTok(TITOK["l-32"]),
    "vit-vqgan-small": lambda: ViTVQGAN(VIT_VQGAN["small"]),
}
SETTINGS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp32, peers' form": torch.float32,
    "bf16, peers' form": torch.bfloat16,
}
SIDE = 256


class Timing:
    """The clock, and how long each figure is measured."""

    def __init__(self, clock: Callable[[], float], seconds: float):
        self.clock, self.seconds = clock, seconds

    def once(self, run: Callable[[], object]) -> float:
        started_at = self.clock()
        run()
        return self.clock() - started_at

    def median(self, run: Callable[[], object]) -> float:
        """Seconds of one run: the median of at least 2, after one that does not count."""
        first = self.once(run)
        rounds = max(2, min(50, int(self.seconds / first)))
        return median(self.once(run) for _ in range(rounds))


@contextmanager
def peak_memory(found: list[int]):
    """Appends the most bytes that the process held beyond what it held before."""
    gc.collect()
    before = _status_bytes("VmRSS")
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the kernel forgets the highest resident size so far
    yield
    found.append(_status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def products_per_s(timing: Timing) -> dict[str, float]:
    """Floating-point operations a second of one large matrix product; multiply and add count two."""
    n = 2048
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        rates[name] = 2 * n**3 / min(timing.once(lambda a=a, b=b: a @ b) for _ in range(8))
    return rates


# ---- networks ----


def random_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Without the initial values of each layer, which take longer than the measurement."""
    with torch.device("meta"):
        model = MODELS[name]()
    model = model.to_empty(device="cpu").eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    return model


def peers_form(model: VQGAN, images: Tensor, codes: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Encoding and decoding with pictures channels first, as they come from the peers' loaders, and their search."""
    entries = F.normalize(model.quantizer.codebook.float(), dim=-1)  # pyright: ignore[reportArgumentType]
    images = images.to(model.encoder.conv_in.weight.dtype)

    def encode() -> Tensor:
        latents = model.to_code(model.encoder(2 * images - 1)).permute(0, 2, 3, 1).contiguous()
        return by_distances(F.normalize(latents.float().flatten(0, 2), dim=-1), entries).view(codes.shape)

    def decode() -> Tensor:
        latents = F.embedding(codes, entries).permute(0, 3, 1, 2).contiguous().to(images.dtype)
        return model.decoder(model.from_code(latents))

    return encode, decode


def forward_flops(name: str) -> tuple[int, int]:
    """Operations of encoding and of decoding a picture, without the search for the nearest code."""
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = MODELS[name]().eval()
        images = torch.empty(1, 3, SIDE, SIDE)
        with FlopCounterMode(display=False) as encoding:
            latents = model.encode_latents(images)  # pyright: ignore[reportCallIssue]
        with FlopCounterMode(display=False) as decoding:
            model.decode_latents(latents)  # pyright: ignore[reportCallIssue]
    return encoding.get_total_flops(), decoding.get_total_flops()


def measure_networks(
    names: list[str], settings: list[str], batch_sizes: list[int], timing: Timing, limits: dict[str, float]
) -> list[dict]:
    rows = []
    print(f"\n{'encode and decode at 256 × 256':38} {'batch':>5} {'pictures/s':>16} {'of the limit':>16} {'peak':>10}")
    for name in names:
        flops = forward_flops(name)
        for setting in settings:
            as_peers = "peers" in setting
            if as_peers and name != "vq-16":
                continue
            with torch.inference_mode():
                model = random_model(name, SETTINGS[setting])
                for batch_size in batch_sizes:
                    row = measure_network(model, batch_size, as_peers, timing)
                    rates = row["encoded_per_s"], row["decoded_per_s"]
                    limit = limits[setting[:4]]
                    row["share_of_limit"] = [rate * work / limit for rate, work in zip(rates, flops, strict=True)]
                    rows.append({"model": name, "setting": setting, "batch_size": batch_size, **row})
                    shares = [f"{share:.0%}" for share in row["share_of_limit"]]
                    print(
                        f"  {name + ', ' + setting:36} {batch_size:5} {rates[0]:7.2f} {rates[1]:8.2f} "
                        f"{shares[0]:>7} {shares[1]:>8} {row['peak_bytes'] / 2**20:6.0f} MiB",
                        flush=True,
                    )
                del model
    return rows


def measure_network(model: Any, batch_size: int, as_peers: bool, timing: Timing) -> dict:
    images = torch.rand(batch_size, 3, SIDE, SIDE)
    codes = model.encode_images(images)
    encode, decode = partial(model.encode_images, images), partial(model.decode_codes, codes)
    if as_peers:
        encode, decode = peers_form(model, images, codes)
    peak: list[int] = []
    with peak_memory(peak):
        encode_s, decode_s = timing.median(encode), timing.median(decode)
    return {
        "encoded_per_s": batch_size / encode_s,
        "decoded_per_s": batch_size / decode_s,
        "peak_bytes": peak[0],
    }


# ---- the nearest code ----


def by_distances(vectors: Tensor, entries: Tensor) -> Tensor:
    """The form peers have: all squared distances as a sum of three terms, then the smallest of each row."""
    distances = (
        vectors.square().sum(1, keepdim=True)
        + entries.square().sum(1)
        - 2 * torch.einsum("ne,ke->nk", vectors, entries)
    )
    return distances.argmin(1)


def measure_search(timing: Timing) -> dict[str, float]:
    vectors, entries = (F.normalize(torch.randn(n, 8), dim=-1) for n in (1024, 16_384))
    agree = float((nearest(vectors, entries) == by_distances(vectors, entries)).float().mean())
    found: dict[str, float] = {"same_codes": agree}
    print("\nnearest of 16,384 codes of width 8 for 1,024 vectors")
    for name, search in (("matrix product, in blocks", nearest), ("all distances", by_distances)):
        peak: list[int] = []
        with torch.inference_mode(), peak_memory(peak):
            seconds = timing.median(lambda search=search: search(vectors, entries))
        found[name] = seconds
        print(f"  {name:36} {seconds * 1e3:7.1f} ms {peak[0] / 2**20:6.0f} MiB")
    print(f"  the same codes for {agree:.2%} of the vectors")
    return found


# ---- reading pictures ----


def measure_reading(timing: Timing) -> dict[str, float]:
    """Seconds to unpack one PNG of 256 x 256, beside which the networks' seconds a picture are to be held."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    smooth = np.stack([128 + 100 * np.sin(rows / a + columns / b) for a, b in ((19, 31), (43, 11), (23, 57))], axis=-1)
    noisy = smooth + np.random.default_rng(0).normal(0, 4, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    encoded = file.getvalue()
    seconds = timing.median(lambda: decode_picture(encoded))
    print(
        f"\nunpacking a PNG of {SIDE} × {SIDE} ({len(encoded) / 1024:.0f} KiB, smooth with noise): "
        f"{seconds * 1e3:.1f} ms"
    )
    return {"png_s": seconds, "png_bytes": len(encoded)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("networks", "search", "reading"), action="append", help="all by default")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="all by default")
    parser.add_argument("--setting", choices=list(SETTINGS), action="append", help="all by default")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="timing for each figure")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count processor time instead of the clock's: with --threads 1, what a busy machine still measures fairly",
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    timing = Timing(time.process_time if args.processor_time else time.perf_counter, args.seconds)
    limits = products_per_s(timing)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads"
        f"{', processor time' if args.processor_time else ''}; "
        f"products {limits['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {limits['bf16'] / 1e9:,.0f} in bf16"
    )
    parts = args.part or ["networks", "search", "reading"]
    found: dict[str, object] = {"limits": limits}
    if "networks" in parts:
        found["networks"] = measure_networks(
            args.model or list(MODELS), args.setting or list(SETTINGS), args.batch_sizes, timing, limits
        )
    if "search" in parts:
        found["search"] = measure_search(timing)
    if "reading" in parts:
        found["reading"] = measure_reading(timing)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
