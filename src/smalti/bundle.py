"""The one loaded thing: a model, the layout of its sequences, and the tokenizers it has; and the folder it lies in.

config.json             format version, layout, model, pictures, sampling defaults, measured figures, checksums
model.safetensors       the transformer's weights; may be in half precision
text_tokenizer.json     the words, as the `tokenizers` library saves them, if there are any
image_tokenizer/        config.json and model.safetensors of the image tokenizer, if there is one
reranker/               config.json and model.safetensors of a dual encoder that ranks candidates, if there is one
upsampler/              the same of what makes its pictures larger, if there is that
README.md               the model card

What a bundle can do follows from its layout and its parts, and is asked of it: `can_draw`, `can_caption`,
`reads_features`, `is_lines`.
"""

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from smalti.devices import choose_device, choose_dtype
from smalti.documents import config_of, read_json
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError, first_line, shortened
from smalti.files import new_folder, write_json
from smalti.hub import import_hub, is_hub_name
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.models.decoder_only import DecoderOnly
from smalti.models.dual_encoder import DualEncoder, DualEncoderConfig
from smalti.models.families import AnyModel, build_model, describe_model, read_model_config
from smalti.models.stored_weights import STORAGES
from smalti.prompts import PromptForm, PromptTokenizer
from smalti.sequences.layout import Layout, Marker, Span
from smalti.sequences.vocabulary import FEATURES
from smalti.text_features import TextEncoderConfig
from smalti.text_tokenizer import TextTokenizer
from smalti.upsample import Upsampler, UpsamplerConfig, check_input_size, find_upsampler, load_upsampler, save_upsampler
from smalti.weights import (
    ANEW,
    BUILD_ERRORS,
    CONFIG,
    WEIGHTS,
    check_sha256,
    file_sha256,
    load_module,
    save_weights,
    weights_sha256,
)

FORMAT = "smalti bundle"
FORMAT_VERSION = 2
TEXT_TOKENIZER = "text_tokenizer.json"
IMAGE_TOKENIZER = "image_tokenizer"
RERANKER = "reranker"
LABEL = "label"
"""The segment of a vocabulary that classes stand in."""
NO_CLASSES = "the layout has labels; give the classes that they stand for."
CARD = "README.md"
UPSAMPLER = "upsampler"
PARTS = (
    WEIGHTS,
    TEXT_TOKENIZER,
    *(f"{folder}/{file}" for folder in (IMAGE_TOKENIZER, RERANKER, UPSAMPLER) for file in (CONFIG, WEIGHTS)),
)
"""Files of which a bundle's config must know the checksum, where they are there."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a bundle draws with unless told otherwise."""

    picture: SampleConfig = field(default_factory=SampleConfig)
    caption: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=0.0))
    rerank: str | None = None
    """By which of `rerankers_of` the best of several pictures of a caption is kept; None: the first."""

    def check_rerank(self, layout: Layout, *, has_dual_encoder: bool) -> None:
        """Raises ValueError if a bundle of these has no such ranking."""
        found = rerankers_of(layout, has_dual_encoder=has_dual_encoder)
        if self.rerank is not None and self.rerank not in found:
            raise ValueError(f"rerank is {self.rerank!r}; a bundle of this layout ranks by {', '.join(found)}.")


def rerankers_of(layout: Layout, *, has_dual_encoder: bool) -> tuple[str, ...]:
    """What a bundle can keep the best of several pictures of a caption by, what tells most of the caption first:
    cosine by its dual encoder; p(caption | picture), and its product with p(picture | caption), where an order has the
    picture first; pointwise mutual information; p(picture | caption)."""
    first = ("contrastive",) if has_dual_encoder else ()
    return (*first, *(("caption", "both") if has_order(layout, "image", "text") else ()), "pmi", "picture")


