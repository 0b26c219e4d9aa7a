"""Static steps, what a GPU captures and a compiler fuses, called directly: the plain path's numbers, one function of
tensors that stay on the device, and nothing in it that waits for one."""

import math
from dataclasses import replace

import pytest
import torch
from test_devices import Waits
from test_executors import KINDS, LAYOUT, MAX_LENGTH, B, decoder_only, layout_model, small_weights, tokens

from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS, StaticSteps, choose_executor, make_executor
from smalti.engine.executors.compiled import Compiled
from smalti.engine.executors.static_steps import Inputs, StaticPlaces, static_step
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig, Settings, filter_logits, filter_rows, sample, sample_rows, settings_of
from smalti.errors import InputError
from smalti.models.decode_state import SLOT_BLOCK
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary


class Direct(StaticSteps):
    """A step as it is, of which it counts how many there are and how often they run."""

    name = "direct"
    prepared = launched = 0

    def prepare(self, step):
        type(self).prepared += 1

        def launch():
            type(self).launched += 1
            step()

        return launch


class Traced(Compiled):
    """As `compiled`, without what makes it fast: a step must be one graph without a break."""

    name = "traced"
    backend = "aot_eager"


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Direct, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)
    Direct.prepared = Direct.launched = 0


CONFIGS = [
    SampleConfig(temperature=0),
    SampleConfig(),
    SampleConfig(temperature=0.7, top_k=5, guidance_scale=2.5, guidance_schedule="cosine"),
    SampleConfig(top_p=0.8, min_p=0.05, guidance_scale=-1.5),
    SampleConfig(guidance_scale=2.0, guidance_interval=(2, 7)),
]
NULL = Request(order="image to text")


