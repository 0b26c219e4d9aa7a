"""A model of pre-tokenized lines as one object: what lines cost, and how prefixes may go on. No picture is needed.

    model = LineModel.load("out/lines/bundle")
    nll_nats = model.score(codes, lengths)
    completions = model.complete([torch.tensor([0, 152, 276])], CompleteConfig(strategy="sample"))

Letters: N lines, L codes of a line (what the model takes is `length`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti import bundle
from smalti.bounds import MAX_CANDIDATES
from smalti.engine.beam import beam_search
from smalti.engine.generate import Generated, Request, best_of, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.likelihood import to_device
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.models.loss import token_nll
from smalti.sequences.layout import Layout, SpanValues
from smalti.systems.line_presets import ORDER

KIND = "lines"
"""What the `config.json` of a bundle of lines has under "kind"."""
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


class LineModel:
    """A decoder-only model over the layout `<bos> image{length}`. `load` reads a bundle, `save` writes one.

    Raises ValueError where model and layout do not fit together.
    """

    def __init__(
        self,
        *,
        model: DecoderOnly,
        layout: Layout,
        figures: Mapping[str, Any] = {},
        name: str = "a bundle of lines",
    ):
        self.model, self.layout, self.figures, self.name = model.eval(), layout, dict(figures), name
        if model.config.vocab_size != layout.vocabulary.size:
            raise ValueError(
                f"the model's vocab_size is {model.config.vocab_size}, the layout says {layout.vocabulary.size}."
            )
        model.check_layout(layout)
        self.length = layout[ORDER].span("image").length
        self.vocab_size = layout.vocabulary["image"].size

    # Reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """A bundle of lines from its folder, or by a hub's `owner/name`.

        Raises InputError if there is none, it is of another kind, or a file of it is missing or damaged.
        """
        directory = bundle.find_bundle(name)
        config = bundle.read_config(directory)
        if config.get("kind") != KIND:
            found = config.get("kind", "pictures")
            raise InputError(f"{directory} is a bundle of {found}, not of lines: train one with smalti train lines.")
        path = directory / bundle.CONFIG
        with bundle.described_by(path):
            shape = DecoderOnlyConfig.from_dict(config["model"], f"{path}: model")
            model = bundle.load_module(lambda: DecoderOnly(shape), directory / bundle.WEIGHTS)
            layout = Layout.from_dict(config["layout"])
            return cls(model=model, layout=layout, figures=config["figures"], name=str(config["name"]))

    def save(self, directory: Path | str, *, half: bool = False, force: bool = False) -> None:
        """Writes the bundle as a folder, the weights in float16 if `half`; loaded, they are float32 again.

        Raises InputError if the folder exists and is not empty, unless `force`; then it must be a bundle.
        """

        def write_files(folder: Path) -> dict[str, Any]:
            bundle.save_weights(self.model.state_dict(), folder / bundle.WEIGHTS, half=half)
            (folder / bundle.CARD).write_text(self.card(), encoding="utf-8")
            return {
                "kind": KIND,
                "name": self.name,
                "smalti_version": version("smalti"),
                "layout": self.layout.to_dict(),
                "model": self.model.config.to_dict(),
                "figures": self.figures,
            }

        bundle.write_bundle(directory, write_files, force=force)

    def card(self) -> str:
        """The model card: what it is, how to use it, its measured figures."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.figures.items())
        figures = f"\n## Measured\n\n| | |\n|---|---|\n{rows}\n" if self.figures else ""
        return CARD.format(
            name=self.name,
            num_parameters=f"{self.model.num_parameters:,}",
            length=self.length,
            max_code=self.vocab_size - 1,
            figures=figures,
        )

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of all weights as they are in memory, in float32: the same however the bundle is stored."""
        return bundle.weights_sha256(self.model)

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
        packed = self.layout.pack(ORDER, {"image": SpanValues(whole, torch.full((N,), self.length))})
        used = type(packed)(*(tensor[:, : 1 + L] for tensor in packed))
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
            Request(order=ORDER, given={"image": prefix}, seed=config.seed + line * config.seeds_per_line)
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


def bundle_kind(name: str | Path) -> str:
    """What a bundle is of: "lines", "pictures" if `Pipeline` reads it, or what else its config names."""
    return bundle.read_config(bundle.find_bundle(name)).get("kind", "pictures")


CARD = """---
library_name: smalti
tags: [image-generation, autoregressive, discrete-tokens]
---
# {name}

A transformer of {num_parameters} parameters over lines of {length} picture codes in 0..{max_code}. There is no image
tokenizer: what the codes look like is not known.

## Use

    smalti score lines.txt --bundle THIS_FOLDER -o scores/
    smalti complete prefixes.txt --bundle THIS_FOLDER -o completed.txt
{figures}"""
