"""Pictures and captions to a table of tokens: each picture through the image tokenizer once, for good.

The work lies in parts beside the output (`.NAME.parts`), some thousand records each, with a manifest that says which
source, tokenizers and settings they belong to. A run that was stopped or killed at any moment keeps its whole parts and
does the others again, so that it ends with the table an unstopped run writes; other parts are refused.

Letters: N pictures of H rows and W columns.
"""

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import nn

from smalti.data.pair_sources import PairSource, open_pairs
from smalti.data.pairs import Record, decode_picture
from smalti.data.parquet_files import ParquetReader
from smalti.data.parts import claim, do_parts, parts_folder, remove_leftovers
from smalti.data.tokens import SCHEMA, token_rows, write_token_table
from smalti.devices import AUTO, choose_device
from smalti.documents import parse_json
from smalti.errors import InputError
from smalti.files import lock_of, locked, made_again, refuse_existing
from smalti.image_files import MAX_SIDE
from smalti.progress import stage
from smalti.text_tokenizer import TextTokenizer
from smalti.weights import weights_sha256

ON_ERROR = ("stop", "skip")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How pairs become tokens. Raises ValueError for what cannot be."""

    size: tuple[int, int] | None = None
    """Rows and columns to which pictures are cropped (in the middle) and resized; None: as they are, all alike."""
    max_text_length: int | None = None
    """Captions are cut to so many tokens; None: not at all."""
    on_error: str = "stop"
    """What to do about a broken record: "stop", or "skip" and report it."""
    batch_size: int = 256
    """Pictures encoded at a time."""
    records_per_part: int = 512
    """What is lost at most when a run is killed: minutes with the large networks, which encode one or two a second."""
    workers: int = 0
    """Processes that share the parts; 0: this one does them."""
    device: str = AUTO
    """Where pictures are encoded, as `smalti.devices` knows them; each process moves its own image tokenizer there."""
    ray: bool = False
    """Have actors of a Ray cluster share them instead, as many as `workers`."""

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error is {self.on_error!r}; choose one of {', '.join(ON_ERROR)}.")
        if self.size is not None and not 1 <= min(self.size) <= max(self.size) <= MAX_SIDE:
            raise ValueError(f"size is {self.size}; expected rows and columns of 1 to {MAX_SIDE}.")
        for name, value, least in (
            ("max_text_length", self.max_text_length, 0),
            ("batch_size", self.batch_size, 1),
            ("records_per_part", self.records_per_part, 1),
            ("workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")


class TokenizeReport(NamedTuple):
    """What became of the records."""

    num_rows: int
    skipped: list[tuple[str, str]]
    """Name and fault of every broken record."""
    num_cut: int
    """Captions that were longer than `max_text_length`."""
    time: "TimeSpent"
    num_empty: int = 0
    """Captions that are empty."""


class TimeSpent(NamedTuple):
    """Where the seconds went, over all parts, those of earlier starts of the run included."""

    reading_s: float
    """Processor time that unpacking, cropping and captions took."""
    processor_s: float
    """Processor time in all: the rest is the network."""
    available_s: float
    """Seconds by the clock times the threads that could work."""

    def __str__(self) -> str:
        busy = self.processor_s / max(self.available_s, 1e-9)
        reading = self.reading_s / max(self.processor_s, 1e-9)
        return (
            f"processors {busy:.0%} busy, {1 - reading:.0%} of that in the network and {reading:.0%} reading pictures"
        )


def tokenize_pairs(
    pairs: Path | str,
    tokens: Path | str,
    image_tokenizer: nn.Module,
    text_tokenizer: TextTokenizer | None,
    config: TokenizeConfig = TokenizeConfig(),
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    delimiter: str | None = None,
    force: bool = False,
    show_progress: bool = True,
) -> TokenizeReport:
    """Writes the token table of what `open_pairs` finds at `pairs`, and goes on where a run was stopped.

    Without a text tokenizer captions are kept as text alone. The table's metadata say which tokenizers made it
    (`tokenizer_metadata`). Broken are records without a picture or caption, pictures that cannot be read or have
    another size than the first, and captions with words outside the vocabulary. Raises InputError naming the first of
    them unless they are skipped, or if none is left; if `tokens` exists, unless `force`; and if parts of another run
    lie there, naming what differs.
    """
    tokens, pairs = Path(tokens), Path(pairs)
    if config.ray:  # whose actors are somewhere else
        tokens, pairs = tokens.absolute(), pairs.absolute()
    folder = parts_folder(tokens)
    if not force:
        remove_leftovers(tokens)
    refuse_existing([tokens], force=force)
    source = open_pairs(pairs, image_column=image_column, caption_column=caption_column, delimiter=delimiter)
    metadata = tokenizer_metadata(image_tokenizer, text_tokenizer)
    with locked(lock_of(folder), tokens):
        claim(folder, _manifest(source, config, metadata), partial(_require_same, tokens=tokens), _check, force=force)
        shape = config.size or _first_size(source)
        job = _Job(source, folder, image_tokenizer, text_tokenizer, config, shape)
        num_parts = -(-len(source) // config.records_per_part)
        missing = [part for part in range(num_parts) if not job.file(part).exists()]
        done = min(len(source), (num_parts - len(missing)) * config.records_per_part)
        with stage(
            f"tokenizing {Path(pairs).name}", len(source), unit="picture", completed=done, show=show_progress
        ) as progress:
            for _ in do_parts(job, missing, workers=config.workers, ray=config.ray):
                progress.update(min(len(source), progress.completed + config.records_per_part))
        report = _join([job.file(part) for part in range(num_parts)], tokens, metadata, config.on_error, force=force)
        shutil.rmtree(folder)
        return report


def tokenizer_metadata(image_tokenizer: Any, text_tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """What must agree for two token tables to be joined, or for a model to go with a table."""
    of_pictures = {
        "codebook_size": image_tokenizer.config.codebook_size,
        "grid": list(image_tokenizer.config.grid),
        "image_tokenizer_sha256": weights_sha256(image_tokenizer),
    }
    if text_tokenizer is None:
        return of_pictures
    return {
        **of_pictures,
        "text_vocab_size": text_tokenizer.vocab_size,
        "text_tokenizer_sha256": hashlib.sha256(text_tokenizer.to_json().encode()).hexdigest(),
    }


def require_tokenizers(found: dict[str, Any], wanted: dict[str, Any], where: Path | str, mend: str) -> None:
    """Raises InputError naming both tokenizers if a table's metadata are of others than those of `wanted`."""
    different = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if different:
        both = "; ".join(f"{name} {found.get(name)}, now {wanted.get(name)}" for name in different)
        raise InputError(f"{where} was made with another tokenizer: {both}. {mend}")


