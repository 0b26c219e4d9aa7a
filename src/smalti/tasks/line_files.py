"""Scoring and completing whole files of lines: in pieces, in order, with progress, and going on where a run stopped.

What is done lies in parts beside the output (`.NAME.part`), a piece of lines at a time. A run that was stopped or
killed at any moment keeps the whole pieces and does the others again, so it ends with the files that an unstopped run
writes. The parts say which input, bundle and settings they belong to; others are refused.

Letters: n lines of a piece, L codes of a line.
"""

import csv
import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float64, Int64
from matplotlib.figure import Figure

from smalti.arrays import read_npz
from smalti.data.lines import LineFormat, Lines, read_lines, table_lines, write_lines
from smalti.data.tokens import TokenTable
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.file_kinds import refuse_pipe
from smalti.files import lock_of, locked, new_file, refuse_existing, write_json
from smalti.progress import stage
from smalti.tasks.lines import CompleteConfig, LineModel

SCORE_FILES = ("lines.csv", "positions.csv", "positions.png", "summary.json")
LIKELIHOOD_SUFFIX = ".log_probs.csv"
"""Behind the name of a file of completions: each line's own log-likelihood."""
ADVICE = (
    "Mend the line, or set bad lines aside (smalti data import-lines --allow-short --skip-bad N) and give the table."
)
LINES_PER_PIECE = 1024
_PARTS = ".part"
_JOB, _WRITTEN = "job.json", "written.json"
"""In a folder of parts: what they are of; the same, once the results are written and the parts are to go."""


class LineFileScore(NamedTuple):
    """What a file of lines costs in all."""

    num_lines: int
    num_tokens: int
    nats_per_token: float
    standard_error: float
    """Of `nats_per_token`, from the spread between lines, which are the independent draws."""
    bits_per_token: float
    perplexity: float


# Pieces --------------------------------------------------------------------------------------------------------


def _pieces(path: Path, line_format: LineFormat, first_piece: int) -> Iterator[Lines]:
    """The file's lines, LINES_PER_PIECE at a time, from a piece on."""
    skip = first_piece * LINES_PER_PIECE
    waiting: list[Lines] = []
    num_waiting = 0
    for block in _read(path, line_format):
        here = min(skip, len(block.lengths))
        skip -= here
        waiting.append(_part(block, here, len(block.lengths)))
        num_waiting += len(block.lengths) - here
        if num_waiting >= LINES_PER_PIECE:
            joined = _joined(waiting)
            whole = num_waiting // LINES_PER_PIECE * LINES_PER_PIECE
            for start in range(0, whole, LINES_PER_PIECE):
                yield _part(joined, start, start + LINES_PER_PIECE)
            waiting, num_waiting = [_part(joined, whole, num_waiting)], num_waiting - whole
    if num_waiting:
        yield _joined(waiting)


def _read(path: Path, line_format: LineFormat, *, warns: bool = False) -> Iterator[Lines]:
    """The lines of a text file, or of a token table, which is known by its name."""
    if path.suffix != ".parquet":
        yield from read_lines(path, line_format, advice=ADVICE, warns=warns)
        return
    for lines in table_lines(TokenTable.open(path, image_vocab_size=line_format.vocab_size)):
        if line_format.length is not None and (longest := int(lines.lengths.max(initial=0))) > line_format.length:
            raise InputError(f"{path} has lines of {longest} codes, expected at most {line_format.length}.")
        yield lines


def _part(lines: Lines, start: int, end: int) -> Lines:
    ends = np.concatenate([[0], np.cumsum(lines.lengths)])
    return Lines(lines.tags[start:end], lines.codes[ends[start] : ends[end]], lines.lengths[start:end])


def _joined(parts: list[Lines]) -> Lines:
    tags = pa.concat_arrays([part.tags for part in parts])
    codes, lengths = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    return Lines(tags, codes, lengths)


def _padded(lines: Lines, width: int) -> Int64[np.ndarray, "n L"]:
    codes = lines.padded()
    return np.pad(codes, ((0, 0), (0, width - codes.shape[1])), constant_values=-1)


def _size(path: Path, line_format: LineFormat, show_progress: bool) -> tuple[int, int]:
    """How many lines and codes there are. All are read: a bad one is better found before the work than in it."""
    num_lines = num_codes = 0
    with stage(f"checking {path.name}", unit="line", show=show_progress) as progress:
        for block in _read(path, line_format, warns=True):
            num_lines, num_codes = num_lines + len(block.lengths), num_codes + len(block.codes)
            progress.update(num_lines)
    return num_lines, num_codes


