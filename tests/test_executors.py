"""Every executor against the full forward pass: hidden states, logits, draws; a row knows nothing of its batch."""

import os
from dataclasses import replace

import pytest
import torch

import smalti.engine.executors.native
from smalti import native
from smalti.engine.beam import beam_search
from smalti.engine.executors import EXECUTORS, Eager, choose_executor, make_executor
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig, guide, log_prob_of, sample
from smalti.errors import InputError
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig, new_model
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.vocabulary import Vocabulary

B, V, MAX_LENGTH = 5, 29, 13
LAYOUT = Layout.parse(
    Vocabulary({"special": ["<bos>", "<end of image>", "<end of text>"], "image": 13, "text": 7}),
    {
        "text to image": "<bos> <end of image> text{3} <end of text> image{11}",
        "image to text": "<bos> <end of text> image{11} <end of image> text{3}",
    },
)
KINDS = {
    "gpt-2": {},
    "gelu_tanh, sinusoidal": dict(feed_forward="gelu_tanh", positions="sinusoidal"),
    "relu, no positions": dict(feed_forward="relu", positions="none"),
    "tanh, one key-value head": dict(feed_forward="tanh", num_kv_heads=1),
    "llama, grouped heads": dict(
        num_kv_heads=2, norm="rms", feed_forward="swiglu", bias=False, positions="rotary", rotary_base=100.0
    ),
    "llamagen": dict(norm="rms", feed_forward="swiglu", positions="rotary_2d", grid=(3, 4), prefix_length=1),
    "qk_norm, rms, grouped": dict(qk_norm=True, norm="rms", positions="rotary", num_kv_heads=3),
    "qk_norm, layer": dict(qk_norm=True),
    "wide heads": dict(head_width=14, num_kv_heads=3, norm="rms", feed_forward="swiglu", positions="rotary"),
    "narrow heads": dict(head_width=2, positions="rotary"),
}


def decoder_only(dtype: torch.dtype = torch.float64, **options) -> DecoderOnly:
    torch.manual_seed(0)
    sizes = dict(num_layers=3, d_model=24, num_heads=6, d_ff=17, max_length=MAX_LENGTH)
    model = DecoderOnly(DecoderOnlyConfig(vocab_size=V, transformer=TransformerConfig(**(sizes | options))))
    return _with_large_weights(model).to(dtype)


def _with_large_weights(model: DecoderOnly) -> DecoderOnly:
    for parameter in model.parameters():  # biases too: a tiny model at its usual start hides mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, V, (B, length), generator=torch.Generator().manual_seed(1))


# Widths around those of vectors and panels: whole ones, several, and what is left over.
SIZES = {
    "small": {},
    "whole vectors": dict(d_model=128, num_heads=4, d_ff=256),
    "left over": dict(d_model=152, num_heads=2, d_ff=93),
}
SLOTS = [None, Slot(((3, 17),)), Slot(((2, 3), (11, 29)))]
ALL = slice(0, B)


@pytest.fixture(params=["native", "packed", "eager"])
def name(request) -> str:
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


