"""The engine: whatever comes and goes beside it, a request is carried out as it is alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_generate import CAPTIONS, DIGITS, teacher_forced, tiny_model

from smalti.engine.engine import Engine, Event
from smalti.engine.sampling import SampleConfig
from smalti.sequences.request import Request

MODELS = {"digits": (tiny_model(DIGITS), DIGITS), "captions": (tiny_model(CAPTIONS), CAPTIONS)}
CONFIGS = [
    SampleConfig(),
    SampleConfig(temperature=0),
    SampleConfig(temperature=0.7, top_k=4),
    SampleConfig(guidance_scale=2.5),
    SampleConfig(guidance_scale=3.0, guidance_interval=(2, 4), top_p=0.9),
    SampleConfig(guidance_scale=1.5, guidance_schedule="linear"),
    SampleConfig(speculative=3),
    SampleConfig(speculative=2, guidance_scale=3.0, guidance_interval=(2, 4), temperature=0.8),
    SampleConfig(speculative=9, coupling="gumbel", guidance_scale=1.5),
    SampleConfig(speculative=3, coupling="inverse", top_k=4),
]


@pytest.fixture(params=["native", "packed", "eager"])
def executor(request) -> str:
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


def requests(layout_name: str, seed: int, kind: int) -> Request:
    if layout_name == "captions":
        given_ = {"text": torch.tensor([1, 4, 2, 0])[: kind % 5]} if kind % 6 else {}
        return Request(order="text to image", given=given_, seed=seed)
    null = Request(order="image to text")
    text, image = torch.tensor([2, 0, kind % 7]), torch.tensor([12, 3, 7, 0, 5])
    return [
        Request(order="text to image", given={"text": text}, seed=seed, null=null),
        Request(order="text to image", given={"text": text, "image": image[: kind % 5]}, seed=seed, null=null),
        Request(order="image to text", seed=seed, null=null),
        Request(order="image to text", given={"image": image[: kind % 6]}, seed=seed, null=null),
    ][kind % 4]


def fits(layout_name: str, request: Request, config: SampleConfig) -> bool:
    """The null of these requests leaves the spans of a picture alone."""
    if config.guidance_scale == 1:
        return True
    return layout_name == "digits" and "text" in request.given and "image" not in request.given


def alone(model, layout, request, config, executor) -> tuple[list, list]:
    engine = Engine(model, layout, capacity=1, executor=executor)
    ticket = engine.submit(request, config)
    engine.run()
    found = engine.take(ticket)
    return found.token_ids.tolist(), found.draw_log_probs.tolist()


ARRIVAL = st.tuples(st.integers(0, 99), st.integers(0, 40), st.sampled_from(CONFIGS))
ACTION = st.one_of(ARRIVAL, st.just("step"), st.just("step"), st.integers(0, 5))  # a number: cancel one


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(ACTION, max_size=25),
    capacity=st.integers(1, 5),
    guided_capacity=st.integers(1, 5),
    watched=st.booleans(),
)
@pytest.mark.parametrize("layout_name", MODELS)
def test_arrivals_and_cancels_beside_it_change_nothing(
    layout_name, executor, actions, capacity, guided_capacity, watched
):
    """Requests of all kinds and settings come at any times, some are cancelled; each that ends is as it is alone,
    whether its tokens are watched to the end or not."""
    model, layout = MODELS[layout_name]
    engine = Engine(model, layout, capacity=capacity, guided_capacity=guided_capacity, executor=executor)
    submitted: dict[int, tuple[Request, SampleConfig]] = {}
    streamed: list[Event] = []
    for action in actions:
        going = [ticket for ticket in submitted if ticket not in engine.finished]
        if action == "step":
            streamed += engine.step()
        elif isinstance(action, int) and going:
            ticket = going[action % len(going)]
            engine.cancel(ticket)
            del submitted[ticket]
        elif isinstance(action, tuple):
            request, config = requests(layout_name, *action[:2]), action[2]
            if fits(layout_name, request, config):
                submitted[engine.submit(request, config)] = request, config
    while watched and not engine.is_idle:
        streamed += engine.step()
    engine.run()
    for ticket, (request, config) in submitted.items():
        found = engine.take(ticket)
        token_ids, draw_log_probs = alone(model, layout, request, config, executor)
        assert found.token_ids.tolist() == token_ids
        assert torch.allclose(found.draw_log_probs, torch.tensor(draw_log_probs), atol=1e-5)
        own = [event for event in streamed if event.ticket == ticket]
        first = own[0].position if own else 0
        assert [event.position for event in own] == list(range(first, first + len(own)))
        assert [event.token_id for event in own] == token_ids[first : len(token_ids) if watched else first + len(own)]
    assert not engine.finished


@pytest.mark.parametrize("config", CONFIGS[:6])
def test_what_all_draw_alike_is_looked_up_once_and_is_the_same(executor, config, monkeypatch):
    model, layout = MODELS["digits"]
    engine = Engine(model, layout, capacity=4, executor=executor)
    asked = [requests("digits", seed, 4) for seed in range(6)]  # two wait until the others have left
    tickets = [engine.submit(request, config) for request in asked]
    together: list[int] = []
    draw_alike = engine._draw_alike
    monkeypatch.setattr(engine, "_draw_alike", lambda number: together.append(number) or draw_alike(number))
    engine.run()
    assert together and min(together) > 1
    for ticket, request in zip(tickets, asked, strict=True):
        found = engine.take(ticket)
        token_ids, draw_log_probs = alone(model, layout, request, config, executor)
        assert found.token_ids.tolist() == token_ids
        assert torch.allclose(found.draw_log_probs, torch.tensor(draw_log_probs), atol=1e-5)


def test_a_scale_that_is_a_whole_number_is_that_number(executor):
    model, layout = MODELS["digits"]
    asked = requests("digits", 5, 0)
    whole, real = (alone(model, layout, asked, SampleConfig(guidance_scale=scale), executor) for scale in (3, 3.0))
    assert whole == real


def rows_in_use(engine: Engine) -> int:
    return len(engine.active) + len(engine.guided)


def test_a_guided_request_takes_two_rows_and_leaves_with_both():
    model, layout = MODELS["digits"]
    engine = Engine(model, layout, capacity=3, guided_capacity=1)
    first, second = (requests("digits", seed, 0) for seed in range(2))
    one = engine.submit(first, CONFIGS[3])
    two = engine.submit(second, CONFIGS[3])  # waits: there is one null row
    three = engine.submit(first)
    engine.step()
    assert rows_in_use(engine) == 2 and [running.ticket for running in engine.active] == [one]
    engine.cancel(one)
    assert rows_in_use(engine) == 0
    engine.step()
    assert rows_in_use(engine) == 3 and [running.ticket for running in engine.active] == [two, three]
    engine.cancel(two)
    assert rows_in_use(engine) == 1
    with pytest.raises(KeyError):
        engine.cancel(two)
    engine.run()
    assert engine.take(three).token_ids.tolist() == alone(model, layout, first, CONFIGS[0], None)[0]
    with pytest.raises(KeyError):
        engine.take(three)


def test_a_prompt_is_run_once_for_all_its_candidates(executor, monkeypatch):
    model, layout = MODELS["digits"]
    engine = Engine(model, layout, capacity=8, executor=executor)
    for seed in range(8):
        engine.submit(requests("digits", seed, 0), CONFIGS[3])
    run, counts = engine._run, []

    def counting(rows, tokens):
        counts.append([len(row) for row in tokens])
        run(rows, tokens)

    monkeypatch.setattr(engine, "_run", counting)
    engine.run()
    assert counts == [[2, 6], *([[1] * 16] * 4)]  # the null condition and the caption; then every row of the pictures
    for seed in range(8):
        request = requests("digits", seed, 0)
        assert engine.take(seed).token_ids.tolist() == alone(model, layout, request, CONFIGS[3], executor)[0]


def test_what_is_certain_is_run_with_what_is_drawn(executor, monkeypatch):
    """A caption drawn, then the two markers, then the picture: no step is spent on a marker."""
    model, layout = MODELS["digits"]
    engine = Engine(model, layout, capacity=1, executor=executor)
    ticket = engine.submit(Request(order="text to image", seed=3))
    run, counts = engine._run, []

    def counting(rows, tokens):
        counts.append([len(row) for row in tokens])
        run(rows, tokens)

    monkeypatch.setattr(engine, "_run", counting)
    events = []
    while not engine.is_idle:
        events.append([event.position for event in engine.step()])
    assert counts == [[2], [1], [1], [2], [1], [1], [1], [1]]
    assert events == [[2], [3], [4, 5], [6], [7], [8], [9], [10]]
    found = engine.take(ticket)
    drawn = found.log_probs != 0
    assert torch.allclose(found.log_probs[drawn], teacher_forced(model, layout, found)[drawn], atol=1e-5)


def test_what_was_not_finite_does_not_reach_who_comes_next(executor):
    """A row's memory is used again."""
    model, layout = MODELS["digits"]
    engine = Engine(model, layout, capacity=1, executor=executor)
    ticket = engine.submit(requests("digits", 0, 0))
    engine.step()
    with torch.inference_mode():
        for both in engine.state.both:
            both[:, engine.active[0].row] = torch.nan
    engine.run()
    engine.take(ticket)
    ticket = engine.submit(requests("digits", 1, 0))
    engine.run()
    expected, _ = alone(model, layout, requests("digits", 1, 0), CONFIGS[0], executor)
    assert engine.take(ticket).token_ids.tolist() == expected


def test_what_an_engine_cannot_do_is_explained():
    model, layout = MODELS["digits"]
    with pytest.raises(ValueError, match="capacity is 0"):
        Engine(model, layout, capacity=0)
    with pytest.raises(ValueError, match="training mode"):
        Engine(tiny_model(DIGITS).train(), layout)
    engine = Engine(model, layout, guided_capacity=0)
    with pytest.raises(ValueError, match="without room for guided requests"):
        engine.submit(requests("digits", 0, 0), CONFIGS[3])
    engine.submit(requests("digits", 0, 0))
    with pytest.raises(ValueError, match="needs a null condition"):
        Engine(model, layout).submit(Request(order="text to image"), CONFIGS[3])
