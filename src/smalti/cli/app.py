"""The command line: parses, calls, prints. What a command needs is imported inside it, so that each starts fast."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.exceptions import TyperException

from smalti.bounds import MAX_CANDIDATES, MAX_PICTURES
from smalti.cli.doctor import app as doctor_app
from smalti.cli.edit import app as edit_app
from smalti.cli.evaluate import app as evaluate_app
from smalti.cli.evaluate import parse_size
from smalti.cli.gallery import app as gallery_app
from smalti.cli.interop import app as interop_app
from smalti.cli.options import (
    BundleName,
    Count,
    Coupling,
    Force,
    Guidance,
    Interval,
    MinP,
    Power,
    Quiet,
    Scale,
    Schedule,
    Seed,
    Speculative,
    Temperature,
    TextEncoderName,
    TopK,
    TopP,
    interval_of,
    output_names,
    refuse_outputs,
    save_pictures,
    settings_given,
    usual_bundle_for_picture,
)
from smalti.cli.plan import app as plan_app
from smalti.cli.sample import app as sample_app
from smalti.cli.scenes import data_scenes
from smalti.cli.train import RECIPE_NAMES
from smalti.cli.train import app as train_app
from smalti.cli.upsampler import app as upsampler_app
from smalti.default_bundle import CLASSES_BUNDLE, DEFAULT_BUNDLE, SHIPPED, Choice, bundle_for_prompt
from smalti.errors import MAX_MESSAGE, InputError, InputWarning, shortened
from smalti.stopping import Stopped, resuming, stoppable, without_debris
from smalti.tables import print_table

app = typer.Typer(
    name="smalti",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Make the tables that training reads.", no_args_is_help=True)
data_app.command(
    "scenes",
    epilog="Examples: smalti data scenes out/scenes · smalti data scenes out/few --rows 1000 --held-out 100 --seed 7",
)(data_scenes)
app.add_typer(data_app, name="data")
app.add_typer(interop_app)
app.add_typer(doctor_app)
app.add_typer(sample_app)
app.add_typer(edit_app)
app.add_typer(gallery_app)
app.add_typer(upsampler_app)
app.add_typer(plan_app)
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")

OF_TABLES = "For a table of captions"
OF_PICTURES, OF_LINES = "For a bundle of pictures", "For a bundle of lines"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"smalti {version('smalti')}")
        raise typer.Exit


def _set_debug(asked: bool) -> None:
    global _debug
    _debug = asked


def _set_device(name: str | None) -> None:
    """For this command and the processes that it starts. Said at once if it is not there."""
    if name is not None:
        from smalti.devices import DEVICE_VARIABLE, choose_device

        choose_device(name)
        os.environ[DEVICE_VARIABLE] = name


def _set_dtype(name: str | None) -> None:
    if name is not None:
        from smalti.devices import DTYPE_VARIABLE, choose_dtype

        choose_dtype(name)
        os.environ[DTYPE_VARIABLE] = name


_debug = False
"""Whether errors are shown with their traceback and what caused them."""


@app.callback(epilog=f"Bundles that ship: {SHIPPED}. Recipes to train: {RECIPE_NAMES}.")
def options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error, with its cause."
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            callback=_set_device,
            is_eager=True,
            help="What to compute on: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            callback=_set_dtype,
            is_eager=True,
            help="What transformers draw and score in: auto (float32), float32, bfloat16.",
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Autoregressive image generation with discrete tokens: tokenize, train, measure, generate."""


