"""What a bundle of pre-tokenized lines does: tells what lines cost, and completes prefixes. No picture is needed.

    model = LineModel.load("out/lines/bundle")
    nll_nats = model.score(codes, lengths)
    completions = model.complete([torch.tensor([0, 152, 276])], CompleteConfig(strategy="sample"))

Letters: N lines, L codes of a line (what the model takes is `length`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.bounds import MAX_CANDIDATES
from smalti.bundle import Bundle
from smalti.engine.beam import beam_search
from smalti.engine.generate import Generated, Request, best_of, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.likelihood import to_device
from smalti.models.loss import token_nll
from smalti.sequences.layout import SpanValues
from smalti.tasks.face import Face

STRATEGIES = ("sample", "greedy", "beam", "best-of-n")


@dataclass(frozen=True, kw_only=True)
class CompleteConfig:
    """How lines are completed. `sample` draws; `greedy` takes the likeliest code each time; `beam` searches for the
    likeliest line; `best-of-n` draws several and keeps the one the model finds likeliest."""

    strategy: str = "sample"
    temperature: float = 0.9
    """Of `sample` and `best-of-n`, as are the next three (see `SampleConfig`). At 0.9 an independent model finds what
    is drawn about as likely as what is real, at 1 less likely (docs/lines.md)."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_candidates: int = 16
    """Lines that `best-of-n` draws for each prefix."""
    beam_width: int = 8
    """Lines that `beam` keeps in view for each prefix."""
    seed: int = 0
    """Candidate j of prefix i is drawn with the seed `seed + i · num_candidates + j` (`sample` has one candidate)."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        for name in ("num_candidates", "beam_width"):
            if not 1 <= getattr(self, name) <= MAX_CANDIDATES:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {MAX_CANDIDATES}.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0.")
        if self.strategy != "greedy" and self.temperature == 0:
            raise ValueError('temperature 0 draws nothing; give strategy "greedy", or a temperature above 0.')
        self.sampling  # noqa: B018 (checks the other fields)

    @property
    def sampling(self) -> SampleConfig:
        return SampleConfig(
            temperature=0.0 if self.strategy == "greedy" else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )

    @property
    def seeds_per_line(self) -> int:
        return self.num_candidates if self.strategy == "best-of-n" else 1


class Completions(NamedTuple):
    """Whole lines, in the order of their prefixes."""

    codes: Int[Tensor, "N L"]
    log_probs: Float[Tensor, " N"]
    """The model's own ln p of what was added, given the prefix; 0 where nothing was left to add."""


class LineModel(Face):
    """A bundle of lines, and what it does: scores and completes them. `load` reads one.

    Raises InputError for a bundle of anything else.
    """

    def __init__(self, bundle: Bundle):
        if not bundle.is_lines:
            raise InputError(
                f"{bundle.name} is a bundle of {bundle.kind}, not of lines: train one with smalti train lines."
            )
        super().__init__(bundle)
        self.order, self.length = bundle.order("image"), bundle.image_length
        self.vocab_size = bundle.layout.vocabulary["image"].size

    # Likelihood ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(
        self, codes: Int[Tensor, "N L"], lengths: Int[Tensor, " N"], *, batch_size: int = 256
    ) -> Float[Tensor, "N L"]:
        """−ln p(code | codes before it) of every code, in nats, in float64; 0 behind a line's end.

        Lines may be shorter than the model's. Raises ValueError for a longer one, or a code out of range.
        """
        self._check(codes, lengths)
        found = [
            self._score_batch(codes[start : start + batch_size], lengths[start : start + batch_size])
            for start in range(0, len(codes), batch_size)
        ]
        return torch.cat(found) if found else torch.zeros(codes.shape, dtype=torch.float64)

    def _score_batch(self, codes: Int[Tensor, "N L"], lengths: Int[Tensor, " N"]) -> Float[Tensor, "N L"]:
        N, L = codes.shape
        inside = torch.arange(L) < lengths[:, None]
        whole = torch.zeros(N, self.length, dtype=torch.long)
        whole[:, :L] = torch.where(inside, codes, 0)  # what stands behind the end does not reach what is before it
        packed = self.layout.pack(self.order, {"image": SpanValues(whole, torch.full((N,), self.length))})
        used = packed.map(lambda tensor: tensor[:, : 1 + L])
        nll = token_nll(self.model, to_device(used, self.model.device), self.layout.slots)
        return torch.where(inside, nll[:, 1:].double().cpu(), 0.0)

    def _check(self, codes: Int[Tensor, "N L"], lengths: Int[Tensor, " N"]) -> None:
        if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= min(self.length, codes.shape[1]):
            raise ValueError(
                f"lengths {int(lengths.min())} to {int(lengths.max())} for {codes.shape[1]} columns of codes; "
                f"lines of this model have up to {self.length} codes."
            )
        inside = torch.arange(codes.shape[1]) < lengths[:, None]
        wrong = (inside & ((codes < 0) | (codes >= self.vocab_size))).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(
                f"line {row}, code {column} is {int(codes[row, column])}; expected 0..{self.vocab_size - 1}."
            )

    # Completing ------------------------------------------------------------------------------------------------

    def complete(
        self,
        prefixes: Sequence[Int[Tensor, " l"]],
        config: CompleteConfig = CompleteConfig(),
        *,
        first_line: int = 0,
        batch_size: int = 256,
    ) -> Completions:
        """Each prefix, untouched, with what the model adds. Prefixes may have any lengths, also 0.

        `first_line` is the number of the first prefix among all that share a seed: a file may be completed piece by
        piece. Raises ValueError for a prefix too long, or a code out of range.
        """
        requests = [
            Request(order=self.order, given={"image": prefix}, seed=config.seed + line * config.seeds_per_line)
            for line, prefix in enumerate(prefixes, first_line)
        ]
        found = self._complete(requests, config, batch_size)
        codes = [sequence.spans["image"] for sequence in found]
        log_probs = torch.tensor([sequence.log_prob for sequence in found], dtype=torch.float64)
        return Completions(torch.stack(codes) if codes else torch.zeros(0, self.length, dtype=torch.long), log_probs)

    def _complete(self, requests: list[Request], config: CompleteConfig, batch_size: int) -> list[Generated]:
        if config.strategy in ("sample", "greedy"):
            return generate(self.model, self.layout, requests, config.sampling, batch_size=batch_size)
        if config.strategy == "beam":
            ranked = beam_search(self.model, self.layout, requests, config.beam_width, batch_size=batch_size)
        else:
            ranked = best_of(
                self.model, self.layout, requests, config.num_candidates, config.sampling, batch_size=batch_size
            )
        return [candidates[0] for candidates in ranked]
