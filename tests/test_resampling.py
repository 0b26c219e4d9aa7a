"""Codes drawn given all others: compared with the enumerated distribution of a tiny model."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from test_generate import tiny_model

from smalti.engine.resampling import ResampleConfig, num_steps, resample
from smalti.engine.sampling import SampleConfig, guide, reshape
from smalti.errors import InputError
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import Vocabulary

NUM_CODES = 3
LAYOUT = Layout.parse(
    Vocabulary({"special": ["<bos>", "<text>", "<image>"], "image": NUM_CODES, "text": 7}),
    {"text to image": "<bos> <text> text{3} <image> image{6}", "image alone": "<bos> <image> image{6}"},
)
TEXT, CODES = torch.tensor([2, 0, 5]), torch.tensor([1, 2, 0, 2, 1, 0])
DRAWN = (1, 2, 4)
"""Cells 0, 3 and 5 are kept: before, between and behind what is drawn."""
CONFIGS = {
    "plain": SampleConfig(),
    "reshaped": SampleConfig(temperature=0.8, top_k=2, guidance_scale=1.7, guidance_schedule="linear"),
}


def request(seed: int, *, guided: bool) -> Request:
    null = Request(order="image alone", given={"image": CODES[:1]}) if guided else None
    return Request(
        order="text to image",
        given={"text": TEXT, "image": CODES[:1]},
        kept={"image": {3: 2, 5: 0}},
        seed=seed,
        null=null,
    )


def log_q(model, codes: torch.Tensor, config: SampleConfig, *, blind: bool = False) -> torch.Tensor:
    """ln Π q_j over the cells from 1 on, by whole passes over all sequences; `blind` to what the kept ones cost."""
    vocabulary = LAYOUT.vocabulary
    image, [bos, begin_text, begin_image] = (
        vocabulary["image"].offset,
        map(vocabulary.special, ("<bos>", "<text>", "<image>")),
    )
    begins = [[bos, begin_text, *(vocabulary["text"].offset + TEXT).tolist(), begin_image], [bos, begin_image]]
    slot = LAYOUT.slots[LAYOUT.slot_index("text to image", len(LAYOUT["text to image"].parts) - 1)]
    total = torch.zeros(len(codes), dtype=torch.float64)
    with torch.no_grad():
        logits = []
        for begin in begins:
            whole = torch.cat([torch.tensor(begin).expand(len(codes), -1), codes + image], dim=1)
            logits.append(model.logits(model.hidden(whole)[:, len(begin) - 1 : -1], slot))
        for cell in range(1, 6):
            found = guide(logits[0][:, cell], logits[1][:, cell], config.guidance_at(cell, 6))
            found = reshape(found, config) if cell in DRAWN else found / config.temperature
            if blind and cell not in DRAWN:
                continue
            total += found.double().log_softmax(-1).gather(1, codes[:, cell : cell + 1])[:, 0]
    return total


def sharp_model():
    """In which the cells behind tell much of those before them: what does not look ahead is off by a quarter."""
    model = tiny_model(LAYOUT, seed=7)
    for parameter in model.parameters():
        parameter.data.mul_(2.5)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def posterior(request):
    return enumerated(CONFIGS[request.param])


def enumerated(config: SampleConfig) -> tuple:
    """The model, the settings, all 27 pictures that agree with what is kept, and how likely each is."""
    model = sharp_model()
    every = CODES.repeat(NUM_CODES ** len(DRAWN), 1)
    every[:, DRAWN] = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=len(DRAWN))))
    return model, config, every, log_q(model, every, config).softmax(0)


def counts_of(tokens: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    codes = tokens - LAYOUT.vocabulary["image"].offset
    same = (codes[:, None] == every[None, :, 1:]).all(2)
    assert bool((same.sum(1) == 1).all())  # what is kept is there, and is the kept
    return same.sum(0)


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Of the chi-square test; outcomes that are expected fewer than 5 times are counted together."""
    assert int(counts[probs == 0].sum()) == 0
    expected = probs * counts.sum()
    often = expected >= 5
    pooled = (
        torch.cat([counts[often], counts[~often].sum()[None]]),
        torch.cat([expected[often], expected[~often].sum()[None]]),
    )
    kept = pooled[1] > 0
    return float(chisquare(pooled[0][kept].numpy(), pooled[1][kept].numpy()).pvalue)


