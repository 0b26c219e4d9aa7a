"""The command `data`: the tables that training reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import (
    Force,
    Quiet,
    numbers_of,
)
from smalti.cli.scenes import data_scenes

app = typer.Typer(help="Make the tables that training reads.", no_args_is_help=True)
app.command(
    "scenes",
    epilog="Examples: smalti data scenes out/scenes · smalti data scenes out/few --rows 1000 --held-out 100 --seed 7",
)(data_scenes)


@app.command("digits", epilog="Example: smalti data digits out/digits --mnist folder/with/mnist")
def data_digits(
    output: Annotated[Path, typer.Argument(help="Folder for train.parquet, validation.parquet and test.parquet.")],
    mnist: Annotated[
        Path | None, typer.Option(help="Folder with MNIST's idx files (default: scikit-learn's digits).")
    ] = None,
    pickle: Annotated[Path | None, typer.Option(help="The original colored_mnist_with_text.pkl.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the colours.")] = 0,
    colourings: Annotated[int, typer.Option(min=1, help="How many pairs of colours each digit gets.")] = 1,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Make coloured, captioned digits as parquet tables."""
    from smalti.data.digit_sources import read_coloured_pickle, read_mnist, scikit_learn_digits
    from smalti.data.digits import ColouringConfig, write_digits

    if mnist and pickle:
        raise ValueError("--mnist and --pickle are two sources; give one of them.")
    config = ColouringConfig(seed=seed, colourings=colourings)
    if pickle:
        source, digits = "pickle", read_coloured_pickle(pickle)
    elif mnist:
        source, digits = "mnist", read_mnist(mnist)
    else:
        source, digits = "scikit-learn", scikit_learn_digits()
    paths = write_digits(output, source, digits, config, force=force, show_progress=not quiet)
    for path in paths.values():
        typer.echo(path)


@app.command("import-lines", epilog="Example: smalti data import-lines codes.txt.gz -o tokens.parquet --skip-bad 10")
def data_import_lines(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Text files, plain or compressed: a tag and the codes on each line; or .npy, .npz or .jsonl of codes."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file of tokens.")],
    vocab_size: Annotated[int | None, typer.Option(help="Codes are below this (default: as found).")] = None,
    length: Annotated[int | None, typer.Option(help="Codes on each line (default: as found).")] = None,
    skip_bad: Annotated[int, typer.Option(min=0, help="Set aside up to this many bad lines instead of stopping.")] = 0,
    allow_short: Annotated[bool, typer.Option("--allow-short", help="Accept lines shorter than the length.")] = False,
    no_tags: Annotated[
        bool, typer.Option("--no-tags", help="Lines hold codes alone; they are named by their numbers.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn lines of picture codes into a token table."""
    from smalti.data.lines import import_lines

    report = import_lines(
        inputs,
        output,
        vocab_size,
        length,
        skip_bad,
        allow_short=allow_short,
        tags=not no_tags,
        force=force,
        show_progress=not quiet,
    )
    typer.echo(
        f"{output}: {report.num_lines} lines of {report.length or 'various numbers of'} codes "
        f"below {report.vocab_size}, {report.num_duplicates} duplicates, {report.num_bad} bad lines"
        + (f" set aside in {report.bad_lines_path}" if report.bad_lines_path else "")
    )


@app.command(
    "export-lines",
    epilog="Examples: smalti data export-lines tokens.parquet -o lines.txt · smalti data export-lines test.parquet "
    "-o prefixes.txt --num-codes 24 · smalti data export-lines emoji.parquet -o lines.txt.gz --code-offset 1 "
    "--before 0 --after 65,distinct",
)
def data_export_lines(
    tables: Annotated[list[Path], typer.Argument(help="Token tables of smalti tokenize or import-lines, in order.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Text file; .gz or .zst at its end compresses it.")],
    num_codes: Annotated[int | None, typer.Option(min=0, help="Cut each line to its first codes: prefixes.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows to write of each table, from its start.")] = None,
    before: Annotated[str, typer.Option(help="Special codes to put in front of each line: 0.")] = "",
    after: Annotated[
        str, typer.Option(help="The same behind it; the word distinct: how many different codes the picture has.")
    ] = "",
    code_offset: Annotated[int, typer.Option(min=0, help="Number added to every code, to make room for them.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn token tables into lines of text: the key as the tag, then the codes of the picture."""
    import numpy as np

    from smalti.data.lines import DISTINCT, Lines, table_lines, write_lines
    from smalti.data.tokens import TokenTable
    from smalti.progress import stage

    behind = [word if word == DISTINCT else numbers_of("after", word)[0] for word in after.split(",") if word]
    around = {"before": numbers_of("before", before), "after": behind, "code_offset": code_offset}
    opened = [TokenTable.open(path) for path in tables]
    total = sum(min(len(table), max_rows or len(table)) for table in opened)
    with stage("writing lines", total, unit="line", show=not quiet) as progress:

        def blocks() -> Iterator[Lines]:
            for table in opened:
                for lines in table_lines(table, np.arange(len(table))[:max_rows], **around, num_codes=num_codes):
                    yield lines
                    progress.advance(len(lines.lengths))

        num_lines = write_lines(output, blocks(), force=force)
    typer.echo(f"{output}: {num_lines} lines")
