"""Transformers of other projects that draw picture codes: read into bundles, checked against reference arrays, written.

Letters: B sequences, L codes of a picture, P prefix tokens, C channels of features, n codes there are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smalti.bundle import LABEL, Bundle, Classes, Sampling
from smalti.documents import read_text_list
from smalti.engine.executors import executors_for
from smalti.engine.generate import generate
from smalti.engine.sampling import SampleConfig, filter_logits, guide
from smalti.errors import InputError
from smalti.evaluate.reconstruction import default_image_size, find_image_tokenizer
from smalti.files import refuse_existing
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.vqgan import VQGAN
from smalti.interop import dalle_mini, gigatok_gpt, janus, llamagen_gpt, llamagen_vq, maskgit_vq, rar, taming
from smalti.interop.fields import Fields
from smalti.interop.fused import PieceMap, write_fused
from smalti.interop.huggingface import INDEXES, TOKENIZER, read_shards
from smalti.interop.keys import ImportReport, KeyLayout, config_beside, import_foreign, write_foreign
from smalti.interop.verifying import ArrayError, ReferenceArrays, compare_outputs, find_weights, read_arrays
from smalti.models.base import Inputs
from smalti.models.decoder_only import DecoderOnly
from smalti.models.encoder_decoder import END_OF_TEXT, EncoderDecoder
from smalti.models.encoder_decoder import START as START_OF_PICTURE
from smalti.models.families import AnyModel
from smalti.models.janus import START, Janus
from smalti.models.rar import PREFIX, RAR
from smalti.prompts import PromptTokenizer
from smalti.sequences.layout import Layout, Slot, SpanValues
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import FEATURE, FEATURES
from smalti.text_features import TextEncoder, TextEncoderConfig
from smalti.weight_files import ForeignWeights, read_config, read_weights

GUIDED_TOLERANCE = 5e-4
"""Of guided logits: the scale multiplies the rounding of both passes."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class ReadModel(NamedTuple):
    """What a foreign checkpoint holds, in evaluation mode."""

    model: AnyModel
    layout: Layout
    classes: Classes | None
    sampling: Sampling
    report: ImportReport
    text_encoder: TextEncoderConfig | None = None
    text_tokenizer: PromptTokenizer | None = None
    image_tokenizer: Any = None
    """Where the checkpoint itself holds one."""


class WrittenModel(NamedTuple):
    """A model of ours as another project keeps it."""

    pieces: PieceMap
    config: dict
    container: str | None
    """The name under which the original saves its tensors, if any."""
    beside: Mapping[str, Tensor] = {}
    """Tensors of other parts of the bundle."""
    text_tokenizer: PromptTokenizer | None = None
    """Whose file goes beside the weights."""


@dataclass(frozen=True, kw_only=True)
class TokenModelKind:
    """All that is particular to reading and writing one project's transformers."""

    name: str
    read: Callable[..., ReadModel]
    """From weights, their config or None, the side of the pictures in pixels where that is given, and the file of the
    text tokenizer where there is one."""
    write: Callable[[Bundle, Path], WrittenModel]
    """From a bundle and its folder. Raises InputError for a model that the original cannot be."""
    tokenizer_layout: KeyLayout | None
    """Of the image tokenizer that its published weights go with; None: no importer reads it."""
    inputs: tuple[str, ...]
    """Arrays of a reference folder that are given, not computed."""
    files: tuple[str, ...] = ()
    """Names, but for their endings, of the files in which the weights are published, and what their keys are read
    behind. Without any, there is one file."""


