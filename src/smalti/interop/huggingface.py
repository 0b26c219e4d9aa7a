"""Llama in the Hugging Face layout (transformers, `LlamaForCausalLM`), in and out.

Two things differ from our tensors. They keep queries, keys and values, and gate and up, as matrices of their own; ours
are fused. And their rotary positions turn channel j of a head with channel j + Dh/2, ours turn neighbours: the rows of
queries and keys change places, head by head, which leaves every dot product as it was.

Letters: B sequences, T tokens, P prompt tokens, V vocabulary, Dh head width.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from smalti.bundle import Bundle
from smalti.documents import read_json
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError, shortened
from smalti.file_kinds import GGUF, is_hidden
from smalti.files import new_folder
from smalti.interop.fields import Fields, sizes_go_together
from smalti.interop.fused import halves_to_pairs, pairs_to_halves
from smalti.interop.keys import Foreign, ImportReport, Moved, misfit, shape_problems
from smalti.interop.verifying import ArrayError, ReferenceArrays, compare_outputs, read_arrays
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.prompts import PromptTokenizer
from smalti.sequences.layout import Layout, Marker, Order, Span
from smalti.sequences.vocabulary import Vocabulary
from smalti.text_tokenizer import TextTokenizer
from smalti.weight_files import ForeignWeights, read_config, read_weights, require_values

KIND = "hf-llama"
ORDER = "text"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER = "tokenizer.json"
LAYOUT_FIELD = "smalti_layout"
"""Where an export keeps the layout, so that importing it again loses nothing; other readers pass it over."""
PAD = "<|pad|>"
PADDING = "padding"
"""The segment of rows that were added behind a layout's ids, to make the table a multiple of 64, say."""
INPUT_NAMES = ("input_ids", "prompt_ids")

_UNUSED_FIELDS = (  # what a config says beside the network itself
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range"),
    *("transformers_version", "use_cache", "pretraining_tp", "_name_or_path", "return_dict", "output_attentions"),
    *("output_hidden_states", "rope_theta", "rope_parameters", "rope_scaling", "is_encoder_decoder", "problem_type"),
    *("id2label", "label2id", "chunk_size_feed_forward", "_attn_implementation", "_attn_implementation_autoset"),
    *("attn_implementation", "tokenizer_class", "task_specific_params", "finetuning_task", "torchscript", "is_decoder"),
    *("sep_token_id", "decoder_start_token_id", "max_sequence_length", "use_bfloat16", "_commit_hash", "prefix"),
)
_REFUSED_FIELDS = {  # what other architectures have, and a Llama of transformers does not
    "sliding_window": "attention to a window of the last tokens",
    "layer_types": "layers of several kinds",
    "quantization_config": "quantized weights",
    "auto_map": "code of its own beside the weights, which is never run",
    "add_cross_attention": "cross-attention",
    "logit_scale": "scaled logits",
    "num_local_experts": "a mixture of experts",
}
ATTENTION, FEED_FORWARD = "attention", "feed_forward"
BIASES = {ATTENTION: "attention_bias", FEED_FORWARD: "mlp_bias"}
"""The halves of a block, and what a config calls the biases of their linear layers. Ours have both or none: where a
file has one of the two, the other is zero, and a half whose biases are all zero is written without."""


class Part(NamedTuple):
    """One foreign tensor inside a fused one of ours."""

    key: str
    shape: tuple[int, ...]
    rotary_heads: int = 0
    """Heads whose rows change places; 0: none do."""


class ImportedLlama(NamedTuple):
    """A model from elsewhere, in evaluation mode."""

    model: DecoderOnly
    layout: Layout
    report: ImportReport
    notes: tuple[str, ...]
    tokenizer: Path | None
    """The `tokenizer.json` beside the weights."""


# Names and shapes ------------------------------------------------------------------------------------------------


