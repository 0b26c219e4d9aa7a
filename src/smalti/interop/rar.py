"""RAR (bytedance/1d-tokenizer, modeling/rar.py).

Its tables of positions have rows for sequences far longer than its pictures; only those of a picture are read. The id
between codes and classes, which nothing uses, gives its row to the learned start token.
"""

from collections.abc import Mapping

from torch import Tensor

from smalti.interop.fields import Fields, check_header
from smalti.interop.fused import Piece, PieceMap, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.rar import PREFIX, RAR, RARConfig

CLASS_NAME = "modeling.rar.RAR"
DROPPABLE = {"attn_mask": "computed"}
MORE_POSITIONS, MORE_STEPS = 1024, 100
"""Rows of the tables of positions and of steps beyond the codes of a picture."""


def read_config(config: dict) -> RARConfig:
    """Ours from the sections `model.generator` and `model.vq_model`."""
    check_header(config, CLASS_NAME, None)
    fields = Fields(config, "config")
    model = (fields.section("config") if "config" in config else fields).section("model")
    network, codes = model.section("generator"), model.section("vq_model")
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


def read_rar(state: Mapping[str, Tensor], config: dict, *, allow_nonfinite: bool = False) -> tuple[RAR, ImportReport]:
    """The model of a RAR state dict, in evaluation mode. Raises InputError if a tensor is missing, has another shape or
    is left over."""
    model = RAR(read_config(config))
    report = read_fused(
        model,
        state,
        piece_map(model.config),
        droppable=DROPPABLE,
        sizes="from the config",
        allow_nonfinite=allow_nonfinite,
    )
    return model, report
