"""The commands `score` and `baselines`: what pictures, captions and lines cost."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from smalti.cli.options import (
    OF_LINES,
    BundleName,
    Quiet,
    TextEncoderName,
    refuse_options,
    settings_given,
    usual_bundle_for_picture,
)
from smalti.stopping import resuming
from smalti.tables import print_table

app = typer.Typer()


@app.command(
    epilog='Examples: smalti score eight.png "dark green eight on bright cyan" · '
    "smalti score lines.txt -o scores --bundle out/lines/bundle"
)
def score(
    source: Annotated[Path, typer.Argument(help="A picture file; for a bundle of lines, a file of lines.")],
    captions: Annotated[list[str] | None, typer.Argument(help="One or more captions of the picture.")] = None,
    bundle: BundleName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for scores by line and by position.", rich_help_panel=OF_LINES),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Lines scored at a time: 256.", rich_help_panel=OF_LINES)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.", rich_help_panel=OF_LINES)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.", rich_help_panel=OF_LINES)] = False,
    text_encoder: TextEncoderName = None,
) -> None:
    """How well captions fit a picture, in nats: −ln p(picture | caption), −ln p(caption | picture), information.

    With a bundle of lines: nats per token of each line of a file (text, or a token table) and of all, with standard
    error, and by position. A run that was stopped resumes when it is started again.
    """
    from smalti.bundle import Bundle

    bundle = usual_bundle_for_picture(bundle, source)
    loaded = Bundle.load(bundle)
    if loaded.is_lines:
        if captions or text_encoder:
            raise ValueError(f"{bundle} is a bundle of lines, which knows no captions; leave them out.")
        if output is None:
            raise ValueError("scores of lines need a folder to go to: add -o FOLDER.")
        with resuming():
            _score_lines(source, output, loaded, batch_size or 256, force, as_json, quiet)
        return
    refuse_options(settings_given(output=output, batch_size=batch_size, force=force or None), bundle, loaded.kind)
    if not captions:
        raise ValueError("no caption is given; write one or more after the picture.")
    from smalti.tasks.features import captions_face

    scores = captions_face(loaded, text_encoder).score([source] * len(captions), captions)
    columns = [[None] * len(captions) if column is None else column.tolist() for column in scores]
    if as_json:
        import json

        rows = [
            dict(zip(("caption", *scores._fields), row, strict=True)) for row in zip(captions, *columns, strict=True)
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("caption", "−ln p(picture | caption)", "−ln p(caption | picture)", "mutual information", box=None)
    for line, *values in zip(captions, *columns, strict=True):
        table.add_row(line, *("–" if value is None else f"{value:.2f} nats" for value in values))
    print_table(table)


def _score_lines(
    lines: Path, output: Path, bundle: Any, batch_size: int, force: bool, as_json: bool, quiet: bool
) -> None:
    from smalti.tasks.line_files import SCORE_FILES, score_file
    from smalti.tasks.lines import LineModel

    how = {"batch_size": batch_size, "force": force, "show_progress": not quiet}
    found = score_file(LineModel(bundle), lines, output, **how)
    if as_json:
        typer.echo((output / SCORE_FILES[-1]).read_text(encoding="utf-8"), nl=False)
        return
    error = f" ± {found.standard_error:.4f}" if found.num_lines > 1 else ""
    typer.echo(
        f"{found.nats_per_token:.4f}{error} nats per token, {found.bits_per_token:.4f} bits, "
        f"perplexity {found.perplexity:.3f}: {found.num_lines} lines, {found.num_tokens} tokens\n"
        f"{output}: {', '.join(SCORE_FILES)}"
    )


@app.command(epilog="Example: smalti baselines lines.parquet out/lines/validation.parquet --bundle out/lines/bundle")
def baselines(
    train: Annotated[Path, typer.Argument(help="Token table to fit to; rows that are held out too are left out.")],
    held_out: Annotated[Path, typer.Argument(help="Token table to measure.")],
    bundle: Annotated[str | None, typer.Option(help="A bundle of lines to measure beside them.")] = None,
    max_train_rows: Annotated[int, typer.Option(min=1, help="Rows to fit to at most, drawn at random.")] = 200_000,
    max_rows: Annotated[int, typer.Option(min=1, help="Held-out rows to measure at most.")] = 10_000,
    quiet: Quiet = False,
) -> None:
    """What lines cost without a network, in nats per token: uniform, unigrams, n-grams, a compressor."""
    from smalti.evaluate.lines import compare_with_baselines, error_text
    from smalti.tasks.lines import LineModel

    table = Table("", "nats per token", "standard error", box=None)
    model = LineModel.load(bundle) if bundle else None
    for row in compare_with_baselines(model, train, held_out, max_train_rows, max_rows, show_progress=not quiet):
        table.add_row(row.name, f"{row.nats_per_token:.4f}", error_text(row))
    print_table(table)
