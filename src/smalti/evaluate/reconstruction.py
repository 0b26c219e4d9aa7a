"""How well image tokenizers rebuild pictures: PSNR, SSIM, LPIPS, a Fréchet distance, and the use of the codebook.

Letters: N pictures, B batch, C H W image, D features.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.data.picture_sets import PictureSet
from smalti.errors import InputError
from smalti.files import new_file, refuse_existing
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.perceptual import LPIPS, unit
from smalti.image_tokenizers.quantizer import CodebookHealth
from smalti.progress import track

FEATURE_SPACE = "64 fixed random filter responses"
"""What the Fréchet distance compares here. Its values compare tokenizers on the same pictures, and nothing else:
they are not FID, which needs the weights of InceptionV3."""

SSIM_WINDOW = 11

REPORT_FILES = ("reconstruction.json", "reconstructions.png")


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """Figures over `num_pictures` pictures, in float32 after clamping to [0, 1].

    `psnr_db` is of the mean squared error over all dims together; `ssim` and `lpips` are means over pictures (None
    without the weights of LPIPS); `frechet` is the Fréchet distance between pictures and reconstructions in
    FEATURE_SPACE. Usage, perplexity and dead codes count the codes of all the pictures.
    """

    num_pictures: int
    image_size: tuple[int, int]
    num_codes: int
    codebook_size: int
    psnr_db: float
    ssim: float
    lpips: float | None
    frechet: float
    codebook_usage: float
    perplexity: float
    dead_codes: int


def measure_reconstruction(
    image_tokenizer: Any, pictures: UInt8[Tensor, "N H W 3"], lpips: LPIPS | None = None, batch_size: int = 32
) -> ReconstructionReport:
    """The figures of one image tokenizer, put in eval mode for it. Raises ValueError for fewer than 2 pictures."""
    return _measured(image_tokenizer, pictures, lpips, batch_size)[0]


@torch.inference_mode()
def _measured(
    image_tokenizer: Any, pictures: UInt8[Tensor, "N H W 3"], lpips: LPIPS | None, batch_size: int = 32
) -> tuple[ReconstructionReport, Int[Tensor, "N h w"]]:
    """The figures, and the codes of the pictures."""
    N, H, W, _ = pictures.shape
    if N < 2:
        raise ValueError(f"{N} pictures; a Fréchet distance needs at least 2.")
    image_tokenizer.eval()
    device = next(image_tokenizer.parameters()).device
    features = RandomFeatures().to(device)
    squared_error, ssims, distances, codes = 0.0, [], [], []
    true_features, our_features = [], []
    for part in pictures.split(batch_size):
        images = to_images(part, device)
        codes.append(image_tokenizer.encode_images(images))
        rebuilt = image_tokenizer.decode_codes(codes[-1]).clamp(0, 1)
        squared_error += float((rebuilt - images).double().square().sum())
        ssims.append(ssim(rebuilt, images))
        true_features.append(features(images))
        our_features.append(features(rebuilt))
        if lpips is not None:
            distances.append(lpips.per_pair(rebuilt, images))
    all_codes = torch.cat(codes)
    health = CodebookHealth(image_tokenizer.config.codebook_size, window=all_codes.numel())
    health.update(all_codes)
    seen = health.report()
    mse = squared_error / pictures.numel()
    report = ReconstructionReport(
        num_pictures=N,
        image_size=(H, W),
        num_codes=all_codes[0].numel(),
        codebook_size=image_tokenizer.config.codebook_size,
        psnr_db=-10 * math.log10(mse) if mse else math.inf,
        ssim=float(torch.cat(ssims).mean()),
        lpips=float(torch.cat(distances).mean()) if distances else None,
        frechet=frechet_distance(torch.cat(our_features), torch.cat(true_features)),
        codebook_usage=seen.usage,
        perplexity=seen.perplexity,
        dead_codes=seen.dead_codes,
    )
    return report, all_codes


def to_images(pictures: UInt8[Tensor, "N H W C"], device: torch.device | str = "cpu") -> Float[Tensor, "N C H W"]:
    """Bytes 0..255 as images in [0, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float() / 255


def ssim(ours: Float[Tensor, "B C H W"], theirs: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each pair, in [-1, 1], of images in [0, 1] (Wang et al. 2004): a Gaussian window of
    11 pixels with deviation 1.5 around every pixel of pictures mirrored at their borders, K1 = 0.01 and K2 = 0.03,
    each channel by itself, as torchmetrics has it. Raises ValueError for pictures too small to be mirrored."""
    _, C, H, W = ours.shape
    margin = SSIM_WINDOW // 2
    if min(H, W) <= margin:
        raise ValueError(f"pictures of {H} x {W} pixels; SSIM needs {margin + 1} a side.")
    ours, theirs = (F.pad(images, (margin, margin, margin, margin), mode="reflect") for images in (ours, theirs))
    places = torch.arange(-margin, margin + 1, device=ours.device)
    window = torch.exp(-places.float().square() / (2 * 1.5**2))
    window = window / window.sum()
    # The five moments are smoothed as channels of one picture, along rows and then along columns.
    moments = torch.cat([ours, theirs, ours * ours, theirs * theirs, ours * theirs], dim=1)
    moments = F.conv2d(moments, window.view(1, 1, 1, -1).expand(5 * C, 1, 1, -1), groups=5 * C)
    moments = F.conv2d(moments, window.view(1, 1, -1, 1).expand(5 * C, 1, -1, 1), groups=5 * C)
    a, b, aa, bb, ab = moments.split(C, dim=1)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * a * b + c1) * (2 * (ab - a * b) + c2)
    denominator = (a * a + b * b + c1) * ((aa - a * a) + (bb - b * b) + c2)
    return (numerator / denominator).flatten(1).mean(1)


class RandomFeatures(nn.Module):
    """64 numbers of a picture: mean responses, after ReLU, of three layers of random 3x3 filters, each layer at half
    the resolution of the one before. The filters are always the same.

    All but 4 of the first layer's filters sum to zero, so that what is felt is edges and texture more than colour.
    Untrained filters still tell blur, noise and blocks from what pictures look like; they know nothing of what is
    in a picture.
    """

    first: Tensor
    second: Tensor
    third: Tensor

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(0)
        for name, (width, before) in {"first": (16, 3), "second": (24, 16), "third": (24, 24)}.items():
            filters = random.standard_normal((width, before, 3, 3)) / math.sqrt(before * 9 / 2)
            if name == "first":
                filters[4:] -= filters[4:].mean((1, 2, 3), keepdims=True)
            self.register_buffer(name, torch.from_numpy(filters.astype(np.float32)))

    def taps(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B D h w"]]:
        """The responses after each of the three layers."""
        x, found = images, []
        for i, filters in enumerate((self.first, self.second, self.third)):
            x = F.relu(F.conv2d(x, filters, stride=1 if i == 0 else 2, padding=1))
            found.append(x)
        return found

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 64"]:
        return torch.cat([x.mean((2, 3)) for x in self.taps(images)], dim=1)

    def distance(self, ours: Float[Tensor, "B 3 H W"], theirs: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Of each pair, as LPIPS has it (Zhang et al. 2018, arXiv:1801.03924) with these filters in place of VGG's and
        all channels weighted alike: squared differences of responses at unit length, summed over channels, averaged
        over places, summed over layers. It needs no weights, and knows nothing that people see."""
        layers = zip(self.taps(ours), self.taps(theirs), strict=True)
        return torch.stack([(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in layers]).sum(0)


def frechet_distance(ours: Float[Tensor, "N D"], theirs: Float[Tensor, "M D"]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the means and unbiased covariances of two sets of features
    (Heusel et al. 2017, arXiv:1706.08500), in float64. It is biased upwards, the more so the fewer the rows."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    difference = ours.mean(0) - theirs.mean(0)
    s1, s2 = (torch.atleast_2d(torch.cov(features.T)) for features in (ours, theirs))
    # The square root's trace is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(difference.square().sum() + s1.trace() + s2.trace() - 2 * cross))


# Several tokenizers in one table -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The figures of several image tokenizers on the same pictures, by name, and the command that made them."""

    pictures: str
    command: str
    reports: Mapping[str, ReconstructionReport]
    same_codes: Mapping[str, float | None]
    """The share of codes that are those of the first tokenizer: 1 where an enlarged decoder stands behind the same
    encoder and codebook. None where there is another number of codes or of entries."""
    sheet: Image.Image
    """The first pictures in the top row, each tokenizer's reconstructions in a row of its own below."""

    def table(self) -> Table:
        table = Table("image tokenizer", "pictures", "codes", "PSNR dB", "SSIM", "LPIPS", "Fréchet", box=None)
        for title in ("usage", "perplexity", "dead", "codes as the first's"):
            table.add_column(title)
        for name, report in self.reports.items():
            table.add_row(
                name,
                f"{report.num_pictures} of {report.image_size[0]}×{report.image_size[1]}",
                f"{report.num_codes} of {report.codebook_size:,}",
                f"{report.psnr_db:.2f}",
                f"{report.ssim:.4f}",
                "–" if report.lpips is None else f"{report.lpips:.4f}",
                f"{report.frechet:.4g}",
                f"{report.codebook_usage:.1%}",
                f"{report.perplexity:.0f}",
                f"{report.dead_codes:,}",
                "–" if (same := self.same_codes[name]) is None else f"{same:.1%}",
            )
        table.caption = f"Fréchet distance in the space of {FEATURE_SPACE}: not an FID."
        return table

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes `reconstruction.json` and `reconstructions.png`. Raises InputError if they exist, unless `force`."""
        directory = Path(directory)
        refuse_existing([directory / name for name in REPORT_FILES], force=force)
        content = {
            "command": self.command,
            "pictures": self.pictures,
            "feature_space": FEATURE_SPACE,
            "image_tokenizers": {
                name: {**dataclasses.asdict(report), "same_codes": self.same_codes[name]}
                for name, report in self.reports.items()
            },
        }
        with new_file(directory / REPORT_FILES[0], force=force) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with new_file(directory / REPORT_FILES[1], force=force) as temporary:
            self.sheet.save(temporary, format="PNG")


def compare_tokenizers(
    directories: Sequence[Path | str],
    pictures: Path | str,
    *,
    num: int | None = None,
    image_size: tuple[int, int] | None = None,
    lpips: LPIPS | None = None,
    num_shown: int = 8,
    command: str = "",
    show_progress: bool = False,
) -> Comparison:
    """Measures image tokenizers on the first `num` pictures (all of them, if None) of a folder or parquet table.

    A directory is that of an image tokenizer, of a bundle or of a training run. Pictures are cut to `image_size`
    (rows, columns), or else to each tokenizer's own default size. Raises InputError for what cannot be read.
    """
    if not directories:
        raise InputError("no image tokenizer is given; name at least one folder.")
    picture_set = PictureSet(pictures)
    rows = range(len(picture_set) if num is None else min(num, len(picture_set)))
    reports: dict[str, ReconstructionReport] = {}
    strips: dict[str, Tensor] = {}
    sizes: dict[tuple[int, int], Tensor] = {}
    first: tuple[int, Tensor] | None = None
    same_codes: dict[str, float | None] = {}
    for directory in track(directories, "measuring image tokenizers", unit="tokenizer", show=show_progress):
        image_tokenizer: Any = load_image_tokenizer(find_image_tokenizer(directory))
        size = image_size or default_image_size(image_tokenizer.config)
        if size not in sizes:
            sizes[size] = picture_set.fitted(rows, size)
            strips[f"pictures {size[0]} x {size[1]}"] = to_images(sizes[size][:num_shown])
        name = str(directory)
        reports[name], codes = _measured(image_tokenizer, sizes[size], lpips)
        first = first or (reports[name].codebook_size, codes)
        alike = first[0] == reports[name].codebook_size and first[1].shape == codes.shape
        same_codes[name] = float((codes == first[1]).float().mean()) if alike else None
        strips[name] = _rebuilt(image_tokenizer, to_images(sizes[size][:num_shown]))
    return Comparison(
        pictures=str(pictures), command=command, reports=reports, same_codes=same_codes, sheet=draw_strips(strips)
    )


def find_image_tokenizer(directory: Path | str) -> Path:
    """The folder of the image tokenizer that a folder is or, as a bundle or a training run, holds."""
    directory = Path(directory)
    inner = directory / "image_tokenizer"
    found = inner if inner.is_dir() else directory
    if not (found / "config.json").is_file():
        raise InputError(
            f"{directory} holds no image tokenizer; give a folder with config.json and model.safetensors, "
            "a bundle, or the output folder of a finished training run."
        )
    return found


def default_image_size(config: Any) -> tuple[int, int]:
    """Rows and columns of the pictures that an image tokenizer's config names."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def draw_strips(strips: Mapping[str, Float[Tensor, "_ C H W"]]) -> Image.Image:
    """A sheet with one row of pictures under each name, pictures enlarged by whole pixels to about 96."""
    label, gap = 14, 2
    rows = []
    for name, images in strips.items():
        zoom = max(1, 96 // images.shape[-1])
        enlarged = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
        pixels = (enlarged.clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        rows.append((name, [Image.fromarray(picture.contiguous().numpy()) for picture in pixels]))
    width = max(len(pictures) * (pictures[0].width + gap) for _, pictures in rows)
    sheet = Image.new("RGB", (width, sum(label + pictures[0].height + gap for _, pictures in rows)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, pictures in rows:
        draw.text((1, top + 1), name, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * (picture.width + gap), top + label))
        top += label + pictures[0].height + gap
    return sheet


@torch.inference_mode()
def _rebuilt(image_tokenizer: Any, images: Tensor) -> Tensor:
    return image_tokenizer.decode_codes(image_tokenizer.encode_images(images)).clamp(0, 1)
