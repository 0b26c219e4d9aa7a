"""Sizes of models for pre-tokenized lines, and which one suits how much data.

The rule: about four different tokens for each parameter. A model learns best for its compute from some twenty tokens a
parameter (Hoffmann et al. 2022, arXiv:2203.15556), and up to about four passes over the same tokens are worth nearly as
much as new ones (Muennighoff et al. 2023, arXiv:2305.16264): four or five passes over four tokens make those twenty.
"""

from dataclasses import dataclass

from smalti.models.config import TransformerConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import SPECIAL, Vocabulary

AUTO = "auto"
ORDER = "lines"
BOS = "<bos>"


@dataclass(frozen=True, kw_only=True)
class LinePreset:
    """The shape of a transformer, and the number of different training tokens from which it is the one to take."""

    num_layers: int
    d_model: int
    num_heads: int
    tokens_from: int

    def transformer(self, layout: Layout, *, dropout: float) -> TransformerConfig:
        """Learned 1-D positions: what a place means is found in the data, no grid is assumed."""
        return TransformerConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=4 * self.d_model,
            max_length=layout.max_length,
            positions="learned",
            dropout=dropout,
        )


# Parameters are counted with 1025 codes and 67 of them a line; a test counts them again.
LINE_PRESETS = {
    "1M": LinePreset(num_layers=4, d_model=128, num_heads=4, tokens_from=0),  # 1,064,576
    "3M": LinePreset(num_layers=6, d_model=192, num_heads=6, tokens_from=12_000_000),  # 3,076,416
    "10M": LinePreset(num_layers=8, d_model=320, num_heads=5, tokens_from=40_000_000),  # 10,542,400
    "30M": LinePreset(num_layers=9, d_model=512, num_heads=8, tokens_from=120_000_000),  # 29,457,408
    "100M": LinePreset(num_layers=14, d_model=768, num_heads=12, tokens_from=400_000_000),  # 100,859,136
}


def choose_preset(name: str, num_tokens: int) -> str:
    """The preset's name, "auto" being the largest that so many training tokens suit. Raises ValueError, listing the
    presets, for a name that is none."""
    if name != AUTO and name not in LINE_PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {AUTO}, {', '.join(LINE_PRESETS)}.")
    if name != AUTO:
        return name
    return max(
        (known for known, preset in LINE_PRESETS.items() if preset.tokens_from <= num_tokens),
        key=lambda known: LINE_PRESETS[known].tokens_from,
    )


def line_layout(length: int, vocab_size: int) -> Layout:
    """`<bos> image{length}`: one segment of codes, one order."""
    vocabulary = Vocabulary({SPECIAL: [BOS], "image": vocab_size})
    return Layout.parse(vocabulary, {ORDER: f"{BOS} image{{{length}}}"})
