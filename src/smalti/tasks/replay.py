"""Drawing a picture again from what its PNG says about itself, and saying where the two differ, if they do.

Letters: N pictures of h by w codes, H by W pixels.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from smalti.bundle import Bundle
from smalti.documents import config_of
from smalti.engine.executors import EXECUTORS, executors_for
from smalti.engine.executors.native import load
from smalti.engine.generate import Request, generate
from smalti.engine.resampling import ResampleConfig
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError, first_line, shortened
from smalti.image_files import GRID_GAP, grid_columns, read_picture, read_receipts, to_grid, with_receipt
from smalti.models.stored_weights import STORAGES
from smalti.tasks.classes import CLASS, ClassPipeline
from smalti.tasks.codes import drawn_pictures
from smalti.tasks.edit import edit_request, pixel_distance, resampled
from smalti.tasks.features import FeaturePipeline, captions_face
from smalti.tasks.images import Pipeline

AnyPipeline = Pipeline | ClassPipeline | FeaturePipeline
ENTRIES = {"task": str, "seed": int, "sampling": dict, "weights_sha256": str, "codes": list, "bundle": str}
"""What a receipt must hold, whatever the picture is."""
TASK_ENTRIES = {
    "generate": {"prompt": str},
    CLASS: {"label": int},
    "complete": {"rows": int},
    "edit": {"prompt": str, "redrawn": list},
}
"""And what of each task."""


class Replayed(NamedTuple):
    """A picture drawn again."""

    picture: Image.Image
    """With the receipt of the first, but its own codes."""
    num_pictures: int
    num_codes: int
    difference: str | None
    """The first place where it is not the picture that was given; None if they are the same, code by code and pixel
    by pixel."""


def replay(path: Path | str, bundle: str | Path | None = None, text_encoder: str | Path | None = None) -> Replayed:
    """Draws the picture, or the grid of pictures, in a PNG file again, with the bundle it names or `bundle`, and the
    text encoder it names, if any, or `text_encoder`.

    Raises InputError if the file does not say how it was made, or bundle or text encoder have other weights than those
    it was made with, naming both.
    """
    given = read_picture(path)
    receipts = checked_receipts(path, read_receipts(path))
    pipe = _load(path, receipts, bundle, text_encoder)
    for receipt in receipts:
        if receipt["weights_sha256"] != pipe.weights_sha256:
            raise InputError(
                f"{path} was drawn with weights {receipt['weights_sha256']}, the bundle {bundle or pipe.name} has "
                f"{pipe.weights_sha256}; name the bundle it was drawn with by --bundle."
            )
    check_kept(path, receipts, pipe)
    if isinstance(pipe, FeaturePipeline):
        check_text_encoder(path, receipts, pipe)
    for receipt in receipts:
        _check_executor(path, receipt.get("executor"))
    upscale = _is_upscaled(path, receipts, pipe)
    scale = _scale(
        path, given, len(receipts), drawn_pictures(pipe.bundle, upscale).width
    )  # before the work: a picture made smaller has no place for them
    try:
        codes = _draw_codes(pipe, receipts)
    except InputError as error:
        raise InputError(f"{path}: its receipt cannot be drawn again: {error}") from error
    except ValueError as error:  # settings that do not go together, or a seed out of range
        raise _damaged(path, first_line(error)) from error
    drawn = pipe.decode(codes, scale=scale, upscale=upscale)
    pictures = [
        with_receipt(picture, {**receipt, "codes": row.tolist()})
        for picture, receipt, row in zip(
            unblended(pipe, given, drawn, receipts), receipts, codes.flatten(1), strict=True
        )
    ]
    picture = to_grid(pictures) if len(pictures) > 1 else pictures[0]
    difference = code_difference(codes, receipts) or _pixel_difference(np.asarray(picture), np.asarray(given))
    return Replayed(picture, len(pictures), codes.numel(), difference)


def checked_receipts(path: Path | str, receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The receipts of the picture in a file, or of that name. Raises InputError if they do not say how it was made."""
    for receipt in receipts:
        task = receipt.get("task")
        wanted = ENTRIES | TASK_ENTRIES.get(task if isinstance(task, str) else "", TASK_ENTRIES["generate"])
        for name, kind in wanted.items():
            if not isinstance(receipt.get(name), kind) or isinstance(receipt[name], bool):
                raise InputError(
                    f"{path}: its receipt has {name} {shortened(repr(receipt.get(name)))}, so it cannot be drawn "
                    "again; was it written by another program, or another version of smalti?"
                )
        for name in ("prompt", "negative_prompt", "text_encoder", "text_encoder_sha256", "upsampler_sha256"):
            if not isinstance(receipt.get(name), str | None):
                raise _damaged(path, f"{name} is {shortened(repr(receipt[name]))}, expected text")
        for name in ("codes", "redrawn"):
            if not all(isinstance(code, int) and not isinstance(code, bool) for code in receipt.get(name, [])):
                raise _damaged(path, f"not all of its {name} are whole numbers")
        if receipt.get("weights", "float32") not in STORAGES:
            raise _damaged(path, f"weights is {shortened(repr(receipt['weights']))}, expected {', '.join(STORAGES)}")
        if not isinstance(receipt.get("blended", 0), int) or receipt.get("blended", 0) < 0:
            raise _damaged(path, f"blended is {shortened(repr(receipt['blended']))}, expected a number of pixels")
        if receipt["task"] not in TASK_ENTRIES:
            raise InputError(f"{path}: a picture of the task {receipt['task']!r} cannot be drawn again.")
        config_of(SampleConfig, receipt["sampling"], f"{path}: its receipt is damaged: sampling")
        if "resampling" in receipt:
            config_of(ResampleConfig, receipt["resampling"], f"{path}: its receipt is damaged: resampling")
    return receipts


