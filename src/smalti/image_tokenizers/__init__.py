"""Image tokenizers: pictures to integer codes and back, one file per family, one interface.

Every image tokenizer is an `nn.Module` with `config` (a frozen dataclass with `codebook_size` and `grid`),
`encode_images(images) -> codes` and `decode_codes(codes) -> images`; images are float32 (B, C, H, W) in [0,
1], codes integers (B, h, w) in [0, codebook_size). A folder written by `save_image_tokenizer` holds
`config.json` and `model.safetensors`.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from jaxtyping import Float, Int
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from smalti.errors import InputError
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.image_tokenizers.vqvae import VQVAE, DeepulVQVAE, DeepulVQVAEConfig, VQVAEConfig

FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {
    "vqvae": (VQVAEConfig, VQVAE),
    "deepul_vqvae": (DeepulVQVAEConfig, DeepulVQVAE),
    "vqgan": (VQGANConfig, VQGAN),
    "vit_vqgan": (ViTVQGANConfig, ViTVQGAN),
    "titok": (TiTokConfig, TiTok),
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
    described = {"family": family, "config": asdict(cast(Any, image_tokenizer.config))}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The weights first: without config.json the folder is not yet a tokenizer.
    _replace(directory / "model.safetensors", safetensors.torch.save(weights))
    _replace(directory / "config.json", (json.dumps(described, indent=2) + "\n").encode())


def load_image_tokenizer(directory: Path | str) -> nn.Module:
    """The image tokenizer of a folder, in eval mode on the CPU, in float32 whatever it was stored in.

    Raises InputError naming the file and the field, key or size that does not fit.
    """
    directory = Path(directory)
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    try:
        described = json.loads(config_path.read_bytes())
        family, values = described["family"], described["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read {config_path}: {error}; expected JSON with the keys family and config, "
            "as save_image_tokenizer writes it."
        ) from error
    if family not in FAMILIES:
        raise InputError(f"{config_path}: unknown family {family!r}; known are {', '.join(FAMILIES)}.")
    config_class, module_class = FAMILIES[family]
    image_tokenizer = module_class(config_from_json(config_class, values, str(config_path)))
    try:
        weights = safetensors.torch.load_file(weights_path)
        wanted = image_tokenizer.state_dict()
        weights = {
            name: tensor.to(wanted[name].dtype) if name in wanted else tensor for name, tensor in weights.items()
        }
        image_tokenizer.load_state_dict(weights)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot load {weights_path}: {error}") from error
    return image_tokenizer.eval()


def config_from_json(config_class: type[Any], values: Any, where: str) -> Any:
    """The config dataclass of JSON or YAML values. Raises InputError naming `where`, the field and the
    mend."""
    try:
        config: Any = TypeAdapter(config_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "config"
        raise InputError(f"{where}: {field}: {first['msg']}; found {first['input']!r}.") from error
    known = json.loads(json.dumps(asdict(config)))
    unknown = _unknown_keys(values, known)
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]}; known are {', '.join(known)}.")
    return config


def _unknown_keys(given: dict[str, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    unknown = []
    for name, value in given.items():
        if name not in known:
            unknown.append(prefix + name)
        elif isinstance(value, dict) and isinstance(known[name], dict):
            unknown += _unknown_keys(value, known[name], f"{prefix}{name}.")
    return unknown


def _family_of(image_tokenizer: nn.Module) -> str:
    for family, (_, module_class) in FAMILIES.items():
        if type(image_tokenizer) is module_class:
            return family
    raise ValueError(f"{type(image_tokenizer).__name__} is not an image tokenizer; known are {', '.join(FAMILIES)}.")


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
