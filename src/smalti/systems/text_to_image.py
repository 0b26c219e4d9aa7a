"""Pictures of captions that a text encoder reads, from top to bottom: codes, features, a transformer in one or two
stages, a bundle, a report. The second stage goes on with the weights of the first, at larger pictures.

The folder of a run (see stages.py):

    image_tokenizer/     the image tokenizer, in half precision
    text_encoder.json    which text encoder the features are of; it lies elsewhere
    features/            features of all captions, unless the recipe names another folder for them
    stage1/, stage2/     tokens/: pictures as codes, with their captions; model/: checkpoints, curves.csv, curves.png;
                         samples/: the same prompts with the same seeds on the way
    bundle/              what `FeaturePipeline.load` reads
    report.md, report.json, captions.png
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from smalti.bundle import Bundle, find_bundle
from smalti.data.featured_pairs import FeaturedPairs
from smalti.data.lines import split_rows
from smalti.data.pair_sources import open_pairs
from smalti.data.tokenize_pairs import TokenizeConfig
from smalti.data.tokens import TokenTable
from smalti.devices import choose_device
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.evaluate.captions import CaptionNats, caption_nats, evaluate_captions
from smalti.evaluate.reconstruction import default_image_size, find_image_tokenizer
from smalti.files import made_again, write_json
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN
from smalti.image_tokenizers.vqgan import VQGAN
from smalti.models.config import LLAMAGEN, TransformerConfig
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.models.families import AnyModel
from smalti.recipes import TextToImageRecipe, TextToImageStage, claim_folder
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary
from smalti.systems.stages import finish, stored_image_tokenizer, stored_tokens, team
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.sample_table import SampleTable
from smalti.text_features import FeatureCache, TextEncoder, TextEncoderConfig, prepared
from smalti.training.estimate import Estimate
from smalti.training.token_model import train_model

ORDER = "caption to image"


class _Stage(NamedTuple):
    """One training: its settings, the size of its pictures in rows and columns, and where it lies."""

    settings: TextToImageStage
    size: tuple[int, int]
    sources: dict[str, Path]
    """Pictures with captions, "train" and perhaps "validation"."""
    folder: Path

    def tokens(self, split: str) -> Path:
        return self.folder / "tokens" / f"{split}.parquet"


Rows = tuple[TokenTable, Int64[np.ndarray, " n"]]
"""Some rows of a table."""


class _Tables(NamedTuple):
    """What a stage trains and is measured on."""

    train: Rows
    held_out: Rows


class _Trained(NamedTuple):
    """What came of a stage."""

    bundle: Bundle
    model: DecoderOnly
    held_out: FeaturedPairs


def train_text_to_image(recipe: TextToImageRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes tables and features, all of them train the transformer. Raises InputError
    if the folder holds a run of another recipe or text encoder, or as the stages do.
    """
    if recipe.data is None or recipe.image_tokenizer is None or recipe.text_encoder is None:
        raise InputError(
            "give data, pictures with captions; image_tokenizer, a folder or a bundle that has one; and text_encoder, "
            "the folder of a T5 encoder or a hub's owner/name."
        )
    output, given = recipe.output, recipe.image_tokenizer
    given = find_image_tokenizer(given if given.is_dir() else find_bundle(given))
    stages = _stages(recipe, load_image_tokenizer(given))
    encoder = TextEncoder(recipe.text_encoder, max_length=recipe.num_features, device=choose_device())
    with team(output) as processes:
        if processes.is_first:
            _prepare(recipe, stages, given, encoder, show_progress)
        processes.wait()
        image_tokenizer: Any = load_image_tokenizer(output / "image_tokenizer").eval()
        tables, cache = _open_tables(recipe, stages), FeatureCache(_cache_folder(recipe), encoder)
        trained: _Trained | None = None
        estimate = Estimate()
        measured: dict[str, CaptionNats] = {}
        for stage, rows in zip(stages, tables, strict=True):
            before = None if trained is None else trained.model
            trained = _train(recipe, stage, rows, image_tokenizer, cache, before, estimate, show_progress)
            if processes.is_first and stage is not stages[-1]:
                pipe = FeaturePipeline(trained.bundle, encoder)
                measured[_pixels(stage)] = caption_nats(pipe, trained.held_out, recipe.evaluate)
        assert trained is not None
        if processes.is_first:
            held_out, seed = trained.held_out, stages[-1].settings.train.seed
            trained.bundle.about = {**recipe.about, "Trained by": f"`{command}`", "Seed": str(seed)}

            def measure(bundle: Bundle) -> dict[str, str]:
                pipe, how = FeaturePipeline(bundle, encoder), recipe.evaluate
                report = evaluate_captions(pipe, held_out, how, measured, command=command, show_progress=show_progress)
                report.write(output, force=True)
                return report.figures()

            finish(trained.bundle, output / "bundle", measure)
    return output / "bundle"


