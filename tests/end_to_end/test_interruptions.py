"""SIGKILL in every stage, then the same command again: the result is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_stepkto.base.files import sha256_of

pytestmark = [pytest.mark.end_to_end, pytest.mark.vllm, pytest.mark.distributed]

TIME_LIMIT_S = 1200  # on a busy machine
SMALL = {
    "iterations": 1, "problems.per_iteration": 16, "sample.num_samples": 4, "sample.chunk_problems": 4,
    "train.global_batch_size": 8, "train.checkpoint_every": 2, "evaluate.num_problems": 20, "evaluate.k": 4,
}  # fmt: skip


def command(repository: Path, output: Path) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in SMALL.items()]
    return [sys.executable, "-m", "megatron_stepkto", "run", str(repository / "recipes" / "mini_cpu.yaml"),
            f"--set=output={output}", *sets]  # fmt: skip


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def run_to_end(repository: Path, output: Path) -> dict[str, Any]:
    done = subprocess.run(
        command(repository, output), capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "mini_cpu" / "summary.json").read_text())


def kill_when(repository: Path, output: Path, seen: Callable[[], bool]) -> None:
    """Start the run, SIGKILL its main process at the first sight of ``seen``, and see that its children die too."""
    process = subprocess.Popen(
        command(repository, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + TIME_LIMIT_S
    try:
        while not seen():
            assert process.poll() is None, (
                f"the run ended before the instant to kill it: {process.communicate()[1][-2000:]}"
            )
            assert time.monotonic() < limit
            time.sleep(0.002)
        children = descendants(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    _, alive = psutil.wait_procs(children, timeout=TIME_LIMIT_S)
    assert not alive, f"left behind: {alive}"


# Measurements of time and memory, places of files, and what exists only while a stage is under way.
MEASURED = {
    "seconds", "seconds_of_this_command", "tokens_per_second", "tflops_per_rank", "memory_gb",
    "engines", "engine_seconds", "engine_start_seconds", "tokens_per_second_per_engine", "time_includes", "path",
    "final", "trained",  # the trained folder's hash, as output and as input: it counts .metadata (see PASSING)
}  # fmt: skip
# .metadata: torch writes the folder's own path into it
PASSING = {"progress.json", "started.json", "job.json", ".hashes.json", "recipe.yaml", "report.html", ".metadata"}


def without_measurements(value: Any) -> Any:
    """Also without the hashes of files that hold measurements."""
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if k not in MEASURED and Path(k).name not in ("metrics.jsonl",)}
        return {key: without_measurements(each) for key, each in left.items()}
    return [without_measurements(each) for each in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run: its hash, or its values where some of them are measurements."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        # a cache holds its entries in the order in which they came
        if not path.is_file() or path.name in PASSING or {"logs", "tensorboard", "cache"} & set(name.parts):
            continue
        if path.parent.name.endswith(".lock") or re.fullmatch(r"\..*\.tmp", path.name):  # a kill leaves a draft
            continue
        if path.name in ("manifest.json", "summary.json", "metrics.json"):
            found[str(name)] = without_measurements(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[str(name)] = [without_measurements(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[str(name)] = sha256_of(path)
    return found


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.long)], ids=["three kills", "nine"])
def test_killed_in_every_stage_ends_as_undisturbed(repository: Path, tmp_path: Path, everywhere: bool) -> None:
    expected = run_to_end(repository, tmp_path / "undisturbed")
    evaluating, sampling = (
        json.loads((tmp_path / "undisturbed" / "mini_cpu" / stage / "manifest.json").read_text())["counts"]
        for stage in ("evaluate/M0", "iteration_1/sample")
    )
    assert sampling["engine_start_seconds"] == 0, "the engines that evaluated M0 sample for the first iteration"
    assert evaluating["time_includes"] == "iteration 1 sample"
    output = tmp_path / "interrupted"  # as long a name: the size of a checkpoint counts its own path
    run = output / "mini_cpu"
    first = run / "iteration_1"

    def begun(stage: Path) -> Callable[[], bool]:
        return lambda: (stage / "started.json").exists()

    drawn, sampled = run / "evaluate" / "M0" / "drawn" / "chunks", first / "sample" / "chunks"
    checkpoints = first / "train" / "checkpoints"
    # three: the evaluation's and the next iteration's samples come from one start of the engines; in the middle of
    # writing a later checkpoint; in the last stage
    instants: list[tuple[bool, Callable[[], bool]]] = [
        (False, lambda: any(drawn.glob("*.jsonl"))),
        (True, lambda: any(sampled.glob("samples-*.jsonl"))),
        (False, begun(first / "judge")),
        (False, begun(first / "dataset")),
        (False, lambda: any((first / "train").glob("reference-*.npy"))),
        (False, lambda: any(checkpoints.glob("update_*/state.json"))),
        (True, lambda: any(checkpoints.glob(".update_*.partial"))),
        (False, begun(first / "convert")),
        (True, begun(run / "evaluate" / "M1")),
    ]
    for always, seen in instants:
        if always or everywhere:
            kill_when(repository, output, seen)
    got = run_to_end(repository, output)

    assert without_measurements(got) == without_measurements(expected)
    ours, truth = contents(run), contents(tmp_path / "undisturbed" / "mini_cpu")
    assert set(ours) == set(truth)
    assert [name for name in truth if ours[name] != truth[name]] == []
    assert {"iteration_1/convert/model/model.safetensors", "evaluate/M1/sampled.jsonl"} <= set(truth)
    assert [name for name in truth if name.startswith("iteration_1/train/reference-")]
    rows = [json.loads(line) for line in (first / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(1, 9)), "64 examples in batches of 8, each update logged once"
    assert len((first / "train" / "log_ratios.jsonl").read_text().splitlines()) == 64, "of all, as they are under 100"

    gap = json.loads((first / "train" / "manifest.json").read_text())["counts"]["gap"]
    assert gap["tokens"] > 500
    assert gap["max"] < 1e-4, "vLLM's log-probs of its own samples equal Megatron's"

    # done is done: a third time costs nothing and changes nothing
    began = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    assert without_measurements(run_to_end(repository, output)) == without_measurements(expected)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")} == began
