"""VQ-VAE: small pictures to a grid of codes and back (van den Oord et al. 2017, arXiv:1711.00937).

Letters: B batch, C H W image, h w code grid, N heads, Dh head width, D width, E code width, L levels of a
channel.

`VQVAE` is ours: each patch becomes one latent; encoder and decoder mix neighbours by a depthwise convolution
and all cells by attention; the decoder paints each patch from a few colours of its own, mixed pixel by pixel.
`DeepulVQVAE` is the network of Berkeley CS294-158 (spring 2024, homework 1), layer by layer, for its
published weights.

For pictures of two flat colours, `two_colours` codes the shape and the colours apart. Without it the codes
name a piece of shape in its colours: on coloured digits, after 2,600 steps, no code was the same for one
shape in two pairs of far colours, and the entropies of the 49 codes added up to 299 nats, against 100 when
coded apart. `palette` does so for up to that many flat colours; docs/compositionality.md has what it changes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.bounds import MAX_CELLS, check_sizes
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, Quantized, QuantizerConfig, make_quantizer

MAX_COLOURS = 4096
"""Colours of `palette` that are counted in each picture at most."""


class Reconstructed(NamedTuple):
    """What training needs: the loss of the picture, and the quantizer's output with its losses."""

    reconstruction_loss: Float[Tensor, ""]
    quantized: Quantized


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """A square picture of `image_size`, cut in patches of `patch_size`, one code each.

    With `levels` L > 0, channel values are the L numbers k / (L - 1), k = 0..L-1: the decoder gives each
    channel of each pixel a distribution over them, and the loss is its cross-entropy in nats per dim. With 0,
    values are any numbers in [0, 1] and the loss is their mean squared error. `width` is that of a cell in
    the network.

    `two_colours` is for pictures of two flat colours on a grid whose top corners are plain: those two codes
    carry the more frequent colour (left) and the rarer one (right), all others only which pixels have the
    rarer colour. Of other pictures it keeps no more than these two parts and their mean colours.

    `palette` M > 0 does the same for pictures of up to M flat colours whose first M cells are plain: these carry the
    colours, in the order in which they first appear, all others only which pixel has which of them. Of other pictures
    it keeps the M most frequent colours.
    """

    image_size: int = 28
    patch_size: int = 4
    channels: int = 3
    levels: int = 4
    width: int = 128
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    num_heads: int = 4
    two_colours: bool = False
    palette: int = 0
    quantizer: AnyQuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self):
        check_sizes(self, "encoder_blocks", "decoder_blocks")
        for name in ("image_size", "patch_size", "channels", "width", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.image_size % self.patch_size:
            good = self.image_size // self.patch_size * self.patch_size or self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; "
                f"use {good} or another multiple of {self.patch_size}."
            )
        if (self.image_size // self.patch_size) ** 2 > MAX_CELLS:
            raise ValueError(f"image_size {self.image_size} has more than {MAX_CELLS} patches of {self.patch_size}.")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}.")
        if self.levels < 0 or self.levels == 1:
            raise ValueError(f"levels is {self.levels}; use 0 for continuous values or at least 2.")
        if self.two_colours and self.image_size == self.patch_size:
            raise ValueError("two_colours needs at least two columns of codes; use a smaller patch_size.")
        if self.palette:
            self._check_palette()
        if self.encoder_blocks < 0 or self.decoder_blocks < 0:
            raise ValueError(f"there cannot be {min(self.encoder_blocks, self.decoder_blocks)} blocks.")

    def _check_palette(self) -> None:
        if self.two_colours:
            raise ValueError("two_colours and palette are two ways to code colours apart; give one of them.")
        if not 2 <= self.palette <= self.grid[1]:
            raise ValueError(
                f"palette is {self.palette}; expected 0, or 2 to {self.grid[1]}, the columns of codes, whose first row "
                "carries the colours."
            )
        if not 2 <= self.levels**self.channels <= MAX_COLOURS:
            raise ValueError(
                f"palette needs flat colours: levels {self.levels} of {self.channels} channels are not 2 to "
                f"{MAX_COLOURS:,} colours; use fewer levels, but not 0."
            )

    @property
    def colour_cells(self) -> list[int]:
        """Columns of the first row whose codes carry a colour each, if colours are coded apart."""
        return [0, -1] if self.two_colours else list(range(self.palette))

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def colours_per_cell(self) -> int:
        """How many colours each cell of the decoder proposes; two cells together make those of two-colour
        pictures."""
        return 1 if self.colour_cells else 4

    @property
    def colours_mixed(self) -> int:
        """Of how many colours the decoder mixes a pixel."""
        return len(self.colour_cells) or 4

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.image_size // self.patch_size
        return side, side


