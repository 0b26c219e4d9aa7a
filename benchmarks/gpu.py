"""Decoding on a GPU at LlamaGen's sizes, random weights, class-conditional with guidance, beside transformers' Llama.

    python benchmarks/gpu.py [--shapes llamagen-b,llamagen-l] [--batches 1,8,64] [--peer-batches 1,8] [--quick]

For each batch: pictures of 256 codes of 16,384, guidance 2, in bfloat16; two rows a picture. The limit is that of the
memory: every step reads all weights of the blocks and the head once, and the keys and values so far. The peer draws as
many rows without guidance, with a static cache, compiled as its `generate` does by itself. All draw a batch once before
it is timed: what is captured or compiled then is kept, as in a server. `--quick` runs everything once, at a small size,
to see that it runs.
"""

import argparse
import time
from collections.abc import Callable

import torch

from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.sampling import SampleConfig
from smalti.models.config import preset_config
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import Vocabulary

LABELS, CODES, SIDE = 1001, 16384, 16
CELLS = SIDE * SIDE
LAYOUT = Layout.parse(Vocabulary({"label": LABELS, "image": CODES}), {"class": f"(label{{1}}) image{{{CELLS}}}"})
CONFIG = SampleConfig(guidance_scale=2.0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median, behind one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[rounds // 2] if rounds else found[0]


def bytes_per_s(device: torch.device, gigabytes: float) -> float:
    source = torch.zeros(int(gigabytes * 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), device, 5)


def flops_per_s(device: torch.device, size: int) -> float:
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)


def model_of(shape: str, device: torch.device) -> DecoderOnly:
    config = preset_config(shape, max_length=1 + CELLS, grid=(SIDE, SIDE), prefix_length=1)
    with torch.device(device):
        return new_model(LAYOUT, config).bfloat16().eval()


def limit_s(model: DecoderOnly, batch: int, rate: float) -> float:
    """Of a batch of pictures: the time in which the memory gives what all steps read."""
    config = model.config.transformer
    weights = 2 * (model.num_parameters - model.embed_tokens.weight.numel())
    cache = 2 * 2 * config.num_layers * config.kv_width * 2 * batch * (CELLS / 2)
    return CELLS * (weights + cache) / rate


def peer_of(shape: str, device: torch.device):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = preset_config(shape, max_length=1 + CELLS, grid=(SIDE, SIDE), prefix_length=1)
    peer = LlamaConfig(
        vocab_size=CODES, hidden_size=config.d_model, intermediate_size=config.d_ff, bos_token_id=0, eos_token_id=None,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, pad_token_id=0,
        max_position_embeddings=1 + CELLS,
    )  # fmt: skip
    return LlamaForCausalLM(peer).to(device, torch.bfloat16).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="llamagen-b,llamagen-l")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--peer-batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        global SIDE, CELLS, LAYOUT
        given.shapes, given.batches, given.peer_batches, given.rounds, SIDE, CELLS = "llamagen-b", "1,2", "1", 0, 2, 4
        LAYOUT = Layout.parse(LAYOUT.vocabulary, {"class": f"(label{{1}}) image{{{CELLS}}}"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = bytes_per_s(device, 0.1 if given.quick else 4)
    rate_of_products = flops_per_s(device, 256 if given.quick else 8192)
    lines = [f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} TB/s read and written, "
             f"{rate_of_products / 1e12:.0f} TFLOP/s in bfloat16"]  # fmt: skip
    print(lines[0], flush=True)
    for shape in given.shapes.split(","):
        model = model_of(shape, device)
        executors = [name for name, executor in EXECUTORS.items() if not executor.why_not(model)]
        for batch in map(int, given.batches.split(",")):
            null = Request(order="class", given={"label": torch.tensor([LABELS - 1])})
            requests = [
                Request(order="class", given={"label": torch.tensor([i])}, seed=i, null=null) for i in range(batch)
            ]
            limit = limit_s(model, batch, rate)
            for executor in executors:
                engine = Engine(model, LAYOUT, capacity=batch, executor=executor)

                def draw_ours(engine=engine, requests=requests) -> None:
                    for request in requests:
                        engine.submit(request, CONFIG)
                    engine.run()

                with torch.inference_mode():
                    took = seconds(draw_ours, device, given.rounds)
                lines.append(
                    f"{shape:12} {batch:3} pictures  {executor:12} {took / batch:8.3f} s/picture "
                    f"{batch * CELLS / took:9.0f} tokens/s  {limit / took:6.1%} of the memory's limit"
                )
                print(lines[-1], flush=True)
        del model
        peer = peer_of(shape, device)
        for batch in map(int, given.peer_batches.split(",")):
            start = torch.zeros(2 * batch, 1, dtype=torch.long, device=device)
            options = dict(max_new_tokens=CELLS, min_new_tokens=CELLS, do_sample=True, top_k=0)

            def draw(p=peer, s=start, o=options) -> None:
                p.generate(s, attention_mask=torch.ones_like(s), cache_implementation="static", **o)

            took = seconds(draw, device, min(given.rounds, 2))
            lines.append(
                f"{shape:12} {batch:3} pictures  transformers {took / batch:8.3f} s/picture "
                f"{batch * CELLS / took:9.0f} tokens/s  (two rows each, static cache)"
            )
            print(lines[-1], flush=True)
        del peer
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
