"""Ctrl-C and SIGTERM: a command ends with one line, which says whether the same command goes on from there.

A signal may come anywhere, also where what it raises is lost: Python drops it in the callback of a weak reference, and
a library turns it into an error of its own, as PyTorch does while it writes a file. So it is remembered: whatever error
leaves the command afterwards is the stop, and work that goes on all the same ends at its next sign of progress, and
before anything it has made gets its name: a picture may have been taken for damaged because its reading was stopped.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """The user or the system wants this command to end. Not an Exception, so that only the command line takes it."""

    def __init__(self, signal_number: int):
        self.exit_status = 128 + signal_number
        self.resumes = False
        super().__init__(signal.Signals(signal_number).name)

    @property
    def line(self) -> str:
        return "stopped; run the same command again to resume" if self.resumes else "stopped"


_asked: Stopped | None = None
"""The last that was raised in the command that runs."""
_num_stops = 0


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns the signals into `Stopped`, while it lasts; in the main thread alone, where Python takes signals."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, taken = os.getpid(), {}

    def stop(number: int, _: Any) -> None:
        global _asked, _num_stops
        if os.getpid() != process:  # a worker, forked from the command: it ends without a word
            os._exit(128 + number)
        _asked = Stopped(number)
        _num_stops += 1
        raise _asked

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's choice, or another library's, stays
            taken[number] = signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        if _asked is None or error is _asked:
            raise
        raise _asked from error
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        _asked = None


@contextmanager
def without_debris() -> Iterator[None]:
    """Behind a stop, Python prints no exception that it ignores: a stop that was lost, which comes again, and what
    fails as it is thrown away half done, such as an archive that was being written."""
    told, before = sys.unraisablehook, _num_stops

    def unraisable(lost: Any) -> None:
        if _num_stops == before:
            told(lost)

    sys.unraisablehook = unraisable
    try:
        yield
        if _num_stops != before:
            gc.collect()  # what holds itself is thrown away here, too
    finally:
        sys.unraisablehook = told


@contextmanager
def resuming() -> Iterator[None]:
    """What is stopped in here resumes when the same command is run again."""
    try:
        yield
    except BaseException:
        if _asked is not None:
            _asked.resumes = True
        raise


def end_if_stopped() -> None:
    """Raises `Stopped` once more, if a signal came and what it raised was lost. Long work calls it as it goes on."""
    if _asked is not None and sys.exc_info()[1] is None and threading.current_thread() is threading.main_thread():
        raise _asked
