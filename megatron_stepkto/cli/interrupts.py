"""Ctrl-C in one line and exit code 130, from the first import to the last moment of a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SAID = b"interrupted: finished work is kept; run the same command again to go on\n"


def _leave(number: int, frame: object) -> None:
    os.write(2, SAID)
    os._exit(130)


def leave_at_once() -> None:
    """End the process at an interrupt while no work is under way; one that the caller ignores stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def interruptible() -> Iterator[None]:
    """In here an interrupt raises KeyboardInterrupt, so that work under way is put in order; after it, it leaves."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)
