"""Features of captions: what a T5 encoder makes of every token of a caption, and where they are kept once made.

LlamaGen's models of captions read them in place of token ids (arXiv:2406.06525): up to 120 vectors of FLAN-T5-XL. The
original fills shorter captions up on the left and masks what it filled; here a caption has as many vectors as tokens.

A cache is a folder of safetensors files, in a subfolder of one encoder's weights and one length. A tensor's name tells
the caption, by the hash of its text, how many tokens the caption has, and the checksum of the vectors.

Letters: n tokens of a caption, C channels of a feature, B captions encoded together, T tokens of the longest of them.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smalti.documents import read_json
from smalti.errors import InputError, first_line, shortened
from smalti.files import new_file, user_cache, write_text
from smalti.hub import import_hub, is_hub_name
from smalti.progress import stage
from smalti.weights import file_sha256

MAX_FEATURES = 120
"""Tokens of a caption at most, its end included (LlamaGen, t5_feature_max_len)."""
CAPTIONS_PER_FILE = 256
"""What a run that is killed encodes again at most."""
OPEN_FILES = 64
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
ANEW = "give the folder of a T5 encoder with its tokenizer, as transformers saves them"

Features = Float[Tensor, "n C"]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The text encoder whose features a model reads, as its bundle knows it."""

    name: str | None = None
    """Its folder, or the hub's owner/name; None: it has to be given."""
    sha256: str | None = None
    """`TextEncoder.sha256`; None: not known, as of published weights."""
    cleaned: bool = True
    """Whether captions are cleaned before (see `clean_caption`), as LlamaGen's were."""


