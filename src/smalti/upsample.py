"""Super-resolution behind an image tokenizer's decoder: pictures made 2 or 4 times as large.

WDSR-A (Yu et al. 2018, arXiv:1808.08718): residual blocks of two 3×3 convolutions around one wide ReLU, weight norm on
every convolution (Salimans and Kingma 2016, arXiv:1602.07868), pixels shuffled out of channels at the end, and a global
skip of one 5×5 convolution. With 128 channels, 12 blocks and an expansion of 4 it has 14.2 million parameters, about
what Parti says of its own (arXiv:2206.10789, section 2.1: 15 million, 12 blocks, 128 channels).

It is trained on what a frozen image tokenizer rebuilds, so it mends what that one does to pictures as well. A folder
written by `save_upsampler` holds `config.json` and `model.safetensors`, as an image tokenizer's does.

Letters: B batch, C H W image, D channels inside, s scale.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from smalti.bounds import check_sizes
from smalti.documents import config_of, read_json
from smalti.errors import InputError, first_line
from smalti.files import new_file, write_json
from smalti.weights import ANEW, BUILD_ERRORS, CONFIG, WEIGHTS, file_sha256, load_module, save_weights

FAMILY = "wdsr"
SCALES = (2, 4)


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """`image_size` (rows, columns) is that of the pictures it takes. Any size can be computed, but what is learned of a
    tokenizer's pictures at one size holds for no other. `mean` is subtracted from pictures in [0, 1], by channel."""

    image_size: tuple[int, int]
    scale: int = 2
    width: int = 128
    num_blocks: int = 12
    expansion: int = 4
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("image_size", "mean"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        check_sizes(self, "num_blocks")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale}; expected {' or '.join(map(str, SCALES))}.")
        for name in ("width", "num_blocks", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; expected rows and columns of at least 1.")
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean is {self.mean}; expected values of pictures in [0, 1].")

    @property
    def output_size(self) -> tuple[int, int]:
        """Rows and columns of what comes out."""
        return self.image_size[0] * self.scale, self.image_size[1] * self.scale


def _convolution(
    channels_in: int, channels_out: int, size: int, padding_mode: Literal["zeros", "replicate"] = "zeros"
) -> nn.Conv2d:
    plain = nn.Conv2d(channels_in, channels_out, size, padding=size // 2, padding_mode=padding_mode)
    return cast(nn.Conv2d, weight_norm(plain))


class Block(nn.Module):
    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.widen = _convolution(config.width, config.width * config.expansion, 3)
        self.narrow = _convolution(config.width * config.expansion, config.width, 3)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x + self.narrow(F.relu(self.widen(x)))


class Upsampler(nn.Module):
    """Pictures in [0, 1] to pictures `scale` times as large, on the same scale, not clamped."""

    mean: Tensor

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        s = config.scale
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.head = _convolution(3, config.width, 3)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.tail = _convolution(config.width, 3 * s * s, 3)
        self.skip = _convolution(3, 3 * s * s, 5, padding_mode="replicate")
        self._start_from_bicubic()

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 sH sW"]:
        centred = images - self.mean
        x = self.head(centred)
        for block in self.blocks:
            x = block(x)
        return F.pixel_shuffle(self.tail(x) + self.skip(centred), self.config.scale).float() + self.mean

    def _start_from_bicubic(self) -> None:
        """The skip begins as bicubic interpolation, and what the blocks add to it is small. The published network
        begins at random, and learns that first."""
        kernel = bicubic_kernel(self.config.scale)
        weight = torch.zeros(3, len(kernel), 3, 5, 5)
        for channel in range(3):
            weight[channel, :, channel] = kernel
        self.skip.weight = weight.flatten(0, 1)
        nn.init.zeros_(cast(Tensor, self.skip.bias))
        self.tail.weight = self.tail.weight.detach() * 0.1
        nn.init.zeros_(cast(Tensor, self.tail.bias))

    @torch.inference_mode()
    def upsample(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 sH sW"]:
        """Pictures one by one, so that none depends on the others, clamped to [0, 1]. Raises InputError for pictures of
        another size than it was trained for."""
        check_input_size(self.config, (images.shape[2], images.shape[3]))
        with parametrize.cached():  # the norms of all weights are computed once
            return torch.cat([self(image[None].clamp(0, 1)) for image in images]).clamp(0, 1)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def bicubic_kernel(scale: int) -> Float[Tensor, "s2 5 5"]:
    """The taps of bicubic interpolation (Keys 1981, a = −1/2, as Pillow has it) for each of the scale² pixels that one
    becomes, row by row."""
    places = (torch.arange(scale) + 0.5) / scale - 0.5
    distance = (torch.arange(-2, 3)[None] - places[:, None]).abs()  # (s, 5)
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    return (taps[:, None, :, None] * taps[None, :, None, :]).flatten(0, 1)


def check_input_size(config: UpsamplerConfig, size: tuple[int, int], where: str = "pictures") -> None:
    """Raises InputError for a size (rows, columns) that an upsampler was not trained for."""
    if size != config.image_size:
        takes = " × ".join(map(str, config.image_size))
        raise InputError(
            f"{where} of {size[0]} × {size[1]} pixels, and this upsampler (×{config.scale}) takes {takes}; give one "
            "that was trained for them: smalti train upsampler."
        )


def upsample_chain(upsamplers: Sequence[Upsampler], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 sH sW"]:
    """Pictures through several, 256 → 512 → 1024 say. Raises InputError where one does not take what another gives."""
    size = images.shape[2], images.shape[3]
    for upsampler in upsamplers:
        check_input_size(upsampler.config, size)
        size = upsampler.config.output_size
    for upsampler in upsamplers:
        images = upsampler.upsample(images)
    return images


def save_upsampler(upsampler: Upsampler, directory: Path | str, *, half: bool = False) -> None:
    """Writes `config.json` and `model.safetensors` into `directory`, replacing those that are there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)  # in between the folder is none
    with new_file(directory / WEIGHTS, force=True) as temporary:
        save_weights({name: t.detach().cpu() for name, t in upsampler.state_dict().items()}, temporary, half=half)
    described = {"family": FAMILY, "config": asdict(upsampler.config), "sha256": file_sha256(directory / WEIGHTS)}
    write_json(directory / CONFIG, described, force=True)


def load_upsampler(directory: Path | str, *, sha256: object = None, device: torch.device | str = "cpu") -> Upsampler:
    """Reads a folder that `save_upsampler` wrote, in float32 and eval mode. Raises InputError naming what is missing or
    damaged."""
    path = find_upsampler(directory) / CONFIG
    described: dict[str, Any] = read_json(path, ANEW)
    if described.get("family") != FAMILY or "config" not in described:
        raise InputError(f"{path} does not describe an upsampler: expected the entries family {FAMILY!r} and config.")
    config = config_of(UpsamplerConfig, described["config"], path)
    sha256 = described.get("sha256") if sha256 is None else sha256
    try:
        return load_module(lambda: Upsampler(config), path.with_name(WEIGHTS), sha256=sha256, device=device).eval()
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"{path}: no network can be built of it ({first_line(error)}); {ANEW}.") from error


def find_upsampler(directory: Path | str) -> Path:
    """The folder of the upsampler that a folder is or, as a bundle or a training run, holds."""
    directory = Path(directory)
    inner = directory / "upsampler"
    found = inner if inner.is_dir() else directory
    if not (found / CONFIG).is_file():
        raise InputError(
            f"{directory} holds no upsampler; give a folder with {CONFIG} and {WEIGHTS}, a bundle that has one, or the "
            "output folder of smalti train upsampler."
        )
    return found


PRESETS: dict[str, UpsamplerConfig] = {
    # Parti, section 2.1: about 15 million parameters for 256 → 512. Two of them in a row, for 1024, are its 30 million.
    "parti-512": UpsamplerConfig(image_size=(256, 256), scale=2),  # 14,189,620 parameters
    "parti-1024": UpsamplerConfig(image_size=(512, 512), scale=2),
}
