"""The command `evaluate`: a bundle, what a bundle makes of held-out compositions, or image tokenizers side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smalti.bounds import MAX_CANDIDATES
from smalti.cli import evaluate_samples
from smalti.cli.options import Force, Quiet, numbers_of
from smalti.cli.prompts import prompts
from smalti.default_bundle import SHIPPED
from smalti.errors import shortened
from smalti.tables import print_table


class BundleGroup(TyperGroup):
    """`smalti evaluate digits` is short for `smalti evaluate bundle digits`, whatever is not the name of a part; with
    --data, which no part takes, that is a bundle's name too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        has_data = any(word.partition("=")[0] == "--data" for word in args)
        if args and (args[0] not in (*self.commands, "--help", "-h") or (has_data and args[0] != "bundle")):
            args = ["bundle", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=BundleGroup,
    help="Measure a bundle of digits (smalti evaluate digits), a bundle on held-out compositions, image tokenizers, or "
    "drawn pictures beside real ones.",
    epilog="Examples: smalti evaluate digits --data out/digits · smalti evaluate tokenizer out/vqgan photos",
    no_args_is_help=True,
)
app.command(
    "prompts",
    epilog="Examples: smalti evaluate prompts scenes · smalti evaluate prompts digits --num 200 -o out/report",
)(prompts)
evaluate_samples.register(app)


