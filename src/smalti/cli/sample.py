"""The command `sample`: thousands of pictures for measuring."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.cli.options import interval_of, settings_given
from smalti.default_bundle import SHIPPED
from smalti.errors import InputError
from smalti.stopping import resuming

app = typer.Typer()


@app.command(
    epilog="Examples: smalti sample --bundle mnist-classes --classes all -n 50000 -o samples.npz · smalti sample "
    "--bundle out/t2i --prompts evaluation_metadata.jsonl --per-prompt 4 --layout geneval -o out/geneval · smalti "
    "sample --bundle out/t2i --prompts coco_captions.csv -n 30000 -o coco.npz --workers 8"
)
def sample(
    context: typer.Context,
    *,
    bundle: Annotated[str, typer.Option(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File that ends in .npz (arr_0, as ADM has it) or .parquet, or a folder."),
    ],
    classes: Annotated[
        str | None, typer.Option(help="all, or numbers, ranges and names with commas between: 0,3,7-9.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV, JSON, JSON lines, parquet or text with prompts, or a folder with a .txt file for each."
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option("-n", "--num", min=1, help="Pictures in all (default: --per-prompt of each prompt).")
    ] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of the prompts (default: found by its name).")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Classes of pictures: balanced (each as often) or random (by the seed).")
    ] = "balanced",
    layout: Annotated[
        str, typer.Option(help="Of a folder, for a benchmark's own judge: plain, geneval, geneval2, dpg.")
    ] = "plain",
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn with the seed SEED + i.")] = 0,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes; the pictures do not depend on it.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Pictures drawn at a time.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, 1 the model's own distribution.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the K most likely tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the fewest tokens whose probability reaches P.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens at least P times as likely as the likeliest.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    guidance_schedule: Annotated[str | None, typer.Option(help="constant, linear, cosine.")] = None,
    guidance_power: Annotated[float | None, typer.Option(help="The schedule's time to this power.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Guide only the codes START:END of a picture, as 0:64.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="A caption to steer away from; needs guidance.")] = None,
    weights: Annotated[str, typer.Option(help="How matrices are kept: float32, bfloat16, int8.")] = "float32",
    dtype: Annotated[str, typer.Option(help="What is computed in: auto, float32, bfloat16.")] = "auto",
    text_encoder: Annotated[
        str | None, typer.Option(help="For a bundle that reads captions as features: the folder of a T5 encoder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Draw many pictures of classes or of a list of prompts, to measure them. If it is stopped, run it again: it
    resumes.

    Picture i has the seed SEED + i and is the same however many processes draw. Beside the output stands a card of how
    it was drawn, which smalti evaluate samples takes over.
    """
    from smalti.bundle import classes_of
    from smalti.data.prompt_lists import read_prompts
    from smalti.tasks.draw_samples import SamplingConfig, Subjects, draw_samples, parse_classes

    if (classes is None) == (prompts is None):
        raise InputError("what to draw? Give --classes for a bundle of classes, or --prompts for one of captions.")
    sampling = settings_given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        guidance_power=guidance_power,
        guidance_interval=None if guidance_interval is None else interval_of(guidance_interval),
    )
    if classes is not None:
        given = {"--per-prompt": per_prompt != 1, "--negative-prompt": negative_prompt, "--text-encoder": text_encoder}
        for name in (name for name, there in given.items() if there):
            raise InputError(f"a class is drawn by itself, without {name}; leave it out.")
        if num is None:
            raise InputError("how many pictures? Give -n, such as -n 50000.")
        subjects = Subjects(labels=parse_classes(classes, classes_of(bundle)))
    else:
        assert prompts is not None
        subjects = Subjects(prompts=read_prompts(prompts, column=caption_column))
        most = len(subjects.prompts or ()) * per_prompt
        if num is not None and num > most:
            raise InputError(f"-n is {num}, but {prompts} gives {most} pictures; raise --per-prompt for more.")
        num = num or most
    settings: dict[str, Any] = {"weights": weights, "dtype": dtype, "text_encoder": text_encoder}
    config = SamplingConfig(
        num=num,
        seed=seed,
        labels=labels,
        per_prompt=per_prompt,
        batch_size=batch_size,
        workers=workers,
        sampling=sampling,
        negative_prompt=negative_prompt,
        **settings,
    )
    how: dict[str, Any] = {"layout": layout, "command": _command(context), "force": force, "show_progress": not quiet}
    with resuming():
        draw_samples(bundle, subjects, output, config, **how)
    typer.echo(f"{output}: {num:,} pictures")


def _command(context: typer.Context) -> str:
    """As it was typed."""
    return shlex.join(["smalti", *(context.obj or [])])
