"""Janus and Janus-Pro: as deepseek-ai/Janus keeps them (janus/models/modeling_vlm.py), and as `transformers` does.

A file holds more than draws pictures. What looks at them (a vision encoder and its aligner) and what writes text (the
head of the language model) is passed over by name, and counted; the image tokenizer inside is read with the rest.
"""

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from smalti.errors import InputError, shortened
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import PRESETS, VQGAN, VQGANConfig
from smalti.interop import llamagen_vq
from smalti.interop.fields import Fields, sizes_go_together
from smalti.interop.fused import Piece, PieceMap, build_of, read_fused
from smalti.interop.huggingface import read_llama_config, tensor_map
from smalti.interop.keys import ImportReport, rename_all
from smalti.interop.vqgan_keys import llamagen_key, transformers_key
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnlyConfig
from smalti.models.janus import START, Janus, JanusConfig
from smalti.prompts import PLACE, PromptForm

FORM = PromptForm(
    template=f"<|User|>: {PLACE}\n\n<|Assistant|>:",
    begin="<｜begin▁of▁sentence｜>",
    start=START,
    filler="<｜▁pad▁｜>",
)
"""Of the conversation "deepseek" without a system prompt (janus/utils/conversation.py, generation_inference.py)."""
GUIDANCE_SCALE = 5.0
"""What the original draws with by itself, at temperature 1."""
MOST_TEXT = 447
"""Ids of text there is room for, so that a sequence of 576 codes has 1,024 tokens. The language model takes 16,384; the
keys and values of so many would fill gigabytes a picture."""
LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
"""Of `LlamaConfig`: a config leaves out what is as by default, as that of Janus-Pro-7B does."""
OF_GENERATING = (  # what transformers 4 wrote into every section, of drawing text
    *("bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "output_scores", "pruned_heads", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "top_k", "top_p", "typical_p"),
)


@dataclass(frozen=True, kw_only=True)
class KeyNames:
    """What one of the two layouts calls the parts."""

    body: str
    """Before the layers of the language model."""
    codes: str
    aligner: Callable[[int], str]
    head: tuple[str, str]
    image_tokenizer: str
    """Before its keys."""
    image_key: Callable[[str], str]
    """The image tokenizer's key of one of ours."""
    passed_over: Mapping[str, str]
    """Beginnings of keys that drawing does not need, with the reason."""


LOOKING, WRITING = "it looks at pictures, drawing does not", "it writes text, drawing does not"
COMPUTED = {".rotary_emb.inv_freq": "computed from the config"}
ORIGINAL = KeyNames(
    body="language_model.model.",
    codes="gen_embed.weight",
    aligner=lambda layer: f"gen_aligner.layers.{2 * layer}",
    head=("gen_head.output_mlp_projector", "gen_head.vision_head"),
    image_tokenizer="gen_vision_model.",
    image_key=llamagen_key,
    passed_over={"vision_model.": LOOKING, "aligner.": LOOKING, "language_model.lm_head.": WRITING},
)
TRANSFORMERS = KeyNames(
    body="model.language_model.",
    codes="model.generation_embeddings.weight",
    aligner=lambda layer: f"model.generation_aligner.{f'hidden_layers.{layer - 1}' if layer else 'fc1'}",
    head=("model.generation_head.proj_out", "model.generation_head.vision_head"),
    image_tokenizer="model.vqmodel.",
    image_key=transformers_key,
    passed_over={"model.vision_model.": LOOKING, "model.aligner.": LOOKING, "lm_head.": WRITING},
)


class ReadJanus(NamedTuple):
    """Both networks of a checkpoint, in evaluation mode."""

    model: Janus
    image_tokenizer: VQGAN
    report: ImportReport


class Sizes(NamedTuple):
    """What a config says, in ours; the id at which a picture starts is the tokenizer's to say."""

    model: Callable[[int], JanusConfig]
    image_tokenizer: VQGANConfig


# Configs ---------------------------------------------------------------------------------------------------------


def read_config(config: dict) -> Sizes:
    """Ours from either project's config, told by its sections. Raises InputError naming a field that asks for something
    else, and where two sections disagree."""
    fields = Fields(config, "config")
    with sizes_go_together():
        if "language_config" in config:
            return _read_original(fields)
        if "text_config" in config:
            return _read_transformers(fields)
    raise InputError(
        "config is of no Janus: expected the section language_config (deepseek-ai/Janus) or text_config "
        f"(transformers); found {shortened(', '.join(map(str, config)))}."
    )


def _read_original(fields: Fields) -> Sizes:
    fields.expect("model_type", "multi_modality")
    body, text_size = _language_model(fields.section("language_config"))
    D = body.d_model
    codes = fields.section("gen_vision_config")
    codes.expect("cls", "VQ-16")
    numbers = codes.section("params", {})
    size, dim = numbers.take("image_token_size", int, 16384), numbers.take("n_embed", int, 8)
    image_tokenizer = PRESETS["vq-16"]
    if "ModelArgs" in codes.values:
        image_tokenizer = llamagen_vq.read_config(
            {name: codes.values[name] for name in ("ModelArgs", "Encoder_Decoder") if name in codes.values}
        )
    aligner, head = (fields.section(name).section("params") for name in ("gen_aligner_config", "gen_head_config"))
    aligner.expect("projector_type", "mlp_gelu")
    _require(aligner, "input_dim", dim)
    _require(aligner, "n_embed", D)
    _require(head, "n_embed", D)
    _require(head, "image_token_size", size)
    seen = fields.section("vision_config", {}).section("params", {}).take("image_size", int, 384)
    side, rest = divmod(seen, image_tokenizer.patch_size)
    if rest or not side:
        raise InputError(
            f"config.vision_config.params.image_size is {seen}; expected a multiple of {image_tokenizer.patch_size}, "
            "the pixels of a code."
        )
    return _sizes(
        body,
        image_tokenizer,
        side,
        text_size=text_size,
        codebook_size=size,
        code_dim=dim,
        aligner_depth=aligner.take("depth", int, 1),
        head_width=head.take("image_token_embed", int),
    )


def _read_transformers(fields: Fields) -> Sizes:
    fields.expect("model_type", "janus")
    body, text_size = _language_model(fields.section("text_config"))
    D, codes, looking = body.d_model, fields.section("vq_config", {}), fields.section("vision_config", {})
    size, dim = codes.take("num_embeddings", int, 16384), codes.take("embed_dim", int, 8)
    codes.expect("double_latent", False)
    codes.expect("hidden_act", "gelu")
    channels = codes.take("in_channels", int, 3)
    codes.expect("out_channels", channels)
    multipliers = codes.take_ints("channel_multiplier", (1, 1, 2, 2, 4))
    lowest = len(multipliers) - 1
    image_tokenizer = VQGANConfig(
        quantizer=QuantizerConfig(codebook_size=size, code_dim=dim, update="gradient", l2_normalised=True),
        channels=codes.take("base_channels", int, 128),
        encoder_multipliers=multipliers,
        decoder_multipliers=multipliers,
        encoder_attention_levels=(lowest,),
        decoder_attention_levels=(lowest,),
        num_res_blocks=codes.take("num_res_blocks", int, 2),
        latent_channels=codes.take("latent_channels", int, 256),
        image_channels=channels,
        dropout=codes.take("dropout", float, 0.0),
    )
    _require(codes, "image_token_embed_dim", D, 2048)
    _require(codes, "projection_dim", D, 2048)
    (rows, columns), patch = looking.take_size("image_size", 384), looking.take_size("patch_size", 16)
    side = rows // max(1, patch[0])
    if (rows, patch[0]) != (columns, patch[1]) or side * side != looking.take("num_image_tokens", int, 576):
        raise InputError(
            f"config.vision_config: pictures of {rows} × {columns} pixels with {patch[0]} × {patch[1]} a code make "
            f"another number of codes than num_image_tokens, {looking.take('num_image_tokens', int, 576)}."
        )
    return _sizes(
        body,
        image_tokenizer,
        side,
        text_size=text_size,
        codebook_size=size,
        code_dim=dim,
        aligner_depth=codes.take("num_hidden_layers", int, 2),
        head_width=D,
    )


def _language_model(section: Fields) -> tuple[TransformerConfig, int]:
    """The language model's sizes, and how many ids of text it has."""
    given = {name: value for name, value in section.values.items() if value is not None and name not in OF_GENERATING}
    try:
        ours, biased = read_llama_config(LLAMA_DEFAULTS | given)
    except InputError as error:
        raise InputError(str(error).replace("config", section.where, 1)) from error
    if biased:
        raise InputError(f"{section.where} asks for biases, which the language model of a Janus does not have.")
    return ours.transformer, ours.vocab_size


def _require(section: Fields, name: str, wanted: int, default: int | None = None) -> None:
    """Raises InputError where a field repeats a size otherwise than another one says it."""
    found = section.take(name, int) if default is None else section.take(name, int, default)
    if found != wanted:
        raise InputError(f"{section.where}.{name} is {found}; the rest of the config says {wanted}.")


def _sizes(body: TransformerConfig, image_tokenizer: VQGANConfig, side: int, **sizes: int) -> Sizes:
    codes = image_tokenizer.quantizer
    assert isinstance(codes, QuantizerConfig)
    if (codes.codebook_size, codes.code_dim) != (sizes["codebook_size"], sizes["code_dim"]):
        raise InputError(
            f"config: the image tokenizer has {codes.codebook_size} codes, {codes.code_dim} wide, the language model "
            f"reads {sizes['codebook_size']} of {sizes['code_dim']}."
        )
    pixels, num_codes = side * image_tokenizer.patch_size, side * side
    room = body.max_length - num_codes - 1
    if room < 1:
        raise InputError(f"config: {num_codes} codes leave no room for text among {body.max_length} positions.")

    def model(start_id: int) -> JanusConfig:
        return JanusConfig(
            start_id=start_id, num_codes=num_codes, max_text=min(MOST_TEXT, room), transformer=body, **sizes
        )

    return Sizes(model, replace(image_tokenizer, image_size=(pixels, pixels)))


def write_config(config: JanusConfig, image_tokenizer: VQGAN) -> dict[str, Any]:
    """The original's fields, of the parts that draw. Raises InputError for a model that it cannot be."""
    body, codes = config.transformer, image_tokenizer.config
    D, (pixels, _) = body.d_model, codes.image_size
    params = {"image_token_size": config.codebook_size, "n_embed": config.code_dim}
    drawing: dict[str, Any] = {"cls": "VQ-16", "model_type": "gen_vision", "params": params}
    if replace(codes, image_size=PRESETS["vq-16"].image_size) != PRESETS["vq-16"]:
        written = llamagen_vq.write_config(image_tokenizer)
        drawing |= {name: written[name] for name in ("ModelArgs", "Encoder_Decoder")}
    written = {
        "model_type": "multi_modality",
        "language_config": {
            "model_type": "llama",
            "vocab_size": config.text_size,
            "hidden_size": D,
            "intermediate_size": body.d_ff,
            "num_hidden_layers": body.num_layers,
            "num_attention_heads": body.num_heads,
            "num_key_value_heads": body.kv_heads,
            "max_position_embeddings": body.max_length,
            "rms_norm_eps": body.norm_eps,
            "rope_theta": body.rotary_base,
            "attention_dropout": body.attention_dropout,
        },
        "gen_vision_config": drawing,
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {
                "depth": config.aligner_depth,
                "input_dim": config.code_dim,
                "n_embed": D,
                "projector_type": "mlp_gelu",
            },
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": config.head_width,
                "image_token_size": config.codebook_size,
                "n_embed": D,
            },
        },
        "vision_config": {"params": {"image_size": pixels}},
    }
    if body.head_width is not None:
        written["language_config"]["head_dim"] = body.head_dim
    mine, theirs = config.to_dict(), read_config(written).model(config.start_id).to_dict()
    mine, theirs = mine | mine.pop("transformer"), theirs | theirs.pop("transformer")
    for name in mine:
        if mine[name] != theirs[name]:
            raise InputError(
                f"this model is no Janus of the original: its {name} is {mine[name]}, there it is {theirs[name]}."
            )
    return written


