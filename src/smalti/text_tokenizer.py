"""Captions to numbers and back, through the `tokenizers` library; saved as its own JSON file.

The numbers count from 0; where they stand among all token ids is the layout's business. A word-level vocabulary is
closed: a word it does not hold is an error that names it, never an `<unk>` that would quietly change the prompt.
Byte-level pieces of words (BPE) spell any text. Their file holds the whole vocabulary of a system, picture codes and
markers too, each as one token, so that other programs read and write its sequences as text. SentencePiece's pieces
(unigram) hold text alone; what no piece spells is spelled by its bytes.
"""

import difflib
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import tokenizers
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smalti.bounds import MAX_VOCABULARY
from smalti.errors import InputError, InputWarning, first_line, shortened
from smalti.file_kinds import kind_of
from smalti.files import new_file
from smalti.sequences.vocabulary import SPECIAL, Vocabulary

START_OF_IMAGE, END_OF_IMAGE = "<|startofimage|>", "<|endofimage|>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
SPECIALS = (
    START_OF_IMAGE,
    END_OF_IMAGE,
    START_OF_TEXT,
    END_OF_TEXT,
    "<|pad|>",
    *(f"<|reserved:{i}|>" for i in range(4)),
)
SEGMENTS = ("image", SPECIAL, "text")
NUM_BYTES = 256
UNKNOWN = "<unk>"
LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))
"""Those that every vocabulary of unigram pieces spells."""
TWIN = "\ue000"
"""No caption's letter, from Unicode's private ones."""
UNLIKELY = 1000
"""How many times less likely than any other a piece is that no caption is to have, on the logarithmic scale."""
MAX_HINTS = 6
"""Unknown words that an error names with words near to them."""
_IMAGE_TOKEN = re.compile(r"<\|image:(\d+)\|>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def image_token(code: int) -> str:
    """How a picture code is written in a line of text."""
    return f"<|image:{code}|>"


@dataclass(frozen=True, kw_only=True)
class BPEConfig:
    """Sizes of a system's whole vocabulary; by default 4,096 + 9 + 25,895 = 30,000. Raises ValueError where they
    cannot be."""

    image_size: int = 4096
    text_size: int = 25_895
    """Pieces of words, the 256 bytes among them."""
    specials: tuple[str, ...] = SPECIALS
    order: tuple[str, ...] = SEGMENTS
    """Which ids come first."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; expected the number of picture codes, at least 1.")
        if self.text_size < NUM_BYTES:
            raise ValueError(f"text_size is {self.text_size}; it holds the {NUM_BYTES} bytes at least.")
        for name in ("image_size", "text_size"):
            if getattr(self, name) > MAX_VOCABULARY:
                raise ValueError(f"{name} is {getattr(self, name)}; at most {MAX_VOCABULARY} is possible.")
        if sorted(self.order) != sorted(SEGMENTS):
            raise ValueError(f"order is {', '.join(self.order)}; expected {', '.join(SEGMENTS)} in any order.")
        for special in self.specials:
            if not re.fullmatch(r"<[^<>\s]+>", special) or _IMAGE_TOKEN.fullmatch(special):
                raise ValueError(f"the special {special!r} is not a name in angle brackets, such as {END_OF_IMAGE}.")
        self.vocabulary  # noqa: B018 (checks the specials)

    @property
    def vocabulary(self) -> Vocabulary:
        sizes = {"image": self.image_size, SPECIAL: self.specials, "text": self.text_size}
        return Vocabulary({name: sizes[name] for name in self.order})


@dataclass(frozen=True, kw_only=True)
class UnigramConfig:
    """Size of a vocabulary of pieces; by default Parti's. Raises ValueError where it cannot be."""

    text_size: int = 16_000
    """Pieces of words; among them the 256 bytes, the one for what is unknown, and the letters of ASCII."""

    def __post_init__(self) -> None:
        least = NUM_BYTES + 1 + len(LETTERS) + 1
        if self.text_size < least:
            raise ValueError(
                f"text_size is {self.text_size}; it holds the {NUM_BYTES} bytes, {len(LETTERS)} letters and a piece "
                f"for what is unknown, so it is at least {least}."
            )
        if self.text_size > MAX_VOCABULARY:
            raise ValueError(f"text_size is {self.text_size}; at most {MAX_VOCABULARY} is possible.")


class Cut(NamedTuple):
    """A caption's numbers, and whether it was longer."""

    numbers: list[int]
    was_cut: bool


class TextTokenizer:
    """A vocabulary of words, or of pieces of words. Build it with `from_words` or `train`, or read it with `load`.

    Raises ValueError if the ids of the text are not contiguous in `tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer):
        # A marker typed into a caption is text. Only `parse` reads it as the marker.
        tokenizer.encode_special_tokens = True
        switch_off(tokenizer)
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()  # others than special ones are words of the text
        self._controls = {token.content: number for number, token in added if token.special}
        ids = {word: i for word, i in tokenizer.get_vocab(with_added_tokens=True).items() if word not in self._controls}
        self._offset = min(ids.values(), default=0)
        self._vocabulary = {word: i - self._offset for word, i in ids.items()}
        self._words = {number: word for word, number in self._vocabulary.items()}
        if self._words and max(self._words) >= len(self._words):
            raise ValueError("the ids of the text are not contiguous: other tokens lie among them.")

    def __reduce__(self) -> tuple:
        return _from_json, (type(self), self._tokenizer.to_str())  # for other processes: pickle forgets a setting

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
    def train(cls, captions: Sequence[str], config: BPEConfig = BPEConfig()) -> tuple[Self, int]:
        """Byte-level BPE (arXiv:1508.07909, on bytes) of captions, and how many of its `text_size` numbers are unused.

        Some are, where the captions hold so few words that each is one piece already. The sizes stay as asked;
        nothing is ever encoded to an unused number. The same captions give the same file. Raises InputError if all
        captions are empty.
        """
        if not any(captions):
            raise InputError("there are no captions to train a text tokenizer on: all of them are empty.")
        found = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=config.text_size,
            min_frequency=0,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        found.train_from_iterator(captions, trainer, length=len(captions))
        model = json.loads(found.to_str())["model"]
        pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
        num_unused = config.text_size - len(pieces)
        pieces += [f"<|unused:{i}|>" for i in range(num_unused)]
        merges = [(first, second) for first, second in model["merges"]]
        return cls(_whole_vocabulary(config, pieces, merges)), num_unused

    @classmethod
    def train_unigram(
        cls,
        captions: Sequence[str],
        config: UnigramConfig = UnigramConfig(),
    ) -> tuple[Self, int]:
        """SentencePiece's unigram pieces (arXiv:1808.06226) of captions, and how many of its `text_size` numbers are
        unused, as in `train`. Spaces are part of the pieces; a character that is in no piece is spelled by its bytes.

        The pieces of the same captions are the same, in alphabetical order; their scores may differ in the fifth digit,
        since the library adds in any order. Raises InputError if all captions are empty.
        """
        if not any(captions):
            raise InputError("there are no captions to train a text tokenizer on: all of them are empty.")
        found = _unigram(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=config.text_size - NUM_BYTES,
            unk_token=UNKNOWN,
            special_tokens=[UNKNOWN],
            initial_alphabet=list(LETTERS),
            show_progress=False,
        )
        # The library proposes what stands in two different words, whatever their counts: a word that stands within no
        # other would be spelled in pieces. So each that occurs twice is there once more, with a letter behind it.
        counts = Counter(word for caption in captions for word in caption.split(" ") if word)
        found.train_from_iterator([*captions, *(word + TWIN for word in counts if counts[word] > 1)], trainer)
        learned = json.loads(found.to_str())["model"]["vocab"]
        scores = {piece: score for piece, score in learned if piece != UNKNOWN and TWIN not in piece}
        lowest = min(scores.values())
        scores |= {letter: lowest for letter in LETTERS if letter not in scores}
        # Typed into a caption, the names of bytes are text: letters spell them, since these score far less.
        never = UNLIKELY * lowest
        pieces = [(UNKNOWN, never), *((byte_piece(byte), never) for byte in range(NUM_BYTES)), *sorted(scores.items())]
        num_unused = config.text_size - len(pieces)
        pieces += [(f"<unused {i}>", never) for i in range(num_unused)]  # no text has a space that is not U+2581
        return cls(_unigram(models.Unigram(pieces, unk_id=0, byte_fallback=True))), num_unused

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a `text_tokenizer.json`, also of another project. Settings that would change captions unasked
        (truncation, padding, dropout, templates) are switched off, and a warning names them. Raises InputError naming
        the file if it is missing or not one."""
        path = Path(path)
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
            if found := switch_off(tokenizer):
                warnings.warn(f"{path}: not applied: {', '.join(found)}.", InputWarning, stacklevel=2)
            text_tokenizer = cls(tokenizer)
            text_tokenizer.vocabulary  # noqa: B018 (checks the order of the picture codes)
            return text_tokenizer
        except OSError as error:
            raise InputError(
                f"cannot read the text tokenizer {path}: {error.strerror}; save the bundle anew."
            ) from error
        except Exception as error:  # the library raises a bare Exception for any content it does not understand
            reason = f"{first_line(error)}); {_what_instead(path)}."
            raise InputError(f"{path} is not a text tokenizer of the tokenizers library ({reason}") from error

    def save(self, path: Path | str, *, force: bool = False) -> None:
        """Writes the `tokenizers` library's own JSON. Raises InputError if the file exists, unless `force`."""
        with new_file(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        return json.dumps(json.loads(self._tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The segments of the whole vocabulary; None if the tokenizer holds text alone.

        Raises ValueError if picture codes, markers and text do not each lie together, the codes in their order.
        """
        if not self._controls:
            return None
        kinds = {number: _kind(content) for content, number in self._controls.items()}
        kinds |= dict.fromkeys(range(self._offset, self._offset + self.vocab_size), "text")
        runs = [kinds[number] for number in sorted(kinds) if kinds.get(number - 1) != kinds[number]]
        if len(set(runs)) < len(runs) or sorted(kinds) != list(range(len(kinds))):
            raise ValueError(f"the ids of its segments do not lie together: {', '.join(runs)}.")
        named = sorted(self._controls, key=self._controls.__getitem__)
        codes = [int(match[1]) for name in named if (match := _IMAGE_TOKEN.fullmatch(name))]
        if codes != list(range(len(codes))):
            raise ValueError("its picture codes are not numbered 0, 1, 2 and so on in the order of their ids.")
        specials = [name for name in named if not _IMAGE_TOKEN.fullmatch(name)]
        sizes = {"image": len(codes), SPECIAL: specials, "text": self.vocab_size}
        return Vocabulary({kind: sizes[kind] for kind in runs})

    @property
    def words(self) -> list[str]:
        """The vocabulary in the order of its numbers."""
        return [self._words[number] for number in sorted(self._words)]

    def encode(self, caption: str) -> list[int]:
        """The numbers of a caption's words. Raises InputError naming every word outside the vocabulary, with near
        ones."""
        return self._numbers(self._encoded(caption), caption)

    def encode_within(self, caption: str, max_length: int) -> Cut:
        """The numbers of a caption, or of as much of its beginning as `max_length` numbers hold. No character is cut
        into pieces."""
        encoding = self._encoded(caption)
        numbers = self._numbers(encoding, caption)
        if len(numbers) <= max_length:
            return Cut(numbers, False)
        length = max_length
        while length and self._is_within_character(encoding, numbers, length):
            length -= 1
        return Cut(numbers[:length], True)

    def _is_within_character(self, encoding: Encoding, numbers: list[int], position: int) -> bool:
        """Whether the piece at a position and the one before it are bytes of one character."""
        if encoding.offsets[position][0] >= encoding.offsets[position - 1][1]:
            return False
        byte = _BYTE_PIECE.fullmatch(self._words[numbers[position]])
        # bytes that spell what no piece does have the place of the whole run of it: they tell themselves
        return byte is None or 0x80 <= int(byte[1], 16) < 0xC0

    def _encoded(self, caption: str) -> Encoding:
        """Raises InputError for a caption with words or characters outside the vocabulary."""
        check_unicode(caption)
        encoding = None
        try:
            encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        except Exception as error:  # without an unknown token, some models raise
            if not self.unknown_words(caption):
                raise InputError(f"caption {shortened(caption)!r} cannot be encoded ({first_line(error)}).") from error
        self._check(caption, encoding)
        assert encoding is not None
        return encoding

    def _numbers(self, encoding: Encoding, caption: str) -> list[int]:
        numbers = [i - self._offset for i in encoding.ids]
        if outside := [number for number in numbers if number not in self._words]:
            token = self._tokenizer.id_to_token(outside[0] + self._offset)
            raise InputError(
                f"caption {shortened(caption)!r} is encoded to {token!r}, which is none of the text's tokens; the text "
                f"tokenizer's ids of text are {self._offset} to {self._offset + self.vocab_size - 1}."
            )
        return numbers

    def null_of(self, length: int) -> list[int]:
        """What stands for a caption of so many words where there is none: nothing."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of text ids. Raises ValueError for an id outside the vocabulary."""
        for position, number in enumerate(ids):
            if number not in self._words:
                raise ValueError(f"word {position} has number {number}; expected 0..{self.vocab_size - 1}.")
        return self._tokenizer.decode([number + self._offset for number in ids], skip_special_tokens=False)

    def parse(self, line: str) -> list[int]:
        """Ids in the whole vocabulary of a line such as `a river<|startofimage|><|image:7|><|endofimage|>`.

        Here, and nowhere else, what is typed as a marker or picture code is one. Raises ValueError if the tokenizer
        holds text alone, InputError for text that is not Unicode.
        """
        tokenizer = self._with_controls
        check_unicode(line)
        return tokenizer.encode(line, add_special_tokens=False).ids

    @cached_property
    def _with_controls(self) -> Tokenizer:
        if not self._controls:
            raise ValueError("this text tokenizer holds words alone, no picture codes or markers.")
        return Tokenizer.from_str(self._tokenizer.to_str())

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises ValueError, printing both, if the tokenizer's segments are not those of a model."""
        if self.vocabulary is not None and self.vocabulary != vocabulary:
            raise ValueError(
                f"the text tokenizer's segments are {self.vocabulary!r} with the specials "
                f"{' '.join(self.vocabulary.specials)}, the model's {vocabulary!r} with "
                f"{' '.join(vocabulary.specials)}; use the tokenizer the model was trained with."
            )

    def unknown_words(self, caption: str) -> list[str]:
        """The words of a caption that are not in the vocabulary, each once; where words are made of pieces, the parts
        that no piece spells. Raises InputError for text that is not Unicode.
        """
        check_unicode(caption)
        if not self._can_miss:
            return []  # bytes spell any word
        if not isinstance(self._tokenizer.model, models.WordLevel):
            try:
                return self._unspelled(caption, self._tokenizer.encode(caption, add_special_tokens=False))
            except Exception:  # of a word by itself it can be told whether it is known
                return [word for word in dict.fromkeys(caption.split()) if not self._spells(word)]
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(caption) if normalizer else caption
        found = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return [word for word in dict.fromkeys(found) if word not in self._vocabulary]

    def _spells(self, word: str) -> bool:
        try:
            self._tokenizer.encode(word, add_special_tokens=False)
        except Exception:
            return False
        return True

    def _unspelled(self, caption: str, encoding: Encoding) -> list[str]:
        """The parts of a caption that were encoded as the unknown token, or dropped because there is none."""
        spans = [
            caption[a:b]
            for number, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self._unknown
        ]
        if self._unknown is None:
            covered = [False] * len(caption)
            for start, end in encoding.offsets:
                covered[start:end] = [True] * (end - start)
            spans = "".join(" " if seen else letter for letter, seen in zip(caption, covered, strict=True)).split()
        return list(dict.fromkeys(span.strip() or span for span in spans))

    @cached_property
    def _can_miss(self) -> bool:
        """Whether there are words that the vocabulary cannot spell. Bytes, and pieces made of them, spell all."""
        if isinstance(self._tokenizer.model, models.Unigram):
            has_fallback = json.loads(self._tokenizer.to_str())["model"].get("byte_fallback", False)
            return not (has_fallback and self._vocabulary.keys() >= set(map(byte_piece, range(NUM_BYTES))))
        if not isinstance(self._tokenizer.model, models.BPE):
            return True
        has_bytes = "ByteLevel(" in repr(self._tokenizer.pre_tokenizer)
        return not (has_bytes and self._vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()))

    @cached_property
    def _unknown(self) -> int | None:
        """The id that stands for what is unknown."""
        model = self._tokenizer.model
        if isinstance(model, models.Unigram):
            return json.loads(self._tokenizer.to_str())["model"]["unk_id"]
        name = getattr(model, "unk_token", None)
        return None if name is None else self._tokenizer.token_to_id(name)

    def _check(self, caption: str, encoding: Encoding | None = None) -> None:
        if not self._can_miss:
            return
        is_words = isinstance(self._tokenizer.model, models.WordLevel)
        unknown = self.unknown_words(caption) if is_words or encoding is None else self._unspelled(caption, encoding)
        if unknown:
            near = {word: difflib.get_close_matches(word, self.words, n=3) for word in unknown[:MAX_HINTS]}
            hints = [
                repr(word) + (f" (did you mean {' or '.join(near[word])}?)" if near[word] else "") for word in near
            ]
            hints += [f"and {len(unknown) - MAX_HINTS} more"] if len(unknown) > MAX_HINTS else []
            raise InputError(
                f"caption {shortened(caption)!r} has words outside the vocabulary: {'; '.join(hints)}."
                + ("" if all(near.values()) else f" Known words: {self._some_words()}.")
            )

    def _some_words(self) -> str:
        some = self.words[:40]
        return f"{' '.join(some)}{' …' if len(self.words) > len(some) else ''}"


def check_unicode(caption: str) -> None:
    """Raises InputError for text that is not Unicode."""
    if max(caption, default="") >= "\ud800" and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise InputError(f"caption {shortened(caption)!r} is not valid Unicode: not UTF-8, or half a surrogate pair.")


def switch_off(tokenizer: Tokenizer) -> list[str]:
    """Switches off what would change a caption's tokens unasked, and says what that was. Templates need no switch:
    nothing here encodes with them."""
    found = []
    if tokenizer.truncation:
        found.append(f"truncation to {tokenizer.truncation['max_length']} tokens (--max-text-length cuts captions)")
        tokenizer.no_truncation()
    if tokenizer.padding:
        found.append(f"padding with {tokenizer.padding['pad_token']}")
        tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE) and tokenizer.model.dropout:
        found.append(f"dropout of {tokenizer.model.dropout:g} of the merges")
        tokenizer.model.dropout = None
    if num := tokenizer.num_special_tokens_to_add(is_pair=False):
        found.append(f"the template that adds {num} special tokens to a caption")
    return found


def _what_instead(path: Path) -> str:
    """What a file may be that the library does not read."""
    if kind := kind_of(path):
        return f"it is {kind.what}" + (f": {kind.advice}" if kind.advice else "")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "it is not JSON; give a tokenizer.json"
    if isinstance(content, dict) and "model" in content:
        return f"it may be of a newer release than the one here, {tokenizers.__version__}, or damaged"
    if isinstance(content, dict) and content and all(isinstance(number, int) for number in content.values()):
        return "it is a vocabulary alone, of the old form with merges.txt; give the tokenizer.json beside it"
    return "give a tokenizer.json, or save the bundle anew"


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_piece(byte: int) -> str:
    """How SentencePiece writes a byte."""
    return f"<0x{byte:02X}>"


def _unigram(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # Every word, the first too, begins with the space before it, which is written as U+2581.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _whole_vocabulary(config: BPEConfig, pieces: Sequence[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer with the ids of all segments. The added tokens stand in the model's vocabulary too: those that do
    are given the id they have there, others would come behind all the rest."""
    contents = {
        "image": [image_token(code) for code in range(config.image_size)],
        SPECIAL: list(config.specials),
        "text": list(pieces),
    }
    ordered = [content for name in config.order for content in contents[name]]
    if len(set(ordered)) < len(ordered):
        raise AssertionError("a piece of text is spelled as a marker")
    tokenizer = _byte_level(models.BPE({content: i for i, content in enumerate(ordered)}, merges))
    controls = [content for name in config.order if name != "text" for content in contents[name]]
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in controls])
    return tokenizer


def _kind(content: str) -> str:
    return "image" if _IMAGE_TOKEN.fullmatch(content) else SPECIAL


def _from_json(kind: type[TextTokenizer], content: str) -> TextTokenizer:
    return kind(Tokenizer.from_str(content))
