"""One Slurm for all tests here."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, write_site


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="stepkto-slurm-"))  # short: a socket's path has 107 characters at most
    started = Cluster(folder)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def python_bin() -> Path:
    return Path(sys.executable).parent


@pytest.fixture
def site(tmp_path: Path, repository: Path, python_bin: Path, cluster: Cluster) -> Path:
    return write_site(tmp_path / "site.sh", repository, python_bin)
