"""Models of classes on real pictures: LlamaGen's way against RAR's, on grids of codes and on rows of them.

    python benchmarks/class_models.py --mnist FOLDER --emoji FOLDER -o OUT [--only WORD] [--threads 2]

MNIST's ten digits and six groups of emoji; the codes are the grid that the bundles `digits` and `emoji` have (`grid`),
one of 16 × 16 (`fine`), or a row of TiTok's (`row`); of the latter two a tokenizer is trained first. Each run is a
`smalti train` with its own folder in OUT: what is done is not done again, and what was stopped goes on. Printed are
nats a code, class accuracy and Fréchet distance by a judge that the runs of one kind of picture train alike, against
guidance; OUT/*/guidance.png draws them.
"""

import argparse
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smalti.data.digit_sources import read_mnist

GROUPS = {
    "flags": [(0x1F1E6, 0x1F1FF), (0x1F3F4, 0x1F3F4)],
    "faces": [(0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F925), (0x1F927, 0x1F92F), (0x1F970, 0x1F97A)],
    "people": [(0x1F466, 0x1F469), (0x1F9D1, 0x1F9D1), (0x1F645, 0x1F64F), (0x1F9CD, 0x1F9DF), (0x1F46E, 0x1F487)],
    "animals and plants": [(0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1F330, 0x1F344), (0x1FAB0, 0x1FABD)],
    "food": [(0x1F345, 0x1F37F), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADB)],
}
"""First code points, from and to; what has a skin tone is a person, and what is left is something else."""
FINE = [
    # each code made of its own patch, 2 × 2 or 4 × 4 pixels
    "image_tokenizer.model.local=true", "image_tokenizer.model.encoder_multipliers=[4]",
    "image_tokenizer.model.decoder_multipliers=[2]", "image_tokenizer.model.encoder_attention_levels=[]",
    "image_tokenizer.model.decoder_attention_levels=[]", "image_tokenizer.model.quantizer.codebook_size=512",
    "train.num_steps=1000", "train.warmup_steps=100",
]  # fmt: skip
TOKENIZERS = {
    ("fine", "mnist"): ["vqgan", "image_tokenizer.model.image_size=[32,32]", "image_tokenizer.model.fold=2", *FINE],
    ("fine", "emoji"): ["vqgan", "image_tokenizer.model.fold=4", *FINE],
    # 32 × 32 in 16 codes of 4,096, 64 × 64 in 32
    ("row", "mnist"): [
        "titok", "image_tokenizer.model.image_size=[32,32]", "image_tokenizer.model.num_latents=16",
        *(
            f"image_tokenizer.model.{part}.{size}"
            for part in ("encoder", "decoder")
            for size in ("patch_size=4", "width=96", "num_layers=2", "num_heads=3")
        ),
        "train.num_steps=2000", "train.warmup_steps=200",
    ],
    ("row", "emoji"): ["titok", "train.num_steps=1200", "train.warmup_steps=120"],
}  # fmt: skip
MODELS = {
    "mnist": ["train.num_steps=1500"],
    "emoji": ["train.num_steps=1000", "data.held_out_share=0.1", "data.scale=4"],
}
FEWER = ["train.num_steps=1000", "train.batch_size=16", "train.evaluation_rows=300"]
"""Of 256 codes, each row of which costs as much as five of 49."""
FAMILIES = {"llamagen": ["model.family=llamagen"], "rar": ["model.family=rar"]}


def group(code_points: str, has_skin_tone: bool) -> str:
    first = int(code_points.split()[0], 16)
    found = [name for name, ranges in GROUPS.items() if any(start <= first <= end for start, end in ranges)]
    return "people" if has_skin_tone else (found or ["something else"])[0]


def write_pictures(mnist: Path, emoji: Path, folder: Path) -> dict[str, Path]:
    """Both as tables with the columns image and label; MNIST also goes by its own files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"mnist": folder / "mnist.parquet", "emoji": folder / "emoji.parquet"}
    if not paths["mnist"].exists():
        digits = read_mnist(mnist)["train"]
        pictures = [_png(Image.fromarray((mask * 255).astype("uint8")).convert("RGB")) for mask in digits.masks]
        pq.write_table(pa.table({"image": pictures, "label": digits.labels.tolist()}), paths["mnist"])
    if not paths["emoji"].exists():
        table = pq.read_table(emoji / "train.parquet")
        rows = table.select(["codepoints", "skin_tones"]).to_pylist()
        labels = [group(row["codepoints"], bool(row["skin_tones"])) for row in rows]
        pq.write_table(pa.table({"image": table["image"], "label": labels}), paths["emoji"])
    return paths


def _png(picture: Image.Image) -> bytes:
    held = BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()


def smalti(arguments: list[str], threads: int) -> None:
    command = [sys.executable, "-m", "smalti", *arguments]
    print("$ smalti " + " ".join(arguments), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="the folder with its four files")
    parser.add_argument("--emoji", type=Path, required=True, help="a folder with train.parquet: image, codepoints, …")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="runs with this in their name")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tables = write_pictures(args.mnist, args.emoji, args.output / "pictures")
    names = []
    for codes in ("grid", "fine", "row"):
        for pictures in ("mnist", "emoji"):
            for family, options in FAMILIES.items():
                name = f"{pictures}-{codes}-{family}"
                if args.only not in name:
                    continue
                names.append(name)
                folder = args.output / name
                if (folder / "report.json").exists():
                    continue
                tokenizer = {"mnist": "digits", "emoji": "emoji"}[pictures]
                if codes != "grid":
                    trained = args.output / f"{pictures}-{codes}"
                    if not (trained / "image_tokenizer").exists():
                        recipe, *sizes = TOKENIZERS[codes, pictures]
                        given = [f"pictures={tables[pictures]}", f"output={trained}", *sizes]
                        smalti(["train", "tokenizer", recipe, *given], args.threads)
                    tokenizer = str(trained)
                data = args.mnist if pictures == "mnist" else tables["emoji"]
                given = [f"data.train={data}", f"image_tokenizer={tokenizer}", f"output={folder}", *options]
                fewer = FEWER if codes == "fine" else []
                smalti(["train", "c2i", *given, *MODELS[pictures], *fewer], args.threads)
    for name in names:
        report = json.loads((args.output / name / "report.json").read_text())
        print(f"\n{name}: {json.dumps(report['nats'], ensure_ascii=False)}, judge {report['judge_accuracy']}, "
              f"reconstructions {report['frechet_of_reconstructions']:.3f}")  # fmt: skip
        for scale in report["scales"]:
            print("  " + ", ".join(f"{key} {value:.3f}" for key, value in scale.items()))


if __name__ == "__main__":
    main()
