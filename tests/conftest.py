"""Shared fixtures. Real data live beside the checkout and are never committed (see the README's data section)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.progress import console

REPOSITORY = Path(__file__).resolve().parents[1]


SLURM = "tests/slurm/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share fixtures that are costly, so one process runs them all; one runs all of the only Slurm."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SLURM if nodeid.startswith(SLURM) else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests come first: they take the longest, and the other processes share what follows."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))


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
