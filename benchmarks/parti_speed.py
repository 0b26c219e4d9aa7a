"""Training and drawing with an encoder-decoder, beside parti-pytorch and the machine's limit.

    pip install --target DIR --no-deps parti-pytorch==0.2.0
    python benchmarks/parti_speed.py [--peer DIR] [--part train] [--part draw] [--pictures 1 4]
        [--weights float32 bfloat16 int8] [--rounds 3] [--threads 2] [--processor-time] [--quick]

Width 512, 6 layers of 8 heads in the decoder, feed-forward 2,048, 256 codes of 8,192, captions of 32 tokens. The peer
has one head of keys and values, ties its head to its embedding, and is given its captions as features, so that its text
encoder costs it nothing; ours reads them with two layers of the same width, whose work is counted. It keeps no keys and
values: every step runs the picture so far anew, twice where it is guided. Its file `parti_pytorch.py` runs as it is;
what its package imports beside it (torchvision, T5) is not needed for what is measured, and stands empty.

A training step is forward, backward, clipping to a norm of 4 and AdamW, at batch 4; tokens are codes. A picture is
drawn with guidance 3 from the tenth of the codes that is likeliest, the peer's own setting. All take turns, `--rounds`
times behind one to warm up; the median is printed. With --quick the peer draws the first 24 codes, and its time for all
is told from them: that of step t is taken to be linear in t, which favours it.

The limit of training is the arithmetic of the products at the rate at which the machine multiplies large matrices of
the same precision; that of drawing is what it takes to read all weights of decoder and head once a step, as they are
stored, or to compute with them, whichever takes longer.
"""

import argparse
import importlib.util
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from smalti import processor
from smalti.engine.generate import generate
from smalti.engine.sampling import SampleConfig
from smalti.models.encoder_decoder import ORDER, EncoderDecoder, EncoderDecoderConfig
from smalti.models.loss import slot_nll, slot_targets
from smalti.models.stored_weights import STORAGES
from smalti.precision import compute_precision
from smalti.sequences.layout import SpanValues
from smalti.sequences.request import Request

WIDTH, LAYERS, HEADS, CODES, SIDE, TEXT, BATCH = 512, 6, 8, 8192, 16, 32, 4
LENGTH, GUIDANCE, KEPT = SIDE * SIDE, 3.0, CODES // 10
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CPU = torch.device("cpu")

clock = time.perf_counter


def seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def shape() -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        text_size=16_000,
        max_text=TEXT,
        codebook_size=CODES,
        grid=(SIDE, SIDE),
        encoder_layers=2,
        decoder_layers=LAYERS,
        d_model=WIDTH,
        num_heads=HEADS,
        d_ff=4 * WIDTH,
        dropout=0.0,
    )


def our_model(weights: str = "float32") -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(shape())
    model.store_weights(weights)
    return model


def peer_model(folder: Path) -> Any:
    """The peer's model, for features of captions as wide as T5-base's."""
    names = ("torchvision", "torchvision.transforms", "parti_pytorch", "parti_pytorch.t5")
    stubs: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]
    stubs["parti_pytorch.t5"].__dict__.update(
        t5_encode_text=lambda *args, **kwargs: None, get_encoded_dim=lambda name: 768, DEFAULT_T5_NAME="t5-base"
    )
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location("peer", folder / "parti_pytorch" / "parti_pytorch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Codes(nn.Module):
        """In place of its image tokenizer, of which the model asks the grid."""

        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))
            self.codebook_size, self.image_size = CODES, 8 * SIDE

        def get_encoded_fmap_size(self, size: int) -> int:
            return SIDE

    torch.manual_seed(0)
    vae = Codes()
    model = module.Parti.__new__(module.Parti)
    init = module.exists
    module.exists = lambda value: value is not None and value is not vae  # it takes either a tokenizer or a number
    module.Parti.__init__(
        model, dim=WIDTH, depth=LAYERS, heads=HEADS, dim_head=64, vae=vae, vae_codebook_size=CODES, text_embed_dim=768
    )
    module.exists, model.vae = init, None
    nn.init.normal_(model.image_token_embed.weight, std=0.02)
    model.top_k, model.gumbel_sample = module.top_k, module.gumbel_sample
    return model


# ---- training ----


