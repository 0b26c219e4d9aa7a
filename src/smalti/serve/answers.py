"""From a request to a job for the worker, and from what was drawn to the answer.

Letters: h w code grid, L codes of a picture.
"""

import base64
import binascii
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import MAX_SIDE, read_receipts, with_receipt
from smalti.inspect.choices import choice_at
from smalti.picture_files import load_picture
from smalti.sequences.request import Generated, Request
from smalti.serve.openai_api import (
    COUNT,
    MAX_PROMPT,
    ApiError,
    CaptionRequest,
    ChoiceRequest,
    ImageRequest,
    ScoreRequest,
    partial_marks,
    scale_of,
)
from smalti.serve.painter import encoded
from smalti.serve.worker import EngineRequest, Job, Worker
from smalti.tasks.classes import CLASS, ClassPipeline
from smalti.tasks.edit import check_cells, codes_of, edit_receipt, edit_request, kept_candidates, redrawn_cells
from smalti.tasks.face import PictureFace
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.images import Pipeline
from smalti.tasks.replay import (
    check_kept,
    check_text_encoder,
    checked_receipts,
    code_difference,
    is_resampled,
    is_upscaled,
    receipt_config,
    receipt_request,
    unblended,
)
from smalti.text_features import Features

MAX_OUTPUT_SIDE = 1024
"""Pictures are enlarged so far at most, unless the bundle's own scale goes further."""
MOST_REPLAYED = 16
ALTERNATIVES = 8
"""Codes that are shown of those that could have stood at a cell."""
UPLOAD = "the picture"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What an edit keeps and draws anew."""

    codes: Int[Tensor, "h w"]
    redrawn: Bool[Tensor, "h w"]


class CheckedRequest:
    """A request for pictures, checked: the job that draws them, and what its answers say of all of them."""

    def __init__(
        self,
        worker: Worker,
        body: ImageRequest,
        upload: Upload | None = None,
        features: "PromptFeatures | None" = None,
    ):
        self.worker, self.pipe, self.body, self.upload, self.features = worker, worker.pipe, body, upload, features
        pipe, pictures = self.pipe, self.pipe.pictures
        most = max(pictures.scale, MAX_OUTPUT_SIDE // max(pictures.width, pictures.height))
        self.scale = scale_of(body.size, pictures.width, pictures.height, pictures.scale, most)
        self.size = f"{pictures.width * self.scale}x{pictures.height * self.scale}"
        self.format = body.output_format or "png"
        self.n, self.best_of = body.n or 1, body.best_of or 1
        self.seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        self.config = sampled(pipe, pipe.sampling.picture, body.sampling())
        self._check()
        self.request = self._first_request()
        self.prefix = len(self.request.given.get("image", ()))
        self.kept = dict(self.request.kept.get("image", {}))

    def job(self) -> Job:
        requests = [replace(self.request, seed=self.seed + i) for i in range(self.n * self.best_of)]
        marks = []
        if self.body.stream:
            length, columns = self.pipe.bundle.image_length, self.pipe.grid[1]
            marks = partial_marks(self.body.num_partials, self.prefix, length, columns)
        drawings = [EngineRequest(request, self.config) for request in requests]
        return Job(drawings, self._answer, partial=self._partial, marks=marks)

    def _check(self) -> None:
        body = self.body
        if self.n * self.best_of > self.worker.limit:
            raise ApiError(
                400,
                f"n is {self.n} and best_of {self.best_of}: {self.n * self.best_of} pictures to draw, and this server "
                f"has room for {self.worker.limit}; ask for fewer.",
                param=COUNT,
            )
        if self.seed + self.n * self.best_of > 2**63:
            raise ApiError(400, "seed is too large for so many pictures: the last one's would pass 2^63.", param="seed")
        if body.partial_images is not None and not body.stream:
            raise ApiError(
                400, "partial_images goes with stream=true; add it, or leave it out.", param="partial_images"
            )
        if body.stream and self.n > 1:
            raise ApiError(
                400, f"n is {self.n}: a stream is of one picture; open one for each, seed by seed.", param=COUNT
            )
        if body.num_partials and self.best_of > 1:
            raise ApiError(
                400, "partial_images of several candidates are of none; leave best_of out.", param="partial_images"
            )
        if body.num_partials and not self.pipe.has_patches:
            raise ApiError(
                400,
                f"{self.worker.name} has no partial pictures: each of its codes stands for the whole picture.",
                param="partial_images",
            )

    def _first_request(self) -> Request:
        body, pipe = self.body, self.pipe
        if isinstance(pipe, ClassPipeline):
            for name in ("negative_prompt", "best_of"):
                if getattr(body, name) is not None:
                    message = f"{pipe.name} draws classes: guidance steers away from no class, and nothing ranks."
                    raise ApiError(400, f"{message} Leave {name} out.", param=name)
            return pipe.class_request(class_of(pipe, body.prompt), self.seed, self.config)
        if body.negative_prompt is not None and self.config.guidance_scale == 1:
            message = "negative_prompt steers by guidance, and guidance_scale is 1, which is none; raise it to 2."
            raise ApiError(400, message, param="negative_prompt")
        if isinstance(pipe, FeaturePipeline):
            if body.best_of is not None:
                raise ApiError(400, f"nothing ranks pictures of {pipe.name}. Leave best_of out.", param="best_of")
            assert self.features is not None
            return pipe.picture_request(self.features.prompt, self.seed, self.features.negative, self.config)
        check_prompt(pipe, body.prompt, "prompt")
        if body.negative_prompt is not None:
            check_prompt(pipe, body.negative_prompt, "negative_prompt")
        if self.upload is None:
            words = pipe.whole(body.prompt)
            return pipe.picture_request(words, self.seed, body.negative_prompt, self.config)
        codes, redrawn = self.upload.codes, self.upload.redrawn
        return edit_request(pipe, codes, redrawn, body.prompt, self.seed, body.negative_prompt, self.config)

    # On the thread that makes answers --------------------------------------------------------------------------

    def _partial(self, codes: list[int]) -> dict[str, Any]:
        painted = self.worker.painter.paint_partial(self.worker.name, codes, self.kept, self.scale, self.format)
        return {"b64_json": painted}

    def _answer(self, found: list[Generated]) -> dict[str, Any]:
        data = []
        for number, codes in self._kept(found):
            receipt = self._receipt(self.seed + number, codes)
            drawn = codes.flatten().tolist()
            painted = self.worker.painter.paint(self.worker.name, drawn, receipt, self.scale, self.format)
            data.append({"b64_json": painted, "smalti": receipt})
        self.worker.metrics.pictures.labels(self.worker.name).inc(len(data))
        text = sum(len(ids) for name, ids in self.request.given.items() if name != "image")
        text += 0 if self.request.features is None else len(self.request.features)
        output = self.pipe.bundle.image_length * len(found)
        usage = {
            "input_tokens": text + self.prefix,
            "output_tokens": output,
            "total_tokens": text + self.prefix + output,
            "input_tokens_details": {"text_tokens": text, "image_tokens": self.prefix},
        }
        shared = {"background": "opaque", "output_format": self.format, "size": self.size}
        return {"created": int(time.time()), "data": data, **shared, "usage": usage}

    def _kept(self, found: list[Generated]) -> list[tuple[int, Int[Tensor, "h w"]]]:
        pipe, numbers = self.pipe, range(len(found))
        if isinstance(pipe, Pipeline) and self.upload is not None:
            return kept_candidates(pipe, found, self.best_of)
        if isinstance(pipe, Pipeline) and self.best_of > 1:
            numbers = pipe.best(found, self.best_of, None, 64)
        return [(number, found[number].spans["image"].view(self.pipe.grid)) for number in numbers]

    def _receipt(self, seed: int, codes: Int[Tensor, "h w"]) -> dict[str, Any]:
        """As the library writes it, so that `smalti replay` draws the picture again."""
        settings = {"sampling": asdict(self.config), "executor": self.worker.executor}
        if isinstance(self.pipe, ClassPipeline):
            return self.pipe.class_receipt(class_of(self.pipe, self.body.prompt), seed, codes, **settings)
        settings |= {"negative_prompt": self.body.negative_prompt}
        prompt, best_of = self.body.prompt, self.best_of
        if isinstance(self.pipe, FeaturePipeline):
            settings |= self.pipe.encoder_receipt([prompt, self.body.negative_prompt or ""])
            return self.pipe.receipt(
                task="generate", prompt=prompt, seed=seed, codes=codes.flatten().tolist(), **settings
            )
        if self.upload is not None:
            return edit_receipt(self.pipe, prompt, self.upload.redrawn, seed, codes, best_of, **settings)
        if best_of > 1:
            settings |= {"best_of": best_of, "rerank": self.pipe.rerankers[0]}
        return self.pipe.receipt(task="generate", prompt=prompt, seed=seed, codes=codes.flatten().tolist(), **settings)


def class_of(pipe: ClassPipeline, prompt: str) -> int:
    """The class that a prompt names, or whose number it is. Raises ApiError."""
    try:
        return pipe.classes.find(prompt)
    except InputError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from error


def of_captions(worker: Worker) -> Pipeline:
    """The bundle of a worker. Raises ApiError for one of classes, of which this cannot be asked."""
    if not isinstance(worker.pipe, Pipeline):
        why = "draws pictures of classes and knows no captions"
        if isinstance(worker.pipe, FeaturePipeline):
            why = "reads captions as features of a text encoder, to draw of them"
        message = f"{worker.name} {why}: it takes /v1/images/generations and /v1/replay alone."
        raise ApiError(400, message, param="model")
    return worker.pipe


def sampled(pipe: PictureFace, default: SampleConfig, given: dict[str, Any]) -> SampleConfig:
    """The settings to draw with. Raises ApiError naming the one that cannot be."""
    try:
        return pipe.sample_config(default, given)
    except ValueError as error:  # it begins with the setting's name
        raise ApiError(400, str(error), param=str(error).split()[0], code="invalid_value") from error


def check_prompt(pipe: Pipeline, prompt: str, param: str) -> None:
    """Raises ApiError for a prompt that the bundle would cut: nothing of it is left out unsaid."""
    if len(prompt) > MAX_PROMPT:
        raise ApiError(400, f"{param} has {len(prompt)} letters, at most {MAX_PROMPT}.", param=param)
    most = pipe.layout[pipe.bundle.order("text", "image")].span("text").length
    try:
        num_tokens = len(pipe.text_tokenizer.encode(prompt))
    except InputError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
    if num_tokens > most:
        raise _too_long(pipe, param, num_tokens, most)


def _too_long(pipe: PictureFace, param: str, num_tokens: int, most: int) -> ApiError:
    message = f"{param} has {num_tokens} tokens; {pipe.name} takes {most}. Shorten it."
    return ApiError(400, message, param=param, code="string_above_max_length")


class PromptFeatures(NamedTuple):
    """What a model reads of a prompt, and of what guidance steers away from."""

    prompt: Features
    negative: Features | None


def features_job(pipe: FeaturePipeline, body: ImageRequest) -> Job:
    """A job that has the text encoder read the prompts, which may take a second; its answer are `PromptFeatures`."""

    def finish(_: list[Generated]) -> PromptFeatures:
        given = {"prompt": body.prompt, "negative_prompt": body.negative_prompt}
        for param, prompt in given.items():
            if prompt is not None and (num := pipe.num_tokens(prompt)) > pipe.reader.num_features:
                raise _too_long(pipe, param, num, pipe.reader.num_features)
        found = pipe.features([prompt for prompt in given.values() if prompt is not None])
        return PromptFeatures(found[0], None if body.negative_prompt is None else found[1])

    return Job([], finish)


def file_bytes(image: str) -> bytes:
    """The file in base64, or in a data URL. Raises ApiError."""
    text = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "image is no base64: give a picture file in base64, or a data URL of it.", param="image"
        ) from error


def read_upload(content: bytes, param: str) -> Image.Image:
    """The picture in a file's bytes. Raises ApiError."""
    try:
        return load_picture(content, max_side=MAX_SIDE)
    except InputError as error:
        raise ApiError(
            400, f"{param} cannot be read as a picture ({error}); give a whole file, such as a PNG.", param=param
        ) from error


