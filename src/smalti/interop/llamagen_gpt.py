"""LlamaGen's transformers (FoundationVision/LlamaGen, autoregressive/models/gpt.py), from class labels (c2i) and from
captions (t2i).

The label table has one more row than there are classes where training dropped labels: the null condition. Captions are
features of a text encoder, up to `cls_token_num` of them. There they are filled up on the left, and the filling is
masked; here it is left out, which is the same, since nothing else sees it and the prefix is not rotated.
"""

import math
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from smalti.errors import InputError
from smalti.interop.fields import HEADER, Fields, check_header, sizes_go_together
from smalti.interop.fused import Piece, PieceMap, build_of, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.config import PRESETS, TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary

CLASS_NAME = "autoregressive.models.gpt.Transformer"
DROPPABLE = {"freqs_cis": "computed from the config", ".k_cache": "a cache", ".v_cache": "a cache"}
TEXT_ENCODER, FEATURE_WIDTH = "google/flan-t5-xl", 2048
"""Of the published models of captions."""
UNREAD = ("initializer_range", "token_dropout_p", "ffn_dropout_p", "drop_path_rate", "max_batch_size", "max_seq_len")
"""Of training, and of memory set aside."""


def read_config(config: dict) -> tuple[DecoderOnlyConfig, Layout]:
    """Ours from the fields of LlamaGen's `ModelArgs`, alone or in a section of that name."""
    check_header(config, CLASS_NAME, None)
    fields = Fields(config, "config")
    args = fields.section("ModelArgs") if "ModelArgs" in config else fields
    num_codes, prefix = args.take("block_size", int), args.take("cls_token_num", int)
    side = math.isqrt(num_codes)
    if side * side != num_codes:
        raise InputError(f"{args.where}.block_size is {num_codes}; LlamaGen's pictures are square grids of codes.")
    with sizes_go_together():
        transformer = TransformerConfig(
            max_length=prefix + num_codes,
            positions="rotary_2d",
            rotary_base=args.take("rope_base", float, 10000.0),
            grid=(side, side),
            prefix_length=prefix,
            zero_prefix_rotation=True,
            **read_sizes(args),
        )
        codes, kind = args.take("vocab_size", int), args.expect("model_type", "c2i", "t2i")
        num_classes, width = args.take("num_classes", int, 1000), args.take("caption_dim", int, FEATURE_WIDTH)
        num_labels = num_classes + (args.take("class_dropout_prob", float, 0.1) > 0)
        args.finish(*UNREAD, *HEADER)
        if kind == "c2i":
            if prefix != 1:
                raise InputError(f"{args.where}.cls_token_num is {prefix}; a label is one token.")
            vocabulary, line = Vocabulary({"image": codes, "label": num_labels}), f"label{{1}} image{{{num_codes}}}"
        else:
            vocabulary = Vocabulary({FEATURES: 0, "image": codes})
            line = f"{FEATURES}{{{prefix}}} image{{{num_codes}}}"
        ours = DecoderOnlyConfig(
            vocab_size=vocabulary.size,
            transformer=transformer,
            head_ranges=((0, codes),) if kind == "c2i" else None,
            feature_width=width if kind == "t2i" else None,
        )
        return ours, Layout.parse(vocabulary, {"label to image" if kind == "c2i" else "caption to image": line})


def read_sizes(args: Fields) -> dict[str, Any]:
    """Of `TransformerConfig`, what does not depend on how positions are told."""
    d_model = args.take("dim", int)
    return {
        "num_layers": args.take("n_layer", int),
        "d_model": d_model,
        "num_heads": args.take("n_head", int),
        "num_kv_heads": args.take("n_kv_head", int | None, None),
        "d_ff": feed_forward_width(args, d_model),
        "norm": "rms",
        "norm_eps": args.take("norm_eps", float, 1e-5),
        "feed_forward": "swiglu",
        "bias": False,
        "dropout": args.take("resid_dropout_p", float, 0.0),
        "attention_dropout": args.take("attn_dropout_p", float, 0.0),
    }


def write_sizes(ours: TransformerConfig) -> dict[str, Any]:
    """The fields that `read_sizes` takes."""
    return {
        "dim": ours.d_model,
        "n_layer": ours.num_layers,
        "n_head": ours.num_heads,
        "n_kv_head": ours.num_kv_heads,
        **feed_forward_fields(ours),
        "norm_eps": ours.norm_eps,
        "resid_dropout_p": ours.dropout,
        "attn_dropout_p": ours.attention_dropout,
    }


