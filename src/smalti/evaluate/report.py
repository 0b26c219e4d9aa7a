"""All that is measured of a bundle of digits, as one table: likelihood, obedience to prompts, captions, pairs, codes.

Every row has its unit and standard error: over sequences for nats, binomial for shares. Letters: N pairs.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from rich.table import Table
from torch import Tensor

from smalti.data.digits import LEVEL_STEP, PICTURE_SIZE, images_to_levels, levels_to_images, parse_caption, source_of
from smalti.data.pairs import PairTable
from smalti.documents import read_json
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.evaluate.digits import (
    DigitClassifier,
    Rate,
    binomial_rate,
    caption_accuracy,
    judge_pictures,
    load_digit_classifier,
    prompt_accuracy,
    shipped_classifier,
)
from smalti.files import new_file, refuse_existing
from smalti.likelihood import Likelihood, evaluate_nll
from smalti.progress import stage
from smalti.sequences.layout import Packed, SpanValues
from smalti.tasks.images import LIKELIHOODS, Pipeline

REPORT_FILES = ("report.json", "report.md")
_PICTURES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much is measured; fewer pairs are taken where the test table holds fewer."""

    num_prompts: int = 1000
    num_captions: int = 1000
    num_pairs: int = 1000
    best_of: tuple[int, ...] = (1, 4, 16)
    """Candidates drawn at temperature 1 without guidance, of which reranking keeps one; () measures none."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_captions", "num_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if any(n < 1 for n in self.best_of):
            raise ValueError(f"best_of is {self.best_of}; each must be at least 1.")


class Row(NamedTuple):
    """One figure. A share is in [0, 1]."""

    part: str
    figure: str
    value: float
    standard_error: float | None
    unit: str
    num: int
    """How many tokens, pictures or captions it was measured over."""

    def text(self) -> str:
        """Value and standard error, shares in percent."""
        scale, unit = (100, " %") if self.unit == "share" else (1, f" {self.unit}" if self.unit else "")
        digits = 1 if self.unit == "share" or abs(self.value) >= 100 else 3
        error = "" if self.standard_error is None else f" ± {self.standard_error * scale:.{digits}f}"
        return f"{self.value * scale:.{digits}f}{error}{unit}"


@dataclass(frozen=True, kw_only=True)
class Report:
    rows: list[Row]
    bundle: str
    weights_sha256: str
    data: str
    config: ReportConfig
    command: str
    """What to run to get the same figures."""
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row._asdict() for row in self.rows]}

    def table(self) -> Table:
        """For the terminal."""
        table = Table("", "figure", "value", "measured over", title=f"{self.bundle} on {self.data}")
        for previous, row in zip([None, *self.rows], self.rows, strict=False):
            new_part = previous is None or previous.part != row.part
            if new_part and previous is not None:
                table.add_section()
            table.add_row(row.part if new_part else "", row.figure, row.text(), f"{row.num:,}")
        return table

    def markdown(self) -> str:
        figures = [row.figure.replace("|", "\\|") for row in self.rows]  # as in p(picture | caption)
        cells = zip(self.rows, figures, strict=True)
        lines = [f"| {row.part} | {figure} | {row.text()} | {row.num:,} |" for row, figure in cells]
        return (
            f"# What {self.bundle} learned\n\nMeasured on {self.data} in {self.elapsed_s:.0f} s by\n\n"
            f"    {self.command}\n\nwith the weights {self.weights_sha256[:16]}. ± is one standard error.\n\n"
            "| part | figure | value | measured over |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
        )

    def figures(self) -> dict[str, str]:
        """The rows as a bundle's `config.json` and model card hold them."""
        return {f"{row.part}: {row.figure}": row.text() for row in self.rows}

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes `report.json` and `report.md`. Raises InputError if one exists, unless `force`."""
        paths = [Path(directory) / name for name in REPORT_FILES]
        refuse_existing(paths, force=force)
        contents = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", self.markdown())
        for path, content in zip(paths, contents, strict=True):
            with new_file(path, force=force) as temporary:
                temporary.write_text(content, encoding="utf-8")


class HeldOut(NamedTuple):
    """Pictures the model has not seen, as levels 0..3, with their captions."""

    pictures: UInt8[np.ndarray, "N 28 28 3"]
    captions: list[str]
    source: str
    """The table's name."""
    digits: str | None = None
    """Where the digits come from, as `smalti.data.digits.source_of` says."""


