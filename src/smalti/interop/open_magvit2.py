"""Open-MAGVIT2's image tokenizers (TencentARC/SEED-Voken, src/Open_MAGVIT2/models/lfqgan.py).

There is no codebook in the weights: bit j of a code is the sign of channel j.
"""

from collections.abc import Callable

from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from smalti.image_tokenizers.quantizer import LFQConfig
from smalti.interop import ibq
from smalti.interop.fields import HEADER, check_header
from smalti.interop.keys import KeyLayout, KeyMap, check_expressible, rename_all
from smalti.interop.verifying import ReferenceArrays, grid_outputs
from smalti.interop.vqgan_keys import open_magvit2_key

CLASS_NAME = "src.Open_MAGVIT2.models.lfqgan.VQModel"
IMAGE_RANGE = (-1.0, 1.0)
TRAINING_ONLY = (*ibq.TRAINING_ONLY, "factorized_bits")
"""`factorized_bits` is for the transformer alone, which draws a code in two parts."""


def key_map(image_tokenizer: OpenMAGVIT2) -> KeyMap:
    num_levels = len(image_tokenizer.config.multipliers)
    return rename_all(image_tokenizer, lambda name: open_magvit2_key(name, num_levels))


def read_config(config: dict) -> OpenMAGVIT2Config:
    """Our config from the original's field names: the section `model.init_args`, or its fields alone."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    params = ibq.init_args(config, "VQModel")
    network = params.section("ddconfig")
    codes = LFQConfig(num_bits=network.take("z_channels", int))
    for name, wanted in (("embed_dim", codes.num_bits), ("n_embed", codes.codebook_size)):
        if (found := params.take(name, int)) != wanted:
            raise InputError(f"{params.where}.{name} is {found}, but {codes.num_bits} channels of signs make {wanted}.")
    multipliers = network.take_ints("ch_mult", (1, 2, 2, 4))
    side = _size_of_data(config) or network.take("resolution", int)
    in_channels = network.take("in_channels", int)
    network.expect("out_ch", in_channels)
    ours = OpenMAGVIT2Config(
        quantizer=codes,
        image_size=(side, side),
        channels=network.take("ch", int),
        multipliers=multipliers,
        num_res_blocks=network.take("num_res_blocks", int),
        image_channels=in_channels,
    )
    network.finish("resolution", "double_z")
    params.finish(*TRAINING_ONLY, "token_factorization", *HEADER)
    return ours


def _size_of_data(config: dict) -> int | None:
    """The side of the pictures that a training config reads. Those for 256 x 256 give a resolution of 128, which
    nothing there uses."""
    section: object = config
    for name in ("data", "init_args", "validation", "params", "config", "size"):
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, int) and not isinstance(section, bool) else None


def write_config(image_tokenizer: OpenMAGVIT2) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    network = {
        "double_z": False,
        "z_channels": ours.quantizer.num_bits,
        "resolution": ours.image_size[0],
        "in_channels": ours.image_channels,
        "out_ch": ours.image_channels,
        "ch": ours.channels,
        "ch_mult": list(ours.multipliers),
        "num_res_blocks": ours.num_res_blocks,
    }
    params = {"n_embed": ours.codebook_size, "embed_dim": ours.quantizer.num_bits, "ddconfig": network}
    model = {"class_path": CLASS_NAME, "init_args": params}
    config = {"class": CLASS_NAME, "model": model, "image_range": list(IMAGE_RANGE)}
    check_expressible(ours, read_config(config), "open-magvit2", "image_size")
    return config


def outputs(image_tokenizer: OpenMAGVIT2, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    return grid_outputs(image_tokenizer, arrays, IMAGE_RANGE[0], image_tokenizer.config.patch_size)


LAYOUT = KeyLayout(
    name="open-magvit2",
    build=OpenMAGVIT2,
    read_config=read_config,
    write_config=write_config,
    key_map=key_map,
    outputs=outputs,
    published={
        "256 x 256, 262144 codes (imagenet_256_L.ckpt, pretrain256_262144.ckpt)": OpenMAGVIT2Config(),
        "256 x 256, 16384 codes (pretrain256_16384.ckpt)": OpenMAGVIT2Config(quantizer=LFQConfig(num_bits=14)),
        "128 x 128, 262144 codes (imagenet_128_L.ckpt)": OpenMAGVIT2Config(
            image_size=(128, 128), multipliers=(1, 2, 2, 4)
        ),
    },
    droppable={"loss.": "part of the training loss", "colorize": "colours for drawing segmentation maps"},
    container="state_dict",
)
