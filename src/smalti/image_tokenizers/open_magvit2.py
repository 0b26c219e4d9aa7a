"""Open-MAGVIT2: a convolutional image tokenizer whose codes are signs (Luo et al. 2024, arXiv:2409.04410).

Letters: B batch, C H W image, h w code grid, E code width and bits of a code, D channels inside the network.

MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737) for images, as SEED-Voken builds it
(src/Open_MAGVIT2/modules/diffusionmodules/improved_model.py). It departs from the VQGAN of `vqgan.py` in this: residual
convolutions have no bias, there is no attention, and no 1x1 convolution stands around the quantizer; the decoder is
told the mean and the spread of the picture's code bits at every level (`AdaptiveNorm`), and doubles its resolution by
turning channels into cells.
"""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.bounds import check_sizes
from smalti.image_tokenizers.quantizer import LFQConfig, LookupFreeQuantizer
from smalti.image_tokenizers.vqgan import (
    NORM_GROUPS,
    GroupNorm,
    Level,
    Reconstructed,
    channels_last_if_bf16,
    check_image_size,
    group_norm,
)

SIGNS = LFQConfig(num_bits=18)


@dataclass(frozen=True, kw_only=True)
class OpenMAGVIT2Config:
    """`channels` times `multipliers[i]` is the width at level i, where level 0 has the resolution of the picture and
    each further level half of it. The latents have as many channels as a code has bits. `image_size` (rows, columns)
    is only the default: any size that halves evenly from level to level can be encoded."""

    quantizer: LFQConfig = SIGNS
    image_size: tuple[int, int] = (256, 256)
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    image_channels: int = 3

    def __post_init__(self):
        check_sizes(self, "num_res_blocks")
        for name in ("image_size", "multipliers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        for name in ("channels", "num_res_blocks", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.multipliers:
            raise ValueError("multipliers is empty; give one number for each level, for example (1, 1, 2, 2, 4).")
        for multiplier in (1, *self.multipliers):
            if multiplier < 1 or multiplier * self.channels % NORM_GROUPS:
                raise ValueError(
                    f"multipliers {list(self.multipliers)} times channels {self.channels} gives a width of "
                    f"{multiplier * self.channels}; every width must be a multiple of the {NORM_GROUPS} groups "
                    "of GroupNorm."
                )
        check_image_size(*self.image_size, self.patch_size, "image_size")

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def patch_size(self) -> int:
        """Pixels per code, along each axis."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes for a picture of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]


class BiasFreeBlock(nn.Module):
    """GroupNorm, swish, 3x3 convolution without bias, twice, plus the input; where widths differ, a 1x1 convolution
    brings the input to the new width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B Dout H W"]:
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        return branch + (x if self.shortcut is None else self.shortcut(x))


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift come from the spread and the mean of the latents over the whole picture."""

    def __init__(self, channels: int, code_dim: int):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, channels, eps=1e-6, affine=False)
        self.scale = nn.Linear(code_dim, channels)
        self.shift = nn.Linear(code_dim, channels)

    def forward(self, x: Float[Tensor, "B D H W"], latents: Float[Tensor, "B E h w"]) -> Float[Tensor, "B D H W"]:
        cells = latents.flatten(2)  # (B, E, h*w)
        scale = self.scale((cells.var(-1) + 1e-6).sqrt())
        shift = self.shift(cells.mean(-1))
        return scale[..., None, None] * self.norm(x) + shift[..., None, None]


class ChannelsToCells(nn.Module):
    """Doubles rows and columns: a 3x3 convolution to four times the channels, whose quarters become the four cells of
    each block of 2 x 2. A quarter's channels stand together, where `nn.PixelShuffle` wants those of a cell together."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D H W"]:
        quarters = self.conv(x).unflatten(1, (4, -1))  # (B, 4, D, h, w)
        return F.pixel_shuffle(quarters.transpose(1, 2).flatten(1, 2), 2)


class OpenMAGVIT2Encoder(nn.Module):
    """`levels[0]` has the resolution of the picture."""

    def __init__(self, config: OpenMAGVIT2Config):
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        last = len(config.widths) - 1
        for i, (before, width) in enumerate(pairwise([config.channels, *config.widths])):
            halve = nn.Conv2d(width, width, 3, stride=2, padding=1) if i < last else nn.Identity()
            self.levels.append(Level([before] + [width] * config.num_res_blocks, False, halve, BiasFreeBlock))
        width = config.widths[-1]
        self.mid = nn.Sequential(*[BiasFreeBlock(width, width) for _ in range(config.num_res_blocks)])
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, config.quantizer.code_dim, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class OpenMAGVIT2Decoder(nn.Module):
    """`levels[0]` has the resolution of the code grid: the reverse of the encoder's order."""

    def __init__(self, config: OpenMAGVIT2Config):
        super().__init__()
        code_dim, before = config.quantizer.code_dim, config.widths[-1]
        self.conv_in = nn.Conv2d(code_dim, before, 3, padding=1)
        self.mid = nn.Sequential(*[BiasFreeBlock(before, before) for _ in range(config.num_res_blocks)])
        self.norms, self.levels = nn.ModuleList(), nn.ModuleList()
        for i, width in reversed(list(enumerate(config.widths))):
            double = ChannelsToCells(width) if i > 0 else nn.Identity()
            self.norms.append(AdaptiveNorm(before, code_dim))
            self.levels.append(Level([before] + [width] * config.num_res_blocks, False, double, BiasFreeBlock))
            before = width
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, config.image_channels, 3, padding=1)

    def forward(self, latents: Float[Tensor, "B E h w"]) -> Float[Tensor, "B C H W"]:
        x = self.mid(self.conv_in(latents))
        for norm, level in zip(self.norms, self.levels, strict=True):
            x = level(norm(x, latents))
        return self.conv_out(F.silu(self.norm_out(x)))