def _stages(recipe: TextToImageRecipe, image_tokenizer: nn.Module) -> list[_Stage]:
    """Raises InputError for pictures of a size that the image tokenizer cannot take."""
    found = []
    for name, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if settings is None:
            continue
        data = settings.data or recipe.data
        validation = settings.validation or (recipe.validation if settings.data is None else None)
        assert data is not None
        sources = {"train": data} if validation is None else {"train": data, "validation": validation}
        size = settings.image_size or default_image_size(image_tokenizer.config)
        at_size(image_tokenizer, size)
        found.append(_Stage(settings, size, sources, recipe.output / name))
    return found


def _pixels(stage: _Stage) -> str:
    return f"{stage.size[1]}×{stage.size[0]} pixels"


def _cache_folder(recipe: TextToImageRecipe) -> Path:
    return recipe.features or recipe.output / "features"


# Prepare -------------------------------------------------------------------------------------------------------


def at_size(image_tokenizer: nn.Module, size: tuple[int, int]) -> Any:
    """The image tokenizer, with the same weights, for pictures of `size` rows and columns. Raises InputError for one
    that knows its own size alone."""
    config: Any = image_tokenizer.config
    if default_image_size(config) == size:
        return image_tokenizer
    if not isinstance(image_tokenizer, VQGAN | ViTVQGAN):
        own = default_image_size(config)
        raise InputError(
            f"the image tokenizer is a {type(image_tokenizer).__name__}, which knows pictures of {own[0]}×{own[1]} "
            f"alone, and image_size is {size[0]}×{size[1]}: leave it out, with stage2=null, or give a VQGAN."
        )
    other = copy.copy(image_tokenizer)
    try:
        other.config = replace(config, image_size=size)
    except ValueError as error:
        raise InputError(f"image_size does not suit the image tokenizer: {error}") from error
    return other


def _prepare(
    recipe: TextToImageRecipe, stages: Sequence[_Stage], given: Path, encoder: TextEncoder, show_progress: bool
) -> None:
    """Makes what is not there yet: the image tokenizer as the bundle holds it, tokens, and features."""
    output = recipe.output
    for stage in stages:  # before the folder is claimed for them
        for split, source in stage.sources.items():
            if not stage.tokens(split).exists():
                open_pairs(source)
    claim_folder(recipe, output, free=("sample", "evaluate", "about", "watch", "features", "text_encoder"))
    _claim_encoder(output / "text_encoder.json", encoder)
    stored = stored_image_tokenizer(output / "image_tokenizer", lambda: load_image_tokenizer(given).eval())
    for stage in stages:
        how = TokenizeConfig(size=stage.size, on_error=recipe.on_error)
        for split, source in stage.sources.items():
            tokenizer = at_size(stored, stage.size)
            stored_tokens(source, stage.tokens(split), tokenizer, None, how, show_progress=show_progress)
    _fill(FeatureCache(_cache_folder(recipe), encoder), _open_tables(recipe, stages), recipe, show_progress)


def _claim_encoder(path: Path, encoder: TextEncoder) -> None:
    """Notes which text encoder the features are of, or checks that it is the same."""
    if not path.exists():
        write_json(path, {"name": encoder.name, "sha256": encoder.sha256, "width": encoder.width})
        return
    found = read_json(path, "remove this file if the run there is of the text encoder you give")
    if found.get("sha256") != encoder.sha256:
        raise InputError(
            f"{path.parent} holds a run with the text encoder {found.get('name')} of sha256 {found.get('sha256')}, "
            f"{encoder.name} has {encoder.sha256}: resume it with the same, or give another folder, output=FOLDER."
        )


