"""How well pictures that an image tokenizer rebuilt are enlarged: an upsampler beside bicubic and Lanczos.

Letters: N pictures, B batch, H W rows and columns of the small ones, s scale.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from smalti.data.picture_sets import PictureSet
from smalti.errors import InputError
from smalti.evaluate.reconstruction import RandomFeatures, draw_strips, ssim, to_images
from smalti.files import new_file, refuse_existing
from smalti.image_tokenizers.perceptual import LPIPS
from smalti.progress import stage
from smalti.upsample import Upsampler

REPORT_FILES = ("upsampling.json", "upsampling.png")
UPSAMPLER = "upsampler"
Enlarge = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B 3 sH sW"]]


@dataclass(frozen=True, kw_only=True)
class UpsamplingReport:
    """Figures over the pictures, in float32 on the scale [0, 1]: `psnr_db` of the mean squared error over all of them
    together, the others means over pictures. `distance` is that of `RandomFeatures`, `lpips` None without its
    weights."""

    psnr_db: float
    ssim: float
    distance: float
    lpips: float | None


def shrunk(images: Float[Tensor, "B 3 sH sW"], size: tuple[int, int]) -> Float[Tensor, "B 3 H W"]:
    """Pictures made smaller as the loaders make them: bicubic with antialiasing, rounded to bytes."""
    small = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
    return (small.clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def rebuilt(image_tokenizer: Any, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """What an image tokenizer makes of pictures, rounded to bytes as a drawn picture is."""
    found = image_tokenizer.decode_codes(image_tokenizer.encode_images(images)).clamp(0, 1)
    return (found * 255).round() / 255


def resampled_by(method: Image.Resampling, scale: int) -> Enlarge:
    """Pillow's enlarging of pictures of bytes."""

    def enlarge(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 sH sW"]:
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        sizes = images.shape[3] * scale, images.shape[2] * scale
        large = [np.asarray(Image.fromarray(picture).resize(sizes, method)) for picture in pixels]
        return to_images(torch.from_numpy(np.stack(large)), images.device)

    return enlarge


def methods_beside(upsampler: Upsampler) -> dict[str, Enlarge]:
    """What an upsampler is compared with, and it."""
    scale = upsampler.config.scale
    plain = {
        "nearest": Image.Resampling.NEAREST,
        "bicubic": Image.Resampling.BICUBIC,
        "Lanczos": Image.Resampling.LANCZOS,
    }
    found = {name: resampled_by(method, scale) for name, method in plain.items()}
    return found | {UPSAMPLER: upsampler.upsample}


@torch.inference_mode()
def measure_upsampling(
    methods: Mapping[str, Enlarge],
    image_tokenizer: Any,
    pictures: UInt8[Tensor, "N sH sW 3"],
    image_size: tuple[int, int],
    lpips: LPIPS | None = None,
    *,
    batch_size: int = 32,
    show_progress: bool = False,
) -> dict[str, UpsamplingReport]:
    """The figures of each way to enlarge what the image tokenizer makes of the pictures at `image_size`, compared with
    the pictures as they are."""
    device = next(image_tokenizer.parameters()).device
    features = RandomFeatures().to(device)
    errors = dict.fromkeys(methods, 0.0)
    columns: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in methods}
    with stage("enlarging pictures", len(pictures), unit="picture", show=show_progress) as progress:
        for part in pictures.split(batch_size):
            truth = to_images(part, device)
            small = rebuilt(image_tokenizer, shrunk(truth, image_size))
            for name, enlarge in methods.items():
                ours = enlarge(small)
                errors[name] += float((ours - truth).double().square().sum())
                found = [ssim(ours, truth), features.distance(ours, truth)]
                columns[name].append((*found, *([] if lpips is None else [lpips.per_pair(ours, truth)])))
            progress.advance(len(part))
    reports = {}
    for name in methods:
        means = [float(torch.cat(column).mean()) for column in zip(*columns[name], strict=True)]
        mse = errors[name] / pictures.numel()
        reports[name] = UpsamplingReport(
            psnr_db=-10 * math.log10(mse) if mse else math.inf,
            ssim=means[0],
            distance=means[1],
            lpips=None if lpips is None else means[2],
        )
    return reports


# One table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UpsamplingComparison:
    """The figures of each way by its name, and the command that made them."""

    command: str
    pictures: str
    num_pictures: int
    image_size: tuple[int, int]
    scale: int
    num_parameters: int
    reports: Mapping[str, UpsamplingReport]
    sheet: Image.Image
    """The first pictures in the top row, what each way makes of their reconstructions below."""

    def table(self) -> Table:
        table = Table("enlarged by", "PSNR dB", "SSIM", "distance", "LPIPS", box=None)
        for name, report in self.reports.items():
            table.add_row(
                name,
                f"{report.psnr_db:.2f}",
                f"{report.ssim:.4f}",
                f"{report.distance:.4f}",
                "–" if report.lpips is None else f"{report.lpips:.4f}",
            )
        rows, columns = self.image_size
        table.caption = (
            f"{self.num_pictures} reconstructions of {rows}×{columns}, ×{self.scale}, against the pictures themselves. "
            "distance: as LPIPS, of fixed random filters."
        )
        return table

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes `upsampling.json` and `upsampling.png`. Raises InputError if they exist, unless `force`."""
        directory = Path(directory)
        refuse_existing([directory / name for name in REPORT_FILES], force=force)
        names = ("command", "pictures", "num_pictures", "image_size", "scale", "num_parameters")
        content = {name: getattr(self, name) for name in names}
        content["methods"] = {name: dataclasses.asdict(report) for name, report in self.reports.items()}
        with new_file(directory / REPORT_FILES[0], force=force) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with new_file(directory / REPORT_FILES[1], force=force) as temporary:
            self.sheet.save(temporary, format="PNG")


def compare_upsampling(
    upsampler: Upsampler,
    image_tokenizer: Any,
    pictures: Path | str,
    *,
    num: int | None = None,
    lpips: LPIPS | None = None,
    num_shown: int = 6,
    command: str = "",
    show_progress: bool = False,
) -> UpsamplingComparison:
    """An upsampler beside plain ways to enlarge, on the first `num` pictures (None: all) of a folder or parquet table,
    cut to the size that comes out. Raises InputError for what cannot be read, or is smaller than that size: there would
    be nothing to compare with."""
    picture_set, config = PictureSet(pictures), upsampler.config
    rows = range(len(picture_set) if num is None else min(num, len(picture_set)))
    height, width = config.output_size
    first = picture_set.picture(0)
    if first.width < width or first.height < height:
        raise InputError(
            f"{pictures}: its first picture has {first.width}×{first.height} pixels, and ×{config.scale} gives "
            f"{width}×{height}: to measure it, pictures of at least that size are needed."
        )
    fitted = picture_set.fitted(rows, config.output_size)
    methods = methods_beside(upsampler)
    how = {"lpips": lpips, "show_progress": show_progress}
    reports = measure_upsampling(methods, image_tokenizer, fitted, config.image_size, **how)
    truth = to_images(fitted[:num_shown])
    small = rebuilt(image_tokenizer, shrunk(truth, config.image_size))
    strips = {f"pictures {height} x {width}": truth}
    with torch.inference_mode():
        strips |= {name: methods[name](small) for name in ("nearest", "Lanczos", UPSAMPLER)}
    return UpsamplingComparison(
        command=command,
        pictures=str(pictures),
        num_pictures=len(rows),
        image_size=config.image_size,
        scale=config.scale,
        num_parameters=upsampler.num_parameters,
        reports=reports,
        sheet=draw_strips(strips),
    )
