"""The command `data scenes`: pictures of a few shapes with captions, from a grammar."""

from pathlib import Path
from typing import Annotated

import typer


def data_scenes(
    output: Annotated[Path, typer.Argument(help="Folder for train.parquet, validation.parquet and test.parquet.")],
    rows: Annotated[int, typer.Option(min=1, help="Training scenes.")] = 100_000,
    held_out: Annotated[
        int,
        typer.Option(
            min=1, help="Scenes of validation, and of test: every other one of these shows what no other does."
        ),
    ] = 2_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tables.")] = 0,
    complete_captions: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training captions that leave nothing out.")
    ] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Draw scenes of one to four shapes with captions as parquet tables; some combinations are kept for the test."""
    from smalti.data.scene_tables import ScenesConfig, write_scenes

    config = ScenesConfig(
        num_train=rows, num_validation=held_out, num_test=held_out, seed=seed, complete_captions=complete_captions
    )
    for path in write_scenes(output, config, force=force, show_progress=not quiet).values():
        typer.echo(path)
