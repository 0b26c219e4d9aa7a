"""Commands that are stopped at random moments and started again: `python fault_runs.py NAME SIGNAL FOLDER`, from
test_faults.py.

Each start is a fork, so that torch is imported once. What is left in the end must be what an undisturbed run writes.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from tiny_bundle import tiny_bpe_pipeline
from tiny_lines import random_codes, tiny_line_model, write_text

from smalti.cli import app as cli
from smalti.data.lines import import_lines
from smalti.data.tokens import TokenTable
from smalti.tasks import line_files

MAX_STARTS = 200


def _bundles(folder: Path) -> None:
    tiny_line_model().save(folder / "lines_bundle")
    tiny_bpe_pipeline().save(folder / "words_bundle")


def training(folder: Path) -> Callable[[Path], list[str]]:
    path = write_text(folder / "lines.txt", random_codes(200))
    import_lines(path, folder / "lines.parquet")
    settings = ["train.num_epochs=null", "train.num_steps=60", "train.batch_size=8", "checkpoint_every=5"]
    more = ["preset=1M", "dropout=0.1", "train.warmup_steps=5", "patience=null"]
    return lambda output: [
        "train", "lines", f"data={folder / 'lines.parquet'}", f"output={output}", *settings, *more, "--quiet"
    ]  # fmt: skip


def tokenizing(folder: Path) -> Callable[[Path], list[str]]:
    tiny_bpe_pipeline().save(folder / "bundle")
    (folder / "pairs").mkdir()
    generator = np.random.default_rng(0)
    for row in range(1100):
        pixels = generator.integers(256, size=(28, 28, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / f"{row:04d}.png")
        (folder / "pairs" / f"{row:04d}.txt").write_text("a dog on a tree")
    source, bundle = str(folder / "pairs"), str(folder / "bundle")
    return lambda output: ["tokenize", source, "-o", str(output / "t.parquet"), "--bundle", bundle]


def importing(folder: Path) -> Callable[[Path], list[str]]:
    path = write_text(folder / "lines.txt", random_codes(300_000))
    return lambda output: ["data", "import-lines", str(path), "-o", str(output / "t.parquet")]


def completing(folder: Path) -> Callable[[Path], list[str]]:
    line_files.LINES_PER_PIECE = 64
    tiny_line_model().save(folder / "bundle")
    path = write_text(folder / "prefixes.txt", random_codes(1500), np.arange(1500) % 8)
    bundle = str(folder / "bundle")
    return lambda output: ["complete", str(path), "-o", str(output / "c.txt"), "--bundle", bundle]


def start(arguments: list[str]) -> int:
    """The process of a command; its output goes to a file of its own, for the parent to look at if it fails."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os._exit(cli.run(arguments))


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, object]:
    """What must be the same; times, logs and the names of the folders differ."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            table = TokenTable.open(path)
            rows = np.arange(len(table))
            found[path.name] = (table.batch(rows).image_tokens.tolist(), table.keys(rows), table.texts(rows))
        elif path.suffix in (".txt", ".csv") and path.is_file():
            found[str(path.relative_to(folder))] = path.read_text()
        elif path.name == "model.safetensors" and "checkpoints" not in path.parts:
            found[str(path.relative_to(folder))] = path.read_bytes().hex()[-20_000:]
    return found


def main(name: str, sent: signal.Signals, folder: Path) -> None:
    torch.set_num_threads(1)
    command = {"training": training, "tokenizing": tokenizing, "importing": importing, "completing": completing}[name](
        folder
    )
    (folder / "whole").mkdir()
    began = time.perf_counter()
    assert status(start(command(folder / "whole"))) == 0
    whole_s = time.perf_counter() - began
    random, codes = Random(0), []
    (folder / "stopped").mkdir()
    for attempt in range(MAX_STARTS):
        pid = start(command(folder / "stopped"))
        # Some are stopped at once; later starts run longer, so that a command without parts ends some time.
        time.sleep(random.random() * whole_s * (0.2 + 0.1 * attempt))
        os.kill(pid, sent)
        codes.append(status(pid))
        # 2: stopped behind its last step, it has left what it was to make, which is refused now.
        if codes[-1] in (0, 2):
            break
    expected, left = contents(folder / "whole"), contents(folder / "stopped")
    other = sorted(key for key in expected.keys() | left.keys() if expected.get(key) != left.get(key))
    hidden = [str(p.relative_to(folder)) for p in (folder / "stopped").rglob(".*")]
    print(json.dumps({"codes": codes, "other": other, "hidden": hidden}))


if __name__ == "__main__":
    main(sys.argv[1], signal.Signals[sys.argv[2]], Path(sys.argv[3]))
