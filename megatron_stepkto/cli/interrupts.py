"""Ctrl-C ends a process with one line and exit code 130, from its first import to its last moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SAID = b"interrupted: finished work is kept; run the same command again to resume\n"


def _leave(number: int, frame: object) -> None:
    os.write(2, SAID)
    os._exit(130)


def leave_at_once() -> None:
    """End the process at an interrupt while it does no work. Interrupts that the caller ignores stay ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, an interrupt raises KeyboardInterrupt, so that work can clean up; afterwards it ends the process."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)
