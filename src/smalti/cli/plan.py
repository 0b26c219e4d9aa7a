"""The command `plan`: what a training and drawing from it will take, before it is started."""

from typing import Annotated, Any

import typer

from smalti.cli.train import RECIPE_NAMES
from smalti.errors import InputError
from smalti.tables import print_table

app = typer.Typer()


@app.command(
    epilog="Examples: smalti plan demo · smalti plan c2i train.batch_size=128 --codebook-size 16384 --grid 16x16 · "
    "smalti plan llamagen-3b --gpu h100 --devices 8,64,512 --no-measure --price 2.5 · smalti plan parti-20b --gpu h200 "
    "--devices 512 --no-measure --json"
)
def plan(
    recipe: Annotated[
        str, typer.Argument(help=f"A shipped recipe ({RECIPE_NAMES}), a YAML file, or a preset: llamagen-b, parti-3b …")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, each key=value, as for smalti train.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPUs to plan for, with commas: a100, h100, h200, l40s, rtx4090.")] = "h100",
    devices: Annotated[str, typer.Option(help="Numbers of GPUs, with commas: 1,8,64.")] = "1,8",
    price: Annotated[float | None, typer.Option(min=0, help="What an hour of one GPU costs, for the cost.")] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of a GPU's data sheet that training reaches (default: 0.35).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure some steps on this machine, for some seconds.")
    ] = True,
    codebook_size: Annotated[
        int | None, typer.Option(min=1, help="Codes of the image tokenizer, where the recipe names none.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Its grid of codes, ROWSxCOLUMNS.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes, for a class-conditional model.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the training table.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, bytes and seconds.")] = False,
) -> None:
    """Parameters, memory by part, days and cost of a training, and pictures a second, here and on GPUs.

    Here some steps are measured. On GPUs products and bytes are counted and set against data sheets: read that as
    within a third, and measure before you pay.
    """
    from smalti.cli.evaluate import parse_size
    from smalti.devices import choose_device
    from smalti.planning.gpus import TRAINING_EFFICIENCY, find_gpu
    from smalti.planning.plan import make_plan
    from smalti.planning.subjects import Assumed, find_subject

    counts = [_count(text) for text in devices.split(",") if text.strip()]
    cells = None if grid is None else parse_size(grid)
    assumed = Assumed(codebook_size=codebook_size, grid=cells, num_classes=classes, num_rows=rows)
    found = make_plan(
        find_subject(recipe, settings or [], assumed),
        gpus=[find_gpu(name.strip()) for name in gpu.split(",") if name.strip()],
        device_counts=counts,
        price=price,
        efficiency=TRAINING_EFFICIENCY if efficiency is None else efficiency,
        measure=measure,
        device=choose_device(),
    )
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    _show(found)


def _count(text: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise InputError(f"--devices has {text!r}; expected numbers of GPUs with commas between, such as 1,8,64.")
    return int(text)


def _show(plan: Any) -> None:
    from rich.table import Table

    typer.echo(
        f"{plan.name}: {plan.num_parameters:,} parameters, {plan.flops_per_token / 1e9:.3g} GFLOP a token forward and "
        f"backward, sequences of {plan.tokens_per_sequence}, {plan.batch_size} a step"
        + ("" if plan.num_steps is None else f", {plan.num_steps:,} steps, {plan.num_tokens / 1e9:.3g} G tokens")
    )
    if plan.assumptions:
        typer.echo(f"assumed: {'; '.join(plan.assumptions)}")
    if plan.here is not None:
        here = plan.here
        parts = ", ".join(f"{name} {_bytes(value)}" for name, value in here.memory.items() if value)
        typer.echo(
            f"\nhere ({here.device}, {here.threads} threads, {here.precision}, {here.path}): {_time(here.step_s)} a "
            f"step, {here.tokens_per_s:,.0f} tokens/s, {_long(here.days)}; memory {_bytes(here.peak_bytes)} at most "
            f"({parts})"
        )
    if plan.gpus:
        columns = ("", "layout", "rows × micro", "memory", "step", "tokens/s", "in all", "GPU hours", "cost")
        table = Table(*columns, box=None)
        for one in plan.gpus:
            name = f"{one.num_devices} × {one.gpu}"
            if one.step_s is None:
                table.add_row(name, "does not fit", *[""] * 7)
                continue
            table.add_row(
                name,
                one.settings or "as it is",
                f"{one.rows} × {one.num_micro_batches}",
                _bytes(one.total_bytes),
                _time(one.step_s),
                f"{one.tokens_per_s:,.0f}",
                _long(one.days),
                "–" if one.gpu_hours is None else f"{one.gpu_hours:,.0f}",
                "–" if one.cost is None else f"{one.cost:,.0f}",
            )
        typer.echo()
        print_table(table)
        for one in plan.gpus:
            parts = ", ".join(f"{name} {_bytes(value)}" for name, value in one.memory.items() if value)
            if parts:
                typer.echo(f"{one.num_devices} × {one.gpu}: {parts}; bound by {one.bound_by}")
            for reason in one.why:
                typer.echo(f"  {reason}")
    if plan.drawing:
        table = Table("drawing", "pictures at once", "room for", "pictures/s", "seconds", "bound by", box=None)
        for one in plan.drawing:
            room = "–" if one.most_pictures is None else f"{one.most_pictures:,}"
            rate, seconds = f"{one.pictures_per_s:,.3g}", f"{one.seconds:,.3g}"
            table.add_row(one.device, f"{one.pictures:,}", room, rate, seconds, one.bound_by)
        typer.echo()
        print_table(table)


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.3g} GB" if value >= 1e9 else f"{value / 1e6:,.3g} MB"


def _time(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def _long(days: float | None) -> str:
    from smalti.progress import duration

    if days is None:
        return "as long as there are rows"
    return f"{days:,.3g} days" if days >= 2 else duration(days * 86_400)
