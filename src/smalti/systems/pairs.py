"""What systems do alike that learn from pictures with captions as codes and text ids: text tokenizer, tokens,
transformer, bundle. What differs, the layout and the model, is told by a `Shape`.

The folder of a run (see stages.py):

    image_tokenizer/      the image tokenizer, in half precision
    text_tokenizer.json   pieces of words, learned from the training captions
    tokens/               train and validation pairs as codes and numbers
    reranker/             the training of a dual encoder, where the recipe asks for one
    model/                the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    samples/              the same prompts with the same seeds on the way: table.png, table.md
    bundle/               what `Pipeline.load` reads
    compositions.md       held-out compositions, where the recipe asks for them
    prompts.md            prompts whose pictures are read back, likewise
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smalti.bundle import Bundle
from smalti.data.pair_sources import open_pairs
from smalti.data.ready_tokens import are_tokens, open_tokens
from smalti.data.tokenize_pairs import TokenizeConfig
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.compositions import evaluate_compositions
from smalti.evaluate.prompts import evaluate_prompts
from smalti.files import made_again
from smalti.image_files import PictureConfig
from smalti.models.config import TransformerConfig
from smalti.models.dual_encoder import DualEncoder, DualEncoderConfig, lend_encoder
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.models.families import AnyModel
from smalti.progress import stage, track
from smalti.recipes import CaptionsRecipe, PartiRecipe, claim_folder
from smalti.sequences.layout import Layout
from smalti.systems.stages import Team, check_grid, finish, stored_image_tokenizer, stored_tokens, team
from smalti.tasks.images import Pipeline
from smalti.tasks.sample_table import SampleTable
from smalti.text_tokenizer import TextTokenizer
from smalti.training.checkpoint import latest_checkpoint, load_checkpoint
from smalti.training.dual_encoder import CHECKPOINTS, train_dual_encoder
from smalti.training.estimate import Estimate
from smalti.training.token_model import TokenPairs, nats_by_order, train_model
from smalti.weights import weights_sha256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained."""

    layout: Layout
    model: TransformerConfig | EncoderDecoderConfig
    learn_words: Callable[[Sequence[str]], TextTokenizer]
    """Of the training captions."""
    text_tokenizer: TextTokenizer | None
    """The recipe's own, in place of one that is learned."""
    reranker: DualEncoderConfig | None = None
    """A dual encoder to train first; `recipe.reranker` says how."""
    begin_with: Path | None = None
    """The bundle whose weights training begins with."""


