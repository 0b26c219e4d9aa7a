"""Whether a bundle keeps what every bundle promises, tried on the bundle itself: `examine` gives a certificate.

Sequences are drawn of every order, from random conditions and up to a number of tokens, so that a large model is
examined in little time. What is compared agrees up to rounding: TOLERANCE times the largest logit, or 1.

Letters: T tokens of a sequence, n ids of a slot.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from smalti.bundle import LABEL, Bundle, smalti_version
from smalti.engine.engine import Engine
from smalti.engine.executors import executors_for, make_executor
from smalti.engine.sampling import SampleConfig
from smalti.errors import first_line
from smalti.models.base import Inputs
from smalti.models.decoder_only import DecoderOnly
from smalti.processor import instruction_set
from smalti.prompts import PromptTokenizer
from smalti.sequences.layout import Marker, Order, Slot, Span
from smalti.sequences.request import Request, TokenSequence
from smalti.sequences.vocabulary import FEATURES
from smalti.text_tokenizer import TextTokenizer

TOLERANCE = 2e-4
NUM_TOKENS = 64
GUIDED = SampleConfig(guidance_scale=2.0)
TITLE = "Certificate"


class Check(NamedTuple):
    """One promise, and whether it is kept."""

    name: str
    holds: bool
    found: str
    """What was seen, in words."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was examined, where, and what was found."""

    bundle: str
    weights_sha256: str
    date: str
    smalti: str
    torch: str
    processor: str
    num_tokens: int
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"checks": [check._asdict() for check in self.checks], "holds": self.holds}

    def table(self) -> Table:
        table = Table("", "check", "found", box=None)
        for check in self.checks:
            table.add_row("holds" if check.holds else "FAILS", check.name, check.found)
        return table

    def card_section(self) -> str:
        """For the model card."""
        rows = [f"| {check.name} | {'holds' if check.holds else '**fails**'}: {check.found} |" for check in self.checks]
        return "\n".join(
            [
                f"## {TITLE}\n",
                f"`smalti doctor`, {self.date}, smalti {self.smalti}, torch {self.torch}, {self.processor}; weights "
                f"sha256 `{self.weights_sha256}`.\n",
                "| | |\n|---|---|",
                *rows,
                "",
            ]
        )


class Drawn(NamedTuple):
    """What an engine drew of a request."""

    token_ids: list[int]
    log_probs: list[float]