_SCORES = {"line_nats", "lengths", "place_sums", "place_squares"}
_COMPLETED = {"codes", "log_probs", "lengths"}
"""The arrays of a part, of scores and of completions."""


@dataclass
class _Parts:
    """A folder of finished pieces, each one file that appears whole."""

    folder: Path

    @classmethod
    def open(cls, name: Path, job: dict[str, Any], last: Path, others: Sequence[Path], *, force: bool) -> "_Parts":
        """The parts of a job, perhaps those that an earlier run left. `last` is the result that is written last, the
        `others` may be there already if a run was stopped among them.

        Raises InputError if results exist, or the parts are another job's, unless `force`, which drops both.
        """
        folder = _folder_of_parts(name)
        path = folder / _JOB
        refuse_existing([last], force=force or _is_written(name, last))
        refuse_existing([] if path.exists() else others, force=force)
        try:
            if path.exists():
                _require_job(path, job)
            for number in range(cls(folder).num_done):
                cls(folder).part(number)
        except InputError:
            if not force:
                raise
            shutil.rmtree(folder)
        if not path.exists():
            write_json(path, job)
        return cls(folder)

    @property
    def num_done(self) -> int:
        number = 0
        while self.path(number).exists():
            number += 1
        return number

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npz"

    def write(self, number: int, **arrays: np.ndarray) -> None:
        with new_file(self.path(number), force=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **cast(Any, arrays))

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        yield from map(self.part, range(self.num_done))

    def part(self, number: int) -> dict[str, np.ndarray]:
        """Raises InputError naming a part that is damaged."""
        mend = "remove it to have this part made again, or start anew with --force"
        arrays = read_npz(self.path(number), mend)
        lengths = arrays.get("lengths")
        whole = lengths is not None and lengths.ndim == 1 and len(lengths) <= LINES_PER_PIECE
        if not whole or not (arrays.keys() >= _SCORES or arrays.keys() >= _COMPLETED):
            raise InputError(f"{self.path(number)} is damaged: it lacks arrays of a part; {mend}.")
        return arrays

    def remove(self) -> None:
        """Behind the last result. Stopped in between, the next run removes the rest."""
        (self.folder / _JOB).replace(self.folder / _WRITTEN)
        _remove_written(self.folder)


def _remove_written(folder: Path) -> None:
    """Removes a folder of parts whose results are all written: what says so goes last."""
    if not folder.is_dir() or not ((folder / _WRITTEN).exists() or not any(folder.iterdir())):
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _WRITTEN):
        path.unlink(missing_ok=True)
    folder.rmdir()


def _is_written(name: Path, last: Path) -> bool:
    """Whether a run was stopped behind its last result, before its parts were removed: then it may end again."""
    parts = sorted(_folder_of_parts(name).glob("*.npz"))
    return bool(parts) and last.exists() and last.stat().st_mtime_ns >= parts[-1].stat().st_mtime_ns


def _folder_of_parts(name: Path) -> Path:
    return name.with_name(f".{name.name}{_PARTS}")


def _require_job(path: Path, job: dict[str, Any]) -> None:
    found = read_json(path, f"remove the folder {path.parent}, or start anew with --force")
    differing = [key for key in job if found.get(key) != job[key]]
    if differing:
        raise InputError(
            f"{path.parent} holds an unfinished run with another {differing[0]}: resume it with the same one, or "
            "--force to start anew."
        )


def _job(path: Path, model: LineModel, **settings: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"input": digest, "bundle": model.weights_sha256, "lines_per_piece": LINES_PER_PIECE, **settings}


# Scoring -------------------------------------------------------------------------------------------------------


def score_file(
    model: LineModel,
    path: Path | str,
    output: Path | str,
    *,
    batch_size: int = 256,
    force: bool = False,
    show_progress: bool = False,
) -> LineFileScore:
    """What the lines of a file cost, each and together; lines may be shorter than the model's.

    The folder `output` gets `lines.csv` (tag, tokens, nats, nats per token of each line, in the file's order),
    `positions.csv` and `positions.png` (nats per token by position) and `summary.json`. Raises InputError for a line
    that does not fit the model, if the results exist and `force` is not set, or for an unfinished run of another job.
    """
    path, output = _existing(path), Path(output)
    last = output / SCORE_FILES[-1]
    if output.is_file():
        raise InputError(f"{output} is a file; scores go to a folder: give another name.")
    _remove_written(_folder_of_parts(output / "scores"))
    refuse_existing([last], force=force or _is_written(output / "scores", last))
    with locked(lock_of(_folder_of_parts(output / "scores")), output):
        return _score_file(model, path, output, batch_size, force, show_progress)


