"""The commands `import` and `export`: weights of other projects in and out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()

Kind = Annotated[
    str, typer.Argument(help="llamagen-vq, taming, titok, maskgit-vq, vit-vqgan or deepul: whose layout the file has.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command(
    "import", epilog="Examples: smalti import llamagen-vq vq_ds16_c2i.pt -o out/vq16 · with --verify REFERENCE_FOLDER"
)
def import_(
    kind: Kind,
    file: Annotated[Path, typer.Argument(help="Weight file, as torch.save wrote it or safetensors.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the image tokenizer.")],
    config: Annotated[
        Path | None, typer.Option(help="The original's config (JSON or YAML); published files need none.")
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Reference folder (config.json, weights, io.npz) whose every output must come out the same."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out the list of tensors.")] = False,
    force: Force = False,
) -> int:
    """Read the weights of another project's image tokenizer. Nothing in the file is run.

    Prints every tensor's old and new name. With --verify, the status is 1 if an output differs.
    """
    from smalti.interop.commands import error_table, import_weights

    imported = import_weights(kind, file, output, config, verify, force=force)
    lines = imported.report.lines()
    for line in (*(lines[-2:] if quiet else lines), *imported.notes):
        typer.echo(line)
    if imported.errors:
        Console().print(error_table(imported.errors))
    if not imported.holds:
        typer.echo("error: the reference was not reproduced; nothing was written.", err=True)
        return 1
    typer.echo(output)
    return 0


@app.command("export", epilog="Example: smalti export llamagen-vq out/vq16 vq_ds16.pt")
def export(
    kind: Kind,
    bundle: Annotated[Path, typer.Argument(help="Folder of an image tokenizer, or of a bundle with one.")],
    file: Annotated[Path, typer.Argument(help="File to write: .safetensors, or any other ending for torch.save.")],
    force: Force = False,
) -> None:
    """Write an image tokenizer's weights as another project lays them out, and its config beside them."""
    from smalti.interop.commands import export_weights

    config = export_weights(kind, bundle, file, force=force)
    typer.echo(file)
    typer.echo(config)
