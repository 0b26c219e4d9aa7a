"""The head over a slice against the masked whole, the grouped loss against a plain one, and a model that memorises."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.engine.beam import beam_search
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.likelihood import evaluate_nll, score
from smalti.models.config import PRESETS, TransformerConfig
from smalti.models.decode_state import SLOT_BLOCK
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig, new_model
from smalti.models.loss import is_predicted, slot_nll, slot_targets, token_nll
from smalti.sequences.layout import NO_SLOT, Layout, Packed, SpanValues
from smalti.sequences.vocabulary import Vocabulary

DIGITS = Layout.parse(
    Vocabulary({"special": ["<bos>", "<end of image>", "<end of text>"], "image": 13, "text": 7}),
    {
        "text to image": "<bos> <end of image> text{3} <end of text> image{5}",
        "image to text": "<bos> <end of text> image{5} <end of image> text{3}",
    },
)
CAPTIONS = Layout.parse(
    Vocabulary({"image": 11, "special": ["<start>", "<end>", "<bos>"], "text": 5, "unused": 2}),
    {"text to image": "<bos> (text{..4}) <start> image{3} <end>"},
)
LLAMAGEN_PARAMETERS = {
    "llamagen-b": 110_888_448,
    "llamagen-l": 342_910_976,
    "llamagen-xl": 774_699_520,
    "llamagen-xxl": 1_410_972_672,
    "llamagen-xxxl": 3_893_027_840,
    "llamagen-1b": 1_199_616_000,
    "llamagen-3b": 3_096_659_200,
    "llamagen-7b": 6_614_589_440,
}
LAYOUTS = {"digits": DIGITS, "captions": CAPTIONS}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def tiny_model(layout: Layout, *, tie_embeddings: bool = False, full_head: bool = False, **options) -> DecoderOnly:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, d_model=20, num_heads=5, d_ff=29, max_length=layout.max_length)
    model = new_model(
        layout, TransformerConfig(**(sizes | options)), tie_embeddings=tie_embeddings, full_head=full_head
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def random_rows(layout: Layout, order: str, num_rows: int = 17) -> Packed:
    generator = torch.Generator().manual_seed(2)
    spans = {}
    for span in layout[order].spans:
        values = torch.randint(layout.vocabulary[span.segment].size, (num_rows, span.length), generator=generator)
        shortest = 0 if span.end else span.length
        spans[span.segment] = SpanValues(
            values, torch.randint(shortest, span.length + 1, (num_rows,), generator=generator)
        )
    return layout.pack(order, spans)


def all_orders(layout: Layout) -> Packed:
    """Rows of every order in one batch."""
    packs = [random_rows(layout, order) for order in layout.orders]
    return Packed(*(torch.cat(tensors) for tensors in zip(*(pack[:3] for pack in packs), strict=True)))


def masked_nll(model: DecoderOnly, layout: Layout, packed: Packed) -> Tensor:
    """All V logits, what cannot stand at a place set to −inf, the softmax over the rest."""
    logits = model.logits(model.hidden(packed.token_ids))[:, :-1]
    allowed = torch.zeros(len(layout.slots) + 1, layout.vocabulary.size, dtype=torch.bool)
    for index, slot in enumerate(layout.slots):
        for start, end in slot.ranges:
            allowed[index, start:end] = True
    allowed[NO_SLOT] = True
    slot_ids, targets = packed.slot_ids[:, 1:], packed.token_ids[:, 1:]
    log_probs = logits.masked_fill(~allowed[slot_ids], -math.inf).log_softmax(-1)
    nll = -log_probs.gather(-1, targets[..., None])[..., 0]
    return F.pad(nll.masked_fill(slot_ids == NO_SLOT, 0.0), (1, 0))


def gradients(loss: Tensor, model: DecoderOnly) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@every_layout
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_softmax_over_a_slice_is_the_masked_softmax_over_all(layout, tie_embeddings):
    model, packed = tiny_model(layout, tie_embeddings=tie_embeddings, full_head=True), all_orders(layout)
    found, expected = token_nll(model, packed, layout.slots), masked_nll(model, layout, packed)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    weights = torch.rand_like(found)
    pairs = zip(gradients((found * weights).sum(), model), gradients((expected * weights).sum(), model), strict=True)
    for gradient, expected_gradient in pairs:
        assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-10)


@every_layout
def test_the_full_softmax_is_plain_cross_entropy(layout):
    model, packed = tiny_model(layout, full_head=True), all_orders(layout)
    found = token_nll(model, packed, layout.slots, full_softmax=True)
    logits = model.logits(model.hidden(packed.token_ids[:, :-1])).transpose(1, 2)
    expected = F.cross_entropy(logits, packed.token_ids[:, 1:], reduction="none")
    predicted = packed.slot_ids[:, 1:] != NO_SLOT
    assert torch.allclose(found[:, 1:], expected * predicted, atol=1e-10)
    assert bool((found[:, 0] == 0).all())
    sliced = token_nll(model, packed, layout.slots)
    assert bool((found >= sliced - 1e-12).all())  # fewer rivals, fewer nats
    assert bool((found[:, 1:] > sliced[:, 1:])[predicted].all())


@every_layout
def test_places_with_one_possible_id_cost_nothing(layout):
    model, packed = tiny_model(layout, full_head=True), all_orders(layout)
    nll = token_nll(model, packed, layout.slots)
    sizes = torch.tensor([slot.size for slot in layout.slots] + [1])[packed.slot_ids]
    assert bool((nll[sizes == 1] == 0).all())
    assert bool((nll[sizes > 1] > 0).all())
    assert int((sizes == 1).sum()) > len(packed.token_ids)  # more than the first tokens


def test_impossible_rows_of_the_head_get_exactly_no_gradient():
    model, packed = tiny_model(CAPTIONS, full_head=True), all_orders(CAPTIONS)
    nll = token_nll(model, packed, CAPTIONS.slots)
    vocabulary, image = CAPTIONS.vocabulary, CAPTIONS.vocabulary["image"]
    in_picture = (packed.token_ids < image.end) & (packed.slot_ids != NO_SLOT)
    for loss, possible in (
        (nll[in_picture].sum(), set(range(image.end))),
        (nll.sum(), {*range(image.end), vocabulary.special("<start>"), *range(14, 19)}),
    ):
        (gradient,) = torch.autograd.grad(loss, [model.head], retain_graph=True)
        assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) == possible
    (full,) = torch.autograd.grad(token_nll(model, packed, CAPTIONS.slots, full_softmax=True).sum(), [model.head])
    assert bool((full.abs().sum(1) > 0).all())


@every_layout
@pytest.mark.parametrize("full_softmax", [False, True])
def test_the_loss_of_a_training_step_is_that_of_the_counted_tokens(layout, full_softmax):
    model, packed = tiny_model(layout, full_head=full_softmax).float(), all_orders(layout)
    targets = slot_targets(packed, layout.slots, full_softmax=full_softmax)
    found = slot_nll(model, packed.token_ids, targets, layout.slots).sum()
    expected = token_nll(model, packed, layout.slots, full_softmax=full_softmax)[packed.counted].sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, expected_gradient in zip(gradients(found, model), gradients(expected, model), strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-4)
    if layout is CAPTIONS and not full_softmax:  # the caption is given: nothing of it is computed
        assert sum(len(target.rows) for target in targets) == 3 * len(packed.token_ids)


@every_layout
def test_a_slices_logits_are_columns_of_the_whole(layout):
    model = tiny_model(layout, full_head=True)
    hidden = torch.randn(3, 2, 20, dtype=torch.float64)
    whole = model.logits(hidden)
    assert whole.shape == (3, 2, layout.vocabulary.size)
    for slot in layout.slots:
        columns = slot.token_ids(torch.arange(slot.size))
        assert torch.allclose(model.logits(hidden, slot), whole[..., columns], atol=1e-12)


@every_layout
def test_logits_do_not_depend_on_their_token_or_what_follows(layout):
    """The gradient of what scores token t, by the embeddings of tokens t and later, is exactly 0."""
    model, packed = tiny_model(layout), all_orders(layout)
    embeddings = []
    model.embed_tokens.register_forward_hook(lambda _, __, output: embeddings.append(output))
    nll = token_nll(model, packed, layout.slots)
    for t in range(1, packed.token_ids.shape[1]):
        (gradient,) = torch.autograd.grad(nll[:, t].sum(), embeddings, retain_graph=True)
        assert bool((gradient[:, t:] == 0).all())
        predicted = nll[:, t] > 0
        assert bool((gradient[predicted, :t].abs().amax(-1) > 0).all())


def test_a_model_scores_the_same_in_training_as_in_evaluation():
    model, packed = tiny_model(DIGITS), all_orders(DIGITS)
    assert torch.equal(token_nll(model.train(), packed, DIGITS.slots), token_nll(model.eval(), packed, DIGITS.slots))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_prefill_and_decode_steps_are_the_hidden_states_of_one_pass(positions):
    model, token_ids = tiny_model(DIGITS, positions=positions), all_orders(DIGITS).token_ids
    expected = model.hidden(token_ids)
    state, rows = model.new_state(len(token_ids)), slice(0, len(token_ids))
    assert torch.allclose(model.extend(state, rows, token_ids[:, :4]), expected[:, 3], atol=1e-10)
    for t in range(4, token_ids.shape[1]):
        assert state.lengths == [t] * len(token_ids)
        assert torch.allclose(model.extend(state, rows, token_ids[:, t : t + 1]), expected[:, t], atol=1e-10)


def test_a_state_is_as_long_and_as_precise_as_asked():
    model = tiny_model(DIGITS, num_heads=10, num_kv_heads=2)
    state = model.new_state(3)
    assert state.keys(0).shape == (3, 2, SLOT_BLOCK, 2) and state.max_length == DIGITS.max_length <= SLOT_BLOCK
    assert state.keys(0).dtype == torch.float64
    assert model.bfloat16().new_state(3, 4).values(1).dtype == torch.bfloat16
    assert model.new_state(3, 4).max_length == 4


def test_tied_embeddings_are_one_tensor():
    apart, tied = tiny_model(DIGITS, full_head=True), tiny_model(DIGITS, tie_embeddings=True)
    assert tied.head_weight is tied.embed_tokens.weight
    assert apart.head_weight is not apart.embed_tokens.weight
    assert apart.num_parameters - tied.num_parameters == 20 * DIGITS.vocabulary.size
    assert "head" not in tied.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_head": True},
        {"tie_embeddings": True, "positions": "rotary_2d", "grid": (3, 3), "prefix_length": 2},
        {"num_kv_heads": 1, "norm": "rms"},
    ],
)
def test_a_config_survives_json(options):
    config = tiny_model(DIGITS, **options).config
    again = DecoderOnlyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert ("head_ranges" in config.to_dict()) == (config.head_ranges is not None)
    model = DecoderOnly(again)
    model.load_state_dict(tiny_model(DIGITS, **options).state_dict())


# ---- a head with rows for what is predicted ----


@every_layout
def test_a_head_has_rows_for_exactly_the_ids_that_get_a_gradient(layout):
    model, packed = tiny_model(layout, full_head=True), all_orders(layout)
    loss = slot_nll(model.float(), packed.token_ids, slot_targets(packed, layout.slots), layout.slots).sum()
    (gradient,) = torch.autograd.grad(loss, [model.head])
    trained = gradient.abs().sum(1).nonzero()[:, 0]
    assert torch.equal(trained, layout.predicted.token_ids(torch.arange(layout.predicted.size)))
    smaller = tiny_model(layout)
    assert smaller.config.head_ranges == layout.predicted.ranges
    assert smaller.head_weight.shape == (len(trained), 20)


@every_layout
def test_a_smaller_head_begins_and_scores_as_the_whole_one(layout):
    shape = TransformerConfig(num_layers=1, d_model=20, num_heads=5, d_ff=29, max_length=layout.max_length)
    models = []
    for full_head in (True, False):
        torch.manual_seed(3)
        models.append(new_model(layout, shape, full_head=full_head).eval())
    whole, smaller = models
    packed = all_orders(layout)
    targets = slot_targets(packed, layout.slots)
    assert torch.equal(*(slot_nll(model, packed.token_ids, targets, layout.slots) for model in models))
    assert torch.equal(
        whole.transformer.blocks[0].attention.qkv.weight, smaller.transformer.blocks[0].attention.qkv.weight
    )
    kept = layout.predicted.token_ids(torch.arange(layout.predicted.size))
    logits = smaller.logits(torch.ones(3, 20))
    assert torch.allclose(logits[:, kept], whole.logits(torch.ones(3, 20))[:, kept], atol=1e-6)
    assert int((logits == -math.inf).sum()) == 3 * (layout.vocabulary.size - len(kept))


def test_what_was_only_given_is_neither_scored_nor_drawn():
    model, packed = tiny_model(CAPTIONS), all_orders(CAPTIONS)
    text = next(slot for slot in CAPTIONS.slots if CAPTIONS.vocabulary["text"].offset in range(*slot.ranges[-1]))
    with pytest.raises(ValueError, match=r"cannot score the ids 11\.\.11, 14\.\.18: it has rows for 0\.\.10"):
        model.logits(torch.zeros(20, dtype=torch.float64), text)
    nll, predicted = token_nll(model, packed, CAPTIONS.slots), is_predicted(model, packed.slot_ids, CAPTIONS.slots)
    in_picture = (packed.token_ids < 11) & (packed.slot_ids != NO_SLOT)
    assert bool((nll > 0).eq(in_picture).all())
    alone = [index for index, slot in enumerate(CAPTIONS.slots) if slot.size == 1]  # behind a full caption, too
    assert torch.equal(predicted, in_picture | torch.isin(packed.slot_ids, torch.tensor(alone)))
    assert not predicted[packed.token_ids >= 14].any()
    found = evaluate_nll(model, CAPTIONS, [packed])
    assert found["caption"].num_tokens == 0 and found["picture"].num_tokens == 3 * len(packed.token_ids)
    assert math.isfinite(found["total"].nats_per_token)
    spans = {"text": SpanValues(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 1]))}
    spans["image"] = SpanValues(torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 3]))
    nats = score(model, CAPTIONS, "text to image", spans)
    with pytest.raises(ValueError, match="text has no likelihood here: the model was always given it"):
        score(model, CAPTIONS, "text to image", spans, segments=["text"])
    assert "text" not in nats and bool((nats["image"] > 0).all())
    for draw in (generate, partial(beam_search, beam_width=2)):
        with pytest.raises(
            ValueError, match=r"\(text\{\.\.4\}\) <start> cannot be drawn, since the model was always given it"
        ):
            draw(model, CAPTIONS, [Request(order="text to image")])
    for full in (slot_targets(packed, CAPTIONS.slots, full_softmax=True),):
        with pytest.raises(ValueError, match=r"\(full_softmax\) needs a head with rows for all ids"):
            slot_nll(model, packed.token_ids, full, CAPTIONS.slots)
    with pytest.raises(ValueError, match=r"\(full_softmax\) needs a head with rows for all ids"):
        token_nll(model, packed, CAPTIONS.slots, full_softmax=True)


@pytest.mark.parametrize(
    "ranges", [(), ((0, 0),), ((3, 2),), ((0, 4), (2, 6)), ((0, 24),), ((-1, 3),), ((0, 2), (2, 4))]
)
def test_head_ranges_that_cannot_be_are_explained(ranges):
    transformer = TransformerConfig(num_layers=1, d_model=4, num_heads=1, d_ff=4, max_length=11)
    with pytest.raises(ValueError, match=r"expected pairs \(start, end\) of token ids within 0..23"):
        DecoderOnlyConfig(vocab_size=23, transformer=transformer, head_ranges=ranges)
    with pytest.raises(ValueError, match="tie_embeddings uses a head with rows for all ids"):
        DecoderOnlyConfig(vocab_size=23, transformer=transformer, head_ranges=((0, 4),), tie_embeddings=True)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("llamagen")])
def test_llamagens_have_the_published_parameter_counts(name):
    layout = Layout.parse(Vocabulary({"label": 1001, "image": 16384}), {"label to image": "label{1} image{256}"})
    with torch.device("meta"):
        model = new_model(layout, TransformerConfig(max_length=257, grid=(16, 16), prefix_length=1, **PRESETS[name]))
    assert model.num_parameters == LLAMAGEN_PARAMETERS[name]


def test_a_model_that_cannot_be_is_explained():
    transformer = TransformerConfig(num_layers=1, d_model=4, num_heads=1, d_ff=4, max_length=9)
    with pytest.raises(ValueError, match="the layout's sequences have up to 11 tokens, max_length is 9"):
        new_model(DIGITS, transformer)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        DecoderOnlyConfig(vocab_size=0, transformer=transformer)
    for wrong in ({"causal": False}, {"cross_attention": True}):
        with pytest.raises(ValueError, match="needs causal=True and cross_attention=False"):
            new_model(DIGITS, TransformerConfig(num_layers=1, d_model=4, num_heads=1, d_ff=4, max_length=11, **wrong))


def test_a_model_memorises_eight_examples_and_samples_them_back():
    torch.manual_seed(1)
    images, texts = torch.randint(13, (8, 5)), torch.randint(7, (8, 3))
    assert len(texts.unique(dim=0)) == len(images.unique(dim=0)) == 8
    spans = {"image": SpanValues(images, torch.full((8,), 5)), "text": SpanValues(texts, torch.full((8,), 3))}
    packs = [DIGITS.pack(order, spans) for order in DIGITS.orders]
    packed = Packed(*(torch.cat(tensors) for tensors in zip(*(pack[:3] for pack in packs), strict=True)))
    targets = slot_targets(packed, DIGITS.slots)
    model = new_model(
        DIGITS, TransformerConfig(num_layers=2, d_model=48, num_heads=4, d_ff=96, max_length=DIGITS.max_length)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = slot_nll(model, packed.token_ids, targets, DIGITS.slots).sum() / len(packed.token_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What cannot be known: which order it is, and which of the eight examples.
    assert loss.item() == pytest.approx(math.log(2) + math.log(8), abs=0.05)

    model.eval()
    for config in (SampleConfig(temperature=0), SampleConfig(top_p=0.9)):
        drawn = generate(
            model, DIGITS, [Request(order="text to image", given={"text": text}) for text in texts], config
        )
        assert [one.spans["image"].tolist() for one in drawn] == images.tolist()
        read = generate(model, DIGITS, [Request(order="image to text", given={"image": i}) for i in images], config)
        assert [one.spans["text"].tolist() for one in read] == texts.tolist()
    pairs = {(tuple(i), tuple(t)) for i, t in zip(images.tolist(), texts.tolist(), strict=True)}
    for one in generate(model, DIGITS, [Request(seed=seed) for seed in range(40)], SampleConfig(top_p=0.95)):
        assert (tuple(one.spans["image"].tolist()), tuple(one.spans["text"].tolist())) in pairs