def _score_file(
    model: LineModel, path: Path, output: Path, batch_size: int, force: bool, show_progress: bool
) -> LineFileScore:
    *others, last = (output / name for name in SCORE_FILES)
    line_format = LineFormat(vocab_size=model.vocab_size, length=model.length, allow_short=True)
    num_lines, num_codes = _size(path, line_format, show_progress)
    if not num_codes:
        raise InputError(f"{path} has no codes to score.")
    parts = _Parts.open(output / "scores", _job(path, model), last, others, force=force)
    first = parts.num_done
    done = min(num_lines, first * LINES_PER_PIECE)
    with stage("scoring", num_lines, unit="line", completed=done, show=show_progress) as progress:
        for number, lines in enumerate(_pieces(path, line_format, first), first):
            codes = torch.from_numpy(_padded(lines, int(lines.lengths.max(initial=0))))
            nll = model.score(codes, torch.from_numpy(lines.lengths), batch_size=batch_size).numpy()
            parts.write(
                number,
                line_nats=nll.sum(1),
                lengths=lines.lengths,
                place_sums=_by_place(nll, model.length),
                place_squares=_by_place(nll**2, model.length),
            )
            progress.advance(len(lines.lengths))
    found = list(parts.read())
    nats, lengths = (np.concatenate([piece[name] for piece in found]) for name in ("line_nats", "lengths"))
    score = _file_score(nats, lengths)
    _write_lines_csv(output / "lines.csv", path, line_format, nats, lengths)
    _write_places(output, found, lengths, model.length)
    content = {**score._asdict(), "file": str(path), "bundle": model.name, "weights_sha256": model.weights_sha256}
    last_again = force or _is_written(output / "scores", last)
    write_json(output / "summary.json", _without_nan(content), force=last_again)
    parts.remove()
    return score


def _existing(path: Path | str) -> Path:
    refuse_pipe(path)
    if not Path(path).is_file():
        raise InputError(
            f"no such file: {path}. Expected lines as text, plain, gzip or zstd, or a token table (.parquet)."
        )
    return Path(path)


def _by_place(values: Float64[np.ndarray, "n L"], length: int) -> Float64[np.ndarray, " length"]:
    sums = values.sum(0)
    return np.pad(sums, (0, length - len(sums)))


def _file_score(nats: Float64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]) -> LineFileScore:
    """Total nats over total tokens, with the standard error of a ratio of sums over independent lines."""
    num_lines, num_tokens = len(nats), int(lengths.sum())
    mean = float(nats.sum()) / num_tokens if num_tokens else math.nan
    error = math.nan
    if num_lines > 1 and num_tokens:
        residual = nats - mean * lengths
        error = math.sqrt(float((residual**2).sum()) * num_lines / (num_lines - 1)) / num_tokens
    return LineFileScore(num_lines, num_tokens, mean, error, mean / math.log(2), math.exp(mean))


def _without_nan(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in content.items()}


def _write_lines_csv(
    target: Path,
    path: Path,
    line_format: LineFormat,
    nats: Float64[np.ndarray, " n"],
    lengths: Int64[np.ndarray, " n"],
) -> None:
    with new_file(target, force=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("tag", "num_tokens", "nats", "nats_per_token"))
        start = 0
        for lines in _read(path, line_format):
            here = slice(start, start + len(lines.lengths))
            for tag, length, total in zip(
                lines.tags.to_pylist(), lengths[here].tolist(), nats[here].tolist(), strict=True
            ):
                writer.writerow((tag, length, f"{total:.6f}", f"{total / length:.6f}" if length else ""))
            start = here.stop