def _damaged(path: Path | str, what: str) -> InputError:
    return InputError(f"{path}: its receipt is damaged: {what}; draw the picture again.")


def check_kept(path: Path | str, receipts: list[dict[str, Any]], pipe: AnyPipeline) -> None:
    """Raises InputError if the codes that a completion or an edit kept are none that the bundle's pictures can have."""
    size, (rows, columns) = pipe.layout.vocabulary["image"].size, pipe.grid
    for receipt in (receipt for receipt in receipts if receipt["task"] == "edit"):
        codes, cells = receipt["codes"], receipt["redrawn"]
        if len(codes) != rows * columns or not cells or not all(0 <= cell < rows * columns for cell in cells):
            raise _damaged(
                path, f"it has {len(codes)} codes of which {len(cells)} were drawn, for {rows}×{columns} cells"
            )
        if not all(0 <= code < size for code in codes):
            raise _damaged(path, f"not all of its codes are in 0..{size - 1}")
    for receipt in (receipt for receipt in receipts if receipt["task"] == "complete"):
        kept = receipt["codes"][: max(receipt["rows"], 0) * columns]
        if not 0 <= receipt["rows"] <= rows or len(kept) != receipt["rows"] * columns:
            raise _damaged(path, f"it keeps {receipt['rows']} rows, the bundle's pictures have {rows}")
        if not all(0 <= code < size for code in kept):
            raise _damaged(path, f"not all of its codes are in 0..{size - 1}")


def _load(
    path: Path | str, receipts: list[dict[str, Any]], bundle: str | Path | None, text_encoder: str | Path | None
) -> AnyPipeline:
    receipt = receipts[0]
    if len({one["task"] == CLASS for one in receipts}) > 1:
        raise _damaged(path, "some of its pictures are of classes and some of captions")
    weights = receipt.get("weights", "float32")  # receipts of before there was a choice

    def load_face(name: str | Path) -> AnyPipeline:
        loaded = Bundle.load(name, weights=weights)
        if receipt["task"] == CLASS:
            return ClassPipeline(loaded)
        # what a picture's file names never starts a download
        return captions_face(loaded, text_encoder or receipt.get("text_encoder"), fetch=text_encoder is not None)

    if bundle is not None:
        return load_face(bundle)
    try:
        return load_face(receipt["bundle"])
    except InputError as error:
        raise InputError(
            f"{path} was drawn with the bundle {receipt['bundle']!r} of weights {receipt['weights_sha256']}: say by "
            f"--bundle where it is ({error})"
        ) from error


def check_text_encoder(path: Path | str, receipts: list[dict[str, Any]], pipe: FeaturePipeline) -> None:
    """Raises InputError for another text encoder than a receipt's, and for what is not drawn of a whole caption."""
    for receipt in receipts:
        if receipt["task"] != "generate":
            raise _damaged(path, f"{pipe.name} draws whole pictures of captions, and it says {receipt['task']!r}")
        wanted = receipt.get("text_encoder_sha256")
        if wanted is not None and wanted != pipe.text_encoder.sha256:
            raise InputError(
                f"{path} was drawn with a text encoder of sha256 {wanted}, {pipe.text_encoder.name} has "
                f"{pipe.text_encoder.sha256}; name the one it was drawn with by --text-encoder."
            )


