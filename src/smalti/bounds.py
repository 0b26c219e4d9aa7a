"""How large the numbers of a config may be: more than anybody builds, so that a slip or a damaged file is told at once
and not by a full memory."""

from dataclasses import fields
from typing import Any

MAX_LAYERS = 1024
"""The deepest transformers that were published have 1,000 layers (arXiv:2203.00555)."""
MAX_SIZE = 2**31 - 1
MAX_TABLE = 2**28
"""Numbers in a table of positions: a gigabyte; the longest published Llamas have a sixteenth of it."""
MAX_CELLS = 2**20
"""Codes of one picture."""
MAX_PARTS = 64
"""Of what is given as a list: levels, multipliers."""


MAX_PICTURES = 10_000
"""That one command draws."""
MAX_CANDIDATES = 1024
"""Of which the best is kept: drawn, or held in view by a beam."""
MAX_VOCABULARY = 2**18
"""Of picture codes, and of pieces of words: the largest that are published. For so many, `tokenizers` takes a gigabyte
and half a minute."""


def check_sizes(config: Any, *layers: str) -> None:
    """Raises ValueError if a whole number of a config dataclass is beyond MAX_SIZE or, of the fields `layers`, each of
    which is that many modules, beyond MAX_LAYERS; or a list of numbers beyond MAX_PARTS."""
    for name in (field.name for field in fields(config) if field.name != "seed"):
        value, most = getattr(config, name), MAX_LAYERS if name in layers else MAX_SIZE
        if isinstance(value, tuple | list) and len(value) > MAX_PARTS:
            raise ValueError(f"{name} has {len(value)} entries; at most {MAX_PARTS} are possible.")
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{name} is {number}; at most {most} is possible.")