def tensor_map(config: DecoderOnlyConfig, biased: Collection[str]) -> dict[str, tuple[Part, ...]]:
    """For every tensor of ours the foreign ones it is made of, one above the other. `biased` are the halves of a block
    that have biases there (see BIASES)."""
    ours = config.transformer
    D, q, kv = ours.d_model, ours.num_heads, ours.kv_heads
    table = (config.vocab_size, D)
    parts: dict[str, tuple[Part, ...]] = {"embed_tokens.weight": (Part("model.embed_tokens.weight", table),)}
    for layer in range(ours.num_layers):
        foreign, block = f"model.layers.{layer}", f"transformer.blocks.{layer}"
        linear = {
            "attention.qkv": (
                ("self_attn.q_proj", (ours.q_width, D), q),
                ("self_attn.k_proj", (ours.kv_width, D), kv),
                ("self_attn.v_proj", (ours.kv_width, D), 0),
            ),
            "attention.out": (("self_attn.o_proj", (D, ours.q_width), 0),),
            "feed_forward.up": (("mlp.gate_proj", (ours.d_ff, D), 0), ("mlp.up_proj", (ours.d_ff, D), 0)),
            "feed_forward.down": (("mlp.down_proj", (D, ours.d_ff), 0),),
        }
        for name, pieces in linear.items():
            parts[f"{block}.{name}.weight"] = tuple(Part(f"{foreign}.{key}.weight", s, n) for key, s, n in pieces)
            if name.partition(".")[0] in biased:
                parts[f"{block}.{name}.bias"] = tuple(Part(f"{foreign}.{key}.bias", s[:1], n) for key, s, n in pieces)
        parts[f"{block}.attention_norm.weight"] = (Part(f"{foreign}.input_layernorm.weight", (D,)),)
        parts[f"{block}.feed_forward_norm.weight"] = (Part(f"{foreign}.post_attention_layernorm.weight", (D,)),)
    parts["transformer.norm.weight"] = (Part("model.norm.weight", (D,)),)
    if not config.tie_embeddings:
        parts["head"] = (Part("lm_head.weight", table),)
    return parts


def fuse(state: Mapping[str, Tensor], parts: Mapping[str, Sequence[Part]]) -> dict[str, Tensor]:
    """Our state dict from the foreign one, except for biases that it does not have."""

    def piece(part: Part) -> Tensor:
        rows = state[part.key].float()
        return halves_to_pairs(rows, part.rotary_heads) if part.rotary_heads else rows

    return {name: torch.cat([piece(part) for part in pieces]) for name, pieces in parts.items()}


def biased_halves(model: DecoderOnly) -> tuple[str, ...]:
    """The halves of a block (see BIASES) in which some layer has a bias that is not zero."""
    biases = [(name, tensor) for name, tensor in model.state_dict().items() if name.endswith(".bias")]
    return tuple(half for half in BIASES if any(f".{half}." in name and bool(bias.any()) for name, bias in biases))


def split(model: DecoderOnly) -> dict[str, Tensor]:
    """The foreign state dict from ours."""
    state, ours = {}, model.state_dict()
    if "head" in ours:
        ours["head"] = _whole_head(model)
    for name, parts in tensor_map(model.config, biased_halves(model)).items():
        pieces = ours[name].detach().cpu().split([part.shape[0] for part in parts])
        for part, rows in zip(parts, pieces, strict=True):
            rows = pairs_to_halves(rows, part.rotary_heads) if part.rotary_heads else rows
            state[part.key] = rows.contiguous().clone()
    return state


def _whole_head(model: DecoderOnly) -> Float[Tensor, "V D"]:
    """The head with rows for all ids, as a Llama has them: zeros for those that the model does not predict."""
    ids = model.config.head_slot.token_ids(torch.arange(len(model.head_weight), device=model.device))
    weight = model.head_weight.detach()
    return weight.new_zeros(model.config.vocab_size, weight.shape[1]).index_copy(0, ids, weight)


# Configs ---------------------------------------------------------------------------------------------------------


class ReadConfig(NamedTuple):
    """What a `LlamaConfig` says."""

    ours: DecoderOnlyConfig
    biased: tuple[str, ...]
    """The halves of a block that have biases (see BIASES)."""


