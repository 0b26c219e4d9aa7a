"""The fast decoder against the plain path: the same hidden states at every position, the same tokens."""

from dataclasses import replace

import pytest
import torch

import smalti.engine.packed
from smalti.engine.beam import beam_search
from smalti.engine.generate import Request, generate
from smalti.engine.packed import FEWEST_STEPS, FastDecoder, make_stepper
from smalti.engine.sampling import SampleConfig
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_equals_the_full_forward_pass(kind):
    model, token_ids = decoder_only(**KINDS[kind]), tokens(MAX_LENGTH)
    fast, cache = FastDecoder(model), model.new_cache(B)
    with torch.no_grad():
        expected = model.hidden(token_ids)
    for position in range(MAX_LENGTH):
        hidden = fast.decode_step(token_ids[:, position], cache)
        assert cache.length == position + 1
        assert torch.allclose(hidden, expected[:, position], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_padded_on_the_left_equal_the_plain_path(kind):
    model, token_ids = decoder_only(torch.float32, **KINDS[kind]), tokens(MAX_LENGTH)
    starts = torch.tensor([2, 0, 3, 1, 0])
    fast, caches = FastDecoder(model), [model.new_cache(B, starts=starts) for _ in range(2)]
    with torch.no_grad():
        for first, last in [(0, 2), *((i, i + 1) for i in range(2, 9)), (9, MAX_LENGTH)]:
            hidden = fast.prefill(token_ids[:, first:last], caches[0])
            if last - first == 1:
                caches[0].length -= 1
                hidden = fast.decode_step(token_ids[:, first], caches[0])
            expected = model.prefill(token_ids[:, first:last], caches[1])
            real = last - 1 >= starts  # the row that starts in slot 3 still has padding to come
            assert torch.allclose(hidden[real], expected[real], atol=3e-5, rtol=3e-5)


def test_a_cache_may_change_hands_and_its_rows_their_places():
    model, token_ids = decoder_only(), tokens(9)
    starts, parents = torch.tensor([2, 0, 1, 0, 1]), torch.tensor([3, 3, 0, 1, 2])
    found = []
    for stepper in (FastDecoder(model), model):
        cache, other = model.new_cache(B, starts=starts), model.new_cache(2)
        with torch.no_grad():
            stepper.prefill(token_ids[:, :3], cache)
            stepper.decode_step(token_ids[:, 3], cache)
            cache.select(parents)  # beams: keys, values and starts move
            found.append(stepper.decode_step(token_ids[:, 4], cache))
            found.append(stepper.decode_step(token_ids[:2, 4], other))
            part = cache.rows(1, 4)  # guidance: the conditional rows go on alone
            found.append(stepper.decode_step(token_ids[1:4, 5], part))
            found.append(stepper.decode_step(token_ids[1:4, 6], part))
    for ours, plain in zip(found[:4], found[4:], strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("slot", [None, Slot(((3, 17),)), Slot(((2, 3), (11, 29)))], ids=str)
def test_logits_of_a_slot_equal_the_plain_ones(slot, tie_embeddings):
    model = decoder_only()
    model = _with_large_weights(DecoderOnly(replace(model.config, tie_embeddings=tie_embeddings)).double())
    fast, hidden = FastDecoder(model), torch.randn(7, 24, dtype=torch.float64)
    for _ in range(2):
        assert torch.allclose(fast.logits(hidden, slot), model.logits(hidden, slot), atol=1e-12)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_threads(kind):
    """Teacher-forced logits behind a prefill of ragged prefixes, steps, and more tokens at once; past a slot block."""
    grid = dict(grid=(9, 9)) if "grid" in KINDS[kind] else {}
    model = decoder_only(torch.float32, max_length=72, **(KINDS[kind] | grid))
    token_ids = torch.randint(1, V, (11, 70), generator=torch.Generator().manual_seed(2))
    prefixes = 52 + torch.arange(11) % 5
    found = []
    for num_threads, batch_size in [(1, 11), (2, 11), (1, 1), (2, 4)]:
        torch.set_num_threads(num_threads)
        fast, rows = FastDecoder(model), []
        for ids, lengths in zip(token_ids.split(batch_size), prefixes.split(batch_size), strict=True):
            starts = lengths.max() - lengths
            shifted = (torch.arange(int(lengths.max()) + 14) - starts[:, None]).clamp(min=0)
            padded, cache = ids.gather(1, shifted), model.new_cache(len(ids), starts=starts)
            parts = padded[:, :-14], *padded[:, -14:-4].split(1, dim=1), padded[:, -4:]
            hidden = [fast.decode_step(p[:, 0], cache) if p.shape[1] == 1 else fast.prefill(p, cache) for p in parts]
            rows.append(torch.cat([fast.logits(behind) for behind in hidden], dim=1))
        found.append(torch.cat(rows))
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_full_cache_is_an_error():
    model = decoder_only()
    cache = model.new_cache(B, 1)
    fast = FastDecoder(model)
    fast.decode_step(tokens(1)[:, 0], cache)
    with pytest.raises(ValueError, match=r"2 tokens exceed the limit of 1 \(max_length\)"):
        fast.decode_step(tokens(1)[:, 0], cache)


def test_training_and_low_precision_stay_on_the_plain_path(monkeypatch):
    monkeypatch.setenv("SMALTI_NATIVE", "0")
    model = decoder_only(torch.float32)
    assert isinstance(make_stepper(model, FEWEST_STEPS), FastDecoder)
    assert make_stepper(model.train(), FEWEST_STEPS) is model
    with torch.autocast("cpu", torch.bfloat16):
        assert make_stepper(model.eval(), FEWEST_STEPS) is model
    assert make_stepper(model.bfloat16(), FEWEST_STEPS) is model


def layout_model(**options) -> DecoderOnly:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, d_model=24, num_heads=4, d_ff=20, max_length=LAYOUT.max_length)
    return _with_large_weights(new_model(LAYOUT, TransformerConfig(**(sizes | options))))


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(temperature=0),
        SampleConfig(),
        SampleConfig(temperature=0.7, top_k=5, guidance_scale=2.5),
        SampleConfig(guidance_scale=2.0, guidance_interval=(2, 7)),
    ],
    ids=["greedy", "sampled", "guided", "guided for a while"],
)
@pytest.mark.parametrize("kind", ["gpt-2", "llama, grouped heads"])
def test_generated_tokens_are_those_of_the_plain_path(kind, config, monkeypatch):
    model = layout_model(**(KINDS[kind] | ({"num_kv_heads": 2} if "num_kv_heads" in KINDS[kind] else {})))
    null = Request(order="image to text")
    requests = [Request(order="image to text", seed=seed, null=null) for seed in range(17)]
    captioned = [
        Request(order="text to image", given={"text": torch.tensor([seed % 7, 3, 5])}, seed=seed, null=null)
        for seed in range(17)
    ]
    for batch in (requests, captioned):
        ours = generate(model, LAYOUT, batch, config)
        with monkeypatch.context() as patch:
            patch.setattr(smalti.engine.packed, "FEWEST_STEPS", 1000)
            plain = generate(model, LAYOUT, batch, config)
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert torch.allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_beams_are_those_of_the_plain_path(monkeypatch):
    model, requests = layout_model(), [Request(order="text to image", seed=0), Request(order="image to text", seed=0)]
    ours = beam_search(model, LAYOUT, requests, 3)
    monkeypatch.setattr(smalti.engine.packed, "FEWEST_STEPS", 1000)
    plain = beam_search(model, LAYOUT, requests, 3)
    found = [[beam.token_ids.tolist() for beam in beams] for beams in ours]
    assert found == [[beam.token_ids.tolist() for beam in beams] for beams in plain]
