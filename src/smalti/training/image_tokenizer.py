"""Training an image tokenizer: one loop for all families, read top to bottom.

What a step learns from is a `Learner`'s: `PlainLearner` here, for digits and other small pictures in memory, and
`GANLearner` in gan_tokenizer.py, with perceptual losses and a discriminator, for pictures from files.

The run's directory gets `training.csv`, `evaluation.csv`, `warnings.csv`, `curves.png`, tensorboard events,
`reconstructions/` (pictures above, reconstructions below), checkpoints, and `image_tokenizer/`, the averaged weights of
the best evaluation so far. Starting the same run again goes on from its last checkpoint, and ends with the same weights
to the last bit as a run that never stopped (on one machine). Only the logged window of codes that tells the codebook's
health begins anew.

Letters: B batch, N pictures, C H W image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from smalti.data.loader import batches
from smalti.devices import choose_device
from smalti.errors import InputError, require_finite
from smalti.files import new_file
from smalti.image_tokenizers import FAMILIES, load_image_tokenizer, save_image_tokenizer
from smalti.image_tokenizers.quantizer import CodebookHealth, Quantized
from smalti.precision import AUTO, autocast, check_precision, resolve_precision
from smalti.progress import Stage
from smalti.training.checkpoint import check_writable, one_run_at_a_time, random_state, set_random_state
from smalti.training.curves import CsvLog, read_columns
from smalti.training.estimate import Estimate, why_slow
from smalti.training.run import (
    Run,
    going_astray,
    is_due,
    require_finite_weights,
    scheduled,
    set_learning_rate,
    training_stage,
    update_average,
)
from smalti.training.settings import check_ranges

STAGE = "image tokenizer"
NO_LOSSES = ("step", "learning_rate", "gradient_norm", "usage", "perplexity", "dead_codes")
"""Columns of training.csv that are no losses of the tokenizer; nor are those of a discriminator."""
DISCRIMINATOR = ("generator", "adversarial_weight", "discriminator", "real_logit", "fake_logit")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop is told, the same for all families, which differ in some defaults.

    The learning rate rises over `warmup_steps` and falls by a cosine to `final_share` of its peak. What is evaluated
    and returned is a running mean of the weights with `ema_decay` (0: the weights themselves). "Every" counts steps; 0
    is never. Products are taken in `precision`: "float32", "bfloat16", or "auto", bfloat16 where the hardware
    multiplies in it.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    final_share: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float | None = 1.0
    """Gradients of a larger norm are scaled down to it; None: never."""
    ema_decay: float
    precision: str = AUTO
    seed: int = 0
    device: str = AUTO
    """As `smalti.devices` knows them."""
    evaluate_every: int
    sample_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists
        check_precision(self.precision)
        check_ranges(
            self,
            positive="num_steps batch_size learning_rate max_grad_norm keep_checkpoints",
            not_negative="warmup_steps weight_decay evaluate_every sample_every checkpoint_every log_every",
            below_one="ema_decay betas",
            shares="final_share",
        )

    def learning_rate_at(self, step: int) -> float:
        return scheduled(
            step,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            final_share=self.final_share,
            lowest_at=self.num_steps,
        )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(LoopConfig):
    """How to train on small pictures in memory. `max_value` is the channel value that stands for 1.0 (3 for digits of
    levels 0..3)."""

    num_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_share: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    ema_decay: float = 0.99
    max_value: int = 255
    held_out_pictures: int = 1000
    evaluate_every: int = 200

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive="max_value held_out_pictures")


class Losses(NamedTuple):
    """`total` is what the tokenizer's optimiser sees; `parts` are losses by their names in `Learner.parts`, the first
    the one that is shown. `rebuilt` is None where codes alone are learned."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    rebuilt: Float[Tensor, "B C H W"] | None
    quantized: Quantized


Figures = Mapping[str, float | None]


