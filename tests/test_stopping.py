"""Ctrl-C and SIGTERM at a command: one line that says whether it resumes, and the shell's exit status."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from smalti.cli import app as cli
from smalti.progress import stage
from smalti.stopping import Stopped, resuming, stoppable, without_debris

# The signal comes while the command loads its recipe or its table; a child of a background job ignores Ctrl-C.
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from smalti import {module}
def wait(*_, **__):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
{module}.{name} = wait
from smalti.cli.app import main
main(sys.argv[1:])
"""
STAGES = {
    "train": (["train", "demo"], "recipes", "load_recipe"),
    "data": (["data", "digits", "out"], "data.digits", "write_digits"),
}


@pytest.mark.parametrize(
    ("command", "number", "line", "status"),
    [
        ("train", signal.SIGINT, "stopped; run the same command again to resume", 130),
        ("data", signal.SIGTERM, "stopped", 143),
    ],
)
def test_a_stopped_command_says_one_line(tmp_path, command, number, line, status):
    arguments, module, name = STAGES[command]
    script = SCRIPT.format(module=module, name=name).replace(f"import {module}", f"import {module.split('.')[0]}")
    script = f"import smalti.{module}\n{script}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (err, process.returncode) == (f"{line}\n", status)


@pytest.mark.parametrize("inside", [True, False])
def test_what_resumes_is_told_by_where_it_was_stopped(inside):
    with pytest.raises(Stopped) as caught, stoppable():
        if inside:
            with resuming():
                os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.resumes is inside and caught.value.exit_status == 143


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_what_a_library_makes_of_the_signal_is_a_stop_all_the_same(error):
    with pytest.raises(Stopped) as caught, stoppable(), resuming():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise error("a file ends in the middle") from None
    assert caught.value.resumes and isinstance(caught.value.__cause__, error)


def test_a_stop_that_was_lost_comes_at_the_next_progress():
    class Key:
        pass

    with (
        noticed_unraisable() as unraisable,
        without_debris(),
        pytest.raises(Stopped) as caught,
        stoppable(),
        stage("work", 3, show=False) as progress,
    ):
        key = Key()
        lost = weakref.ref(key, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del key
        assert lost() is None
        try:
            progress.advance()
        finally:
            progress.advance()  # what is put in order on the way out is not interrupted
    assert progress.completed == 1 and caught.value.exit_status == 143 and unraisable == []
    with stage("work", 3, show=False) as progress:
        progress.advance()  # the next command knows nothing of it


def test_what_fails_as_it_is_thrown_away_is_told_only_where_nothing_was_stopped():
    class Half:
        def __del__(self):
            raise ValueError("half written")

    def work(stop: bool) -> None:
        held: list[object] = [Half()]
        held.append(held)  # a circle, which only the collector finds
        if stop:
            os.kill(os.getpid(), signal.SIGTERM)

    for stop in (False, True):
        with noticed_unraisable() as unraisable, without_debris():
            with suppress(Stopped), stoppable():
                work(stop)
            if not stop:
                gc.collect()
        assert unraisable == ([] if stop else [ValueError])


@contextmanager
def noticed_unraisable() -> Iterator[list[type]]:
    kinds: list[type] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda found: kinds.append(found.exc_type)
    try:
        yield kinds
    finally:
        sys.unraisablehook = before


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_commands_run_outside_the_main_thread_too(capsys):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(cli.run(["info", "--list"])))
    thread.start()
    thread.join()
    assert statuses == [0] and "digits" in capsys.readouterr().out