def upload_job(worker: Worker, image: bytes, mask: bytes | None) -> Job:
    """A job that reads the picture and the mask of an edit; its answer is an `Upload`."""
    pipe = of_captions(worker)
    check_cells(pipe)

    def finish(_: list[Generated]) -> Upload:
        picture, param = read_upload(image, "image"), "mask" if mask is not None else "image"
        marked = picture if mask is None else read_upload(mask, "mask")
        if "A" not in marked.getbands() and "transparency" not in marked.info:
            raise ApiError(
                400,
                f"{param} has no transparent part: what is transparent in it is drawn anew. Give a mask, a PNG with an "
                "alpha channel as large as the picture.",
                param=param,
            )
        if marked.size != picture.size:
            sizes = [f"{one.width}×{one.height}" for one in (marked, picture)]
            raise ApiError(400, f"mask is {sizes[0]}, the picture {sizes[1]}; make them equal.", param="mask")
        redrawn = redrawn_cells(marked.convert("RGBA").getchannel("A"), pipe.grid)
        if not redrawn.any():
            raise ApiError(400, f"{param} has no transparent part: there is nothing to draw.", param=param)
        opaque = picture
        if picture.mode != "RGB":
            opaque = picture.convert("RGB")
            opaque.info = dict(picture.info)
        return Upload(codes=codes_of(pipe, opaque), redrawn=redrawn)

    return Job([], finish)


