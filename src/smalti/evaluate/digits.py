"""The judge of coloured digits: does a picture show what its caption says, does a caption say what its picture shows?

Colours are read exactly, by the rule of `read_colours`; the digit is read from the foreground's mask by a small
convolutional network trained on real digits. Two trained ones ship beside this file, each with its own test accuracy:
one for MNIST and one for scikit-learn's digits, of which that of MNIST reads no more than 82 %.

    python -m smalti.evaluate.digits --mnist DIR
    python -m smalti.evaluate.digits

train them anew. Letters: B masks in a batch, N pictures.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from smalti.data.digit_sources import read_mnist, scikit_learn_digits
from smalti.data.digits import PICTURE_SIZE, SourceDigits, normalise_caption, parse_caption, read_colours
from smalti.errors import InputError, first_line
from smalti.files import new_file, write_text
from smalti.precision import FLOAT32, PRECISIONS, autocast, check_precision, resolve_precision
from smalti.progress import track

SHIPPED_CLASSIFIER = Path(__file__).with_name("digit_classifier.safetensors")
_SCIKIT_LEARN_CLASSIFIER = Path(__file__).with_name("digit_classifier_scikit_learn.safetensors")


def shipped_classifier(source: str | None) -> Path:
    """The classifier that reads digits of a source, as `smalti.data.digits.source_of` names it: "scikit-learn" has its
    own, all others are MNIST's, one that is not known too."""
    return _SCIKIT_LEARN_CLASSIFIER if source == "scikit-learn" else SHIPPED_CLASSIFIER


# The classifier ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How a digit classifier is trained: Adam with a one-cycle schedule on batches of randomly shifted masks."""

    seed: int = 0
    num_steps: int = 900
    batch_size: int = 128
    peak_learning_rate: float = 4e-3
    max_shift: int = 2  # pixels, each way
    precision: str = FLOAT32
    """Of products. Not "auto" by default, so that the shipped classifiers can be made again on any processor."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if min(self.num_steps, self.batch_size) < 1 or self.peak_learning_rate <= 0:
            raise ValueError(f"num_steps, batch_size and peak_learning_rate must be positive, got {self}")
        if not 0 <= self.max_shift < PICTURE_SIZE:
            raise ValueError(f"max_shift {self.max_shift} is outside 0 .. {PICTURE_SIZE - 1}")


class DigitClassifier(nn.Module):
    """Logits of the ten digits from masks of 28×28: three convolutions and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_block(1, 16, kernel_size=5),
            *_block(16, 32, kernel_size=3),
            *_block(32, 64, kernel_size=3),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, 10),
        )

    def forward(self, masks: Float[Tensor, "B 28 28"]) -> Float[Tensor, "B 10"]:
        return self.layers(masks[:, None])


