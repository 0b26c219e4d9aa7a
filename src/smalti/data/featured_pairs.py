"""Rows of a token table with features of their captions, as models of captions train on them.

Letters: n features of a caption, C channels of a feature, P features that a sequence has room for.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from smalti.data.tokens import TokenBatch, TokenTable
from smalti.text_features import prepared


class CaptionFeatures(Protocol):
    """Features of a caption by its text."""

    def __getitem__(self, caption: str, /) -> Float[Tensor, "n C"]: ...


class FeaturedPairs:
    """Some rows of a table, numbered anew from 0, and the features of their captions. What stands for no caption is
    the end of `null_features`, as many as the caption has; an empty caption has all of them."""

    def __init__(
        self,
        table: TokenTable,
        rows: Int64[np.ndarray, " n"],
        cache: CaptionFeatures,
        null_features: Float[Tensor, "P C"],
        *,
        cleaned: bool,
    ):
        self.table, self.rows, self.cache, self.null_features, self.cleaned = table, rows, cache, null_features, cleaned

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        return self.table.batch(self.rows[rows])

    def captions(self, rows: Integer[np.ndarray, " n"]) -> list[str]:
        """As the text encoder is given them."""
        return [prepared(text, cleaned=self.cleaned) for text in self.table.texts(self.rows[rows])]

    def features(
        self, rows: Integer[np.ndarray, " n"], uncaptioned: Bool[np.ndarray, " n"] | None = None
    ) -> list[Float[Tensor, "n C"]]:
        """Of these rows' captions; of those that are `uncaptioned`, what stands for none."""
        found = []
        for row, caption in enumerate(self.captions(rows)):
            features = self.cache[caption] if caption else self.null_features
            without = uncaptioned is not None and uncaptioned[row]
            found.append(self.null_features[-len(features) :] if without else features)
        return found