def codes_job(worker: Worker, image: bytes) -> Job:
    """A job that reads a picture; its answer are its codes."""
    pipe = of_captions(worker)
    return Job([], lambda _: codes_of(pipe, read_upload(image, "image")))


def caption_job(worker: Worker, body: CaptionRequest, codes: Int[Tensor, "h w"]) -> Job:
    pipe = of_captions(worker)
    given = {name: getattr(body, name) for name in ("temperature", "guidance_scale") if getattr(body, name) is not None}
    config = sampled(pipe, pipe.sampling.caption, given)
    request = pipe.caption_request(codes, body.seed or 0, config)
    return Job([EngineRequest(request, config)], lambda found: {"model": worker.name, "caption": pipe.text(found[0])})


def score_job(worker: Worker, body: ScoreRequest, image: bytes) -> Job:
    pipe = of_captions(worker)
    for caption in body.captions:
        check_prompt(pipe, caption, "captions")
    words = [pipe.whole(caption) for caption in body.captions]

    def finish(_: list[Generated]) -> dict[str, Any]:
        codes = codes_of(pipe, read_upload(image, "image"))
        scores = pipe.score_codes(codes.expand(len(words), *pipe.grid), words)
        columns = [[None] * len(words) if column is None else column.tolist() for column in scores]
        rows = zip(body.captions, *columns, strict=True)
        return {
            "model": worker.name,
            "scores": [dict(zip(("caption", *scores._fields), row, strict=True)) for row in rows],
        }

    return Job([], finish)


