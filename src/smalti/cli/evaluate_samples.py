"""The commands `evaluate samples`, `statistics`, `judge` and `compare`: figures of drawn pictures beside real ones."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.default_bundle import SHIPPED
from smalti.errors import InputError
from smalti.stopping import resuming
from smalti.tables import print_table

PROTOCOL_NAMES = "adm, torch-fidelity, clean-fid, pytorch-fid or smalti"
Features = Annotated[
    str,
    typer.Option(
        help="What looks at the pictures: a weight file (FID's Inception, VGG16, ConvNeXt-S, a judge), a folder of "
        "CLIP or DINOv2; judge (trained on the reference), tokenizer (of --bundle), given (files of features)."
    ),
]
ProtocolName = Annotated[
    str | None,
    typer.Option("--protocol", help=f"Whose conventions: {PROTOCOL_NAMES} (default: adm with Inception, else smalti)."),
]
WeightsHash = Annotated[
    str | None, typer.Option("--features-sha256", help="What the weight file's SHA-256 must begin with.")
]
BundleOption = Annotated[
    str | None,
    typer.Option(help=f"With --features tokenizer: a shipped bundle's name ({SHIPPED}), a folder, or a hub's."),
]
Size = Annotated[
    str | None,
    typer.Option(help="Crop and resize pictures in folders and tables to ROWSxCOLUMNS, or a square; bicubic."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures that the network sees at a time.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
OF_JUDGE = "judge"


def samples(
    context: typer.Context,
    samples: Annotated[
        Path,
        typer.Argument(help="Drawn pictures: .npz with arr_0, a folder, a parquet table; or .npz of features (N, D)."),
    ],
    reference: Annotated[
        Path,
        typer.Option(
            help="Real ones, likewise; or .npz of mu and sigma, as smalti evaluate statistics and ADM have it."
        ),
    ],
    features: Features,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for card.json and card.md.")] = None,
    protocol: ProtocolName = None,
    features_sha256: WeightsHash = None,
    bundle: BundleOption = None,
    judge_data: Annotated[
        Path | None, typer.Option(help="Pictures of classes that a judge is trained on (default: the reference).")
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option(help="Only these, with commas between: frechet,precision,… (default: all that can be)."),
    ] = None,
    bootstrap: Annotated[
        int | None,
        typer.Option(min=0, help="Replicates for intervals; 0: none (default: 200, or 20 beyond 512 features)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of the judge's training.")] = 0,
    size: Size = None,
    split: Annotated[str | None, typer.Option(help="Of MNIST's folder as reference: train or test (default).")] = None,
    batch_size: BatchSize = 64,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """FID and all its kin of drawn pictures, with intervals and a card of all that the numbers depend on.

    A run that was stopped resumes when it is started again.
    """
    from smalti.evaluate.protocol_card import CARD_FILES, figures_table, make_card, write_card
    from smalti.evaluate.samples import MeasureConfig, measure, measured, work_folder
    from smalti.files import refuse_existing

    names: dict[str, Any] = (
        {} if figures is None else {"figures": tuple(name.strip() for name in figures.split(",") if name.strip())}
    )
    config = MeasureConfig(num_replicates=bootstrap, seed=seed, **names)
    if output:
        refuse_existing([output / name for name in CARD_FILES], force=force)
    network, chosen = _network(features, protocol, features_sha256, bundle, judge_data or reference, seed, quiet)
    how: dict[str, Any] = {"size": _size(size), "batch_size": batch_size, "show_progress": not quiet}
    with resuming(), work_folder(output) as folder:
        ours = measured(samples, network, folder / "samples", **how)
        theirs = measured(reference, network, folder / "reference", split=split, **how)
        resizer = "given" if network is None else network.resizer
        found = measure(ours, theirs, chosen, config, resizer=resizer, show_progress=not quiet)
        card = make_card(found, ours, theirs, network, chosen, config, _command(context))
        if output:
            write_card(card, output, force=force)
    print_table(figures_table(card))
    if output:
        typer.echo(f"{output}: {', '.join(CARD_FILES)}")


def statistics(
    sources: Annotated[
        list[Path], typer.Argument(help="Sets of pictures, or files of statistics; several are taken together.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File for mu, sigma, mu_s, sigma_s: .npz.")],
    features: Features,
    protocol: ProtocolName = None,
    features_sha256: WeightsHash = None,
    bundle: BundleOption = None,
    judge_data: Annotated[Path | None, typer.Option(help="Pictures of classes that a judge is trained on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the judge's training.")] = 0,
    size: Size = None,
    split: Annotated[str | None, typer.Option(help="Of MNIST's folder: train or test (default).")] = None,
    keep_features: Annotated[
        int, typer.Option(min=0, help="Keep the first N pictures' features too, for neighbours and kernels.")
    ] = 0,
    batch_size: BatchSize = 64,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Mean and covariance of features, in the form of ADM's reference files; shards merge into what the whole gives."""
    import numpy as np

    from smalti.evaluate.moments import Moments, Statistics, write_statistics
    from smalti.evaluate.samples import measured, note_of, work_folder
    from smalti.files import refuse_existing

    if output.suffix != ".npz":
        raise InputError(f"{output}: statistics are written as .npz; give a name that ends in .npz.")
    refuse_existing([output], force=force)
    network, _ = _network(features, protocol, features_sha256, bundle, judge_data or sources[0], seed, quiet)
    parts = []
    with resuming(), work_folder(output) as folder:
        for number, source in enumerate(sources):
            how: dict[str, Any] = {"size": _size(size), "split": split, "batch_size": batch_size}
            parts.append(measured(source, network, folder / str(number), **how, show_progress=not quiet))
        pooled = Moments.merged(part.pooled.moments for part in parts).gaussian
        spatial = [part.spatial for part in parts if part.spatial is not None]
        merged = Moments.merged(one.moments for one in spatial).gaussian if len(spatial) == len(parts) else None
        kept = {}
        if keep_features:
            held = [part.features.pooled for part in parts if part.features is not None]
            if len(held) < len(parts):
                raise InputError("--keep-features needs pictures: a file of statistics alone has no features to keep.")
            kept["features"] = np.concatenate([one[:keep_features].numpy() for one in held])[:keep_features]
        note = "" if network is None else note_of(network)
        write_statistics(output, Statistics(pooled, merged, note), force=force, **kept)
    typer.echo(f"{output}: statistics of {pooled.num:,} pictures, {pooled.width} features")


