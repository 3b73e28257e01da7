"""Files that are either whole or absent: atomic writes, hashes."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_stepkto.base.errors import UserError


@contextlib.contextmanager
def atomic_writer(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on a clean exit flush it to disk and rename it to ``path``.

    A reader, or a run after a crash, sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes 0600: a run directory is shared on a cluster
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    with atomic_writer(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Parse one JSON document.

    Raises:
        UserError: the file is missing or not JSON (with its line), see ``parse_json``.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found none") from None
    return _parse(path, text)


def parse_json(text: str | bytes) -> Any:
    """One JSON document of a user.

    Raises:
        ValueError: it does not parse (``json.JSONDecodeError``), names a key twice, or is nested too deep to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'key "{next(name for name in names if names.count(name) > 1)}" is given twice')
    return found


def _parse(path: Path, text: bytes) -> Any:
    try:
        return parse_json(text.decode("utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: expected JSON, got text that does not parse ({error})") from None


def read_json_if_there(path: Path) -> Any:
    """``read_json``, or None where there is no file: one look, for another process may remove it between two."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    return _parse(path, text)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files below ``folder`` whose name fits, oldest first.

    A run that is under way makes and removes folders: what goes meanwhile is left out (``rglob`` and ``stat`` raise).
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in fnmatch.filter(names, pattern):
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems (FUSE, SMB) cannot, of a folder
            raise
    finally:
        os.close(handle)


def flush_tree(path: Path) -> None:
    """A file, or a folder with all in it: what a rename makes count must be whole after a power cut."""
    for each in (path, *path.rglob("*")):
        flush(each)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a directory's sorted (relative name, SHA-256) list; hidden files do not count."""
    if path.is_dir():
        digest = hashlib.sha256()
        for inner in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            digest.update(f"{inner.relative_to(path)}\0{sha256_of(inner)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same in every process and run (Python's own is not)."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")
