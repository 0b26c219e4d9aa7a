"""The command line: parses, calls, prints. What a command needs is imported inside it, so that each starts fast."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from smalti.cli.complete import app as complete_app
from smalti.cli.data import app as data_app
from smalti.cli.doctor import app as doctor_app
from smalti.cli.edit import app as edit_app
from smalti.cli.evaluate import app as evaluate_app
from smalti.cli.gallery import app as gallery_app
from smalti.cli.generate import app as generate_app
from smalti.cli.info import app as info_app
from smalti.cli.inspect import app as inspect_app
from smalti.cli.interop import app as interop_app
from smalti.cli.pictures import app as pictures_app
from smalti.cli.plan import app as plan_app
from smalti.cli.sample import app as sample_app
from smalti.cli.score import app as score_app
from smalti.cli.serve import app as serve_app
from smalti.cli.tokenize import app as tokenize_app
from smalti.cli.train import RECIPE_NAMES
from smalti.cli.train import app as train_app
from smalti.cli.upsampler import app as upsampler_app
from smalti.default_bundle import SHIPPED
from smalti.errors import MAX_MESSAGE, InputWarning, shortened
from smalti.stopping import Stopped, stoppable, without_debris

app = typer.Typer(
    name="smalti",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
for _commands in (
    generate_app,
    pictures_app,
    complete_app,
    score_app,
    info_app,
    tokenize_app,
    inspect_app,
    serve_app,
    interop_app,
    doctor_app,
    sample_app,
    edit_app,
    gallery_app,
    upsampler_app,
    plan_app,
):
    app.add_typer(_commands)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"smalti {version('smalti')}")
        raise typer.Exit


def _set_debug(asked: bool) -> None:
    global _debug
    _debug = asked


def _set_device(name: str | None) -> None:
    """For this command and the processes that it starts. Said at once if it is not there."""
    if name is not None:
        from smalti.devices import DEVICE_VARIABLE, choose_device

        choose_device(name)
        os.environ[DEVICE_VARIABLE] = name


def _set_dtype(name: str | None) -> None:
    if name is not None:
        from smalti.devices import DTYPE_VARIABLE, choose_dtype

        choose_dtype(name)
        os.environ[DTYPE_VARIABLE] = name


_debug = False
"""Whether errors are shown with their traceback and what caused them."""


@app.callback(epilog=f"Bundles that ship: {SHIPPED}. Recipes to train: {RECIPE_NAMES}.")
def options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error, with its cause."
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            callback=_set_device,
            is_eager=True,
            help="What to compute on: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            callback=_set_dtype,
            is_eager=True,
            help="What transformers draw and score in: auto (float32), float32, bfloat16.",
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Autoregressive image generation with discrete tokens: tokenize, train, measure, generate."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process: 0, or 2 with one line on stderr for what the user can mend, or 130 and 143
    with one line for Ctrl-C and SIGTERM."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status. Our own bugs keep their traceback."""
    with without_debris():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    for argument in arguments:
        if "\0" in argument:
            return _complain(f"{argument!r} holds a null byte, which no command line can: leave it out.")
    try:
        with stoppable(), _warnings_in_one_line():
            result: Any = app(list(arguments), prog_name="smalti", standalone_mode=False, obj=list(arguments))
        return result if isinstance(result, int) else 0
    except TyperException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if not message:  # a command group alone: its help stands there already
            return 2
        return _complain(f"{message.rstrip('.')}. Try {context.command_path if context else 'smalti'} --help.")
    except (ValueError, OSError) as error:
        if _debug:
            traceback.print_exception(error)
        return _complain(_one_line(error))
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr)
        return stopped.exit_status
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints what is said to the user of a command as plainly as errors are. Other warnings stay as they are."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, InputWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                plain(message, category, *rest, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", InputWarning)
        yield


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What a terminal would obey instead of showing, where a message repeats what a file or an argument holds."""


def _complain(message: str) -> int:
    print(
        f"error: {_CONTROL.sub(lambda found: ascii(found[0])[1:-1], shortened(message, MAX_MESSAGE))}", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    main()
