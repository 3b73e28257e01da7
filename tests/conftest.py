"""Shared fixtures. Real data live beside the checkout and are never committed (see the README's data section)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.progress import console

REPOSITORY = Path(__file__).resolve().parents[1]
SHARING = ("tests/slurm/", "tests/real/")  # folders whose tests share one cluster, one converted model


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, and of the folders ``SHARING`` all of them: what a fixture makes is made once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrFolder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in SHARING if file.startswith(folder)), file)

    config.option.loadscopereorder = False  # in the order of collection: unit/, with the short ones, is the last
    return ByFileOrFolder(config, log)


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
