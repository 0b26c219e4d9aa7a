"""Training an upsampler on what a frozen image tokenizer rebuilds, read top to bottom.

A step takes pictures at the size that comes out, makes them small, has the image tokenizer rebuild them, and learns to
turn crops of that into the same crops of the pictures. Losses, discriminator and averaging are those of image
tokenizers' trainings; so are resuming (to the last bit, on one machine) and the errors.

The run's directory gets `training.csv`, `evaluation.csv`, checkpoints, and `upsampler/`, the averaged weights of the
evaluation with the best PSNR so far.

Letters: B batch, N pictures, H W rows and columns of small pictures, s scale.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from smalti.data.picture_sets import PicturesConfig, PictureSet, training_batches
from smalti.devices import choose_device
from smalti.errors import InputError, require_finite
from smalti.evaluate.reconstruction import to_images
from smalti.evaluate.upsampling import UPSAMPLER, measure_upsampling, rebuilt, shrunk
from smalti.image_tokenizers.losses import AdversarialConfig, LossConfig
from smalti.image_tokenizers.perceptual import make_perceptual
from smalti.precision import autocast, resolve_precision
from smalti.training.checkpoint import check_writable, one_run_at_a_time, random_state, set_random_state
from smalti.training.curves import CsvLog
from smalti.training.estimate import Estimate, why_slow
from smalti.training.gan_tokenizer import Adversary, picture_losses, split_pictures
from smalti.training.image_tokenizer import LoopConfig, how_to_mend
from smalti.training.run import (
    Run,
    going_astray,
    is_due,
    require_finite_weights,
    set_learning_rate,
    training_stage,
    update_average,
)
from smalti.training.settings import check_ranges
from smalti.upsample import Upsampler, UpsamplerConfig, load_upsampler, save_upsampler
from smalti.weights import weights_sha256

STAGE = "upsampler"
PARTS = ("loss", "l2", "l1", "logit_laplace", "gradients", "perceptual", "generator", "discriminator", "gradient_norm")
FIGURES = ("psnr_db", "ssim", "distance")


@dataclass(frozen=True, kw_only=True)
class TrainUpsamplerConfig(LoopConfig):
    """How to train. `crop` is the side of the small pictures' crops that a step learns from; 0: whole pictures."""

    num_steps: int = 20_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    evaluate_every: int = 500
    crop: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, not_negative="crop")


class Batch:
    """Crops of rebuilt small pictures, and the same crops of the pictures."""

    def __init__(self, image_tokenizer: Any, model_config: UpsamplerConfig, config: TrainUpsamplerConfig):
        self.image_tokenizer, self.model_config, self.config = image_tokenizer, model_config, config

    def of(
        self, pictures: UInt8[Tensor, "B sH sW 3"], step: int
    ) -> tuple[Float[Tensor, "B 3 h w"], Float[Tensor, "B 3 sh sw"]]:
        """Where the crops are depends on the seed and the step alone."""
        truth = to_images(pictures, self.config.device)
        small = rebuilt(self.image_tokenizer, shrunk(truth, self.model_config.image_size))
        rows, columns = (min(self.config.crop or side, side) for side in self.model_config.image_size)
        if (rows, columns) == self.model_config.image_size:
            return small, truth
        s, places = self.model_config.scale, np.random.default_rng([self.config.seed, step])
        tops = places.integers(0, small.shape[2] - rows, len(small), endpoint=True).tolist()
        lefts = places.integers(0, small.shape[3] - columns, len(small), endpoint=True).tolist()
        corners = list(zip(small, truth, tops, lefts, strict=True))
        return (
            torch.stack([one[:, top : top + rows, left : left + columns] for one, _, top, left in corners]),
            torch.stack(
                [one[:, s * top : s * (top + rows), s * left : s * (left + columns)] for _, one, top, left in corners]
            ),
        )