def judge(
    data: Annotated[Path, typer.Argument(help="A folder with one folder a class, a parquet table with labels, MNIST.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File for its weights: .safetensors.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 600,
    seed: Annotated[int, typer.Option(help="Decides it on one machine.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train a small classifier whose features measure pictures of these classes: for --features FILE."""
    from smalti.evaluate.feature_networks import save_judge, train_judge_of
    from smalti.files import refuse_existing

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: weights are written as safetensors; give a name that ends in .safetensors.")
    refuse_existing([output], force=force)
    save_judge(train_judge_of(data, seed=seed, num_steps=steps, show_progress=not quiet), output, force=force)
    typer.echo(f"{output}")


def compare(
    first: Annotated[Path, typer.Argument(help="A card.json of smalti evaluate samples, or its folder.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Markdown file for the same.")] = None,
    force: Force = False,
) -> None:
    """Which fields of two protocols differ, and whether their figures do by more than noise."""
    from smalti.evaluate.protocol_card import compare_cards, read_card
    from smalti.files import refuse_existing, write_text

    if output:
        refuse_existing([output], force=force)
    names = ("A", "B")
    found = compare_cards(read_card(first), read_card(second), names)
    typer.echo(f"A: {first}\nB: {second}\n")
    if found.different:
        print_table(found.fields_table())
        typer.echo()
    print_table(found.figures_table())
    typer.echo(found.how)
    if output:
        write_text(output, f"A: {first}, B: {second}\n\n{found.text()}", force=force)


def _network(
    features: str,
    protocol: str | None,
    sha256: str | None,
    bundle: str | None,
    judge_data: Path,
    seed: int,
    quiet: bool,
) -> tuple[Any, Any]:
    """The network that is asked for, None for features that are given, and the protocol."""
    from smalti.evaluate.feature_networks import (
        JUDGE,
        TOKENIZER,
        judge_features,
        open_network,
        tokenizer_features,
        train_judge_of,
    )
    from smalti.evaluate.protocols import ADM, OF_INCEPTION, SMALTI, find_protocol
    from smalti.evaluate.reconstruction import default_image_size
    from smalti.evaluate.samples import GIVEN

    asked = None if protocol is None else find_protocol(protocol)
    named = features in (JUDGE, TOKENIZER, GIVEN)
    if named and asked is not None and asked.name in OF_INCEPTION:
        raise InputError(f"the protocol {asked.name} is one of Inception: give its weight file by --features.")
    if named and sha256 is not None:
        raise InputError(f"--features-sha256 is of a weight file, and --features is {features}; leave it out.")
    if (bundle is not None) != (features == TOKENIZER):
        raise InputError("--features tokenizer and --bundle go together: the tokenizer is the bundle's.")
    if features == GIVEN:
        return None, asked or SMALTI
    if features == JUDGE:
        return judge_features(train_judge_of(judge_data, seed=seed, show_progress=not quiet)), asked or SMALTI
    if features == TOKENIZER:
        from smalti.bundle import Bundle

        loaded = Bundle.load(bundle or "")
        if loaded.image_tokenizer is None or loaded.pictures is None:
            raise InputError(f"{bundle} has no image tokenizer; take other features.")
        return tokenizer_features(
            loaded.image_tokenizer, default_image_size(loaded.image_tokenizer.config)
        ), asked or SMALTI
    network = open_network(Path(features), asked or ADM, sha256=sha256)
    if asked is None:
        return network, ADM if network.name == "inception" else SMALTI
    if asked.name in OF_INCEPTION and network.name != "inception":
        raise InputError(f"the protocol {asked.name} is one of Inception, and {features} holds the {network.name}.")
    return network, asked


def _size(size: str | None) -> tuple[int, int] | None:
    from smalti.cli.evaluate import parse_size

    return None if size is None else parse_size(size)


def _command(context: typer.Context) -> str:
    """As it was typed."""
    return shlex.join(["smalti", *(context.obj or [])])


def register(app: typer.Typer) -> None:
    """Adds the commands to `evaluate`."""
    example = "smalti evaluate samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz"
    app.command(
        "samples",
        epilog=f"Examples: {example} --features pt_inception-2015-12-05-6726825d.pth -o out/card · smalti evaluate "
        "samples drawn.npz --reference mnist --features judge -o out/card",
    )(samples)
    app.command(
        "statistics",
        epilog="Example: smalti evaluate statistics photos -o photos.npz --features inception.pth --size 256",
    )(statistics)
    app.command("judge", epilog="Example: smalti evaluate judge mnist -o judge.safetensors")(judge)
    app.command("compare", epilog="Example: smalti evaluate compare out/ours out/theirs")(compare)
