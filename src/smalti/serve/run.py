"""Starting a server: bundles, a socket, and uvicorn, which ends it in good order."""

import logging
import os
import socket
from collections.abc import Callable, Sequence

import torch
import uvicorn

from smalti.bundle import Bundle
from smalti.errors import InputError
from smalti.serve.app import ServeConfig, Service, create_app
from smalti.serve.metrics import Metrics
from smalti.serve.painter import Painter
from smalti.serve.worker import Served, Worker
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.features import FeaturePipeline, captions_face


def load_service(bundles: Sequence[str], config: ServeConfig) -> Service:
    """The bundles, each with its engine. Raises InputError for one that cannot draw, two of one name, and a text
    encoder that is not there, is not a bundle's, or that no bundle reads captions with."""
    pipes: dict[str, Served] = {}
    for name in bundles:
        bundle = Bundle.load(name)
        if bundle.image_tokenizer is None or not (
            bundle.can_draw or bundle.can_draw_classes or bundle.can_draw_features
        ):
            raise InputError(f"{name} draws no pictures of captions or of classes, so there is nothing to serve.")
        if bundle.can_draw_classes:
            pipe = ClassPipeline(bundle)
        else:
            pipe = captions_face(bundle, config.text_encoder if bundle.reads_features else None)
        if isinstance(pipe, FeaturePipeline):
            _ = pipe.text_encoder.sha256  # told now, not with the first picture
        if pipe.name in pipes:
            raise InputError(f"two bundles have the name {pipe.name!r}, by which clients call them; leave one out.")
        pipes[pipe.name] = pipe
    if config.text_encoder is not None and not any(isinstance(pipe, FeaturePipeline) for pipe in pipes.values()):
        raise InputError(f"{', '.join(pipes)} read captions without a text encoder; leave out --text-encoder.")
    return make_service(list(pipes.values()), config)


def make_service(pipes: Sequence[Served], config: ServeConfig) -> Service:
    """The service of bundles of different names."""
    metrics, apart = Metrics(), config.paint_apart and (os.cpu_count() or 1) > 1
    painter = Painter({pipe.name: pipe.bundle for pipe in pipes}, apart=apart)
    how = {"capacity": config.capacity, "max_queue": config.max_queue, "executor": config.executor}
    return Service([Worker(pipe, metrics, painter, **how) for pipe in pipes], painter, metrics, config)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises InputError."""
    # asyncio does not know of `create_server` that it is TCP, and lets it wait 40 ms between the pieces of an answer.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(2048)
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {reason}; give another --host or --port.") from error


def serve(
    bundles: Sequence[str], config: ServeConfig, *, host: str, port: int, announce: Callable[[str, Service], None]
) -> None:
    """Serves until SIGINT or SIGTERM; then takes no more requests, answers those it has, and returns.

    Half of the processors step the engine while the other half make pictures of codes.
    """
    listening = bound_socket(host, port)
    with listening:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        service = load_service(bundles, config)
        server = make_server(service)
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{listening.getsockname()[1]}", service)
        server.run(sockets=[listening])


def make_server(service: Service) -> uvicorn.Server:
    """Of the service, in a socket that is given to its `run`."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else a line for each form that is damaged
    return uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            http="h11",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(service.config.deadline_s) + 10,
            h11_max_incomplete_event_size=2**16,
        )
    )
