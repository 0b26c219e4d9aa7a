"""Distances between pictures as trained classifiers see them, from public weight files that the user supplies.

Letters: B batch, C H W image, D channels.

- `LPIPS`: VGG16 features (Zhang et al. 2018, arXiv:1801.03924). Files: torchvision's vgg16 (keys
  `features.{i}.weight`) and the linear layers of LPIPS, known as vgg.pth (`lin{k}.model.1.weight`), of the lpips
  package and of taming-transformers.
- `ConvNeXtDistance`: the logits of ConvNeXt-S (Liu et al. 2022, arXiv:2201.03545), as TiTok uses them. File:
  torchvision's convnext_small or timm's.

The networks never train: their weights have no gradients, and they stay in eval mode.
"""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.errors import InputError
from smalti.image_tokenizers.losses import LossConfig
from smalti.weight_files import read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

VGG16_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
VGG16_TAPS = (3, 8, 15, 22, 29)
"""Layers of `features` after which LPIPS compares: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
VGG16_TAP_WIDTHS = (64, 128, 256, 512, 512)


def make_perceptual(config: LossConfig) -> nn.Module:
    """The network that a config names, with the weights of its files, in eval mode and without gradients of its own.

    Raises InputError naming the file and the first key that is missing, left over or of another size.
    """
    if config.perceptual_weights is None:
        raise ValueError("perceptual_weights names no file.")
    if config.perceptual_network == "convnext":
        return ConvNeXtDistance.load(config.perceptual_weights)
    if config.lpips_weights is None:
        raise ValueError("lpips_weights names no file.")
    return LPIPS.load(config.perceptual_weights, config.lpips_weights)


class LPIPS(nn.Module):
    """The learned distance of VGG16 features. `lins` weigh the channels of each of the five layers compared."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        # Of inputs in [0, 1]: the (-0.030, -0.088, -0.188) and (0.458, 0.448, 0.450) that LPIPS applies to [-1, 1]
        # are the same up to their rounding, which is kept.
        self.register_buffer("mean", ((torch.tensor([-0.030, -0.088, -0.188]) + 1) / 2).view(3, 1, 1))
        self.register_buffer("std", (torch.tensor([0.458, 0.448, 0.450]) / 2).view(3, 1, 1))
        layers: list[nn.Module] = []
        before = 3
        for width in VGG16_WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)
        self.lins = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in VGG16_TAP_WIDTHS)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, vgg_file: Path | str, lpips_file: Path | str) -> "LPIPS":
        network = cls()
        vgg = {name: tensor for name, tensor in read_weights(Path(vgg_file)).tensors.items()}
        trunk = {name.removeprefix("features."): t for name, t in vgg.items() if not name.startswith("classifier.")}
        load_strictly(network.features, trunk, vgg_file, "torchvision's vgg16")
        found = read_weights(Path(lpips_file)).tensors
        lins = {match[1]: t for name, t in found.items() if (match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name))}
        load_strictly(network.lins, lins, lpips_file, "the linear layers of LPIPS for VGG (lin0.model.1.weight, ...)")
        return network

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode whatever it is a part of."""
        return super().train(False)

    def taps(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B D h w"]]:
        """The features after each of the five layers compared."""
        x = (images - self.mean) / self.std
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in VGG16_TAPS:
                taps.append(x)
        return taps

    def forward(self, reconstructions: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The mean distance of the pairs; 0 for equal pictures."""
        return self.per_pair(reconstructions, images).mean()

    def per_pair(
        self, reconstructions: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """The distance of each pair: squared differences of features at unit length, weighted by channel, averaged
        over places, summed over layers. Pictures need at least 16 pixels a side."""
        if min(images.shape[-2:]) < 16:
            raise ValueError(f"pictures of {images.shape[-2]} x {images.shape[-1]} pixels; LPIPS needs 16 a side.")
        total = torch.zeros(len(images), device=images.device)
        for ours, theirs, lin in zip(self.taps(reconstructions), self.taps(images), self.lins, strict=True):
            difference = unit(ours.float()) - unit(theirs.float())
            total = total + (difference.square() * lin).sum(1).mean((1, 2))
        return total


def unit(features: Tensor) -> Tensor:
    """Features of length 1 at every place. The floor keeps the gradient finite where all of them are 0."""
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt().clamp(min=1e-10)


class ConvNeXtDistance(nn.Module):
    """Mean squared difference of the 1,000 logits of ConvNeXt-S (50,223,688 parameters) at 224 x 224 pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.network = ConvNeXt()
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, file: Path | str) -> "ConvNeXtDistance":
        distance = cls()
        found = read_weights(Path(file)).tensors
        if any(name.startswith("stem.") for name in found):
            found = {torchvision_name(name): tensor for name, tensor in found.items()}
        found = {name: t.view(-1, 1, 1) if name.endswith("layer_scale") else t for name, t in found.items()}
        load_strictly(distance.network, found, file, "ConvNeXt-S of torchvision or timm")
        return distance

    def train(self, mode: bool = True) -> "ConvNeXtDistance":
        """Stays in eval mode whatever it is a part of."""
        return super().train(False)

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        resized = F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        return self.network((resized - self.mean) / self.std)

    def forward(self, reconstructions: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        return F.mse_loss(self.logits(reconstructions).float(), self.logits(images).float())


class ConvNeXt(nn.Module):
    """The classifier, under torchvision's key names. The defaults are ConvNeXt-S."""

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 27, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
        num_classes: int = 1000,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0]))]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i:
                layers.append(nn.Sequential(ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, stride=2)))
            layers.append(nn.Sequential(*(_ConvNeXtBlock(width) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(widths[-1]), nn.Flatten(1), nn.Linear(widths[-1], num_classes))

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            _Permute(0, 2, 3, 1),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            _Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x + self.layer_scale * self.block(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, input: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _Permute(nn.Module):
    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


_TIMM_BLOCK = {
    "gamma": "layer_scale",
    "conv_dw": "block.0",
    "norm": "block.2",
    "mlp.fc1": "block.3",
    "mlp.fc2": "block.5",
}


def torchvision_name(name: str) -> str:
    """torchvision's key for one of timm's ConvNeXt. Unknown names stay as they are, so that they are reported."""
    name = re.sub(r"^stem\.", "features.0.", name)
    name = re.sub(r"^head\.norm\.", "classifier.0.", name)
    name = re.sub(r"^head\.fc\.", "classifier.2.", name)
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", name):
        return f"features.{2 * int(match[1])}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(gamma|conv_dw|norm|mlp\.fc1|mlp\.fc2)(\..+)?", name):
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.{_TIMM_BLOCK[match[3]]}{match[4] or ''}"
    return name


def load_strictly(module: nn.Module, found: dict[str, Tensor], file: Path | str, what: str) -> None:
    """Loads strictly. Raises InputError naming the first key that does not fit."""
    wanted = module.state_dict()
    for name in sorted({*wanted, *found}):
        problem = None
        if name not in found:
            problem = f"has no tensor {name}"
        elif name not in wanted:
            problem = f"has a tensor {name} that is not known"
        elif found[name].shape != wanted[name].shape:
            problem = f"has {name} of shape {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        if problem:
            raise InputError(f"{file} {problem} (of {len(found)} read); expected the weights of {what}.")
    module.load_state_dict(found)
