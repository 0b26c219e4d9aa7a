"""Bundles of captions of any length: reranking by what they have, and pictures drawn while a model is trained."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_captions import BOTH, ONE, TEXT_FIRST, tiny

from smalti.cli.app import run
from smalti.engine.generate import Request, generate
from smalti.errors import InputError
from smalti.image_files import read_picture, read_receipt, save_picture
from smalti.likelihood import score
from smalti.sequences.layout import SpanValues
from smalti.tasks.images import Pipeline
from smalti.tasks.sample_table import SampleTable, SampleTableConfig, wrapped

CAPTIONS = ["cook, dark skin tone", "a flag"]


@pytest.fixture(scope="module")
def one() -> Pipeline:
    return tiny(ONE)


@pytest.fixture(scope="module")
def both() -> Pipeline:
    return tiny(BOTH)


def spans(pipe, codes, captions):
    words = [torch.tensor(pipe.text_tokenizer.encode(caption), dtype=torch.long) for caption in captions]
    lengths = torch.tensor([len(ids) for ids in words])
    return {
        "image": SpanValues(codes.flatten(1), torch.full((len(codes),), 6)),
        "text": SpanValues(torch.nn.utils.rnn.pad_sequence(words, batch_first=True), lengths),
    }


@pytest.mark.parametrize("name", ["one", "both"])
def test_information_is_against_the_empty_caption(name, request):
    pipe = request.getfixturevalue(name)
    codes = pipe.generate_codes(CAPTIONS, seed=4)
    found = pipe.score_codes(codes, [torch.tensor(pipe.text_tokenizer.encode(caption)) for caption in CAPTIONS])
    given = score(pipe.model, pipe.layout, "text to image", spans(pipe, codes, CAPTIONS))
    alone = score(pipe.model, pipe.layout, "text to image", spans(pipe, codes, ["", ""]))
    torch.testing.assert_close(found.picture_nll_nats, given["image"])
    torch.testing.assert_close(found.pmi_nats, alone["image"] - given["image"])
    if name == "one":
        assert found.caption_nll_nats is None
    else:
        back = score(pipe.model, pipe.layout, "image to text", spans(pipe, codes, CAPTIONS))
        torch.testing.assert_close(found.caption_nll_nats, back["text"])


def test_the_best_is_by_default_what_the_bundle_can_tell(one, both):
    assert one.rerankers == ("pmi", "picture") and both.rerankers == ("caption", "both", "pmi", "picture")
    for pipe in (one, both):
        [picture] = pipe.generate(CAPTIONS[0], seed=5, best_of=4)
        receipt = json.loads(picture.info["smalti"])
        assert receipt["rerank"] == pipe.rerankers[0]
        candidates = pipe.generate_codes(CAPTIONS[0], seed=5, n=4)
        scores = pipe.score_codes(candidates, [torch.tensor(pipe.text_tokenizer.encode(CAPTIONS[0]))] * 4)
        merit = scores.pmi_nats if pipe is one else -scores.caption_nll_nats
        assert receipt["seed"] == 5 + int(merit.argmax())


def test_a_bundle_of_one_order_neither_captions_nor_reranks_by_captions(one):
    with pytest.raises(InputError, match="no order with image before text, so it cannot rerank by 'caption'; choose"):
        one.generate(CAPTIONS[0], best_of=2, rerank="caption")
    with pytest.raises(InputError, match="has no order with image before text"):
        one.caption_codes(one.generate_codes(CAPTIONS[0]))


def test_scores_that_a_bundle_lacks_are_a_dash(one, tmp_path, capsys):
    one.save(tmp_path / "bundle")
    [picture] = one.generate(CAPTIONS[0])
    codes = one.encode([picture])
    found = one.score_codes(codes, [torch.tensor(one.text_tokenizer.encode(CAPTIONS[0]))])
    save_picture(picture, tmp_path / "a.png")
    arguments = ["score", str(tmp_path / "a.png"), CAPTIONS[0], "--bundle", str(tmp_path / "bundle")]
    assert run(arguments) == 0
    assert "–" in capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["caption_nll_nats"] is None
    assert row["pmi_nats"] == pytest.approx(found.pmi_nats.item(), rel=1e-4)


# Captions that are begun


def test_an_open_caption_that_is_begun_goes_on_as_if_it_had_been_drawn():
    pipe = tiny({"text to image": TEXT_FIRST.replace("(text{..40})", "text{..40}")})
    drawn = generate(pipe.model, pipe.layout, [Request(order="text to image", seed=seed) for seed in range(3)])
    for seed, whole in enumerate(drawn):
        for num in (0, 2, len(whole.spans["text"])):
            given = {"text": whole.spans["text"][:num]}
            begun = Request(order="text to image", given=given, begun="text", seed=seed)
            [again] = generate(pipe.model, pipe.layout, [begun])
            assert torch.equal(again.token_ids, whole.token_ids)
    said = pipe.complete_caption("cook, da", seed=1, n=3)
    assert len(set(said)) == 3 and all(line.startswith("cook, da") and len(line) > 8 for line in said)
    assert pipe.complete_caption("cook, da", seed=2) == said[1:2]


def test_a_caption_is_not_completed_where_that_was_never_learned(both, one, tmp_path, capsys):
    with pytest.raises(
        InputError, match=r"never learned p\(caption\): .* 'image to text' writes captions of a picture"
    ):
        both.complete_caption("cook")
    with pytest.raises(InputError, match=r"never learned p\(caption\): .* it draws pictures of whole captions"):
        one.complete_caption("cook")
    both.save(tmp_path / "both")
    assert run(["complete", "cook", "--bundle", str(tmp_path / "both")]) == 2
    assert "cannot complete a caption by itself" in capsys.readouterr().err


# Pictures on the way


def test_the_table_grows_by_a_row_for_each_iteration_and_draws_none_twice(one, tmp_path):
    prompts = ("cook, dark skin tone", "a | flag of many colours and a long name", "")
    drawn = []

    class Counted(Pipeline):
        def generate(self, *arguments, **options):
            drawn.append(options["seed"])
            return super().generate(*arguments, **options)

    def make_pipeline(model):
        return Counted(replace(one.bundle, model=model))

    table = SampleTable(tmp_path, SampleTableConfig(prompts=prompts, every=10, seed=7), make_pipeline)
    one.model.train()
    for step in (0, 10, 10, 20):
        table(one.model, step)
    assert one.model.training
    one.model.eval()
    assert drawn == [[7, 8, 9]] * 3 and table.steps == [0, 10, 20]
    receipt = read_receipt(tmp_path / "00000010-2.png")
    assert (receipt["prompt"], receipt["seed"]) == (prompts[1], 8)
    expected = one.generate(prompts[1], seed=8)[0]
    assert read_picture(tmp_path / "00000010-2.png").tobytes() == expected.tobytes()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert (
        lines[0] == "| iteration | cook, dark skin tone | a \\| flag of many colours and a long name | (no caption) |"
    )
    assert lines[3] == "| 10 | ![](00000010-1.png) | ![](00000010-2.png) | ![](00000010-3.png) |"
    assert len(lines) == 5
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.height > picture.width * 0.8
    (tmp_path / "00000020-3.png").unlink()
    assert table.steps == [0, 10]


def test_every_is_checked():
    with pytest.raises(ValueError, match="every is 0"):
        SampleTableConfig(every=0)


def test_lines_are_as_long_as_their_words_allow():
    assert wrapped("a bb ccc extraordinarily d", 6) == "a bb\nccc\nextraordinarily\nd"
