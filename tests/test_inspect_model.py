"""Exactness of what is read off a model, and planted behaviour that must be found."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smalti.inspect import attention, causes
from smalti.inspect.grid import Grid
from smalti.inspect.sequences import pack_codes
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.loss import token_nll
from smalti.recipes.line_presets import line_layout

GRID = Grid(rows=3, columns=5)
LENGTH, NUM_CODES = 15, 11
LAYOUT = line_layout(LENGTH, NUM_CODES)
PLACES = range(1, LENGTH + 1)


def tiny_model(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = dict(num_layers=3, d_model=24, num_heads=3, d_ff=29, max_length=LAYOUT.max_length)
        model = new_model(LAYOUT, TransformerConfig(**{**config, **changes})).eval()
        for parameter in model.parameters():  # far from even odds, so that what is likely shows
            torch.nn.init.normal_(parameter, std=0.3)
        return model


@pytest.fixture(scope="module")
def packed():
    return pack_codes(LAYOUT, "lines", np.random.default_rng(0).integers(0, NUM_CODES, (7, LENGTH)))


VARIANTS = [
    {},
    {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": False},
    {"num_heads": 6, "num_kv_heads": 2, "qk_norm": True},
    {"positions": "rotary_2d", "grid": (3, 5), "prefix_length": 1, "num_heads": 2},
]


# ---- attention ----


@pytest.mark.parametrize("changes", VARIANTS)
def test_attention_written_out_is_the_models_own(changes, packed):
    model = tiny_model(**changes)
    compared = []

    def compare(module, arguments, output):
        x, rotation, mask, _, _ = arguments
        compared.append((attention.attend(module, x, rotation, mask).output, output))

    handles = [block.attention.register_forward_hook(compare) for block in model.transformer.blocks]
    with torch.no_grad():
        model.hidden(packed.token_ids)
    for handle in handles:
        handle.remove()
    assert len(compared) == 3
    for ours, theirs in compared:
        assert torch.allclose(ours, theirs, atol=1e-5)
    for weights in attention.attention_weights(model, packed.token_ids):
        assert weights.shape == (7, model.config.transformer.num_heads, LENGTH + 1, LENGTH + 1)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
        assert (weights.triu(1) == 0).all()


def planted_model(back: int):
    """Positions are one-hot; head 1 of layer 0 asks for the position so many before its own, head 0 for the first
    token, head 2 for nothing."""
    T = LENGTH + 1
    model = tiny_model(num_layers=1, d_model=3 * T, bias=True)
    with torch.no_grad():
        for parameter in model.transformer.blocks[0].attention.parameters():
            parameter.zero_()
        model.embed_tokens.weight.zero_()
        model.transformer.positions.weight.copy_(torch.eye(T, 3 * T))
        for norm in (model.transformer.blocks[0].attention_norm,):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        weight = model.transformer.blocks[0].attention.qkv.weight  # (3 · 3T, 3T)
        for query in range(T):
            weight[T + max(query - back, 0), query] = 5.0  # head 1: what it asks for
            weight[0, query] = 5.0  # head 0: the first
        for key in range(T):
            weight[3 * T + T + key, key] = 5.0
            weight[3 * T + key, key] = 5.0
    return model


@pytest.mark.parametrize(
    ("back", "name"), [(1, "previous token"), (0, "itself"), (5, "row above"), (4, "row above next"), (6, "above left")]
)
def test_planted_heads_are_named(back, name, packed):
    heads = attention.name_heads(planted_model(back), packed.token_ids, 1, GRID)
    assert [head.name for head in heads] == ["start", name, "diffuse"]
    assert heads[1].shares[name] > 0.9 and heads[1].excess[name] > 5
    without_grid = attention.name_heads(planted_model(back), packed.token_ids, 1)[1].name
    assert without_grid == name if back < 2 else without_grid in ("mixed", "start")  # the first queries all ask for 0


@pytest.mark.parametrize("name", ["same code", "position 2"])
def test_heads_planted_by_content_or_place_are_named(name, packed):
    """Head 1 asks for the code that it reads, in the embedding's one-hot part, or for one place, in the positions'."""
    T = LENGTH + 1
    model = planted_model(1)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(NUM_CODES + 1, 3 * T).roll(T, 1))
        weight = model.transformer.blocks[0].attention.qkv.weight
        weight[T : 2 * T] = 0
        weight[4 * T : 5 * T] = 0
        if name == "same code":
            weight[T : T + NUM_CODES + 1, T : T + NUM_CODES + 1] = 5 * torch.eye(NUM_CODES + 1)
            weight[4 * T : 4 * T + NUM_CODES + 1, T : T + NUM_CODES + 1] = 5 * torch.eye(NUM_CODES + 1)
        else:
            weight[T, :T] = 5.0
            weight[4 * T, 3] = 5.0  # position 2 is behind <bos> and two codes
    head = attention.name_heads(model, packed.token_ids, 1, GRID)[1]
    assert head.shares[name] > 0.4 and head.excess[name] > 2
    assert head.name == name or (name, head.name) == ("same code", "itself")  # its own code is the same, too


def test_attention_by_offset_and_lag(packed):
    [weights] = attention.attention_weights(planted_model(4), packed.token_ids)
    by_offset = attention.attention_by_offset(weights.mean(0), 1, GRID)
    assert by_offset.shape == (3, 3, 9)
    assert by_offset[1].argmax() == 1 * 9 + 4  # a row above the predicted cell, the same column
    by_lag = attention.attention_by_lag(weights.mean(0), 7)
    assert by_lag.shape == (3, 7) and by_lag[1].argmax() == 4


# ---- surprise and context ----


def test_surprise_is_the_models_own_loss(packed):
    model = tiny_model()
    with torch.no_grad():
        nll = token_nll(model, packed, LAYOUT.slots)
    found = attention.nats_by_position(model, LAYOUT, packed, batch_size=3)
    assert torch.allclose(found.mean.float(), nll.mean(0), atol=1e-5)
    assert found.mean[0] == 0


@pytest.mark.parametrize("changes", VARIANTS)
def test_full_context_is_the_whole_model(changes, packed):
    model = tiny_model(**changes)
    nats = attention.nats_of(model, LAYOUT, packed).mean(0)
    found = attention.loss_by_context(model, LAYOUT, packed, [2, LENGTH], [5, 9], batch_size=4)
    assert found[1].tolist() == pytest.approx([float(nats[5]), float(nats[9])], rel=1e-4)
    assert found[0].tolist() != pytest.approx(found[1].tolist(), rel=1e-3)


def test_hidden_context_has_no_influence(packed):
    """What stands before the visible tokens may change without any effect, however deep the model."""
    model = tiny_model()
    changed = packed._replace(token_ids=packed.token_ids.clone())
    changed.token_ids[:, 1:6] = 1 + (changed.token_ids[:, 1:6] + 3) % NUM_CODES
    one, other = (attention.loss_by_context(model, LAYOUT, given, [3], [9]) for given in (packed, changed))
    assert torch.equal(one, other)
    seen = [attention.loss_by_context(model, LAYOUT, given, [5], [9]) for given in (packed, changed)]
    assert not torch.allclose(*seen)


# ---- lens, ablation, patching ----


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_last_lens_is_the_model(changes, packed):
    model = tiny_model(**changes)
    with torch.no_grad():
        logits = model.logits(model.hidden(packed.token_ids))
    lens = causes.logit_lens(model, LAYOUT, packed)
    nats = attention.nats_of(model, LAYOUT, packed).mean(0)
    assert torch.allclose(lens.nats[-1], nats, atol=1e-6)
    assert (lens.agreement[-1] == 1).all() and (lens.agreement[0] < 1).any()
    assert torch.equal(lens.likeliest[-1][:, 1:], logits[:, :-1, 1:].argmax(-1) + 1)


def test_a_lens_guesses_among_what_it_is_told_to(packed):
    model = tiny_model()
    plain, told = (causes.logit_lens(model, LAYOUT, packed, among=among) for among in (None, range(3, 7)))
    guessed = told.likeliest[:, :, 1:]
    assert int(guessed.min()) >= 3 and int(guessed.max()) < 7
    assert torch.equal(told.nats, plain.nats)
    with torch.no_grad():
        logits = model.logits(model.hidden(packed.token_ids))[:, :-1, 3:7]
    assert torch.equal(guessed[-1], 3 + logits.argmax(-1))


def test_the_first_lens_sees_no_context(packed):
    model = tiny_model()
    lens = causes.logit_lens(model, LAYOUT, packed)
    x = model.embed_tokens(packed.token_ids) + model.transformer.positions.weight
    logits = model.logits(model.transformer.norm(x))
    assert torch.equal(lens.likeliest[0][:, 1:], logits[:, :-1, 1:].argmax(-1) + 1)


def test_a_head_is_ablated_like_its_columns_of_the_output(packed):
    model, edited = tiny_model(), tiny_model()
    own = slice(8, 16)  # head 1 of width 8
    with torch.no_grad():
        edited.transformer.blocks[2].attention.out.weight[:, own] = 0
        with causes.ablated(model, heads=[(2, 1)], kind="zero"):
            ablated = model.hidden(packed.token_ids)
        assert torch.allclose(ablated, edited.hidden(packed.token_ids), atol=1e-6)
        whole = model.hidden(packed.token_ids)
    assert not torch.allclose(ablated, whole)
    assert torch.equal(whole, tiny_model().hidden(packed.token_ids)), "the hooks are gone"


def test_a_layer_is_skipped(packed):
    model, shorter = tiny_model(), tiny_model()
    del shorter.transformer.blocks[1]
    with torch.no_grad(), causes.ablated(model, layers=[1]):
        assert torch.equal(model.hidden(packed.token_ids), shorter.hidden(packed.token_ids))


def test_sublayers_are_ablated(packed):
    model, edited = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in (
            *edited.transformer.blocks[0].attention.out.parameters(),
            *edited.transformer.blocks[1].feed_forward.down.parameters(),
        ):
            parameter.zero_()
        with causes.ablated(model, attentions=[0], feed_forwards=[1], kind="zero"):
            assert torch.allclose(model.hidden(packed.token_ids), edited.hidden(packed.token_ids), atol=1e-6)


def test_mean_ablation_of_equal_sequences_changes_nothing(packed):
    model = tiny_model()
    same = packed.token_ids[:1].expand(5, -1)
    with torch.no_grad(), causes.ablated(model, heads=[(0, 0), (1, 2)], attentions=[2], feed_forwards=[1]):
        assert torch.allclose(model.hidden(same), tiny_model().hidden(same), atol=1e-5)


def test_ablation_losses(packed):
    model = tiny_model()
    losses = causes.ablation_losses(model, LAYOUT, packed, PLACES)
    assert losses.heads.shape == (3, 3) and losses.layers.shape == (3,)
    assert losses.whole == pytest.approx(float(attention.nats_of(model, LAYOUT, packed)[:, 1:].mean()))
    with causes.ablated(model, heads=[(1, 2)]):
        by_hand = float(attention.nats_of(model, LAYOUT, packed)[:, 1:].mean())
    assert float(losses.heads[1, 2]) == pytest.approx(by_hand - losses.whole, abs=1e-6)
    with causes.ablated(model, layers=[2]):
        by_hand = float(attention.nats_of(model, LAYOUT, packed)[:, 1:].mean())
    assert float(losses.layers[2]) == pytest.approx(by_hand - losses.whole, abs=1e-6)


def test_what_cannot_be_ablated():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"no layer 3; the model has layers 0..2"), causes.ablated(model, layers=[3]):
        pass
    with pytest.raises(ValueError, match=r"no head 5; a layer has heads 0..2"), causes.ablated(model, heads=[(0, 5)]):
        pass
    with pytest.raises(ValueError, match="kind 'median' is unknown"), causes.ablated(model, kind="median"):
        pass


@pytest.mark.parametrize("layer", range(4))
def test_the_identity_patch_changes_nothing(layer, packed):
    model = tiny_model()
    positions = torch.tensor([3, 0, 5, 15, 7, 2, 9])
    states = causes.residual_stream(model, packed.token_ids)
    with torch.no_grad():
        whole = model.hidden(packed.token_ids)
        with causes.patched(model, layer, positions, states[layer][torch.arange(7), positions]):
            assert torch.equal(model.hidden(packed.token_ids), whole)
        with causes.patched(model, layer, positions, torch.zeros(7, 24)):
            assert not torch.allclose(model.hidden(packed.token_ids), whole)


def test_the_identity_check_sees_a_patch_that_does_something(packed, monkeypatch):
    model = tiny_model()
    assert causes.identity_patch_error(model, packed.token_ids[:2]) == 0
    states = causes.residual_stream
    monkeypatch.setattr(causes, "residual_stream", lambda *given: [state.flip(-1) for state in states(*given)])
    assert causes.identity_patch_error(model, packed.token_ids[:2]) > 0.01


def test_patching_finds_what_differs(packed):
    """Two lines differ at one position: before the first layer that alone carries all, at the end the last state."""
    model = tiny_model()
    token_ids = packed.token_ids.clone()
    token_ids[1] = token_ids[0]
    token_ids[1, 4] = 1 + (token_ids[0, 4] % NUM_CODES)
    found = causes.patching_map(model, LAYOUT, packed._replace(token_ids=token_ids), 0, 1, 8)
    assert found.shape == (4, 8)
    assert float(found[0, 4]) == pytest.approx(1, abs=1e-4)
    assert float(found[-1, 7]) == pytest.approx(1, abs=1e-4)
    elsewhere = [t for t in range(8) if t != 4]
    assert found[0, elsewhere].abs().max() < 1e-4
    assert found[-1, :7].abs().max() < 1e-4
    same = causes.patching_map(model, LAYOUT, packed, 2, 2, 8)
    assert same.isnan().all()


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_run_is_taken_up_between_any_two_layers(changes, packed):
    model = tiny_model(**changes)
    with torch.no_grad():
        whole = model.hidden(packed.token_ids)
    for layer, state in enumerate(causes.residual_stream(model, packed.token_ids)):
        assert torch.equal(causes.run_from(model, layer, state), whole)


# ---- changing codes ----


def test_a_changed_code_moves_only_what_comes_later(packed):
    model = tiny_model()
    changed = 1 + packed.token_ids[:, 6] % NUM_CODES
    moved = causes.change_map(model, LAYOUT, packed, 6, changed)
    assert (moved[:, :7] == 0).all() and (moved[:, 7:] > 0).all()
    unchanged = causes.change_map(model, LAYOUT, packed, 6, packed.token_ids[:, 6])
    assert (unchanged.abs() < 1e-12).all()
    token_ids = packed.token_ids.clone()
    token_ids[:, 6] = changed
    with torch.no_grad():
        before, after = (
            model.logits(model.hidden(ids))[:, 9, 1:].double().log_softmax(-1) for ids in (packed.token_ids, token_ids)
        )
    assert torch.allclose(moved[:, 10], F.kl_div(after, before, log_target=True, reduction="none").sum(-1))


@pytest.mark.parametrize("changes", VARIANTS)
def test_influence_is_the_mean_of_changes(changes, packed):
    """Of two sequences each is changed to the other's codes. What stands before a change is not run again."""
    model, two = tiny_model(**changes), packed.map(lambda part: part[:2].clone())
    two.token_ids[1, [3, 7]] = 1 + two.token_ids[0, [3, 7]] % NUM_CODES
    two.token_ids[1, 4] = two.token_ids[0, 4]  # nothing to change
    moved = causes.influence(model, LAYOUT, two, [3, 4, 7, LENGTH])
    others = two.token_ids.flip(0)
    by_hand = [causes.change_map(model, LAYOUT, two, place, others[:, place]).mean(0) for place in (3, 4, 7, LENGTH)]
    assert torch.allclose(moved, torch.stack(by_hand), rtol=1e-3, atol=1e-6)
    assert (moved[1] == 0).all() and (moved[3] == 0).all() and moved[0, 4:].min() > 0