def _read_llamagen(
    weights: ForeignWeights,
    config: dict | None,
    image_size: int | None = None,
    text_tokenizer: Path | None = None,
    *,
    allow_nonfinite: bool = False,
) -> ReadModel:
    if gigatok_gpt.POSITIONS in weights.tensors:
        raise InputError(f"the weights have {gigatok_gpt.POSITIONS}, as GigaTok's have: import them as gigatok.")
    sizes = None
    if config is None:
        config, name = llamagen_gpt.infer_config(weights.tensors, _num_codes(weights.settings, image_size))
        sizes = f"of the published {name}, {config['block_size']} codes a picture"
    elif image_size is not None:
        raise InputError("--image-size and a config both say how large a picture is; leave out --image-size.")
    model, layout, report = llamagen_gpt.read_llamagen(weights.tensors, config, allow_nonfinite=allow_nonfinite)
    num_classes = llamagen_gpt.num_classes(config)
    classes = None if num_classes is None else Classes(num=num_classes)
    # as its scripts sample_c2i.py and sample_t2i.py draw by themselves
    guided = SampleConfig(guidance_scale=4.0 if classes else 7.5, top_k=2000 if classes else 1000)
    report = replace(report, sizes=sizes or report.sizes)
    text_encoder = None
    if classes is None:
        is_published = model.config.feature_width == llamagen_gpt.FEATURE_WIDTH
        text_encoder = TextEncoderConfig(name=llamagen_gpt.TEXT_ENCODER if is_published else None)
    return ReadModel(model, layout, classes, Sampling(picture=guided), report, text_encoder)


def _write_llamagen(bundle: Bundle, directory: Path) -> WrittenModel:
    gpt = bundle.decoder_only("the llamagen layout")
    num_classes = None if bundle.classes is None else bundle.classes.num
    config = llamagen_gpt.write_config(gpt.config, bundle.layout, num_classes)
    return WrittenModel(llamagen_gpt.piece_map(gpt.config), config, "model")


def _read_gigatok(
    weights: ForeignWeights,
    config: dict | None,
    image_size: int | None = None,
    text_tokenizer: Path | None = None,
    *,
    allow_nonfinite: bool = False,
) -> ReadModel:
    if image_size is not None:
        raise InputError("--image-size goes with llamagen; GigaTok's weights tell how many codes a picture has.")
    sizes = None
    if config is None:
        config, name = gigatok_gpt.infer_config(weights.tensors)
        sizes = f"of the published {name}, {config['block_size']} codes a picture"
    model, layout, report = gigatok_gpt.read_gigatok(weights.tensors, config, allow_nonfinite=allow_nonfinite)
    num_classes = llamagen_gpt.num_classes(config)
    assert num_classes is not None
    guided = SampleConfig(guidance_scale=4.0)  # as its README draws; its script filters nothing
    classes, sampling = Classes(num=num_classes), Sampling(picture=guided)
    return ReadModel(model, layout, classes, sampling, replace(report, sizes=sizes or report.sizes))


def _write_gigatok(bundle: Bundle, directory: Path) -> WrittenModel:
    gpt = bundle.decoder_only("the gigatok layout")
    if bundle.classes is None:
        raise InputError(f"{directory} holds a model without classes; the gigatok layout is for one with them.")
    config = gigatok_gpt.write_config(gpt.config, bundle.layout, bundle.classes.num)
    return WrittenModel(gigatok_gpt.piece_map(gpt.config), config, "model")


def _read_rar(
    weights: ForeignWeights,
    config: dict | None,
    image_size: int | None = None,
    text_tokenizer: Path | None = None,
    *,
    allow_nonfinite: bool = False,
) -> ReadModel:
    if image_size is not None:
        raise InputError("--image-size goes with llamagen; a RAR's weights tell how many codes a picture has.")
    sizes = None
    if config is None:
        config, sizes = rar.infer_config(weights.tensors), "from the shapes of the weights"
    model, report = rar.read_rar(weights.tensors, config, allow_nonfinite=allow_nonfinite)
    classes, sampling = Classes(num=model.config.num_classes), Sampling(picture=rar.read_sampling(config))
    return ReadModel(model, model.config.layout, classes, sampling, replace(report, sizes=sizes or report.sizes))


def _write_rar(bundle: Bundle, directory: Path) -> WrittenModel:
    model = bundle.model
    if not isinstance(model, RAR):
        raise InputError(f"{directory} holds a {type(model).__name__}; the rar layout is for a RAR.")
    return WrittenModel(rar.piece_map(model.config), rar.write_config(model.config, bundle.sampling.picture), None)


