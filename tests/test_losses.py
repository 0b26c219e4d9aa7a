"""Losses and discriminators: densities that integrate to one, signs, gradients, networks against other code."""

import math
from itertools import pairwise

import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from smalti.errors import InputError
from smalti.image_tokenizers.discriminators import (
    EqualisedConv,
    PatchDiscriminator,
    StyleGAN2Discriminator,
    batch_deviation,
    make_discriminator,
)
from smalti.image_tokenizers.losses import (
    AdversarialConfig,
    LeCam,
    LossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_loss,
    l1_loss,
    l2_loss,
    logit_laplace_loss,
    logit_laplace_nll,
    r1_penalty,
)
from smalti.image_tokenizers.perceptual import (
    LPIPS,
    VGG16_TAP_WIDTHS,
    ConvNeXt,
    ConvNeXtDistance,
    make_perceptual,
    torchvision_name,
)

KINDS = ["hinge", "non_saturating"]


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Pixels


def test_l2_and_l1_by_hand():
    ours, theirs = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.5, 0.75]]]])
    assert l2_loss(ours, theirs).item() == pytest.approx((0.25 + 0.0625) / 2)
    assert l1_loss(ours, theirs).item() == pytest.approx((0.5 + 0.25) / 2)


@pytest.mark.parametrize(("mean_logit", "log_scale"), [(0.0, -1.0), (1.3, 0.4), (-2.1, -0.7)])
def test_the_logit_laplace_density_integrates_to_one(mean_logit, log_scale):
    # x = sigmoid(y) puts the integral onto the whole line, where the ends are no trouble.
    y = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    x = torch.sigmoid(y)
    inside = (x > 0) & (x < 1)
    y, x = y[inside], x[inside]
    nll = logit_laplace_nll(x, torch.full_like(x, mean_logit), torch.full_like(x, log_scale))
    density_of_y = (-nll).exp() * x * torch.sigmoid(-y)
    assert torch.trapezoid(density_of_y, y).item() == pytest.approx(1.0, abs=1e-6)


def test_logit_laplace_nll_is_the_formula_of_the_paper():
    x, mean, log_scale = torch.tensor(0.3), torch.tensor(0.2), torch.tensor(-0.5)
    b = math.exp(-0.5)
    density = 1 / (2 * b * 0.3 * 0.7) * math.exp(-abs(math.log(0.3 / 0.7) - 0.2) / b)
    assert logit_laplace_nll(x, mean, log_scale).item() == pytest.approx(-math.log(density), rel=1e-6)


def test_the_scale_of_the_logit_laplace_loss_is_the_likeliest():
    truth, guess = images(3, 3, 5, 7), images(3, 3, 5, 7, seed=1)
    squeezed, means = 0.1 + 0.8 * truth, 0.1 + 0.8 * guess
    by_scale = [
        logit_laplace_nll(squeezed, torch.logit(means), torch.tensor(log_scale)).mean().item()
        for log_scale in torch.linspace(-4, 4, 801).tolist()
    ]
    assert logit_laplace_loss(guess, truth).item() == pytest.approx(min(by_scale), abs=1e-4)


def test_the_logit_laplace_loss_is_finite_with_finite_gradients_anywhere():
    truth = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 3)
    for value in (-9.0, 0.0, 0.5, 1.0, 9.0):
        guess = torch.full((1, 1, 2, 3), value, requires_grad=True)
        loss = logit_laplace_loss(guess, truth)
        loss.backward()
        assert loss.isfinite() and guess.grad is not None and guess.grad.isfinite().all()
    assert logit_laplace_loss(truth, truth).isfinite()


def test_the_gradient_loss_by_hand():
    truth = torch.zeros(1, 1, 2, 2)
    guess = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)  # slopes: 1 along rows, 0 along columns
    assert gradient_loss(guess, truth).item() == pytest.approx(1.0)  # at the next scale nothing is left
    wide = torch.tensor([[0.0, 0, 1, 1]] * 4).view(1, 1, 4, 4)
    # Full scale: a third of the row slopes is 1; half: all of them.
    assert gradient_loss(wide, torch.zeros(1, 1, 4, 4)).item() == pytest.approx((1 / 3 + 1) / 2)