def find_report(directory: Path, weights_sha256: str, config: ReportConfig) -> Report | None:
    """The report in a folder, if there is one of these weights, measured as `config` says."""
    try:
        content = read_json(directory / REPORT_FILES[0], "it is made anew")
        rows = [Row(**row) for row in content.pop("rows")]
        given = content.pop("config")
        report = Report(rows=rows, config=ReportConfig(**{**given, "best_of": tuple(given["best_of"])}), **content)
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that another version wrote
        return None
    return report if report.weights_sha256 == weights_sha256 and report.config == config else None


def read_held_out(path: Path | str) -> HeldOut:
    """The pairs of a parquet table of digits, or of the `test.parquet` in a folder. Raises InputError naming the row
    where a picture is not one of 28×28 with values 0, 85, 170 and 255."""
    table = Path(path) / "test.parquet" if Path(path).is_dir() else Path(path)
    pairs = PairTable(table).read()
    levels, rest = np.divmod(pairs.pictures, LEVEL_STEP)
    wrong = (rest > 0).any(axis=(1, 2, 3))
    if pairs.pictures.shape[1:3] != (PICTURE_SIZE, PICTURE_SIZE) or wrong.any():
        raise InputError(
            f"{table}: row {int(wrong.argmax())}: expected a picture of {PICTURE_SIZE}×{PICTURE_SIZE} pixels with "
            f"values 0, {LEVEL_STEP}, {2 * LEVEL_STEP} and {3 * LEVEL_STEP}, as smalti data digits writes them."
        )
    return HeldOut(levels.astype(np.uint8), pairs.captions, table.name, source_of(table))


def evaluate_digits(
    pipe: Pipeline,
    pairs: HeldOut,
    config: ReportConfig = ReportConfig(),
    *,
    classifier: DigitClassifier | None = None,
    command: str = "",
    show_progress: bool = True,
) -> Report:
    """Measures a bundle of coloured digits. `classifier` reads digits; by default the shipped one for their source."""
    if not pairs.captions:
        raise InputError(f"{pairs.source} holds no pictures to measure with.")
    if (pipe.pictures.height, pipe.pictures.width) != pairs.pictures.shape[1:3]:
        raise InputError(
            f"{pipe.name} draws pictures of {pipe.pictures.width}×{pipe.pictures.height}, and this measures bundles of "
            f"coloured digits of 28×28; others are measured by: smalti evaluate compositions."
        )
    _check_captions(pipe, pairs)
    started_at = time.perf_counter()
    judge = classifier or load_digit_classifier(shipped_classifier(pairs.digits))
    with stage("encoding pictures", show=show_progress):
        codes = pipe.encode_images(levels_to_images(pairs.pictures), batch_size=_PICTURES_AT_ONCE)
    rows = []
    for part, measure in (
        ("likelihood", lambda _: _likelihood_rows(pipe, codes, pairs.captions)),
        (
            "prompts",
            lambda advance: _prompt_rows(pipe, pairs.captions[: config.num_prompts], config, judge, advance),
        ),
        ("captions", lambda _: _caption_rows(pipe, codes[: config.num_captions], pairs.captions)),
        ("pairs from nothing", lambda advance: _pair_rows(pipe, config, judge, advance)),
        ("best of n", lambda advance: _best_of_rows(pipe, pairs.captions, config, judge, advance)),
        ("image tokenizer", lambda _: _reconstruction_rows(pipe, codes, pairs, judge)),
    ):
        with stage(f"measuring {part}", 1, unit="", show=show_progress) as progress:
            rows += measure(progress.update)
    return Report(
        rows=rows,
        bundle=pipe.name,
        weights_sha256=pipe.weights_sha256,
        data=f"{len(pairs.captions):,} pairs of {pairs.source}",
        config=config,
        command=command,
        elapsed_s=round(time.perf_counter() - started_at, 1),
    )


