"""Captions to word numbers and back, through the `tokenizers` library; saved as its own JSON file.

The numbers count from 0; where they stand among all token ids is the layout's business. A word-level vocabulary is
closed: a word it does not hold is an error that names it, never an `<unk>` that would quietly change the prompt.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from smalti.errors import InputError
from smalti.files import new_file


class TextTokenizer:
    """A vocabulary of words. Build it with `from_words`, or read it with `load`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab()
        self._words = {number: word for word, number in self._vocabulary.items()}

    @classmethod
    def from_words(cls, words: Sequence[str], *, spellings: Mapping[str, str] = {}) -> Self:
        """Word i of `words` gets number i. Case and extra spaces in a caption do not matter; `spellings` gives other
        spellings of a word, `{"eigth": "eight"}`.

        Raises ValueError for a word that is repeated, empty, not lower case or has a space in it.
        """
        for i, word in enumerate(words):
            if not word or word != word.lower() or word.split() != [word]:
                raise ValueError(f"word {i} of the vocabulary is {word!r}; expected lower case without spaces.")
            if word in words[:i]:
                raise ValueError(f"the word {word!r} is in the vocabulary twice; give every word once.")
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        respell = [
            normalizers.Replace(Regex(rf"\b{re.escape(variant)}\b"), word) for variant, word in spellings.items()
        ]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *respell])
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a `text_tokenizer.json`. Raises InputError naming the file if it is missing or not one."""
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
            return cls(Tokenizer.from_str(content))
        except OSError as error:
            raise InputError(
                f"cannot read the text tokenizer {path}: {error.strerror}; save the bundle anew."
            ) from error
        except Exception as error:  # the library raises a bare Exception for any content it does not understand
            raise InputError(
                f"{path} is not a text tokenizer of the tokenizers library ({error}); save the bundle anew."
            ) from error

    def save(self, path: Path | str, *, force: bool = False) -> None:
        """Writes the `tokenizers` library's own JSON. Raises InputError if the file exists, unless `force`."""
        with new_file(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        return json.dumps(json.loads(self._tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def words(self) -> list[str]:
        """The vocabulary in the order of its numbers."""
        return [self._words[number] for number in sorted(self._words)]

    def encode(self, caption: str) -> list[int]:
        """The numbers of a caption's words. Raises InputError naming every word outside the vocabulary, with near
        ones."""
        self._check(caption)
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of word numbers. Raises ValueError for a number outside the vocabulary."""
        for position, number in enumerate(ids):
            if number not in self._words:
                raise ValueError(f"word {position} has number {number}; expected 0..{self.vocab_size - 1}.")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _check(self, caption: str) -> None:
        if not isinstance(self._tokenizer.model, models.WordLevel):
            return  # pieces of words spell any word
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(caption) if normalizer else caption
        found = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        unknown = [word for word in dict.fromkeys(found) if word not in self._vocabulary]
        if unknown:
            hints = "; ".join(self._near(word) for word in unknown)
            raise InputError(f"caption {caption!r} has words outside the vocabulary: {hints}.")

    def _near(self, word: str) -> str:
        near = difflib.get_close_matches(word, self.words, n=3)
        if near:
            return f"{word!r} (did you mean {' or '.join(near)}?)"
        some = self.words[:40]
        return f"{word!r} (known words: {' '.join(some)}{' …' if len(self.words) > len(some) else ''})"
