"""Drafts change how many passes a sequence takes, never its distribution.

Oracles: enumeration of every outcome of every coupling, the plain sampler, a plain loop that draws by Gumbel noise.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import scipy.stats
import torch
from test_generate import CAPTIONS, DIGITS, requests_of_all_kinds, teacher_forced, tiny_model

import smalti.engine.speculative
from smalti.engine.engine import Engine
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig, guide, reshape
from smalti.engine.speculative import Drafts, Window, num_kept
from smalti.errors import InputError
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.vocabulary import Vocabulary

NULL = Request(order="image to text")
CONFIGS = [
    SampleConfig(),
    SampleConfig(temperature=0),
    SampleConfig(temperature=0.7, top_k=4),
    SampleConfig(guidance_scale=2.5, temperature=0.8),
    SampleConfig(guidance_scale=3.0, guidance_interval=(1, 3), top_p=0.9),
    SampleConfig(guidance_scale=1.5, guidance_schedule="linear"),
]


@pytest.fixture(params=["native", "packed", "eager"])
def executor(request) -> str:
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


def picture_requests(count: int) -> list[Request]:
    return [
        Request(order="text to image", given={"text": torch.tensor([seed % 7, 3, 5])}, seed=seed, null=NULL)
        for seed in range(count)
    ]


def token_ids(found) -> list[list[int]]:
    return [one.token_ids.tolist() for one in found]


# ---- the very same picture ----


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("window", [1, 3, 50])
def test_inverse_coupling_draws_the_very_pictures_of_the_plain_sampler(window, config, executor):
    """With greedy drawing every coupling does."""
    model, requests = tiny_model(DIGITS), picture_requests(23)
    if config.guidance_scale == 1:
        requests += requests_of_all_kinds()
    plain = generate(model, DIGITS, requests, config, executor=executor)
    for coupling in ("inverse",) if config.temperature else ("inverse", "gumbel", "maximal"):
        ahead = replace(config, speculative=window, coupling=coupling)
        found = generate(model, DIGITS, requests, ahead, executor=executor, batch_size=7)
        assert token_ids(found) == token_ids(plain)
        for ours, other in zip(found, plain, strict=True):
            assert torch.allclose(ours.log_probs, other.log_probs, atol=1e-5)
            assert torch.allclose(ours.draw_log_probs, other.draw_log_probs, atol=1e-5)


@torch.no_grad()
def drawn_by_noise(model: DecoderOnly, request: Request, config: SampleConfig) -> list[int]:
    """One token after the other, each the likeliest once noise is added; no state."""
    slot = Slot(((DIGITS.vocabulary["image"].offset, DIGITS.vocabulary["image"].end),))
    drafts = Drafts(request.seed, config)
    given, null = [0, 1, *(request.given["text"] + DIGITS.vocabulary["text"].offset).tolist(), 2], [0, 2]
    drawn: list[int] = []
    for step in range(5):
        logits = model.logits(model.hidden(torch.tensor([given + drawn]))[:, -1], slot)
        scale = config.guidance_at(step, 5)
        if scale != 1:
            logits = guide(logits, model.logits(model.hidden(torch.tensor([null + drawn]))[:, -1], slot), scale)
        [noise] = drafts.noise(len(given) + step, 1, slot.size)
        drawn.append(slot.ranges[0][0] + int((reshape(logits, config)[0] + noise).argmax()))
    return given + drawn


@pytest.mark.parametrize("config", [CONFIGS[0], *CONFIGS[2:]], ids=str)
def test_gumbel_coupling_draws_what_its_noise_says_whatever_the_window(config, executor):
    model, requests = tiny_model(DIGITS), picture_requests(11)
    expected = [drawn_by_noise(model, request, config) for request in requests]
    for window in (1, 3, 50):
        ahead = replace(config, speculative=window, coupling="gumbel")
        assert token_ids(generate(model, DIGITS, requests, ahead, executor=executor)) == expected


def test_the_noise_of_a_position_is_gumbel_and_its_own():
    drafts = [Drafts(seed, SampleConfig()) for seed in range(3)]
    rows = [row for one in drafts for row in one.noise(4, 3, 2000)]
    assert all(scipy.stats.kstest(row.numpy(), scipy.stats.gumbel_r.cdf).pvalue > 1e-3 for row in rows)
    assert all(abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.08 for pair in itertools.combinations(rows, 2))
    assert torch.equal(drafts[1].noise(5, 1, 2000)[0], rows[4])


# ---- the same distribution ----


def test_a_coupling_moves_a_draft_from_its_distribution_to_the_wanted_one():
    """Integrated over both random numbers: between the places where what is drawn changes, nothing changes."""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.rand(4, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    q, p = q / q.sum(), p / p.sum()
    p[2] = 0
    p = p / p.sum()
    rest = (p - q).clamp(min=0)
    ratios = [min(1.0, float(p[x] / q[x])) for x in range(4)]
    for source, weights in ((q, q), (None, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))):
        found = torch.zeros(4, dtype=torch.float64)
        for x in range(4):
            edges = sorted({0.0, 1.0, ratios[x] if source is not None else float(p[x])})
            taken = p.clone() if source is None else rest
            if source is None:
                taken[x] = 0
            cuts = [0.0, *(taken.cumsum(0) / taken.sum()).tolist()]
            for (low, high), (left, right) in itertools.product(itertools.pairwise(edges), itertools.pairwise(cuts)):
                if right <= left:
                    continue
                drafts = Drafts(0, SampleConfig())
                drafts.token_ids, drafts.probs = [10 + x], [source]
                drafts.numbers = lambda _, pair=((low + high) / 2, (left + right) / 2): torch.tensor(
                    [pair], dtype=torch.float64
                )
                window = Window(drafts, 0, [0.0])
                [y] = smalti.engine.speculative._couple_maximally([window], p[None], Slot(((10, 14),)))
                found[y] += weights[x] * (high - low) * (right - left)
        assert torch.allclose(found, p, atol=1e-12)


TINY = Layout.parse(
    Vocabulary({"special": ["<bos>", "<t>", "<i>"], "image": 2, "text": 3}),
    {"a": "<bos> text{1} <i> image{4} <t>"},
)
SMALL = Layout.parse(
    Vocabulary({"special": ["<bos>", "<t>", "<i>"], "image": 4, "text": 3}),
    {"a": "<bos> text{1} <i> image{4} <t>"},
)


def request_of(layout: Layout, seed: int) -> Request:
    null = Request(order="a", given={"text": torch.tensor([0])})
    return Request(order="a", given={"text": torch.tensor([2])}, seed=seed, null=null)


@torch.no_grad()
def exact_distribution(model: DecoderOnly, layout: Layout, config: SampleConfig) -> dict[tuple[int, ...], float]:
    """ln-free: the product of what every code is drawn from, over all pictures."""
    image, text, marker = layout.vocabulary["image"], layout.vocabulary["text"], layout.vocabulary.special("<i>")
    slot, found = Slot(((image.offset, image.end),)), {(): 1.0}
    for step in range(4):
        grown = {}
        for codes, before in found.items():
            logits = [
                model.logits(
                    model.hidden(torch.tensor([[0, text.offset + word, marker, *(image.offset + c for c in codes)]]))[
                        :, -1
                    ],
                    slot,
                )
                for word in (2, 0)
            ]
            scale = config.guidance_at(step, 4)
            probs = reshape(logits[0] if scale == 1 else guide(*logits, scale), config).softmax(-1)[0]
            grown |= {(*codes, code): before * float(prob) for code, prob in enumerate(probs)}
        found = grown
    return found


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(),
        SampleConfig(guidance_scale=2.0, temperature=1.3),
        SampleConfig(guidance_scale=2.0, guidance_interval=(1, 3)),
    ],
    ids=["plain", "guided", "guided for a while"],
)
@pytest.mark.parametrize("window", [1, 2, 4])
def test_every_way_that_drafts_can_go_adds_up_to_the_plain_distribution(window, config, monkeypatch):
    """The engine runs once for each series of outcomes that couplings can have; their probabilities are summed."""
    model = tiny_model(TINY).double()
    expected = exact_distribution(model, TINY, config)
    script: list[int] = []
    ways: list[tuple[int, int]] = []  # at each coupling: which outcome is taken, of how many
    weight = 1.0

    def couple(windows, probs, slot):
        nonlocal weight
        [window] = windows
        local = []
        for number, p in enumerate(probs):
            outcomes = p
            if number < len(window.drafts.token_ids):
                x, q = window.drafts.token_ids[number] - slot.ranges[0][0], window.drafts.probs[number]
                q = torch.eye(len(p), dtype=p.dtype)[x] if q is None else q
                stay = min(1.0, float(p[x] / q[x]))
                rest = (p - q).clamp(min=0)
                outcomes = (1 - stay) * rest / rest.sum() if stay < 1 else torch.zeros_like(p)
                outcomes[x] += stay
            possible = [code for code in range(len(p)) if outcomes[code] > 0]
            taken = script[len(ways)] if len(ways) < len(script) else 0
            ways.append((taken, len(possible)))
            weight *= float(outcomes[possible[taken]])
            local.append(possible[taken])
        return torch.tensor(local)

    monkeypatch.setattr(smalti.engine.speculative, "_couple_maximally", couple)
    found, num_ways = Counter(), 0
    while True:
        ways.clear()
        weight = 1.0
        engine = Engine(model, TINY, capacity=1, executor="eager")
        ticket = engine.submit(request_of(TINY, 0), replace(config, speculative=window))
        engine.run()
        found[tuple(engine.take(ticket).spans["image"].tolist())] += weight
        num_ways += 1
        while ways and ways[-1][0] == ways[-1][1] - 1:
            ways.pop()
        if not ways:
            break
        script = [taken for taken, _ in ways[:-1]] + [ways[-1][0] + 1]
    assert num_ways > 16
    assert math.isclose(sum(found.values()), 1, abs_tol=1e-12)
    for codes, probability in expected.items():
        assert math.isclose(found[codes], probability, abs_tol=1e-12)


@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
@pytest.mark.parametrize(
    "config", [SampleConfig(), SampleConfig(guidance_scale=1.7, temperature=0.9, top_p=0.95)], ids=["plain", "guided"]
)
def test_drawn_pictures_are_distributed_as_they_should(config, coupling):
    """Chi-square over all 256 pictures, the rare ones together."""
    model, num = tiny_model(SMALL, seed=1), 4000
    requests = [request_of(SMALL, seed) for seed in range(num)]
    ahead = replace(config, speculative=3, coupling=coupling)
    found = Counter(
        tuple(one.spans["image"].tolist()) for one in generate(model, SMALL, requests, ahead, batch_size=500)
    )
    expected = exact_distribution(model, SMALL, config)
    assert all(expected[codes] > 0 for codes in found)
    common = [codes for codes, probability in expected.items() if num * probability >= 5]
    observed = [found[codes] for codes in common]
    wanted = [num * expected[codes] for codes in common]
    if num - sum(wanted) > 1e-6:
        observed, wanted = [*observed, num - sum(observed)], [*wanted, num - sum(wanted)]
    assert len(common) > 20
    share = num / sum(wanted)  # 1 but for rounding, which scipy takes for a mistake
    assert scipy.stats.chisquare(observed, [share * one for one in wanted]).pvalue > 1e-3


def test_log_probs_are_those_of_the_teacher_forced_pass(executor):
    model = tiny_model(DIGITS)
    for coupling in ("maximal", "gumbel", "inverse"):
        config = SampleConfig(speculative=3, coupling=coupling)
        for found in generate(model, DIGITS, requests_of_all_kinds(), config, executor=executor):
            drawn = found.log_probs != 0
            assert torch.allclose(found.log_probs[drawn], teacher_forced(model, DIGITS, found)[drawn], atol=1e-5)
            assert torch.equal(found.log_probs, found.draw_log_probs)


# ---- in the engine ----


@pytest.mark.parametrize("coupling", ["maximal", "gumbel", "inverse"])
def test_fewer_passes_are_made_and_all_tokens_come_as_events(coupling, executor):
    """Of a model that is sure of itself nearly every draft stands."""
    model = tiny_model(DIGITS)
    with torch.no_grad():
        model.head.mul_(30)
    engine = Engine(model, DIGITS, capacity=1, executor=executor)
    ticket = engine.submit(picture_requests(1)[0], SampleConfig(speculative=4, coupling=coupling))
    steps = []
    while not engine.is_idle:
        steps.append(engine.step())
    events = [event for step in steps for event in step]
    assert len(steps) < 5
    assert [event.position for event in events] == [6, 7, 8, 9, 10]
    assert [event.token_id for event in events] == engine.take(ticket).token_ids[6:].tolist()


def test_open_spans_and_what_decides_the_order_take_one_token_a_pass(executor):
    model = tiny_model(CAPTIONS)
    requests = [Request(order="text to image", seed=seed) for seed in range(200)]
    found = generate(model, CAPTIONS, requests, SampleConfig(speculative=5), executor=executor)
    assert {len(one.spans["text"]) for one in found} == {0, 1, 2, 3, 4}
    assert all(len(one.spans["image"]) == 3 for one in found)
    assert {one.order for one in generate(tiny_model(DIGITS), DIGITS, requests_of_all_kinds()[6:], executor=executor)}


def test_how_many_drawn_tokens_stand():
    assert num_kept([], [4]) == 1
    assert num_kept([4, 5], [4, 5, 6]) == 3
    assert num_kept([4, 5], [4, 5]) == 2
    assert num_kept([4, 5], [4, 7, 6]) == 2
    assert num_kept([4, 5], [9, 5, 6]) == 1


def test_what_is_asked_for_wrongly_is_explained():
    with pytest.raises(ValueError, match=r"speculative is -1; expected 0 \(off\) to 1024 drafts"):
        SampleConfig(speculative=-1)
    with pytest.raises(ValueError, match="coupling is optimal; expected maximal, gumbel, inverse"):
        SampleConfig(coupling="optimal")

    class OfOneToken(DecoderOnly):
        extend_all = property()  # hasattr says no

    model = tiny_model(DIGITS)
    model.__class__ = OfOneToken
    engine = Engine(model, DIGITS, executor="eager")
    with pytest.raises(InputError, match="speculative 2: OfOneToken tells of the last token it runs alone"):
        engine.submit(picture_requests(1)[0], SampleConfig(speculative=2))
