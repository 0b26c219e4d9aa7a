"""Losses of image tokenizers: how far a reconstruction is from its picture, and the two sides of a discriminator.

Letters: B batch, C H W image. Images are on the scale [0, 1]; reconstructions are not clamped.

Every function returns one number, a mean, so that weights mean the same at any batch and picture size.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LAPLACE_MARGIN = 0.1
"""Pictures are squeezed into [margin, 1 - margin] before the logit (DALL-E, arXiv:2102.12092, appendix A.3)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The weight of each reconstruction loss; 0 leaves it out. The quantizer's own losses come on top, weighted by
    its config.

    `gradients` compares edges at three scales and needs no other network: it stands in for `perceptual` where the
    public weights are not at hand. `perceptual` needs `perceptual_weights`, the public weight file of its network:
    torchvision's VGG16 together with `lpips_weights` (the linear layers of LPIPS, "vgg.pth"), or a ConvNeXt-S of
    torchvision or timm.
    """

    l2: float = 1.0
    l1: float = 0.0
    logit_laplace: float = 0.0
    gradients: float = 0.0
    perceptual: float = 0.0
    perceptual_network: Literal["lpips", "convnext"] = "lpips"
    perceptual_weights: Path | None = None
    lpips_weights: Path | None = None

    def __post_init__(self):
        weights = ("l2", "l1", "logit_laplace", "gradients", "perceptual")
        for name in weights:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be a number of at least 0.")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"every loss has weight 0; give one of {', '.join(weights)} a weight above 0.")
        if self.perceptual_network not in ("lpips", "convnext"):
            raise ValueError(f'perceptual_network is {self.perceptual_network!r}; use "lpips" or "convnext".')
        if self.perceptual and self.perceptual_weights is None:
            raise ValueError(
                f"perceptual is {self.perceptual}, but perceptual_weights names no file; give the public weights of "
                "VGG16 or ConvNeXt-S, or set perceptual to 0 and use gradients, which needs none."
            )
        if self.perceptual and self.perceptual_network == "lpips" and self.lpips_weights is None:
            raise ValueError('perceptual_network "lpips" needs lpips_weights, the file vgg.pth of its linear layers.')


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator beside the tokenizer; `weight` 0 trains without one.

    It begins to learn at step `start`, alone for `warmup_steps`: a discriminator that has learned nothing would
    only add noise to the tokenizer. Its gradient then reaches the tokenizer, at a weight that rises evenly over
    `ramp_steps`. With `adaptive`, that weight is multiplied by the ratio of the gradients of both losses at the
    decoder's last layer (VQGAN, arXiv:2012.09841, equation 7).

    `channels` is the width at full resolution: 64 in the PatchGAN of LlamaGen and for a StyleGAN2 discriminator at
    512 x 512. `r1` is the penalty's gamma, applied every `r1_every` steps; `lecam` the weight of the LeCam
    regulariser (`LeCam`).
    """

    weight: float = 0.0
    network: Literal["patch", "stylegan2"] = "patch"
    loss: Literal["hinge", "non_saturating"] = "hinge"
    adaptive: bool = False
    start: int = 0
    warmup_steps: int = 500
    ramp_steps: int = 500
    channels: int = 64
    learning_rate: float = 1e-4
    r1: float = 0.0
    r1_every: int = 16
    lecam: float = 0.0

    def __post_init__(self):
        for name in ("weight", "start", "warmup_steps", "ramp_steps", "r1", "lecam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number of at least 0.")
        for name in ("channels", "r1_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if self.network not in ("patch", "stylegan2"):
            raise ValueError(f'network is {self.network!r}; use "patch" or "stylegan2".')
        if self.loss not in ("hinge", "non_saturating"):
            raise ValueError(f'loss is {self.loss!r}; use "hinge" or "non_saturating".')

    def weight_at(self, step: int) -> float:
        """What the discriminator's verdict weighs in the tokenizer's loss at this step."""
        since = step - self.start - self.warmup_steps
        if since < 0:
            return 0.0
        return self.weight * min(1.0, (since + 1) / max(1, self.ramp_steps))


# Pixels ----------------------------------------------------------------------------------------------------------


def l2_loss(reconstructions: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    return F.mse_loss(reconstructions.float(), images)


def l1_loss(reconstructions: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    return F.l1_loss(reconstructions.float(), images)


def logit_laplace_nll(
    images: Float[Tensor, "*shape"], mean_logits: Float[Tensor, "*shape"], log_scale: Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """-ln of the logit-Laplace density of each value in (0, 1), in nats: the density of sigmoid(X) where X is
    Laplace with mean `mean_logits` and scale exp(`log_scale`) (DALL-E, arXiv:2102.12092, equation 2)."""
    deviation = (torch.logit(images) - mean_logits).abs() * torch.exp(-log_scale)
    return deviation + log_scale + math.log(2) + images.log() + torch.log1p(-images)


def logit_laplace_loss(
    reconstructions: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]
) -> Float[Tensor, ""]:
    """Mean logit-Laplace negative log-likelihood of squeezed pictures, in nats per dim.

    DALL-E's decoder predicts a scale for each value; decoders with one output per value, as here, leave none to
    predict, so the scale is the likeliest one for the whole batch, no smaller than 0.01 lest a perfect fit have no
    bound. Reconstructions further than about a tenth outside [0, 1] get no gradient from it.
    """
    squeezed = LAPLACE_MARGIN + (1 - 2 * LAPLACE_MARGIN) * images
    means = LAPLACE_MARGIN + (1 - 2 * LAPLACE_MARGIN) * reconstructions.float()
    mean_logits = torch.logit(means, eps=LAPLACE_MARGIN / 10)
    scale = (torch.logit(squeezed) - mean_logits).abs().mean().clamp(min=0.01)
    return logit_laplace_nll(squeezed, mean_logits, scale.log()).mean()


def gradient_loss(reconstructions: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean absolute difference of the slopes along rows and columns, averaged over scales of 1, 2 and 4 pixels.

    A blurred edge costs little in squared error and much here. Scales at which a picture would be a single row or
    column are left out.
    """
    difference = reconstructions.float() - images  # slopes are linear: the slope of the difference is enough
    losses = []
    for _ in range(3):
        if min(difference.shape[-2:]) < 2:
            break
        losses.append(difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean())
        difference = F.avg_pool2d(difference, 2)
    if not losses:
        raise ValueError(f"pictures of {images.shape[-2]} x {images.shape[-1]} pixels have no slopes to compare.")
    return torch.stack(losses).mean()


# The discriminator -----------------------------------------------------------------------------------------------
# Its logits are high where it takes a picture to be real.


def discriminator_loss(
    real_logits: Float[Tensor, "..."], fake_logits: Float[Tensor, "..."], kind: Literal["hinge", "non_saturating"]
) -> Float[Tensor, ""]:
    """Half the sum of both sides: falls when real logits rise and when fake logits fall."""
    real_logits, fake_logits = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits: Float[Tensor, "..."], kind: Literal["hinge", "non_saturating"]) -> Float[Tensor, ""]:
    """What the tokenizer pays for being recognised: falls when fake logits rise."""
    if kind == "hinge":
        return -fake_logits.float().mean()
    return F.softplus(-fake_logits.float()).mean()


def r1_penalty(discriminator: nn.Module, images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Half the mean squared norm of the logits' gradient at real pictures (Mescheder et al. 2018,
    arXiv:1801.04406, equation 9, without gamma). The logits of a picture are summed first."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(images).float().sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


class LeCam(nn.Module):
    """relu(R - F')^2 + relu(R' - F)^2, with R and F the mean logits of real and reconstructed pictures and R' and
    F' their running means (Tseng et al. 2021, arXiv:2104.03310): it holds a discriminator back that sees few
    pictures. The running means move after they were used."""

    running_real: Tensor
    running_fake: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("running_real", torch.zeros(()))
        self.register_buffer("running_fake", torch.zeros(()))

    def forward(self, real_logits: Float[Tensor, "..."], fake_logits: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        real, fake = real_logits.float().mean(), fake_logits.float().mean()
        # Copies: the backward pass needs the means as they were.
        past_real, past_fake = self.running_real.clone(), self.running_fake.clone()
        with torch.no_grad():
            self.running_real.lerp_(real, 1 - self.decay)
            self.running_fake.lerp_(fake, 1 - self.decay)
        return F.relu(real - past_fake).square() + F.relu(past_real - fake).square()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""], adversarial_loss: Float[Tensor, ""], last_weight: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """By how much to multiply the adversarial loss so that at the decoder's last layer its gradient is as large as
    that of the reconstruction loss; in float32, at most 10,000 (VQGAN, arXiv:2012.09841, equation 7)."""
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)
    return ratio.clamp(0, 1e4).detach()
