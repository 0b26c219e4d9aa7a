"""Likelihood against plain loops, known entropies and the generator's own log-probs."""

import math

import pytest
import torch

from smalti.engine.generate import Request, generate
from smalti.likelihood import _likelihood, evaluate_nll, score
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.sequences.layout import Layout, SpanValues
from smalti.sequences.vocabulary import Vocabulary

LAYOUT = Layout.parse(
    Vocabulary({"special": ["<bos>", "<i>", "<t>"], "image": 13, "text": 7}),
    {"text first": "<bos> <i> text{..3} <t> image{5}", "image first": "<bos> <t> image{5} <i> text{..3} <bos>"},
)


def model_and_spans(num_rows=11):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, d_model=20, num_heads=2, d_ff=28, max_length=LAYOUT.max_length, dropout=0.3
    )
    model = new_model(LAYOUT, config)
    torch.nn.init.normal_(model.head, std=0.5)
    lengths = torch.randint(0, 4, (num_rows,))
    image = SpanValues(torch.randint(0, 13, (num_rows, 5)), torch.full((num_rows,), 5))
    return model, {"image": image, "text": SpanValues(torch.randint(0, 7, (num_rows, 3)), lengths)}


def row_nats_by_hand(model, order, spans, row):
    """One token at a time: softmax of all logits masked to what can follow, in float64."""
    one = {name: SpanValues(v.values[row : row + 1], v.lengths[row : row + 1]) for name, v in spans.items()}
    packed = LAYOUT.pack(order, one)
    nats = {"image": 0.0, "text": 0.0, "special": 0.0}
    ids = packed.token_ids[0]
    for at in range(1, len(ids)):
        logits = model.logits(model.hidden(ids[None, :at])[0, -1]).double()
        allowed = torch.zeros(LAYOUT.vocabulary.size, dtype=torch.bool)
        for start, end in LAYOUT.slots[packed.slot_ids[0, at]].ranges:
            allowed[start:end] = True
        log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        [owner] = [s.name for s in LAYOUT.vocabulary.segments.values() if s.offset <= ids[at] < s.end]
        nats[owner] -= log_probs[ids[at]].item()
    return nats


@pytest.mark.parametrize("order", ["text first", "image first"])
@torch.no_grad()
def test_scores_equal_a_plain_loop_and_do_not_depend_on_the_batch(order):
    model, spans = model_and_spans()
    found = score(model, LAYOUT, order, spans, batch_size=4)
    assert model.training  # left as it was; dropout was off meanwhile
    model.eval()
    for row in range(11):
        expected = row_nats_by_hand(model, order, spans, row)
        for name, nats in expected.items():
            assert found[name][row].item() == pytest.approx(nats, abs=1e-4)
    again = score(model, LAYOUT, order, spans, batch_size=1)
    for name in found:
        assert torch.allclose(found[name], again[name], atol=1e-5)


@torch.no_grad()
def test_the_head_computes_only_the_segments_that_are_asked_for(monkeypatch):
    model, spans = model_and_spans()
    whole, logits, computed = score(model, LAYOUT, "text first", spans), DecoderOnly.logits, []

    def counting(self, hidden, slot=None):
        computed.append((len(hidden), slot.size))
        return logits(self, hidden, slot)

    monkeypatch.setattr(DecoderOnly, "logits", counting)
    found = score(model, LAYOUT, "text first", spans, segments=["image"])
    assert list(found) == ["image"] and torch.equal(found["image"], whole["image"])
    assert computed == [(11 * 5, 13)]  # no word, no marker


def test_scores_equal_the_generators_log_probs():
    model, _ = model_and_spans()
    model.eval()
    for found in generate(model, LAYOUT, [Request(order="text first", seed=s) for s in range(7)]):
        spans = {name: SpanValues(v[None], torch.tensor([len(v)])) for name, v in found.spans.items()}
        nats = score(model, LAYOUT, found.order, spans)
        # the generator was told the order, so the first marker was not drawn: take its nats off
        first = LAYOUT.pack(found.order, spans)
        choice = model.logits(model.hidden(first.token_ids[:, :1])[0, 0], LAYOUT.slots[int(first.slot_ids[0, 1])])
        first_nats = -choice.log_softmax(-1)[0].item()
        total = sum(float(part) for part in nats.values())
        assert -found.log_prob == pytest.approx(total - first_nats, abs=1e-4)


def test_a_uniform_model_scores_the_logarithm_of_the_slot():
    model, spans = model_and_spans()
    torch.nn.init.zeros_(model.head)
    nats = score(model, LAYOUT, "text first", spans)
    assert torch.allclose(nats["image"], torch.full((11,), 5 * math.log(13)).double())
    words = spans["text"].lengths
    full = words == 3  # then the end marker is certain
    assert torch.allclose(nats["text"], (words * math.log(8)).double())
    assert torch.allclose(nats["special"], math.log(2) + torch.where(full, 0.0, math.log(8)).double())


def test_reports_are_micro_averages_with_the_error_of_a_ratio():
    model, spans = model_and_spans(40)
    batches = [
        LAYOUT.pack(
            "text first", {n: SpanValues(v.values[at : at + 8], v.lengths[at : at + 8]) for n, v in spans.items()}
        )
        for at in range(0, 40, 8)
    ]
    report = evaluate_nll(model, LAYOUT, batches)
    nats = score(model, LAYOUT, "text first", spans)
    assert report["picture"].num_tokens == 200
    assert report["picture"].nats_per_token == pytest.approx(float(nats["image"].sum()) / 200)
    assert report["picture"].standard_error == pytest.approx(float(nats["image"].std()) / 5 / math.sqrt(40))
    assert report["caption"].num_tokens == int(spans["text"].lengths.sum())
    assert report["total"].num_tokens == sum(report[part].num_tokens for part in ("picture", "caption", "markers"))
    assert report["total"].total_nats == pytest.approx(sum(float(part.sum()) for part in nats.values()))
    assert report["picture"].perplexity == pytest.approx(math.exp(report["picture"].nats_per_token))
    assert report["picture"].bits_per_token == pytest.approx(report["picture"].nats_per_token / 0.6931472)


def test_the_error_of_a_ratio_covers_the_truth():
    """Over repeated samples of sequences with random lengths, the error is the spread of the average."""
    torch.manual_seed(1)
    averages, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 9, (60,)).double()
        found = _likelihood(counts * 2 + torch.randn(60).double() * counts, counts)
        averages.append(found.nats_per_token)
        errors.append(found.standard_error)
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(averages).std().item(), rel=0.1)