def _write_places(
    output: Path, found: list[dict[str, np.ndarray]], lengths: Int64[np.ndarray, " n"], length: int
) -> None:
    """The curve by position; its error bars are standard errors over lines."""
    counts = len(lengths) - np.cumsum(np.bincount(lengths, minlength=length + 1))[:length]
    sums, squares = (sum(piece[name] for piece in found) for name in ("place_sums", "place_squares"))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
        errors = np.sqrt(np.maximum(squares / counts - means**2, 0) / (counts - 1))
    used = np.flatnonzero(counts)
    with new_file(output / "positions.csv", force=True) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("position", "num_lines", "nats_per_token", "standard_error"))
        for place in used.tolist():
            error = f"{errors[place]:.6f}" if counts[place] > 1 else ""
            writer.writerow((place, int(counts[place]), f"{means[place]:.6f}", error))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(used, means[used], yerr=np.nan_to_num(errors[used]), fmt="o-", markersize=3, capsize=2)
    axes.set(xlabel="position in the line", ylabel="nats per token", title=f"{len(lengths):,} lines")
    axes.grid(alpha=0.3)
    with new_file(output / "positions.png", force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


# Completing ----------------------------------------------------------------------------------------------------


def complete_file(
    model: LineModel,
    path: Path | str,
    output: Path | str,
    config: CompleteConfig = CompleteConfig(),  # noqa: B008 (frozen)
    *,
    batch_size: int = 256,
    force: bool = False,
    show_progress: bool = False,
) -> int:
    """Completes every prefix of a file; returns how many lines there are. The output has the same tags in the same
    order, each line beginning with its prefix as it was given; `OUTPUT.log_probs.csv` has each line's own
    log-likelihood: the model's ln p of what was added, given the prefix.

    Raises InputError for a prefix that does not fit the model, if an output exists and `force` is not set, or for an
    unfinished run of another job.
    """
    path, output = _existing(path), Path(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder; completed lines go to a text file: give the name of one.")
    if output.exists() and output.samefile(path):
        raise InputError(f"{output} holds the prefixes themselves; give another name for the completed lines.")
    _remove_written(_folder_of_parts(output))
    refuse_existing([output], force=force or _is_written(output, output))
    with locked(lock_of(_folder_of_parts(output)), output):
        return _complete_file(model, path, output, config, batch_size, force, show_progress)


def _complete_file(
    model: LineModel,
    path: Path,
    output: Path,
    config: CompleteConfig,
    batch_size: int,
    force: bool,
    show_progress: bool,
) -> int:
    side = output.with_name(output.name + LIKELIHOOD_SUFFIX)
    line_format = LineFormat(vocab_size=model.vocab_size, length=model.length, allow_short=True)
    num_lines, _ = _size(path, line_format, show_progress)
    if not num_lines:
        raise InputError(f"{path} has no prefixes to complete.")
    parts = _Parts.open(output, _job(path, model, settings=asdict(config)), output, [side], force=force)
    first = parts.num_done
    done = min(num_lines, first * LINES_PER_PIECE)
    with stage("completing", num_lines, unit="line", completed=done, show=show_progress) as progress:
        for number, lines in enumerate(_pieces(path, line_format, first), first):
            prefixes = [torch.from_numpy(codes) for codes in np.split(lines.codes, np.cumsum(lines.lengths)[:-1])]
            found = model.complete(prefixes, config, first_line=number * LINES_PER_PIECE, batch_size=batch_size)
            parts.write(number, codes=found.codes.numpy(), log_probs=found.log_probs.numpy(), lengths=lines.lengths)
            progress.advance(len(prefixes))
    _write_log_probs(side, path, line_format, parts, model.length)
    again = force or _is_written(output, output)
    write_lines(output, _completed_lines(path, line_format, parts, model.length), force=again)
    parts.remove()
    return num_lines


def _completed_lines(path: Path, line_format: LineFormat, parts: _Parts, length: int) -> Iterator[Lines]:
    for lines, piece in zip(_pieces(path, line_format, 0), parts.read(), strict=True):
        yield Lines(lines.tags, piece["codes"].reshape(-1), np.full(len(lines.lengths), length))


def _write_log_probs(target: Path, path: Path, line_format: LineFormat, parts: _Parts, length: int) -> None:
    with new_file(target, force=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("tag", "num_given", "num_added", "log_prob", "nats_per_added_token"))
        for lines, piece in zip(_pieces(path, line_format, 0), parts.read(), strict=True):
            rows = zip(lines.tags.to_pylist(), lines.lengths.tolist(), piece["log_probs"].tolist(), strict=True)
            for tag, given, log_prob in rows:
                added = length - given
                writer.writerow((tag, given, added, f"{log_prob:.6f}", f"{-log_prob / added:.6f}" if added else ""))
