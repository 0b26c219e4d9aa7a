"""Parts of a picture drawn anew: the codes of the other cells stay as they are.

A picture is drawn in raster order, so that what is drawn sees the kept cells before it and not those behind it. Among
several candidates, `best_of`, the one is kept under which the whole picture, what is kept behind it too, is likeliest.

Letters: H W picture, h w code grid.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from smalti.engine.generate import Generated, Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import read_picture, read_receipt, with_receipt
from smalti.tasks.images import Pipeline

RERANK = "picture"
"""What the best candidate has most of: p(picture | caption)."""


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
    **sampling: Any,
) -> list[Image.Image]:
    """`n` pictures that differ from the given one in the cells `redrawn`, which are drawn to fit the caption.

    Picture i is the best of those with the seeds from `seed + i · best_of` on. Each carries its receipt.
    """
    config = pipe.sample_config(pipe.sampling.picture, sampling)
    executor = pipe.executor(n * best_of)
    codes = codes_of(pipe, picture)
    request = edit_request(pipe, codes, redrawn, caption, seed, negative_prompt, config)
    requests = [replace(request, seed=seed + i) for i in range(n * best_of)]
    found = generate(pipe.model, pipe.layout, requests, config, executor=executor)
    settings = {"negative_prompt": negative_prompt, "sampling": asdict(config), "executor": executor}
    return [
        with_receipt(drawn, edit_receipt(pipe, caption, redrawn, seed + number, row, best_of, **settings))
        for number, row in kept_candidates(pipe, found, best_of)
        for drawn in pipe.decode(row[None], scale=scale)
    ]


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
