"""From continuous latents to codes and back: vector quantization, IBQ, FSQ and LFQ, and the health of a codebook.

Letters: E code width, K codebook entries, N vectors (all leading axes taken together). Channels are last.

- `VectorQuantizer`: the nearest of K learned vectors (VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937),
  with every common remedy against a codebook of which only a few entries are used.
- `IndexBackpropagationQuantizer`: the one of K learned vectors with the largest dot product (IBQ, Shi et al. 2024,
  arXiv:2412.02692).
- `FiniteScalarQuantizer`: rounding of a few bounded numbers (FSQ, Mentzer et al. 2023, arXiv:2309.15505).
- `LookupFreeQuantizer`: the signs of log2 K numbers (LFQ, Yu et al. 2023, arXiv:2310.05737).

All have `encode`, `lookup` and `forward`. Straight-through outputs are `code + (x - x.detach())`,
whose forward value is the code to the last bit; the usual `x + (code - x).detach()` is off by a rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smalti.bounds import MAX_SIZE, check_sizes

SEARCH_BYTES = 4 * 2**20
"""No (vectors x K) matrix beyond this many bytes is ever built, short of a single row. It fits a core's
cache: on one core the blocked search takes 0.4 times as long as one large product for 1,024 vectors and
16,384 entries of width 8."""
SEARCH_ROWS = 64
"""Vectors that are searched for together at least, where there are as many: of a larger codebook a block then holds
only some entries, so that it is read from memory once for them all and not once for every few."""


class Quantized(NamedTuple):
    """What a quantizer returns. The losses are means, already multiplied by their weights: add them up."""

    latents: Float[Tensor, "... E"]
    codes: Int[Tensor, "..."]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    entropy_loss: Float[Tensor, ""]

    @property
    def loss(self) -> Tensor:
        return self.codebook_loss + self.commitment_loss + self.entropy_loss


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """A codebook of `codebook_size` vectors of width `code_dim`, and how it learns.

    `update`: "gradient" trains the codebook by the codebook loss; "ema" moves each entry to the running mean
    of the latents it is given; "clustering" is "gradient" plus a pull of idle entries towards latents (CVQ,
    Zheng and Vedaldi 2023, arXiv:2307.15139). `kmeans_rounds` > 0 starts the codebook by that many Lloyd
    rounds on the first training batch. `restart_below` > 0 ("ema" only) puts an entry whose running count of
    latents per batch has fallen below it onto a random latent of the batch.

    The latents on which k-means starts and dead entries restart are drawn evenly, or with `new_entries`
    "squared_distance" in proportion to the squared distance from the nearest entry (k-means++, Arthur and
    Vassilvitskii 2007): rare latents far from all others then get an entry of their own, where an even draw spends
    nearly all entries on what is frequent.
    """

    codebook_size: int = 1024
    code_dim: int = 64
    update: Literal["gradient", "ema", "clustering"] = "ema"
    commitment_weight: float = 0.25
    ema_decay: float = 0.99
    kmeans_rounds: int = 0
    restart_below: float = 0.0
    l2_normalised: bool = False
    rotation_trick: bool = False
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    new_entries: Literal["squared_distance"] | None = None
    kind: Literal["vq"] = "vq"

    def __post_init__(self):
        check_sizes(self)
        _check_at_least(self, 1, "codebook_size", "code_dim")
        _check_at_least(self, 0, "commitment_weight", "kmeans_rounds", "restart_below", "entropy_weight")
        if self.update not in ("gradient", "ema", "clustering"):
            raise ValueError(f'update is {self.update!r}; use "gradient", "ema" or "clustering".')
        if self.new_entries not in (None, "squared_distance"):
            raise ValueError(f'new_entries is {self.new_entries!r}; use "squared_distance", or leave it out.')
        if self.new_entries and not (self.kmeans_rounds or self.restart_below):
            raise ValueError("new_entries places what kmeans_rounds or restart_below draw; set one of them above 0.")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, for example 0.99.")
        if self.restart_below and self.update != "ema":
            raise ValueError(
                f'restart_below needs update "ema", which keeps running counts; update is {self.update!r}.'
            )
        if not self.entropy_temperature > 0:
            raise ValueError(f"entropy_temperature is {self.entropy_temperature}; it must be above 0.")


class VectorQuantizer(nn.Module):
    """Each latent becomes the nearest entry of `codebook` (K, E), a parameter, or a buffer under "ema".

    With `l2_normalised`, latents and entries are compared and returned at unit length (ViT-VQGAN, Yu et al.
    2021, arXiv:2110.04627). The codebook changes only in `forward` in training mode. Under torch.distributed
    every process then makes the same change, computed from the vectors of all processes.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    running_usage: Tensor
    kmeans_done: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        K, E = config.codebook_size, config.code_dim
        codebook = torch.empty(K, E).uniform_(-1 / K, 1 / K)
        if config.l2_normalised:
            codebook = F.normalize(torch.randn(K, E), dim=-1)
        if config.update == "ema":
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_counts", torch.ones(K))
            self.register_buffer("ema_sums", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
        if config.update == "clustering":
            self.register_buffer("running_usage", torch.zeros(K))
        if config.kmeans_rounds:
            self.register_buffer("kmeans_done", torch.tensor(False))
        # A copy of the flag that can be read without waiting for the device.
        self._needs_kmeans = config.kmeans_rounds > 0
        self.register_load_state_dict_post_hook(VectorQuantizer._reread_kmeans_flag)

    @staticmethod
    def _reread_kmeans_flag(module: "VectorQuantizer", _incompatible_keys) -> None:
        module._needs_kmeans = module.config.kmeans_rounds > 0 and not bool(module.kmeans_done)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def encode(self, latents: Float[Tensor, "... E"]) -> Int[Tensor, "..."]:
        """The index in [0, K) of the entry nearest to each latent, by float32 Euclidean distance."""
        flat = self._comparable(latents.reshape(-1, self.config.code_dim))
        return nearest(flat, self._entries()).view(latents.shape[:-1])

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... E"]:
        """The entries of the given codes. Raises ValueError if one lies outside [0, K)."""
        check_codes(codes, self.config.codebook_size)
        return F.embedding(codes, self._entries())

    def forward(self, latents: Float[Tensor, "... E"]) -> Quantized:
        """The nearest entries, with gradients passed on to `latents`; in training mode the codebook learns.

        An "ema" codebook is updated after the lookup, so the returned latents are entries as they stood
        before.
        """
        config = self.config
        # Distances, running sums and losses in float32 also under autocast: in bf16 near codes become ties.
        with torch.autocast(latents.device.type, enabled=False):
            flat = self._comparable(latents.reshape(-1, config.code_dim))
            if self.training and self._needs_kmeans:
                self._start_by_kmeans(flat.detach())
            # A copy, because the backward pass needs the entries as they were before `_learn` moved them.
            entries = self._entries().clone()
            codes = nearest(flat, entries)
            chosen = F.embedding(codes, entries)

            zero = flat.new_zeros(())
            codebook_loss = zero if config.update == "ema" else F.mse_loss(chosen, flat.detach())
            commitment_loss = config.commitment_weight * F.mse_loss(flat, chosen.detach())
            entropy_loss = zero
            if config.entropy_weight:
                penalty = entropy_penalty(flat, entries, config.entropy_temperature)
                entropy_loss = config.entropy_weight * penalty
            through = rotate_onto(flat, chosen) if config.rotation_trick else straight_through(flat, chosen)
            if self.training:
                self._learn(flat.detach(), codes, chosen.detach())
        return Quantized(
            latents=through.view(latents.shape),
            codes=codes.view(latents.shape[:-1]),
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
        )

    def _entries(self) -> Tensor:
        return F.normalize(self.codebook, dim=-1) if self.config.l2_normalised else self.codebook

    def _comparable(self, flat: Tensor) -> Tensor:
        flat = flat.float()
        return F.normalize(flat, dim=-1) if self.config.l2_normalised else flat

    @torch.no_grad()
    def _learn(self, flat: Tensor, codes: Tensor, chosen: Tensor) -> None:
        if self.config.update == "gradient":
            return
        counts, sums = _sums_by_code(flat, codes, self.config.codebook_size)
        if self.config.update == "ema":
            self._move_to_running_means(counts, sums)
            if self.config.restart_below:
                self._restart_dead_entries(flat, chosen)
        else:
            self._pull_idle_entries(flat, counts)

    def _move_to_running_means(self, counts: Tensor, sums: Tensor) -> None:
        decay = self.config.ema_decay
        self.ema_counts.lerp_(counts, 1 - decay)
        self.ema_sums.lerp_(sums, 1 - decay)
        self.codebook.copy_(self.ema_sums / _smoothed(self.ema_counts)[:, None])
        if self.config.l2_normalised:
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))

    def _restart_dead_entries(self, flat: Tensor, chosen: Tensor) -> None:
        """Writes to every entry under a mask, so that no step waits to learn whether any entry is dead."""
        threshold = self.config.restart_below
        dead = self.ema_counts < threshold
        if self.config.new_entries == "squared_distance":
            newcomers = _draw_far_vectors(flat, (flat - chosen).square().sum(-1), self.config.codebook_size)
        else:
            newcomers = _draw_vectors(flat, self.config.codebook_size, distinct=False)
        self.codebook.copy_(torch.where(dead[:, None], newcomers, self.codebook))
        self.ema_sums.copy_(torch.where(dead[:, None], newcomers * threshold, self.ema_sums))
        self.ema_counts.clamp_(min=threshold)

    def _pull_idle_entries(self, flat: Tensor, counts: Tensor) -> None:
        """CVQ: entries hardly in use move towards the closest vector of the batch, those in use stay."""
        decay, K = 0.99, self.config.codebook_size
        self.running_usage.lerp_(counts / counts.sum(), 1 - decay)
        pull = torch.exp(-self.running_usage * K * 10 / (1 - decay) - 1e-3)[:, None]
        self.codebook.data.lerp_(_closest_vectors(flat, self._entries()), pull)

    @torch.no_grad()
    def _start_by_kmeans(self, flat: Tensor) -> None:
        K = self.config.codebook_size
        if self.config.new_entries == "squared_distance":
            centres = _draw_spread_vectors(flat, K)
        else:
            centres = _draw_vectors(flat, K, distinct=True)
        counts = flat.new_zeros(K)
        for _ in range(self.config.kmeans_rounds):
            counts, sums = _sums_by_code(flat, nearest(flat, centres), K)
            means = sums / counts.clamp(min=1)[:, None]
            if self.config.l2_normalised:
                means = F.normalize(means, dim=-1)
            centres = torch.where(counts[:, None] > 0, means, centres)
        self.codebook.data.copy_(centres)
        if self.config.update == "ema":
            self.ema_counts.copy_(counts)
            self.ema_sums.copy_(centres * counts[:, None])
        self.kmeans_done.fill_(True)
        self._needs_kmeans = False