def asked(count: int) -> list[Request]:
    found = [Request(order="image to text", seed=seed, null=NULL) for seed in range(count // 2)]
    return found + [
        Request(order="text to image", given={"text": torch.tensor([seed % 7, 3, 5])}, seed=seed, null=NULL)
        for seed in range(count - len(found))
    ]


def assert_same(found, expected) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.token_ids, plain.token_ids)
        assert torch.allclose(ours.log_probs, plain.log_probs, atol=1e-4)
        assert torch.allclose(ours.draw_log_probs, plain.draw_log_probs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_equal_the_full_forward_pass(kind):
    model, token_ids = small_weights(decoder_only(torch.float32, **KINDS[kind])), tokens(MAX_LENGTH)
    executor, expected = Direct(model), model.hidden(token_ids)
    for rows in (slice(0, B), slice(2, 2 + B)):
        state, end = executor.new_state(B + 4), 0
        for size in [2, 1, 1, 3, *[1] * (MAX_LENGTH - 7)]:
            hidden = executor.extend(state, rows, token_ids[:, end : end + size].tolist())
            end += size
            assert state.lengths[rows] == [end] * B
            assert torch.allclose(hidden, expected[:, end - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_full_row_beside_those_that_run_is_left_alone():
    model = decoder_only(torch.float32, max_length=SLOT_BLOCK)
    executor = Direct(model)
    state = executor.new_state(4)
    executor.extend(state, [3], [[7] * SLOT_BLOCK])
    before = [both[:, 3].clone() for both in state.both]
    for _ in range(2):
        executor.extend(state, slice(0, 3), [[1], [2], [3]])
    assert all(torch.equal(both[:, 3], held) for both, held in zip(state.both, before, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tokens_are_those_of_the_plain_path_in_any_batch(config):
    model, requests = layout_model(), asked(13)
    expected = generate(model, LAYOUT, requests, config, executor="eager")
    for size in (64, 3):
        assert_same(generate(model, LAYOUT, requests, config, executor="direct", batch_size=size), expected)


def test_a_step_is_one_graph_to_a_compiler():
    torch.compiler.reset()
    model, requests = layout_model(), asked(3)[1:]
    config = SampleConfig(temperature=0.7, top_k=5, guidance_scale=2.5)
    found = generate(model, LAYOUT, requests, config, executor="traced")
    assert_same(found, generate(model, LAYOUT, requests, config, executor="eager"))


def test_requests_of_all_settings_share_a_step_and_come_and_go():
    """Step by step, as a server has it, and to the end at once."""
    model, requests = layout_model(), asked(12)
    engine = Engine(model, LAYOUT, capacity=5, executor="direct")
    events = []
    for number, request in enumerate(requests):
        engine.submit(request, CONFIGS[number % 5])
        if number % 3 == 0:
            events += engine.step()
    engine.run()
    for number, request in enumerate(requests):
        (alone,) = generate(model, LAYOUT, [request], CONFIGS[number % 5], executor="eager")
        assert_same([engine.take(number)], [alone])
        own = [(event.position, event.token_id) for event in events if event.ticket == number]
        assert own == [(position, int(alone.token_ids[position])) for position, _ in own]


def test_settings_of_one_step_may_differ():
    """Without guidance here, hot and greedy, filtered and not, in one run of the device."""
    model = layout_model()
    configs = [SampleConfig(temperature=0), SampleConfig(temperature=1.3), SampleConfig(top_k=3, min_p=0.1)]
    requests = [Request(order="image to text", seed=seed) for seed in range(3)]
    engine = Engine(model, LAYOUT, capacity=3, guided_capacity=0, executor="direct")
    for request, config in zip(requests, configs, strict=True):
        engine.submit(request, config)
    engine.run()
    assert Direct.launched == 10 + 2  # eleven codes, the first behind the prompt; three text ids, likewise
    for number, (request, config) in enumerate(zip(requests, configs, strict=True)):
        assert_same([engine.take(number)], generate(model, LAYOUT, [request], config, executor="eager"))


@pytest.mark.parametrize("config", [*CONFIGS, SampleConfig(top_k=4, top_p=0.7), SampleConfig(top_k=99)], ids=str)
def test_settings_in_tensors_drop_and_draw_what_those_in_numbers_do(config):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-9, 9, (64, 31), generator=generator) / 4  # with equals
    logits[:, 7] = -math.inf
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    settings = Settings.of(settings_of([config] * 64))
    if config.temperature:
        kept = filter_logits(logits, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        assert torch.equal(filter_rows(logits, settings), kept)
    expected = sample(logits, uniforms, config)
    for filtered in {True, config.is_filtered}:
        ids, log_probs = sample_rows(logits, uniforms, settings, filtered=filtered)
        assert torch.equal(ids, expected[0]) and torch.allclose(log_probs, expected[1], atol=1e-6)


LONG = 2 * SLOT_BLOCK + 9
NO_CLASS = Request(order="class", given={"label": torch.tensor([4])})
PICTURES = Layout.parse(Vocabulary({"label": 5, "image": 23}), {"class": f"(label{{1}}) image{{{LONG}}}"})


def test_a_picture_is_drawn_without_the_host_and_in_few_steps(monkeypatch):
    """One call, which reads once; of every width of the state one step is prepared, for up to a power of two rows."""
    model = layout_model()
    longer = replace(model.config.transformer, max_length=LONG + 1)
    torch.manual_seed(0)
    model = type(model)(replace(model.config, vocab_size=28, head_ranges=((5, 28),), transformer=longer)).eval()
    requests = [
        Request(order="class", given={"label": torch.tensor([seed])}, seed=seed, null=NO_CLASS) for seed in range(3)
    ]
    config = SampleConfig(guidance_scale=2.0, temperature=0.8)
    reads = []
    real = StaticSteps.draw_ahead
    monkeypatch.setattr(StaticSteps, "draw_ahead", lambda *given: reads.append(1) or real(*given))
    found = generate(model, PICTURES, requests, config, executor="direct")
    assert_same(found, generate(model, PICTURES, requests, config, executor="eager"))
    assert (len(reads), Direct.launched, Direct.prepared) == (1, LONG, 1 + 3)  # one of them for the labels


class Asks(Waits):
    """And what reads a device in other ways."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        lengths = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        self.num += name.lstrip("_") in [one.lstrip("_") for one in self.WAITS] or by_mask or lengths or moved
        return found


def test_what_makes_the_host_wait_is_seen():
    values = torch.tensor([1.0, 2.0])
    for wait in (
        lambda: values[0].item(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: bool(values.sum() > 1),
    ):
        with Asks() as asks:
            wait()
        assert asks.num > 0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_makes_nobody_wait(config, monkeypatch):
    seen = []

    def watched(_, step):
        def launch():
            with Asks() as asks:
                step()
            seen.append(asks.num)

        return launch

    monkeypatch.setattr(Direct, "prepare", watched)
    engine = Engine(layout_model(), LAYOUT, capacity=4, executor="direct")
    for request in asked(4)[2:]:
        engine.submit(request, config)
    engine.run()
    assert len(seen) >= 8 and set(seen) == {0}


@torch.no_grad()
def test_no_device_is_written_into_a_step():
    """On the device `meta` a tensor made elsewhere fails, and so does whatever depends on a number."""
    model = layout_model().to("meta")
    state, slot = model.new_state(8), LAYOUT.slots[-1]
    for start, filtered in ((1, True), (4, False)):
        inputs = Inputs(model, state, start, 4, 7)
        places = StaticPlaces(state, slice(start, 7), inputs.slots, SLOT_BLOCK)
        static_step(model, inputs, places, slot, filtered)
        static_step(model, inputs, places, None, False)
        assert inputs.drawn.device.type == "meta"


def test_what_is_compiled_is_taken_by_name_alone():
    model = layout_model()
    assert Compiled.why_not(model) == [] and choose_executor(model) not in ("compiled", "direct", "traced")
    with pytest.raises(InputError, match="'cuda_graph' cannot run this model here: the model is on cpu, not on a GPU"):
        make_executor(model, "cuda_graph")
    with pytest.raises(InputError, match="the model is in training mode"):
        make_executor(model.train(), "compiled")
