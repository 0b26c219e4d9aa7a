"""Ctrl-C and SIGTERM: a command ends with one line, which says whether the same command goes on from there."""

import os
import signal
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


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns the signals into `Stopped`, while it lasts; in the main thread alone, where Python takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, taken = os.getpid(), {}

    def stop(number: int, _: Any) -> None:
        if os.getpid() != process:  # a worker, forked from the command: it ends without a word
            os._exit(128 + number)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's choice, or another library's, stays
            taken[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def resuming() -> Iterator[None]:
    """What is stopped in here resumes when the same command is run again."""
    try:
        yield
    except Stopped as stopped:
        stopped.resumes = True
        raise