def train_on_pairs(
    recipe: CaptionsRecipe | PartiRecipe,
    image_tokenizer: Any,
    shape: Shape,
    *,
    command: str,
    show_progress: bool,
) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, the layout does not fit the image tokenizer, or as the stages do.
    """
    output, watch, layout, given = recipe.output, recipe.watch, shape.layout, shape.text_tokenizer
    assert recipe.data.train is not None and recipe.data.validation is not None
    check_grid(layout, image_tokenizer)
    recipe.sample.check_rerank(layout, has_dual_encoder=shape.reranker is not None)
    max_text_length = _most_text(layout)
    size = recipe.data.size or _picture_size(image_tokenizer)
    sources = {"train": recipe.data.train, "validation": recipe.data.validation}
    ready = {split: source for split, source in sources.items() if are_tokens(source)}
    if given is None and ready:
        raise InputError(
            f"{next(iter(ready.values()))} holds tokens: give the text_tokenizer that goes with them, a file."
        )
    with team(output) as processes:
        # Tokens that are there are of the image tokenizer as it was given, not of its copy in half precision.
        lengths: Any = {"max_text_length": max_text_length, "seed": recipe.train.seed}
        opened: dict[str, TokenPairs] = {}
        if given is not None:
            opened |= {split: open_tokens(ready[split], split, image_tokenizer, given, **lengths) for split in ready}
        if processes.is_first:
            claim_folder(recipe, output, free=("sample", "evaluate", "prompts", "about"))
            image_tokenizer = stored_image_tokenizer(output / "image_tokenizer", lambda: image_tokenizer)
            if not (output / "text_tokenizer.json").exists():
                learned = given or _learn_words(recipe.data.train, shape, show_progress)
                learned.save(output / "text_tokenizer.json")
        processes.wait()
        with made_again(output / "text_tokenizer.json"):
            text_tokenizer = TextTokenizer.load(output / "text_tokenizer.json")
        tables = {split: output / "tokens" / f"{split}.parquet" for split in sources if split not in opened}
        if processes.is_first:
            config = TokenizeConfig(size=size, max_text_length=max_text_length, on_error=recipe.data.on_error)
            for split, tokens in tables.items():
                pairs = sources[split]
                stored_tokens(pairs, tokens, image_tokenizer, text_tokenizer, config, show_progress=show_progress)
        processes.wait()
        opened |= {split: TokenTable.open(tokens) for split, tokens in tables.items()}
        train, validation = opened["train"], opened["validation"]

        model: AnyModel | TransformerConfig | EncoderDecoderConfig = shape.model
        reranker = None
        if shape.reranker is not None:
            reranker = _trained_reranker(recipe, shape.reranker, train, validation, processes, show_progress)
            model = _lent_encoder(recipe, shape.model, reranker)
        if shape.begin_with is not None:
            model = _weights(shape.begin_with, shape, text_tokenizer, image_tokenizer)

        def make_pipeline(model: AnyModel, **described: Any) -> Pipeline:
            bundle = Bundle(
                model=model,
                layout=layout,
                reranker=reranker,
                image_tokenizer=image_tokenizer,
                text_tokenizer=text_tokenizer,
                pictures=PictureConfig(height=size[0], width=size[1], scale=recipe.data.scale),
                sampling=recipe.sample,
                name=output.name,
                **described,
            )
            return Pipeline(bundle)

        model = train_model(
            model,
            layout,
            train,
            validation,
            recipe.train,
            output / "model",
            sampler=SampleTable(output / "samples", watch, make_pipeline) if watch.prompts else None,
            sample_every=watch.every,
            show_progress=show_progress,
            estimate=Estimate(recipe.minutes, {"transformer": recipe.train.length}),
        )
        if processes.is_first:
            about = {**recipe.about, "Trained by": f"`{command}`", "Seed": str(recipe.train.seed)}
            trained = make_pipeline(model.cpu(), about=about).bundle
            finish(trained, output / "bundle", lambda bundle: _figures(bundle, recipe, validation, show_progress))
    return output / "bundle"


def _trained_reranker(
    recipe: CaptionsRecipe | PartiRecipe,
    shape: DualEncoderConfig,
    train: TokenPairs,
    validation: TokenPairs,
    processes: Team,
    show_progress: bool,
) -> DualEncoder:
    """The dual encoder of the run's folder; the first process trains it, the others read it."""
    assert isinstance(recipe, PartiRecipe) and recipe.reranker is not None
    folder, settings = recipe.output / "reranker", recipe.reranker.train
    if processes.is_first:
        train_dual_encoder(shape, train, validation, settings, folder, show_progress=show_progress)
    processes.wait()
    reranker = DualEncoder(shape)
    last = latest_checkpoint(folder / CHECKPOINTS)
    assert last is not None
    reranker.load_state_dict(load_checkpoint(last).weights)
    return reranker.eval()


