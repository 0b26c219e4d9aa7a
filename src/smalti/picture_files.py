"""The one door to picture files: whatever reads a picture reads it here, upright.

Cameras store a picture as its sensor lies and note in EXIF how to turn it. Viewers do, so its caption is of the turned
picture.
"""

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from smalti.errors import InputError, first_line
from smalti.file_kinds import EMPTY, PICTURE, PIPE, is_pipe, kind_of, kind_of_bytes

_ORIENTATION = 0x0112


def load_picture(source: Path | str | bytes, *, max_side: int | None = None) -> Image.Image:
    """The whole picture in a file, or in a file's bytes, upright. Raises InputError saying what is wrong, without a
    name; FileNotFoundError and IsADirectoryError as they are."""
    if not isinstance(source, bytes) and is_pipe(source):
        raise InputError(f"it is {PIPE.what}: {PIPE.advice}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if max_side is not None and max(picture.size) > max_side:
                raise InputError(f"{picture.width}×{picture.height} pixels; at most {max_side} a side are read")
            picture.load()
            return upright(picture)
    except (InputError, FileNotFoundError, IsADirectoryError):
        raise
    except UnidentifiedImageError as error:  # its own words name a place in memory
        kind = kind_of_bytes(source[:512]) if isinstance(source, bytes) else kind_of(source)
        if kind is None or kind in (EMPTY, PICTURE):
            raise InputError("of no format that is known") from error
        raise InputError(f"it is {kind.what}{f': {kind.advice}' if kind.advice else ''}") from error
    except (Exception, MemoryError) as error:  # Pillow's readers raise of many kinds
        raise InputError(first_line(error)) from error


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says it is to be seen; itself, if that says nothing or cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of EXIF that it cannot read
            if picture.getexif().get(_ORIENTATION, 1) == 1:
                return picture
            return ImageOps.exif_transpose(picture)
    except Exception:  # a picture is no worse for its EXIF
        return picture