# Parts -----------------------------------------------------------------------------------------------------------


_COUNTED: tuple[str, ...] = ("num_cut", "num_empty")


class _Job(NamedTuple):
    """What a process needs to do a part."""

    source: PairSource
    folder: Path
    image_tokenizer: Any
    text_tokenizer: TextTokenizer | None
    config: TokenizeConfig
    shape: tuple[int, int]

    def file(self, part: int) -> Path:
        return self.folder / f"{part:08d}.parquet"

    def do(self, part: int) -> None:
        """Writes the table of one part; in its metadata, what was skipped and cut."""
        config = self.config
        counts: dict[str, Any] = {"skipped": [], **dict.fromkeys(_COUNTED, 0), **dict.fromkeys(TimeSpent._fields, 0.0)}
        start = part * config.records_per_part
        records = islice(self.source.records(start), config.records_per_part)

        def read() -> Iterator[list[_Row]]:
            started_at = time.thread_time()
            while batch := list(islice(records, config.batch_size)):
                rows = [row for record in batch if (row := self._read(record, counts)) is not None]
                counts["reading_s"] = time.thread_time() - started_at
                yield rows

        def batches() -> Iterator[pa.RecordBatch]:
            started_at, processor_before = time.perf_counter(), time.process_time()
            for rows in one_ahead(read()):
                if rows:
                    yield self._encode(rows)
            counts["processor_s"] = time.process_time() - processor_before
            counts["available_s"] = (time.perf_counter() - started_at) * torch.get_num_threads()

        write_token_table(self.file(part), batches(), counts, force=True)

    def _read(self, record: Record, counts: dict[str, Any]) -> "_Row | None":
        try:
            row = self._row(record)
        except InputError as error:
            if self.config.on_error == "stop":
                raise InputError(f"{record.name}: {error}") from error
            counts["skipped"].append((record.name, str(error)))
            return None
        counts["num_cut"] += row.was_cut
        counts["num_empty"] += not row.caption.strip()
        return row

    def _row(self, record: Record) -> "_Row":
        if record.fault is not None:
            raise InputError(record.fault)
        for what, value in (("picture", record.encoded), ("caption", record.caption), ("key", record.key)):
            if value is None:
                raise InputError(f"there is no {what}, or none that can be read; every record needs one")
        assert record.key is not None and record.caption is not None and record.encoded is not None
        picture = decode_picture(record.encoded)
        if self.config.size is not None:
            picture = fit(picture, self.config.size)
        if picture.shape[:2] != self.shape:
            rows, columns = self.shape
            raise InputError(
                f"the picture is {picture.shape[0]}×{picture.shape[1]}, the first {rows}×{columns} (rows × columns); "
                "give a size to which all are cropped and resized"
            )
        numbers, was_cut = self._numbers(record.caption)
        return _Row(record.key, record.caption, picture, numbers, was_cut)

    def _numbers(self, caption: str) -> tuple[list[int], bool]:
        if self.text_tokenizer is None:
            return [], False
        if self.config.max_text_length is None:
            return self.text_tokenizer.encode(caption), False
        return self.text_tokenizer.encode_within(caption, self.config.max_text_length)

    def _encode(self, rows: list["_Row"]) -> pa.RecordBatch:
        device = choose_device(self.config.device)
        image_tokenizer = self.image_tokenizer.to(device)  # once; behind that nothing moves
        pictures = torch.from_numpy(np.stack([row.picture for row in rows])).to(device)  # (N, H, W, 3)
        with torch.inference_mode():
            codes = image_tokenizer.encode_images(pictures.permute(0, 3, 1, 2).float() / 255).cpu()
        words, texts = [row.numbers for row in rows], [row.caption for row in rows]
        return token_rows([row.key for row in rows], codes.flatten(1).numpy(), words, texts)


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while one is in use, a thread makes the next."""
    iterator = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, iterator, end)
            yield item


class _Row(NamedTuple):
    key: str
    caption: str
    picture: UInt8[np.ndarray, "H W 3"]
    numbers: list[int]
    was_cut: bool


def fit(picture: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The largest middle part of a picture with the proportions of `size` (rows, columns), resized to it as image
    tokenizers are trained (`picture_sets.py`): bicubic."""
    height, width = picture.shape[:2]
    rows, columns = size
    scale = min(height / rows, width / columns)
    top, left = (height - rows * scale) / 2, (width - columns * scale) / 2
    box = (left, top, left + columns * scale, top + rows * scale)
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC, box=box))


