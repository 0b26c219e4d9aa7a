"""Recipes: one YAML file says all that a system is trained with, from data to output folder.

A recipe is checked before anything runs. Its sections are the config dataclasses themselves, so their fields, ranges
and defaults are written down once, where they are used; this file only says which sections there are.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smalti.data.digits import ColouringConfig
from smalti.data.picture_sets import PicturesConfig
from smalti.documents import BoundedLoader, parse_yaml, read_json, read_yaml
from smalti.errors import InputError, shortened
from smalti.evaluate.compositions import CompositionsConfig
from smalti.evaluate.report import ReportConfig
from smalti.files import write_json
from smalti.image_tokenizers.losses import AdversarialConfig, LossConfig
from smalti.image_tokenizers.titok import TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGANConfig
from smalti.image_tokenizers.vqvae import VQVAEConfig
from smalti.models.config import PRESETS, TransformerConfig
from smalti.precision import AUTO as AUTO_PRECISION
from smalti.precision import with_precision
from smalti.sequences.layout import Layout, Order, parse_order
from smalti.sequences.vocabulary import SPECIAL, Vocabulary
from smalti.systems.line_presets import AUTO, choose_preset
from smalti.tasks.images import Sampling
from smalti.text_tokenizer import BPEConfig
from smalti.training.gan_tokenizer import TrainGANTokenizerConfig
from smalti.training.image_tokenizer import TrainTokenizerConfig
from smalti.training.sample_table import SampleTableConfig
from smalti.training.token_model import TrainConfig


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Minutes = dict[Literal["image tokenizer", "transformer", "report"], Annotated[float, Field(gt=0)]]
"""What the stages of a recipe take on the machine that `expects` was measured on, two cores. They hold for the recipe
as it is: a change to what is trained, or for how long, takes them back."""


class DigitsData(Section):
    """Coloured, captioned digits, made from uncoloured ones, or read from the original pickle."""

    source: Literal["scikit-learn", "mnist", "pickle"]
    path: Path | None = None
    """MNIST's folder with the four idx files, or the pickle file; scikit-learn's digits need none."""
    colouring: ColouringConfig = ColouringConfig()

    @model_validator(mode="after")
    def _has_path(self) -> "DigitsData":
        if (self.path is None) == (self.source != "scikit-learn"):
            rule = "has no path" if self.source == "scikit-learn" else "needs a path"
            raise ValueError(f'path is {self.path}, and source "{self.source}" {rule}.')
        return self


class ImageTokenizer(Section):
    family: Literal["vqvae"]
    model: VQVAEConfig = VQVAEConfig()
    train: TrainTokenizerConfig = TrainTokenizerConfig()
    path: Path | None = None
    """Folder of a trained image tokenizer to use as it is, instead of training one."""


class Orders(Section):
    """The specials, and the orders in which spans stand, in the notation of `smalti.sequences.layout`."""

    specials: tuple[str, ...]
    orders: dict[str, str | tuple[str, float]]
    """The line of each order, or the line and its weight."""

    def make(self, *, codebook_size: int, text_vocab_size: int) -> Layout:
        sizes = {SPECIAL: self.specials, "image": codebook_size, "text": text_vocab_size}
        return Layout.parse(Vocabulary(sizes), self.orders)


class Recipe(Section):
    """A checked recipe. `load_recipe` reads one."""

    system: Literal["digits"]
    description: str
    expects: str
    """What a run gives and takes: figures with the data and machine they were measured on."""
    minutes: Minutes = {}
    data: DigitsData
    image_tokenizer: ImageTokenizer
    layout: Orders
    model: TransformerConfig
    """Without `max_length`, which is that of the layout's longest sequence; `preset` names one of `PRESETS` to start
    from."""
    train: TrainConfig
    sample: Sampling = Sampling()
    evaluate: ReportConfig = ReportConfig()
    output: Path

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        tokenizer = self.image_tokenizer.model
        layout = self.layout.make(codebook_size=tokenizer.codebook_size, text_vocab_size=1)
        if self.image_tokenizer.path is not None:
            return self  # its grid is known when it is loaded
        rows, columns = tokenizer.grid
        for order in layout.orders.values():
            for span in order.spans:
                if span.segment == "image" and span.length != rows * columns:
                    raise ValueError(
                        f'layout order "{order.name}" has {span}, but the image tokenizer gives {rows} × {columns} '
                        f"codes; write image{{{rows * columns}}} or change image_tokenizer.model."
                    )
        return self


class LinesModel(Section):
    preset: str = AUTO
    """A shape of `LINE_PRESETS`; "auto" picks the one that suits the number of training tokens."""
    dropout: float = 0.0

    @model_validator(mode="after")
    def _is_known(self) -> "LinesModel":
        choose_preset(self.preset, 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected a share in [0, 1).")
        return self


class LinesRecipe(Section):
    """A checked recipe of the system `lines`: pre-tokenized pictures, without captions or an image tokenizer."""

    system: Literal["lines"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: Path | None = None
    """Token table of `smalti data import-lines`."""
    validation: Path | None = None
    """A second token table; training rows with the codes of one of its rows are left out. None: hold rows out."""
    held_out: float | int = 0.05
    """Rows of `data` held out where no `validation` is given: a share, or a number."""
    split_seed: int = 0
    vocab_size: int | None = None
    """Codes are below it; None: as the table says."""
    model: LinesModel = LinesModel()
    learning_rate_width: int | None = None
    """`train.learning_rate` is for models of this width; for others it is multiplied by this width over theirs, as
    muP scales it for matrices (Yang et al. 2022, arXiv:2203.03466). None: it is the same for all."""
    train: TrainConfig
    baseline_rows: int = 200_000
    """Training rows that the report's baselines are fitted to at most; they are held in memory."""
    report_rows: int = 10_000
    """Validation rows that the report measures at most."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "LinesRecipe":
        for name in ("held_out", "vocab_size", "learning_rate_width", "baseline_rows", "report_rows"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0.")
        return self


class VQGANFamily(Section):
    family: Literal["vqgan"]
    model: VQGANConfig = VQGANConfig()


class ViTVQGANFamily(Section):
    family: Literal["vit_vqgan"]
    model: ViTVQGANConfig = ViTVQGANConfig()


class TiTokFamily(Section):
    family: Literal["titok"]
    model: TiTokConfig = TiTokConfig()


class TokenizerRecipe(Section):
    """A checked recipe of the system `image tokenizer`: an image tokenizer alone, trained on real pictures."""

    system: Literal["image tokenizer"]
    description: str
    expects: str
    minutes: Minutes = {}
    pictures: Path | None = None
    """Folder of pictures, or parquet table with a column `image`."""
    held_out: Path | None = None
    """Pictures of their own to measure on. None: some of `pictures` are kept back."""
    reading: PicturesConfig = PicturesConfig()
    image_tokenizer: Annotated[VQGANFamily | ViTVQGANFamily | TiTokFamily, Field(discriminator="family")]
    losses: LossConfig = LossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TrainGANTokenizerConfig = TrainGANTokenizerConfig()
    output: Path


class CaptionedPictures(Section):
    """Pictures with captions, as `open_pairs` finds them: parquet, webdataset shards, or a folder. Or what is tokens
    already: a table of `smalti tokenize`, or "hub:owner/name", a data set of the hub, read as a stream."""

    train: Path | None = None
    validation: Path | None = None
    size: tuple[int, int] | None = None
    """Rows and columns to which pictures are cropped and resized; None: those the image tokenizer was trained on."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a broken picture."""
    scale: int = 1
    """Drawn pictures are enlarged this many times."""