class Learner(ABC):
    """What the loop trains, and how one step learns."""

    model: nn.Module
    held_out: UInt8[Tensor, "N H W C"]
    """Pictures to measure on, and to draw."""
    max_value: int
    """The channel value of theirs that stands for 1.0."""
    parts: tuple[str, ...]
    """What a step gives, in the order of the log."""
    columns: tuple[str, ...]
    """Of training.csv, besides step and learning rate."""
    figures: tuple[str, ...]
    """Of an evaluation."""

    @abstractmethod
    def losses(self, images: Float[Tensor, "B C H W"], step: int, precision: str) -> Losses: ...

    def learn_besides(
        self, images: Float[Tensor, "B C H W"], found: Losses, step: int, precision: str
    ) -> dict[str, Tensor]:
        """What else learns after the tokenizer; more parts."""
        return {}

    @abstractmethod
    def measure(self, averaged: nn.Module) -> Figures: ...

    def is_best(self, figures: Figures) -> bool:
        """Whether the image tokenizer of an evaluation is to be kept."""
        return True

    def warning(self, figures: Figures, step: int) -> str | None:
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the tokenizer's own state."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most have none)
        """Takes back what `state` gave."""


class PlainLearner(Learner):
    """A family's own reconstruction loss, and its quantizer's."""

    parts = columns = ("reconstruction_loss", "codebook_loss", "commitment_loss", "entropy_loss", "gradient_norm")

    def __init__(self, model: nn.Module, held_out: UInt8[Tensor, "N H W C"], max_value: int):
        self.model, self.held_out, self.max_value = model, held_out, max_value
        self.figures = HeldOutReport._fields

    def losses(self, images: Float[Tensor, "B C H W"], step: int, precision: str) -> Losses:
        with autocast(images.device, precision):
            loss, quantized = self.model(images)
        values = (loss, quantized.codebook_loss, quantized.commitment_loss, quantized.entropy_loss)
        return Losses(loss + quantized.loss, dict(zip(self.parts, values, strict=False)), None, quantized)

    def measure(self, averaged: nn.Module) -> Figures:
        return evaluate_reconstruction(averaged, self.held_out, self.max_value)._asdict()


@one_run_at_a_time
def train_tokenizer(
    images: UInt8[np.ndarray, "N H W C"] | UInt8[Tensor, "N H W C"],
    held_out: UInt8[np.ndarray, "M H W C"] | UInt8[Tensor, "M H W C"],
    model_config: Any,
    config: TrainTokenizerConfig,
    directory: Path | str,
    *,
    show_progress: bool = True,
    estimate: Estimate | None = None,
) -> nn.Module:
    """The trained image tokenizer of `model_config`'s family, in eval mode; also saved in `directory`.

    Raises InputError before the first step if `directory` cannot be written, lacks space, or holds a run of
    other settings; and if the loss stops being finite. `estimate` says early how long a recipe takes in all, if
    progress is shown.
    """
    images = _checked("training", images, config.max_value)
    held_out = _checked("held-out", held_out, config.max_value)[: config.held_out_pictures]
    torch.manual_seed(config.seed)
    config = replace(config, device=str(choose_device(config.device)))
    learner = PlainLearner(_family_of(model_config)(model_config).to(config.device), held_out, config.max_value)

    def stream(start: int) -> Iterator[Float[Tensor, "B C H W"]]:
        for rows in batches(len(images), config.batch_size, config.seed, start):
            yield _to_images(images[torch.from_numpy(rows)], config.max_value, config.device)

    settings = {"model": model_config}
    return train_loop(
        learner, stream, config, Path(directory), settings, show_progress=show_progress, estimate=estimate
    )


