"""What an image tokenizer learns from real pictures, with or without a discriminator.

For VQGAN, ViT-VQGAN and TiTok; the loop is `train_loop` of image_tokenizer.py. A run has one of three stages:
- "pixels": everything learns, from the losses of the rebuilt pictures;
- "proxy_codes": TiTok's first stage, where logits over the codes of a frozen VQGAN learn by cross-entropy;
- "decoder": TiTok's second stage, or an enlarged decoder of a VQGAN or ViT-VQGAN: encoder and codes stay as they are in
  `start_from`, and what comes after them learns from the losses of the rebuilt pictures.

Letters: B batch, N pictures, C H W image.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.data.picture_sets import PicturesConfig, PictureSet, training_batches
from smalti.devices import choose_device
from smalti.errors import InputError
from smalti.evaluate.reconstruction import (
    ReconstructionReport,
    find_image_tokenizer,
    measure_reconstruction,
    to_images,
)
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.discriminators import make_discriminator
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
    r1_penalty,
)
from smalti.image_tokenizers.perceptual import LPIPS, make_perceptual
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.precision import autocast
from smalti.training.checkpoint import one_run_at_a_time
from smalti.training.estimate import Estimate
from smalti.training.image_tokenizer import (
    DISCRIMINATOR,
    Figures,
    Learner,
    LoopConfig,
    Losses,
    train_loop,
)

TOKENIZER_PARTS = ("loss", "l2", "l1", "logit_laplace", "gradients", "perceptual", "proxy_nats", "quantizer")
HEALTH_PARTS = ("usage", "perplexity", "dead_codes")
ENCODER_SIDE = ("patches_in", "gather", "latent_tokens", "encoder", "to_code", "latent_norm", "quantizer")
"""The modules and parameters that make codes of pictures, in all three families."""

DECODER_FIELDS = {
    ViTVQGANConfig: ("decoder",),
    VQGANConfig: ("decoder_multipliers", "decoder_attention_levels", "decoder_res_blocks"),
}
"""What may differ from `start_from` where the stage is "decoder": an enlarged decoder behind the same codes."""

WORSE_DB = 0.5
"""A run says so when held-out PSNR falls this far below its best from before the adversarial loss was enabled."""


@dataclass(frozen=True, kw_only=True)
class TrainGANTokenizerConfig(LoopConfig):
    """How to train on real pictures. What is returned is as it was at the evaluation that was best by `best_by`, or
    "last". `start_from` is the folder of an image tokenizer to start from, or of the run that made it, `proxy` that of
    the VQGAN whose codes the stage "proxy_codes" learns.
    """

    num_steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_steps: int = 500
    final_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    stage: Literal["pixels", "proxy_codes", "decoder"] = "pixels"
    start_from: Path | None = None
    proxy: Path | None = None
    best_by: Literal["psnr_db", "ssim", "lpips", "frechet", "last"] = "psnr_db"
    evaluate_every: int = 500

    def __post_init__(self):
        super().__post_init__()
        if (self.stage == "proxy_codes") != (self.proxy is not None):
            raise ValueError(f'stage is "{self.stage}" and proxy is {self.proxy}; a proxy belongs to "proxy_codes".')
        if self.stage == "decoder" and self.start_from is None:
            raise ValueError('stage "decoder" keeps an encoder that was trained before; name its folder in start_from.')


class Adversary(nn.Module):
    """The discriminator with its optimiser and LeCam's running means: `verdict` is the tokenizer's side, `learn` the
    discriminator's. Neither leaves a gradient on the other's weights."""

    def __init__(self, config: AdversarialConfig, image_size: tuple[int, int]):
        super().__init__()
        self.config = config
        self.discriminator = make_discriminator(config, image_size)
        self.lecam = LeCam()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.99))

    def verdict(self, rebuilt: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
        """What the tokenizer pays for being recognised; its gradient reaches `rebuilt` alone."""
        self.discriminator.requires_grad_(False)
        try:
            return generator_loss(self.discriminator(rebuilt), self.config.loss)
        finally:
            self.discriminator.requires_grad_(True)

    def learn(
        self, images: Float[Tensor, "B C H W"], rebuilt: Float[Tensor, "B C H W"], step: int, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the discriminator; returns its loss and the mean logits of real and rebuilt pictures."""
        config = self.config
        with autocast(images.device, precision):
            real, fake = self.discriminator(images), self.discriminator(rebuilt.detach())
        loss = total = discriminator_loss(real, fake, config.loss)
        if config.lecam:
            total = total + config.lecam * self.lecam(real, fake)
        if config.r1 and step % config.r1_every == 0:
            # In float32, and times the steps it stands for.
            total = total + config.r1 * config.r1_every * r1_penalty(self.discriminator, images)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return loss.detach(), real.detach().float().mean(), fake.detach().float().mean()


