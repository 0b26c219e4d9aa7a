"""What captions do, by intervention; memorised pictures; the names of TransformerLens."""

import numpy as np
import pytest
import torch
from tiny_bundle import CODEBOOK_SIZE, save_tiny_bundle

from smalti.bundle import Bundle
from smalti.errors import InputError
from smalti.inspect import attention, causes
from smalti.inspect.captions import caption_gain, patch_nats, word_effects
from smalti.inspect.hooks import HookedModel, act_name
from smalti.inspect.memorisation import (
    edit_distances,
    memorised,
    nearest_by_codes,
    nearest_by_features,
    picture_features,
)
from smalti.inspect.sequences import has_picture_order, picture_order
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.recipes.line_presets import line_layout
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.tasks.images import Pipeline

CAPTION, OTHER = "dark green eight on bright cyan", "light red two on dark blue"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    bundle = Bundle.load(save_tiny_bundle(tmp_path_factory.mktemp("captions") / "bundle"), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in bundle.model.parameters():  # far from even odds, so that captions matter
            torch.nn.init.normal_(parameter, std=0.3)
    return bundle


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (3, 7, 7)))


# ---- captions ----


def test_nats_of_patches_add_up_to_those_of_the_picture(bundle, codes):
    pipe = Pipeline(bundle)
    captions = [CAPTION, OTHER, CAPTION]
    scores = pipe.score_codes(codes, [pipe.whole(text) for text in captions])
    gain = caption_gain(bundle, codes, captions, batch_size=2)
    assert gain.given.shape == codes.shape
    assert torch.allclose(gain.given.sum((1, 2)), scores.picture_nll_nats.double(), rtol=1e-5)
    assert torch.allclose((gain.alone - gain.given).sum((1, 2)), scores.pmi_nats.double(), atol=1e-3)


def test_a_words_effect_is_what_another_word_costs(bundle, codes):
    effects = word_effects(bundle, codes[0], CAPTION, others=[OTHER, CAPTION])
    assert [effect.word for effect in effects] == ["dark", "green", "eight", "bright", "cyan"]  # both have "on"
    eight = effects[2]
    assert eight.instead == ("two",)
    by_hand = patch_nats(bundle, codes[:1], [CAPTION.replace("eight", "two")]) - patch_nats(
        bundle, codes[:1], [CAPTION]
    )
    assert torch.allclose(eight.nats, by_hand[0], atol=1e-5) and float(eight.nats.abs().max()) > 0.01
    assert eight.total == pytest.approx(float(by_hand.sum()), abs=1e-4)


def test_a_word_that_the_model_does_not_read_has_no_effect(bundle, codes):
    """Both words get one embedding: putting one for the other changes nothing."""
    eight, two = (bundle.text_tokenizer.encode(text)[2] for text in (CAPTION, OTHER))
    offset = bundle.layout.vocabulary["text"].offset
    weight = bundle.model.embed_tokens.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[offset + two] = weight[offset + eight]
        effects = word_effects(bundle, codes[0], CAPTION, others=[OTHER])
        weight.copy_(kept)
    assert float(effects[2].nats.abs().max()) < 1e-5
    assert float(effects[1].nats.abs().max()) > 0.01


def test_what_cannot_be_asked_is_refused(bundle, codes):
    with pytest.raises(InputError, match=r"fixed length, so no word can be taken away; give other captions of 6 words"):
        word_effects(bundle, codes[0], CAPTION)
    layout = line_layout(49, CODEBOOK_SIZE)
    config = TransformerConfig(num_layers=1, d_model=8, num_heads=2, d_ff=8, max_length=layout.max_length)
    with pytest.raises(InputError, match="not of pictures drawn from captions"):
        patch_nats(Bundle(model=new_model(layout, config), layout=layout), codes[:1], [CAPTION])


# ---- memorisation ----


