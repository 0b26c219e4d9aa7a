"""TiTok of 1d-tokenizer (bytedance/1d-tokenizer, modeling/titok.py), two-stage and one-stage."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.titok import BASE, LARGE, PRESETS, SMALL, TiTok, TiTokConfig, ViTConfig
from smalti.interop.fields import Fields, check_header
from smalti.interop.keys import (
    Foreign,
    KeyLayout,
    KeyMap,
    check_expressible,
    first_renamed,
    learned_codebook,
    rename_all,
)
from smalti.interop.maskgit_vq import read_sections, write_sections
from smalti.interop.verifying import ReferenceArrays
from smalti.interop.vqgan_keys import maskgit_key

CLASS_NAME = "modeling.titok.TiTok"
IMAGE_RANGE = (0.0, 1.0)
NAMED_SIZES = {"small": SMALL, "base": BASE, "large": LARGE}

RENAMES = (
    (r"^patches_in\.", "encoder.patch_embed."),
    (r"^to_code\.", "encoder.conv_out."),
    (r"^from_code\.", "decoder.decoder_embed."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^proxy_codebook$", "pixel_quantize.embedding.weight"),
    (r"^head\.(hidden|to_pixels)\.", "decoder.ffn.0."),
    (r"^head\.to_logits\.", "decoder.ffn.2."),
    (r"^head\.smooth\.", "decoder.conv_out."),
    (r"\.class_token$", ".class_embedding"),
    (r"\.patch_positions$", ".positional_embedding"),
    (r"\.latent_positions$", ".latent_token_positional_embedding"),
    (r"^(encoder|decoder)\.norm_in\.", r"\1.ln_pre."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.ln_post."),
    (r"\.blocks\.(\d+)\.attention_norm\.", r".transformer.\1.ln_1."),
    (r"\.blocks\.(\d+)\.attention\.qkv\.", r".transformer.\1.attn.in_proj_"),
    (r"\.blocks\.(\d+)\.attention\.out\.", r".transformer.\1.attn.out_proj."),
    (r"\.blocks\.(\d+)\.mlp_norm\.", r".transformer.\1.ln_2."),
    (r"\.blocks\.(\d+)\.mlp_in\.", r".transformer.\1.mlp.c_fc."),
    (r"\.blocks\.(\d+)\.mlp_out\.", r".transformer.\1.mlp.c_proj."),
)


def key_map(image_tokenizer: TiTok) -> KeyMap:
    proxy = image_tokenizer.config.proxy
    num_levels = len(proxy.decoder_multipliers) if proxy is not None else 0

    def foreign_key(name: str) -> str:
        if name.startswith("proxy_decoder."):
            return "pixel_" + maskgit_key(name.removeprefix("proxy_"), num_levels)
        return first_renamed(name, RENAMES)

    renamed = rename_all(image_tokenizer, foreign_key)
    added_axes = {
        "encoder.class_token": lambda shape: (1, *shape),
        "decoder.class_token": lambda shape: (1, *shape),
        "mask_token": lambda shape: (1, 1, *shape),
        "to_code.weight": lambda shape: (*shape, 1, 1),
    }
    for name, foreign_shape in added_axes.items():
        renamed[name] = Foreign(renamed[name].key, foreign_shape(renamed[name].shape))
    return renamed


def read_config(config: dict) -> TiTokConfig:
    """Our config from the original's field names: a section `config` or that section alone. `model_sizes`,
    `pixel_decoder` and `pixel_quantize` beside it replace what the original has fixed in its code."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    outer = Fields(config, "config")
    inner = outer.section("config") if "config" in config else outer
    model = inner.section("model").section("vq_model")
    sizes = {name: _read_size(outer.section("model_sizes"), name) for name in config.get("model_sizes", {})}
    # One switch in the original: the slip in the encoder's layout and the head that predicts proxy codes.
    legacy = model.take("is_legacy", bool, True)
    model.expect("quantize_mode", "vq")
    if model.take("finetune_decoder", bool, True) != legacy:
        raise InputError(
            f"{model.where} has is_legacy {legacy} and finetune_decoder {not legacy}, which is no image tokenizer: "
            "two-stage models have both true, one-stage models both false."
        )
    ours = TiTokConfig(
        encoder=_read_side(model, "enc", sizes),
        decoder=_read_side(model, "dec", sizes),
        num_latents=model.take("num_latent_tokens", int),
        quantizer=QuantizerConfig(
            codebook_size=model.take("codebook_size", int),
            code_dim=model.take("token_size", int),
            update="gradient",
            commitment_weight=model.take("commitment_cost", float, 0.25),
            l2_normalised=model.take("use_l2_norm", bool),
        ),
        image_size=inner.section("dataset").section("preprocessing").take_size("crop_size"),
        target="proxy_codes" if legacy else "pixels",
        proxy=read_sections(outer) if legacy else None,
        mixed_latents=legacy,
    )
    model.finish("clustering_vq")  # how the codebook was trained
    return ours


