"""Each fault that doctor knows, injected: one line that says what is wrong and what to do."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.nodes import Nodes
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.run.folder import Run
from megatron_stepkto.slurm import doctor


@pytest.fixture
def recipe(repository: Path, tmp_path: Path) -> Recipe:
    return read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}", "train.device=cpu"])


def one(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    assert "\n" not in faults[0]
    return faults[0]


def test_a_healthy_machine_has_no_fault_and_its_ranks_add_up(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.doctor(Run(recipe)) == []
    said = capsys.readouterr().err
    assert "all-reduce of 8 MiB over 2 ranks on 1 node, gloo:" in said
    assert list((recipe.run_dir / "doctor").iterdir()) == []


def test_what_a_stage_would_refuse_is_a_fault(repository: Path, tmp_path: Path) -> None:
    """Of both environments on one machine, of one on a cluster."""
    sets = [
        f"output={tmp_path}",
        "train.device=cpu",
        "train.dtype=bfloat16",
        "train.fp8={}",
        "sample.tensor_parallel=2",
    ]
    run = Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}", *sets]))
    name = os.uname().nodename
    train, sample = doctor.doctor(run)
    assert train == (
        f"{name}: iteration 1 train: train.fp8 needs an NVIDIA GPU, but training runs on the CPU; remove train.fp8"
    )
    assert sample.startswith(f"{name}: evaluate M0: sample.tensor_parallel is 2, but vLLM's CPU build is installed")
    assert doctor.doctor(run, "train") == [train]
    assert doctor.doctor(run, "sample") == [sample]


def test_files_to_import_that_are_missing(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each file, with its line of the recipe; what is there, or imported already, is no fault."""
    monkeypatch.setenv("STEPKTO_TEST_DATA", str(tmp_path))
    path = repository / "recipes" / "gsm8k_offline_cpu.yaml"
    run = Run(read_recipe(path, [f"output={tmp_path / 'runs'}", "iterations=1"]))
    lines = path.read_text().splitlines()
    named = [
        ("processbench", "steps/processbench_gsm8k.jsonl"), ("processbench", "steps/processbench_math.jsonl"),
        ("prm800k", "steps/raw_format_prm800k_sample.jsonl"),
        ("math_shepherd", "steps/raw_format_math-shepherd_sample.jsonl"),
        ("gsm8k_solutions", "samples/gsm8k_model_solutions.jsonl"),
    ]  # fmt: skip
    expected = [
        f"{os.uname().nodename}: inputs: {path}:{1 + next(n for n, line in enumerate(lines) if file in line)}: "
        f"problems.imports.{number}.path: expected a file of format {kind}, found none at {tmp_path / file}; "
        "download it (docs/data.md says from where), or correct the path"
        for number, (kind, file) in enumerate(named)
    ]
    assert doctor.doctor(run) == expected
    (tmp_path / "steps").mkdir()
    (tmp_path / named[0][1]).write_text("")
    assert doctor.doctor(run, "sample") == expected[1:]
    imported = run.folder.judged(1).parent
    imported.mkdir(parents=True)
    (imported / "manifest.json").write_text("{}")
    assert doctor.doctor(run, "sample") == []


def test_exit_code(recipe: Recipe, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", "doctor", str(repository / "recipes" / "mini_cpu.yaml"),
         f"--set=output={tmp_path}/file", "--set=train.device=cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith("fault: ")
    assert "cannot write (Not a directory); give a shared folder of yours as `output`" in done.stdout


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    assert "may open 1024 files" in one(doctor._limits(on_gpu=False))
    limits[resource.RLIMIT_NOFILE] = 65536
    assert "may lock 64 KiB of memory" in one(doctor._limits(on_gpu=True))
    limits[resource.RLIMIT_MEMLOCK] = resource.RLIM_INFINITY
    assert doctor._limits(on_gpu=True) == []


def test_busy_and_absent_gpus() -> None:
    assert doctor.busy_gpus("0, 4\n1, 1024\n") == []
    assert one(doctor.busy_gpus("0, 4\n1, 70311\n")).startswith("GPU 1 is not idle: 70311 MiB in use; ")
    import torch

    if not torch.cuda.is_available():
        assert one(doctor._gpus(8)).startswith("torch sees 0 GPUs, the layout needs 8 on this node; ")


def test_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    real, write = time.time, Path.write_text
    for ahead in (60, -60):
        with monkeypatch.context() as patch:
            patch.setattr(doctor.time, "time", lambda ahead=ahead: real() + ahead)
            faults, skew = doctor._write_test(tmp_path / "x", Nodes())
        assert one(faults).startswith(f"the clock is {skew:+.0f} s from that of the file server")
        assert skew == pytest.approx(ahead, abs=30)  # the machine may be busy

    def slowly(self: Path, text: str) -> int:
        """The file server answers after a minute."""
        written = write(self, text)
        monkeypatch.setattr(doctor.time, "time", lambda: real() + 60)
        return written

    monkeypatch.setattr(Path, "write_text", slowly)
    assert doctor._write_test(tmp_path / "x", Nodes()) == ([], 0.0)


def report(node: str, clock: float = 0.0, **versions: str) -> dict[str, object]:
    return {
        "node": node,
        "faults": [],
        "clock_s": clock,
        "versions": {"torch": "2.13.0", "python": "3.11.2", **versions},
    }


def test_a_recipe_for_gpus_where_torch_has_no_nccl(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU build of torch, and no model either: both are named."""
    monkeypatch.setenv("STEPKTO_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    recipe = read_recipe(repository / "recipes" / "llama3.1_8b_8xh100.yaml", [f"output={tmp_path}"])
    faults = " ".join(doctor.doctor(Run(recipe)))
    assert "torch sees 0 GPUs, the layout needs 8" in faults
    assert f"initial_model: expected a Hugging Face folder, found none at {tmp_path}/models/Llama" in faults


def test_nodes_that_disagree() -> None:
    assert doctor.disagreements([report("n1"), report("n2")]) == []
    assert one(doctor.disagreements([report("n1"), report("n2", torch="2.12.1")])).startswith(
        "n2: torch is 2.12.1, on n1 it is 2.13.0; "
    )
    assert one(doctor.disagreements([report("n1", apex="1"), report("n2")])).startswith("n2: apex is absent, on n1")
    assert one(doctor.disagreements([report("n1", -4), report("n2", 4.5)])).startswith("n2: clock is +8 s from n1's")


def test_a_node_that_does_not_see_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEET_S", 0.5)
    write_json(tmp_path / "node-0.json", report("n1"))
    seen = doctor._meet(tmp_path, 2)
    assert one(doctor._unseen(tmp_path, seen, 2)).startswith(
        f"only 1 of 2 nodes (n1) are seen in {tmp_path} after 0 s: "
    )


def test_ranks_that_cannot_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, of which the other never comes: the line names the logs and what to look at."""
    monkeypatch.setattr(doctor, "ALL_REDUCE_S", 3.0)
    nodes = Nodes(number=1, count=2, address="127.0.0.1", port=29, attempt="x")  # where nobody listens
    fault = one(doctor._all_reduce(tmp_path, nodes, 1, on_gpu=False))
    assert "all-reduce over 2 ranks failed" in fault
    assert f"logs: {tmp_path}" in fault
