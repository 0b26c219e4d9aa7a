"""Pictures of a file of captions, drawn as codes into a token table, in parts that resume: by this process, by others,
or by actors of a Ray cluster with an engine each.

Row i is drawn from the seed SEED + i by one executor, so the table does not depend on who drew what, nor on how often
it was interrupted. `smalti tokenize` writes the same schema, so that a model can be trained on what another one drew.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from smalti.bundle import Bundle
from smalti.data.parquet_files import ParquetReader
from smalti.data.parts import claim, do_parts, parts_folder, remove_leftovers
from smalti.data.tokenize_pairs import tokenizer_metadata
from smalti.data.tokens import SCHEMA, token_rows, write_token_table
from smalti.engine.generate import job_executor
from smalti.errors import InputError
from smalti.files import lock_of, locked, made_again, refuse_existing
from smalti.progress import stage
from smalti.tasks.features import captions_face


@dataclass(frozen=True, kw_only=True)
class DrawTableConfig:
    """How a table of pictures is drawn. Raises ValueError for a number out of range."""

    seed: int = 0
    """Row i is drawn from the seed `seed` + i."""
    batch_size: int = 64
    """Pictures drawn together; a picture does not depend on it."""
    rows_per_part: int = 256
    """What is lost at most when a run is killed."""
    workers: int = 0
    """Processes that share the parts; 0: this one does them."""
    ray: bool = False
    """Have actors of a Ray cluster share them instead, as many as `workers`."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("rows_per_part", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def draw_table(
    bundle: str,
    captions: Sequence[str],
    output: Path | str,
    config: DrawTableConfig = DrawTableConfig(),
    *,
    text_encoder: str | None = None,
    force: bool = False,
    show_progress: bool = True,
    **sampling: Any,
) -> int:
    """Writes a token table with a picture of each caption, and goes on where a run was stopped; returns the number of
    rows. `sampling` are settings of `SampleConfig`.

    Keys are the captions' numbers, counted from 0, in nine digits. Raises InputError if there are no captions or one is
    not in the bundle's words, if `output` exists, unless `force`, and if parts of another run lie there.
    """
    output = Path(output).absolute()
    if not captions:
        raise InputError("there are no captions to draw.")
    if not force:
        remove_leftovers(output)
    refuse_existing([output], force=force)
    face = captions_face(Bundle.load(bundle), text_encoder)
    face.sample_config(face.bundle.sampling.picture, sampling)
    executor = job_executor(face.model, face.layout, len(captions), config.batch_size)
    folder = parts_folder(output)
    drawn = {"seed": config.seed, "rows_per_part": config.rows_per_part, "executor": executor, "sampling": sampling}
    digest = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    manifest = {"bundle": face.bundle.weights_sha256, "captions": digest, "settings": drawn}
    with locked(lock_of(folder), output):
        claim(folder, manifest, partial(_require_same, output=output), _check, force=force)
        where = bundle if not Path(bundle).exists() else str(Path(bundle).absolute())
        ours = None if config.workers or config.ray else face
        job = _Job(where, text_encoder, list(captions), folder, config, executor, sampling, ours)
        num_parts = -(-len(captions) // config.rows_per_part)
        missing = [part for part in range(num_parts) if not job.file(part).exists()]
        done = min(len(captions), (num_parts - len(missing)) * config.rows_per_part)
        with stage("drawing", len(captions), unit="picture", completed=done, show=show_progress) as progress:
            for _ in do_parts(job, missing, workers=config.workers, ray=config.ray):
                progress.update(min(len(captions), progress.completed + config.rows_per_part))
        words: Any = face.bundle.text_tokenizer
        metadata = tokenizer_metadata(face.bundle.image_tokenizer, words)
        readers = [ParquetReader(job.file(part)) for part in range(num_parts)]
        num_rows = write_token_table(output, _rows(readers), metadata, force=force)
        shutil.rmtree(folder)
    return num_rows


@dataclass
class _Job:
    """What a process needs to draw a part; it loads the bundle when it draws the first."""

    bundle: str
    text_encoder: str | None
    captions: list[str]
    folder: Path
    config: DrawTableConfig
    executor: str
    sampling: dict[str, Any]
    face: Any = field(default=None, repr=False)

    def file(self, part: int) -> Path:
        return self.folder / f"{part:08d}.parquet"

    def do(self, part: int) -> None:
        if self.face is None:
            self.face = captions_face(Bundle.load(self.bundle), self.text_encoder)
        first = part * self.config.rows_per_part
        captions = self.captions[first : first + self.config.rows_per_part]
        rows = range(first, first + len(captions))
        codes = self.face.generate_codes(
            captions,
            seed=[self.config.seed + row for row in rows],
            batch_size=self.config.batch_size,
            executor=self.executor,
            **self.sampling,
        )
        words = self.face.bundle.text_tokenizer
        ids = [[] if words is None else words.encode(caption) for caption in captions]
        batch = token_rows([f"{row:09d}" for row in rows], codes.flatten(1).numpy(), ids, captions)
        write_token_table(self.file(part), [batch], {}, force=True)


def _require_same(found: dict[str, Any], manifest: dict[str, Any], output: Path) -> None:
    different = [name for name in manifest if found.get(name) != manifest[name]]
    raise InputError(
        f"the unfinished {output} was begun with other {', '.join(different) or 'settings'}. Resume it with the same, "
        "or start anew with --force."
    )


def _check(part: Path) -> None:
    with made_again(part):
        for _ in ParquetReader(part).batches(SCHEMA.names, rows_at_once=65_536):
            pass


def _rows(readers: Sequence[ParquetReader]) -> Iterator[pa.RecordBatch]:
    for reader in readers:
        yield from reader.batches(SCHEMA.names, rows_at_once=65_536)