class CaptionsRecipe(Section):
    """A checked recipe of the system `captions`: pictures from free captions in one vocabulary."""

    system: Literal["captions"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: CaptionedPictures
    image_tokenizer: Path | None = None
    """Folder of a trained image tokenizer."""
    text_tokenizer: Path | None = None
    """File of a text tokenizer, which tokens need. None: one is trained on the captions of the training pictures."""
    text_size: int
    """Pieces of words."""
    segments: tuple[str, ...]
    """Which ids come first: image, special and text in some order."""
    layout: Orders
    model: TransformerConfig
    """Without `max_length`, which is that of the layout's longest sequence; `preset` names one of `PRESETS` to start
    from."""
    train: TrainConfig
    watch: SampleTableConfig = SampleTableConfig()
    sample: Sampling = Sampling()
    evaluate: CompositionsConfig | None = None
    """Draw the compositions of `data.validation` and look for each among all true pictures; None: do not."""
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "CaptionsRecipe":
        # the codebook's size is known when the image tokenizer is loaded
        BPEConfig(image_size=1, text_size=self.text_size, specials=self.layout.specials, order=self.segments)
        self.layout.make(codebook_size=1, text_vocab_size=1)
        return self


AnyRecipe = Recipe | LinesRecipe | TokenizerRecipe | CaptionsRecipe
System = type[Recipe] | type[LinesRecipe] | type[TokenizerRecipe] | type[CaptionsRecipe]
SYSTEMS: dict[str, System] = {
    "digits": Recipe,
    "lines": LinesRecipe,
    "image tokenizer": TokenizerRecipe,
    "captions": CaptionsRecipe,
}
"""Kinds of recipes, by their entry `system`."""


# Reading -------------------------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(resources.files(__name__))).glob("*.yaml"))}


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """A shipped recipe by its name, or the one in a YAML file, with settings changed by `overrides`.

    An override is "key=value": the key dotted, as in `train.learning_rate`, or its last word alone where only one
    setting ends in it; the value as in YAML. Raises InputError, in one line, for a recipe, key or value that is not
    as expected.
    """
    known = shipped_recipes()
    path = known.get(str(name), Path(name))
    if not os.path.isfile(path):  # which, unlike Path's, knows no name that is too long
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"there is no recipe {shortened(repr(str(name)))}; there are {', '.join(known)}, or give the path of a "
            f".yaml file.{hint}"
        )
    content = _read_yaml(path)
    system = SYSTEMS.get(str(content.get("system")))
    if system is None:
        raise InputError(
            f"recipe {name}: system is {shortened(repr(content.get('system')))}; expected one of {', '.join(SYSTEMS)}."
        )
    _rename_bf16(content, name)
    for override in overrides:
        for one in _one_by_one(override, system):
            if not _keeps_pace(_apply(content, one, system)):
                content.pop("minutes", None)
    return _checked(content, str(name), system)


