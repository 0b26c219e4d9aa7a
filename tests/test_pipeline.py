"""The bundle a user loads: what it writes, reads back and refuses; and that what it draws hangs on the seed alone."""

import hashlib
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import CODEBOOK_SIZE, save_tiny_bundle, tiny_pipeline

from smalti import bundle
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import PictureConfig, read_picture, read_receipt, save_picture, to_images, to_pictures
from smalti.likelihood import score
from smalti.sequences.layout import SpanValues
from smalti.tasks.images import OWN, Pipeline
from smalti.weights import load_module, save_weights

CAPTION = "dark green eight on bright cyan"
OTHER = "plain red two on light gray"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_tiny_bundle(tmp_path / "tiny")


# Pictures ------------------------------------------------------------------------------------------------------

CONFIG = PictureConfig(height=3, width=5, levels=4, scale=2)


def test_pictures_are_rounded_to_levels_and_enlarged_pixel_by_pixel():
    image = torch.zeros(1, 3, 3, 5)
    image[0, 0, 1, 2] = 0.30  # nearest of 0, 1/3, 2/3, 1
    image[0, 1, 2, 4] = 7.0
    [picture] = to_pictures(image, CONFIG)
    assert picture.size == (10, 6)
    expected = np.zeros((6, 10, 3), np.uint8)
    expected[2:4, 4:6, 0] = 85
    expected[4:6, 8:10, 1] = 255
    np.testing.assert_array_equal(np.asarray(picture), expected)
    assert to_pictures(image, CONFIG, scale=7)[0].size == (35, 21)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_what_is_written_reads_back_exactly_at_any_scale(scale: int, tmp_path):
    levels = torch.randint(0, 4, (1, 3, 3, 5), generator=torch.Generator().manual_seed(scale)) / 3
    [picture] = to_pictures(levels, CONFIG, scale=scale)
    save_picture(picture, tmp_path / "a.png")
    torch.testing.assert_close(to_images([picture], CONFIG), levels)
    torch.testing.assert_close(to_images([tmp_path / "a.png"], CONFIG), levels)


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image.new("L", (5, 3)), "mode L, expected RGB; convert it"),
        (Image.new("RGBA", (5, 3)), "mode RGBA, expected RGB"),
        (Image.new("RGB", (7, 3)), "7×3 pixels, expected 5×3 or a whole multiple"),
        (Image.new("RGB", (10, 3)), "10×3 pixels, expected 5×3"),
        (Image.new("RGB", (4, 2)), "4×2 pixels, expected 5×3"),
        (Image.radial_gradient("L").resize((10, 6)).convert("RGB"), "but not 5×3 enlarged 2 times pixel by pixel"),
    ],
)
def test_a_picture_of_the_wrong_size_or_mode_is_refused_with_the_mend(picture: Image.Image, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        to_images([picture], CONFIG)


def test_a_file_that_is_no_whole_picture_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*none\.png"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png cannot be read as a picture \(of no format"):
        read_picture(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.png cannot be read as a picture \(.*; give a whole picture"):
        read_picture(tmp_path / "cut.png")
    Image.new("L", (5000, 1)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"wide\.png cannot be read .*5000×1 pixels; at most 4096"):
        read_picture(tmp_path / "wide.png")


@pytest.mark.parametrize("bad", [{"height": 0}, {"levels": 1}, {"levels": 5}, {"scale": 0}])
def test_picture_config_is_checked(bad: dict):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PictureConfig(**{"height": 3, "width": 5, **bad})


# Saving and loading --------------------------------------------------------------------------------------------


def test_a_saved_bundle_loads_as_the_same_one(pipe: Pipeline, saved: Path):
    loaded = Pipeline.load(saved)
    assert sorted(p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()) == [
        "README.md",
        "config.json",
        "image_tokenizer/config.json",
        "image_tokenizer/model.safetensors",
        "model.safetensors",
        "text_tokenizer.json",
    ]
    assert loaded.weights_sha256 == pipe.weights_sha256
    assert loaded.layout.to_dict() == pipe.layout.to_dict()
    assert (
        loaded.pictures == pipe.pictures
        and loaded.sampling == pipe.sampling
        and loaded.bundle.figures == pipe.bundle.figures
    )
    assert torch.equal(loaded.generate_codes(CAPTION, seed=5), pipe.generate_codes(CAPTION, seed=5))
    assert "| test nats per token | 3.25 |" in (saved / "README.md").read_text()
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]


def test_half_precision_on_disk_is_float32_in_memory(pipe: Pipeline, tmp_path):
    pipe.save(tmp_path / "whole")
    pipe.save(tmp_path / "half", half=True)
    for name in ("model.safetensors", "image_tokenizer/model.safetensors"):
        whole, half = ((tmp_path / folder / name).stat().st_size for folder in ("whole", "half"))
        assert half < 0.75 * whole
    loaded = Pipeline.load(tmp_path / "half")
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, pipe.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_values_beyond_float16_stay_float32(tmp_path):
    weights = torch.nn.ParameterDict({"a": torch.tensor([1e6]), "b": torch.tensor([2.0])})
    save_weights(weights.state_dict(), tmp_path / "w", half=True)
    loaded = load_module(lambda: torch.nn.ParameterDict({name: torch.empty(1) for name in "ab"}), tmp_path / "w")
    assert loaded["a"].item() == 1e6 and loaded["b"].item() == 2.0


def test_nothing_is_replaced_unasked_and_only_bundles_by_force(pipe: Pipeline, saved: Path, tmp_path):
    with pytest.raises(InputError, match="exists and is not empty"):
        pipe.save(saved)
    (saved / "stray").write_text("x")
    pipe.save(saved, force=True)
    assert not (saved / "stray").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds no bundle, so --force does not replace it"):
        pipe.save(precious, force=True)
    assert (precious / "thesis.txt").exists()
    with pytest.raises(InputError, match="exists and is not empty"):
        pipe.save(precious)


def test_an_interrupted_save_leaves_what_was_there(pipe: Pipeline, saved: Path, monkeypatch):
    def no_space(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "save_weights", no_space)
    with pytest.raises(InputError, match="no space left on its disk"):
        pipe.save(saved, force=True)
    monkeypatch.undo()
    assert Pipeline.load(saved).weights_sha256 == pipe.weights_sha256
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["model.safetensors", "image_tokenizer/model.safetensors", "text_tokenizer.json"])
def test_a_damaged_or_missing_file_is_named(saved: Path, name: str):
    content = bytearray((saved / name).read_bytes())
    content[-3] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(name)} \(\d+ bytes\) is damaged"):
        Pipeline.load(saved)
    (saved / name).unlink()
    with pytest.raises(InputError, match=rf"lacks {re.escape(name)}"):
        Pipeline.load(saved)


