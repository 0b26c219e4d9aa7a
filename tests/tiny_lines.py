"""A model of lines small enough to build in a test, and lines to feed it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from smalti.bundle import Bundle
from smalti.data.lines import Lines, write_lines
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.recipes.line_presets import line_layout
from smalti.tasks.lines import LineModel

LENGTH, VOCAB_SIZE = 7, 11


def tiny_line_model(seed: int = 0, *, length: int = LENGTH, vocab_size: int = VOCAB_SIZE) -> LineModel:
    layout = line_layout(length, vocab_size)
    shape = TransformerConfig(num_layers=1, d_model=10, num_heads=2, d_ff=13, max_length=layout.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(layout, shape)
        for parameter in model.parameters():  # far from even odds, so that what is likely shows
            torch.nn.init.normal_(parameter, std=0.5)
    figures = {"validation nats per token": "2.5 ± 0.1"}
    return LineModel(Bundle(model=model, layout=layout, name="tiny", figures=figures))


def random_codes(num_lines: int, *, length: int = LENGTH, vocab_size: int = VOCAB_SIZE, seed: int = 0):
    return np.random.default_rng(seed).integers(0, vocab_size, (num_lines, length))


def write_text(path: Path, codes, lengths=None, *, tag: str = "picture") -> Path:
    """Lines whose tags say where they stand; the first `lengths` codes of each."""
    lengths = np.full(len(codes), codes.shape[1]) if lengths is None else np.asarray(lengths)
    flat = codes[np.arange(codes.shape[1]) < lengths[:, None]]
    tags = pa.array([f"{tag}-{row}.png" for row in range(len(codes))])
    write_lines(path, [Lines(tags, flat, lengths)], force=True)
    return path
