"""Cached answers, keyed by the request, in an append-only file that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import threading
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
    Answers stay in the file: memory holds about 110 bytes for each, whatever its size. Threads may share a cache, and a
    process may have several open on one file: each finds what was there when it was opened, and its own answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[int, int] = {}  # short hash of the key -> where its line begins
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # without a buffer: a line is written at once, at the end, whoever else writes to the file
            self._writer = self.path.open("ab", buffering=0)
        self._reader = self.path.open("rb")
        whole = 0
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n"):  # torn
                self._writer.truncate(whole)
                break
            try:
                row = json.loads(line)
                _ = row["value"]
                self._offsets[_short(row["key"])] = whole
            except (ValueError, KeyError, TypeError, AttributeError):
                self._close()
                raise UserError(
                    f"{self.path}:{number}: expected a cached answer, got other text; remove the line"
                ) from None
            whole += len(line)
        self._found = whole
        return self

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return _short(key) in self._offsets

    def was_kept(self, key: str) -> bool:
        """Whether the answer was there when the cache was opened, and has not been replaced since."""
        return self._offsets.get(_short(key), self._found) < self._found

    def get(self, key: str) -> Any:
        with self._lock:
            offset = self._offsets.get(_short(key))
            if offset is None:
                return None
            self._reader.seek(offset)
            line = self._reader.readline()
        return json.loads(line)["value"]

    def put(self, key: str, value: Any) -> None:
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n"
        with self._lock, writing(self.path):
            left = line
            while left:  # a full disk takes a part of it, and then none: a kill leaves it whole or torn at the end, too
                left = left[self._writer.write(left) :]
            self._offsets[_short(key)] = self._writer.tell() - len(line)

    def __exit__(self, *_: object) -> None:
        with writing(self.path):
            try:
                os.fsync(self._writer.fileno())
            finally:
                self._close()

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()


def _short(key: str) -> int:
    """120 bits of a hash of the key, which Python stores in as much memory as 64 of them."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:15], "big")
