"""IBQ's image tokenizers (TencentARC/SEED-Voken, src/IBQ/models/ibqgan.py), of which Emu3.5's is one
(baaivision/Emu3.5, src/vision_tokenizer/ibq.py).

The network and its keys are taming's; the code of a latent is the entry with the largest dot product. Emu3.5's code
takes the sizes of its network from the config.yaml beside the weights, so that file is needed for it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import IBQConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.interop import taming
from smalti.interop.fields import HEADER, Fields, check_header
from smalti.interop.keys import KeyLayout, check_expressible
from smalti.interop.verifying import ReferenceArrays, grid_outputs, quantized

CLASS_NAME = "src.IBQ.models.ibqgan.IBQ"
IMAGE_RANGE = (-1.0, 1.0)
TRAINING_ONLY = (
    *taming.TRAINING_ONLY,
    "learning_rate",
    "l2_normalize",
    "cosine_similarity",
    "use_entropy_loss",
    "sample_minimization_weight",
    "batch_maximization_weight",
    "warmup_epochs",
    "scheduler_type",
    "min_learning_rate",
    "gradient_clip_val",
    "resume_lr",
    "lr_drop_epoch",
    "lr_drop_iter",
    "lr_drop_rate",
    "use_ema",
    "use_shared_epoch",
    "stage",
    "sche_type",
    "max_iter",
    "wp",
    "wp0",
    "wpe",
    "wp_iter",
)
"""`l2_normalize` and `cosine_similarity` too: the original takes them and its quantizer reads neither."""


def read_config(config: dict) -> VQGANConfig:
    """Our config from the original's field names: the section `model.init_args`, or its fields alone, as in Emu3.5's
    config.yaml."""
    check_header(config, CLASS_NAME, IMAGE_RANGE)
    params = init_args(config, "IBQ")
    quantizer = IBQConfig(
        codebook_size=params.take("n_embed", int),
        code_dim=params.take("embed_dim", int),
        codebook_weight=params.take("beta", float, 0.25),
        entropy_temperature=params.take("entropy_temperature", float, 0.01),
    )
    ours = taming.read_network(params.section("ddconfig"), quantizer)
    params.expect("remap", None)
    params.finish(*TRAINING_ONLY, *HEADER)
    return ours


def init_args(config: dict, class_name: str) -> Fields:
    """The arguments of the model's class in a config of Lightning's command line, or in the config itself. Raises
    InputError if the config names another class."""
    params = Fields(config, "config")
    if "model" not in config:
        return params
    model = params.section("model")
    path = model.take("class_path", str, class_name)
    if path.rpartition(".")[2] != class_name:
        raise InputError(f"{model.where}.class_path is {path}; this kind reads {class_name}.")
    params = model.section("init_args")
    model.finish()
    return params


def write_config(image_tokenizer: VQGAN) -> dict:
    """The original's field names for the sizes of `image_tokenizer`."""
    ours = image_tokenizer.config
    codes = ours.quantizer
    if not isinstance(codes, IBQConfig):
        raise ValueError(
            "the ibq layout holds a codebook of which the largest dot product is chosen; this tokenizer's codes are "
            f"{codes.kind!r}."
        )
    params = {
        "n_embed": codes.codebook_size,
        "embed_dim": codes.code_dim,
        "beta": codes.codebook_weight,
        "entropy_temperature": codes.entropy_temperature,
        "ddconfig": taming.write_network(ours),
    }
    model = {"class_path": CLASS_NAME, "init_args": params}
    config = {"class": CLASS_NAME, "model": model, "image_range": list(IMAGE_RANGE)}
    check_expressible(ours, read_config(config), "ibq", "image_size")
    return config


def outputs(image_tokenizer: VQGAN, arrays: ReferenceArrays) -> dict[str, Callable[[], Tensor]]:
    low = IMAGE_RANGE[0]
    return {
        **grid_outputs(image_tokenizer, arrays, low, image_tokenizer.config.patch_size),
        "quant_loss": lambda: quantized(image_tokenizer, arrays, low).loss,
    }


_PUBLISHED = VQGANConfig(quantizer=IBQConfig(codebook_size=16384, code_dim=256), num_res_blocks=4)
LAYOUT = KeyLayout(
    name="ibq",
    build=VQGAN,
    read_config=read_config,
    write_config=write_config,
    key_map=taming.key_map,
    outputs=outputs,
    published={
        f"IBQ of {size} codes ({files})": replace(_PUBLISHED, quantizer=IBQConfig(codebook_size=size, code_dim=256))
        for size, files in (
            (1024, "imagenet256_1024.ckpt"),
            (8192, "imagenet256_8192.ckpt"),
            (16384, "imagenet256_16384.ckpt, IBQ_pretrain_16384.ckpt"),
            (262144, "imagenet256_262144.ckpt, IBQ_pretrain_262144.ckpt"),
        )
    },
    droppable={"loss.": "part of the training loss", "colorize": "colours for drawing segmentation maps"},
    container="state_dict",
)