def test_truncated_weights_are_named_even_with_a_checksum_of_their_own(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config["sha256"]["model.safetensors"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        Pipeline.load(saved)


def test_a_bundle_without_a_checksum_is_refused(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    del config["sha256"]["model.safetensors"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the entry sha256 has no checksum of model\.safetensors"):
        Pipeline.load(saved)
    del config["sha256"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the entry sha256 is no list of files"):
        Pipeline.load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, 'expected the entry "format"'),
        ({"format_version": 3}, "format version 3, this smalti reads versions 1 and 2; upgrade smalti"),
        ({"format_version": 0}, "save the bundle again with this smalti"),
        ({"pictures": {"height": 28}}, "config.json: pictures: width: Field required"),
        ({"layout": None}, "does not describe a bundle"),
        ({"sampling": "warm"}, "does not describe a bundle"),
        ({"model": {"family": "diffusion"}}, "config.json: model: unknown family 'diffusion'"),
        ({"sha256": "0123"}, "the entry sha256 is no list of files"),
    ],
)
def test_a_config_of_another_kind_or_version_is_refused(saved: Path, change: dict, message: str):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=re.escape(message)):
        Pipeline.load(saved)


def test_a_config_without_an_entry_or_not_json_is_refused(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    del config["sampling"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the entry 'sampling' is missing"):
        Pipeline.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON: .*; fetch or save"):
        Pipeline.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"is not a bundle: it has no config\.json"):
        Pipeline.load(saved)


def test_parts_that_do_not_fit_together_are_refused(pipe: Pipeline):
    other = tiny_pipeline()
    with pytest.raises(ValueError, match=r"text tokenizer's size is 1, the layout says 31"):
        bundle.Bundle(
            model=pipe.model,
            layout=pipe.layout,
            image_tokenizer=pipe.image_tokenizer,
            text_tokenizer=type(other.text_tokenizer).from_words(["one"]),
            pictures=pipe.pictures,
        )


def test_an_unknown_bundle_lists_what_there_is():
    with pytest.raises(InputError, match=r"there is no bundle 'nonesuch': .*one that ships"):
        Pipeline.load("nonesuch")


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="there is no bundle 'out/demo'"):
        bundle.find_bundle("out/demo")


def test_a_hub_name_without_the_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=re.escape("pip install 'smalti[hub]'")):
        Pipeline.load("someone/digits")


