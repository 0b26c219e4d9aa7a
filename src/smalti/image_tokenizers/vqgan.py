"""VQGAN: a convolutional image tokenizer (Esser et al. 2021, arXiv:2012.09841).

Letters: B batch, C H W image, h w code grid, E code width, D channels inside the network.

Two forms of one network. "llamagen" is LlamaGen's VQ-8 and VQ-16 (Sun et al. 2024, arXiv:2406.06525), which
differ from taming-transformers' models only in where attention stands. "maskgit" is MaskGIT-VQGAN (Chang et
al. 2022, arXiv:2202.04200) as ported in 1d-tokenizer, whose decoder TiTok borrows. Its departures: no
attention, residual convolutions without bias, average pooling, no 1x1 convolutions around the quantizer,
pictures used in [0, 1] as they come, and a shortcut that reads the branch's own output (see `ResidualBlock`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.bounds import MAX_CELLS, check_sizes
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, Quantized, QuantizerConfig, make_quantizer

NORM_GROUPS = 32
LLAMAGEN_QUANTIZER = QuantizerConfig(codebook_size=16384, code_dim=8, update="gradient", l2_normalised=True)


class Reconstructed(NamedTuple):
    """What training needs: the decoded pictures, in [0, 1] but not clamped, and the quantizer's results."""

    images: Float[Tensor, "B C H W"]
    quantized: Quantized


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """`channels` times `encoder_multipliers[i]` is the width at level i, where level 0 has the resolution of
    the picture and each further level half of it; attention stands at the levels listed. `image_size` (rows,
    columns) is only the default: any size that halves evenly from level to level can be encoded.

    With `fold` above 1, blocks of fold x fold pixels become channels before the first convolution and pixels
    again after the last (space to depth, as in Shi et al. 2016, arXiv:1609.05158): level 0 then has 1/fold of the
    picture's rows and columns, where most of the time is spent otherwise.

    With `local`, a code is made from its own patch alone: the encoder's convolutions are 1x1, or 2x2 where it halves,
    each cell is normalised by its own channels, and there is no middle and no attention. Equal patches then have equal
    codes, which a transformer predicts more easily; otherwise the codes of a blank background come to tell of the
    whole picture.
    """

    quantizer: AnyQuantizerConfig = LLAMAGEN_QUANTIZER
    image_size: tuple[int, int] = (256, 256)
    channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_attention_levels: tuple[int, ...] = (4,)
    decoder_attention_levels: tuple[int, ...] = (4,)
    num_res_blocks: int = 2
    decoder_res_blocks: int | None = None
    """Of each level of the decoder; None: `num_res_blocks`, and one more in LlamaGen's form."""
    latent_channels: int = 256
    image_channels: int = 3
    fold: int = 1
    local: bool = False
    dropout: float = 0.0
    resample_with_conv: bool = True
    form: Literal["llamagen", "maskgit"] = "llamagen"

    def __post_init__(self):
        check_sizes(self, "num_res_blocks")
        for name in ("image_size", "encoder_multipliers", "decoder_multipliers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        for name in ("encoder_attention_levels", "decoder_attention_levels"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        for name in ("channels", "num_res_blocks", "latent_channels", "image_channels", "fold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.decoder_res_blocks is not None and self.decoder_res_blocks < 1:
            raise ValueError(f"decoder_res_blocks is {self.decoder_res_blocks}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")
        self._check_levels("encoder", self.encoder_multipliers, self.encoder_attention_levels)
        self._check_levels("decoder", self.decoder_multipliers, self.decoder_attention_levels)
        if self.form not in ("llamagen", "maskgit"):
            raise ValueError(f'form is {self.form!r}; use "llamagen" or "maskgit".')
        if self.form == "maskgit":
            self._check_maskgit()
        if self.local and (self.encoder_attention_levels or self.form == "maskgit"):
            raise ValueError('local needs form "llamagen" and no encoder_attention_levels: attention sees all patches.')
        check_image_size(*self.image_size, self.patch_size, "image_size")

    def _check_levels(self, side: str, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> None:
        for multiplier in (1, *multipliers):
            if multiplier < 1 or multiplier * self.channels % NORM_GROUPS:
                raise ValueError(
                    f"{side}_multipliers {list(multipliers)} times channels {self.channels} gives a width of "
                    f"{multiplier * self.channels}; every width must be a multiple of the {NORM_GROUPS} groups "
                    "of GroupNorm."
                )
        if not multipliers or not all(0 <= level < len(multipliers) for level in attention):
            raise ValueError(
                f"{side}_attention_levels {list(attention)} must lie in 0..{len(multipliers) - 1}, the levels "
                f"of {side}_multipliers {list(multipliers)}."
            )

    def _check_maskgit(self) -> None:
        if self.encoder_attention_levels or self.decoder_attention_levels:
            raise ValueError('form "maskgit" has no attention; leave both lists of attention levels empty.')
        if self.quantizer.code_dim != self.latent_channels:
            raise ValueError(
                f'form "maskgit" quantizes the latents as they are: code_dim {self.quantizer.code_dim} must equal '
                f"latent_channels {self.latent_channels}."
            )

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def patch_size(self) -> int:
        """Pixels per code, along each axis."""
        return self.fold * 2 ** (len(self.encoder_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes for a picture of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def check_image_size(rows: int, columns: int, patch_size: int, name: str) -> None:
    """Raises ValueError if a picture cannot be cut into whole patches, or has more of them than any picture."""
    if rows < 1 or columns < 1 or rows % patch_size or columns % patch_size:
        nearest_rows, nearest_columns = (max(1, round(s / patch_size)) * patch_size for s in (rows, columns))
        raise ValueError(
            f"{name} {rows} x {columns} does not divide into patches of {patch_size} x {patch_size} pixels; "
            f"crop or resize to {nearest_rows} x {nearest_columns}."
        )
    if rows * columns // patch_size**2 > MAX_CELLS:
        raise ValueError(f"{name} {rows} x {columns} has more than {MAX_CELLS} patches of {patch_size} x {patch_size}.")


class GroupNorm(nn.GroupNorm):
    """GroupNorm, in float32 where the CPU is to find gradients: torch's backward pass in bf16 takes 8 to 12 times as
    long (112 ms and 14 ms for 16 maps of 32 x 64 x 64)."""

    def forward(self, input: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        if torch.is_grad_enabled() and input.dtype == torch.bfloat16 and input.device.type == "cpu":
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)


def group_norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class CellNorm(nn.LayerNorm):
    """Normalises the channels of each cell by themselves."""

    def forward(self, input: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


Norm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """GroupNorm, swish, 3x3 convolution, twice, plus the input.

    Where widths differ, a 1x1 convolution brings the input to the new width. In MaskGIT-VQGAN it is applied
    to the branch's output instead and the input is not added at all; its weights were trained that way.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: VQGANConfig,
        norm: Norm = group_norm,
        kernel_size: int = 3,
    ):
        super().__init__()
        self.maskgit = config.form == "maskgit"
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not self.maskgit)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not self.maskgit)
        self.shortcut = None
        if in_channels != out_channels:
            shortcut_in = out_channels if self.maskgit else in_channels
            self.shortcut = nn.Conv2d(shortcut_in, out_channels, 1, bias=not self.maskgit)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B Dout H W"]:
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(self.dropout(F.silu(self.norm2(branch))))
        if self.shortcut is None:
            return x + branch
        return branch + self.shortcut(branch if self.maskgit else x)


class SpatialAttention(nn.Module):
    """Every cell attends to all cells of its picture, with one head as wide as the layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT for layer in (self.q, self.k, self.v))  # (B, H*W, D)
        mixed = attend(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(mixed.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halves rows and columns: pad right and bottom by one, then a 3x3 convolution of stride 2. If `local`, a 2x2
    convolution, which needs no padding."""

    def __init__(self, channels: int, local: bool):
        super().__init__()
        self.padding = 0 if local else 1
        self.conv = nn.Conv2d(channels, channels, 2 + self.padding, stride=2)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D h w"]:
        return self.conv(F.pad(x, (0, self.padding, 0, self.padding)))


class Upsample(nn.Module):
    """Doubles rows and columns by repetition, then smooths by a 3x3 convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D H W"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, then the change of resolution."""

    def __init__(self, widths: list[int], attention: bool, resample: nn.Module, block: Callable[[int, int], nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(block(before, after) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(SpatialAttention(width) if attention else nn.Identity() for width in widths[1:])
        self.resample = resample

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B Dout Hout Wout"]:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Encoder(nn.Module):
    """`levels[0]` has the resolution of the picture."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        maskgit = config.form == "maskgit"
        kernel_size, norm = (1, CellNorm) if config.local else (3, group_norm)
        block = partial(ResidualBlock, config=config, norm=norm, kernel_size=kernel_size)
        widths = [config.channels * multiplier for multiplier in config.encoder_multipliers]
        last = len(widths) - 1
        self.fold = nn.PixelUnshuffle(config.fold)
        pixel_channels = config.image_channels * config.fold**2
        self.conv_in = nn.Conv2d(
            pixel_channels, config.channels, kernel_size, padding=kernel_size // 2, bias=not maskgit
        )
        self.levels = nn.ModuleList()
        before = config.channels
        for i, width in enumerate(widths):
            with_conv = config.resample_with_conv and not maskgit
            halve = Downsample(width, config.local) if with_conv else nn.AvgPool2d(2)
            self.levels.append(
                Level(
                    [before] + [width] * config.num_res_blocks,
                    i in config.encoder_attention_levels,
                    halve if i < last else nn.Identity(),
                    block,
                )
            )
            before = width
        self.mid = nn.Identity() if config.local else middle(before, config)
        self.norm_out = norm(before)
        kernel_size = 1 if maskgit else kernel_size
        self.conv_out = nn.Conv2d(before, config.latent_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = self.conv_in(self.fold(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """`levels[0]` has the resolution of the code grid: the reverse of the encoder's order."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.decoder_multipliers]
        num_blocks = config.decoder_res_blocks or config.num_res_blocks + (config.form == "llamagen")
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.mid = middle(before, config)
        self.levels = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            double = Upsample(width, config.resample_with_conv) if i > 0 else nn.Identity()
            attention = i in config.decoder_attention_levels
            block = partial(ResidualBlock, config=config)
            self.levels.append(Level([before] + [width] * num_blocks, attention, double, block))
            before = width
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, config.image_channels * config.fold**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.fold)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C H W"]:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.unfold(self.conv_out(F.silu(self.norm_out(x))))


def attend(
    q: Float[Tensor, "B N T Dh"], k: Float[Tensor, "B N T Dh"], v: Float[Tensor, "B N T Dh"]
) -> Float[Tensor, "B N T Dh"]:
    """`scaled_dot_product_attention`, in float32 where the CPU is to find gradients: the backward pass of its fused
    kernel takes 7 times as long in bf16 for 64 tokens (69 ms and 9 ms for 32 x 6 heads), as long for 1,024."""
    if torch.is_grad_enabled() and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def middle(channels: int, config: VQGANConfig) -> nn.Sequential:
    """What stands at the lowest resolution between the levels and the code side."""
    if config.form == "maskgit":
        return nn.Sequential(*[ResidualBlock(channels, channels, config) for _ in range(config.num_res_blocks)])
    return nn.Sequential(
        ResidualBlock(channels, channels, config),
        SpatialAttention(channels),
        ResidualBlock(channels, channels, config),
    )


def channels_last_if_bf16(x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """The same values, laid out as convolutions in bf16 like them: VQ-16 encodes 2.8 times as fast on a CPU. In float32
    it would be 1.3 times, but there torch's GroupNorm is less exact in this layout."""
    return x.contiguous(memory_format=torch.channels_last) if x.dtype == torch.bfloat16 else x


class VQGAN(nn.Module):
    """Pictures in [0, 1] to a grid of codes and back. Weights may be bf16; pictures come back in float32."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = make_quantizer(config.quantizer)
        self.to_code: nn.Module = nn.Identity()
        self.from_code: nn.Module = nn.Identity()
        if config.form == "llamagen":
            self.to_code = nn.Conv2d(config.latent_channels, config.quantizer.code_dim, 1)
            self.from_code = nn.Conv2d(config.quantizer.code_dim, config.latent_channels, 1)

    def encode_latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w E"]:
        """What the quantizer is given, not yet normalised. Raises ValueError if H or W does not divide into
        patches of `config.patch_size`."""
        check_image_size(images.shape[-2], images.shape[-1], self.config.patch_size, "picture")
        images = channels_last_if_bf16(images.to(self.encoder.conv_in.weight.dtype))
        if self.config.form == "llamagen":
            images = 2 * images - 1
        return self.to_code(self.encoder(images)).movedim(1, -1)

    def decode_latents(self, latents: Float[Tensor, "B h w E"]) -> Float[Tensor, "B C H W"]:
        """Pictures from quantized latents, float32 on the scale [0, 1], not clamped."""
        latents = latents.to(self.decoder.conv_in.weight.dtype)
        images = self.decoder(self.from_code(latents.movedim(-1, 1))).float()
        return images / 2 + 0.5 if self.config.form == "llamagen" else images

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

    def with_decoder(
        self, multipliers: tuple[int, ...], attention_levels: tuple[int, ...], res_blocks: int | None = None
    ) -> "VQGAN":
        """A copy with the same encoder and codebook, without gradients, and another decoder, as a rule a larger one, of
        as many levels. Codes are unchanged in eval mode (Parti, arXiv:2206.10789, section 2.1).

        A decoder of the same widths, with more blocks or attention, starts as this one is: what is new adds nothing
        yet. Any other is untrained. Raises ValueError for another number of levels.
        """
        if len(multipliers) != len(self.config.decoder_multipliers):
            raise ValueError(
                f"decoder_multipliers {list(multipliers)} are {len(multipliers)} levels; this tokenizer's codes need "
                f"{len(self.config.decoder_multipliers)}."
            )
        config = replace(
            self.config,
            decoder_multipliers=multipliers,
            decoder_attention_levels=attention_levels,
            decoder_res_blocks=res_blocks,
        )
        copy = VQGAN(config).to(self.encoder.conv_in.weight.device)
        for name in ("encoder", "to_code", "quantizer"):
            getattr(copy, name).load_state_dict(getattr(self, name).state_dict())
            getattr(copy, name).requires_grad_(False)
        copy.from_code.load_state_dict(self.from_code.state_dict())
        _begin_as(copy.decoder, self.decoder)
        return copy


def _begin_as(larger: Decoder, smaller: Decoder) -> None:
    """Gives a decoder the weights of one that it holds, and has its other blocks add zero; nothing if it holds none."""
    held, weights = larger.state_dict(), smaller.state_dict()
    if any(name not in held or held[name].shape != weight.shape for name, weight in weights.items()):
        return
    larger.load_state_dict(weights, strict=False)
    for name, module in larger.named_modules():
        last = {ResidualBlock: "conv2", SpatialAttention: "out"}.get(type(module))
        if last is not None and f"{name}.{last}.weight" not in weights:
            for parameter in module.get_submodule(last).parameters():
                nn.init.zeros_(parameter)


PRESETS: dict[str, VQGANConfig] = {
    # 71,883,403 parameters, 16 x 16 pixels per code; LlamaGen, tokenizer/tokenizer_image/vq_model.py
    "vq-16": VQGANConfig(),
    # 70,109,835 parameters, 8 x 8 pixels per code; same source
    "vq-8": VQGANConfig(
        encoder_multipliers=(1, 2, 2, 4),
        decoder_multipliers=(1, 2, 2, 4),
        encoder_attention_levels=(3,),
        decoder_attention_levels=(3,),
    ),
    # 54,515,587 parameters, 16 x 16 pixels per code; 1d-tokenizer, modeling/modules/maskgit_vqgan.py
    "maskgit": VQGANConfig(
        quantizer=QuantizerConfig(codebook_size=1024, code_dim=256, update="gradient"),
        encoder_attention_levels=(),
        decoder_attention_levels=(),
        form="maskgit",
    ),
}
