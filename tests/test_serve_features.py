"""A server of a bundle that reads captions as features of a text encoder: the pictures of the library, and again."""

import base64

import pytest
from serving import Running, picture_of
from tiny_t5 import PREFIX, save_t5, tiny_bundle

from smalti.bundle import TextEncoderConfig
from smalti.cli.app import run
from smalti.errors import InputError
from smalti.serve.app import ServeConfig
from smalti.serve.run import load_service
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.replay import replay
from smalti.text_features import TextEncoder

PROMPT, OTHER = "a red bar across", "the blue block"
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def bundle(tmp_path, t5, monkeypatch):
    """The folder of a bundle that knows the hash of its text encoder, and not where that lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_bundle(TextEncoderConfig(name=None, sha256=TextEncoder(t5).sha256)).save(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("settings", [{}, {"negative_prompt": OTHER}, {"guidance_scale": 1.0}, {"temperature": 0.5}])
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_pictures_are_those_of_the_library(bundle, t5, prompt, settings):
    pipe = FeaturePipeline.load(bundle, text_encoder=t5)
    wanted = pipe.generate_codes(prompt, seed=3, n=2, executor="eager", **settings)
    with Running(pipe, executor="eager") as server:
        status, answer, _ = server.request("POST", GENERATIONS, {"prompt": prompt, "seed": 3, "n": 2} | settings)
    assert status == 200
    for codes, picture, entry in zip(wanted, pipe.decode(wanted), answer["data"], strict=True):
        assert entry["smalti"]["codes"] == codes.flatten().tolist()
        assert picture_of(entry["b64_json"]).tobytes() == picture.tobytes()
        assert entry["smalti"].get("text_encoder") == (str(t5) if prompt or "negative_prompt" in settings else None)
    assert answer["usage"]["input_tokens_details"]["text_tokens"] == (5 if prompt else PREFIX)


def test_a_picture_comes_again_from_its_receipt_here_and_there(bundle, t5, tmp_path, native_kernels):
    pipe = FeaturePipeline.load(bundle, text_encoder=t5)
    with Running(pipe, executor="native") as server:
        _, answer, _ = server.request("POST", GENERATIONS, {"prompt": PROMPT, "seed": 7, "negative_prompt": OTHER})
        image = answer["data"][0]["b64_json"]
        status, again, _ = server.request("POST", "/v1/replay", {"image": image})
        assert status == 200 and again["identical"] and again["data"][0]["smalti"] == answer["data"][0]["smalti"]
        status, listed, _ = server.request("GET", "/v1/models/tiny")
        assert listed["smalti"]["max_prompt_tokens"] == PREFIX and not listed["smalti"]["can_caption"]
    (tmp_path / "a.png").write_bytes(base64.b64decode(image))
    assert replay(tmp_path / "a.png", bundle, text_encoder=t5).difference is None


def test_what_it_does_not_take_is_named(bundle, t5, tmp_path):
    pipe = FeaturePipeline.load(bundle, text_encoder=t5)
    with Running(pipe, executor="eager") as server:
        for asked, message in (
            ({"prompt": f"{PROMPT} " * 3}, "prompt has 13 tokens; tiny takes 7"),
            ({"prompt": PROMPT, "negative_prompt": f"{OTHER} " * 5}, "negative_prompt has 16 tokens"),
            ({"prompt": PROMPT, "negative_prompt": OTHER, "guidance_scale": 1}, "steers by guidance"),
            ({"prompt": PROMPT, "best_of": 2}, "nothing ranks pictures of tiny"),
        ):
            status, answer, _ = server.request("POST", GENERATIONS, asked)
            assert status == 400 and message in answer["error"]["message"]
        body = {"image": "", "captions": [PROMPT]}
        status, answer, _ = server.request("POST", "/v1/score", body)
        assert status == 400 and "reads captions as features of a text encoder" in answer["error"]["message"]


def test_the_text_encoder_is_looked_for_before_anything_is_served(bundle, t5, tmp_path, capsys):
    service = load_service([str(bundle)], ServeConfig(capacity=2, text_encoder=str(t5), paint_apart=False))
    assert list(service.workers) == ["tiny"]
    for given, message in (
        (None, "does not say of which text encoder"),
        (str(save_t5(tmp_path / "other", seed=1)), "was trained with"),
        (str(tmp_path), "there is no text encoder"),
    ):
        with pytest.raises(InputError, match=message):
            load_service([str(bundle)], ServeConfig(text_encoder=given))
    assert run(["serve", "digits", "--text-encoder", str(t5), "--port", "0"]) == 2
    assert "digits read captions without a text encoder" in capsys.readouterr().err
