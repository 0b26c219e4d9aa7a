"""Tables of scenes: pictures and captions, training ones without what is kept unseen."""

import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from smalti.data.parquet_files import ParquetReader, parquet_writer
from smalti.data.scenes import UNSEEN, Scene, draw_scene, parse_caption, render, unseen_kinds, write_caption
from smalti.errors import InputError
from smalti.files import cause, new_file
from smalti.progress import Stage, stage

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """How many scenes are drawn, and from which seed (0 .. 2³²-1).

    Training and validation scenes show nothing of `UNSEEN`. Of the test scenes every other one does, of each kind in
    turn, and its caption says it.
    """

    num_train: int = 100_000
    num_validation: int = 2_000
    num_test: int = 2_000
    seed: int = 0
    complete_captions: float = 0.0
    """Share of the training captions that name every size, the background and the texture; of the others, and of
    validation and test, one in four leaves out a size and two in five something of the ground. What a caption leaves
    out is learned from what it says: that pink things are small, if no large one is pink."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is outside 0 .. {2**32 - 1}.")
        for name in ("num_train", "num_validation", "num_test"):
            if not 1 <= getattr(self, name) <= 10**8:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {10**8:,}.")
        if not 0 <= self.complete_captions <= 1:
            raise ValueError(f"complete_captions is {self.complete_captions}; expected a share in 0 .. 1.")


class Row(NamedTuple):
    """One pair of a table."""

    scene: Scene
    caption: str
    unseen: str | None
    """The kind of `UNSEEN` that it shows."""


def scene_row(split: str, index: int, seed: int, complete: float = 0.0) -> Row:
    """The pair number `index` of a split: a function of these alone. The picture does not depend on `complete`, the
    share of captions that leave nothing out."""
    stream = random.Random(f"smalti scenes {seed} {split} {index}")  # seeded by the text's SHA-512
    wanted = list(UNSEEN)[index // 2 % len(UNSEEN)] if split == "test" and index % 2 else None
    while True:
        scene = draw_scene(stream, wanted)
        caption = write_caption(scene, stream, complete)
        if wanted is None or unseen_kinds(parse_caption(caption)) == {wanted}:  # it says so
            return Row(scene, caption, wanted)


_METADATA_KEY = b"smalti.scenes"
_SCHEMA = pa.schema(
    [(name, pa.string() if name != "image" else pa.binary()) for name in ("__key__", "image", "caption", "kind")]
    + [("unseen", pa.string())]
)
_ROWS_PER_GROUP = 4096


def write_scenes(
    directory: Path | str,
    config: ScenesConfig = ScenesConfig(),
    *,
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Writes `train.parquet`, `validation.parquet` and `test.parquet` into `directory`; returns their paths.

    Columns: `__key__`, `image` (PNG), `caption`, `kind` (of KINDS), and `unseen`, the kind of what training lacks, or
    empty. A table that was made the same way is left alone. Raises InputError if a file is there that was made
    otherwise (unless `force`), or if writing fails.
    """
    directory = Path(directory)
    sizes = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
    paths = {split: directory / f"{split}.parquet" for split in sizes}
    complete = {"train": config.complete_captions}
    notes = {split: _note(split, num, config.seed, complete.get(split, 0.0)) for split, num in sizes.items()}
    missing = [split for split in sizes if force or not _is_made(paths[split], notes[split])]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split in missing:
            with stage(f"{split} scenes", sizes[split], unit="picture", show=show_progress) as progress:
                _write_table(paths[split], notes[split], progress)
    except OSError as error:
        raise InputError(
            f"cannot write the scenes to {directory}: {cause(error)}; choose a folder that can be written, with some "
            f"{max(1, sum(sizes.values()) // 2000)} MB free."
        ) from error
    return paths


def _note(split: str, num: int, seed: int, complete: float) -> dict[str, Any]:
    """How a table is made."""
    held_out = {kind: sorted(map(list, pairs)) for kind, pairs in UNSEEN.items()}
    note = {"version": 1, "split": split, "num": num, "seed": seed, "unseen": held_out}
    return note | ({"complete_captions": complete} if complete else {})


def _is_made(path: Path, note: Mapping[str, Any]) -> bool:
    """Whether the table is there, made as `note` says. Raises InputError if another file is in its place."""
    if not path.exists():
        return False
    try:
        found = json.loads((ParquetReader(path).schema.metadata or {}).get(_METADATA_KEY, b"null"))
    except (InputError, ValueError):
        found = None
    if found == note:
        return True
    raise InputError(f"{path} exists and was made otherwise; name another folder, or add --force to replace it.")


def _write_table(path: Path, note: Mapping[str, Any], progress: Stage) -> None:
    split, num, seed, complete = note["split"], note["num"], note["seed"], note.get("complete_captions", 0.0)
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(note).encode()})
    with new_file(path, force=True) as temporary, parquet_writer(temporary, schema) as writer:
        for start in range(0, num, _ROWS_PER_GROUP):
            indices = range(start, min(start + _ROWS_PER_GROUP, num))
            rows = [scene_row(split, index, seed, complete) for index in indices]
            columns = {
                "__key__": [f"{split}-{index:08d}" for index in indices],
                "image": [to_png(render(row.scene.content)) for row in rows],
                "caption": [row.caption for row in rows],
                "kind": [row.scene.claim.kind for row in rows],
                "unseen": [row.unseen or "" for row in rows],
            }
            writer.write_table(pa.table(columns, schema=schema))
            progress.update(indices.stop)


def to_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A picture's PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
