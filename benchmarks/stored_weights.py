"""Weights in float32, bfloat16 and int8: their memory, milliseconds a picture, and price in nats a code.

    python benchmarks/stored_weights.py [--bundles digits emoji FOLDER] [-n 32] [--executors native eager] [--rounds 3]
        [--processor-time]

Memory is that of the transformer's parameters. Pictures are drawn one at a time with the bundle's own settings; the
kinds of weights take turns, and medians are printed. The price needs no data: n pictures are drawn from the float32
model at temperature 1, without guidance, and at every code of them the distribution of the model with stored weights is
compared with that of the float32 model. The mean of KL(float32 || stored) is what a code of the float32 model's own
pictures costs more with them, in nats, with its standard error over pictures.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.generate import Generated, generate
from smalti.engine.sampling import SampleConfig
from smalti.models.stored_weights import STORAGES
from smalti.tasks.images import Pipeline

PROMPTS = {
    "digits": ["dark green eight on bright cyan", "dark red three on light blue", "dark blue zero on bright green"],
    "emoji": ["woman astronaut, dark skin tone", "cat face", "man cook", "thumbs up, light skin tone", "red heart"],
}


@torch.inference_mode()
def log_probs(pipe: Pipeline, drawn: list[Generated]) -> Float[Tensor, "N L n"]:
    """ln p of all codes that could stand in place of each drawn one."""
    order = pipe.layout[pipe.bundle.order("text", "image")]
    index = next(i for i, part in enumerate(order.parts) if getattr(part, "segment", None) == "image")
    slot = pipe.layout.slots[pipe.layout.slot_index(order.name, index)]
    found = []
    for one in drawn:  # captions have any length
        (start, end), *_ = slot.ranges
        is_code = ((one.token_ids >= start) & (one.token_ids < end)).nonzero()[:, 0]
        hidden = pipe.model.hidden(one.token_ids[None])[0, is_code - 1]
        found.append(pipe.model.logits(hidden, slot).double().log_softmax(-1))
    return torch.stack(found)


def milliseconds(pipe: Pipeline, executor: str, clock, config: SampleConfig, words) -> float:
    """Of a picture."""
    start = clock()
    for seed, one in enumerate(words):
        engine = Engine(pipe.model, pipe.layout, capacity=1, executor=executor)
        engine.submit(pipe.picture_request(one, seed, None, config), config)
        engine.run()
    return 1e3 * (clock() - start) / len(words)


def compare(args: argparse.Namespace, name: str, clock) -> None:
    pipes = {weights: Pipeline.load(name, weights=weights) for weights in STORAGES}
    first = pipes["float32"]
    words = [first.whole(prompt) for prompt in PROMPTS["digits" if first.name == "digits" else "emoji"]]
    plain = SampleConfig()
    requests = [first.picture_request(words[i % len(words)], i, None, plain) for i in range(args.n)]
    drawn = generate(first.model, first.layout, requests, plain)
    reference = log_probs(first, drawn)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for weights, pipe in pipes.items():
            for executor in args.executors:
                taken = milliseconds(pipe, executor, clock, replace(pipe.sampling.picture), words)
                times.setdefault((weights, executor), []).append(taken)
    print(f"\n{first.name}: {first.model.num_parameters:,} parameters, nats a code of {args.n} pictures")
    print(
        f"{'weights':10}{'MB':>8}{'nats more':>24}" + "".join(f"{executor + ', ms':>14}" for executor in args.executors)
    )
    for weights, pipe in pipes.items():
        megabytes = sum(tensor.nbytes for tensor in (*pipe.model.parameters(), *pipe.model.buffers())) / 1e6
        price = (reference.exp() * (reference - log_probs(pipe, drawn))).sum(-1).mean(-1)
        error = float(price.std()) / len(price) ** 0.5
        took = "".join(f"{median(times[weights, executor]):14.1f}" for executor in args.executors)
        print(f"{weights:10}{megabytes:8.2f}{float(price.mean()):14.6f} ± {error:.6f} {took}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundles", nargs="+", default=["digits", "emoji"])
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--executors", nargs="+", default=["native", "eager"], choices=list(EXECUTORS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.bundles:
        compare(args, name, time.process_time if args.processor_time else time.perf_counter)


if __name__ == "__main__":
    main()
