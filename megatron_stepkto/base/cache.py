"""Cached answers, keyed by the request, in an append-only file that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.storage import writing


def content_key(*parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """``{"key", "value"}`` per line, appended as soon as an answer arrives. One process writes at a time.

    A last line that a kill cut short is dropped; any other line that does not parse is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # torn
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["value"]
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise UserError(
                    f"{self.path}:{number}: expected a cached answer, got other text; remove the line"
                ) from None
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Any:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        self._known[key] = value
        # one write of one line to a file opened for appending: a kill leaves it whole or torn at the end
        with writing(self.path):
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        with writing(self.path):
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
