"""Training an image tokenizer on real pictures, with or without a discriminator: one loop, read top to bottom.

For VQGAN, ViT-VQGAN and TiTok; digits and other small pictures in memory are `train_tokenizer`'s. A run has one of
three stages:
- "pixels": everything learns, from the losses of the rebuilt pictures;
- "proxy_codes": TiTok's first stage, where logits over the codes of a frozen VQGAN learn by cross-entropy;
- "decoder": TiTok's second stage, or an enlarged ViT-VQGAN decoder: encoder and codes stay as they are in
  `start_from`, and what comes after them learns from the losses of the rebuilt pictures.

The run's directory gets `training.csv`, `evaluation.csv`, `warnings.csv`, `curves.png`, tensorboard events,
`reconstructions/`, checkpoints, and `image_tokenizer/`, the averaged weights of the best evaluation so far. Starting
the same run again goes on from its last checkpoint, and ends with the same weights to the last bit as a run that
never stopped (on one machine). Only the logged window of codes that tells the codebook's health begins anew.

Letters: B batch, N pictures, C H W image.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from smalti.data.picture_sets import PicturesConfig, PictureSet, training_batches
from smalti.errors import InputError, require_finite
from smalti.evaluate.reconstruction import (
    ReconstructionReport,
    find_image_tokenizer,
    measure_reconstruction,
    to_images,
)
from smalti.files import new_file
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
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
from smalti.image_tokenizers.quantizer import CodebookHealth, Quantized
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.precision import AUTO, autocast, check_precision
from smalti.progress import stage
from smalti.training.checkpoint import (
    check_writable,
    latest_checkpoint,
    load_checkpoint,
    load_run,
    one_run_at_a_time,
    random_state,
    save_checkpoint,
    set_random_state,
)
from smalti.training.estimate import Estimate, why_slow
from smalti.training.image_tokenizer import (
    STAGE,
    CsvLog,
    as_described_now,
    described,
    draw_reconstructions,
    how_to_mend,
    is_due,
    read_columns,
    running_mean,
    settings_difference,
    with_resolved_precision,
)

TOKENIZER_PARTS = ("loss", "l2", "l1", "logit_laplace", "gradients", "perceptual", "proxy_nats", "quantizer")
ADVERSARY_PARTS = ("generator", "adversarial_weight", "discriminator", "real_logit", "fake_logit", "gradient_norm")
HEALTH_PARTS = ("usage", "perplexity", "dead_codes")
ENCODER_SIDE = ("patches_in", "gather", "latent_tokens", "encoder", "to_code", "latent_norm", "quantizer")
"""The modules and parameters that make codes of pictures, in all three families."""

WORSE_DB = 0.5
"""A run says so when held-out PSNR falls this far below its best from before the discriminator was listened to."""


@dataclass(frozen=True, kw_only=True)
class TrainGANTokenizerConfig:
    """How to train. The learning rate rises over `warmup_steps` and falls by a cosine to `final_share` of its peak.

    What is evaluated and returned is a running mean of the weights with `weight_ema_decay` (0: the weights
    themselves), as it was at the evaluation that was best by `best_by`, or "last". "Every" counts steps; 0 is never.
    `start_from` is the folder of an image tokenizer to start from, or of the run that made it, `proxy` that of the
    VQGAN whose codes the stage "proxy_codes" learns. Products are taken in `precision`: "float32", "bfloat16", or
    "auto", bfloat16 where the hardware multiplies in it.
    """

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_steps: int = 500
    final_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    weight_ema_decay: float = 0.999
    stage: Literal["pixels", "proxy_codes", "decoder"] = "pixels"
    start_from: Path | None = None
    proxy: Path | None = None
    best_by: Literal["psnr_db", "ssim", "lpips", "frechet", "last"] = "psnr_db"
    precision: str = AUTO
    seed: int = 0
    device: str = "cpu"
    evaluate_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    log_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists
        check_precision(self.precision)
        for name in ("steps", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("warmup_steps", "weight_decay", "evaluate_every", "sample_every", "save_every", "log_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.weight_ema_decay < 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"weight_ema_decay {self.weight_ema_decay} and betas {list(self.betas)} must lie in [0, 1)."
            )
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share is {self.final_share}; it must lie in [0, 1].")
        if (self.stage == "proxy_codes") != (self.proxy is not None):
            raise ValueError(f'stage is "{self.stage}" and proxy is {self.proxy}; a proxy belongs to "proxy_codes".')
        if self.stage == "decoder" and self.start_from is None:
            raise ValueError('stage "decoder" keeps an encoder that was trained before; name its folder in start_from.')

    def learning_rate_at(self, step: int) -> float:
        """Linear from 0 (not included) over the warm-up, then half a cosine down to the final share."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        share = self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * share


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


