"""What the codes of a book are: how often and how clumped they come, where, beside what, and which replace each other.

Letters: N lines, L positions, K codes, h w grid, D width of an embedding, B batch, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer

from smalti.inspect.attention import hidden_by_batch
from smalti.inspect.clusters import k_means, principal_components
from smalti.inspect.grid import Grid
from smalti.inspect.positions import check_codes, position_counts
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Layout, Packed, Slot

PROJECTIONS = ("pca", "t-sne")


class CodeStatistics(NamedTuple):
    """One number for each of K codes."""

    num_occurrences: Int64[np.ndarray, " K"]
    num_lines: Int64[np.ndarray, " K"]
    """Lines that have the code."""
    burstiness: Float64[np.ndarray, " K"]
    """How often the code stands in a line that has it, over what is expected if each place drew its codes alone: 1 is
    chance, more is clumped (Church and Gale 1995 compare with a Poisson law; here each position keeps its own rate).
    NaN where the code does not occur."""


class CodePlaces(NamedTuple):
    """Where codes stand."""

    binding_nats: Float64[np.ndarray, " K"]
    """What a code tells of its position: ln L − H(position | code), corrected for few occurrences (Miller and Madow)
    and not below 0. 0: anywhere alike; ln L: at one position alone. NaN where the code does not occur."""
    top_position: Int64[np.ndarray, " K"]
    counts: Int64[np.ndarray, "K L"]


class Swap(NamedTuple):
    """Two codes that stand in for one another."""

    code: int
    other: int
    score: float


def code_statistics(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> CodeStatistics:
    """Frequency and burstiness. Raises InputError for a code out of range."""
    check_codes(codes, vocab_size)
    ordered = np.sort(codes, axis=1)
    is_first = np.ones(codes.shape, bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    count = np.bincount(codes.ravel(), minlength=vocab_size)
    num_lines = np.bincount(ordered[is_first], minlength=vocab_size)
    absent = np.zeros(vocab_size)  # ln of the chance that a line lacks the code, by the rates of its positions
    for rates in position_counts(codes, vocab_size) / len(codes):
        absent += np.log1p(-np.minimum(rates, 1 - 1e-12))
    expected_lines = -np.expm1(absent) * len(codes)
    with np.errstate(invalid="ignore"):
        burstiness = expected_lines / np.where(num_lines > 0, num_lines, np.nan)
    return CodeStatistics(count, num_lines, burstiness)


def code_places(codes: Integer[np.ndarray, "N L"], vocab_size: int) -> CodePlaces:
    """How bound to places codes are. Raises InputError for a code out of range."""
    check_codes(codes, vocab_size)
    counts = position_counts(codes, vocab_size).T  # (K, L)
    total = counts.sum(1)
    shares = counts / np.maximum(total, 1)[:, None]
    entropy = -np.where(counts > 0, shares * np.log(np.where(counts > 0, shares, 1.0)), 0.0).sum(1)
    entropy += ((counts > 0).sum(1) - 1) / np.maximum(2 * total, 1)
    binding = np.maximum(np.log(codes.shape[1]) - entropy, 0.0)
    return CodePlaces(np.where(total > 0, binding, np.nan), counts.argmax(1), counts)


def border_share(places: CodePlaces, grid: Grid) -> Float64[np.ndarray, " K"]:
    """Share of each code's occurrences inside the grid that lie on its border; NaN where it has none."""
    inside = places.counts[:, grid.positions.ravel()]
    border = np.ones((grid.rows, grid.columns), bool)
    border[1:-1, 1:-1] = False
    total = inside.sum(1)
    return inside[:, border.ravel()].sum(1) / np.where(total > 0, total, np.nan)


