"""What lines of codes cost without a network: the yardsticks beside which a model's nats per token mean something.

    uniform       every code alike: ln V
    unigram       how often each code is, add-one
    position      how often each code is at each place, backed off to the unigram
    bigram        interpolated Kneser-Ney over the code before
    n-gram        the same over up to three codes before
    mixture       the three above and a bigram of each place, weighted by what predicts held-back training lines
    lzma          what the compressor of `xz` adds for the held-out lines behind the training lines, as a file of 16-bit
                  numbers: of the kind of gzip, with a longer memory

Counts are sorted arrays of hashed contexts, looked up by binary search; nothing loops over lines. Interpolated
Kneser-Ney follows Chen and Goodman 1998 (TR-10-98), section 3, with one discount n1 / (n1 + 2 n2) for each order.

Letters: n lines, L codes of each, V codes in all, M predicted tokens.
"""

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_START = np.uint64(0x51ED270B7A1D0F25)
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_MAX_LZMA_CODES = 64 * 2**20
"""Training codes that the compressor sees: what its memory holds."""


class BaselineScore(NamedTuple):
    """A row of the table."""

    name: str
    nats_per_token: float
    standard_error: float
    """From the spread between lines; NaN where only the sum is known."""


@dataclass(frozen=True)
class Counts:
    """How often each code followed each context: pairs (context, code) in ascending order of their hash."""

    keys: UInt64[np.ndarray, " pairs"]
    counts: Int64[np.ndarray, " pairs"]
    contexts: UInt64[np.ndarray, " contexts"]
    totals: Int64[np.ndarray, " contexts"]
    followers: Int64[np.ndarray, " contexts"]
    """How many different codes followed each context."""

    @classmethod
    def of(cls, contexts: UInt64[np.ndarray, " M"], codes: Int64[np.ndarray, " M"]) -> Self:
        """Counts of what was seen."""
        keys, first, counts = np.unique(_pair(contexts, codes), return_index=True, return_counts=True)
        known, inverse, followers = np.unique(contexts[first], return_inverse=True, return_counts=True)
        totals = np.bincount(inverse, weights=counts, minlength=len(known)).astype(np.int64)
        return cls(keys, counts, known, totals, followers)

    def count(self, contexts: UInt64[np.ndarray, " M"], codes: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        return _look_up(self.keys, self.counts, _pair(contexts, codes))

    def total(self, contexts: UInt64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        return _look_up(self.contexts, self.totals, contexts)

    def num_followers(self, contexts: UInt64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        return _look_up(self.contexts, self.followers, contexts)

    @property
    def discount(self) -> float:
        """n1 / (n1 + 2 n2), of the pairs seen once and twice; one half where there are none of either."""
        once, twice = int((self.counts == 1).sum()), int((self.counts == 2).sum())
        return once / (once + 2 * twice) if once and twice else 0.5

    def interpolate(
        self,
        contexts: UInt64[np.ndarray, " M"],
        codes: Int64[np.ndarray, " M"],
        lower: Float64[np.ndarray, " M"],
    ) -> Float64[np.ndarray, " M"]:
        """(max(count − d, 0) + d · followers · lower) / total; `lower` alone where the context was never seen."""
        discount, totals = self.discount, self.total(contexts)
        kept = np.maximum(self.count(contexts, codes) - discount, 0)
        shared = discount * self.num_followers(contexts) * lower
        return np.where(totals > 0, (kept + shared) / np.maximum(totals, 1), lower)


def _pair(contexts: UInt64[np.ndarray, " M"], codes: Int64[np.ndarray, " M"]) -> UInt64[np.ndarray, " M"]:
    mixed = (contexts ^ codes.astype(np.uint64)) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(31))


def _look_up(
    keys: UInt64[np.ndarray, " k"], values: Int64[np.ndarray, " k"], wanted: UInt64[np.ndarray, " M"]
) -> Int64[np.ndarray, " M"]:
    """The value of each wanted key, 0 for a key that is not there."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _contexts(codes: Int64[np.ndarray, "n L"], num_before: int, *, by_place: bool = False) -> UInt64[np.ndarray, " M"]:
    """A hash of the `num_before` codes before each code, of which places before the line's start count as codes of
    their own; `by_place`, also of where the code stands."""
    n, L = codes.shape
    places = np.arange(L, dtype=np.uint64) + np.uint64(1) if by_place else np.zeros(L, np.uint64)
    hashes = np.tile(_pair(np.full(L, _START) * np.uint64(2 * num_before + 1), places.astype(np.int64)), (n, 1))
    padded = np.concatenate([np.full((n, num_before), -1), codes], axis=1)
    for back in range(num_before, 0, -1):
        hashes = _pair(hashes, padded[:, num_before - back : num_before - back + L])
    return hashes.reshape(-1)


# The baselines -------------------------------------------------------------------------------------------------


def unigram(train: Int64[np.ndarray, "n L"], vocab_size: int) -> Float64[np.ndarray, " V"]:
    """(count + 1) / (tokens + V) of each code (Laplace)."""
    return (np.bincount(train.reshape(-1), minlength=vocab_size) + 1) / (train.size + vocab_size)


@dataclass(frozen=True)
class PositionUnigram:
    """Absolute discounting at each place, what is taken off going to the unigram."""

    counts: Counts
    lower: Float64[np.ndarray, " V"]

    @classmethod
    def fit(cls, train: Int64[np.ndarray, "n L"], vocab_size: int) -> Self:
        return cls(Counts.of(_contexts(train, 0, by_place=True), train.reshape(-1)), unigram(train, vocab_size))

    def probabilities(self, codes: Int64[np.ndarray, "n L"]) -> Float64[np.ndarray, " M"]:
        flat = codes.reshape(-1)
        return self.counts.interpolate(_contexts(codes, 0, by_place=True), flat, self.lower[flat])


@dataclass(frozen=True)
class KneserNey:
    """Interpolated Kneser-Ney over up to `len(levels)` codes before, backed off to how many different codes each code
    followed, and that to the uniform distribution."""

    levels: tuple[Counts, ...]
    """For 1, 2, ... codes before. All but the last count different continuations to the left instead of occurrences."""
    lower: Float64[np.ndarray, " V"]

    @classmethod
    def fit(cls, train: Int64[np.ndarray, "n L"], vocab_size: int, num_before: int) -> Self:
        flat = train.reshape(-1)
        levels = []
        for before in range(1, num_before + 1):
            contexts = _contexts(train, before)
            if before == num_before:
                levels.append(Counts.of(contexts, flat))
            else:  # each longer context counts once
                _, first = np.unique(_pair(_contexts(train, before + 1), flat), return_index=True)
                levels.append(Counts.of(contexts[first], flat[first]))
        _, first = np.unique(_pair(_contexts(train, 1), flat), return_index=True)
        continuations = np.bincount(flat[first], minlength=vocab_size)
        return cls(tuple(levels), (continuations + 1) / (len(first) + vocab_size))

    def probabilities(self, codes: Int64[np.ndarray, "n L"]) -> Float64[np.ndarray, " M"]:
        flat = codes.reshape(-1)
        found = self.lower[flat]
        for before, level in enumerate(self.levels, 1):
            found = level.interpolate(_contexts(codes, before), flat, found)
        return found


@dataclass(frozen=True)
class PlaceBigram:
    """A bigram of each place: the code before and the position, backed off to the position's unigram."""

    counts: Counts
    lower: PositionUnigram

    @classmethod
    def fit(cls, train: Int64[np.ndarray, "n L"], vocab_size: int) -> Self:
        counts = Counts.of(_contexts(train, 1, by_place=True), train.reshape(-1))
        return cls(counts, PositionUnigram.fit(train, vocab_size))

    def probabilities(self, codes: Int64[np.ndarray, "n L"]) -> Float64[np.ndarray, " M"]:
        contexts = _contexts(codes, 1, by_place=True)
        return self.counts.interpolate(contexts, codes.reshape(-1), self.lower.probabilities(codes))


def mixture_weights(probabilities: Float64[np.ndarray, "P M"]) -> Float64[np.ndarray, " P"]:
    """The weights of P predictors under which their mixture makes M tokens likeliest, by expectation-maximisation."""
    weights = np.full(len(probabilities), 1 / len(probabilities))
    for _ in range(50):
        joint = weights[:, None] * probabilities
        weights = (joint / joint.sum(0)).mean(1)
    return weights


def lzma_nats(train: Int64[np.ndarray, "n L"], held_out: Int64[np.ndarray, "m L"]) -> float:
    """Nats per held-out token that LZMA adds behind the training lines. Raises ValueError for codes above 65,535."""
    if max(train.max(initial=0), held_out.max(initial=0)) > 0xFFFF:
        raise ValueError("lzma is measured on 16-bit codes; these are larger.")
    seen = train[-(_MAX_LZMA_CODES // max(1, train.shape[1])) :].astype("<u2").tobytes()
    added = held_out.astype("<u2").tobytes()
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2 * 2 * _MAX_LZMA_CODES, "preset": 6, "lp": 1, "lc": 3, "pb": 1}]

    def num_bytes(content: bytes) -> int:
        return len(lzma.compress(content, lzma.FORMAT_RAW, filters=filters))

    return (num_bytes(seen + added) - num_bytes(seen)) * 8 * math.log(2) / held_out.size


# The table -----------------------------------------------------------------------------------------------------


def score_baselines(
    train: Int64[np.ndarray, "n L"], held_out: Int64[np.ndarray, "m L"], vocab_size: int
) -> list[BaselineScore]:
    """Nats per token of the held-out lines under every baseline fitted to the training lines.

    All training codes are in memory at once. Raises ValueError for a code out of range, or if there are no codes.
    """
    for name, codes in (("training", train), ("held-out", held_out)):
        if not codes.size:
            raise ValueError(f"there are no {name} codes; baselines need some.")
        if not 0 <= codes.min() <= codes.max() < vocab_size:
            raise ValueError(f"{name} codes are {codes.min()} to {codes.max()}; expected 0 to {vocab_size - 1}.")
    scores = [BaselineScore("uniform", math.log(vocab_size), 0.0)]
    flat = held_out.reshape(-1)
    scores.append(_score("unigram", unigram(train, vocab_size)[flat], held_out))
    predictors = {
        "per-position unigram": PositionUnigram.fit,
        "bigram (Kneser-Ney)": lambda codes, size: KneserNey.fit(codes, size, 1),
        "4-gram (Kneser-Ney)": lambda codes, size: KneserNey.fit(codes, size, 3),
        "per-position bigram": PlaceBigram.fit,
    }
    fitted = {name: fit(train, vocab_size) for name, fit in predictors.items()}
    found = {name: predictor.probabilities(held_out) for name, predictor in fitted.items()}
    scores += [_score(name, probabilities, held_out) for name, probabilities in found.items()]
    if len(train) > 1:
        weights = _weights_from_held_back(train, vocab_size, list(predictors.values()))
        mixed = (weights[:, None] * np.stack(list(found.values()))).sum(0)
        scores.append(_score("mixture of the four above", mixed, held_out))
    scores.append(BaselineScore("lzma (xz)", lzma_nats(train, held_out), math.nan))
    return scores


def _weights_from_held_back(
    train: Int64[np.ndarray, "n L"], vocab_size: int, fits: Sequence
) -> Float64[np.ndarray, " P"]:
    """Weights by a tenth of the training lines (at most 2,000) held back from the predictors that are weighted."""
    is_back = np.zeros(len(train), bool)
    num_back = min(max(1, len(train) // 10), 2000)
    is_back[np.random.default_rng(0).choice(len(train), num_back, replace=False)] = True
    fitted = [fit(train[~is_back], vocab_size) for fit in fits]
    return mixture_weights(np.stack([predictor.probabilities(train[is_back]) for predictor in fitted]))


def _score(name: str, probabilities: Float64[np.ndarray, " M"], held_out: Int64[np.ndarray, "m L"]) -> BaselineScore:
    lines = -np.log(probabilities).reshape(held_out.shape).mean(1)
    error = float(lines.std(ddof=1) / math.sqrt(len(lines))) if len(lines) > 1 else math.nan
    return BaselineScore(name, float(lines.mean()), error)
