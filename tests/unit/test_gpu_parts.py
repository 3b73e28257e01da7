"""``tools/gpu_parts.py``: what is on the disk after parts that end, fail, skip or never end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tools import gpu_parts
from tools.gpu_parts import PARTS, Part, Result, counts_of_tests, ended, estimate_s, run_parts

PROGRAMS = {
    "good": """print('{"a": 1}')\nprint('{"a": 2}')""",
    "bad": """print('{"a": 1}')\nraise SystemExit("it broke")""",
    "absent": """print("skipped: no such kernel")""",
    # a child that would outlive its parent, and a parent that will not stop when asked to
    "endless": """import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
print('{"a": 1}', flush=True)
time.sleep(600)""",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    for name, text in PROGRAMS.items():
        (tmp_path / f"{name}_part.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_parts, "GRACE_S", 0.2)
    return {name: Part(name, name, (f"{name}_part",), (f"{name}_part",), 20, 0.0) for name in PROGRAMS}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_part_leaves_a_line_and_the_next_one_runs(parts: dict[str, Part], tmp_path: Path) -> None:
    chosen = [parts["bad"], parts["absent"], parts["good"]]
    run_parts(chosen, Path(sys.executable), tmp_path / "out")
    rows = lines(tmp_path / "out")
    assert [(row["part"], row["status"]) for row in rows] == [("bad", "failed"), ("absent", "skipped"), ("good", "ok")]
    assert rows[0]["said"] == "exit code 1: it broke"
    assert rows[1]["said"] == "no such kernel"
    assert [len(row["figures"]) for row in rows] == [1, 0, 2]
    for row in rows:
        assert row["versions"]["python"] == sys.version.split()[0]
        assert row["commit"]
        assert row["device"]


def test_a_part_at_its_limit_is_killed_with_its_children_and_keeps_its_figures(
    parts: dict[str, Part], tmp_path: Path
) -> None:
    endless = Part("endless", "", parts["endless"].module, (), 2, 0.0)
    results = run_parts([endless, parts["good"]], Path(sys.executable), tmp_path / "out")
    assert [result.status for result in results] == ["out of time", "ok"]
    assert results[0].figures == [{"a": 1}]
    assert not is_running(int((tmp_path / "child").read_text()))


def test_what_no_time_is_left_for_is_skipped(parts: dict[str, Part], tmp_path: Path) -> None:
    (result,) = run_parts([parts["good"]], Path(sys.executable), tmp_path / "out", budget_s=1)
    assert (result.status, result.said) == ("skipped", "no time left")


def test_stopped_in_a_part_it_records_that_part(parts: dict[str, Part], tmp_path: Path) -> None:
    code = f"""import pathlib, sys
from tools.gpu_parts import Part, run_parts
run_parts([Part("endless", "", ("endless_part",), (), 60, 0.0)], pathlib.Path(sys.executable),
          pathlib.Path({str(tmp_path / "out")!r}))"""
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    while not (tmp_path / "child").is_file() or "{" not in (tmp_path / "out" / "log.txt").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    (row,) = lines(tmp_path / "out")
    assert (row["status"], row["figures"]) == ("interrupted", [{"a": 1}])
    assert not is_running(int((tmp_path / "child").read_text()))


def test_tests_are_counted_as_they_end() -> None:
    output = (
        "tests/gpu/test_a.py::test_one[x y] PASSED   [ 25%]\n"
        "tests/gpu/test_a.py::test_two FAILED [ 50%]\n"
        "tests/gpu/test_a.py::test_three SKIPPED (needs two GPUs) [ 75%]\n"
        "tests/gpu/test_a.py::test_four "
    )
    counts = {"passed": 1, "failed": 1, "error": 0, "skipped": 1, "names": ["tests/gpu/test_a.py::test_two"]}
    assert counts_of_tests(output) == counts
    killed = ended("tests", output, "out of time", 90.0, 80.0, 90.0)
    assert (killed.status, killed.figures) == ("out of time", [counts])


def test_tests_that_were_all_skipped_are_a_skipped_part() -> None:
    output = (
        "tests/gpu/test_a.py::test_one SKIPPED [100%]\n"
        "SKIPPED [1] tests/gpu/conftest.py:9: needs Transformer Engine\n==== 1 skipped in 3.0s ====\n"
    )
    result = ended("te_tests", output, 0, 3.0, 3.0, 90.0)
    assert (result.status, result.said) == ("skipped", "needs Transformer Engine")


def test_the_limits_fit_the_order_of_value() -> None:
    """Without Transformer Engine first; the expected sizes, not the limits, fit ten minutes."""
    names = [part.name for part in PARTS]
    assert names[:3] == ["tests", "train_8b", "head"]
    assert len(set(names)) == len(names)
    assert sum(part.gpu_s for part in PARTS) < gpu_parts.BUDGET_S
    assert all(part.gpu_s < part.limit_s for part in PARTS)


def test_the_estimate_by_hand() -> None:
    """What stays on the processor there, or the start of the programs, and the GPU's own time."""
    loop = Part("loop", "", (), (), limit_s=120, gpu_s=60, programs=7)
    result = Result("loop", "ok", 300.0, 264.0, limit_s=600, said="", figures=[], start_s=5.0)
    assert estimate_s(loop, result) == 7 * 5 + 60
    assert estimate_s(replace(loop, host_bound=True), result) == 264 + 60
