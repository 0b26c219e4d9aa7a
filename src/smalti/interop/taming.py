"""taming-transformers' VQGAN (CompVis/taming-transformers, taming/models/vqgan.py).

Its variants are put into the form of `VQModel` first. `EMAVQ` differs in training alone. `GumbelVQ` chooses the code k
of the largest w_k · z + b_k, and hands e_k to the decoder: that is the nearest entry (w_k, e_k, s_k) to (z, 0, 0), if
s_k² = C − 2 b_k − |w_k|² − |e_k|² with C so large that none is negative.
Letters: K codebook entries, E code width, Z channels of the latents.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.keys import KeyLayout, KeyMap, check_expressible, learned_codebook, rename_all
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized
from smalti.interop.vqgan_keys import taming_key

CLASS_NAME = "taming.models.vqgan.VQModel"
IMAGE_RANGE = (-1.0, 1.0)
TARGETS = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel", "EMAVQ", "GumbelVQ")
"""Classes whose encoder, decoder and codes are those of `VQModel`, the last one once it is prepared."""
GUMBEL_ONLY = ("kl_weight", "temperature_scheduler_config")
TRAINING_ONLY = (
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "sane_index_shape",
)


def prepare(state: Mapping[str, Tensor], config: dict | None) -> tuple[Mapping[str, Tensor], dict | None]:
    """Weights and config of a variant, or of a `Net2NetTransformer` around one, as those of a `VQModel`."""
    config = _first_stage(config)
    if "quantize.proj.weight" not in state:
        return state, config
    w, b, e = (state.get(f"quantize.{name}") for name in ("proj.weight", "proj.bias", "embed.weight"))
    to_code, from_code = state.get("quant_conv.weight"), state.get("post_quant_conv.weight")
    bias = state.get("quant_conv.bias")
    if w is None or b is None or e is None or to_code is None or from_code is None or bias is None:
        raise InputError(
            "the weights have quantize.proj.weight as GumbelVQ has, but not all of its quantizer's tensors."
        )
    w, b, e = w.double().flatten(1), b.double(), e.double()
    if w.shape[1] != len(to_code) or len(w) != len(e) or len(b) != len(w):
        raise InputError(
            f"quantize.proj.weight is {list(w.shape)}, quantize.embed.weight {list(e.shape)} and quant_conv.weight "
            f"{list(to_code.shape)}; a GumbelVQ has one row of each for every code, as wide as quant_conv's output."
        )
    Z, E = w.shape[1], e.shape[1]
    squares = 2 * b + w.square().sum(1) + e.square().sum(1)
    s = (squares.max() - squares).sqrt()[:, None]
    changed = {
        "quantize.embedding.weight": torch.cat([w, e, s], dim=1).float(),  # (K, Z + E + 1)
        "quant_conv.weight": torch.cat([to_code, to_code.new_zeros(E + 1, *to_code.shape[1:])]),
        "quant_conv.bias": torch.cat([bias, bias.new_zeros(E + 1)]),
        "post_quant_conv.weight": torch.cat(
            [from_code.new_zeros(len(from_code), Z, 1, 1), from_code, from_code.new_zeros(len(from_code), 1, 1, 1)],
            dim=1,
        ),
    }
    others = {key: tensor for key, tensor in state.items() if not key.startswith(("quantize.proj.", "quantize.embed."))}
    return {**others, **changed}, None if config is None else _with_code_dim(config, E, Z + E + 1)


def _first_stage(config: dict | None) -> dict | None:
    """The config of the image tokenizer within that of a transformer on its codes."""
    params = _params(config)
    if params is None or not isinstance(params.get("first_stage_config"), dict):
        return config
    return {"model": params["first_stage_config"]}


def _params(config: dict | None) -> dict[str, Any] | None:
    model = config.get("model") if config is not None else None
    params = model.get("params") if isinstance(model, dict) else config
    return params if isinstance(params, dict) else None


def _with_code_dim(config: dict, given: int, wanted: int) -> dict:
    config = copy.deepcopy(config)
    params = _params(config)
    if params is None or params.get("embed_dim") != given:
        raise InputError(f"the codes are {given} wide in the weights; config has another embed_dim.")
    params["embed_dim"] = wanted
    return config


def key_map(image_tokenizer: VQGAN) -> KeyMap:
    num_levels = len(image_tokenizer.config.decoder_multipliers)
    return rename_all(image_tokenizer, lambda name: taming_key(name, num_levels))


def read_config(config: dict) -> VQGANConfig:
    """Our config from taming's field names: the section `model.params`, or its fields alone."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    params = Fields(config, "config")
    if "model" in config:
        model = params.section("model")
        params = model.section("params")
        target = model.take("target", str, CLASS_NAME)
        if target.rpartition(".")[2] not in TARGETS:
            raise InputError(f"config.model.target is {target}; this kind reads {', '.join(TARGETS)}.")
        model.finish("base_learning_rate")
    quantizer = QuantizerConfig(
        codebook_size=params.take("n_embed", int), code_dim=params.take("embed_dim", int), update="gradient"
    )
    ours = read_network(params.section("ddconfig"), quantizer)
    params.expect("remap", None)
    params.finish(*TRAINING_ONLY, *GUMBEL_ONLY, *HEADER)
    return ours


def read_network(network: Fields, quantizer: AnyQuantizerConfig) -> VQGANConfig:
    """Our config of the section `ddconfig`, with this quantizer. Attention levels follow from `attn_resolutions` as
    they do there: the encoder halves `resolution` rounding down, the decoder doubles what is left."""
    multipliers = network.take_ints("ch_mult", (1, 2, 4, 8))
    resolution = network.take("resolution", int)
    at = network.take_ints("attn_resolutions")
    lowest = len(multipliers) - 1
    side = max(1, resolution >> lowest) << lowest  # the largest that halves evenly from level to level
    in_channels = network.take("in_channels", int)
    network.expect("out_ch", in_channels)
    network.expect("double_z", False)
    ours = VQGANConfig(
        quantizer=quantizer,
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
    network.finish()
    return ours


def write_config(image_tokenizer: VQGAN) -> dict:
    """Taming's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = learned_codebook(ours.quantizer, "taming")
    params = {"embed_dim": codes.code_dim, "n_embed": codes.codebook_size, "ddconfig": write_network(ours)}
    config = {"class": CLASS_NAME, "model": {"params": params}, "image_range": list(IMAGE_RANGE)}
    check_expressible(ours, read_config(config), "taming", "image_size")
    return config


def write_network(ours: VQGANConfig) -> dict:
    """The section `ddconfig` of a config of ours."""
    resolution = ours.image_size[0]
    return {
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
LAYOUT = KeyLayout(
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
        "quantize.embedding.cluster_size": "how EMAVQ's codebook was learned",
        "quantize.embedding.embed_avg": "how EMAVQ's codebook was learned",
    },
    part_of=("first_stage_model.",),  # in Net2NetTransformer
    container="state_dict",
    prepare=prepare,
)
