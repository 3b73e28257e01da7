"""Progress with an estimate: a bar on a terminal, a line every few seconds elsewhere.

Workers (sampling processes, training ranks) report through small JSON files that the parent polls, so that
``stepkto status`` and a batch system can read the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_stepkto.base.storage import writing

# Quiet in a program that imports the package: only the command line shows messages and bars.
console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=True)
PROGRESS = "progress.json"  # the name of a ``ProgressFile``
LINE_EVERY_S = 10.0
REPORT_EVERY_S = 0.3


def show_messages() -> None:
    """Show messages, warnings and progress on standard error from now on: the command line calls this."""
    console.quiet = False


def say(message: str) -> None:
    console.print(message, markup=False)


def warn(message: str) -> None:
    """A line on the command line; a ``UserWarning`` in a program that imports the package."""
    if console.quiet:
        warnings.warn(message, stacklevel=2)
    else:
        console.print(f"warning: {message}", style="yellow", markup=False)


class ProgressBar:
    """``with ProgressBar("sampling", total, "problems") as bar: bar.update(done, note)``.

    Bars may be open together, as stages of a stream are: they share a terminal's display.
    """

    _display: ClassVar[Progress | None] = None  # of the bar that was opened first

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._began = self._last_line = time.monotonic()
        self._done = self._worked = 0
        self._first: tuple[float, int] | None = None  # time and work at which the measurement of speed began
        self._moves = False
        self._note = ""
        self._rich: Progress | None = None
        self._owns_display = False

    def __enter__(self) -> Self:
        if console.is_terminal and not console.quiet:
            self._owns_display = ProgressBar._display is None
            self._rich = ProgressBar._display = ProgressBar._display or self._new_display()
            self._rich.start()  # once, however often it is called
            self._task = self._rich.add_task(self.title, total=self.total, note="", unit=self.unit)
        return self

    def _new_display(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def update(self, done: int, note: str = "", kept: int = 0) -> None:
        """kept: how many of those done an earlier attempt did, where it is not all that the first call reports."""
        # Speed is measured from the first advance: neither an earlier attempt's work nor the start-up time counts.
        worked = done - kept
        if self._first is None or (not self._moves and worked > self._first[1]):
            self._moves = self._first is not None
            self._first = (time.monotonic(), worked)
        self._done, self._worked, self._note = done, worked, note
        if self._rich:
            self._rich.update(self._task, completed=done, total=self.total, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._last_line = now
        began, first = self._first or (now, 0)
        gained = self._worked - first
        left = (
            f", about {(now - began) * (self.total - self._done) / gained:.0f} s left"
            if gained > 0 and self._done < self.total
            else ""
        )
        note = f"  {self._note}" if self._note else ""
        say(f"{self.title}: {self._done}/{self.total} {self.unit}, {now - self._began:.0f} s{left}{note}")

    def __exit__(self, *_: object) -> None:
        if self._rich is None:
            self._line()
        elif self._owns_display:
            ProgressBar._display = None
            self._rich.stop()


class ProgressFile:
    """A worker's report, rewritten in place at most every ``REPORT_EVERY_S`` seconds."""

    def __init__(self, path: Path) -> None:
        self.path, self._last = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def report(self, done: int, total: int, note: str = "", unit: str = "", *, at_once: bool = False) -> None:
        """unit: what is counted, where it differs from the stage's usual unit. The end is written at once, too."""
        now = time.monotonic()
        if at_once or done == total or now - self._last >= REPORT_EVERY_S:
            self._last = now
            # a unique name: processes on several hosts may report on the same work
            temporary = self.path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
            with writing(self.path):
                temporary.write_text(json.dumps({"done": done, "total": total, "note": note, "unit": unit}))
                temporary.replace(self.path)


class Report(NamedTuple):
    done: int
    total: int
    note: str
    unit: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.done}/{self.total}", self.unit, self.note)))


def read_progress(path: Path) -> Report | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Report(**json.loads(path.read_text()))
    return None