def _rename_bf16(settings: dict[str, Any], name: str | Path) -> None:
    """Writes the `bf16` of recipes from before `precision` in today's words, in every section that trains."""
    for key, section in settings.items():
        if isinstance(section, dict):
            try:
                settings[key] = with_precision(section) if key == "train" else section
            except InputError as error:
                raise InputError(f"recipe {name}: {key}: {error}") from error
            _rename_bf16(settings[key], name)


class _Loader(BoundedLoader):
    """YAML, but 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (self.construct_object(key) for key, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    return read_yaml(path, "a recipe has sections such as data: and train:, in YAML", loader=_Loader)


def _checked(content: dict[str, Any], name: str, system: System) -> AnyRecipe:
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    _set_max_length(content, name)
    try:
        # As JSON, whose strict rules take a list for a tuple and text for a path, but never text for a number.
        return system.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        key = _place(content, found["loc"])
        raise InputError(
            f"recipe {name}: {_explain(key, found['type'], found['msg'], found['input'], system)}"
        ) from error


def _set_max_length(content: dict[str, Any], name: str) -> None:
    """Gives the model section the length of the layout's longest sequence."""
    model, layout = content.get("model"), content.get("layout")
    if not isinstance(model, dict) or not isinstance(layout, dict) or not isinstance(layout.get("orders"), dict):
        return  # the check that follows says so
    if "max_length" in model:
        raise InputError(f"recipe {name}: model.max_length follows from the layout; leave it out.")
    if (preset := model.pop("preset", None)) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(
                f"recipe {name}: model.preset {shortened(repr(preset))} is unknown; choose one of {', '.join(PRESETS)}."
            )
        model.update({**PRESETS[preset], **model})
    try:
        lines = [line if isinstance(line, str) else str(line[0]) for line in layout["orders"].values()]
        model["max_length"] = max(Order(name="", parts=parse_order(line)).max_length for line in lines)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"recipe {name}: layout.orders: {error}") from error


def _place(content: Any, location: Sequence[int | str]) -> str:
    """A validation error's location as a dotted key, without the tag by which a kind of section was chosen, which is
    not a place in the file."""
    places = []
    for place in location:
        inside = place in content if isinstance(content, dict) else isinstance(place, int)
        if inside or place == location[-1]:
            places.append(str(place))
        if inside:
            content = content[place] if isinstance(content, dict) else None  # lists hold no sections
    return ".".join(places)


_WORDS = {
    "a valid integer": "a whole number",
    "an object": "a section",
    "a valid array": "a list",
    "a valid ": "a ",
    "Input tag": "the kind",
}
"""JSON's words in error messages, and what a writer of YAML calls them."""


def _explain(key: str, kind: str, message: str, given: object, system: System) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no setting {shortened(key)}; {_suggest(key, system)}"
    if kind in ("missing", "missing_argument"):
        return f"{key} is missing; add it."
    for json_word, word in _WORDS.items():
        message = message.replace(json_word, word)
    return f"{key} is {given!r}; {message}."


# Overrides -----------------------------------------------------------------------------------------------------


def _one_by_one(override: str, system: System) -> list[str]:
    """A setting as it is given, but `precision=...` alone for every section that trains, and `bf16` by its new name."""
    key, equals, text = override.partition("=")
    section, _, last = key.rpartition(".")
    if last == "bf16":
        last, text = "precision", with_precision({last: _value(text, override)})["precision"]
    if last != "precision":
        return [override]
    keys = [f"{section}.{last}"] if section else [name for name in _keys(system) if name.rpartition(".")[2] == last]
    return [f"{key}{equals}{text}" for key in keys]


