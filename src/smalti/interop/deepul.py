"""The VQ-VAE of Berkeley's deep unsupervised learning course (rll/deepul, deepul/models/vqvae.py)."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqvae import DeepulVQVAE, DeepulVQVAEConfig
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
from smalti.interop.verifying import ReferenceArrays

CLASS_NAME = "deepul.models.vqvae.VQVAE"
TOP_LEVEL = 3
"""Colour levels are 0..3."""

RENAMES = (
    (r"^encoder\.(\d+)\.wide\.", r"encoder.conv_stack.\1.stack.0.res_block.1."),
    (r"^encoder\.(\d+)\.back\.", r"encoder.conv_stack.\1.stack.0.res_block.3."),
    (r"^decoder\.(\d+)\.wide\.", r"decoder.inverse_conv_stack.\1.stack.0.res_block.1."),
    (r"^decoder\.(\d+)\.back\.", r"decoder.inverse_conv_stack.\1.stack.0.res_block.3."),
    (r"^encoder\.", "encoder.conv_stack."),
    (r"^decoder\.", "decoder.inverse_conv_stack."),
    (r"^to_code\.", "pre_quantization_conv."),
    (r"^quantizer\.codebook$", "vector_quantization.embedding.weight"),
)


def foreign_key(name: str) -> str:
    return first_renamed(name, RENAMES)


def key_map(image_tokenizer: DeepulVQVAE) -> KeyMap:
    """The one layer of a residual stack is listed once for every time it is used."""
    further = range(1, image_tokenizer.config.residual_layers)
    return {
        name: Foreign(
            key, shape, tuple(key.replace(".stack.0.", f".stack.{i}.") for i in further if ".stack.0." in key)
        )
        for name, (key, shape, _) in rename_all(image_tokenizer, foreign_key).items()
    }


def read_config(config: dict) -> DeepulVQVAEConfig:
    """Our config from the original's field names: a section `args`, or its fields alone."""
    check_header(config, CLASS_NAME, None)
    args = Fields(config, "config")
    args.expect("image_values", list(range(TOP_LEVEL + 1)))
    if "args" in config:
        args = args.section("args")
    ours = DeepulVQVAEConfig(
        width=args.take("h_dim", int),
        residual_width=args.take("res_h_dim", int),
        residual_layers=args.take("n_res_layers", int),
        quantizer=QuantizerConfig(
            codebook_size=args.take("n_embeddings", int),
            code_dim=args.take("embedding_dim", int),
            update="gradient",
            commitment_weight=args.take("beta", float, 0.25),
        ),
    )
    args.finish("save_img_embedding_map", *HEADER)
    return ours


def infer_config(state: Mapping[str, Tensor]) -> DeepulVQVAEConfig:
    """The sizes, all of which show in the shapes of the weights. Raises InputError if a tensor is missing."""
    layers = [key for key in state if re.fullmatch(r"encoder\.conv_stack\.5\.stack\.\d+\.res_block\.1\.weight", key)]
    try:
        codebook_size, code_dim = state["vector_quantization.embedding.weight"].shape
        return DeepulVQVAEConfig(
            width=state["encoder.conv_stack.4.weight"].shape[0],
            residual_width=state["encoder.conv_stack.5.stack.0.res_block.1.weight"].shape[0],
            residual_layers=len(layers),
            quantizer=QuantizerConfig(codebook_size=codebook_size, code_dim=code_dim, update="gradient"),
        )
    except KeyError as error:
        raise InputError(f"the weights have no tensor {error}; check that the kind belongs to this file.") from None


def write_config(image_tokenizer: DeepulVQVAE) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "deepul")
    config = {
        "class": CLASS_NAME,
        "args": {
            "h_dim": ours.width,
            "res_h_dim": ours.residual_width,
            "n_res_layers": ours.residual_layers,
            "n_embeddings": codes.codebook_size,
            "embedding_dim": codes.code_dim,
            "beta": codes.commitment_weight,
        },
        "image_values": list(range(TOP_LEVEL + 1)),
    }
    check_expressible(ours, read_config(config), "deepul", "image_size")
    return config


def outputs(image_tokenizer: DeepulVQVAE, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    """Pictures of this family are listed as (B, H, W, C), with values 0..3."""

    def latents() -> Tensor:
        return image_tokenizer.latents(arrays["image"].movedim(-1, 1) / TOP_LEVEL)

    def codes() -> Tensor:
        return image_tokenizer.quantizer.encode(latents())

    def decode(codes: Tensor) -> Tensor:
        return image_tokenizer.decode_codes(codes).movedim(1, -1) * TOP_LEVEL

    return {
        "z_e": lambda: latents().movedim(-1, 1),
        "z_q": lambda: image_tokenizer.quantizer.lookup(codes()).movedim(-1, 1),
        "indices": codes,
        "decoded": lambda: decode(arrays["indices"]),
        "random_decoded": lambda: decode(arrays["random_indices"]),
        "reconstruction": lambda: decode(codes()),
    }


LAYOUT = KeyLayout(
    name="deepul",
    build=DeepulVQVAE,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    infer_config=infer_config,
)
