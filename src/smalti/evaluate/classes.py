"""How well a bundle of classes draws: what codes cost it, whether a judge sees the class that was asked for, and how
far what it draws lies from real pictures, against guidance.

The judge is a small convolutional network that is trained on real pictures of the classes. The Fréchet distance (Heusel
et al. 2017, arXiv:1706.08500) is taken between Gaussians of its features: only distances of one judge compare.

Letters: N pictures, H W rows and columns of pixels, F features, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.bounds import MAX_PICTURES
from smalti.data.labelled_pictures import Labelled
from smalti.engine.sampling import SampleConfig
from smalti.evaluate.digits import binomial_rate
from smalti.evaluate.reconstruction import frechet_distance, to_images
from smalti.files import new_file, refuse_existing, write_text
from smalti.progress import track
from smalti.tasks.classes import ClassPipeline

REPORT_FILES = ("report.json", "report.md", "guidance.png", "classes.png")
NUM_FEATURES = 64
MOST_TRAINING = 20_000
"""Real pictures that the judge is trained on at most; they are held in memory."""
SHOWN = 10
"""Pictures of each class in the figure, and classes."""


@dataclass(frozen=True, kw_only=True)
class ClassesReportConfig:
    """What is measured of a bundle of classes. Raises ValueError for a number out of range."""

    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    num_pictures: int = 1000
    """Drawn at each scale, as many of each class, and as many real ones to compare with."""
    judge_steps: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.guidance_scales:
            raise ValueError("guidance_scales is empty; give at least one, such as 1.")
        if not 2 <= self.num_pictures <= MAX_PICTURES:
            raise ValueError(f"num_pictures is {self.num_pictures}; expected 2 to {MAX_PICTURES}.")
        if self.judge_steps < 1 or self.seed < 0:
            raise ValueError(f"judge_steps is {self.judge_steps} and seed {self.seed}; expected at least 1, and 0.")


# The judge -----------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Features of pictures in [0, 1], and from them the scores of the classes."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (3, 32, 64, 64)
        convolutions = []
        for num_in, num_out in pairwise(widths):
            convolutions += [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]
            convolutions.append(nn.AvgPool2d(2, ceil_mode=True))
        self.convolutions = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(16 * widths[-1], NUM_FEATURES), nn.ReLU())
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N K"]]:
        features = self.features(self.convolutions(images))
        return features, self.head(features)


def train_judge(
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Int[np.ndarray, " N"],
    num_classes: int,
    *,
    num_steps: int = 600,
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool = True,
) -> Judge:
    """A judge of real pictures, in evaluation mode: Adam with a one-cycle schedule on randomly shifted pictures. The
    seed decides it on one machine."""
    stream, pixels, wanted = torch.Generator().manual_seed(seed), torch.from_numpy(images), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(num_classes)
    optimizer = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    most = max(1, min(images.shape[1:3]) // 14)
    for _ in track(range(num_steps), "judge", unit="step", show=show_progress):
        rows = torch.randint(len(pixels), (batch_size,), generator=stream)
        down, right = torch.randint(-most, most + 1, (2,), generator=stream).tolist()
        batch = to_images(pixels[rows]).roll((down, right), (2, 3))
        loss = F.cross_entropy(judge(batch)[1], wanted[rows].long(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


class Seen(NamedTuple):
    """What a judge makes of pictures."""

    features: Float[Tensor, "N F"]
    labels: Int[Tensor, " N"]


@torch.inference_mode()
def look_at(judge: Judge, images: Float[Tensor, "N 3 H W"]) -> Seen:
    """The judge's features of pictures in [0, 1], and the class it takes each for."""
    found = [judge(part) for part in images.split(250)]
    return Seen(torch.cat([features for features, _ in found]), torch.cat([scores.argmax(1) for _, scores in found]))


# The report ----------------------------------------------------------------------------------------------------


