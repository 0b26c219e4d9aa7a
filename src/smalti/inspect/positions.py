"""What the positions of a line are, from the codes alone: entropy, special positions, mutual information.

Letters: N lines, L positions, K codes, C classes of codes.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Integer

from smalti.errors import InputError
from smalti.inspect.clusters import k_means, leading_vectors

CONSTANT_SHARE = 0.999
"""A position whose commonest code takes at least this share of the lines is called constant."""
FOREIGN_KINSHIP = 0.15
"""A position whose codes are at home in less than this share of the other positions has codes of its own."""
_CONTEXT_WIDTH = 8  # leading correspondence-analysis coordinates kept of each code
_MAX_MERGED = 2048  # rarer codes than the first so many share one class


class PositionStatistics(NamedTuple):
    """One number for each of L positions."""

    entropy_nats: Float64[np.ndarray, " L"]
    """Of the code there, with Miller and Madow's correction for finite samples."""
    num_used: Int64[np.ndarray, " L"]
    top_code: Int64[np.ndarray, " L"]
    top_share: Float64[np.ndarray, " L"]
    kinship: Float64[np.ndarray, " L"]
    """Share of the other positions in which the position's codes are at home, that is, at least a tenth as frequent."""


class SpecialPosition(NamedTuple):
    """A position that is unlike a cell of a picture. `kind` is "constant" or "own codes"."""

    position: int
    kind: str
    top_code: int


class Explanation(NamedTuple):
    """A position whose value another property of the line tells."""

    position: int
    property: str
    share: float
    """Mutual information of the two over the position's entropy: 1 if the property tells the value exactly."""


