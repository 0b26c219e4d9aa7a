"""The dual encoder: its losses written out, what it learns, what it lends, and how it ranks in a bundle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_parti import GRID, K, config, model, tiny

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.errors import InputError
from smalti.models.dual_encoder import DualEncoder, DualEncoderConfig, lend_encoder
from smalti.tasks.images import Pipeline
from smalti.training.dual_encoder import TrainDualConfig, _Batch, losses, train_dual_encoder
from smalti.training.token_model import TokenArrays

L = GRID[0] * GRID[1]
SHAPE = DualEncoderConfig(
    text_size=380,
    max_text=9,
    codebook_size=K,
    grid=GRID,
    text_layers=2,
    picture_layers=1,
    d_model=24,
    num_heads=3,
    d_ff=29,
    embedding_width=7,
    dropout=0.0,
)


def dual(**changes) -> DualEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DualEncoder(replace(SHAPE, **changes)).eval()
        for name, parameter in made.named_parameters():
            if name != "log_scale":
                torch.nn.init.normal_(parameter, std=0.3)
    return made


def texts_of(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.arange(length) * 11 % 380 for length in lengths]


def test_a_pair_fits_the_same_in_any_company():
    made, texts = dual(), texts_of((3, 0, 9, 5))
    codes = torch.randint(K, (4, L), generator=torch.Generator().manual_seed(1))
    together = made.fit(codes, texts)
    assert together.shape == (4,) and bool((together.abs() <= 1).all())
    for row in range(4):
        assert torch.allclose(made.fit(codes[row : row + 1], texts[row : row + 1]), together[row : row + 1], atol=1e-5)
    with pytest.raises(ValueError, match="a caption has 10 ids; the dual encoder reads 9"):
        made.fit(codes[:1], texts_of((10,)))


@torch.no_grad()
def test_the_losses_are_those_of_clip_and_bert_written_out():
    made, lengths = dual(), (3, 4, 3, 2)
    texts = texts_of(lengths)
    texts[1] += 1  # the first and the third caption are one
    text, counts = made.with_end(texts)
    codes = torch.randint(K, (4, L), generator=torch.Generator().manual_seed(1))
    hidden = torch.zeros_like(text, dtype=torch.bool)
    hidden[0, 1] = hidden[3, 0] = True
    found = losses(made, _Batch(codes, text, counts, hidden))
    encoded = made.read_text(text, counts, hidden)
    fits = made.of_text(encoded, counts) @ made.of_pictures(codes).T / 0.07
    expected, right = 0.0, 0
    for row in range(4):
        others = [column for column in range(4) if {row, column} != {0, 2}]
        expected -= float(fits[row, others].log_softmax(0)[others.index(row)]) / 8
        expected -= float(fits[others, row].log_softmax(0)[others.index(row)]) / 8
        right += int(max(others, key=lambda column: float(fits[row, column])) == row)
    assert float(found.contrastive) == pytest.approx(expected, rel=1e-4) and float(found.accuracy) == right / 4
    scores = encoded[[0, 3], [1, 0]] @ made.embed_text.weight[:-1].T
    assert float(found.masked) == pytest.approx(float(F.cross_entropy(scores, text[[0, 3], [1, 0]])), rel=1e-4)
    shown = made.read_text(text, counts)
    assert not torch.allclose(shown[0], encoded[0]) and torch.allclose(shown[1], encoded[1], atol=1e-5)


@pytest.fixture(scope="module")
def pairs() -> TokenArrays:
    """The caption says which code a picture is mostly of."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(6, size=160)
    image = np.where(generator.random((160, L)) < 0.7, kinds[:, None], generator.integers(K, size=(160, L)))
    text = np.stack([kinds * 7 + 3, generator.integers(9, size=160)], axis=1)
    return TokenArrays(image, text)


