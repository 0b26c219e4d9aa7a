"""The service, by OpenAI's own client and by plain requests, against a real server: what it draws is what the library
draws, what it refuses it names, and who goes away leaves nothing behind."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from serving import Gate, Running, picture_of, png_of, wait_until
from test_edit import cells
from tiny_bundle import save_tiny_bundle, tiny_pipeline

from smalti.cli import app as cli
from smalti.engine.generate import stream
from smalti.image_files import RECEIPT, read_receipt, receipt_chunks, with_receipt
from smalti.serve.openai_api import partial_marks
from smalti.serve.painter import Painter, encoded
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.edit import edit

CAPTION, OTHER = "dark green eight on bright cyan", "plain red two on light gray"


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def same(found: Any, expected: Image.Image) -> bool:
    """Whether a served PNG is the library's picture: pixels and receipt."""
    picture = picture_of(found.b64_json)
    assert json.loads(picture.info[RECEIPT]) == found.smalti
    ours = json.loads(expected.info[RECEIPT])
    return bool((np.asarray(picture) == np.asarray(expected)).all()) and found.smalti == {**ours, "executor": "packed"}


# OpenAI's client ---------------------------------------------------------------------------------------------------


def test_a_picture_is_the_librarys(server, client):
    found = client.images.generate(
        model="tiny", prompt=CAPTION, n=2, size="84x84", response_format="b64_json", output_format="png", user="me",
        extra_body={
            "seed": 5, "guidance_scale": 2.5, "negative_prompt": OTHER, "temperature": 0.7, "top_k": 30, "top_p": 0.9,
            "best_of": 2,
        },
    )  # fmt: skip
    expected = server.pipes["tiny"].generate(
        CAPTION, seed=5, n=2, scale=3, guidance_scale=2.5, negative_prompt=OTHER, temperature=0.7, top_k=30, top_p=0.9,
        best_of=2,
    )  # fmt: skip
    assert [same(*pair) for pair in zip(found.data, expected, strict=True)] == [True, True]
    assert (found.size, found.output_format, found.background) == ("84x84", "png", "opaque")
    assert (found.usage.output_tokens, found.usage.input_tokens, found.usage.total_tokens) == (4 * 49, 6, 4 * 49 + 6)


def test_many_at_once_are_each_as_alone(server):
    """Guided or not, with and without filters, of both models."""
    asked = [
        {
            "model": ("tiny", "words")[i % 2], "prompt": (CAPTION, "a purple dog")[i % 2],
            "extra_body": {"seed": i, "guidance_scale": 1 + i % 3, "temperature": 0.5 + i / 20, "top_k": i % 4 * 9},
        }
        for i in range(16)
    ]  # fmt: skip

    async def draw() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.images.generate(**one) for one in asked))

    for one, found in zip(asked, asyncio.run(draw()), strict=True):
        [expected] = server.pipes[one["model"]].generate(one["prompt"], **one["extra_body"])
        assert same(found.data[0], expected), one
    assert server.worker.rows_in_use == 0 and server.worker.pending == 0


@pytest.mark.parametrize("executor", ["native", "eager"])
def test_codes_are_the_librarys_on_every_executor(executor, request):
    """`packed` is what the others here run on."""
    if executor == "native":
        request.getfixturevalue("native_kernels")
    pipe = tiny_pipeline()
    asked = [
        {"seed": seed, "guidance_scale": 1 + seed % 3, "temperature": 0.6 + seed / 20, "top_k": seed % 2 * 40}
        for seed in range(12)
    ]
    bodies = [{"prompt": (CAPTION, OTHER)[i % 2], **one} for i, one in enumerate(asked)]
    with Running(pipe, executor=executor) as server, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda body: server.request("POST", "/v1/images/generations", body), bodies))
    for one, body, (status, content, _) in zip(asked, bodies, found, strict=True):
        assert status == 200
        codes = pipe.generate_codes(body["prompt"], executor=executor, **one)
        assert content["data"][0]["smalti"]["codes"] == codes.flatten().tolist(), body