def train_loop(
    learner: Learner,
    stream: Callable[[int], Iterator[Float[Tensor, "B C H W"]]],
    config: LoopConfig,
    directory: Path,
    settings: dict[str, Any],
    *,
    show_progress: bool,
    estimate: Estimate | None,
) -> nn.Module:
    """The image tokenizer of the best evaluation, as `directory` has it. `stream` gives the batches from a step on,
    `settings` are all that decides the weights besides `config`."""
    model, averaged, mend = learner.model, deepcopy(learner.model), how_to_mend(config)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    losses = RecentLosses(learner.parts, cast(Any, model.config).codebook_size, mend)

    # Where to write, and what an earlier start of this run has left there
    weights_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    check_writable(directory, expected_bytes=(config.keep_checkpoints + 1) * 4 * weights_bytes)
    run = Run(directory)
    config = replace(config, precision=resolve_precision(config.precision, config.device, begun=run.precision))
    start = 0
    if (checkpoint := run.claim({**settings, "training": config})) is not None:
        start, weights, state, _ = checkpoint
        averaged.load_state_dict(weights)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        learner.load_state(state)
        losses.pending = [row.to(config.device) for row in state["pending"]]
        set_random_state(state["random"])
    # A run killed before its first checkpoint begins its tables anew.
    logs = Logs(directory, learner, start, keep_to=start if checkpoint else -1)

    why = partial(why_slow, config.precision, config.device)
    shown = training_stage(STAGE, config.num_steps, completed=start, show=show_progress, estimate=estimate, why=why)
    with shown as progress, logs.board:
        images_from_start = stream(start)
        for step in range(start, config.num_steps + 1):
            last = step == config.num_steps
            resumed_here = step == start > 0
            evaluates = (is_due(config.evaluate_every, step) or last) and not resumed_here
            saves = (is_due(config.checkpoint_every, step) and step > start) or last
            if evaluates or saves:  # weights that are not finite are neither measured nor saved
                losses.require_finite(step)
                require_finite_weights(model, step, mend)

            if evaluates:
                _evaluate_and_keep(learner, averaged, step, directory, logs, progress, mend)

            if (is_due(config.sample_every, step) or last) and not resumed_here:
                path = directory / "reconstructions" / f"step_{step:08d}.png"
                with going_astray(averaged, step, mend):
                    draw_reconstructions(averaged, learner.held_out[:16], learner.max_value, path)

            if saves:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "pending": losses.pending,
                    "random": random_state(),
                    **learner.state(),
                }
                run.save(step, averaged.state_dict(), state, keep=config.keep_checkpoints)
            if last:
                break

            images, note = next(images_from_start), None
            set_learning_rate(optimizer, config.learning_rate_at(step))
            with going_astray(model, step, mend):
                parts, codes = _learn(learner, averaged, optimizer, learning, images, step, config)
            losses.add(parts, codes)
            if is_due(config.log_every, step + 1):
                row = losses.take(step + 1)
                note = f"loss {row[learner.parts[0]]:.4g}"
                logs.training(step + 1, {**row, "learning_rate": config.learning_rate_at(step)})
            progress.update(step + 1, note)

    if not (directory / "image_tokenizer").exists():  # a run that ended before there was one from every evaluation
        save_image_tokenizer(averaged, directory / "image_tokenizer")
    return load_image_tokenizer(directory / "image_tokenizer")


class RecentLosses:
    """The losses since the last row of training.csv, and how much of the codebook is used. The losses stay on the
    device until the row is due: reading them makes the host wait."""

    def __init__(self, parts: Sequence[str], codebook_size: int, mend: str):
        self.parts, self.mend = parts, mend
        self.pending: list[Float[Tensor, " parts"]] = []
        self.health = CodebookHealth(codebook_size)

    def add(self, values: Mapping[str, Tensor], codes: Tensor) -> None:
        """One step's losses by name, some of which may be missing, and its codes."""
        self.health.update(codes)
        nothing = torch.tensor(math.nan, device=codes.device)
        self.pending.append(torch.stack([values.get(name, nothing).detach().float() for name in self.parts]))

    def require_finite(self, step: int) -> None:
        """Raises InputError if the first of the losses is not finite."""
        if self.pending:
            require_finite(float(torch.stack(self.pending)[:, 0].mean()), step, self.mend)

    def take(self, step: int) -> dict[str, float]:
        """The row's means by name, without those that no step had. Raises InputError if the first is not finite."""
        self.require_finite(step)
        means = torch.stack(self.pending).nanmean(0).tolist()
        self.pending = []
        row = {name: value for name, value in zip(self.parts, means, strict=True) if not math.isnan(value)}
        return {**row, **self.health.report()._asdict()}


class Logs:
    """The tables of a run and the same for tensorboard, from the step `start` on. Of an earlier start's rows those up
    to `keep_to` stay."""

    def __init__(self, directory: Path, learner: Learner, start: int, *, keep_to: int):
        def table(name: str, columns: Sequence[str]) -> CsvLog:
            return CsvLog(directory / f"{name}.csv", ["step", *columns], keep_to=keep_to)

        self._training = table("training", ["learning_rate", *learner.columns])
        self._evaluation = table("evaluation", learner.figures)
        self._warnings = table("warnings", ["warning"])
        self.board = SummaryWriter(str(directory), purge_step=start)

    def training(self, step: int, row: Figures) -> None:
        self._write(self._training, "training", step, row)

    def evaluation(self, step: int, figures: Figures) -> None:
        self._write(self._evaluation, "held_out", step, figures)

    def warning(self, step: int, text: str) -> None:
        self._warnings.write(step, {"warning": text})

    def _write(self, table: CsvLog, group: str, step: int, row: Figures) -> None:
        table.write(step, row)
        for name, value in row.items():
            if value is not None:
                self.board.add_scalar(f"{group}/{name}", value, step)


