"""MaskGIT-VQGAN as ported in 1d-tokenizer (bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py)."""

from collections.abc import Callable

from torch import Tensor

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import PRESETS, VQGAN, VQGANConfig
from smalti.interop.fields import Fields, check_header
from smalti.interop.keys import KeyLayout, KeyMap, check_expressible, learned_codebook, rename_all
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized
from smalti.interop.vqgan_keys import maskgit_key

CLASS_NAME = "modeling.modules.maskgit_vqgan.PretrainedTokenizer"
IMAGE_RANGE = (0.0, 1.0)


def key_map(image_tokenizer: VQGAN) -> KeyMap:
    num_levels = len(image_tokenizer.config.decoder_multipliers)
    return rename_all(image_tokenizer, lambda name: maskgit_key(name, num_levels))


def read_config(config: dict) -> VQGANConfig:
    """Our config from the original's field names, in sections as in TiTok's golden config."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    return read_sections(Fields(config, "config"))


def read_sections(config: Fields) -> VQGANConfig:
    """Our config from the sections `pixel_decoder` and `pixel_quantize`; either may be absent, for the published
    sizes."""
    network = config.section("pixel_decoder", {})
    codes = config.section("pixel_quantize", {})
    multipliers = network.take_ints("channel_mult", (1, 1, 2, 2, 4))
    network.expect("num_resolutions", len(multipliers))
    ours = VQGANConfig(
        quantizer=QuantizerConfig(
            codebook_size=codes.take("num_embeddings", int, 1024),
            code_dim=codes.take("embedding_dim", int, 256),
            update="gradient",
            commitment_weight=codes.take("commitment_cost", float, 0.25),
        ),
        image_size=network.take_size("resolution", 256),
        channels=network.take("hidden_channels", int, 128),
        encoder_multipliers=multipliers,
        decoder_multipliers=multipliers,
        encoder_attention_levels=(),
        decoder_attention_levels=(),
        num_res_blocks=network.take("num_res_blocks", int, 2),
        latent_channels=network.take("z_channels", int, 256),
        image_channels=network.take("num_channels", int, 3),
        dropout=network.take("dropout", float, 0.0),
        form="maskgit",
    )
    network.finish()
    codes.finish()
    return ours


def write_config(image_tokenizer: VQGAN) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    config = {"class": CLASS_NAME, **write_sections(image_tokenizer.config), "image_range": list(IMAGE_RANGE)}
    check_expressible(image_tokenizer.config, read_config(config), "maskgit-vq")
    return config


def write_sections(ours: VQGANConfig) -> dict:
    codes = learned_codebook(ours.quantizer, "maskgit-vq")
    return {
        "pixel_decoder": {
            "channel_mult": list(ours.decoder_multipliers),
            "num_resolutions": len(ours.decoder_multipliers),
            "dropout": ours.dropout,
            "hidden_channels": ours.channels,
            "num_channels": ours.image_channels,
            "num_res_blocks": ours.num_res_blocks,
            "resolution": list(ours.image_size),
            "z_channels": ours.latent_channels,
        },
        "pixel_quantize": {
            "num_embeddings": codes.codebook_size,
            "embedding_dim": codes.code_dim,
            "commitment_cost": codes.commitment_weight,
        },
    }


def outputs(image_tokenizer: VQGAN, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    low = IMAGE_RANGE[0]
    return {
        **grid_outputs(image_tokenizer, arrays, low, image_tokenizer.config.patch_size),
        "codebook_loss": lambda: quantized(image_tokenizer, arrays, low).loss,
    }


LAYOUT = KeyLayout(
    name="maskgit-vq",
    build=VQGAN,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={"maskgit-vqgan-imagenet-f16-256.bin": PRESETS["maskgit"]},
)
