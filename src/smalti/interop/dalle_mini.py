"""DALL·E mini and mega (borisdayma/dalle-mini) as min-dalle keeps them: `encoder.pt` and `decoder.pt`, or one file in
which the keys begin with "encoder." and "decoder.".

A caption is `<s> words </s>`; the null condition is `<s> </s>`. `<eot>` has the embedding of `</s>`, id 2. The original
draws of the first 16,384 ids of pictures alone, so rows behind them, which the larger model has, stand for nothing. Of
the sizes only the number of heads is not told by the weights: published heads are 64 wide.
"""

import math
import re
from collections.abc import Mapping, MutableMapping

from torch import Tensor

from smalti.errors import InputError
from smalti.interop.fields import Fields, sizes_go_together
from smalti.interop.fused import Piece, PieceMap, build_of, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.prompts import PLACE, PromptForm

MODEL_TYPE = "dallebart"
HEAD_WIDTH, NUM_CODES = 64, 2**14
END_ID = 2
"""Of `</s>`."""
FORM = PromptForm(template=PLACE, begin="<s>", start="</s>", filler=None)
GUIDANCE_SCALE = 16.0
"""min-dalle's `supercondition_factor`."""
FILES = ("encoder", "decoder")


def infer_config(state: Mapping[str, Tensor]) -> dict:
    """The fields of dalle-mini's config that shapes tell, and the number of heads. Raises InputError if the weights are
    not of this layout."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wanted = [f"{part}.embed_{what}.weight" for part in FILES for what in ("tokens", "positions")]
    wanted.append("encoder.layers.0.glu.fc0.weight")
    if missing := [key for key in wanted if len(shapes.get(key, ())) != 2]:
        raise InputError(f"this is no DALL·E mini: it has no {missing[0]}; found {', '.join(list(state)[:4])} …")
    (text, D), (max_text, _), (pictures, _), (length, _), (wide, _) = (shapes[key] for key in wanted)
    layers = {
        name: 1 + max(int(found[1]) for key in state if (found := re.match(rf"{name}\.layers\.(\d+)\.", key)))
        for name in FILES
    }
    return {
        "model_type": MODEL_TYPE,
        "d_model": D,
        "encoder_vocab_size": text,
        "max_text_length": max_text,
        "image_vocab_size": pictures - 1,
        "image_length": length,
        **{f"{name}_layers": count for name, count in layers.items()},
        **{f"{name}_attention_heads": max(1, D // HEAD_WIDTH) for name in FILES},
        **{f"{name}_ffn_dim": wide for name in FILES},
    }


def read_config(config: dict) -> EncoderDecoderConfig:
    """Ours from dalle-mini's fields. Raises InputError naming one that asks for something else."""
    fields = Fields(config, "config")
    fields.expect("model_type", MODEL_TYPE)
    for name in ("attention_heads", "ffn_dim"):
        fields.expect(f"decoder_{name}", fields.take(f"encoder_{name}", int))
    pictures, length = fields.take("image_vocab_size", int), fields.take("image_length", int)
    side = math.isqrt(length)
    if side * side != length:
        raise InputError(f"config.image_length is {length}; expected a square number of codes.")
    codes = min(pictures, NUM_CODES)
    with sizes_go_together():
        return EncoderDecoderConfig(
            text_size=fields.take("encoder_vocab_size", int),
            max_text=fields.take("max_text_length", int) - 1,
            codebook_size=codes,
            spare_codes=pictures - codes,
            grid=(side, side),
            encoder_layers=fields.take("encoder_layers", int),
            decoder_layers=fields.take("decoder_layers", int),
            d_model=fields.take("d_model", int),
            num_heads=fields.take("encoder_attention_heads", int),
            d_ff=fields.take("encoder_ffn_dim", int),
            feed_forward="geglu",
            form="dalle_mini",
            dropout=0.0,
        )


def write_config(config: EncoderDecoderConfig) -> dict:
    """dalle-mini's fields. Raises InputError for a model that it cannot be."""
    written = {
        "model_type": MODEL_TYPE,
        "d_model": config.d_model,
        "encoder_vocab_size": config.text_size,
        "max_text_length": config.max_text + 1,
        "image_vocab_size": config.codebook_size + config.spare_codes,
        "image_length": config.num_codes,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        **{f"{name}_attention_heads": config.num_heads for name in FILES},
        **{f"{name}_ffn_dim": config.d_ff for name in FILES},
    }
    theirs = read_config(written).to_dict()
    for name, value in config.to_dict().items():
        if value != theirs[name] and "dropout" not in name:
            raise InputError(f"this model is no DALL·E mini: its {name} is {value}, there it is {theirs[name]}.")
    return written


