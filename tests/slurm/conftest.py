"""One Slurm for all tests here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, write_site
from tests.slurm.runs import LIMIT_S, arguments


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


@pytest.fixture(scope="session")
def undisturbed(repository: Path, tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """A run on this machine alone."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", "run", *arguments(repository, output)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output / "mini_cpu"
