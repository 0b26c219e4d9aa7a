"""The encoder-decoder: a plain recomputation, caches against whole sequences, what is shared and what is not, sizes."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_parti import GRID, K, config, model

from smalti.engine.beam import beam_search
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS, choose_executor
from smalti.engine.generate import generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.likelihood import score
from smalti.models import encoder_decoder
from smalti.models.encoder_decoder import (
    ORDER,
    PRESETS,
    EncoderDecoder,
    EncoderDecoderConfig,
    local_mask,
    preset_config,
)
from smalti.models.loss import slot_nll, slot_targets, token_nll
from smalti.sequences.layout import SpanValues
from smalti.sequences.request import Request

COUNTS = dict(re.findall(r'"(parti-\w+)": _shape\(.*\),  # ([\d,]+)', Path(encoder_decoder.__file__).read_text()))
"""What the comments beside the presets say."""
L = GRID[0] * GRID[1]
KERNELS = (None, 3)


@pytest.fixture(scope="module", params=KERNELS, ids=["all", "local"])
def drawer(request) -> EncoderDecoder:
    return model(local_kernel=request.param)


def request_of(length: int, seed: int = 0) -> Request:
    words = torch.arange(length) * 7 % 380
    null = Request(order=ORDER, given={"text": words[:0]})
    return Request(order=ORDER, given={"text": words}, seed=seed, null=null)


REQUESTS = [request_of(length, seed) for seed, length in enumerate((0, 3, 9, 3, 1, 5, 2))]


def packed(drawer: EncoderDecoder, seed: int = 0):
    lengths = torch.tensor([len(one.given["text"]) for one in REQUESTS])
    texts = torch.nn.utils.rnn.pad_sequence([one.given["text"] for one in REQUESTS], batch_first=True)
    codes = torch.randint(K, (len(REQUESTS), L), generator=torch.Generator().manual_seed(seed))
    spans = {"text": SpanValues(texts, lengths), "image": SpanValues(codes, torch.full_like(lengths, L))}
    return drawer.config.layout.pack(ORDER, spans), spans


def plain_logits(drawer: EncoderDecoder, text: list[int], codes: list[int]) -> torch.Tensor:
    """Scores of the code behind each input of the decoder, every sum written out."""
    state = {name: tensor.double() for name, tensor in drawer.state_dict().items()}
    shape = drawer.config

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(q, k, v, seen):
        heads = []
        for part in torch.arange(shape.d_model).chunk(shape.num_heads):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, part])
        return torch.cat(heads, 1)

    def block(x, name, seen, encoded=None):
        q, k, v = (norm(x, f"{name}.attention_norm") @ state[f"{name}.attention.qkv.weight"].T).chunk(3, 1)
        x = x + attend(q, k, v, seen) @ state[f"{name}.attention.out.weight"].T
        if encoded is not None:
            q = norm(x, f"{name}.cross_norm") @ state[f"{name}.cross_attention.q.weight"].T
            k, v = (encoded @ state[f"{name}.cross_attention.kv.weight"].T).chunk(2, 1)
            everything = torch.ones(len(q), len(k), dtype=torch.bool)
            x = x + attend(q, k, v, everything) @ state[f"{name}.cross_attention.out.weight"].T
        wide = (norm(x, f"{name}.feed_forward_norm") @ state[f"{name}.feed_forward.up.weight"].T).clamp(min=0)
        return x + wide @ state[f"{name}.feed_forward.down.weight"].T

    ids = torch.tensor([*text, shape.text_size])
    x = state["embed_text.weight"][ids] + state["text_positions.weight"][: len(ids)]
    for layer in range(shape.encoder_layers):
        x = block(x, f"encoder.blocks.{layer}", torch.ones(len(ids), len(ids), dtype=torch.bool))
    encoded = norm(x, "encoder.norm")
    inputs = torch.tensor([K, *codes[:-1]])
    cells = torch.arange(len(inputs))
    row, column = cells // GRID[1], cells % GRID[1]
    x = (
        state["embed_codes.weight"][inputs]
        + state["row_positions.weight"][row]
        + state["column_positions.weight"][column]
    )
    seen = torch.ones(L, L, dtype=torch.bool).tril()
    if shape.local_kernel is not None:
        reach = shape.local_kernel // 2
        for i in range(L):
            for j in range(L):
                near = abs(i // GRID[1] - j // GRID[1]) <= reach and abs(i % GRID[1] - j % GRID[1]) <= reach
                seen[i, j] &= near
    for layer in range(shape.decoder_layers):
        x = block(x, f"decoder.blocks.{layer}", seen, encoded)
    return norm(x, "decoder.norm") @ state["head.weight"].T


@torch.no_grad()
def test_whole_sequences_score_as_a_plain_recomputation(drawer):
    batch, spans = packed(drawer)
    nats = token_nll(drawer, batch, drawer.config.layout.slots).sum(1)
    image = score(drawer, drawer.config.layout, ORDER, spans)["image"]
    for row, one in enumerate(REQUESTS):
        codes = spans["image"].values[row]
        logits = plain_logits(drawer, one.given["text"].tolist(), codes.tolist())
        assert torch.allclose(F.cross_entropy(logits, codes, reduction="sum"), image[row], rtol=1e-5)
        assert torch.allclose(nats[row].double(), image[row], rtol=1e-6)


@torch.no_grad()
def test_cached_steps_are_the_whole_sequence_however_it_is_cut(drawer):
    batch, _ = packed(drawer)
    layout = drawer.config.layout
    first = layout.vocabulary.special("<sot>")
    for row in (0, 2, 5):
        ids = batch.token_ids[row, : int((batch.slot_ids[row] >= 0).sum()) + 1][None, :-1]
        whole, start = drawer.hidden(ids)[0], ids[0].tolist().index(first)
        assert not whole[:start].any() and whole.shape[1] == drawer.config.d_model
        for step in (1, 4):
            state = drawer.new_state(2)
            found = [drawer.extend(state, [1], ids[:, : start + 1])]
            for at in range(start + 1, ids.shape[1], step):
                found += drawer.extend_all(state, [1], ids[:, at : at + step])[0].split(1)
            assert torch.allclose(torch.cat(found), whole[start:], atol=2e-5)
            assert state.lengths[1] == ids.shape[1] and state.num_filled(1) == L
        everything = drawer.extend_all(drawer.new_state(1), [0], ids)[0]
        assert torch.allclose(everything, whole, atol=2e-5)


@torch.no_grad()
def test_rows_of_different_lengths_run_together(drawer):
    batch, _ = packed(drawer)
    lengths = [len(one.given["text"]) + 2 + extra for one, extra in zip(REQUESTS, (3, 1, 0, 7, 2, 4, 5), strict=True)]
    together = drawer.new_state(len(REQUESTS))
    token_ids = batch.token_ids[:, : max(lengths)]
    hidden = drawer.extend(together, slice(0, len(REQUESTS)), token_ids, lengths)
    every = drawer.extend_all(drawer.new_state(len(REQUESTS)), slice(0, len(REQUESTS)), token_ids, lengths)
    for row, length in enumerate(lengths):
        alone = drawer.extend(drawer.new_state(1), [0], token_ids[row : row + 1, :length])
        assert torch.allclose(hidden[row], alone[0], atol=2e-5)
        assert torch.allclose(every[row, length - 1], alone[0], atol=2e-5)
    # and a row that began before goes on beside one that begins
    mixed = drawer.new_state(2)
    drawer.extend(mixed, [0], token_ids[3:4, : lengths[3]])
    new = torch.zeros(2, lengths[1], dtype=torch.long)
    new[0, 0], new[1] = batch.token_ids[3, lengths[3]], token_ids[1, : lengths[1]]
    found = drawer.extend(mixed, [0, 1], new, [1, lengths[1]])
    assert torch.allclose(found[1], hidden[1], atol=2e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"guidance_scale": 2.0},
        {"guidance_scale": 3.0, "guidance_interval": (4, 9)},
        {"top_k": 5, "temperature": 0.7},
    ],
)
def test_drawn_together_is_drawn_alone(drawer, sampling):
    settings = SampleConfig(**sampling)
    together = generate(drawer, drawer.config.layout, REQUESTS, settings, batch_size=5)
    for one, found in zip(REQUESTS, together, strict=True):
        [alone] = generate(drawer, drawer.config.layout, [one], settings)
        assert torch.equal(found.token_ids, alone.token_ids)
        assert torch.allclose(found.log_probs, alone.log_probs, atol=1e-4)


def test_nats_are_the_sum_over_decode_steps(drawer):
    found = generate(drawer, drawer.config.layout, REQUESTS)
    texts = [one.spans["text"] for one in found]
    lengths = torch.tensor(list(map(len, texts)))
    codes = torch.stack([one.spans["image"] for one in found])
    spans = {
        "text": SpanValues(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths),
        "image": SpanValues(codes, torch.full_like(lengths, L)),
    }
    nats = score(drawer, drawer.config.layout, ORDER, spans)
    assert set(nats) == {"image"}  # what is only given has no likelihood
    assert torch.allclose(nats["image"], -torch.tensor([one.log_prob for one in found]).double(), atol=1e-4)


def test_a_caption_is_encoded_once_for_all_candidates(drawer, monkeypatch):
    encoded = []
    plain = EncoderDecoder.encode

    def counted(self, text, lengths=None):
        encoded.append(tuple(text[0].tolist()))
        return plain(self, text, lengths)

    monkeypatch.setattr(EncoderDecoder, "encode", counted)
    candidates = [replace(REQUESTS[1], seed=seed) for seed in range(5)]
    guided = SampleConfig(guidance_scale=2.0)
    generate(drawer, drawer.config.layout, candidates, guided, batch_size=2)  # rows come and go
    assert len(encoded) == 2 and len(set(encoded)) == 2  # the caption, and the empty one
    engine = Engine(drawer, drawer.config.layout, capacity=4)
    for one in candidates[:3]:
        engine.submit(one, guided)
    engine.step()
    contexts = [engine.state.conditions[running.row] for running in engine.active]
    assert all(context is contexts[0] for context in contexts)
    assert contexts[0].keys[0].shape == (1, 3, 4, 8)  # one caption of 3 pieces and its marker


def test_beams_and_drafts_take_it(drawer):
    layout = drawer.config.layout
    greedy = generate(drawer, layout, REQUESTS[:2], SampleConfig(temperature=0))
    for one, [likeliest] in zip(greedy, beam_search(drawer, layout, REQUESTS[:2], 1), strict=True):
        assert torch.equal(one.token_ids, likeliest.token_ids)
    assert len(beam_search(drawer, layout, [REQUESTS[1]], 3)[0]) == 3
    plain = generate(drawer, layout, REQUESTS[:2], SampleConfig(temperature=0, guidance_scale=2.0))
    drafted = generate(drawer, layout, REQUESTS[:2], SampleConfig(temperature=0, guidance_scale=2.0, speculative=4))
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(plain, drafted, strict=True))


def test_the_window_is_the_formulas():
    """Of a kernel 2R + 1 an inner cell sees R (2R + 1) + R + 1: 5 and 61 (facts of DALL-E's figure 11)."""
    grid = (9, 13)
    for kernel, inner in ((3, 5), (5, 13)):
        reach, visible = kernel // 2, local_mask(grid, kernel)
        assert int(visible[5 * 13 + 6].sum()) == inner == reach * kernel + reach + 1
        for row in range(grid[0]):
            for column in range(grid[1]):
                left, right = min(reach, column), min(reach, grid[1] - 1 - column)
                above = min(reach, row)
                assert int(visible[row * 13 + column].sum()) == above * (left + right + 1) + left + 1
        assert not visible.triu(1).any()
    assert int(local_mask((32, 32), 11)[16 * 32 + 16].sum()) == 61


def test_sizes_are_those_of_the_paper():
    """Table 1; the formula Le (4 d² + 2 d f) + Ld (8 d² + 2 d f) + 16,000 d + 2 · 8,192 d, and norms, positions and two
    markers beside it."""
    for name, printed in (("350m", 0.385e9), ("750m", 0.788e9), ("3b", 3.09e9), ("20b", 20.5e9)):
        shape = preset_config(f"parti-{name}", text_size=16_000, codebook_size=8192, grid=(32, 32))
        with torch.device("meta"):
            made = EncoderDecoder(shape)
        d, f = shape.d_model, shape.d_ff
        formula = shape.encoder_layers * (4 * d * d + 2 * d * f) + shape.decoder_layers * (8 * d * d + 2 * d * f)
        formula += 16_000 * d + 2 * 8192 * d
        assert f"{formula / 1e9:.3g}" == f"{printed / 1e9:.3g}"
        positions = (129 + 32 + 32) * d
        norms = (2 * shape.encoder_layers + 3 * shape.decoder_layers + 2) * 2 * d
        assert made.num_parameters == formula + positions + norms + 2 * d
        assert made.num_parameters < 1.002 * formula
        assert f"{made.num_parameters:,}" == COUNTS[f"parti-{name}"]


def test_small_presets_count_as_their_comments_say():
    small = [name for name, sizes in PRESETS.items() if sizes["d_model"] < 1024]
    assert len(small) == 4
    for name in small:
        with torch.device("meta"):
            made = EncoderDecoder(preset_config(name, text_size=1, codebook_size=1, grid=(1, 1)))
        blocks = sum(p.numel() for part in (made.encoder, made.decoder) for p in part.blocks.parameters())
        assert f"{blocks:,}" == COUNTS[name]


def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(drawer):
    learner = EncoderDecoder(replace(drawer.config, dropout=0.1)).train()
    batch, _ = packed(learner)
    slots, gradients = learner.config.layout.slots, []
    for recompute in (False, True):
        learner.encoder.recomputes = learner.decoder.recomputes = recompute
        torch.manual_seed(3)
        learner.zero_grad()
        slot_nll(learner, batch.token_ids, slot_targets(batch, slots), slots).mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in learner.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0].values())


