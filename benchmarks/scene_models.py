"""Decoder-only against encoder-decoder on scenes, at three sizes: equal parameters, equal compute, the same data.

    python benchmarks/scene_models.py -o out/scene_models

Each size is trained once as a decoder-only transformer that learns pictures of captions alone and once as an
encoder-decoder, with the same words, codes, optimizer, rate and schedule; the largest decoder-only one a second time
with captions of pictures besides, as the recipe `scenes` does. Every run makes the same number of products: that of
UPDATES updates of the middle decoder-only model, counted by `smalti plan`'s own `footprint` on sequences of full
length. Then `smalti evaluate prompts` draws the same prompts from each. A bundle given by `--ranker` ranks the
candidates of all by p(caption | picture) p(picture | caption); without, each ranks its own by p(picture | caption).

Every training is a `smalti train` in a folder of its own: what is done is not done again, and what was stopped goes on.
The table is printed as Markdown, with Wilson's intervals of 95 %.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from smalti.bundle import CONFIG, find_bundle
from smalti.evaluate.prompts import Share
from smalti.evaluate.reconstruction import find_image_tokenizer
from smalti.planning.footprint import Footprint, footprint
from smalti.planning.subjects import Assumed, find_subject
from smalti.text_tokenizer import TextTokenizer, UnigramConfig

TEXT_SIZE = 512
"""Unigram pieces: enough that every word of the grammar is one."""
MAX_TEXT = 24
"""Pieces of the longest caption."""
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "0.25m": {
        "decoder-only": {"num_layers": 2, "d_model": 64, "num_heads": 2, "d_ff": 160},
        "encoder-decoder": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "num_heads": 2, "d_ff": 160},
    },
    "0.5m": {
        "decoder-only": {"num_layers": 2, "d_model": 96, "num_heads": 3, "d_ff": 256},
        "encoder-decoder": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 96, "num_heads": 3, "d_ff": 256},
    },
    "1m": {
        "decoder-only": {"num_layers": 3, "d_model": 128, "num_heads": 4, "d_ff": 416},
        "encoder-decoder": {"encoder_layers": 1, "decoder_layers": 2, "d_model": 128, "num_heads": 4, "d_ff": 448},
    },
}
"""Shapes of each size, whose parameters differ by 5 % at most."""
MIDDLE = "0.5m"
CATEGORIES = ("attributes", "count", "relation")
UPDATES = 3000
TO_PICTURE = "<|startoftext|> (text{..24}) <|startofimage|> image{64} <|endofimage|>"
TO_CAPTION = "<|startofimage|> (image{64}) <|endofimage|> text{..24} <|endoftext|>"
TRAIN = {
    "batch_size": 64, "optimizer": "muon", "learning_rate": 6e-3, "schedule": "cosine", "warmup_steps": 100,
    "final_share": 0.02, "weight_decay": 0.02, "betas": [0.9, 0.95], "max_grad_norm": 1.0, "ema_decay": 0.995,
    "caption_dropout": 0.1, "evaluation_rows": 400, "checkpoint_every": 200,
}  # fmt: skip
"""The settings of the recipe `scenes`."""


def recipe(name: str, family: str, size: str, captions: bool, folder: Path, image_tokenizer: Path) -> dict[str, Any]:
    """The recipe of a run, but for its length."""
    shape = SIZES[size][family]
    common = {
        "description": name,
        "expects": "",
        "data": {**{split: str(folder / f"{split}.parquet") for split in ("train", "validation")}, "scale": 4},
        "image_tokenizer": str(image_tokenizer),
        "text_tokenizer": str(folder / "text_tokenizer.json"),
        "text_size": TEXT_SIZE,
        "train": TRAIN,
        "sample": {"picture": {"temperature": 0.5, "guidance_scale": 2.0}},
        "output": str(folder / name),
    }
    if family == "encoder-decoder":
        return common | {
            "system": "parti",
            "max_text": MAX_TEXT,
            "model": {"preset": "parti-1m", "dropout": 0.0, **shape},
        }
    orders = (
        {"text to image": [TO_PICTURE, 3], "image to text": [TO_CAPTION, 1]}
        if captions
        else {"text to image": TO_PICTURE}
    )
    specials = ["<|startoftext|>", "<|startofimage|>", "<|endofimage|>"] + ["<|endoftext|>"] * captions
    return common | {
        "system": "captions",
        "segments": ["special", "text", "image"],
        "layout": {"specials": specials, "orders": orders},
        "model": {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary", "bias": False, **shape},
    }


def counted(recipe: dict[str, Any], file: Path) -> Footprint:
    """What an update of it takes."""
    write(with_steps(recipe, 1), file)
    task = find_subject(str(file), [], Assumed()).task
    return footprint(task, TRAIN["batch_size"], precision="float32")


def write(recipe: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def with_steps(recipe: dict[str, Any], num_steps: int) -> dict[str, Any]:
    return recipe | {"train": recipe["train"] | {"num_steps": num_steps, "num_epochs": None}}


def smalti(arguments: list[str], threads: int) -> None:
    print("$ smalti " + " ".join(arguments), flush=True)
    command = [sys.executable, "-m", "smalti", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def make_tokens(folder: Path, image_tokenizer: Path, threads: int) -> None:
    """Scenes, words, and both as tokens, once for all runs."""
    if not (folder / "data" / "test.parquet").exists():  # the last of them
        smalti(["data", "scenes", str(folder / "data")], threads)
    words = folder / "text_tokenizer.json"
    if not words.exists():
        captions = pq.read_table(folder / "data" / "train.parquet", columns=["caption"])["caption"].to_pylist()
        TextTokenizer.train_unigram(captions, UnigramConfig(text_size=TEXT_SIZE))[0].save(words)
    for split in ("train", "validation"):
        if not (tokens := folder / f"{split}.parquet").exists():
            given = ["--image-tokenizer", str(image_tokenizer), "--text-tokenizer", str(words)]
            given += ["--max-text-length", str(MAX_TEXT)]
            smalti(["tokenize", str(folder / "data" / f"{split}.parquet"), "-o", str(tokens), *given], threads)


def nats(bundle: Path) -> str:
    """Of a code, on validation scenes."""
    figures = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))["figures"]
    return next(value for name, value in figures.items() if "per picture token" in name and "empty" not in name)


def table(
    reports: dict[str, Any], footprints: dict[str, Footprint], steps: dict[str, int], nats: dict[str, str]
) -> str:
    """A line for each run and number of candidates: shares of right pictures, seen / unseen, in %."""
    head = ("model", "parameters", "updates", "nats a code", "n", "all", *CATEGORIES)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, report in reports.items():
        rows = {(row["group"], row["best_of"]): row["shares"] for row in report["rows"]}
        told = [name, f"{footprints[name].num_parameters:,.0f}", f"{steps[name]:,}", nats[name]]
        for n in (n for group, n in rows if group == "seen" and n):
            cells = [cell(rows["seen", n][what], rows["unseen", n][what]) for what in ("all", *CATEGORIES)]
            lines.append(f"| {' | '.join([*told, str(n), *cells])} |")
            told = [""] * len(told)
    return "\n".join(lines)


def cell(*shares: dict[str, float]) -> str:
    return " / ".join(str(Share(round(share["right"]), round(share["num"]))).replace("%", "") for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bundle", default="scenes", help="whose image tokenizer is used")
    parser.add_argument(
        "--ranker", help="bundle of both orders that ranks candidates, such as one of the recipe scenes"
    )
    parser.add_argument("--only", default="", help="runs with this in their name")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of the middle decoder-only model")
    parser.add_argument("--num", type=int, default=400, help="prompts")
    parser.add_argument("--best-of", default="1,4,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", action="store_true", help="print parameters and updates, and train nothing")
    given = parser.parse_args()
    folder: Path = given.output
    image_tokenizer = find_image_tokenizer(find_bundle(given.bundle))
    make_tokens(folder, image_tokenizer, given.threads)

    runs = {f"{family}-{size}": (family, size, False) for size in SIZES for family in SIZES[size]}
    runs["decoder-only-both-orders-1m"] = ("decoder-only", "1m", True)
    recipes = {name: recipe(name, *how, folder, image_tokenizer) for name, how in runs.items()}
    files = {name: folder / "recipes" / f"{name}.yaml" for name in runs}
    footprints = {name: counted(one, files[name]) for name, one in recipes.items()}
    products = given.updates * footprints[f"decoder-only-{MIDDLE}"].flops
    steps = {name: round(products / found.flops) for name, found in footprints.items()}
    for name, found in footprints.items():
        write(with_steps(recipes[name], steps[name]), files[name])
        size = f"{found.num_parameters:,.0f} parameters, {found.flops / 1e9:.1f} GFLOP an update"
        print(f"{name}: {size}, {steps[name]:,} updates")
    if given.count:
        return
    reports = {}
    for name in (name for name in runs if given.only in name):
        if not (folder / name / "bundle").exists():
            smalti(["train", str(files[name])], given.threads)
        prompts = folder / name / "prompts"
        if not (prompts / "prompts.json").exists():
            how = ["--num", str(given.num), "--best-of", given.best_of]
            how += ["--ranker", given.ranker, "--rerank", "both"] if given.ranker else ["--rerank", "picture"]
            bundle = str(folder / name / "bundle")
            smalti(["evaluate", "prompts", bundle, *how, "-o", str(prompts), "--quiet"], given.threads)
        reports[name] = json.loads((prompts / "prompts.json").read_text(encoding="utf-8"))
    print()
    print(table(reports, footprints, steps, {name: nats(folder / name / "bundle") for name in reports}))


if __name__ == "__main__":
    main()