def _check_captions(pipe: Pipeline, pairs: HeldOut) -> None:
    """Raises InputError naming the row of a caption that says no digit and colours, or not in the bundle's words."""
    for row, caption in enumerate(pairs.captions):
        try:
            parse_caption(caption)
            pipe.text_tokenizer.encode(caption)
        except InputError as error:
            raise InputError(f"{pairs.source}: row {row}: {error}") from error


Advance = Callable[[float], None]
Codes = Int[Tensor, "N h w"]


# Likelihood ----------------------------------------------------------------------------------------------------


def _likelihood_rows(pipe: Pipeline, codes: Codes, captions: Sequence[str]) -> list[Row]:
    words = [torch.tensor(pipe.text_tokenizer.encode(caption)) for caption in captions]
    rows, part = [], "test nats a token"
    batches: list[Packed] = []
    for name in pipe.layout.orders:
        packed = list(_packed(pipe, name, codes, words))
        rows += _nats_rows(part, f"{name}: ", evaluate_nll(pipe.model, pipe.layout, packed))
        batches += packed
    rows += _nats_rows(part, "all orders: ", evaluate_nll(pipe.model, pipe.layout, batches))
    scores = pipe.score_codes(codes, words, batch_size=_PICTURES_AT_ONCE)
    names = ("−ln p(picture | caption)", "−ln p(caption | picture)", "mutual information")
    for name, values in zip(names, scores, strict=True):
        if values is None:
            continue
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        rows.append(Row("nats a pair", name, float(values.mean()), error, "nats", len(values)))
    return rows


def _nats_rows(part: str, prefix: str, found: Mapping[str, Likelihood]) -> list[Row]:
    return [
        Row(part, prefix + name, nats.nats_per_token, nats.standard_error, "nats", nats.num_tokens)
        for name, nats in found.items()
        if nats.num_tokens
    ]


def _packed(pipe: Pipeline, order: str, codes: Codes, words: list[Int[Tensor, " L"]]) -> Iterator[Packed]:
    for start in range(0, len(codes), _PICTURES_AT_ONCE):
        chosen = slice(start, start + _PICTURES_AT_ONCE)
        image, text = codes[chosen].flatten(1), torch.nn.utils.rnn.pad_sequence(words[chosen], batch_first=True)
        spans = {
            "image": SpanValues(image, torch.full((len(image),), image.shape[1])),
            "text": SpanValues(text, torch.tensor([len(ids) for ids in words[chosen]])),
        }
        yield pipe.layout.pack(order, spans)


# Pictures of prompts -------------------------------------------------------------------------------------------


def _prompt_rows(
    pipe: Pipeline, captions: Sequence[str], config: ReportConfig, judge: DigitClassifier, advance: Advance
) -> list[Row]:
    """Prompt accuracy from the model's own distribution, and with the bundle's settings where they differ."""
    rows = []
    settings = list(dict.fromkeys((SampleConfig(), pipe.sampling.picture)))
    for i, sampling in enumerate(settings):
        pictures = []
        for start in range(0, len(captions), _PICTURES_AT_ONCE):
            pictures.append(_draw(pipe, captions[start : start + _PICTURES_AT_ONCE], sampling, config.seed + start))
            advance((i + (start + _PICTURES_AT_ONCE) / len(captions)) / len(settings))
        accuracy = prompt_accuracy(judge_pictures(np.concatenate(pictures), captions, judge))
        part = f"prompt accuracy, {describe_sampling(sampling)}"
        rows += _rate_rows(part, accuracy)
    return rows