def _is_upscaled(path: Path | str, receipts: list[dict[str, Any]], pipe: AnyPipeline) -> bool:
    """Whether they were made larger by the bundle's upsampler. Raises InputError for another one's."""
    [wanted, *others] = {receipt.get("upsampler_sha256") for receipt in receipts}
    if others:
        raise _damaged(path, "its pictures were made larger by different upsamplers")
    if wanted is not None and wanted != pipe.bundle.upsampler_sha256:
        has = "has none" if pipe.bundle.upsampler is None else f"has {pipe.bundle.upsampler_sha256}"
        raise InputError(
            f"{path} was made larger by an upsampler of sha256 {wanted}, the bundle {pipe.name} {has}; name the bundle "
            "it was drawn with by --bundle."
        )
    return wanted is not None


def _scale(path: Path | str, given: Image.Image, num_pictures: int, drawn_width: int) -> int:
    """How often every pixel was enlarged."""
    columns = grid_columns(num_pictures) if num_pictures > 1 else 1
    width = (given.width - (columns - 1) * GRID_GAP) // columns
    if width < drawn_width:
        raise InputError(
            f"{path} is {given.width} pixels wide, too few for {num_pictures} of {drawn_width}: it was made "
            "smaller after it was drawn."
        )
    return width // drawn_width


def _draw_codes(pipe: AnyPipeline, receipts: list[dict[str, Any]]) -> Int[Tensor, "N h w"]:
    """By the executor that each receipt names; those of before they did: by any that draws the same, if one does."""
    if all("executor" in receipt for receipt in receipts):
        return _drawn_by_named(pipe, receipts)
    codes = _drawn_by_named(pipe, receipts)
    for executor in executors_for(pipe.model):
        if code_difference(codes, receipts) is None:
            break
        other = _drawn_by_named(pipe, [{"executor": executor, **receipt} for receipt in receipts])
        codes = other if code_difference(other, receipts) is None else codes
    return codes


def _check_executor(path: Path | str, executor: Any) -> None:
    """Raises InputError if a receipt names what is unknown or missing here; None: it is of before they named one."""
    if executor is not None and (not isinstance(executor, str) or executor not in EXECUTORS):
        raise InputError(
            f"{path}: its receipt has executor {shortened(repr(executor))}; this version knows {', '.join(EXECUTORS)}."
        )
    if executor == "native" and load() is None:
        raise InputError(
            f"{path} was drawn by the native decoder, which is missing here: install a C++ compiler, and do not set "
            "SMALTI_NATIVE=0. The other decoders draw the same up to rounding, which is not what replay checks."
        )


def _drawn_by_named(pipe: AnyPipeline, receipts: list[dict[str, Any]]) -> Int[Tensor, "N h w"]:
    drawn = []
    for (config, executor, *more), alike in groupby(receipts, lambda one: _way_of(pipe, one)):
        requests = [receipt_request(pipe, receipt) for receipt in alike]
        if more and isinstance(pipe, Pipeline):
            drawn += [resampled(pipe, [request], config, more[0], executor)[0] for request in requests]
            continue
        found = generate(pipe.model, pipe.layout, requests, config, executor=executor)
        drawn += [one.spans["image"].view(pipe.grid) for one in found]
    return torch.stack(drawn)


def _way_of(pipe: AnyPipeline, receipt: dict[str, Any]) -> tuple:
    """What pictures that are drawn together have in common."""
    way = receipt_config(pipe, receipt), receipt.get("executor")
    return (*way, ResampleConfig(**receipt["resampling"])) if is_resampled(receipt) else way


def is_resampled(receipt: dict[str, Any]) -> bool:
    """Whether it is of an edit that was drawn given what is kept behind it."""
    return receipt["task"] == "edit" and "resampling" in receipt


def is_upscaled(receipt: dict[str, Any]) -> bool:
    """Whether an upsampler made the picture larger."""
    return receipt.get("upsampler_sha256") is not None


