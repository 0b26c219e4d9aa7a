"""The command `tokenize`: pictures and captions as tokens."""

from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.cli.evaluate import parse_size
from smalti.cli.options import (
    Force,
    Quiet,
    refuse_outputs,
)
from smalti.default_bundle import DEFAULT_BUNDLE
from smalti.stopping import resuming

app = typer.Typer()


@app.command(
    epilog="Examples: smalti tokenize out/digits/train.parquet -o tokens.parquet --bundle digits · "
    "smalti tokenize 'shards/*.tar' -o tokens.parquet --image-tokenizer out/titok --text-tokenizer tokenizer.json"
)
def tokenize(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Pictures with captions: parquet, webdataset tar shards, or a folder of pictures with JSON lines, "
            "CSV, COCO captions, or .txt files beside them."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file of tokens.")],
    bundle: Annotated[
        str | None, typer.Option(help=f"Bundle whose tokenizers to use, if none is given: {DEFAULT_BUNDLE}.")
    ] = None,
    image_tokenizer: Annotated[Path | None, typer.Option(help="Folder of an image tokenizer.")] = None,
    text_tokenizer: Annotated[
        Path | None, typer.Option(help="File of a text tokenizer, with --image-tokenizer; none keeps text alone.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Crop and resize pictures to ROWSxCOLUMNS, or a square (default: as they are)."),
    ] = None,
    max_text_length: Annotated[int | None, typer.Option(help="Cut captions to this many tokens.")] = None,
    on_error: Annotated[
        str, typer.Option(help="What to do about a broken picture: stop, or skip and name it.")
    ] = "stop",
    workers: Annotated[int, typer.Option(min=0, help="Processes that share the work; 0: this one alone.")] = 0,
    ray: Annotated[bool, typer.Option("--ray", help="Have actors of a Ray cluster share it, as many.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at a time.")] = 256,
    image_column: Annotated[str, typer.Option(help="Column of the pictures in parquet.")] = "image",
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the captions (default: found by its name), or its number in a table without header."
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="What separates the fields of a folder's CSV or TSV (default: by its name).")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn pictures and captions into tokens. If it is stopped, run it again: it resumes."""
    refuse_outputs([output], force)
    from smalti.data.tokenize_pairs import TokenizeConfig, tokenize_pairs

    config = TokenizeConfig(
        size=None if size is None else parse_size(size),
        max_text_length=max_text_length,
        on_error=on_error,
        batch_size=batch_size,
        workers=workers,
        ray=ray,
    )
    tokenizers = _tokenizers(bundle, image_tokenizer, text_tokenizer)
    columns = {"image_column": image_column, "caption_column": caption_column, "delimiter": delimiter}
    with resuming():
        report = tokenize_pairs(pairs, output, *tokenizers, config, **columns, force=force, show_progress=not quiet)
    for name, fault in report.skipped:
        typer.echo(f"skipped: {name}: {fault}", err=True)
    if report.num_cut:
        typer.echo(
            f"warning: {report.num_cut} of {report.num_rows} captions were cut to {max_text_length} tokens.", err=True
        )
    if report.num_empty:
        typer.echo(f"warning: {report.num_empty} of {report.num_rows} captions are empty.", err=True)
    typer.echo(f"{output}: {report.num_rows} rows, {len(report.skipped)} skipped; {report.time}")


def _tokenizers(bundle: str | None, image_tokenizer: Path | None, text_tokenizer: Path | None) -> tuple[Any, Any]:
    """The image tokenizer and the text tokenizer, or None for no text."""
    if image_tokenizer is None:
        from smalti.tasks.images import Pipeline

        if text_tokenizer is not None:
            raise ValueError("--text-tokenizer goes with --image-tokenizer; a bundle has its own.")
        pipe = Pipeline.load(bundle or DEFAULT_BUNDLE, device="cpu")
        return pipe.image_tokenizer, pipe.text_tokenizer
    if bundle is not None:
        raise ValueError("--bundle and --image-tokenizer both name an image tokenizer; give one of them.")
    from smalti.image_tokenizers import load_image_tokenizer
    from smalti.text_tokenizer import TextTokenizer

    words = None if text_tokenizer is None else TextTokenizer.load(text_tokenizer)
    return load_image_tokenizer(image_tokenizer).eval(), words