class Losses(NamedTuple):
    """`total` is what the tokenizer's optimiser sees before a discriminator is heard; `parts` are the unweighted
    losses by their names in TOKENIZER_PARTS. `rebuilt` is None in the stage "proxy_codes"."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    rebuilt: Float[Tensor, "B C H W"] | None
    quantized: Quantized


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
    # Pictures, networks, optimisers
    directory = Path(directory)
    if type(model_config) not in _FAMILIES:
        raise ValueError(
            f"{type(model_config).__name__} cannot be trained here; use the config of a VQGAN, ViT-VQGAN or TiTok."
        )
    image_size = model_config.image_size
    rows, measured = _split(pictures, held_out, image_size, reading)
    torch.manual_seed(config.seed)
    model = _make_model(model_config, config).to(config.device)
    proxy = _load_proxy(model, config)
    perceptual = make_perceptual(losses).to(config.device) if losses.perceptual else None
    lpips = perceptual if isinstance(perceptual, LPIPS) else None
    if config.best_by == "lpips" and lpips is None:
        raise InputError('best_by is "lpips", but no LPIPS weights are given; use psnr_db, ssim, frechet or last.')
    adversary = Adversary(adversarial, image_size).to(config.device) if adversarial.weight else None
    averaged = AveragedModel(model, multi_avg_fn=running_mean(config.weight_ema_decay))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    window = CodebookHealth(model_config.codebook_size)

    # Where to write, and what an earlier start of this run has left there
    weights_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    check_writable(directory, expected_bytes=(config.keep_checkpoints + 1) * 4 * weights_bytes)
    latest = latest_checkpoint(directory)
    begun = as_described_now(load_run(latest)) if latest else None
    config = with_resolved_precision(config, begun)
    settings = {"model": model_config, "training": config, "losses": losses, "adversarial": adversarial}
    run = {name: asdict(part) for name, part in settings.items()}
    run["pictures"] = {**asdict(reading), "workers": None, "num_training": len(rows)}  # workers change nothing
    run = described(run)
    progress_state = _Progress()
    start, pending = 0, []
    if latest:
        start, weights, state = load_checkpoint(latest)
        if begun is not None and begun != run:
            raise InputError(
                f"{directory} holds a run with other settings ({settings_difference(begun, run)}); "
                "choose another folder, or remove that one."
            )
        averaged.module.load_state_dict(weights)
        averaged.n_averaged.copy_(state["n_averaged"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if adversary is not None:
            adversary.load_state_dict(state["adversary"])
            adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        pending = list(state["pending"])
        progress_state = _Progress(**state["progress"])
        set_random_state(state["random"])
    columns = ["step", "learning_rate", *TOKENIZER_PARTS, *ADVERSARY_PARTS, *HEALTH_PARTS]
    kept_to = start if latest else -1  # a run killed before its first checkpoint begins its tables anew
    training_log = CsvLog(directory / "training.csv", columns, keep_to=kept_to)
    evaluation_log = CsvLog(directory / "evaluation.csv", ["step", *_EVALUATED], keep_to=kept_to)
    warnings_log = CsvLog(directory / "warnings.csv", ["step", "warning"], keep_to=kept_to)
    board = SummaryWriter(str(directory), purge_step=start)

    watch = None if estimate is None else estimate.watch(lambda: why_slow(config.precision, config.device))
    with stage(STAGE, config.steps, completed=start, show=show_progress, watch=watch) as bar, board:
        read_ahead = training_batches(pictures, rows, image_size, config.batch_size, reading, config.seed, start)
        for step in range(start, config.steps + 1):
            last = step == config.steps
            resumed_here = step == start and start > 0

            # Evaluate, and keep the best
            if (is_due(config.evaluate_every, step) or last) and not resumed_here:
                report = measure_reconstruction(averaged.module, measured, lpips)
                values = {name: getattr(report, name) for name in _EVALUATED}
                evaluation_log.write(step, ["" if value is None else value for value in values.values()])
                for name, value in values.items():
                    if value is not None:
                        board.add_scalar(f"held_out/{name}", value, step)
                if progress_state.is_best(report, config.best_by):
                    save_image_tokenizer(averaged.module, directory / "image_tokenizer")
                if adversary is not None and (warning := progress_state.warning(report, adversarial, step)):
                    warnings_log.write(step, [warning])
                    bar.say(f"step {step}: {warning}")
                draw_curves(directory)
                bar.update(step, f"{report.psnr_db:.1f} dB, usage {report.codebook_usage:.0%}")

            # Sample
            if (is_due(config.sample_every, step) or last) and not resumed_here:
                path = directory / "reconstructions" / f"step_{step:08d}.png"
                draw_reconstructions(averaged.module, measured[:16], 255, path)

            # Save
            if (is_due(config.save_every, step) and step > start) or last:
                if pending:  # weights that are not finite are not saved
                    require_finite(float(torch.stack(pending)[:, 0].mean()), step, how_to_mend(config))
                state = {
                    "run": run,
                    "model": model.state_dict(),
                    "n_averaged": averaged.n_averaged,
                    "optimizer": optimizer.state_dict(),
                    "adversary": adversary.state_dict() if adversary is not None else {},
                    "adversary_optimizer": adversary.optimizer.state_dict() if adversary is not None else {},
                    "pending": pending,
                    "progress": asdict(progress_state),
                    "random": random_state(),
                }
                save_checkpoint(directory, step, averaged.module.state_dict(), state, config.keep_checkpoints)
            if last:
                break

            # The tokenizer's step
            note = None
            model.train()
            if config.stage == "decoder":
                for name in ("quantizer", "latent_norm"):  # an EMA codebook and running means would go on moving
                    if hasattr(model, name):
                        getattr(model, name).eval()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            images = to_images(next(read_ahead), config.device)
            found = tokenizer_losses(model, images, losses, perceptual, proxy, config.precision)
            total, heard = found.total, {}
            if adversary is not None and found.rebuilt is not None and (weight := adversarial.weight_at(step)):
                with autocast(images.device, config.precision):
                    verdict = adversary.verdict(found.rebuilt)
                scale = torch.tensor(weight, device=images.device)
                if adversarial.adaptive:
                    scale = weight * adaptive_weight(found.total, verdict, last_weight(model))
                total = total + scale * verdict
                heard = {"generator": verdict.detach(), "adversarial_weight": scale}
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            heard["gradient_norm"] = nn.utils.clip_grad_norm_(learning, config.gradient_clip)
            optimizer.step()
            averaged.update_parameters(model)

            # The discriminator's step
            if adversary is not None and found.rebuilt is not None and step >= adversarial.start:
                learned = adversary.learn(images, found.rebuilt, step, config.precision)
                heard |= dict(zip(("discriminator", "real_logit", "fake_logit"), learned, strict=True))

            # Log. The losses stay on the device until a row is due: reading them makes the host wait.
            window.update(found.quantized.codes)
            everything = {**found.parts, **heard}
            nothing = torch.tensor(math.nan, device=images.device)
            row = [everything.get(name, nothing).detach().float() for name in (*TOKENIZER_PARTS, *ADVERSARY_PARTS)]
            pending.append(torch.stack(row))
            if is_due(config.log_every, step + 1):
                logged = torch.stack(pending)
                means, loss = logged.nanmean(0).tolist(), float(logged[:, 0].mean())
                pending = []
                require_finite(loss, step + 1, how_to_mend(config))
                note = f"loss {loss:.4g}"
                health = [getattr(window.report(), name) for name in HEALTH_PARTS]
                values = [config.learning_rate_at(step), *means, *health]
                training_log.write(step + 1, ["" if math.isnan(value) else value for value in values])
                for name, value in zip(columns[1:], values, strict=True):
                    if not math.isnan(value):
                        board.add_scalar(f"training/{name}", value, step + 1)
            bar.update(step + 1, note)

    return load_image_tokenizer(directory / "image_tokenizer")


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
        parts |= _picture_losses(rebuilt, images, config, perceptual, precision)
        total = torch.stack(
            [getattr(config, name) * value for name, value in parts.items() if name != "quantizer"]
        ).sum()
    total = total + quantized.loss
    return Losses(total, {"loss": total.detach(), **parts}, rebuilt, quantized)


def _picture_losses(
    rebuilt: Any, images: Tensor, config: LossConfig, perceptual: nn.Module | None, precision: str
) -> dict[str, Tensor]:
    """The unweighted losses of every part that has a weight."""
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


_EVALUATED = tuple(
    field.name
    for field in fields(ReconstructionReport)
    if field.name not in ("num_pictures", "image_size", "num_codes", "codebook_size")
)


@dataclass
class _Progress:
    """What evaluations must remember across a restart: the best figure, the best PSNR before the discriminator was
    listened to, and whether the warning was given."""

    best: float | None = None
    psnr_before: float | None = None
    warned: bool = False

    def is_best(self, report: ReconstructionReport, best_by: str) -> bool:
        if best_by == "last":
            return True
        sign = -1 if best_by in ("lpips", "frechet") else 1
        figure = sign * getattr(report, best_by)
        if self.best is not None and not figure > self.best:
            return False
        self.best = figure
        return True

    def warning(self, report: ReconstructionReport, config: AdversarialConfig, step: int) -> str | None:
        """What to say, once, if reconstruction is worse than before the discriminator was listened to."""
        if config.weight_at(step) == 0 or step == config.start + config.warmup_steps:
            self.psnr_before = max(report.psnr_db, -math.inf if self.psnr_before is None else self.psnr_before)
            return None
        if self.warned or self.psnr_before is None or report.psnr_db > self.psnr_before - WORSE_DB:
            return None
        self.warned = True
        return (
            f"held-out PSNR is {report.psnr_db:.2f} dB, after {self.psnr_before:.2f} dB before the discriminator had a "
            f"say; lower adversarial.weight ({config.weight}), lengthen warmup_steps ({config.warmup_steps}) or "
            "ramp_steps, or set adaptive."
        )


def draw_curves(directory: Path) -> None:
    """Writes `curves.png` from the run's two CSV files."""
    training, evaluation = (read_columns(directory / f"{name}.csv") for name in ("training", "evaluation"))
    figure = Figure(figsize=(16, 3.5), layout="constrained")
    loss, quality, adversary, codebook = figure.subplots(1, 4)
    shown = [name for name in TOKENIZER_PARTS if not all(map(math.isnan, training[name]))]
    for name in shown:
        loss.plot(training["step"], training[name], label=name)
    positive = all(value > 0 for name in shown for value in training[name] if not math.isnan(value))
    loss.set(title="training: losses", xlabel="step", yscale="log" if shown and positive else "linear")
    quality.plot(evaluation["step"], evaluation["psnr_db"], marker=".")
    quality.set(title="held out: reconstruction", xlabel="step", ylabel="PSNR, dB")
    similarity = quality.twinx()
    similarity.plot(evaluation["step"], evaluation["ssim"], marker=".", color="C1")
    similarity.set(ylabel="SSIM (orange)")
    for name in ("real_logit", "fake_logit", "generator"):
        if not all(map(math.isnan, training[name])):
            adversary.plot(training["step"], training[name], label=name)
    adversary.set(title="training: discriminator", xlabel="step")
    codebook.plot(training["step"], training["usage"], label="training, last 65,536 codes")
    codebook.plot(evaluation["step"], evaluation["codebook_usage"], marker=".", label="held out")
    codebook.set(title="codebook", xlabel="step", ylabel="share of codes used", ylim=(0, 1))
    perplexity = codebook.twinx()
    perplexity.plot(training["step"], training["perplexity"], color="C2")
    perplexity.set(ylabel="perplexity (green)", ylim=(0, None))
    for axes in (loss, adversary, codebook):
        if axes.get_lines():
            axes.legend(fontsize="small")
    with new_file(directory / "curves.png", force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _split(
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
    if isinstance(model, ViTVQGAN) and stage == "decoder" and type(model_config) is ViTVQGANConfig:
        enlarged = model.with_decoder(model_config.decoder)
        others = [field.name for field in fields(ViTVQGANConfig) if field.name != "decoder"]
        if all(getattr(theirs, name) == getattr(model_config, name) for name in others):
            return enlarged
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