def _draw(pipe: Pipeline, captions: Sequence[str], sampling: SampleConfig, seed: int) -> UInt8[np.ndarray, "N 28 28 3"]:
    """A picture of each caption, the i-th drawn with the seed `seed + i`, so that equal captions differ."""
    seeds = range(seed, seed + len(captions))
    return _levels(pipe, pipe.generate_codes(captions, seed=seeds, batch_size=_PICTURES_AT_ONCE, **vars(sampling)))


def _levels(pipe: Pipeline, codes: Codes) -> UInt8[np.ndarray, "N 28 28 3"]:
    return images_to_levels(pipe.decode_images(codes, batch_size=_PICTURES_AT_ONCE))


def describe_sampling(sampling: SampleConfig) -> str:
    """The settings that differ from the model's own distribution, and the temperature always."""
    plain = SampleConfig()
    changed = [
        f"{field.name} {getattr(sampling, field.name)}"
        for field in fields(sampling)
        if field.name == "temperature" or getattr(sampling, field.name) != getattr(plain, field.name)
    ]
    return ", ".join(changed)


# Captions of pictures, and pairs -------------------------------------------------------------------------------


def _caption_rows(pipe: Pipeline, codes: Codes, captions: Sequence[str]) -> list[Row]:
    predicted = pipe.caption_codes(codes, batch_size=_PICTURES_AT_ONCE)
    part = f"caption accuracy, {describe_sampling(pipe.sampling.caption)}"
    return _rate_rows(part, caption_accuracy(predicted, captions[: len(codes)]))


def _pair_rows(pipe: Pipeline, config: ReportConfig, judge: DigitClassifier, advance: Advance) -> list[Row]:
    """How often picture and caption, both drawn from nothing, agree, and what helps: an order, a sharper distribution,
    the caption first and then its picture as the bundle draws pictures, the best of four pairs."""
    rows = []
    ways: list[tuple[str, dict[str, Any]]] = [("the order drawn too", {})]
    ways += [(f"order {order}", {"order": order}) for order in pipe.layout.orders]
    ways.append(("the order drawn too, temperature 0.8", {"temperature": 0.8}))
    if pipe.sampling.picture.guidance_scale != 1:
        ways.append((f"caption first, {describe_sampling(pipe.sampling.picture)}", vars(pipe.sampling.picture)))
    ways.append(("best of 4 by p(caption | picture)", {"best_of": 4}))
    for i, (name, given) in enumerate(ways):
        agree = []
        for start in range(0, config.num_pairs, _PICTURES_AT_ONCE):
            n = min(_PICTURES_AT_ONCE, config.num_pairs - start)
            seed = config.seed + start * given.get("best_of", 1)
            codes, captions = pipe.pair_codes(n, seed, batch_size=_PICTURES_AT_ONCE, **given)
            agree.append(pairs_agree(_levels(pipe, codes), captions, judge))
            advance((i + (start + n) / config.num_pairs) / len(ways))
        rows += _rate_rows("agreement of pairs from nothing", {name: binomial_rate(np.concatenate(agree))})
    return rows


def pairs_agree(
    pictures: UInt8[np.ndarray, "N 28 28 3"], captions: Sequence[str], judge: DigitClassifier
) -> Bool[np.ndarray, " N"]:
    """Whether digit and both colours of each picture are those of its caption; a caption that is none is wrong."""
    is_caption = np.array([_is_caption(caption) for caption in captions], dtype=bool)
    agree = np.zeros(len(captions), dtype=bool)
    said = [caption for caption, fine in zip(captions, is_caption, strict=True) if fine]
    if said:
        agree[is_caption] = judge_pictures(pictures[is_caption], said, judge).all_ok
    return agree


def _is_caption(caption: str) -> bool:
    try:
        parse_caption(caption)
    except InputError:
        return False
    return True


# Reranking -----------------------------------------------------------------------------------------------------