def num_classes(config: dict) -> int | None:
    """How many classes a config speaks of, the null condition left out; None for captions."""
    args = config.get("ModelArgs", config)
    return args.get("num_classes", 1000) if args.get("model_type", "c2i") == "c2i" else None


def infer_config(state: Mapping[str, Tensor], num_codes: int) -> tuple[dict, str]:
    """LlamaGen's config of a state dict of one of the published sizes, and the name of that size. How many codes a
    picture has the weights do not say. Raises InputError if the shapes are of none of them."""
    sizes, name = infer_sizes(state, "LlamaGen")
    config: dict[str, Any] = {**sizes, "block_size": num_codes}
    labels, captions = (state.get(f"cls_embedding.{key}") for key in ("embedding_table.weight", "uncond_embedding"))
    if labels is not None and labels.ndim == 2:
        config |= {"model_type": "c2i", "num_classes": labels.shape[0] - 1, "cls_token_num": 1}
    elif captions is not None and captions.ndim == 2:
        config |= {"model_type": "t2i", "cls_token_num": captions.shape[0], "caption_dim": captions.shape[-1]}
    else:
        raise InputError(
            "this transformer of LlamaGen has no condition: expected cls_embedding.embedding_table.weight (classes) or "
            "cls_embedding.uncond_embedding (captions)."
        )
    return config, name


def infer_sizes(state: Mapping[str, Tensor], whose: str) -> tuple[dict[str, Any], str]:
    """The fields of `ModelArgs` that the shapes of one of LlamaGen's published sizes tell, and its name. Raises
    InputError, which speaks of `whose` transformers, if they are of none of them."""
    layers = {int(found[1]) for key in state if (found := re.match(r"layers\.(\d+)\.attention\.wqkv\.", key))}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    codes, wide = shapes.get("tok_embeddings.weight"), shapes.get("layers.0.feed_forward.w1.weight")
    if not layers or codes is None or wide is None or len(codes) != 2 or len(wide) != 2:
        raise InputError(
            f"this is no transformer of {whose}: expected tok_embeddings.weight, layers.0.attention.wqkv.weight and "
            f"layers.0.feed_forward.w1.weight; found {', '.join(list(state)[:4])} …"
        )
    found = (len(layers), codes[1], wide[0])
    sizes = {name: PRESETS[name] for name in PRESETS if name.startswith("llamagen-")}
    fitting = [name for name, size in sizes.items() if (size["num_layers"], size["d_model"], size["d_ff"]) == found]
    if not fitting:
        raise InputError(
            "the shapes are of no published {} ({} layers, width {}, feed-forward {}), and do not say how many "
            "heads there are: give the original's config.".format(whose, *found)
        )
    heads = sizes[fitting[0]]["num_heads"]
    return {"dim": codes[1], "n_layer": len(layers), "n_head": heads, "vocab_size": codes[0]}, fitting[0]


def write_config(config: DecoderOnlyConfig, layout: Layout, classes: int | None) -> dict:
    """LlamaGen's fields of a model that it can express. Raises InputError for another, saying why."""
    ours = config.transformer
    codes = layout.vocabulary["image"].size
    labels = layout.vocabulary["label"].size if "label" in layout.vocabulary else 0
    args = {
        **write_sizes(ours),
        "rope_base": ours.rotary_base,
        "num_classes": 1000 if classes is None else classes,
        "class_dropout_prob": 0.1 if classes is None or labels > classes else 0.0,
        "caption_dim": config.feature_width or FEATURE_WIDTH,
        "model_type": "t2i" if classes is None else "c2i",
        "vocab_size": codes,
        "cls_token_num": ours.prefix_length,
        "block_size": ours.max_length - ours.prefix_length,
    }
    written = {"class": CLASS_NAME, "ModelArgs": args}
    require_same("LlamaGen", written, read_config, config, layout)
    return written


def require_same(
    whose: str,
    written: dict,
    read: Callable[[dict], tuple[DecoderOnlyConfig, Layout]],
    config: DecoderOnlyConfig,
    layout: Layout,
) -> None:
    """Raises InputError unless a config that was written reads as the model it was written of."""
    try:
        theirs, their_layout = read(written)
    except ValueError as error:
        raise InputError(f"this model is none that {whose} has: {error}") from error
    if (theirs, their_layout.to_dict()) != (config, layout.to_dict()):
        reason = _difference(config, layout, theirs, their_layout)
        raise InputError(f"this model is none that {whose} has: {reason}.")


