"""FID's Inception: its graph against one written out of plain operations, its file, and the resizers before it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from smalti.errors import InputError
from smalti.evaluate.feature_networks import open_network
from smalti.evaluate.inception import NUM_OUTPUTS, SPATIAL_WIDTH, Inception
from smalti.evaluate.protocols import ADM, CLEAN_FID, PYTORCH_FID, SMALTI, TORCH_FIDELITY
from smalti.evaluate.resizers import resized


@pytest.fixture(scope="module")
def network() -> Inception:
    """Of random weights that keep features alive through all layers."""
    network, random = Inception(), torch.Generator().manual_seed(0)
    for name, values in network.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            values.copy_(torch.rand(values.shape, generator=random) + 0.5)
        elif values.dim() > 1:
            values.copy_(torch.randn(values.shape, generator=random) * (2 / values[0].numel()) ** 0.5)
        elif values.is_floating_point():
            values.copy_(torch.randn(values.shape, generator=random) * 0.1)
    return network


@pytest.fixture(scope="module")
def weight_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_it_has_the_size_of_the_published_file(network):
    """torchvision's Inception without its auxiliary head has 23,834,568 parameters of 1,000 outputs; 8 outputs more."""
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049 == 23_850_960
    names = network.state_dict()
    assert len(names) == 94 * 6 + 2  # convolutions, each with its BatchNorm, and the last layer
    assert names["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert names["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert names["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert names["fc.weight"].shape == (NUM_OUTPUTS, 2048)
    assert network.train().training is False and not any(p.requires_grad for p in network.parameters())


# The graph once more, as TensorFlow's file lists it: per block its branches, each a chain of operations. A convolution
# is its name, and its padding follows from its kernel: "v" is TensorFlow's VALID padding with stride 2.
A = ["branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "avg branch_pool"]
B = ["branch3x3:v", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3:v", "max:v"]
C = ["branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
     "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5", "avg branch_pool"]  # fmt: skip
D = ["branch3x3_1 branch3x3_2:v", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4:v", "max:v"]
E = [
    "branch1x1",
    "branch3x3_1 branch3x3_2a",
    "branch3x3_1 branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
]
BLOCKS = {
    **{f"Mixed_5{letter}": A for letter in "bcd"},
    "Mixed_6a": B,
    **{f"Mixed_6{letter}": C for letter in "bcde"},
    "Mixed_7a": D,
    "Mixed_7b": [*E, "avg branch_pool"],
    "Mixed_7c": [*E, "max branch_pool"],
}


def written_out(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, from the state dict alone."""
    w = {name: t.double() for name, t in weights.items()}

    def convolution(name: str, x: Tensor, valid: bool, stride: int = 1) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        padding = (0, 0) if valid else ((kernel.shape[2] - 1) // 2, (kernel.shape[3] - 1) // 2)
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, var, scale, shift = (w[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        normal = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 0.001).sqrt()
        return (normal * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp(min=0)

    def average(x: Tensor) -> Tensor:
        ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
        sums = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1)
        return sums / F.avg_pool2d(F.pad(ones, (1, 1, 1, 1)), 3, stride=1)

    def chain(block: str, operations: str, x: Tensor) -> Tensor:
        for operation in operations.split():
            name, _, valid = operation.partition(":")
            if name == "avg":
                x = average(x)
            elif name == "max":
                x = F.max_pool2d(x, 3, stride=2) if valid else F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                x = convolution(f"{block}.{name}", x, bool(valid), 2 if valid else 1)
        return x

    x = (x.double() - 128) * 0.0078125
    x = convolution("Conv2d_1a_3x3", x, True, 2)
    x = convolution("Conv2d_2b_3x3", convolution("Conv2d_2a_3x3", x, True), False)
    x = F.max_pool2d(x, 3, stride=2)
    x = convolution("Conv2d_4a_3x3", convolution("Conv2d_3b_1x1", x, True), True)
    x = F.max_pool2d(x, 3, stride=2)
    spatial = None
    for block, branches in BLOCKS.items():
        if block == "Mixed_6d":  # TensorFlow's mixed_6, whose first operation is a convolution without BatchNorm yet
            whole = F.conv2d(x, w["Mixed_6d.branch1x1.conv.weight"])
            spatial = whole.permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
        x = torch.cat([chain(block, operations, x) for operations in branches], 1)
    assert spatial is not None
    pooled = x.mean((2, 3))
    return pooled, spatial, pooled @ w["fc.weight"].T


def test_the_graph_is_the_one_written_out(network):
    pictures = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 255
    found = network(pictures)
    wanted = written_out(network.state_dict(), pictures)
    assert [part.shape[1] for part in found] == [2048, SPATIAL_WIDTH, 1008]
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.std() > 0.05
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_file_is_read_strictly(network, weight_file, tmp_path):
    pictures = torch.randint(0, 256, (2, 9, 11, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    opened = open_network(weight_file, ADM)
    assert opened.name == "inception" and len(opened.sha256) == 64 and opened.resizer == "tf1 to 299×299"
    found = opened(pictures)
    assert torch.allclose(found.pooled, network(resized(pictures.permute(0, 3, 1, 2), "tf1")).pooled, atol=1e-4)
    with pytest.raises(InputError, match=r"has the SHA-256 .* expected 6726825d: figures of other weights"):
        open_network(weight_file, ADM, sha256="6726825d")
    assert open_network(weight_file, ADM, sha256=opened.sha256[:8]).sha256 == opened.sha256
    with pytest.raises(ValueError, match="smalti does not say how pictures are resized"):
        open_network(weight_file, SMALTI)

    state = dict(network.state_dict())
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(InputError, match=r"fc.weight of shape \(1000, 2048\) instead of .*not torchvision's"):
        open_network(tmp_path / "torchvision.pth", ADM)
    torch.save(state | {"fc.bias": torch.full((1008,), float("nan"))}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"fc\.bias holds 1008 of 1008 values that are NaN"):
        open_network(tmp_path / "nan.pth", ADM)
    torch.save({name: t for name, t in state.items() if "num_batches" not in name}, tmp_path / "bare.pth")
    assert torch.equal(Inception.load(tmp_path / "bare.pth").fc.weight, network.fc.weight)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="the weights of no network that is known here"):
        open_network(tmp_path / "other.pth", ADM)


# Resizers ----------------------------------------------------------------------------------------------------------


def slow_bilinear(picture: np.ndarray, side: int, *, half: bool) -> np.ndarray:
    """Pixel by pixel, without antialiasing: TensorFlow 1's with the corner of pixels at whole numbers, or with their
    centres at the half."""
    H, W, _ = picture.shape
    found = np.zeros((side, side, 3))
    for i in range(side):
        for j in range(side):
            y, x = (
                max(0.0, (place + 0.5) * size / side - 0.5) if half else place * size / side
                for place, size in ((i, H), (j, W))
            )
            top, left = int(y), int(x)
            below, right = min(top + 1, H - 1), min(left + 1, W - 1)
            upper = picture[top, left] * (1 - x + left) + picture[top, right] * (x - left)
            lower = picture[below, left] * (1 - x + left) + picture[below, right] * (x - left)
            found[i, j] = upper * (1 - y + top) + lower * (y - top)
    return found


@pytest.mark.parametrize(("size", "side"), [((5, 7), 12), ((23, 19), 9), ((11, 11), 11)])
def test_resizers_are_what_they_say(size, side):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    given = torch.from_numpy(picture).permute(2, 0, 1)[None]
    for name, half in (("tf1", False), ("half-pixel", True)):
        found = resized(given, name, side)[0].permute(1, 2, 0).numpy()
        assert np.allclose(found, slow_bilinear(picture.astype(float), side, half=half), atol=1e-3)
    channels = [
        np.asarray(Image.fromarray(picture[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    found = resized(given, "clean", side)[0].numpy()
    assert np.array_equal(found, np.stack(channels).clip(0, 255)) and found.dtype == np.float32
    assert torch.equal(resized(given, "none"), given.float())


def test_the_protocols_differ_where_they_say():
    """A picture of fine stripes, made smaller: without antialiasing they stay, with it they are grey; TF1's lies half a
    pixel up and left; and clean-fid's is not rounded to whole numbers."""
    stripes = torch.zeros(1, 3, 600, 600, dtype=torch.uint8)
    stripes[..., ::2] = 255
    spread = {one.name: resized(stripes, one.resizer).std() for one in (ADM, TORCH_FIDELITY, CLEAN_FID, PYTORCH_FID)}
    assert spread["adm"] == spread["torch-fidelity"] > 60 and spread["clean-fid"] < 15
    ramp = torch.arange(0, 250, dtype=torch.uint8).repeat(1, 3, 50, 1)
    tf1, half, clean = (resized(ramp, name, 50) for name in ("tf1", "half-pixel", "clean"))
    assert float((half - tf1)[..., 10:40].mean()) == pytest.approx(2.0)  # (5 - 1) / 2 pixels
    assert bool((clean != clean.round()).any()) and clean.min() >= 0 and clean.max() <= 255
    with pytest.raises(ValueError, match="choose one of tf1, clean"):
        resized(ramp, "lanczos")
