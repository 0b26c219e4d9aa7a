"""Training a dual encoder of captions and codes: which caption of a batch goes with which picture, and perhaps the ids
of captions that are hidden from it.

The contrastive loss is the mean of two cross-entropies, over the batch's pictures for a caption and over its captions
for a picture (CLIP, arXiv:2103.00020, fig. 3); two pairs with the same caption are not told apart. The masked loss is
that of BERT (arXiv:1810.04805): of the hidden ids, all are replaced by one learned vector. Everything random is a
function of (seed, step), so a run that was stopped ends with the weights it would have had.

Letters: B batch, S ids of a caption with its marker.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.data.loader import prefetch, step_rows
from smalti.devices import choose_device
from smalti.errors import InputError, require_finite
from smalti.models.dual_encoder import DualEncoder, DualEncoderConfig
from smalti.precision import AUTO, check_precision, compute_precision, resolve_precision
from smalti.training.checkpoint import run_lock
from smalti.training.curves import Curves
from smalti.training.run import Run, require_finite_weights, scheduled, set_learning_rate, training_stage
from smalti.training.settings import check_ranges
from smalti.training.token_model import TokenPairs, seed_step

CHECKPOINTS = "checkpoints"
STAGE = "dual encoder"
MEND = "Start anew with a lower learning_rate or a longer warm-up."
COLUMNS = ("nats_per_pair", "accuracy", "masked_nats")
LOG_EVERY = 50
AMONG = 64
"""Pictures among which evaluation looks for each caption's."""


@dataclass(frozen=True, kw_only=True)
class TrainDualConfig:
    """How a dual encoder is trained. Raises ValueError for a number out of range."""

    num_steps: int = 2000
    batch_size: int = 128
    """Pairs that are told apart at once."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    """Updates over which the learning rate rises; then it falls with half a cosine to a tenth."""
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    masked_share: float = 0.15
    """Share of a caption's ids that are hidden."""
    masked_weight: float = 0.0
    """Of the masked loss beside the contrastive one; 0: nothing is hidden."""
    precision: str = AUTO
    seed: int = 0
    evaluation_rows: int = 1024
    checkpoint_every: int = 1000
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_ranges(
            self,
            positive="num_steps batch_size learning_rate max_grad_norm evaluation_rows checkpoint_every "
            "keep_checkpoints",
            not_negative="warmup_steps weight_decay masked_weight seed",
            below_one="masked_share",
        )


class _Batch(NamedTuple):
    codes: Int[Tensor, "B L"]
    text: Int[Tensor, "B S"]
    lengths: Int[Tensor, " B"]
    hidden: Bool[Tensor, "B S"] | None


class Losses(NamedTuple):
    contrastive: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    """Share of the captions whose own picture fits best."""
    masked: Float[Tensor, ""]


def losses(model: DualEncoder, batch: _Batch) -> Losses:
    """The mean losses of a batch, in nats."""
    encoded = model.read_text(batch.text, batch.lengths, batch.hidden)
    fits = model.of_text(encoded, batch.lengths).float() @ model.of_pictures(batch.codes).float().T * model.scale
    B = len(fits)
    same = (batch.text[:, None] == batch.text).all(-1) & (batch.lengths[:, None] == batch.lengths)
    others = same & ~torch.eye(B, dtype=torch.bool, device=same.device)
    fits = fits.masked_fill(others, -torch.inf)
    own = torch.arange(B, device=fits.device)
    contrastive = (F.cross_entropy(fits, own) + F.cross_entropy(fits.T, own)) / 2
    masked = fits.new_zeros(())
    if batch.hidden is not None and bool(batch.hidden.any()):
        scores = model.unmask(encoded[batch.hidden]).float()
        masked = F.cross_entropy(scores, batch.text[batch.hidden])
    return Losses(contrastive, (fits.argmax(1) == own).float().mean(), masked)


