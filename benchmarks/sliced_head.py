"""The sliced head against the full softmax: the same model, pairs, seed and steps, in a vocabulary of 30,000.

    python benchmarks/sliced_head.py [--captions text/coco_captions.csv] [--num-layers 4] [--steps 40]

trains a Llama with d_model 512 twice, each in a process of its own: once with the softmax over the 4,096 codes that can
stand in a picture, once over all 30,000 ids. It prints validation nats per picture token, seconds per step, and peak
memory. `--only sliced` or `--only full` does one of them; results are kept in `--results`, so that both make one table.

Captions are COCO's where they are found. Their pictures' codes come from a small process whose entropy is known: the
first word that is no stop word chooses one of 16 blocks of 256 codes; a code is from it with probability 0.8, from any
block else, and Zipf-distributed within. What a model can learn of it is thus known, and learned in few steps.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float, Int64

from smalti.data.captions import read_captions
from smalti.data.tokens import TokenBatch
from smalti.models.config import PRESETS, TransformerConfig
from smalti.models.loss import token_nll
from smalti.sequences.layout import Layout
from smalti.text_tokenizer import END_OF_IMAGE, START_OF_IMAGE, BPEConfig, TextTokenizer
from smalti.training import token_model as module
from smalti.training.token_model import TrainConfig, pack_rows, train_model

SHARED = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2] / "shared"))
HEADS = {"sliced": False, "full": True}
NUM_BLOCKS, IN_BLOCK, LENGTH = 16, 0.8, 32
STOP_WORDS = frozenset("a an the of on in at with and to is are some two three there".split())  # noqa: SIM905
NUM_VALIDATION = 256


class Pairs:
    """Captions as numbers, with codes of the process; a caption without a word of its own gets block 0."""

    def __init__(self, captions: list[str], text_tokenizer: TextTokenizer, codebook_size: int, seed: int):
        self._words = [text_tokenizer.encode_within(caption, 64).numbers for caption in captions]
        random = np.random.default_rng(seed)
        topics = np.array([_topic(caption) for caption in captions])
        size = codebook_size // NUM_BLOCKS
        inside = random.random((len(captions), LENGTH)) < IN_BLOCK
        blocks = np.where(inside, topics[:, None], random.integers(NUM_BLOCKS, size=inside.shape))
        self._codes = blocks * size + random.choice(size, inside.shape, p=zipf(size))

    def __len__(self) -> int:
        return len(self._words)

    def batch(self, rows: Int64[np.ndarray, " n"]) -> TokenBatch:
        words = [self._words[row] for row in rows]
        lengths = np.array([len(found) for found in words])
        padded = np.full((len(rows), int(lengths.max(initial=0))), -1)
        for row, found in enumerate(words):
            padded[row, : len(found)] = found
        return TokenBatch(self._codes[rows].astype(np.int64), np.full(len(rows), LENGTH), padded, lengths)


def _topic(caption: str) -> int:
    own = [word for word in caption.lower().replace(".", " ").split() if word not in STOP_WORDS]
    return zlib.crc32(own[0].encode()) % NUM_BLOCKS if own else 0


def zipf(size: int) -> Float[np.ndarray, " size"]:
    weights = 1 / np.arange(1, size + 1)
    return weights / weights.sum()


def entropy_nats(codebook_size: int) -> float:
    """Of one code, given its block's topic: what the best model pays."""
    within = zipf(codebook_size // NUM_BLOCKS)
    other = (1 - IN_BLOCK) / NUM_BLOCKS
    shares = np.array([IN_BLOCK + other] + [other] * (NUM_BLOCKS - 1))
    both = shares[:, None] * within
    return float(-(both * np.log(both)).sum())


def read_or_make_captions(path: Path | None) -> list[str]:
    """COCO's captions; without them, sentences of made-up words, which need as many ids."""
    path = path or SHARED / "data" / "text" / "coco_captions.csv"
    if path.is_file():
        return read_captions(path)
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioubdgklmnprst"), 6)) for _ in range(20_000)]
    return [" ".join(random.choice(words, 10)) for _ in range(30_000)]


def measure(head: str, options: argparse.Namespace) -> dict[str, float]:
    """Trains one of the two and measures it; called in a process of its own."""
    config = BPEConfig()
    layout = Layout.parse(
        config.vocabulary, {"text to image": f"(text{{..64}}) {START_OF_IMAGE} image{{{LENGTH}}} {END_OF_IMAGE}"}
    )
    captions = read_or_make_captions(options.captions)
    text_tokenizer = TextTokenizer.train(captions, config)[0]
    num_pairs = min(options.steps * options.batch_size, len(captions) - NUM_VALIDATION)
    pairs = Pairs(captions[:num_pairs], text_tokenizer, config.image_size, seed=0)
    held_out = Pairs(captions[-NUM_VALIDATION:], text_tokenizer, config.image_size, seed=1)
    shape = {"num_layers": options.num_layers, "d_model": options.d_model, "d_ff": options.d_model * 11 // 4}
    model = TransformerConfig(max_length=layout.max_length, **(PRESETS["llama-60m"] | shape))
    train = TrainConfig(
        num_steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=1e-3,
        warmup_steps=options.steps // 10,
        max_grad_norm=1.0,
        betas=(0.9, 0.95),
        full_softmax=HEADS[head],
        checkpoint_every=10**9,
        evaluation_rows=1,
    )
    clock: list[float] = []
    from_tokens = 0 if options.path == "native" else 10**15
    with tempfile.TemporaryDirectory() as folder, patch.object(module, "NATIVE_FROM_TOKENS", from_tokens):
        trained = train_model(
            model,
            layout,
            pairs,
            held_out,
            train,
            folder,
            device="cpu",
            sampler=lambda model, step: clock.append(time.perf_counter()),
            sample_every=1,
            show_progress=False,
        )
    found = {
        "parameters": trained.num_parameters,
        "seconds per step": float(np.median(np.diff(clock[options.steps // 4 :]))),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    for over, full in (("over the codes", False), ("over all ids", True)):
        if full and trained.config.head_ranges is not None:  # the sliced one has no rows for the other ids
            continue
        nats, num = 0.0, 0
        for start in range(0, NUM_VALIDATION, 64):
            packed = pack_rows(layout, held_out, np.arange(start, start + 64), np.zeros(64, dtype=np.int64))
            image = layout.vocabulary["image"]
            inside = packed.counted & (packed.token_ids >= image.offset) & (packed.token_ids < image.end)
            with torch.inference_mode():
                nats += float(token_nll(trained, packed, layout.slots, full_softmax=full)[inside].double().sum())
            num += int(inside.sum())
        found[f"nats per picture token, softmax {over}"] = nats / num
    return found


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """In Markdown; the last column says how much better the sliced head is."""
    both = set(results) == set(HEADS)
    lines = [
        f"{options.num_layers} layers, d_model {options.d_model}, {results[next(iter(results))]['parameters']:,} "
        f"parameters, batch {options.batch_size}, {options.steps} steps, {torch.get_num_threads()} threads, "
        f"{options.path}; the process costs {entropy_nats(4096):.4f} nats a code",
        "",
        f"| | {' | '.join(results)} |{' full / sliced |' if both else ''}",
        "|---" * (len(results) + 1 + both) + "|",
    ]
    for name in dict.fromkeys(name for found in results.values() for name in found):
        if name == "parameters":
            continue
        values = [found.get(name) for found in results.values()]
        digits = 1 if "memory" in name else 4 if "nats" in name else 3
        ratio = (
            f" {results['full'][name] / results['sliced'][name]:.2f} |" if both and "nats" not in name else " |" * both
        )
        lines.append(
            f"| {name} | {' | '.join('' if value is None else f'{value:.{digits}f}' for value in values)} |{ratio}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The sliced head against the full softmax.")
    parser.add_argument(
        "--captions", type=Path, help="captions, CSV or text (default: those of COCO in the shared data)"
    )
    parser.add_argument("--only", choices=[*HEADS], help="measure one of the two")
    parser.add_argument("--results", type=Path, help="JSON file that collects results, so that both make one table")
    parser.add_argument(
        "--path", choices=["native", "torch"], default="native", help="the CPU's training kernel, or torch's operators"
    )
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.only, options)))
        return
    results = json.loads(options.results.read_text()) if options.results and options.results.is_file() else {}
    for head in [options.only] if options.only else HEADS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", head, "--in-this-process"]
        results[head] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
    print(table({head: results[head] for head in HEADS if head in results}, options))


if __name__ == "__main__":
    main()