def test_partial_pictures_come_row_by_row_and_then_the_whole(server, client):
    events = list(client.images.generate(prompt=CAPTION, stream=True, partial_images=3, extra_body={"seed": 5}))
    *partial, completed = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert completed.type == "image_generation.completed" and completed.usage.output_tokens == 49
    pipe = server.pipes["tiny"]
    [expected] = pipe.generate(CAPTION, seed=5)
    assert same(completed, expected)
    streamed = {len(one.codes): one.picture for one in pipe.stream(CAPTION, seed=5)}
    for event, num_codes in zip(partial, (14, 28, 35), strict=True):
        assert np.array_equal(np.asarray(picture_of(event.b64_json)), np.asarray(streamed[num_codes]))
    assert event.size == "56x56" and event.output_format == "png" and event.created_at > 0


def test_a_stream_of_the_asynchronous_client(server):
    async def draw() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none") as client:
            stream = await client.images.generate(
                model="words", prompt="a dog", stream=True, partial_images=48, extra_body={"seed": 2}
            )
            return [event async for event in stream]

    *partial, completed = asyncio.run(draw())
    assert len(partial) == 48
    assert same(completed, server.pipes["words"].generate("a dog", seed=2)[0])


def masked(picture: Image.Image, *numbers: int) -> bytes:
    """A mask as large as the picture, transparent in these cells of 7×7."""
    alpha = np.where(cells(*numbers).numpy(), 0, 255).astype(np.uint8)
    alpha = alpha.repeat(picture.height // 7, 0).repeat(picture.width // 7, 1)
    return png_of(Image.merge("RGBA", [*picture.convert("RGB").split(), Image.fromarray(alpha)]))


@pytest.mark.parametrize("with_mask", [True, False])
def test_an_edit_keeps_the_codes_of_what_is_not_transparent(server, client, with_mask):
    pipe = server.pipes["tiny"]
    [picture] = pipe.generate(CAPTION, seed=1)
    transparent, info = masked(picture, 3, 8, 30), {"pnginfo": receipt_chunks(picture)}
    whole = png_of(picture, **info)
    if not with_mask:  # the picture's own transparent parts; its receipt does not tell its codes then
        [picture] = [Image.open(io.BytesIO(transparent)).convert("RGB")]
    given = {"image": whole, "mask": transparent} if with_mask else {"image": transparent}
    found = client.images.edit(**given, prompt=OTHER, n=2, extra_body={"seed": 4, "best_of": 2, "guidance_scale": 2})
    expected = edit(pipe, picture, cells(3, 8, 30), OTHER, seed=4, n=2, best_of=2, guidance_scale=2.0)
    assert [same(*pair) for pair in zip(found.data, expected, strict=True)] == [True, True]
    assert found.usage.input_tokens_details.image_tokens == 3


def test_an_edit_streams_with_what_is_kept_in_its_place(server, client):
    pipe = server.pipes["tiny"]
    [picture] = pipe.generate(CAPTION, seed=1)
    given = {"image": png_of(picture, pnginfo=receipt_chunks(picture)), "mask": masked(picture, *range(14, 35))}
    *partial, completed = client.images.edit(
        **given, prompt=CAPTION, stream=True, partial_images=1, extra_body={"seed": 9}
    )
    assert [event.type for event in partial] == ["image_edit.partial_image"]
    assert completed.type == "image_edit.completed"
    assert same(completed, edit(pipe, picture, cells(*range(14, 35)), CAPTION, seed=9)[0])
    lowest = np.asarray(picture_of(partial[0].b64_json))[-8:]
    assert not np.array_equal(lowest, np.full_like(lowest, 170))  # grey is what is not there yet


def test_models_are_listed(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny", "words"] and listed[0].smalti["grid"] == [7, 7]
    assert client.models.retrieve("words").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=CAPTION, model="dall-e-2")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"quality": "hd"}, "quality", "invalid_value"),
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"moderation": "auto"}, "moderation", "unsupported_parameter"),
        ({"output_compression": 90}, "output_compression", "unsupported_parameter"),
        ({"steps": 20}, "steps", "unknown_parameter"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "unknown_parameter"),
        ({"extra_body": {"seed": 1}, "seed": 1}, "seed", None),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 2, "stream": True}, "n", None),
        ({"n": 10, "best_of": 64}, "n", None),
        ({"size": "1024x1024"}, "size", "invalid_size"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"partial_images": 2}, "partial_images", None),
        ({"partial_images": 2, "stream": True, "best_of": 2}, "partial_images", None),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", None),
        ({"prompt": "mauve eight"}, "prompt", None),
        ({"prompt": "a" * 4001}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"model": "words", "prompt": "a dog " * 30}, "prompt", "string_above_max_length"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"guidance_scale": 1, "negative_prompt": OTHER}, "negative_prompt", None),
    ],
)
def test_what_cannot_be_is_refused_by_name(server, asked, param, code):
    status, found, _ = server.request("POST", "/v1/images/generations", {"prompt": CAPTION, **asked})
    assert status == 400, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert (found["error"]["type"], found["error"]["param"], found["error"]["code"]) == (
        "invalid_request_error", param, code,
    )  # fmt: skip
    if param is not None:
        assert param in found["error"]["message"]


