"""The commands `import` and `export`: weights of other projects in and out."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.tables import print_table

app = typer.Typer()

TOKENIZERS = "llamagen-vq, taming, titok, maskgit-vq, vit-vqgan, deepul"
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command(
    "import", epilog="Examples: smalti import llamagen-vq vq_ds16_c2i.pt -o out/vq16 · with --verify REFERENCE_FOLDER"
)
def import_(
    kind: Annotated[str, typer.Argument(help=f"Whose layout the file has: {TOKENIZERS}, hf-llama.")],
    file: Annotated[
        Path, typer.Argument(help="Weight file, as torch.save wrote it or safetensors; of hf-llama also the folder.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the image tokenizer, or the bundle.")],
    config: Annotated[
        Path | None, typer.Option(help="The original's config (JSON or YAML); published files need none.")
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Reference folder (config.json, weights, io.npz) whose every output must come out the same."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Read weights that hold NaN or infinity too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out the list of tensors.")] = False,
    force: Force = False,
) -> int:
    """Read the weights of another project's image tokenizer or language model. Nothing in the file is run.

    Prints every tensor's old and new name. With --verify, the status is 1 if an output differs.
    """
    from smalti.interop.commands import error_table, import_weights

    imported = import_weights(kind, file, output, config, verify, force=force, allow_nonfinite=allow_nonfinite)
    lines = imported.report.lines()
    for line in (*(lines[-2:] if quiet else lines), *imported.report.notes, *imported.notes):
        typer.echo(line)
    if imported.errors:
        print_table(error_table(imported.errors))
    if not imported.holds:
        typer.echo("error: the reference was not reproduced; nothing was written.", err=True)
        return 1
    typer.echo(output)
    return 0


@app.command(
    "export", epilog="Examples: smalti export llamagen-vq out/vq16 vq_ds16.pt · smalti export hf out/bundle out/llama"
)
def export(
    kind: Annotated[
        str, typer.Argument(help=f"Whose layout to write: {TOKENIZERS}; or hf, a bundle's model as a Llama.")
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder of an image tokenizer, or of a bundle with one.")],
    file: Annotated[
        Path,
        typer.Argument(help="File to write: .safetensors, or any other ending for torch.save; for hf a folder."),
    ],
    force: Force = False,
) -> None:
    """Write weights as another project lays them out, with their config: an image tokenizer's, or a model's for
    transformers and LLM servers."""
    if kind == "hf":
        from smalti.interop.huggingface import export_llama

        written, notes = export_llama(bundle, file, force=force)
        for line in (*written, *notes):
            typer.echo(line)
        return
    from smalti.interop.commands import export_weights

    config = export_weights(kind, bundle, file, force=force)
    typer.echo(file)
    typer.echo(config)