# Replay --------------------------------------------------------------------------------------------------------


def receipts_job(worker: Worker, image: bytes) -> Job:
    """A job that reads what a picture says of itself; its answer are the picture and its receipts."""

    def finish(_: list[Generated]) -> tuple[Image.Image, list[dict[str, Any]]]:
        picture = read_upload(image, "image")
        receipts = checked_receipts(UPLOAD, read_receipts(picture))
        return picture, receipts

    return Job([], finish)


def worker_of_receipts(workers: Sequence[Worker], receipts: list[dict[str, Any]]) -> Worker:
    """The bundle that drew it, known by its weights: the name in a receipt is not looked up anywhere."""
    for worker in workers:
        if all(receipt["weights_sha256"] == worker.pipe.weights_sha256 for receipt in receipts):
            return worker
    raise ApiError(
        400, "the picture was drawn with weights that this server does not have; it draws with "
        f"{', '.join(worker.name for worker in workers)}.", param="image",
    )  # fmt: skip


def requests_job(worker: Worker, receipts: list[dict[str, Any]]) -> Job:
    """A job whose answer are the requests that draw the pictures of receipts again: a text encoder may have to read
    their prompts."""
    pipe = worker.pipe

    def finish(_: list[Generated]) -> list[EngineRequest]:
        if isinstance(pipe, FeaturePipeline):
            check_text_encoder(UPLOAD, receipts, pipe)
        return [EngineRequest(receipt_request(pipe, receipt), receipt_config(pipe, receipt)) for receipt in receipts]

    if any((receipt["task"] == CLASS) != isinstance(pipe, ClassPipeline) for receipt in receipts):
        raise ApiError(400, f"its receipt is damaged: the task is none of {worker.name}'s.", param="image")
    check_kept(UPLOAD, receipts, pipe)
    if len(receipts) > MOST_REPLAYED:
        raise ApiError(
            400, f"the picture holds {len(receipts)}, at most {MOST_REPLAYED} are drawn again.", param="image"
        )
    for what, is_so in (("with resampling", is_resampled), ("and made larger", is_upscaled)):
        if any(map(is_so, receipts)):
            raise ApiError(400, f"the picture was drawn {what}, which smalti replay draws again.", param="image")
    return Job([], finish)