def test_null_is_not_given_and_extra_body_may_be_an_object(server):
    body = {"prompt": CAPTION, "size": None, "output_format": None, "extra_body": {"seed": 5}, "quality": "auto"}
    status, found, _ = server.request("POST", "/v1/images/generations", body)
    [expected] = server.pipes["tiny"].generate(CAPTION, seed=5)
    assert status == 200 and found["data"][0]["smalti"]["codes"] == json.loads(expected.info[RECEIPT])["codes"]


def test_without_a_seed_pictures_differ_and_tell_theirs(client):
    first, second = (client.images.generate(prompt=CAPTION).data[0].smalti for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.images.generate(prompt=CAPTION, extra_body={"seed": first["seed"]}).data[0].smalti
    assert again["codes"] == first["codes"]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_have_the_same_pixels_and_no_receipt(server, client, output_format):
    found = client.images.generate(prompt=CAPTION, output_format=output_format, extra_body={"seed": 5}).data[0]
    picture = picture_of(found.b64_json)
    [expected] = server.pipes["tiny"].generate(CAPTION, seed=5)
    assert picture.format == output_format.upper() and RECEIPT not in picture.info
    difference = np.abs(np.asarray(picture.convert("RGB"), int) - np.asarray(expected, int)).max()
    assert difference == 0 if output_format == "webp" else difference < 64


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": b"no picture"}, "image"),
        ({"image": png_of(Image.new("RGB", (28, 28)))}, "image"),
        ({"image": png_of(Image.new("RGB", (28, 28))), "mask": png_of(Image.new("RGBA", (28, 28), "red"))}, "mask"),
        ({"image": png_of(Image.new("RGB", (28, 28))), "mask": png_of(Image.new("RGBA", (56, 56)))}, "mask"),
        ({"image": png_of(Image.new("RGB", (29, 28))), "mask": png_of(Image.new("RGBA", (29, 28)))}, None),
        ({"image": [png_of(Image.new("RGB", (28, 28)))] * 2}, "image[]"),
    ],
)
def test_edits_that_cannot_be_are_explained(client, files, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**files, prompt=CAPTION)
    assert caught.value.param == param


# What only smalti has ----------------------------------------------------------------------------------------------


