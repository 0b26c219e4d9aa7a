"""Pictures from free captions in one vocabulary: a decoder-only transformer on pairs.py, which says what a run's folder
holds."""

from pathlib import Path
from typing import Any

from smalti.bundle import Bundle
from smalti.errors import InputError
from smalti.evaluate.reconstruction import find_image_tokenizer
from smalti.image_tokenizers import load_image_tokenizer
from smalti.recipes import CaptionsRecipe
from smalti.sequences.layout import Layout
from smalti.systems.pairs import Shape, train_on_pairs
from smalti.text_tokenizer import BPEConfig, TextTokenizer


def train_captions(recipe: CaptionsRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, as `train_on_pairs` does; returns the bundle's folder."""
    if recipe.data.train is None or recipe.data.validation is None or recipe.image_tokenizer is None:
        raise InputError("give data.train and data.validation, pictures with captions, and image_tokenizer, a folder.")
    image_tokenizer: Any = load_image_tokenizer(find_image_tokenizer(recipe.image_tokenizer)).eval()
    words = BPEConfig(
        image_size=image_tokenizer.config.codebook_size,
        text_size=recipe.text_size,
        specials=recipe.layout.specials,
        order=recipe.segments,
    )
    layout = Layout.parse(words.vocabulary, recipe.layout.orders)
    given = _given_words(recipe, layout)
    shape = Shape(
        layout=layout,
        model=recipe.model,
        learn_words=lambda captions: TextTokenizer.train(captions, words)[0],
        text_tokenizer=given,
        begin_with=recipe.begin_with,
    )
    return train_on_pairs(recipe, image_tokenizer, shape, command=command, show_progress=show_progress)


def _given_words(recipe: CaptionsRecipe, layout: Layout) -> TextTokenizer | None:
    """The recipe's text tokenizer, or that of the bundle that training begins with; None: one is to be learned."""
    if recipe.text_tokenizer is not None:
        given = TextTokenizer.load(recipe.text_tokenizer)
        given.check_vocabulary(layout.vocabulary)
        return given
    words = None if recipe.begin_with is None else Bundle.load(recipe.begin_with).text_tokenizer
    if not isinstance(words, TextTokenizer) or words.vocab_size != layout.vocabulary["text"].size:
        return None  # weights cannot be taken over either: train_on_pairs says so
    return words if words.vocabulary in (None, layout.vocabulary) else None
