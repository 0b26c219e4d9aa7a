"""The command `complete`: captions, pictures, or lines from file to file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.bounds import MAX_CANDIDATES, MAX_PICTURES
from smalti.cli.options import (
    OF_LINES,
    OF_PICTURES,
    BundleName,
    Force,
    Seed,
    Temperature,
    TopK,
    TopP,
    output_names,
    refuse_options,
    refuse_outputs,
    save_pictures,
    settings_given,
    usual_bundle_for_picture,
)
from smalti.stopping import resuming

app = typer.Typer()


@app.command(
    epilog='Examples: smalti complete "dark green" -n 3 · smalti complete --picture eight.png --rows 3 -o new.png · '
    "smalti complete prefixes.txt -o completed.txt --bundle out/lines/bundle"
)
def complete(
    beginning: Annotated[
        str | None,
        typer.Argument(
            help="First words of a caption, or, with --picture, a whole caption for it; for a bundle of lines, the "
            "file of prefixes."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Keep the first rows of this picture's codes and draw the rest.", rich_help_panel=OF_PICTURES
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=0, help="How many rows of codes to keep of the picture: 3.", rich_help_panel=OF_PICTURES),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PNG file for completed pictures, or text file for lines.")
    ] = None,
    bundle: BundleName = None,
    seed: Seed = 0,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            max=MAX_PICTURES,
            help="How many to make: 1; the i-th is drawn with the seed SEED + i.",
            rich_help_panel=OF_PICTURES,
        ),
    ] = None,
    force: Force = False,
    scale: Annotated[
        int | None,
        typer.Option(help="Enlarge each pixel to this many by this many.", rich_help_panel=OF_PICTURES),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="1 is off, larger follows the caption.", rich_help_panel=OF_PICTURES),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="sample (at temperature 0.9), greedy, beam or best-of-n.", rich_help_panel=OF_LINES),
    ] = None,
    num_candidates: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_CANDIDATES, help="Lines that best-of-n draws: 16.", rich_help_panel=OF_LINES),
    ] = None,
    beam_width: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_CANDIDATES, help="Lines that beam keeps in view: 8.", rich_help_panel=OF_LINES),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Lines completed at a time: 256.", rich_help_panel=OF_LINES)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.", rich_help_panel=OF_LINES)] = False,
) -> None:
    """Complete the beginning of a caption, a picture from its upper rows, or every line of a file.

    With a bundle of lines every prefix of a text file is completed: same tags, same order, the prefix untouched; OUTPUT
    .log_probs.csv gets each line's own log-likelihood, and a run that was stopped resumes when it is started again.
    """
    from smalti.bundle import Bundle

    bundle = usual_bundle_for_picture(bundle, picture)
    loaded = Bundle.load(bundle)
    of_pictures = settings_given(picture=picture, rows=rows, n=n, scale=scale, guidance_scale=guidance_scale)
    of_lines = settings_given(
        strategy=strategy, num_candidates=num_candidates, beam_width=beam_width, batch_size=batch_size
    )
    sampling = settings_given(temperature=temperature, top_k=top_k, top_p=top_p)
    if loaded.is_lines:
        refuse_options(of_pictures, bundle, "lines")
        if beginning is None or output is None:
            raise ValueError(
                "lines are completed from file to file: smalti complete PREFIXES -o OUTPUT --bundle BUNDLE."
            )
        with resuming():
            _complete_lines(Path(beginning), output, loaded, force, quiet, seed=seed, **of_lines, **sampling)
        return
    refuse_options(of_lines, bundle, loaded.kind)
    from smalti.tasks.images import Pipeline

    pipe = Pipeline(loaded)
    given = {**sampling, **settings_given(guidance_scale=guidance_scale)}
    if picture is None:
        if beginning is not None and Path(beginning).is_file():
            raise ValueError(
                f"{beginning} is a file, and {bundle} a bundle of pictures: give a picture with --picture, or --bundle "
                "with a bundle of lines."
            )
        for line in pipe.complete_caption(beginning or "", seed=seed, n=n or 1, **given):
            typer.echo(line)
        return
    if output is None:
        raise ValueError("a completed picture needs a file to go to: add -o FILE.png.")
    outputs = output_names(output, n or 1)
    refuse_outputs(outputs, force)
    kept = 3 if rows is None else rows
    drawn = pipe.complete(picture, rows=kept, caption=beginning, seed=seed, n=n or 1, scale=scale, **given)
    save_pictures(drawn, outputs, force)


def _complete_lines(
    prefixes: Path, output: Path, bundle: Any, force: bool, quiet: bool, *, batch_size: int = 256, **settings: Any
) -> None:
    from smalti.tasks.line_files import LIKELIHOOD_SUFFIX, complete_file
    from smalti.tasks.lines import CompleteConfig, LineModel

    config = CompleteConfig(**settings)
    drawing = {"temperature", "top_k", "top_p"}
    used = {"sample": drawing, "best-of-n": drawing | {"num_candidates"}, "beam": {"beam_width"}, "greedy": set()}
    for name in sorted(settings.keys() - used[config.strategy] - {"strategy", "seed"}):
        raise ValueError(f"strategy {config.strategy} has no use for --{name.replace('_', '-')}; leave it out.")
    how = {"batch_size": batch_size, "force": force, "show_progress": not quiet}
    num_lines = complete_file(LineModel(bundle), prefixes, output, config, **how)
    typer.echo(f"{output}: {num_lines} lines, log-likelihoods in {output}{LIKELIHOOD_SUFFIX}")
