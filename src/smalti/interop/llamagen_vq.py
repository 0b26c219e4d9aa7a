"""LlamaGen's VQ-8 and VQ-16 (FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py)."""

from collections.abc import Callable

from torch import Tensor

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import PRESETS, VQGAN, VQGANConfig
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.keys import KeyLayout, KeyMap, check_expressible, learned_codebook, rename_all
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized
from smalti.interop.vqgan_keys import llamagen_key

CLASS_NAME = "tokenizer.tokenizer_image.vq_model.VQModel"
IMAGE_RANGE = (-1.0, 1.0)


def key_map(image_tokenizer: VQGAN) -> KeyMap:
    return rename_all(image_tokenizer, llamagen_key)


def read_config(config: dict) -> VQGANConfig:
    """Our config from LlamaGen's field names: the sections `ModelArgs` and `Encoder_Decoder`, or the fields of
    `ModelArgs` alone."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    if "ModelArgs" in config or "Encoder_Decoder" in config:
        args = Fields(config.get("ModelArgs", {}), "config.ModelArgs")
        sides = Fields(config.get("Encoder_Decoder", {}), "config.Encoder_Decoder")
    else:
        args, sides = Fields(config, "config"), Fields({}, "config.Encoder_Decoder")
    encoder_multipliers = args.take_ints("encoder_ch_mult", (1, 1, 2, 2, 4))
    decoder_multipliers = args.take_ints("decoder_ch_mult", (1, 1, 2, 2, 4))
    in_channels = sides.take("in_channels", int, 3)
    sides.expect("out_channels", in_channels)
    sides.expect("norm_type", "group")
    ours = VQGANConfig(
        quantizer=QuantizerConfig(
            codebook_size=args.take("codebook_size", int, 16384),
            code_dim=args.take("codebook_embed_dim", int, 8),
            update="gradient",
            commitment_weight=args.take("commit_loss_beta", float, 0.25),
            l2_normalised=args.take("codebook_l2_norm", bool, True),
            entropy_weight=args.take("entropy_loss_ratio", float, 0.0),
        ),
        channels=sides.take("ch", int, 128),
        encoder_multipliers=encoder_multipliers,
        decoder_multipliers=decoder_multipliers,
        encoder_attention_levels=(len(encoder_multipliers) - 1,),
        decoder_attention_levels=(len(decoder_multipliers) - 1,),
        num_res_blocks=sides.take("num_res_blocks", int, 2),
        latent_channels=args.take("z_channels", int, 256),
        image_channels=in_channels,
        dropout=args.take("dropout_p", float, 0.0),
        resample_with_conv=sides.take("resamp_with_conv", bool, True),
    )
    args.finish("codebook_show_usage", *HEADER)
    sides.finish()
    return ours


def write_config(image_tokenizer: VQGAN) -> dict:
    """LlamaGen's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "llamagen-vq")
    config = {
        "class": CLASS_NAME,
        "ModelArgs": {
            "codebook_size": codes.codebook_size,
            "codebook_embed_dim": codes.code_dim,
            "codebook_l2_norm": codes.l2_normalised,
            "commit_loss_beta": codes.commitment_weight,
            "entropy_loss_ratio": codes.entropy_weight,
            "encoder_ch_mult": list(ours.encoder_multipliers),
            "decoder_ch_mult": list(ours.decoder_multipliers),
            "z_channels": ours.latent_channels,
            "dropout_p": ours.dropout,
        },
        "Encoder_Decoder": {
            "in_channels": ours.image_channels,
            "out_channels": ours.image_channels,
            "ch": ours.channels,
            "num_res_blocks": ours.num_res_blocks,
            "norm_type": "group",
            "resamp_with_conv": ours.resample_with_conv,
        },
        "image_range": list(IMAGE_RANGE),
    }
    check_expressible(ours, read_config(config), "llamagen-vq", "image_size")
    return config


def outputs(image_tokenizer: VQGAN, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    decoder_patch = 2 ** (len(image_tokenizer.config.decoder_multipliers) - 1)
    low = IMAGE_RANGE[0]
    return {
        **grid_outputs(image_tokenizer, arrays, low, decoder_patch),
        "vq_loss": lambda: quantized(image_tokenizer, arrays, low).codebook_loss,
        "commit_loss": lambda: quantized(image_tokenizer, arrays, low).commitment_loss,
        "entropy_loss": lambda: quantized(image_tokenizer, arrays, low).entropy_loss,
    }


LAYOUT = KeyLayout(
    name="llamagen-vq",
    build=VQGAN,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={
        "VQ-16 (vq_ds16_c2i.pt, vq_ds16_t2i.pt)": PRESETS["vq-16"],
        "VQ-8 (vq_ds8_c2i.pt)": PRESETS["vq-8"],
    },
    droppable={"quantize.codebook_used": "a history of which codes were used, not a weight"},
    part_of=("gen_vision_model.",),  # in Janus
    container="model",
)