def _read_janus(
    weights: ForeignWeights,
    config: dict | None,
    image_size: int | None = None,
    text_tokenizer: Path | None = None,
    *,
    allow_nonfinite: bool = False,
) -> ReadModel:
    if config is None:
        raise InputError(
            "a Janus's weights do not tell how many heads it has: give the folder it was published in, with its "
            "config.json, or --config."
        )
    if text_tokenizer is None:
        raise InputError(
            f"a Janus is asked in words, and there is no {TOKENIZER} beside its weights: put the published one there."
        )
    words = PromptTokenizer.load(text_tokenizer, janus.FORM)
    found = janus.read_janus(weights.tensors, config, words.start_id, allow_nonfinite=allow_nonfinite)
    (rows, _), (pixels, _) = found.image_tokenizer.config.grid, found.image_tokenizer.config.image_size
    if image_size not in (None, pixels):
        raise InputError(
            f"--image-size is {image_size}; this Janus draws {pixels} × {pixels} pixels, {rows} × {rows} codes, and "
            f"learned no other size: give {pixels}, or leave it out."
        )
    guided = SampleConfig(guidance_scale=janus.GUIDANCE_SCALE)
    return ReadModel(
        found.model,
        found.model.config.layout,
        None,
        Sampling(picture=guided),
        found.report,
        text_tokenizer=words,
        image_tokenizer=found.image_tokenizer,
    )


def _write_janus(bundle: Bundle, directory: Path) -> WrittenModel:
    model, words, image_tokenizer = bundle.model, bundle.text_tokenizer, bundle.image_tokenizer
    if not isinstance(model, Janus):
        raise InputError(f"{directory} holds a {type(model).__name__}; the janus layout is for a Janus.")
    if not isinstance(image_tokenizer, VQGAN) or not isinstance(words, PromptTokenizer):
        raise InputError(f"{directory} lacks the image tokenizer or the prompts of a Janus; import it again.")
    return WrittenModel(
        janus.piece_map(model.config),
        janus.write_config(model.config, image_tokenizer),
        None,
        beside=write_fused(image_tokenizer, janus.image_pieces(image_tokenizer)),
        text_tokenizer=words,
    )


def _read_dalle_mini(
    weights: ForeignWeights,
    config: dict | None,
    image_size: int | None = None,
    text_tokenizer: Path | None = None,
    *,
    allow_nonfinite: bool = False,
) -> ReadModel:
    if image_size is not None:
        raise InputError("--image-size goes with llamagen; a DALL·E mini's weights tell how many codes a picture has.")
    if text_tokenizer is None:
        raise InputError(
            f"a DALL·E mini is asked in words, and there is no {TOKENIZER} beside its weights: put the published one "
            "there."
        )
    model, report = dalle_mini.read_dalle_mini(weights.tensors, config, allow_nonfinite=allow_nonfinite)
    words = PromptTokenizer.load(text_tokenizer, dalle_mini.FORM)
    if words.start_id != dalle_mini.END_ID:
        raise InputError(
            f"{text_tokenizer} has </s> as id {words.start_id}; the weights of a DALL·E mini have it as "
            f"{dalle_mini.END_ID}: take the tokenizer that was published with them."
        )
    sampling = Sampling(picture=SampleConfig(guidance_scale=dalle_mini.GUIDANCE_SCALE))
    return ReadModel(model, model.config.layout, None, sampling, report, text_tokenizer=words)


def _write_dalle_mini(bundle: Bundle, directory: Path) -> WrittenModel:
    model, words = bundle.model, bundle.text_tokenizer
    if not isinstance(model, EncoderDecoder) or model.config.form != "dalle_mini":
        raise InputError(f"{directory} holds a {type(model).__name__} that is none of DALL·E mini's form.")
    given = words if isinstance(words, PromptTokenizer) else None
    pieces, config = dalle_mini.piece_map(model.config), dalle_mini.write_config(model.config)
    return WrittenModel(pieces, config, None, text_tokenizer=given)


