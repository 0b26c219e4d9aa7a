"""The system of pre-tokenized lines from top to bottom: split, transformer, bundle, report.

Everything lies in one folder, each stage in a place of its own, written whole or not at all. A run that was stopped,
or killed, goes on from what is there; run again when it is done, it finds nothing left to do.

    validation.parquet   the lines held out, if no validation file is given
    model/               the transformer's training: checkpoints, the best weights, curves.csv, curves.png, tensorboard
    bundle/              what `LineModel.load` reads
    report.md, report.json   validation nats per token beside the baselines

Tags stay in the tables. Lines with the same codes are on one side of the split.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64

from smalti.bundle import Bundle
from smalti.data.line_rows import TableRows, rows_not_in, write_rows
from smalti.data.lines import MAX_UNTOLD_VOCAB_SIZE, split_rows
from smalti.data.tokens import TokenTable
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.evaluate.baselines import BaselineScore, score_baselines
from smalti.files import write_json, write_text
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly
from smalti.progress import stage
from smalti.recipes import LinesRecipe, claim_folder
from smalti.systems.line_presets import LINE_PRESETS, choose_preset, line_layout
from smalti.tasks.lines import LineModel
from smalti.training.checkpoint import run_lock
from smalti.training.estimate import Estimate
from smalti.training.token_model import processes, train_model


class LineData(NamedTuple):
    train: TableRows
    validation: TokenTable
    length: int
    vocab_size: int


def train_lines(recipe: LinesRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains a model of a table's lines in the recipe's output folder, from wherever it stands; returns the bundle's.

    Under `torchrun` the first process splits the table, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, the table's lines differ in length, or as the stages do.
    """
    output = recipe.output
    with processes() as (rank, world_size), run_lock(output, rank):
        if rank == 0:
            claim_folder(recipe, output, free=("baseline_rows", "report_rows"))
            read_data(recipe, show_progress=show_progress)  # the first process writes the validation table
        if world_size > 1:
            dist.barrier()
        data = read_data(recipe)
        layout = line_layout(data.length, data.vocab_size)
        preset = choose_preset(recipe.model.preset, len(data.train) * data.length)
        transformer = LINE_PRESETS[preset].transformer(layout, dropout=recipe.model.dropout)
        if rank == 0 and show_progress:
            print(
                f"{len(data.train):,} lines of {data.length} codes below {data.vocab_size} to train on, "
                f"{len(data.validation):,} to validate with; preset {preset}",
                flush=True,
            )
        config = replace(recipe.train, learning_rate=learning_rate_for(recipe, transformer))
        model = train_model(
            transformer,
            layout,
            data.train,
            data.validation,
            config,
            output / "model",
            show_progress=show_progress,
            estimate=Estimate(recipe.minutes, {"transformer": recipe.train.length}),
        )
        if rank == 0:
            _finish(recipe, model, data, preset, command, show_progress)
    return output / "bundle"


def read_data(recipe: LinesRecipe, *, show_progress: bool = False) -> LineData:
    """The rows to train on and the table to validate with, which is written if it is to be held out and not there.

    Raises InputError if there is no table, its lines differ in length, or nothing is left to train on.
    """
    if recipe.data is None:
        raise InputError("which lines? Give the table of smalti data import-lines: data=lines.parquet.")
    table = TokenTable.open(recipe.data, image_vocab_size=recipe.vocab_size)
    length, vocab_size = table.image_length, recipe.vocab_size or _vocab_size(table, recipe.data)
    if not length:
        raise InputError(
            f"{recipe.data} has lines of different lengths, or empty ones; training needs lines of one length. Import "
            "them again with length=N and --skip-bad to set the others aside."
        )
    if recipe.validation is not None:
        validation = TokenTable.open(recipe.validation, image_length=length, image_vocab_size=vocab_size)
        with stage("comparing lines", show=show_progress):
            rows = rows_not_in(table, validation)
    else:
        with stage("comparing lines", show=show_progress):
            rows, held_out = split_rows(table, recipe.held_out, recipe.split_seed)
        path = recipe.output / "validation.parquet"
        if not path.exists():
            write_rows(path, table, held_out)
        validation = TokenTable.open(path, image_length=length, image_vocab_size=vocab_size)
    if not len(rows):
        raise InputError(f"all lines of {recipe.data} are in {recipe.validation} too: nothing is left to train on.")
    return LineData(TableRows(table, rows), validation, length, vocab_size)


def _vocab_size(table: TokenTable, path: Path) -> int:
    """As the import wrote it; tables tokenized with an image tokenizer of ours have its codebook's size; else what the
    largest code needs. Raises InputError if a model of so many codes would be a mistake, before one is made."""
    told = table.metadata.get("image_vocab_size") or table.metadata.get("codebook_size")
    if told is None:
        if table.max_image_token >= MAX_UNTOLD_VOCAB_SIZE:
            raise InputError(
                f"{path} holds the code {table.max_image_token}, more than any codebook has; if the vocabulary is that "
                f"large, give its size: vocab_size={table.max_image_token + 1}."
            )
        return table.max_image_token + 1
    if type(told) is not int or told < 1:
        raise InputError(f"{path}: its metadata say {told!r} for the size of the vocabulary; import the lines again.")
    if table.max_image_token >= told:
        TokenTable.open(path, image_vocab_size=told)  # raises, naming the row
    return told


def learning_rate_for(recipe: LinesRecipe, transformer: TransformerConfig) -> float:
    """The recipe's learning rate, for a model of this width (see `LinesRecipe.learning_rate_width`)."""
    if recipe.learning_rate_width is None:
        return recipe.train.learning_rate
    return recipe.train.learning_rate * recipe.learning_rate_width / transformer.d_model


# Bundle and report ---------------------------------------------------------------------------------------------


def _finish(
    recipe: LinesRecipe, model: DecoderOnly, data: LineData, preset: str, command: str, show_progress: bool
) -> None:
    """Bundles, then measures the bundle as a user will load it, rounded to half precision."""
    output, bundle = recipe.output, recipe.output / "bundle"
    layout = line_layout(data.length, data.vocab_size)
    Bundle(model=model.cpu(), layout=layout, name=output.name).save(bundle, half=True, force=True)
    loaded = LineModel.load(bundle)
    path = output / "report.json"
    if (figures := _figures_of(path, loaded)) is not None:
        loaded.bundle.figures = figures
        loaded.save(bundle, half=True, force=True)
        return
    num_rows = recipe.baseline_rows, recipe.report_rows
    rows = score_with_baselines(loaded, data.train, data.validation, *num_rows, show_progress=show_progress)
    best = rows[-1]
    loaded.bundle.figures = {
        "validation nats per token": f"{best.nats_per_token:.4f} ± {best.standard_error:.4f}",
        "validation bits per token": f"{best.nats_per_token / math.log(2):.4f}",
        "validation perplexity": f"{math.exp(best.nats_per_token):.3f}",
        "training lines": len(data.train),
        "preset": preset,
    }
    loaded.save(bundle, half=True, force=True)
    content = {
        "command": command,
        "weights_sha256": loaded.weights_sha256,
        "figures": loaded.bundle.figures,
        "rows": [row._replace(standard_error=_or_none(row.standard_error))._asdict() for row in rows],
    }
    write_text(output / "report.md", _markdown(rows, loaded, command), force=True)
    write_json(path, content, force=True)


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
    size = model.vocab_size if model else _vocab_size(fitted, train)
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