def train_dual_encoder(
    shape: DualEncoderConfig,
    train: TokenPairs,
    validation: TokenPairs,
    config: TrainDualConfig,
    directory: Path | str,
    *,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> DualEncoder:
    """A dual encoder of this shape, trained on pairs of text ids and codes, from wherever its run stands.

    `directory` gets `checkpoints/`, `curves.csv`, `curves.png` and `tensorboard/`. Raises InputError if it holds a run
    of other settings, there are fewer than two pairs, or training diverges.
    """
    directory, device = Path(directory), choose_device("auto" if device is None else device)
    if min(len(train), len(validation)) < 2:
        raise InputError("a dual encoder tells pairs apart: give at least two to train on and two to validate with.")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(run_lock(directory, 0))
        torch.manual_seed(config.seed)
        model = DualEncoder(shape).to(device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )
        run, step = Run(directory / CHECKPOINTS), 0
        config = replace(config, precision=resolve_precision(config.precision, device, begun=run.precision))
        found = run.claim({"model": shape, "training": config, "data": {"num_rows": len(train)}})
        if found is not None:
            step = found.step
            model.load_state_dict(found.weights)
            optimizer.load_state_dict(found.training_state["optimizer"])
        if step == config.num_steps:
            return model.eval()
        curves = Curves(directory, COLUMNS, start_step=step, label="nats per pair")
        stack.callback(curves.close)
        progress = stack.enter_context(
            training_stage(STAGE, config.num_steps, completed=step, show=show_progress, estimate=None, why=list)
        )
        rows = step_rows(train, min(config.batch_size, len(train)), config.seed, step)
        batches = prefetch(_batch(model, train, chosen, config, number) for number, chosen in enumerate(rows, step))
        stack.callback(batches.close)
        while step < config.num_steps:
            seed_step(config.seed, step, 0)
            set_learning_rate(optimizer, learning_rate(step, config))
            with compute_precision(device, config.precision):
                parts = losses(model, next(batches))
                (parts.contrastive + config.masked_weight * parts.masked).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update(step)
            if step % LOG_EVERY == 0 or step == config.num_steps:
                parts = Losses(*(part.detach() for part in parts))
                require_finite(float(parts.contrastive + config.masked_weight * parts.masked), step, MEND)
                _note(curves, "train", step, step * config.batch_size / len(train), parts)
                progress.update(step, f"{float(parts.accuracy):.0%} of a batch's captions find their picture")
            if step % config.checkpoint_every == 0 or step == config.num_steps:
                require_finite_weights(model, step, MEND)
                _note(
                    curves,
                    "validation",
                    step,
                    step * config.batch_size / len(train),
                    evaluate(model, validation, config),
                )
                curves.draw()
                curves.flush()
                state = {"optimizer": optimizer.state_dict()}
                run.save(step, model.state_dict(), state, keep=config.keep_checkpoints)
        return model.eval()


def learning_rate(step: int, config: TrainDualConfig) -> float:
    return scheduled(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        final_share=0.1,
        lowest_at=config.num_steps - 1,
    )


@torch.no_grad()
def evaluate(model: DualEncoder, pairs: TokenPairs, config: TrainDualConfig) -> Losses:
    """The losses on the first validation pairs, AMONG at a time, nothing hidden and without dropout."""
    model.eval()
    try:
        rows = np.array_split(np.arange(min(len(pairs), config.evaluation_rows)), max(1, len(pairs) // AMONG))
        found = [losses(model, _batch(model, pairs, chosen)) for chosen in rows if len(chosen) > 1]
        return Losses(*(torch.stack(part).mean() for part in zip(*found, strict=True)))
    finally:
        model.train()


def _batch(
    model: DualEncoder,
    pairs: TokenPairs,
    rows: Int[np.ndarray, " n"],
    config: TrainDualConfig | None = None,
    step: int = 0,
) -> _Batch:
    image, _, text, lengths = map(torch.from_numpy, pairs.batch(rows))
    ended, counts = model.with_end([row[:length] for row, length in zip(text, lengths.tolist(), strict=True)])
    hidden = None
    if config is not None and config.masked_weight:
        chances = torch.from_numpy(np.random.default_rng([config.seed, step, 5]).random(ended.shape)).to(ended.device)
        words = torch.arange(ended.shape[1], device=ended.device) < counts[:, None] - 1
        hidden = words & (chances < config.masked_share)
    return _Batch(image.to(model.device), ended, counts, hidden)


def _note(curves: Curves, split: str, step: int, epoch: float, parts: Losses) -> None:
    curves.add(split, step, epoch, dict(zip(COLUMNS, (float(part) for part in parts), strict=True)))
