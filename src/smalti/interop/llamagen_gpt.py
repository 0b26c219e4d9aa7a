"""LlamaGen's transformers (FoundationVision/LlamaGen, autoregressive/models/gpt.py), from class labels (c2i) and from
captions (t2i).

The label table has one more row than there are classes where training dropped labels: the null condition. Captions are
features of a text encoder, up to `cls_token_num` of them. There they are filled up on the left, and the filling is
masked; here it is left out, which is the same, since nothing else sees it and the prefix is not rotated.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from smalti.errors import InputError
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.fused import Piece, PieceMap, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary

CLASS_NAME = "autoregressive.models.gpt.Transformer"
DROPPABLE = {"freqs_cis": "computed from the config", ".k_cache": "a cache", ".v_cache": "a cache"}
UNREAD = (  # of training, and of memory set aside
    *("initializer_range", "token_dropout_p", "ffn_dropout_p", "drop_path_rate", "max_batch_size", "max_seq_len"),
)
SECTIONS = ("ModelArgs", "generate", "smallest_top2_logit_gap", "filters", *HEADER)


def read_config(config: dict) -> tuple[DecoderOnlyConfig, Layout]:
    """Ours from the fields of LlamaGen's `ModelArgs`, alone or in a section of that name."""
    check_header(config, CLASS_NAME, None)
    fields = Fields(config, "config")
    args = fields.section("ModelArgs") if "ModelArgs" in config else fields
    d_model, num_heads = args.take("dim", int), args.take("n_head", int)
    num_codes, prefix = args.take("block_size", int), args.take("cls_token_num", int)
    side = math.isqrt(num_codes)
    if side * side != num_codes:
        raise InputError(f"{args.where}.block_size is {num_codes}; LlamaGen's pictures are square grids of codes.")
    transformer = TransformerConfig(
        num_layers=args.take("n_layer", int),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=args.take("n_kv_head", int | None, None),
        d_ff=_wide(args, d_model),
        max_length=prefix + num_codes,
        norm="rms",
        norm_eps=args.take("norm_eps", float, 1e-5),
        feed_forward="swiglu",
        bias=False,
        positions="rotary_2d",
        rotary_base=args.take("rope_base", float, 10000.0),
        grid=(side, side),
        prefix_length=prefix,
        zero_prefix_rotation=True,
        dropout=args.take("resid_dropout_p", float, 0.0),
        attention_dropout=args.take("attn_dropout_p", float, 0.0),
    )
    codes, kind = args.take("vocab_size", int), args.expect("model_type", "c2i", "t2i")
    num_classes, width = args.take("num_classes", int, 1000), args.take("caption_dim", int, 2048)
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


def _wide(args: Fields, d_model: int) -> int:
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
    state: Mapping[str, Tensor], config: dict, *, allow_nonfinite: bool = False
) -> tuple[DecoderOnly, Layout, ImportReport]:
    """The model of a LlamaGen state dict, in evaluation mode, and its layout. Raises InputError if a tensor is missing,
    has another shape or is left over, and for a config that says what is not known here."""
    ours, layout = read_config(config)
    model = DecoderOnly(ours)
    report = read_fused(
        model,
        state,
        piece_map(ours),
        droppable=DROPPABLE,
        sizes="from the config",
        allow_nonfinite=allow_nonfinite,
    )
    return model, layout, report
