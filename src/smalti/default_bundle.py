"""Which of the bundles that ship a command uses when none is named. Imports as little as the command line does."""

from pathlib import Path
from typing import NamedTuple

from smalti.errors import shortened

DEFAULT_BUNDLE = "digits"
ANY_WORDS_BUNDLE = "emoji"
"""Takes any prompt."""
SCENES_BUNDLE = "scenes"
"""Takes captions of its grammar."""
CLASSES_BUNDLE = "mnist-classes"
SHIPPED = ", ".join(sorted(path.parent.name for path in (Path(__file__).parent / "bundles").glob("*/config.json")))
"""The names of the bundles that ship, for help."""


class Choice(NamedTuple):
    name: str
    why: str


def bundle_for_prompt(*prompts: str) -> Choice:
    """`digits` if every word is one of its vocabulary, and there is one; `scenes` for captions of its grammar; else
    `emoji`. Raises InputError for text that is not Unicode."""
    from smalti.bundle import TEXT_TOKENIZER, find_bundle
    from smalti.data.scenes import is_caption
    from smalti.text_tokenizer import TextTokenizer

    words = TextTokenizer.load(find_bundle(DEFAULT_BUNDLE) / TEXT_TOKENIZER)
    unknown = [word for prompt in prompts for word in words.unknown_words(prompt)]
    if unknown and all(is_caption(prompt) for prompt in prompts if prompt.split()):
        return Choice(SCENES_BUNDLE, "a scene of shapes")
    if unknown:
        return Choice(ANY_WORDS_BUNDLE, f"{shortened(unknown[0], 40)!r} is no word of {DEFAULT_BUNDLE}")
    if not any(prompt.split() for prompt in prompts):
        return Choice(ANY_WORDS_BUNDLE, "an empty prompt")
    return Choice(DEFAULT_BUNDLE, "it knows every word")


def bundle_for_picture(path: Path | str) -> Choice:
    """`emoji` if the picture is of its size or that enlarged whole, and not so of `digits`; `scenes`, whose size is the
    same, if its receipt says that it drew it; else `digits`."""
    from PIL import Image

    from smalti.bundle import find_bundle, read_config

    try:
        with Image.open(path) as picture:
            size = picture.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return Choice(DEFAULT_BUNDLE, "")  # who reads it says what is wrong with it
    for name in (DEFAULT_BUNDLE, ANY_WORDS_BUNDLE):
        pictures = read_config(find_bundle(name))["pictures"]
        (columns, too_wide), (rows, too_high) = divmod(size[0], pictures["width"]), divmod(size[1], pictures["height"])
        if not (too_wide or too_high) and columns == rows > 0:
            if name == ANY_WORDS_BUNDLE and _drawn_by(path) == SCENES_BUNDLE:
                return Choice(SCENES_BUNDLE, "it drew the picture")
            return Choice(name, f"the picture is {size[0]}×{size[1]}")
    return Choice(DEFAULT_BUNDLE, "")


def _drawn_by(path: Path | str) -> object:
    """The bundle that a picture's receipt names; None if there is none."""
    from smalti.errors import InputError
    from smalti.image_files import read_receipt

    try:
        return read_receipt(path).get("bundle")
    except InputError:
        return None
