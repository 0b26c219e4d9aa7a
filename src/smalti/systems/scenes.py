"""Scenes of a grammar from top to bottom: pictures and captions, image tokenizer, and on both the system `captions` or
`parti`.

The folder of a run holds what systems/pairs.py names, and

    data/                       pictures and captions: train, validation and test as parquet
    image_tokenizer_training/   the image tokenizer's training
"""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from smalti.data.pairs import PairTable
from smalti.data.scene_tables import ScenesConfig, write_scenes
from smalti.image_tokenizers import load_image_tokenizer
from smalti.recipes import (
    CaptionsRecipe,
    ImageTokenizer,
    PartiRecipe,
    PartiScenesRecipe,
    ScenesRecipe,
    claim_folder,
)
from smalti.recipes.schema import CaptionedPictures
from smalti.systems.captions import train_captions
from smalti.systems.parti import train_parti
from smalti.systems.stages import stored_image_tokenizer, team
from smalti.training.estimate import Estimate, Length
from smalti.training.image_tokenizer import train_tokenizer

_SCALE = 4
"""Drawn pictures are enlarged this many times."""


class _Sources(BaseModel):
    """What decides pictures and image tokenizer; the system on them guards the rest."""

    data: ScenesConfig
    tokenizer_pictures: int
    image_tokenizer: ImageTokenizer


def train_scenes(recipe: ScenesRecipe | PartiScenesRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes pictures and image tokenizer, all of them train the transformer. Raises
    InputError if the folder holds a run of another recipe, or as the stages do.
    """
    output, tokenizer = recipe.output, recipe.image_tokenizer
    paths = {split: output / "data" / f"{split}.parquet" for split in ("train", "validation")}
    of_tokenizer = Length("image_tokenizer.train.num_steps", tokenizer.train.num_steps)
    estimate = Estimate(recipe.minutes, {"image tokenizer": of_tokenizer, "transformer": recipe.train.length})

    def make_image_tokenizer() -> Any:
        if tokenizer.path is not None:
            return load_image_tokenizer(tokenizer.path)
        train, validation = (_pictures(path, recipe.tokenizer_pictures) for path in paths.values())
        folder = output / "image_tokenizer_training"
        shown: Any = {"show_progress": show_progress, "estimate": estimate}
        return train_tokenizer(train, validation, tokenizer.model, tokenizer.train, folder, **shown)

    with team(output) as processes:
        if processes.is_first:
            sources = {name: getattr(recipe, name) for name in _Sources.model_fields}
            claim_folder(_Sources(**sources), output / "data", free=())
            write_scenes(output / "data", recipe.data, show_progress=show_progress)
            stored_image_tokenizer(output / "image_tokenizer", make_image_tokenizer)
        processes.wait()
    how: Any = {"command": command, "show_progress": show_progress}
    common = {
        **{name: getattr(recipe, name) for name in ("description", "expects", "minutes", "text_size", "train")},
        **{name: getattr(recipe, name) for name in ("watch", "sample", "about", "output", "model")},
        "data": CaptionedPictures(train=paths["train"], validation=paths["validation"], scale=_SCALE),
        "image_tokenizer": output / "image_tokenizer",
        "prompts": recipe.evaluate,
    }
    if isinstance(recipe, PartiScenesRecipe):
        return train_parti(PartiRecipe(system="parti", max_text=recipe.max_text, **common), **how)
    own = {name: getattr(recipe, name) for name in ("segments", "layout", "begin_with")}
    return train_captions(CaptionsRecipe(system="captions", **own, **common), **how)


def _pictures(table: Path, most: int) -> np.ndarray:
    return np.stack([pair.picture for pair in islice(PairTable(table), most)])