@app.command(
    epilog='Examples: smalti generate "dark green eight on bright cyan" -o eight.png · '
    "smalti generate --class 207 -o dog.png --bundle out/c2i-b --guidance-scale 4 · "
    'smalti generate "a red fox in the snow" -o fox.png --bundle out/t2i-xl --text-encoder flan-t5-xl · '
    "smalti generate --captions captions.csv -o drawn.parquet --bundle out/cc3m/bundle --ray --workers 4"
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The caption: any text, or words that the bundle knows.", show_default=False)
    ] = None,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file; with -n 3: NAME-1.png to NAME-3.png.")],
    class_: Annotated[
        str | None,
        typer.Option("--class", help="Instead of a caption, for a bundle of classes: a class's number or name."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a caption: a file of them (.txt, .csv, .tsv, .jsonl, .parquet). Their pictures' codes go "
            "into a token table, OUTPUT.parquet, in parts: if it is stopped, run it again.",
            rich_help_panel=OF_TABLES,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that share the parts; 0: this one alone.", rich_help_panel=OF_TABLES)
    ] = 0,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Have actors of a Ray cluster share them, as many.", rich_help_panel=OF_TABLES),
    ] = False,
    bundle: Annotated[
        str | None,
        typer.Option(
            help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name (default: digits if it knows "
            "every word of the prompt, else emoji, which takes any)."
        ),
    ] = None,
    seed: Seed = 0,
    n: Count = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="Put all pictures into one file, in a nearly square grid.")
    ] = False,
    force: Force = False,
    scale: Scale = None,
    negative_prompt: Annotated[str | None, typer.Option(help="A caption to steer away from; needs guidance.")] = None,
    best_of: Annotated[
        int,
        typer.Option(min=1, max=MAX_CANDIDATES, help="Candidates for each picture, of which the best is kept."),
    ] = 1,
    rerank: Annotated[
        str | None,
        typer.Option(
            help="What is best: the bundle's dual encoder 'contrastive', p(caption | picture) 'caption', that times "
            "p(picture | caption) 'both', mutual information 'pmi', or p(picture | caption) 'picture' (default: the "
            "bundle's choice, or the first of these that it has); or, with --clip, 'clip'."
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a CLIP model, as transformers saves it, that reranks (extra t5).", metavar="FOLDER"
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    guidance_scale: Guidance = None,
    guidance_schedule: Schedule = None,
    guidance_power: Power = None,
    guidance_interval: Interval = None,
    speculative: Speculative = None,
    coupling: Coupling = None,
    weights: Annotated[
        str, typer.Option(help="How matrices are kept: float32, or in a half or a quarter of it: bfloat16, int8.")
    ] = "float32",
    text_encoder: TextEncoderName = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="Make pictures larger by the bundle's upsampler, if it has one.")
    ] = False,
) -> None:
    """Draw pictures of a caption, or of a class. Each PNG carries a receipt, from which `smalti replay` redraws it."""
    outputs = [output] if captions is not None else output_names(output, 1 if grid else n)
    refuse_outputs(outputs, force)
    if (rerank or clip) and best_of == 1:
        given = f"--rerank {rerank}" if rerank else "--clip"
        raise InputError(f"{given} has one picture to choose from; give --best-of 2 or more as well.")
    sampling = settings_given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        guidance_power=guidance_power,
        guidance_interval=None if guidance_interval is None else interval_of(guidance_interval),
        speculative=speculative,
        coupling=coupling,
    )
    if captions is not None:
        of_one = settings_given(
            prompt=prompt, class_=class_, negative_prompt=negative_prompt, rerank=rerank, scale=scale
        )
        of_one |= {name: given for name, given in (("n", n > 1), ("grid", grid), ("best_of", best_of > 1)) if given}
        for name in of_one:
            raise InputError(
                f"--captions draws one picture of each caption; {name.rstrip('_')} is for one: leave it out."
            )
        _draw_table(captions, output, bundle, seed, workers, ray, force, text_encoder, sampling)
        return
    if workers or ray:
        raise InputError("--workers and --ray share the parts of a table: give --captions FILE, or leave them out.")
    chosen = None
    if class_ is not None:
        of_captions = settings_given(
            prompt=prompt, negative_prompt=negative_prompt, rerank=rerank, text_encoder=text_encoder
        )
        of_captions |= settings_given(clip=clip)
        of_captions |= {} if best_of == 1 else {"best_of": best_of}
        if bundle is None:
            chosen = Choice(CLASSES_BUNDLE, "it draws classes")
            bundle = chosen.name
        pipe = _class_pipeline(bundle, of_captions, weights)
        draw = partial(pipe.generate, class_)
    elif prompt is None:
        raise InputError("what to draw? Give a caption, or --class with a bundle of classes.")
    else:
        from smalti.tasks.features import FeaturePipeline, captions_face

        if bundle is None:
            chosen = bundle_for_prompt(prompt, negative_prompt or "")
            bundle = chosen.name
        pipe = captions_face(_loaded_for_prompt(bundle, weights), text_encoder)
        candidates = {} if best_of == 1 and rerank is None else {"best_of": best_of, "rerank": rerank}
        if clip is not None and not isinstance(pipe, FeaturePipeline):
            from smalti.tasks.clip import Clip

            pipe.clip = Clip(clip)
        if pipe.bundle.reads_features:
            _refuse_options(candidates, bundle, pipe.bundle.kind)
        draw = partial(pipe.generate, prompt, negative_prompt=negative_prompt, **candidates)
    if grid:
        from smalti.image_files import grid_size
        from smalti.tasks.codes import drawn_pictures

        size = drawn_pictures(pipe.bundle, upscale)
        grid_size(n, size.width * (scale or size.scale), size.height * (scale or size.scale))
    pictures = draw(seed=seed, n=n, scale=scale, upscale=upscale, **sampling)
    if grid:
        from smalti.image_files import to_grid

        pictures = [to_grid(pictures)]
    save_pictures(pictures, outputs, force)
    if chosen:
        typer.echo(f"drawn by the bundle {chosen.name} ({chosen.why}); --bundle chooses another", err=True)