def test_it_learns_which_caption_goes_with_which_picture_and_resumes(pairs, tmp_path):
    settings = TrainDualConfig(
        num_steps=40, batch_size=32, learning_rate=3e-3, warmup_steps=5, masked_weight=0.5, checkpoint_every=25
    )
    whole = train_dual_encoder(SHAPE, pairs, pairs, settings, tmp_path / "whole", show_progress=False)
    codes, words = torch.from_numpy(pairs.image_tokens), torch.from_numpy(pairs.text_tokens)
    right = whole.fit(codes, list(words))
    other = whole.fit(codes, [text.where(text < 38, -4) + torch.tensor([7, 0]) for text in words])  # another kind
    assert float((right > other).float().mean()) > 0.8  # by chance a half

    class Stopped(Exception):
        pass

    class Ends(TokenArrays):
        def batch(self, rows):
            if len(rows) == 32 and Ends.left <= 0:
                raise Stopped
            Ends.left -= len(rows) == 32
            return super().batch(rows)

    Ends.left = 33
    stopping = Ends(pairs.image_tokens, pairs.text_tokens)
    with pytest.raises(Stopped):
        train_dual_encoder(SHAPE, stopping, pairs, settings, tmp_path / "stopped", show_progress=False)
    again = train_dual_encoder(SHAPE, pairs, pairs, settings, tmp_path / "stopped", show_progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(InputError, match=r"training\.batch_size is 32 there, 16 here"):
        train_dual_encoder(
            SHAPE, pairs, pairs, replace(settings, batch_size=16), tmp_path / "stopped", show_progress=False
        )


def test_its_text_encoder_can_begin_an_encoder_decoder():
    made, fresh = dual(), model(seed=1)
    lend_encoder(made, fresh)
    texts = texts_of((4,))
    text, lengths = made.with_end(texts)
    with torch.no_grad():
        expected = fresh.decoder.context(made.read_text(text, lengths))
        assert torch.allclose(fresh.encode(text).keys[1], expected.keys[1], atol=1e-6)
    with pytest.raises(ValueError, match="encoder has another shape than the model's"):
        lend_encoder(dual(text_layers=1), fresh)


def ranked(reranker: DualEncoder) -> Pipeline:
    pipe = tiny()
    parts = {name: getattr(pipe.bundle, name) for name in ("model", "layout", "image_tokenizer", "text_tokenizer")}
    return Pipeline(Bundle(**parts, pictures=pipe.pictures, reranker=reranker, name="ranked"))


def test_it_ranks_candidates_and_lies_in_the_bundle(tmp_path):
    pipe = ranked(dual())
    assert pipe.rerankers == ("contrastive", "pmi", "picture")
    candidates = pipe.generate_codes("a red ball", seed=3, n=4)
    words = [pipe.whole("a red ball")] * 4
    best = int(pipe.bundle.reranker.fit(candidates.flatten(1), words).argmax())
    assert torch.equal(pipe.generate_codes("a red ball", seed=3, best_of=4)[0], candidates[best])
    pipe.save(tmp_path / "bundle")
    loaded = Pipeline.load(tmp_path / "bundle")
    assert loaded.weights_sha256 == pipe.weights_sha256 != tiny().weights_sha256
    assert torch.equal(loaded.merit(candidates, words, "contrastive"), pipe.merit(candidates, words, "contrastive"))
    (tmp_path / "bundle" / "reranker" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"reranker/model\.safetensors"):
        Pipeline.load(tmp_path / "bundle")
    with pytest.raises(ValueError, match="the reranker's number of codes is 8, the layout says 15"):
        ranked(dual(grid=(2, 4)))


def test_rerankers_that_are_not_there_are_told_by_name(tmp_path, capsys):
    tiny().save(tmp_path / "bundle")
    draw = ["generate", "a red ball", "--bundle", str(tmp_path / "bundle"), "-o", str(tmp_path / "a.png")]
    for options, message in (
        (["--best-of", "2", "--rerank", "contrastive"], "has no dual encoder (reranker/), so it cannot rerank by"),
        (["--best-of", "2", "--rerank", "clip"], "has no CLIP model: name its folder, --clip FOLDER"),
        (["--best-of", "2", "--clip", str(tmp_path)], "holds no CLIP model that transformers reads"),
        (["--clip", str(tmp_path)], "--clip has one picture to choose from"),
    ):
        assert run([*draw, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_clip_of_transformers_ranks(tmp_path):
    transformers = pytest.importorskip("transformers")
    towers = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    words = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    torch.manual_seed(0)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(towers, vocab_size=len(vocabulary), eos_token_id=len(vocabulary) - 1, bos_token_id=52),
            vision_config=dict(towers, image_size=16, patch_size=8),
            projection_dim=9,
        )
    )
    looking = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    clip.save_pretrained(tmp_path)
    transformers.CLIPProcessor(image_processor=looking, tokenizer=words).save_pretrained(tmp_path)
    from smalti.tasks.clip import Clip

    pipe = tiny()
    pipe.clip = Clip(tmp_path)
    assert pipe.rerankers[0] == "clip"
    codes = pipe.generate_codes("a red ball", seed=1, n=3)
    merit = pipe.merit(codes, [pipe.whole("a red ball")] * 3, "clip")
    pictures = pipe.decode(codes, scale=1)
    inputs = pipe.clip.processor(text=["a red ball"], images=pictures, return_tensors="pt")
    with torch.no_grad():
        logits = clip.eval()(**inputs).logits_per_text[0] / clip.logit_scale.exp()
    assert torch.allclose(merit, logits, atol=1e-5) and isinstance(pictures[0], Image.Image)
    chosen = pipe.generate_codes("a red ball", seed=1, best_of=3, rerank="clip")
    assert torch.equal(chosen[0], codes[int(merit.argmax())])


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="text_layers is 0"):
        replace(SHAPE, text_layers=0)
    with pytest.raises(ValueError, match=r"masked_share is 1\.5"):
        TrainDualConfig(masked_share=1.5)
    assert DualEncoderConfig.from_dict(SHAPE.to_dict()) == SHAPE
    assert config().encoder == replace(SHAPE.text, dropout=0.0)
