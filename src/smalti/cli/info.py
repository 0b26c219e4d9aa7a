"""The command `info`: what a bundle holds."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from smalti.default_bundle import DEFAULT_BUNDLE, SHIPPED
from smalti.tables import print_table

app = typer.Typer()


@app.command(epilog="Example: smalti info digits")
def info(
    bundle: Annotated[
        str, typer.Argument(help=f"A shipped bundle's name ({SHIPPED}), a folder, or a hub's owner/name.")
    ] = DEFAULT_BUNDLE,
    list_bundles: Annotated[bool, typer.Option("--list", help="List the bundles that ship with the package.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """What a bundle holds: parameters, vocabulary, layout, measured figures."""
    from smalti.bundle import Bundle, read_config, shipped_bundles

    if list_bundles:
        for name, directory in shipped_bundles().items():
            num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            typer.echo(f"{name}  {num_bytes / 1e6:.1f} MB  {' · '.join(read_config(directory)['layout']['orders'])}")
        return
    rows = _info(Bundle.load(bundle))
    if as_json:
        import json

        typer.echo(json.dumps(dict(rows), ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _info(bundle: Any) -> Iterator[tuple[str, str]]:
    layout, pictures, image_tokenizer = bundle.layout, bundle.pictures, bundle.image_tokenizer
    yield "bundle", bundle.name
    yield "parameters", f"{bundle.model.num_parameters:,} (transformer)"
    if image_tokenizer is not None:
        yield "parameters of the image tokenizer", f"{sum(p.numel() for p in image_tokenizer.parameters()):,}"
    yield "vocabulary", str(layout.vocabulary)
    if words := getattr(bundle.text_tokenizer, "words", None):
        yield "words", " ".join(words) if len(words) <= 200 else f"{len(words):,} pieces of words"
    if image_tokenizer is not None:
        rows, columns = image_tokenizer.config.grid
        yield "pictures", f"{pictures.width}×{pictures.height}, codes {rows}×{columns}"
    if bundle.upsampler is not None:
        height, width = bundle.upsampler.config.output_size
        yield "upsampler", f"to {width}×{height} (--upscale), {bundle.upsampler.num_parameters:,} parameters"
    if bundle.classes is not None:
        names = bundle.classes.names
        null = "none" if bundle.null_label is None else f"label {bundle.null_label}"
        named = "" if names is None else f": {', '.join(names) if len(names) <= 20 else ', '.join(names[:3]) + ' …'}"
        yield "classes", f"{bundle.classes.num:,}{named}; null condition: {null}"
    if bundle.reads_features:
        known, num_features = bundle.text_encoder, bundle.model.num_features
        name = "not said" if known is None or known.name is None else known.name
        yield "text encoder", f"{name}; {bundle.model.config.feature_width} features a token, of {num_features} tokens"
    if bundle.is_lines:
        yield "lines", f"{bundle.image_length} codes in 0..{layout.vocabulary['image'].size - 1}"
    for name, order in layout.orders.items():
        yield f"layout {name} ({order.weight:g})", str(order)
    if image_tokenizer is not None:
        yield "draws with", f"{bundle.sampling.picture}"
    yield "weights", f"sha256 {bundle.weights_sha256}"
    yield from ((name, str(value)) for name, value in bundle.figures.items())
