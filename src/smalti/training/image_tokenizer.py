"""Training an image tokenizer on pictures in memory: one loop, read top to bottom.

The run's directory gets `training.csv`, `evaluation.csv`, `curves.png`, tensorboard events,
`reconstructions/` (pictures above, reconstructions below), checkpoints, and at the end `image_tokenizer/`.
Starting the same run again goes on from its last checkpoint, and ends with the same weights to the last bit
as a run that never stopped (on one machine).

Letters: N pictures, C H W image.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from smalti.data.loader import batches
from smalti.errors import InputError, require_finite
from smalti.files import named_failure, new_file
from smalti.image_tokenizers import FAMILIES, save_image_tokenizer
from smalti.image_tokenizers.quantizer import CodebookHealth
from smalti.precision import AUTO, autocast, check_precision, resolve_precision, with_precision
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
from smalti.training.curves import read_csv_rows
from smalti.training.estimate import Estimate, why_slow

STAGE = "image tokenizer"
_LOSSES = ("reconstruction_loss", "codebook_loss", "commitment_loss", "entropy_loss", "gradient_norm")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """How to train. `max_value` is the channel value that stands for 1.0 (3 for digits of levels 0..3).

    The learning rate rises over `warmup_steps` and falls to 0 by a cosine. What is evaluated and returned is
    a running mean of the weights with `weight_ema_decay` (0: the weights themselves). "Every" counts steps; 0
    is never. Products are taken in `precision`: "float32", "bfloat16", or "auto", bfloat16 where the hardware
    multiplies in it.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    weight_ema_decay: float = 0.99
    max_value: int = 255
    precision: str = AUTO
    seed: int = 0
    device: str = "cpu"
    held_out_pictures: int = 1000
    evaluate_every: int = 200
    sample_every: int = 500
    save_every: int = 500
    log_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self):
        check_precision(self.precision)
        for name in ("steps", "batch_size", "max_value", "held_out_pictures", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("warmup_steps", "weight_decay", "evaluate_every", "sample_every", "save_every", "log_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.weight_ema_decay < 1:
            raise ValueError(f"weight_ema_decay is {self.weight_ema_decay}; it must lie in [0, 1).")


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
    # Pictures, network, optimiser
    directory = Path(directory)
    images = _checked("training", images, config.max_value)
    held_out = _checked("held-out", held_out, config.max_value)[: config.held_out_pictures]
    torch.manual_seed(config.seed)
    model = _family_of(model_config)(model_config).to(config.device)
    averaged = AveragedModel(model, multi_avg_fn=running_mean(config.weight_ema_decay))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True
    )
    window = CodebookHealth(model_config.codebook_size)

    # Where to write, and what an earlier start of this run has left there
    weights_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    check_writable(directory, expected_bytes=(config.keep_checkpoints + 1) * 4 * weights_bytes)
    latest = latest_checkpoint(directory)
    begun = as_described_now(load_run(latest)) if latest else None
    config = with_resolved_precision(config, begun)
    run = described({"model": asdict(model_config), "training": asdict(config)})
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
        pending = list(state["pending"])
        set_random_state(state["random"])
    kept_to = start if latest else -1  # a run killed before its first checkpoint begins its tables anew
    training_log = CsvLog(directory / "training.csv", ["step", "learning_rate", *_LOSSES], keep_to=kept_to)
    evaluation_log = CsvLog(directory / "evaluation.csv", ["step", *ReconstructionReport._fields], keep_to=kept_to)
    board = SummaryWriter(str(directory), purge_step=start)

    watch = None if estimate is None else estimate.watch(lambda: why_slow(config.precision, config.device))
    with stage(STAGE, config.steps, completed=start, show=show_progress, watch=watch) as progress, board:
        rows = batches(len(images), config.batch_size, config.seed, start)
        for step in range(start, config.steps + 1):
            last = step == config.steps
            resumed_here = step == start and latest is not None

            # Evaluate
            if (is_due(config.evaluate_every, step) or last) and not resumed_here:
                report = evaluate_reconstruction(averaged.module, held_out, config.max_value)
                evaluation_log.write(step, report)
                for name, value in report._asdict().items():
                    board.add_scalar(f"held_out/{name}", value, step)
                draw_curves(directory)
                progress.update(step, report.brief())

            # Sample
            if (is_due(config.sample_every, step) or last) and not resumed_here:
                path = directory / "reconstructions" / f"step_{step:08d}.png"
                draw_reconstructions(averaged.module, held_out[:16], config.max_value, path)

            # Save
            if (is_due(config.save_every, step) and step > start) or last:
                if pending:  # weights that are not finite are not saved
                    require_finite(float(torch.stack(pending)[:, 0].mean()), step, how_to_mend(config))
                state = {
                    "run": run,
                    "model": model.state_dict(),
                    "n_averaged": averaged.n_averaged,
                    "optimizer": optimizer.state_dict(),
                    "pending": pending,
                    "random": random_state(),
                }
                weights = averaged.module.state_dict()
                save_checkpoint(directory, step, weights, state, config.keep_checkpoints)
            if last:
                break

            # Step
            note = None
            model.train()
            learning_rate = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            batch = _to_images(images[torch.from_numpy(next(rows))], config.max_value, config.device)
            with autocast(config.device, config.precision):
                reconstruction_loss, quantized = model(batch)
            optimizer.zero_grad(set_to_none=True)
            (reconstruction_loss + quantized.loss).backward()
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            averaged.update_parameters(model)

            # Log. The losses stay on the device until a row is due: reading them makes the host wait.
            window.update(quantized.codes)
            pending.append(torch.stack([reconstruction_loss.detach(), *_parts(quantized), gradient_norm.detach()]))
            if is_due(config.log_every, step + 1):
                means = torch.stack(pending).mean(0).tolist()
                pending = []
                require_finite(means[0], step + 1, how_to_mend(config))
                note = f"loss {means[0]:.4g}"
                training_log.write(step + 1, [learning_rate, *means])
                for name, value in zip(_LOSSES, means, strict=True):
                    board.add_scalar(f"training/{name}", value, step + 1)
                for name, value in window.report()._asdict().items():
                    board.add_scalar(f"codebook/{name}", value, step + 1)
            progress.update(step + 1, note)

    image_tokenizer = averaged.module.eval()
    save_image_tokenizer(image_tokenizer, directory / "image_tokenizer")
    return image_tokenizer


def learning_rate_at(step: int, config: TrainTokenizerConfig) -> float:
    """Linear from 0 (not included) over the warm-up, then half a cosine down to 0 at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


class ReconstructionReport(NamedTuple):
    """Figures over a set of pictures. `mse` and `psnr_db` are over dims on the scale [0, 1] after clamping;
    `exact_pixels` is the share of pixels all of whose channels are right after rounding to whole values."""

    mse: float
    psnr_db: float
    exact_pixels: float
    codebook_usage: float
    perplexity: float
    dead_codes: int

    def brief(self) -> str:
        return f"{self.psnr_db:.1f} dB, exact {self.exact_pixels:.2%}, usage {self.codebook_usage:.0%}"


@torch.inference_mode()
def evaluate_reconstruction(
    image_tokenizer: Any,
    pictures: UInt8[Tensor, "N H W C"],
    max_value: int,
    batch_size: int = 256,
) -> ReconstructionReport:
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
    return ReconstructionReport(
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
    """Writes `curves.png` from the run's two CSV files."""
    training, evaluation = (read_columns(directory / f"{name}.csv") for name in ("training", "evaluation"))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    loss, exact, codebook = figure.subplots(1, 3)
    loss.plot(training["step"], training["reconstruction_loss"])
    loss.set(title="training: reconstruction loss", xlabel="step", yscale="log" if training["step"] else "linear")
    exact.plot(evaluation["step"], [1 - share for share in evaluation["exact_pixels"]], marker=".")
    exact.set(title="held out: share of pixels not exact", xlabel="step", ylim=(0, None))
    codebook.plot(evaluation["step"], evaluation["codebook_usage"], marker=".", label="usage")
    codebook.set(title="held out: codebook", xlabel="step", ylabel="share of codes used", ylim=(0, 1))
    perplexity = codebook.twinx()
    perplexity.plot(evaluation["step"], evaluation["perplexity"], marker=".", color="C1")
    perplexity.set(ylabel="perplexity (orange)", ylim=(0, None))
    with new_file(directory / "curves.png", force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _row(step: str, *values: str) -> list[str]:
    int(step)  # the first column of every table of a run
    return [step, *values]


class CsvLog:
    """A CSV file of rows by step; rows after step `keep_to`, of an earlier start of the run, are dropped."""

    def __init__(self, path: Path, columns: list[str], *, keep_to: int):
        kept = [row for row in read_csv_rows(path, columns, _row) if int(row[0]) <= keep_to]
        with new_file(path, force=True) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *kept])
        self.path = path

    def write(self, step: int, values) -> None:
        with named_failure(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([step, *values])


def read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a `CsvLog` file by name; an empty field is NaN."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [_number(row[i]) for row in rows if i < len(row)] for i, name in enumerate(header)}


def _number(text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # a warning, or a damaged value
        return math.nan


def is_due(interval: int, step: int) -> bool:
    """Whether what is done every `interval` steps (0: never) is done at this one."""
    return interval > 0 and step % interval == 0


def _parts(quantized) -> Iterator[Tensor]:
    return (part.detach() for part in (quantized.codebook_loss, quantized.commitment_loss, quantized.entropy_loss))


def running_mean(decay: float):
    """An update for AveragedModel whose decay grows to `decay`, so that the first, random weights are soon
    forgotten."""

    def update(averages, values, num_averaged) -> None:
        step = float(num_averaged)
        share = 1 - min(decay, (1 + step) / (10 + step))
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, share)

    return update


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


def how_to_mend(config: Any) -> str:
    """What helps a training whose loss is not finite."""
    return (
        f"Start anew in another folder with a lower learning_rate ({config.learning_rate}) or gradient_clip "
        f"({config.gradient_clip}), or with precision=float32."
    )


def as_described_now(run: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run, in today's names."""
    return described({**run, "training": with_precision(run["training"])})


def described(run: dict[str, Any]) -> dict[str, Any]:
    """Settings as a checkpoint holds them. One that is None is left out, and so the same as one that an earlier version
    did not have."""
    return _without_none(json.loads(json.dumps(run, default=str)))


def _without_none(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_without_none(part) for part in settings]
    if not isinstance(settings, dict):
        return settings
    return {name: _without_none(value) for name, value in settings.items() if value is not None}


def with_resolved_precision(config: Any, begun: dict[str, Any] | None) -> Any:
    """The training's config with its precision decided, by an earlier start of the run if there was one."""
    earlier = None if begun is None else begun["training"]["precision"]
    return replace(config, precision=resolve_precision(config.precision, config.device, begun=earlier))


def settings_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first setting in which two runs differ."""
    for part in one | other:
        there, here = one.get(part, {}), other.get(part, {})
        for name in there | here:
            if there.get(name) != here.get(name):
                return f"{part} {name} is {there.get(name)} there, {here.get(name)} here"
    return "settings that are not known here"
