"""The command `inspect`: codes and model explained."""

import os
from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import (
    Force,
    Quiet,
)

app = typer.Typer()


@app.command(
    epilog="Examples: smalti inspect out/lines/bundle --data lines.parquet -o report/ · "
    "smalti inspect digits --data tokens.parquet -o report/"
)
def inspect(
    bundle: Annotated[str, typer.Argument(help="A bundle of pictures or of lines: a name, a folder, or a hub's.")],
    data: Annotated[Path, typer.Option(help="Lines to look at it on: a token table (parquet) or a text file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for index.html and findings.json.")],
    image_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="What the lines were made with, if it exists: an image tokenizer's folder, or a bundle's name."
        ),
    ] = None,
    code_offset: Annotated[
        int, typer.Option(min=0, help="Number that was added to the image tokenizer's codes, as export-lines does.")
    ] = 0,
    lines: Annotated[int, typer.Option(min=2, help="Lines for the findings about codes alone.")] = 20_000,
    scored: Annotated[int, typer.Option(min=10, help="Lines run through the model.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the choice of lines.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Explain codes and model: one page of findings in words, numbers and pictures, which opens without a network."""
    # Threads wait for the next product: asleep, or they take as much processor time as the work itself. Both are read
    # when torch and NumPy are loaded; NumPy's products are too small to be shared out.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from smalti.inspect.findings import Finding, InspectConfig
    from smalti.inspect.report import PAGE, inspect_bundle

    def tell(finding: Finding) -> None:
        if finding.headline:
            typer.echo(f"- {finding.text}")

    config = InspectConfig(num_lines=lines, num_scored=scored, seed=seed)
    inspect_bundle(
        bundle,
        data,
        output,
        config,
        image_tokenizer=image_tokenizer,
        code_offset=code_offset,
        force=force,
        show_progress=not quiet,
        heard=tell,
    )
    typer.echo(f"{output / PAGE}")