def check_codes(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> None:
    """Raises InputError if there are too few lines to say anything, or a code is outside [0, vocab_size)."""
    if codes.ndim != 2 or codes.shape[0] < 2 or codes.shape[1] < 1:
        raise InputError(f"codes have the shape {codes.shape}; expected at least 2 lines of at least 1 code.")
    if codes.min() < 0 or codes.max() >= vocab_size:
        raise InputError(f"codes run from {codes.min()} to {codes.max()}; expected 0..{vocab_size - 1}.")


def position_counts(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> Int64[np.ndarray, "L K"]:
    """How often each code stands at each position."""
    L = codes.shape[1]
    flat = codes + np.arange(L) * vocab_size
    return np.bincount(flat.ravel(), minlength=L * vocab_size).reshape(L, vocab_size)


def position_statistics(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> PositionStatistics:
    """Entropy and usage by position. Raises InputError for a code out of range."""
    check_codes(codes, vocab_size)
    counts = position_counts(codes, vocab_size)
    shares = counts / len(codes)
    num_used = (counts > 0).sum(1)
    return PositionStatistics(
        entropy_nats=_entropy(shares) + (num_used - 1) / (2 * len(codes)),
        num_used=num_used,
        top_code=counts.argmax(1),
        top_share=shares.max(1),
        kinship=_kinship(shares),
    )


def _entropy(shares: Float64[np.ndarray, "... K"]) -> Float64[np.ndarray, "..."]:
    return -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(-1)


def _kinship(shares: Float64[np.ndarray, "L K"]) -> Float64[np.ndarray, " L"]:
    L = len(shares)
    found = np.zeros(L)
    ordered = np.sort(shares, axis=0)
    for code in np.flatnonzero(ordered[-1]):
        column = shares[:, code]
        num_home = L - np.searchsorted(ordered[:, code], column / 10, side="left") - 1  # itself not counted
        found += column * num_home
    return found / max(L - 1, 1)


def special_positions(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> list[SpecialPosition]:
    """Positions that do not look like cells: constant ones, and ones whose codes hardly occur elsewhere.

    A position that is constant with a code common elsewhere (an empty border) is not among them.
    """
    statistics = position_statistics(codes, vocab_size)
    found = []
    for position in np.flatnonzero(statistics.kinship < FOREIGN_KINSHIP).tolist():
        constant = statistics.top_share[position] >= CONSTANT_SHARE
        kind = "constant" if constant else "own codes"
        found.append(SpecialPosition(position, kind, int(statistics.top_code[position])))
    return found


def explain_by_counts(codes: Integer[np.ndarray, "N L"], vocab_size: int, positions: list[int]) -> list[Explanation]:
    """Which of the positions hold a count of something in the rest of the line: how many different codes it has, how
    often its commonest code stands in it, how many codes equal their left neighbour.

    A property counts if its mutual information with the position is at least half of the position's entropy.
    """
    check_codes(codes, vocab_size)
    rest = np.delete(codes, positions, axis=1)
    found = []
    for position in positions:
        values = np.unique(codes[:, position], return_inverse=True)[1].ravel()
        entropy = float(_entropy(np.bincount(values) / len(values)))
        if entropy < 0.05:  # a constant is explained by anything
            continue
        for name, property in _line_properties(rest).items():
            numbers = np.unique(property, return_inverse=True)[1].ravel()
            pair = np.stack([values, numbers], axis=1)
            share = mutual_information(pair, int(pair.max()) + 1)[0, 1] / entropy
            if share >= 0.5:
                found.append(Explanation(position, name, float(share)))
    return found


def positions_that_count(codes: Integer[np.ndarray, "N L"]) -> list[Explanation]:
    """Which positions, of all, hold a count of something in the line (see `explain_by_counts`). What is counted is
    taken of the whole line, so that no position need be suspected before; the position itself blurs it a little."""
    properties = {
        name: np.unique(property, return_inverse=True)[1].ravel() for name, property in _line_properties(codes).items()
    }
    found = []
    unrelated = np.random.default_rng(0).permutation(len(codes))
    for position in range(codes.shape[1]):
        values = np.unique(codes[:, position], return_inverse=True)[1].ravel()
        entropy = float(_entropy(np.bincount(values) / len(values)))
        if entropy < 0.05:
            continue
        for name, numbers in properties.items():
            share = (_joint_entropy(values, numbers[unrelated]) - _joint_entropy(values, numbers)) / entropy
            if share >= 0.5:
                found.append(Explanation(position, name, share))
                break
    return found


def _joint_entropy(first: Int64[np.ndarray, " N"], second: Int64[np.ndarray, " N"]) -> float:
    counts = np.bincount(first * (int(second.max()) + 1) + second)
    return float(_entropy(counts[counts > 0] / len(first)))


def _line_properties(rest: Integer[np.ndarray, "N M"]) -> dict[str, Int64[np.ndarray, " N"]]:
    if not rest.shape[1]:
        return {}
    ordered = np.sort(rest, axis=1)
    run = np.ones(len(rest), np.int64)
    longest = run.copy()
    for column in range(1, rest.shape[1]):
        run = np.where(ordered[:, column] == ordered[:, column - 1], run + 1, 1)
        longest = np.maximum(longest, run)
    return {
        "the number of different codes in the line": 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1),
        "how often the line's commonest code stands in it": longest,
        "how many codes equal the one before them": (rest[:, 1:] == rest[:, :-1]).sum(1),
    }


# ---- mutual information ----


def mutual_information(
    classes: Integer[np.ndarray, "N L"], num_classes: int, *, seed: int = 0
) -> Float64[np.ndarray, "L L"]:
    """Mutual information of every pair of positions in nats, the diagonal 0.

    The plug-in estimate minus the same of unrelated lines (one column's rows permuted), so that independent positions
    get 0 on average, however few lines there are. With many codes merge them first (`merge_codes`): merging can only
    lose information.
    """
    permuted = classes[np.random.default_rng(seed).permutation(len(classes))]
    information = _plug_in(classes, classes, num_classes) - _plug_in(classes, permuted, num_classes)
    information = (information + information.T) / 2
    np.fill_diagonal(information, 0.0)
    return information


def _plug_in(
    left: Integer[np.ndarray, "N L"], right: Integer[np.ndarray, "N L"], num_classes: int
) -> Float64[np.ndarray, "L L"]:
    """I(left column i; right column j), from the counts of pairs."""
    N, L = left.shape
    of_pair = num_classes**2
    block = max(1, min(L, 2**22 // of_pair))  # of columns counted at a time: bounds the memory
    found = np.zeros((L, L))
    marginals = position_counts(left, num_classes) / N
    entropy = _entropy(marginals)
    for start in range(0, L, block):
        chosen = right[:, start : start + block]
        offsets = np.arange(chosen.shape[1]) * of_pair
        for i in range(L):
            pairs = left[:, i, None] * num_classes + chosen + offsets
            counts = np.bincount(pairs.ravel(), minlength=chosen.shape[1] * of_pair)
            joint = _entropy(counts.reshape(-1, of_pair) / N)
            found[i, start : start + block] = entropy[i] + entropy[start : start + block] - joint
    return found


def merge_codes(
    codes: Integer[np.ndarray, "N L"], vocab_size: int, num_classes: int, *, seed: int = 0
) -> Int64[np.ndarray, " K"]:
    """A class in [0, num_classes) for each code, so that codes with the same company share one.

    The company of a code is what stands at the positions that tell most of each other: first those one or two places
    away in the line, then, in a second round, the pairs with the most mutual information under the first classes.
    Correspondence analysis of those pairs gives each code coordinates, k-means the classes.
    """
    check_codes(codes, vocab_size)
    counts = np.bincount(codes.ravel(), minlength=vocab_size)
    ranked = np.argsort(-counts, kind="stable")
    common = ranked[: min(_MAX_MERGED, int((counts > 0).sum()))]
    number = np.full(vocab_size, len(common), np.int64)  # the rest shares the last number
    number[common] = np.arange(len(common))
    if (number[codes] < num_classes).all():
        return np.minimum(number, num_classes - 1)
    numbered, num_numbers = number[codes], len(common) + 1
    L = codes.shape[1]
    pairs = [(i, i + lag) for lag in (1, 2) for i in range(L - lag)]
    merged = np.minimum(np.arange(num_numbers), num_classes - 1)
    for is_last in (False, True):
        coordinates, mass = _correspondence(numbered, pairs or [(0, 0)], num_numbers, seed)
        merged = k_means(coordinates, num_classes, weights=mass + 1e-12, num_starts=2, seed=seed)
        if not is_last:
            information = np.triu(mutual_information(merged[numbered], num_classes, seed=seed))
            strongest = np.argsort(-information, axis=None)[: 2 * L]
            pairs = [(int(place // L), int(place % L)) for place in strongest]
    return merged[number]


def _correspondence(
    numbered: Integer[np.ndarray, "N L"], pairs: list[tuple[int, int]], num_numbers: int, seed: int
) -> tuple[Float64[np.ndarray, "M E"], Float64[np.ndarray, " M"]]:
    """Each code's coordinates by correspondence analysis of the pairs, and its mass. The coordinates are the functions
    of two neighbours that correlate most (Hirschfeld 1935)."""
    table = np.zeros((num_numbers, num_numbers))
    for i, j in pairs:
        flat = numbered[:, i] * num_numbers + numbered[:, j]
        places, counts = np.unique(flat, return_counts=True)
        table[places // num_numbers, places % num_numbers] += counts
    table += table.T
    table /= table.sum()
    mass = table.sum(1)
    scale = np.sqrt(np.where(mass > 0, mass, 1.0))
    residual = (table - np.outer(mass, mass)) / np.outer(scale, scale)
    width = min(_CONTEXT_WIDTH, num_numbers - 1)
    left, values = leading_vectors(residual, width, seed=seed)
    return left * values / scale[:, None], mass
