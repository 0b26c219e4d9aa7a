"""Autoregressive image generation with discrete tokens.

    from smalti import Pipeline, save_picture
    [picture] = Pipeline.load("digits").generate("dark green eight on bright cyan", seed=3)
    save_picture(picture, "eight.png")

A name is imported when it is first used: importing the package loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smalti.bundle import Bundle as Bundle
    from smalti.engine.beam import beam_search as beam_search
    from smalti.engine.generate import best_of as best_of
    from smalti.engine.generate import generate as generate
    from smalti.engine.generate import stream as stream
    from smalti.engine.sampling import SampleConfig as SampleConfig
    from smalti.errors import InputError as InputError
    from smalti.image_files import read_receipt as read_receipt
    from smalti.image_files import save_picture as save_picture
    from smalti.likelihood import score as score
    from smalti.sequences.layout import Layout as Layout
    from smalti.sequences.request import Generated as Generated
    from smalti.sequences.request import Request as Request
    from smalti.sequences.vocabulary import Vocabulary as Vocabulary
    from smalti.tasks.classes import ClassPipeline as ClassPipeline
    from smalti.tasks.features import FeaturePipeline as FeaturePipeline
    from smalti.tasks.images import Pipeline as Pipeline
    from smalti.tasks.lines import CompleteConfig as CompleteConfig
    from smalti.tasks.lines import LineModel as LineModel
    from smalti.tasks.replay import replay as replay

_HOMES = {
    "bundle": "Bundle",
    "engine.beam": "beam_search",
    "engine.generate": "best_of generate stream",
    "engine.sampling": "SampleConfig",
    "errors": "InputError",
    "image_files": "read_receipt save_picture",
    "likelihood": "score",
    "sequences.layout": "Layout",
    "sequences.request": "Generated Request",
    "sequences.vocabulary": "Vocabulary",
    "tasks.classes": "ClassPipeline",
    "tasks.features": "FeaturePipeline",
    "tasks.images": "Pipeline",
    "tasks.lines": "CompleteConfig LineModel",
    "tasks.replay": "replay",
}
_HOME_OF = {name: f"smalti.{home}" for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
