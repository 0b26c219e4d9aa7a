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
from smalti.data.tokenize_pairs import TokenizeConfig
from smalti.data.tokens import TokenTable
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
from smalti.training.distributed import own_device
from smalti.training.token_model import train_model

ORDER = "caption to image"


class _Stage(NamedTuple):
    """One training: its settings, and where it lies."""

    name: str
    settings: TextToImageStage
    data: Path
    validation: Path | None
    folder: Path

    @property
    def sources(self) -> dict[str, Path]:
        found = {"train": self.data}
        return found if self.validation is None else found | {"validation": self.validation}

    def tokens(self, split: str) -> Path:
        return self.folder / "tokens" / f"{split}.parquet"


class _Tables(NamedTuple):
    """The rows of a stage."""

    train: tuple[TokenTable, Int64[np.ndarray, " n"]]
    held_out: tuple[TokenTable, Int64[np.ndarray, " m"]]


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
    output, stages = recipe.output, _stages(recipe)
    given = recipe.image_tokenizer
    given = find_image_tokenizer(given if given.is_dir() else find_bundle(given))
    encoder = TextEncoder(recipe.text_encoder, max_length=recipe.num_features, device=own_device(None))
    sizes = _sizes(load_image_tokenizer(given), stages)
    with team(output) as processes:
        if processes.is_first:
            claim_folder(recipe, output, free=("sample", "evaluate", "about", "watch", "features", "text_encoder"))
            _claim_encoder(output / "text_encoder.json", encoder)
            stored = stored_image_tokenizer(output / "image_tokenizer", lambda: load_image_tokenizer(given).eval())
            for stage, size in zip(stages, sizes, strict=True):
                how = TokenizeConfig(size=size, on_error=recipe.on_error)
                for split, source in stage.sources.items():
                    tokenizer = at_size(stored, size)
                    stored_tokens(source, stage.tokens(split), tokenizer, None, how, show_progress=show_progress)
        processes.wait()
        image_tokenizer: Any = load_image_tokenizer(output / "image_tokenizer").eval()
        tables = _open_tables(recipe, stages)
        cache = FeatureCache(recipe.features or output / "features", encoder)
        if processes.is_first:
            _fill(cache, tables, recipe, show_progress)
        processes.wait()
        if not processes.is_first:
            cache = FeatureCache(recipe.features or output / "features", encoder)
        described = TextEncoderConfig(
            name=str(recipe.text_encoder), sha256=encoder.sha256, cleaned=recipe.clean_captions
        )
        model: DecoderOnly | None = None
        measured: dict[str, CaptionNats] = {}
        for number, (stage, size, rows) in enumerate(zip(stages, sizes, tables, strict=True)):
            tokenizer = at_size(image_tokenizer, size)
            layout, model = _model(recipe, tokenizer.config, encoder.width, model)
            null_features = model.features.null_features.cpu().clone()

            def pairs(of: tuple[TokenTable, Any], null: torch.Tensor = null_features) -> FeaturedPairs:
                return FeaturedPairs(*of, cache, null, cleaned=recipe.clean_captions)

            def make_pipeline(
                model: AnyModel, layout: Layout = layout, tokenizer: Any = tokenizer, **more: Any
            ) -> FeaturePipeline:
                height, width = default_image_size(tokenizer.config)
                bundle = Bundle(
                    model=model,
                    layout=layout,
                    image_tokenizer=tokenizer,
                    pictures=PictureConfig(height=height, width=width, scale=recipe.scale),
                    text_encoder=described,
                    sampling=recipe.sample,
                    name=output.name,
                    **more,
                )
                return FeaturePipeline(bundle, encoder)

            trained = train_model(
                model,
                layout,
                pairs(rows.train),
                pairs(rows.held_out),
                stage.settings.train,
                stage.folder / "model",
                sampler=SampleTable(stage.folder / "samples", recipe.watch, make_pipeline)
                if recipe.watch.prompts
                else None,
                sample_every=recipe.watch.every,
                show_progress=show_progress,
            )
            assert isinstance(trained, DecoderOnly)
            model = trained.cpu()
            if not processes.is_first:
                continue
            held_out = pairs(rows.held_out)
            if number + 1 < len(stages):
                pixels = f"{size[1]}×{size[0]} pixels"
                measured[pixels] = caption_nats(make_pipeline(copy.deepcopy(model)), held_out, recipe.evaluate)
                continue
            about = {**recipe.about, "Trained by": f"`{command}`", "Seed": str(stage.settings.train.seed)}

            def measure(bundle: Bundle, held_out: FeaturedPairs = held_out) -> dict[str, str]:
                report = evaluate_captions(
                    FeaturePipeline(bundle, encoder),
                    held_out,
                    recipe.evaluate,
                    measured,
                    command=command,
                    show_progress=show_progress,
                )
                report.write(output, force=True)
                return report.figures()

            finish(make_pipeline(model, about=about).bundle, output / "bundle", measure)
    return output / "bundle"