def test_the_gradient_loss_sees_blur_more_than_a_shift_of_colour():
    truth = images(5, 3, 16, 16)
    blurred = F.avg_pool2d(F.pad(truth, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    shifted = truth + (blurred - truth).square().mean().sqrt()  # as far in squared error
    assert l2_loss(shifted, truth).item() == pytest.approx(l2_loss(blurred, truth).item(), rel=1e-4)
    assert gradient_loss(shifted, truth) < 1e-5 < 0.1 < gradient_loss(blurred, truth)
    with pytest.raises(ValueError, match="pictures of 1 x 7 pixels have no slopes to compare"):
        gradient_loss(torch.zeros(1, 3, 1, 7), torch.zeros(1, 3, 1, 7))


# The discriminator's side and the tokenizer's


@pytest.mark.parametrize("kind", KINDS)
@given(real=st.floats(-0.9, 0.9), fake=st.floats(-0.9, 0.9), rise=st.floats(0.01, 3))
def test_losses_fall_the_right_way(kind, real, fake, rise):
    def loss(real, fake):
        return discriminator_loss(torch.tensor([real]), torch.tensor([fake]), kind).item()

    assert loss(real + rise, fake) < loss(real, fake)
    assert loss(real, fake - rise) < loss(real, fake)
    assert generator_loss(torch.tensor([fake + rise]), kind) < generator_loss(torch.tensor([fake]), kind)


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.25 + 1.0) / 2)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))) / 2
    expected += (math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected / 2)
    assert generator_loss(fake, "hinge").item() == pytest.approx(1.0)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(
        (math.log1p(math.exp(3)) + math.log1p(math.exp(-1))) / 2
    )


def test_r1_of_a_linear_discriminator_is_half_its_squared_weights():
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 5, 1))
    weight = discriminator[1].weight
    penalty = r1_penalty(discriminator, images(7, 3, 2, 5))
    assert penalty.item() == pytest.approx(weight.square().sum().item() / 2, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())


def test_lecam_by_hand():
    lecam = LeCam(decay=0.9)
    assert lecam(torch.tensor([1.0, 3.0]), torch.tensor([-2.0])).item() == pytest.approx(2.0**2 + 2.0**2)
    assert (lecam.running_real.item(), lecam.running_fake.item()) == pytest.approx((0.2, -0.2))
    # relu(-1 + 0.2)^2 + relu(0.2 - 0.1)^2
    assert lecam(torch.tensor(-1.0), torch.tensor(0.1)).item() == pytest.approx(0.01)


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last = torch.tensor([3.0, -1.0], requires_grad=True)
    weight = adaptive_weight((last * torch.tensor([3.0, 4.0])).sum(), 0.5 * last[0], last)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight((1e9 * last).sum(), 1e-9 * last.sum(), last).item() == 1e4


def test_the_weight_waits_for_the_discriminator_and_then_rises():
    config = AdversarialConfig(weight=0.5, start=10, warmup_steps=5, ramp_steps=4)
    assert [config.weight_at(step) for step in (0, 10, 14, 15, 16, 17, 18, 99)] == [
        0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5,
    ]  # fmt: skip
    assert AdversarialConfig(weight=0.5, warmup_steps=0, ramp_steps=0).weight_at(0) == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"l1": -1.0}, "l1 is -1.0; a weight must be a number of at least 0"),
        ({"l2": 0.0}, "every loss has weight 0; give one of l2, l1, logit_laplace, gradients, perceptual"),
        ({"perceptual": 0.1}, "perceptual_weights names no file; .* use gradients, which needs none"),
        ({"perceptual": 0.1, "perceptual_weights": "vgg16.pth"}, '"lpips" needs lpips_weights, the file vgg.pth'),
    ],
)
def test_losses_that_cannot_be_computed_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**given)


