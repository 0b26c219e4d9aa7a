"""ViT-VQGAN of enhancing-transformers (thuanz123/enhancing-transformers, enhancing/modules/stage1)."""

from collections.abc import Callable

from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vit_vqgan import PRESETS, ViTConfig, ViTVQGAN, ViTVQGANConfig
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.keys import (
    Foreign,
    KeyLayout,
    KeyMap,
    check_expressible,
    first_renamed,
    learned_codebook,
    rename_all,
)
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized

CLASS_NAME = "enhancing.modules.stage1.vitvqgan.ViTVQ"
IMAGE_RANGE = (0.0, 1.0)

RENAMES = (
    (r"^patches_in\.", "encoder.to_patch_embedding.0."),
    (r"^patches_out\.", "decoder.to_pixel.1."),
    (r"^encoder\.positions$", "encoder.en_pos_embedding"),
    (r"^decoder\.positions$", "decoder.de_pos_embedding"),
    (r"^to_code\.", "pre_quant."),
    (r"^from_code\.", "post_quant."),
    (r"^quantizer\.codebook$", "quantizer.embedding.weight"),
    (r"\.blocks\.(\d+)\.attention_norm\.", r".transformer.layers.\1.0.norm."),
    (r"\.blocks\.(\d+)\.attention\.qkv\.", r".transformer.layers.\1.0.fn.to_qkv."),
    (r"\.blocks\.(\d+)\.attention\.out\.", r".transformer.layers.\1.0.fn.to_out."),
    (r"\.blocks\.(\d+)\.mlp_norm\.", r".transformer.layers.\1.1.norm."),
    (r"\.blocks\.(\d+)\.mlp_in\.", r".transformer.layers.\1.1.fn.net.0."),
    (r"\.blocks\.(\d+)\.mlp_out\.", r".transformer.layers.\1.1.fn.net.2."),
    (r"^(encoder|decoder)\.norm\.", r"\1.transformer.norm."),
)


def foreign_key(name: str) -> str:
    return first_renamed(name, RENAMES)


def key_map(image_tokenizer: ViTVQGAN) -> KeyMap:
    renamed = rename_all(image_tokenizer, foreign_key)
    for name in ("encoder.positions", "decoder.positions"):
        renamed[name] = Foreign(renamed[name].key, (1, *renamed[name].shape))
    return renamed


def read_config(config: dict) -> ViTVQGANConfig:
    """Our config from the original's field names: the section `model.params`, or its fields alone. A section
    `quantizer_defaults` beside it holds for what `quantizer` leaves out."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    outer = params = Fields(config, "config")
    defaults = outer.section("quantizer_defaults", {})
    if "model" in config:
        model = outer.section("model")
        params = model.section("params")
        model.finish("target", "base_learning_rate")
    encoder, in_channels = _read_side(params.section("encoder"))
    decoder, out_channels = _read_side(params.section("decoder"))
    if in_channels != out_channels:
        raise InputError(f"encoder.channels is {in_channels} but decoder.channels {out_channels}; they must be equal.")
    ours = ViTVQGANConfig(
        encoder=encoder,
        decoder=decoder,
        quantizer=_read_quantizer(params.section("quantizer"), defaults),
        image_size=params.take_size("image_size"),
        patch_size=params.take_square("patch_size"),
        image_channels=in_channels,
    )
    params.finish("loss", "path", "ignore_keys", "scheduler", "image_key", "quantizer_defaults", *HEADER)
    return ours


def _read_side(side: Fields) -> tuple[ViTConfig, int]:
    ours = ViTConfig(
        width=side.take("dim", int),
        num_layers=side.take("depth", int),
        num_heads=side.take("heads", int),
        head_dim=side.take("dim_head", int, 64),
        mlp_width=side.take("mlp_dim", int),
    )
    channels = side.take("channels", int, 3)
    side.finish()
    return ours, channels


def _read_quantizer(codes: Fields, defaults: Fields) -> QuantizerConfig:
    codes = Fields({**defaults.values, **codes.values}, codes.where)
    ours = QuantizerConfig(
        codebook_size=codes.take("n_embed", int),
        code_dim=codes.take("embed_dim", int),
        update="gradient",
        commitment_weight=codes.take("beta", float, 0.25),
        l2_normalised=codes.take("use_norm", bool, True),
    )
    codes.expect("use_residual", False)
    codes.expect("straight_through", True)
    codes.finish("num_quantizers")  # read only with use_residual
    return ours


def write_config(image_tokenizer: ViTVQGAN) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "vit-vqgan")
    params = {
        "image_size": list(ours.image_size),
        "patch_size": ours.patch_size,
        "encoder": _write_side(ours.encoder, ours.image_channels),
        "decoder": _write_side(ours.decoder, ours.image_channels),
        "quantizer": {
            "embed_dim": codes.code_dim,
            "n_embed": codes.codebook_size,
            "beta": codes.commitment_weight,
            "use_norm": codes.l2_normalised,
        },
    }
    config = {"class": CLASS_NAME, "model": {"params": params}, "image_range": list(IMAGE_RANGE)}
    check_expressible(ours, read_config(config), "vit-vqgan")
    return config


def _write_side(ours: ViTConfig, channels: int) -> dict:
    return {
        "dim": ours.width,
        "depth": ours.num_layers,
        "heads": ours.num_heads,
        "mlp_dim": ours.mlp_width,
        "dim_head": ours.head_dim,
        "channels": channels,
    }


def outputs(image_tokenizer: ViTVQGAN, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    """Latents of this family are listed as (B, h*w, E)."""

    def latents() -> Tensor:
        return image_tokenizer.encode_latents(arrays["image"])

    return {
        **grid_outputs(image_tokenizer, arrays, IMAGE_RANGE[0], image_tokenizer.config.patch_size),
        "encoder_features": lambda: image_tokenizer.encode_features(arrays["image"]).flatten(1, 2),
        "z_e": lambda: latents().flatten(1, 2),
        "z_q": lambda: image_tokenizer.quantizer(latents()).latents.flatten(1, 2),
        "codebook_loss": lambda: quantized(image_tokenizer, arrays, IMAGE_RANGE[0]).loss,
        "en_pos_embedding": lambda: image_tokenizer.encoder.positions[None],
        "de_pos_embedding": lambda: image_tokenizer.decoder.positions[None],
    }


LAYOUT = KeyLayout(
    name="vit-vqgan",
    build=ViTVQGAN,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={
        "vitvqgan-imagenet-small": PRESETS["small"],
        "vitvqgan-imagenet-base": PRESETS["base"],
    },
    droppable={"loss.": "part of the training loss"},
    container="state_dict",
)