def test_push_and_load_go_through_the_hub_library(pipe: Pipeline, tmp_path, monkeypatch):
    held: dict[str, Path] = {}

    class HfApi:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
            assert private and exist_ok
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            held[repo_id] = Path(shutil.copytree(folder_path, tmp_path / "hub"))

    hub = types.SimpleNamespace(HfApi=HfApi, snapshot_download=lambda name: str(held[name]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert pipe.push_to_hub("someone/digits", private=True) == "https://hub/someone/digits"
    assert Pipeline.load("someone/digits").weights_sha256 == pipe.weights_sha256


# Generating ----------------------------------------------------------------------------------------------------


def test_a_picture_hangs_on_its_seed_and_prompt_alone(pipe: Pipeline):
    alone = pipe.generate_codes(CAPTION, seed=11)
    among = pipe.generate_codes([OTHER, CAPTION, OTHER], seed=9, n=3, batch_size=4)
    assert torch.equal(among[3 + 2], alone[0])
    assert not torch.equal(among[3 + 1], alone[0])
    guided = pipe.generate_codes([OTHER, CAPTION], seed=11, guidance_scale=3.0)
    assert torch.equal(guided[1], pipe.generate_codes(CAPTION, seed=11, guidance_scale=3.0)[0])
    assert not torch.equal(guided[1], alone[0])


def test_pictures_are_their_codes_decoded_with_receipts(pipe: Pipeline, tmp_path):
    pictures = pipe.generate([CAPTION, OTHER], seed=2, n=2, temperature=0.7, guidance_scale=1.5)
    codes = pipe.generate_codes([CAPTION, OTHER], seed=2, n=2, temperature=0.7, guidance_scale=1.5)
    assert [picture.size for picture in pictures] == [(56, 56)] * 4
    for picture, row in zip(pictures, codes, strict=True):
        expected = pipe.image_tokenizer.decode_codes(row[None])
        torch.testing.assert_close(to_images([picture], pipe.pictures), (expected * 3).round().clamp(0, 3) / 3)
    save_picture(pictures[3], tmp_path / "a.png")
    receipt = read_receipt(tmp_path / "a.png")
    assert (receipt["prompt"], receipt["seed"], receipt["task"]) == (OTHER, 3, "generate")
    assert receipt["sampling"]["temperature"] == 0.7 and receipt["sampling"]["guidance_scale"] == 1.5
    assert receipt["weights_sha256"] == pipe.weights_sha256
    assert receipt["codes"] == codes[3].flatten().tolist()


@pytest.mark.parametrize("rerank", OWN)
def test_best_of_keeps_the_best_and_says_its_seed(pipe: Pipeline, rerank: str):
    [first, second] = pipe.generate(CAPTION, seed=5, n=2, best_of=3, rerank=rerank)
    words = [torch.tensor(pipe.text_tokenizer.encode(CAPTION))] * 6
    codes = pipe.generate_codes(CAPTION, seed=5, n=6)
    scores = pipe.score_codes(codes, words)
    merits = {"picture": -scores[0], "caption": -scores[1], "both": -scores[0] - scores[1], "pmi": scores[2]}
    merit = merits[rerank]
    torch.testing.assert_close(scores.merit(rerank), merit)
    for picture, candidates in ((first, range(3)), (second, range(3, 6))):
        receipt = json.loads(picture.info["smalti"])
        best = max(candidates, key=lambda i: float(merit[i]))
        assert receipt["seed"] == 5 + best
        [again] = pipe.generate(receipt["prompt"], seed=receipt["seed"])
        assert again.tobytes() == picture.tobytes()


def test_guidance_zero_ignores_the_prompt_and_a_negative_prompt_steers(pipe: Pipeline):
    free = pipe.generate_codes([CAPTION, OTHER], seed=4, guidance_scale=0.0)
    assert torch.equal(free[0], free[1])
    steered = pipe.generate_codes(CAPTION, seed=4, guidance_scale=0.0, negative_prompt=OTHER)
    assert torch.equal(steered, pipe.generate_codes(OTHER, seed=4))


def test_one_picture_may_be_given_alone(pipe: Pipeline, tmp_path):
    [picture] = pipe.generate(CAPTION)
    save_picture(picture, tmp_path / "a.png")
    said = pipe.caption([picture])
    for one in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), iter([picture])):
        assert pipe.caption(one) == said
    for alone, several in zip(pipe.score(picture, CAPTION), pipe.score([picture], [CAPTION]), strict=True):
        assert torch.equal(alone, several)


