"""The command line: parses, calls, prints. What a command needs is imported inside it, so that each starts fast."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from smalti.cli_interop import app as interop_app
from smalti.cli_train import app as train_app

app = typer.Typer(
    name="smalti",
    help="Autoregressive image generation with discrete tokens: tokenize, train, measure, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Make the tables that training reads.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(interop_app)
app.add_typer(train_app, name="train")
console = Console()

Bundle = Annotated[
    str, typer.Option(help="A shipped bundle's name (smalti info --list), a folder, or a hub's owner/name.")
]
Seed = Annotated[int, typer.Option(help="The same seed and prompt give the same picture, whatever else is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Count = Annotated[int, typer.Option("-n", min=1, help="How many; the i-th is drawn with the seed SEED + i.")]
Scale = Annotated[int | None, typer.Option(help="Enlarge every pixel to so many by so many (default: the bundle's).")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, 1 the model's own distribution.")]
TopK = Annotated[int | None, typer.Option(help="Keep the K most likely tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the fewest tokens whose probability reaches P, in (0, 1].")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least P times as likely as the likeliest, in [0, 1].")]
Guidance = Annotated[
    float | None, typer.Option(help="null + scale · (cond − null): 1 is off, larger follows the prompt.")
]
Schedule = Annotated[
    str | None, typer.Option(help="How the guidance grows from 1 over a picture: constant, linear, cosine.")
]
DEFAULT_BUNDLE = "digits"


@app.command(epilog='Example: smalti generate "dark green eight on bright cyan" -o eight.png')
def generate(
    prompt: Annotated[str, typer.Argument(help="The caption, in the bundle's words.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file; with -n 3: NAME-1.png to NAME-3.png.")],
    bundle: Bundle = DEFAULT_BUNDLE,
    seed: Seed = 0,
    n: Count = 1,
    force: Force = False,
    scale: Scale = None,
    negative_prompt: Annotated[str | None, typer.Option(help="A caption to steer away from; needs guidance.")] = None,
    best_of: Annotated[int, typer.Option(min=1, help="Draw so many for each picture and keep the best.")] = 1,
    rerank: Annotated[
        str,
        typer.Option(help="What is best: p(picture | caption) 'picture', p(caption | picture) 'caption', or 'pmi'."),
    ] = "caption",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    guidance_scale: Guidance = None,
    guidance_schedule: Schedule = None,
) -> None:
    """Draw pictures of a caption. Each PNG says in itself how it was made."""
    outputs = _output_names(output, n)
    _refuse_existing(outputs, force)
    from smalti.pipeline import Pipeline

    pictures = Pipeline.load(bundle).generate(
        prompt,
        seed=seed,
        n=n,
        scale=scale,
        negative_prompt=negative_prompt,
        best_of=best_of,
        rerank=rerank,
        **_given(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
        ),
    )
    _save(pictures, outputs, force)


@app.command(epilog="Example: smalti caption eight.png")
def caption(
    pictures: Annotated[
        list[Path], typer.Argument(help="Picture files, as large as the bundle's pictures or enlarged whole.")
    ],
    bundle: Bundle = DEFAULT_BUNDLE,
    seed: Seed = 0,
    temperature: Temperature = None,
    guidance_scale: Guidance = None,
) -> None:
    """Print a caption for each picture."""
    from smalti.pipeline import Pipeline

    given = _given(temperature=temperature, guidance_scale=guidance_scale)
    for line in Pipeline.load(bundle).caption(list(pictures), seed=seed, **given):
        typer.echo(line)


@app.command(
    epilog='Examples: smalti complete "dark green" -n 3 · smalti complete --picture eight.png --rows 3 -o new.png'
)
def complete(
    beginning: Annotated[
        str | None, typer.Argument(help="First words of a caption, or, with --picture, a whole caption for it.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Keep the first rows of this picture's codes and draw the rest.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows of codes to keep of the picture.")] = 3,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG file for completed pictures.")] = None,
    bundle: Bundle = DEFAULT_BUNDLE,
    seed: Seed = 0,
    n: Count = 1,
    force: Force = False,
    scale: Scale = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance_scale: Guidance = None,
) -> None:
    """Complete a caption that is begun, or a picture of which the upper rows are given."""
    given = _given(temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)
    if picture is None:
        from smalti.pipeline import Pipeline

        for line in Pipeline.load(bundle).complete_caption(beginning or "", seed=seed, n=n, **given):
            typer.echo(line)
        return
    if output is None:
        raise ValueError("a completed picture needs a file to go to: add -o FILE.png.")
    outputs = _output_names(output, n)
    _refuse_existing(outputs, force)
    from smalti.pipeline import Pipeline

    pipe = Pipeline.load(bundle)
    _save(pipe.complete(picture, rows=rows, caption=beginning, seed=seed, n=n, scale=scale, **given), outputs, force)


@app.command(epilog='Example: smalti score eight.png "dark green eight on bright cyan"')
def score(
    picture: Annotated[Path, typer.Argument(help="A picture file.")],
    captions: Annotated[list[str], typer.Argument(help="One or more captions.")],
    bundle: Bundle = DEFAULT_BUNDLE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How well captions fit a picture, in nats: −ln p(picture | caption), −ln p(caption | picture), information."""
    from smalti.pipeline import Pipeline

    scores = Pipeline.load(bundle).score([picture] * len(captions), captions)
    columns = [column.tolist() for column in scores]
    if as_json:
        import json

        rows = [
            dict(zip(("caption", *scores._fields), row, strict=True)) for row in zip(captions, *columns, strict=True)
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("caption", "−ln p(picture | caption)", "−ln p(caption | picture)", "mutual information", box=None)
    for line, *values in zip(captions, *columns, strict=True):
        table.add_row(line, *(f"{value:.2f} nats" for value in values))
    console.print(table)


@app.command(epilog="Example: smalti info digits")
def info(
    bundle: Annotated[
        str, typer.Argument(help="A shipped bundle's name, a folder, or a hub's owner/name.")
    ] = DEFAULT_BUNDLE,
    list_bundles: Annotated[bool, typer.Option("--list", help="List the bundles that ship with the package.")] = False,
) -> None:
    """What a bundle holds: parameters, vocabulary, layout, measured figures."""
    from smalti.bundle import read_config, shipped_bundles

    if list_bundles:
        for name, directory in shipped_bundles().items():
            num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            typer.echo(f"{name}  {num_bytes / 1e6:.1f} MB  {' · '.join(read_config(directory)['layout']['orders'])}")
        return
    from smalti.pipeline import Pipeline

    pipe = Pipeline.load(bundle)
    table = Table(show_header=False, box=None)
    table.add_row("bundle", pipe.name)
    table.add_row("parameters", f"{pipe.model.num_parameters:,} (transformer)")
    table.add_row("", f"{sum(p.numel() for p in pipe.image_tokenizer.parameters()):,} (image tokenizer)")
    table.add_row("vocabulary", str(pipe.layout.vocabulary))
    words = pipe.text_tokenizer.words
    table.add_row("words", " ".join(words) if len(words) <= 200 else f"{len(words):,} pieces of words")
    table.add_row("pictures", f"{pipe.pictures.width}×{pipe.pictures.height}, codes {pipe.grid[0]}×{pipe.grid[1]}")
    for name, order in pipe.layout.orders.items():
        table.add_row(f"layout ({order.weight:g})", f"{name}: {order}")
    table.add_row("draws with", f"{pipe.sampling.picture}")
    table.add_row("weights", f"sha256 {pipe.weights_sha256}")
    for name, value in pipe.figures.items():
        table.add_row(name, str(value))
    console.print(table, soft_wrap=True, markup=False)


@data_app.command("digits", epilog="Example: smalti data digits out/digits --mnist ../shared/data/mnist")
def data_digits(
    output: Annotated[Path, typer.Argument(help="Folder for train.parquet, validation.parquet and test.parquet.")],
    mnist: Annotated[
        Path | None, typer.Option(help="Folder with MNIST's idx files (default: scikit-learn's digits).")
    ] = None,
    pickle: Annotated[Path | None, typer.Option(help="The original colored_mnist_with_text.pkl.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the colours.")] = 0,
    colourings: Annotated[int, typer.Option(min=1, help="How many pairs of colours each digit gets.")] = 1,
    force: Force = False,
) -> None:
    """Make coloured, captioned digits as parquet tables."""
    from smalti.data.digit_sources import read_coloured_pickle, read_mnist, scikit_learn_digits
    from smalti.data.digits import ColouringConfig, write_digits

    if mnist and pickle:
        raise ValueError("--mnist and --pickle are two sources; give one of them.")
    config = ColouringConfig(seed=seed, colourings=colourings)
    if pickle:
        paths = write_digits(output, "pickle", read_coloured_pickle(pickle), config, force=force)
    elif mnist:
        paths = write_digits(output, "mnist", read_mnist(mnist), config, force=force)
    else:
        paths = write_digits(output, "scikit-learn", scikit_learn_digits(), config, force=force)
    for path in paths.values():
        typer.echo(path)


@data_app.command(
    "import-lines", epilog="Example: smalti data import-lines codes.txt.gz -o tokens.parquet --skip-bad 10"
)
def data_import_lines(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text files, plain, gzip or zstd: a tag and the codes on each line.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file of tokens.")],
    vocab_size: Annotated[int | None, typer.Option(help="Codes are below this (default: as found).")] = None,
    length: Annotated[int | None, typer.Option(help="Codes on each line (default: as found).")] = None,
    skip_bad: Annotated[int, typer.Option(min=0, help="Set aside up to so many bad lines instead of stopping.")] = 0,
    allow_short: Annotated[bool, typer.Option("--allow-short", help="Admit lines shorter than the length.")] = False,
    force: Force = False,
) -> None:
    """Turn lines of picture codes into a token table."""
    from smalti.data.lines import import_lines

    report = import_lines(
        inputs, output, vocab_size, length, skip_bad, allow_short=allow_short, force=force, show_progress=True
    )
    typer.echo(
        f"{output}: {report.num_lines} lines of {report.length or 'various numbers of'} codes "
        f"below {report.vocab_size}, {report.num_duplicates} duplicates, {report.num_bad} bad lines"
        + (f" set aside in {report.bad_lines_path}" if report.bad_lines_path else "")
    )


@app.command(epilog="Example: smalti tokenize out/digits/train.parquet -o tokens.parquet --bundle digits")
def tokenize(
    pairs: Annotated[Path, typer.Argument(help="Parquet table of pictures and captions.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file of tokens.")],
    bundle: Bundle = DEFAULT_BUNDLE,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at a time.")] = 256,
    force: Force = False,
) -> None:
    """Turn pictures and captions into tokens with a bundle's tokenizers."""
    _refuse_existing([output], force)
    from smalti.data.tokenize_pairs import tokenize_pairs
    from smalti.pipeline import Pipeline

    pipe = Pipeline.load(bundle)
    num_rows = tokenize_pairs(
        pairs, output, pipe.image_tokenizer, pipe.text_tokenizer, batch_size=batch_size, force=force
    )
    typer.echo(f"{output}: {num_rows} rows")


@app.command(epilog="Example: smalti evaluate digits --data out/digits -o out/report")
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A shipped bundle's name, a folder, or a hub's owner/name.")],
    data: Annotated[Path, typer.Option(help="Folder with test.parquet, or a parquet table of pictures and captions.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for report.json, report.md and the 3×3 figures.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Captions drawn, pictures captioned, and pairs from nothing.")] = 1000,
    best_of: Annotated[str, typer.Option(help="Candidates for reranking; the empty string measures none.")] = "1,4,16",
    seed: Annotated[int, typer.Option(help="The i-th picture is drawn with the seed SEED + i.")] = 0,
    force: Force = False,
) -> None:
    """Measure a bundle of digits: likelihood, prompt and caption accuracy, agreement of pairs, reranking, tokenizer."""
    from smalti.evaluate.galleries import GALLERIES, draw_galleries
    from smalti.evaluate.report import REPORT_FILES, ReportConfig, evaluate_digits, read_held_out
    from smalti.files import refuse_existing
    from smalti.pipeline import Pipeline

    config = ReportConfig(
        num_prompts=num, num_captions=num, num_pairs=num, best_of=_numbers("best_of", best_of), seed=seed
    )
    if output:
        refuse_existing([output / name for name in (*REPORT_FILES, *GALLERIES)], force=force)
    held_out = read_held_out(data)
    pipe = Pipeline.load(bundle)
    command = f"smalti evaluate {bundle} --data {data} --num {num} --best-of {best_of!r} --seed {seed}"
    report = evaluate_digits(pipe, held_out, config, command=command)
    console.print(report.table())
    if output:
        report.write(output, force=force)
        draw_galleries(pipe, held_out.pictures, held_out.captions, output, seed=seed, force=force)
        typer.echo(f"{output}: {', '.join((*REPORT_FILES, *GALLERIES))}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process: 0, or 2 with one line on stderr for what the user can mend."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status. Our own bugs keep their traceback."""
    try:
        result: Any = app(list(arguments), prog_name="smalti", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except TyperException as error:
        return _complain(f"{error.format_message()} Try smalti --help.")
    except (ValueError, OSError) as error:
        return _complain(_one_line(error))
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given; the others are the bundle's own."""
    return {name: value for name, value in settings.items() if value is not None}


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected whole numbers with commas between, such as 1,4,16.") from error


def _output_names(output: Path, n: int) -> list[Path]:
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: pictures are written as PNG; give a name that ends in .png.")
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, n + 1)]


def _refuse_existing(outputs: Sequence[Path], force: bool) -> None:
    from smalti.files import refuse_existing

    refuse_existing(outputs, force=force)


def _save(pictures: Sequence[Any], outputs: Sequence[Path], force: bool) -> None:
    from smalti.pictures import save_picture

    for picture, output in zip(pictures, outputs, strict=True):
        save_picture(picture, output, force=force)
        typer.echo(output)


if __name__ == "__main__":
    main()
