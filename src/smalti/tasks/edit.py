"""Parts of a picture drawn anew: the codes of the other cells stay as they are, to the bit.

A picture is drawn in raster order. Where all that is kept stands before all that is drawn, the model's own draws are
exact. Elsewhere what is drawn does not see the kept cells behind it, and there are two ways to make it fit them:

- `resampling` draws from the model's distribution given all kept cells (`engine/resampling.py`);
- without it, among several candidates, `best_of`, the one is kept under which the whole picture is likeliest.

A decoder's pixels depend on codes of cells around them too. `blended`, the drawn picture fades into the given one over
as many pixels as the drawn cells were measured to reach; beyond those the pixels are the given ones, to the bit.

Letters: H W rows and columns of pixels, h w of codes.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from smalti.engine.generate import Generated, Request, generate
from smalti.engine.resampling import ResampleConfig, num_steps, resample
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import PictureConfig, read_picture, read_receipt, to_images, with_receipt
from smalti.progress import stage
from smalti.tasks.images import Pipeline

RERANK = "picture"
"""What the best candidate has most of: p(picture | caption)."""
MOST_PROBES = 8
REACHED = 0.99
"""Of the change of pixels that another code in a cell makes, the share that lies within its reach."""


def edit(
    pipe: Pipeline,
    picture: Image.Image | Path | str,
    redrawn: Bool[Tensor, "h w"],
    caption: str,
    *,
    seed: int = 0,
    n: int = 1,
    best_of: int = 1,
    negative_prompt: str | None = None,
    scale: int | None = None,
    resampling: ResampleConfig | None = None,
    blended: bool = False,
    show_progress: bool = False,
    **sampling: Any,
) -> list[Image.Image]:
    """`n` pictures that differ from the given one in the cells `redrawn`, which are drawn to fit the caption.

    Picture i is the best of those with the seeds from `seed + i · best_of` on. Each carries its receipt. `resampling`
    is left out where what is kept stands before what is drawn: it would change nothing.
    """
    if resampling is not None and best_of > 1:
        raise InputError(f"best_of is {best_of}, and resampling weighs its particles already; leave one of them out.")
    config = pipe.sample_config(pipe.sampling.picture, sampling)
    codes = codes_of(pipe, picture)
    request = edit_request(pipe, codes, redrawn, caption, seed, negative_prompt, config)
    resampling = None if is_behind(redrawn) else resampling
    executor = pipe.executor(n * (best_of if resampling is None else resampling.num_particles))
    requests = [replace(request, seed=seed + i) for i in range(n * best_of)]
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt, "sampling": asdict(config), "executor": executor
    }  # fmt: skip
    steps = 1 if resampling is None else num_steps(pipe.layout, requests, config, resampling)
    with stage("drawing", steps, show=show_progress) as progress:
        if resampling is None:
            found = generate(pipe.model, pipe.layout, requests, config, executor=executor)
            kept = kept_candidates(pipe, found, best_of)
        else:
            settings["resampling"] = asdict(resampling)
            kept = list(enumerate(resampled(pipe, requests, config, resampling, executor, progress.advance)))
    if blended:
        settings["blended"] = reach(pipe, codes, redrawn)
    drawn = [pipe.decode(row[None], scale=1 if blended else scale)[0] for _, row in kept]
    if blended:
        opacity = blending(redrawn, pipe.pictures, settings["blended"])
        drawn = [_enlarged(blend(one, picture, opacity, pipe.pictures), pipe.pictures, scale) for one in drawn]
    return [
        with_receipt(one, edit_receipt(pipe, caption, redrawn, seed + number, row, best_of, **settings))
        for one, (number, row) in zip(drawn, kept, strict=True)
    ]


def resampled(
    pipe: Pipeline,
    requests: Sequence[Request],
    config: SampleConfig,
    resampling: ResampleConfig,
    executor: str | None,
    on_step: Any = lambda: None,
) -> Int[Tensor, "R h w"]:
    """The codes of edits of one picture, drawn given all that is kept of it."""
    tokens = resample(pipe.model, pipe.layout, requests, config, resampling, executor=executor, on_step=on_step)
    image = pipe.layout.vocabulary["image"]
    given = requests[0].given.get("image", torch.zeros(0, dtype=torch.long))
    drawn = tokens[:, : pipe.bundle.image_length - len(given)] - image.offset
    return torch.cat([given.expand(len(drawn), -1), drawn], dim=1).view(-1, *pipe.grid)


def is_behind(redrawn: Bool[Tensor, "h w"]) -> bool:
    """Whether what is drawn stands behind all that is kept, in raster order."""
    cells = redrawn.flatten()
    return bool(cells[int(cells.int().argmax()) :].all())


def edit_codes(
    pipe: Pipeline,
    codes: Int[Tensor, "h w"],
    redrawn: Bool[Tensor, "h w"],
    caption: str,
    *,
    seed: int = 0,
    negative_prompt: str | None = None,
    executor: str | None = None,
    **sampling: Any,
) -> Int[Tensor, "1 h w"]:
    """The codes of one picture, of which those `redrawn` are drawn and the others are the given ones."""
    config = pipe.sample_config(pipe.sampling.picture, sampling)
    request = edit_request(pipe, codes, redrawn, caption, seed, negative_prompt, config)
    [found] = generate(pipe.model, pipe.layout, [request], config, executor=executor)
    return found.spans["image"].view(1, *pipe.grid)


def edit_request(
    pipe: Pipeline,
    codes: Int[Tensor, "h w"],
    redrawn: Bool[Tensor, "h w"],
    caption: str,
    seed: int,
    negative_prompt: str | None,
    config: SampleConfig,
) -> Request:
    """The codes before the first cell that is drawn are given, those behind it kept. Raises InputError where there is
    nothing to draw, or codes do not stand for cells."""
    check_cells(pipe)
    if tuple(redrawn.shape) != pipe.grid or not redrawn.any():
        raise InputError(
            f"there is nothing to draw: mark at least one of the {pipe.grid[0]}×{pipe.grid[1]} cells of the picture."
        )
    flat, cells = codes.flatten(), redrawn.flatten().tolist()
    first = cells.index(True)
    kept = {cell: int(flat[cell]) for cell in range(first, len(cells)) if not cells[cell]}
    request = pipe.picture_request(pipe.whole(caption), seed, negative_prompt, config)
    prefix = {"image": flat[:first]} if first else {}
    if request.null is not None:
        request = replace(request, null=replace(request.null, given={**request.null.given, **prefix}))
    return replace(request, given={**request.given, **prefix}, kept={"image": kept} if kept else {})


def check_cells(pipe: Pipeline) -> None:
    """Raises InputError if parts of the bundle's pictures cannot be kept."""
    if not pipe.has_patches:
        raise InputError(
            f"the bundle {pipe.name} cannot keep a part of a picture: its image tokenizer has no code for a patch, "
            "each of its codes stands for the whole picture. Draw a new picture, or use another bundle."
        )