def drawn(model, config, num: int, resampling: ResampleConfig, **more) -> torch.Tensor:
    requests = [request(seed, guided=config.guidance_scale != 1) for seed in range(num)]
    return resample(model, LAYOUT, requests, config, resampling, executor="packed", **more)


def test_particles_are_drawn_from_the_posterior(posterior):
    model, config, every, probs = posterior
    counts = counts_of(drawn(model, config, 300, ResampleConfig(num_particles=48, num_sweeps=0)), every)
    assert p_value(counts, probs) > 0.001
    # The test can tell: without what the kept cells cost it is another distribution.
    assert p_value(counts, log_q(model, every, config, blind=True).softmax(0)) < 1e-6


@pytest.mark.parametrize("num_particles", [2, 4], ids=["two candidates", "every code"])
def test_sweeps_leave_the_posterior_as_it_is(posterior, num_particles):
    """From pictures that are drawn from the enumerated posterior, with any number of candidates."""
    model, config, every, probs = posterior
    start = every[torch.multinomial(probs, 500, replacement=True, generator=torch.Generator().manual_seed(0))]
    tokens = start[:, 1:] + LAYOUT.vocabulary["image"].offset
    resampling = ResampleConfig(num_particles=num_particles, num_sweeps=2)
    found = drawn(model, config, 500, resampling, start=tokens)
    assert p_value(counts_of(found, every), probs) > 0.001
    assert float((found != tokens).any(1).float().mean()) > 0.1  # they do move


def test_sweeps_reach_the_posterior_from_anywhere():
    model, config, every, probs = enumerated(CONFIGS["plain"])
    start = every[probs.argmin()]
    tokens = (start[1:] + LAYOUT.vocabulary["image"].offset).expand(300, -1)
    found = drawn(model, config, 300, ResampleConfig(num_particles=4, num_sweeps=6), start=tokens)
    assert p_value(counts_of(found, every), probs) > 0.001


def test_a_picture_depends_on_its_own_seed_alone():
    model, resampling, steps = sharp_model(), ResampleConfig(num_particles=8, num_sweeps=2), []
    config = CONFIGS["reshaped"]
    requests = [request(seed, guided=True) for seed in range(7)]
    together = resample(model, LAYOUT, requests, config, resampling, executor="packed", on_step=lambda: steps.append(0))
    assert len(steps) == num_steps(LAYOUT, requests, config, resampling) == 5 + 2 * len(DRAWN)
    for seed in (0, 3, 6):
        alone = resample(model, LAYOUT, requests[seed : seed + 1], config, resampling, executor="packed")
        assert torch.equal(alone[0], together[seed])
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_what_cannot_be_resampled_is_explained():
    model = tiny_model(LAYOUT)
    with pytest.raises(InputError, match="temperature 0 draws one and the same"):
        resample(model, LAYOUT, [request(0, guided=False)], SampleConfig(temperature=0))
    with pytest.raises(ValueError, match="num_particles is 1; expected 2"):
        ResampleConfig(num_particles=1)
    with pytest.raises(ValueError, match="num_sweeps is -1; expected 0"):
        ResampleConfig(num_sweeps=-1)
    with pytest.raises(ValueError, match="null condition"):
        resample(model, LAYOUT, [request(0, guided=False)], SampleConfig(guidance_scale=2.0))
    other = replace(request(0, guided=False), kept={"image": {2: 1}})
    with pytest.raises(ValueError, match="not alike"):
        resample(model, LAYOUT, [request(0, guided=False), other], SampleConfig())