def nearest(vectors: Float[Tensor, "N E"], entries: Float[Tensor, "K E"]) -> Int[Tensor, " N"]:
    """The index of the entry nearest to each vector, the first among equals.

    argmin |v - e|^2 = argmax v.e - |e|^2 / 2: one matrix product with the norms added in.
    """
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        entries = entries.float()
        return _largest(vectors, entries, -entries.square().sum(-1) / 2)


def largest_product(vectors: Float[Tensor, "N E"], entries: Float[Tensor, "K E"]) -> Int[Tensor, " N"]:
    """The index of the entry with the largest dot product with each vector, the first among equals. Neither is
    normalised: a longer entry is chosen more often."""
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        return _largest(vectors, entries.float(), entries.new_zeros(len(entries), dtype=torch.float32))


def _largest(vectors: Float[Tensor, "N E"], entries: Float[Tensor, "K E"], offsets: Float[Tensor, " K"]) -> Tensor:
    """(N,): the index of the largest v.e + offset, the first among equals. Products are taken in blocks of vectors and
    entries of at most `SEARCH_BYTES`, with a running maximum over the blocks of entries."""
    codes = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
    num_rows = min(len(vectors), max(SEARCH_ROWS, SEARCH_BYTES // (4 * len(entries)))) or 1
    columns = list(_blocks(len(entries), num_rows))
    for start in range(0, len(vectors), num_rows):
        rows = slice(start, start + num_rows)
        block = vectors[rows].float()
        if len(columns) == 1:
            codes[rows] = torch.addmm(offsets, block, entries.t()).argmax(-1)
            continue
        best, found = torch.addmm(offsets[columns[0]], block, entries[columns[0]].t()).max(-1)
        for part in columns[1:]:
            score, index = torch.addmm(offsets[part], block, entries[part].t()).max(-1)
            found = torch.where(score > best, index + part.start, found)
            best = torch.maximum(score, best)
        codes[rows] = found
    return codes


def straight_through(latents: Float[Tensor, "... E"], chosen: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """`chosen` to the last bit, with the gradient of the identity towards `latents`."""
    return chosen.detach() + (latents - latents.detach())


def rotate_onto(latents: Float[Tensor, "... E"], chosen: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """`chosen` to the last bit; the gradient is turned and scaled as the latent is onto its entry.

    The rotation trick (Fifty et al. 2024, arXiv:2410.06424, section 4.2): with unit vectors a of the latent
    and b of the entry and r = (a + b) / |a + b|, the output is |entry| / |latent| (x - 2 r r.x + 2 b a.x),
    where only x carries gradient.
    """
    with torch.no_grad():
        latent_norm = latents.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scale = chosen.norm(dim=-1, keepdim=True) / latent_norm
        a = latents / latent_norm
        b = F.normalize(chosen, dim=-1)
        r = F.normalize(a + b, dim=-1)
    turned = latents - 2 * r * (r * latents).sum(-1, keepdim=True) + 2 * b * (a * latents).sum(-1, keepdim=True)
    return straight_through(scale * turned, chosen)


def entropy_penalty(
    vectors: Float[Tensor, "N E"], entries: Float[Tensor, "K E"], temperature: float, *, by_product: bool = False
) -> Float[Tensor, ""]:
    """Mean entropy of each vector's soft assignment, less the entropy of the mean assignment, in nats.

    Assignments are softmax(-squared distance / temperature) (MaskGIT, Chang et al. 2022, arXiv:2202.04200), or
    `by_product` softmax(dot product / temperature).
    Low when each vector is near one entry and all entries are used. The (N, K) assignments are recomputed
    block by block in the backward pass instead of being kept. Each process uses its own vectors.
    """
    total_entropy = vectors.new_zeros(())
    total = vectors.new_zeros(len(entries))
    for rows in _blocks(len(vectors), len(entries)):
        entropy, assignments = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
            _assignment_sums, vectors[rows], entries, temperature, by_product, use_reentrant=False
        )
        total_entropy = total_entropy + entropy
        total = total + assignments
    return total_entropy / len(vectors) - _entropy(total / len(vectors))


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raises ValueError if a code lies outside [0, codebook_size)."""
    if codes.numel() == 0:
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        wrong = low if low < 0 else high
        raise ValueError(f"code {wrong} is outside the codebook: codes lie in 0..{codebook_size - 1}.")


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows such that a float32 block (rows, num_columns) takes at most `SEARCH_BYTES`."""
    step = max(1, SEARCH_BYTES // (4 * num_columns))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _assignment_sums(vectors: Tensor, entries: Tensor, temperature: float, by_product: bool) -> tuple[Tensor, Tensor]:
    if by_product:
        logits = vectors @ entries.t() / temperature
    else:
        # -|v - e|^2 = 2 v.e - |e|^2 - |v|^2, of which the last is the same for all entries and leaves softmax
        # alone.
        logits = torch.addmm(-entries.square().sum(-1), vectors, entries.t(), alpha=2.0) / temperature
    log_assignments = logits.log_softmax(-1)
    assignments = log_assignments.exp()
    return -(assignments * log_assignments).sum(), assignments.sum(0)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats; the floor keeps the gradient finite where an entry is never chosen."""
    return -(probabilities * probabilities.clamp(min=1e-5).log()).sum(-1)


def _smoothed(counts: Tensor) -> Tensor:
    """Counts with 1e-5 added to each and the same total: an entry never chosen must not divide by zero."""
    total, epsilon = counts.sum(), 1e-5
    return (counts + epsilon) / (total + len(counts) * epsilon) * total


def _sums_by_code(flat: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors have each code (K,), and their sums (K, E), over all processes."""
    counts = torch.bincount(codes, minlength=codebook_size).to(flat.dtype)
    sums = flat.new_zeros(codebook_size, flat.shape[-1]).index_add_(0, codes, flat)
    if _several_processes():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    return counts, sums


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _draw_vectors(flat: Tensor, num: int, *, distinct: bool) -> Tensor:
    """(num, E) vectors at random from the batch of all processes; `distinct` rows where there are enough.

    The first process draws for all, from its global generator, as a single process with the joined batch
    would.
    """
    total = sum(_sizes(flat))
    if distinct and total >= num:
        rows = torch.randperm(total, device=flat.device)[:num]
    else:
        rows = torch.randint(total, (num,), device=flat.device)
    return _rows_of_all(flat, rows)


def _draw_far_vectors(flat: Tensor, distances: Float[Tensor, " N"], num: int) -> Tensor:
    """(num, E) vectors of the batch of all processes, each drawn with probability in proportion to its (squared)
    distance; evenly if all are 0. The first process draws for all."""
    weights = _joined(distances).double()
    # An inverse of the cumulative sum: torch.multinomial takes no more than 2^24 weights.
    cumulative = weights.cumsum(0) if weights.sum() > 0 else torch.ones_like(weights).cumsum(0)
    drawn = torch.rand(num, dtype=torch.double, device=flat.device) * cumulative[-1]
    rows = torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(weights) - 1)
    return _rows_of_all(flat, rows)


def _draw_spread_vectors(flat: Tensor, num: int) -> Tensor:
    """(num, E) vectors of the batch of all processes by k-means++: the first at random, each further one in
    proportion to its squared distance from the nearest one drawn so far."""
    drawn = _draw_vectors(flat, 1, distinct=True)
    distances = (flat - drawn).square().sum(-1)
    for _ in range(num - 1):
        newcomer = _draw_far_vectors(flat, distances, 1)
        distances = torch.minimum(distances, (flat - newcomer).square().sum(-1))
        drawn = torch.cat([drawn, newcomer])
    return drawn


def _sizes(flat: Tensor) -> list[int]:
    """How many vectors each process has."""
    if not _several_processes():
        return [len(flat)]
    sizes = [torch.zeros((), dtype=torch.long, device=flat.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(flat), device=flat.device))
    return [int(size) for size in sizes]


def _joined(values: Float[Tensor, " N"]) -> Tensor:
    """The values of all processes one after the other, on each of them."""
    if not _several_processes():
        return values
    sizes = _sizes(values)
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _rows_of_all(flat: Tensor, rows: Int[Tensor, " n"]) -> Tensor:
    """(n, E) vectors of the batch of all processes, by the row numbers that the first process drew."""
    if not _several_processes():
        return flat[rows]
    first = sum(_sizes(flat)[: dist.get_rank()])
    dist.broadcast(rows, src=0)
    here = (rows >= first) & (rows < first + len(flat))
    drawn = flat[(rows - first).clamp(0, len(flat) - 1)] * here[:, None]
    dist.all_reduce(drawn)  # each row is non-zero on one process only
    return drawn


def _closest_vectors(flat: Tensor, entries: Tensor) -> Tensor:
    """(K, E): for each entry the closest vector of the batch of all processes."""
    closest = flat[nearest(entries, flat)]
    if not _several_processes():
        return closest
    distances = (closest - entries).square().sum(-1)
    every_distance = [torch.empty_like(distances) for _ in range(dist.get_world_size())]
    every_closest = [torch.empty_like(closest) for _ in range(dist.get_world_size())]
    dist.all_gather(every_distance, distances)
    dist.all_gather(every_closest, closest)
    winner = torch.stack(every_distance).argmin(0)
    return torch.stack(every_closest)[winner, torch.arange(len(entries), device=flat.device)]


def _check_at_least(config, least: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class IBQConfig:
    """A codebook of `codebook_size` vectors of width `code_dim`, of which the one with the largest dot product is
    chosen.

    `codebook_weight` is that of the squared distance which moves entries towards their latents alone. `entropy_weight`
    times (mean entropy per latent - entropy of the mean) is added to the loss, of softmax(products /
    entropy_temperature); the published models have 0.05.
    """

    codebook_size: int = 1024
    code_dim: int = 256
    codebook_weight: float = 0.25
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    kind: Literal["ibq"] = "ibq"

    def __post_init__(self):
        check_sizes(self)
        _check_at_least(self, 1, "codebook_size", "code_dim")
        _check_at_least(self, 0, "codebook_weight", "entropy_weight")
        if not self.entropy_temperature > 0:
            raise ValueError(f"entropy_temperature is {self.entropy_temperature}; it must be above 0.")


class IndexBackpropagationQuantizer(nn.Module):
    """Each latent becomes the entry of `codebook` (K, E) with the largest dot product, neither being normalised.

    Gradients pass through the choice as through softmax(products) over all entries, so that every entry learns at every
    step and not only those that were chosen (SEED-Voken, src/IBQ/modules/vqvae/quantize.py).
    """

    def __init__(self, config: IBQConfig):
        super().__init__()
        self.config = config
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def encode(self, latents: Float[Tensor, "... E"]) -> Int[Tensor, "..."]:
        """The index in [0, K) of the entry with the largest float32 dot product with each latent."""
        return largest_product(latents.reshape(-1, self.config.code_dim), self.codebook).view(latents.shape[:-1])

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... E"]:
        """The entries of the given codes. Raises ValueError if one lies outside [0, K)."""
        check_codes(codes, self.config.codebook_size)
        return F.embedding(codes, self.codebook)

    def forward(self, latents: Float[Tensor, "... E"]) -> Quantized:
        """The chosen entries, with gradients through the choice to `latents` and to the whole codebook."""
        config = self.config
        with torch.autocast(latents.device.type, enabled=False):
            flat, entries = latents.float().reshape(-1, config.code_dim), self.codebook.float()
            codes = largest_product(flat, entries)
            chosen = F.embedding(codes, entries)
            through = chosen
            if torch.is_grad_enabled():
                expected = _expected_entries(flat, entries)
                through = chosen + (expected - expected.detach())
            # Both ways through the choice, then each side alone.
            codebook_loss = F.mse_loss(through, flat) + config.codebook_weight * F.mse_loss(chosen, flat.detach())
            commitment_loss = F.mse_loss(flat, chosen.detach())
            entropy_loss = flat.new_zeros(())
            if config.entropy_weight:
                penalty = entropy_penalty(flat, entries, config.entropy_temperature, by_product=True)
                entropy_loss = config.entropy_weight * penalty
        return Quantized(
            latents=through.view(latents.shape),
            codes=codes.view(latents.shape[:-1]),
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
        )


def _expected_entries(vectors: Float[Tensor, "N E"], entries: Float[Tensor, "K E"]) -> Float[Tensor, "N E"]:
    """The mean of the entries under softmax(products), with gradients through the shares alone; (N, K) shares are
    computed block by block, and again in the backward pass."""
    means = [
        checkpoint(_soft_means, vectors[rows], entries, use_reentrant=False)
        for rows in _blocks(len(vectors), len(entries))
    ]
    return torch.cat(means) if means else vectors  # pyright: ignore[reportArgumentType, reportCallIssue]


def _soft_means(vectors: Tensor, entries: Tensor) -> Tensor:
    return (vectors @ entries.t()).softmax(-1) @ entries.detach()


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """A fixed codebook: the grid of `levels[j]` values in each of len(levels) numbers.

    Levels of at least 5 work best (arXiv:2309.15505, section 3.2); (8, 5, 5, 5) stands in for a codebook of
    1,024.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    kind: Literal["fsq"] = "fsq"

    def __post_init__(self):
        check_sizes(self)
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels is {self.levels}; give at least one number, each at least 2.")
        if self.codebook_size > MAX_SIZE:
            raise ValueError(f"levels {self.levels} make {self.codebook_size} codes; at most {MAX_SIZE} are possible.")

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def code_dim(self) -> int:
        return len(self.levels)


class FiniteScalarQuantizer(nn.Module):
    """Bounds each of E numbers to its L levels and rounds it; no codebook and no losses (all are zero).

    The value of level r = 0..L-1 is (r - floor(L / 2)) / floor(L / 2), in [-1, 1]; even levels reach -1 and
    stop short of 1. The code counts the first number fastest: sum over j of r_j times the product of the
    levels before j.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config = config
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", levels.cumprod(0) // levels, persistent=False)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def encode(self, latents: Float[Tensor, "... E"]) -> Int[Tensor, "..."]:
        """The code in [0, K) of each latent."""
        return self._codes(self._bounded(latents).round())

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... E"]:
        """The grid points of the given codes. Raises ValueError if one lies outside [0, K)."""
        check_codes(codes, self.config.codebook_size)
        half = self.levels // 2
        return ((codes[..., None] // self.strides) % self.levels - half) / half

    def forward(self, latents: Float[Tensor, "... E"]) -> Quantized:
        """The grid points, with the gradient of the bounding (not of the rounding) towards `latents`."""
        bounded = self._bounded(latents)
        rounded = bounded.round()
        zero = bounded.new_zeros(())
        return Quantized(
            latents=straight_through(bounded, rounded) / (self.levels // 2),
            codes=self._codes(rounded),
            codebook_loss=zero,
            commitment_loss=zero,
            entropy_loss=zero,
        )

    def _bounded(self, latents: Tensor) -> Tensor:
        """Latents squashed so that rounding gives the integers -floor(L/2) .. L-1-floor(L/2)."""
        # The factor 1.001 keeps the outermost levels reachable; the shift centres 0 between levels when L is
        # even.
        half_range = (self.levels - 1) * 1.001 / 2
        offset = 0.5 * (self.levels % 2 == 0)
        shift = torch.atanh(offset / half_range)
        return torch.tanh(latents.float() + shift) * half_range - offset

    def _codes(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.levels // 2) * self.strides).sum(-1)


@dataclass(frozen=True, kw_only=True)
class LFQConfig:
    """A fixed codebook of the 2^`num_bits` corners of a cube.

    `entropy_weight` times (mean entropy per vector - `diversity` x entropy of the mean) is added to the loss,
    of soft assignments at the given inverse temperature.
    """

    num_bits: int = 10
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    diversity: float = 1.0
    inverse_temperature: float = 100.0
    kind: Literal["lfq"] = "lfq"

    def __post_init__(self):
        _check_at_least(self, 1, "num_bits")
        if self.num_bits > 31:
            raise ValueError(f"num_bits is {self.num_bits}; at most 31 are possible.")
        _check_at_least(self, 0, "commitment_weight", "entropy_weight", "diversity", "inverse_temperature")

    @property
    def codebook_size(self) -> int:
        return 2**self.num_bits

    @property
    def code_dim(self) -> int:
        return self.num_bits


class LookupFreeQuantizer(nn.Module):
    """Each of E = log2 K numbers becomes its sign, -1 or 1; the code is the sum of 2^j over the positive
    numbers j."""

    bit_values: Tensor

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.config = config
        self.register_buffer("bit_values", 2 ** torch.arange(config.num_bits), persistent=False)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def encode(self, latents: Float[Tensor, "... E"]) -> Int[Tensor, "..."]:
        """The code in [0, K) of each latent; zero counts as negative."""
        return ((latents > 0) * self.bit_values).sum(-1)

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... E"]:
        """The corners of the given codes. Raises ValueError if one lies outside [0, K)."""
        check_codes(codes, self.config.codebook_size)
        return (codes[..., None] & self.bit_values != 0).float() * 2 - 1

    def forward(self, latents: Float[Tensor, "... E"]) -> Quantized:
        """The corners, with gradients passed straight through."""
        config = self.config
        with torch.autocast(latents.device.type, enabled=False):
            flat = latents.float().reshape(-1, config.num_bits)
            codes = self.encode(flat)
            corners = self.lookup(codes)
            zero = flat.new_zeros(())
            entropy_loss = zero
            if config.entropy_weight:
                entropy_loss = config.entropy_weight * self._entropy_penalty(flat)
            commitment_loss = config.commitment_weight * F.mse_loss(flat, corners)
            through = straight_through(flat, corners)
        return Quantized(
            latents=through.view(latents.shape),
            codes=codes.view(latents.shape[:-1]),
            codebook_loss=zero,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
        )

    def _entropy_penalty(self, flat: Tensor) -> Tensor:
        """softmax(2 inverse_temperature x.corner) over all corners is a product over the bits, so the entropy
        of one vector is a sum of binary entropies; only the mean over vectors needs all K corners, in blocks
        of vectors."""
        bit_logits = 4 * self.config.inverse_temperature * flat
        p = torch.sigmoid(bit_logits)
        # H = -p log p - (1-p) log (1-p), written so that neither logarithm meets a zero.
        per_vector = (F.softplus(bit_logits) - p * bit_logits).sum(-1).mean()
        total = flat.new_zeros(self.config.codebook_size)
        for rows in _blocks(len(flat), self.config.codebook_size):
            total = total + checkpoint(_corner_assignments, p[rows], use_reentrant=False)
        return per_vector - self.config.diversity * _entropy(total / len(flat))


def _corner_assignments(p: Tensor) -> Tensor:
    """(2^E,): how much of the vectors, with probabilities p (N, E) of their bits being set, falls to each
    corner."""
    joint = p.new_ones(len(p), 1)
    for bit in p.t():
        joint = torch.cat([joint * (1 - bit)[:, None], joint * bit[:, None]], dim=1)
    return joint.sum(0)


AnyQuantizerConfig = Annotated[QuantizerConfig | IBQConfig | FSQConfig | LFQConfig, Field(discriminator="kind")]
"""Read from JSON or YAML, `kind` says which."""


def make_quantizer(
    config: QuantizerConfig | IBQConfig | FSQConfig | LFQConfig,
) -> VectorQuantizer | IndexBackpropagationQuantizer | FiniteScalarQuantizer | LookupFreeQuantizer:
    """The quantizer that a config describes."""
    if isinstance(config, IBQConfig):
        return IndexBackpropagationQuantizer(config)
    if isinstance(config, FSQConfig):
        return FiniteScalarQuantizer(config)
    if isinstance(config, LFQConfig):
        return LookupFreeQuantizer(config)
    return VectorQuantizer(config)


class HealthReport(NamedTuple):
    """`usage` is the share of entries seen in the window, `perplexity` = exp of the entropy of their shares
    (between 1 and K), `dead_codes` the number of entries not seen, `num_codes` how many codes the window
    holds."""

    usage: float
    perplexity: float
    dead_codes: int
    num_codes: int


class CodebookHealth:
    """Usage, perplexity and dead codes over the last `window` codes. `update` never waits for the device.

    A window much longer than the codebook is needed to call an entry dead: with K = 1,024 entries in even
    use, 8,192 codes miss none of them in about 7 of 10 windows.
    """

    def __init__(self, codebook_size: int, window: int = 65_536):
        if window < 1:
            raise ValueError(f"window is {window}; it must hold at least 1 code.")
        self.codebook_size = codebook_size
        self._recent = torch.zeros(window, dtype=torch.long)
        self._num_seen = 0

    def update(self, codes: Int[Tensor, "..."]) -> None:
        codes = codes.detach().flatten()
        window = len(self._recent)
        self._recent = self._recent.to(codes.device)
        self._num_seen += len(codes) - len(codes[-window:])
        codes = codes[-window:]
        places = torch.arange(self._num_seen, self._num_seen + len(codes), device=codes.device) % window
        self._recent[places] = codes
        self._num_seen += len(codes)

    def report(self) -> HealthReport:
        """Raises ValueError before the first update."""
        num_codes = min(self._num_seen, len(self._recent))
        if num_codes == 0:
            raise ValueError("no codes were seen yet; call update first.")
        counts = torch.bincount(self._recent[:num_codes], minlength=self.codebook_size)
        shares = counts.double() / num_codes
        used = int((counts > 0).sum())
        return HealthReport(
            usage=used / self.codebook_size,
            perplexity=float(torch.special.entr(shares).sum().exp()),
            dead_codes=self.codebook_size - used,
            num_codes=num_codes,
        )