class OpenMAGVIT2(nn.Module):
    """Pictures in [0, 1] to a grid of codes and back. Weights may be bf16; pictures come back in float32."""

    def __init__(self, config: OpenMAGVIT2Config):
        super().__init__()
        self.config = config
        self.encoder = OpenMAGVIT2Encoder(config)
        self.decoder = OpenMAGVIT2Decoder(config)
        self.quantizer = LookupFreeQuantizer(config.quantizer)

    def encode_latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w E"]:
        """What the quantizer is given. Raises ValueError if H or W does not divide into patches of
        `config.patch_size`."""
        check_image_size(images.shape[-2], images.shape[-1], self.config.patch_size, "picture")
        images = channels_last_if_bf16(images.to(self.encoder.conv_in.weight.dtype))
        return self.encoder(2 * images - 1).movedim(1, -1)

    def decode_latents(self, latents: Float[Tensor, "B h w E"]) -> Float[Tensor, "B C H W"]:
        """Pictures from quantized latents, float32 on the scale [0, 1], not clamped. Raises ValueError for a single
        code, which has no spread."""
        if latents.shape[1] * latents.shape[2] < 2:
            raise ValueError("a picture of one code cannot be decoded: the decoder needs the spread of two or more.")
        latents = latents.to(self.decoder.conv_in.weight.dtype)
        return self.decoder(latents.movedim(-1, 1)).float() / 2 + 0.5

    def encode_images(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        """Codes of pictures in [0, 1]; h = H / patch_size and w = W / patch_size."""
        return self.quantizer.encode(self.encode_latents(images))

    def decode_codes(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """Pictures on the scale [0, 1], not clamped. Raises ValueError if a code is outside the codebook."""
        return self.decode_latents(self.quantizer.lookup(codes))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Reconstructed:
        """Encode, quantize with straight-through gradients, decode."""
        quantized = self.quantizer(self.encode_latents(images))
        return Reconstructed(self.decode_latents(quantized.latents), quantized)