_DASHES = re.compile("[‐‑‒–—―−]")
_DOUBLE_QUOTES, _SINGLE_QUOTES = re.compile("[`´«»“”¨]"), re.compile("[‘’]")
_SIGNS = re.compile(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+")


def prepared(caption: str, *, cleaned: bool) -> str:
    """A caption as the text encoder is given it; "" where there is none."""
    return clean_caption(caption) if cleaned else caption.strip()


def clean_caption(caption: str) -> str:
    """A caption as LlamaGen's text encoder is given it: in lower case, typographic quotes and dashes as plain ones,
    signs such as parentheses as spaces, white space single. The original takes out addresses, HTML and file names too.
    """
    text = _DASHES.sub("-", caption.strip().lower())
    text = _SINGLE_QUOTES.sub("'", _DOUBLE_QUOTES.sub('"', text))
    return " ".join(_SIGNS.sub(" ", text).split())


# The encoder ---------------------------------------------------------------------------------------------------


class TextEncoder:
    """A T5 encoder in a folder, or on the hub. Its weights are loaded when the first caption is encoded.

    Raises InputError if there is none. Of a hub's name only a copy that is there is taken, unless `fetch`.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        max_length: int = MAX_FEATURES,
        device: torch.device | str = "cpu",
        fetch: bool = True,
    ):
        self.name, self.max_length, self.device = str(name), max_length, torch.device(device)
        self.folder = _find(name, fetch=fetch)
        config = read_json(self.folder / "config.json", ANEW)
        if config.get("model_type") != "t5" or not isinstance(config.get("d_model"), int):
            found = shortened(repr(config.get("model_type")))
            raise InputError(f"{self.folder} holds a model of the type {found}, not a T5; {ANEW}.")
        self.width: int = config["d_model"]

    @cached_property
    def sha256(self) -> str:
        """A hash of its weights and its tokenizer: the same in any folder. It is kept, since hashing takes as long as
        reading, and is computed again when a file has another size or time of change."""
        files = [self.folder / name for name in ("config.json", *TOKENIZER_FILES)]
        files = [file for file in files if file.is_file()] + _weight_files(self.folder)
        states = [file.resolve().stat() for file in files]
        found = [[str(file), state.st_size, state.st_mtime_ns] for file, state in zip(files, states, strict=True)]
        kept = user_cache("encoders") / f"{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]}.txt"
        with suppress(OSError, UnicodeDecodeError):
            if re.fullmatch("[0-9a-f]{64}", text := kept.read_text(encoding="utf-8").strip()):
                return text
        digest = hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()
        with suppress(InputError, OSError):  # a cache that cannot be written is none
            write_text(kept, f"{digest}\n", force=True)
        return digest

    def num_tokens(self, caption: str) -> int:
        """Of a whole caption, however many of them are encoded."""
        tokenizer = self._tokenizer
        with _as_input_error(self.folder), _quiet(_import_transformers()):  # which notes long captions
            return len(tokenizer(caption)["input_ids"])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> "list[EncodedCaption]":
        """The features of captions that are not empty, encoded together, on the CPU. Others beside a caption change its
        features by rounding alone."""
        tokenizer = self._tokenizer
        with _as_input_error(self.folder), _quiet(_import_transformers()):  # which notes long captions
            lengths = [len(found) for found in tokenizer(list(captions))["input_ids"]]
            ids = tokenizer(list(captions), truncation=True, max_length=self.max_length)["input_ids"]
        most = max(map(len, ids))
        token_ids = torch.tensor([[*row, *[0] * (most - len(row))] for row in ids], device=self.device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in ids], device=self.device)
        with _as_input_error(self.folder):
            hidden = self._model(input_ids=token_ids, attention_mask=mask).last_hidden_state.float().cpu()
        found = [EncodedCaption(row[: len(own)].clone(), n) for row, own, n in zip(hidden, ids, lengths, strict=True)]
        for caption, (features, _) in zip(captions, found, strict=True):
            if not features.isfinite().all():
                raise InputError(f"{self.folder} makes features that are not finite of {shortened(repr(caption))}.")
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        transformers = _import_transformers()
        with _as_input_error(self.folder), _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        transformers = _import_transformers()
        with _as_input_error(self.folder), _quiet(transformers):
            model, found = transformers.T5EncoderModel.from_pretrained(
                str(self.folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        if lacking := sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"]))):
            # which transformers would fill with random numbers
            raise InputError(f"{self.folder} lacks weights of a T5 encoder, such as {shortened(lacking[0])}; {ANEW}.")
        return model.to(self.device).eval()


class EncodedCaption(NamedTuple):
    features: Features
    num_tokens: int
    """Of the whole caption; the features are of at most `TextEncoder.max_length`."""


def _find(name: str | Path, *, fetch: bool) -> Path:
    """The folder of an encoder."""
    if (Path(name) / "config.json").is_file():
        if not _weight_files(Path(name)):
            raise InputError(f"{name} has no weights (*.safetensors, pytorch_model*.bin); {ANEW}.")
        return Path(name)
    if not is_hub_name(name):
        raise InputError(f"there is no text encoder {str(name)!r}: expected a folder with config.json; {ANEW}.")
    _import_transformers()  # before a download of gigabytes
    hub = import_hub()
    try:
        how: dict[str, Any] = {"local_files_only": not fetch}
        folder = Path(hub.snapshot_download(str(name), allow_patterns=["*.json", "*.model", "*.safetensors"], **how))
        if not _weight_files(folder):
            hub.snapshot_download(str(name), allow_patterns=["pytorch_model*.bin"], **how)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        if not fetch:
            raise InputError(
                f"captions are read by the text encoder {name}, of which there is no copy here: give its folder by "
                f"--text-encoder, or --text-encoder {name} to fetch it from the hub."
            ) from error
        raise InputError(f"the hub does not give a text encoder {name}: {first_line(error)}; {ANEW}.") from error
    return _find(folder, fetch=False) if (folder / "config.json").is_file() else folder


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "features of captions need transformers, which is an extra: pip install 'smalti[t5]'."
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and notes of transformers; left as it was."""
    logging = transformers.utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


@contextmanager
def _as_input_error(folder: Path) -> Iterator[None]:
    """Whatever transformers makes of a damaged or foreign folder, as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # errors of Rust, of Python and of torch
        raise InputError(f"{folder} cannot be used as a text encoder: {first_line(error)}; {ANEW}.") from error


# The cache -----------------------------------------------------------------------------------------------------


class Filled(NamedTuple):
    """What became of captions."""

    num_captions: int
    """Different ones."""
    num_made: int
    num_cut: int
    """Captions with more tokens than features."""
    longest: int
    """Tokens of the caption that has most."""
    num_damaged: int
    """Files of the cache that were damaged, and whose captions were encoded again."""


class _Entry(NamedTuple):
    file: Path
    name: str

    @property
    def num_tokens(self) -> int:
        return int(self.name.split(".")[1])


class FeatureCache:
    """Features of captions by their text, in a folder; made of what is missing by `fill`."""

    def __init__(self, folder: Path, encoder: TextEncoder):
        self.encoder = encoder
        self.folder = folder / f"{encoder.sha256[:16]}-{encoder.max_length}"
        self._open = lru_cache(OPEN_FILES)(lambda file: safe_open(file, "pt"))
        self._entries: dict[str, _Entry] = {}
        self._damaged: set[Path] = set()
        self._held: dict[str, Features] = {}  # where the folder cannot be written
        for file in sorted(self.folder.glob("*.safetensors")):
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            names = list(safe_open(file, "pt").keys())
            if not all(re.fullmatch(r"[0-9a-f]{32}\.\d+\.[0-9a-f]{8}", name) for name in names):
                raise ValueError("these are no features")
        except Exception:  # errors of Rust and of Python
            self._damaged.add(file)
            return
        self._entries |= {name.split(".")[0]: _Entry(file, name) for name in names}

    def fill(
        self, captions: Sequence[str], *, batch_size: int = 32, keep: bool = True, show_progress: bool = False
    ) -> Filled:
        """Encodes the captions that are not there, or whose features are damaged, `batch_size` at a time. Where the
        folder cannot be written they are held in memory alone, unless it must `keep` them: then it is an InputError."""
        texts = sorted({caption for caption in captions if caption}, key=lambda text: (len(text), text))
        for text in texts:
            self._check(text)
        missing = [text for text in texts if _key(text) not in self._entries]
        damaged = sorted(self._damaged)
        for file in damaged:
            with suppress(OSError):
                file.unlink()
        self._damaged.clear()
        self._open.cache_clear()  # the same captions make a file of the same name
        with stage("encoding captions", len(missing), unit="caption", show=show_progress and bool(missing)) as progress:
            for start in range(0, len(missing), CAPTIONS_PER_FILE):
                part = missing[start : start + CAPTIONS_PER_FILE]
                encoded = [one for batch in _split(part, batch_size) for one in self.encoder.encode(batch)]
                self._store(part, encoded, keep)
                progress.update(start + len(part))
        lengths = [self._num_tokens(text) for text in texts]
        num_cut = sum(length > self.encoder.max_length for length in lengths)
        return Filled(len(texts), len(missing), num_cut, max(lengths, default=0), len(damaged))

    def __getitem__(self, caption: str) -> Features:
        """The features of a caption that `fill` was given. Raises InputError if they were damaged meanwhile."""
        entry = self._entries[_key(caption)]
        if (features := self._read(entry)) is None:
            raise InputError(f"{entry.file} was damaged meanwhile; start again, and its captions are encoded again.")
        return features

    def _num_tokens(self, text: str) -> int:
        return self._entries[_key(text)].num_tokens

    def _read(self, entry: _Entry) -> Features | None:
        """None where they are damaged."""
        if entry.name in self._held:
            return self._held[entry.name]
        try:
            features = self._open(entry.file).get_tensor(entry.name)
        except Exception:  # errors of Rust and of Python
            return None
        fits = features.ndim == 2 and features.shape[1] == self.encoder.width and features.dtype == torch.float32
        return features if fits and _checksum(features) == entry.name.split(".")[2] else None

    def _check(self, text: str) -> None:
        """Forgets a file in which a caption's features are damaged: all its captions are encoded again."""
        entry = self._entries.get(_key(text))
        if entry is not None and self._read(entry) is None:
            self._damaged.add(entry.file)
            self._entries = {key: other for key, other in self._entries.items() if other.file != entry.file}

    def _store(self, texts: Sequence[str], encoded: Sequence[EncodedCaption], keep: bool) -> None:
        named = {
            f"{_key(text)}.{num_tokens}.{_checksum(features)}": features
            for text, (features, num_tokens) in zip(texts, encoded, strict=True)
        }
        file = self.folder / f"{hashlib.sha256(' '.join(sorted(named)).encode()).hexdigest()[:24]}.safetensors"
        try:
            with new_file(file, force=True) as temporary:
                save_file(named, temporary)
        except InputError:
            if keep:
                raise
            self._held |= named
        self._entries |= {name.split(".")[0]: _Entry(file, name) for name in named}


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _checksum(features: Features) -> str:
    return f"{zlib.crc32(features.contiguous().view(-1).view(torch.uint8).numpy().data):08x}"


def _split(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