def test_a_bundle_of_classes_is_asked_by_name_or_number():
    pipe = ClassPipeline.load("mnist-classes")
    with Running(pipe, tiny_pipeline()) as running:
        [classes, captions] = running.request("GET", "/v1/models")[1]["data"]
        assert classes["smalti"]["class_names"][7] == "seven" and not classes["smalti"]["can_edit"]
        assert "class_names" not in captions["smalti"]
        asked = {"prompt": "seven", "seed": 3, "n": 2, "guidance_scale": 2.0}
        _, found, _ = running.request("POST", "/v1/images/generations", asked)
        expected = pipe.generate(7, seed=3, n=2, guidance_scale=2.0)
        for one, picture in zip(found["data"], expected, strict=True):
            drawn = picture_of(one["b64_json"])
            assert (np.asarray(drawn) == np.asarray(picture)).all() and one["smalti"]["label"] == 7
            replayed = running.request("POST", "/v1/replay", {"image": one["b64_json"]})[1]
            assert (replayed["identical"], replayed["model"]) == (True, "mnist-classes")
        assert found["usage"]["input_tokens"] == 1
        forged = with_receipt(expected[0], {**read_receipt(expected[0]), "task": "generate", "prompt": "eight"})
        refused = [
            ("/v1/images/generations", {"prompt": "eleven"}, "there is no class 'eleven'"),
            ("/v1/images/generations", {"prompt": "10"}, "out of range"),
            ("/v1/images/generations", {"prompt": "7", "negative_prompt": "8"}, "Leave negative_prompt out"),
            ("/v1/images/generations", {"prompt": "7", "best_of": 2}, "Leave best_of out"),
            ("/v1/score", {"image": found["data"][0]["b64_json"], "captions": ["a"]}, "knows no captions"),
            ("/v1/caption", {"image": found["data"][0]["b64_json"]}, "writes no captions"),
            ("/v1/choices", {"prompt": "7", "codes": [0] * 49, "cell": 0}, "knows no captions"),
            ("/v1/replay", {"image": encoded(forged, "png")}, "none of mnist-classes's"),
        ]
        for route, body, message in refused:
            status, answer, _ = running.request("POST", route, body)
            assert status == 400 and message in answer["error"]["message"], answer


def test_captions_and_scores_are_the_librarys(server):
    pipe = server.pipes["tiny"]
    [picture] = pipe.generate(CAPTION, seed=3)
    image = base64.b64encode(png_of(picture, pnginfo=receipt_chunks(picture))).decode()
    status, found, _ = server.request("POST", "/v1/caption", {"image": f"data:image/png;base64,{image}"})
    codes = np.array(json.loads(picture.info[RECEIPT])["codes"]).reshape(1, 7, 7)
    codes = torch.from_numpy(codes)
    assert (status, found) == (200, {"model": "tiny", "caption": pipe.caption_codes(codes)[0]})
    status, found, _ = server.request("POST", "/v1/score", {"image": image, "captions": [CAPTION, OTHER]})
    expected = pipe.score_codes(codes.expand(2, 7, 7), [pipe.whole(CAPTION), pipe.whole(OTHER)])
    assert status == 200 and [row["caption"] for row in found["scores"]] == [CAPTION, OTHER]
    for name, column in expected._asdict().items():
        np.testing.assert_allclose([row[name] for row in found["scores"]], column.numpy(), rtol=1e-5)
    status, found, _ = server.request("POST", "/v1/caption", {"image": image, "model": "words"})
    assert status == 400 and "never learned" in found["error"]["message"]
    assert server.request("POST", "/v1/caption", {"image": "&"})[0] == 400


def test_a_picture_is_drawn_again_from_its_receipt_alone(server):
    pipe = server.pipes["tiny"]
    [picture] = pipe.generate(CAPTION, seed=3, guidance_scale=2.0)
    asked = {"image": base64.b64encode(png_of(picture, pnginfo=receipt_chunks(picture))).decode()}
    status, found, _ = server.request("POST", "/v1/replay", asked)
    assert (status, found["identical"], found["difference"]) == (200, True, None)
    receipt = json.loads(picture.info[RECEIPT])
    for changes, says in (
        ({"codes": [*receipt["codes"][:-1], (receipt["codes"][-1] + 1) % 37]}, "row 6, column 6"),
        ({"weights_sha256": "0" * 64}, "weights that this server does not have"),
        ({"bundle": "/etc/passwd", "seed": "3"}, "has seed '3'"),
    ):
        changed = with_receipt(picture.copy(), {**receipt, **changes})
        asked = {"image": base64.b64encode(png_of(changed, pnginfo=receipt_chunks(changed))).decode()}
        _, found, _ = server.request("POST", "/v1/replay", asked)
        assert says in (found.get("difference") or found["error"]["message"])