@pytest.mark.parametrize("given", [np.zeros((28, 28, 3), np.uint8), [np.zeros((28, 28, 3))], [None], torch.zeros(1, 3)])
def test_what_is_no_picture_is_named_by_its_type(pipe: Pipeline, given):
    with pytest.raises(InputError, match=r"given as (ndarray|NoneType|Tensor); give a picture of Pillow or the path"):
        pipe.caption(given)


@pytest.mark.parametrize(
    "codes", [torch.zeros(1, 49, dtype=torch.long), torch.zeros(2, 7, 7), torch.zeros(7, 7, dtype=torch.long)]
)
def test_codes_of_another_shape_are_refused(pipe: Pipeline, codes: torch.Tensor):
    with pytest.raises(InputError, match=r"codes are .* expected whole numbers of the shape \(N, 7, 7\), such as"):
        pipe.decode(codes)


def test_completing_needs_a_caption_for_guidance_and_one_to_complete(pipe: Pipeline):
    kept = torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(InputError, match=r"guidance_scale is 2\.0, but guidance follows the caption .* none is given"):
        pipe.complete_codes(kept, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"guidance_scale is 2\.0, but guidance follows the caption .* none is given"):
        pipe.complete_caption("dark", guidance_scale=2.0)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n is {n}; it must be at least 1"):
            pipe.complete_codes(kept, n=n)


def test_a_negative_prompt_without_guidance_is_refused(pipe: Pipeline):
    with pytest.raises(InputError, match="guidance_scale is 1, which is none"):
        pipe.generate(CAPTION, guidance_scale=1.0, negative_prompt=OTHER)
    with pytest.raises(InputError, match="guidance_scale is 1, which is none"):
        next(pipe.stream(CAPTION, guidance_scale=1.0, negative_prompt=OTHER))


@pytest.mark.parametrize("seeds", [np.int64(4), np.array([4, 4]), torch.tensor([4, 4]), (4, 4), [np.int32(4), 4]])
def test_seeds_may_be_of_any_kind_of_whole_number(pipe: Pipeline, seeds):
    pictures = pipe.generate([CAPTION, OTHER], seed=seeds)
    expected = pipe.generate([CAPTION, OTHER], seed=4)
    assert [json.loads(picture.info["smalti"]) for picture in pictures] == [
        json.loads(picture.info["smalti"]) for picture in expected
    ]


def test_a_stream_ends_in_what_generate_gives(pipe: Pipeline):
    partials = list(pipe.stream(CAPTION, seed=8, guidance_scale=2.0))
    assert [len(partial.codes) for partial in partials] == list(range(1, 50))
    assert torch.equal(partials[-1].codes.view(1, 7, 7), pipe.generate_codes(CAPTION, seed=8, guidance_scale=2.0))
    [whole] = pipe.generate(CAPTION, seed=8, guidance_scale=2.0)
    assert partials[-1].picture.tobytes() == whole.tobytes()
    grey = np.asarray(partials[0].picture)[8:]  # only the first cell, 4 pixels doubled, is drawn
    assert (grey == grey[0, 0]).all()


def test_captions_follow_the_picture_and_are_greedy_by_default(pipe: Pipeline):
    pictures = pipe.generate([CAPTION, OTHER], seed=1)
    captions = pipe.caption(pictures)
    assert captions == pipe.caption(pictures, seed=77) == [pipe.caption([picture])[0] for picture in pictures]
    assert all(len(caption.split()) == 6 for caption in captions)
    drawn = {pipe.caption(pictures, seed=seed, temperature=1.0)[0] for seed in range(5)}
    assert len(drawn) > 1
    assert pipe.caption([]) == []


def test_pairs_come_from_nothing_by_their_own_seeds(pipe: Pipeline):
    pairs = pipe.pairs(3, seed=20)
    assert pairs[2].picture.tobytes() == pipe.pairs(1, seed=22)[0].picture.tobytes()
    assert len({pair.caption for pair in pairs}) == 3
    best = pipe.pairs(1, seed=20, best_of=3)[0]
    scores = pipe.score([pair.picture for pair in pairs], [pair.caption for pair in pairs])
    assert len(scores.pmi_nats) == 3 and best.caption in {pair.caption for pair in pairs}


