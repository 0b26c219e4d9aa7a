"""Lists of prompts as benchmarks publish them, and what their own judges want of the pictures.

- a table: CSV or TSV such as PartiPrompts (columns Prompt, Category, Challenge, Note) or COCO's captions, JSON lines
  such as GenEval's `evaluation_metadata.jsonl` and GenEval 2's `geneval2_data.jsonl` (their prompts under `prompt`),
  one JSON;
- a parquet table, of which the columns of text are read;
- a text file with a prompt on each line;
- a folder with a `.txt` file for each prompt, as DPG-Bench has them (`dpg_bench/prompts`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.data import arrow_types
from smalti.data.parquet_files import ParquetReader
from smalti.data.text_tables import SUFFIXES, caption_column, find_column, open_text_table, text_lines
from smalti.errors import InputError, shortened

MOST_PROMPTS = 1_000_000


@dataclass(frozen=True)
class PromptList:
    """Prompts in their order, each with the row of the benchmark that it is from, and a name of its own."""

    path: Path
    prompts: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(path: Path | str, *, column: str | None = None, most: int | None = None) -> PromptList:
    """The first `most` prompts. Raises InputError naming the file and the line where a prompt is none or empty."""
    path = Path(path)
    if path.is_dir():
        found = _of_folder(path)
    elif path.suffix.lower() == ".parquet":
        found = _of_parquet(path, column)
    elif path.suffix.lower() in SUFFIXES:
        found = _of_table(path, column)
    elif not path.is_file():
        raise InputError(f"there is no {path}; give a file of prompts, or a folder with a .txt file for each.")
    else:
        found = [
            (f"{path}, line {i}", line.strip(), {"prompt": line.strip()}) for i, line in enumerate(text_lines(path), 1)
        ]
        found = [one for one in found if one[1]]
    found = found[:most]
    if not found:
        raise InputError(f"{path} holds no prompts.")
    if len(found) > MOST_PROMPTS:
        raise InputError(f"{path} holds {len(found):,} prompts, at most {MOST_PROMPTS:,} are drawn by one command.")
    for where, prompt, _ in found:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: the prompt is {shortened(repr(prompt))}; expected text.")
    names = [Path(where).stem if path.is_dir() else f"{i:05d}" for i, (where, _, _) in enumerate(found)]
    return PromptList(path, tuple(p.strip() for _, p, _ in found), tuple(row for _, _, row in found), tuple(names))


def _of_table(path: Path, column: str | None) -> list[tuple[str, Any, dict[str, Any]]]:
    table = open_text_table(path, wanted=column)
    name = caption_column(table, column)
    return [(row.where, row.values.get(name), dict(row.values)) for row in table.rows()]


def _of_parquet(path: Path, column: str | None) -> list[tuple[str, Any, dict[str, Any]]]:
    reader = ParquetReader(path)
    columns = [name for name in reader.schema.names if arrow_types.is_text(reader.schema.field(name).type)]
    if not columns:
        raise InputError(f"{path} has no column of text; it has {', '.join(reader.schema.names) or 'none'}.")
    name = find_column(columns, column, path)
    rows = [row for batch in reader.batches(columns, rows_at_once=65_536) for row in batch.to_pylist()]
    return [(f"{path}: row {number}", row[name], row) for number, row in enumerate(rows)]


def _of_folder(folder: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    files = sorted(file for file in folder.iterdir() if file.suffix == ".txt" and not file.name.startswith("."))
    if not files:
        raise InputError(f"{folder} holds no .txt files; expected one for each prompt, as DPG-Bench has them.")
    texts = [" ".join(text_lines(file)) for file in files]
    return [(str(file), text, {"item_id": file.stem, "prompt": text}) for file, text in zip(files, texts, strict=True)]