def _evaluate_and_keep(
    learner: Learner, averaged: nn.Module, step: int, directory: Path, logs: Logs, progress: Stage, mend: str
) -> None:
    """Measures the averaged weights on held-out pictures, writes the figures down, and keeps the best tokenizer."""
    with going_astray(averaged, step, mend):
        figures = learner.measure(averaged)
    logs.evaluation(step, figures)
    if learner.is_best(figures):
        save_image_tokenizer(averaged, directory / "image_tokenizer")
    if (warning := learner.warning(figures, step)) is not None:
        logs.warning(step, warning)
        progress.say(f"step {step}: {warning}")
    draw_curves(directory)
    progress.update(step, f"{figures['psnr_db']:.1f} dB, usage {figures['codebook_usage']:.0%}")


def _learn(
    learner: Learner,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning: Sequence[nn.Parameter],
    images: Float[Tensor, "B C H W"],
    step: int,
    config: LoopConfig,
) -> tuple[dict[str, Tensor], Tensor]:
    """One step on a batch; returns its losses by name, and the codes of its pictures."""
    learner.model.train()
    found = learner.losses(images, step, config.precision)
    optimizer.zero_grad(set_to_none=True)
    found.total.backward()
    norm = nn.utils.clip_grad_norm_(learning, config.max_grad_norm or math.inf)
    optimizer.step()
    # The first average is a copy.
    update_average(averaged, learner.model, step, config.ema_decay if step else 0.0)
    besides = learner.learn_besides(images, found, step, config.precision)
    return {**found.parts, "gradient_norm": norm, **besides}, found.quantized.codes


class HeldOutReport(NamedTuple):
    """Figures over a set of pictures. `mse` and `psnr_db` are over dims on the scale [0, 1] after clamping;
    `exact_pixels` is the share of pixels all of whose channels are right after rounding to whole values."""

    mse: float
    psnr_db: float
    exact_pixels: float
    codebook_usage: float
    perplexity: float
    dead_codes: int


@torch.inference_mode()
def evaluate_reconstruction(
    image_tokenizer: Any,
    pictures: UInt8[Tensor, "N H W C"],
    max_value: int,
    batch_size: int = 256,
) -> HeldOutReport:
    """How well pictures survive encoding and decoding, in float32, and how much of the codebook they use."""
    image_tokenizer.eval()
    health = CodebookHealth(image_tokenizer.config.codebook_size, window=_num_codes(image_tokenizer, pictures))
    squared_error, num_exact = 0.0, 0
    for part in pictures.split(batch_size):
        images = _to_images(part, max_value, _device_of(image_tokenizer))
        codes = image_tokenizer.encode_images(images)
        decoded = image_tokenizer.decode_codes(codes).clamp(0, 1)
        health.update(codes)
        squared_error += float((decoded - images).double().square().sum())
        num_exact += int(((decoded * max_value).round() == (images * max_value).round()).all(1).sum())
    mse = squared_error / pictures.numel()
    seen = health.report()
    return HeldOutReport(
        mse=mse,
        psnr_db=-10 * math.log10(mse) if mse else math.inf,
        exact_pixels=num_exact / pictures[..., 0].numel(),
        codebook_usage=seen.usage,
        perplexity=seen.perplexity,
        dead_codes=seen.dead_codes,
    )


