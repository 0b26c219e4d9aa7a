"""What several commands take, and how they refuse, choose and write alike."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.bounds import MAX_PICTURES
from smalti.default_bundle import DEFAULT_BUNDLE, SHIPPED, bundle_for_picture
from smalti.errors import InputError, shortened

OF_TABLES = "For a table of captions"
OF_PICTURES, OF_LINES = "For a bundle of pictures", "For a bundle of lines"
"""Panels of help."""

BundleName = Annotated[
    str | None,
    typer.Option(
        help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name (default: emoji for a picture of "
        "its size, else digits)."
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed and prompt give the same picture, whatever else is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Count = Annotated[
    int, typer.Option("-n", min=1, max=MAX_PICTURES, help="How many to draw; the i-th is drawn with the seed SEED + i.")
]
Scale = Annotated[
    int | None, typer.Option(help="Enlarge each pixel to this many by this many (default: the bundle's).")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, 1 the model's own distribution.")]
TopK = Annotated[int | None, typer.Option(help="Keep the K most likely tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the fewest tokens whose probability reaches P, in (0, 1].")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least P times as likely as the likeliest, in [0, 1].")]
Guidance = Annotated[
    float | None, typer.Option(help="null + scale · (cond − null): 1 is off, larger follows the prompt.")
]
Schedule = Annotated[
    str | None, typer.Option(help="How the guidance grows from 1 over a picture: constant, linear, cosine.")
]
TextEncoderName = Annotated[
    str | None,
    typer.Option(
        help="For a bundle that reads captions as features: the folder of a T5 encoder, or a hub's owner/name to fetch "
        "it (default: what the bundle names)."
    ),
]
Speculative = Annotated[
    int | None, typer.Option(help="Draft N codes ahead and verify them in one pass, exactly; 0 is off.", metavar="N")
]
Coupling = Annotated[
    str | None,
    typer.Option(
        help="How drafts are verified: maximal keeps most; with gumbel the picture does not depend on N; with inverse "
        "it is the same as without drafts."
    ),
]
Power = Annotated[
    float | None, typer.Option(help="Its time to this power: with cosine, RAR's power-cosine (default: 1).")
]
Interval = Annotated[
    str | None, typer.Option(help="Guide only the codes START:END of a picture, as 0:64 or 16: (default: all).")
]


def settings_given(**settings: Any) -> dict[str, Any]:
    """The settings that were given; the others are the bundle's own."""
    return {name: value for name, value in settings.items() if value is not None}


def interval_of(text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"\s*(\d*):(\d*)\s*", text)
    if found is None:
        raise InputError(f"--guidance-interval is {shortened(text)!r}; expected START:END, such as 0:64, or 16:.")
    start, end = found.groups()
    return int(start or 0), int(end) if end else None


def refuse_options(options: dict[str, Any], bundle: str, kind: str) -> None:
    for name in options:
        raise ValueError(
            f"{bundle} is a bundle of {kind}, which has no use for --{name.replace('_', '-')}; leave it out."
        )


def numbers_of(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected whole numbers with commas between, such as 1,4,16.") from error


def usual_bundle_for_picture(bundle: str | None, picture: Path | None) -> str:
    """The bundle that was named, or else the one of pictures of this size; says so where that is not the usual one."""
    if bundle is not None or picture is None:
        return bundle or DEFAULT_BUNDLE
    chosen = bundle_for_picture(picture)
    if chosen.name != DEFAULT_BUNDLE:
        typer.echo(f"read by the bundle {chosen.name} ({chosen.why}); --bundle chooses another", err=True)
    return chosen.name


def output_names(output: Path, n: int) -> list[Path]:
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: pictures are written as PNG; give a name that ends in .png.")
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, n + 1)]


def refuse_outputs(outputs: Sequence[Path], force: bool) -> None:
    from smalti.files import refuse_existing

    refuse_existing(outputs, force=force)


def save_pictures(pictures: Sequence[Any], outputs: Sequence[Path], force: bool) -> None:
    from smalti.image_files import save_picture

    for picture, output in zip(pictures, outputs, strict=True):
        save_picture(picture, output, force=force)
        typer.echo(output)
