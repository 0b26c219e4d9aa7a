"""ViT-VQGAN: a transformer image tokenizer (Yu et al. 2021, arXiv:2110.04627).

Letters: B batch, C H W image, h w patch grid, T = h*w patches, D model width, N heads, Dh head width, E code
width.

The layers follow the one public re-implementation with weights, thuanz123/enhancing-transformers: fixed
sine-cosine positions, pre-norm blocks, tanh in every feed-forward layer, one linear layer on either side of
the codes. The paper instead puts one extra tanh feed-forward layer after the encoder's blocks.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, QuantizerConfig, make_quantizer
from smalti.image_tokenizers.vqgan import Reconstructed, attend, check_image_size


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """One side of the tokenizer, encoder or decoder."""

    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int

    def __post_init__(self):
        check_sizes(self, "num_layers")
        for name in ("num_layers", "num_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.width < 4 or self.width % 4:
            raise ValueError(
                f"width is {self.width}; it must be a multiple of 4, for the sines and cosines of rows and columns."
            )


# Paper, table 2.
SMALL = ViTConfig(width=512, num_layers=8, num_heads=8, head_dim=64, mlp_width=2048)
BASE = ViTConfig(width=768, num_layers=12, num_heads=12, head_dim=64, mlp_width=3072)
LARGE = ViTConfig(width=1280, num_layers=32, num_heads=16, head_dim=80, mlp_width=5120)

FACTORISED_CODES = QuantizerConfig(codebook_size=8192, code_dim=32, update="gradient", l2_normalised=True)


@dataclass(frozen=True, kw_only=True)
class ViTVQGANConfig:
    """`image_size` (rows, columns) is only the default: positions are computed for any grid of patches."""

    encoder: ViTConfig = SMALL
    decoder: ViTConfig = SMALL
    quantizer: AnyQuantizerConfig = FACTORISED_CODES
    image_size: tuple[int, int] = (256, 256)
    patch_size: int = 8
    image_channels: int = 3

    def __post_init__(self):
        check_sizes(self)
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists
        for name in ("patch_size", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        check_image_size(*self.image_size, self.patch_size, "image_size")

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes for a picture of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def position_table(rows: int, columns: int, width: int) -> Float[Tensor, "T D"]:
    """Sines and cosines of the column in the first half of the channels, of the row in the second; quarter
    q = width / 4 frequencies 10000^(-i/q). Computed in float64, so that every caller gets the same
    float32."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row_angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    column_angles = torch.arange(columns, dtype=torch.float64)[:, None] * frequencies
    by_column = torch.cat([column_angles.sin(), column_angles.cos()], dim=-1)  # (w, D/2)
    by_row = torch.cat([row_angles.sin(), row_angles.cos()], dim=-1)  # (h, D/2)
    table = torch.cat([by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)], dim=-1)
    return table.flatten(0, 1).float()


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        # With a single head of full width there is nothing to join; the public code then has no layer here.
        self.out = nn.Linear(inner, config.width) if (inner, config.num_heads) != (config.width, 1) else nn.Identity()

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, N, T, Dh) each
        mixed = attend(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(torch.tanh(self.mlp_in(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Adds positions, then the blocks and a last norm. The table for the default grid is kept with the
    weights."""

    positions: Tensor

    def __init__(self, config: ViTConfig, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.register_buffer("positions", position_table(*grid, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        B, h, w, D = x.shape
        tokens = x.flatten(1, 2) + self._positions_for((h, w))  # (B, T, D)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).view(B, h, w, D)

    def _positions_for(self, grid: tuple[int, int]) -> Float[Tensor, "T D"]:
        if grid == self.grid:
            return self.positions
        rows, columns = self.grid
        D = self.positions.shape[-1]
        if not torch.allclose(self.positions.cpu().float(), position_table(rows, columns, D), atol=1e-2):
            raise ValueError(
                f"these weights hold a position table of their own for a grid of {rows} x {columns} patches, which "
                f"cannot be computed for the {grid[0]} x {grid[1]} asked for; resize the picture."
            )
        return position_table(*grid, D).to(self.positions)


class ViTVQGAN(nn.Module):
    """Pictures in [0, 1] to a grid of codes and back. Weights may be bf16; pictures come back in float32."""

    def __init__(self, config: ViTVQGANConfig):
        super().__init__()
        self.config = config
        C, patch_size = config.image_channels, config.patch_size
        self.patches_in = nn.Conv2d(C, config.encoder.width, patch_size, stride=patch_size)
        self.encoder = Transformer(config.encoder, config.grid)
        self.to_code = nn.Linear(config.encoder.width, config.quantizer.code_dim)
        self.quantizer = make_quantizer(config.quantizer)
        self.from_code = nn.Linear(config.quantizer.code_dim, config.decoder.width)
        self.decoder = Transformer(config.decoder, config.grid)
        self.patches_out = nn.ConvTranspose2d(config.decoder.width, C, patch_size, stride=patch_size)
        self.apply(init_weights)
        # From mid-gray: with the original's start pictures are noise of deviation 1, and all that the first steps would
        # teach the network is to be silent.
        self.patches_out.weight.data.mul_(0.1)
        nn.init.constant_(cast(Tensor, self.patches_out.bias), 0.5)

    def encode_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """What the encoder makes of each patch, before the projection to code width. Raises ValueError if H
        or W does not divide into patches."""
        check_image_size(images.shape[-2], images.shape[-1], self.config.patch_size, "picture")
        patches = self.patches_in(images.to(self.patches_in.weight.dtype))
        return self.encoder(patches.movedim(1, -1))

    def encode_latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w E"]:
        """What the quantizer is given, not yet normalised."""
        return self.to_code(self.encode_features(images))

    def decode_latents(self, latents: Float[Tensor, "B h w E"]) -> Float[Tensor, "B C H W"]:
        """Pictures from quantized latents, float32 on the scale [0, 1], not clamped."""
        x = self.decoder(self.from_code(latents.to(self.from_code.weight.dtype)))
        return self.patches_out(x.movedim(-1, 1)).float()

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

    def with_decoder(self, decoder: ViTConfig) -> "ViTVQGAN":
        """A copy with the same, now frozen, encoder and codebook and a new untrained decoder, often a far
        larger one. Codes are unchanged, so it fits under a generator already trained on them (Parti,
        arXiv:2206.10789, section 2.1)."""
        quantizer, codes = self.config.quantizer, self.quantizer.state_dict()
        if isinstance(quantizer, QuantizerConfig):
            # An EMA codebook would go on moving in training mode, so the copy's is an ordinary parameter.
            quantizer = replace(quantizer, update="gradient", kmeans_rounds=0, restart_below=0.0, new_entries=None)
            codes = {"codebook": codes["codebook"]}
        copy = ViTVQGAN(replace(self.config, quantizer=quantizer, decoder=decoder)).to(self.patches_in.weight.device)
        copy.quantizer.load_state_dict(codes)
        for name in ("patches_in", "encoder", "to_code"):
            getattr(copy, name).load_state_dict(getattr(self, name).state_dict())
        for name in ("patches_in", "encoder", "to_code", "quantizer"):
            getattr(copy, name).requires_grad_(False)
        return copy


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, as in enhancing-transformers."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PRESETS: dict[str, ViTVQGANConfig] = {
    # Encoder-decoder pairs of the paper's sections 3 and 5 (SS, BB, SL), and of two large sides.
    "small": ViTVQGANConfig(encoder=SMALL, decoder=SMALL),  # 50,908,195 parameters
    "base": ViTVQGANConfig(encoder=BASE, decoder=BASE),  # 170,664,483
    "small-large": ViTVQGANConfig(encoder=SMALL, decoder=LARGE),  # 655,430,947
    "large": ViTVQGANConfig(encoder=LARGE, decoder=LARGE),  # 1,259,953,699
}
