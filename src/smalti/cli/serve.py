"""The command `serve`: bundles over HTTP."""

from typing import Annotated, Any

import typer

from smalti.bounds import MAX_PICTURES
from smalti.default_bundle import SHIPPED
from smalti.errors import InputError

app = typer.Typer()


@app.command(epilog="Examples: smalti serve emoji · smalti serve digits emoji --port 9000 --api-key-env SMALTI_KEY")
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help=f"Shipped bundles' names ({SHIPPED}), folders, or a hub's owner/name; the first is the default model."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free; it is printed.")] = 8000,
    capacity: Annotated[int, typer.Option(min=1, max=4096, help="Sequences that each bundle draws at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=0, max=MAX_PICTURES, help="Sequences that may wait; more: 429.")] = 256,
    deadline: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
    executor: Annotated[
        str | None,
        typer.Option(
            help="What runs the steps: cuda_graph, native, packed, eager (default: the first that can), or compiled."
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="T5 encoder of bundles that read captions as features, a folder or the hub's owner/name."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that clients must send.")
    ] = None,
) -> None:
    """Serve bundles over HTTP: OpenAI's Images API, captions, scores, and a page to draw at. Ctrl-C or SIGTERM ends it.

    Requests are drawn together, each as if it were alone: the same prompt, seed and settings give the picture that
    smalti generate draws.
    """
    import os

    key = None
    if api_key_env is not None and not (key := os.environ.get(api_key_env)):
        raise InputError(f"--api-key-env {api_key_env}: there is no such variable, or it is empty; set it to the key.")
    try:
        from smalti.serve.app import ServeConfig
        from smalti.serve.run import serve as serve_bundles
    except ImportError as error:
        raise InputError(f"this needs {error.name}, which is in an extra: pip install 'smalti[serve]'.") from error
    config = ServeConfig(
        capacity=capacity,
        max_queue=max_queue,
        deadline_s=deadline,
        executor=executor,
        api_key=key,
        text_encoder=text_encoder,
    )

    def announce(address: str, service: Any) -> None:
        models = ", ".join(f"{name} ({worker.executor})" for name, worker in service.workers.items())
        typer.echo(f"{address}: {models}; API at {address}/v1")
        if host not in ("127.0.0.1", "localhost", "::1") and key is None:
            typer.echo("warning: open to the network without a key; --api-key-env NAME sets one.", err=True)

    serve_bundles(bundles, config, host=host, port=port, announce=announce)