def examine(bundle: Bundle, *, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Certificate:
    """Tries a bundle's promises on up to `num_tokens` tokens of a sequence. A check that raises an error does not hold,
    and says which."""
    doctor = _Doctor(bundle, num_tokens, seed)
    return Certificate(
        bundle=bundle.name,
        weights_sha256=bundle.weights_sha256,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        smalti=smalti_version(),
        torch=torch.__version__,
        processor=str(bundle.device) if bundle.device.type != "cpu" else instruction_set(),
        num_tokens=num_tokens,
        checks=tuple(_tried(name, check) for name, check in doctor.checks().items()),
    )


def _tried(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        with torch.inference_mode():
            return Check(name, *check())
    except (ValueError, RuntimeError, LookupError) as error:
        return Check(name, False, f"{type(error).__name__}: {first_line(error)}")


class _Doctor:
    def __init__(self, bundle: Bundle, num_tokens: int, seed: int):
        self.bundle, self.model, self.layout = bundle, bundle.model, bundle.layout
        self.num_tokens, self.seed = num_tokens, seed

    def checks(self) -> dict[str, Callable[[], tuple[bool, str]]]:
        found: dict[str, Callable[[], tuple[bool, str]]] = {
            "weights are finite": self.weights,
            "cached steps = whole sequences": self.cached,
            "nats = −Σ log-probs of what is drawn": self.nats,
            "drawn together = drawn alone": self.batched,
            "executors agree": self.executors,
            "same seed, same sequence": self.seeds,
        }
        if self.bundle.image_tokenizer is not None:
            found["image tokenizer: codes to pictures and back"] = self.image_tokenizer
        if isinstance(self.bundle.text_tokenizer, TextTokenizer):
            found["text tokenizer: words to ids and back"] = self.text_tokenizer
        if isinstance(self.bundle.text_tokenizer, PromptTokenizer):
            found["text tokenizer: prompts in their form"] = self.prompts
        return found

    # What is drawn ---------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> list[Request]:
        """Two of every order, from random conditions."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            self._request(order, number, generator)
            for order in self.layout.orders.values()
            for number in (self.seed, self.seed + 1)
        ]

    def _request(self, order: Order, seed: int, generator: torch.Generator) -> Request:
        """What is given is what has to be: what the model cannot predict, and where nothing else begins the sequence
        its first span."""
        given: dict[str, Int[Tensor, " L"]] = {}
        features = null = None
        for index, part in enumerate(order.parts):
            if isinstance(part, Marker):
                continue
            slot = self.layout.slots[self.layout.slot_index(order.name, index)]
            if part.segment == FEATURES:
                features = self._features(part, generator)
                null = Request(order=order.name, features=self._null_features(len(features)))
            elif index == 0 or not self.model.can_score(slot):
                given[part.segment] = self._ids(part, generator)
            else:
                break
        words = self.bundle.text_tokenizer
        if isinstance(words, PromptTokenizer) and "text" in given:
            null = Request(order=order.name, given={"text": torch.tensor(words.null_of(len(given["text"])))})
        if self.bundle.null_label is not None and LABEL in given:
            null = Request(order=order.name, given={LABEL: torch.tensor([self.bundle.null_label])})
        return Request(order=order.name, given=given, features=features, seed=seed, null=null)

    def _ids(self, span: Span, generator: torch.Generator) -> Int[Tensor, " L"]:
        length = span.length if span.end is None else min(3, span.length)
        size = self.layout.vocabulary[span.segment].size
        return torch.randint(size, (length,), generator=generator)

    def _features(self, span: Span, generator: torch.Generator) -> Float[Tensor, "n C"]:
        assert isinstance(self.model, DecoderOnly) and self.model.config.feature_width is not None
        return torch.randn(max(1, span.length // 2), self.model.config.feature_width, generator=generator)

    def _null_features(self, num_features: int) -> Float[Tensor, "n C"]:
        assert isinstance(self.model, DecoderOnly)
        return self.model.null_features(num_features)

    def _draw(
        self,
        requests: Sequence[Request],
        executor: str = "eager",
        config: SampleConfig = SampleConfig(),  # noqa: B008
    ) -> list[Drawn]:
        engine = Engine(self.model, self.layout, capacity=len(requests), executor=executor)
        drawn = [Drawn([], []) for _ in requests]
        for request in requests:
            engine.submit(request, config)
        for _ in range(self.num_tokens):
            if engine.is_idle:
                break
            for event in engine.step():
                drawn[event.ticket].token_ids.append(event.token_id)
                drawn[event.ticket].log_probs.append(event.log_prob)
        return drawn

    @cached_property
    def drawn(self) -> list[Drawn]:
        """Of every request, together."""
        return self._draw(self.requests)

    def _whole(self, request: Request, drawn: Drawn) -> list[int]:
        return TokenSequence(self.layout, request).token_ids + drawn.token_ids

    def _inputs(self, request: Request, token_ids: Sequence[int]) -> Inputs:
        """Whole sequences as the model reads them."""
        ids = torch.tensor([token_ids], device=self.model.device)
        if request.features is None:
            return Inputs(ids)
        assert isinstance(self.model, DecoderOnly)
        given, prefix = len(request.features), self.model.config.transformer.prefix_length
        features = ids.new_zeros(*ids.shape, request.features.shape[1], dtype=torch.float32)
        features[0, :given] = request.features
        positions = torch.arange(ids.shape[1], device=ids.device)[None] + prefix - given
        return Inputs(ids, positions, features=features)

    def _slots(self, request: Request, drawn: Drawn) -> list[tuple[int, Slot]]:
        """Each drawn token's position, and what could have stood there."""
        sequence, found = TokenSequence(self.layout, request), list[tuple[int, Slot]]()
        for token in drawn.token_ids:
            found.append((len(sequence.token_ids), self.layout.slots[sequence.plan().slot_ids[0]]))
            sequence.push(token)
        return found

    # What is promised ------------------------------------------------------------------------------------------

    def weights(self) -> tuple[bool, str]:
        parts = {"model": self.model, "image tokenizer": self.bundle.image_tokenizer}
        tensors = {
            f"{part}: {name}": tensor
            for part, module in parts.items()
            if module is not None
            for name, tensor in module.state_dict().items()
        }
        bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if bad:
            return False, f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity, the first {bad[0]}"
        return True, f"all {sum(tensor.numel() for tensor in tensors.values()):,} numbers of {len(tensors)} tensors"

    def cached(self) -> tuple[bool, str]:
        worst = 0.0
        for request, drawn in zip(self.requests, self.drawn, strict=True):
            token_ids = self._whole(request, drawn)[:-1]
            given = len(token_ids) - len(drawn.token_ids) + 1
            hidden = self.model.hidden(self._inputs(request, token_ids))[0]
            state = self.model.new_state(1, self.layout.max_length)
            state.begin(0, request.features)
            steps = [token_ids[:given], *([token] for token in token_ids[given:])]
            for number, ((_, slot), tokens) in enumerate(zip(self._slots(request, drawn), steps, strict=True)):
                new = self.model.extend(state, [0], torch.tensor([tokens], device=self.model.device))[0]
                if slot.size > 1:
                    whole = self.model.logits(hidden[given + number - 1], slot)
                    worst = max(worst, _apart(whole, self.model.logits(new, slot)))
        return worst <= TOLERANCE, f"logits agree within {worst:.1e}"

    def nats(self) -> tuple[bool, str]:
        worst, total, num_drawn = 0.0, 0.0, 0
        for request, drawn in zip(self.requests, self.drawn, strict=True):
            token_ids = self._whole(request, drawn)
            hidden = self.model.hidden(self._inputs(request, token_ids[:-1]))[0]
            for (position, slot), token, log_prob in zip(
                self._slots(request, drawn), drawn.token_ids, drawn.log_probs, strict=True
            ):
                scored = 0.0
                if slot.size > 1:
                    scores = self.model.logits(hidden[position - 1], slot).float().log_softmax(-1)
                    scored = float(scores[int(slot.local(torch.tensor(token)))])
                worst = max(worst, _difference(scored, log_prob))
                total, num_drawn = total - scored, num_drawn + (slot.size > 1)
        return worst <= 10 * TOLERANCE, f"{total / max(num_drawn, 1):.4f} nats a token, equal within {worst:.1e}"

    def batched(self) -> tuple[bool, str]:
        configs = [SampleConfig()] + ([GUIDED] if all(request.null for request in self.requests) else [])
        worst = 0.0
        for config in configs:
            for number, together in enumerate(self._draw(self.requests, config=config)):
                [alone] = self._draw([self.requests[number]], config=config)
                if together.token_ids != alone.token_ids:
                    return (
                        False,
                        f"sequence {number}, token {_first(together.token_ids, alone.token_ids)} is another one",
                    )
                worst = max([worst, *map(_difference, together.log_probs, alone.log_probs)])
        kinds = "guided and not, " if len(configs) > 1 else ""
        return worst <= 10 * TOLERANCE, f"{len(self.requests)} sequences, {kinds}log-probs within {worst:.1e}"

    def executors(self) -> tuple[bool, str]:
        apart = {}
        for name in executors_for(self.model):
            if name != "eager":
                apart[name] = max(
                    self._executor_apart(name, request, drawn)
                    for request, drawn in zip(self.requests, self.drawn, strict=True)
                )
        if not apart:
            return True, "eager alone takes this model"
        found = ", ".join(f"{name} within {worst:.1e}" for name, worst in apart.items())
        return all(worst <= TOLERANCE for worst in apart.values()), f"{found} of eager"

    def _executor_apart(self, name: str, request: Request, drawn: Drawn) -> float:
        token_ids = self._whole(request, drawn)
        given = len(token_ids) - len(drawn.token_ids)
        runs = []
        for one in (make_executor(self.model, name), make_executor(self.model, "eager")):
            state = one.new_state(1, self.layout.max_length)
            state.begin(0, request.features)
            rows = [token_ids[:given], *([token] for token in token_ids[given:-1])]
            hidden = [one.extend(state, [0], [tokens]) for tokens in rows]
            slots = [slot for _, slot in self._slots(request, drawn)]
            runs.append([one.logits(h, slot) for h, slot in zip(hidden, slots, strict=True) if slot.size > 1])
        return max(map(_apart, *runs))

    def seeds(self) -> tuple[bool, str]:
        again = self._draw(self.requests)
        if again != self.drawn:
            return False, "the same requests gave other tokens, or other log-probs"
        pairs = list(zip(self.drawn[::2], self.drawn[1::2], strict=True))
        differ = sum(one != other for one, other in pairs)
        return True, f"{len(self.drawn)} sequences twice, bit for bit; {differ} of {len(pairs)} pairs of seeds differ"

    def image_tokenizer(self) -> tuple[bool, str]:
        tokenizer, pictures = self.bundle.image_tokenizer, self.bundle.pictures
        assert pictures is not None
        generator = torch.Generator().manual_seed(self.seed)
        size = tokenizer.config.codebook_size
        codes = torch.randint(size, (2, *tokenizer.config.grid), generator=generator).to(self.bundle.device)
        images = tokenizer.decode_codes(codes)
        wanted = (2, 3, pictures.height, pictures.width)
        if tuple(images.shape) != wanted or not images.isfinite().all():
            return False, f"codes give {tuple(images.shape)}, expected finite images {wanted}"
        alone = torch.cat([tokenizer.decode_codes(one[None]) for one in codes])
        apart = float((alone - images).abs().max())
        back = tokenizer.encode_images(images.clamp(0, 1))
        if back.shape != codes.shape or int(back.min()) < 0 or int(back.max()) >= size:
            return False, f"pictures give codes {tuple(back.shape)} in {int(back.min())}..{int(back.max())}"
        again = tokenizer.encode_images(tokenizer.decode_codes(back).clamp(0, 1))
        kept = float((again == back).float().mean())
        holds = apart <= 10 * TOLERANCE
        return holds, f"decoded alone within {apart:.1e}; of a picture's own codes {kept:.0%} come back"

    def text_tokenizer(self) -> tuple[bool, str]:
        words = self.bundle.text_tokenizer
        assert isinstance(words, TextTokenizer)
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(words.vocab_size, (64,), generator=generator).tolist()
        text = words.decode(ids)
        again = words.decode(words.encode(text))
        return (
            again == text,
            f"text of {len(ids)} random pieces {'comes back' if again == text else 'comes back otherwise'}",
        )

    def prompts(self) -> tuple[bool, str]:
        words, prompt = self.bundle.text_tokenizer, "two red tiles beside a blue one"
        assert isinstance(words, PromptTokenizer)
        ids = words.encode(prompt)
        text, null = words.decode(ids), words.null_of(len(ids))
        alike = len(null) == (1 if words.form.filler is None else len(ids))
        holds = prompt in text and alike and null[0] == ids[0]
        return holds, f"{len(ids)} tokens, {text!r}; the null condition has {len(null)}"


def _apart(first: Float[Tensor, "... n"], second: Float[Tensor, "... n"]) -> float:
    """Largest difference of logits, as a share of the largest of them, or of 1; infinite where one is not finite."""
    apart = float((first - second).abs().max()) / max(1.0, float(first.abs().max()))
    return apart if apart == apart else float("inf")


def _difference(first: float, second: float) -> float:
    apart = abs(first - second) / max(1.0, abs(first))
    return apart if apart == apart else float("inf")


def _first(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def with_certificate(card: str, certificate: Certificate) -> str:
    """The card with the certificate as its last section, in place of an earlier one."""
    before = card.partition(f"\n## {TITLE}\n")[0].rstrip("\n")
    return f"{before}\n\n{certificate.card_section()}"


def as_json(certificate: Certificate) -> str:
    return json.dumps(certificate.to_dict(), indent=2, ensure_ascii=False)
