"""The demo's recipe, two iterations, through sbatch on two nodes, in two environments: the numbers of the local run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.files import sha256_of
from tests.slurm.cluster import Cluster, stepkto, write_site
from tests.slurm.environments import make_environment
from tests.slurm.runs import LIMIT_S

pytestmark = [pytest.mark.slurm, pytest.mark.vllm, pytest.mark.distributed]
SMALL = {
    "iterations": 2, "problems.per_iteration": 16, "sample.num_samples": 4, "sample.chunk_problems": 4,
    "sample.workers": 1, "train.global_batch_size": 16, "evaluate.num_problems": 20, "evaluate.k": 4,
}  # fmt: skip


def sets(output: Path) -> list[str]:
    return [f"--set={key}={value}" for key, value in SMALL.items()] + [f"--set=output={output}"]


def rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "summary.json").read_text())["iterations"]


def test_two_iterations_on_two_nodes_equal_the_local_run(cluster: Cluster, tmp_path: Path, repository: Path) -> None:
    """Each job finds in its environment what it needs, also where it gets nothing of the shell that submits."""
    bins = {kind: make_environment(tmp_path / f"venv-{kind}", kind, repository) for kind in ("train", "sample")}
    site = write_site(tmp_path / "site.sh", repository, bins["train"], SBATCH_EXTRA="(--export=NONE)")
    with site.open("a") as file:
        file.write(f'environment() {{ source "{tmp_path}/venv-$1/bin/activate"; }}\n')
    python_bin = bins["sample"]  # where `submit` runs, which trains nothing
    recipe = str(repository / "recipes" / "mini_cpu.yaml")
    submitted = stepkto(
        ["slurm", "submit", recipe, *sets(tmp_path / "jobs"), f"--site={site}"],
        python_bin, tmp_path, cluster.environment,
    )  # fmt: skip
    graph = {line.split()[1]: line for line in submitted.splitlines()}
    assert list(graph) == [
        "prepare", "evaluate_0", "sample_1", "judge_1", "dataset_1", "train_1", "convert_1", "evaluate_1",
        "sample_2", "judge_2", "dataset_2", "train_2", "convert_2", "evaluate_2", "finish",
    ]  # fmt: skip
    job = {name: int(line.split()[0]) for name, line in graph.items()}
    assert graph["sample_2"].endswith(f"after convert_1 {job['convert_1']}")
    assert graph["finish"].endswith(", ".join(f"evaluate_{t} {job[f'evaluate_{t}']}" for t in range(3)))
    assert len(set(job.values())) == 15

    # a second submission, while the first is in the queue, adds nothing
    again = stepkto(
        ["slurm", "submit", recipe, *sets(tmp_path / "jobs"), f"--site={site}"],
        python_bin, tmp_path, cluster.environment,
    )  # fmt: skip
    for line in again.splitlines():
        number, name, *how = line.split()
        assert how[0] == "done" if number == "-" else int(number) == job[name]
    assert "submitted" not in again

    local = subprocess.Popen(
        [sys.executable, "-m", "megatron_stepkto", "run", recipe, *sets(tmp_path / "local")],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = local.communicate(timeout=LIMIT_S)[1]
    assert local.returncode == 0, said
    run, other = tmp_path / "jobs" / "mini_cpu", tmp_path / "local" / "mini_cpu"

    def over() -> bool:
        states = dict(cluster.jobs("mini_cpu-finish"))
        bad = [(n, s) for n, s in cluster.jobs("") if s in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")]
        if bad:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in run.glob("slurm/logs/*.log"))
            raise RuntimeError(f"{bad}\n{logs}")
        return set(states.values()) == {"COMPLETED"}

    cluster.wait(over, LIMIT_S, "end of the chain")
    assert rows(run) == rows(other)
    assert len(rows(run)) == 3
    for part in (
        "iteration_1/sample/samples.jsonl", "iteration_1/judge/judged.jsonl",
        "iteration_1/dataset/train/examples.arrow",
        "iteration_1/convert/model/model.safetensors", "iteration_2/convert/model/model.safetensors",
        "evaluate/M2/sampled.jsonl",
    ):  # fmt: skip
        assert sha256_of(run / part) == sha256_of(other / part), part
    assert (run / "report.html").is_file()

    # two elements of the array, two launchers on two nodes, a preflight on both
    assert sorted(path.name for path in (run / "slurm" / "attempts").glob("sample_1.*")) == ["sample_1.0", "sample_1.1"]
    log = (run / "slurm" / "logs" / "train_1.log").read_text()
    assert "attempt 1, job" in log
    assert "n[1-2]" in log
    assert "all-reduce of 8 MiB over 2 ranks on 2 nodes, gloo" in log
    assert "no fault found" in log
    ranks = sorted(path.name for path in (run / "iteration_1" / "train" / "logs").glob("rank-*.log"))
    assert ranks == ["rank-0.log", "rank-1.log"]

    shown = stepkto(["slurm", "status", str(run)], python_bin, tmp_path, cluster.environment)
    assert [line.split()[2] for line in shown.splitlines()[1:]] == ["done"] * 15
    assert stepkto(["slurm", "cancel", str(run)], python_bin, tmp_path, cluster.environment).endswith(
        "no job is in the queue\n"
    )