def test_codes_do_not_see_what_comes_later(drawer):
    batch, _ = packed(drawer)
    changed = batch.token_ids.clone()
    start = 2 + len(REQUESTS[2].given["text"])
    changed[2, start + 6] = (changed[2, start + 6] - 382 + 1) % K + 382
    with torch.no_grad():
        before, after = drawer.hidden(batch.token_ids)[2], drawer.hidden(changed)[2]
    assert torch.equal(before[: start + 6], after[: start + 6])
    assert not torch.allclose(before[start + 6], after[start + 6])


def test_other_executors_refuse_it_by_name(drawer):
    for name, executor in EXECUTORS.items():
        reasons = executor.why_not(drawer)
        assert (name == "eager") == (not reasons)
        assert name == "eager" or "not EncoderDecoder" in reasons[0]
    assert choose_executor(drawer) == "eager"


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_weights_may_be_stored_in_fewer_bits(storage):
    drawer, batch = model(), packed(model())[0]
    whole = drawer.hidden(batch.token_ids)
    drawer.store_weights(storage)
    assert drawer.storage == storage
    near = drawer.hidden(batch.token_ids)
    assert not torch.equal(near, whole) and (near - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_what_cannot_be_is_said():
    for change, message in (
        ({"local_kernel": 4}, "local_kernel is 4; expected an odd number"),
        ({"grid": (0, 3)}, "grid is"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"num_heads": 5}, "d_model 24 is not divisible by num_heads 5"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**change)
    with pytest.raises(ValueError, match="preset 'parti-9b' is unknown; choose one of parti-350m"):
        preset_config("parti-9b")
    with pytest.raises(InputError, match="encoder_layers"):
        EncoderDecoderConfig.from_dict({**config().to_dict(), "encoder_layers": "two"})
    assert EncoderDecoderConfig.from_dict(config(local_kernel=3).to_dict()) == config(local_kernel=3)
    drawer = model()
    with pytest.raises(ValueError, match="a row begins with its whole caption"):
        drawer.extend(drawer.new_state(1), [0], torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="a sequence has no <sot>"):
        drawer.hidden(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="scores codes alone"):
        drawer.logits(torch.zeros(24), drawer.config.layout.slots[0])
    with pytest.raises(ValueError, match="nothing to start from"):
        generate(drawer, drawer.config.layout, [Request(order=ORDER)])
    with pytest.raises(ValueError, match="limit of 15"):
        state = drawer.new_state(1)
        drawer.extend(state, [0], torch.tensor([[380, 381, *[382] * 15]]))
