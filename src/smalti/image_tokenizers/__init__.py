"""Image tokenizers: pictures to integer codes and back, one file per family, one interface.

Every image tokenizer is an `nn.Module` with `config` (a frozen dataclass with `codebook_size` and `grid`),
`encode_images(images) -> codes` and `decode_codes(codes) -> images`; images are float32 (B, C, H, W) in [0,
1], codes integers (B, h, w) in [0, codebook_size). A folder written by `save_image_tokenizer` holds
`config.json` and `model.safetensors`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.documents import config_of, read_json
from smalti.errors import InputError, first_line, shortened
from smalti.files import new_file, write_json
from smalti.image_tokenizers.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.image_tokenizers.vqvae import VQVAE, DeepulVQVAE, DeepulVQVAEConfig, VQVAEConfig
from smalti.weights import ANEW, BUILD_ERRORS, CONFIG, WEIGHTS, file_sha256, load_module

FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {
    "vqvae": (VQVAEConfig, VQVAE),
    "deepul_vqvae": (DeepulVQVAEConfig, DeepulVQVAE),
    "vqgan": (VQGANConfig, VQGAN),
    "vit_vqgan": (ViTVQGANConfig, ViTVQGAN),
    "titok": (TiTokConfig, TiTok),
    "open_magvit2": (OpenMAGVIT2Config, OpenMAGVIT2),
}
"""The config and the module of each family, under the name that `config.json` bears."""


class ImageTokenizer(Protocol):
    """What every family offers, besides being an `nn.Module`."""

    config: Any

    def encode_images(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]: ...

    def decode_codes(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]: ...


def save_image_tokenizer(image_tokenizer: nn.Module, directory: Path | str, dtype: torch.dtype | None = None) -> None:
    """Writes `config.json` and `model.safetensors` into `directory`, replacing those that are there.

    With `dtype`, for example torch.float16, floating weights are stored in it. Codes can change at near ties
    by that: make token tables with the tokenizer as loaded again.
    """
    family = _family_of(image_tokenizer)
    weights = {
        name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in image_tokenizer.state_dict().items()
    }
    directory = Path(directory)
    # The old config goes first and the new one comes last: in between the folder is no tokenizer.
    if (directory / CONFIG).exists():
        (directory / CONFIG).unlink()
    with new_file(directory / WEIGHTS, force=True) as temporary:
        safetensors.torch.save_file(weights, temporary)
    described = {
        "family": family,
        "config": asdict(cast(Any, image_tokenizer.config)),
        "sha256": file_sha256(directory / WEIGHTS),
    }
    write_json(directory / CONFIG, described, force=True)


def load_image_tokenizer(
    directory: Path | str, *, sha256: object = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The image tokenizer of a folder, in eval mode, in float32 whatever it was stored in. `sha256` is the checksum of
    its weights (default: the one in the folder's config).

    Raises InputError naming the file and the field, key or size that does not fit.
    """
    directory = Path(directory)
    config_path, weights_path = directory / CONFIG, directory / WEIGHTS
    described = read_json(config_path, ANEW)
    family = described.get("family")
    if not isinstance(family, str) or "config" not in described:
        raise InputError(
            f"{config_path} does not describe an image tokenizer: expected the entries family and config, as "
            f"save_image_tokenizer writes them; {ANEW}."
        )
    if family not in FAMILIES:
        raise InputError(f"{config_path}: unknown family {shortened(family)!r}; known are {', '.join(FAMILIES)}.")
    sha256 = described.get("sha256") if sha256 is None else sha256  # folders of an earlier version have none
    config_class, module_class = FAMILIES[family]
    config = config_of(config_class, described["config"], config_path)
    try:
        return load_module(lambda: module_class(config), weights_path, sha256=sha256, device=device).eval()
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"{config_path}: no network can be built of it ({first_line(error)}); {ANEW}.") from error


def _family_of(image_tokenizer: nn.Module) -> str:
    for family, (_, module_class) in FAMILIES.items():
        if type(image_tokenizer) is module_class:
            return family
    raise ValueError(f"{type(image_tokenizer).__name__} is not an image tokenizer; known are {', '.join(FAMILIES)}.")
