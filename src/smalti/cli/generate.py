"""The command `generate`: pictures of a caption, of a class, or of a file of captions."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.bounds import MAX_CANDIDATES
from smalti.cli.options import (
    OF_TABLES,
    Count,
    Coupling,
    Force,
    Guidance,
    Interval,
    MinP,
    Power,
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
    refuse_options,
    refuse_outputs,
    save_pictures,
    settings_given,
)
from smalti.default_bundle import CLASSES_BUNDLE, DEFAULT_BUNDLE, SHIPPED, Choice, bundle_for_prompt
from smalti.errors import InputError
from smalti.stopping import resuming

app = typer.Typer()


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
    of_captions = settings_given(negative_prompt=negative_prompt, rerank=rerank)
    of_captions |= {"best_of": best_of} if best_of > 1 else {}
    if captions is not None:
        of_one = settings_given(prompt=prompt, class_=class_, **of_captions, scale=scale)
        of_one |= {name: given for name, given in (("n", n > 1), ("grid", grid)) if given}
        for name in of_one:
            raise InputError(
                f"--captions draws one picture of each caption; {name.rstrip('_')} is for one: leave it out."
            )
        _draw_table(captions, output, bundle, seed, workers, ray, force, text_encoder, sampling)
        return
    if workers or ray:
        raise InputError("--workers and --ray share the parts of a table: give --captions FILE, or leave them out.")
    if class_ is not None:
        of_captions |= settings_given(prompt=prompt, text_encoder=text_encoder, clip=clip)
        pipe, chosen = _for_class(bundle, of_captions, weights)
        draw = partial(pipe.generate, class_)
    elif prompt is None:
        raise InputError("what to draw? Give a caption, or --class with a bundle of classes.")
    else:
        pipe, chosen = _for_prompt(prompt, of_captions, bundle, weights, text_encoder, clip)
        draw = partial(pipe.generate, prompt, **of_captions)
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


def _for_class(bundle: str | None, of_captions: dict[str, Any], weights: str) -> tuple[Any, Choice | None]:
    """What draws classes, and what chose its bundle if nobody named one. Raises InputError for what only captions have
    a use for."""
    from smalti.tasks.classes import ClassPipeline

    for name in of_captions:
        what = "a caption" if name == "prompt" else f"--{name.replace('_', '-')}"
        raise InputError(f"a class is drawn by itself, without {what}; leave it out.")
    chosen = Choice(CLASSES_BUNDLE, "it draws classes") if bundle is None else None
    return ClassPipeline.load(bundle or CLASSES_BUNDLE, weights=weights), chosen


def _for_prompt(
    prompt: str,
    of_captions: dict[str, Any],
    bundle: str | None,
    weights: str,
    text_encoder: str | None,
    clip: Path | None,
) -> tuple[Any, Choice | None]:
    """What draws a caption, and what chose its bundle if nobody named one. Raises InputError, saying how, for a bundle
    that draws something else, and for options that it has no use for."""
    from smalti.bundle import Bundle
    from smalti.tasks.features import FeaturePipeline, captions_face

    chosen = None
    if bundle is None:
        chosen = bundle_for_prompt(prompt, of_captions.get("negative_prompt", ""))
        bundle = chosen.name
    loaded = Bundle.load(bundle, weights=weights)
    if loaded.classes is not None:
        raise InputError(
            f"{bundle} draws classes, not captions: give --class, a number from 0 to {loaded.classes.num - 1}"
            f"{' or a name' if loaded.classes.names else ''}."
        )
    pipe = captions_face(loaded, text_encoder)
    if isinstance(pipe, FeaturePipeline):
        candidates = {name: given for name, given in of_captions.items() if name != "negative_prompt"}
        refuse_options(candidates, bundle, loaded.kind)
    elif clip is not None:
        from smalti.tasks.clip import Clip

        pipe.clip = Clip(clip)
    return pipe, chosen
