"""Passes and seconds a picture with drafts verified ahead, against none, on trained bundles.

    python benchmarks/speculative.py [--bundles digits emoji FOLDER] [-n 16] [--batch-sizes 1 8] [--windows 4 8 16 32]
        [--couplings inverse gumbel maximal] [--executors native eager] [--rounds 3] [--temperature T]
        [--guidance-scale S] [--processor-time] [--quick]

Draws n pictures of captions that the bundle knows, or of classes in turn, with its own settings, for each window and
coupling, and without drafts; the settings take turns, `--rounds` times. A pass is one call of the model for all
pictures that are open; passes a picture are those in which it was. Times are medians; how much faster that is, is the
median of the ratios in each round, and less than 1 is slower. With the coupling `inverse` and an executor other than
`eager` the pictures must be the same; exits 1 if they are not. `--processor-time` counts that of the process instead of
a clock's, for a machine that is busy.
"""

import argparse
import sys
import time
from dataclasses import replace
from statistics import median

import torch

from smalti.bundle import Bundle, find_bundle
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.sampling import COUPLINGS, SampleConfig
from smalti.sequences.request import Request
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.images import Pipeline

DIGITS = ["dark green eight on bright cyan", "dark red three on light blue", "dark blue zero on bright green"]
EMOJI = ["woman astronaut, dark skin tone", "cat face", "man cook", "thumbs up, light skin tone", "red heart", "rocket"]


def open_pipe(name: str) -> Pipeline | ClassPipeline:
    bundle = Bundle.load(find_bundle(name))
    return ClassPipeline(bundle) if bundle.can_draw_classes else Pipeline(bundle)


def asked(pipe: Pipeline | ClassPipeline, number: int, config: SampleConfig) -> Request:
    if isinstance(pipe, ClassPipeline):
        return pipe.class_request(number % pipe.classes.num, number, config)
    prompts = DIGITS if pipe.name == "digits" else EMOJI
    return pipe.picture_request(pipe.whole(prompts[number % len(prompts)]), number, None, config)


def draw(
    pipe: Pipeline | ClassPipeline, n: int, batch_size: int, executor: str, config: SampleConfig, clock
) -> tuple[list[list[int]], float, float]:
    """The codes of n pictures, passes a picture, and seconds a picture."""
    engine = Engine(pipe.model, pipe.layout, capacity=batch_size, executor=executor)
    tickets = [engine.submit(asked(pipe, number, config), config) for number in range(n)]
    passes, start = 0, clock()
    while not engine.is_idle:
        passes += len({event.ticket for event in engine.step()})
    seconds = clock() - start
    return [engine.take(ticket).spans["image"].tolist() for ticket in tickets], passes / n, seconds / n


def compare(args: argparse.Namespace, name: str, executor: str, batch_size: int, clock) -> int:
    """Prints a table; returns how many pictures of the coupling `inverse` are not those without drafts."""
    pipe = open_pipe(name)
    given = {"temperature": args.temperature, "guidance_scale": args.guidance_scale}
    config = replace(pipe.sampling.picture, **{name: value for name, value in given.items() if value is not None})
    settings = [config] + [
        replace(config, speculative=window, coupling=coupling) for coupling in args.couplings for window in args.windows
    ]
    found = [[draw(pipe, args.n, batch_size, executor, one, clock) for one in settings] for _ in range(args.rounds)]
    plain = [rows[0] for rows in found]
    num_codes = pipe.bundle.image_length
    print(
        f"\n{pipe.name}, {num_codes} codes, {executor}, {batch_size} at once, temperature {config.temperature}, "
        f"guidance {config.guidance_scale}: {plain[0][1]:.1f} passes and "
        f"{1e3 * median(one[2] for one in plain):.1f} ms a picture"
    )
    print(f"{'coupling':10}{'drafts':>7}{'passes':>9}{'fewer':>9}{'ms':>9}{'faster':>9}{'same':>7}")
    different = 0
    for number, one in enumerate(settings[1:], 1):
        codes, passes, _ = found[0][number]
        seconds = median(rows[number][2] for rows in found)
        faster = median(rows[0][2] / rows[number][2] for rows in found)
        same = sum(ours == other for ours, other in zip(codes, plain[0][0], strict=True))
        different += len(codes) - same if one.coupling == "inverse" and executor != "eager" else 0
        print(
            f"{one.coupling:10}{one.speculative:7}{passes:9.1f}{plain[0][1] / passes:8.2f}x{1e3 * seconds:9.1f}"
            f"{faster:8.2f}x{same:4}/{len(codes)}",
            flush=True,
        )
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundles", nargs="+", default=["digits", "emoji"])
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--couplings", nargs="+", default=list(COUPLINGS), choices=COUPLINGS)
    parser.add_argument("--executors", nargs="+", default=["native", "eager"], choices=list(EXECUTORS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two pictures of each, once")
    args = parser.parse_args()
    if args.quick:
        args.n, args.rounds, args.windows, args.batch_sizes = 2, 1, args.windows[:1], args.batch_sizes[:1]
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    different = 0
    for name in args.bundles:
        for executor in args.executors:
            for batch_size in args.batch_sizes:
                different += compare(args, name, executor, batch_size, clock)
    if different:
        print(f"{different} pictures of the coupling inverse are not those without drafts.")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