def codes_of(pipe: Pipeline, picture: Image.Image | Path | str) -> Int[Tensor, "h w"]:
    """The codes of a picture: those in its receipt, if it is what these weights make of them, pixel by pixel; encoding
    it anew may give others."""
    try:
        receipt = read_receipt(picture)
        codes = torch.tensor(receipt["codes"], dtype=torch.long).view(pipe.grid)
        size = pipe.layout.vocabulary["image"].size
        if receipt["weights_sha256"] == pipe.weights_sha256 and 0 <= int(codes.min()) <= int(codes.max()) < size:
            given = picture if isinstance(picture, Image.Image) else read_picture(picture)
            [drawn] = pipe.decode(codes[None], scale=max(1, given.width // pipe.pictures.width))
            if drawn.size == given.size and (np.asarray(drawn) == np.asarray(given.convert("RGB"))).all():
                return codes
    except (InputError, ValueError, KeyError, TypeError, RuntimeError, IndexError):
        pass  # without a receipt, or with one that cannot be used, it is a picture like any other
    return pipe.encode([picture])[0]


def redrawn_cells(alpha: Image.Image, grid: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The cells in which a mask is transparent anywhere, as the Images API says what to draw. Its size is a whole
    multiple of the grid."""
    columns, rows = alpha.width // grid[1], alpha.height // grid[0]
    if not rows or not columns or alpha.size != (columns * grid[1], rows * grid[0]):
        raise InputError(f"the mask has {alpha.width}×{alpha.height} pixels; give one as large as the picture.")
    opaque = torch.from_numpy(np.asarray(alpha) == 255).view(grid[0], rows, grid[1], columns)
    return ~opaque.all(3).all(1)


def read_mask(mask: Path | str, picture: Path | str, grid: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The cells that a mask file marks anywhere: transparent in a mask with an alpha channel, else bright (128 of 255
    or more). Raises InputError for a mask of another size than the picture, and one that marks nothing."""
    marked, size = read_picture(mask), read_picture(picture).size
    if marked.size != size:
        raise InputError(
            f"the mask {mask} has {marked.width}×{marked.height} pixels, the picture {picture} {size[0]}×{size[1]}; "
            "make them equal."
        )
    if "A" in marked.getbands() or "transparency" in marked.info:
        alpha, how = marked.convert("RGBA").getchannel("A"), "transparent"
    else:
        alpha, how = marked.convert("L").point([255] * 128 + [0] * 128), "bright"
    redrawn = redrawn_cells(alpha, grid)
    if not redrawn.any():
        raise InputError(f"the mask {mask} has no {how} part: there is nothing to draw.")
    return redrawn


# Pixels --------------------------------------------------------------------------------------------------------


def reach(pipe: Pipeline, codes: Int[Tensor, "h w"], redrawn: Bool[Tensor, "h w"]) -> int:
    """How many pixels beyond a cell its code reaches, measured in this picture: other codes are put into some of the
    redrawn cells, one at a time, and REACHED of the squared change lies within."""
    cells = redrawn.flatten().nonzero()[:, 0]
    probes = cells[torch.linspace(0, len(cells) - 1, min(MOST_PROBES, len(cells))).long()]
    changed = codes.flatten().repeat(len(probes), 1)
    size = pipe.layout.vocabulary["image"].size
    other = torch.randint(1, size, (len(probes),), generator=torch.Generator().manual_seed(0))
    places = torch.arange(len(probes))
    changed[places, probes] = (changed[places, probes] + other) % size
    # one by one, so that nothing depends on how many there are
    images = pipe.decode_images(torch.cat([codes[None], changed.view(-1, *codes.shape)]), batch_size=1).clamp(0, 1)
    change = (images[1:] - images[:1]).double().square().sum(1)  # (probes, H, W)
    shares = torch.zeros(max(images.shape[2:]) + 1, dtype=torch.float64)
    for cell, of_cell in zip(probes.tolist(), change, strict=True):
        mask = torch.zeros_like(redrawn)
        mask.view(-1)[cell] = True
        distance = pixel_distance(mask, pipe.pictures)
        total = of_cell.sum().clamp(min=1e-30)
        shares.index_add_(0, distance.flatten(), (of_cell / total).flatten())
    within = shares.cumsum(0)
    return int((within < REACHED * within[-1]).sum())


def pixel_distance(cells: Bool[Tensor, "h w"], pictures: PictureConfig) -> Int[Tensor, "H W"]:
    """How many pixels each pixel is away from the nearest of the cells, the larger of rows and columns; 0 in them."""
    height, width = pictures.height // cells.shape[0], pictures.width // cells.shape[1]
    found = torch.full((pictures.height, pictures.width), max(pictures.height, pictures.width))
    rows, columns = torch.arange(pictures.height), torch.arange(pictures.width)
    for row, column in cells.nonzero().tolist():
        down = torch.maximum(row * height - rows, rows - (row + 1) * height + 1).clamp(min=0)
        across = torch.maximum(column * width - columns, columns - (column + 1) * width + 1).clamp(min=0)
        found = torch.minimum(found, torch.maximum(down[:, None], across[None]))
    return found


def blending(redrawn: Bool[Tensor, "h w"], pictures: PictureConfig, reached: int) -> Float[Tensor, "H W"]:
    """How much of each pixel is of the drawn picture: all in the redrawn cells, less and less as far as they reach, and
    nothing beyond."""
    return (1 - pixel_distance(redrawn, pictures).double() / (reached + 1)).clamp(min=0)


def blend(
    drawn: Image.Image, given: Image.Image | Path | str, opacity: Float[Tensor, "H W"], pictures: PictureConfig
) -> Image.Image:
    """The drawn picture over the given one. Where only one of them counts, its pixels are taken as they are."""
    ours: UInt8[np.ndarray, "H W 3"] = np.asarray(drawn)
    theirs = (to_images(given, pictures)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    share, step = opacity.numpy()[..., None], 255 / (pictures.levels - 1)
    mixed = np.round((share * ours + (1 - share) * theirs) / step) * step
    return Image.fromarray(np.where(share == 1, ours, np.where(share == 0, theirs, mixed)).astype(np.uint8))


def _enlarged(picture: Image.Image, pictures: PictureConfig, scale: int | None) -> Image.Image:
    scale = pictures.scale if scale is None else scale
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


# Candidates and receipts ---------------------------------------------------------------------------------------


def kept_candidates(pipe: Pipeline, found: Sequence[Generated], best_of: int) -> list[tuple[int, Int[Tensor, "h w"]]]:
    """Of every `best_of` sequences the number and the codes of the one that is kept."""
    numbers = pipe.best(found, best_of, RERANK, 64) if best_of > 1 else range(len(found))
    return [(number, found[number].spans["image"].view(pipe.grid)) for number in numbers]


def edit_receipt(
    pipe: Pipeline,
    caption: str,
    redrawn: Bool[Tensor, "h w"],
    seed: int,
    codes: Int[Tensor, "h w"],
    best_of: int,
    **settings: Any,
) -> dict[str, Any]:
    """The receipt of an edited picture: `redrawn` are the numbers of the cells that were drawn, in raster order."""
    details = {"best_of": best_of, "rerank": RERANK} if best_of > 1 else {}
    cells = redrawn.flatten().nonzero()[:, 0].tolist()
    return pipe.receipt(
        task="edit", prompt=caption, seed=seed, redrawn=cells, codes=codes.flatten().tolist(), **settings, **details
    )