# Networks that judge


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_patch_discriminator_is_that_of_pix2pix():
    network = make_discriminator(AdversarialConfig(), (64, 96))
    assert isinstance(network, PatchDiscriminator)
    # 4x4 convolutions 3-64-128-256-512-1; a bias on the first and last, BatchNorm (2 numbers a channel) on the others
    assert parameters(network) == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 65 + 2 * (128 + 256 + 512)
    assert network(images(2, 3, 64, 96)).shape == (2, 1, 6, 10)
    assert network(images(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    with pytest.raises(ValueError, match="16 x 64 pixels are too small for a patch discriminator; they need 24 a side"):
        make_discriminator(AdversarialConfig(), (16, 64))


def test_a_logit_of_the_patch_discriminator_sees_70_pixels():
    network = PatchDiscriminator((128, 128), 8).eval()
    pixels = images(1, 3, 128, 128).requires_grad_()
    network(pixels)[0, 0, 7, 7].backward()
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_the_stylegan2_discriminator_has_the_shapes_of_the_original():
    with torch.device("meta"):
        network = StyleGAN2Discriminator((256, 256), 128)

    # rosinality's stylegan2, Discriminator(256, channel_multiplier=2), but widths capped at 8 * 128 instead of 512
    def block(a, b):
        return 9 * a * a + a + 9 * a * b + b + a * b

    widths = [128, 256, 512, 1024, 1024, 1024, 1024]
    expected = 4 * 128 + sum(block(a, b) for a, b in pairwise(widths))
    expected += 9 * 1025 * 1024 + 1024 + 1024 * 16 * 1024 + 1024 + 1024 + 1
    assert parameters(network) == expected


@pytest.mark.parametrize("size", [(4, 4), (16, 24), (20, 20)])
def test_the_stylegan2_discriminator_gives_one_logit_each_and_every_weight_a_gradient(size):
    network = StyleGAN2Discriminator(size, 5)
    logits = network(images(6, 3, *size))
    assert logits.shape == (6,)
    (logits.square().sum() + r1_penalty(network, images(6, 3, *size))).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in network.named_parameters() if "to_logit" not in n
    )
    with pytest.raises(ValueError, match="18 x 20 pixels cannot be halved 2 times"):
        StyleGAN2Discriminator((18, 20), 5)


def test_halving_keeps_a_flat_picture_flat_inside():
    conv = EqualisedConv(1, 1, 1, bias=False, halve=True)
    conv.weight.data.fill_(1.0)
    halved = conv(torch.full((1, 1, 8, 12), 0.7))
    assert halved.shape == (1, 1, 4, 6)
    torch.testing.assert_close(halved[..., 1:-1, 1:-1], torch.full((1, 1, 2, 4), 0.7))


def test_batch_deviation_by_hand():
    x = torch.tensor([0.0, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    assert batch_deviation(x, 2).flatten().tolist() == pytest.approx([1.0, 2.0, 1.0, 2.0])  # pairs (0, 2) and (1, 5)
    assert batch_deviation(x, 4).flatten().tolist() == pytest.approx([x.std(unbiased=False).item()] * 4)
    assert batch_deviation(x[:3], 2).flatten().tolist() == pytest.approx([1e-4] * 3)  # 2 does not divide 3: groups of 1


# Perceptual networks


@pytest.fixture(scope="module")
def vgg_files(tmp_path_factory):
    """Random weights under the public names: torchvision's vgg16 with its classifier, and LPIPS' linear layers."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    trunk = {f"features.{name}": tensor for name, tensor in LPIPS().features.state_dict().items()}
    trunk["classifier.0.weight"] = torch.zeros(3, 2)
    torch.save(trunk, folder / "vgg16.pth")
    lins = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(VGG16_TAP_WIDTHS)}
    torch.save(lins, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def test_the_vgg_trunk_has_the_keys_and_size_of_torchvision(vgg_files):
    names = set(torch.load(vgg_files[0], weights_only=True)) - {"classifier.0.weight"}
    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert names == {f"features.{i}.{kind}" for i in convs for kind in ("weight", "bias")}
    with torch.device("meta"):
        assert parameters(LPIPS().features) == 14_714_688


def test_lpips_is_the_written_out_formula(vgg_files):
    lpips = LPIPS.load(*vgg_files)
    weights, lins = (torch.load(file, weights_only=True) for file in vgg_files)
    ours, theirs = images(2, 3, 17, 19), images(2, 3, 17, 19, seed=1)

    def features(x):
        x = 2 * x - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        taps, i = [], 0
        for count in (2, 2, 3, 3, 3):
            for _ in range(count):
                x = F.relu(F.conv2d(x, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1))
                i += 2
            taps.append(x)
            if len(taps) < 5:
                x, i = F.max_pool2d(x, 2), i + 1
        return [tap / (tap.norm(dim=1, keepdim=True) + 1e-10) for tap in taps]

    expected = torch.zeros(2)
    for k, (a, b) in enumerate(zip(features(ours), features(theirs), strict=True)):
        expected += F.conv2d((a - b) ** 2, lins[f"lin{k}.model.1.weight"])[:, 0].mean((1, 2))
    torch.testing.assert_close(lpips.per_pair(ours, theirs), expected, rtol=1e-4, atol=1e-6)
    assert lpips(ours, ours).item() == 0.0


def test_lpips_stays_frozen_and_gives_its_pictures_finite_gradients(vgg_files):
    config = LossConfig(perceptual=1.0, perceptual_weights=vgg_files[0], lpips_weights=vgg_files[1])
    lpips = make_perceptual(config).train()
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    guess = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(guess, torch.zeros(1, 3, 16, 16) + 0.5).backward()
    assert guess.grad is not None and guess.grad.isfinite().all() and guess.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="pictures of 8 x 16 pixels; LPIPS needs 16 a side"):
        lpips(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_the_published_linear_layers_of_lpips_are_read(vgg_files):
    """torchmetrics ships them."""
    published = f"{torchmetrics.__path__[0]}/functional/image/lpips_models/vgg.pth"
    lpips = LPIPS.load(vgg_files[0], published)
    assert [lin.shape[1] for lin in lpips.lins] == list(VGG16_TAP_WIDTHS)
    assert all((lin >= 0).all() and lin.sum() > 0 for lin in lpips.lins)


def test_a_wrong_weight_file_names_what_does_not_fit(vgg_files, tmp_path):
    with pytest.raises(InputError, match=r"vgg16.pth has no tensor 0 .*expected the weights of the linear layers"):
        LPIPS.load(vgg_files[0], vgg_files[0])
    with pytest.raises(InputError, match=r"vgg.pth has no tensor 0.bias .*expected the weights of torchvision's vgg16"):
        LPIPS.load(vgg_files[1], vgg_files[1])
    weights = torch.load(vgg_files[0], weights_only=True)
    torch.save({**weights, "features.0.bias": torch.zeros(63)}, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"short.pth has 0.bias of shape \(63,\) instead of \(64,\)"):
        LPIPS.load(tmp_path / "short.pth", vgg_files[1])


def timm_name(name):
    """The inverse of the renaming, written out from timm's side."""
    place, *rest = name.split(".")
    if place == "classifier":
        return ".".join([{"0": "head.norm", "2": "head.fc"}[rest[0]], *rest[1:]])
    stage, *rest = rest
    if stage == "0":
        return ".".join(["stem", *rest])
    if int(stage) % 2 == 0:
        return ".".join([f"stages.{int(stage) // 2}.downsample", *rest])
    inside = {"block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1", "block.5": "mlp.fc2"}
    block, *rest = rest
    rest = ".".join(rest)
    for torchvision, timm in inside.items():
        rest = rest.replace(torchvision, timm)
    return f"stages.{(int(stage) - 1) // 2}.blocks.{block}.{rest.replace('layer_scale', 'gamma')}"


def test_convnext_s_has_torchvisions_keys_and_size_and_timms_are_renamed():
    with torch.device("meta"):
        network = ConvNeXt()
    assert parameters(network) == 50_223_688
    names = list(network.state_dict())
    for name in (
        "features.0.0.weight", "features.0.1.bias", "features.1.0.block.0.weight", "features.1.0.layer_scale",
        "features.2.0.weight", "features.2.1.weight", "features.5.26.block.5.bias", "classifier.0.weight",
        "classifier.2.bias",
    ):  # fmt: skip
        assert name in names
    assert timm_name("features.5.26.block.3.weight") == "stages.2.blocks.26.mlp.fc1.weight"
    assert [torchvision_name(timm_name(name)) for name in names] == names


def test_convnext_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[5, 7, 11, 13], num_labels=17)
    torch.manual_seed(0)
    theirs = transformers.ConvNextForImageClassification(config).eval()
    ours = ConvNeXt((1, 2, 1, 1), (5, 7, 11, 13), 17).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("convnext.")
        parts = name.split(".")
        if parts[0] == "embeddings":
            name = f"features.0.{0 if parts[1] == 'patch_embeddings' else 1}.{parts[2]}"
        elif parts[0] == "encoder" and parts[3] == "downsampling_layer":
            name = f"features.{2 * int(parts[2])}.{parts[4]}.{parts[5]}"
        elif parts[0] == "encoder":
            stage, block, layer = parts[2], parts[4], ".".join(parts[5:])
            for their, our in (
                ("layer_scale_parameter", "layer_scale"), ("dwconv", "block.0"), ("layernorm", "block.2"),
                ("pwconv1", "block.3"), ("pwconv2", "block.5"),
            ):  # fmt: skip
                layer = layer.replace(their, our)
            name = f"features.{2 * int(stage) + 1}.{block}.{layer}"
        elif parts[0] == "layernorm":
            name = f"classifier.0.{parts[1]}"
        else:
            name = f"classifier.2.{parts[1]}"
        state[name] = tensor.view(-1, 1, 1) if name.endswith("layer_scale") else tensor
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_the_convnext_distance_is_the_squared_difference_of_logits(monkeypatch, tmp_path):
    monkeypatch.setattr("smalti.image_tokenizers.perceptual.ConvNeXt", lambda: ConvNeXt((1, 1, 1, 1), (4, 4, 4, 4), 7))
    torch.manual_seed(0)
    network = ConvNeXt((1, 1, 1, 1), (4, 4, 4, 4), 7)
    state = {timm_name(name): t.flatten() if name.endswith("scale") else t for name, t in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "convnext.pth")
    distance = ConvNeXtDistance.load(tmp_path / "convnext.pth")
    ours, theirs = images(2, 3, 32, 40), images(2, 3, 32, 40, seed=1)
    assert distance(ours, ours).item() == 0.0
    difference = distance.logits(ours) - distance.logits(theirs)
    assert distance(ours, theirs).item() == pytest.approx(difference.square().mean().item())
    assert difference.abs().sum() > 0
    assert torch.equal(distance.network.classifier[2].weight, network.classifier[2].weight)
    with pytest.raises(InputError, match=r"convnext.pth has no tensor"):
        torch.save({"state_dict": {"stem.0.weight": torch.zeros(1)}}, tmp_path / "convnext.pth")
        ConvNeXtDistance.load(tmp_path / "convnext.pth")