@pytest.fixture(params=["native", "packed"])
def exact_name(request) -> str:
    """Of an executor whose rows do not depend on others to the last bit."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def small_weights(model: DecoderOnly) -> DecoderOnly:
    """As `decoder_only` makes them a wide model's sums are so large that rounding alone shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def options_of(kind: str, size: str) -> dict:
    options = KINDS[kind] | SIZES[size]
    if size != "small" and "num_kv_heads" in options:
        options["num_kv_heads"] = 1
    if size != "small":
        options.pop("head_width", None)
    return options


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_position_equals_the_full_forward_pass(kind, size, name):
    model, token_ids = small_weights(decoder_only(torch.float32, **options_of(kind, size))), tokens(MAX_LENGTH)
    executor, expected = make_executor(model, name), model.hidden(token_ids)
    for chunks in ([1] * MAX_LENGTH, [4, 1, 1, 5, 2]):
        state, end = executor.new_state(B), 0
        for size_ in chunks:
            hidden = executor.extend(state, ALL, token_ids[:, end : end + size_].tolist())
            end += size_
            assert state.lengths == [end] * B
            assert torch.allclose(hidden, expected[:, end - 1], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_have_their_own_lengths_and_any_places(kind, name):
    """Rows enter and go on at their own times; rows that others held before, and moved rows, are no different."""
    model, token_ids = small_weights(decoder_only(torch.float32, **KINDS[kind])), tokens(MAX_LENGTH)
    executor, expected = make_executor(model, name), model.hidden(token_ids)
    state = executor.new_state(B + 2)
    executor.extend(state, slice(0, B + 2), torch.randint(0, V, (B + 2, 9)).tolist())  # what was there before
    state.lengths = [0] * (B + 2)
    seen = [0] * B

    def extend(rows, counts):
        """Row r of the tokens stands in row r + 1 of the state."""
        new = [token_ids[row, seen[row] : seen[row] + count].tolist() for row, count in zip(rows, counts, strict=True)]
        places = [row + 1 for row in rows]
        side_by_side = places == list(range(places[0], places[-1] + 1))
        found = executor.extend(state, slice(places[0], places[-1] + 1) if side_by_side else places, new)
        for row, count, hidden in zip(rows, counts, found, strict=True):
            seen[row] += count
            assert torch.allclose(hidden, expected[row, seen[row] - 1], atol=3e-5, rtol=3e-5)

    extend([0, 2], [3, 1])
    extend([0, 1, 2, 3], [1, 2, 1, 5])
    extend([4, 1], [4, 1])
    extend([0, 1, 2, 3, 4], [1] * 5)
    extend([1, 3], [1, 1])
    state.copy([1, 5], [6, 0])
    state.copy([6, 0], [1, 5])
    extend([0, 1, 2, 3, 4], [2, 1, 3, 1, 8])


@torch.no_grad()
def test_a_state_may_change_hands_and_rows_follow_their_parents(native_kernels):
    model, token_ids = decoder_only(torch.float32), tokens(9)
    parents, found = [3, 3, 0, 1, 2], []
    for first, second in [("native", "packed"), ("packed", "eager"), ("eager", "native"), ("eager", "eager")]:
        one, other = make_executor(model, first), make_executor(model, second)
        state = one.new_state(B)
        one.extend(state, ALL, [row[: 3 - i % 2].tolist() for i, row in enumerate(token_ids)])
        state.copy(parents, range(B))
        assert state.lengths == [2, 2, 3, 2, 3]
        hidden = [other.extend(state, ALL, token_ids[:, 4:5].tolist())]
        hidden.append(one.extend(state, slice(1, 4), token_ids[1:4, 5:7].tolist()))
        found.append(torch.cat(hidden))
    for mixed in found[:-1]:
        assert torch.allclose(mixed, found[-1], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("slot", SLOTS, ids=str)
@torch.no_grad()
def test_logits_of_a_slot_equal_the_plain_ones(slot, tie_embeddings, name):
    model = decoder_only(torch.float32)
    model = _with_large_weights(DecoderOnly(replace(model.config, tie_embeddings=tie_embeddings)))
    executor, hidden = make_executor(model, name), torch.randn(7, 24)
    for rows in (hidden, hidden[2:5], hidden[:, ::2].repeat_interleave(2, 1), hidden[[1]]):
        assert torch.allclose(executor.logits(rows, slot), model.logits(rows, slot), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_without_some_rows_scores_and_draws_as_the_whole_one(name):
    whole = decoder_only(torch.float32)
    ranges = ((2, 7), (9, V - 1))
    smaller = _with_large_weights(DecoderOnly(replace(whole.config, head_ranges=ranges)))
    kept = torch.cat([torch.arange(*pair) for pair in ranges])
    smaller.load_state_dict(whole.state_dict() | {"head": whole.head[kept]})
    ours, plain = make_executor(smaller, name), make_executor(whole, name)
    hidden, uniforms = torch.randn(7, 24), torch.rand(7, dtype=torch.float64)
    for slot in (Slot(((3, 6),)), Slot(((2, 7), (11, V - 1))), Slot(ranges)):
        assert torch.allclose(ours.logits(hidden, slot), plain.logits(hidden, slot), atol=1e-5)
        for config in (SampleConfig(), SampleConfig(top_k=3)):
            found, expected = (one.draw(hidden, None, slot, uniforms, None, config) for one in (ours, plain))
            assert torch.equal(found.token_ids, expected.token_ids)
            assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    logits = ours.logits(hidden)
    assert torch.allclose(logits[:, kept], plain.logits(hidden)[:, kept], atol=1e-5)
    assert int((logits == -torch.inf).sum()) == 7 * (V - len(kept))
    with pytest.raises(ValueError, match=rf"cannot score the ids 0\.\.{V - 1}: it has rows for 2\.\.6, 9\.\.{V - 2}"):
        ours.logits(hidden, Slot(((0, V),)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gpt-2", "llama, grouped heads"])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_threads(kind, size, exact_name):
    model = decoder_only(torch.float32, **(options_of(kind, size) | dict(num_kv_heads=None)))
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, V, (53, 7), generator=generator)
    starts = torch.randint(0, 3, (53,), generator=generator).tolist()  # rows are not equally long
    uniforms = torch.rand(53, generator=generator, dtype=torch.float64)
    found = []
    before = torch.get_num_threads()
    for threads, batch_size in [(1, 53), (2, 53), (1, 1), (2, 7), (2, 34), (3, 53)]:
        torch.set_num_threads(threads)
        executor, rows = make_executor(model, exact_name), []
        for first in range(0, 53, batch_size):
            part, begin = token_ids[first : first + batch_size], starts[first : first + batch_size]
            state, every = executor.new_state(len(part) + 3), slice(2, 2 + len(part))
            executor.extend(state, every, [row[at : at + 2 + at].tolist() for row, at in zip(part, begin, strict=True)])
            executor.extend(state, every, part[:, 5:6].tolist())
            hidden = executor.extend(state, every, part[:, 6:].tolist())
            some = uniforms[first : first + batch_size]
            drawn = executor.draw(hidden, None, Slot(((2, 29),)), some, None, SampleConfig(temperature=0.9))
            rows.append(torch.cat((hidden, executor.logits(hidden), *(value[:, None] for value in drawn)), dim=1))
        found.append(torch.cat(rows))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@torch.no_grad()
def test_a_full_state_is_an_error(name):
    executor = make_executor(decoder_only(torch.float32), name)
    state = executor.new_state(B, 1)
    executor.extend(state, ALL, tokens(1).tolist())
    with pytest.raises(ValueError, match=r"2 tokens exceed the limit of 1 \(max_length\)"):
        executor.extend(state, ALL, tokens(1).tolist())
    state = executor.new_state(B, 100)
    with pytest.raises(ValueError, match=rf"14 tokens exceed the limit of {MAX_LENGTH} \(max_length\)"):
        executor.extend(state, ALL, tokens(14).tolist())
    assert state.lengths == [0] * B


def layout_model(**options) -> DecoderOnly:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, d_model=24, num_heads=4, d_ff=20, max_length=LAYOUT.max_length)
    return _with_large_weights(new_model(LAYOUT, TransformerConfig(**(sizes | options))))


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(temperature=0),
        SampleConfig(),
        SampleConfig(temperature=0.7, guidance_scale=2.5, guidance_schedule="cosine"),
        SampleConfig(top_k=5, guidance_scale=2.5),
        SampleConfig(guidance_scale=2.0, guidance_interval=(2, 7)),
    ],
    ids=["greedy", "sampled", "guided", "filtered", "guided for a while"],
)
@pytest.mark.parametrize("kind", ["gpt-2", "llama, grouped heads"])
def test_generated_tokens_are_those_of_the_plain_path_in_any_batch(kind, config, exact_name):
    model = layout_model(**(KINDS[kind] | ({"num_kv_heads": 2} if "num_kv_heads" in KINDS[kind] else {})))
    null = Request(order="image to text")
    requests = [Request(order="image to text", seed=seed, null=null) for seed in range(40)]
    requests += [
        Request(order="text to image", given={"text": torch.tensor([seed % 7, 3, 5])}, seed=seed, null=null)
        for seed in range(13)
    ]
    found = {
        size: generate(model, LAYOUT, requests, config, batch_size=size, executor=exact_name) for size in (64, 7, 1)
    }
    plain = generate(model, LAYOUT, requests, config, executor="eager")
    for ours, other in zip(found[64], plain, strict=True):
        assert torch.equal(ours.token_ids, other.token_ids)
        assert torch.allclose(ours.log_probs, other.log_probs, atol=1e-5)
        assert torch.allclose(ours.draw_log_probs, other.draw_log_probs, atol=1e-5)
    for size in (7, 1):
        for ours, other in zip(found[64], found[size], strict=True):
            assert torch.equal(ours.token_ids, other.token_ids)
            assert torch.equal(ours.log_probs, other.log_probs)


def test_beams_are_those_of_the_plain_path(exact_name, monkeypatch):
    model, requests = layout_model(), [Request(order="text to image", seed=0), Request(order="image to text", seed=0)]
    found = []
    for executor in (exact_name, "eager"):
        monkeypatch.setattr("smalti.engine.beam.job_executor", lambda *_, executor=executor: executor)
        beams = beam_search(model, LAYOUT, requests, 3)
        found.append([[beam.token_ids.tolist() for beam in some] for some in beams])
    assert found[0] == found[1]


# ---- which executor ----


def test_an_executor_says_everything_that_keeps_it_from_a_job(monkeypatch):
    monkeypatch.setenv("SMALTI_NATIVE", "0")
    model = decoder_only(torch.bfloat16).train()
    reasons = [
        "it computes in torch.float32, not in torch.bfloat16",
        "the model is in training mode",
    ]
    assert EXECUTORS["native"].why_not(model) == reasons
    assert EXECUTORS["packed"].why_not(model)[1:] == reasons[1:]
    assert EXECUTORS["eager"].why_not(model) == []
    with pytest.raises(InputError, match=f"the executor 'native' cannot run this model here: {'; '.join(reasons)}."):
        make_executor(model, "native")
    with pytest.raises(
        InputError, match="executor 'fast' is unknown; there are cuda_graph, native, packed, eager, compiled"
    ):
        make_executor(model, "fast")
    assert EXECUTORS["native"].why_not(decoder_only(torch.float32)) == [smalti.engine.executors.native.MISSING]


def test_the_first_that_takes_the_job_is_chosen(native_kernels, monkeypatch):
    model = decoder_only(torch.float32)
    assert choose_executor(model) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_executor(model) == "eager"
    monkeypatch.setattr(smalti.processor, "memory_bytes", lambda: 100)
    assert "would take more than 25% of the memory" in EXECUTORS["native"].why_not(model)[0]
    assert choose_executor(model) == "packed"
    assert choose_executor(decoder_only(torch.float64)) == "packed"
    assert choose_executor(decoder_only(torch.bfloat16)) == "eager"
    assert choose_executor(model.to("meta")) == "eager"


def test_a_job_compiles_if_it_is_long_enough_whatever_the_process_did_before(monkeypatch, tmp_path, native_kernels):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMALTI_NATIVE")
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_absent", set())
    monkeypatch.setattr(smalti.engine.executors.native, "STEPS_THAT_REPAY_COMPILING", 100)
    model = decoder_only(torch.float32)
    assert [choose_executor(model, steps) for steps in (60, 60, 60, 100, 60)] == ["packed"] * 3 + ["native"] * 2


def test_without_a_compiler_the_same_tokens_come(native_kernels, monkeypatch):
    model, requests = layout_model(), [Request(order="text to image", seed=seed) for seed in range(5)]
    ours = generate(model, LAYOUT, requests)
    monkeypatch.setattr(native, "_loaded", {"decode": None})
    assert make_executor(model).name == "packed"
    for one, other in zip(ours, generate(model, LAYOUT, requests), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


# ---- the native one ----


@torch.no_grad()
def test_a_long_prompt_in_parts_is_the_same(native_kernels, monkeypatch):
    model, token_ids = decoder_only(torch.float32), tokens(11)
    prompts, found = [row[i % 3 :].tolist() for i, row in enumerate(token_ids)], []
    for most_rows in (1024, 3, 4 * B):
        monkeypatch.setattr(smalti.engine.executors.native, "MOST_ROWS", most_rows)
        executor = make_executor(model, "native")
        state = executor.new_state(B)
        found.append((executor.extend(state, ALL, prompts), *state.both))
        assert state.lengths == [11, 10, 9, 11, 10]
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("num_ids", [2, 64, 1000])
def test_draws_are_those_of_the_plain_sampler(num_ids, guided, temperature, native_kernels):
    torch.manual_seed(0)
    model = decoder_only(torch.float32)
    model = DecoderOnly(replace(model.config, vocab_size=num_ids + 5)).eval()
    torch.nn.init.normal_(model.head, std=0.7)
    slot = Slot(((1, 2), (5, num_ids + 4)))
    R = 37
    hidden, null, scales = torch.randn(R, 24), torch.randn(R, 24), torch.linspace(0, 3, R)
    uniforms = torch.rand(R, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    config = SampleConfig(temperature=temperature)
    with torch.no_grad():
        cond = model.logits(hidden, slot)
        logits = guide(cond, model.logits(null, slot), scales[:, None]) if guided else cond
    expected, draw_log_probs = sample(logits, uniforms, config)
    given = (null, scales) if guided else (None, None)
    found = make_executor(model, "native").draw(hidden, given[0], slot, uniforms, given[1], config)
    assert found.token_ids.tolist() == slot.token_ids(expected).tolist()
    assert torch.allclose(found.log_probs, log_prob_of(cond, expected), atol=1e-5)
    assert torch.allclose(found.draw_log_probs, draw_log_probs, atol=1e-5)


def test_what_has_no_probability_is_not_drawn(native_kernels):
    """The weight of the last ids is nothing beside the others', and the uniform number is as close to 1 as it gets."""
    model = DecoderOnly(replace(decoder_only(torch.float32).config, vocab_size=130)).eval()
    with torch.no_grad():
        model.head.zero_()[:, 0] = torch.linspace(0, -1, 130)
    hidden = torch.zeros(2, 24)
    hidden[:, 0] = torch.tensor([2000.0, 1e30])
    uniforms = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    executor = make_executor(model, "native")
    token_ids, log_probs, _ = executor.draw(hidden, None, Slot(((0, 130),)), uniforms, None, SampleConfig())
    assert log_probs.isfinite().all() and log_probs[0] > -40 and log_probs[1] == 0
    assert token_ids.tolist() == [int(token_ids[0]), 0]


def test_an_unknown_token_is_an_error(native_kernels):
    executor = make_executor(decoder_only(torch.float32), "native")
    state = executor.new_state(B)
    for wrong in (V, -1):
        with pytest.raises(IndexError, match=r"a token id is outside 0\.\.28"):
            executor.extend(state, ALL, [[1], [2], [wrong], [0], [0]])


@torch.no_grad()
def test_a_job_sees_the_weights_of_its_time(native_kernels):
    model, token_ids = decoder_only(torch.float32), tokens(1).tolist()
    for _ in range(2):
        found = []
        for executor in (make_executor(model, "native"), Eager(model)):
            found.append(executor.extend(executor.new_state(B), ALL, token_ids))
        assert torch.allclose(*found, atol=1e-5)
        model.transformer.blocks[1].feed_forward.up.weight.data.mul_(-1)  # no version counter sees this


def test_a_forked_process_generates(native_kernels):
    """As a worker of a data loader would: the parent's threads are not there."""
    model, requests = layout_model(), [Request(order="text to image", seed=seed) for seed in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = [one.token_ids.tolist() for one in generate(model, LAYOUT, requests)]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        executor = make_executor(model, "native")
        torch.set_num_threads(2)  # the kernels know by themselves
        hidden = executor.extend(executor.new_state(3), slice(0, 3), [[1], [2], [3]])
        torch.set_num_threads(1)
        same = [one.token_ids.tolist() for one in generate(model, LAYOUT, requests)] == expected
        os._exit(0 if same and hidden.isfinite().all() else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