def our_step(model: EncoderDecoder, precision: str) -> Callable[[], object]:
    layout, lengths = model.config.layout, torch.full((BATCH,), TEXT - 1)
    spans = {
        "text": SpanValues(torch.randint(16_000, (BATCH, TEXT - 1)), lengths),
        "image": SpanValues(torch.randint(CODES, (BATCH, LENGTH)), torch.full((BATCH,), LENGTH)),
    }
    packed = layout.pack(ORDER, spans)
    targets = slot_targets(packed, layout.slots)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with compute_precision(CPU, precision):
            slot_nll(model, packed.token_ids, targets, layout.slots).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(model: Any, precision: str) -> Callable[[], object]:
    features, codes = torch.randn(BATCH, TEXT, 768), torch.randint(CODES, (BATCH, LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            model(text_token_embeds=features, image_token_ids=codes, return_loss=True).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products_per_step() -> float:
    """Floating-point operations of the products of a training step of ours, forward and backward."""
    encoder = 2 * (4 * WIDTH**2 + 8 * WIDTH**2) * TEXT + LAYERS * 2 * WIDTH**2 * TEXT
    decoder = (LAYERS * (6 * WIDTH**2 + 8 * WIDTH**2) + CODES * WIDTH) * LENGTH
    return 6.0 * BATCH * (encoder + decoder)


def flops_per_s(dtype: torch.dtype) -> float:
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(6))


def train(peer: Path | None, rounds: int) -> None:
    precisions = ("float32", "bfloat16") if processor.multiplies_bfloat16() else ("float32",)
    rates = {precision: flops_per_s(getattr(torch, precision)) for precision in precisions}
    steps: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        steps[f"smalti, {precision}"] = our_step(our_model().train(), precision)
        if peer is not None:
            steps[f"parti-pytorch, {precision}"] = peer_step(peer_model(peer).train(), precision)
    times = take_turns(steps, rounds)
    print(f"{'training, batch ' + str(BATCH):30}{'tokens/s':>10}{'limit':>10}{'of it':>7}{'ours / its':>12}")
    for name, found in times.items():
        who, _, precision = name.partition(", ")
        line = f"{name:30}{BATCH * LENGTH / found:10.0f}"
        if who == "smalti":
            limit = BATCH * LENGTH * rates[precision] / products_per_step()
            line += f"{limit:10.0f}{100 * BATCH * LENGTH / found / limit:6.0f}%"
            theirs = times.get(f"parti-pytorch, {precision}")
            line += "" if theirs is None else f"{theirs / found:11.2f}x"
        print(line, flush=True)


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            times[name] += [taken] if number else []
    return {name: median(found) for name, found in times.items()}


# ---- drawing ----


def draw_ours(model: EncoderDecoder, num_pictures: int, executor: str) -> None:
    null = Request(order=ORDER, given={"text": torch.zeros(0, dtype=torch.long)})
    words = torch.randint(16_000, (num_pictures, TEXT - 1), generator=torch.Generator().manual_seed(0))
    requests = [Request(order=ORDER, given={"text": row}, seed=seed, null=null) for seed, row in enumerate(words)]
    generate(model, model.config.layout, requests, SampleConfig(guidance_scale=GUIDANCE, top_k=KEPT), executor=executor)


@torch.no_grad()
def draw_peer(model: Any, num_pictures: int, num_codes: int) -> float:
    """Seconds for all codes: its loop, as `generate` has it, on features of captions."""
    features = torch.randn(num_pictures, TEXT, 768)
    codes, times = torch.empty(num_pictures, 0, dtype=torch.long), []
    for _ in range(num_codes):
        start = clock()
        logits = model.forward_with_cond_scale(text_token_embeds=features, image_token_ids=codes, cond_scale=GUIDANCE)
        drawn = model.gumbel_sample(model.top_k(logits[:, -1], thres=0.9))
        codes = torch.cat((codes, drawn[:, None]), dim=-1)
        times.append(clock() - start)
    if num_codes == LENGTH:
        return sum(times)
    early, late = (median(part) for part in (times[: num_codes // 3], times[-num_codes // 3 :]))
    slope = max(0.0, (late - early) / (num_codes * 2 / 3))
    return LENGTH * (early + slope * (LENGTH - num_codes / 3) / 2)


def read_bytes_per_s(num_bytes: int) -> float:
    weights = torch.randn(num_bytes // 4)
    return weights.nbytes / min(seconds(weights.sum) for _ in range(8))


def limit_s(weights: str, num_pictures: int, read: float, flops: float) -> float:
    """Seconds a picture."""
    num_weights = LAYERS * 14 * WIDTH**2 + CODES * WIDTH
    rows = 2 * num_pictures
    cache = 4 * rows * LAYERS * 2 * WIDTH * (LENGTH / 2 + TEXT)
    reading = (BYTES[weights] * num_weights + cache) / read
    return LENGTH * max(reading, rows * 2 * num_weights / flops) / num_pictures


def draw(peer: Path | None, args: argparse.Namespace) -> None:
    models = {weights: our_model(weights).eval() for weights in args.weights}
    theirs = None if peer is None else peer_model(peer).eval()
    read, flops = read_bytes_per_s(100 * 2**20), flops_per_s(torch.float32)
    print(f"reads {read / 1e9:.1f} GB/s, computes {flops / 1e9:.0f} GFLOP/s in float32")
    print(
        f"{'drawing, guidance ' + str(GUIDANCE):30}{'pictures':>9}{'s a picture':>13}{'limit':>8}{'of it':>7}", end=""
    )
    print(f"{'its / ours':>12}")
    for num in args.pictures:
        runs: dict[str, Callable[[], object]] = {
            f"smalti, native, {weights}": partial(draw_ours, model, num, "native") for weights, model in models.items()
        }
        if "float32" in models:
            runs["smalti, eager, float32"] = partial(draw_ours, models["float32"], num, "eager")
        times = take_turns(runs, args.rounds)
        slowest = None
        if theirs is not None:
            codes = 24 if args.quick else LENGTH
            slowest = median(draw_peer(theirs, num, codes) for _ in range(1 if args.quick else min(2, args.rounds)))
        for name, found in times.items():
            limit = limit_s(name.rpartition(" ")[2], num, read, flops)
            line = f"{name:30}{num:9}{found / num:13.2f}{limit:8.2f}{100 * limit * num / found:6.0f}%"
            print(line + ("" if slowest is None else f"{slowest / found:11.1f}x"), flush=True)
        if slowest is not None:
            print(f"{'parti-pytorch, float32':30}{num:9}{slowest / num:13.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="where parti-pytorch was installed")
    parser.add_argument("--part", action="append", choices=("train", "draw"), help="by default both")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16", "int8"], choices=STORAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="one round, and few of the peer's codes")
    args = parser.parse_args()
    if args.processor_time:
        global clock
        clock = time.process_time
    if args.quick:
        args.rounds = 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {processor.instruction_set()}, torch {torch.__version__}", flush=True)
    for part in args.part or ("train", "draw"):
        if part == "train":
            train(args.peer, args.rounds)
        else:
            draw(args.peer, args)


if __name__ == "__main__":
    main()
