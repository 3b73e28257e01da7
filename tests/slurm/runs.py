"""The small run of the fault tests: how it is made, and what is seen of it from outside."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_stepkto.base.files import read_json
from tests.slurm.cluster import Cluster

LIMIT_S = 1200  # of processes on this machine, which may be busy
SETTINGS = {
    "iterations": 1, "problems.per_iteration": 16, "sample.num_samples": 4, "sample.chunk_problems": 1,
    "sample.workers": 1, "sample.backend": "transformers", "train.global_batch_size": 1,
    "train.checkpoint_every": 1, "train.epochs": 2, "evaluate": "null",
}  # fmt: skip


def arguments(repository: Path, output: Path) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in {**SETTINGS, "output": output}.items()]
    return [str(repository / "recipes" / "mini_cpu.yaml"), *sets]


def copy_without(run: Path, output: Path, stages: list[str]) -> Path:
    """A run that got as far as before ``stages`` of its first iteration."""
    copy = output / "mini_cpu"
    shutil.copytree(run, copy)
    for stage in stages:
        shutil.rmtree(copy / "iteration_1" / stage)
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()
    return copy


def number(cluster: Cluster, run: Path, stage: str) -> str:
    return str(read_json(run / "slurm" / "jobs.json")[stage]["job"])


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def updates_saved(run: Path) -> int:
    saved = (run / "iteration_1" / "train" / "checkpoints").glob("update_*/state.json")
    return max((int(path.parent.name.removeprefix("update_")) for path in saved), default=0)


def state(cluster: Cluster, job: str) -> set[str]:
    return set(cluster.ask("squeue", "-h", "-t", "all", "-r", "-j", job, "-o", "%T").split())