@app.command("bundle", epilog="Example: smalti evaluate digits --data out/digits -o out/report")
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
        num_prompts=num, num_captions=num, num_pairs=num, best_of=numbers_of("best_of", best_of), seed=seed
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
    "tokenizer", epilog="Example: smalti evaluate tokenizer out/vqgan out/titok photos/held_out -o out/comparison"
)
def tokenizer(
    bundles_and_pictures: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE... PICTURES",
            help="Folders of image tokenizers, bundles or training runs; last a folder or a table of pictures.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for reconstruction.json and reconstructions.png.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=2, help="Measure on the first NUM pictures (default: all).")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Crop and resize pictures to ROWSxCOLUMNS, or a square (default: each tokenizer's own)."),
    ] = None,
    vgg: Annotated[Path | None, typer.Option(help="torchvision's vgg16 weights, for LPIPS.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="The linear layers of LPIPS, vgg.pth.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """How well image tokenizers rebuild pictures: PSNR, SSIM, a Fréchet distance, use of the codebook, one table."""
    import shlex

    from smalti.evaluate.reconstruction import REPORT_FILES, compare_tokenizers
    from smalti.files import refuse_existing
    from smalti.image_tokenizers.perceptual import LPIPS

    *bundles, pictures = bundles_and_pictures
    if not bundles:
        raise ValueError(f"only {pictures} is given; name at least one image tokenizer, and the pictures last.")
    if (vgg is None) != (lpips is None):
        raise ValueError("LPIPS needs two files: give both --vgg and --lpips.")
    if output:
        refuse_existing([output / name for name in REPORT_FILES], force=force)
    network = LPIPS.load(vgg, lpips) if vgg and lpips else None
    options = [*(["--num", str(num)] if num else []), *(["--size", size] if size else [])]
    command = shlex.join(["smalti", "evaluate", "tokenizer", *map(str, bundles_and_pictures), *options])
    how = {"lpips": network, "command": command, "show_progress": not quiet}
    comparison = compare_tokenizers(
        bundles, pictures, num=num, image_size=None if size is None else parse_size(size), **how
    )
    print_table(comparison.table())
    if output:
        comparison.write(output, force=force)
        typer.echo(f"{output}: {', '.join(REPORT_FILES)}")


@app.command(
    "upsampler", epilog="Example: smalti evaluate upsampler out/emoji-upsampler test.parquet --image-tokenizer emoji"
)
def upsampler(
    upsampler: Annotated[Path, typer.Argument(help="Folder of an upsampler, of a training run or of a bundle.")],
    pictures: Annotated[Path, typer.Argument(help="A folder or a table of pictures, as large as what comes out.")],
    image_tokenizer: Annotated[
        Path, typer.Option(help="Whose pictures are made larger: a folder of an image tokenizer, or a bundle.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for upsampling.json and upsampling.png.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Measure on the first NUM pictures (default: all).")] = None,
    vgg: Annotated[Path | None, typer.Option(help="torchvision's vgg16 weights, for LPIPS.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="The linear layers of LPIPS, vgg.pth.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """An upsampler beside nearest, bicubic and Lanczos: PSNR, SSIM, perceptual distance, one table."""
    import shlex

    from smalti.evaluate.upsampling import REPORT_FILES, compare_upsampling
    from smalti.files import refuse_existing
    from smalti.image_tokenizers import load_image_tokenizer
    from smalti.image_tokenizers.perceptual import LPIPS
    from smalti.systems.stages import given_image_tokenizer
    from smalti.upsample import load_upsampler

    if (vgg is None) != (lpips is None):
        raise ValueError("LPIPS needs two files: give both --vgg and --lpips.")
    if output:
        refuse_existing([output / name for name in REPORT_FILES], force=force)
    words = [
        "smalti",
        "evaluate",
        "upsampler",
        str(upsampler),
        str(pictures),
        "--image-tokenizer",
        str(image_tokenizer),
    ]
    found = compare_upsampling(
        load_upsampler(upsampler),
        load_image_tokenizer(given_image_tokenizer(image_tokenizer)),
        pictures,
        num=num,
        lpips=LPIPS.load(vgg, lpips) if vgg and lpips else None,
        command=shlex.join([*words, *(["--num", str(num)] if num else [])]),
        show_progress=not quiet,
    )
    print_table(found.table())
    if output:
        found.write(output, force=force)
        typer.echo(f"{output}: {', '.join(REPORT_FILES)}")


@app.command(
    "compositions",
    epilog="Example: smalti evaluate compositions emoji --test test.parquet --train train.parquet -o out/report",
)
def compositions(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ],
    test: Annotated[Path, typer.Option(help="Held-out compositions: parquet with image, caption, base, skin_tones.")],
    train: Annotated[Path, typer.Option(help="The other true pictures, in the same columns.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for compositions.json, .md and .png.")
    ] = None,
    guidance: Annotated[str, typer.Option(help="Guidance scales, with commas between; 1 is off.")] = "1,2,3",
    best_of: Annotated[
        int, typer.Option(min=1, max=MAX_CANDIDATES, help="Candidates for reranking; 1 measures none.")
    ] = 16,
    num: Annotated[int | None, typer.Option(min=1, help="Draw the first NUM compositions (default: all).")] = None,
    seed: Annotated[int, typer.Option(help="The i-th composition is drawn with the seed SEED + i.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Draw held-out compositions of a figure and a skin tone, and look for each among all true pictures."""
    import shlex

    from smalti.evaluate.compositions import REPORT_FILES, CompositionsConfig, evaluate_compositions
    from smalti.files import refuse_existing
    from smalti.tasks.images import Pipeline

    try:
        scales = tuple(float(scale) for scale in guidance.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance is {guidance!r}; expected numbers with commas between, such as 1,2,3.") from error
    config = CompositionsConfig(guidance_scales=scales, best_of=best_of, num=num, seed=seed)
    if output:
        refuse_existing([output / name for name in REPORT_FILES], force=force)
    options = ["--guidance", guidance, "--best-of", str(best_of), *(["--num", str(num)] if num else [])]
    tables = ["--test", str(test), "--train", str(train), "--seed", str(seed)]
    command = shlex.join(["smalti", "evaluate", "compositions", bundle, *tables, *options])
    how = {"command": command, "show_progress": not quiet}
    report = evaluate_compositions(Pipeline.load(bundle), test, train, config, **how)
    print_table(report.table())
    if output:
        report.write(output, force=force)
        typer.echo(f"{output}: {', '.join(REPORT_FILES)}")


@app.command(
    "candidates",
    epilog="Example: smalti evaluate candidates out/parti/bundle --pairs val.parquet -n 16 -o out/candidates",
)
def candidates(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ],
    pairs: Annotated[Path, typer.Option(help="Pictures with captions, parquet: the prompts, and what is right.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for candidates.json, .md and .png.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=2, max=MAX_CANDIDATES, help="Candidates of each prompt.")] = 16,
    num: Annotated[int | None, typer.Option(min=1, help="Draw of the first NUM captions (default: all).")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the bundle's own.")] = None,
    seed: Annotated[int, typer.Option(help="The candidates of the i-th prompt have the seeds from SEED + i·N on.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Measure how much better the best of n candidates is, against n, by every ranker that the bundle has.

    A picture is right if the true picture nearest to it is one of its caption's.
    """
    import shlex

    from smalti.evaluate.candidates import REPORT_FILES, CandidatesConfig, NearestJudge, evaluate_candidates
    from smalti.files import refuse_existing
    from smalti.tasks.images import Pipeline

    if output:
        refuse_existing([output / name for name in REPORT_FILES], force=force)
    config = CandidatesConfig(num_prompts=num, num_candidates=n, guidance_scale=guidance_scale, seed=seed)
    pipe = Pipeline.load(bundle)
    judge = NearestJudge(pipe, pairs)
    prompts = list(dict.fromkeys(judge.captions))[:num]
    options = ["-n", str(n), "--seed", str(seed), *(["--num", str(num)] if num else [])]
    options += [] if guidance_scale is None else ["--guidance-scale", f"{guidance_scale:g}"]
    command = shlex.join(["smalti", "evaluate", "candidates", bundle, "--pairs", str(pairs), *options])
    how = {"judged": judge.judged, "command": command, "show_progress": not quiet}
    report = evaluate_candidates(pipe, prompts, judge, config, **how)
    print_table(report.table())
    if output:
        report.write(output, force=force)
        typer.echo(f"{output}: {', '.join(REPORT_FILES)}")


def parse_size(text: str) -> tuple[int, int]:
    """Rows and columns of `64x48`, or of `64`, a square. Raises ValueError for anything else."""
    from smalti.image_files import MAX_SIDE

    rows, cross, columns = text.partition("x")
    if not (rows.isdecimal() and (columns.isdecimal() if cross else True) and len(text) <= 20):
        raise ValueError(f"--size is {shortened(text)!r}; expected ROWSxCOLUMNS, such as 64x48, or one number.")
    size = int(rows), int(columns or rows)
    if not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"--size is {shortened(text)!r}; expected rows and columns of 1 to {MAX_SIDE}.")
    return size