# Weights ---------------------------------------------------------------------------------------------------------


def names_of(state: Mapping[str, Tensor]) -> KeyNames:
    """Which of the two layouts a state dict has. Raises InputError if it is none."""
    for names in (ORIGINAL, TRANSFORMERS):
        if names.codes in state:
            return names
    raise InputError(
        f"this is no Janus: expected {ORIGINAL.codes} (deepseek-ai/Janus) or {TRANSFORMERS.codes} (transformers); "
        f"found {shortened(', '.join(list(state)[:4]))} …"
    )


def piece_map(config: JanusConfig, names: KeyNames = ORIGINAL) -> PieceMap:
    """The key, or keys, of every tensor of ours."""
    body = config.transformer
    D, E, H, K = body.d_model, config.code_dim, config.head_width, config.codebook_size
    alone = DecoderOnlyConfig(vocab_size=config.text_size, transformer=body, tie_embeddings=True)
    pieces: PieceMap = {
        ours: tuple(
            Piece(names.body + part.key.removeprefix("model."), part.shape, rotary_heads=part.rotary_heads)
            for part in parts
        )
        for ours, parts in tensor_map(alone, ()).items()
    }
    pieces["embed_codes.weight"] = (Piece(names.codes, (K, E)),)
    for layer in range(config.aligner_depth):
        pieces |= _linear(f"aligner.layers.{layer}", names.aligner(layer), D, D if layer else E)
    first, second = names.head
    return pieces | _linear("head.first", first, H, D) | _linear("head.second", second, K, H)