def border_and_inside(
    codes: Integer[np.ndarray, "N L"], vocab_size: int, grid: Grid
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """Each code's share of all cells on the grid's border, and of all cells inside it (NaN if there are none)."""
    counts = position_counts(codes, vocab_size)
    border = np.ones((grid.rows, grid.columns), bool)
    border[1:-1, 1:-1] = False
    shares = []
    for chosen in (grid.positions[border], grid.positions[~border]):
        num_cells = len(chosen) * len(codes)
        shares.append(counts[chosen].sum(0) / (num_cells or np.nan))
    return shares[0], shares[1]


def co_occurrence(
    codes: Integer[np.ndarray, "N L"], vocab_size: int, grid: Grid, *, down: int = 0, right: int = 1
) -> Int64[np.ndarray, "K K"]:
    """How often the second code stands so many rows below and columns right of the first."""
    check_codes(codes, vocab_size)
    neighbour = grid.neighbours(down, right)
    here = np.flatnonzero(neighbour >= 0)
    pairs = codes[:, here] * vocab_size + codes[:, neighbour[here]]
    return np.bincount(pairs.ravel(), minlength=vocab_size**2).reshape(vocab_size, vocab_size)


def attracted_pairs(table: Integer[np.ndarray, "K K"], *, num: int = 10) -> list[Swap]:
    """The pairs of a co-occurrence table most above chance: `score` is ln p(pair) − ln p(code) p(other), in nats, among
    pairs of different codes that occur at least 20 times."""
    total = table.sum()
    first, second = np.nonzero((table >= 20) & ~np.eye(len(table), dtype=bool))
    row, column = table.sum(1), table.sum(0)
    score = np.log(table[first, second] * total / (row[first] * column[second]))
    best = np.argsort(-score, kind="stable")[:num]
    return [Swap(int(first[i]), int(second[i]), float(score[i])) for i in best]


# ---- embeddings ----


def code_embeddings(model: DecoderOnly, layout: Layout) -> dict[str, Float64[np.ndarray, "K D"]]:
    """The rows of the codes in the model's "input" embedding and in its "output" head."""
    segment = layout.vocabulary["image"]
    ((start, end),) = model.head_rows(_codes(layout))
    tables = {"input": model.embed_tokens.weight[segment.offset : segment.end], "output": model.head_weight[start:end]}
    return {name: table.detach().double().cpu().numpy() for name, table in tables.items()}


def _codes(layout: Layout) -> Slot:
    segment = layout.vocabulary["image"]
    return Slot(((segment.offset, segment.end),))


def nearest_codes(
    embedding: Float64[np.ndarray, "K D"], chosen: Sequence[int], *, among: Sequence[int], num: int = 5
) -> dict[int, list[int]]:
    """For each chosen code the most alike by cosine, the likest first, among the given ones. The mean embedding is
    taken off before: what all codes share says nothing. Give only codes that occur: others were never trained."""
    centred = embedding - embedding[list(among)].mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    pool = np.array(list(among))
    found = {}
    for code in chosen:
        alike = unit[pool] @ unit[code]
        alike[pool == code] = -np.inf
        found[int(code)] = pool[np.argsort(-alike, kind="stable")[: min(num, len(pool) - 1)]].tolist()
    return found


def cluster_codes(
    embedding: Float64[np.ndarray, "K D"], codes: Sequence[int], num_clusters: int, *, seed: int = 0
) -> Int64[np.ndarray, " M"]:
    """A cluster in [0, num_clusters) for each of M codes, by k-means on directions."""
    rows = embedding[list(codes)]
    centred = rows - rows.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return k_means(unit, num_clusters, num_starts=4, seed=seed)


def project_codes(
    embedding: Float64[np.ndarray, "K D"], codes: Sequence[int], method: str = "pca", *, seed: int = 0
) -> Float64[np.ndarray, "M 2"]:
    """A point in the plane for each of M codes. Raises ValueError for a method that is none."""
    if method not in PROJECTIONS:
        raise ValueError(f"method {method!r} is unknown; choose one of {', '.join(PROJECTIONS)}.")
    rows = embedding[list(codes)]
    if method == "pca":
        return principal_components(rows)
    from sklearn.manifold import TSNE  # it takes longer to import than all of `clusters` to run

    perplexity = min(30.0, (len(rows) - 1) / 3)
    t_sne = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed, n_jobs=1)
    return t_sne.fit_transform(rows).astype(float)


