"""The command `add-upsampler`: a bundle with what makes its pictures larger."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Force
from smalti.default_bundle import SHIPPED

app = typer.Typer()


@app.command("add-upsampler", epilog="Example: smalti add-upsampler emoji out/emoji-upsampler -o out/emoji-large")
def add_upsampler(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ],
    upsampler: Annotated[Path, typer.Argument(help="Folder of an upsampler, or of the run that trained it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new bundle.")],
    force: Force = False,
) -> None:
    """Put an upsampler into a bundle: its pictures are then drawn larger by smalti generate --upscale."""
    from smalti.bundle import add_upsampler as add

    height, width = add(bundle, upsampler, output, force=force).output_size
    typer.echo(f"{output}: smalti generate --upscale draws {width}×{height}")
