"""Pictures of codes, as files, in a process of their own.

An image tokenizer and an engine are both long rows of small steps in Python, of which one process does one at a time:
in two threads they wait for each other at every step, and draw fewer pictures together than one after the other.
"""

import base64
import contextlib
import io
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from smalti.bundle import Bundle
from smalti.image_files import PictureConfig, receipt_chunks, with_receipt
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.tasks.codes import PictureDecoder, decode, grid_of, partial_picture

_log = logging.getLogger(__name__)


class Painter:
    """Makes picture files of the codes of some bundles, each known by its name.

    `apart`: in a process of its own, where none of the bundles is on a GPU. If that process dies, another one takes
    its place. Close it.
    """

    def __init__(self, bundles: Mapping[str, Bundle], *, apart: bool):
        self._bundles = bundles
        self._lock = threading.Lock()  # bundles' threads take turns at the process
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        if apart and all(bundle.device.type == "cpu" for bundle in bundles.values()):
            self._start()

    def close(self) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()  # which ends the process
            self._process.join()

    def paint(self, name: str, codes: Sequence[int], receipt: dict[str, Any], scale: int, output_format: str) -> str:
        """A picture file in base64; a PNG has the receipt in it."""
        return self._call(_painted, name, codes, receipt, scale, output_format)

    def paint_partial(
        self, name: str, codes: Sequence[int], kept: Mapping[int, int], scale: int, output_format: str
    ) -> str:
        """The same of a picture's first codes and those kept behind them."""
        return self._call(_painted_partial, name, list(codes), dict(kept), scale, output_format)

    def _call(self, make: Callable[..., str], name: str, *given: Any) -> str:
        if self._connection is None:
            return make(self._bundles[name], *given)
        with self._lock:
            try:
                found = self._ask(make, name, *given)
            except (EOFError, OSError):
                _log.warning("the process that makes pictures ended; another one takes its place")
                self._start()
                found = self._ask(make, name, *given)
        if isinstance(found, Exception):
            raise found
        return found

    def _ask(self, *asked: Any) -> Any:
        assert self._connection is not None
        self._connection.send(asked)
        return self._connection.recv()

    def _start(self) -> None:
        """A process that has read the image tokenizers."""
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may wait for ever
        self._connection, other = context.Pipe()
        with TemporaryDirectory(prefix="smalti-") as folder:
            given = {}
            for number, (name, bundle) in enumerate(self._bundles.items()):
                path = Path(folder) / str(number)
                save_image_tokenizer(bundle.image_tokenizer, path)
                given[name] = path, bundle.pictures
            arguments = other, given, torch.get_num_threads()
            self._process = context.Process(target=_run, args=arguments, daemon=True)
            self._process.start()
            other.close()
            self._connection.recv()


def encoded(picture: Image.Image, output_format: str) -> str:
    """A picture file in base64; a PNG has the receipt in it."""
    file, options = io.BytesIO(), {
        "png": {"pnginfo": receipt_chunks(picture), "compress_level": 6},
        "jpeg": {"quality": 95, "subsampling": 0},
        "webp": {"lossless": True},
    }  # fmt: skip
    picture.save(file, format=output_format.upper(), **options[output_format])
    return base64.b64encode(file.getvalue()).decode()


def _painted(
    decoder: Bundle | PictureDecoder, codes: Sequence[int], receipt: dict[str, Any], scale: int, output_format: str
) -> str:
    [picture] = decode(decoder, torch.tensor(codes).view(1, *grid_of(decoder)), scale=scale)
    return encoded(with_receipt(picture, receipt), output_format)


def _painted_partial(
    decoder: Bundle | PictureDecoder, codes: list[int], kept: Mapping[int, int], scale: int, output_format: str
) -> str:
    return encoded(partial_picture(decoder, codes, scale, kept=kept), output_format)


def _run(connection: Connection, given: Mapping[str, tuple[Path, PictureConfig]], num_threads: int) -> None:
    """The process: answers what it is asked until nobody is at the other end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends it, behind its last answer
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # what waits for it is nobody's next token
    torch.set_num_threads(num_threads)
    decoders = {name: PictureDecoder(load_image_tokenizer(path), pictures) for name, (path, pictures) in given.items()}
    connection.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            make, name, *asked = connection.recv()
            try:
                found = make(decoders[name], *asked)
            except Exception as error:
                found = error
            connection.send(found)
