"""Networks that tell pictures from reconstructions. Images are on the scale [0, 1]; logits are high for real ones.

Letters: B batch, C H W image, D channels, h w grid of logits.

- `PatchDiscriminator`: one logit per patch (pix2pix, Isola et al. 2016, arXiv:1611.07004), as in taming and
  LlamaGen.
- `StyleGAN2Discriminator`: one logit per picture (Karras et al. 2019, arXiv:1912.04958), as in ViT-VQGAN.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.image_tokenizers.losses import AdversarialConfig


def make_discriminator(config: AdversarialConfig, image_size: tuple[int, int]) -> nn.Module:
    """The discriminator that a config names, for pictures of `image_size` (rows, columns)."""
    if config.network == "stylegan2":
        return StyleGAN2Discriminator(image_size, config.channels)
    return PatchDiscriminator(image_size, config.channels)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions, three of them of stride 2, with BatchNorm and leaky ReLU between: each logit sees 70 x 70
    pixels. Pictures must be at least 24 pixels a side."""

    def __init__(self, image_size: tuple[int, int], channels: int = 64):
        super().__init__()
        num_layers = 3
        least = 3 * 2**num_layers
        if min(image_size) < least:
            raise ValueError(
                f"pictures of {image_size[0]} x {image_size[1]} pixels are too small for a patch discriminator; "
                f'they need {least} a side. Use network "stylegan2" or larger pictures.'
            )
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(num_layers):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_init_as_dcgan)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        return self.layers(2 * images - 1)


def _init_as_dcgan(module: nn.Module) -> None:
    """Weights N(0, 0.02), those of BatchNorm N(1, 0.02); only BatchNorm's biases are zeroed, as in the original."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class StyleGAN2Discriminator(nn.Module):
    """Residual blocks that halve the picture until the shorter side has 4 to 7 pixels, then the deviation within the
    batch as one more channel, a convolution and two linear layers.

    The width doubles with every halving from `channels`, up to 8 * `channels`. Weights are N(0, 1) and scaled at
    use ("equalised learning rate"). Rows and columns must halve evenly.
    """

    def __init__(self, image_size: tuple[int, int], channels: int = 64):
        super().__init__()
        num_halvings = int(math.log2(max(1, min(image_size) / 4)))
        if any(side % 2**num_halvings for side in image_size) or min(image_size) < 4:
            raise ValueError(
                f"pictures of {image_size[0]} x {image_size[1]} pixels cannot be halved {num_halvings} times down to "
                "4 x 4 or more, as the StyleGAN2 discriminator does; use sides such as 32, 64, 96 or 128."
            )
        widths = [channels * min(2**i, 8) for i in range(num_halvings + 1)]
        self.colours_in = EqualisedConv(3, widths[0], 1)
        self.blocks = nn.Sequential(*(_HalvingBlock(a, b) for a, b in pairwise(widths)))
        rows, columns = (side // 2**num_halvings for side in image_size)
        self.conv_out = EqualisedConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = _EqualisedLinear(widths[-1] * rows * columns, widths[-1])
        self.to_logit = _EqualisedLinear(widths[-1], 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        x = self.blocks(_leaky(self.colours_in(2 * images - 1)))
        x = _leaky(self.conv_out(torch.cat([x, batch_deviation(x, group_size=4)], dim=1)))
        return self.to_logit(_leaky(self.hidden(x.flatten(1))))[:, 0]


class EqualisedConv(nn.Module):
    """A convolution that keeps rows and columns, or halves them after a blur."""

    blur: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True, halve: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = (in_channels * kernel_size**2) ** -0.5
        self.halve, self.padding = halve, kernel_size // 2
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", torch.outer(kernel, kernel) / kernel.sum() ** 2, persistent=False)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B Dout Hout Wout"]:
        weight = self.weight * self.scale
        if not self.halve:
            return F.conv2d(x, weight, self.bias, padding=self.padding)
        D, k = x.shape[1], weight.shape[-1]
        before, after = (k + 2) // 2, (k + 1) // 2  # of the 4-tap blur and the kernel together, less the stride
        kernel = self.blur.to(x.dtype).expand(D, 1, 4, 4)
        x = F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=D)
        return F.conv2d(x, weight, self.bias, stride=2)


class _EqualisedLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = in_features**-0.5

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B Dout"]:
        return F.linear(x, self.weight * self.scale, self.bias)


class _HalvingBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = EqualisedConv(in_channels, in_channels, 3)
        self.conv2 = EqualisedConv(in_channels, out_channels, 3, halve=True)
        self.skip = EqualisedConv(in_channels, out_channels, 1, bias=False, halve=True)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B Dout Hout Wout"]:
        # Divided by sqrt 2, so that the sum has the variance of its parts.
        return (_leaky(self.conv2(_leaky(self.conv1(x)))) + self.skip(x)) / math.sqrt(2)


def batch_deviation(x: Float[Tensor, "B D h w"], group_size: int) -> Float[Tensor, "B 1 h w"]:
    """The standard deviation over each group of pictures, averaged over channels and cells: a discriminator that
    sees it notices when reconstructions are all alike. The group is the largest that divides the batch."""
    B, D, h, w = x.shape
    group_size = next(size for size in range(min(group_size, B), 0, -1) if B % size == 0)
    groups = x.float().view(group_size, -1, D, h, w)
    deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (B / group_size,)
    return deviation.repeat(group_size)[:, None, None, None].expand(B, 1, h, w).to(x.dtype)


def _leaky(x: Tensor) -> Tensor:
    """Leaky ReLU times sqrt 2, which keeps the variance of its input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