LLAMAGEN = TokenModelKind(
    name="llamagen",
    read=_read_llamagen,
    write=_write_llamagen,
    tokenizer_layout=llamagen_vq.LAYOUT,
    inputs=(
        "tokens",
        "class_ids",
        "null_class_ids",
        "filter_logits",
        "caption_embs",
        "emb_masks",
        "attn_mask",
        "valid",
    ),
)
RAR_KIND = TokenModelKind(
    name="rar",
    read=_read_rar,
    write=_write_rar,
    tokenizer_layout=maskgit_vq.LAYOUT,
    inputs=("tokens", "class_ids", "orders"),
)
GIGATOK = TokenModelKind(
    name="gigatok",
    read=_read_gigatok,
    write=_write_gigatok,
    tokenizer_layout=None,
    inputs=("tokens", "class_ids", "null_class_ids", "filter_logits"),
)
JANUS = TokenModelKind(
    name="janus",
    read=_read_janus,
    write=_write_janus,
    tokenizer_layout=llamagen_vq.LAYOUT,
    inputs=("tokens", "prompt_ids", "null_prompt_ids"),
)
DALLE_MINI = TokenModelKind(
    name="dalle-mini",
    read=_read_dalle_mini,
    write=_write_dalle_mini,
    tokenizer_layout=taming.LAYOUT,
    inputs=("tokens", "prompt_ids", "null_prompt_ids"),
    files=dalle_mini.FILES,
)
TOKEN_MODELS: Mapping[str, TokenModelKind] = {
    kind.name: kind for kind in (LLAMAGEN, RAR_KIND, GIGATOK, JANUS, DALLE_MINI)
}


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What an import may be told beside the weights."""

    image_tokenizer: Path | None = None
    """A folder of one, or the original's weight file."""
    image_size: int | None = None
    """Side of the pictures in pixels, which LlamaGen's weights do not tell."""
    class_names: Path | None = None
    """A file with a name a line, or a JSON list of them."""
    text_encoder: str | None = None
    """Of a model of captions: the folder of the T5 encoder whose features it reads, or the hub's owner/name."""


class ImportedModel(NamedTuple):
    bundle: Bundle
    report: ImportReport
    notes: tuple[str, ...]


# Reading -------------------------------------------------------------------------------------------------------


def import_token_model(
    kind: TokenModelKind, source: Path, config: Path | None, extras: Extras, *, allow_nonfinite: bool = False
) -> ImportedModel:
    """The bundle of a foreign checkpoint: a file, or a folder with one in it. Raises InputError if a file cannot be
    read, a tensor is missing, misshapen or left over, or the sizes are known from nowhere."""
    weights = _read_source(source, kind.files)
    notes = list(weights.notes)
    fields = _find_config(kind, source, config, notes)
    words = _find_text_tokenizer(source)
    found = kind.read(weights, fields, extras.image_size, words, allow_nonfinite=allow_nonfinite)
    classes = found.classes
    if extras.class_names is not None:
        classes = _named(classes, extras.class_names)
    parts: dict[str, Any] = {"text_tokenizer": found.text_tokenizer, "text_encoder": found.text_encoder}
    if extras.text_encoder is not None:
        parts["text_encoder"] = _named_encoder(found, extras.text_encoder)
    image_tokenizer = found.image_tokenizer
    if extras.image_tokenizer is not None:
        image_tokenizer, note = _joined_tokenizer(kind, extras.image_tokenizer, found.layout)
        notes.append(note)
    if image_tokenizer is not None:
        rows, columns = default_image_size(image_tokenizer.config)
        parts |= {"image_tokenizer": image_tokenizer, "pictures": PictureConfig(height=rows, width=columns)}
    if found.text_tokenizer is not None:
        notes.append(f"{words} was taken; prompts stand in the form {found.text_tokenizer.form.template!r}")
    name = (source if source.is_dir() else source.with_suffix("")).resolve().name
    bundle = Bundle(
        model=found.model,
        layout=found.layout,
        classes=classes,
        sampling=found.sampling,
        name=name,
        about={"Weights": f"imported from {source.name} ({kind.name})"},
        **parts,
    )
    return ImportedModel(bundle, found.report, tuple(notes))