def piece_map(config: EncoderDecoderConfig) -> PieceMap:
    """min-dalle's key, or keys, of every tensor of ours."""
    D, V, K = config.d_model, config.text_size, config.codebook_size + config.spare_codes
    words = "encoder.embed_tokens.weight"
    pieces: PieceMap = {
        "embed_text.weight": (Piece(words, (V, D)), Piece(words, (V, D), END_ID, END_ID + 1)),
        "text_positions.weight": (Piece("encoder.embed_positions.weight", (config.max_text + 1, D)),),
        "embed_codes.weight": (Piece("decoder.embed_tokens.weight", (K + 1, D)),),
        "code_positions.weight": (Piece("decoder.embed_positions.weight", (config.num_codes, D)),),
        "head.weight": (Piece("decoder.lm_head.weight", (K + 1, D)),),
        **_norm("text_norm", "encoder.layernorm_embedding", D),
        **_norm("code_norm", "decoder.layernorm_embedding", D),
        **_norm("encoder.norm", "encoder.final_ln", D),
        **_norm("decoder.norm", "decoder.final_ln", D),
    }
    for stack, num_layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(num_layers):
            pieces |= _block(f"{stack}.blocks.{layer}", f"{stack}.layers.{layer}", D, config.d_ff, stack == "decoder")
    return pieces


def _block(ours: str, theirs: str, D: int, wide: int, crosses: bool) -> PieceMap:
    def square(attention: str, *names: str) -> tuple[Piece, ...]:
        return tuple(Piece(f"{theirs}.{attention}.{name}_proj.weight", (D, D)) for name in names)

    gated = tuple(Piece(f"{theirs}.glu.{name}.weight", (wide, D)) for name in ("fc0", "fc1"))
    pieces: PieceMap = {
        f"{ours}.attention.qkv.weight": square("self_attn", "q", "k", "v"),
        f"{ours}.attention.out.weight": square("self_attn", "out"),
        f"{ours}.feed_forward.up.weight": gated,
        f"{ours}.feed_forward.down.weight": (Piece(f"{theirs}.glu.fc2.weight", (D, wide)),),
        **_norm(f"{ours}.attention_norm", f"{theirs}.pre_self_attn_layer_norm", D),
        **_norm(f"{ours}.attention.out_norm", f"{theirs}.self_attn_layer_norm", D),
        **_norm(f"{ours}.feed_forward_norm", f"{theirs}.glu.ln0", D),
        **_norm(f"{ours}.feed_forward.inner_norm", f"{theirs}.glu.ln1", wide),
    }
    if not crosses:
        return pieces
    return pieces | {
        f"{ours}.cross_attention.q.weight": square("encoder_attn", "q"),
        f"{ours}.cross_attention.kv.weight": square("encoder_attn", "k", "v"),
        f"{ours}.cross_attention.out.weight": square("encoder_attn", "out"),
        **_norm(f"{ours}.cross_norm", f"{theirs}.pre_encoder_attn_layer_norm", D),
        **_norm(f"{ours}.cross_attention.out_norm", f"{theirs}.encoder_attn_layer_norm", D),
    }


def _norm(ours: str, theirs: str, width: int) -> PieceMap:
    return {f"{ours}.{name}": (Piece(f"{theirs}.{name}", (width,)),) for name in ("weight", "bias")}


def read_dalle_mini(
    state: MutableMapping[str, Tensor], config: dict | None, *, allow_nonfinite: bool = False
) -> tuple[EncoderDecoder, ImportReport]:
    """The model of both state dicts, their keys behind "encoder." and "decoder.", in evaluation mode; `state` is
    emptied. Without a config the shapes tell the sizes. Raises InputError if a tensor is missing, has another shape
    or is left over."""
    sizes = "from the config" if config is not None else f"from the shapes of the weights, heads {HEAD_WIDTH} wide"
    ours = read_config(infer_config(state) if config is None else config)
    model = build_of(lambda: EncoderDecoder(ours), state)
    report = read_fused(model, state, piece_map(ours), droppable={}, sizes=sizes, allow_nonfinite=allow_nonfinite)
    return model, report