def has_order(layout: Layout, *segments: str) -> bool:
    """Whether an order has spans of these segments, one after the other."""
    return any([span.segment for span in order.spans] == [*segments] for order in layout.orders.values())


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What the labels of a layout stand for: label i is class i, and one label more is the null condition. Raises
    ValueError for a name that is not unique."""

    num: int
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"there are {self.num} classes; expected at least 1.")
        if self.names is not None and len(self.names) != self.num:
            raise ValueError(f"{len(self.names)} names are given for {self.num} classes; give one for each.")
        if self.names is not None and len(set(self.names)) != self.num:
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two classes are named {shortened(repr(twice))}; names must differ.")

    def find(self, name: str | int) -> int:
        """The number of a class that is given by it or by its name. Raises InputError saying which there are."""
        text = str(name).strip()
        if self.names is not None and text in self.names:
            return self.names.index(text)
        if not re.fullmatch(r"-?\d+", text):
            near = difflib.get_close_matches(text, self.names or (), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"give its number, 0 to {self.num - 1}."
            known = "no names of classes are known here" if self.names is None else "no class has that name"
            raise InputError(f"there is no class {shortened(repr(text))}: {known}; {hint}")
        if not 0 <= int(text) < self.num:
            raise InputError(f"class {shortened(text)} is out of range; expected 0 to {self.num - 1}.")
        return int(text)


def classes_of(name: str | Path) -> Classes:
    """The classes of a bundle, of which nothing else is read. Raises InputError if it has none."""
    directory = find_bundle(name)
    described = read_config(directory)
    if "classes" not in described:
        raise InputError(f"{name} knows no classes; give it captions (--prompts) instead.")
    return config_of(Classes, described["classes"], f"{directory / CONFIG}: classes")


@cache
def smalti_version() -> str:
    """As it is installed. Looked up once: that takes a millisecond, and every picture's receipt names it."""
    return version("smalti")