@one_run_at_a_time
def train_gan_tokenizer(
    pictures: PictureSet,
    held_out: PictureSet | None,
    model_config: VQGANConfig | ViTVQGANConfig | TiTokConfig,
    config: TrainGANTokenizerConfig,
    directory: Path | str,
    *,
    losses: LossConfig,
    adversarial: AdversarialConfig,
    reading: PicturesConfig,
    show_progress: bool = True,
    estimate: Estimate | None = None,
) -> nn.Module:
    """The best image tokenizer of the run, in eval mode; also saved in `directory`. Pictures have the size of
    `model_config.image_size`.

    Raises InputError before the first step if `directory` cannot be written, lacks space, or holds a run of other
    settings, or if a file named by the settings does not fit; and if a loss stops being finite. `estimate` says early
    how long a recipe takes in all, if progress is shown.
    """
    directory = Path(directory)
    if type(model_config) not in _FAMILIES:
        raise ValueError(
            f"{type(model_config).__name__} cannot be trained here; use the config of a VQGAN, ViT-VQGAN or TiTok."
        )
    image_size = model_config.image_size
    rows, measured = split_pictures(pictures, held_out, image_size, reading)
    torch.manual_seed(config.seed)
    config = replace(config, device=str(choose_device(config.device)))
    learner = GANLearner(model_config, config, losses, adversarial, measured)

    def stream(start: int) -> Iterator[Float[Tensor, "B C H W"]]:
        for batch in training_batches(pictures, rows, image_size, config.batch_size, reading, config.seed, start):
            yield to_images(batch, config.device)

    settings = {
        "model": model_config,
        "losses": losses,
        "adversarial": adversarial,
        "pictures": reading,
        "data": {"num_rows": len(rows)},
    }
    return train_loop(learner, stream, config, directory, settings, show_progress=show_progress, estimate=estimate)