def _stages(recipe: TextToImageRecipe) -> list[_Stage]:
    found = []
    for name, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if settings is None:
            continue
        own = settings.data is not None
        validation = settings.validation if own else settings.validation or recipe.validation
        data = settings.data or recipe.data
        assert data is not None
        found.append(_Stage(name, settings, data, validation, recipe.output / name))
    return found


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


def _sizes(image_tokenizer: nn.Module, stages: Sequence[_Stage]) -> list[tuple[int, int]]:
    """Rows and columns of the pictures of each stage."""
    own = default_image_size(image_tokenizer.config)
    sizes = [stage.settings.image_size or own for stage in stages]
    for size in sizes:
        at_size(image_tokenizer, size)
    return sizes


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
        table = opened["train"]
        if "validation" in opened:
            held_out = opened["validation"]
            found.append(_Tables((table, np.arange(len(table))), (held_out, np.arange(len(held_out)))))
            continue
        first = found[0] if found and stages[0].sources == stage.sources else None
        kept, held = split_rows(table, recipe.held_out, stage.settings.train.seed)
        if first is not None and len(first.train[0]) == len(table):
            kept, held = first.train[1], first.held_out[1]
        found.append(_Tables((table, kept), (table, held)))
    return found


def _fill(cache: FeatureCache, tables: Sequence[_Tables], recipe: TextToImageRecipe, show_progress: bool) -> None:
    """Encodes all captions, and says how many are cut, empty or were damaged."""
    opened = {id(table): table for rows in tables for table, _ in rows}.values()
    texts = [
        prepared(text, cleaned=recipe.clean_captions) for table in opened for text in table.texts(np.arange(len(table)))
    ]
    filled = cache.fill(texts, show_progress=show_progress)
    notes = {
        f"cut to {recipe.num_features} tokens; the longest has {filled.longest}": filled.num_cut,
        "empty: they train the null condition": sum(not text for text in texts),
    }
    for what, count in notes.items():
        if count:
            print(f"{count} of {len(texts)} captions are {what}", flush=True)
    if filled.num_damaged:
        print(f"{filled.num_damaged} files of features were damaged, and are made again", flush=True)


# The model -----------------------------------------------------------------------------------------------------


def _model(
    recipe: TextToImageRecipe, tokenizer: Any, feature_width: int, before: DecoderOnly | None
) -> tuple[Layout, DecoderOnly]:
    """A fresh model for an image tokenizer's grid, with the weights of the stage before, if there was one: none of them
    depends on the grid, since positions are rotations."""
    (rows, columns), model = tokenizer.grid, recipe.model
    vocabulary = Vocabulary({FEATURES: 0, "image": tokenizer.codebook_size})
    layout = Layout.parse(vocabulary, {ORDER: f"{FEATURES}{{{recipe.num_features}}} image{{{rows * columns}}}"})
    # as LlamaGen, but features are not rotated where its weights multiply queries and keys by zero
    shape = TransformerConfig(
        num_layers=model.num_layers,
        d_model=model.d_model,
        num_heads=model.num_heads,
        d_ff=model.d_ff,
        dropout=model.dropout,
        max_length=layout.max_length,
        grid=(rows, columns),
        prefix_length=recipe.num_features,
        **LLAMAGEN,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.stage1.train.seed)
        made = new_model(layout, shape, feature_width=feature_width)
    if before is not None:
        made.load_state_dict(before.state_dict())
    return layout, made
