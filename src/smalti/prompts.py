"""Prompts of a language model: its own tokenizer, and the form in which it was taught to be asked for a picture.

The form puts a prompt between the words that it was trained with, behind a token that begins every sequence and ahead
of the token at which the picture starts. The null condition is as long as the prompt: it begins and ends alike, and
between stands one token over and over. Every id of the tokenizer is text, special or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from smalti.errors import InputError, first_line, shortened
from smalti.files import new_file
from smalti.sequences.vocabulary import Vocabulary
from smalti.text_tokenizer import Cut, check_unicode, switch_off

PLACE = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How a prompt is put to a model. Raises ValueError if the template has no place for it, or several."""

    template: str
    """With `{prompt}` where the prompt stands."""
    begin: str
    """The token that begins every sequence."""
    start: str
    """The token behind the prompt, at which the picture starts."""
    filler: str | None
    """The token that stands for each of the prompt's where there is none; None: nothing does, and the null condition is
    the beginning alone."""

    def __post_init__(self) -> None:
        if self.template.count(PLACE) != 1:
            raise ValueError(f"the template {self.template!r} needs {PLACE} once, where the prompt stands.")


class PromptTokenizer:
    """Prompts to ids and back. `load` reads one. Raises ValueError if `content`, a file of the `tokenizers` library,
    lacks a token of the form."""

    def __init__(self, content: str, form: PromptForm):
        self.content, self.form = content, form
        self._tokenizer = Tokenizer.from_str(content)
        switch_off(self._tokenizer)
        self._begin, self.start_id = map(self._id_of, (form.begin, form.start))
        self._filler = None if form.filler is None else self._id_of(form.filler)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._markers = sorted({token.content for token in added if token.special} | {form.start})

    def _id_of(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"it has no token {token!r}, which every sequence of this model has")
        return found

    def __reduce__(self) -> tuple:
        return type(self), (self.content, self.form)

    @classmethod
    def load(cls, path: Path | str, form: PromptForm) -> Self:
        """Reads a `tokenizer.json`. Raises InputError naming the file if it is missing, none, or lacks a token of the
        form."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), form)
        except OSError as error:
            raise InputError(f"cannot read the text tokenizer {path}: {error.strerror}.") from error
        except Exception as error:  # the library raises a bare Exception for any content it does not understand
            raise InputError(
                f"{path} is no tokenizer.json of this model ({first_line(error)}); take the one published with it."
            ) from error

    def save(self, path: Path | str, *, force: bool = False) -> None:
        """Writes the file it was read from, as it was. Raises InputError if the file exists, unless `force`."""
        with new_file(path, force=force) as temporary:
            temporary.write_text(self.content, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises ValueError if a model's text has fewer ids; it may have more, to be a multiple of 64, say."""
        if self.vocab_size > vocabulary["text"].size:
            raise ValueError(
                f"the text tokenizer has {self.vocab_size} ids, the model's text {vocabulary['text'].size}: they do "
                "not belong together."
            )

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt in its form, up to the start of the picture. Raises InputError for a prompt that is
        empty, or spells a marker: the model would take it for one."""
        check_unicode(prompt)
        prompt = prompt.strip()
        if not prompt:
            raise InputError("the prompt is empty; say what to draw.")
        if marker := next((marker for marker in self._markers if marker in prompt), None):
            raise InputError(
                f"the prompt {shortened(prompt)!r} holds {marker}, which this model takes for a marker; leave it out."
            )
        text = self.form.template.replace(PLACE, prompt) + self.form.start
        # with the start, so that the text's last token is the one that stands before it
        *ids, start = self._tokenizer.encode(text, add_special_tokens=False).ids
        if start != self.start_id:
            raise InputError(f"the text tokenizer does not read {self.form.start} behind {shortened(prompt)!r} as one.")
        return [self._begin, *ids]

    def encode_within(self, prompt: str, max_length: int) -> Cut:
        """`encode`. Raises InputError for a prompt that is longer: cut, its form would lack its end."""
        numbers = self.encode(prompt)
        if len(numbers) > max_length:
            raise InputError(
                f"the prompt {shortened(prompt)!r} makes {len(numbers)} tokens in its form; this bundle takes "
                f"{max_length}. Make it shorter."
            )
        return Cut(numbers, False)

    def null_of(self, length: int) -> list[int]:
        """What stands for a prompt of so many ids where there is none."""
        return [self._begin] if self._filler is None else [self._begin, *[self._filler] * (length - 1)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, markers included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
