"""What a command owes to the process that it runs in: signals and streams. Loads at once."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)


def enter() -> None:
    """Before the slow imports of a module that runs as a command.

    Ctrl-C while they load is one line, and what is printed never ends the run.
    """
    _on_signals(_depart)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def listen() -> None:
    """From here on Ctrl-C and SIGTERM raise KeyboardInterrupt."""
    _on_signals(_interrupt)


def leave(status: int) -> NoReturn:
    """End the process; a late Ctrl-C does not change its status any more."""
    _on_signals(signal.SIG_IGN)
    sys.exit(status)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Whatever is set within, the handlers are afterwards what they were."""
    before = {each: signal.getsignal(each) for each in ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in before.items():
                signal.signal(each, handler or signal.SIG_DFL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing within, neither here nor in processes started within."""
    with signals_kept():
        _on_signals(signal.SIG_IGN)
        yield


def _on_signals(handler) -> None:
    if threading.current_thread() is threading.main_thread():
        for each in ENDING:
            if signal.getsignal(each) != signal.SIG_IGN:  # as nohup and shells ask for
                signal.signal(each, handler)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _depart(signum: int, frame: object) -> None:
    """Nothing is open yet, and an exception might be taken for a module that does not import."""
    with suppress(OSError):
        os.write(2, b"interrupted before anything was computed\n")
    os._exit(130)


class _Lasting(io.FileIO):
    """A file that takes everything, also when its reader has gone or its disk is full."""

    def write(self, text) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)


def _lasting(stream, number: int) -> io.TextIOWrapper:
    """The same stream, which neither a closed pipe nor an odd character can break."""
    if stream is None:  # closed by who started the process
        return open(os.devnull, "w")
    raw = _Lasting(number, "wb", closefd=False)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=True)
