"""What a decode step takes at published sizes, by executor and by how the weights are stored: RAR, Janus-Pro, and
LlamaGen of captions.

    python benchmarks/decode_steps.py [--model rar-b janus-pro-1b llamagen-xl] [--pictures 1 4] [--steps 12]
        [--weights float32 int8] [--threads 2] [--processor-time]

Random weights, guided, so two rows a picture. A picture takes as many steps as it has codes (256, 576, 256), and what
an engine does once: packing the weights and reading the prompt, which stands in a column of its own. The limit is what
it takes to read all weights that a step multiplies once, as they are stored. Janus-Pro-1B needs 14 GB in float32.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from smalti import processor
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.sampling import SampleConfig
from smalti.models.config import preset_config
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.models.families import AnyModel
from smalti.models.janus import PRESETS as JANUS
from smalti.models.janus import Janus
from smalti.models.rar import PRESETS as RARS
from smalti.models.rar import RAR
from smalti.models.stored_weights import STORAGES
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import FEATURES, Vocabulary

WORDS, FEATURE_WIDTH = 20, 2048
"""Of a caption."""

clock = time.perf_counter


CAPTIONS = Layout.parse(
    Vocabulary({FEATURES: 0, "image": 16_384}), {"caption to image": f"{FEATURES}{{120}} image{{256}}"}
)


def captions_model(shape: str) -> DecoderOnly:
    config = preset_config(shape, max_length=376, grid=(16, 16), prefix_length=120)
    return new_model(CAPTIONS, config, feature_width=FEATURE_WIDTH)


def model_of(name: str, weights: str) -> tuple[AnyModel, Layout, Callable[[int], Request]]:
    """With random weights, its layout, and a guided request by number."""
    kind = RAR if name in RARS else Janus if name in JANUS else None
    with torch.device("meta"):
        made = captions_model(name) if kind is None else kind((RARS | JANUS)[name])  # type: ignore[arg-type]
    model = made.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in (*model.parameters(), *model.buffers()):  # as large as they are, and quick to draw
        if parameter.is_floating_point():
            parameter.uniform_(-0.02, 0.02)
    model.store_weights(weights)
    layout = CAPTIONS if kind is None else model.config.layout
    order = next(iter(layout.orders))

    def request(seed: int, is_null: bool = False) -> Request:
        null = None if is_null else request(seed, True)
        if isinstance(model, RAR):
            label = model.config.num_classes if is_null else seed
            return Request(order=order, given={"label": torch.tensor([label])}, seed=seed, null=null)
        if isinstance(model, Janus):
            ids = torch.full((WORDS,), 3 + is_null + seed)
            return Request(order=order, given={"text": ids}, seed=seed, null=null)
        features = torch.randn(WORDS, FEATURE_WIDTH, generator=torch.Generator().manual_seed(seed + is_null))
        return Request(order=order, features=features, seed=seed, null=null)

    return model, layout, request


def read_bytes(model: nn.Module) -> int:
    """Of the weights that a step multiplies."""
    left_out = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.nbytes for p in model.parameters() if id(p) not in left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["rar-b", "janus-pro-1b", "llamagen-xl"])
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--weights", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a machine that is busy")
    given = parser.parse_args()
    if given.processor_time:
        global clock
        clock = time.process_time
    torch.set_num_threads(given.threads)
    numbers = torch.randn(2**26)
    read = numbers.nbytes / min(_seconds(numbers.sum) for _ in range(8))
    print(f"{given.threads} threads, {processor.instruction_set()}: reads {read / 1e9:.1f} GB/s")
    print(f"{'':38}{'pictures':>9}{'ready, s':>10}{'a step, ms':>12}{'limit':>8}{'a picture, s':>14}")
    for name in given.model:
        for weights in given.weights:
            model, layout, request = model_of(name, weights)
            for executor in ("native", "eager") if weights == "float32" else ("native",):
                label = f"{name}, {executor}, {weights}"
                if reasons := EXECUTORS[executor].why_not(model):
                    print(f"{label:38} {'; '.join(reasons)}", flush=True)
                    continue
                for num_pictures in given.pictures:
                    started_at = clock()
                    engine = Engine(model, layout, capacity=2 * num_pictures, executor=executor)
                    for seed in range(num_pictures):
                        engine.submit(request(seed), SampleConfig(guidance_scale=4.0))
                    engine.step()
                    ready = clock() - started_at
                    step = median(_seconds(engine.step) for _ in range(given.steps))
                    [num_codes] = (
                        span.length for span in next(iter(layout.orders.values())).spans if span.segment == "image"
                    )
                    whole = (ready + step * (num_codes - 1)) / num_pictures
                    limit = read_bytes(model) / read
                    print(
                        f"{label:38}{num_pictures:9}{ready:10.1f}{1e3 * step:12.1f}{1e3 * limit:8.1f}{whole:14.1f}",
                        flush=True,
                    )
            del model, request


def _seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


if __name__ == "__main__":
    with torch.inference_mode():
        main()
