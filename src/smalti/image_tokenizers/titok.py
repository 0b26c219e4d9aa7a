"""TiTok: pictures as a short 1-D sequence of codes (Yu et al. 2024, arXiv:2406.07550).

Letters: B batch, C H W image, h w patch grid, T = h*w patches, n latent tokens, D model width, N heads, Dh
head width, E code width, P proxy codes of width F, p patch side.

The encoder reads the patches of a picture and n learned latent tokens together and keeps only the latter; the
decoder rebuilds a grid of patches from mask tokens and the quantized latents. What stands in that grid is
- "pixels" (one stage): the p x p pixels of the patch, smoothed by a 3x3 convolution;
- "proxy_codes" (two stages): logits over the codes of a VQGAN, whose decoder then makes the picture.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.bounds import check_sizes
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, QuantizerConfig, make_quantizer
from smalti.image_tokenizers.vqgan import PRESETS as VQGAN_PRESETS
from smalti.image_tokenizers.vqgan import (
    VQGAN,
    Reconstructed,
    VQGANConfig,
    attend,
    channels_last_if_bf16,
    check_image_size,
)
from smalti.image_tokenizers.vqgan import Decoder as ProxyDecoder


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """One side of the tokenizer, encoder or decoder. The feed-forward width is `mlp_ratio` times `width`."""

    width: int
    num_layers: int
    num_heads: int
    patch_size: int = 16
    mlp_ratio: float = 4.0

    def __post_init__(self):
        check_sizes(self, "num_layers")
        for name in ("width", "num_layers", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}.")
        if not int(self.width * self.mlp_ratio) >= 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; times width {self.width} it must be at least 1.")


SMALL = ViTConfig(width=512, num_layers=8, num_heads=8)
BASE = ViTConfig(width=768, num_layers=12, num_heads=12)
LARGE = ViTConfig(width=1024, num_layers=24, num_heads=16)

TWO_STAGE_CODES = QuantizerConfig(codebook_size=4096, code_dim=12, update="gradient", l2_normalised=True)
ONE_STAGE_CODES = QuantizerConfig(codebook_size=8192, code_dim=64, update="gradient")


@dataclass(frozen=True, kw_only=True)
class TiTokConfig:
    """`image_size` is (rows, columns); positions are learned, so no other size can be encoded. `proxy` is the VQGAN
    behind "proxy_codes": MaskGIT-VQGAN in the released models, any other in those trained here.

    `mixed_latents` repeats a slip of the released two-stage models: the encoder's (n, D) output is read as
    (D, n) without transposing, which mixes channels and tokens. Off for anything newly trained.

    With `regional`, which no published model has, each latent starts from a run of patches of its own, T / n of them
    in raster order, and the decoder's patches start from the latent of their run; attention then adds what the rest of
    the picture tells. The quantizer is given latents of mean 0 and variance 1 over the batch (BatchNorm, arXiv:
    1502.03167). Without either, the first steps teach all latents to say the same, and attention takes thousands of
    steps to find out what each could tell.
    """

    encoder: ViTConfig = LARGE
    decoder: ViTConfig = LARGE
    num_latents: int = 32
    quantizer: AnyQuantizerConfig = TWO_STAGE_CODES
    image_size: tuple[int, int] = (256, 256)
    target: Literal["proxy_codes", "pixels"] = "proxy_codes"
    proxy: VQGANConfig | None = VQGAN_PRESETS["maskgit"]
    mixed_latents: bool = False
    regional: bool = False

    def __post_init__(self):
        check_sizes(self)
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists
        if self.num_latents < 1:
            raise ValueError(f"num_latents is {self.num_latents}; it must be at least 1.")
        if self.target not in ("proxy_codes", "pixels"):
            raise ValueError(f'target is {self.target!r}; use "proxy_codes" or "pixels".')
        if (self.target == "proxy_codes") != (self.proxy is not None):
            raise ValueError(f'target is {self.target!r}; a proxy is needed for "proxy_codes" and only there.')
        check_image_size(*self.image_size, self.encoder.patch_size, "image_size")
        check_image_size(*self.image_size, self.decoder.patch_size, "image_size")
        for side, name in ((self.encoder, "encoder"), (self.decoder, "decoder")):
            rows, columns = self.patch_grid(side)
            if self.regional and rows * columns % self.num_latents:
                raise ValueError(
                    f"the {rows} x {columns} patches of the {name} cannot be shared out evenly among "
                    f"{self.num_latents} latents; with regional, num_latents must divide them."
                )

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        """A sequence of codes counts as one row."""
        return 1, self.num_latents

    def patch_grid(self, side: ViTConfig) -> tuple[int, int]:
        """Rows and columns of patches that one side of the tokenizer sees."""
        return self.image_size[0] // side.patch_size, self.image_size[1] // side.patch_size


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, N, T, Dh) each
        mixed = attend(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        mlp_width = int(config.width * config.mlp_ratio)
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, config.width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Blocks over [class token, patches, latents], with a learned position for each and a norm at either
    end."""

    def __init__(self, config: ViTConfig, num_patches: int, num_latents: int):
        super().__init__()
        D, std = config.width, config.width**-0.5
        self.class_token = nn.Parameter(std * torch.randn(D))
        self.patch_positions = nn.Parameter(std * torch.randn(1 + num_patches, D))  # the first for the class token
        self.latent_positions = nn.Parameter(std * torch.randn(num_latents, D))
        self.norm_in = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(D)

    def forward(
        self, patches: Float[Tensor, "B T D"], latents: Float[Tensor, "B n D"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B n D"]]:
        B, T, D = patches.shape
        patches = torch.cat([self.class_token.expand(B, 1, D), patches], dim=1) + self.patch_positions
        x = self.norm_in(torch.cat([patches, latents + self.latent_positions], dim=1))
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(x)
        return x[:, 1 : 1 + T], x[:, 1 + T :]


class TiTok(nn.Module):
    """Pictures in [0, 1] to a row of codes and back. Weights may be bf16; pictures come back in float32."""

    def __init__(self, config: TiTokConfig):
        super().__init__()
        self.config = config
        encoder, decoder, n = config.encoder, config.decoder, config.num_latents
        rows, columns = config.patch_grid(encoder)
        self.patches_in = nn.Conv2d(3, encoder.width, encoder.patch_size, stride=encoder.patch_size)
        self.latent_tokens = nn.Parameter(encoder.width**-0.5 * torch.randn(n, encoder.width))
        if config.regional:
            run = rows * columns // n
            self.gather = nn.Conv1d(encoder.width, encoder.width, run, stride=run)
            self.latent_norm = nn.BatchNorm1d(config.quantizer.code_dim, affine=False, momentum=0.05)
        self.encoder = Transformer(encoder, rows * columns, n)
        self.to_code = nn.Linear(encoder.width, config.quantizer.code_dim)
        self.quantizer = make_quantizer(config.quantizer)
        self.from_code = nn.Linear(config.quantizer.code_dim, decoder.width)
        rows, columns = config.patch_grid(decoder)
        self.mask_token = nn.Parameter(decoder.width**-0.5 * torch.randn(decoder.width))
        if config.regional:
            run = rows * columns // n
            self.spread = nn.ConvTranspose1d(decoder.width, decoder.width, run, stride=run)
        self.decoder = Transformer(decoder, rows * columns, n)
        self.head = PixelHead(decoder) if config.proxy is None else ProxyHead(decoder.width, config.proxy)
        self.apply(init_weights)
        if isinstance(self.head, PixelHead):
            self.head.start_from_gray()
        if config.proxy is not None:
            # Codebook and decoder of a trained VQGAN: see `load_proxy`.
            self.proxy_codebook = nn.Parameter(torch.randn(config.proxy.codebook_size, config.proxy.latent_channels))
            self.proxy_decoder = ProxyDecoder(config.proxy)

    def encode_latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 n E"]:
        """What the quantizer is given, in one row. Raises ValueError if pictures are not of
        `config.image_size`."""
        if tuple(images.shape[-2:]) != self.config.image_size:
            rows, columns = self.config.image_size
            raise ValueError(
                f"picture {images.shape[-2]} x {images.shape[-1]} given; this TiTok has learned positions for "
                f"{rows} x {columns} alone; crop or resize to that."
            )
        B, n, D = len(images), self.config.num_latents, self.config.encoder.width
        patches = self.patches_in(images.to(self.patches_in.weight.dtype)).flatten(2).mT  # (B, T, D)
        start = self.latent_tokens.expand(B, n, D)
        if self.config.regional:
            start = start + self.gather(patches.mT).mT
        _, latents = self.encoder(patches, start)
        if self.config.mixed_latents:
            latents = latents.reshape(B, D, n).mT
        latents = self.to_code(latents)
        if self.config.regional:
            latents = self.latent_norm(latents.mT.to(self.gather.weight.dtype)).mT  # in float32 under autocast
        return latents[:, None]

    def decode_grid(self, latents: Float[Tensor, "B 1 n E"]) -> Float[Tensor, "B D h w"]:
        """The decoder's features of each patch, on the grid of patches, before the head."""
        rows, columns = self.config.patch_grid(self.config.decoder)
        x = self.from_code(latents[:, 0].to(self.from_code.weight.dtype))
        masks = self.mask_token.expand(len(x), rows * columns, -1)
        if self.config.regional:
            masks = masks + self.spread(x.mT).mT
        patches, _ = self.decoder(masks, x)
        return patches.mT.unflatten(2, (rows, columns))

    def proxy_logits(self, latents: Float[Tensor, "B 1 n E"]) -> Float[Tensor, "B P h w"]:
        """Logits over the proxy's codes for each patch: what the first of the two stages trains by
        cross-entropy. For models with target "proxy_codes" only."""
        return self.head(self.decode_grid(latents))

    def proxy_latents(self, logits: Float[Tensor, "B P h w"]) -> Float[Tensor, "B F h w"]:
        """The row of the proxy's codebook expected under the logits, for each patch."""
        return torch.einsum("bphw,pf->bfhw", logits.softmax(1), self.proxy_codebook)

    def proxy_pictures(self, logits: Float[Tensor, "B P h w"]) -> Float[Tensor, "B C H W"]:
        """What the proxy's decoder makes of its expected codes, float32 on the scale [0, 1], not clamped."""
        pictures = self.proxy_decoder(channels_last_if_bf16(self.proxy_latents(logits))).float()
        return pictures if self.config.proxy is None or self.config.proxy.form == "maskgit" else pictures / 2 + 0.5

    def decode_latents(self, latents: Float[Tensor, "B 1 n E"]) -> Float[Tensor, "B C H W"]:
        """Pictures from quantized latents, float32 on the scale [0, 1], not clamped."""
        x = self.head(self.decode_grid(latents))
        return x.float() if self.config.proxy is None else self.proxy_pictures(x)

    def encode_images(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B 1 n"]:
        """Codes of pictures in [0, 1] and of `config.image_size`, in one row."""
        return self.quantizer.encode(self.encode_latents(images))

    def decode_codes(self, codes: Int[Tensor, "B 1 n"]) -> Float[Tensor, "B C H W"]:
        """Pictures on the scale [0, 1], not clamped. Raises ValueError if a code is outside the codebook."""
        return self.decode_latents(self.quantizer.lookup(codes))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Reconstructed:
        """Encode, quantize with straight-through gradients, decode."""
        quantized = self.quantizer(self.encode_latents(images))
        return Reconstructed(self.decode_latents(quantized.latents), quantized)

    def load_proxy(self, proxy: VQGAN) -> None:
        """Copies codebook and decoder of a trained proxy. Raises ValueError if its sizes are not
        `config.proxy`'s."""
        if self.config.proxy != proxy.config:
            raise ValueError(f"the proxy given has {proxy.config}; this TiTok was built for {self.config.proxy}.")
        self.proxy_decoder.load_state_dict(proxy.decoder.state_dict())
        every_code = torch.arange(proxy.config.codebook_size, device=self.proxy_codebook.device)
        # As wide as the decoder takes them: that layer is affine, so it may come before the expectation over codes.
        entries = proxy.from_code(proxy.quantizer.lookup(every_code).mT[None, :, :, None])
        self.proxy_codebook.data.copy_(entries[0, :, :, 0].mT)


class PixelHead(nn.Module):
    """The pixels of each patch, put in place, then a 3x3 convolution over the whole picture."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.to_pixels = nn.Conv2d(config.width, 3 * config.patch_size**2, 1)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def start_from_gray(self) -> None:
        """Sets the weights so that pictures start near mid-gray and the 3x3 convolution changes nothing. A random head
        paints noise, and all that the first steps would teach the network is to be silent."""
        self.to_pixels.weight.data.mul_(0.1)
        nn.init.dirac_(self.smooth.weight)
        nn.init.constant_(cast(Tensor, self.smooth.bias), 0.5)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C H W"]:
        B, _, h, w = x.shape
        p = self.patch_size
        pixels = self.to_pixels(x).view(B, p, p, 3, h, w)  # channels in the order row, column, colour
        pixels = pixels.permute(0, 3, 4, 1, 5, 2).reshape(B, 3, h * p, w * p)
        return self.smooth(pixels)


class ProxyHead(nn.Module):
    """Logits over the proxy's codes for each patch."""

    def __init__(self, width: int, proxy: VQGANConfig):
        super().__init__()
        self.hidden = nn.Conv2d(width, 2 * width, 1)
        self.to_logits = nn.Conv2d(2 * width, proxy.codebook_size, 1)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B P h w"]:
        return self.to_logits(torch.tanh(self.hidden(x)))


def init_weights(module: nn.Module) -> None:
    """Normal matrices and zero biases. The original's deviation is 0.02 at every size, which suits width 1,024; here
    it grows as layers get narrower. With 0.02 a network of width 64 stays at one picture for all: 8 pictures come
    out at 13 dB after 600 steps, and at 29 dB so."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d | nn.ConvTranspose1d):
        nn.init.normal_(module.weight, std=0.02 * (1024 / module.weight[0].numel()) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _two_stage(size: ViTConfig, num_latents: int) -> TiTokConfig:
    return TiTokConfig(encoder=size, decoder=size, num_latents=num_latents, mixed_latents=True)


def _one_stage(encoder: ViTConfig, num_latents: int) -> TiTokConfig:
    return TiTokConfig(
        encoder=encoder,
        decoder=LARGE,
        num_latents=num_latents,
        quantizer=ONE_STAGE_CODES,
        target="pixels",
        proxy=None,
    )


PRESETS: dict[str, TiTokConfig] = {
    # Released two-stage models, 1d-tokenizer, configs/infer/TiTok; counts include 30,740,483 of the proxy.
    "l-32": _two_stage(LARGE, 32),  # 641,054,735 parameters
    "b-64": _two_stage(BASE, 64),  # 204,814,095
    "s-128": _two_stage(SMALL, 128),  # 83,674,639
    # Released one-stage models of the same source. The decoder is always the large one.
    "bl-64": _one_stage(BASE, 64),  # 390,016,148
    "bl-128": _one_stage(BASE, 128),  # 390,179,988
    "sl-256": _one_stage(SMALL, 256),  # 330,260,884
}
