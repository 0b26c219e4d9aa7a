"""Replicas of the service in a Ray cluster, behind Ray Serve's own proxy: the extra `smalti[ray]`.

    serve run smalti.serve.ray_serve:build bundles=emoji,digits replicas=2

Each replica is a whole service, with an engine of its own for every bundle: a picture is drawn by one of them, and any
of them draws the same one where they have the same executor.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastapi import FastAPI

from smalti.errors import InputError
from smalti.serve.app import ServeConfig, create_app
from smalti.serve.run import load_service

OPTIONS = {
    "capacity": int, "max_queue": int, "deadline_s": float, "max_requests": int, "executor": str, "text_encoder": str
}  # fmt: skip


def application(
    bundles: Sequence[str],
    config: ServeConfig = ServeConfig(),  # noqa: B008 (frozen)
    *,
    replicas: int = 1,
    cpus: int = 2,
) -> Any:
    """An application, which `ray.serve.run` takes. `cpus` are a replica's: half of its threads step the engine."""
    try:
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("this needs ray, which is in an extra: pip install 'smalti[ray]'.") from error
    if replicas < 1 or cpus < 1:
        raise InputError(f"replicas={replicas} and cpus={cpus}: give at least 1 of each.")

    def service() -> FastAPI:
        torch.set_num_threads(max(1, cpus // 2))
        return create_app(load_service(bundles, config))

    @serve.deployment(
        name="smalti",
        num_replicas=replicas,
        max_ongoing_requests=config.max_requests,
        ray_actor_options={"num_cpus": cpus},
        graceful_shutdown_timeout_s=config.deadline_s + 10,
    )
    @serve.ingress(service)
    class Smalti:
        """The routes are the service's own."""

    return Smalti.bind()  # pyright: ignore[reportAttributeAccessIssue]


def build(arguments: Mapping[str, Any]) -> Any:
    """For `serve run` and Serve's config files: `bundles` by commas, `replicas`, `cpus`, `api_key_env`, and what
    `ServeConfig` takes. Raises InputError for an argument that it does not know."""
    left = dict(arguments)
    bundles = [name for name in str(left.pop("bundles", "")).split(",") if name]
    if not bundles:
        raise InputError("there is nothing to serve: give bundles=NAME, or several by commas.")
    replicas, cpus = (_number(name, left.pop(name, default), int) for name, default in (("replicas", 1), ("cpus", 2)))
    key = None
    if (name := left.pop("api_key_env", None)) is not None and not (key := os.environ.get(str(name))):
        raise InputError(f"api_key_env={name}: there is no such variable, or it is empty; set it to the key.")
    if unknown := sorted(left.keys() - OPTIONS.keys()):
        raise InputError(f"{', '.join(unknown)} cannot be given; there are bundles, replicas, cpus, api_key_env, "
                         f"{', '.join(OPTIONS)}.")  # fmt: skip
    settings = {name: _number(name, value, OPTIONS[name]) for name, value in left.items()}
    return application(bundles, ServeConfig(api_key=key, **settings), replicas=replicas, cpus=cpus)


def _number(name: str, given: Any, kind: type) -> Any:
    """An argument as it was typed or as a config file has it."""
    try:
        return kind(given)
    except ValueError as error:
        raise InputError(f"{name}={given} is no {'whole number' if kind is int else 'number'}.") from error
