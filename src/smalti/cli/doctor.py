"""The command `doctor`: whether a bundle keeps what it promises."""

from typing import Annotated

import typer

from smalti.default_bundle import DEFAULT_BUNDLE, SHIPPED
from smalti.tables import print_table

app = typer.Typer()


@app.command(epilog="Examples: smalti doctor digits · smalti doctor out/c2i-b --card · smalti doctor out/c2i-b --json")
def doctor(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ] = DEFAULT_BUNDLE,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to draw of a sequence at most.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Draws conditions and tokens.")] = 0,
    card: Annotated[bool, typer.Option("--card", help="Write the certificate into the bundle's README.md.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> int:
    """Examine a bundle: cached steps and whole sequences agree, and executors, batches, seeds and nats.

    Prints a certificate with the hash of the weights. The status is 1 if a check fails.
    """
    from smalti.bundle import CARD, Bundle, find_bundle
    from smalti.files import write_text
    from smalti.tasks.doctor import as_json as written
    from smalti.tasks.doctor import examine, with_certificate

    loaded = Bundle.load(bundle)
    found = examine(loaded, num_tokens=tokens, seed=seed)
    if as_json:
        typer.echo(written(found))
    else:
        typer.echo(f"{found.bundle}: weights sha256 {found.weights_sha256}")
        typer.echo(f"smalti {found.smalti}, torch {found.torch}, {found.processor}, {found.date}")
        print_table(found.table())
    if card:
        path = find_bundle(bundle) / CARD
        text = path.read_text(encoding="utf-8") if path.is_file() else loaded.card()
        write_text(path, with_certificate(text, found), force=True)
        typer.echo(path, err=as_json)
    if not found.holds:
        failed = [check.name for check in found.checks if not check.holds]
        typer.echo(f"error: {loaded.name} does not keep its promises: {'; '.join(failed)}.", err=True)
        return 1
    return 0
