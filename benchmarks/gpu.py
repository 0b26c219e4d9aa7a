"""On a GPU: drawing at LlamaGen's sizes, training, and image tokenizers, each beside its peer; the limits first.

    python benchmarks/gpu.py [--parts limits,draw,train,pictures] [--shapes llamagen-b,llamagen-l] [--batches 1,8,64]
        [--peer DIR] [--peer-batches 1,8] [--compiled-batches 1,64] [--rounds 3] [--quick]

Drawing: pictures of 256 codes of 16,384, class-conditional, random weights, guidance 2, in bfloat16; two rows a
picture. Ours by each executor that the device has: on a GPU `eager`, `cuda_graph` (captured) and `compiled` (compiled,
then captured; a step takes up to a minute to compile, so not at all batches). The memory's limit is that every step
reads all weights of the blocks and the head once, and the keys and values so far; the other that it makes their
products. Peers: transformers' Llama with as many rows, without guidance, a
static cache, compiled as its `generate` does by itself; and with DIR, a clone of github.com/FoundationVision/LlamaGen,
its own sampler, plain and compiled as its script does. All draw a batch once before it is timed: what is captured or
compiled then is kept, as in a server.

Training: the recipes digits and emoji, their own batches, bfloat16, beside transformers' GPT-2 or Llama of the same
sizes; each plain and compiled. Pictures: VQ-16 of random weights at 256 and 512 pixels, with DIR beside LlamaGen's own.

`--quick` runs everything once, at a small size, on a CPU too, to see that it runs; `compiled` is traced then, and left
as it is. One table comes at the end.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smalti.devices import choose_device
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.executors.compiled import Compiled
from smalti.engine.sampling import SampleConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.models.config import preset_config
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.planning.footprint import Task, example, make_model
from smalti.planning.subjects import find_subject
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import Vocabulary
from smalti.training.token_model import NextTokenLoss

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


def llamagen_of(folder: Path, shape: str, device: torch.device) -> Any:
    """LlamaGen's own model of a shape."""
    sys.path.insert(0, str(folder))
    from autoregressive.models.gpt import GPT_models  # type: ignore[import-not-found]

    name = {"llamagen-b": "GPT-B", "llamagen-l": "GPT-L"}[shape]
    sizes = dict(vocab_size=CODES, block_size=CELLS, num_classes=LABELS - 1, cls_token_num=1, model_type="c2i")
    return GPT_models[name](**sizes).eval().to(device, torch.bfloat16)


def draw_llamagen(model: Any, batch: int, device: torch.device) -> None:
    from autoregressive.models.generate import generate  # type: ignore[import-not-found]

    classes = torch.arange(batch, device=device)
    generate(model, classes, CELLS, cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)


def draw(given: argparse.Namespace, device: torch.device, rate: float, products: float, say: Callable) -> None:
    for shape in given.shapes.split(","):
        model = model_of(shape, device)
        executors = [name for name, executor in EXECUTORS.items() if not executor.why_not(model)]
        for batch in map(int, given.batches.split(",")):
            null = Request(order="class", given={"label": torch.tensor([LABELS - 1])})
            requests = [
                Request(order="class", given={"label": torch.tensor([i])}, seed=i, null=null) for i in range(batch)
            ]
            reading = limit_s(model, batch, rate)
            computing = 2 * batch * CELLS * 2 * model.num_parameters / products
            for executor in executors:
                if executor == "compiled" and str(batch) not in given.compiled_batches.split(","):
                    continue
                engine = Engine(model, LAYOUT, capacity=batch, executor=executor)

                def draw_ours(engine=engine, requests=requests) -> None:
                    for request in requests:
                        engine.submit(request, CONFIG)
                    engine.run()

                with torch.inference_mode():
                    took = seconds(draw_ours, device, given.rounds)
                bound = f"{reading / took:6.1%} of the memory's limit, {computing / took:5.1%} of the products'"
                say(drawn(shape, batch, executor, took, bound))
        del model
        peer = peer_of(shape, device)
        for batch in map(int, given.peer_batches.split(",")):
            start = torch.zeros(2 * batch, 1, dtype=torch.long, device=device)
            options = dict(max_new_tokens=CELLS, min_new_tokens=CELLS, do_sample=True, top_k=0)
            options |= dict(disable_compile=device.type == "cpu")  # where it would take minutes

            def draw_peer(p=peer, s=start, o=options) -> None:
                p.generate(s, attention_mask=torch.ones_like(s), cache_implementation="static", **o)

            took = seconds(draw_peer, device, min(given.rounds, 2))
            say(drawn(shape, batch, "transformers", took, "two rows each, static cache"))
        del peer
        for compiled in (False, True) if given.peer else ():
            theirs = llamagen_of(given.peer, shape, device)
            if compiled:
                theirs = torch.compile(theirs, mode="reduce-overhead", fullgraph=True)
            for batch in map(int, given.peer_batches.split(",")):
                took = seconds(lambda m=theirs, b=batch: draw_llamagen(m, b, device), device, min(given.rounds, 2))
                say(drawn(shape, batch, "LlamaGen" + ", compiled" * compiled, took, "its own sampler"))


