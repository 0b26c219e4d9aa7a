"""What is to be planned: the model, its sequences and its training, from a recipe or from a preset's name."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from smalti.data.digits import words
from smalti.documents import parse_yaml
from smalti.errors import InputError, shortened
from smalti.models import config as decoder_only
from smalti.models import encoder_decoder
from smalti.models.config import LLAMAGEN, TransformerConfig
from smalti.models.rar import RARConfig
from smalti.planning.footprint import Task
from smalti.recipes import (
    AnyRecipe,
    CaptionsRecipe,
    ClassesRecipe,
    LinesRecipe,
    OfScenes,
    PartiRecipe,
    PartiScenesRecipe,
    Recipe,
    ScenesRecipe,
    TextToImageRecipe,
    TokenizerRecipe,
    UpsamplerRecipe,
    load_recipe,
)
from smalti.recipes.line_presets import LINE_PRESETS, choose_preset, line_layout
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary
from smalti.text_tokenizer import BPEConfig, TextTokenizer
from smalti.training.token_model import TrainConfig

IMAGENET, IMAGENET_CLASSES = 1_281_167, 1000
GUIDED = ("classes", "text to image", "captions", "parti", "digits", "scenes", "scenes-parti")
"""Systems that draw under guidance: two rows a picture."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a recipe does not say until its data are read."""

    codebook_size: int | None = None
    grid: tuple[int, int] | None = None
    num_classes: int | None = None
    num_rows: int | None = None
    feature_width: int = 2048
    """FLAN-T5-XL's."""


class Subject(NamedTuple):
    name: str
    task: Task
    num_rows: int | None
    """Of the training table; None: not known."""
    is_guided: bool
    assumptions: list[str]


def find_subject(name: str, settings: Sequence[str] = (), assumed: Assumed = Assumed()) -> Subject:
    """A recipe, shipped or a file, or a preset of LlamaGen's or Parti's sizes. `settings` are key=value, as for `smalti
    train`; for a preset those of a training. Raises InputError as `load_recipe` does, and for what trains no
    transformer."""
    if name in decoder_only.PRESETS and name.startswith("llamagen"):
        return _llamagen(name, settings, assumed)
    if name in encoder_decoder.PRESETS:
        return _parti(name, settings, assumed)
    return _of_recipe(name, load_recipe(name, settings), assumed)


def _llamagen(name: str, settings: Sequence[str], assumed: Assumed) -> Subject:
    """Class-conditional, trained as LlamaGen's repository does (train_c2i.py): 300 epochs of ImageNet, batch 256."""
    grid, codes = assumed.grid or (16, 16), assumed.codebook_size or 16384
    num_classes, num_rows = assumed.num_classes or IMAGENET_CLASSES, assumed.num_rows or IMAGENET
    layout = _class_layout(grid, codes, num_classes)
    shape = decoder_only.preset_config(name, max_length=layout.max_length, grid=grid, prefix_length=1)
    train = _train(
        settings, num_epochs=300, batch_size=256, learning_rate=1e-4, weight_decay=0.05, betas=(0.9, 0.95),
        max_grad_norm=1.0,
    )  # fmt: skip
    said = f"{num_classes:,} classes, {grid[0]} × {grid[1]} codes of {codes:,}, {num_rows:,} pictures"
    return Subject(name, Task(shape, layout, train), num_rows, True, [said])


def _parti(name: str, settings: Sequence[str], assumed: Assumed) -> Subject:
    """Trained for the paper's 450,000 updates of 8,192 pairs (arXiv:2206.10789, §3), by AdamW."""
    grid, codes = assumed.grid or (32, 32), assumed.codebook_size or 8192
    shape = encoder_decoder.preset_config(name, text_size=16_000, max_text=128, codebook_size=codes, grid=grid)
    train = _train(
        settings, num_steps=450_000, batch_size=8192, learning_rate=4.5e-5, warmup_steps=5000, weight_decay=0.045,
        betas=(0.9, 0.96), max_grad_norm=4.0,
    )  # fmt: skip
    said = f"captions of 128 pieces of 16,000, {grid[0]} × {grid[1]} codes of {codes:,}, AdamW in place of Adafactor"
    return Subject(name, Task(shape, shape.layout, train), assumed.num_rows, True, [said])


