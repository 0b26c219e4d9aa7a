"""taming-transformers' VQGAN (CompVis/taming-transformers, taming/models/vqgan.py)."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.keys import KeyMap, Layout, check_expressible, learned_codebook, rename_all
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized
from smalti.interop.vqgan_keys import taming_key

CLASS_NAME = "taming.models.vqgan.VQModel"
IMAGE_RANGE = (-1.0, 1.0)
TRAINING_ONLY = (
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "sane_index_shape",
)


def key_map(image_tokenizer: VQGAN) -> KeyMap:
    num_levels = len(image_tokenizer.config.decoder_multipliers)
    return rename_all(image_tokenizer, lambda name: taming_key(name, num_levels))


def read_config(config: dict) -> VQGANConfig:
    """Our config from taming's field names: the section `model.params`, or its fields alone. Attention levels
    follow from `attn_resolutions` as they do there: the encoder halves `resolution` rounding down, the decoder
    doubles what is left."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    params = Fields(config, "config")
    if "model" in config:
        model = params.section("model")
        params = model.section("params")
        model.finish("target", "base_learning_rate")
    network = params.section("ddconfig")
    multipliers = network.take_ints("ch_mult", (1, 2, 4, 8))
    resolution = network.take("resolution", int)
    at = network.take_ints("attn_resolutions")
    lowest = len(multipliers) - 1
    side = max(1, resolution >> lowest) << lowest  # the largest that halves evenly from level to level
    in_channels = network.take("in_channels", int)
    network.expect("out_ch", in_channels)
    network.expect("double_z", False)
    ours = VQGANConfig(
        quantizer=QuantizerConfig(
            codebook_size=params.take("n_embed", int), code_dim=params.take("embed_dim", int), update="gradient"
        ),
        image_size=(side, side),
        channels=network.take("ch", int),
        encoder_multipliers=multipliers,
        decoder_multipliers=multipliers,
        encoder_attention_levels=tuple(i for i in range(lowest + 1) if resolution >> i in at),
        decoder_attention_levels=tuple(i for i in range(lowest + 1) if side >> i in at),
        num_res_blocks=network.take("num_res_blocks", int),
        latent_channels=network.take("z_channels", int),
        image_channels=in_channels,
        dropout=network.take("dropout", float, 0.0),
        resample_with_conv=network.take("resamp_with_conv", bool, True),
    )
    params.expect("remap", None)
    params.finish(*TRAINING_ONLY, *HEADER)
    network.finish()
    return ours


def write_config(image_tokenizer: VQGAN) -> dict:
    """Taming's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "taming")
    resolution = ours.image_size[0]
    network = {
        "double_z": False,
        "z_channels": ours.latent_channels,
        "resolution": resolution,
        "in_channels": ours.image_channels,
        "out_ch": ours.image_channels,
        "ch": ours.channels,
        "ch_mult": list(ours.encoder_multipliers),
        "num_res_blocks": ours.num_res_blocks,
        "attn_resolutions": [resolution >> level for level in ours.encoder_attention_levels],
        "dropout": ours.dropout,
        "resamp_with_conv": ours.resample_with_conv,
    }
    params = {"embed_dim": codes.code_dim, "n_embed": codes.codebook_size, "ddconfig": network}
    config = {"class": CLASS_NAME, "model": {"params": params}, "image_range": list(IMAGE_RANGE)}
    check_expressible(ours, read_config(config), "taming", "image_size")
    return config


def outputs(image_tokenizer: VQGAN, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    decoder_patch = 2 ** (len(image_tokenizer.config.decoder_multipliers) - 1)
    low = IMAGE_RANGE[0]
    return {
        **grid_outputs(image_tokenizer, arrays, low, decoder_patch),
        # Taming weights the wrong one of the two terms ("legacy"), which leaves their sum's value alone.
        "codebook_loss": lambda: quantized(image_tokenizer, arrays, low).loss,
    }


_F16 = VQGANConfig(quantizer=QuantizerConfig(codebook_size=1024, code_dim=256, update="gradient"))
_F8 = VQGANConfig(
    quantizer=QuantizerConfig(codebook_size=16384, code_dim=4, update="gradient"),
    encoder_multipliers=(1, 2, 2, 4),
    decoder_multipliers=(1, 2, 2, 4),
    encoder_attention_levels=(3,),
    decoder_attention_levels=(3,),
    latent_channels=4,
)
LAYOUT = Layout(
    name="taming",
    build=VQGAN,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={
        "f16, 1024 codes (vqgan_imagenet_f16_1024)": _F16,
        "f16, 16384 codes (vqgan_imagenet_f16_16384)": replace(
            _F16, quantizer=replace(_F16.quantizer, codebook_size=16384)
        ),
        "f8, 16384 codes (OpenImages)": _F8,
        "f8, 256 codes (OpenImages)": replace(_F8, quantizer=replace(_F8.quantizer, codebook_size=256)),
    },
    droppable={
        "loss.": "part of the training loss",
        "colorize": "colours for drawing segmentation maps",
    },
    part_of=("first_stage_model.",),  # in Net2NetTransformer
    container="state_dict",
)
