"""Turns errors and signals into one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_stepkto.base.errors import MachineFault, StageFailed, UserError
from megatron_stepkto.base.progress import console, show_messages
from megatron_stepkto.base.storage import STORAGE_FAULTS, check_working_directory
from megatron_stepkto.cli.interrupts import SAID, interruptible


def guarded(work: Callable[[], None]) -> None:
    """Do the work of a command; an error or a signal becomes one message and an exit code."""
    show_messages()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    try:
        with interruptible():
            check_working_directory()
            work()
    except UserError as error:
        _fail(f"error: {error}", 2)
    except MachineFault as error:
        _fail(f"error: {error}", 1)
    except StageFailed as error:
        _fail(f"failed: {error}", 1)
    except KeyboardInterrupt as stop:
        _fail(SAID.decode().strip(), 143 if stop.args else 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `stepkto ... | head`: the reader has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"error: {place}{error.strerror or error}", 1 if error.errno in STORAGE_FAULTS else 2)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _fail(message: str, code: int) -> NoReturn:
    console.print(message, style="red", markup=False)
    raise SystemExit(code) from None