class AtScale(NamedTuple):
    """What was drawn with one guidance scale."""

    guidance_scale: float
    class_accuracy: float
    standard_error: float
    frechet_distance: float


def _nearest(scales: Sequence[AtScale]) -> AtScale:
    return min(scales, key=lambda at: at.frechet_distance)


@dataclass(frozen=True, kw_only=True)
class ClassesReport:
    command: str
    nats: dict[str, str]
    """Nats a code by condition, with their standard errors."""
    judge_accuracy: dict[str, float]
    """Of real held-out pictures, and of what the image tokenizer makes of them."""
    frechet_of_reconstructions: float
    num_pictures: int
    scales: list[AtScale]
    pictures: Image.Image
    """A row for each class, drawn with the best scale."""

    @property
    def best(self) -> AtScale:
        """The scale that comes nearest to real pictures."""
        return _nearest(self.scales)

    def figures(self) -> dict[str, str]:
        best = self.best
        return {
            **{f"held-out nats per code, {name}": value for name, value in self.nats.items()},
            f"class accuracy of {self.num_pictures} samples, guidance {best.guidance_scale:g}": (
                f"{best.class_accuracy:.1%} ± {best.standard_error:.1%}"
            ),
            f"Fréchet distance in the judge's features, guidance {best.guidance_scale:g}": (
                f"{best.frechet_distance:.3f}"
            ),
        }

    def table(self) -> Table:
        table = Table("guidance", "class accuracy", "Fréchet distance", box=None)
        for at in self.scales:
            accuracy = f"{at.class_accuracy:.1%} ± {at.standard_error:.1%}"
            table.add_row(f"{at.guidance_scale:g}", accuracy, f"{at.frechet_distance:.3f}")
        return table

    def write(self, folder: Path, *, force: bool = False) -> None:
        """Writes REPORT_FILES. Raises InputError if one exists, unless `force`."""
        refuse_existing([folder / name for name in REPORT_FILES], force=force)
        content = asdict(self) | {"scales": [at._asdict() for at in self.scales]}
        content.pop("pictures")
        write_text(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n", force=force)
        write_text(folder / "report.md", self.text(), force=force)
        with new_file(folder / "guidance.png", force=force) as temporary:
            self._curves().savefig(temporary, format="png", dpi=110)
        with new_file(folder / "classes.png", force=force) as temporary:
            self.pictures.save(temporary, format="PNG")

    def text(self) -> str:
        rows = [f"| {name} | {value} |" for name, value in self.nats.items()]
        drawn = [
            f"| {at.guidance_scale:g} | {at.class_accuracy:.1%} ± {at.standard_error:.1%} | {at.frechet_distance:.3f} |"
            for at in self.scales
        ]
        real, rebuilt = self.judge_accuracy["real"], self.judge_accuracy["reconstructed"]
        return "\n".join(
            [
                f"`{self.command}`\n",
                "| held-out nats per code | |\n|---|---|",
                *rows,
                f"\nA judge trained on real pictures reads the class of {real:.1%} of real ones held out, and of "
                f"{rebuilt:.1%} of them as the image tokenizer gives them back, which lie "
                f"{self.frechet_of_reconstructions:.3f} from the real ones in its features. Of {self.num_pictures} "
                "pictures drawn at each scale:\n",
                "| guidance | class accuracy | Fréchet distance |\n|---|---|---|",
                *drawn,
                "\n![Class accuracy and Fréchet distance against guidance](guidance.png)",
                "\n![A row for each class](classes.png)\n",
            ]
        )

    def _curves(self) -> Figure:
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        scales = [at.guidance_scale for at in self.scales]
        for axes, name, values in zip(
            figure.subplots(1, 2),
            ("class accuracy of samples", "Fréchet distance in the judge's features"),
            ([at.class_accuracy for at in self.scales], [at.frechet_distance for at in self.scales]),
            strict=True,
        ):
            axes.plot(scales, values, marker="o", color="#1f4e79")
            axes.set_xlabel("guidance scale")
            axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.3)
        return figure