def _read_size(sizes: Fields, name: str) -> ViTConfig:
    size = sizes.section(name)
    ours = ViTConfig(
        width=size.take("width", int),
        num_layers=size.take("num_layers", int),
        num_heads=size.take("num_heads", int),
        mlp_ratio=size.take("mlp_ratio", float, 4.0),
    )
    size.finish()
    return ours


def _read_side(model: Fields, side: str, sizes: dict[str, ViTConfig]) -> ViTConfig:
    known = {**NAMED_SIZES, **sizes}
    name = model.take(f"vit_{side}_model_size", str)
    if name not in known:
        raise InputError(f"{model.where}.vit_{side}_model_size is {name!r}; known are {', '.join(known)}.")
    return replace(known[name], patch_size=model.take_square(f"vit_{side}_patch_size"))


def write_config(image_tokenizer: TiTok) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "titok")
    legacy = ours.target == "proxy_codes"
    model = {
        "codebook_size": codes.codebook_size,
        "token_size": codes.code_dim,
        "use_l2_norm": codes.l2_normalised,
        "commitment_cost": codes.commitment_weight,
        "vit_enc_model_size": "encoder",
        "vit_dec_model_size": "decoder",
        "vit_enc_patch_size": ours.encoder.patch_size,
        "vit_dec_patch_size": ours.decoder.patch_size,
        "num_latent_tokens": ours.num_latents,
        "finetune_decoder": legacy,
        "is_legacy": legacy,
    }
    config = {
        "class": CLASS_NAME,
        "config": {
            "model": {"vq_model": model},
            "dataset": {"preprocessing": {"crop_size": list(ours.image_size)}},
        },
        "model_sizes": {"encoder": _write_size(ours.encoder), "decoder": _write_size(ours.decoder)},
        **(write_sections(ours.proxy) if ours.proxy is not None else {}),
        "image_range": list(IMAGE_RANGE),
    }
    check_expressible(ours, read_config(config), "titok")
    return config


def _write_size(ours: ViTConfig) -> dict:
    return {
        "width": ours.width,
        "num_layers": ours.num_layers,
        "num_heads": ours.num_heads,
        "mlp_ratio": ours.mlp_ratio,
    }


def outputs(image_tokenizer: TiTok, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    """Latents of this family are listed as (B, E, 1, n), codes as (B, 1, n)."""
    lookup = image_tokenizer.quantizer.lookup

    def codes() -> Tensor:
        return image_tokenizer.encode_images(arrays["image"])

    def proxy_logits(name: str) -> Tensor:
        return image_tokenizer.proxy_logits(lookup(arrays[name]))

    found = {
        "z_e": lambda: image_tokenizer.encode_latents(arrays["image"]).movedim(-1, 1),
        "z_q": lambda: lookup(codes()).movedim(-1, 1),
        "indices": codes,
        "decoded": lambda: image_tokenizer.decode_codes(arrays["indices"]),
        "random_decoded": lambda: image_tokenizer.decode_codes(arrays["random_indices"]),
        "reconstruction": lambda: image_tokenizer.decode_codes(codes()),
    }
    if image_tokenizer.config.target == "proxy_codes":
        found |= {
            "pixel_logits": lambda: proxy_logits("indices"),
            "pixel_latents": lambda: image_tokenizer.proxy_latents(proxy_logits("indices")),
            "random_pixel_logits": lambda: proxy_logits("random_indices"),
            "random_pixel_latents": lambda: image_tokenizer.proxy_latents(proxy_logits("random_indices")),
        }
    return found


LAYOUT = KeyLayout(
    name="titok",
    build=TiTok,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={
        "tokenizer_titok_l32_imagenet": PRESETS["l-32"],
        "tokenizer_titok_b64_imagenet": PRESETS["b-64"],
        "tokenizer_titok_s128_imagenet": PRESETS["s-128"],
        "tokenizer_titok_bl64_vq8k": PRESETS["bl-64"],
        "tokenizer_titok_bl128_vq8k": PRESETS["bl-128"],
        "tokenizer_titok_sl256_vq8k": PRESETS["sl-256"],
    },
    droppable={"quantize.embed_prob": "running use of the codes in training, not a weight"},
)
