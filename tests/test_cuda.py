"""On a GPU (pytest --device cuda): the contract of executors again. The same numbers as on a CPU, and captured steps
equal to the model's own. Skipped, visibly, where there is none."""

import pytest
import torch
from test_executors import KINDS, MAX_LENGTH, B, decoder_only, layout_model, small_weights, tokens
from test_generate import DIGITS, tiny_model
from test_static_steps import LONG, NO_CLASS, PICTURES, Direct

from smalti.engine.beam import beam_search
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS, Ahead, choose_executor, make_executor
from smalti.engine.executors.cuda_graph import CudaGraph
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.likelihood import score
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import SLOT_BLOCK
from smalti.models.decoder_only import new_model
from smalti.sequences.layout import SpanValues

pytestmark = pytest.mark.usefixtures("gpu")

CONFIGS = [
    SampleConfig(temperature=0),
    SampleConfig(),
    SampleConfig(temperature=0.7, top_k=5, guidance_scale=2.5),
    SampleConfig(guidance_scale=2.0, guidance_interval=(2, 4)),
    SampleConfig(top_p=0.8, min_p=0.05, guidance_scale=-1.5),
]


@pytest.fixture(params=["eager", "cuda_graph"])
def name(request) -> str:
    return request.param


@pytest.fixture
def long_model():
    """Of pictures over several widths of the state, with their layout."""
    torch.manual_seed(0)
    sizes = dict(num_layers=2, d_model=24, num_heads=4, d_ff=20, max_length=LONG + 1)
    model = new_model(PICTURES, TransformerConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def requests(count: int) -> list[Request]:
    null = Request(order="image to text")
    given = [{"text": torch.tensor([seed % 7, 0, 6])} for seed in range(count)]
    return [Request(order="text to image", given=text, seed=seed, null=null) for seed, text in enumerate(given)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_are_those_of_a_cpu(kind, name):
    model, token_ids = small_weights(decoder_only(torch.float32, **KINDS[kind])), tokens(MAX_LENGTH)
    expected = model.hidden(token_ids)
    executor = make_executor(model.cuda(), name)
    for rows in (slice(0, B), slice(2, 2 + B)):
        state, end = executor.new_state(B + 4), 0
        for size in [2, 1, 1, 3, *[1] * (MAX_LENGTH - 7)]:
            hidden = executor.extend(state, rows, token_ids[:, end : end + size].tolist())
            end += size
            assert torch.allclose(hidden.cpu(), expected[:, end - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tokens_are_those_of_a_cpu(config, name):
    model = tiny_model(DIGITS)
    expected = generate(model, DIGITS, requests(11), config, executor="eager")
    for size in (1, 7, 64):
        found = generate(model.cuda(), DIGITS, requests(11), config, executor=name, batch_size=size)
        for ours, plain in zip(found, expected, strict=True):
            assert torch.equal(ours.token_ids, plain.token_ids)
            assert torch.allclose(ours.log_probs, plain.log_probs, atol=1e-4)


def test_a_step_across_blocks_of_slots_is_captured_again():
    model = layout_model()
    assert model.config.transformer.max_length < SLOT_BLOCK  # the layout's; a longer one has several
    torch.manual_seed(0)
    long = decoder_only(torch.float32, max_length=3 * SLOT_BLOCK).cuda()
    token_ids = torch.randint(0, 29, (3, 2 * SLOT_BLOCK + 5))
    with torch.no_grad():
        expected = long.hidden(token_ids.cuda())
    executor = make_executor(long, "cuda_graph")
    state = executor.new_state(4)
    for at in range(token_ids.shape[1]):
        hidden = executor.extend(state, slice(0, 3), token_ids[:, at : at + 1].tolist())
        assert torch.allclose(hidden, expected[:, at], atol=1e-3, rtol=1e-3)


def test_arrivals_beside_it_change_nothing(name):
    model = tiny_model(DIGITS).cuda()
    engine = Engine(model, DIGITS, capacity=5, executor=name)
    asked = requests(12)
    for number, request in enumerate(asked):
        engine.submit(request, CONFIGS[number % 5])
        if number % 3 == 0:
            engine.step()
    engine.run()
    for number, request in enumerate(asked):
        (alone,) = generate(model, DIGITS, [request], CONFIGS[number % 5], executor=name)
        assert torch.equal(engine.take(number).token_ids, alone.token_ids)


@pytest.mark.parametrize("executor", ["cuda_graph", "compiled"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_whole_pictures_are_those_of_the_model_itself(executor, temperature, long_model):
    """Drawn without the host between their codes, through all widths of the state."""
    asked = [
        Request(order="class", given={"label": torch.tensor([seed % 4])}, seed=seed, null=NO_CLASS) for seed in range(5)
    ]
    config = SampleConfig(guidance_scale=2.0, temperature=temperature)
    expected = generate(long_model, PICTURES, asked, config, executor="eager")
    found = generate(long_model.cuda(), PICTURES, asked, config, executor=executor)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.token_ids, plain.token_ids)
        assert torch.allclose(ours.log_probs, plain.log_probs, atol=1e-3)


@pytest.mark.parametrize("executor", ["cuda_graph", "compiled"])
def test_a_captured_step_is_the_step(executor, long_model):
    """What is captured, called directly on the CPU and replayed: hidden states and what is drawn from them."""
    found = []
    for device, name in (("cpu", "direct"), ("cuda", executor)):
        model = long_model.to(device)
        runner = (Direct if name == "direct" else EXECUTORS[name])(model)
        with torch.inference_mode():
            state = runner.new_state(8)
            hidden = runner.extend(state, slice(1, 7), [[0], [1], [2], [3], [4], [1]]).cpu().clone()
            uniforms = torch.rand(70, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            configs = [SampleConfig(temperature=0), SampleConfig(top_k=5), SampleConfig(top_p=0.9, min_p=0.01)]
            ahead = Ahead(
                slice(4, 7), [3, 1, 2], [8, 9, 10], PICTURES.slots[-1], uniforms, torch.full((70, 3), 2.0), configs
            )
            found.append((hidden, runner.draw_ahead(state, ahead)))
            assert state.lengths == [0, *[71] * 6, 0]
    (hidden, drawn), (captured, replayed) = found
    assert torch.allclose(captured, hidden, atol=1e-4, rtol=1e-4)
    assert [[token[0] for token in step] for step in replayed] == [[token[0] for token in step] for step in drawn]
    assert torch.allclose(torch.tensor(replayed), torch.tensor(drawn), atol=1e-3)


def test_nothing_waits_between_the_codes_of_a_picture(long_model):
    """CUDA refuses, and says where, if anything would."""
    runner = CudaGraph(long_model.cuda())
    with torch.inference_mode():
        state, uniforms = runner.new_state(4), torch.rand(20, 2, dtype=torch.float64)
        ahead = Ahead(slice(2, 4), [1, 0], [8, 9], PICTURES.slots[-1], uniforms, uniforms.float(), [SampleConfig()] * 2)
        runner.draw_ahead(state, ahead)  # captures
        torch.cuda.set_sync_debug_mode("error")
        try:
            for launch in runner.launches.values():
                launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_beams_and_scores_are_those_of_a_cpu():
    model, asked = tiny_model(DIGITS), requests(3)
    spans = {
        "text": SpanValues(torch.tensor([[1, 2, 3], [0, 6, 5]]), torch.tensor([3, 3])),
        "image": SpanValues(torch.tensor([[1, 2, 3, 4, 5], [12, 0, 1, 7, 7]]), torch.tensor([5, 5])),
    }
    found = []
    for device in ("cpu", "cuda"):
        beams = beam_search(model.to(device), DIGITS, asked, 3)
        nats = score(model, DIGITS, "text to image", spans)
        found.append(([[beam.token_ids.tolist() for beam in some] for some in beams], nats))
    assert found[0][0] == found[1][0]
    for name, nats in found[0][1].items():
        assert torch.allclose(nats, found[1][1][name], atol=1e-4)


def test_graphs_are_what_is_chosen():
    assert choose_executor(tiny_model(DIGITS).cuda()) == "cuda_graph"
    assert choose_executor(tiny_model(DIGITS).cuda().bfloat16()) == "cuda_graph"