@dataclass(kw_only=True, eq=False)
class Bundle:
    """A model in evaluation mode, its layout, and what else it has. `load` reads one, `save` writes one.

    Raises ValueError where the parts do not fit together.
    """

    model: AnyModel
    layout: Layout
    text_tokenizer: TextTokenizer | PromptTokenizer | Path | None = None
    """A path: a file of the `tokenizers` library that goes with the model and is not read, as an imported language
    model may have."""
    image_tokenizer: Any = None
    """Of any family: `smalti.image_tokenizers` says what all have."""
    reranker: DualEncoder | None = None
    """What tells how well a caption and a picture's codes fit, where one was trained."""
    pictures: PictureConfig | None = None
    """Those that the image tokenizer reads and draws; there if it is."""
    upsampler: Upsampler | None = None
    """What makes these pictures larger."""
    classes: Classes | None = None
    """What the labels are, where the layout has any."""
    text_encoder: TextEncoderConfig | None = None
    """What makes the features of a caption that sequences begin with, where that is known. It lies outside."""
    sampling: Sampling = Sampling()
    about: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    name: str = "a bundle"

    def __post_init__(self) -> None:
        self.model.eval()
        self.about, self.figures = dict(self.about), dict(self.figures)
        vocabulary = self.layout.vocabulary
        fits = [("the model's vocab_size", self.model.vocab_size, vocabulary.size)]
        if (self.classes is not None) != (LABEL in vocabulary):
            raise ValueError("classes are given, but the layout has no labels." if self.classes else NO_CLASSES)
        if self.classes is not None and vocabulary[LABEL].size - self.classes.num not in (0, 1):
            raise ValueError(
                f"there are {self.classes.num} classes and {vocabulary[LABEL].size} labels; expected as many, or one "
                "label more for the null condition."
            )
        if self.text_encoder is not None and not self.reads_features:
            raise ValueError("a text encoder is named, but the layout has no features.")
        if isinstance(self.text_tokenizer, PromptTokenizer):
            self.text_tokenizer.check_vocabulary(vocabulary)
        elif isinstance(self.text_tokenizer, TextTokenizer):
            self.text_tokenizer.check_vocabulary(vocabulary)
            fits.append(("the text tokenizer's size", self.text_tokenizer.vocab_size, vocabulary["text"].size))
        if (self.image_tokenizer is None) != (self.pictures is None):
            raise ValueError("an image tokenizer and the config of its pictures go together; give both, or neither.")
        if self.image_tokenizer is not None:
            config = self.image_tokenizer.eval().config
            fits.append(("the image tokenizer's codebook_size", config.codebook_size, vocabulary["image"].size))
            num_cells = config.grid[0] * config.grid[1]
            fits.append(("the cells of the image tokenizer's grid", num_cells, self.image_length))
        if self.reranker is not None:
            shape = self.reranker.eval().config
            fits.append(("the reranker's codebook_size", shape.codebook_size, vocabulary["image"].size))
            fits.append(("the reranker's number of codes", shape.num_codes, self.image_length))
            fits.append(("the reranker's text_size", shape.text_size, vocabulary["text"].size))
        self.sampling.check_rerank(self.layout, has_dual_encoder=self.reranker is not None)
        if self.upsampler is not None:
            if self.pictures is None:
                raise ValueError("an upsampler is given, but no image tokenizer whose pictures it makes larger.")
            size = self.pictures.height, self.pictures.width
            check_input_size(self.upsampler.eval().config, size, f"the bundle {self.name} has pictures")
        for what, found, wanted in fits:
            if found != wanted:
                raise ValueError(f"{what} is {found}, the layout says {wanted}.")
        self.model.check_layout(self.layout)

    # What it can do --------------------------------------------------------------------------------------------

    @property
    def can_draw(self) -> bool:
        """Whether it draws pictures of captions."""
        return self._has_both_tokenizers and self.has_order("text", "image")

    @property
    def can_caption(self) -> bool:
        """Whether it writes captions of pictures."""
        return self._has_both_tokenizers and self.has_order("image", "text")

    @property
    def can_draw_classes(self) -> bool:
        """Whether it draws pictures of classes."""
        return self.image_tokenizer is not None and self.has_order(LABEL, "image")

    @property
    def reads_features(self) -> bool:
        """Whether captions reach the model as features of a text encoder."""
        return FEATURES in self.layout.vocabulary

    @property
    def can_draw_features(self) -> bool:
        """Whether it draws pictures of features of captions."""
        return self.image_tokenizer is not None and self.has_order(FEATURES, "image")

    @property
    def null_label(self) -> int | None:
        """The label that says that no class is given; None: there is none, and so no guidance."""
        if self.classes is None or self.layout.vocabulary[LABEL].size == self.classes.num:
            return None
        return self.classes.num

    def decoder_only(self, what: str) -> DecoderOnly:
        """The model, for `what` knows decoder-only ones alone. Raises InputError for another."""
        if not isinstance(self.model, DecoderOnly):
            kind = type(self.model).__name__
            article = "an" if kind[0] in "AEIOU" else "a"
            raise InputError(f"the model of {self.name} is {article} {kind}; {what} takes none.")
        return self.model

    @property
    def is_lines(self) -> bool:
        """Whether its sequences are lines of codes behind a marker, and what the codes look like is not known."""
        return self.image_tokenizer is None and is_lines(self.layout)

    @property
    def kind(self) -> str:
        """What it is a bundle of, in a word, for messages."""
        if self.classes is not None:
            return "classes" if self.image_tokenizer is not None else "classes without an image tokenizer"
        if self.reads_features:
            return f"features of captions{'' if self.image_tokenizer is not None else ' without an image tokenizer'}"
        return "lines" if self.is_lines else "token ids alone" if self.image_tokenizer is None else "pictures"

    @property
    def _has_both_tokenizers(self) -> bool:
        return self.image_tokenizer is not None and isinstance(self.text_tokenizer, TextTokenizer | PromptTokenizer)

    def has_order(self, *segments: str) -> bool:
        return has_order(self.layout, *segments)

    @property
    def rerankers(self) -> tuple[str, ...]:
        """Those of `rerankers_of` that the bundle has, its own choice first."""
        found, chosen = rerankers_of(self.layout, has_dual_encoder=self.reranker is not None), self.sampling.rerank
        return found if chosen is None else (chosen, *(name for name in found if name != chosen))

    def order(self, *segments: str) -> str:
        """The name of the order with spans of these segments, one after the other. Raises InputError listing the orders
        there are."""
        for order in self.layout.orders.values():
            if [span.segment for span in order.spans] == [*segments]:
                return order.name
        raise InputError(
            f"the bundle {self.name} has no order with {' before '.join(segments)}, which this needs; it has:\n"
            f"{self.layout}"
        )

    @property
    def image_length(self) -> int:
        """Codes of a picture."""
        return next(iter(self.layout.orders.values())).span("image").length

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights; an image tokenizer's are float32."""
        return next(self.model.parameters()).dtype

    @cached_property
    def upsampler_sha256(self) -> str | None:
        """Of the upsampler's weights, if there is one: they make no codes, and so are no part of `weights_sha256`."""
        return None if self.upsampler is None else weights_sha256(self.upsampler)

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of all weights as they are in memory: the same however the bundle is stored. It is taken when it is
        first asked for, as a receipt does."""
        others = [part for part in (self.image_tokenizer, self.reranker) if part is not None]
        return weights_sha256(self.model, *others)

    # Reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, name: str | Path, *, device: torch.device | str = "auto", dtype: str = "auto", weights: str = "float32"
    ) -> Self:
        """A bundle from its folder, by the name of one that ships, or by a hub's `owner/name` (extra "hub").

        `device` and `dtype`, the transformer's, are as `smalti.devices` knows them: "auto" is a GPU where there is one,
        and float32; on "meta" a bundle has its shapes and no weights. `weights` of STORAGES is how its matrices are
        kept: in bfloat16 or int8 they take a half or a quarter of the memory, and are computed with in float32 all the
        same. The image tokenizer is always in float32: codes would change at near ties. Every file is read once and
        compared with its checksum on the way. Raises InputError if there is no such bundle or device, a file of it is
        missing or damaged, or a newer version wrote it.
        """
        directory = find_bundle(name)
        config = read_config(directory)
        path, sha256 = directory / CONFIG, config["sha256"]
        device, chosen = choose_device(device), choose_dtype(dtype)
        if weights not in STORAGES:
            raise InputError(f"weights {weights!r} is unknown; choose one of {', '.join(STORAGES)}.")
        if weights != "float32" and chosen != torch.float32:
            raise InputError(f"weights {weights!r} are computed with in float32; leave out dtype {chosen}.")
        networks = (IMAGE_TOKENIZER, UPSAMPLER) if "pictures" in config else ()
        weight_files = {WEIGHTS, *(f"{folder}/{WEIGHTS}" for folder in (*networks, RERANKER))}
        for file in sha256.keys() - weight_files:
            check_sha256(directory / file, sha256[file])
        with described_by(path):
            for entry, kind in (("about", dict), ("figures", dict), ("sampling", dict), ("name", str)):
                if not isinstance(config[entry], kind):
                    raise ValueError(f"the entry {entry} is {shortened(repr(config[entry]))}")
            model_config = read_model_config(config["model"], path)
            text_tokenizer = directory / TEXT_TOKENIZER if TEXT_TOKENIZER in sha256 else None
            form = config_of(PromptForm, config["prompt"], f"{path}: prompt") if "prompt" in config else None
            parts: dict[str, Any] = {"text_tokenizer": text_tokenizer}
            if "pictures" in config:
                folder, image_sha256 = directory / IMAGE_TOKENIZER, sha256.get(f"{IMAGE_TOKENIZER}/{WEIGHTS}")
                parts = {
                    "pictures": config_of(PictureConfig, config["pictures"], f"{path}: pictures"),
                    "image_tokenizer": load_image_tokenizer(folder, sha256=image_sha256, device=device),
                    "text_tokenizer": TextTokenizer.load(text_tokenizer) if text_tokenizer and not form else None,
                }
                if f"{UPSAMPLER}/{WEIGHTS}" in sha256:
                    folder, upsampler_sha256 = directory / UPSAMPLER, sha256[f"{UPSAMPLER}/{WEIGHTS}"]
                    parts["upsampler"] = load_upsampler(folder, sha256=upsampler_sha256, device=device)
            if "text_encoder" in config:
                parts["text_encoder"] = config_of(TextEncoderConfig, config["text_encoder"], f"{path}: text_encoder")
            if f"{RERANKER}/{WEIGHTS}" in sha256:
                parts["reranker"] = _load_reranker(directory / RERANKER, sha256[f"{RERANKER}/{WEIGHTS}"], device)
            if text_tokenizer and form:
                parts["text_tokenizer"] = PromptTokenizer.load(text_tokenizer, form)
            if "classes" in config:
                parts["classes"] = config_of(Classes, config["classes"], f"{path}: classes")
            model = load_module(
                lambda: build_model(model_config),
                directory / WEIGHTS,
                sha256=sha256[WEIGHTS],
                device=device,
                dtype=chosen,
            )
            if weights != "float32":
                model.store_weights(weights)
            return cls(
                model=model,
                layout=Layout.from_dict(config["layout"]),
                sampling=config_of(Sampling, config["sampling"], f"{path}: sampling"),
                about=config["about"],
                figures=config["figures"],
                name=config["name"],
                **parts,
            )

    def save(self, directory: Path | str, *, half: bool = False, force: bool = False) -> None:
        """Writes the bundle as a folder, the weights in float16 if `half`; loaded, they are float32 again.

        Raises InputError if the folder exists and is not empty, unless `force`; then it must be a bundle. So it does
        where the weights are not float32: what was lost would be saved for good.
        """
        if self.model.storage != "float32":
            raise InputError(
                f"the weights of {self.name} are kept as {self.model.storage}; load it with float32 to save it."
            )
        write_bundle(directory, lambda folder: self._write_files(folder, half), force=force)

    def _write_files(self, folder: Path, half: bool) -> dict[str, Any]:
        save_weights(self.model.state_dict(), folder / WEIGHTS, half=half)
        words = self.text_tokenizer
        if isinstance(words, TextTokenizer | PromptTokenizer):
            words.save(folder / TEXT_TOKENIZER)
        elif words is not None:
            shutil.copyfile(words, folder / TEXT_TOKENIZER)
        if self.image_tokenizer is not None:
            image_dtype = torch.float16 if half else None
            save_image_tokenizer(self.image_tokenizer, folder / IMAGE_TOKENIZER, dtype=image_dtype)
        if self.reranker is not None:
            (folder / RERANKER).mkdir()
            save_weights(self.reranker.state_dict(), folder / RERANKER / WEIGHTS, half=half)
            write_json(folder / RERANKER / CONFIG, self.reranker.config.to_dict())
        if self.upsampler is not None:
            save_upsampler(self.upsampler, folder / UPSAMPLER, half=half)
        (folder / CARD).write_text(self.card(), encoding="utf-8")
        return {
            "name": self.name,
            "smalti_version": smalti_version(),
            "layout": self.layout.to_dict(),
            "model": describe_model(self.model),
            **({} if self.pictures is None else {"pictures": asdict(self.pictures)}),
            **({} if self.classes is None else {"classes": asdict(self.classes)}),
            **({} if self.text_encoder is None else {"text_encoder": asdict(self.text_encoder)}),
            **({"prompt": asdict(words.form)} if isinstance(words, PromptTokenizer) else {}),
            "sampling": asdict(self.sampling),
            "about": self.about,
            "figures": self.figures,
        }

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the bundle to the hub's `owner/name`; returns its address. Needs the extra "hub"."""
        hub = import_hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "bundle")
            api = hub.HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=str(Path(folder) / "bundle"))
        return str(address)

    def card(self) -> str:
        """The model card: what it is, how to use it, where it comes from, its measured figures."""
        what, use = {
            "pictures": (CARD_OF_PICTURES, USE_OF_PICTURES),
            "lines": (CARD_OF_LINES, USE_OF_LINES),
            "token ids alone": (CARD_OF_TOKEN_IDS, USE_OF_TOKEN_IDS),
            "features of captions": (CARD_OF_FEATURES, USE_OF_FEATURES),
            "features of captions without an image tokenizer": (CARD_OF_FEATURES_ALONE, USE_OF_CODES),
            "classes": (CARD_OF_CLASSES, USE_OF_CLASSES),
            "classes without an image tokenizer": (CARD_OF_CODES, USE_OF_CODES),
        }[self.kind]
        sizes = {segment.name: segment.size for segment in self.layout.vocabulary.segments.values()}
        what = what.format(
            num_parameters=f"{self.model.num_parameters:,}",
            num_words=sizes.get("text", 0),
            codebook_size=f"{sizes.get('image', 0):,}",
            max_code=sizes.get("image", 0) - 1,
            length=self.layout.max_length - 1,
            num_classes="" if self.classes is None else f"{self.classes.num:,}",
            num_codes=self.image_length if "image" in self.layout.vocabulary else 0,
            size=f"{self.pictures.width}×{self.pictures.height}" if self.pictures else "",
            text_encoder=(self.text_encoder and self.text_encoder.name) or "a T5 encoder",
        )
        if not self.can_caption:
            use = use.replace(CAPTION_USE, "")
        if self.upsampler is not None:
            height, width = self.upsampler.config.output_size
            what += (
                f" With `--upscale` they are {width}×{height}, by an upsampler of {self.upsampler.num_parameters:,}."
            )
        orders = "\n".join(f"    {order}" for order in self.layout.orders.values())
        tables = _card_table("Where it comes from", self.about) + _card_table("Measured", self.figures)
        return f"{CARD_HEAD}# {self.name}\n\n{what} Its sequences:\n\n{orders}\n\n## Use\n\n{use}{tables}"


