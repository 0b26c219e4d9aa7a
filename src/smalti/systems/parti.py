"""Parti: pictures from captions by a text encoder and a picture decoder, on pairs.py, which says what a run's folder
holds. The text tokenizer is SentencePiece's unigram."""

from pathlib import Path
from typing import Any

from smalti.bundle import find_bundle
from smalti.errors import InputError
from smalti.evaluate.reconstruction import find_image_tokenizer
from smalti.image_tokenizers import load_image_tokenizer
from smalti.recipes import PartiRecipe
from smalti.systems.pairs import Shape, train_on_pairs
from smalti.text_tokenizer import TextTokenizer, UnigramConfig


def train_parti(recipe: PartiRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, as `train_on_pairs` does; returns the bundle's folder."""
    if recipe.data.train is None or recipe.data.validation is None or recipe.image_tokenizer is None:
        raise InputError(
            "give data.train and data.validation, pictures with captions, and image_tokenizer, a folder or a bundle "
            "that has one."
        )
    folder = recipe.image_tokenizer
    image_tokenizer: Any = load_image_tokenizer(
        find_image_tokenizer(folder if folder.is_dir() else find_bundle(folder))
    ).eval()
    given = None if recipe.text_tokenizer is None else TextTokenizer.load(recipe.text_tokenizer)
    model = recipe.model.config(
        text_size=recipe.text_size if given is None else given.vocab_size,
        max_text=recipe.max_text,
        codebook_size=image_tokenizer.config.codebook_size,
        grid=image_tokenizer.config.grid,
    )
    if given is not None:
        given.check_vocabulary(model.layout.vocabulary)
    words = UnigramConfig(text_size=recipe.text_size)
    shape = Shape(
        layout=model.layout,
        model=model,
        learn_words=lambda captions: TextTokenizer.train_unigram(captions, words)[0],
        text_tokenizer=given,
    )
    return train_on_pairs(recipe, image_tokenizer, shape, command=command, show_progress=show_progress)
