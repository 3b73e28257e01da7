"""A hash of the code that computes a cached value, as part of its key: changed code must not return an old label."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from pathlib import Path

from megatron_stepkto.base.cache import content_key
from megatron_stepkto.base.files import sha256_of

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]
# They do not affect the value (input and output, processes, progress): changing them must not discard finished work.
PLUMBING = (f"{PACKAGE}.base", f"{PACKAGE}.recipe.keys")


@functools.cache
def code_hash(*modules: str) -> str:
    """Hash of the source of modules of this package, and of all modules of it that they import, at any depth.

    Args:
        modules: dotted names.
    """
    sources: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in sources:
            if (source := _find(name)) is None:
                raise ModuleNotFoundError(f"{name}: expected a module of {PACKAGE}")
            sources[name] = source
            waiting += _imports(source)
    return content_key(sorted([name, sha256_of(path)] for name, path in sources.items()))


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages that affect a value.

    Raises:
        importlib.metadata.PackageNotFoundError: one is not installed.
    """
    return {name: importlib.metadata.version(name) for name in packages}


def _find(module: str) -> Path | None:
    head, *rest = module.split(".")
    path = ROOT.joinpath(*rest)
    candidates = (path.with_suffix(".py"), path / "__init__.py") if rest else (path / "__init__.py",)
    return next((file for file in candidates if head == PACKAGE and file.is_file()), None)


def _imports(source: Path) -> list[str]:
    """Modules of this package that a file names in its imports, including imports inside functions."""
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # an imported name may be a module, or a name in one
            named = [[f"{node.module}.{alias.name}", node.module] for alias in node.names]
        else:
            continue
        found += [next((name for name in names if _find(name)), None) for names in named]
    return [name for name in found if name is not None and not f"{name}.".startswith(tuple(f"{p}." for p in PLUMBING))]