class Block(nn.Module):
    """Neighbours, then all cells, then each cell by itself, each added to the residual stream."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        # Each block starts as the identity: the first k-means then sees patches, not random mixtures of them.
        for last in (self.local, self.attention_out, self.mlp_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(Tensor, last.bias))

    def forward(self, x: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        x = x + self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.attention_out(self._attend(self.attention_norm(x)))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        B, h, w, D = x.shape
        q, k, v = self.qkv(x).view(B, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, N, h*w, Dh)
        # Written out: at 49 cells in bf16 on a CPU, training is 1.4 to 2.5 times as fast as with the fused
        # kernel.
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).reshape(B, h, w, D)


class VQVAE(nn.Module):
    """The image tokenizer for small pictures. Images are (B, C, H, W) in [0, 1], codes (B, h, w) in [0,
    K)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        D, E = config.width, config.quantizer.code_dim
        seen = 1 if config.two_colours else config.palette or config.channels
        self.patches_in = nn.Linear(seen * config.patch_size**2, D)
        if config.colour_cells:
            self.colours_in = nn.Sequential(nn.Linear(config.channels, D), nn.GELU(), nn.Linear(D, D))
        self.encoder = nn.Sequential(*(Block(D, config.num_heads) for _ in range(config.encoder_blocks)))
        self.encoder_norm = nn.LayerNorm(D)
        self.to_code = nn.Linear(D, E)
        self.quantizer = make_quantizer(config.quantizer)
        self.from_code = nn.Linear(E, D)
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(*config.grid, D))
        self.decoder = nn.Sequential(*(Block(D, config.num_heads) for _ in range(config.decoder_blocks)))
        self.decoder_norm = nn.LayerNorm(D)
        self.palette = nn.Linear(D, config.colours_per_cell * config.channels * max(config.levels, 1))
        self.mixture = nn.Linear(D, config.colours_mixed * config.patch_size**2)

    def encode_images(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        """The codes of pictures in [0, 1]. Raises ValueError if their size is not the one of the config."""
        return self.quantizer.encode(self._latents(images))

    def decode_codes(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """The pictures of codes: the most likely level, k / (L - 1); without levels the number itself, not
        clamped."""
        outputs = self._outputs(self.quantizer.lookup(codes))
        if self.config.levels:
            return outputs.argmax(2) / (self.config.levels - 1)
        return outputs.squeeze(2).float()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Reconstructed:
        quantized = self.quantizer(self._latents(images))
        outputs = self._outputs(quantized.latents)
        if self.config.levels:
            levels = (images * (self.config.levels - 1)).round().long()
            loss = F.cross_entropy(outputs.flatten(0, 1).float(), levels.flatten(0, 1))
        else:
            loss = F.mse_loss(outputs.squeeze(2).float(), images)
        return Reconstructed(loss, quantized)

    def _latents(self, images: Tensor) -> Float[Tensor, "B h w E"]:
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {tuple(images.shape)}; expected (B, {', '.join(map(str, expected))}).")
        (h, w), p = config.grid, config.patch_size
        if config.two_colours:
            shape, colours = split_two_colours(images)
        elif config.palette:
            shape, colours = split_palette(images, config.palette, config.levels)
        else:
            shape, colours = images, None
        patches = (2 * shape - 1).view(len(images), -1, h, p, w, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        cells = self.encoder(self.patches_in(patches))  # (B, h, w, D)
        if colours is not None:
            coloured = self.colours_in(2 * colours - 1).to(cells.dtype)  # (B, 2 or M, D)
            if config.two_colours:
                top = torch.cat([coloured[:, :1], cells[:, 0, 1:-1], coloured[:, 1:]], dim=1)
            else:
                top = torch.cat([coloured, cells[:, 0, config.palette :]], dim=1)
            cells = torch.cat([top[:, None], cells[:, 1:]], dim=1)
        return self.to_code(self.encoder_norm(cells))

    def _outputs(self, latents: Tensor) -> Float[Tensor, "B C L H W"]:
        """Logits of the levels, or with no levels the value itself as L = 1."""
        config = self.config
        cells = self.from_code(latents)  # (B, h, w, D)
        # In the dtype autocast chose: one float32 addend would turn the whole residual stream to float32.
        cells = self.decoder(cells + self.decoder_positions.to(cells.dtype))
        cells = self.decoder_norm(cells)
        mixture = self.mixture(cells).unflatten(-1, (config.patch_size, config.patch_size, config.colours_mixed))
        mixture = mixture.permute(0, 5, 1, 3, 2, 4)  # (B, M, h, p, w, p), M colours mixed
        if config.colour_cells:
            # One product for the whole picture, with pixels innermost: softmax and cross-entropy over rows of 2 and 4
            # numbers were a quarter of a step without blocks.
            shares = mixture.reshape(len(cells), config.colours_mixed, -1).softmax(1)  # (B, M, H * W)
            palette = self.palette(cells[:, 0, config.colour_cells]).transpose(1, 2)  # (B, C * L, M)
            outputs = palette @ shares.to(palette.dtype)
        else:
            palette = self.palette(cells).unflatten(-1, (config.colours_per_cell, -1))  # (B, h, w, M, C * L)
            shares = mixture.softmax(1).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)  # (B, h, w, p * p, M)
            outputs = (shares.to(palette.dtype) @ palette).unflatten(3, (config.patch_size, config.patch_size))
            outputs = outputs.permute(0, 5, 1, 3, 2, 4)  # (B, C * L, h, p, w, p)
        size = (config.image_size, config.image_size)
        return outputs.reshape(len(cells), config.channels, max(config.levels, 1), *size)


def split_two_colours(
    images: Float[Tensor, "B C H W"],
) -> tuple[Float[Tensor, "B 1 H W"], Float[Tensor, "B 2 C"]]:
    """Which pixels have the rarer colour (1, others 0), and the two colours, the more frequent one first.

    Exact for pictures of two colours: with a share f of the rarer colour, a pixel's squared distance from the
    mean colour is proportional to (1 - f)^2 for that colour and to f^2 for the other, and the mean of all
    lies between.
    """
    distances = (images - images.mean((2, 3), keepdim=True)).square().sum(1, keepdim=True)
    rare = (distances > distances.mean((2, 3), keepdim=True) + 1e-8).to(images.dtype)
    colours = [(images * side).sum((2, 3)) / side.sum((2, 3)).clamp(min=1) for side in (1 - rare, rare)]
    return rare, torch.stack(colours, dim=1)


def split_palette(
    images: Float[Tensor, "B C H W"], num_colours: int, levels: int
) -> tuple[Float[Tensor, "B M H W"], Float[Tensor, "B M C"]]:
    """Which pixels have which of the M most frequent colours of their picture (1, others 0), and these colours, in the
    order in which they first appear, row by row. Pixels of further colours have the nearest of them; where there are
    fewer, the first stands in the places left, and no pixel has it.
    """
    B, C, H, W = images.shape
    values = (images.clamp(0, 1) * (levels - 1)).round().long().flatten(2)  # (B, C, H * W)
    weights = levels ** torch.arange(C, device=images.device)
    packed = (values * weights[:, None]).sum(1)
    counts = torch.zeros(B, levels**C, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, packed, torch.ones_like(packed))
    places = torch.arange(H * W, device=images.device).expand(B, -1)
    first = torch.full_like(counts, H * W).scatter_reduce(1, packed, places, "amin")
    frequent, chosen = counts.topk(num_colours, dim=1)
    order = first.gather(1, chosen).argsort(1)
    chosen, present = chosen.gather(1, order), frequent.gather(1, order) > 0
    chosen = torch.where(present, chosen, chosen[:, :1])
    colours = (chosen[..., None] // weights % levels).to(images.dtype) / (levels - 1)  # (B, M, C)
    # Distances are taken of every colour there can be, not of every pixel: these are fewer.
    every = torch.arange(levels**C, device=images.device)[:, None] // weights % levels  # (L ** C, C)
    distances = (every.to(images.dtype) / (levels - 1) - colours[:, :, None]).square().sum(-1)  # (B, M, L ** C)
    nearest = distances.masked_fill(~present[..., None], torch.inf).argmin(1).gather(1, packed)  # (B, H * W)
    shape = (nearest[:, None] == torch.arange(num_colours, device=images.device)[:, None]).to(images.dtype)
    return shape.view(B, num_colours, H, W), colours


@dataclass(frozen=True, kw_only=True)
class DeepulVQVAEConfig:
    """Sizes of the homework's network. The original's names are h_dim, res_h_dim, n_res_layers, and inside
    the quantizer n_embeddings, embedding_dim and beta. `image_size` is only that of `grid`: any multiple of 4
    goes in.
    """

    width: int = 128
    residual_width: int = 32
    residual_layers: int = 2
    image_size: int = 28
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(update="gradient"))

    def __post_init__(self):
        check_sizes(self, "residual_layers")
        for name in ("width", "residual_width", "residual_layers", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if (self.image_size // 4) ** 2 > MAX_CELLS:
            raise ValueError(f"image_size is {self.image_size}; at most {MAX_CELLS} patches of 4 are possible.")
        if self.width % 2 or self.image_size % 4:
            raise ValueError(f"width {self.width} must be even and image_size {self.image_size} a multiple of 4.")

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size // 4, self.image_size // 4


class SharedResidualStack(nn.Module):
    """One residual layer applied `num_layers` times, then ReLU: the original repeats the layer, not a copy of
    it.

    The original's first ReLU works in place on the layer's input, so that the skip path carries relu(x) as
    well.
    """

    def __init__(self, width: int, residual_width: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        self.wide = nn.Conv2d(width, residual_width, 3, padding=1, bias=False)
        self.back = nn.Conv2d(residual_width, width, 1, bias=False)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        for _ in range(self.num_layers):
            x = F.relu(x)
            x = x + self.back(F.relu(self.wide(x)))
        return F.relu(x)


class DeepulVQVAE(nn.Module):
    """The homework's VQ-VAE. Images are (B, 3, H, W) in [0, 1], H and W multiples of 4; codes (B, H/4, W/4).

    The original takes levels 0..3 less 1.5 and adds 1.5 to its output; here both ends are scaled to [0, 1].
    """

    def __init__(self, config: DeepulVQVAEConfig):
        super().__init__()
        self.config = config
        D, E = config.width, config.quantizer.code_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(3, D // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(D // 2, D, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(D, D, 3, padding=1),
            SharedResidualStack(D, config.residual_width, config.residual_layers),
        )
        self.to_code = nn.Conv2d(D, E, 1)
        self.quantizer = make_quantizer(config.quantizer)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(E, D, 3, padding=1),
            SharedResidualStack(D, config.residual_width, config.residual_layers),
            nn.ConvTranspose2d(D, D // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(D // 2, 3, 4, stride=2, padding=1),
        )

    def encode_images(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        """The codes of pictures in [0, 1]. Raises ValueError if a side is not a multiple of 4."""
        return self.quantizer.encode(self.latents(images))

    def decode_codes(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """The pictures of codes on the scale of [0, 1], neither rounded nor clamped."""
        return self._pictures(self.quantizer.lookup(codes))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Reconstructed:
        quantized = self.quantizer(self.latents(images))
        return Reconstructed(F.mse_loss(self._pictures(quantized.latents), images), quantized)

    def latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w E"]:
        """What the quantizer sees."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % 4 or images.shape[3] % 4:
            raise ValueError(f"images are {tuple(images.shape)}; expected (B, 3, H, W), H and W multiples of 4.")
        return self.to_code(self.encoder(3 * images - 1.5)).permute(0, 2, 3, 1)

    def _pictures(self, latents: Tensor) -> Tensor:
        return (self.decoder(latents.permute(0, 3, 1, 2)) + 1.5) / 3
