"""Files that are either whole or absent: atomic writes, hashes."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.storage import writing

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


@contextlib.contextmanager
def atomic_writer(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on a clean exit flush it to disk and rename it to ``path``.

    A reader, or a run after a crash, sees the old file or the new one, never a part.

    Raises:
        MachineFault: the file system is full, or fails.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with writing(path), os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with writing(path):
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


# Far larger than any tokenizer or weight index, far smaller than a machine's memory.
MAX_JSON_BYTES = 1 << 28


def read_json(path: Path, shape: type[BaseModel] | None = None) -> Any:
    """Parse one JSON document.

    Args:
        shape: model of the object that it must hold; further keys are ignored.

    Raises:
        UserError: the file is missing, is a folder or far too large, is not JSON (with its line; see
            ``parse_json``), or does not match ``shape``.
    """
    content = _content(path)
    if content is None:
        raise UserError(f"{path}: expected a JSON file, found none")
    return _parse(path, content, shape)


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON document that a user wrote.

    Raises:
        ValueError: it does not parse (``json.JSONDecodeError``), has a duplicate key, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # parsers differ in which value they keep
        for number, (key, value) in enumerate(pairs):
            if found[key] != value:
                raise ValueError(f"the key {key} has two values, {value!r:.80} and {found[key]!r:.80}; remove one")
            if any(key == other for other, _ in pairs[:number]):
                raise ValueError(f'key "{key}" is duplicated; keep one')
    return found


def read_json_if_there(path: Path, shape: type[BaseModel] | None = None) -> Any:
    """``read_json``, or None if the file does not exist, even if another process deletes it during the call."""
    content = _content(path)
    return None if content is None else _parse(path, content, shape)


def read_json_object(path: Path) -> dict[str, Any]:
    """``read_json`` of a file that must hold an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {_kind(found)}")
    return found


def _content(path: Path) -> bytes | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: expected a JSON file, got {'a folder' if path.is_dir() else 'something else'}")
        if found.st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path}: expected a JSON file of at most {MAX_JSON_BYTES >> 20} MiB, got {found.st_size >> 20} MiB; "
                "this is not the file that belongs here"
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(path: Path, content: bytes, shape: type[BaseModel] | None) -> Any:
    try:
        found = parse_json(content.decode("utf-8"))
    except ValueError as error:  # also of bytes that are not UTF-8, and of endless numbers
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: expected JSON, got text that does not parse ({error})") from None
    if shape is not None:
        _check_shape(path, found, shape)
    return found


_WAY_OUT = "restore the file from a copy, or move it away with what it describes"


def _check_shape(path: Path, found: Any, shape: type[BaseModel]) -> None:
    from pydantic import ValidationError

    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: expected a JSON object, got {_kind(found)}; {_WAY_OUT}")
    try:
        shape.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {describe(error)}; {_WAY_OUT}") from None


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error, as one clause: where, what was expected, what came."""
    from pydantic import BaseModel

    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "record"
    quiet = first["type"] in ("missing", "extra_forbidden") or isinstance(first.get("input"), dict | BaseModel)
    shown = "" if quiet else f", got {first.get('input')!r:.60}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{shown}{more}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files below ``folder`` whose name matches, oldest first.

    A running process creates and removes folders: files that disappear meanwhile are skipped (``rglob`` would raise).
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in fnmatch.filter(names, pattern):
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def numbered(folder: Path, prefix: str) -> list[Path]:
    """``iteration_1``, ``iteration_2``, ..., ``iteration_10`` in the order of their numbers."""
    found = [(re.fullmatch(rf"{prefix}(\d+)", path.name), path) for path in folder.glob(f"{prefix}*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems (FUSE, SMB) cannot flush a folder
            raise
    finally:
        os.close(handle)


def flush_tree(path: Path) -> None:
    """Flush a file, or a folder and all in it, so that it is complete after a power failure."""
    for each in (path, *path.rglob("*")):
        flush(each)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a directory's sorted (relative name, SHA-256) list.

    Hidden files (locks, drafts, desktop files) are ignored, except a checkpoint's ``.metadata``, which maps its bytes
    to weights.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        counted = (p for p in path.rglob("*") if not p.name.startswith(".") or p.name == ".metadata")
        for inner in sorted(p for p in counted if p.is_file()):
            digest.update(f"{inner.relative_to(path)}\0{sha256_of(inner)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same in every process and run (Python's own is not)."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")
