"""The package is a house: a room imports only rooms on lower floors, and modules import each other in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "megatron_stepkto"
# From top to bottom. Rooms on one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("slurm",),
    ("report",),  # it reads the folder that run/folder.py defines
    ("run",),
    ("evaluation", "training", "first_recipe"),
    ("methods",),
    ("megatron",),
    ("planning",),
    ("judging",),
    ("sampling", "problems"),
    ("checkpoints",),
    ("architectures",),
    ("recipe", "answers", "steps"),
    ("base",),
    ("losses", "logprobs"),
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}
MAX_LOOSE_FILES = 6


class Import(NamedTuple):
    """``module`` (of ours or of Megatron-Core) as imported by ``importer`` in line ``line``; both dotted names."""

    importer: str
    line: int
    module: str

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.importer), room_of(self.module)

    def __str__(self) -> str:
        return f"{self.importer.replace('.', '/')}.py:{self.line} imports {self.module}"


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports_of(importer: str, source: str, modules: frozenset[str]) -> Iterator[Import]:
    """Imports at any depth: those inside functions and under TYPE_CHECKING count as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(importer, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{importer}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(importer, node.lineno, full if full in modules else node.module)


@pytest.fixture(scope="module")
def imports(repository: Path) -> list[Import]:
    files = sorted((repository / PACKAGE).rglob("*.py"))
    names = {path: ".".join(path.relative_to(repository).with_suffix("").parts) for path in files}
    modules = frozenset(name.removesuffix(".__init__") for name in names.values())
    return [found for path, name in names.items() for found in imports_of(name, path.read_text(), modules)]


def ours(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.module.split(".")[0] == PACKAGE]


def test_few_files_lie_loose(repository: Path) -> None:
    assert len(list((repository / PACKAGE).glob("*.py"))) <= MAX_LOOSE_FILES


def test_every_room_has_a_floor(repository: Path) -> None:
    rooms = {path.parent.relative_to(repository / PACKAGE).parts[:1] for path in (repository / PACKAGE).rglob("*.py")}
    rooms.discard(())
    assert {name for (name,) in rooms} | {"losses", "logprobs"} == set(FLOOR)


def test_imports_point_down(imports: list[Import]) -> None:
    wrong = []
    for found in ours(imports):
        upper, lower = found.rooms
        if upper in FLOOR and lower in FLOOR and upper != lower and FLOOR[lower] >= FLOOR[upper]:
            wrong.append(f"{found}: {lower}/ is not below {upper}/")
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_in_no_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for found in ours(imports):
        importer = found.importer.removesuffix(".__init__")
        if importer != found.module:
            graph.setdefault(importer, set()).add(found.module)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_one_room_imports_megatron(imports: list[Import]) -> None:
    """``megatron.core`` is imported by megatron_stepkto/megatron/ alone."""
    outside = [str(i) for i in imports if i.module.split(".")[0] == "megatron" and i.rooms[0] != "megatron"]
    assert not outside, "\n".join(outside)


@pytest.mark.parametrize("where", ["import {0}", "def f():\n    from {1} import {2}", "if x:\n    from {0} import y"])
def test_an_import_is_found_at_any_depth(where: str) -> None:
    full = f"{PACKAGE}.slurm.chain"
    source = where.format(full, *full.rsplit(".", 1))
    [found] = imports_of(f"{PACKAGE}.base.files", source, frozenset({full}))
    assert found.module == full
    assert found.rooms == ("base", "slurm")