def _train(settings: Sequence[str], **defaults: Any) -> TrainConfig:
    known = [field.name for field in fields(TrainConfig)]
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.removeprefix("train.")
        if not equals or key not in known:
            raise InputError(f"{shortened(setting)} is no setting of a training: {', '.join(known)}.")
        value = parse_yaml(text, shortened(setting), "put the value in quotes", kind=object)
        other = {"num_steps": "num_epochs", "num_epochs": "num_steps"}.get(key)
        defaults |= {key: tuple(value) if isinstance(value, list) else value}
        if other:
            defaults[other] = None
    try:
        return TrainConfig(**defaults)
    except TypeError as error:
        raise InputError(f"{' '.join(settings)}: {error}.") from error


def _class_layout(grid: tuple[int, int], codebook_size: int, num_classes: int) -> Layout:
    vocabulary = Vocabulary({"image": codebook_size, "label": num_classes + 1})
    return Layout.parse(vocabulary, {"label to image": f"label{{1}} image{{{grid[0] * grid[1]}}}"})


def _of_recipe(name: str, recipe: AnyRecipe, assumed: Assumed) -> Subject:
    said: list[str] = []
    feature_width = None
    rows = assumed.num_rows
    if isinstance(recipe, TokenizerRecipe | UpsamplerRecipe):
        what = "an image tokenizer" if isinstance(recipe, TokenizerRecipe) else "an upsampler"
        raise InputError(f"{name} trains {what} alone; a plan is for trainings of transformers.")
    if isinstance(recipe, Recipe):
        train, tokenizer = recipe.train, recipe.image_tokenizer.model
        text = TextTokenizer.from_words(words()).vocab_size
        layout = recipe.layout.make(codebook_size=tokenizer.codebook_size, text_vocab_size=text)
        shape: Any = recipe.model
        if rows is None and recipe.data.source != "pickle":
            rows = {"mnist": 55_000, "scikit-learn": 1437}[recipe.data.source] * recipe.data.colouring.colourings
            said.append(f"{rows:,} training rows")
    elif isinstance(recipe, CaptionsRecipe | ScenesRecipe):
        train, shape = recipe.train, recipe.model
        codes, _ = _codes_of_captions(recipe, assumed, said, 4096, None)
        words_of = BPEConfig(
            image_size=codes, text_size=recipe.text_size, specials=recipe.layout.specials, order=recipe.segments
        )
        layout = Layout.parse(words_of.vocabulary, recipe.layout.orders)
    elif isinstance(recipe, PartiRecipe | PartiScenesRecipe):
        train = recipe.train
        codes, grid = _codes_of_captions(recipe, assumed, said, 8192, (32, 32))
        shape = recipe.model.config(
            text_size=recipe.text_size, max_text=recipe.max_text, codebook_size=codes, grid=grid or (32, 32)
        )
        layout = shape.layout
    elif isinstance(recipe, ClassesRecipe):
        train = recipe.training
        codes, grid = _codes(recipe.image_tokenizer, assumed, said, 16384, (16, 16))
        num_classes = assumed.num_classes or 10
        said += [] if assumed.num_classes else [f"{num_classes} classes"]
        layout, shape = _classes(recipe, codes, grid or (16, 16), num_classes)
    elif isinstance(recipe, TextToImageRecipe):
        train, feature_width = recipe.stage1.train, assumed.feature_width
        codes, grid = _codes(recipe.image_tokenizer, assumed, said, 16384, (16, 16))
        said.append(f"stage 1, features of {feature_width} channels")
        assert grid is not None
        vocabulary = Vocabulary({FEATURES: 0, "image": codes})
        orders = {"caption to image": f"{FEATURES}{{{recipe.num_features}}} image{{{grid[0] * grid[1]}}}"}
        layout = Layout.parse(vocabulary, orders)
        sizes: dict[str, Any] = {**LLAMAGEN, **recipe.model.model_dump(), "max_length": layout.max_length}
        shape = TransformerConfig(grid=grid, prefix_length=recipe.num_features, **sizes)
    else:
        assert isinstance(recipe, LinesRecipe)
        train = recipe.train
        layout, shape, rows = _lines(recipe, assumed, said)
    if isinstance(recipe, OfScenes):
        rows = rows or recipe.data.num_train
    task = Task(shape, layout, train, feature_width)
    return Subject(name, task, rows, recipe.system in GUIDED, said)