def _draw_table(
    captions: Path,
    output: Path,
    bundle: str | None,
    seed: int,
    workers: int,
    ray: bool,
    force: bool,
    text_encoder: str | None,
    sampling: dict[str, Any],
) -> None:
    from smalti.data.captions import read_captions
    from smalti.tasks.draw_table import DrawTableConfig, draw_table

    if output.suffix.lower() != ".parquet":
        raise InputError(f"{output}: codes go into a token table; give a name that ends in .parquet.")
    config = DrawTableConfig(seed=seed, workers=workers, ray=ray)
    lines = read_captions(captions)
    how = {"text_encoder": text_encoder, "force": force}
    with resuming():
        num_rows = draw_table(bundle or DEFAULT_BUNDLE, lines, output, config, **how, **sampling)
    typer.echo(f"{output}: {num_rows} rows")


def _class_pipeline(bundle: str, of_captions: dict[str, Any], weights: str) -> Any:
    """What draws classes. Raises InputError for what only captions have a use for."""
    from smalti.tasks.classes import ClassPipeline

    for name in of_captions:
        what = "a caption" if name == "prompt" else f"--{name.replace('_', '-')}"
        raise InputError(f"a class is drawn by itself, without {what}; leave it out.")
    return ClassPipeline.load(bundle, weights=weights)


def _loaded_for_prompt(name: str, weights: str) -> Any:
    """A bundle that a caption was given for. Raises InputError, saying how, for one that draws something else."""
    from smalti.bundle import Bundle

    loaded = Bundle.load(name, weights=weights)
    if loaded.classes is not None:
        raise InputError(
            f"{name} draws classes, not captions: give --class, a number from 0 to {loaded.classes.num - 1}"
            f"{' or a name' if loaded.classes.names else ''}."
        )
    return loaded


