"""A child process that answers one line of JSON on its input with one line of JSON on its output, many times."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

LAST_WORDS = 800  # characters of its error output that a message shows


class LineWorker:
    """``python -m module arguments``; it must end when its input ends, so also when this process is killed.

    One request is under way at a time. A context manager, which kills it.

    Args:
        log: file for its error output; None: a temporary one.
        env: variables beside those of this process.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        if log is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._errors = log.open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self.fileno = self._output.fileno()  # ready for reading when ``receive`` has something to read
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def send(self, request: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died between two requests: ``receive`` says so next
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()

    def receive(self) -> Any:
        """The reply, or None while its line is incomplete. Waits until there is something to read.

        Raises:
            EOFError: the process has ended.
        """
        chunk = os.read(self.fileno, 65536)
        if not chunk:
            raise EOFError
        self._buffer += chunk
        if not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = self._buffer, b""
        return json.loads(line)

    def ask(self, request: Any) -> Any:
        """Send a request and wait for its reply.

        Raises:
            EOFError: the process has ended.
        """
        self.send(request)
        while (reply := self.receive()) is None:
            pass
        return reply

    def last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace").strip()[-LAST_WORDS:]

    def exit_code(self) -> int:
        """Waits for its end; as ``subprocess`` counts: negative for a signal."""
        return self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._input, self._output, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()