def _best_of_rows(
    pipe: Pipeline, captions: Sequence[str], config: ReportConfig, judge: DigitClassifier, advance: Advance
) -> list[Row]:
    """Prompt accuracy at temperature 1 without guidance when the likeliest of n candidates is kept."""
    if not config.best_of:
        return []
    captions, most = captions[: config.num_prompts], max(config.best_of)
    right, merits = [], []
    at_once = max(1, 1024 // most)
    for start in range(0, len(captions), at_once):
        prompts = captions[start : start + at_once]
        seeds = [config.seed + (start + i) * most for i in range(len(prompts))]
        codes = pipe.generate_codes(prompts, seed=seeds, n=most, batch_size=_PICTURES_AT_ONCE, **vars(SampleConfig()))
        repeated = [prompt for prompt in prompts for _ in range(most)]
        right.append(judge_pictures(_levels(pipe, codes), repeated, judge).all_ok.reshape(-1, most))
        merits.append(_merits(pipe, codes, repeated).reshape(len(LIKELIHOODS), -1, most))
        advance((start + len(prompts)) / len(captions))
    ok, merit = np.concatenate(right), np.concatenate(merits, axis=1)
    rows = []
    for n in config.best_of:
        for i, rerank in enumerate(LIKELIHOODS if n > 1 else LIKELIHOODS[:1]):
            chosen = merit[i, :, :n].argmax(1)
            rate = binomial_rate(ok[np.arange(len(ok)), chosen])
            name = f"best of {n} by {_RERANKED[rerank]}" if n > 1 else "best of 1"
            rows += _rate_rows("prompt accuracy, temperature 1.0, reranked", {name: rate})
    return rows


_RERANKED = {
    "picture": "p(picture | caption)",
    "caption": "p(caption | picture)",
    "pmi": "mutual information",
}


def _merits(pipe: Pipeline, codes: Codes, captions: Sequence[str]) -> Float[np.ndarray, "rerankers N"]:
    words = [torch.tensor(pipe.text_tokenizer.encode(caption)) for caption in captions]
    scores = pipe.score_codes(codes, words, batch_size=_PICTURES_AT_ONCE)
    return np.stack([scores.merit(rerank).numpy() for rerank in LIKELIHOODS])


# The image tokenizer -------------------------------------------------------------------------------------------


def _reconstruction_rows(pipe: Pipeline, codes: Codes, pairs: HeldOut, judge: DigitClassifier) -> list[Row]:
    """What encoding and decoding loses, and how the codebook is used."""
    part, N = "image tokenizer", len(codes)
    images, decoded = levels_to_images(pairs.pictures), pipe.decode_images(codes).clamp(0, 1)
    error = float(((decoded - images) ** 2).mean())
    rebuilt = images_to_levels(decoded)
    exact = (rebuilt == pairs.pictures).all(axis=-1)  # (N, 28, 28)
    counts = torch.bincount(codes.flatten(), minlength=pipe.image_tokenizer.config.codebook_size).double()
    share = counts[counts > 0] / counts.sum()
    before, after = (judge_pictures(p, pairs.captions, judge) for p in (pairs.pictures, rebuilt))
    rows = [
        Row(part, "mean squared error", error, None, "", N),
        Row(part, "PSNR", -10 * math.log10(error) if error else math.inf, None, "dB", N),
        Row(part, "pixels exact after rounding", float(exact.mean()), _spread(exact.mean(axis=(1, 2))), "share", N),
        Row(part, "codebook usage", float((counts > 0).double().mean()), None, "share", int(counts.sum())),
        Row(part, "codebook perplexity", float((-(share * share.log()).sum()).exp()), None, "", int(counts.sum())),
    ]
    accuracies = {
        "digit read in originals": binomial_rate(before.digit_ok),
        "digit read in reconstructions": binomial_rate(after.digit_ok),
        "digit and both colours in reconstructions": binomial_rate(after.all_ok),
    }
    return rows + _rate_rows(part, accuracies)


def _spread(values: Float[np.ndarray, " N"]) -> float | None:
    """The standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _rate_rows(part: str, rates: Mapping[str, Rate]) -> list[Row]:
    return [Row(part, name, rate["rate"], rate["standard_error"], "share", rate["num"]) for name, rate in rates.items()]
