"""Training and sampling at the size of the digits model, beside GPT-2 of `transformers` and `x-transformers`.

    python benchmarks/digits_speed.py [--quick] [--part train] [--part sample] [--threads 2] [--json FILE]

On a processor without bfloat16 units, or with SMALTI_ISA naming such a one, nothing is raced in bfloat16: it is
emulated there, for everybody at a tenth of the rate. To stand for an AVX2 machine:

    SMALTI_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/digits_speed.py

4 layers, width 128, 4 heads, feed-forward 512, sequences of 58 tokens, vocabulary 1,058 (ours) or 1,100 (peers). Every
contestant runs at several settings and counts with its best. All of them, and the rates of the machine they are held
against, are measured in one process, one round after the other, so that what slows the machine slows all alike; given
is the median of the rounds. It prints and asserts nothing. `--quick` leaves out the settings that seldom win.

Needs `transformers` and `x-transformers` (the extra "dev"). Uses a GPU where there is one, else `--threads` of a CPU.
"""

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from smalti.engine.executors import make_executor
from smalti.engine.generate import generate
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.processor import instruction_set, multiplies_bfloat16
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import Vocabulary
from smalti.training.native_loss import make_native_loss, why_not
from smalti.training.token_model import (
    NextTokenLoss,
    TokenArrays,
    compute_precision,
    make_micro_batch,
    pack_rows,
)

LAYERS, WIDTH, HEADS, WIDE, LENGTH, CODES, PEER_VOCAB = 4, 128, 4, 512, 58, 1024, 1100
BATCH = 32
SAMPLED = LENGTH - 2  # behind <bos> and the marker that says what comes first
LAYER_PARAMETERS = LAYERS * (4 * WIDTH**2 + 2 * WIDTH * WIDE)
LAYOUT = Layout.parse(
    Vocabulary({"special": ["<bos>", "<end of image>", "<end of text>"], "image": CODES, "text": 31}),
    {
        "text to image": "<bos> <end of image> text{6} <end of text> image{49}",
        "image to text": "<bos> <end of text> image{49} <end of image> text{6}",
    },
)


@dataclass
class Contestant:
    """One library at one setting. `run` does the work once: a training step, or a batch of sequences."""

    library: str
    setting: str
    run: Callable[[], object]
    tokens: int
    memory_bytes: int = 0
    build_s: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / median(self.seconds)


class Bench:
    """The device, and how time and memory are taken on it."""

    def __init__(self, device: torch.device, quick: bool, clock: Callable[[], float] = time.perf_counter):
        self.device, self.quick, self.clock = device, quick, clock
        fast_bf16 = multiplies_bfloat16() if device.type == "cpu" else True
        self.precisions = [True, False] if fast_bf16 else [False]  # whether bf16, the faster first

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object]) -> float:
        self.sync()
        started_at = self.clock()
        run()
        self.sync()
        return self.clock() - started_at

    def peak_bytes_reset(self) -> int:
        """Bytes in use now; what the peak is counted from."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # the kernel forgets the highest resident size so far
        return _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status_bytes("VmHWM")

    def prepare(
        self, library: str, setting: str, tokens: int, build: Callable[[], Callable[[], object]]
    ) -> Contestant | None:
        """Builds and warms up (and so compiles); None, with the reason printed, where that fails."""
        before = self.peak_bytes_reset()
        started_at = time.perf_counter()
        try:
            run = build()
            for _ in range(3):
                self.time(run)
        except Exception as error:
            print(f"  left out: {library}, {setting}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            return None
        build_s = time.perf_counter() - started_at
        return Contestant(library, setting, run, tokens, self.peak_bytes() - before, build_s)

    def prepare_all(
        self, builds: dict[tuple[str, str], Callable[[], Callable[[], object]]], tokens: int
    ) -> list[Contestant]:
        found = [self.prepare(*key, tokens, build) for key, build in builds.items()]
        return [contestant for contestant in found if contestant is not None]

    def race(self, contestants: list[Contestant], seconds_each: float) -> None:
        """Rounds in which each runs in turn, until each has had its time (at least five rounds)."""
        slowest = max(self.time(contestant.run) for contestant in contestants)
        for _ in range(max(5, min(200, int(seconds_each / slowest)))):
            for contestant in contestants:
                contestant.seconds.append(self.time(contestant.run))


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# ---- the machine ----


@dataclass
class Limits:
    flops: dict[str, float]
    """Multiply and add count two."""
    memory_bytes_per_s: float
    weights_bytes_per_s: float
    """Reading, again and again, as much as the model's weights: from cache where they fit."""