def _difference(config: DecoderOnlyConfig, layout: Layout, theirs: DecoderOnlyConfig, their_layout: Layout) -> str:
    """In words, what the model that a written config describes has otherwise."""
    mine, other = config.to_dict(), theirs.to_dict()
    mine, other = mine | mine.pop("transformer"), other | other.pop("transformer")
    for name in mine:
        if mine[name] != other.get(name):
            return f"its {name} is {mine[name]}, there it is {other.get(name)}"
    return f"its sequences are {layout!r}, there they are {their_layout!r}"


def feed_forward_fields(ours: TransformerConfig) -> dict[str, Any]:
    """The fields that LlamaGen makes the width of the feed-forward of."""
    plain = int(2 * (4 * ours.d_model) / 3)
    for step in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-plain // step) * step == ours.d_ff:
            return {"multiple_of": step, "ffn_dim_multiplier": None}
    return {"multiple_of": 1, "ffn_dim_multiplier": (ours.d_ff + 0.5) / plain}


def feed_forward_width(args: Fields, d_model: int) -> int:
    """The width that LlamaGen makes of its fields."""
    wide, step = int(2 * (4 * d_model) / 3), args.take("multiple_of", int, 256)
    multiplier = args.take("ffn_dim_multiplier", float | None, None)
    if multiplier is not None:
        wide = int(multiplier * wide)
    return -(-wide // step) * step


def piece_map(config: DecoderOnlyConfig) -> PieceMap:
    """LlamaGen's key, or keys, of every tensor of ours."""
    ours, codes = config.transformer, config.head_slot.size
    D, labels = ours.d_model, config.vocab_size - codes
    pieces: PieceMap = {
        "embed_tokens.weight": (Piece("tok_embeddings.weight", (codes, D)),),
        "head": (Piece("output.weight", (codes, D)),),
        "transformer.norm.weight": (Piece("norm.weight", (D,)),),
    }
    if config.feature_width is None:
        pieces["embed_tokens.weight"] += (Piece("cls_embedding.embedding_table.weight", (labels, D)),)
    else:
        C, P = config.feature_width, ours.prefix_length
        pieces["features.first.weight"] = (Piece("cls_embedding.cap_proj.fc1.weight", (D, C)),)
        pieces["features.second.weight"] = (Piece("cls_embedding.cap_proj.fc2.weight", (D, D)),)
        pieces["features.null_features"] = (Piece("cls_embedding.uncond_embedding", (P, C)),)
    for layer in range(ours.num_layers):
        theirs, block = f"layers.{layer}", f"transformer.blocks.{layer}"
        wide = (ours.d_ff, D)
        pieces |= {
            f"{block}.attention_norm.weight": (Piece(f"{theirs}.attention_norm.weight", (D,)),),
            f"{block}.attention.qkv.weight": (
                Piece(f"{theirs}.attention.wqkv.weight", (ours.q_width + 2 * ours.kv_width, D)),
            ),
            f"{block}.attention.out.weight": (Piece(f"{theirs}.attention.wo.weight", (D, ours.q_width)),),
            f"{block}.feed_forward_norm.weight": (Piece(f"{theirs}.ffn_norm.weight", (D,)),),
            f"{block}.feed_forward.up.weight": (
                Piece(f"{theirs}.feed_forward.w1.weight", wide),
                Piece(f"{theirs}.feed_forward.w3.weight", wide),
            ),
            f"{block}.feed_forward.down.weight": (Piece(f"{theirs}.feed_forward.w2.weight", wide[::-1]),),
        }
    return pieces


def read_llamagen(
    state: MutableMapping[str, Tensor], config: dict, *, allow_nonfinite: bool = False
) -> tuple[DecoderOnly, Layout, ImportReport]:
    """The model of a LlamaGen state dict, in evaluation mode, and its layout; its weights may share the memory of
    `state`, which is emptied. Raises InputError if a tensor is missing, has another shape or is left over, and for a
    config that says what is not known here."""
    ours, layout = read_config(config)
    model = build_of(lambda: DecoderOnly(ours), state)
    report = read_fused(
        model,
        state,
        piece_map(ours),
        droppable=DROPPABLE,
        sizes="from the config",
        allow_nonfinite=allow_nonfinite,
    )
    return model, layout, report
