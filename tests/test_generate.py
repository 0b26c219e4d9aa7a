"""The equivalence contract of generation: every way to the same sequence gives the same tokens and log-probs.

Oracles: the teacher-forced pass, enumeration of every sequence of a tiny vocabulary, a plain beam search.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import smalti.engine.beam
import smalti.engine.generate
from smalti.engine.beam import beam_search
from smalti.engine.engine import Engine
from smalti.engine.executors import EXECUTORS
from smalti.engine.generate import Generated, Request, best_of, generate, stream
from smalti.engine.sampling import SampleConfig
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.models.loss import token_nll
from smalti.sequences.layout import Layout, SpanValues
from smalti.sequences.vocabulary import Vocabulary

DIGITS = Layout.parse(
    Vocabulary({"special": ["<bos>", "<end of image>", "<end of text>"], "image": 13, "text": 7}),
    {
        "text to image": "<bos> <end of image> text{3} <end of text> image{5}",
        "image to text": "<bos> <end of text> image{5} <end of image> text{3}",
    },
)
CAPTIONS = Layout.parse(
    Vocabulary({"image": 11, "special": ["<start>", "<end>", "<bos>"], "text": 5}),
    {"text to image": "<bos> text{..4} <start> image{3} <end>"},
)


@pytest.fixture(params=["native", "packed", "eager"], autouse=True)
def each_executor(request, monkeypatch) -> None:
    """Everything below holds on every executor that takes the model."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")

    def chosen(model, *_) -> str:
        return "eager" if EXECUTORS[request.param].why_not(model.eval()) else request.param

    for module in (smalti.engine.generate, smalti.engine.beam):
        monkeypatch.setattr(module, "job_executor", chosen)


def tiny_model(layout: Layout, seed: int = 0, **options) -> DecoderOnly:
    torch.manual_seed(seed)
    config = dict(num_layers=2, d_model=24, num_heads=4, d_ff=20, max_length=layout.max_length) | options
    model = new_model(layout, TransformerConfig(**config)).eval()
    for parameter in model.parameters():  # larger weights: a tiny model at its usual start predicts nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def image_head(model: DecoderOnly) -> torch.Tensor:
    """The rows of the head for the codes, to be multiplied with hidden states of sequences of digits."""
    image = DIGITS.vocabulary["image"]
    return model.head[image.offset - 1 : image.end - 1].T  # nothing predicts <bos>, so it has no row


def teacher_forced(model: DecoderOnly, layout: Layout, found: Generated) -> torch.Tensor:
    """ln p of every token in one pass."""
    spans = {name: SpanValues(values[None], torch.tensor([len(values)])) for name, values in found.spans.items()}
    packed = layout.pack(found.order, spans)
    assert packed.token_ids[0].tolist() == found.token_ids.tolist()
    with torch.no_grad():
        return -token_nll(model, packed, layout.slots)[0]


def requests_of_all_kinds() -> list[Request]:
    caption, codes = torch.tensor([2, 0, 6]), torch.tensor([12, 3, 7, 0, 5])
    return [
        Request(order="text to image", given={"text": caption}, seed=1),
        Request(order="image to text", given={"image": codes}, seed=2),
        Request(order="text to image", seed=3),
        Request(order="image to text", seed=4),
        Request(order="text to image", given={"text": caption, "image": codes[:2]}, seed=5),
        Request(order="image to text", given={"image": codes[:4]}, seed=6),
        Request(seed=7),
        Request(seed=8),
    ]


@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal", "none"])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_log_probs_of_decode_steps_equal_the_teacher_forced_pass(positions, num_kv_heads):
    model = tiny_model(DIGITS, positions=positions, num_kv_heads=num_kv_heads)
    for found in generate(model, DIGITS, requests_of_all_kinds()):
        generated = found.log_probs != 0
        assert generated.any()
        expected = teacher_forced(model, DIGITS, found)
        assert torch.allclose(found.log_probs[generated], expected[generated], atol=1e-5)
        assert torch.equal(found.log_probs, found.draw_log_probs)