def measure_limits(bench: Bench) -> Limits:
    flops = {}
    for bf16 in bench.precisions:
        name, dtype = ("bf16", torch.bfloat16) if bf16 else ("fp32", torch.float32)
        n = 8192 if bench.device.type == "cuda" else 1024
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        flops[name] = 2 * n**3 / min(bench.time(lambda a=a, b=b: a @ b) for _ in range(12))
    a, b, out = (torch.randn(2**25, device=bench.device) for _ in range(3))
    memory = 3 * a.nbytes / min(bench.time(lambda: torch.add(a, b, out=out)) for _ in range(12))
    weights = torch.randn(LAYER_PARAMETERS + CODES * WIDTH, device=bench.device)
    cached = weights.nbytes / min(bench.time(lambda: weights.sum()) for _ in range(100))
    return Limits(flops, memory, max(cached, memory))


def flops_per_token(num_head_rows: int) -> float:
    """Of one forward pass: matrices, head, and attention to half a sequence on average."""
    return 2 * (LAYER_PARAMETERS + num_head_rows * WIDTH) + 4 * LAYERS * WIDTH * LENGTH / 2


def sampling_limit(limits: Limits, batch_size: int) -> float:
    """Tokens/s in fp32 if nothing but the arithmetic, or nothing but reading weights and cache, took time."""
    flops = batch_size * flops_per_token(CODES)
    weights_bytes = 4 * (LAYER_PARAMETERS + CODES * WIDTH)
    cache_bytes = 4 * batch_size * LAYERS * 2 * WIDTH * LENGTH / 2
    return batch_size / max(flops / limits.flops["fp32"], (weights_bytes + cache_bytes) / limits.weights_bytes_per_s)


# ---- models ----


def ours(device: torch.device) -> DecoderOnly:
    config = TransformerConfig(num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, d_ff=WIDE, max_length=LENGTH)
    return new_model(LAYOUT, config).to(device)


def gpt2(device: torch.device, attention: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=WIDE)
    tokens = dict(vocab_size=PEER_VOCAB, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**shape, **tokens, **none, attn_implementation=attention)).to(device)


def x_transformer(device: torch.device, flash: bool) -> nn.Module:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=flash)
    model = TransformerWrapper(num_tokens=PEER_VOCAB, max_seq_len=LENGTH, attn_layers=layers)
    return AutoregressiveWrapper(model).to(device)


# ---- training ----


def training_contestants(bench: Bench) -> list[Contestant]:
    builds: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {}
    if bench.device.type == "cpu":
        for bf16 in bench.precisions:
            name = f"{'bf16' if bf16 else 'fp32'} native"
            builds["smalti", name] = partial(train_ours, bench.device, bf16, False, False, native=True)
    for bf16, compiled in product(bench.precisions, (True, False)):
        setting = f"{'bf16' if bf16 else 'fp32'} {'compiled' if compiled else 'eager'}"
        builds["smalti", setting] = partial(train_ours, bench.device, bf16, compiled, False)
        builds["smalti", f"{setting}, full softmax"] = partial(train_ours, bench.device, bf16, compiled, True)
        for fused in (False, True):
            name = f"{setting}, {'fused' if fused else 'plain'} attention"
            builds["GPT-2", name] = partial(train_gpt2, bench.device, bf16, compiled, fused)
            builds["x-transformers", name] = partial(train_x_transformer, bench.device, bf16, compiled, fused)
    if bench.quick:
        seldom = ("full", *(("fp32", "fused") if bench.precisions[0] else ("plain attention",)))
        builds = {key: build for key, build in builds.items() if not any(word in key[1] for word in seldom)}
    return bench.prepare_all(builds, BATCH * LENGTH)


