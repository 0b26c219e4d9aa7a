"""RAR (bytedance/1d-tokenizer, modeling/rar.py), and VFMTok-RAR (CVMI-Lab/VFMTok-RAR), which is the same network over
16,384 codes of another image tokenizer.

Its tables of positions have rows for sequences far longer than its pictures; only those of a picture are read. The id
between codes and classes, which nothing uses, gives its row to the learned start token.
"""

import re
from collections.abc import Mapping, MutableMapping

from torch import Tensor

from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.interop.fields import Fields, check_header, sizes_go_together
from smalti.interop.fused import Piece, PieceMap, build_of, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.rar import PREFIX, RAR, RARConfig

CLASS_NAME = "modeling.rar.RAR"
DROPPABLE = {"attn_mask": "computed"}
MORE_POSITIONS, MORE_STEPS = 1024, 100
"""Rows of the tables of positions and of steps beyond the codes of a picture."""
PUBLISHED_GUIDANCE = {
    (24, 768): {"guidance_scale": 16.0, "guidance_scale_pow": 2.75},
    (24, 1024): {"guidance_scale": 15.5, "guidance_scale_pow": 2.5},
    (32, 1280): {"guidance_scale": 6.9, "guidance_scale_pow": 1.5},
    (40, 1408): {"guidance_scale": 8.0, "guidance_scale_pow": 1.2},
}
"""What RAR-B, -L, -XL and -XXL were drawn with, by layers and width (arXiv:2411.00776, §4). VFMTok-RAR's have the same
sizes; its scale is an argument of its script, and the published figures without guidance need none."""
RAR_CODES = 1024


def read_config(config: dict) -> RARConfig:
    """Ours from the sections `model.generator` and `model.vq_model`."""
    check_header(config, CLASS_NAME, None)
    fields = Fields(config, "config")
    model = (fields.section("config") if "config" in config else fields).section("model")
    network, codes = model.section("generator"), model.section("vq_model")
    with sizes_go_together():
        return RARConfig(
            codebook_size=codes.take("codebook_size", int),
            num_classes=network.take("condition_num_classes", int, 1000),
            num_codes=network.take("image_seq_len", int),
            num_layers=network.take("num_hidden_layers", int),
            d_model=network.take("hidden_size", int),
            num_heads=network.take("num_attention_heads", int),
            d_ff=network.take("intermediate_size", int),
            dropout=network.take("dropout", float, 0.1),
            attention_dropout=network.take("attn_drop", float, 0.1),
        )


def read_sampling(config: dict) -> SampleConfig:
    """What the original draws with: its guidance and the power of its schedule."""
    fields = Fields(config, "config")
    network = (fields.section("config") if "config" in config else fields).section("model").section("generator")
    with sizes_go_together(network.where):
        return SampleConfig(
            guidance_scale=network.take("guidance_scale", float, 1.0),
            guidance_schedule="cosine",
            guidance_power=network.take("guidance_scale_pow", float, 1.0),
        )


def infer_config(state: Mapping[str, Tensor]) -> dict:
    """RAR's config of a state dict, all of which its shapes tell. Raises InputError if they are not a RAR's."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    layers = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.adaLN_modulation\.", key))}
    wanted = {
        "embeddings.weight": 2,
        "lm_head.weight": 2,
        "timesteps_embeddings": 3,
        "blocks.0.attn.q_norm.weight": 1,
        "blocks.0.mlp.fc1.weight": 2,
    }
    if missing := [key for key, axes in wanted.items() if len(shapes.get(key, ())) != axes]:
        raise InputError(f"this is no RAR: it has no {missing[0]}; found {', '.join(list(state)[:4])} …")
    (table, D), (codes, _) = shapes["embeddings.weight"], shapes["lm_head.weight"]
    network = {
        "hidden_size": D,
        "num_hidden_layers": len(layers),
        "num_attention_heads": D // max(1, shapes["blocks.0.attn.q_norm.weight"][0]),
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "image_seq_len": shapes["timesteps_embeddings"][1] - MORE_STEPS,
        "condition_num_classes": table - codes - 2,
    }
    if codes == RAR_CODES:
        network |= PUBLISHED_GUIDANCE.get((len(layers), D), {})
    return {"model": {"vq_model": {"codebook_size": codes}, "generator": network}}


def write_config(config: RARConfig, sampling: SampleConfig) -> dict:
    """RAR's fields."""
    return {
        "class": CLASS_NAME,
        "model": {
            "vq_model": {"codebook_size": config.codebook_size},
            "generator": {
                "hidden_size": config.d_model,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "intermediate_size": config.d_ff,
                "dropout": config.dropout,
                "attn_drop": config.attention_dropout,
                "image_seq_len": config.num_codes,
                "condition_num_classes": config.num_classes,
                "guidance_scale": sampling.guidance_scale,
                "guidance_scale_pow": sampling.guidance_power,
            },
        },
    }