@pytest.mark.parametrize("layout", [DIGITS, CAPTIONS], ids=["digits", "captions"])
def test_tokens_do_not_depend_on_the_batch_or_the_order_of_requests(layout):
    model = tiny_model(layout)
    requests = [Request(order="text to image", seed=seed) for seed in range(20)]
    if layout is DIGITS:
        requests += requests_of_all_kinds()
    alone = [found.token_ids.tolist() for found in generate(model, layout, requests, batch_size=1)]
    for batch_size in (7, 64):
        together = [found.token_ids.tolist() for found in generate(model, layout, requests, batch_size=batch_size)]
        assert together == alone
    backwards = generate(model, layout, requests[::-1], batch_size=7)
    assert [found.token_ids.tolist() for found in backwards[::-1]] == alone


def test_given_tokens_are_kept_and_everything_generated_is_possible():
    caption = torch.tensor([2, 0, 6])
    found = generate(
        tiny_model(DIGITS), DIGITS, [Request(order="text to image", given={"text": caption}, seed=s) for s in range(9)]
    )
    for one in found:
        assert one.spans["text"].tolist() == caption.tolist()
        assert one.spans["image"].shape == (5,)
        assert one.token_ids[:2].tolist() == [0, 1]
        assert one.token_ids[5] == 2


def test_open_spans_end_by_their_marker_or_when_full():
    found = generate(tiny_model(CAPTIONS), CAPTIONS, [Request(order="text to image", seed=s) for s in range(60)])
    lengths = {len(one.spans["text"]) for one in found}
    assert lengths == {0, 1, 2, 3, 4}
    for one in found:
        expected = teacher_forced(tiny_model(CAPTIONS), CAPTIONS, one)
        assert torch.allclose(one.log_probs.double(), expected.double(), atol=1e-5)
        assert one.spans["image"].shape == (3,)


def test_probabilities_of_all_sequences_sum_to_one():
    layout = Layout.parse(
        Vocabulary({"special": ["<bos>", "<i>", "<t>"], "image": 3, "text": 2}),
        {"a": "<bos> <i> text{..2} <t> image{2}", "b": "<bos> <t> image{2} <i> text{2}"},
    )
    model = tiny_model(layout).double()
    total = 0.0
    model.requires_grad_(False)
    images = list(itertools.product(range(3), repeat=2))
    open_texts = [text for n in range(3) for text in itertools.product(range(2), repeat=n)]
    fixed_texts = list(itertools.product(range(2), repeat=2))
    for order, texts in (("a", open_texts), ("b", fixed_texts)):
        for image, text in itertools.product(images, texts):
            spans = {"image": image, "text": text}
            given = {
                name: SpanValues(torch.tensor([values], dtype=torch.long).view(1, -1), torch.tensor([len(values)]))
                for name, values in spans.items()
            }
            total += float((-token_nll(model, layout.pack(order, given), layout.slots).double().sum()).exp())
    assert total == pytest.approx(1, abs=1e-9)


def test_frequencies_follow_the_distribution():
    layout = Layout.parse(Vocabulary({"special": ["<bos>"], "image": 5}), {"a": "<bos> image{1}"})
    model = tiny_model(layout)
    found = generate(model, layout, [Request(order="a", seed=s) for s in range(4000)], batch_size=500)
    counts = torch.bincount(torch.stack([one.spans["image"][0] for one in found]), minlength=5).double()
    expected = model.logits(model.hidden(torch.tensor([[0]])), layout.slots[1]).softmax(-1)[0, 0].double().detach()
    chi_square = ((counts - 4000 * expected) ** 2 / (4000 * expected)).sum()
    assert chi_square < 18.5  # 0.1 % point of chi-square with 4 degrees of freedom


