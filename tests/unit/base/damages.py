"""Ways in which a small file may not be what was written, and what a command says of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_stepkto.cli.main import main


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: takes no space on the disk, but all of a reader's memory


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": text(""),
    "cut short": text('{"key": {"settings": '),
    "a list": text("[]"),
    "an empty object": text("{}"),
    "null": text("null"),
    "text": text('"manifest"'),
    "a number": text("3"),
    "wrong types": text('{"key": 1, "outputs": [], "counts": 2, "seconds": "x", "iterations": 3, "name": 4}'),
    "not UTF-8": text(b'{"a": "\xff\xfe"}'),
    "nested without end": text("[" * 100_000),
    "a number without end": text('{"seconds": ' + "9" * 5000 + "}"),
    "a key with two values": text('{"seconds": 1, "seconds": 2}'),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "huge": huge,
}


def damage(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    DAMAGES[how](path)


def stepkto(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err.replace("\n", "")  # a terminal's width cuts lines