def evaluate_classes(
    pipe: ClassPipeline,
    train: Labelled,
    held_out: Labelled,
    config: ClassesReportConfig,
    nats: dict[str, str],
    *,
    command: str = "",
    show_progress: bool = True,
) -> ClassesReport:
    """Draws pictures at every guidance scale, and has a judge of the real ones look at them. Classes are drawn in the
    shares that they have among the held-out pictures: another mixture would be far from them by itself."""
    size, num_classes = (pipe.pictures.height, pipe.pictures.width), pipe.classes.num
    generator = np.random.default_rng([config.seed, 0])
    chosen = generator.permutation(len(train))[:MOST_TRAINING]
    real_images = train.images(chosen.tolist(), size)
    judge = train_judge(
        real_images, train.labels[chosen], num_classes, num_steps=config.judge_steps, show_progress=show_progress
    )
    measured = generator.permutation(len(held_out))[: config.num_pictures]
    real = to_images(torch.from_numpy(held_out.images(measured.tolist(), size)))
    seen, truth = look_at(judge, real), torch.from_numpy(held_out.labels[measured])
    rebuilt = look_at(judge, _in_range(_rebuilt(pipe, real)))
    wanted = in_shares(truth, config.num_pictures)
    labels, scales = wanted.tolist(), list[AtScale]()
    for scale in track(config.guidance_scales, "drawing", unit="scale", show=show_progress):
        drawn = look_at(judge, _drawn(pipe, labels, scale, config.seed))
        rate = binomial_rate((drawn.labels == wanted).numpy())
        distance = frechet_distance(drawn.features, seen.features)
        scales.append(AtScale(scale, rate["rate"], rate["standard_error"], distance))
    return ClassesReport(
        command=command,
        nats=nats,
        judge_accuracy={
            "real": float((seen.labels == truth).float().mean()),
            "reconstructed": float((rebuilt.labels == truth).float().mean()),
        },
        frechet_of_reconstructions=frechet_distance(rebuilt.features, seen.features),
        num_pictures=config.num_pictures,
        scales=scales,
        pictures=_sheet(pipe, min(SHOWN, num_classes), _nearest(scales).guidance_scale, config.seed),
    )


def in_shares(labels: Int[Tensor, " N"], num: int) -> Int[Tensor, " num"]:
    """So many labels, in order, each as often as among those given, within one."""
    return labels.long().sort().values[torch.arange(num) * len(labels) // num]


def _drawn(pipe: ClassPipeline, labels: Sequence[int], scale: float, seed: int) -> Float[Tensor, "N 3 H W"]:
    codes = pipe.generate_codes(labels, seed=range(seed, seed + len(labels)), **_guided(pipe, scale), batch_size=250)
    return _in_range(pipe.decode_images(codes))


def _guided(pipe: ClassPipeline, scale: float) -> dict[str, Any]:
    plain: SampleConfig = pipe.sampling.picture
    return asdict(replace(plain, guidance_scale=scale))


def _rebuilt(pipe: ClassPipeline, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    with torch.inference_mode():
        codes = torch.cat([pipe.image_tokenizer.encode_images(part) for part in images.split(64)])
    return pipe.decode_images(codes)


def _in_range(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """As a picture file would hold them."""
    return (images.clamp(0, 1) * 255).round() / 255


def _sheet(pipe: ClassPipeline, num_classes: int, scale: float, seed: int) -> Image.Image:
    """A row of pictures for each class, with the seeds from `seed` on, so that a column shares its seed."""
    pictures = pipe.generate(list(range(num_classes)), n=SHOWN, seed=seed, scale=1, **_guided(pipe, scale))
    width, height = pictures[0].size
    sheet = Image.new("RGB", ((width + 2) * SHOWN, (height + 2) * num_classes), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % SHOWN) * (width + 2), (i // SHOWN) * (height + 2)))
    return sheet
