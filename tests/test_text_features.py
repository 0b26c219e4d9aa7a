"""Features of captions: as transformers makes them, kept, found damaged; and what a bundle that reads them draws."""

import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_t5 import PREFIX, WIDTH, save_t5, tiny_bundle, tiny_vqgan

from smalti.bundle import Bundle, TextEncoderConfig
from smalti.cli.app import run
from smalti.errors import InputError, InputWarning
from smalti.image_files import read_receipt, save_picture
from smalti.image_tokenizers import save_image_tokenizer
from smalti.models.base import Inputs
from smalti.sequences.vocabulary import FEATURE
from smalti.tasks.doctor import examine
from smalti.tasks.features import FeaturePipeline, captions_face
from smalti.tasks.replay import replay
from smalti.text_features import FeatureCache, TextEncoder, clean_caption

CAPTIONS = ["a red bar across", "the blue block", "a green bar , down , in the snow , a red fox"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "smalti"


@pytest.fixture
def bundle(tmp_path, t5):
    """The folder of a bundle that names its text encoder."""
    config = TextEncoderConfig(name=str(t5), sha256=TextEncoder(t5).sha256)
    tiny_bundle(config).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def by_transformers(t5, caption: str, most: int = PREFIX) -> torch.Tensor:
    """Of the caption alone, nothing filled up, nothing masked."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    ids = tokenizer(caption, return_tensors="pt", truncation=True, max_length=most).input_ids
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0]


# ---- the encoder ----


def test_features_are_those_of_transformers_alone_and_together(t5):
    encoder = TextEncoder(t5, max_length=PREFIX)
    together = encoder.encode(CAPTIONS)
    assert [len(one.features) for one in together] == [5, 4, 7] and [one.num_tokens for one in together] == [5, 4, 14]
    for caption, (features, _) in zip(CAPTIONS, together, strict=True):
        [(alone, _)] = encoder.encode([caption])
        expected = by_transformers(t5, caption)
        assert torch.equal(alone, expected)
        assert torch.allclose(features, expected, atol=1e-5)


def test_captions_are_cleaned_as_llamagen_s():
    assert clean_caption("  A “Red”\n fox — (in) the\tsnow’s `light` #1 ") == 'a "red" fox - in the snow\'s "light" 1'


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no text encoder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "of the type 'bert', not a T5"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be used as a text encoder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be used as a text encoder"),
    ],
)
def test_folders_that_are_no_text_encoder(tmp_path, spoil, message):
    folder = save_t5(tmp_path / "t5")
    spoil(folder)
    with pytest.raises(InputError, match=re.escape(message)) as found:
        TextEncoder(folder).encode(["a fox"])
    assert "\n" not in str(found.value)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_t5(tmp_path / "t5")
    state = load_file(folder / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of a T5 encoder, such as encoder\.final_layer_norm\.weight"):
        TextEncoder(folder).encode(["a fox"])


def test_without_transformers_the_extra_is_named(t5, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=re.escape("pip install 'smalti[t5]'")):
        TextEncoder(t5).encode(["a fox"])


def test_the_hash_is_of_the_contents_and_is_kept(tmp_path, t5, monkeypatch):
    found = TextEncoder(t5).sha256
    monkeypatch.setattr("smalti.text_features.file_sha256", lambda file: pytest.fail("hashed again"))
    assert TextEncoder(t5).sha256 == found
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert TextEncoder(save_t5(tmp_path / "copy")).sha256 == found
    assert TextEncoder(save_t5(tmp_path / "other", seed=1)).sha256 != found


# ---- the cache ----


def test_what_is_kept_is_not_encoded_again(tmp_path, t5, monkeypatch):
    encoder = TextEncoder(t5, max_length=PREFIX)
    filled = FeatureCache(tmp_path, encoder).fill([*CAPTIONS, CAPTIONS[0], ""])
    assert (filled.num_captions, filled.num_made, filled.num_cut, filled.longest) == (3, 3, 1, 14)
    fresh = TextEncoder(t5, max_length=PREFIX)
    monkeypatch.setattr(fresh, "encode", lambda captions: pytest.fail("encoded again"))
    cache = FeatureCache(tmp_path, fresh)
    assert cache.fill(CAPTIONS) == filled._replace(num_made=0)
    for caption in CAPTIONS:
        assert torch.allclose(cache[caption], by_transformers(t5, caption), atol=1e-5)
    assert FeatureCache(tmp_path, TextEncoder(t5, max_length=9)).folder != cache.folder
    other = TextEncoder(save_t5(tmp_path / "other", seed=1), max_length=PREFIX)
    assert FeatureCache(tmp_path, other).fill(CAPTIONS).num_made == 3


@pytest.mark.parametrize("where", ["header", "values", "end", "nothing"])
def test_damage_is_found_and_made_good(tmp_path, t5, where):
    encoder = TextEncoder(t5, max_length=PREFIX)
    cache = FeatureCache(tmp_path, encoder)
    cache.fill(CAPTIONS)
    before = {caption: cache[caption].clone() for caption in CAPTIONS}
    [file] = cache.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if where in ("header", "values"):
        content[20 if where == "header" else -30] ^= 0x5A
    elif where == "end":
        del content[-100:]
    else:
        content.clear()
    file.unlink()  # an open file keeps what it was
    file.write_bytes(content)
    again = FeatureCache(tmp_path, encoder)
    filled = again.fill(CAPTIONS)
    assert (filled.num_made, filled.num_damaged) == (3, 1)
    assert all(torch.equal(again[caption], features) for caption, features in before.items())
    assert FeatureCache(tmp_path, encoder).fill(CAPTIONS).num_damaged == 0


def test_damage_on_the_way_is_told(tmp_path, t5):
    cache = FeatureCache(tmp_path, TextEncoder(t5))
    cache.fill(CAPTIONS)
    cache = FeatureCache(tmp_path, TextEncoder(t5))
    [file] = cache.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-30] ^= 0x5A
    file.write_bytes(content)
    with pytest.raises(InputError, match="was damaged meanwhile; start again"):
        _ = [cache[caption] for caption in CAPTIONS]


def test_a_folder_that_cannot_be_written(tmp_path, t5):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", TextEncoder(t5))
    with pytest.raises(InputError, match="is a file, not a folder"):
        cache.fill(CAPTIONS)
    cache.fill(CAPTIONS, keep=False)
    assert len(cache[CAPTIONS[0]]) == 5


# ---- drawing ----


def whole(bundle: Bundle, features: torch.Tensor, codes: list[int]) -> torch.Tensor:
    """Logits of the code behind these, from a pass over the whole sequence, filled up on the left as the original is:
    what was filled up stands in the prefix and is seen by nobody."""
    model, n = bundle.model, len(features)
    token_ids = torch.tensor([[FEATURE] * n + codes])
    positions = torch.arange(n + len(codes))[None] + PREFIX - n
    hidden = model.hidden(Inputs(token_ids, positions, features=features[None]))
    return model.logits(hidden)[0, -1]


@pytest.mark.filterwarnings("ignore:1 of . captions were cut")
@torch.no_grad()
def test_guided_greedy_codes_are_those_of_a_plain_loop(bundle, t5):
    pipe = FeaturePipeline.load(bundle)
    for scale, negative in ((1.0, None), (7.5, None), (3.0, "the blue block")):
        drawn = pipe.generate_codes(CAPTIONS, temperature=0, guidance_scale=scale, negative_prompt=negative)
        for caption, found in zip(CAPTIONS, drawn, strict=True):
            features, codes = by_transformers(t5, caption), []
            null = pipe.model.features.null_features[-len(features) :]
            null = null if negative is None else by_transformers(t5, negative)
            for _ in range(16):
                given, none = whole(pipe.bundle, features, codes), whole(pipe.bundle, null, codes)
                codes.append(int((none + scale * (given - none)).argmax()))
            assert codes == found.flatten().tolist()


@pytest.mark.filterwarnings("ignore:1 of . captions were cut")
@torch.no_grad()
def test_likelihood_given_a_caption_is_that_of_a_plain_loop(bundle, t5):
    pipe = FeaturePipeline.load(bundle)
    codes = pipe.generate_codes(CAPTIONS, temperature=1.0, top_k=0, guidance_scale=1.0)
    scores = pipe.score_codes(codes, pipe.features(CAPTIONS))
    for caption, row, nats, pmi in zip(CAPTIONS, codes, scores.picture_nll_nats, scores.pmi_nats, strict=True):
        features, known, totals = by_transformers(t5, caption), row.flatten().tolist(), []
        for given in (features, pipe.model.features.null_features[-len(features) :]):
            losses = [F.cross_entropy(whole(pipe.bundle, given, known[:i]), row.flatten()[i]) for i in range(16)]
            totals.append(float(sum(losses)))
        assert float(nats) == pytest.approx(totals[0], abs=1e-3)
        assert float(pmi) == pytest.approx(totals[1] - totals[0], abs=1e-3)
    assert scores.caption_nll_nats is None


def test_prompts_draw_alike_in_any_company_and_are_drawn_again(tmp_path, bundle, t5, user_cache, monkeypatch, capsys):
    picture, prompt = tmp_path / "fox.png", "The RED fox"
    command = ["generate", prompt, "-o", str(picture), "--bundle", str(bundle), "--seed", "3"]
    assert run(command) == 0
    receipt = read_receipt(picture)
    assert receipt["sampling"]["guidance_scale"] == 7.5 and receipt["text_encoder"] == str(t5)
    with Image.open(picture) as image:
        assert image.size == (8, 8)
    assert list(user_cache.glob("features/*/*.safetensors"))
    # what was encoded once is there: the encoder is not loaded again
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert run(["replay", str(picture), "--bundle", str(bundle)]) == 0
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    pipe = FeaturePipeline.load(bundle)
    codes = pipe.generate_codes(["a bar", prompt, "the snow"], seed=[0, 3, 1])
    assert codes[1].flatten().tolist() == receipt["codes"]
    two = pipe.generate_codes(prompt, seed=2, n=2)
    assert torch.equal(two[1], codes[1])
    *_, last = pipe.stream(prompt, seed=3)
    assert last.codes.tolist() == receipt["codes"]
    capsys.readouterr()
    assert run(["score", str(picture), prompt, "a bar", "--bundle", str(bundle), "--json"]) == 0
    assert '"caption_nll_nats": null' in capsys.readouterr().out
    assert run(["info", str(bundle)]) == 0
    assert f"{WIDTH} features a token, of 7 tokens" in capsys.readouterr().out


def test_an_empty_caption_is_none(bundle):
    pipe = FeaturePipeline.load(bundle)
    [features] = pipe.features([" "])
    assert torch.equal(features, pipe.model.features.null_features)
    plain = pipe.generate_codes("", seed=4, guidance_scale=1.0)
    assert torch.equal(plain, pipe.generate_codes("", seed=4, guidance_scale=9.0))
    [picture] = pipe.generate("", seed=4)
    assert "text_encoder" not in read_receipt(picture)


def test_captions_that_are_cut_are_counted(bundle):
    pipe = FeaturePipeline.load(bundle)
    with pytest.warns(
        InputWarning, match="2 of 3 captions were cut to 7 tokens, as many as this bundle takes; .* has 14"
    ):
        pipe.features([CAPTIONS[2], "a a a a a a a", CAPTIONS[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.features(["a a a a a a"])


def test_a_bundle_of_features_keeps_its_promises_and_its_config(bundle):
    loaded = Bundle.load(bundle)
    assert loaded.reads_features and loaded.can_draw_features and not loaded.can_draw
    assert loaded.text_encoder.cleaned and loaded.kind == "features of captions"
    assert "16 codes of 13" in loaded.card().replace("\n", " ")
    certificate = examine(loaded, num_tokens=16)
    assert certificate.holds, certificate.checks
    with pytest.raises(ValueError, match="a text encoder is named, but the layout has no features"):
        digits = Bundle.load("digits")
        replace(digits, text_encoder=TextEncoderConfig())


def test_an_imported_model_draws_with_the_encoder_that_is_given(tmp_path, shared_dir, capsys):
    """LlamaGen's quirks (queries and keys of the prefix times zero) come with its weights."""
    folder, t5, bundle = shared_dir / "golden" / "llamagen_gpt_t2i", save_t5(tmp_path / "t5"), tmp_path / "t2i"
    save_image_tokenizer(tiny_vqgan(codes=53), tmp_path / "vq")
    command = ["import", "llamagen", str(folder / "weights.pt"), "-o", str(bundle), "--quiet"]
    command += ["--image-tokenizer", str(tmp_path / "vq")]
    picture, draw = (
        str(tmp_path / "x.png"),
        ["generate", "a fox", "--bundle", str(bundle), "-o", str(tmp_path / "x.png")],
    )
    assert run(command) == 0 and run(draw) == 2
    assert "give the folder of a T5 encoder by --text-encoder" in capsys.readouterr().err
    assert run([*draw, "--text-encoder", str(t5)]) == 0 and run(["replay", picture, "--bundle", str(bundle)]) == 0
    assert run([*command, "--force", "--text-encoder", str(t5)]) == 0 and run([*draw, "--force"]) == 0
    assert (
        read_receipt(picture)["sampling"] | {"guidance_scale": 7.5, "top_k": 1000} == read_receipt(picture)["sampling"]
    )
    capsys.readouterr()
    assert run(["doctor", str(bundle), "--tokens", "8"]) == 0
    wide = save_t5(tmp_path / "wide", width=24)
    assert run([*command, "--force", "--text-encoder", str(wide)]) == 2
    assert "makes 24 features a token, the model reads 20" in capsys.readouterr().err


# ---- bad input ----


def test_what_cannot_be_drawn(tmp_path, bundle, t5, capsys):
    picture = str(tmp_path / "x.png")
    wide, other = save_t5(tmp_path / "wide", width=24), save_t5(tmp_path / "other", seed=1)
    capsys.readouterr()
    for given, message in (
        (["--text-encoder", str(tmp_path / "none")], "there is no text encoder"),
        (["--text-encoder", str(wide)], "makes 24 features a token, the model of tiny reads 20"),
        (["--text-encoder", str(other)], f"tiny was trained with {TextEncoder(t5).sha256}"),
        (["--best-of", "3"], "a bundle of features of captions, which has no use for --best-of"),
        (["--negative-prompt", "snow", "--guidance-scale", "1"], "negative_prompt steers by guidance"),
        (["--guidance-interval", "0:17"], "a picture has 16 codes"),
    ):
        assert run(["generate", "a fox", "-o", picture, "--bundle", str(bundle), *given]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    assert run(["generate", "--class", "1", "-o", picture, "--bundle", str(bundle)]) == 2
    assert "which knows no classes" in capsys.readouterr().err
    assert run(["generate", "plain red two on light gray", "-o", picture, "--text-encoder", str(t5)]) == 2
    assert "reads captions without a text encoder; leave out --text-encoder" in capsys.readouterr().err
    for command in (["caption", picture], ["complete", "--picture", picture, "--rows", "1", "-o", picture]):
        assert run([*command, "--bundle", str(bundle)]) == 2
        capsys.readouterr()


def test_a_hub_s_name_is_fetched_only_if_it_is_given(tmp_path, t5, monkeypatch):
    from smalti import text_features

    class Hub:
        def snapshot_download(self, name, *, allow_patterns, local_files_only):
            if local_files_only:
                raise FileNotFoundError("no copy")
            return str(t5)

    monkeypatch.setattr(text_features, "import_hub", Hub)
    assert TextEncoder("owner/t5").folder == t5
    pipe = FeaturePipeline(tiny_bundle(TextEncoderConfig(name="owner/t5")))
    with pytest.raises(InputError, match="of which there is no copy here: give its folder by --text-encoder, or"):
        pipe.generate_codes("a fox")
    pipe = captions_face(tiny_bundle(TextEncoderConfig(name="owner/t5")), "owner/t5")
    assert pipe.generate_codes("a fox").shape == (1, 4, 4)
    pipe.save(tmp_path / "bundle")
    [picture] = pipe.generate("a fox")
    save_picture(picture, tmp_path / "x.png")
    with pytest.raises(InputError, match="of which there is no copy here"):
        replay(tmp_path / "x.png", tmp_path / "bundle")
    assert replay(tmp_path / "x.png", tmp_path / "bundle", "owner/t5").difference is None


def test_another_encoder_does_not_draw_a_picture_again(tmp_path, t5, capsys):
    tiny_bundle(TextEncoderConfig(name=str(t5))).save(tmp_path / "bundle")  # published: no hash is known
    picture = str(tmp_path / "x.png")
    assert run(["generate", "a fox", "-o", picture, "--bundle", str(tmp_path / "bundle")]) == 0
    other = save_t5(tmp_path / "other", seed=1)
    assert run(["replay", picture, "--bundle", str(tmp_path / "bundle"), "--text-encoder", str(other)]) == 2
    assert "was drawn with a text encoder of sha256" in capsys.readouterr().err