# ---- codes that replace each other ----


def context_similarity(
    codes: Integer[np.ndarray, "N L"], vocab_size: int, grid: Grid | None = None
) -> Float64[np.ndarray, "K K"]:
    """How alike the company of two codes is: cosine of their neighbours' excess over chance, from −1 to 1; 0 for codes
    that do not occur. Neighbours are the four around on the grid; without one, the two before and behind in the line.
    """
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    line = grid or Grid(rows=1, columns=codes.shape[1])
    if grid is None:
        steps = [(0, 1), (0, -1), (0, 2), (0, -2)]
    profiles = []
    for down, right in steps:
        table = co_occurrence(codes, vocab_size, line, down=down, right=right).astype(float)
        expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
        profiles.append((table - expected) / np.sqrt(np.maximum(expected, 1.0)))
    profile = np.concatenate(profiles, axis=1).astype(np.float32)  # four times K by K: the product takes its time
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    unit = profile / np.where(length > 0, length, 1.0)
    return (unit @ unit.T).astype(float)


class PredictedInstead:
    """What the model holds possible in a code's place, added up batch by batch."""

    def __init__(self, model: DecoderOnly, layout: Layout) -> None:
        segment = layout.vocabulary["image"]
        self._model, self._layout = model, layout
        self._sums, self._count = torch.zeros(segment.size, segment.size), torch.zeros(segment.size)

    @torch.no_grad()
    def add(self, packed: Packed, hidden: Float[torch.Tensor, "B T_1 D"]) -> None:
        """Sequences, and their hidden states but for the last token's."""
        segment, targets = self._layout.vocabulary["image"], packed.token_ids[:, 1:]
        is_code = (targets >= segment.offset) & (targets < segment.end)
        logits = self._model.logits(hidden[is_code], _codes(self._layout))
        true = (targets[is_code] - segment.offset).cpu()
        self._sums.index_add_(0, true, logits.float().softmax(-1).cpu())
        self._count += torch.bincount(true, minlength=segment.size)

    def mean(self) -> Float[torch.Tensor, "K K"]:
        """Row c is the mean of p(· | the codes before) where the true code is c; zeros if it does not occur."""
        return self._sums.double() / self._count.clamp(min=1)[:, None]


def predicted_instead(
    model: DecoderOnly, layout: Layout, packed: Packed, *, batch_size: int = 64
) -> Float[torch.Tensor, "K K"]:
    """The mean of what the model holds possible in each code's place (`PredictedInstead`)."""
    found = PredictedInstead(model, layout)
    for part, hidden in hidden_by_batch(model, packed, batch_size=batch_size):
        found.add(part, hidden)
    return found.mean()


def swappable_codes(
    similarity: Float64[np.ndarray, "K K"],
    count: Integer[np.ndarray, " K"],
    instead: Float64[np.ndarray, "K K"] | None = None,
    *,
    num: int = 10,
    min_count: int = 20,
) -> list[Swap]:
    """The pairs of codes most exchangeable, the best first, each code in one pair at most.

    The score is the similarity of their contexts (`context_similarity`). With `instead` (`predicted_instead`) it is
    the mean of that and of how far the model expects each in the other's place: the geometric mean over both
    directions of p(other | code's place) / p(code | code's place), cut at 1.
    """
    pool = np.flatnonzero(count >= min_count)
    score = similarity[np.ix_(pool, pool)].copy()
    if instead is not None:
        rows = instead[np.ix_(pool, pool)]
        relative = np.minimum(rows / np.maximum(np.diag(rows)[:, None], 1e-12), 1.0)
        score = (score + np.sqrt(relative * relative.T)) / 2
    score[np.tril_indices(len(pool))] = -np.inf
    found: list[Swap] = []
    used: set[int] = set()
    for place in np.argsort(-score, axis=None)[: 40 * num]:
        i, j = divmod(int(place), len(pool))
        if i < j and not {i, j} & used:
            found.append(Swap(int(pool[i]), int(pool[j]), float(score[i, j])))
            used |= {i, j}
        if len(found) == num:
            break
    return found