def test_choices_are_what_was_drawn_from(server):
    """By drawing: at temperature 0 the likeliest code, and the probabilities of the engine's own events."""
    pipe = server.pipes["tiny"]
    config = pipe.sample_config(pipe.sampling.picture, {"guidance_scale": 2.0, "temperature": 0.8})
    request = pipe.picture_request(pipe.whole(CAPTION), 3, None, config)
    drawn = list(stream(pipe.model, pipe.layout, [request], config))
    offset = pipe.layout.vocabulary["image"].offset
    codes = [event.token_id - offset for event in drawn]
    for cell in (0, 20, 48):
        asked = {"prompt": CAPTION, "codes": codes, "cell": cell, "guidance_scale": 2.0, "temperature": 0.8}
        status, found, _ = server.request("POST", "/v1/choices", asked)
        assert status == 200, found
        [chosen] = [one for one in found["alternatives"] if one["drawn"]]
        np.testing.assert_allclose(np.log(chosen["probability"]), drawn[cell].draw_log_prob, atol=1e-4)
        np.testing.assert_allclose(np.log(chosen["model_probability"]), drawn[cell].log_prob, atol=1e-4)
        assert len(found["attention"]["cells"]) == cell and found["attention"]["words"] == CAPTION.split()
        assert 0 < sum(found["attention"]["cells"]) + sum(found["attention"]["text"]) <= 1.0001
        assert picture_of(chosen["patch"]).size == (8, 8)


def test_health_and_metrics(server):
    assert server.request("GET", "/healthz")[:2] == (200, {"status": "ok"})
    status, found, _ = server.request("GET", "/metrics")
    assert status == 200 and b'smalti_rows_in_use{model="tiny"} 0.0' in found
    assert b'smalti_requests_total{route="/healthz",status="200"}' in found and b"first_partial_seconds_bucket" in found


def test_other_addresses_and_methods_are_errors_of_the_api(server):
    for method, path, status in (("GET", "/v1/images", 404), ("GET", "/v1/score", 405), ("GET", "/../etc/passwd", 404)):
        found = server.request(method, path)
        assert found[0] == status and found[1]["error"]["type"] == "invalid_request_error"
    assert server.request("POST", "/v1/score", b"{}", {"Content-Type": "text/plain"})[0] == 415
    for body in (b"", b"[", b"[]", b"[" * 5000, b'{"prompt": "\\ud800"}', b"\xff"):
        status, found, _ = server.request("POST", "/v1/images/generations", body)
        assert status == 400 and found["error"]["message"]
    assert server.request("POST", "/v1/images/generations", b" " * (8 * 2**20 + 1))[0] == 413


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["prompt", "n", "size", "seed", "model", "stream", "top_k", "captions", "codes", "cell", "image"]
)
ROUTES = ["images/generations", "images/edits", "caption", "score", "replay", "choices"]


@settings(max_examples=60)
@given(st.sampled_from(ROUTES), st.dictionaries(NAMES | st.text(max_size=4), VALUES, max_size=4) | VALUES)
def test_bodies_of_any_kind_get_an_answer_and_never_a_fault(server, route, body):
    status, found, _ = server.request("POST", f"/v1/{route}", body)
    assert status in (200, 400, 404, 415) and (status == 200 or found["error"]["message"])