@one_run_at_a_time
def train_upsampler(
    pictures: PictureSet,
    held_out: PictureSet | None,
    image_tokenizer: Any,
    model_config: UpsamplerConfig,
    config: TrainUpsamplerConfig,
    directory: Path | str,
    *,
    losses: LossConfig,
    adversarial: AdversarialConfig,
    reading: PicturesConfig,
    show_progress: bool = True,
    estimate: Estimate | None = None,
) -> Upsampler:
    """The upsampler of the best evaluation, in eval mode; also saved in `directory`.

    Raises InputError before the first step if `directory` cannot be written, lacks space, or holds a run of other
    settings, if the image tokenizer cannot take pictures of `model_config.image_size`, or if pictures are too small;
    and if the loss stops being finite.
    """
    directory, mend = Path(directory), how_to_mend(config)
    if adversarial.adaptive:
        raise InputError("adversarial.adaptive needs a last layer without weight norm, and an upsampler has none.")
    rows, measured = split_pictures(pictures, held_out, model_config.output_size, reading)
    _check_sizes(pictures, image_tokenizer, model_config)
    torch.manual_seed(config.seed)
    config = replace(config, device=str(choose_device(config.device)))
    image_tokenizer = image_tokenizer.to(config.device).eval().requires_grad_(False)
    model = Upsampler(model_config).to(config.device)
    averaged, perceptual = deepcopy(model), make_perceptual(losses).to(config.device) if losses.perceptual else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    adversary, batch = None, Batch(image_tokenizer, model_config, config)
    if adversarial.weight:
        side = [min(config.crop or side, side) * model_config.scale for side in model_config.image_size]
        adversary = Adversary(adversarial, (side[0], side[1])).to(config.device)

    # Where to write, and what an earlier start of this run has left there
    weights_bytes = 4 * model.num_parameters
    check_writable(directory, expected_bytes=(config.keep_checkpoints + 1) * 4 * weights_bytes)
    run = Run(directory)
    config = replace(config, precision=resolve_precision(config.precision, config.device, begun=run.precision))
    settings = {
        "model": model_config, "losses": losses, "adversarial": adversarial, "pictures": reading,
        "data": {"num_rows": len(rows), "image_tokenizer": weights_sha256(image_tokenizer)}, "training": config,
    }  # fmt: skip
    start, best = 0, -math.inf
    if (checkpoint := run.claim(settings)) is not None:
        start, state = checkpoint.step, checkpoint.training_state
        averaged.load_state_dict(checkpoint.weights)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if adversary is not None:
            adversary.load_state_dict(state["adversary"])
            adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        best = state["best"]
        set_random_state(state["random"])
    keep_to = start if checkpoint else -1
    log = CsvLog(directory / "training.csv", ["step", "learning_rate", *PARTS], keep_to=keep_to)
    evaluation = CsvLog(directory / "evaluation.csv", ["step", *FIGURES], keep_to=keep_to)
    recent: list[dict[str, float]] = []

    why = partial(why_slow, config.precision, config.device)
    shown = training_stage(STAGE, config.num_steps, completed=start, show=show_progress, estimate=estimate, why=why)
    with shown as progress:
        size = model_config.output_size
        stream = training_batches(pictures, rows, size, config.batch_size, reading, config.seed, start)
        for step in range(start, config.num_steps + 1):
            last, resumed_here = step == config.num_steps, step == start > 0
            evaluates = (is_due(config.evaluate_every, step) or last) and not resumed_here
            saves = (is_due(config.checkpoint_every, step) and step > start) or last
            if evaluates or saves:  # weights that are not finite are neither measured nor saved
                require_finite_weights(model, step, mend)

            if evaluates:
                with going_astray(averaged, step, mend):
                    found = measure_upsampling(
                        {UPSAMPLER: averaged.eval().upsample}, image_tokenizer, measured, model_config.image_size
                    )[UPSAMPLER]
                evaluation.write(step, {name: getattr(found, name) for name in FIGURES})
                if found.psnr_db > best:
                    best = found.psnr_db
                    save_upsampler(averaged, directory / "upsampler")
                progress.update(step, f"{found.psnr_db:.2f} dB")

            if saves:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "adversary": adversary.state_dict() if adversary is not None else {},
                    "adversary_optimizer": adversary.optimizer.state_dict() if adversary is not None else {},
                    "best": best,
                    "random": random_state(),
                }
                run.save(step, averaged.state_dict(), state, keep=config.keep_checkpoints)
            if last:
                break

            rate, note = config.learning_rate_at(step), None
            set_learning_rate(optimizer, rate)
            with going_astray(model, step, mend):
                small, truth = batch.of(next(stream), step)
                parts = _learn(model.train(), optimizer, small, truth, losses, perceptual, adversary, step, config)
            update_average(averaged, model, step, config.ema_decay if step else 0.0)
            recent.append(parts)
            if is_due(config.log_every, step + 1):
                row = {name: float(np.mean([one[name] for one in recent if name in one])) for name in recent[-1]}
                require_finite(row["loss"], step + 1, mend)
                log.write(step + 1, {**row, "learning_rate": rate})
                note, recent = f"loss {row['loss']:.4g}", []
            progress.update(step + 1, note)
    return load_upsampler(directory / "upsampler")


def _learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    small: Float[Tensor, "B 3 h w"],
    truth: Float[Tensor, "B 3 sh sw"],
    losses: LossConfig,
    perceptual: nn.Module | None,
    adversary: Adversary | None,
    step: int,
    config: TrainUpsamplerConfig,
) -> dict[str, float]:
    """One step; returns its losses by name."""
    with autocast(truth.device, config.precision):
        ours = model(small)
    parts = picture_losses(ours, truth, losses, perceptual, config.precision)
    total = torch.stack([getattr(losses, name) * value for name, value in parts.items()]).sum()
    weight = 0.0 if adversary is None else adversary.config.weight_at(step)
    if adversary is not None and weight:
        with autocast(truth.device, config.precision):
            parts["generator"] = adversary.verdict(ours)
        total = total + weight * parts["generator"]
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    parts |= {
        "loss": total,
        "gradient_norm": nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf),
    }
    optimizer.step()
    if adversary is not None and step >= adversary.config.start:
        parts["discriminator"], _, _ = adversary.learn(truth, ours, step, config.precision)
    return {name: float(value.detach()) for name, value in parts.items()}


def _check_sizes(pictures: PictureSet, image_tokenizer: Any, config: UpsamplerConfig) -> None:
    first, (height, width) = pictures.picture(0), config.output_size
    if first.width < width or first.height < height:
        raise InputError(
            f"{pictures.path}: its first picture has {first.width}×{first.height} pixels, and ×{config.scale} of "
            f"{config.image_size[0]}×{config.image_size[1]} gives {height}×{width}: an upsampler learns from pictures "
            "of at least that size."
        )
    try:
        found = rebuilt(image_tokenizer.eval(), torch.zeros(1, 3, *config.image_size))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the image tokenizer cannot take pictures of {config.image_size[0]}×{config.image_size[1]}: {error}"
        ) from error
    if tuple(found.shape[2:]) != config.image_size:
        raise InputError(f"the image tokenizer gives pictures of {tuple(found.shape[2:])}, not {config.image_size}.")
