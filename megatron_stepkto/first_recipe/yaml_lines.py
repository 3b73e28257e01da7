"""Recipe keys with the reason for each value, as YAML lines."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

WIDTH, COLUMN = 120, 38
_PLAIN = re.compile(r"[A-Za-z_./][\w./@+-]*")  # read by YAML as the text that it is
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


class Key(NamedTuple):
    """A key, its value (a list of keys: a section) and why it has this value."""

    name: str
    value: Any
    why: str = ""


def yaml_lines(keys: Sequence[Key], indent: int = 0) -> list[str]:
    """The lines of a mapping; a reason stands behind its key where it fits, else above."""
    lines: list[str] = []
    space = " " * indent
    for name, value, why in keys:
        section = isinstance(value, list)
        line = f"{space}{name}:" if section else f"{space}{name}: {scalar(value)}"
        beside = f"{line:<{COLUMN}}# {why}"
        if not why:
            lines.append(line)
        elif len(beside) <= WIDTH and len(line) < COLUMN:
            lines.append(beside)
        else:
            lines += [*comment(why, indent), line]
        if section:
            lines += yaml_lines(value, indent + 2)
    return lines


def comment(text: str, indent: int = 0) -> list[str]:
    start = f"{' ' * indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def scalar(value: Any) -> str:
    """A value in YAML's flow style, as a recipe has it; a tuple is a list."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, float):
        if value < 1e-2:
            digits, exponent = f"{value:.1e}".split("e")
            return f"{digits}e{int(exponent)}"  # YAML 1.1 needs the point
        return repr(value)
    if isinstance(value, str):
        value = value.replace("${", "$${")  # no variable
        return (
            value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else json.dumps(value, ensure_ascii=False)
        )
    return json.dumps(value)