def with_null(request: Request) -> Request:
    return replace(request, null=Request(order="image to text"))


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_null():
    model = tiny_model(DIGITS)
    given = {"text": torch.tensor([2, 0, 6])}
    plain = [Request(order="text to image", given=given, seed=s) for s in range(12)]
    guided = [with_null(request) for request in plain]
    one = generate(model, DIGITS, guided, SampleConfig(guidance_scale=1.0))
    assert [o.token_ids.tolist() for o in one] == [o.token_ids.tolist() for o in generate(model, DIGITS, plain)]

    zero = generate(model, DIGITS, guided, SampleConfig(guidance_scale=0.0))
    for found in zero:  # drawn with the log-probs of the picture under the null order
        packed = DIGITS.pack(
            "image to text", {k: SpanValues(v[None], torch.tensor([len(v)])) for k, v in found.spans.items()}
        )
        expected = -token_nll(model, packed, DIGITS.slots)[0, 2:7]
        assert torch.allclose(found.draw_log_probs[-5:], expected, atol=1e-4)


def test_guided_draws_follow_the_formula_at_every_step():
    model = tiny_model(DIGITS)
    request = with_null(Request(order="text to image", given={"text": torch.tensor([1, 1, 4])}, seed=11))
    config = SampleConfig(guidance_scale=2.5, temperature=0.7, top_k=6)
    (found,) = generate(model, DIGITS, [request], config)
    cond_hidden = model.hidden(found.token_ids[None])[0, 5:-1]
    null_ids = torch.cat((torch.tensor([0, 2]), found.token_ids[-5:]))
    null_hidden = model.hidden(null_ids[None])[0, 1:-1]
    for step in range(5):
        cond, null = (h[step] @ image_head(model) for h in (cond_hidden, null_hidden))
        logits = (null + 2.5 * (cond - null)) / 0.7
        kept = logits >= logits.sort(descending=True).values[5]
        expected = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)[found.spans["image"][step]]
        assert found.draw_log_probs[-5 + step].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("interval", [(0, 2), (2, 4), (1, 2), (3, None)])
def test_an_interval_skips_the_null_pass_and_changes_nothing_else(interval, monkeypatch):
    model = tiny_model(DIGITS)
    request = with_null(Request(order="text to image", given={"text": torch.tensor([1, 1, 4])}, seed=3))
    config = SampleConfig(guidance_scale=3.0, guidance_interval=interval)
    rows_run = []
    run = Engine._run

    def counting(self, rows, tokens):
        rows_run.append(len(tokens) * max(map(len, tokens)))
        run(self, rows, tokens)

    monkeypatch.setattr(Engine, "_run", counting)
    (found,) = generate(model, DIGITS, [request], config)
    end = 5 if interval[1] is None else interval[1]
    assert len([count for count in rows_run[1:] if count > 1]) <= end - interval[0]
    (again,) = generate(model, DIGITS, [request], replace(config, guidance_interval=(0, None)))
    if interval[0] == 0:  # the first guided tokens are those of full guidance
        assert found.spans["image"][: interval[1]].tolist() == again.spans["image"][: interval[1]].tolist()
    expected = teacher_forced(model, DIGITS, found)
    outside = [step for step in range(5) if not interval[0] <= step < end]
    assert torch.allclose(found.draw_log_probs[-5:][outside], expected[-5:][outside], atol=1e-5)
    null_ids = torch.cat((torch.tensor([0, 2]), found.token_ids[-5:]))
    for step in range(interval[0], end):
        cond = model.hidden(found.token_ids[None])[0, 5 + step] @ image_head(model)
        null = model.hidden(null_ids[None])[0, 1 + step] @ image_head(model)
        guided = (null + 3.0 * (cond - null)).log_softmax(-1)[found.spans["image"][step]]
        assert found.draw_log_probs[-5 + step].item() == pytest.approx(guided.item(), abs=1e-4)


def test_a_negative_prompt_is_another_null():
    model = tiny_model(DIGITS)
    given, negative = {"text": torch.tensor([2, 0, 6])}, {"text": torch.tensor([5, 5, 1])}
    null = Request(order="text to image", given=negative)
    (found,) = generate(
        model, DIGITS, [Request(order="text to image", given=given, null=null)], SampleConfig(guidance_scale=0.0)
    )
    under_negative = teacher_forced(
        model,
        DIGITS,
        replace(
            found,
            spans=found.spans | negative,
            token_ids=torch.cat(
                (found.token_ids[:2], DIGITS.vocabulary.ids("text", negative["text"]), found.token_ids[5:])
            ),
        ),
    )
    assert torch.allclose(found.draw_log_probs[-5:], under_negative[-5:], atol=1e-4)