def _first_size(source: PairSource) -> tuple[int, int]:
    """Rows and columns of the first picture that can be read; broken ones before it come up in their turn."""
    for record in source.records():
        try:
            if record.encoded is not None:
                height, width, _ = decode_picture(record.encoded).shape
                return height, width
        except InputError:
            continue
    return 0, 0


# Manifest and result ---------------------------------------------------------------------------------------------


def _manifest(source: PairSource, config: TokenizeConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    settings = asdict(config)
    for name in ("workers", "ray", "device", "batch_size", "on_error"):  # these change nothing in a part that is whole
        del settings[name]
    return {"source": source.fingerprint, "settings": settings, "tokenizers": metadata}


def _require_same(found: dict[str, Any], manifest: dict[str, Any], tokens: Path) -> None:
    mend = "Resume it with the same, or start anew with --force."
    tokenizers = found.get("tokenizers")
    if isinstance(tokenizers, dict):
        require_tokenizers(tokenizers, manifest["tokenizers"], f"the unfinished {tokens}", mend)
    what = "settings" if found.get("source") == manifest["source"] else "pictures and captions"
    raise InputError(f"the unfinished {tokens} was begun with other {what}. {mend}")


def _check(part: Path) -> None:
    """Raises InputError naming a part that is damaged anywhere: better now than when all others are done."""
    with made_again(part):
        reader = ParquetReader(part)
        for _ in reader.batches(SCHEMA.names, rows_at_once=65_536):
            pass
    _counts(reader)


def _counts(reader: ParquetReader) -> dict[str, Any]:
    """What was skipped and cut in a part. Raises InputError naming a part that is damaged."""
    part = reader.path
    mend = f"remove {part} to have this part made again, or start anew with --force"
    counts = parse_json(reader.metadata(b"smalti") or b"", f"what {part} notes of itself", mend)
    skipped = counts.get("skipped")
    numbers = [counts.get(name, 0) for name in (*_COUNTED, *TimeSpent._fields)]  # parts of an earlier version lack some
    whole = isinstance(skipped, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in skipped)
    if not whole or not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"what {part} notes of itself is damaged; {mend}.")
    return counts


def _join(parts: list[Path], tokens: Path, metadata: dict[str, Any], on_error: str, *, force: bool) -> TokenizeReport:
    skipped: list[tuple[str, str]] = []
    counted, seconds = dict.fromkeys(_COUNTED, 0), dict.fromkeys(TimeSpent._fields, 0.0)
    readers = [ParquetReader(part) for part in parts]
    for reader in readers:
        counts = _counts(reader)
        skipped += [(name, fault) for name, fault in counts["skipped"]]
        for found in (counted, seconds):
            for name in found:
                found[name] += counts.get(name, 0)
    if skipped and (on_error == "stop" or not sum(map(len, readers))):
        first = f"the first: {skipped[0][0]}: {skipped[0][1]}"
        raise InputError(f"there is no table {tokens}: {len(skipped)} broken records, {first}.")
    num_rows = write_token_table(tokens, _batches(readers), metadata, force=force)
    return TokenizeReport(num_rows, skipped, time=TimeSpent(**seconds), **counted)


def _batches(readers: Iterable[ParquetReader]) -> Iterator[pa.RecordBatch]:
    for reader in readers:
        yield from reader.batches(SCHEMA.names, rows_at_once=65_536)
