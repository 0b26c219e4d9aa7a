"""The command `train`: a whole system from a recipe, or one part of it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smalti.stopping import resuming

_RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"), key=lambda path: path.stem)
RECIPE_NAMES = ", ".join(path.stem for path in _RECIPES)
TOKENIZER_RECIPE_NAMES = ", ".join(
    path.stem for path in _RECIPES if "\nsystem: image tokenizer\n" in path.read_text(encoding="utf-8")
)

UPSAMPLER_RECIPE_NAMES = ", ".join(
    path.stem for path in _RECIPES if "\nsystem: upsampler\n" in path.read_text(encoding="utf-8")
)


class RecipeGroup(TyperGroup):
    """`smalti train demo` is short for `smalti train recipe demo`, whatever is not the name of a part."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["recipe", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeGroup,
    help=f"Train a whole system from a recipe (smalti train digits), or one part of one.\n\nRecipes: {RECIPE_NAMES}.",
    no_args_is_help=True,
)


@app.command(
    epilog="Examples: smalti train demo · smalti train digits data.path=mnist train.num_epochs=2 output=out/short · "
    "smalti train lines data=lines.parquet · smalti train c2i data.train=photos image_tokenizer=out/vq16 · "
    "smalti train t2i data=pairs image_tokenizer=out/vq16 text_encoder=flan-t5-base · "
    "smalti train parti data.train=train.parquet data.validation=val.parquet image_tokenizer=out/vit_vqgan"
)
def recipe(
    recipe: Annotated[str, typer.Argument(help=f"A shipped recipe ({RECIPE_NAMES}), or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change, each key=value; the last word of a key is often enough."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a whole system, from data to bundle and report. If it is stopped, run it again: it resumes."""
    import shlex

    from smalti.recipes import load_recipe

    with resuming():
        checked = load_recipe(recipe, settings or [])
        _train_recipe(checked, shlex.join(["smalti", "train", recipe, *(settings or [])]), quiet)


def _train_recipe(checked: Any, command: str, quiet: bool) -> None:
    from smalti.recipes import (
        CaptionsRecipe,
        ClassesRecipe,
        LinesRecipe,
        PartiRecipe,
        PartiScenesRecipe,
        ScenesRecipe,
        TextToImageRecipe,
        TokenizerRecipe,
        UpsamplerRecipe,
    )

    if isinstance(checked, TokenizerRecipe):
        _train_tokenizer(checked, quiet)
        return
    if isinstance(checked, UpsamplerRecipe):
        _train_upsampler(checked, quiet)
        return
    if isinstance(checked, CaptionsRecipe):
        from smalti.systems.captions import train_captions

        bundle = train_captions(checked, command=command, show_progress=not quiet)
        table = f", {checked.output}/samples/table.png (the same prompts on the way)" if checked.watch.prompts else ""
        typer.echo(
            f"\nOpen {checked.output}/model/curves.png{table}. The bundle is {bundle}.\n"
            "Try next:\n"
            f'  smalti generate "a bird on a tree" -o bird.png --bundle {bundle}\n'
            f"  smalti export hf {bundle} {checked.output}/llama"
        )
        return
    output = checked.output
    if isinstance(checked, PartiRecipe):
        from smalti.systems.parti import train_parti

        bundle = train_parti(checked, command=command, show_progress=not quiet)
        table = f", {output}/samples/table.png (the same prompts on the way)" if checked.watch.prompts else ""
        typer.echo(
            f"\nOpen {output}/model/curves.png{table}. The bundle is {bundle}.\n"
            "Try next:\n"
            f'  smalti generate "a bird on a tree" -n 4 -o birds.png --bundle {bundle}\n'
            f"  smalti doctor {bundle}"
        )
        return
    if isinstance(checked, ScenesRecipe | PartiScenesRecipe):
        from smalti.systems.scenes import train_scenes

        bundle = train_scenes(checked, command=command, show_progress=not quiet)
        typer.echo(
            f"\nOpen {output}/prompts.html (pictures of seen and unseen prompts) and {output}/model/curves.png. The "
            f"bundle is {bundle}.\n"
            "Try next:\n"
            f'  smalti generate "a red ring left of a blue square" -o scene.png --bundle {bundle}\n'
            f"  smalti evaluate prompts {bundle}"
        )
        return
    if isinstance(checked, ClassesRecipe):
        from smalti.systems.classes import train_classes

        bundle = train_classes(checked, command=command, show_progress=not quiet)
        typer.echo(
            f"\nOpen {output}/report.md (guidance.png, and classes.png: ten pictures of each class) and\n"
            f"{output}/model/curves.png. The bundle is {bundle}.\n"
            "Try next:\n"
            f"  smalti generate --class 0 -o picture.png --bundle {bundle}\n"
            f"  smalti doctor {bundle}"
        )
        return
    if isinstance(checked, TextToImageRecipe):
        from smalti.systems.text_to_image import train_text_to_image

        bundle = train_text_to_image(checked, command=command, show_progress=not quiet)
        typer.echo(
            f"\nOpen {output}/report.md (captions.png: held-out captions, drawn) and the curves.png of each stage's "
            f"model.\nThe bundle is {bundle}.\n"
            "Try next:\n"
            f'  smalti generate "a red fox in the snow" -o fox.png --bundle {bundle}\n'
            f"  smalti doctor {bundle}"
        )
        return
    if isinstance(checked, LinesRecipe):
        from smalti.systems.lines import train_lines

        bundle = train_lines(checked, command=command, show_progress=not quiet)
        typer.echo(
            f"\nOpen {output}/report.md (beside the baselines) and {output}/model/curves.png. The bundle is {bundle}.\n"
            "Try next:\n"
            f"  smalti score LINES.txt --bundle {bundle} -o scores\n"
            f"  smalti complete PREFIXES.txt --bundle {bundle} -o completed.txt"
        )
        return
    from smalti.systems.digits import train_digits

    bundle = train_digits(checked, command=command, show_progress=not quiet)
    typer.echo(
        f"\nOpen {output}/report.md (what it learned), {output}/text_conditioned.png, image_conditioned.png and\n"
        f"unconditional.png (nine of each), and {output}/model/curves.png. The bundle is {bundle}.\n"
        "Try next:\n"
        f'  smalti generate "dark green eight on bright cyan" -o eight.png --bundle {bundle}\n'
        f"  smalti caption eight.png --bundle {bundle}"
    )


@app.command(
    "tokenizer",
    epilog="Examples: smalti train tokenizer vqgan pictures=photos output=out/photos · "
    "smalti train tokenizer titok pictures=train.parquet held_out=test.parquet train.num_steps=5000",
)
def tokenizer(
    family: Annotated[
        str, typer.Argument(help=f"A shipped recipe for image tokenizers ({TOKENIZER_RECIPE_NAMES}), or a YAML file.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, each key=value; pictures=FOLDER_OR_PARQUET is needed."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train an image tokenizer on a folder or a table of pictures. If it is stopped, run it again: it resumes."""
    from smalti.recipes import TokenizerRecipe, load_recipe

    checked = load_recipe(family, settings or [])
    if not isinstance(checked, TokenizerRecipe):
        raise ValueError(f"{family} is a recipe of the system {checked.system}; train it by: smalti train {family}")
    with resuming():
        _train_tokenizer(checked, quiet)


def _train_tokenizer(recipe: Any, quiet: bool) -> None:
    from smalti.data.picture_sets import PictureSet
    from smalti.training.estimate import Estimate, Length
    from smalti.training.gan_tokenizer import train_gan_tokenizer

    if recipe.pictures is None:
        raise ValueError("no pictures are given; add pictures=FOLDER, or pictures=TABLE.parquet.")
    estimate = Estimate(recipe.minutes, {"image tokenizer": Length("train.num_steps", recipe.train.num_steps)})
    train_gan_tokenizer(
        PictureSet(recipe.pictures),
        None if recipe.held_out is None else PictureSet(recipe.held_out),
        recipe.image_tokenizer.model,
        recipe.train,
        recipe.output,
        losses=recipe.losses,
        adversarial=recipe.adversarial,
        reading=recipe.reading,
        show_progress=not quiet,
        estimate=estimate,
    )
    measured_on = recipe.held_out or recipe.pictures
    typer.echo(
        f"\nOpen {recipe.output}/curves.png and the last of {recipe.output}/reconstructions. The image tokenizer is "
        f"{recipe.output}/image_tokenizer.\nTry next:\n"
        f"  smalti evaluate tokenizer {recipe.output} {measured_on} -o {recipe.output}/report"
    )


@app.command(
    "upsampler",
    epilog="Examples: smalti train upsampler emoji-upsampler pictures=train.parquet held_out=test.parquet · "
    "smalti train upsampler emoji-upsampler pictures=photos image_tokenizer=out/vqgan model.image_size=[128,128]",
)
def upsampler(
    recipe: Annotated[
        str, typer.Argument(help=f"A shipped recipe for upsamplers ({UPSAMPLER_RECIPE_NAMES}), or a YAML file.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, each key=value; pictures=FOLDER_OR_PARQUET is needed."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train super-resolution behind a frozen image tokenizer. If it is stopped, run it again: it resumes."""
    from smalti.recipes import UpsamplerRecipe, load_recipe

    checked = load_recipe(recipe, settings or [])
    if not isinstance(checked, UpsamplerRecipe):
        raise ValueError(f"{recipe} is a recipe of the system {checked.system}; train it by: smalti train {recipe}")
    with resuming():
        _train_upsampler(checked, quiet)


def _train_upsampler(recipe: Any, quiet: bool) -> None:
    from smalti.data.picture_sets import PictureSet
    from smalti.image_tokenizers import load_image_tokenizer
    from smalti.systems.stages import given_image_tokenizer
    from smalti.training.estimate import Estimate, Length
    from smalti.training.upsampler import train_upsampler

    if recipe.pictures is None or recipe.image_tokenizer is None:
        raise ValueError(
            "an upsampler is trained on pictures as an image tokenizer rebuilds them; give both: "
            "pictures=FOLDER_OR_PARQUET image_tokenizer=FOLDER_OR_BUNDLE."
        )
    train_upsampler(
        PictureSet(recipe.pictures),
        None if recipe.held_out is None else PictureSet(recipe.held_out),
        load_image_tokenizer(given_image_tokenizer(recipe.image_tokenizer)),
        recipe.model,
        recipe.train,
        recipe.output,
        losses=recipe.losses,
        adversarial=recipe.adversarial,
        reading=recipe.reading,
        show_progress=not quiet,
        estimate=Estimate(recipe.minutes, {"upsampler": Length("train.num_steps", recipe.train.num_steps)}),
    )
    measured_on = recipe.held_out or recipe.pictures
    typer.echo(
        f"\nThe upsampler is {recipe.output}/upsampler.\nTry next:\n"
        f"  smalti evaluate upsampler {recipe.output} {measured_on} --image-tokenizer {recipe.image_tokenizer}\n"
        f"  smalti add-upsampler BUNDLE {recipe.output} -o {recipe.output}/bundle"
    )


@app.command("text-tokenizer", epilog="Example: smalti train text-tokenizer captions.csv -o tokenizer.json")
def text_tokenizer(
    captions: Annotated[
        list[Path], typer.Argument(help="Captions: .csv, .tsv, .jsonl, .json, .parquet, or .txt with one on each line.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file of the tokenizers library to write.")],
    column: Annotated[
        str | None,
        typer.Option(
            "--caption-column",
            "--column",
            help="Column of the captions (default: found by its name), or its number in a table without header.",
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="What separates the fields of a CSV or TSV (default: by its name).")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Picture codes, the image tokenizer's codebook_size.")] = 4096,
    text_size: Annotated[int, typer.Option(help="Pieces of words.")] = 25_895,
    order: Annotated[str, typer.Option(help="Which ids come first.")] = "image,special,text",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Learn pieces of words (byte-level BPE) from captions. The file holds picture codes and markers as tokens too."""
    from smalti.data.captions import read_captions
    from smalti.files import refuse_existing
    from smalti.progress import stage
    from smalti.text_tokenizer import BPEConfig, TextTokenizer

    refuse_existing([output], force=force)
    config = BPEConfig(image_size=image_size, text_size=text_size, order=tuple(order.split(",")))
    lines = [caption for path in captions for caption in read_captions(path, column, delimiter=delimiter)]
    with stage("learning words"):
        trained, num_unused = TextTokenizer.train(lines, config)
    trained.save(output, force=force)
    typer.echo(f"{output}: {len(lines)} captions, {config.vocabulary.size} ids: {config.vocabulary!r}")
    if num_unused:
        typer.echo(
            f"warning: the captions have no more than {text_size - num_unused} pieces, so {num_unused} numbers of "
            f"the text are unused; --text-size {text_size - num_unused} leaves them out.",
            err=True,
        )