@app.command(epilog="Examples: smalti replay eight.png · smalti replay bird.png -o again.png --bundle out/cc3m/bundle")
def replay(
    picture: Annotated[Path, typer.Argument(help="PNG file that generate or complete wrote, or a grid of them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PNG file for the picture drawn again (default: none).")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="The bundle it was drawn with (default: the one that its receipt names).")
    ] = None,
    force: Force = False,
    text_encoder: TextEncoderName = None,
) -> None:
    """Redraw a picture from its receipt, and check that all codes and pixels are the same.

    The exit code is 0 if they are, and 1 if not: then the first difference is printed.
    """
    if output is not None:
        refuse_outputs(output_names(output, 1), force)
    from smalti.tasks.replay import replay as draw_again

    found = draw_again(picture, bundle, text_encoder)
    if output is not None:
        save_pictures([found.picture], [output], force)
    if found.difference is not None:
        typer.echo(f"error: {picture} is not drawn again as it was: {found.difference}.", err=True)
        raise typer.Exit(1)
    what = f"{found.num_pictures} pictures, " if found.num_pictures > 1 else ""
    width, height = found.picture.size
    typer.echo(f"{picture}: drawn again identically ({what}{found.num_codes} codes, {width}×{height} pixels)")


@app.command(epilog="Example: smalti caption eight.png")
def caption(
    pictures: Annotated[
        list[Path], typer.Argument(help="Picture files, as large as the bundle's pictures or enlarged whole.")
    ],
    bundle: BundleName = None,
    seed: Seed = 0,
    temperature: Temperature = None,
    guidance_scale: Guidance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print picture, bundle and caption as JSON.")] = False,
) -> None:
    """Print a caption for each picture; without --bundle each by the bundle of its size."""
    from smalti.tasks.images import Pipeline

    given = settings_given(temperature=temperature, guidance_scale=guidance_scale)
    by_bundle: dict[str, list[int]] = {}
    for i, path in enumerate(pictures):
        by_bundle.setdefault(str(usual_bundle_for_picture(bundle, path)), []).append(i)
    captions, bundles = [""] * len(pictures), [""] * len(pictures)
    for name, places in by_bundle.items():
        found = Pipeline.load(name).caption([pictures[i] for i in places], seed=seed, **given)
        for i, line in zip(places, found, strict=True):
            captions[i], bundles[i] = line, name
    if as_json:
        import json

        columns = zip(map(str, pictures), bundles, captions, strict=True)
        typer.echo(json.dumps([dict(zip(("picture", "bundle", "caption"), row, strict=True)) for row in columns]))
        return
    for line in captions:
        typer.echo(line)


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
        _refuse_options(of_pictures, bundle, "lines")
        if beginning is None or output is None:
            raise ValueError(
                "lines are completed from file to file: smalti complete PREFIXES -o OUTPUT --bundle BUNDLE."
            )
        with resuming():
            _complete_lines(Path(beginning), output, loaded, force, quiet, seed=seed, **of_lines, **sampling)
        return
    _refuse_options(of_lines, bundle, loaded.kind)
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


def _refuse_options(options: dict[str, Any], bundle: str, kind: str) -> None:
    for name in options:
        raise ValueError(
            f"{bundle} is a bundle of {kind}, which has no use for --{name.replace('_', '-')}; leave it out."
        )


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
    _refuse_options(settings_given(output=output, batch_size=batch_size, force=force or None), bundle, loaded.kind)
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


