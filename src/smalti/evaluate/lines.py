"""Lines' nats per token of a model beside those of the baselines, and the report of a bundle of lines."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from smalti.data.line_rows import LineData, TableRows, find_vocab_size, rows_not_in
from smalti.data.tokens import TokenTable
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.evaluate.baselines import BaselineScore, score_baselines
from smalti.files import write_json, write_text
from smalti.progress import stage
from smalti.tasks.lines import LineModel


def report_lines(
    model: LineModel,
    data: LineData,
    folder: Path,
    *,
    baseline_rows: int,
    report_rows: int,
    preset: str,
    command: str,
    show_progress: bool,
) -> dict[str, Any]:
    """The figures of a bundle. `report.md` and `report.json` are written to the folder, unless they are there and of
    these weights."""
    path = folder / "report.json"
    if (figures := _figures_of(path, model)) is not None:
        return figures
    rows = score_with_baselines(
        model, data.train, data.validation, baseline_rows, report_rows, show_progress=show_progress
    )
    best = rows[-1]
    figures = {
        "validation nats per token": f"{best.nats_per_token:.4f} ± {best.standard_error:.4f}",
        "validation bits per token": f"{best.nats_per_token / math.log(2):.4f}",
        "validation perplexity": f"{math.exp(best.nats_per_token):.3f}",
        "training lines": len(data.train),
        "preset": preset,
    }
    content = {
        "command": command,
        "weights_sha256": model.weights_sha256,
        "figures": figures,
        "rows": [row._replace(standard_error=_or_none(row.standard_error))._asdict() for row in rows],
    }
    write_text(folder / "report.md", _markdown(rows, model, command), force=True)
    write_json(path, content, force=True)
    return figures


def _figures_of(path: Path, model: LineModel) -> dict[str, Any] | None:
    """The figures in a report of this model's weights; None if it is of others, or cannot be read: it is then made
    anew."""
    try:
        content = read_json(path, "it is made anew")
    except InputError:
        return None
    figures = content.get("figures")
    return figures if content.get("weights_sha256") == model.weights_sha256 and isinstance(figures, dict) else None


def _or_none(value: float) -> Any:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _markdown(rows: list[BaselineScore], model: LineModel, command: str) -> str:
    table = "\n".join(f"| {row.name} | {row.nats_per_token:.4f} | {error_text(row)} |" for row in rows)
    return (
        f"# {model.name}\n\n{model.model.num_parameters:,} parameters, lines of {model.length} codes below "
        f"{model.vocab_size}. Made by `{command}`.\n\nNats per token of the validation lines:\n\n"
        f"| | nats per token | standard error |\n|---|---|---|\n{table}\n"
    )


def error_text(row: BaselineScore) -> str:
    return f"{row.standard_error:.4f}" if math.isfinite(row.standard_error) else ""


def score_with_baselines(
    model: LineModel | None,
    train: TableRows,
    held_out: TokenTable,
    max_train_rows: int,
    max_held_out_rows: int,
    *,
    vocab_size: int | None = None,
    show_progress: bool = False,
) -> list[BaselineScore]:
    """The baselines' nats per token on the first held-out rows, and the model's as the last row if one is given.

    Baselines are fitted to at most `max_train_rows` rows, drawn at random. `vocab_size` is the model's if there is one.
    """
    size = model.vocab_size if model else vocab_size
    assert size is not None
    chosen = np.arange(len(train))
    if len(train) > max_train_rows:
        chosen = np.sort(np.random.default_rng(0).choice(len(train), max_train_rows, replace=False))
    codes = held_out.batch(np.arange(min(len(held_out), max_held_out_rows))).image_tokens
    with stage("measuring baselines", show=show_progress):
        rows = score_baselines(train.batch(chosen).image_tokens, codes, size)
    if model is None:
        return rows
    with stage("measuring the model", show=show_progress):
        return [*rows, _model_score(model, codes)]


def compare_with_baselines(
    model: LineModel | None,
    train: Path,
    held_out: Path,
    max_train_rows: int,
    max_held_out_rows: int,
    *,
    show_progress: bool = False,
) -> list[BaselineScore]:
    """`score_with_baselines` of two tables; training rows that are held out too are left out.

    Raises InputError for tables whose lines differ in length, or do not fit the model.
    """
    fitted = TokenTable.open(train)
    length = model.length if model else fitted.image_length
    if not length:
        raise InputError(f"{train} has lines of different lengths, or empty ones; baselines need lines of one length.")
    size = model.vocab_size if model else find_vocab_size(fitted, train)
    fitted = TokenTable.open(train, image_length=length, image_vocab_size=size)
    measured = TokenTable.open(held_out, image_length=length, image_vocab_size=size)
    with stage("comparing lines", show=show_progress):
        rows = TableRows(fitted, rows_not_in(fitted, measured))
    return score_with_baselines(
        model, rows, measured, max_train_rows, max_held_out_rows, vocab_size=size, show_progress=show_progress
    )


def _model_score(model: LineModel, codes: Int64[np.ndarray, "n L"]) -> BaselineScore:
    n, L = codes.shape
    lines = model.score(torch.from_numpy(codes), torch.full((n,), L)).mean(1)
    error = float(lines.std()) / math.sqrt(n) if n > 1 else math.nan
    return BaselineScore(f"{model.name} ({model.model.num_parameters:,} parameters)", float(lines.mean()), error)
