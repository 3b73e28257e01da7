"""YAML that users write: bounded, without duplicate keys, and with the line of every key.

Plain scalars are read by the core schema of YAML 1.2, as most people expect it: ``1e-6`` is a number, ``off`` and
``2024-01-01`` are texts, ``010`` is ten. PyYAML alone reads YAML 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import IO, Any, ClassVar

import yaml

Path = tuple[str | int, ...]

MAX_DEPTH = 50  # levels, aliases written out
MAX_NODES = (
    20_000  # keys, items and values, aliases written out: `a: [*b, *b]`, `b: [*c, *c]`, ... doubles at each line
)

_TAG = "tag:yaml.org,2002:"
_PATTERNS = {  # name: pattern and the characters that it begins with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class BadYAML(ValueError):
    """A fault of a YAML text. ``line`` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if "x" in text else 10)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        f"{_TAG}null": yaml.SafeLoader.construct_yaml_null,
        f"{_TAG}bool": yaml.SafeLoader.construct_yaml_bool,
        f"{_TAG}int": _read_int,
        f"{_TAG}float": yaml.SafeLoader.construct_yaml_float,
        f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
        f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
        None: yaml.SafeLoader.construct_undefined,
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth == MAX_DEPTH:
            raise _too_deep(self.peek_event().start_mark.line + 1)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would read as something else."""


for _name, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def read_yaml(text: str, expand: Callable[[str, int], str] | None = None) -> tuple[Any, dict[Path, int]]:
    """One document, and the line of every key and item by its path. What an alias stands for is a copy.

    Args:
        expand: called with every scalar and its line; what comes back of an unquoted one is read like any other text:
            as a number where it is one.

    Raises:
        BadYAML: it does not parse, holds another tag than those of JSON's types, a key twice or one that is not a text,
            or is nested too deep or too big with its aliases written out.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return None, lines
        _Walk(loader, lines, expand).visit(node, (), 0)
        return _copied(loader.construct_document(node)), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadYAML(line, f"not YAML: character {error.character!r}: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadYAML(mark.line + 1 if mark else 1, f"not YAML: {_reason(error)}") from None


def _copied(content: Any) -> Any:
    """PyYAML makes one object of an anchor and all its aliases: a change of one would be a change of all."""
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(item) for item in content] if isinstance(content, list) else content


def write_yaml(content: Any, file: IO[str]) -> None:
    """In the order given; ``read_yaml`` and any reader of YAML 1.1 read the same back."""
    yaml.dump(content, file, Dumper=_Dumper, sort_keys=False)


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    return f"{error.context}, {problem}" if problem.startswith("but ") else problem


def _shown(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return f"{key.value!r:.60}"
    return "a list" if isinstance(key, yaml.SequenceNode) else "a section"


def _too_deep(line: int) -> BadYAML:
    return BadYAML(line, f"expected at most {MAX_DEPTH} levels, found more or an alias that holds itself")


class _Walk:
    """Walks all nodes, aliases expanded, before anything is built from them."""

    def __init__(self, loader: _Loader, lines: dict[Path, int], expand: Callable[[str, int], str] | None) -> None:
        self._loader, self._lines, self._expand = loader, lines, expand
        self._left = MAX_NODES
        self._seen: set[int] = set()  # scalars that are expanded: an alias is the same node again

    def visit(self, node: yaml.Node, path: Path, depth: int) -> None:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            raise BadYAML(line, f"expected at most {MAX_NODES} keys and values, got more, aliases written out")
        if depth > MAX_DEPTH:
            raise _too_deep(line)
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path, depth)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines.setdefault((*path, index), item.start_mark.line + 1)
                self.visit(item, (*path, index), depth + 1)
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, line)

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> None:
        merged = []
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise BadYAML(line, f"expected a text as key, got {_shown(key)}; quote it")
            if key.value in seen:
                raise BadYAML(line, f"key {'.'.join(map(str, (*path, key.value)))} is given twice; keep one")
            seen.add(key.value)
            if key.tag == f"{_TAG}merge":
                merged.append(value)
                continue
            self._lines.setdefault((*path, key.value), line)
            self.visit(value, (*path, key.value), depth + 1)
        for value in merged:  # last: its keys give way to those beside it
            for inner in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self.visit(inner, path, depth + 1)

    def _scalar(self, node: yaml.ScalarNode, line: int) -> None:
        if self._expand is not None and id(node) not in self._seen:
            self._seen.add(id(node))
            expanded = self._expand(node.value, line)
            if expanded != node.value:
                node.value = expanded
                if node.style is None:
                    node.tag = self._loader.resolve(yaml.ScalarNode, expanded, (True, False))
        try:
            self._loader.construct_object(node)
        except (ValueError, LookupError) as error:
            kind = node.tag.removeprefix(_TAG)
            raise BadYAML(line, f"{node.value!r:.60} is not of type {kind}: {error!s:.60}") from None
