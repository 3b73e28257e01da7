"""Shared fixtures. Real data live beside the checkout and are never committed (see the README's data section)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_stepkto.base.progress import console

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real problems, solutions and labels: $STEPKTO_TEST_DATA, else ../shared/data of the checkout."""
    folder = Path(os.environ.get("STEPKTO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no test data in {folder}; set STEPKTO_TEST_DATA to the folder that holds eval/, steps/, golden/ ..."
        )
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(autouse=True)
def _as_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages and warnings are printed, as by ``stepkto``; a library call is silent (tests/unit/test_library.py)."""
    monkeypatch.setattr(console, "quiet", False)