def piece_map(config: RARConfig) -> PieceMap:
    """RAR's key, or keys, of every tensor of ours."""
    D, K, L = config.d_model, config.codebook_size, config.num_codes
    table = (K + 1 + config.num_classes + 1, D)
    positions, end = (1, L + MORE_POSITIONS, D), L + PREFIX
    pieces: PieceMap = {
        "embed_tokens.weight": (
            Piece("embeddings.weight", table, 0, K),
            Piece("cls_token", (1, 1, D)),
            Piece("embeddings.weight", table, K + 1),
        ),
        "positions.weight": (Piece("pos_embed", positions, 0, end),),
        "target_positions.weight": (Piece("target_aware_pos_embed", positions, 0, end),),
        "steps.weight": (Piece("timesteps_embeddings", (1, L + MORE_STEPS, D), 0, end),),
        **_linear("head", "lm_head", K, D),
        **_linear("modulation", "adaln_before_head.adaLN_modulation.1", 2 * D, D),
    }
    Dh = config.transformer.head_dim
    for layer in range(config.num_layers):
        theirs, block = f"blocks.{layer}", f"blocks.{layer}"
        pieces |= {
            **_linear(f"{block}.attention.qkv", f"{theirs}.attn.qkv", 3 * D, D),
            **_linear(f"{block}.attention.out", f"{theirs}.attn.proj", D, D),
            **_linear(f"{block}.feed_forward.up", f"{theirs}.mlp.fc1", config.d_ff, D),
            **_linear(f"{block}.feed_forward.down", f"{theirs}.mlp.fc2", D, config.d_ff),
            **_linear(f"{block}.modulation", f"{theirs}.adaLN_modulation.1", 6 * D, D),
            **_norm(f"{block}.attention_norm", f"{theirs}.norm1", D),
            **_norm(f"{block}.feed_forward_norm", f"{theirs}.norm2", D),
            **_norm(f"{block}.attention.q_norm", f"{theirs}.attn.q_norm", Dh),
            **_norm(f"{block}.attention.k_norm", f"{theirs}.attn.k_norm", Dh),
        }
    return pieces


def _linear(ours: str, theirs: str, outputs: int, inputs: int) -> PieceMap:
    return {
        f"{ours}.weight": (Piece(f"{theirs}.weight", (outputs, inputs)),),
        f"{ours}.bias": (Piece(f"{theirs}.bias", (outputs,)),),
    }


def _norm(ours: str, theirs: str, width: int) -> PieceMap:
    return {f"{ours}.{name}": (Piece(f"{theirs}.{name}", (width,)),) for name in ("weight", "bias")}


def read_rar(
    state: MutableMapping[str, Tensor], config: dict, *, allow_nonfinite: bool = False
) -> tuple[RAR, ImportReport]:
    """The model of a RAR state dict, in evaluation mode; its weights may share the memory of `state`, which is
    emptied. Raises InputError if a tensor is missing, has another shape or is left over."""
    ours = read_config(config)
    model = build_of(lambda: RAR(ours), state)
    report = read_fused(
        model,
        state,
        piece_map(model.config),
        droppable=DROPPABLE,
        sizes="from the config",
        allow_nonfinite=allow_nonfinite,
    )
    return model, report