def test_streamed_tokens_are_the_offline_ones():
    for layout in (DIGITS, CAPTIONS):
        model = tiny_model(layout)
        requests = [Request(order="text to image", seed=s) for s in range(9)]
        if layout is DIGITS:
            requests += requests_of_all_kinds()
        offline = generate(model, layout, requests, batch_size=4)
        streamed = {
            (event.ticket, event.position): (event.token_id, event.log_prob)
            for event in stream(model, layout, requests, batch_size=4)
        }
        for row, found in enumerate(offline):
            for at, (token, lp) in enumerate(zip(found.token_ids.tolist(), found.log_probs.tolist(), strict=True)):
                if (row, at) in streamed:
                    assert streamed[row, at] == (token, pytest.approx(lp))
            drawn = int((found.log_probs != 0).sum())
            assert sum(r == row for r, _ in streamed) >= drawn > 0


def test_temperature_zero_is_greedy():
    model = tiny_model(DIGITS)
    request = Request(order="text to image", given={"text": torch.tensor([2, 0, 6])})
    (found,) = generate(model, DIGITS, [request], SampleConfig(temperature=0))
    ids = found.token_ids[:6]
    image = DIGITS.vocabulary["image"]
    for _ in range(5):
        logits = model.hidden(ids[None])[0, -1] @ image_head(model)
        ids = torch.cat((ids, logits.argmax()[None] + image.offset))
    assert found.token_ids.tolist() == ids.tolist()


def test_a_full_width_beam_finds_the_likeliest_sequences():
    layout = Layout.parse(Vocabulary({"special": ["<bos>", "<i>"], "image": 4}), {"a": "<bos> image{2} <i> image{1}"})
    model = tiny_model(layout)
    scores = {}
    for codes in itertools.product(range(4), repeat=3):
        ids = torch.tensor([0, codes[0] + 2, codes[1] + 2, 1, codes[2] + 2])
        log_probs = model.logits(model.hidden(ids[None]), layout.slots[1]).log_softmax(-1)[0]
        scores[codes] = sum(log_probs[at, code].item() for at, code in zip((0, 1, 3), codes, strict=True))
    best = sorted(scores, key=lambda codes: -scores[codes])
    for (beams,) in (beam_search(model, layout, [Request(order="a")], 16),):
        assert [tuple(beam.spans["image"].tolist()) for beam in beams[:4]] == best[:4]
        assert [beam.log_prob for beam in beams[:4]] == pytest.approx([scores[c] for c in best[:4]], abs=1e-5)


def test_beams_of_several_requests_equal_beams_one_by_one():
    model = tiny_model(DIGITS)
    captions = torch.randint(0, 7, (5, 3), generator=torch.Generator().manual_seed(0))
    requests = [Request(order="text to image", given={"text": caption}) for caption in captions]
    requests.insert(2, Request(order="image to text"))
    together = beam_search(model, DIGITS, requests, 3, batch_size=9)
    for request, beams in zip(requests, together, strict=True):
        (alone,) = beam_search(model, DIGITS, [request], 3)
        assert [beam.token_ids.tolist() for beam in beams] == [beam.token_ids.tolist() for beam in alone]
        assert all(first.log_prob >= second.log_prob for first, second in itertools.pairwise(beams))


def test_a_beam_of_one_is_greedy():
    model = tiny_model(DIGITS)
    requests = [Request(order="text to image", given={"text": torch.tensor([2, 0, 6])})]
    (greedy,) = generate(model, DIGITS, requests, SampleConfig(temperature=0))
    assert beam_search(model, DIGITS, requests, 1)[0][0].token_ids.tolist() == greedy.token_ids.tolist()