@app.command(epilog="Example: smalti info digits")
def info(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ] = DEFAULT_BUNDLE,
    list_bundles: Annotated[bool, typer.Option("--list", help="List the bundles that ship with the package.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """What a bundle holds: parameters, vocabulary, layout, measured figures."""
    from smalti.bundle import Bundle, read_config, shipped_bundles

    if list_bundles:
        for name, directory in shipped_bundles().items():
            num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            typer.echo(f"{name}  {num_bytes / 1e6:.1f} MB  {' · '.join(read_config(directory)['layout']['orders'])}")
        return
    rows = _info(Bundle.load(bundle))
    if as_json:
        import json

        typer.echo(json.dumps(dict(rows), ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _info(bundle: Any) -> Iterator[tuple[str, str]]:
    layout, pictures, image_tokenizer = bundle.layout, bundle.pictures, bundle.image_tokenizer
    yield "bundle", bundle.name
    yield "parameters", f"{bundle.model.num_parameters:,} (transformer)"
    if image_tokenizer is not None:
        yield "parameters of the image tokenizer", f"{sum(p.numel() for p in image_tokenizer.parameters()):,}"
    yield "vocabulary", str(layout.vocabulary)
    if words := getattr(bundle.text_tokenizer, "words", None):
        yield "words", " ".join(words) if len(words) <= 200 else f"{len(words):,} pieces of words"
    if image_tokenizer is not None:
        rows, columns = image_tokenizer.config.grid
        yield "pictures", f"{pictures.width}×{pictures.height}, codes {rows}×{columns}"
    if bundle.upsampler is not None:
        height, width = bundle.upsampler.config.output_size
        yield "upsampler", f"to {width}×{height} (--upscale), {bundle.upsampler.num_parameters:,} parameters"
    if bundle.classes is not None:
        names = bundle.classes.names
        null = "none" if bundle.null_label is None else f"label {bundle.null_label}"
        named = "" if names is None else f": {', '.join(names) if len(names) <= 20 else ', '.join(names[:3]) + ' …'}"
        yield "classes", f"{bundle.classes.num:,}{named}; null condition: {null}"
    if bundle.reads_features:
        known, num_features = bundle.text_encoder, bundle.model.num_features
        name = "not said" if known is None or known.name is None else known.name
        yield "text encoder", f"{name}; {bundle.model.config.feature_width} features a token, of {num_features} tokens"
    if bundle.is_lines:
        yield "lines", f"{bundle.image_length} codes in 0..{layout.vocabulary['image'].size - 1}"
    for name, order in layout.orders.items():
        yield f"layout {name} ({order.weight:g})", str(order)
    if image_tokenizer is not None:
        yield "draws with", f"{bundle.sampling.picture}"
    yield "weights", f"sha256 {bundle.weights_sha256}"
    yield from ((name, str(value)) for name, value in bundle.figures.items())


@data_app.command("digits", epilog="Example: smalti data digits out/digits --mnist folder/with/mnist")
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


@data_app.command(
    "import-lines", epilog="Example: smalti data import-lines codes.txt.gz -o tokens.parquet --skip-bad 10"
)
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


@data_app.command(
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

    behind = [word if word == DISTINCT else _numbers("after", word)[0] for word in after.split(",") if word]
    around = {"before": _numbers("before", before), "after": behind, "code_offset": code_offset}
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


@evaluate_app.command("bundle", epilog="Example: smalti evaluate digits --data out/digits -o out/report")
def evaluate(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with test.parquet, or a parquet table of pictures and captions.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for report.json, report.md and the 3×3 figures.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Captions drawn, pictures captioned, and pairs from nothing.")] = 1000,
    best_of: Annotated[str, typer.Option(help="Candidates for reranking; the empty string measures none.")] = "1,4,16",
    seed: Annotated[int, typer.Option(help="The i-th picture is drawn with the seed SEED + i.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle of digits: likelihood, prompt and caption accuracy, agreement of pairs, reranking, tokenizer."""
    from smalti.evaluate.galleries import GALLERIES, draw_galleries
    from smalti.evaluate.report import REPORT_FILES, ReportConfig, evaluate_digits, read_held_out
    from smalti.files import refuse_existing
    from smalti.progress import stage
    from smalti.tasks.images import Pipeline

    config = ReportConfig(
        num_prompts=num, num_captions=num, num_pairs=num, best_of=_numbers("best_of", best_of), seed=seed
    )
    if output:
        refuse_existing([output / name for name in (*REPORT_FILES, *GALLERIES)], force=force)
    held_out = read_held_out(data)
    pipe = Pipeline.load(bundle)
    command = f"smalti evaluate {bundle} --data {data} --num {num} --best-of {best_of!r} --seed {seed}"
    report = evaluate_digits(pipe, held_out, config, command=command, show_progress=not quiet)
    print_table(report.table())
    if output:
        report.write(output, force=force)
        with stage("drawing galleries", show=not quiet):
            draw_galleries(pipe, held_out.pictures, held_out.captions, output, seed=seed, force=force)
        typer.echo(f"{output}: {', '.join((*REPORT_FILES, *GALLERIES))}")


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


@app.command(epilog="Examples: smalti serve emoji · smalti serve digits emoji --port 9000 --api-key-env SMALTI_KEY")
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help=f"Shipped bundles' names ({SHIPPED}), folders, or a hub's owner/name; the first is the default model."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free; it is printed.")] = 8000,
    capacity: Annotated[int, typer.Option(min=1, max=4096, help="Sequences that each bundle draws at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=0, max=MAX_PICTURES, help="Sequences that may wait; more: 429.")] = 256,
    deadline: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
    executor: Annotated[
        str | None,
        typer.Option(help="What runs the steps: cuda_graph, native, packed, eager (default: the first that can)."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that clients must send.")
    ] = None,
) -> None:
    """Serve bundles over HTTP: OpenAI's Images API, captions, scores, and a page to draw at. Ctrl-C or SIGTERM ends it.

    Requests are drawn together, each as if it were alone: the same prompt, seed and settings give the picture that
    smalti generate draws.
    """
    import os

    key = None
    if api_key_env is not None and not (key := os.environ.get(api_key_env)):
        raise InputError(f"--api-key-env {api_key_env}: there is no such variable, or it is empty; set it to the key.")
    try:
        from smalti.serve.app import ServeConfig
        from smalti.serve.run import serve as serve_bundles
    except ImportError as error:
        raise InputError(f"this needs {error.name}, which is in an extra: pip install 'smalti[serve]'.") from error
    config = ServeConfig(capacity=capacity, max_queue=max_queue, deadline_s=deadline, executor=executor, api_key=key)

    def announce(address: str, service: Any) -> None:
        models = ", ".join(f"{name} ({worker.executor})" for name, worker in service.workers.items())
        typer.echo(f"{address}: {models}; API at {address}/v1")
        if host not in ("127.0.0.1", "localhost", "::1") and key is None:
            typer.echo("warning: open to the network without a key; --api-key-env NAME sets one.", err=True)

    serve_bundles(bundles, config, host=host, port=port, announce=announce)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process: 0, or 2 with one line on stderr for what the user can mend, or 130 and 143
    with one line for Ctrl-C and SIGTERM."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status. Our own bugs keep their traceback."""
    with without_debris():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    for argument in arguments:
        if "\0" in argument:
            return _complain(f"{argument!r} holds a null byte, which no command line can: leave it out.")
    try:
        with stoppable(), _warnings_in_one_line():
            result: Any = app(list(arguments), prog_name="smalti", standalone_mode=False, obj=list(arguments))
        return result if isinstance(result, int) else 0
    except TyperException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if not message:  # a command group alone: its help stands there already
            return 2
        return _complain(f"{message.rstrip('.')}. Try {context.command_path if context else 'smalti'} --help.")
    except (ValueError, OSError) as error:
        if _debug:
            traceback.print_exception(error)
        return _complain(_one_line(error))
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr)
        return stopped.exit_status
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints what is said to the user of a command as plainly as errors are. Other warnings stay as they are."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, InputWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                plain(message, category, *rest, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", InputWarning)
        yield


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What a terminal would obey instead of showing, where a message repeats what a file or an argument holds."""


def _complain(message: str) -> int:
    print(
        f"error: {_CONTROL.sub(lambda found: ascii(found[0])[1:-1], shortened(message, MAX_MESSAGE))}", file=sys.stderr
    )
    return 2


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected whole numbers with commas between, such as 1,4,16.") from error


if __name__ == "__main__":
    main()
