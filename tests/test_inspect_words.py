"""Words and pictures: swapping one word's keys and values is exact at its ends, nats add up to the score."""

import pytest
import tiny_parti
import torch
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.errors import InputError
from smalti.inspect.words import Swap, _positions, attention_to_text, difference, picture_nats, swapped_codes
from smalti.sequences.layout import SpanValues
from smalti.tasks.images import Pipeline

CAPTIONS = ("dark green eight on bright cyan", "light green eight on bright cyan")
NOTHING, EVERYTHING = Swap(keys=False, values=False), Swap(following=None)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return attentive(tiny_pipeline())


def attentive(pipe: Pipeline) -> Pipeline:
    """With weights so large that attention is sharp: every caption has a picture of its own."""
    torch.manual_seed(0)
    for parameter in pipe.model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return pipe


def swapped(pipe: Pipeline, caption: str, other: str, swaps: list[Swap]) -> torch.Tensor:
    return swapped_codes(pipe, [caption], [other], swaps)[0]


def greedy(pipe: Pipeline, caption: str) -> torch.Tensor:
    return pipe.generate_codes(caption, temperature=0.0)[0]


def test_without_a_swap_the_picture_is_the_captions_and_with_all_of_it_the_others(pipe):
    rows = swapped(pipe, *CAPTIONS, [NOTHING, EVERYTHING, Swap(values=False), Swap(word=False, following=None)])
    assert torch.equal(rows[0], greedy(pipe, CAPTIONS[0])) and torch.equal(rows[1], greedy(pipe, CAPTIONS[1]))
    assert torch.equal(rows[2], rows[0]) and torch.equal(rows[3], rows[1])
    assert not torch.equal(rows[0], rows[1])


def test_only_a_swap_of_keys_and_values_together_is_a_swap(pipe):
    halves = [Swap(values=False, following=None), Swap(keys=False, following=None)]
    rows = swapped(pipe, *CAPTIONS, halves)
    assert not torch.equal(rows[2], rows[1]) or not torch.equal(rows[3], rows[1])


def test_of_an_encoder_the_first_word_and_all_behind_it_are_the_whole_caption():
    pipe = attentive(tiny_parti.tiny())
    captions = ("red cat", "blue cat")
    rows = swapped(pipe, *captions, [NOTHING, EVERYTHING])
    assert torch.equal(rows[0], greedy(pipe, captions[0])) and torch.equal(rows[1], greedy(pipe, captions[1]))
    assert torch.equal(rows[2], rows[0]) and torch.equal(rows[3], rows[1])


def test_of_an_encoder_words_before_the_swapped_one_have_read_it_too():
    pipe = tiny_parti.tiny()
    torch.manual_seed(0)
    for parameter in pipe.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    whole = [Swap(preceding=None, following=None), Swap(preceding=None, following=None, word=False)]
    rows = swapped(pipe, "a red ball", "a blue ball", whole)
    assert torch.equal(rows[2], rows[1]) and not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[3], rows[1])


def test_cross_attention_of_a_caption_and_its_marker_is_all_there_is():
    pipe = attentive(tiny_parti.tiny())
    codes = greedy(pipe, "red cat")
    shares = attention_to_text(pipe, codes, "red cat")
    words = pipe.text_tokenizer.encode("red cat")
    config = pipe.model.config
    assert shares.shape == (config.decoder_layers, config.num_heads, codes.numel(), len(words))
    assert (shares > 0).all() and (shares.sum(-1) < 1 + 1e-5).all()
    # The first layer's head written out, from the first input: <sot> at the first cell.
    model, block = pipe.model, pipe.model.decoder.blocks[0]
    x = model.embed_codes.weight[-1] + model.row_positions.weight[0] + model.column_positions.weight[0]
    x = x + block.attention(block.attention_norm(x[None, None]), None, None, None, 0)[0, 0]
    text = torch.tensor([[*words, config.text_size]])
    width = config.d_model // config.num_heads
    query = block.cross_attention.q(block.cross_norm(x))[:width]
    keys = model.encode(text).keys[0][0, 0]
    expected = (keys @ query / width**0.5).softmax(-1)
    torch.testing.assert_close(shares[0, 0, 0], expected[:-1])


def test_captions_together_are_as_alone(pipe):
    swaps = [Swap(), Swap(keys=False, following=1)]
    captions, others = ["dark red two on light gray", CAPTIONS[0]], ["dark red two on light blue", CAPTIONS[1]]
    together = swapped_codes(pipe, captions, others, swaps)
    for found, caption, other in zip(together, captions, others, strict=True):
        assert torch.equal(found, swapped(pipe, caption, other, swaps))


def test_captions_must_differ_in_one_word(pipe):
    assert difference(pipe, *CAPTIONS).places == (0,)
    assert difference(pipe, CAPTIONS[0], "light red eight on bright cyan", 2).places == (0, 1)
    for other in (CAPTIONS[0], "light red eight on bright cyan"):
        with pytest.raises(InputError, match="of 6 and 6 text ids; give two captions that differ in one"):
            difference(pipe, CAPTIONS[0], other)


def test_nats_of_cells_add_up_to_the_score(pipe):
    codes = torch.randint(37, (2, 7, 7), generator=torch.Generator().manual_seed(0))
    nats = picture_nats(pipe, codes, CAPTIONS)
    words = [torch.tensor(pipe.text_tokenizer.encode(caption)) for caption in CAPTIONS]
    assert torch.allclose(nats.sum((1, 2)), pipe.score_codes(codes, words).picture_nll_nats.float(), rtol=1e-4)


def test_attention_to_text_is_a_share_of_all():
    pipe = tiny_pipeline()
    codes = torch.randint(37, (7, 7), generator=torch.Generator().manual_seed(0))
    shares = attention_to_text(pipe, codes, CAPTIONS[0])
    assert shares.shape == (1, 3, 49, 6)
    assert (shares > 0).all() and (shares.sum(-1) < 1).all()
    # The first cell sees three markers and the caption; the last all 48 cells before it too.
    assert shares[:, :, 0].sum() > shares[:, :, -1].sum()


def test_captions_of_any_length_stand_where_they_are_looked_for():
    pipe = tiny_bpe_pipeline()
    caption, order = "a dog and two red cats", pipe.bundle.order("text", "image")
    words = torch.tensor([pipe.text_tokenizer.encode(caption)])
    codes = torch.randint(37, (1, 49), generator=torch.Generator().manual_seed(0))
    spans = {"text": SpanValues(words, torch.tensor([words.shape[1]])), "image": SpanValues(codes, torch.tensor([49]))}
    token_ids = pipe.layout.pack(order, spans).token_ids[0]
    text, image = _positions(pipe, order, words.shape[1])
    of = pipe.layout.vocabulary
    assert (token_ids[text : text + words.shape[1]] - of["text"].offset).tolist() == words[0].tolist()
    assert (token_ids[image : image + 49] - of["image"].offset).tolist() == codes[0].tolist()
