"""A table of pictures and captions to a table of tokens: each picture through the image tokenizer once, for good.

Letters: N pictures of H rows and W columns.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from smalti.bundle import weights_sha256
from smalti.data.pairs import Pair, PairTable
from smalti.data.tokens import token_rows, write_token_table
from smalti.errors import InputError
from smalti.text_tokenizer import TextTokenizer


def tokenize_pairs(
    pairs: Path | str,
    tokens: Path | str,
    image_tokenizer: nn.Module,
    text_tokenizer: TextTokenizer,
    *,
    batch_size: int = 256,
    force: bool = False,
    show_progress: bool = True,
) -> int:
    """Writes the token table of a table of pairs; returns its number of rows.

    The table's metadata say which tokenizers made it (`tokenizer_metadata`). Raises InputError naming the row where a
    picture has another size than the first or a caption has words outside the vocabulary.
    """
    table = PairTable(pairs)
    with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
        task = progress.add_task(f"tokenize {Path(pairs).name}", total=len(table))

        def batches() -> Iterator[pa.RecordBatch]:
            rows, row = iter(table), 0
            while batch := list(islice(rows, batch_size)):
                yield _tokenize(batch, row, table.path, image_tokenizer, text_tokenizer)
                row += len(batch)
                progress.advance(task, len(batch))

        metadata = tokenizer_metadata(image_tokenizer, text_tokenizer)
        return write_token_table(tokens, batches(), metadata, force=force)


def tokenizer_metadata(image_tokenizer: Any, text_tokenizer: TextTokenizer) -> dict[str, Any]:
    """What must agree for two token tables to be joined, or for a model to go with a table."""
    return {
        "codebook_size": image_tokenizer.config.codebook_size,
        "grid": list(image_tokenizer.config.grid),
        "image_tokenizer_sha256": weights_sha256(image_tokenizer),
        "text_vocab_size": text_tokenizer.vocab_size,
        "text_tokenizer_sha256": hashlib.sha256(text_tokenizer.to_json().encode()).hexdigest(),
    }


def _tokenize(
    batch: list[Pair], first_row: int, path: Path, image_tokenizer: Any, text_tokenizer: TextTokenizer
) -> pa.RecordBatch:
    words = []
    for row, pair in enumerate(batch, first_row):
        if pair.picture.shape != batch[0].picture.shape:
            raise InputError(
                f"{path}: row {row}: the picture is {pair.picture.shape}, others {batch[0].picture.shape}."
            )
        try:
            words.append(text_tokenizer.encode(pair.caption))
        except InputError as error:
            raise InputError(f"{path}: row {row}: {error}") from error
    pictures = torch.from_numpy(np.stack([pair.picture for pair in batch]))
    with torch.inference_mode():
        codes = image_tokenizer.encode_images(pictures.permute(0, 3, 1, 2).float() / 255)
    keys, texts = [pair.key for pair in batch], [pair.caption for pair in batch]
    return token_rows(keys, codes.flatten(1).numpy(), words, texts)