def _load_reranker(folder: Path, sha256: str, device: torch.device) -> DualEncoder:
    config = DualEncoderConfig.from_dict(read_json(folder / CONFIG, ANEW), folder / CONFIG)
    return load_module(lambda: DualEncoder(config), folder / WEIGHTS, sha256=sha256, device=device)


def is_lines(layout: Layout) -> bool:
    """Whether every sequence is one marker and then a fixed number of codes."""
    [first, *others] = layout.orders.values()
    if others or len(first.parts) != 2:
        return False
    marker, span = first.parts
    return isinstance(marker, Marker) and isinstance(span, Span) and span.segment == "image" and span.end is None


# Folders -------------------------------------------------------------------------------------------------------


def shipped_bundles() -> dict[str, Path]:
    """The bundles that come with the package, by name."""
    folder = Path(str(resources.files("smalti"))) / "bundles"
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def find_bundle(name: str | Path) -> Path:
    """The folder of a bundle: a folder given as it is, a shipped bundle by name, or a hub's `owner/name`, fetched.

    Raises InputError listing what there is.
    """
    shipped = shipped_bundles()
    # A folder of that name which is no bundle, such as one of data, does not hide a shipped one.
    if Path(name).is_dir() and (str(name) not in shipped or (Path(name) / CONFIG).is_file()):
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    if is_hub_name(name):
        return _fetch(str(name))
    raise InputError(
        f"there is no bundle {str(name)!r}: expected a folder with a {CONFIG}, a hub's owner/name, or one that ships: "
        f"{', '.join(shipped) or '(none)'}."
    )