class GANLearner(Learner):
    """Weighted losses of the rebuilt pictures, or of a proxy's codes; and a discriminator, if it has a weight."""

    max_value = 255
    parts = (*TOKENIZER_PARTS, *DISCRIMINATOR, "gradient_norm")
    columns = (*parts, *HEALTH_PARTS)
    figures = tuple(
        field.name
        for field in fields(ReconstructionReport)
        if field.name not in ("num_pictures", "image_size", "num_codes", "codebook_size")
    )

    def __init__(
        self,
        model_config: VQGANConfig | ViTVQGANConfig | TiTokConfig,
        config: TrainGANTokenizerConfig,
        weights: LossConfig,
        adversarial: AdversarialConfig,
        held_out: UInt8[Tensor, "N H W 3"],
    ):
        self.config, self.weights, self.adversarial, self.held_out = config, weights, adversarial, held_out
        self.model = _make_model(model_config, config).to(config.device)
        self.proxy = _load_proxy(self.model, config)
        self.perceptual = make_perceptual(weights).to(config.device) if weights.perceptual else None
        self.lpips = self.perceptual if isinstance(self.perceptual, LPIPS) else None
        if config.best_by == "lpips" and self.lpips is None:
            raise InputError('best_by is "lpips", but no LPIPS weights are given; use psnr_db, ssim, frechet or last.')
        image_size = model_config.image_size
        self.adversary = Adversary(adversarial, image_size).to(config.device) if adversarial.weight else None
        self.memory = _Memory()

    def losses(self, images: Float[Tensor, "B C H W"], step: int, precision: str) -> Losses:
        if self.config.stage == "decoder":
            for name in ("quantizer", "latent_norm"):  # an EMA codebook and running means would go on moving
                if hasattr(self.model, name):
                    getattr(self.model, name).eval()
        found = tokenizer_losses(self.model, images, self.weights, self.perceptual, self.proxy, precision)
        weight = self.adversarial.weight_at(step)
        if self.adversary is None or found.rebuilt is None or not weight:
            return found
        with autocast(images.device, precision):
            verdict = self.adversary.verdict(found.rebuilt)
        scale = torch.tensor(weight, device=images.device)
        if self.adversarial.adaptive:
            scale = weight * adaptive_weight(found.total, verdict, last_weight(self.model))
        adversarial = {"generator": verdict.detach(), "adversarial_weight": scale}
        return found._replace(total=found.total + scale * verdict, parts=found.parts | adversarial)

    def learn_besides(
        self, images: Float[Tensor, "B C H W"], found: Losses, step: int, precision: str
    ) -> dict[str, Tensor]:
        if self.adversary is None or found.rebuilt is None or step < self.adversarial.start:
            return {}
        learned = self.adversary.learn(images, found.rebuilt, step, precision)
        return dict(zip(("discriminator", "real_logit", "fake_logit"), learned, strict=True))

    def measure(self, averaged: nn.Module) -> Figures:
        report = measure_reconstruction(averaged, self.held_out, self.lpips)
        return {name: getattr(report, name) for name in self.figures}

    def is_best(self, figures: Figures) -> bool:
        return self.memory.is_best(figures, self.config.best_by)

    def warning(self, figures: Figures, step: int) -> str | None:
        return None if self.adversary is None else self.memory.warning(figures, self.adversarial, step)

    def state(self) -> dict[str, Any]:
        adversary = self.adversary
        return {
            "adversary": adversary.state_dict() if adversary is not None else {},
            "adversary_optimizer": adversary.optimizer.state_dict() if adversary is not None else {},
            "progress": asdict(self.memory),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
            self.adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        self.memory = _Memory(**state["progress"])


def tokenizer_losses(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    config: LossConfig,
    perceptual: nn.Module | None,
    proxy: VQGAN | None,
    precision: str,
) -> Losses:
    """The tokenizer's losses on a batch, without a discriminator's: of the rebuilt pictures or, with a `proxy`, of
    the logits over its codes."""
    with autocast(images.device, precision):
        if proxy is not None:
            titok = cast(TiTok, model)
            quantized = titok.quantizer(titok.encode_latents(images))
            logits, rebuilt = titok.proxy_logits(quantized.latents), None
        else:
            rebuilt, quantized = model(images)
            logits = None
    parts = {"quantizer": quantized.loss}
    if logits is not None and proxy is not None:
        with torch.no_grad():
            proxy_codes = proxy.encode_images(images)
        total = parts["proxy_nats"] = F.cross_entropy(logits.float(), proxy_codes)
    else:
        parts |= picture_losses(rebuilt, images, config, perceptual, precision)
        total = torch.stack(
            [getattr(config, name) * value for name, value in parts.items() if name != "quantizer"]
        ).sum()
    total = total + quantized.loss
    return Losses(total, {"loss": total.detach(), **parts}, rebuilt, quantized)


def picture_losses(
    rebuilt: Any, images: Tensor, config: LossConfig, perceptual: nn.Module | None, precision: str
) -> dict[str, Tensor]:
    """The unweighted losses of rebuilt pictures, of every part that has a weight."""
    functions = {"l2": l2_loss, "l1": l1_loss, "logit_laplace": logit_laplace_loss, "gradients": gradient_loss}
    parts = {name: function(rebuilt, images) for name, function in functions.items() if getattr(config, name)}
    if perceptual is not None:
        with autocast(images.device, precision):
            parts["perceptual"] = perceptual(rebuilt, images)
    return parts


def last_weight(model: nn.Module) -> Tensor:
    """The weight of the layer from which pixels come."""
    if isinstance(model, VQGAN):
        return model.decoder.conv_out.weight
    if isinstance(model, ViTVQGAN):
        return model.patches_out.weight
    titok = cast(Any, model)
    return titok.proxy_decoder.conv_out.weight if titok.config.proxy is not None else titok.head.smooth.weight


@dataclass
class _Memory:
    """What evaluations must remember across a restart: the best figure, the best PSNR before the
    adversarial loss was enabled, and whether the warning was given."""

    best: float | None = None
    psnr_before: float | None = None
    warned: bool = False

    def is_best(self, figures: Figures, best_by: str) -> bool:
        if best_by == "last":
            return True
        sign = -1 if best_by in ("lpips", "frechet") else 1
        figure = sign * cast(float, figures[best_by])
        if self.best is not None and not figure > self.best:
            return False
        self.best = figure
        return True

    def warning(self, figures: Figures, config: AdversarialConfig, step: int) -> str | None:
        """What to say, once, if reconstruction is worse than before the adversarial loss was enabled."""
        psnr_db = cast(float, figures["psnr_db"])
        if config.weight_at(step) == 0 or step == config.start + config.warmup_steps:
            self.psnr_before = max(psnr_db, -math.inf if self.psnr_before is None else self.psnr_before)
            return None
        if self.warned or self.psnr_before is None or psnr_db > self.psnr_before - WORSE_DB:
            return None
        self.warned = True
        return (
            f"held-out PSNR is {psnr_db:.2f} dB, after {self.psnr_before:.2f} dB before the adversarial loss was "
            f"enabled; lower adversarial.weight ({config.weight}), lengthen warmup_steps ({config.warmup_steps}) or "
            "ramp_steps, or set adaptive."
        )


def split_pictures(
    pictures: PictureSet, held_out: PictureSet | None, image_size: tuple[int, int], reading: PicturesConfig
) -> tuple[Int64[np.ndarray, " n"], UInt8[Tensor, "N H W 3"]]:
    """The rows to train on, and the pictures to measure on: those held out, or rows kept back from training."""
    rows = np.arange(len(pictures))
    if held_out is not None:
        return rows, held_out.fitted(range(min(reading.held_out_pictures, len(held_out))), image_size)
    kept_back = min(reading.held_out_pictures, len(rows) // 10)
    if kept_back < 2:
        raise InputError(
            f"{pictures.path} holds {len(rows)} pictures, too few to keep a tenth back; give more, or held-out "
            "pictures of their own."
        )
    order = np.random.default_rng(0).permutation(len(rows))  # the same for every seed, so that runs can be compared
    return np.sort(order[kept_back:]), pictures.fitted([int(row) for row in np.sort(order[:kept_back])], image_size)


_FAMILIES: dict[type, type[nn.Module]] = {VQGANConfig: VQGAN, ViTVQGANConfig: ViTVQGAN, TiTokConfig: TiTok}


def _make_model(model_config: Any, config: TrainGANTokenizerConfig) -> nn.Module:
    """A new model, or the one in `start_from`, with the encoder's side frozen in the stage "decoder"."""
    if config.start_from is None:
        model = _FAMILIES[type(model_config)](model_config)
    else:
        model = _started_from(config.start_from, model_config, config.stage)
    if config.stage == "decoder":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] not in ENCODER_SIDE)
    if config.stage == "proxy_codes":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("proxy_codebook", "proxy_decoder.")))
    return model