def read_llama_config(config: dict) -> ReadConfig:
    """Our config from the fields of `LlamaConfig`. Raises InputError naming a field that asks for something else."""
    config = {name: value for name, value in config.items() if value is not None}  # null asks for nothing
    fields = Fields(config, "config")
    fields.expect("model_type", "llama")
    fields.expect("hidden_act", "silu", "swish")
    for name, what in _REFUSED_FIELDS.items():
        if fields.take(name, object, False):
            raise InputError(f"config.{name} asks for {what}, which is not supported; only a plain Llama is read.")
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    head_dim = fields.take("head_dim", int | None, None)
    if heads < 1 or (head_dim is None and hidden % heads):
        raise InputError(f"config.hidden_size {hidden} is not divisible by config.num_attention_heads {heads}.")
    biased = tuple(half for half, name in BIASES.items() if fields.take(name, bool, False))
    if fields.take("pretraining_tp", int, 1) < 1:
        raise InputError(f"config.pretraining_tp is {config['pretraining_tp']}; expected at least 1.")
    kv_heads = fields.take("num_key_value_heads", int | None, None)
    fields.take(LAYOUT_FIELD, dict, {})
    with sizes_go_together():
        ours = DecoderOnlyConfig(
            vocab_size=fields.take("vocab_size", int),
            transformer=TransformerConfig(
                num_layers=fields.take("num_hidden_layers", int),
                d_model=hidden,
                num_heads=heads,
                d_ff=fields.take("intermediate_size", int),
                max_length=fields.take("max_position_embeddings", int, 2048),
                num_kv_heads=None if kv_heads == heads else kv_heads,
                head_width=None if head_dim is None or head_dim * heads == hidden else head_dim,
                norm="rms",
                norm_eps=fields.take("rms_norm_eps", float, 1e-6),
                feed_forward="swiglu",
                bias=bool(biased),
                positions="rotary",
                rotary_base=_rotary_base(config),
                attention_dropout=fields.take("attention_dropout", float, 0.0),
            ),
            tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        )
    fields.finish(*_UNUSED_FIELDS)
    return ReadConfig(ours, biased)


