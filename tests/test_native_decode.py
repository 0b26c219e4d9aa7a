"""The native decoder against the plain path: hidden states, logits, draws; and a row knows nothing of its batch."""

import os
from dataclasses import replace

import pytest
import torch
from test_fast_decode import KINDS, LAYOUT, MAX_LENGTH, B, V, decoder_only, layout_model, tokens

import smalti.engine.native
import smalti.engine.packed
from smalti import native
from smalti.engine.beam import beam_search
from smalti.engine.generate import Request, generate
from smalti.engine.native import NativeDecoder
from smalti.engine.packed import FEWEST_STEPS, FastDecoder, choose_executor, make_stepper
from smalti.engine.sampling import SampleConfig, guide, log_prob_of, sample
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Slot

pytestmark = pytest.mark.usefixtures("native_kernels")

SLOTS = [None, Slot(((3, 17),)), Slot(((2, 3), (11, 29)))]
# Widths around those of vectors and panels: whole ones, several, and what is left over.
SIZES = {
    "whole vectors": dict(d_model=128, num_heads=4, d_ff=256),
    "left over": dict(d_model=152, num_heads=2, d_ff=93),
}


def native_decoder(model: DecoderOnly) -> NativeDecoder:
    stepper = make_stepper(model, MAX_LENGTH)
    assert isinstance(stepper, NativeDecoder)
    return stepper


@pytest.fixture
def two_threads():
    """What one thread computes is compared with this to the last bit, below."""
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


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [None, *SIZES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_position_equals_the_full_forward_pass(kind, size):
    options = KINDS[kind] | ({} if size is None else SIZES[size])
    if size and "num_kv_heads" in options:
        options["num_kv_heads"] = 1
    model, token_ids = small_weights(decoder_only(torch.float32, **options)), tokens(MAX_LENGTH)
    decoder, cache = native_decoder(model), model.new_cache(B)
    with torch.no_grad():
        expected = model.double().hidden(token_ids).float()
        model.float()
    found = decoder.prefill(token_ids[:, :3], cache)
    for position in range(3, MAX_LENGTH + 1):
        assert torch.allclose(found, expected[:, position - 1], atol=2e-6, rtol=1e-4)
        if position < MAX_LENGTH:
            found = decoder.decode_step(token_ids[:, position], cache)
            assert cache.length == position + 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_padded_on_the_left_equal_the_plain_path(kind):
    model, token_ids = decoder_only(torch.float32, **KINDS[kind]), tokens(MAX_LENGTH)
    starts = torch.tensor([2, 0, 3, 1, 0])
    decoder, caches = native_decoder(model), [model.new_cache(B, starts=starts) for _ in range(2)]
    with torch.no_grad():
        for first, last in [(0, 2), *((i, i + 1) for i in range(2, MAX_LENGTH))]:  # row 2 starts behind the prefill
            hidden = decoder.prefill(token_ids[:, first:last], caches[0])
            expected = model.prefill(token_ids[:, first:last], caches[1])
            real = last - 1 >= starts
            assert torch.allclose(hidden[real], expected[real], atol=3e-5, rtol=3e-5)
            if not real.all():
                assert hidden.isfinite().all()


def test_a_long_prefill_in_parts_is_the_same(monkeypatch):
    model, token_ids = decoder_only(torch.float32), tokens(11)
    starts = torch.tensor([2, 0, 4, 1, 0])
    found = []
    for most_rows in (1024, 3, 4 * B):
        monkeypatch.setattr(smalti.engine.native, "MOST_ROWS", most_rows)
        cache = model.new_cache(B, starts=starts)
        found.append((native_decoder(model).prefill(token_ids, cache), cache.keys[2], cache.values[2]))
        assert cache.length == 11
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)


