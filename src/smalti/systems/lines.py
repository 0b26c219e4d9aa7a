"""The system of pre-tokenized lines from top to bottom: split, transformer, bundle, report.

The folder of a run (see stages.py):

    validation.parquet   the lines held out, if no validation file is given
    model/               the transformer's training: checkpoints, the best weights, curves.csv, curves.png, tensorboard
    bundle/              what `LineModel.load` reads
    report.md, report.json   validation nats per token beside the baselines

Tags stay in the tables. Lines with the same codes are on one side of the split.
"""

from dataclasses import replace
from pathlib import Path

from smalti.bundle import Bundle
from smalti.data.line_rows import LineData, read_line_data
from smalti.errors import InputError
from smalti.evaluate.lines import report_lines
from smalti.models.config import TransformerConfig
from smalti.recipes import LinesRecipe, claim_folder
from smalti.recipes.line_presets import LINE_PRESETS, choose_preset, line_layout
from smalti.systems.stages import finish, team
from smalti.tasks.lines import LineModel
from smalti.training.estimate import Estimate
from smalti.training.token_model import train_model


def train_lines(recipe: LinesRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains a model of a table's lines in the recipe's output folder, from wherever it stands; returns the bundle's.

    Under `torchrun` the first process splits the table, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, the table's lines differ in length, or as the stages do.
    """
    output = recipe.output
    with team(output) as processes:
        data = None
        if processes.is_first:
            claim_folder(recipe, output, free=("baseline_rows", "report_rows"))
            data = read_data(recipe, show_progress=show_progress)  # which writes the validation table
        processes.wait()
        data = data or read_data(recipe)
        layout = line_layout(data.length, data.vocab_size)
        preset = choose_preset(recipe.model.preset, len(data.train) * data.length)
        transformer = LINE_PRESETS[preset].transformer(layout, dropout=recipe.model.dropout)
        if processes.is_first and show_progress:
            print(
                f"{len(data.train):,} lines of {data.length} codes below {data.vocab_size} to train on, "
                f"{len(data.validation):,} to validate with; preset {preset}",
                flush=True,
            )
        model = train_model(
            transformer,
            layout,
            data.train,
            data.validation,
            replace(recipe.train, learning_rate=learning_rate_for(recipe, transformer)),
            output / "model",
            show_progress=show_progress,
            estimate=Estimate(recipe.minutes, {"transformer": recipe.train.length}),
        )
        if processes.is_first:
            finish(
                Bundle(model=model.cpu(), layout=layout, name=output.name),
                output / "bundle",
                lambda bundle: report_lines(
                    LineModel(bundle),
                    data,
                    output,
                    baseline_rows=recipe.baseline_rows,
                    report_rows=recipe.report_rows,
                    preset=preset,
                    command=command,
                    show_progress=show_progress,
                ),
            )
    return output / "bundle"


def read_data(recipe: LinesRecipe, *, show_progress: bool = False) -> LineData:
    """See `read_line_data`. Raises InputError if the recipe names no table."""
    if recipe.data is None:
        raise InputError("no lines are given: give the table of smalti data import-lines, data=lines.parquet.")
    return read_line_data(
        recipe.data,
        recipe.validation,
        held_out=recipe.held_out,
        split_seed=recipe.split_seed,
        vocab_size=recipe.vocab_size,
        held_out_path=recipe.output / "validation.parquet",
        show_progress=show_progress,
    )


def learning_rate_for(recipe: LinesRecipe, transformer: TransformerConfig) -> float:
    """The recipe's learning rate, for a model of this width (see `LinesRecipe.learning_rate_width`)."""
    if recipe.learning_rate_width is None:
        return recipe.train.learning_rate
    return recipe.train.learning_rate * recipe.learning_rate_width / transformer.d_model
