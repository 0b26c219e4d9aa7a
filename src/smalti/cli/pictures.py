"""The commands `replay` and `caption`: what pictures tell."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import (
    BundleName,
    Force,
    Guidance,
    Seed,
    Temperature,
    TextEncoderName,
    output_names,
    refuse_outputs,
    save_pictures,
    settings_given,
    usual_bundle_for_picture,
)

app = typer.Typer()


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