def test_a_cache_may_change_hands_and_its_rows_their_places():
    model, token_ids = decoder_only(torch.float32), tokens(9)
    starts, parents = torch.tensor([2, 0, 1, 0, 1]), torch.tensor([3, 3, 0, 1, 2])
    decoder, found = native_decoder(model), []
    for steppers in [(decoder, decoder), (decoder, model), (model, decoder), (model, model)]:
        cache, other = model.new_cache(B, starts=starts), model.new_cache(2)
        with torch.no_grad():
            steppers[0].prefill(token_ids[:, :3], cache)
            steppers[1].decode_step(token_ids[:, 3], cache)
            cache.select(parents)  # beams: keys, values and starts move
            found.append([steppers[0].decode_step(token_ids[:, 4], cache)])
            found[-1].append(steppers[1].decode_step(token_ids[:2, 4], other))
            part = cache.rows(1, 4)  # guidance: the conditional rows go on alone
            found[-1].append(steppers[0].decode_step(token_ids[1:4, 5], part))
            found[-1].append(steppers[1].prefill(token_ids[1:4, 6:8], part))
    for mixed in found[:-1]:
        for ours, plain in zip(mixed, found[-1], strict=True):
            assert torch.allclose(ours, plain, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_logits_of_a_slot_equal_the_plain_ones(slot, tie_embeddings):
    model = decoder_only(torch.float32)
    if tie_embeddings:
        model = DecoderOnly(replace(model.config, tie_embeddings=True)).eval()
    decoder, hidden = native_decoder(model), torch.randn(7, 24)
    for rows in (hidden, hidden[2:5], hidden[:, ::2].repeat_interleave(2, 1), hidden[[1]]):
        assert torch.allclose(decoder.logits(rows, slot), model.logits(rows, slot), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gpt-2", "llama, grouped heads"])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_threads(kind, size):
    options = KINDS[kind] | SIZES[size] | dict(num_kv_heads=None)
    model = decoder_only(torch.float32, **options)
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, V, (53, 4), generator=generator)
    uniforms = torch.rand(53, generator=generator, dtype=torch.float64)
    found = []
    before = torch.get_num_threads()
    for threads, batch_size in [(1, 53), (2, 53), (1, 1), (2, 7), (2, 34), (3, 53)]:
        torch.set_num_threads(threads)
        decoder, rows = native_decoder(model), []
        for start in range(0, 53, batch_size):
            part = token_ids[start : start + batch_size]
            cache = model.new_cache(len(part))
            decoder.prefill(part[:, :2], cache)
            decoder.decode_step(part[:, 2], cache)
            hidden = decoder.decode_step(part[:, 3], cache)
            drawn = decoder.draw(hidden, None, Slot(((2, 29),)), uniforms[start : start + batch_size], None, 0.9)
            rows.append(torch.cat((hidden, decoder.logits(hidden), *(value[:, None] for value in drawn)), dim=1))
        found.append(torch.cat(rows))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("num_ids", [2, 64, 1000])
def test_draws_are_those_of_the_plain_sampler(num_ids, guided, temperature):
    torch.manual_seed(0)
    model = decoder_only(torch.float32)
    model = DecoderOnly(replace(model.config, vocab_size=num_ids + 5)).eval()
    torch.nn.init.normal_(model.head, std=0.7)
    slot = Slot(((1, 2), (5, num_ids + 4)))
    decoder = native_decoder(model)
    R = 37
    hidden, null, scales = torch.randn(R, 24), torch.randn(R, 24), torch.linspace(0, 3, R)
    uniforms = torch.rand(R, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    with torch.no_grad():
        cond = model.logits(hidden, slot)
        logits = guide(cond, model.logits(null, slot), scales[:, None]) if guided else cond
    expected, draw_log_probs = sample(logits, uniforms, SampleConfig(temperature=temperature))
    found = decoder.draw(hidden, null if guided else None, slot, uniforms, scales if guided else None, temperature)
    assert found[0].tolist() == slot.token_ids(expected).tolist()
    assert torch.allclose(found[1], log_prob_of(cond, expected), atol=1e-5)
    assert torch.allclose(found[2], draw_log_probs, atol=1e-5)


def test_what_has_no_probability_is_not_drawn():
    """The weight of the last ids is nothing beside the others', and the uniform number is as close to 1 as it gets."""
    model = DecoderOnly(replace(decoder_only(torch.float32).config, vocab_size=130)).eval()
    with torch.no_grad():
        model.head.zero_()[:, 0] = torch.linspace(0, -1, 130)
    hidden = torch.zeros(2, 24)
    hidden[:, 0] = torch.tensor([2000.0, 1e30])
    uniforms = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    token_ids, log_probs, _ = native_decoder(model).draw(hidden, None, Slot(((0, 130),)), uniforms, None, 1.0)
    assert log_probs.isfinite().all() and log_probs[0] > -40 and log_probs[1] == 0
    assert token_ids.tolist() == [int(token_ids[0]), 0]


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
def test_generated_tokens_are_those_of_the_plain_path_in_any_batch(kind, config, monkeypatch):
    model = layout_model(**(KINDS[kind] | ({"num_kv_heads": 2} if "num_kv_heads" in KINDS[kind] else {})))
    null = Request(order="image to text")
    requests = [Request(order="image to text", seed=seed, null=null) for seed in range(40)]
    requests += [
        Request(order="text to image", given={"text": torch.tensor([seed % 7, 3, 5])}, seed=seed, null=null)
        for seed in range(13)
    ]
    found = {size: generate(model, LAYOUT, requests, config, batch_size=size) for size in (64, 7, 1)}
    monkeypatch.setattr(smalti.engine.packed, "FEWEST_STEPS", 1000)
    plain = generate(model, LAYOUT, requests, config)
    for ours, one, other in zip(found[64], found[1], plain, strict=True):
        assert torch.equal(ours.token_ids, other.token_ids)
        assert torch.allclose(ours.log_probs, other.log_probs, atol=1e-5)
        assert torch.allclose(ours.draw_log_probs, other.draw_log_probs, atol=1e-5)
        assert torch.equal(ours.token_ids, one.token_ids)
    for ours, other in zip(found[64], found[7], strict=True):
        assert torch.equal(ours.token_ids, other.token_ids)


def test_beams_are_those_of_the_plain_path(monkeypatch):
    model, requests = layout_model(), [Request(order="text to image", seed=0), Request(order="image to text", seed=0)]
    ours = beam_search(model, LAYOUT, requests, 3)
    monkeypatch.setattr(smalti.engine.packed, "FEWEST_STEPS", 1000)
    plain = beam_search(model, LAYOUT, requests, 3)
    found = [[beam.token_ids.tolist() for beam in beams] for beams in ours]
    assert found == [[beam.token_ids.tolist() for beam in beams] for beams in plain]


def test_a_full_cache_and_an_unknown_token_are_errors():
    model = decoder_only(torch.float32)
    decoder, cache = native_decoder(model), model.new_cache(B, 1)
    for wrong in (V, -1):
        with pytest.raises(IndexError, match=r"a token id is outside 0\.\.28"):
            decoder.decode_step(torch.tensor([1, 2, wrong, 0, 0]), cache)
    decoder.decode_step(tokens(1)[:, 0], cache)
    with pytest.raises(ValueError, match=r"2 tokens exceed the limit of 1 \(max_length\)"):
        decoder.decode_step(tokens(1)[:, 0], cache)


def test_a_job_sees_the_weights_of_its_time():
    model, token_ids = decoder_only(torch.float32), tokens(1)[:, 0]
    for _ in range(2):
        hidden = native_decoder(model).decode_step(token_ids, model.new_cache(B))
        assert torch.allclose(hidden, model.decode_step(token_ids, model.new_cache(B)), atol=1e-5)
        model.transformer.blocks[1].feed_forward.up.weight.data.mul_(-1)  # no version counter sees this


def test_what_the_kernel_does_not_cover_stays_on_the_other_paths(monkeypatch):
    assert isinstance(make_stepper(decoder_only(torch.float64), FEWEST_STEPS), FastDecoder)
    model = decoder_only(torch.float32)
    assert make_stepper(model.train(), FEWEST_STEPS) is model
    assert make_stepper(decoder_only(torch.bfloat16), FEWEST_STEPS) is not None
    model.eval()
    monkeypatch.setattr(smalti.engine.packed, "MOST_PACKED_BYTES", 100)
    assert isinstance(make_stepper(model, FEWEST_STEPS), FastDecoder)


def test_a_job_compiles_if_it_is_long_enough_whatever_the_process_did_before(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMALTI_NATIVE")
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_absent", set())
    monkeypatch.setattr(smalti.engine.packed, "STEPS_THAT_REPAY_COMPILING", 100)
    model = decoder_only(torch.float32)
    assert [choose_executor(model, steps) for steps in (60, 60, 60, 100, 60)] == ["packed"] * 3 + ["native"] * 2


def test_without_a_compiler_the_same_tokens_come(monkeypatch):
    model, requests = layout_model(), [Request(order="text to image", seed=seed) for seed in range(5)]
    ours = generate(model, LAYOUT, requests)
    monkeypatch.setattr(native, "_loaded", {"decode": None})
    assert isinstance(make_stepper(model, 5), FastDecoder)
    for one, other in zip(ours, generate(model, LAYOUT, requests), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


def test_a_forked_process_generates():
    """As a worker of a data loader would: the parent's threads are not there."""
    model, requests = layout_model(), [Request(order="text to image", seed=seed) for seed in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = [one.token_ids.tolist() for one in generate(model, LAYOUT, requests)]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        decoder = make_stepper(model, 5)
        torch.set_num_threads(2)  # the kernels know by themselves
        hidden = decoder.decode_step(torch.tensor([1, 2, 3]), model.new_cache(3))
        torch.set_num_threads(1)
        same = [one.token_ids.tolist() for one in generate(model, LAYOUT, requests)] == expected
        os._exit(0 if same and hidden.isfinite().all() else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