def _lent_encoder(
    recipe: CaptionsRecipe | PartiRecipe, model: TransformerConfig | EncoderDecoderConfig, reranker: DualEncoder
) -> EncoderDecoder | TransformerConfig | EncoderDecoderConfig:
    """A fresh model with the dual encoder's text encoder, if the recipe asks for it."""
    if not (isinstance(recipe, PartiRecipe) and recipe.reranker and recipe.reranker.lends_encoder):
        return model
    assert isinstance(model, EncoderDecoderConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        fresh = EncoderDecoder(model)
    lend_encoder(reranker, fresh)
    return fresh


def _weights(path: Path, shape: Shape, text_tokenizer: TextTokenizer, image_tokenizer: Any) -> AnyModel:
    """The model of a bundle. Raises InputError if it is not of the shape, or of other words or codes."""
    bundle = Bundle.load(path)
    config = getattr(bundle.model.config, "transformer", bundle.model.config)
    differ = {
        "layout": bundle.layout.to_dict() != shape.layout.to_dict(),
        "model": config != shape.model,
        "image tokenizer": bundle.image_tokenizer is None
        or weights_sha256(bundle.image_tokenizer) != weights_sha256(image_tokenizer),
        "words": getattr(bundle.text_tokenizer, "words", None) != text_tokenizer.words,
    }
    if any(differ.values()):
        what = ", ".join(name for name, does in differ.items() if does)
        raise InputError(f"begin_with {path}: its {what} differ from the recipe's; name a bundle of the same.")
    return bundle.model


def _learn_words(pairs: Path, shape: Shape, show_progress: bool) -> TextTokenizer:
    records = open_pairs(pairs)
    shown = track(records.records(), "reading captions", unit="pair", show=show_progress, total=len(records))
    captions = [pair.caption for pair in shown if pair.caption]
    with stage("learning words", show=show_progress):
        return shape.learn_words(captions)


def _figures(
    bundle: Bundle, recipe: CaptionsRecipe | PartiRecipe, validation: TokenPairs, show_progress: bool
) -> dict[str, str]:
    pipe = Pipeline(bundle)
    num_rows = min(len(validation), recipe.train.evaluation_rows or len(validation))
    with stage("measuring likelihood", show=show_progress):
        figures = _likelihood_figures(pipe, validation, num_rows)
    if recipe.evaluate is not None:
        train, test = recipe.data.train, recipe.data.validation
        assert train is not None and test is not None
        command = (
            shlex.join(["smalti", "evaluate", "compositions", str(recipe.output / "bundle")])
            + f" --test {test} --train {train}"
        )
        report = evaluate_compositions(pipe, test, train, recipe.evaluate, command=command, show_progress=show_progress)
        report.write(recipe.output, force=True)
        figures |= report.figures()
    if recipe.prompts is not None:
        command = shlex.join(["smalti", "evaluate", "prompts", str(recipe.output / "bundle")])
        prompts = evaluate_prompts(pipe, recipe.prompts, command=command, show_progress=show_progress)
        prompts.write(recipe.output, force=True)
        figures |= prompts.figures()
    return figures


def _likelihood_figures(pipe: Pipeline, validation: TokenPairs, num_rows: int) -> dict[str, str]:
    """Nats per token of each part that an order learns, on the validation pairs; of pictures also without captions."""
    figures = {}
    for captioned in (True, False):
        for name, found in nats_by_order(pipe.model, pipe.layout, validation, num_rows, captioned=captioned).items():
            for part, nats in found.items():
                if nats.num_tokens and part in ("picture", "caption") and (captioned or part == "picture"):
                    given = "" if captioned else ", captions empty"
                    what = f"validation nats per {part} token, {name}{given}"
                    figures[what] = f"{nats.nats_per_token:.4f} ± {nats.standard_error:.4f}"
    return figures


def _picture_size(image_tokenizer: Any) -> tuple[int, int]:
    """Rows and columns that an image tokenizer was trained on."""
    size = image_tokenizer.config.image_size
    return (size, size) if isinstance(size, int) else size


def _most_text(layout: Layout) -> int:
    """How many tokens of a caption fit every order. Raises InputError if a caption's span is not of open length."""
    spans = {name: order.span("text") for name, order in layout.orders.items()}
    for name, span in spans.items():
        if span.end is None:
            raise InputError(
                f"the order {name!r} has {span}, but free captions have any length; write text{{..{span.length}}} with "
                "a marker behind it."
            )
    return min(span.length for span in spans.values())
