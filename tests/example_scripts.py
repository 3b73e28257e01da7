"""The scripts of examples/, which are no package."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def load_example(name: str) -> Any:
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
