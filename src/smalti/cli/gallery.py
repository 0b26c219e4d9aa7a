"""The command `gallery`: a list of prompts drawn, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.bounds import MAX_CANDIDATES
from smalti.cli.options import (
    Force,
    Guidance,
    Quiet,
    Scale,
    Temperature,
    TextEncoderName,
    TopK,
    TopP,
    settings_given,
)
from smalti.default_bundle import ANY_WORDS_BUNDLE, SHIPPED
from smalti.stopping import resuming

app = typer.Typer()


@app.command(
    epilog="Examples: smalti gallery PartiPrompts.tsv -o gallery · smalti gallery PartiPrompts.tsv -o animals "
    "--category Animals --num 50 --best-of 4 · smalti gallery prompts.txt -o gallery --bundle digits -n 3"
)
def gallery(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="PartiPrompts.tsv, or any table of prompts, with columns Category, Challenge and Note or without; or "
            "a text file with a prompt on each line."
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for index.html, gallery.json and pictures/.")],
    bundle: Annotated[
        str, typer.Option(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ] = ANY_WORDS_BUNDLE,
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="Pictures of each prompt.")] = 1,
    best_of: Annotated[
        int, typer.Option(min=1, max=MAX_CANDIDATES, help="Candidates for each picture, of which the best is kept.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Each prompt has seeds of its own from here on, by its row in the file.")
    ] = 0,
    category: Annotated[str | None, typer.Option(help="Only prompts of this category.")] = None,
    challenge: Annotated[str | None, typer.Option(help="Only prompts of this challenge.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Only the first NUM of them.")] = None,
    column: Annotated[
        str | None, typer.Option("--caption-column", help="Column of the prompts (default: found by its name).")
    ] = None,
    scale: Scale = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="Make pictures larger by the bundle's upsampler, if it has one.")
    ] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance_scale: Guidance = None,
    text_encoder: TextEncoderName = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Draw a list of prompts: a page by category and challenge, which opens without a network.

    If it is stopped, run it again: it resumes. Prompts with words that the bundle does not know are shown and counted,
    not drawn.
    """
    import shlex
    import sys

    from smalti.bundle import Bundle
    from smalti.evaluate.prompt_gallery import PAGE, GalleryConfig, chosen_prompts, draw_gallery, read_prompts
    from smalti.tasks.features import captions_face

    sampling = settings_given(temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)
    config = GalleryConfig(n=n, best_of=best_of, seed=seed, scale=scale, upscale=upscale, sampling=sampling)
    chosen = chosen_prompts(read_prompts(prompts, column), category=category, challenge=challenge, num=num)
    pipe = captions_face(Bundle.load(bundle), text_encoder)
    with resuming():
        counts = draw_gallery(
            pipe,
            chosen,
            output,
            config,
            source=str(prompts),
            command=shlex.join(["smalti", *sys.argv[1:]]),
            force=force,
            show_progress=not quiet,
        )
    typer.echo(f"{output / PAGE}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
