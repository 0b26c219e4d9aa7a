"""Samples of webdataset shards: the members of a tar file that lie side by side and have one name up to its first dot.

webdataset's own rule (its `base_plus_ext`): what stands before the first dot after the last slash is the sample's key,
the rest names the part. A sample needs one picture and one caption. Whatever this rule would lose in silence is a
fault of the sample that says how to name or sort the members; hidden members and those that belong to no sample are
counted in a warning.
"""

import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from smalti.data.pairs import Record
from smalti.data.text_tables import CAPTION_NAMES
from smalti.errors import InputError, InputWarning, first_line
from smalti.file_kinds import TAR, is_hidden, warn_passed_over, why_not

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIX, FIELDS_SUFFIX = ".txt", ".json"
_SORT = "sort the shard: unpack it (tar xf) and pack it again by name (tar --sort=name -cf)"
_RENAME = "a sample's key ends at the first dot: rename the members so that it has none, as in 22_05.png and 22_05.txt"


class _Member(NamedTuple):
    name: str
    part: str
    """What the name says behind the key, lower case: ".png", ".input.png"."""
    number: int
    info: tarfile.TarInfo


@dataclass
class _Run:
    """Members of one key, side by side. A name that comes again begins another run."""

    key: str
    members: list[_Member] = field(default_factory=list)

    def find(self, suffixes: tuple[str, ...]) -> list[_Member]:
        """The members whose names end so, those that end at the key first."""
        found = [member for member in self.members if member.part.endswith(suffixes)]
        return sorted(found, key=lambda member: member.part not in suffixes)


@dataclass
class TarShard:
    """One shard, scanned once, headers only. `num_records` counts its samples, whole ones and faulty ones."""

    path: Path
    num_records: int = 0
    _faults: dict[int, str] = field(default_factory=dict)
    """What is wrong with the run of this number beyond what its own members tell."""
    _absorbed: set[int] = field(default_factory=set)
    """Runs that are no sample of their own."""

    @classmethod
    def scan(cls, path: Path) -> "TarShard":
        """Raises InputError if the shard is no whole tar file. Warns of what is passed over."""
        shard = cls(path)
        counts = _Counts()
        seen: dict[str, tuple[int, list[_Member]]] = {}
        num_runs, taken = 0, []
        for number, (_, run) in enumerate(_runs(path, counts)):
            num_runs += 1
            if _is_no_sample(run):
                shard._absorbed.add(number)
                counts.strays.append(run.members[0].name)
                continue
            if run.key in seen:
                shard._judge(number, run, *seen[run.key])
                seen[run.key][1].extend(run.members)
            else:
                seen[run.key] = number, list(run.members)
            pictures = run.find(PICTURE_SUFFIXES)
            if len(pictures) > 1 and _ambiguity(run) is None:
                taken.append(pictures)
        shard.num_records = num_runs - len(shard._absorbed)
        for names, what in (
            (counts.hidden, "hidden members"),
            (counts.strays, "members that are no part of a sample"),
            (counts.links, "links without content (pack with tar -h --hard-dereference)"),
        ):
            if names:
                warn_passed_over(len(names), what, path, names[0])
        if taken:
            first, *others = taken[0]
            warnings.warn(
                f"{path}: {len(taken)} samples have several pictures; of the first, {first.name} is taken and "
                f"{', '.join(member.name for member in others)} passed over.",
                InputWarning,
                stacklevel=2,
            )
        return shard

    def _judge(self, number: int, run: _Run, first: int, before: list[_Member]) -> None:
        """A key that came before: its members stand apart, or are repeated."""
        names = {member.part: member for member in before}
        twice = next((member for member in run.members if member.part in names), None)
        if twice is not None:
            there = names[twice.part]
            self._faults[number] = (
                f"the shard holds {twice.name} twice, as members {there.number} and {twice.number}: rename one"
            )
            return
        self._absorbed.add(number)
        one, other = before[0], run.members[0]
        self._faults[first] = (
            f"its members do not lie side by side ({one.name} is member {one.number}, {other.name} is member "
            f"{other.number}): {_SORT}"
        )

    def records(self, start: int = 0) -> Iterator[Record]:
        for number, (archive, run) in enumerate(_runs(self.path, _Counts())):
            if number in self._absorbed:
                continue
            if start <= 0:
                yield self._record(archive, run, self._faults.get(number))
            start -= 1

    def _record(self, archive: tarfile.TarFile, run: _Run, fault: str | None) -> Record:
        name = f"{self.path}: {run.key}"
        fault = fault or _ambiguity(run)
        if fault is not None:
            return Record(name, run.key, None, None, fault)

        def read(member: _Member) -> bytes:
            held = archive.extractfile(member.info)
            return b"" if held is None else held.read()

        pictures, texts, fields = (run.find(s) for s in (PICTURE_SUFFIXES, (CAPTION_SUFFIX,), (FIELDS_SUFFIX,)))
        has = f"it has {', '.join(member.name for member in run.members)}"
        try:
            if not pictures:
                return Record(
                    name, run.key, None, None, f"no member is a picture ({', '.join(PICTURE_SUFFIXES)}): {has}"
                )
            if not texts and not fields:
                return Record(
                    name, run.key, None, None, f"no member is a caption ({CAPTION_SUFFIX} or {FIELDS_SUFFIX}): {has}"
                )
            if texts:
                caption, fault = caption_of_text(read(texts[0]), texts[0].name)
            else:
                caption, fault = _caption_of_fields(read(fields[0]), fields[0].name)
            return Record(name, run.key, caption, read(pictures[0]), fault)
        except Exception as error:
            raise _not_whole(self.path, error) from error