def _classes(recipe: ClassesRecipe, codes: int, grid: tuple[int, int], num_classes: int) -> tuple[Layout, Any]:
    model = recipe.model.model_dump(exclude={"family"})
    if recipe.model.family == "rar":
        num_codes, dropout = grid[0] * grid[1], recipe.model.dropout
        shape = RARConfig(codebook_size=codes, num_classes=num_classes, num_codes=num_codes, attention_dropout=dropout,
                          **model)  # fmt: skip
        return shape.layout, shape
    layout = _class_layout(grid, codes, num_classes)
    return layout, TransformerConfig(max_length=layout.max_length, grid=grid, prefix_length=1, **LLAMAGEN, **model)


def _lines(recipe: LinesRecipe, assumed: Assumed, said: list[str]) -> tuple[Layout, TransformerConfig, int | None]:
    length, vocab_size, rows = None, recipe.vocab_size or assumed.codebook_size, assumed.num_rows
    if recipe.data is not None and recipe.data.exists():
        from smalti.data.tokens import TokenTable

        table = TokenTable.open(recipe.data)
        length, rows = table.image_length, rows or len(table)
        vocab_size = vocab_size or table.max_image_token + 1
    if assumed.grid is not None:
        length = assumed.grid[0] * assumed.grid[1]
    if length is None:
        length, rows = 256, rows or 1_000_000
        said.append(f"{rows:,} lines of {length} codes")
    if vocab_size is None:
        vocab_size = 1024
        said.append(f"codes below {vocab_size:,}")
    layout = line_layout(length, vocab_size)
    preset = choose_preset(recipe.model.preset, (rows or 0) * length)
    return layout, LINE_PRESETS[preset].transformer(layout, dropout=recipe.model.dropout), rows


def _codes_of_captions(
    recipe: CaptionsRecipe | PartiRecipe | OfScenes, assumed: Assumed, said: list[str], *usual: Any
) -> tuple[int, tuple[int, int] | None]:
    """As `_codes`; a recipe of scenes describes its image tokenizer, or names one."""
    if not isinstance(recipe, OfScenes):
        return _codes(recipe.image_tokenizer, assumed, said, *usual)
    if (path := recipe.image_tokenizer.path) is not None:
        return _codes(path, assumed, said, *usual)
    model = recipe.image_tokenizer.model
    return model.codebook_size, model.grid


def _codes(
    given: Path | None, assumed: Assumed, said: list[str], codebook_size: int, grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int] | None]:
    """Codebook size and grid: as assumed by whoever asks, of the image tokenizer that is given, or those usual here."""
    config: Any = None
    if given is not None and not (assumed.codebook_size and assumed.grid):
        from smalti.bundle import find_bundle
        from smalti.evaluate.reconstruction import find_image_tokenizer
        from smalti.image_tokenizers import load_image_tokenizer

        config = load_image_tokenizer(find_image_tokenizer(given if given.is_dir() else find_bundle(given))).config
    found = assumed.codebook_size or (config.codebook_size if config else codebook_size)
    cells = assumed.grid or (config.grid if config else grid)
    if config is None:
        said.append(f"{'' if cells is None else f'{cells[0]} × {cells[1]} '}codes of {found:,}")
    return found, cells
