"""The command `edit`: the marked part of a picture drawn anew."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import (
    BundleName,
    Count,
    Force,
    Guidance,
    Quiet,
    Scale,
    Seed,
    Temperature,
    TopK,
    TopP,
    output_names,
    refuse_outputs,
    save_pictures,
    settings_given,
    usual_bundle_for_picture,
)

app = typer.Typer()


@app.command(
    epilog='Examples: smalti edit eight.png --mask mask.png "dark green nine on bright cyan" -o nine.png · '
    'smalti edit woman.png --mask mask.png "woman astronaut, dark skin tone" -o edited.png -n 4 --particles 64'
)
def edit(
    picture: Annotated[Path, typer.Argument(help="Picture file, as large as the bundle's pictures or enlarged whole.")],
    prompt: Annotated[str, typer.Argument(help="The caption that the whole picture is to fit.")],
    *,
    mask: Annotated[
        Path,
        typer.Option(
            help="Picture file as large as the picture. What is transparent in it is drawn anew; without an alpha "
            "channel, what is bright."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file; with -n 3: NAME-1.png to NAME-3.png.")],
    bundle: BundleName = None,
    seed: Seed = 0,
    n: Count = 1,
    force: Force = False,
    scale: Scale = None,
    particles: Annotated[
        int,
        typer.Option(
            help="Pictures that are drawn at once, and weighed by how well they fit what is kept behind them; 1: the "
            "model draws without looking ahead."
        ),
    ] = 32,
    sweeps: Annotated[
        int, typer.Option(help="How often each drawn code is drawn again given all others, after that.")
    ] = 1,
    negative_prompt: Annotated[str | None, typer.Option(help="A caption to steer away from; needs guidance.")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance_scale: Guidance = None,
    quiet: Quiet = False,
) -> None:
    """Draw the marked part of a picture anew (inpainting, outpainting).

    Where all that is kept stands before what is drawn, in raster order, the model's own draws are exact. Elsewhere
    codes are drawn given all others, those behind them too. Codes of other cells stay as they are; so do the pixels
    that the drawn cells do not reach. Each PNG carries a receipt, from which `smalti replay` redraws it.
    """
    from smalti.engine.resampling import ResampleConfig
    from smalti.tasks.edit import check_cells, read_mask
    from smalti.tasks.edit import edit as draw_parts
    from smalti.tasks.images import Pipeline

    resampling = None if particles == 1 else ResampleConfig(num_particles=particles, num_sweeps=sweeps)
    outputs = output_names(output, n)
    refuse_outputs(outputs, force)
    pipe = Pipeline.load(usual_bundle_for_picture(bundle, picture))
    check_cells(pipe)
    drawn = draw_parts(
        pipe,
        picture,
        read_mask(mask, picture, pipe.grid),
        prompt,
        seed=seed,
        n=n,
        negative_prompt=negative_prompt,
        scale=scale,
        resampling=resampling,
        blended=True,
        show_progress=not quiet,
        **settings_given(temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale),
    )
    save_pictures(drawn, outputs, force)