def _linear(ours: str, theirs: str, outputs: int, inputs: int) -> PieceMap:
    return {
        f"{ours}.weight": (Piece(f"{theirs}.weight", (outputs, inputs)),),
        f"{ours}.bias": (Piece(f"{theirs}.bias", (outputs,)),),
    }


def image_pieces(image_tokenizer: VQGAN, names: KeyNames = ORIGINAL) -> PieceMap:
    """The key of every tensor of the image tokenizer."""
    key_map = rename_all(image_tokenizer, names.image_key)
    return {ours: (Piece(names.image_tokenizer + theirs.key, theirs.shape),) for ours, theirs in key_map.items()}


def read_janus(
    state: MutableMapping[str, Tensor], config: dict, start_id: int, *, allow_nonfinite: bool = False
) -> ReadJanus:
    """The model and the image tokenizer of a Janus state dict of either layout; `state` is emptied. Raises InputError
    if a tensor is missing, has another shape or is left over, and for a config that says what is not known here."""
    names, sizes = names_of(state), read_config(config)
    try:
        ours = sizes.model(start_id)
    except ValueError as error:  # an id that the language model does not have
        raise InputError(f"config: {error}") from error
    drawing = {key: state.pop(key) for key in list(state) if key.startswith(names.image_tokenizer)}
    model = build_of(lambda: Janus(ours), state)
    image_tokenizer = build_of(lambda: VQGAN(sizes.image_tokenizer), drawing)
    parts = (
        (model, state, piece_map(ours, names), {**names.passed_over, **COMPUTED}),
        (
            image_tokenizer,
            drawing,
            image_pieces(image_tokenizer, names),
            {f"{names.image_tokenizer}quantize.codebook_used": "a history of which codes were used, not a weight"},
        ),
    )
    reports = [
        read_fused(
            module, tensors, pieces, droppable=droppable, sizes="from the config", allow_nonfinite=allow_nonfinite
        )
        for module, tensors, pieces, droppable in parts
    ]
    dropped = [pair for report in reports for pair in report.dropped]
    return ReadJanus(
        model,
        image_tokenizer,
        ImportReport(
            sizes="from the config",
            moved=tuple(moved for report in reports for moved in report.moved),
            dropped=tuple(dropped),
            notes=(*(note for report in reports for note in report.notes), *_passed_over(names, dropped)),
        ),
    )


def _passed_over(names: KeyNames, dropped: list[tuple[str, str]]) -> list[str]:
    """How many tensors of each part were passed over."""
    parts = Counter(part for key, _ in dropped for part in names.passed_over if key.startswith(part))
    return [f"passed over: {part}*, tensors: {count} ({names.passed_over[part]})" for part, count in parts.items()]