def _open_tables(recipe: TextToImageRecipe, stages: Sequence[_Stage]) -> list[_Tables]:
    """What each stage trains and is measured on. Where rows are held out of pictures that both stages see, they are the
    same, so that none was trained on before."""
    found: list[_Tables] = []
    for stage in stages:
        opened = {}
        for split in stage.sources:
            with made_again(stage.tokens(split)):
                opened[split] = TokenTable.open(stage.tokens(split))
        table, other = opened["train"], opened.get("validation")
        if other is not None:
            found.append(_Tables((table, np.arange(len(table))), (other, np.arange(len(other)))))
            continue
        if found and stages[0].sources == stage.sources:
            (first, kept), (_, held) = found[0]
            if len(first) != len(table):
                raise InputError(f"{recipe.output} holds tokens of other pictures for each stage: give another folder.")
        else:
            kept, held = split_rows(table, recipe.held_out, stage.settings.train.seed)
        found.append(_Tables((table, kept), (table, held)))
    return found


def _fill(cache: FeatureCache, tables: Sequence[_Tables], recipe: TextToImageRecipe, show_progress: bool) -> None:
    """Encodes all captions, and says how many are cut, empty or were damaged."""
    opened = {id(table): table for rows in tables for table, _ in rows}.values()
    texts = [
        prepared(text, cleaned=recipe.clean_captions) for table in opened for text in table.texts(np.arange(len(table)))
    ]
    filled = cache.fill(texts, show_progress=show_progress)
    if filled.num_cut:
        which = f"{filled.num_cut} of {filled.num_captions} different captions"
        print(f"{which} are cut to {recipe.num_features} tokens; the longest has {filled.longest}", flush=True)
    if num_empty := sum(not text for text in texts):
        print(f"{num_empty} of {len(texts)} captions are empty: they train the null condition", flush=True)
    if filled.num_damaged:
        print(f"{filled.num_damaged} files of features were damaged, and are made again", flush=True)


# Train ---------------------------------------------------------------------------------------------------------


def _train(
    recipe: TextToImageRecipe,
    stage: _Stage,
    rows: _Tables,
    image_tokenizer: nn.Module,
    cache: FeatureCache,
    before: DecoderOnly | None,
    estimate: Estimate,
    show_progress: bool,
) -> _Trained:
    """Trains a stage, from wherever it stands; `before` is the model of the stage before."""
    tokenizer, encoder = at_size(image_tokenizer, stage.size), cache.encoder
    layout, model = _model(recipe, tokenizer.config, encoder.width, before)
    null_features, cleaned = model.features.null_features.clone(), recipe.clean_captions
    train, held_out = (FeaturedPairs(*part, cache, null_features, cleaned=cleaned) for part in rows)

    def bundle(of: AnyModel) -> Bundle:
        return Bundle(
            model=of,
            layout=layout,
            image_tokenizer=tokenizer,
            pictures=PictureConfig(height=stage.size[0], width=stage.size[1], scale=recipe.scale),
            text_encoder=TextEncoderConfig(name=recipe.text_encoder, sha256=encoder.sha256, cleaned=cleaned),
            sampling=recipe.sample,
            name=recipe.output.name,
        )

    def make_pipeline(of: AnyModel) -> FeaturePipeline:
        return FeaturePipeline(bundle(of), encoder)

    watch = recipe.watch
    trained = train_model(
        model,
        layout,
        train,
        held_out,
        stage.settings.train,
        stage.folder / "model",
        sampler=SampleTable(stage.folder / "samples", watch, make_pipeline) if watch.prompts else None,
        sample_every=watch.every,
        show_progress=show_progress,
        estimate=estimate,
    )
    assert isinstance(trained, DecoderOnly)
    return _Trained(bundle(trained.cpu()), trained, held_out)


def _model(
    recipe: TextToImageRecipe, tokenizer: Any, feature_width: int, before: DecoderOnly | None
) -> tuple[Layout, DecoderOnly]:
    """A fresh model for an image tokenizer's grid, with the weights of the stage before, if there was one: none of them
    depends on the grid, since positions are rotations."""
    (rows, columns), model = tokenizer.grid, recipe.model
    vocabulary = Vocabulary({FEATURES: 0, "image": tokenizer.codebook_size})
    layout = Layout.parse(vocabulary, {ORDER: f"{FEATURES}{{{recipe.num_features}}} image{{{rows * columns}}}"})
    # as LlamaGen, but features are not rotated where its weights multiply queries and keys by zero
    sizes: dict[str, Any] = {**LLAMAGEN, **model.model_dump(), "max_length": layout.max_length}
    shape = TransformerConfig(grid=(rows, columns), prefix_length=recipe.num_features, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.stage1.train.seed)
        made = new_model(layout, shape, feature_width=feature_width)
    if before is not None:
        made.load_state_dict(before.state_dict())
    return layout, made