@dataclass
class _Counts:
    hidden: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def _runs(path: Path, counts: _Counts) -> Iterator[tuple[tarfile.TarFile, _Run]]:
    """The runs of a shard in its order, with the open archive."""
    for archive, run in _all_runs(path, counts):
        if run.members:
            yield archive, run


def _all_runs(path: Path, counts: _Counts) -> Iterator[tuple[tarfile.TarFile, _Run]]:
    with _opened(path) as archive:
        run = _Run("")
        for number, info in enumerate(_members(archive, path), 1):
            if not info.isfile():
                if not info.isdir():
                    (counts.links if info.issym() or info.islnk() else counts.strays).append(info.name)
                continue
            if is_hidden(info.name):
                counts.hidden.append(info.name)
                continue
            key, part = split_name(info.name)
            if not part:
                counts.strays.append(info.name)
                continue
            if key != run.key or any(member.part == part for member in run.members):
                yield archive, run
                run = _Run(key)
            run.members.append(_Member(info.name, part, number, info))
        yield archive, run


class _BoundedFile(io.BufferedReader):
    """Asks for no more than the file has left: a damaged header says any size, and that much would be allocated."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


class _Archive(tarfile.TarFile):
    def __init__(self, path: Path):
        self.file = _BoundedFile(path)
        try:
            super().__init__(path, "r", fileobj=self.file)
        except BaseException:
            self.file.close()
            raise

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.file.close()  # which tarfile leaves to whoever opened it


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return _Archive(path)
    except Exception as error:  # tarfile lets errors of the headers' fields out
        raise _not_whole(path, error) from error


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Headers one after the other. tarfile ends in silence at a header that it cannot read, and at the first of
    several archives in one file, so what lies behind the end must be nothing."""
    while True:
        try:
            info = archive.next()
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it would keep them all)
        except Exception as error:
            raise _not_whole(path, error) from error
        if info is None:
            break
        yield info
    with path.open("rb") as file:
        file.seek(archive.offset)
        while chunk := file.read(2**20):
            if chunk.strip(b"\0"):
                raise InputError(
                    f"{path} goes on behind its end: it is damaged there, or several tar files were joined as they "
                    "are; join them with tar -A, or give each by itself."
                )


def _not_whole(path: Path, error: Exception) -> InputError:
    damaged = f"{first_line(error)}; fetch or make the shard again"
    return InputError(f"{path} is not a whole tar file: {why_not(path, TAR.what, damaged)}.")


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.png` → `a/b` and `.seg.png`, as webdataset does."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _is_no_sample(run: _Run) -> bool:
    """A single member that is neither picture nor caption, such as index.json or README.md."""
    return len(run.members) == 1 and not run.find((*PICTURE_SUFFIXES, CAPTION_SUFFIX))


def _ambiguity(run: _Run) -> str | None:
    """Why it is not known which picture and caption of a run belong together."""
    pictures, texts = run.find(PICTURE_SUFFIXES), run.find((CAPTION_SUFFIX,))
    pairs = {_stem(member.part) for member in pictures} & {_stem(member.part) for member in texts}
    if len(pairs) > 1:
        names = ", ".join(member.name for member in run.members[:6])
        return f"{len(run.members)} members have the key {run.key} ({names}): {_RENAME}"
    for found in (pictures, texts):
        if len(found) > 1 and _stem(found[0].part):
            names, ending = " or ".join(member.name for member in found[:6]), found[0].part.rpartition(".")[2]
            return f"it is not known whether {names} is meant: call that one {run.key}.{ending}"
    return None


def _stem(part: str) -> str:
    """What stands between the key and the last dot: ".input" of ".input.png"; nothing of ".png"."""
    return part.rpartition(".")[0]


# Captions --------------------------------------------------------------------------------------------------------


def caption_of_text(content: bytes, name: str) -> tuple[str | None, str | None]:
    """The caption in a text file's bytes, or why there is none."""
    try:
        return content.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError as error:
        return None, f"{name} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); save it as UTF-8"


def _caption_of_fields(content: bytes, name: str) -> tuple[str | None, str | None]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, f"{name} is not JSON ({first_line(error)})"
    if not isinstance(fields, dict):
        return None, f"{name} holds {type(fields).__name__}, expected an object"
    lower: dict[str, object] = {key.lower(): value for key, value in fields.items()}
    found = [lower[field_name] for field_name in CAPTION_NAMES if isinstance(lower.get(field_name), str)]
    if found:
        return str(found[0]), None
    return (
        None,
        f"{name} has no caption in {', '.join(CAPTION_NAMES)}; it has {', '.join(map(repr, fields)) or 'nothing'}",
    )