def test_best_of_returns_the_candidates_ranked_by_their_likelihood():
    model = tiny_model(DIGITS)
    request = Request(order="text to image", given={"text": torch.tensor([2, 0, 6])}, seed=5)
    (ranked,) = best_of(model, DIGITS, [request], 6)
    alone = generate(model, DIGITS, [replace(request, seed=5 + i) for i in range(6)])
    expected = sorted(alone, key=lambda found: -found.log_prob)
    assert [found.token_ids.tolist() for found in ranked] == [found.token_ids.tolist() for found in expected]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(order="sideways"), "no order 'sideways' in the layout; there are text to image, image to text"),
        (Request(order="text to image", given={"image": torch.tensor([1])}), "cannot be given"),
        (Request(order="text to image", given={"text": torch.tensor([9, 0, 0])}), r"outside 0\.\.6"),
        (
            Request(order="text to image", given={"text": torch.zeros(4).long()}),
            "4 text tokens are given; the layout takes 3",
        ),
        (Request(given={"text": torch.zeros(3).long()}), "names its order"),
    ],
)
def test_a_request_that_does_not_fit_is_explained(request_, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(DIGITS), DIGITS, [request_])


def test_guidance_without_a_null_condition_is_explained():
    with pytest.raises(ValueError, match="needs a null condition"):
        generate(tiny_model(DIGITS), DIGITS, [Request(order="text to image")], SampleConfig(guidance_scale=2.0))
    wrong = Request(order="text to image", null=Request(order="text to image", given={"text": torch.zeros(3).long()}))
    with pytest.raises(ValueError, match="leaves other spans"):
        generate(tiny_model(DIGITS), DIGITS, [wrong], SampleConfig(guidance_scale=2.0))


def test_generation_switches_dropout_off_and_leaves_the_model_as_it_was():
    model = tiny_model(DIGITS, dropout=0.5)
    request = Request(order="text to image", given={"text": torch.tensor([2, 0, 6])}, seed=4)
    (expected,) = generate(model, DIGITS, [request])
    model.train()
    (found,) = generate(model, DIGITS, [request])
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert beam_search(model, DIGITS, [request], 2)[0][0].token_ids.tolist() == (
        beam_search(model.eval(), DIGITS, [request], 2)[0][0].token_ids.tolist()
    )
    model.train()
    for _ in stream(model, DIGITS, [request]):
        pass
    assert model.training


def test_a_beam_wider_than_the_sequences_there_are_holds_each_once():
    layout = Layout.parse(Vocabulary({"special": ["<bos>"], "image": 5}), {"a": "<bos> image{1}"})
    (beams,) = beam_search(tiny_model(layout), layout, [Request(order="a")], 8)
    assert sorted(int(beam.spans["image"]) for beam in beams) == [0, 1, 2, 3, 4]


def test_a_request_with_nothing_left_to_generate_is_returned_as_it_is():
    given = {"text": torch.tensor([2, 0, 6]), "image": torch.tensor([1, 2, 3, 4, 5])}
    request = Request(order="text to image", given=given)
    (found,) = generate(tiny_model(DIGITS), DIGITS, [request])
    ((beam,),) = beam_search(tiny_model(DIGITS), DIGITS, [request], 3)
    assert found.token_ids.tolist() == beam.token_ids.tolist()
    assert found.log_prob == beam.log_prob == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r: generate(m, DIGITS, [r], batch_size=0), "batch_size is 0"),
        (lambda m, r: best_of(m, DIGITS, [r], 0), "num_candidates is 0"),
        (lambda m, r: beam_search(m, DIGITS, [r], 0), "beam_width is 0"),
        (lambda m, r: generate(m, DIGITS, [replace(r, seed=2**64)]), "out of range; expected 0 <= seed"),
        (lambda m, r: generate(m, DIGITS, [replace(r, given={"text": torch.rand(3)})]), "one row of whole numbers"),
        (lambda m, r: generate(m, DIGITS, [replace(r, given={"text": torch.zeros(1, 3).long()})]), r"shape \(1, 3\)"),
    ],
)
def test_wrong_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model(DIGITS), Request(order="text to image"))