def _read_source(source: Path, names: tuple[str, ...] = ()) -> ForeignWeights:
    if not source.is_dir():
        return read_weights(source)
    files = {name: path for name in names for path in source.glob(f"{name}.*") if path.suffix in SUFFIXES}
    if names and len(files) == len(names):
        parts = {name: read_weights(file) for name, file in files.items()}
        tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
        return ForeignWeights(tensors=tensors, notes=tuple(note for part in parts.values() for note in part.notes))
    for name in INDEXES:
        if (source / name).is_file():
            return read_shards(source / name)
    found = sorted(file for file in source.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(found) != 1:
        listed = ", ".join(file.name for file in found[:6]) or "none"
        raise InputError(f"{source} holds {len(found)} weight files ({listed}); give the one to read.")
    return read_weights(found[0])


def _find_config(kind: TokenModelKind, source: Path, config: Path | None, notes: list[str]) -> dict | None:
    """The config that was given, or that an export left beside the weights, or that lies in the folder."""
    if config is not None:
        return read_config(config)
    folder = source if source.is_dir() else source.parent
    nearby = [folder / "config.json", folder / "config.yaml"]
    if not source.is_dir():
        nearby.insert(0, config_beside(source))
    for path in nearby:
        if path.is_file():
            notes.append(f"{path} was read")
            return read_config(path)
    return None


def _find_text_tokenizer(source: Path) -> Path | None:
    """The one that an export left beside the weights, or that lies in the folder."""
    nearby = [(source if source.is_dir() else source.parent) / TOKENIZER]
    if not source.is_dir():
        nearby.insert(0, text_tokenizer_beside(source))
    return next((path for path in nearby if path.is_file()), None)


def text_tokenizer_beside(file: Path) -> Path:
    """Where an export leaves a text tokenizer, and an import looks for it."""
    return file.with_suffix(f".{TOKENIZER}")


def _num_codes(settings: Mapping[str, object], image_size: int | None) -> int:
    """Codes of a picture, of what a LlamaGen checkpoint's training noted, or of the size that is given."""
    step = settings.get("downsample_size", 16)
    noted = settings.get("image_size")
    side = image_size if image_size is not None else noted
    if not isinstance(side, int) or not isinstance(step, int) or step < 1:
        raise InputError(
            "the weights do not say how large their pictures are: give --image-size 256, 384 or 512 (pixels a side, at "
            "16 for a code: 256, 576 or 1024 codes), or the original's config."
        )
    if image_size is not None and isinstance(noted, int) and noted != image_size:
        raise InputError(f"--image-size is {image_size}, but the checkpoint was trained on pictures of {noted}.")
    if side < step or side % step:
        raise InputError(f"--image-size is {side}; expected a multiple of {step}, as 256, 384 or 512.")
    return (side // step) ** 2


def _named(classes: Classes | None, path: Path) -> Classes:
    if classes is None:
        raise InputError(f"--class-names {path}: this model draws of captions, and has no classes.")
    names = read_text_list(path, f"give a file with the names of {classes.num} classes, one a line")
    if len(names) != classes.num:
        raise InputError(f"{path} has {len(names)} names; the model has {classes.num} classes.")
    return Classes(num=classes.num, names=tuple(names))


def _named_encoder(found: ReadModel, name: str) -> TextEncoderConfig:
    if found.text_encoder is None or not isinstance(found.model, DecoderOnly):
        raise InputError(f"--text-encoder {name}: this model draws of classes, and reads no captions.")
    encoder, width = TextEncoder(name), found.model.config.feature_width
    if encoder.width != width:
        raise InputError(f"the text encoder {name} makes {encoder.width} features a token, the model reads {width}.")
    return replace(found.text_encoder, name=name, sha256=encoder.sha256)


def _joined_tokenizer(kind: TokenModelKind, path: Path, layout: Layout) -> tuple[Any, str]:
    """The image tokenizer of a folder of ours, or of the original's weight file, for pictures of as many codes as the
    layout has."""
    if path.is_dir():
        image_tokenizer: Any = load_image_tokenizer(find_image_tokenizer(path))
        note = f"image tokenizer of {path}"
    elif kind.tokenizer_layout is None:
        raise InputError(
            f"{path}: the image tokenizer that {kind.name}'s weights go with is not read. Leave out --image-tokenizer, "
            "and the bundle draws codes; or give the folder of an image tokenizer that was imported or trained."
        )
    else:
        weights = read_weights(path)
        image_tokenizer, report = import_foreign(kind.tokenizer_layout, weights.tensors)
        note = f"image tokenizer of {path}: {len(report.moved)} tensors, sizes {report.sizes}"
    num_codes, codebook_size = _image_length(layout), layout.vocabulary["image"].size
    config = image_tokenizer.config
    if config.codebook_size != codebook_size:
        raise InputError(
            f"{path} has a codebook of {config.codebook_size}, the transformer draws codes of {codebook_size}: they do "
            "not belong together."
        )
    side = math.isqrt(num_codes)
    if config.grid[0] * config.grid[1] != num_codes and isinstance(image_tokenizer, VQGAN) and side * side == num_codes:
        size = (side * config.patch_size, side * config.patch_size)  # convolutions: the same weights at any size
        image_tokenizer.config = replace(config, image_size=size)
    if (found := image_tokenizer.config.grid[0] * image_tokenizer.config.grid[1]) != num_codes:
        raise InputError(f"{path} gives {found} codes a picture, the transformer draws {num_codes}.")
    return image_tokenizer.eval(), note


def _image_length(layout: Layout) -> int:
    return next(iter(layout.orders.values())).span("image").length


# Writing -------------------------------------------------------------------------------------------------------


def export_token_model(kind: TokenModelKind, directory: Path, file: Path, *, force: bool = False) -> Path:
    """Writes a bundle's transformer in a foreign layout, as safetensors if `file` is called so and as the original
    saves it otherwise, and beside it the original's config, whose path is returned, and its text tokenizer if it has
    one of its own. Raises InputError for a model that the original cannot be."""
    refuse_existing([file, config_beside(file)], force=force)
    bundle = Bundle.load(directory, device="cpu")
    written = kind.write(bundle, directory)
    if written.text_tokenizer is not None:
        refuse_existing([text_tokenizer_beside(file)], force=force)
    tensors = {**write_fused(bundle.model, written.pieces), **written.beside}
    state = {key: tensor.contiguous() for key, tensor in tensors.items()}
    config = write_foreign(file, state, written.config, container=written.container, force=force)
    if written.text_tokenizer is not None:
        written.text_tokenizer.save(text_tokenizer_beside(file), force=force)
    return config


# Verifying -----------------------------------------------------------------------------------------------------


def verify_token_model(kind: TokenModelKind, found: Bundle | None, directory: Path) -> tuple[list[ArrayError], str]:
    """The largest error of every output of a reference folder: of the bundle's model where the folder is of its sizes,
    of the folder's own weights otherwise (it then certifies the same code)."""
    arrays, config = read_arrays(directory / "io.npz"), read_config(directory / "config.json")
    own = kind.read(read_weights(find_weights(directory)), config, None, _find_text_tokenizer(directory))
    note = f"{directory} is of other sizes than the imported file, so its own weights were run"
    model, layout = own.model, own.layout
    if found is not None and (found.model.config, found.layout.to_dict()) == (own.model.config, own.layout.to_dict()):
        model, layout = found.model, found.layout
        note = f"the imported weights were run on {directory / 'io.npz'}"
    outputs = _Outputs(model, layout, arrays, config).all()
    guided = [name for name in arrays if name.startswith(("gen_cfg", "gen_interval"))]
    tolerances = dict.fromkeys(guided, GUIDED_TOLERANCE)
    return compare_outputs(kind.name, outputs, arrays, kind.inputs, tolerances), note


class _Outputs:
    """How each array of a reference folder is computed: whole sequences at once, and greedily through the engine."""

    def __init__(self, model: AnyModel, layout: Layout, arrays: ReferenceArrays, config: dict):
        self.model, self.layout, self.arrays, self.config = model, layout, arrays, config
        segment = layout.vocabulary["image"]
        self.image = Slot(((segment.offset, segment.end),))
        self.order = next(iter(layout.orders))
        self.has_labels = LABEL in layout.vocabulary

    def all(self) -> dict[str, Callable[[], Tensor]]:
        found: dict[str, Callable[[], Tensor]] = {
            "logits": lambda: self._logits(self.arrays["tokens"]),
            "logits_uncond": lambda: self._logits(self.arrays["tokens"], null=True),
        }
        for name in ("nocfg", "cfg", "interval", "cfg_nomask"):
            found[f"gen_{name}_ids"] = lambda name=name: self._drawn(name)
            found[f"gen_{name}_logits"] = lambda name=name: self._drawn_logits(name)
        if isinstance(self.model, RAR):
            label = self.layout.vocabulary[LABEL]
            return found | {
                "condition_ids": lambda: label.offset + self.arrays["class_ids"],
                "cfg_scale_per_step": lambda: torch.tensor(self._scales("cfg"), dtype=torch.float32),
                "labels_permuted": lambda: self.arrays["tokens"].gather(1, self.arrays["orders"]),
                "logits_permuted": self._permuted_logits,
            }
        model = self.model
        if isinstance(model, Janus | EncoderDecoder):
            return found
        found["loss"] = self._loss
        if model.config.transformer.positions == "rotary_2d":
            found["freqs_cis"] = lambda: model.transformer.table
        for number in range(len(self.config.get("filters", []))):
            found[f"filter_keep_{number}"] = lambda number=number: self._kept(number)
        return found

    # what is drawn -------------------------------------------------------------------------------------------

    def _settings(self, name: str) -> SampleConfig:
        if name == "nocfg":
            return SampleConfig(temperature=0)
        fields = Fields(self.config, "config").section("generate")
        if isinstance(self.model, RAR):
            return SampleConfig(
                temperature=0,
                guidance_scale=fields.take("guidance_scale", float),
                guidance_schedule="cosine",
                guidance_power=fields.take("guidance_scale_pow", float),
            )
        guided = SampleConfig(temperature=0, guidance_scale=fields.take("cfg_scale", float))
        if name != "interval":
            return guided
        # the first token, and the loop's tokens 0 .. cfg_interval behind it
        return replace(guided, guidance_interval=(0, fields.take("cfg_interval", int) + 2))

    def _scales(self, name: str) -> list[float]:
        config, length = self._settings(name), self.arrays["tokens"].shape[1]
        return [config.guidance_at(step, length) for step in range(length)]

    def _drawn(self, name: str) -> Int[Tensor, "B L"]:
        """Greedy codes; the first executor's that differ from the reference, if any do."""
        requests = self._requests(masked=name != "cfg_nomask")
        wanted, ids = self.arrays[f"gen_{name}_ids"], torch.empty(0)
        for executor in executors_for(self.model, self.layout.max_length):
            drawn = generate(self.model, self.layout, requests, self._settings(name), executor=executor)
            ids = torch.stack([one.spans["image"] for one in drawn])
            if not torch.equal(ids, wanted):
                break
        return ids

    def _drawn_logits(self, name: str) -> Float[Tensor, "B L n"]:
        """What each of the reference's codes was drawn from, by teacher forcing over them."""
        ids, masked = self.arrays[f"gen_{name}_ids"], name != "cfg_nomask"
        length = ids.shape[1]
        cond = self._logits(ids, masked=masked)[:, :length]
        if name == "nocfg":
            return cond
        null = self._logits(ids, null=True, masked=masked)[:, :length]
        return guide(cond, null, torch.tensor(self._scales(name))[:, None])

    def _requests(self, *, masked: bool = True) -> list[Request]:
        if isinstance(self.model, Janus | EncoderDecoder):
            prompts = zip(self._prompts(), self._prompts(null=True), strict=True)
            return [
                Request(order=self.order, given={"text": ids}, null=Request(order=self.order, given={"text": null}))
                for ids, null in prompts
            ]
        if not self.has_labels:
            return [
                Request(order=self.order, features=features, null=Request(order=self.order, features=null))
                for features, null in zip(self._features(masked), self._features(masked, null=True), strict=True)
            ]
        nulls = [Request(order=self.order, given={LABEL: label[None]}) for label in self._labels(null=True)]
        return [
            Request(order=self.order, given={LABEL: label[None]}, null=null)
            for label, null in zip(self._labels(), nulls, strict=True)
        ]

    def _labels(self, *, null: bool = False) -> Int[Tensor, " B"]:
        if null and "null_class_ids" in self.arrays:
            return self.arrays["null_class_ids"]
        labels = self.arrays["class_ids"]
        return torch.full_like(labels, self.layout.vocabulary[LABEL].size - 1) if null else labels

    def _prompts(self, *, null: bool = False) -> Int[Tensor, "B P"]:
        """The ids of prompts, without the marker that ends them."""
        return self.arrays["null_prompt_ids" if null else "prompt_ids"][:, :-1]

    def _features(self, masked: bool, *, null: bool = False) -> list[Float[Tensor, "P C"]]:
        assert isinstance(self.model, DecoderOnly)
        masks = self.arrays["emb_masks"].bool()
        rows = [row[mask] if masked else row for row, mask in zip(self.arrays["caption_embs"], masks, strict=True)]
        return [self.model.null_features(len(row)) for row in rows] if null else rows

    # whole sequences -----------------------------------------------------------------------------------------

    def _logits(self, codes: Int[Tensor, "B L"], *, null: bool = False, masked: bool = True) -> Float[Tensor, "B _ n"]:
        """What each code is predicted by, and for a RAR what comes behind the last."""
        if isinstance(self.model, Janus | EncoderDecoder):
            markers = (START,) if isinstance(self.model, Janus) else (END_OF_TEXT, START_OF_PICTURE)
            prompts, codes = self._prompts(null=null), self.layout.vocabulary.ids("image", codes)
            between = torch.tensor([self.layout.vocabulary.special(marker) for marker in markers])
            token_ids = torch.cat((prompts, between.expand(len(codes), -1), codes[:, :-1]), dim=1)
            return self._of(token_ids)[:, prompts.shape[1] + len(markers) - 1 :]
        if not self.has_labels:
            rows = zip(self._features(masked, null=null), codes, strict=True)
            return torch.stack([self._featured_logits(features, row) for features, row in rows])
        labels = self._labels(null=null)[:, None]
        ones = torch.ones(len(codes), dtype=torch.long)
        spans = {LABEL: SpanValues(labels, ones), "image": SpanValues(codes, ones * codes.shape[1])}
        token_ids = self.layout.pack(self.order, spans).token_ids
        if isinstance(self.model, RAR):
            return self._of(token_ids)[:, PREFIX - 1 :]
        return self._of(token_ids[:, :-1])

    def _featured_logits(self, features: Float[Tensor, "P C"], codes: Int[Tensor, " L"]) -> Float[Tensor, "L n"]:
        given, prefix = len(features), self.layout[self.order].span(FEATURES).length
        token_ids = torch.cat((torch.full((given,), FEATURE), codes[:-1]))[None]
        positions = torch.arange(token_ids.shape[1])[None] + prefix - given
        padded = F.pad(features, (0, 0, 0, len(codes) - 1))[None]
        return self._of(Inputs(token_ids, positions, features=padded))[0, given - 1 :]

    def _permuted_logits(self) -> Float[Tensor, "B _ n"]:
        tokens, orders = self.arrays["tokens"], self.arrays["orders"]
        label, start = self.layout.vocabulary[LABEL], self.layout.vocabulary.special("<start>")
        begin = torch.stack((torch.full_like(self.arrays["class_ids"], start), label.offset + self._labels()), dim=1)
        cells, none = orders + PREFIX, torch.full((len(tokens), 1), -1)
        inputs = Inputs(
            torch.cat((begin, tokens.gather(1, orders)), dim=1),
            positions=torch.cat((torch.arange(PREFIX).expand(len(tokens), -1), cells), dim=1),
            targets=torch.cat((none, cells, none), dim=1),
        )
        return self._of(inputs)[:, PREFIX - 1 :]

    def _of(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T n"]:
        return self.model.logits(self.model.hidden(inputs), self.image)

    def _loss(self) -> Float[Tensor, ""]:
        nats = F.cross_entropy(
            self._logits(self.arrays["tokens"]).transpose(1, 2), self.arrays["tokens"], reduction="none"
        ).mean(1)
        valid = self.arrays["valid"] if not self.has_labels else torch.ones(len(nats))
        return (nats * valid).sum() / valid.sum()

    def _kept(self, number: int) -> Tensor:
        fields = Fields(self.config["filters"][number], f"config.filters.{number}")
        kept = filter_logits(
            self.arrays["filter_logits"], top_k=fields.take("top_k", int), top_p=fields.take("top_p", float)
        )
        return kept.isfinite()