def _block(num_in: int, num_out: int, *, kernel_size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(num_in, num_out, kernel_size, padding=kernel_size // 2, bias=False)
    # Pooled before it is normalised: that leaves the normalisation a quarter of the values to work on.
    return convolution, nn.MaxPool2d(2), nn.BatchNorm2d(num_out), nn.ReLU()


def train_digit_classifier(
    source: SourceDigits, config: ClassifierConfig = ClassifierConfig(), *, show_progress: bool = True
) -> DigitClassifier:
    """A classifier of the source's digits, in evaluation mode. The seed decides it on one machine."""
    masks, labels = torch.tensor(source.masks), torch.tensor(source.labels).long()
    stream = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = DigitClassifier()
    precision = resolve_precision(config.precision, "cpu")
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.peak_learning_rate, config.num_steps)
    for _ in track(range(config.num_steps), "digit classifier", unit="step", show=show_progress):
        rows = torch.randint(len(labels), (config.batch_size,), generator=stream)
        shifts = torch.randint(-config.max_shift, config.max_shift + 1, (config.batch_size, 2), generator=stream)
        with autocast("cpu", precision):
            logits = classifier(shift_masks(masks[rows], shifts).float())
        loss = functional.cross_entropy(logits.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def shift_masks(masks: Bool[Tensor, "B 28 28"], shifts: Int[Tensor, "B 2"]) -> Bool[Tensor, "B 28 28"]:
    """Each mask moved down and to the right by its own two shifts (pixels); what leaves is lost, what enters empty."""
    pixels = torch.arange(PICTURE_SIZE)
    from_row, from_column = pixels - shifts[:, :1], pixels - shifts[:, 1:]  # (B, 28)
    inside_row, inside_column = (i.ge(0) & i.lt(PICTURE_SIZE) for i in (from_row, from_column))
    batch = torch.arange(len(masks))[:, None, None]
    moved = masks[batch, from_row.clamp(0, 27)[:, :, None], from_column.clamp(0, 27)[:, None, :]]
    return moved & inside_row[:, :, None] & inside_column[:, None, :]


@torch.inference_mode()
def classify_digits(classifier: DigitClassifier, masks: Bool[np.ndarray, "N 28 28"]) -> Int[np.ndarray, " N"]:
    """The digit 0..9 each mask looks most like."""
    batches = torch.tensor(masks).split(1000)
    return np.concatenate([classifier(batch.float()).argmax(dim=1).numpy() for batch in batches])


def save_digit_classifier(classifier: DigitClassifier, path: Path | str) -> None:
    """Writes the weights in half precision, through a temporary file, so that no half-written one is ever there."""
    path = Path(path)
    weights = {name: t.half() if t.is_floating_point() else t for name, t in classifier.state_dict().items()}
    with new_file(path, force=True) as temporary:
        safetensors.torch.save_file(weights, temporary)


def load_digit_classifier(path: Path | str = SHIPPED_CLASSIFIER) -> DigitClassifier:
    """A saved classifier in evaluation mode, by default the shipped one. Raises InputError naming the file."""
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # of Rust, of Python, of torch
        raise InputError(
            f"{path} is not a saved digit classifier ({first_line(error)}); "
            "train one with `python -m smalti.evaluate.digits`"
        ) from error
    return classifier.eval()


# Judging -------------------------------------------------------------------------------------------------------


class Rate(TypedDict):
    """A share of `num` trials with its binomial standard error, √(rate · (1 - rate) / num)."""

    rate: float
    standard_error: float
    num: int


class Judgement(NamedTuple):
    """For each picture, the digit read and what of its caption is right."""

    digits: Int[np.ndarray, " N"]
    digit_ok: Bool[np.ndarray, " N"]
    foreground_ok: Bool[np.ndarray, " N"]
    background_ok: Bool[np.ndarray, " N"]

    @property
    def all_ok(self) -> Bool[np.ndarray, " N"]:
        return self.digit_ok & self.foreground_ok & self.background_ok


def judge_pictures(
    pictures: UInt8[np.ndarray, "N 28 28 3"], captions: Sequence[str], classifier: DigitClassifier
) -> Judgement:
    """Whether each picture (levels 0..3) shows the digit and exactly the two colours of its caption.

    A picture of a single colour shows no digit and has no foreground. Raises InputError for a caption that is not six
    known words, or unless there are as many captions as pictures.
    """
    if len(pictures) != len(captions):
        raise InputError(f"{len(pictures)} pictures but {len(captions)} captions; give one caption for each picture")
    said = [parse_caption(caption) for caption in captions]
    seen = read_colours(pictures)
    shows_something = seen.mask.any(axis=(1, 2))
    digits = classify_digits(classifier, seen.mask)
    return Judgement(
        digits,
        shows_something & (digits == [content.digit for content in said]),
        shows_something & (seen.foreground == [content.foreground for content in said]).all(axis=1),
        (seen.background == [content.background for content in said]).all(axis=1),
    )


def prompt_accuracy(judgement: Judgement) -> dict[str, Rate]:
    """The shares of pictures right in `digit`, `foreground`, `background`, and in `all` three."""
    return {
        "all": binomial_rate(judgement.all_ok),
        "digit": binomial_rate(judgement.digit_ok),
        "foreground": binomial_rate(judgement.foreground_ok),
        "background": binomial_rate(judgement.background_ok),
    }


def caption_accuracy(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, Rate]:
    """The shares of captions right in `all` six words, the `digit`, and both words of `foreground` and `background`.

    A predicted caption that does not have six words is wrong in all; "eigth" counts as "eight".
    """
    if len(predicted) != len(truth):
        raise InputError(f"{len(predicted)} predicted captions but {len(truth)} true ones; give one for each")
    pairs = [
        (normalise_caption(p).split(), normalise_caption(t).split()) for p, t in zip(predicted, truth, strict=True)
    ]
    slots = {"all": slice(None), "digit": slice(2, 3), "foreground": slice(0, 2), "background": slice(4, 6)}
    return {
        name: binomial_rate(np.array([len(p) == 6 and p[slot] == t[slot] for p, t in pairs], dtype=bool))
        for name, slot in slots.items()
    }


def binomial_rate(ok: Bool[np.ndarray, " N"]) -> Rate:
    """The share of true values with its standard error. Raises ValueError for no values at all."""
    if not len(ok):
        raise ValueError("a rate needs at least one trial, got none")
    rate = float(ok.mean())
    return {"rate": rate, "standard_error": math.sqrt(rate * (1 - rate) / len(ok)), "num": len(ok)}


# Training the shipped classifier -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m smalti.evaluate.digits", description="Train the digit classifier.")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's idx files (default: scikit-learn's digits)")
    parser.add_argument(
        "--output", type=Path, help="where to save the weights (default: in the place of the shipped ones)"
    )
    parser.add_argument("--seed", type=int, default=ClassifierConfig.seed, help="default %(default)s")
    parser.add_argument("--num-steps", type=int, default=ClassifierConfig.num_steps, help="default %(default)s")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=ClassifierConfig.precision, help="default %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    given = parser.parse_args(arguments)
    source = "mnist" if given.mnist else "scikit-learn"
    output = given.output or shipped_classifier(source)
    if output.exists() and not given.force:
        parser.error(f"{output} exists; add --force to overwrite it, or name another --output")
    config = ClassifierConfig(seed=given.seed, num_steps=given.num_steps, precision=given.precision)
    try:
        splits = read_mnist(given.mnist) if given.mnist else scikit_learn_digits()
    except InputError as error:
        parser.error(str(error))
    classifier = train_digit_classifier(splits["train"], config)
    save_digit_classifier(classifier, output)
    shipped = load_digit_classifier(output)  # as it will be used: rounded to half precision
    accuracy = {
        split: binomial_rate(classify_digits(shipped, splits[split].masks) == splits[split].labels)
        for split in ("validation", "test")
    }
    folder = "--mnist DIR " if given.mnist else ""
    report = {
        "command": f"python -m smalti.evaluate.digits {folder}--seed {config.seed} --num-steps {config.num_steps}",
        "source": source,
        "num_train": len(splits["train"].labels),
        "config": asdict(config),
        **{f"{split}_accuracy": rate for split, rate in accuracy.items()},
    }
    text = json.dumps(report, indent=2) + "\n"
    write_text(output.with_suffix(".json"), text, force=True)
    print(text, end="")


if __name__ == "__main__":
    main()