def unblended(
    pipe: AnyPipeline, given: Image.Image, drawn: Sequence[Image.Image], receipts: Sequence[dict[str, Any]]
) -> list[Image.Image]:
    """The drawn pictures, those of blended edits in their redrawn cells alone: their other pixels are, in part or all,
    of a picture that is not at hand, and are taken from the picture `given`, or from its place in that grid."""
    pictures, columns = [], grid_columns(len(drawn))
    for number, (picture, receipt) in enumerate(zip(drawn, receipts, strict=True)):
        if receipt["task"] == "edit" and "blended" in receipt:
            row, column = divmod(number, columns)
            left, top = column * (picture.width + GRID_GAP), row * (picture.height + GRID_GAP)
            theirs = given.convert("RGB").crop((left, top, left + picture.width, top + picture.height))
            cells = torch.zeros(pipe.grid, dtype=torch.bool)
            cells.view(-1)[receipt["redrawn"]] = True
            inside = Image.fromarray((pixel_distance(cells, pipe.pictures) == 0).numpy())
            theirs.paste(picture, mask=inside.resize(picture.size, Image.Resampling.NEAREST))
            picture = theirs
        pictures.append(picture)
    return pictures


def receipt_config(pipe: AnyPipeline, receipt: dict[str, Any]) -> SampleConfig:
    """How a picture was drawn; what an older receipt does not tell is the bundle's own."""
    settings = dict(receipt["sampling"])
    if "guidance_interval" in settings:  # JSON knows no tuples
        settings["guidance_interval"] = tuple(settings["guidance_interval"])
    return pipe.sample_config(SampleConfig() if receipt.get("prompt") is None else pipe.sampling.picture, settings)


def receipt_request(pipe: AnyPipeline, receipt: dict[str, Any]) -> Request:
    """What draws the picture of a receipt that was checked. Raises InputError or ValueError where it cannot be."""
    config, prompt, seed = receipt_config(pipe, receipt), receipt.get("prompt"), receipt["seed"]
    if isinstance(pipe, ClassPipeline):
        return pipe.class_request(pipe.classes.find(receipt["label"]), seed, config)
    if isinstance(pipe, FeaturePipeline):
        return pipe.prompt_request(prompt or "", seed, receipt.get("negative_prompt"), config)
    if receipt["task"] == "complete":
        kept = torch.tensor(receipt["codes"][: receipt["rows"] * pipe.grid[1]], dtype=torch.long)
        return pipe.complete_request(kept.view(-1, pipe.grid[1]), prompt, seed, config)
    negative_prompt = receipt.get("negative_prompt")
    if receipt["task"] == "edit":
        codes, redrawn = torch.tensor(receipt["codes"]).view(pipe.grid), torch.zeros(pipe.grid, dtype=torch.bool)
        redrawn.view(-1)[receipt["redrawn"]] = True
        return edit_request(pipe, codes, redrawn, prompt or "", seed, negative_prompt, config)
    return pipe.picture_request(pipe.whole(prompt or ""), seed, negative_prompt, config)


def code_difference(codes: Int[Tensor, "N h w"], receipts: list[dict[str, Any]]) -> str | None:
    """The first place where codes are not those of the receipts; None if there is none."""
    for number, (found, receipt) in enumerate(zip(codes, receipts, strict=True), 1):
        wanted, columns = receipt["codes"], found.shape[1]
        where = f"picture {number}, " if len(receipts) > 1 else ""
        if len(wanted) != found.numel():
            return f"{where}the receipt has {len(wanted)} codes, the bundle draws {found.numel()}"
        for i, (ours, theirs) in enumerate(zip(found.flatten().tolist(), wanted, strict=True)):
            if ours != theirs:
                return f"{where}row {i // columns}, column {i % columns} is code {ours}, the receipt says {theirs}"
    return None


def _pixel_difference(found: UInt8[np.ndarray, "H W ..."], given: UInt8[np.ndarray, "H W ..."]) -> str | None:
    if found.shape != given.shape:
        sizes = [" × ".join(map(str, pixels.shape[1::-1] + pixels.shape[2:])) for pixels in (found, given)]
        return f"the codes agree, but it is {sizes[0]}, the file {sizes[1]}: the file was changed after it was drawn"
    different = (found != given).any(-1)
    if not different.any():
        return None
    y, x = np.argwhere(different)[0].tolist()
    return (
        f"the codes agree, but {int(different.sum())} pixels differ, the first at column {x}, row {y}, which is "
        f"{tuple(found[y, x].tolist())}, in the file {tuple(given[y, x].tolist())}"
    )
