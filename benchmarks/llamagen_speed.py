"""Seconds a picture at LlamaGen's sizes on a CPU, beside LlamaGen's own sampler and the machine's limit.

    python benchmarks/llamagen_speed.py [--peer DIR] [--shape llamagen-b] [--pictures 1 4] [--weights float32 bfloat16
        int8] [--drafts 4 8 16] [--codes 256] [--rounds 2] [--quick]

Class-conditional, random weights, 256 codes of 16,384, guidance 4, drawn from the whole distribution. DIR is a clone of
github.com/FoundationVision/LlamaGen; its `generate` runs as it is, plain and with its model compiled as its own script
does, in float32 and, where the processor multiplies in it, in bfloat16. All take turns, `--rounds` times behind one to
warm up; the median is printed. The class is counted, as the first pass.

The limit is what the machine needs to read every weight of blocks and head once a step, as they are stored, and the
keys and values so far, or to do the arithmetic in float32, whichever takes longer; both rates are measured first.

`--drafts` tells what a pass over so many drafts of a picture (and their null row) costs, in passes over one token: that
many codes must be kept a pass for drafts to be faster. How many are depends on the model; random weights say nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from smalti import processor
from smalti.engine.engine import Engine
from smalti.engine.executors import make_executor
from smalti.engine.sampling import SampleConfig
from smalti.models.config import preset_config
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.models.stored_weights import STORAGES
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import Vocabulary

CLASSES, CODES = 1001, 16384
GUIDANCE = 4.0
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PEER_SHAPES = {"llamagen-b": "GPT-B", "llamagen-l": "GPT-L"}


clock = time.perf_counter


def seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def read_bytes_per_s(num_bytes: int) -> float:
    weights = torch.randn(num_bytes // 4)
    return weights.nbytes / min(seconds(weights.sum) for _ in range(8))


def flops_per_s() -> float:
    a, b = torch.randn(2, 1536, 1536)
    return 2 * 1536**3 / min(seconds(lambda: a @ b) for _ in range(8))


def layout_of(num_codes: int) -> Layout:
    vocabulary = Vocabulary({"label": CLASSES, "image": CODES})
    return Layout.parse(vocabulary, {"class": f"(label{{1}}) image{{{num_codes}}}"})


def model_of(shape: str, num_codes: int, weights: str) -> DecoderOnly:
    torch.manual_seed(0)
    side = round(num_codes**0.5)
    config = preset_config(shape, max_length=1 + num_codes, grid=(side, side), prefix_length=1)
    model = new_model(layout_of(num_codes), config).eval()
    model.store_weights(weights)
    return model


def draw_ours(model: DecoderOnly, num_codes: int, num_pictures: int) -> None:
    engine = Engine(model, layout_of(num_codes), capacity=num_pictures, executor="native")
    null = Request(order="class", given={"label": torch.tensor([CLASSES - 1])})
    for seed in range(num_pictures):
        request = Request(order="class", given={"label": torch.tensor([seed])}, seed=seed, null=null)
        engine.submit(request, SampleConfig(guidance_scale=GUIDANCE))
    engine.run()


def limit_s(model: DecoderOnly, weights: str, num_codes: int, num_pictures: int, read: float, flops: float) -> float:
    """Seconds a picture."""
    config = model.config.transformer
    per_layer = config.d_model * (2 * config.q_width + 2 * config.kv_width) + 3 * config.d_model * config.d_ff
    num_weights = config.num_layers * per_layer + CODES * config.d_model
    rows = 2 * num_pictures
    cache = 4 * rows * config.num_layers * 2 * config.kv_width * num_codes / 2
    reading = (BYTES[weights] * num_weights + cache) / read
    attention = 4 * config.num_layers * config.q_width * num_codes / 2
    return num_codes * max(reading, rows * (2 * num_weights + attention) / flops) / num_pictures


def peer_of(folder: Path, shape: str, num_codes: int, dtype: torch.dtype):
    sys.path.insert(0, str(folder))
    from autoregressive.models.gpt import GPT_models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = GPT_models[PEER_SHAPES[shape]](
        vocab_size=CODES, block_size=num_codes, num_classes=CLASSES - 1, cls_token_num=1, model_type="c2i"
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.eval().to(dtype)


def draw_peer(model, num_codes: int, num_pictures: int) -> Tensor:
    from autoregressive.models.generate import generate  # type: ignore[import-not-found]

    classes = torch.arange(num_pictures)
    return generate(model, classes, num_codes, cfg_scale=GUIDANCE, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)


def pass_costs(model: DecoderOnly, num_codes: int, drafts: list[int], rounds: int) -> list[float]:
    """What a pass over a token and so many drafts, of two rows half-way through, costs in passes over one token."""
    executor = make_executor(model, "native")
    state = executor.new_state(2, 1 + num_codes)
    found: dict[int, list[float]] = {count: [] for count in (0, *drafts)}
    for _ in range(5 * rounds):
        for count, times in found.items():
            state.lengths = [num_codes // 2] * 2
            tokens = [[CLASSES + 1] * (1 + count)] * 2
            times.append(seconds(lambda tokens=tokens: executor.extend_all(state, slice(0, 2), tokens)))
    return [median(found[count]) / median(found[0]) for count in drafts]


def peers_of(args: argparse.Namespace) -> dict[str, Callable]:
    peers: dict[str, Callable] = {}
    for dtype in args.peer_dtypes or (("float32", "bfloat16") if processor.multiplies_bfloat16() else ("float32",)):
        plain = peer_of(args.peer, args.shape, args.codes, getattr(torch, dtype))
        peers[f"LlamaGen, {dtype}, eager"] = plain
        if not args.no_compiled:
            again = peer_of(args.peer, args.shape, args.codes, getattr(torch, dtype))
            compiled = torch.compile(again, mode="reduce-overhead", fullgraph=True)
            peers[f"LlamaGen, {dtype}, compiled"] = compiled
    return peers


def compare(
    ours: dict[str, DecoderOnly],
    peers: dict[str, Callable],
    limits: dict[str, float],
    num_codes: int,
    num_pictures: int,
    rounds: int,
) -> None:
    """Prints a line for each contestant."""
    runs: dict[str, Callable[[], object]] = {
        f"smalti, native, {weights}": partial(draw_ours, model, num_codes, num_pictures)
        for weights, model in ours.items()
    }
    runs |= {name: partial(draw_peer, peer, num_codes, num_pictures) for name, peer in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run) / num_pictures
            times[name] += [taken] if number else []
    fastest = min((median(times[name]) for name in peers), default=None)
    for name in runs:
        found, share = median(times[name]), ""
        if name not in peers:
            limit = limits[name.rpartition(" ")[2]]
            share = f"{limit:8.2f}{100 * limit / found:6.0f}%"
            share += "" if fastest is None else f"{fastest / found:10.2f}x"
        print(f"{name:30}{num_pictures:9}{found:13.2f}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a clone of LlamaGen")
    parser.add_argument("--peer-dtypes", nargs="+", choices=["float32", "bfloat16"], help="that it draws in")
    parser.add_argument("--shape", default="llamagen-b", choices=list(PEER_SHAPES))
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--weights", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--drafts", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compiled", action="store_true", help="leave out the peer's compiled model")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="16 codes, one round")
    args = parser.parse_args()
    if args.processor_time:
        global clock
        clock = time.process_time
    if args.quick:
        args.codes, args.rounds = 16, 1
    torch.set_num_threads(args.threads)
    ours = {weights: model_of(args.shape, args.codes, weights) for weights in args.weights}
    read, flops = read_bytes_per_s(4 * next(iter(ours.values())).num_parameters), flops_per_s()
    print(
        f"{args.shape}, {args.codes} codes, guidance {GUIDANCE}, {args.threads} threads, "
        f"{processor.instruction_set()}: reads {read / 1e9:.1f} GB/s, computes {flops / 1e9:.0f} GFLOP/s in float32"
    )
    peers = peers_of(args) if args.peer else {}
    print(f"{'':30}{'pictures':>9}{'s a picture':>13}{'limit':>8}{'of it':>7}{'peer / it':>11}")
    for num_pictures in args.pictures:
        limits = {
            weights: limit_s(model, weights, args.codes, num_pictures, read, flops) for weights, model in ours.items()
        }
        compare(ours, peers, limits, args.codes, num_pictures, args.rounds)
    for weights, model in ours.items():
        costs = zip(args.drafts, pass_costs(model, args.codes, args.drafts, args.rounds), strict=True)
        told = ", ".join(f"{count} drafts {cost:.2f}" for count, cost in costs)
        print(f"a pass of one picture over {told} times one over a token ({weights})", flush=True)


if __name__ == "__main__":
    main()