def train_ours(
    device: torch.device, bf16: bool, compiled: bool, full_softmax: bool, *, native: bool = False
) -> Callable[[], object]:
    """As the training loop does it, which takes the native kernel by itself where that is to be had."""
    rng = np.random.default_rng(0)
    pairs = TokenArrays(rng.integers(0, CODES, (BATCH, 49)), rng.integers(0, 31, (BATCH, 6)))
    packed = pack_rows(LAYOUT, pairs, np.arange(BATCH), np.repeat([0, 1], BATCH // 2))
    batch = make_micro_batch(LAYOUT, packed, full_softmax=full_softmax).to(device)
    num_counted = int(batch.counts.sum())
    model = ours(device).train()
    precision = "bfloat16" if bf16 else "float32"
    module = NextTokenLoss(model, LAYOUT, make_native_loss(model, precision) if native else None)
    if native and module.native is None:
        raise RuntimeError(why_not(model, precision) or "the native kernel cannot be compiled")
    call = torch.compile(module) if compiled else module
    return training_step(
        model,
        lambda: call(batch.token_ids, batch.targets).sum() / num_counted,
        lambda: compute_precision(device, precision),
    )


def train_gpt2(device: torch.device, bf16: bool, compiled: bool, fused: bool) -> Callable[[], object]:
    model = gpt2(device, "sdpa" if fused else "eager").train()
    call = torch.compile(model) if compiled else model
    token_ids = torch.randint(0, PEER_VOCAB, (BATCH, LENGTH), device=device)
    return training_step(model, lambda: call(input_ids=token_ids, labels=token_ids).loss, _autocast(device, bf16))


def train_x_transformer(device: torch.device, bf16: bool, compiled: bool, fused: bool) -> Callable[[], object]:
    model = x_transformer(device, flash=fused).train()
    call = torch.compile(model) if compiled else model
    token_ids = torch.randint(0, PEER_VOCAB, (BATCH, LENGTH), device=device)
    return training_step(model, lambda: call(token_ids), _autocast(device, bf16))


def _autocast(device: torch.device, bf16: bool) -> Callable[[], AbstractContextManager]:
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], precision: Callable[[], AbstractContextManager]
) -> Callable[[], object]:
    """Forward, loss, backward and the update; the same optimizer for all."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        with precision():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


# ---- sampling ----


def sampling_contestants(bench: Bench, batch_size: int) -> list[Contestant]:
    device = bench.device
    builds: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {
        ("smalti", "fp32 native"): partial(sample_ours, device, batch_size, "native"),
        ("smalti", "fp32, torch alone"): partial(sample_ours, device, batch_size, "torch"),
        ("smalti", "fp32, plain path"): partial(sample_ours, device, batch_size, "plain"),
    }
    for bf16 in bench.precisions:
        name, dtype = ("bf16", torch.bfloat16) if bf16 else ("fp32", torch.float32)
        builds["GPT-2", f"{name}, dynamic cache"] = partial(sample_gpt2, device, batch_size, dtype, False)
        builds["GPT-2", f"{name}, static cache, compiled"] = partial(sample_gpt2, device, batch_size, dtype, True)
        builds["x-transformers", f"{name}, cache"] = partial(sample_x_transformer, device, batch_size, dtype)
    if bench.quick:
        seldom = ("bf16", "compiled")
        builds = {key: build for key, build in builds.items() if not any(word in key[1] for word in seldom)}
    return bench.prepare_all(builds, batch_size * SAMPLED)


def sample_ours(device: torch.device, batch_size: int, path: str) -> Callable[[], object]:
    """Captions with their pictures, as anybody calls `generate`; or without kernels, or without any fast path."""
    model = ours(device).eval()
    requests = [Request(order="text to image", seed=seed) for seed in range(batch_size)]
    executor = {"native": "native", "torch": "packed", "plain": "eager"}[path]
    if executor == "native":
        with patch.dict(os.environ, {"SMALTI_NATIVE": "1"}):
            make_executor(model, "native")  # compiled before it is timed

    def run() -> None:
        with patch.dict(os.environ, {"SMALTI_NATIVE": "1" if path == "native" else "0"}):
            generate(model, LAYOUT, requests, batch_size=batch_size, executor=executor)

    return run


def sample_gpt2(device: torch.device, batch_size: int, dtype: torch.dtype, compiled: bool) -> Callable[[], object]:
    from transformers import CompileConfig

    model = gpt2(device, "sdpa").to(dtype).eval()
    start = torch.zeros(batch_size, 2, dtype=torch.long, device=device)
    options: dict = dict(max_new_tokens=SAMPLED, min_new_tokens=SAMPLED, do_sample=True, top_k=0, use_cache=True)
    if compiled:
        compile_config = CompileConfig(mode="default")
        compile_config._compile_all_devices = True  # a CPU too
        options |= dict(cache_implementation="static", compile_config=compile_config)
    return lambda: model.generate(start, **options)


def sample_x_transformer(device: torch.device, batch_size: int, dtype: torch.dtype) -> Callable[[], object]:
    model = x_transformer(device, flash=False).to(dtype).eval()
    start = torch.zeros(batch_size, 2, dtype=torch.long, device=device)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                start, SAMPLED, cache_kv=True, filter_logits_fn=lambda logits: logits
            )  # its default drops nine in ten

    return run


# ---- report ----


def report(title: str, contestants: list[Contestant], aim: float, limits: dict[str, float]) -> dict:
    """Prints one table, the fastest first, and returns it. `limits` holds the machine's tokens/s by number format."""
    contestants = sorted(contestants, key=lambda c: -c.tokens_per_s)
    best = {}
    for contestant in contestants:
        best.setdefault(contestant.library, contestant)
    print(f"\n{title}")
    columns = (
        f"{'tokens/s':>9} {'(slowest–fastest round)':>24} {'of the limit':>13} {'peak memory':>12} {'built in':>9}"
    )
    print(f"  {'':40} {columns}")
    for c in contestants:
        fastest, slowest = (c.tokens / seconds for seconds in (min(c.seconds), max(c.seconds)))
        share = c.tokens_per_s / limits["bf16" if "bf16" in c.setting else "fp32"]
        print(
            f"  {c.library + ', ' + c.setting:40} {c.tokens_per_s:9,.0f} {f'({slowest:,.0f}–{fastest:,.0f})':>24} "
            f"{share:13.1%} {c.memory_bytes / 2**20:9,.0f} MiB {c.build_s:7.1f} s"
        )
    ours_best = best.pop("smalti")
    ratios = {library: ours_best.tokens_per_s / peer.tokens_per_s for library, peer in best.items()}
    for library, ratio in ratios.items():
        print(f"  smalti ({ours_best.setting}) is {ratio:.2f} × {library} at its best ({best[library].setting})")
    print(f"  aim: {aim:g} × the better of the two; reached: {min(ratios.values()):.2f} ×")
    rows = [
        {"library": c.library, "setting": c.setting, "tokens_per_s": c.tokens_per_s, "peak_bytes": c.memory_bytes}
        for c in contestants
    ]
    return {"title": title, "rows": rows, "ratios": ratios, "aim": aim, "limits": limits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("train", "sample"), action="append", help="only this part; both by default")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 9, 64], help="of sampling")
    parser.add_argument("--quick", action="store_true", help="leave out settings that seldom win")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing for each contestant")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count processor time instead of the clock's: with --threads 1, what a busy machine still measures fairly",
    )
    parser.add_argument("--json", type=Path, help="also write the tables there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, args.quick, time.process_time if args.processor_time else time.perf_counter)
    limits = measure_limits(bench)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {args.threads} threads"
    products = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {kind}" for kind, flops in limits.flops.items())
    memory, weights = limits.memory_bytes_per_s / 1e9, limits.weights_bytes_per_s / 1e9
    print(f"torch {torch.__version__} on {device.type} ({name}){', processor time' if args.processor_time else ''}")
    if device.type == "cpu":
        print(f"  instructions: {instruction_set()} (torch's own kernels: {torch.backends.cpu.get_cpu_capability()})")
    print(f"  products {products}")
    print(f"  memory {memory:.0f} GB/s; as many bytes as the model's weights, read again and again: {weights:.0f} GB/s")
    tables = []
    if "train" in (args.part or ["train"]):
        contestants = training_contestants(bench)
        bench.race(contestants, args.seconds)
        ceilings = {kind: flops / (3 * flops_per_token(CODES)) for kind, flops in limits.flops.items()}
        title = f"training, batch {BATCH} × {LENGTH} tokens (forward, loss, backward, Adam)"
        tables.append(report(title, contestants, 1.5, ceilings))
    for batch_size in args.batch_sizes if "sample" in (args.part or ["sample"]) else []:
        contestants = sampling_contestants(bench, batch_size)
        bench.race(contestants, args.seconds)
        ceiling = sampling_limit(limits, batch_size)
        title = f"sampling {SAMPLED} tokens behind 2, batch {batch_size}"
        tables.append(report(title, contestants, 4.0, {"fp32": ceiling, "bf16": ceiling}))
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