def replay_job(
    worker: Worker, picture: Image.Image, receipts: list[dict[str, Any]], drawings: list[EngineRequest]
) -> Job:
    """A job that draws the pictures of receipts again; its answer says whether they are the same."""
    pipe = worker.pipe

    def finish(found: list[Generated]) -> dict[str, Any]:
        codes = torch.stack([one.spans["image"].view(pipe.grid) for one in found])
        difference = code_difference(codes, receipts)
        scale = max(1, picture.width // pipe.pictures.width) if len(found) == 1 else pipe.pictures.scale
        drawn = pipe.decode(codes, scale=min(scale, MAX_SIDE // max(pipe.pictures.width, pipe.pictures.height)))
        if picture.size == drawn[0].size:
            drawn = unblended(pipe, picture, drawn, receipts)
        if difference is None and len(drawn) == 1:
            same = drawn[0].size == picture.size and np.array_equal(np.asarray(drawn[0]), np.asarray(picture))
            difference = None if same else "the codes agree, but pixels differ: the file was changed after it was drawn"
        data = [
            {
                "b64_json": encoded(with_receipt(one, {**receipt, "codes": row.flatten().tolist()}), "png"),
                "smalti": {**receipt, "codes": row.flatten().tolist()},
            }
            for one, receipt, row in zip(drawn, receipts, codes, strict=True)
        ]
        executors = {receipt.get("executor") for receipt in receipts}
        return {
            "model": worker.name,
            "identical": difference is None,
            "difference": difference,
            "executor": worker.executor,
            "same_executor": executors == {worker.executor},
            "data": data,
        }

    return Job(drawings, finish)


# What stood to choose ------------------------------------------------------------------------------------------


def choice_job(worker: Worker, body: ChoiceRequest) -> Job:
    """A job that tells what could have stood at a cell of a picture, and what the model looked at."""
    pipe, codes = of_captions(worker), body.codes
    check_cells(pipe)
    length, size = pipe.bundle.image_length, pipe.layout.vocabulary["image"].size
    if len(codes) != length or not all(0 <= code < size for code in codes):
        raise ApiError(400, f"codes are the {length} codes of a picture, each in 0..{size - 1}.", param="codes")
    if body.cell >= length:
        raise ApiError(400, f"cell is {body.cell}; a picture has the cells 0 to {length - 1}.", param="cell")
    check_prompt(pipe, body.prompt, "prompt")
    names = ("temperature", "guidance_scale", "top_k", "top_p")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    config = sampled(pipe, pipe.sampling.picture, given)
    words = pipe.whole(body.prompt)
    request = pipe.picture_request(words, 0, body.negative_prompt, config)
    return Job([], lambda _: _choice(pipe, request, codes, body.cell, config))


def _choice(pipe: Pipeline, request: Request, codes: list[int], cell: int, config: SampleConfig) -> dict[str, Any]:
    found = choice_at(pipe.model, pipe.layout, request, codes, cell, config)
    likeliest = found.probs.topk(min(ALTERNATIVES, len(found.probs))).indices.tolist()
    shown = [*likeliest, *([] if codes[cell] in likeliest else [codes[cell]])]
    patch = _patches(pipe, codes, cell)
    alternatives = [
        {
            "code": code,
            "probability": float(found.probs[code]),
            "model_probability": float(found.model_probs[code]),
            "drawn": code == codes[cell],
            "patch": patch(code),
        }
        for code in shown
        if found.probs[code] > 0 or code == codes[cell]
    ]
    weights = found.to_tokens.tolist()
    order = pipe.layout[request.order or ""]
    first = order.parts.index(order.span("text"))  # what stands before a caption are markers, a token each
    words = request.given["text"].tolist()
    return {
        "cell": cell,
        "alternatives": alternatives,
        "attention": {
            "cells": weights[found.given :],
            "words": [pipe.text_tokenizer.decode([word]) for word in words],
            "text": weights[first : first + len(words)],
        },
    }


def _patches(pipe: Pipeline, codes: list[int], cell: int) -> Callable[[int], str]:
    """How the picture looks at the cell, with a code in its place."""
    (rows, columns), pictures = pipe.grid, pipe.pictures
    height, width = pictures.height // rows * pictures.scale, pictures.width // columns * pictures.scale
    left, top = cell % columns * width, cell // columns * height

    def patch(code: int) -> str:
        changed = torch.tensor([*codes[:cell], code, *codes[cell + 1 :]]).view(1, rows, columns)
        [picture] = pipe.decode(changed)
        return encoded(picture.crop((left, top, left + width, top + height)), "png")

    return patch