def test_influence_is_mapped_on_the_grid(packed):
    model = tiny_model()
    moved = causes.influence(model, LAYOUT, packed, PLACES)[:, PLACES]
    assert moved.shape == (LENGTH, LENGTH) and (moved.tril() == 0).all()
    by_offset = causes.influence_by_offset(moved, GRID, reach=2)
    assert by_offset[0, :3].isnan().all()
    pairs = [(p, p + 4) for p in range(LENGTH - 4) if p % 5]  # one row below, one column to the left
    assert float(by_offset[1, 1]) == pytest.approx(np.mean([float(moved[a, b]) for a, b in pairs]))


def test_swapping_twins_costs_nothing(packed):
    """Codes 3 and 4 have the same embedding and the same row of the head."""
    model = tiny_model()
    with torch.no_grad():
        model.embed_tokens.weight[5] = model.embed_tokens.weight[4]
        model.head[4] = model.head[3]  # no row for <bos>
    twins = causes.swap_cost(model, LAYOUT, packed, 3, 4)
    known = attention.nats_of(model, LAYOUT, packed)
    assert causes.swap_cost(model, LAYOUT, packed, 3, 4, nats=known).nats == pytest.approx(twins.nats, abs=1e-4)
    assert twins.nats == pytest.approx(0, abs=1e-4) and twins.num_changed > 0
    assert abs(causes.swap_cost(model, LAYOUT, packed, 3, 7).nats) > 0.01
    with torch.no_grad():
        absent = pack_codes(LAYOUT, "lines", np.zeros((3, LENGTH), int))
    assert math.isnan(causes.swap_cost(model, LAYOUT, absent, 3, 7).nats)