def _fetch(repository: str) -> Path:
    hub = import_hub()
    try:
        return Path(hub.snapshot_download(repository))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise InputError(
            f"there is no folder {repository}, and the hub does not give a bundle of that name: {first_line(error)}"
        ) from error


def write_bundle(directory: Path | str, write_files: Callable[[Path], dict[str, Any]], *, force: bool = False) -> None:
    """Lets `write_files` fill a temporary folder and return what `config.json` should hold; adds the format and the
    files' checksums, and puts the folder in place. Raises InputError if `directory` exists and is not empty, unless
    `force`; what `force` replaces must be a bundle."""
    with new_folder(directory, force=force, holds=_is_bundle, what="bundle") as temporary:
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **write_files(temporary)}
        config["sha256"] = {
            path.relative_to(temporary).as_posix(): file_sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and path.name != CARD
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def add_upsampler(
    name: str | Path, upsampler: Path | str, directory: Path | str, *, force: bool = False
) -> UpsamplerConfig:
    """Writes a bundle again into `directory`, file by file, with an upsampler in place of the one it had, if any.
    Raises InputError for one that takes pictures of another size, and as `Bundle.load` and `write_bundle`."""
    source, found = find_bundle(name), find_upsampler(upsampler)
    loaded = Bundle.load(source, device="cpu")
    network = load_upsampler(found)
    if loaded.pictures is None:
        raise InputError(f"{name} is a bundle of {loaded.kind}: it has no pictures that an upsampler makes larger.")
    size = loaded.pictures.height, loaded.pictures.width
    check_input_size(network.config, size, f"the bundle {loaded.name} has pictures")

    def write_files(folder: Path) -> dict[str, Any]:
        config = read_config(source)
        for file in config.pop("sha256"):
            if not file.startswith(f"{UPSAMPLER}/"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, folder / file)
        save_upsampler(network, folder / UPSAMPLER)
        loaded.upsampler = network
        (folder / CARD).write_text(loaded.card(), encoding="utf-8")
        return config

    write_bundle(directory, write_files, force=force)
    return network.config


def read_config(directory: Path) -> dict[str, Any]:
    """A bundle's `config.json` in the form of today, after checking that every file it names is there.

    Raises InputError naming the file and how to mend it.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} is not a bundle: it has no {CONFIG}.")
    config = read_json(path, ANEW)
    if config.get("format") != FORMAT:
        raise InputError(f'{path} is not the config of a bundle: expected the entry "format": {FORMAT!r}.')
    config = _upgraded(config, path)
    checksums = config.get("sha256")
    if not isinstance(checksums, dict):
        raise InputError(f"{path}: the entry sha256 is no list of files with their checksums; {ANEW}.")
    for name in PARTS:
        if not isinstance(checksums.get(name), str) and ((directory / name).is_file() or name == WEIGHTS):
            raise InputError(f"{path}: the entry sha256 has no checksum of {name}; {ANEW}.")
    for name in checksums:
        file = directory / name
        if not os.path.isfile(file) or not file.resolve().is_relative_to(directory.resolve()):
            raise InputError(f"{directory} lacks {shortened(name)}; {ANEW}.")
    return config


def _upgraded(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config as version 2 has it. Version 1 named kinds, of which only pictures had all entries, and one family of
    models."""
    found = config.get("format_version")
    if found == FORMAT_VERSION:
        return config
    if found != 1 or isinstance(found, bool):
        newer = isinstance(found, int) and found > FORMAT_VERSION
        raise InputError(
            f"{path}: format version {shortened(repr(found))}, this smalti reads versions 1 and {FORMAT_VERSION}; "
            f"{'upgrade smalti' if newer else 'save the bundle again with this smalti'}."
        )
    kind = config.pop("kind", "pictures")
    if kind not in ("pictures", "lines", "tokens"):
        raise InputError(f"{path}: a bundle of {shortened(repr(kind))} is unknown; {ANEW}.")
    if kind != "pictures":
        config.pop("pictures", None)
        config |= {"sampling": {}, "about": {}}
    elif "pictures" not in config:
        raise InputError(f"{path} does not describe a bundle (the entry 'pictures' is missing); {ANEW}.")
    return {**config, "model": {"family": "decoder_only", "config": config.get("model")}, "format_version": 2}


def _is_bundle(directory: Path) -> bool:
    """Whether a bundle's config lies there, or nothing but what a bundle has: then its config may be damaged."""
    try:
        return read_json(directory / CONFIG, ANEW).get("format") == FORMAT
    except InputError:
        names = {path.name for path in directory.iterdir()}
        names_there = {CONFIG, WEIGHTS, TEXT_TOKENIZER, IMAGE_TOKENIZER, RERANKER, UPSAMPLER, CARD}
        return CONFIG in names and names <= names_there


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Whatever a bundle's config makes the block raise as an InputError that names the config."""
    try:
        yield
    except InputError:
        raise
    except BUILD_ERRORS as error:
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else first_line(error, 1000)
        raise InputError(f"{path} does not describe a bundle ({what}); {ANEW}.") from error


# Cards ---------------------------------------------------------------------------------------------------------


def _card_table(title: str, rows: Mapping[str, Any]) -> str:
    lines = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{lines}\n" if rows else ""


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|")  # as in p(picture | caption)


CARD_HEAD = """---
library_name: smalti
tags: [image-generation, autoregressive, discrete-tokens]
---
"""
CARD_OF_PICTURES = """\
A transformer of {num_parameters} parameters over one vocabulary: {num_words} words and {codebook_size} picture codes.
Pictures are {size} pixels."""
USE_OF_PICTURES = """\
```python
from smalti import Pipeline

pipe = Pipeline.load("PATH OR NAME OF THIS BUNDLE")
[picture] = pipe.generate("A CAPTION", seed=3)
picture.save("picture.png")
print(pipe.caption([picture]))
```
"""
CAPTION_USE = "print(pipe.caption([picture]))\n"
"""The line that goes with bundles that write captions."""
CARD_OF_LINES = """\
A transformer of {num_parameters} parameters over lines of {length} picture codes in 0..{max_code}. There is no image
tokenizer: what the codes look like is not known."""
USE_OF_LINES = """\
    smalti score lines.txt --bundle THIS_FOLDER -o scores/
    smalti complete prefixes.txt --bundle THIS_FOLDER -o completed.txt
"""
CARD_OF_CLASSES = """\
A transformer of {num_parameters} parameters that draws pictures of {num_classes} classes: {num_codes} codes of
{codebook_size} a picture, which are {size} pixels."""
USE_OF_CLASSES = """\
    smalti generate --class 0 -o picture.png --bundle THIS_FOLDER
"""
CARD_OF_CODES = """\
A transformer of {num_parameters} parameters over {num_codes} picture codes of {codebook_size}, for {num_classes}
classes. There is no image tokenizer: import it again with --image-tokenizer to draw pictures."""
USE_OF_CODES = """\
```python
from smalti import ClassPipeline

codes = ClassPipeline.load("PATH OF THIS BUNDLE").generate_codes(0, seed=3)
```
"""
CARD_OF_FEATURES = """\
A transformer of {num_parameters} parameters that draws pictures of captions: {num_codes} codes of {codebook_size} a
picture, which are {size} pixels. It reads captions as features of {text_encoder}, which is not part of the bundle."""
USE_OF_FEATURES = """\
    smalti generate "A CAPTION" -o picture.png --bundle THIS_FOLDER --text-encoder FOLDER_OF_THE_TEXT_ENCODER
"""
CARD_OF_FEATURES_ALONE = """\
A transformer of {num_parameters} parameters over {num_codes} picture codes of {codebook_size}, behind features that
{text_encoder} makes of a caption. There is no image tokenizer: import it again with --image-tokenizer to draw."""
CARD_OF_TOKEN_IDS = "A decoder-only transformer of {num_parameters} parameters, without an image tokenizer."
USE_OF_TOKEN_IDS = (
    "`smalti export hf THIS_FOLDER DIRECTORY` writes it as a Llama that `transformers` and LLM servers load.\n"
)