def test_guided_pairs_draw_a_caption_and_then_its_picture(pipe: Pipeline):
    guided = pipe.pairs(2, seed=20, guidance_scale=2.0)
    assert [pair.caption for pair in guided] == [pair.caption for pair in pipe.pairs(2, seed=20, order="text to image")]
    again = pipe.generate([pair.caption for pair in guided], seed=[20, 21], **vars(SampleConfig(guidance_scale=2.0)))
    assert [pair.picture.tobytes() for pair in guided] == [picture.tobytes() for picture in again]
    with pytest.raises(ValueError, match="needs the caption before the picture"):
        pipe.pairs(1, order="image to text", guidance_scale=2.0)


def test_completion_keeps_what_is_given(pipe: Pipeline):
    [picture] = pipe.generate(CAPTION, seed=3)
    kept = pipe.encode([picture])[0, :3]
    for caption, settings in ((None, {}), (CAPTION, {"guidance_scale": 2.0})):
        completed = pipe.complete(picture, rows=3, caption=caption, seed=6, n=2, **settings)
        for drawn in completed:
            codes = torch.tensor(json.loads(drawn.info["smalti"])["codes"]).view(7, 7)
            assert torch.equal(codes[:3], kept)
        assert completed[0].tobytes() != completed[1].tobytes()
    for line in pipe.complete_caption("dark green", seed=1, n=3):
        assert line.startswith("dark green ") and len(line.split()) == 6
    with pytest.raises(ValueError, match=re.escape("rows is 8; expected 0 to 7")):
        pipe.complete(picture, rows=8)


def test_scores_are_the_likelihoods_of_the_two_orders(pipe: Pipeline):
    pictures = pipe.generate([CAPTION, OTHER], seed=3)
    scores = pipe.score(pictures, [OTHER, CAPTION])
    codes = pipe.encode(pictures)
    words = torch.tensor([pipe.text_tokenizer.encode(caption) for caption in (OTHER, CAPTION)])
    spans = {
        "image": SpanValues(codes.flatten(1), torch.tensor([49, 49])),
        "text": SpanValues(words, torch.tensor([6, 6])),
    }
    text_first = score(pipe.model, pipe.layout, "text to image", spans)
    image_first = score(pipe.model, pipe.layout, "image to text", spans)
    torch.testing.assert_close(scores.picture_nll_nats, text_first["image"])
    torch.testing.assert_close(scores.caption_nll_nats, image_first["text"])
    torch.testing.assert_close(scores.pmi_nats, image_first["image"] - text_first["image"])
    assert scores.picture_nll_nats.mean() > 0.5 * 49 * math.log(CODEBOOK_SIZE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe: pipe.generate("drak green eight on bright cyan"), r"'drak' \(did you mean dark"),
        (lambda pipe: pipe.generate("dark green eight"), "has 3 words; this bundle's captions have 6"),
        (lambda pipe: pipe.generate(CAPTION, temprature=1), "sampling has no setting 'temprature'; there are temper"),
        (lambda pipe: pipe.generate(CAPTION, top_p=2.0), "top_p is 2.0"),
        (lambda pipe: pipe.generate(CAPTION, rerank="beauty", best_of=2), "rerank 'beauty' is unknown"),
        (
            lambda pipe: pipe.generate(CAPTION, rerank="pmi"),
            "rerank 'pmi' has one picture to choose from; give best_of 2",
        ),
        (lambda pipe: pipe.generate(CAPTION, n=0), "n is 0"),
        (lambda pipe: pipe.generate(CAPTION, scale=0), "scale is 0"),
        (lambda pipe: pipe.score([], [CAPTION]), "0 pictures but 1 captions"),
    ],
)
def test_bad_requests_say_what_is_wrong(pipe: Pipeline, call, message: str):
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_receipts_missing_or_damaged_are_named(tmp_path):
    Image.new("RGB", (5, 3)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match=r"plain\.png has no receipt"):
        read_receipt(tmp_path / "plain.png")
    picture = Image.new("RGB", (5, 3))
    picture.info["smalti"] = "{"
    with pytest.raises(InputError, match="its receipt is damaged"):
        read_receipt(picture)


def test_the_defaults_are_the_models_own_distribution():
    pipe = tiny_pipeline()
    assert pipe.sampling.picture == SampleConfig() and pipe.sampling.caption.temperature == 0
