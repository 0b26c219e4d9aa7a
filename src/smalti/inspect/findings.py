"""What is found out about a model and its codes, in words and numbers, section by section.

Each function takes the subject and gives a section; each finding in it names the functions that computed it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from smalti.errors import InputError
from smalti.inspect import attention, captions, causes, codebook, figures, memorisation, patches, positions
from smalti.inspect.grid import Grid, GridFinding
from smalti.inspect.subject import Subject

READING = {
    "raster": "row by row",
    "snake": "row by row, every other row backwards",
    "spiral": "from a corner along the border, and so inwards",
    "diagonal": "along the diagonals, every other one backwards",
    "map": "in an order without a name: the map shows where each position lies",
}
"""Each of `grid.ORDERS` in words."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """How much is looked at. Raises ValueError where a number leaves nothing to compare."""

    num_lines: int = 20_000
    """Lines for what the codes alone tell."""
    num_scored: int = 512
    """Lines run through the model once; an eighth of them where it is run a few times over, fewer where it is often."""
    num_halvings: int = 20
    """Random halvings of the lines that vote on the grid."""
    num_pairs: int = 8
    """Pairs of lines between which activations are patched."""
    num_captions: int = 16
    """Pictures whose captions are changed word by word, and drawn ones that are looked for among the lines."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_lines", 2),
            ("num_scored", 10),
            ("num_halvings", 1),
            ("num_pairs", 1),
            ("num_captions", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def a_share(self, part: int) -> int:
        """Of the lines that are run through the model, one in `part`, but not so few that nothing can be compared."""
        return max(min(10, self.num_scored), self.num_scored // part)


@dataclass(frozen=True, kw_only=True)
class Finding:
    text: str
    function: str
    """What computed it, from `smalti.inspect` on."""
    headline: bool = False
    """Whether it belongs to what is told first."""


@dataclass(kw_only=True)
class Section:
    title: str
    findings: list[Finding] = field(default_factory=list)
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    """Each with its caption."""
    heard: Callable[[Finding], None] = lambda finding: None
    """Told of each finding as it comes."""
    _drawn: list[tuple[str, bytes]] = field(default_factory=list)

    def say(self, text: str, function: str, *, headline: bool = False) -> None:
        self.findings.append(Finding(text=text, function=function, headline=headline))
        self.heard(self.findings[-1])

    def show(self, caption: str, figure: Figure) -> None:
        self.figures.append((caption, figure))

    def drawn(self, draw: Callable[[Figure], bytes]) -> list[tuple[str, bytes]]:
        """Captions and pictures; drawn once, however often the page is written."""
        for caption, figure in self.figures[len(self._drawn) :]:
            self._drawn.append((caption, draw(figure)))
        return self._drawn


def _listed(items: Sequence, most: int = 8) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")


# ---- what positions are ----


def position_section(subject: Subject, config: InspectConfig, found: GridFinding) -> Section:
    section = Section(title="What the positions are", heard=subject.heard)
    codes, K = subject.codes, subject.vocab_size
    statistics = positions.position_statistics(codes, K)
    special = positions.special_positions(codes, K)
    _say_grid(section, found)
    low, high = int(statistics.entropy_nats.argmin()), int(statistics.entropy_nats.argmax())
    section.say(
        f"Seen alone, a code holds {statistics.entropy_nats.mean():.2f} nats on average, from "
        f"{statistics.entropy_nats[low]:.2f} at position {low} to {statistics.entropy_nats[high]:.2f} at position "
        f"{high}; all codes alike would be {math.log(K):.2f}.",
        "positions.position_statistics",
    )
    kinds = {
        "constant": ("always hold one code", "code"),
        "own codes": ("use codes that hardly occur elsewhere", "most often"),
    }
    for kind, (words, how) in kinds.items():
        chosen = [f"{s.position} ({how} {s.top_code})" for s in special if s.kind == kind]
        if chosen:
            section.say(f"Positions that {words}: {_listed(chosen)}.", "positions.special_positions", headline=True)
    if not special:
        section.say("No position is constant or has codes of its own.", "positions.special_positions")
    _say_counts(section, subject, special, found.grid)
    empty = np.flatnonzero((statistics.top_share >= 0.95) & (statistics.kinship >= positions.FOREIGN_KINSHIP))
    if len(empty):
        code = Counter(statistics.top_code[empty].tolist()).most_common(1)[0][0]
        section.say(
            f"{len(empty)} positions hold one code in at least 95 % of the lines, most of them code {code}: background "
            f"that is found elsewhere too (positions {_listed(empty.tolist(), 12)}).",
            "positions.position_statistics",
        )
    section.show(
        "Entropy, and the number of different codes, by position.",
        figures.position_maps(
            {
                "entropy, nats": statistics.entropy_nats,
                "codes used": statistics.num_used.astype(float),
                "share of the commonest code": statistics.top_share,
            },
            found.grid,
        ),
    )
    section.show(
        "Bright: two positions tell much of each other. Stripes parallel to the diagonal are the rows of a picture.",
        figures.information_map(found.information, found.grid),
    )
    if found.grid is not None:
        section.show(
            "Where each position of the line lies in the picture, and the way from one to the next.",
            figures.reading_map(found.grid),
        )
    return section


def _say_counts(
    section: Section, subject: Subject, special: list[positions.SpecialPosition], grid: Grid | None
) -> None:
    """Looks for counts where the codes are strange, and outside the grid: a count may look like a code."""
    asked = {s.position for s in special if s.kind == "own codes"}
    if grid is not None:
        asked |= set(grid.outside)
    best: dict[int, positions.Explanation] = {}
    for explained in positions.explain_by_counts(subject.codes, subject.vocab_size, sorted(asked)):
        if explained.position not in best or explained.share > best[explained.position].share:
            best[explained.position] = explained
    for explained in best.values():
        section.say(
            f"Position {explained.position} tells {explained.property}: that explains {explained.share:.0%} of its "
            "entropy.",
            "positions.explain_by_counts",
            headline=True,
        )


def _described(grid: Grid) -> str:
    """A grid that did not win, in a few words."""
    columns = "" if grid.column_order is None else ", columns in another order"
    num_outside = len(grid.outside)
    outside = f", {_counted(num_outside, 'position')} outside" if num_outside else ""
    return f"{grid.rows} × {grid.columns} {grid.order}{columns}{outside}"


def _counted(num: int, thing: str) -> str:
    return f"{num} {thing}" if num == 1 else f"{num} {thing}s"


def _say_grid(section: Section, found: GridFinding) -> None:
    function = "grid.infer_grid"
    sure = f" Confidence that there is none: {found.confidence:.0%}."
    if found.grid is None and found.runner_up is None:
        text = "No grid is found: the lines have too few positions for one." + sure
        section.say(text, function, headline=True)
        return
    if found.grid is None and found.runner_up is not None:
        again = (
            f" Halves of the lines, each by itself, find only {found.agreement:.0%} of its neighbours again."
            if found.agreement is not None
            else ""
        )
        section.say(
            f"No grid is found, of a known order or another: the best, {_described(found.runner_up)}, explains "
            f"{found.runner_up_explained:z.0%} of how differently pairs of positions share; the best of any on "
            f"shuffled cells {found.chance_explained:.0%}, their order in the line {found.line_explained:z.0%}."
            f"{again}{sure}",
            function,
            headline=True,
        )
        return
    grid = found.grid
    assert grid is not None
    reading = READING[grid.order]
    if grid.column_order is not None:
        reading += f", the columns in the order {', '.join(map(str, grid.column_order))}"
    outside = grid.outside
    section.say(
        f"The lines are pictures of {grid.rows} × {grid.columns} codes read {reading}; "
        + (
            "no position is"
            if not outside
            else f"position {outside[0]} is"
            if len(outside) == 1
            else f"positions {_listed(outside)} are"
        )
        + f" outside. Confidence {found.confidence:.0%}"
        + (
            f": halves of the lines, each by itself, find {found.agreement:.0%} of the neighbours again."
            if found.agreement is not None
            else f" ({found.num_halvings} halvings of the lines voted)."
        ),
        function,
        headline=True,
    )
    section.say(
        f"That grid explains {found.explained:.0%} of how differently pairs of positions share, on lines not used to "
        f"fit it; the best of all named orders on shuffled cells {found.chance_explained:.0%}, nearness in the line "
        f"alone {found.line_explained:z.0%}"
        + (
            f", the next hypothesis ({_described(found.runner_up)}) {found.runner_up_explained:z.0%}"
            if found.runner_up is not None
            else ""
        )
        + ". Of hypotheses that explain as much, the one is taken that leaves outside what looks special, nothing "
        "else. What codes alone cannot tell: a mirrored, turned or transposed picture has the same neighbours, so left "
        "may be right, up may be down, and rows may be columns.",
        function,
    )


# ---- what codes are ----


def code_section(subject: Subject, config: InspectConfig, grid: Grid | None) -> Section:
    section = Section(title="What the codes are", heard=subject.heard)
    codes, K = subject.codes, subject.vocab_size
    statistics, places = codebook.code_statistics(codes, K), codebook.code_places(codes, K)
    counts = statistics.num_occurrences
    ranked = np.argsort(-counts, kind="stable")
    num_used = int((counts > 0).sum())
    half = int(np.searchsorted(np.cumsum(counts[ranked]), counts.sum() / 2)) + 1
    section.say(
        f"{num_used} of {K} codes occur in {len(codes):,} lines. The commonest, {ranked[0]}, takes "
        f"{counts[ranked[0]] / counts.sum():.0%} of all places; "
        f"half of all places are taken by {'it alone' if half == 1 else f'the {half} commonest'}.",
        "codebook.code_statistics",
        headline=True,
    )
    common = ranked[: max(2, int((counts >= 50).sum()))]
    clumped = common[np.argsort(-statistics.burstiness[common], kind="stable")]
    section.say(
        f"Most clumped: {_listed([f'{c} ({statistics.burstiness[c]:.1f} × chance)' for c in clumped[:5]])}. The median "
        f"of the codes that occur at least 50 times is {np.median(statistics.burstiness[common]):.2f} × chance.",
        "codebook.code_statistics",
    )
    bound = common[np.argsort(-places.binding_nats[common], kind="stable")]
    section.say(
        f"Most bound to a place: {_listed([f'{c} (position {places.top_position[c]})' for c in bound[:6]])}; a code "
        f"tells {np.average(places.binding_nats[common], weights=counts[common]):.2f} of at most "
        f"{math.log(codes.shape[1]):.2f} nats about where it stands.",
        "codebook.code_places",
    )
    if grid is not None:
        _say_background(section, codes, K, grid)
        _say_border(section, codebook.border_share(places, grid), common, grid)
    _say_neighbours(section, codes, K, grid)
    if subject.order is not None:
        _say_embeddings(section, subject, common[:300], config)
    section.show("How often codes occur, and how clumped.", figures.frequencies(counts, statistics.burstiness))
    section.show(
        "Where the codes most bound to places stand.", figures.place_maps(places.counts, bound[:16].tolist(), grid)
    )
    return section


def _say_background(section: Section, codes: np.ndarray, vocab_size: int, grid: Grid) -> None:
    border, inside = codebook.border_and_inside(codes, vocab_size, grid)
    code = int(border.argmax())
    if border[code] < 0.25 or not border[code] > inside[code]:  # without inner cells nothing can be told (NaN)
        return
    section.say(
        f"Code {code} is the background: it takes {border[code]:.0%} of the cells of the border and "
        f"{inside[code]:.0%} of the inner ones.",
        "codebook.border_and_inside",
        headline=True,
    )


def _say_neighbours(section: Section, codes: np.ndarray, vocab_size: int, grid: Grid | None) -> None:
    """Pairs that stand together, on the grid or, without one, in the line."""
    line = grid or Grid(rows=1, columns=codes.shape[1])
    steps = {"left and right": (0, 1), "above and below": (1, 0)} if grid else {"one behind the other": (0, 1)}
    for words, (down, right) in steps.items():
        table = codebook.co_occurrence(codes, vocab_size, line, down=down, right=right)
        pairs = [f"{p.code} {p.other} ({math.exp(p.score):.0f} ×)" for p in codebook.attracted_pairs(table, num=5)]
        if pairs:
            section.say(
                f"Pairs that occur together more than by chance, {words}: {_listed(pairs)}.",
                "codebook.co_occurrence, codebook.attracted_pairs",
            )


def _say_border(section: Section, share: np.ndarray, common: np.ndarray, grid: Grid) -> None:
    inner = max(grid.rows - 2, 0) * max(grid.columns - 2, 0)
    if not inner:
        return
    on_border, central = common[share[common] >= 0.9], common[share[common] <= 0.1]
    section.say(
        f"Of {len(common)} common codes {len(on_border)} keep to the border (at least 90 % of their occurrences: "
        f"{_listed(on_border.tolist(), 6) or 'none'}) and {len(central)} to the inner cells; the border is "
        f"{1 - inner / (grid.rows * grid.columns):.0%} of the cells.",
        "codebook.border_share",
    )


def _say_embeddings(section: Section, subject: Subject, common: np.ndarray, config: InspectConfig) -> None:
    if len(common) < 10:
        return
    chosen = common.tolist()
    embeddings = codebook.code_embeddings(subject.model, subject.layout)
    nearest = {name: codebook.nearest_codes(table, chosen, among=chosen, num=3) for name, table in embeddings.items()}
    agree = np.mean([nearest["input"][code][0] in nearest["output"][code] for code in chosen])
    examples = [f"{code}: {_listed(nearest['output'][code])}" for code in chosen[1:4]]
    section.say(
        f"Nearest codes in the output embedding, for three common codes: {'; '.join(examples)}. For {agree:.0%} of the "
        "codes the nearest in the input embedding is among the three nearest in the output embedding "
        f"(chance {3 / (len(chosen) - 1):.0%}).",
        "codebook.nearest_codes",
    )
    clusters = codebook.cluster_codes(embeddings["output"], chosen, 12, seed=config.seed)
    biggest = Counter(clusters.tolist()).most_common(3)
    groups = [_listed([c for c, k in zip(chosen, clusters, strict=True) if k == number], 5) for number, _ in biggest]
    section.say(
        f"Clusters of the output embedding, the largest three of 12: {'; '.join(groups)}.", "codebook.cluster_codes"
    )
    points = {f"{name} embedding, PCA": codebook.project_codes(table, chosen) for name, table in embeddings.items()}
    section.show(
        "Codes in the model's embeddings, coloured by their cluster in the output embedding; the commonest are named.",
        figures.embedding_maps(points, clusters, chosen),
    )


# ---- how the model predicts ----


class Scored(NamedTuple):
    """What one run of the model over the lines tells."""

    nats: Float[torch.Tensor, "B T"]
    instead: Float[torch.Tensor, "K K"]
    """`codebook.predicted_instead`."""


@lru_cache(maxsize=1)  # three findings ask for it
def scored(subject: Subject, config: InspectConfig) -> Scored:
    """Of the first `num_scored` lines."""
    instead, nats = codebook.PredictedInstead(subject.model, subject.layout), []
    for part, hidden in attention.hidden_by_batch(subject.model, subject.packed(config.num_scored)):
        nats.append(attention.nats_of_hidden(subject.model, subject.layout, part, hidden))
        instead.add(part, hidden)
    return Scored(torch.cat(nats), instead.mean())


def prediction_section(subject: Subject, config: InspectConfig, grid: Grid | None) -> Section | None:
    if subject.order is None:
        return None
    section = Section(title="How the model predicts", heard=subject.heard)
    model, layout, places = subject.model, subject.layout, subject.positions
    few = subject.packed(config.a_share(8))
    nats = attention.by_position(scored(subject, config).nats)
    mean, error = nats.mean[places].numpy(), nats.standard_error[places].numpy()
    hardest = np.argsort(-mean)[:5]
    section.say(
        f"A code costs the model {mean.mean():.3f} nats on average on {len(scored(subject, config).nats)} lines. The "
        f"hardest positions: {_listed([f'{p} ({mean[p]:.2f} ± {error[p]:.2f})' for p in hardest])}.",
        "attention.nats_by_position",
        headline=True,
    )
    alone = positions.position_statistics(subject.codes, subject.vocab_size).entropy_nats
    section.show(
        "The surprise map, beside what a code would cost if only its position were known, and what context saves.",
        figures.position_maps(
            {"nats of the model": mean, "nats by position alone": alone, "nats saved": alone - mean}, grid
        ),
    )
    _say_heads(section, subject, few.token_ids, grid)
    _say_context(section, subject, subject.packed(config.a_share(20)), grid)
    lens = causes.logit_lens(model, layout, few)
    by_layer = lens.nats[:, places].mean(1)
    agreement = lens.agreement[:, places].mean(1)
    steps = "; ".join(
        f"{layer}: {by_layer[layer]:.2f} nats, {agreement[layer]:.0%} decided" for layer in range(len(by_layer))
    )
    section.say(
        f"Read off between layers (the logit lens), after so many layers: {steps}. Decided means that the likeliest "
        "code is already that of the whole model.",
        "causes.logit_lens",
        headline=True,
    )
    section.show(
        "Nats of the true code if the model ended after so many layers, by position.",
        figures.layer_map(
            lens.nats[:, places].numpy(), title="logit lens", label="nats per code", xlabel="position in the line"
        ),
    )
    return section


def _say_heads(section: Section, subject: Subject, token_ids: torch.Tensor, grid: Grid | None) -> None:
    first = subject.positions.start
    attended = attention.attention_weights(subject.model, token_ids)
    heads = attention.name_heads(subject.model, token_ids, first, grid, attended=attended)
    kinds = Counter(head.name for head in heads)
    section.say(
        f"The {len(heads)} heads by what they do: {_listed([f'{n} {name}' for name, n in kinds.most_common()])}. A "
        f"head is named for a pattern with at least {attention.DOMINANT:.0%} of its attention.",
        "attention.name_heads",
        headline=True,
    )
    for name in kinds:
        if name not in ("mixed", "diffuse"):
            best = max((head for head in heads if head.name == name), key=lambda head: head.shares[name])
            section.say(
                f"Clearest “{name}” head: layer {best.layer} head {best.head}, {best.shares[name]:.0%} of its "
                f"attention, {best.excess[name]:.1f} × what even attention would give.",
                "attention.name_heads",
            )
    mean = [weights.mean(0).cpu() for weights in attended]
    if grid is not None:
        maps = [attention.attention_by_offset(layer, first, grid).numpy() for layer in mean]
        caption = "Where each head looks, relative to the cell that is predicted (×); bright: much attention."
    else:
        maps = [attention.attention_by_lag(layer, 24).numpy() for layer in mean]
        caption = "How many tokens back each head looks (0: the token itself)."
    section.show(caption, figures.head_maps(heads, maps))


def _say_context(section: Section, subject: Subject, packed, grid: Grid | None) -> None:
    places = subject.positions
    longest = len(places) - 1
    marks = {1, 2, 4, 8, 16, 32, 64, 128, 256, longest}
    if grid is not None:
        marks |= {grid.columns, grid.columns + 1, 2 * grid.columns}
    lengths = sorted(mark for mark in marks if mark <= longest)
    late = places[len(places) // 2 : len(places) - (grid.after if grid else 0)]
    targets = late[:: max(1, len(late) // 5)]
    loss = attention.loss_by_context(subject.model, subject.layout, packed, lengths, targets).mean(1)
    whole = float(loss[-1])
    enough = next(length for length, value in zip(lengths, loss.tolist(), strict=True) if value <= whole * 1.05 + 0.01)
    section.say(
        f"With only the token before, codes in the later half cost {float(loss[0]):.2f} nats, with all {whole:.2f}; "
        f"the last {enough} tokens are enough to come within 5 % of that"
        + (f" ({enough / grid.columns:.1f} rows)." if grid is not None else "."),
        "attention.loss_by_context",
        headline=True,
    )
    section.show(
        "Loss against the length of the context that is left visible.",
        figures.curve(
            lengths,
            {"nats": loss.tolist()},
            xlabel="tokens visible before the code",
            ylabel="nats per code",
            title="how far back the model uses context",
        ),
    )


# ---- causes ----


def cause_section(subject: Subject, config: InspectConfig, grid: Grid | None) -> Section | None:
    if subject.order is None:
        return None
    section = Section(title="Causes, not only correlations", heard=subject.heard)
    model, layout, places = subject.model, subject.layout, subject.positions
    packed = subject.packed(config.a_share(10))
    losses = causes.ablation_losses(model, layout, packed, places)
    flat = int(losses.heads.argmax())
    layer, head = divmod(flat, losses.heads.shape[1])
    idle = int((losses.heads < 0.005).sum())
    section.say(
        f"Without layer {layer} head {head} a code costs {losses.heads[layer, head]:z.3f} nats more than the "
        f"{losses.whole:.3f} of the whole model: the most of any head. {idle} of {losses.heads.numel()} heads cost "
        "less than 0.005 nats each when they are replaced by their mean.",
        "causes.ablation_losses",
        headline=True,
    )
    worst = int(losses.layers.argmax())
    section.say(
        f"Skipping a whole layer costs most for layer {worst} ({losses.layers[worst]:z.2f} nats), least for layer "
        f"{int(losses.layers.argmin())} ({losses.layers.min():z.2f}).",
        "causes.ablation_losses",
    )
    section.show("What is lost without each part.", figures.ablation_map(losses))
    _say_patching(section, subject, packed, config)
    _say_influence(section, subject, subject.packed(config.a_share(16)), config, grid)
    _say_swaps(section, subject, config, grid)
    return section


def _say_patching(section: Section, subject: Subject, packed, config: InspectConfig) -> None:
    target = subject.positions[3 * len(subject.positions) // 4]
    num = min(config.num_pairs, len(packed.token_ids) // 2)
    maps = torch.stack(
        [
            causes.patching_map(subject.model, subject.layout, packed, 2 * pair, 2 * pair + 1, target)
            for pair in range(num)
        ]
    )
    typical = maps.nanmedian(0).values  # a mean would be ruled by pairs that hardly differ
    if typical.isnan().all():
        return
    error = causes.identity_patch_error(subject.model, packed.token_ids[:2])
    section.say(
        "Check of the method: a state put where it was, at any layer and token, "
        + ("changes nothing." if error == 0 else f"changes an output by {error:.1e} at most."),
        "causes.identity_patch_error",
    )
    by_layer = typical[:, -1]  # the state at the token that predicts
    first = typical[0, subject.positions.start :]
    from_start = int(first.nan_to_num(-math.inf).argmax())
    section.say(
        f"Between {num} pairs of lines, predicting position {target - subject.positions.start}: before the first layer "
        f"the code that tells most is the one at position {from_start} ({float(first[from_start]):.0%} of the "
        "difference, the median over the pairs); the state of the predicting token holds, before each "
        "layer and behind the last, "
        + ", ".join(f"{max(value, 0.0):.0%}" for value in by_layer.tolist())
        + " of it (0 % also where it misleads alone).",
        "causes.patching_map",
    )
    section.show(
        f"Activation patching: share of the difference between two lines' predictions for the code at position "
        f"{target - subject.positions.start} that each state carries (1: patching it alone makes the prediction the "
        "other line's).",
        figures.layer_map(
            typical.clamp(-0.2, 1).numpy(),
            title="patched before layer",
            label="share of the difference",
            xlabel="token of the sequence (0: its start)",
        ),
    )


def _say_influence(section: Section, subject: Subject, packed, config: InspectConfig, grid: Grid | None) -> None:
    places = subject.positions
    moved = causes.influence(subject.model, subject.layout, packed, places, seed=config.seed)[:, places]
    strength = moved.sum(1)
    strongest = int(strength.argmax())
    section.say(
        f"Changing one code to another line's moves later predictions most at position {strongest} "
        f"({strength[strongest]:.2f} nats of divergence in sum, the median position {strength.median():.2f}).",
        "causes.influence",
    )
    if grid is None:
        lags = [float(moved.diagonal(lag).mean()) for lag in range(1, min(25, len(moved)))]
        figure = figures.curve(
            range(1, len(lags) + 1),
            {"nats": lags},
            xlabel="positions later",
            ylabel="nats of divergence",
            title="where predictions move when one code is changed",
        )
        if lags:
            lag = int(np.argmax(lags)) + 1
            section.say(
                f"A changed code moves most, on average, the prediction of the code {_counted(lag, 'position')} later "
                f"({lags[lag - 1]:.3f} nats).",
                "causes.influence",
                headline=True,
            )
        section.show("How far predictions move behind a changed code.", figure)
        return
    by_offset = causes.influence_by_offset(moved, grid, reach=3)
    down, right = divmod(int(by_offset.nan_to_num(-1).argmax()), by_offset.shape[1])
    right -= by_offset.shape[1] // 2
    section.say(
        f"A changed code moves most, on average, the prediction of the cell {_way(down, right)} "
        f"({float(by_offset[down, right + by_offset.shape[1] // 2]):.3f} nats).",
        "causes.influence_by_offset",
        headline=True,
    )
    section.show(
        "Mean divergence of the predictions around a changed code (×), which is read before all the others shown.",
        figures.offset_map(by_offset.numpy(), title="where predictions move", label="nats"),
    )


def _way(down: int, right: int) -> str:
    """From one cell to another, in words."""
    parts = [f"{_counted(down, 'row')} below"] if down else []
    if right:
        parts.append(f"{_counted(abs(right), 'column')} to the {'right' if right > 0 else 'left'}")
    return " and ".join(parts)


@lru_cache(maxsize=1)  # two sections ask for them
def find_swaps(subject: Subject, config: InspectConfig, grid: Grid | None) -> list[codebook.Swap]:
    """Codes that stand in for one another, by context and by what the model expects in their place.

    Codes that keep to special positions are left out: where nothing around depends on them, all are exchangeable.
    """
    similarity = codebook.context_similarity(subject.codes, subject.vocab_size, grid)
    instead = scored(subject, config).instead.numpy()
    looked_at = subject.codes[: config.num_scored]
    special = [s.position for s in positions.special_positions(subject.codes, subject.vocab_size)]
    at_special = np.bincount(looked_at[:, special].ravel(), minlength=subject.vocab_size)
    counts = np.bincount(looked_at.ravel(), minlength=subject.vocab_size)
    counts = np.where(at_special < counts / 2, counts, 0)
    return codebook.swappable_codes(similarity, counts, instead, num=6, min_count=min(20, int(counts.max())))


def _say_swaps(section: Section, subject: Subject, config: InspectConfig, grid: Grid | None) -> None:
    swaps = find_swaps(subject, config, grid)
    packed, nats = subject.packed(config.num_scored), scored(subject, config).nats
    told = []
    for swap in swaps[:4]:
        cost = causes.swap_cost(
            subject.model, subject.layout, packed, swap.code, swap.other, nats=nats, seed=config.seed
        )
        told.append(f"{swap.code} ↔ {swap.other} ({cost.nats:+z.1f} nats in {cost.num_changed} lines)")
    if not told:
        return
    common = np.argsort(-np.bincount(subject.codes.ravel(), minlength=subject.vocab_size), kind="stable")[:100]
    strangers = np.random.default_rng(config.seed).choice(common, len(swaps)).tolist()
    costs = [
        causes.swap_cost(subject.model, subject.layout, packed, swap.code, stranger, nats=nats, seed=config.seed).nats
        for swap, stranger in zip(swaps, strangers, strict=True)
        if stranger not in (swap.code, swap.other)
    ]
    versus = f"; a code drawn from the 100 commonest costs {np.mean(costs):+z.1f} nats instead" if costs else ""
    section.say(
        f"Codes that stand in for one another, with what it costs to put the second for the first once: "
        f"{_listed(told)}{versus}.",
        "codebook.swappable_codes, causes.swap_cost",
        headline=True,
    )


# ---- what captions do ----


def caption_section(subject: Subject, config: InspectConfig, grid: Grid | None) -> Section | None:
    """None where there are no captions, or codes have no cells."""
    if subject.captions is None or subject.image_tokenizer is None or min(subject.image_tokenizer.config.grid) == 1:
        return None
    section = Section(title="What the caption does", heard=subject.heard)
    h, w = subject.image_tokenizer.config.grid
    num = min(config.a_share(8), len(subject.codes))
    codes = torch.from_numpy(subject.codes[:num]).view(-1, h, w)
    texts = subject.captions[:num]
    gain = captions.caption_gain(subject.bundle, codes, texts)
    given, alone = gain.given.mean(0), gain.alone.mean(0)
    saved = alone - given
    row, column = divmod(int(saved.argmax()), w)
    section.say(
        f"With its caption a picture costs {float(given.sum()):.1f} nats, without {float(alone.sum()):.1f} (mean of "
        f"{num}): the caption tells {float(saved.sum()):.1f} nats, most of the cell in row {row}, column {column} "
        f"({float(saved[row, column]):.2f}).",
        "captions.caption_gain",
        headline=True,
    )
    section.show(
        "Nats of each patch with its caption and without, and what the caption tells.",
        figures.position_maps(
            {name: part.flatten().numpy() for name, part in (("given", given), ("alone", alone), ("told", saved))},
            Grid(rows=h, columns=w),
        ),
    )
    _say_words(section, subject, codes[: config.num_captions], texts)
    _say_memorised(section, subject, config)
    return section


def _say_words(section: Section, subject: Subject, codes: torch.Tensor, texts: list[str]) -> None:
    shown: list[captions.WordEffect] = []
    strongest = []
    for picture, text in zip(codes, texts, strict=False):
        try:
            effects = captions.word_effects(subject.bundle, picture, text, others=texts)
        except InputError:  # no other caption is as long
            continue
        shown = shown or effects
        best = max(effects, key=lambda effect: effect.total)
        row, column = divmod(int(best.nats.argmax()), picture.shape[1])
        strongest.append(
            f"in “{text}” “{best.word}” ({best.total:+.1f} nats without it, most in row {row}, column {column})"
        )
    if not shown:
        return
    section.say(
        f"The word that a picture hangs on most, found by taking it away or putting others in its place: "
        f"{'; '.join(strongest[:4])}.",
        "captions.word_effects",
        headline=True,
    )
    maps = {f"{effect.word} ({effect.total:+.1f})": effect.nats.flatten().numpy() for effect in shown[:8]}
    section.show(
        f"How much more each patch of the picture of “{texts[0]}” costs without each word, in nats: which word moved "
        "which patch.",
        figures.position_maps(maps, Grid(rows=codes.shape[1], columns=codes.shape[2])),
    )


def _say_memorised(section: Section, subject: Subject, config: InspectConfig) -> None:
    """Drawn pictures beside the lines looked at: nearer than those are to each other?"""
    assert subject.captions is not None
    num = config.num_captions
    if len(subject.codes) < 4 * num:
        return
    drawn = captions.drawn_codes(subject.bundle, subject.captions[:num], seed=config.seed)
    known, new = subject.codes[num : num + 5000], subject.codes[:num]
    found = memorisation.nearest_by_codes(drawn.flatten(1).numpy(), known, num=4)
    measure = memorisation.nearest_by_codes(new, known, num=1)
    told = memorisation.memorised(found, measure)
    h, w = drawn.shape[1:]
    by_features = memorisation.nearest_by_features(
        *(
            memorisation.picture_features(subject.image_tokenizer, torch.from_numpy(part).view(-1, h, w))
            for part in (drawn.flatten(1).numpy(), known)
        ),
        num=1,
    )
    same = int((found.rows[:, 0] == by_features.rows[:, 0]).sum())
    section.say(
        f"Of {num} pictures drawn from captions the nearest of {len(known):,} known ones is "
        f"{np.median(told.distances):.0f} codes of {h * w} away (median; the least {told.distances.min():.0f}); of as "
        f"many pictures of the data it is {np.median(measure.distances):.0f}. "
        f"{int((told.nearer_than_new > 0.95).sum())} of {num} are nearer than 95 % of those, which would be a sign of "
        f"learning by heart. By what is to be seen the same picture is nearest for {same}.",
        "memorisation.memorised",
        headline=True,
    )
    rows = [torch.cat([picture[None], torch.from_numpy(known[near]).view(-1, h, w)]) for picture, near in
            zip(drawn[:6], found.rows[:6], strict=True)]  # fmt: skip
    decoded = [list(patches.decoded(subject.image_tokenizer, row).numpy()) for row in rows]
    section.show(
        "Drawn pictures, and the four known ones nearest to each by edits of codes.",
        figures.picture_grid(decoded, ["drawn", "nearest", "second", "third", "fourth"]),
    )


# ---- what codes look like ----


def picture_section(subject: Subject, config: InspectConfig, grid: Grid | None) -> Section | None:
    """None where there is no image tokenizer, or the lines are no pictures of it."""
    codes = subject.pictures(torch.from_numpy(subject.codes[: max(1000, config.num_scored)]), grid)
    if codes is None or codes.shape[1] == 1:
        return None
    section, shift = Section(title="What the codes look like", heard=subject.heard), subject.code_offset
    average, num_cells = patches.average_patches(subject.image_tokenizer, codes)
    ranked = num_cells.argsort(descending=True, stable=True)[: int((num_cells > 0).sum())][:96].tolist()
    rows = [ranked[i : i + 16] for i in range(0, len(ranked), 16)]
    contrast = average[ranked].flatten(1).std(1)
    section.say(
        f"Average patches of the {len(ranked)} commonest codes, over {len(codes)} pictures. The flattest is code "
        f"{ranked[int(contrast.argmin())] + shift}, the one with most contrast code "
        f"{ranked[int(contrast.argmax())] + shift}.",
        "patches.average_patches",
    )
    section.show(
        "The average patch of each code, the commonest first.",
        figures.picture_grid(
            [[average[code].numpy() for code in row] for row in rows],
            [[str(code + shift) for code in row] for row in rows],
            cell=0.6,
        ),
    )
    section.show(
        "The atlas: the average patch of every code that occurs, from dark to light, and from blue to red in each row.",
        figures.picture_grid([[patches.code_atlas(average, num_cells).numpy()]], [""], cell=6.0),
    )
    if subject.order is None:
        return section
    _show_swaps(section, subject, config, grid, codes)
    few = subject.packed(6)
    offset = subject.layout.vocabulary["image"].offset
    first = offset + subject.code_offset  # specials have no picture, so none is guessed
    drawable = range(first, first + subject.image_tokenizer.config.codebook_size)
    lens = causes.logit_lens(subject.model, subject.layout, few, among=drawable)
    true_codes = few.token_ids[:, subject.positions] - offset
    lens_codes = lens.likeliest[:, :, subject.positions] - offset
    # a code that nothing around tells (a colour for the whole picture) would only hide the shapes if it were guessed
    given = [s.position for s in positions.special_positions(subject.codes, subject.vocab_size)]
    lens_codes[:, :, given] = true_codes[:, given]
    likeliest, true = subject.pictures(lens_codes, grid), subject.pictures(true_codes, grid)
    if likeliest is not None and true is not None:
        decoded = patches.decoded_lens(subject.image_tokenizer, torch.cat([likeliest, true[None]]))
        layers = len(decoded) - 1
        section.say(
            "The decoded logit lens shows, for six lines, what the model would paint after each layer.",
            "patches.decoded_lens",
        )
        section.show(
            "The likeliest code of every cell after so many layers, given the true codes before it (special positions "
            "keep the true code); last, the truth.",
            figures.picture_grid(
                [[decoded[layer, n].numpy() for layer in range(layers + 1)] for n in range(decoded.shape[1])],
                [*(f"after {layer}" for layer in range(layers)), "truth"],
            ),
        )
    return section


def _show_swaps(
    section: Section, subject: Subject, config: InspectConfig, grid: Grid | None, codes: torch.Tensor
) -> None:
    pictures, titles = [], []
    for swap in find_swaps(subject, config, grid):
        pair = swap.code - subject.code_offset, swap.other - subject.code_offset
        having = (codes == pair[0]).flatten(1).any(1).nonzero()[:, 0]
        if len(having) and min(pair) >= 0 and max(pair) < subject.image_tokenizer.config.codebook_size:
            pictures.append(patches.swap_picture(subject.image_tokenizer, codes[having[0]], *pair))
            titles.append(f"{swap.code} → {swap.other}")
    if not pictures:
        return
    change = torch.stack([(pair[0] - pair[1]).abs().mean() for pair in pictures])
    section.say(
        f"Putting one code of an exchangeable pair for the other changes a pixel by {float(change.mean()):.3f} of 1 on "
        "average.",
        "patches.swap_picture",
    )
    columns = [[pair[i].numpy() for pair in pictures] for i in range(2)]
    section.show(
        "Above as it is, below with a code replaced by the one it is exchangeable with.",
        figures.picture_grid(columns, titles),
    )