_SCALED_BY_FACTOR = {
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of scaling that change nothing by a factor of 1, with the fields that then say nothing more."""


def _rotary_base(config: dict) -> float:
    """`rope_theta`, at the top level or, since transformers 5, in `rope_parameters`. Scaling by 1 is none."""
    found = [Fields(config, "config").take("rope_theta", int | float | None, None)]
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(name) is None:
            continue
        ignored: tuple[str, ...] = ()
        rope = Fields(config[name], f"config.{name}")
        factor = rope.take("factor", int | float | None, None)
        for kind in ("rope_type", "type"):
            scaling = rope.take(kind, str, "default")
            if scaling != "default" and not (factor == 1 and scaling in _SCALED_BY_FACTOR):
                raise InputError(
                    f"config.{name}.{kind} is {scaling!r}, with factor {factor}; rotary positions that are scaled are "
                    "not supported, only 'default', or a factor of 1."
                )
            if scaling != "default":
                ignored = _SCALED_BY_FACTOR[scaling]
        rope.expect("partial_rotary_factor", 1.0, 1)
        found.append(rope.take("rope_theta", int | float | None, None))
        rope.finish(*ignored)
    bases = {float(base) for base in found if base is not None}
    if len(bases) > 1:
        raise InputError(f"config gives rope_theta twice, as {' and '.join(map(str, sorted(bases)))}; expected one.")
    base = bases.pop() if bases else 10000.0
    if base <= 0:
        raise InputError(f"config.rope_theta is {base}; expected a positive number.")
    return base


def write_llama_config(config: DecoderOnlyConfig, layout: Layout, biased: Collection[str]) -> dict[str, Any]:
    """The fields of `LlamaConfig`. Raises InputError listing what a Llama cannot be."""
    _refuse_inexpressible(config)
    ours = config.transformer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": ours.d_model,
        "intermediate_size": ours.d_ff,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": ours.max_length,
        "rms_norm_eps": ours.norm_eps,
        # both places: releases of transformers before 5, and most servers, read the first
        "rope_theta": ours.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rotary_base},
        **{name: half in biased for half, name in BIASES.items()},
        "attention_dropout": ours.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": write_generation_config(layout).get("eos_token_id"),
        "pad_token_id": write_generation_config(layout).get("pad_token_id"),
        LAYOUT_FIELD: _layout_lists(layout),
    }


def _layout_lists(layout: Layout) -> dict[str, list]:
    """A layout in lists: `transformers` sorts the keys of what it saves again, but the order of the segments gives the
    ids."""
    content = layout.to_dict()
    return {part: [[name, value] for name, value in content[part].items()] for part in ("vocabulary", "orders")}


def _layout_of_lists(content: Mapping[str, Any]) -> Layout:
    """The inverse of `_layout_lists`. Raises TypeError, ValueError or KeyError for what is none."""
    parts = {}
    for part in ("vocabulary", "orders"):
        if not isinstance(content[part], list):
            raise TypeError(f"its {part} is not a list of names with values; export the bundle again.")
        parts[part] = {name: value for name, value in content[part]}
    return Layout.from_dict(parts)


def _refuse_inexpressible(config: DecoderOnlyConfig) -> None:
    ours = config.transformer
    reasons = []
    if ours.positions == "rotary_2d":
        reasons.append("2-D rotary positions (a Llama rotates by one position number, not by row and column)")
    elif ours.positions != "rotary":
        reasons.append(f"positions {ours.positions!r} (a Llama has rotary ones)")
    if ours.norm != "rms":
        reasons.append("LayerNorm (a Llama has RMSNorm)")
    if ours.feed_forward != "swiglu":
        reasons.append(f"the feed-forward {ours.feed_forward!r} (a Llama has swiglu)")
    if ours.qk_norm:
        reasons.append("norms of queries and keys (a Llama has none)")
    if ours.d_model % ours.num_heads:
        reasons.append(f"a d_model of {ours.d_model} that {ours.num_heads} heads do not divide (a Llama's must be)")
    if ours.cross_attention:
        reasons.append("cross-attention (a Llama is decoder-only)")
    if reasons:
        raise InputError(
            f"this model cannot be written as a Llama: it has {', and '.join(reasons)}. Train one with "
            'norm "rms", feed_forward "swiglu" and positions "rotary" to export it.'
        )


def write_generation_config(layout: Layout) -> dict[str, Any]:
    """Settings under which `generate` draws a valid picture after a prompt that ends where the picture starts:
    as many picture tokens as the layout has, no others, then the marker behind them. Empty for other layouts."""
    order = _picture_order(layout)
    if order is None:
        return {}
    segment = layout.vocabulary["image"]
    spans = [i for i, part in enumerate(order.parts) if isinstance(part, Span)]
    after = order.parts[spans[-1] + 1 :]
    span = order.spans[-1]
    markers = [layout.vocabulary.special(marker.special) for marker in after if isinstance(marker, Marker)]
    allowed = {*range(segment.offset, segment.end), *markers}
    config: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "max_new_tokens": span.length + len(markers),
        "suppress_tokens": [i for i in range(layout.vocabulary.size) if i not in allowed],
    }
    if markers:  # the end may not come before its place, and must come there
        config |= {"eos_token_id": markers[-1], "forced_eos_token_id": markers[-1], "min_new_tokens": span.length}
        config["pad_token_id"] = layout.vocabulary.specials.get(PAD, markers[-1])
    return config


def _picture_order(layout: Layout) -> Order | None:
    """The first order that ends in a picture of a fixed number of tokens, with at most one marker behind it."""
    for order in layout.orders.values():
        last = next((i for i, part in reversed(list(enumerate(order.parts))) if isinstance(part, Span)), None)
        if last is None or len(order.parts) - last > 2:
            continue
        span = order.parts[last]
        if isinstance(span, Span) and span.segment == "image" and span.end is None:
            return order
    return None


# Reading ---------------------------------------------------------------------------------------------------------


def read_llama(source: Path, config: Path | None = None, *, allow_nonfinite: bool = False) -> ImportedLlama:
    """The model in a folder that `save_pretrained` wrote, or in a weight file with `config.json` beside it.

    Weights may be safetensors or `torch.save`'s, in one file or in shards with their index. Raises InputError if a
    file cannot be read, the config asks for what is not supported, or a tensor is missing, misshapen, left over, or
    holds values that are not finite, unless `allow_nonfinite`.
    """
    folder = source if source.is_dir() else source.parent
    weights = _read_all_weights(source)
    _refuse_other_layouts(weights.tensors, source)
    fields = read_config(config if config is not None else folder / CONFIG)
    ours, biased = read_llama_config(fields)
    state, dropped = _without_derived(weights.tensors, ours)
    parts = tensor_map(ours, biased)
    key_map = {part.key: Foreign(part.key, part.shape) for pieces in parts.values() for part in pieces}
    problems = shape_problems(state, key_map, dropped)
    if problems:
        raise InputError(misfit(problems))
    more = require_values(state, key_map, allow_nonfinite=allow_nonfinite)
    model = DecoderOnly(ours)
    ours_state = fuse(state, parts)
    for name, tensor in model.state_dict().items():
        if name.endswith(".bias") and name not in parts:
            ours_state[name] = torch.zeros_like(tensor)
    model.load_state_dict(ours_state)
    moved = tuple(Moved(part.key, name, part.shape) for name, pieces in parts.items() for part in pieces)
    layout, notes = _layout(fields, ours)
    tokenizer = folder / TOKENIZER
    return ImportedLlama(
        model.eval(),
        layout,
        ImportReport(sizes="from the config", moved=moved, dropped=tuple(dropped.items()), notes=more),
        (*weights.notes, *notes),
        tokenizer if tokenizer.is_file() else None,
    )


def _read_all_weights(source: Path) -> ForeignWeights:
    if not source.is_dir():
        return read_weights(source)
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (source / name).is_file():
            return read_weights(source / name)
    for name in INDEXES:
        if (source / name).is_file():
            return read_shards(source / name)
    raise InputError(
        f"{source} holds no weights: expected {WEIGHTS}, pytorch_model.bin, or one of {', '.join(INDEXES)} with its "
        f"shards.{_what_instead(source)}"
    )


def _what_instead(folder: Path) -> str:
    """What a folder holds instead of such weights, and what to do."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not is_hidden(file.name))
    if "adapter_config.json" in names:
        return f" It holds an adapter: {_MERGE}."
    if found := [name for name in names if name.endswith(".gguf")]:
        return f" {found[0]} is {GGUF.what}: {GGUF.advice}."
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return f" It is in Meta's own layout: {_CONVERT}."
    found = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    if found:
        return f" It has {', '.join(found[:6])}: give the file itself, with config.json beside it."
    return f" It has {', '.join(names[:6]) or 'no files'}."


_MERGE = (
    "give the whole model, into which peft merges it: "
    "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)"
)
_CONVERT = "convert it by the script convert_llama_weights_to_hf.py of transformers, and give the folder that it writes"


def _refuse_other_layouts(state: Mapping[str, Tensor], source: Path) -> None:
    """Raises InputError for keys that are known to be another kind of file's, saying which."""
    if key := next((key for key in state if ".lora_" in key), None):
        raise InputError(f"{source} is an adapter (LoRA: {key}), not a whole model; {_MERGE}.")
    if "tok_embeddings.weight" in state:
        if any("cls_embedding" in key or "attention.wqkv" in key for key in state):
            raise InputError(
                f"{source} is a GPT of LlamaGen (it has tok_embeddings.weight and attention.wqkv), not a Llama of "
                "transformers: read it by `smalti import llamagen`."
            )
        raise InputError(f"{source} is a Llama in Meta's own layout (it has tok_embeddings.weight); {_CONVERT}.")


def read_shards(index: Path) -> ForeignWeights:
    """The tensors of all shards that an index names."""
    places = Fields(read_config(index), str(index)).take("weight_map", dict)
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names the shard {shortened(repr(name))}; expected the name of a file beside it.")
    names = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names the shard {name}, which is not there; fetch it into the same folder.")
        tensors |= read_weights(index.parent / name).tensors
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise InputError(f"{index} lists {missing[0]} in {places[missing[0]]}, which does not hold it.")
    return ForeignWeights(tensors=tensors, notes=(f"weights taken from {len(names)} shards",))


def _without_derived(
    state: Mapping[str, Tensor], config: DecoderOnlyConfig
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Old files hold the rotary frequencies, and some the head although it is the embedding."""
    dropped = {key: "computed from the config" for key in state if key.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in state:
        if not torch.equal(state["lm_head.weight"], state.get("model.embed_tokens.weight", torch.empty(0))):
            raise InputError(
                "config.tie_word_embeddings is True, but lm_head.weight is not model.embed_tokens.weight; set it to "
                "False if the model has a head of its own."
            )
        dropped["lm_head.weight"] = "it is model.embed_tokens.weight"
    return state, dropped


def one_segment_layout(vocab_size: int, length: int) -> Layout:
    """`text{length}`: every id may stand at every place."""
    return Layout.parse(Vocabulary({"text": vocab_size}), {ORDER: f"text{{{length}}}"})


def _layout(fields: dict, config: DecoderOnlyConfig) -> tuple[Layout, tuple[str, ...]]:
    whole = one_segment_layout(config.vocab_size, config.transformer.max_length)
    if LAYOUT_FIELD not in fields:
        return whole, (f"the layout is one segment, {whole!r}",)
    try:
        layout = _layout_of_lists(fields[LAYOUT_FIELD])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.{LAYOUT_FIELD} is no layout: {error}") from error
    kept = f"the layout is the one the export kept, {layout!r}"
    num_added = config.vocab_size - layout.vocabulary.size
    if num_added < 0 or (num_added and PADDING in layout.vocabulary):
        raise InputError(
            f"config.{LAYOUT_FIELD} has {layout.vocabulary.size} ids, config.vocab_size is {config.vocab_size}."
        )
    if not num_added:
        return layout, (kept,)
    vocabulary = {**layout.vocabulary.to_dict(), PADDING: num_added}
    layout = Layout.from_dict({**layout.to_dict(), "vocabulary": vocabulary})
    return layout, (kept, f"{num_added} ids behind it were added since; they stand nowhere in a sequence")


# Writing ---------------------------------------------------------------------------------------------------------


def export_llama(bundle: Path | str, directory: Path, *, force: bool = False) -> tuple[list[Path], tuple[str, ...]]:
    """Writes a bundle's model as `transformers` saves a Llama, with its tokenizer where the numbers of that are the
    model's own. Returns the files and notes. Raises InputError for what a Llama cannot be, and if the folder exists,
    unless `force`; then it must be such a folder."""
    found = Bundle.load(bundle, device="cpu")
    model = found.decoder_only("a Llama")
    _refuse_features(model.config)
    assert not isinstance(found.text_tokenizer, PromptTokenizer)  # a Janus has one, and was refused
    config = write_llama_config(model.config, found.layout, biased_halves(model))
    generation = {"_from_model_config": False} | write_generation_config(found.layout)
    with new_folder(directory, force=force, holds=_is_llama, what="Llama") as folder:
        save_file(split(model), folder / WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / CONFIG, config)
        _write_json(folder / "generation_config.json", generation)
        notes = (
            *_head_note(model.config),
            *_export_tokenizer(found.text_tokenizer, found.layout, folder),
        )
    return sorted(directory.iterdir()), notes


def _refuse_features(config: DecoderOnlyConfig) -> None:
    if config.feature_width is not None:
        raise InputError("this model cannot be written as a Llama: it reads features in place of its first tokens.")


def _head_note(config: DecoderOnlyConfig) -> tuple[str, ...]:
    missing = config.vocab_size - config.head_slot.size
    if not missing:
        return ()
    return (
        f"the model predicts {config.head_slot.size} of its {config.vocab_size} ids; the rows of lm_head.weight for "
        f"the other {missing} are zeros, which give a logit of 0: sample among the predicted ids only",
    )


def _is_llama(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG, "").get("model_type") == "llama"
    except InputError:
        return False


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _export_tokenizer(text_tokenizer: TextTokenizer | Path | None, layout: Layout, folder: Path) -> tuple[str, ...]:
    if text_tokenizer is None:
        return ("the bundle has no text tokenizer, so no tokenizer files were written",)
    if set(layout.vocabulary.segments) != {"text"}:  # an imported model's own tokenizer numbers as the model does
        known = TextTokenizer.load(text_tokenizer) if isinstance(text_tokenizer, Path) else text_tokenizer
        sizes = layout.vocabulary.to_dict()
        sizes.pop(PADDING, None)
        if known.vocabulary != Vocabulary(sizes):
            return (
                "the bundle's text tokenizer holds words alone, not all of the model's ids, so no tokenizer files "
                "were written",
            )
    if isinstance(text_tokenizer, Path):
        shutil.copyfile(text_tokenizer, folder / TOKENIZER)
    else:
        text_tokenizer.save(folder / TOKENIZER)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": layout.max_length,
        "padding_side": "left",  # prompts of several lengths end where their pictures start
    }
    generation, names = write_generation_config(layout), {i: name for name, i in layout.vocabulary.specials.items()}
    settings |= {
        f"{kind}_token": names[generation[f"{kind}_token_id"]]
        for kind in ("eos", "pad")
        if f"{kind}_token_id" in generation
    }
    _write_json(folder / "tokenizer_config.json", settings)
    return ()


# Verifying -------------------------------------------------------------------------------------------------------


def verify_llama(imported: ImportedLlama, directory: Path) -> tuple[list[ArrayError], str]:
    """The largest error of every output of a reference folder: of the imported weights where the folder is of their
    sizes, of the folder's own otherwise (it then certifies the same code)."""
    arrays = read_arrays(directory / "io.npz")
    if read_llama_config(read_config(directory / CONFIG)).ours == imported.model.config:
        note = f"the imported weights were run on {directory / 'io.npz'}"
        return _compare(imported.model, arrays), note
    note = f"{directory} is of other sizes than the imported file, so its own weights were run"
    return _compare(read_llama(directory).model, arrays), note


def verify_llama_folder(directory: Path) -> list[ArrayError]:
    """The largest error of every output of a reference folder, from the folder's own weights and config."""
    return _compare(read_llama(directory).model, read_arrays(directory / "io.npz"))


def _compare(model: DecoderOnly, arrays: ReferenceArrays) -> list[ArrayError]:
    return compare_outputs(KIND, outputs(model, arrays), arrays, INPUT_NAMES)


def outputs(model: DecoderOnly, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    """How each array of a reference folder is computed: whole sequences at once, and greedily, token by token."""

    def logits() -> Float[Tensor, "B T V"]:
        return model.logits(model.hidden(arrays["input_ids"]))

    def loss() -> Float[Tensor, ""]:
        return F.cross_entropy(logits()[:, :-1].flatten(0, 1), arrays["input_ids"][:, 1:].flatten())

    return {
        "logits": logits,
        "loss": loss,
        "generated_ids": lambda: greedy_ids(model, arrays["prompt_ids"], arrays["generated_ids"].shape[1]),
        "generated_logits": lambda: cached_logits(
            model,
            greedy_ids(
                model, arrays["prompt_ids"], arrays["prompt_ids"].shape[1] + arrays["generated_logits"].shape[1]
            ),
            arrays["prompt_ids"].shape[1],
        ),
    }


def greedy_ids(model: DecoderOnly, prompt_ids: Int[Tensor, "B P"], length: int) -> Int[Tensor, "B T"]:
    """Prompts continued to `length` tokens, the likeliest each time."""
    layout = one_segment_layout(model.config.vocab_size, length)
    requests = [Request(order=ORDER, given={"text": prompt}) for prompt in prompt_ids]
    return torch.stack([drawn.token_ids for drawn in generate(model, layout, requests, SampleConfig(temperature=0.0))])


def cached_logits(model: DecoderOnly, token_ids: Int[Tensor, "B T"], num_given: int) -> Float[Tensor, "B new V"]:
    """The logits behind `num_given` tokens and behind each later one but the last, through the cache."""
    rows = slice(0, len(token_ids))
    state = model.new_state(len(token_ids))
    hidden = [model.extend(state, rows, token_ids[:, :num_given])]
    for column in token_ids[:, num_given:-1].T:
        hidden.append(model.extend(state, rows, column[:, None]))
    return model.logits(torch.stack(hidden, dim=1))