_ANY_PACE = ("evaluate", "sample", "watch", "about", "minutes", "output", "pictures", "held_out", "text_tokenizer")
_DATA = ("data.path", "data.train", "data.validation", "image_tokenizer", "image_tokenizer.path")


def _value(text: str, override: str) -> Any:
    return parse_yaml(text, shortened(repr(override)), "put the value in quotes", loader=_Loader, kind=object)


def _keeps_pace(key: str) -> bool:
    """Whether a recipe takes as long with another value of a setting."""
    section, last = key.partition(".")[0], key.rpartition(".")[2]
    return section in _ANY_PACE or key in _DATA or last in ("seed", "precision", "device")


def _apply(content: dict[str, Any], override: str, system: System) -> str:
    """Changes a setting in the content of a recipe; returns its full key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(
            f"{shortened(repr(override))} is no setting; write key=value, for example train.learning_rate=1e-3."
        )
    value = _value(text, override)
    full_key = _full_key(key, system)
    *sections, last = full_key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(
                f"{shortened(repr(override))}: the recipe's {section} is not a section but {shortened(repr(content))}."
            )
    if isinstance(value, str) and isinstance(content.get(last), dict) and f"{full_key}.preset" in _keys(system):
        content, last = content[last], "preset"  # model=llama-60m
    content[last] = value
    return full_key


def _full_key(key: str, system: System) -> str:
    known = list(_keys(system))
    patterns = [re.escape(name).replace(r"\*", r"[^.]+") for name in known]
    if any(re.fullmatch(pattern, key) for pattern in patterns) or any(name.startswith(f"{key}.") for name in known):
        return key
    found = [name for name in known if name.rpartition(".")[2] == key]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"several settings are named {key}; write {' or '.join(found)}.")
    raise InputError(f"there is no setting {shortened(key)}; {_suggest(key, system)}")


def _suggest(key: str, system: System) -> str:
    known = [name for name in _keys(system) if "*" not in name]
    by_last_word = {name.rpartition(".")[2]: name for name in [*known, *system.model_fields]}
    near = [by_last_word[word] for word in difflib.get_close_matches(key.rpartition(".")[2], by_last_word, n=1)]
    near += difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near))}?"
    section = key
    while section and not any(name.startswith(f"{section}.") for name in known):
        section = section.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in known if name.startswith(prefix))
    return f"there are {', '.join(f'{prefix}{name}' for name in inside)}."


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings below a section; `*` stands for a name of one's own."""
    for name, inner in _fields(annotation).items():
        below = [kind for kind in (inner, *get_args(inner)) if _fields(kind)]
        if name == "max_length" and annotation is TransformerConfig:
            yield f"{prefix}preset"  # the length follows from the layout; a preset stands for the other fields
            continue
        if not below:
            yield f"{prefix}{name}"
            if getattr(inner, "__origin__", None) is dict:
                yield f"{prefix}{name}.*"
        yield from dict.fromkeys(key for kind in below for key in _keys(kind, f"{prefix}{name}."))


def _fields(annotation: Any) -> Mapping[str, Any]:
    """Names and kinds of the settings of a section; none for anything else."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return {name: kind for name, kind in get_type_hints(annotation).items() if name != "model_config"}
    return {}


def claim_folder(recipe: BaseModel, folder: Path, *, free: Collection[str]) -> None:
    """Writes the recipe into a run's folder, or checks that the run there is of the same one, but for the sections in
    `free`, which say how a run is described and measured and not what it makes.

    Raises InputError naming the section that differs.
    """
    path = folder / "recipe.json"
    settings = json.loads(recipe.model_dump_json(exclude=set(free) | {"output", "description", "expects", "minutes"}))
    if path.exists():
        found = read_json(path, "remove this file if the run there is of the settings you give, or give another folder")
        _rename_bf16(found, path)
        differing = [name for name in settings if not _agree(found.get(name), settings[name])]
        if differing:
            raise InputError(
                f"{folder} holds a run with other settings in the section {differing[0]!r} (see {path}): go on with "
                "the same settings, or give another folder, output=FOLDER."
            )
        return
    write_json(path, settings)


def _agree(one: Any, other: Any, name: str = "") -> bool:
    """Whether two settings are the same. One that is None and one that an earlier version did not have are; so is the
    precision "auto" and any other, since a training that goes on keeps what it began with."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one.get(key), other.get(key), key) for key in one | other)
    return one == other or (name == "precision" and AUTO_PRECISION in (one, other))
