"""Seconds a picture of RAR on a CPU, beside RAR's own sampler and the machine's limit.

    python benchmarks/rar_speed.py [--peer DIR] [--shape rar-b] [--pictures 1 4] [--weights float32 bfloat16 int8]
        [--rounds 2] [--threads 2] [--processor-time] [--codes 256] [--quick]

Random weights, 256 codes of 1,024, guidance 4 rising as in RAR's own sampler, drawn from the whole distribution. DIR
is a clone of github.com/bytedance/1d-tokenizer: its `modeling/rar.py` runs as it is, with its cache, in float32; the
feed-forward that it takes from timm, and its base class, stand here in a few lines. All take turns, `--rounds` times
behind one to warm up; the median is printed.

The limit is what the machine needs to read every weight once a step, as they are stored, or to do the arithmetic in
float32, whichever takes longer; both rates are measured first.
"""

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from smalti import processor
from smalti.engine.engine import Engine
from smalti.engine.sampling import SampleConfig
from smalti.models.rar import PRESETS, RAR
from smalti.models.stored_weights import STORAGES
from smalti.sequences.request import Request

GUIDANCE, POWER = 4.0, 2.75
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

clock = time.perf_counter


def seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def our_model(shape: str, num_codes: int, weights: str) -> RAR:
    torch.manual_seed(0)
    model = RAR(type(PRESETS[shape])(**(PRESETS[shape].to_dict() | {"num_codes": num_codes}))).eval()
    for name, parameter in model.named_parameters():  # which begin as zeros: every block would be the identity
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.02)
    model.store_weights(weights)
    return model


def draw_ours(model: RAR, executor: str, num_pictures: int) -> None:
    layout = model.config.layout
    engine = Engine(model, layout, capacity=2 * num_pictures, executor=executor)
    config = SampleConfig(guidance_scale=GUIDANCE, guidance_schedule="cosine", guidance_power=POWER)

    def request(label: int, seed: int, null: Request | None = None) -> Request:
        return Request(order="label to image", given={"label": torch.tensor([label])}, seed=seed, null=null)

    for seed in range(num_pictures):
        engine.submit(request(seed, seed, request(model.config.num_classes, seed)), config)
    engine.run()


def limit_s(model: RAR, weights: str, num_pictures: int, read: float, flops: float) -> float:
    """Seconds a picture."""
    embeddings = (model.embed_tokens, model.positions, model.target_positions, model.steps)
    num_weights = model.num_parameters - sum(embedding.weight.numel() for embedding in embeddings)
    steps = model.config.num_codes
    return steps * max(BYTES[weights] * num_weights / read, 2 * num_pictures * 2 * num_weights / flops) / num_pictures


class _Mlp(nn.Module):
    """In place of timm's."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)
        self.act, self.drop = act_layer(), nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def peer_model(folder: Path, shape: str, num_codes: int) -> Any:
    names = ("modeling", "modeling.modules", "timm", "timm.layers")
    stubs: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    stubs["modeling.modules"].BaseModel = nn.Module
    stubs["timm.layers"].Mlp = _Mlp
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location("peer", folder / "modeling" / "rar.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = PRESETS[shape]

    class Generator(types.SimpleNamespace):
        def get(self, name: str, default: object) -> object:
            return getattr(self, name, default)

    generator = Generator(
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.d_ff,
        image_seq_len=num_codes,
        condition_num_classes=sizes.num_classes,
        dropout=0.0,
        attn_drop=0.0,
    )
    quantizer = types.SimpleNamespace(codebook_size=sizes.codebook_size)
    model = types.SimpleNamespace(generator=generator, vq_model=quantizer)
    torch.manual_seed(0)
    return module.RAR(types.SimpleNamespace(model=model)).eval()


def draw_peer(model: Any, num_pictures: int) -> None:
    model.generate(torch.arange(num_pictures), GUIDANCE, 1.0, POWER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a clone of 1d-tokenizer")
    parser.add_argument("--shape", default="rar-b", choices=list(PRESETS))
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--weights", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="16 codes, one round")
    given = parser.parse_args()
    if given.processor_time:
        global clock
        clock = time.process_time
    if given.quick:
        given.codes, given.rounds = 16, 1
    torch.set_num_threads(given.threads)
    ours = {weights: our_model(given.shape, given.codes, weights) for weights in given.weights}
    weights = torch.randn(2**26)
    read = weights.nbytes / min(seconds(weights.sum) for _ in range(8))
    a, b = torch.randn(2, 1536, 1536)
    flops = 2 * 1536**3 / min(seconds(lambda: a @ b) for _ in range(8))
    print(
        f"{given.shape}, {given.codes} codes, guidance {GUIDANCE}, {given.threads} threads, "
        f"{processor.instruction_set()}: reads {read / 1e9:.1f} GB/s, computes {flops / 1e9:.0f} GFLOP/s in float32"
    )
    peer = peer_model(given.peer, given.shape, given.codes) if given.peer else None
    print(f"{'':30}{'pictures':>9}{'s a picture':>13}{'limit':>8}{'of it':>7}{'peer / it':>11}")
    for num_pictures in given.pictures:
        runs: dict[str, Callable[[], object]] = {
            f"smalti, native, {weights}": partial(draw_ours, model, "native", num_pictures)
            for weights, model in ours.items()
        }
        if "float32" in ours:
            runs["smalti, eager, float32"] = partial(draw_ours, ours["float32"], "eager", num_pictures)
        if peer is not None:
            runs["RAR, float32"] = partial(draw_peer, peer, num_pictures)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(given.rounds + 1):
            for name, run in runs.items():
                taken = seconds(run) / num_pictures
                times[name] += [taken] if number else []
        found = {name: median(values) for name, values in times.items()}
        for name, taken in found.items():
            line = f"{name:30}{num_pictures:9}{taken:13.2f}"
            if name != "RAR, float32":
                stored = name.rpartition(" ")[2]
                limit = limit_s(ours[stored], stored, num_pictures, read, flops)
                line += f"{limit:8.2f}{100 * limit / taken:6.0f}%"
                line += "" if peer is None else f"{found['RAR, float32'] / taken:10.2f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