def levenshtein(first: list[int], second: list[int]) -> int:
    table = [[i + j if not i * j else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


def test_edit_distances_are_levenshteins():
    lines = np.random.default_rng(0).integers(0, 3, (40, 13))
    expected = [levenshtein(lines[0].tolist(), line.tolist()) for line in lines]
    assert edit_distances(lines[0], lines).tolist() == expected
    assert edit_distances(lines[0], np.roll(lines[:1], 1, axis=1))[0] <= 2, "a moved line is near"


def test_copies_of_training_pictures_are_found(bundle, codes):
    generator = np.random.default_rng(1)
    training, new = (generator.integers(0, CODEBOOK_SIZE, (60, 49)) for _ in range(2))
    drawn = training[[7, 19]].copy()
    drawn[1, :4] = (drawn[1, :4] + 1) % CODEBOOK_SIZE
    nearest = nearest_by_codes(drawn, training, num=3)
    assert nearest.rows[:, 0].tolist() == [7, 19] and nearest.distances[0, 0] == 0 and nearest.distances[1, 0] <= 4
    told = memorised(nearest, nearest_by_codes(new[:20], training))
    assert (told.nearer_than_new == 1).all()
    fresh = memorised(nearest_by_codes(new[20:40], training), nearest_by_codes(new[:20], training))
    assert 0.1 < fresh.nearer_than_new.mean() < 0.9
    features = [
        picture_features(bundle.image_tokenizer, torch.from_numpy(part).view(-1, 7, 7)) for part in (drawn, training)
    ]
    by_features = nearest_by_features(*features)
    assert by_features.rows[0, 0] == 7 and by_features.distances[0, 0] == pytest.approx(0, abs=1e-6)


# ---- hooks ----


@pytest.fixture(scope="module")
def hooked() -> tuple[HookedModel, torch.Tensor]:
    layout = line_layout(11, 7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = TransformerConfig(num_layers=3, d_model=24, num_heads=6, num_kv_heads=2, d_ff=29, max_length=12)
        model = new_model(layout, config).eval()
        return HookedModel(model), torch.randint(0, 7, (5, 11))


def test_names_are_those_of_transformer_lens(hooked):
    """In the order in which its own cache has them (its tests/integration/test_cache_hook_names.py)."""
    _, cache = hooked[0].run_with_cache(hooked[1])
    per_layer = [
        "hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern",
        "attn.hook_z", "hook_attn_out", "hook_resid_mid", "ln2.hook_normalized", "hook_mlp_out", "hook_resid_post",
    ]  # fmt: skip
    blocks = [f"blocks.{layer}.{name}" for layer in range(3) for name in per_layer]
    assert list(cache) == ["hook_embed", *blocks, "ln_final.hook_normalized"]
    assert act_name("resid_post", 2) == "blocks.2.hook_resid_post"
    assert cache["pattern", -1] is cache["blocks.2.attn.hook_pattern"]


def test_values_are_the_models_own(hooked):
    (wrapped, ids), model = hooked, hooked[0].model
    logits, cache = wrapped.run_with_cache(ids)
    with torch.no_grad():
        hidden = model.hidden(ids)
        assert torch.equal(logits, model.logits(hidden))
    states = causes.residual_stream(model, ids)
    for layer in range(3):
        assert torch.equal(cache["resid_pre", layer], states[layer])
        assert torch.equal(cache["resid_post", layer], states[layer + 1])
        assert torch.allclose(
            cache["resid_mid", layer] + cache["mlp_out", layer], cache["resid_post", layer], atol=1e-6
        )
        assert torch.allclose(
            cache["resid_pre", layer] + cache["attn_out", layer], cache["resid_mid", layer], atol=1e-6
        )
        assert torch.allclose(cache["pattern", layer].sum(-1), torch.ones(()), atol=1e-6)
        assert torch.equal(cache["pattern", layer], attention.attention_weights(model, ids)[layer])
        mixed = (cache["pattern", layer] @ cache["v", layer].repeat_interleave(3, 2).transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(cache["z", layer], mixed, atol=1e-5)
    assert torch.equal(cache["ln_final.hook_normalized"], hidden)
    assert cache["q", 0].shape == (5, 11, 6, 4) and cache["k", 0].shape == (5, 11, 2, 4)


def test_hooks_change_what_goes_on_and_are_gone(hooked):
    (wrapped, ids), model = hooked, hooked[0].model
    plain, _ = wrapped.run_with_cache(ids, names_filter=["hook_embed"])
    without = wrapped.run_with_hooks(ids, fwd_hooks=[(act_name("attn_out", 1), lambda value, hook: 0 * value)])
    with torch.no_grad(), causes.ablated(model, attentions=[1], kind="zero"):
        assert torch.allclose(without, model.logits(model.hidden(ids)), atol=1e-6)
    assert not torch.allclose(without, plain)
    assert torch.equal(wrapped.run_with_cache(ids)[0], plain)
    zero_head = [(act_name("z", 0), lambda value, hook: value.index_fill(2, torch.tensor([4]), 0))]
    with torch.no_grad(), causes.ablated(model, heads=[(0, 4)], kind="zero"):
        assert torch.allclose(
            wrapped.run_with_hooks(ids, fwd_hooks=zero_head), model.logits(model.hidden(ids)), atol=1e-6
        )
    with pytest.raises(InputError, match="can be read, but not changed"):
        wrapped.run_with_hooks(ids, fwd_hooks=[(act_name("pattern", 0), lambda value, hook: value)])
    with pytest.raises(KeyError, match="no hook point"):
        wrapped.run_with_cache(ids, names_filter="blocks.9.hook_resid_post")


def test_an_order_that_is_only_given_pictures_is_not_looked_into():
    vocabulary = Vocabulary({"special": ["<text>", "<image>", "<end>"], "text": 5, "image": 7})
    given = Layout.parse(
        vocabulary, {"a": "<text> (text{..3}) <image> image{4} <end>", "b": "<image> (image{4}) <end> text{..3} <text>"}
    )
    assert not has_picture_order(given)
    with pytest.raises(ValueError, match="no order of the layout predicts codes in a fixed place"):
        picture_order(given)
    both = Layout.parse(
        vocabulary, {"a": "<text> (text{..3}) <image> image{4} <end>", "b": "<image> image{4} <end> text{..3} <text>"}
    )
    assert picture_order(both) == "b"
