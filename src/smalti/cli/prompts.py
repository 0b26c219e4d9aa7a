"""The command `evaluate prompts`: prompts whose pictures are read back."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.default_bundle import SHIPPED
from smalti.tables import print_table


def prompts(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for prompts.json, .md, .html (pictures) and .png (against n)."),
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Prompts to draw.")] = 400,
    guidance: Annotated[
        str | None, typer.Option(help="Guidance scales, with commas between; 1 is off (default: the bundle's own).")
    ] = None,
    best_of: Annotated[str, typer.Option(help="Of how many candidates one is kept, with commas between.")] = "1,16",
    rerank: Annotated[
        str | None,
        typer.Option(help="By what: contrastive, caption, both, pmi or picture (default: the bundle's first)."),
    ] = None,
    ranker: Annotated[
        str | None,
        typer.Option(help="Bundle with the same image tokenizer that chooses (default: the one that draws)."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the bundle's own).")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and pictures.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Draw prompts of digits or scenes, read each picture back, and count what is right, by category, seen and not."""
    import shlex

    from smalti.bounds import MAX_CANDIDATES
    from smalti.evaluate.prompts import REPORT_FILES, PromptsConfig, evaluate_prompts
    from smalti.files import refuse_existing
    from smalti.tasks.images import Pipeline

    try:
        scales = None if guidance is None else tuple(float(scale) for scale in guidance.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance is {guidance!r}; expected numbers with commas between, such as 1,2,3.") from error
    counts = best_of.split(",")
    if not all(count.strip().isdecimal() and 1 <= int(count) <= MAX_CANDIDATES for count in counts):
        raise ValueError(f"--best-of is {best_of!r}; expected numbers of 1 to {MAX_CANDIDATES} with commas between.")
    if output:
        refuse_existing([output / name for name in REPORT_FILES], force=force)
    config = PromptsConfig(
        num=num,
        guidance_scales=scales,
        best_of=tuple(dict.fromkeys(map(int, counts))),
        rerank=rerank,
        temperature=temperature,
        seed=seed,
    )
    options = ["--num", str(num), "--best-of", best_of, "--seed", str(seed)]
    options += [] if guidance is None else ["--guidance", guidance]
    options += [] if rerank is None else ["--rerank", rerank]
    options += [] if ranker is None else ["--ranker", ranker]
    options += [] if temperature is None else ["--temperature", f"{temperature:g}"]
    command = shlex.join(["smalti", "evaluate", "prompts", bundle, *options])
    report = evaluate_prompts(
        Pipeline.load(bundle),
        config,
        ranker=None if ranker is None else Pipeline.load(ranker),
        command=command,
        show_progress=not quiet,
    )
    print_table(report.table())
    if output:
        report.write(output, force=force)
        typer.echo(f"{output}: {', '.join(REPORT_FILES)}")
