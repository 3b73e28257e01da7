"""One training, two versions of Megatron-Core: killed under one, finished under the other, on one folder.

Needs a second environment (``make megatron-019`` makes one and runs this): its Python in STEPKTO_OTHER_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from tests.builders import random_examples, write_examples, write_llama
from tests.distributed.test_resume import run, run_until
from tests.model_folders import read_tensor

TIME_LIMIT_S = 300
OTHER = os.environ.get("STEPKTO_OTHER_PYTHON")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(OTHER is None, reason="set STEPKTO_OTHER_PYTHON to a Python with another Megatron-Core"),
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"ranks": 1},
    "DP 2, distributed optimizer": {"ranks": 2, "distributed_optimizer": True},
    "PP 2 interleaved": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
}


def run_elsewhere(folder: Path, parallel: dict[str, Any]) -> None:
    call = f"run(Path({str(folder)!r}), {parallel})"
    code = f"from pathlib import Path; from tests.distributed.test_resume import run; {call}"
    subprocess.run([str(OTHER), "-W", "ignore", "-c", code], check=True, timeout=TIME_LIMIT_S)


def version(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('megatron-core'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_other_python_has_another_version() -> None:
    assert version(str(OTHER)) != version(sys.executable)


@pytest.mark.parametrize("name", LAYOUTS)
def test_begun_here_and_finished_there(name: str, tmp_path: Path) -> None:
    """From the older version to the newer; run with the older one's Python."""
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(24))
    run(tmp_path / "undisturbed", LAYOUTS[name])
    moved = tmp_path / "moved"
    run_until(moved, LAYOUTS[name], moved / "checkpoints" / "update_000002" / "state.json")
    run_elsewhere(moved, LAYOUTS[name])
    assert len((moved / "metrics.jsonl").read_text().splitlines()) == 6
    expected, got = CheckpointReader(tmp_path / "undisturbed" / "final"), CheckpointReader(moved / "final")
    assert got.shapes() == expected.shapes()
    for key in expected.shapes():
        truth = read_tensor(expected, key)
        assert (read_tensor(got, key) - truth).norm() <= 1e-6 * truth.norm(), key


def test_the_way_back_is_refused(tmp_path: Path) -> None:
    """Megatron-Core 0.16 asks for a file that 0.19 does not write: told, not a traceback."""
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(24))
    moved = tmp_path / "moved"
    run_until(moved, {"ranks": 1}, moved / "checkpoints" / "update_000002" / "state.json", str(OTHER))
    with pytest.raises(UserError, match=r"no common\.pt.*make megatron-019"):
        run(moved, {"ranks": 1})