def drawn(shape: str, batch: int, who: str, took: float, note: str) -> str:
    return (
        f"{shape:12} {batch:3} pictures  {who:18} {took / batch:8.3f} s/picture {batch * CELLS / took:9.0f} tokens/s  "
        f"{note}"
    )


def train(given: argparse.Namespace, device: torch.device, say: Callable) -> None:
    """Forward, backward, AdamW: tokens/s."""
    for name in ("digits", "emoji"):
        task = find_subject(name).task
        if given.quick:
            task = task._replace(train=replace(task.train, batch_size=4))
        for who, model in (("smalti", make_model(task)), ("transformers", same_of(task))):
            model = model.to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            piece = example(task, task.train.batch_size).to(device)
            loss = loss_of(task, model, piece)
            for compiled in (False, True) if device.type == "cuda" else (False,):
                run = torch.compile(loss) if compiled else loss

                def step(run=run, optimizer=optimizer) -> None:
                    with torch.autocast(device.type, torch.bfloat16):
                        nats = run()
                    nats.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                took = seconds(step, device, 10 * given.rounds)
                rate = task.train.batch_size * task.layout.max_length / took
                say(f"training {name:8} {who:14} {'compiled' if compiled else 'eager':10} {rate:11,.0f} tokens/s")


def same_of(task: Task) -> Any:
    """transformers' model of the same sizes, with the same ids."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape: Any = task.shape
    common = dict(vocab_size=task.layout.vocabulary.size, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    if shape.norm == "rms":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.d_model, intermediate_size=shape.d_ff, num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads, max_position_embeddings=shape.max_length, **common,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=shape.d_model, n_inner=shape.d_ff, n_layer=shape.num_layers, n_head=shape.num_heads,
            n_positions=shape.max_length, resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=0.0, **common,
        )
    )  # fmt: skip


def loss_of(task: Task, model: Any, piece: Any) -> Callable[[], torch.Tensor]:
    if isinstance(model, DecoderOnly):
        loss = NextTokenLoss(model, task.layout)
        return lambda: loss(piece.token_ids, piece.targets).mean()
    return lambda: model(piece.token_ids, labels=piece.token_ids).loss


def pictures(given: argparse.Namespace, device: torch.device, say: Callable) -> None:
    """VQ-16, LlamaGen's: encode and decode, pictures/s."""
    contestants: dict[str, Any] = {"smalti": VQGAN(VQGANConfig())}
    if given.peer:
        sys.path.insert(0, str(given.peer))
        from tokenizer.tokenizer_image.vq_model import VQ_models  # type: ignore[import-not-found]

        contestants["LlamaGen"] = VQ_models["VQ-16"](codebook_size=CODES, codebook_embed_dim=8)
    for size, batch in ((64, 2),) if given.quick else ((256, 32), (512, 8)):
        images = torch.rand(batch, 3, size, size, device=device)
        codes = torch.zeros(batch, size // 16, size // 16, dtype=torch.long, device=device)
        for who, model in contestants.items():
            model = model.to(device).eval()
            runs = (
                {"encode": partial(model.encode_images, images), "decode": partial(model.decode_codes, codes)}
                if who == "smalti"
                else {
                    "encode": partial(model.encode, images * 2 - 1),
                    "decode": partial(model.decode_code, codes.flatten(), (batch, 8, size // 16, size // 16)),
                }
            )
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=not given.quick):
                for what, run in runs.items():
                    took = seconds(run, device, given.rounds)
                    say(f"VQ-16 {size:4} pixels  {who:10} {what:8} {batch / took:9.1f} pictures/s, {batch} at a time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="draw,train,pictures")
    parser.add_argument("--shapes", default="llamagen-b,llamagen-l")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--peer", type=Path, help="a clone of LlamaGen")
    parser.add_argument("--peer-batches", default="1,8")
    parser.add_argument("--compiled-batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        Compiled.backend = "aot_eager"
        global SIDE, CELLS, LAYOUT
        given.shapes, given.batches, given.peer_batches, given.rounds, SIDE, CELLS = "llamagen-b", "1,2", "1", 0, 2, 4
        LAYOUT = Layout.parse(LAYOUT.vocabulary, {"class": f"(label{{1}}) image{{{CELLS}}}"})
    device = choose_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = bytes_per_s(device, 0.1 if given.quick else 4)
    products = flops_per_s(device, 256 if given.quick else 8192)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(
        f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} TB/s read and written, {products / 1e12:.0f} TFLOP/s in "
        "bfloat16"
    )
    parts = given.parts.split(",")
    if unknown := set(parts) - {"limits", "draw", "train", "pictures"}:
        raise SystemExit(f"--parts has {', '.join(sorted(unknown))}; there are limits, draw, train, pictures.")
    if "draw" in parts:
        draw(given, device, rate, products, say)
    if "train" in parts:
        train(given, device, say)
    if "pictures" in parts:
        pictures(given, device, say)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