@torch.inference_mode()
def draw_reconstructions(image_tokenizer: Any, pictures: UInt8[Tensor, "N H W C"], max_value: int, path: Path) -> None:
    """Writes a PNG with rows of up to 8 pictures, each row above the row of its reconstructions."""
    image_tokenizer.eval()
    images = _to_images(pictures, max_value, _device_of(image_tokenizer))
    decoded = image_tokenizer.decode_codes(image_tokenizer.encode_images(images)).clamp(0, 1)
    _, C, H, W = images.shape
    columns, gap = min(8, len(images)), 2
    pairs = list(zip(images.split(columns), decoded.split(columns), strict=True))
    sheet = torch.ones(C, 2 * len(pairs) * (H + gap), columns * (W + gap))
    for row, strip in enumerate(part for pair in pairs for part in pair):
        for column, image in enumerate(strip.cpu()):
            top, left = row * (H + gap), column * (W + gap)
            sheet[:, top : top + H, left : left + W] = image
    pixels = (sheet * 255).round().byte().permute(1, 2, 0).numpy()
    zoom = max(1, 96 // W)
    picture = Image.fromarray(pixels[..., 0] if C == 1 else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def draw_curves(directory: Path) -> None:
    """Writes `curves.png` from the run's CSV files."""
    training, evaluation = (read_columns(directory / f"{name}.csv") for name in ("training", "evaluation"))
    measured = [name for name, values in training.items() if not all(map(math.isnan, values))]
    losses = [name for name in measured if name not in (*NO_LOSSES, *DISCRIMINATOR)]
    verdicts = [name for name in ("real_logit", "fake_logit", "generator") if name in training]
    figure = Figure(figsize=(4 * (4 if verdicts else 3), 3.5), layout="constrained")
    loss, quality, codebook, *others = figure.subplots(1, 4 if verdicts else 3)
    for name in losses:
        loss.plot(training["step"], training[name], label=name)
    positive = all(value > 0 for name in losses for value in training[name] if not math.isnan(value))
    loss.set(title="training: losses", xlabel="step", yscale="log" if losses and positive else "linear")
    quality.plot(evaluation["step"], evaluation["psnr_db"], marker=".")
    quality.set(title="held out: reconstruction", xlabel="step", ylabel="PSNR, dB")
    second = "ssim" if "ssim" in evaluation else "exact_pixels"
    similarity = quality.twinx()
    similarity.plot(evaluation["step"], evaluation[second], marker=".", color="C1")
    similarity.set(ylabel=f"{second.replace('_', ' ')} (orange)")
    if "usage" in training:
        codebook.plot(training["step"], training["usage"], label="training, last 65,536 codes")
    codebook.plot(evaluation["step"], evaluation["codebook_usage"], marker=".", label="held out")
    codebook.set(title="codebook", xlabel="step", ylabel="share of codes used", ylim=(0, 1))
    perplexity = codebook.twinx()
    perplexity.plot(evaluation["step"], evaluation["perplexity"], marker=".", color="C2")
    perplexity.set(ylabel="held-out perplexity (green)", ylim=(0, None))
    for adversary in others:
        for name in (name for name in verdicts if name in measured):
            adversary.plot(training["step"], training[name], label=name)
        adversary.set(title="training: discriminator", xlabel="step")
    for axes in (loss, codebook, *others):
        if axes.get_lines():
            axes.legend(fontsize="small")
    with new_file(directory / "curves.png", force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _family_of(model_config: Any) -> type[nn.Module]:
    for config_class, module_class in FAMILIES.values():
        if type(model_config) is config_class:
            return module_class
    raise ValueError(f"{type(model_config).__name__} is not the config of an image tokenizer.")


def _device_of(image_tokenizer: Any) -> torch.device:
    return next(image_tokenizer.parameters()).device


def _num_codes(image_tokenizer: Any, pictures: Tensor) -> int:
    rows, columns = image_tokenizer.config.grid
    return len(pictures) * rows * columns


def _checked(which: str, pictures: Any, max_value: int) -> Tensor:
    pictures = torch.as_tensor(pictures)
    if pictures.dim() != 4 or pictures.dtype != torch.uint8 or len(pictures) == 0:
        raise InputError(
            f"{which} pictures are {tuple(pictures.shape)} of {pictures.dtype}; expected (N, H, W, C) of torch.uint8."
        )
    if int(pictures.max()) > max_value:
        raise InputError(f"{which} pictures reach {int(pictures.max())}, above max_value {max_value}.")
    return pictures


def _to_images(
    pictures: UInt8[Tensor, "N H W C"], max_value: int, device: torch.device | str
) -> Float[Tensor, "N C H W"]:
    return pictures.to(device).permute(0, 3, 1, 2).float() / max_value


def how_to_mend(config: LoopConfig) -> str:
    """What helps a training that diverged."""
    return (
        f"Start anew in another folder with a lower learning_rate ({config.learning_rate}) or max_grad_norm "
        f"({config.max_grad_norm}), or with precision=float32."
    )
