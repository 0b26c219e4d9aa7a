"""Inception-v3 as FID has it: the network of TensorFlow's inception-2015-12-05 with 1,008 outputs, as its own graph.

It is not torchvision's: average pools leave the padding out of their average, the last block has a maximum pool where
the paper has an average, BatchNorm's epsilon is 0.001, and pixels are (x - 128) / 128 (Szegedy et al. 2016,
arXiv:1512.00567; the graph file itself). Keys are those of the ported weight file that pytorch-fid and torch-fidelity
share, `pt_inception-2015-12-05-6726825d.pth`, which the user supplies: 23,850,960 parameters, read without running
anything in the file.

Letters: B pictures, C channels, H W rows and columns.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.image_tokenizers.perceptual import load_strictly
from smalti.weight_files import read_weights, require_values

NUM_OUTPUTS = 1008
POOLED_WIDTH = 2048
SPATIAL_CHANNELS = 7
"""Of the 192 of mixed_6/conv, which sFID reads (Nash et al. 2021, arXiv:2103.03841; ADM's evaluator)."""
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
FILE = "inception-2015-12-05-6726825d.pth"
"""The ported weights' name; behind the last dash stand the first digits of their SHA-256, as torch.hub has it."""
MARK = "Mixed_7c.branch_pool.conv.weight"
"""A key that only this network has."""


class Activations(NamedTuple):
    """What the figures read."""

    pooled: Float[Tensor, "B 2048"]
    """pool_3: FID, KID, precision and recall."""
    spatial: Float[Tensor, "B 2023"]
    """The first channels of mixed_6/conv, before its BatchNorm, in the order row, column, channel: sFID."""
    logits: Float[Tensor, "B 1008"]
    """Without the bias, as the original inception score and ADM's evaluator multiply them."""


class Convolution(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, num_in: int, num_out: int, kernel: int | tuple[int, int], *, stride: int = 1, same: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else 0
        self.conv = nn.Conv2d(num_in, num_out, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=0.001)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ _ _"]:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """Of the 3 × 3 around each place, of those that there are: TensorFlow leaves padding out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """35 × 35: 1 × 1, 5 × 5, two of 3 × 3, average pool."""

    def __init__(self, num_in: int, num_pooled: int):
        super().__init__()
        self.branch1x1 = Convolution(num_in, 64, 1)
        self.branch5x5_1 = Convolution(num_in, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(num_in, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(num_in, num_pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))], 1
        )


class To17(nn.Module):
    """35 × 35 to 17 × 17."""

    def __init__(self, num_in: int):
        super().__init__()
        self.branch3x3 = Convolution(num_in, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = Convolution(num_in, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed17(nn.Module):
    """17 × 17: 7 × 7 as rows and columns of 7, once and twice."""

    def __init__(self, num_inner: int):
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, num_inner, 1)
        self.branch7x7_2 = Convolution(num_inner, num_inner, (1, 7))
        self.branch7x7_3 = Convolution(num_inner, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(768, num_inner, 1)
        self.branch7x7dbl_2 = Convolution(num_inner, num_inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(num_inner, num_inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(num_inner, num_inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(num_inner, 192, (1, 7))
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class To8(nn.Module):
    """17 × 17 to 8 × 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed8(nn.Module):
    """8 × 8. `last` has the maximum pool that the graph file has in place of an average."""

    def __init__(self, num_in: int, *, last: bool = False):
        super().__init__()
        self.last = last
        self.branch1x1 = Convolution(num_in, 320, 1)
        self.branch3x3_1 = Convolution(num_in, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(num_in, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(num_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """The whole network, in eval mode and without gradients. The names of its parts are the weight file's keys; beside
    them stand the names in TensorFlow's graph."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, same=False)  # conv
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)  # conv_1
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)  # conv_2
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)  # conv_3
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)  # conv_4
        self.Mixed_5b = Mixed35(192, 32)  # mixed
        self.Mixed_5c = Mixed35(256, 64)  # mixed_1
        self.Mixed_5d = Mixed35(288, 64)  # mixed_2
        self.Mixed_6a = To17(288)  # mixed_3
        self.Mixed_6b = Mixed17(128)  # mixed_4
        self.Mixed_6c = Mixed17(160)  # mixed_5
        self.Mixed_6d = Mixed17(160)  # mixed_6, whose first convolution sFID reads
        self.Mixed_6e = Mixed17(192)  # mixed_7
        self.Mixed_7a = To8()  # mixed_8
        self.Mixed_7b = Mixed8(1280)  # mixed_9
        self.Mixed_7c = Mixed8(2048, last=True)  # mixed_10
        self.fc = nn.Linear(POOLED_WIDTH, NUM_OUTPUTS)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, file: Path | str) -> "Inception":
        """With the weights of a file. Raises InputError naming the first key that is missing, left over, of another
        shape or not finite."""
        path = Path(file)
        tensors = read_weights(path).tensors
        network = cls()
        # Converters keep or drop the counters of BatchNorm; no figure depends on them.
        counters = {name: t for name, t in network.state_dict().items() if name.endswith("num_batches_tracked")}
        weights = {name: t for name, t in tensors.items() if name not in counters}
        load_strictly(network, weights | counters, path, f"FID's Inception (pt_{FILE}), not torchvision's")
        require_values(weights, weights)
        return network

    def train(self, mode: bool = True) -> "Inception":
        """Stays in eval mode whatever it is a part of."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "B 3 299 299"]) -> Activations:
        """Of images in [0, 255], already of the network's size."""
        x = (images - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1.conv(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        pooled = x.mean((2, 3))
        return Activations(pooled, spatial, pooled @ self.fc.weight.T)