def test_answers_do_not_wait_for_nagles_algorithm(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/healthz")
    assert connection.getresponse().read()
    told = [
        held.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for held in list(server.server.server_state.connections)
    ]
    connection.close()
    assert told and all(told)


# Keys, limits, and who goes away -----------------------------------------------------------------------------------


def test_a_key_is_asked_for():
    with Running(tiny_pipeline(), api_key="sésame") as server:
        for given_key, status in (("Bearer sesame", 401), ("sésame", 401), ("", 401), ("Bearer sésame", 200)):
            headers = {"Authorization": given_key.encode().decode("latin-1")}
            found = server.request("GET", "/v1/models", headers=headers)
            assert found[0] == status
        assert server.request("GET", "/v1/models")[1]["error"]["code"] == "invalid_api_key"
        assert server.request("GET", "/healthz")[0] == 200 and server.request("GET", "/")[0] == 200
        with pytest.raises(openai.AuthenticationError), OpenAI(base_url=f"{server.address}/v1", api_key="x") as client:
            client.models.list()


def test_a_full_queue_says_when_to_come_again():
    with Running(tiny_pipeline(), capacity=1, max_queue=1) as server, ThreadPoolExecutor() as pool:
        gate = Gate(server.worker)
        with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            waiting = [pool.submit(client.images.generate, prompt=CAPTION, extra_body={"seed": i}) for i in range(2)]
            wait_until(lambda: server.worker.pending == 2)
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.generate(prompt=CAPTION)
            assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
            gate.is_open = True
            for seed, found in enumerate(waiting):
                [expected] = server.pipes["tiny"].generate(CAPTION, seed=seed)
                assert same(found.result(60).data[0], expected)
        assert server.metric("refusals_total", model="tiny") == 1 and server.worker.pending == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_both_its_rows_before_the_next_step(stream):
    with Running(tiny_pipeline()) as server, ThreadPoolExecutor() as pool:
        gate = Gate(server.worker)
        stays = pool.submit(
            server.request, "POST", "/v1/images/generations", {"prompt": CAPTION, "seed": 1, "guidance_scale": 3}
        )
        wait_until(lambda: server.worker.pending == 1)
        gate.let(1)
        body = json.dumps({"prompt": CAPTION, "guidance_scale": 2, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as leaves:
            leaves.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            wait_until(lambda: server.worker.pending == 2)
            gate.let(3)
            assert server.worker.rows_in_use == 4
        wait_until(lambda: server.metric("cancellations_total", model="tiny") == 1)
        before = gate.num_steps
        wait_until(lambda: server.worker.rows_in_use == 2)
        assert gate.num_steps == before
        gate.is_open = True
        status, found, _ = stays.result(60)
        [expected] = server.pipes["tiny"].generate(CAPTION, seed=1, guidance_scale=3.0)
        assert status == 200 and found["data"][0]["smalti"]["codes"] == json.loads(expected.info[RECEIPT])["codes"]
        wait_until(lambda: server.worker.rows_in_use == 0)
        assert server.worker.pending == 0


def test_a_deadline_ends_what_waits_and_tells_it():
    with Running(tiny_pipeline(), deadline_s=0.2) as server:
        Gate(server.worker)
        with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.images.generate(prompt=CAPTION)
            assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
            with pytest.raises(openai.APIError, match="deadline"):
                list(client.images.generate(prompt=CAPTION, stream=True, extra_body={"deadline_s": 0.05}))
        wait_until(lambda: server.worker.rows_in_use == 0 and server.worker.pending == 0)


def test_after_a_fault_of_the_engine_the_next_request_is_drawn():
    with Running(tiny_pipeline()) as server:

        def broken() -> list:
            raise RuntimeError("broken")

        server.worker.engine.step = broken  # type: ignore[method-assign]
        status, found, _ = server.request("POST", "/v1/images/generations", {"prompt": CAPTION})
        assert (status, found["error"]["type"]) == (500, "server_error") and "broken" not in found["error"]["message"]
        status, found, _ = server.request("POST", "/v1/images/generations", {"prompt": CAPTION, "seed": 1})
        assert status == 200 and server.worker.pending == 0
        assert server.metric("failures_total", model="tiny") == 1


# The command -------------------------------------------------------------------------------------------------------


def test_sigterm_ends_a_server_behind_its_last_answer(tmp_path):
    bundle = save_tiny_bundle(tmp_path / "tiny")
    code = "import sys; from smalti.cli.app import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(bundle), "--port", "0", "--api-key-env", "KEY"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "KEY": "k"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(": ")[0]
        with OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
            stream = client.images.generate(prompt=CAPTION, stream=True, partial_images=48, extra_body={"seed": 5})
            first = next(iter(stream))
            process.send_signal(signal.SIGTERM)
            rest = list(stream)
        assert first.partial_image_index == 0 and rest[-1].type == "image_generation.completed"
        [expected] = tiny_pipeline().generate(CAPTION, seed=5)
        assert rest[-1].smalti["codes"] == json.loads(expected.info[RECEIPT])["codes"]
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (143, "stopped\n")
    finally:
        process.kill()
        process.wait()


def test_a_server_that_cannot_start_says_why(tmp_path, capsys, monkeypatch):
    bundle = str(save_tiny_bundle(tmp_path / "tiny"))
    monkeypatch.delenv("SMALTI_TEST_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            ([bundle, "--api-key-env", "SMALTI_TEST_KEY"], "SMALTI_TEST_KEY"),
            ([bundle, "--port", port], f"cannot listen at 127.0.0.1, port {port}"),
            ([bundle, bundle, "--port", "0"], "two bundles have the name 'tiny'"),
            ([bundle, "--executor", "abacus", "--port", "0"], "abacus"),
            (["nowhere", "--port", "0"], "nowhere"),
        ):
            assert cli.run(["serve", *arguments]) == 2
            assert says in capsys.readouterr().err


def test_partial_pictures_stand_behind_whole_rows_where_they_can():
    assert partial_marks(0, 0, 49, 7) == [] and partial_marks(3, 0, 49, 7) == [14, 28, 35]
    assert partial_marks(6, 0, 49, 7) == [7, 14, 21, 28, 35, 42]
    assert partial_marks(48, 0, 49, 7) == partial_marks(10**6, 0, 49, 7) == list(range(1, 49))
    for first in (0, 5, 48):
        for k in range(60):
            marks = partial_marks(k, first, 49, 7)
            assert all(first < mark < 49 for mark in marks) and len(marks) <= k


# The process that makes pictures -----------------------------------------------------------------------------------


def test_pictures_made_in_a_process_of_their_own_are_the_librarys():
    """Whole and partial, of two bundles at once; and when it is killed, by the next one."""
    with Running(paint_apart=True) as server, ThreadPoolExecutor(6) as pool:
        process = server.service.painter._process
        assert process is not None
        for round_ in range(2):
            bodies = [{"prompt": CAPTION, "seed": seed, "model": "tiny"} for seed in range(4)]
            bodies += [{"prompt": "a dog", "seed": 2, "model": "words"}]
            found = list(pool.map(lambda body: server.request("POST", "/v1/images/generations", body), bodies))
            for body, (status, content, _) in zip(bodies, found, strict=True):
                [expected] = server.pipes[body["model"]].generate(body["prompt"], seed=body["seed"])
                [drawn] = content["data"]
                assert status == 200 and np.array_equal(np.asarray(picture_of(drawn["b64_json"])), np.asarray(expected))
            if round_ == 0:
                process.kill()
                process.join()
        with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            *partial, whole = client.images.generate(
                prompt=CAPTION, stream=True, partial_images=2, extra_body={"seed": 5}
            )
        streamed = {len(one.codes): one.picture for one in server.pipes["tiny"].stream(CAPTION, seed=5)}
        for event, num_codes in zip([*partial, whole], [*partial_marks(2, 0, 49, 7), 49], strict=True):
            assert np.array_equal(np.asarray(picture_of(event.b64_json)), np.asarray(streamed[num_codes]))
        process = server.service.painter._process
        assert process is not None and process.is_alive()
    assert not process.is_alive()


def test_a_fault_in_the_process_that_makes_pictures_is_an_error_of_one_answer():
    with closing(Painter({"tiny": tiny_pipeline().bundle}, apart=True)) as painter:
        with pytest.raises(ValueError, match="outside the codebook"):
            painter.paint("tiny", [10**6] * 49, {}, 1, "png")
        assert painter.paint("tiny", [0] * 49, {}, 1, "png") == painter.paint("tiny", [0] * 49, {}, 1, "png")
