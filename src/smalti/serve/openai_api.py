"""What a request may say, as in OpenAI's Images API, and how it is told that it may not.

Every field that is not here is refused by its name: none is ignored. `null` means that a field is not given. Beside the
API's own there are those that drawing by a sampler needs, at the top level, where the `openai` client puts what stands
in its `extra_body`, or in an object of that name.
"""

import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smalti.errors import shortened

MAX_PROMPT = 4000
"""Letters of a prompt; of what a bundle takes in tokens, its layout decides."""
MAX_PICTURES = 10
MAX_CANDIDATES = 64
MAX_CAPTIONS = 64
MAX_USER = 512
MAX_BASE64 = 6 * 2**20

SIZE, COUNT = "size", "n"
REASONS = {
    "style": "describe the style in the prompt",
    "moderation": "there is none",
    "output_compression": "JPEG is written at quality 95, WebP and PNG without loss",
    "input_fidelity": "kept cells are kept code by code",
    "safety_identifier": "user is taken",
    "complexity": "a picture has a fixed number of tokens",
    "markup": "mark what is to be drawn by transparent parts of a mask",
    "svg": "pictures are of pixels",
    "frame_count": "pictures do not move",
    "frame_duration_ms": "pictures do not move",
}
"""Why parameters that the API has are refused."""


class ApiError(Exception):
    """An answer that is an error: the API's error object, with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        self.status, self.headers = status, headers or {}
        message = shortened(message, 2000).encode("utf-8", "backslashreplace").decode()
        param = None if param is None else shortened(param).encode("utf-8", "backslashreplace").decode()
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    deadline_s: float | None = Field(None, gt=0, le=86400)
    """Seconds after which nobody waits for the answer; at most what the server says."""


class Sampled(_Body):
    """What any drawing may be told. Where nothing is said the bundle's own settings hold."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float | None = None
    guidance_scale: float | None = None


class ImageRequest(Sampled):
    prompt: str = Field(max_length=MAX_PROMPT)
    n: int | None = Field(None, ge=1, le=MAX_PICTURES)
    size: str | None = Field(None, max_length=32)
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, max_length=MAX_USER)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=2**20)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CANDIDATES)

    @property
    def num_partials(self) -> int:
        return self.partial_images or 0

    def sampling(self) -> dict[str, Any]:
        """The fields of `SampleConfig` that are given."""
        names = ("temperature", "top_k", "top_p", "guidance_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class EditRequest(ImageRequest):
    """A form: its fields are text."""

    model_config = ConfigDict(extra="forbid", strict=False)


class CaptionRequest(Sampled):
    image: str = Field(max_length=MAX_BASE64)
    """A picture file in base64, or a data URL of it."""


class ScoreRequest(_Body):
    image: str = Field(max_length=MAX_BASE64)
    captions: list[str] = Field(min_length=1, max_length=MAX_CAPTIONS)


class ReplayRequest(_Body):
    image: str = Field(max_length=MAX_BASE64)


class ChoiceRequest(_Body):
    """What stood to choose at a cell of a picture."""

    prompt: str = Field(max_length=MAX_PROMPT)
    codes: list[int] = Field(max_length=2**16)
    cell: int = Field(ge=0)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    temperature: float | None = None
    guidance_scale: float | None = None
    top_k: int | None = None
    top_p: float | None = None


Body = TypeVar("Body", bound=_Body)


def parsed(kind: type[Body], values: dict[str, Any]) -> Body:
    """The body as one of the classes here. Raises ApiError that names the parameter."""
    values = _with_extra_body(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error.errors()[0], kind) from error


def _with_extra_body(values: dict[str, Any]) -> dict[str, Any]:
    extra = values.get("extra_body")
    if not isinstance(extra, dict):
        return values
    values = {name: value for name, value in values.items() if name != "extra_body"}
    for name in extra:
        if name in values:
            raise ApiError(400, f"{name!r} is given twice, at the top and in extra_body; give it once.", param=name)
    return values | extra


def _refusal(error: Any, kind: type[BaseModel]) -> ApiError:
    where = [str(part) for part in error["loc"]]
    name = ".".join(where) or None
    if error["type"] == "extra_forbidden":
        given = where[0]
        if given in REASONS:
            return ApiError(
                400,
                f"Unsupported parameter: {given!r}: {REASONS[given]}; leave it out.",
                param=given,
                code="unsupported_parameter",
            )
        known = ", ".join(kind.model_fields)
        return ApiError(400, f"Unknown parameter: {given!r}; known are {known}.", param=given, code="unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {name!r}.", param=name, code="missing_required_parameter")
    found = shortened(repr(error["input"]))
    message = f"Invalid value for {name!r}: {error['msg'][:1].lower()}{error['msg'][1:]}; found {found}."
    if name == "response_format" and error["input"] == "url":
        message = "Invalid value for 'response_format': this server keeps no files; ask for b64_json, the default."
    return ApiError(400, message, param=name, code="invalid_value")


def scale_of(size: str | None, width: int, height: int, default: int, most: int) -> int:
    """How often each pixel is enlarged for a size, "auto" or such as "224x224". Raises ApiError naming the sizes."""
    if size in (None, "auto"):
        return default
    sizes = {f"{width * scale}x{height * scale}": scale for scale in range(1, most + 1)}
    if size not in sizes:
        shown = ", ".join(list(sizes)[:4])
        raise ApiError(
            400,
            f"Invalid size {shortened(size)!r}: this model draws {width}x{height}, enlarged whole: auto, {shown} … to "
            f"{width * most}x{height * most}.",
            param=SIZE,
            code="invalid_size",
        )
    return sizes[size]


def partial_marks(num_partials: int, first: int, length: int, columns: int) -> list[int]:
    """After how many codes partial pictures are sent: evenly between the codes that are given and all, behind whole
    rows where there are fewer than rows. Of more than there are codes, one a code."""
    if num_partials >= length - first:
        return list(range(first + 1, length))
    step = columns if num_partials < (length - first) // columns else 1
    points = (first + (length - first) * i / (num_partials + 1) for i in range(1, num_partials + 1))
    return sorted({mark for point in points if first < (mark := math.floor(point / step + 0.5) * step) < length})
