"""The commands `import` and `export`: weights of other projects in and out."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.tables import print_table

app = typer.Typer()

TOKENIZERS = "llamagen-vq, taming, titok, maskgit-vq, vit-vqgan, ibq, open-magvit2, deepul"
TRANSFORMERS = "llamagen, rar, gigatok, janus, dalle-mini"
OF_TRANSFORMERS = f"For {TRANSFORMERS}"
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command(
    "import",
    epilog="Examples: smalti import llamagen-vq vq_ds16_c2i.pt -o out/vq16 · smalti import llamagen c2i_B_256.pt "
    "-o out/c2i-b --image-size 256 --image-tokenizer vq_ds16_c2i.pt · smalti import llamagen t2i_XL_stage1_256.pt "
    "-o out/t2i-xl --image-size 256 --image-tokenizer vq_ds16_t2i.pt · smalti import rar rar_b.bin -o out/rar-b "
    "--image-tokenizer maskgit-vqgan-imagenet-f16-256.bin · smalti import gigatok GPT_B256_e300_VQ_BL.pt -o out/giga "
    "· smalti import janus Janus-Pro-1B -o out/janus · smalti import dalle-mini min-dalle/mega -o "
    "out/mega --image-tokenizer vqgan_f16_16384.ckpt · smalti import ibq imagenet256_16384.ckpt -o out/ibq · smalti "
    "import ibq model.ckpt --config config.yaml -o out/emu3.5 · smalti import open-magvit2 imagenet_256_L.ckpt -o "
    "out/magvit2",
)
def import_(
    kind: Annotated[str, typer.Argument(help=f"Whose layout the file has: {TOKENIZERS}; {TRANSFORMERS}, hf-llama.")],
    file: Annotated[
        Path,
        typer.Argument(help="Weight file, as torch.save wrote it or safetensors; of a transformer also its folder."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the image tokenizer, or the bundle.")],
    config: Annotated[
        Path | None, typer.Option(help="The original's config (JSON or YAML); published files need none.")
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Reference folder (config.json, weights, io.npz) whose every output must come out the same."),
    ] = None,
    image_tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="What makes pictures of the codes: a folder, or the weight file that was published with it "
            "(llamagen-vq for llamagen, maskgit-vq for rar; gigatok's is not read); a janus holds its own.",
            rich_help_panel=OF_TRANSFORMERS,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of llamagen's pictures in pixels: 256, 384 or 512; its weights do not tell.",
            rich_help_panel=OF_TRANSFORMERS,
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            help="Names of the classes, one a line or a JSON list, for generate --class.",
            rich_help_panel=OF_TRANSFORMERS,
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="Of llamagen's models of captions: the folder of the T5 encoder whose features they read, or a hub's "
            "owner/name, to be noted in the bundle (default: google/flan-t5-xl).",
            rich_help_panel=OF_TRANSFORMERS,
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Read weights that hold NaN or infinity too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out the list of tensors.")] = False,
    force: Force = False,
) -> int:
    """Read the weights of another project: an image tokenizer, a model that draws, or a language model. Nothing is run.

    Prints every tensor's old and new name. With --verify, the status is 1 if an output differs.
    """
    from smalti.interop.commands import error_table, import_weights
    from smalti.interop.token_models import Extras

    extras = Extras(
        image_tokenizer=image_tokenizer, image_size=image_size, class_names=class_names, text_encoder=text_encoder
    )
    imported = import_weights(
        kind, file, output, config, verify, extras=extras, force=force, allow_nonfinite=allow_nonfinite
    )
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
    "export",
    epilog="Examples: smalti export llamagen-vq out/vq16 vq_ds16.pt · smalti export ibq out/ibq ibq.ckpt · "
    "smalti export rar out/rar-b rar_b.bin · smalti export janus out/janus janus.safetensors · "
    "smalti export hf out/bundle out/llama",
)
def export(
    kind: Annotated[
        str,
        typer.Argument(
            help=f"Whose layout to write: {TOKENIZERS}; {TRANSFORMERS}; or hf, a bundle's model as a Llama."
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder of an image tokenizer, or of a bundle with one.")],
    file: Annotated[
        Path,
        typer.Argument(help="File to write: .safetensors, or any other ending for torch.save; for hf a folder."),
    ],
    force: Force = False,
) -> None:
    """Write weights as another project lays them out, with their config: an image tokenizer's, a class model's, or a
    language model's for transformers and LLM servers."""
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