def _started_from(directory: Path, model_config: Any, stage: str) -> nn.Module:
    model = load_image_tokenizer(find_image_tokenizer(directory))
    theirs: Any = model.config
    if theirs == model_config:
        return model
    of_decoder = DECODER_FIELDS.get(type(theirs), ()) if stage == "decoder" else ()
    if of_decoder and type(model_config) is type(theirs):
        others = [field.name for field in fields(theirs) if field.name not in of_decoder]
        if all(getattr(theirs, name) == getattr(model_config, name) for name in others):
            return cast(Any, model).with_decoder(*(getattr(model_config, name) for name in of_decoder))
    ours_text, theirs_text = asdict(model_config), asdict(theirs)
    name = next((name for name in ours_text if theirs_text.get(name) != ours_text[name]), "family")
    raise InputError(
        f"start_from {directory} has {name} {theirs_text.get(name)}, the model to train {ours_text.get(name)}; "
        "they must agree."
    )


def _load_proxy(model: nn.Module, config: TrainGANTokenizerConfig) -> VQGAN | None:
    """The frozen VQGAN of the stage "proxy_codes"; its decoder and codebook are copied into the model."""
    if config.proxy is None:
        return None
    proxy = load_image_tokenizer(find_image_tokenizer(config.proxy))
    if not isinstance(model, TiTok) or model.config.proxy is None or not isinstance(proxy, VQGAN):
        raise InputError(
            'stage "proxy_codes" trains a TiTok with target "proxy_codes" on the codes of a VQGAN; the model is a '
            f"{type(model).__name__} and {config.proxy} holds a {type(proxy).__name__}."
        )
    if proxy.config.patch_size != model.config.decoder.patch_size:
        raise InputError(
            f"{config.proxy} has {proxy.config.patch_size} pixels per code, TiTok's decoder patch_size is "
            f"{model.config.decoder.patch_size}; they must be the same."
        )
    model.load_proxy(proxy)
    return proxy.to(config.device).requires_grad_(False)
