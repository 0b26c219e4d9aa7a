"""Two replicas of the service on one machine, by Ray Serve: pictures are those drawn offline, by either of them."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'smalti[ray]'")
serve = pytest.importorskip("ray.serve", reason="ray is without Serve: pip install 'smalti[ray]'")

from smalti.serve.ray_serve import build  # noqa: E402
from smalti.tasks.images import Pipeline  # noqa: E402

PORT = 18731


@pytest.fixture(scope="module")
def address():
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build({"bundles": "digits", "replicas": "2", "cpus": "1", "executor": "packed"}), route_prefix="/")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def post(address: str, path: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_two_replicas_draw_what_is_drawn_offline(address):
    pipe, prompt = Pipeline.load("digits"), "dark green eight on bright cyan"
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": prompt, "seed": seed % 4} for seed in range(16)]
        found = list(pool.map(lambda body: post(address, "/v1/images/generations", body), bodies))
    for number, answer in enumerate(found):
        offline = pipe.generate_codes(prompt, seed=number % 4, executor="packed")
        assert answer["data"][0]["smalti"]["codes"] == offline.flatten().tolist()
    started = {json.load(urllib.request.urlopen(f"{address}/v1/models"))["data"][0]["created"] for _ in range(40)}
    status = serve.status().applications["default"].deployments["smalti"]
    assert status.replica_states == {"RUNNING": 2} and 1 <= len(started) <= 2


def test_errors_are_the_services_own(address):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, "/v1/images/generations", {"prompt": "red one", "quality": "high"})
    error = json.load(caught.value)["error"]
    assert caught.value.code == 400 and error["param"] == "quality"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give bundles=NAME"),
        ({"bundles": "digits", "replicas": "two"}, "replicas=two is no whole number"),
        ({"bundles": "digits", "replicas": "0"}, "at least 1"),
        ({"bundles": "digits", "port": "8000"}, "port cannot be given"),
        ({"bundles": "digits", "api_key_env": "NO_SUCH_VARIABLE"}, "no such variable"),
        ({"bundles": "digits", "capacity": "0"}, "at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(arguments)
