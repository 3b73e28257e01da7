"""What a cluster does to jobs: each ends as promised, with the numbers of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_stepkto.base.files import sha256_of
from tests.slurm.cluster import Cluster, stepkto, write_site
from tests.slurm.runs import LIMIT_S, arguments, copy_without, lines, number, state, updates_saved

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def steps_of(run: Path, stage: str) -> Iterator[psutil.Process]:
    """The ``stepkto`` processes that Slurm started for a stage of this run."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if stage in words and str(run / "slurm" / "recipe.yaml") in words and "python" in words[0]:
            yield process


def ranks_of(run: Path) -> list[psutil.Process]:
    words = {"megatron_stepkto.training.entry", str(run / "iteration_1" / "train" / "job.json")}
    found = [p for p in psutil.process_iter(["cmdline", "ppid"]) if words <= set(p.info["cmdline"] or [])]
    numbers = {process.pid for process in found}
    return [process for process in found if process.info["ppid"] not in numbers]  # not what they fork to write files


@pytest.mark.long
def test_time_limit_requeue_and_lost_node_in_mid_training(
    cluster: Cluster, undisturbed: Path, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    site = write_site(tmp_path / "site.sh", repository, python_bin, STOP_LEAD="15")
    run = copy_without(undisturbed, tmp_path, ["train", "convert"])
    submitted = stepkto(
        ["slurm", "submit", *arguments(repository, tmp_path), f"--site={site}"], python_bin, tmp_path,
        cluster.environment,
    )  # fmt: skip
    names = {line.split()[1]: line.split()[2] for line in submitted.splitlines()}
    assert names == {
        "prepare": "done", "sample_1": "done", "judge_1": "done", "dataset_1": "done",
        "train_1": "submitted", "convert_1": "submitted", "finish": "submitted",
    }  # fmt: skip
    job, log = number(cluster, run, "train_1"), run / "slurm" / "logs" / "train_1.log"
    attempts = run / "slurm" / "attempts" / "train_1"

    # 1. the time limit, brought near when the training is under way. Slurm's limits are whole minutes, and it looks
    # at them seldom: the ranks are held meanwhile, or a fast machine would be done before the signal comes.
    cluster.wait(lambda: updates_saved(run) >= 2, 150, "first updates")
    held = ranks_of(run)
    assert len(held) == 2
    for rank in held:
        rank.suspend()
    parts = cluster.ask("squeue", "-h", "-j", job, "-o", "%M").strip().split(":")
    minutes = int(parts[-2]) + (1 if int(parts[-1]) < 40 else 2)
    cluster.ask("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")
    cluster.wait(lambda: "told to stop" in log.read_text(), 150, "signal before the time limit")
    for rank in held:
        rank.resume()
    cluster.wait(lambda: state(cluster, job) == {"PENDING"}, 120, "requeue after the time limit")
    cluster.ask("scontrol", "update", f"jobid={job}", "TimeLimit=20")
    assert "saved and stopped" in log.read_text()
    assert "interrupted; finished work is kept" in log.read_text()
    saved = updates_saved(run)
    assert 0 < saved < 128, "told when nothing or everything was done: the test shows nothing"

    # 2. scontrol requeue
    cluster.wait(lambda: len(lines(attempts)) == 2 and updates_saved(run) > saved + 1, 150, "second attempt")
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(lambda: state(cluster, job) == {"PENDING"}, 120, "requeue")
    saved = updates_saved(run)

    # 3. a node goes down
    cluster.wait(lambda: len(lines(attempts)) == 3 and updates_saved(run) > saved + 1, 150, "third attempt")
    cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(lambda: state(cluster, job) == {"PENDING"}, 120, "requeue after the loss of a node")
    saved = updates_saved(run)
    assert saved < 128

    def back() -> bool:
        """Slurm refuses to resume a node that still ends a job's processes, or that came back by itself."""
        if "down" not in cluster.ask("sinfo", "-h", "-n", "n2", "-o", "%t"):
            return True
        cluster.ask("scontrol", "update", "nodename=n2", "state=resume")
        return True

    cluster.wait(back, 120, "node")

    # 4. it goes on at another number of nodes: both ranks on one
    cluster.wait(lambda: len(lines(attempts)) == 4 and updates_saved(run) > saved + 1, 150, "fourth attempt")
    stepkto(["slurm", "cancel", str(run)], python_bin, tmp_path, cluster.environment)
    write_site(site, repository, python_bin, STOP_LEAD="15", TRAIN_NODES="1")
    stepkto(  # at once: the job still saves
        ["slurm", "submit", *arguments(repository, tmp_path), f"--site={site}"], python_bin, tmp_path,
        cluster.environment,
    )  # fmt: skip
    assert state(cluster, job) == {"CANCELLED"}
    assert "=== train_1: cancelled\n" in log.read_text(), "saved, and not put back into the queue"

    finish = number(cluster, run, "finish")
    cluster.wait(lambda: state(cluster, finish) == {"COMPLETED"}, LIMIT_S, "end of the run")
    nodes = [line.split()[-1] for line in lines(attempts)]
    assert nodes[:4] == ["n[1-2]"] * 4
    assert nodes[4:] in (["n1"], ["n2"])
    assert "all-reduce of 8 MiB over 2 ranks on 1 node," in log.read_text()
    assert not (run / "slurm" / "failures" / "train_1").exists(), "none of these is the job's own fault"
    rows = [json.loads(line)["update"] for line in lines(run / "iteration_1" / "train" / "metrics.jsonl")]
    assert rows == list(range(1, 129)), "each update once"
    weights = Path("iteration_1/convert/model/model.safetensors")
    assert sha256_of(run / weights) == sha256_of(undisturbed / weights)
    assert (run / "report.html").is_file()


@pytest.mark.long
def test_sampling_requeued_and_killed_then_a_stage_that_fails(
    cluster: Cluster, undisturbed: Path, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    site = write_site(tmp_path / "site.sh", repository, python_bin)
    broken = tmp_path / "bin" / "stepkto"
    broken.parent.mkdir()
    broken.write_text(
        f'#!/bin/bash\nif [[ $1 == judge ]]; then echo "the judge is broken"; exit 3; fi\n'
        f'exec {python_bin}/stepkto "$@"\n'
    )
    broken.chmod(0o755)
    with site.open("a") as file:
        file.write(f"environment() {{ export PATH={broken.parent}:{python_bin}:$PATH PYTHONPATH={repository}; }}\n")
    run = copy_without(undisturbed, tmp_path, ["sample", "judge", "dataset", "train", "convert"])
    stepkto(
        ["slurm", "submit", *arguments(repository, tmp_path), f"--site={site}"], python_bin, tmp_path,
        cluster.environment,
    )  # fmt: skip
    chunks = run / "iteration_1" / "sample" / "chunks"
    array = number(cluster, run, "sample_1")

    def drawn() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in chunks.glob("samples-*.jsonl")}

    cluster.wait(lambda: len(drawn()) >= 2 and len(list(steps_of(run, "sample"))) == 2, 150, "both elements drawing")
    # element 1 breaks: its process is killed. It alone starts again, though its job id is the array's own number
    attempts, failures = run / "slurm" / "attempts", run / "slurm" / "failures"
    for process in steps_of(run, "sample"):
        if process.environ().get("SLURM_ARRAY_TASK_ID") == "1":
            os.kill(process.pid, signal.SIGKILL)
    cluster.wait(lambda: "back into the queue" in (run / "slurm/logs/sample_1.1.log").read_text(), 60, "failure")
    time.sleep(1)
    assert state(cluster, f"{array}_0") == {"RUNNING"}
    assert len(lines(attempts / "sample_1.0")) == 1
    # element 0 is requeued
    cluster.ask("scontrol", "requeue", f"{array}_0")
    before = drawn()
    kept: dict[str, int] = {}

    def finished() -> bool:
        kept.update({name: stamp for name, stamp in drawn().items() if name in before})
        return (run / "iteration_1" / "sample" / "manifest.json").is_file()

    cluster.wait(finished, 200, "end of sampling")
    assert kept.items() >= before.items(), "what was drawn is not drawn again"
    sampled = Path("iteration_1/sample/samples.jsonl")
    assert sha256_of(run / sampled) == sha256_of(undisturbed / sampled)
    cluster.wait(lambda: state(cluster, array) == {"COMPLETED"}, 120, "end of both elements")
    assert len(lines(attempts / "sample_1.0")) == 2
    assert len(lines(attempts / "sample_1.1")) == 2
    assert not (failures / "sample_1.0").exists(), "a requeue is no failure"
    assert len(lines(failures / "sample_1.1")) == 1

    # the judge fails three times, then the chain ends
    cluster.wait(lambda: (failures / "judge_1.stopped").is_file(), 200, "end of a stage that always fails")
    assert len(lines(failures / "judge_1")) == 3
    assert len(lines(attempts / "judge_1")) == 3
    log = run / "slurm" / "logs" / "judge_1.log"
    assert log.read_text().count("the judge is broken") == 3
    assert f"failed 3 times (exit code 3). The chain stops here. Log: {log}" in log.read_text()
    mine = f"stepkto-{run.name}"
    waiting = ["squeue", "-h", "-t", "pending,running", "-o", "%j|%k"]
    cluster.wait(
        lambda: not any(str(run) in line and mine in line for line in cluster.ask(*waiting).splitlines()), 60,
        "end of what depends on it",
    )  # fmt: skip
    shown = stepkto(["slurm", "status", str(run)], python_bin, tmp_path, cluster.environment)
    [line] = [line for line in shown.splitlines() if "judge_1" in line]
    assert "stopped" in line
    assert str(log) in line
    assert not (run / "iteration_1" / "dataset").exists()

    # corrected and submitted again, it resumes after the samples
    write_site(site, repository, python_bin)
    again = stepkto(
        ["slurm", "submit", *arguments(repository, tmp_path), f"--site={site}"], python_bin, tmp_path,
        cluster.environment,
    )  # fmt: skip
    how = {line.split()[1]: line.split()[2] for line in again.splitlines()}
    assert how["sample_1"] == "done"
    assert how["judge_1"] == "submitted"
    cluster.wait((run / "iteration_1" / "judge" / "manifest.json").is_file, 120, "judge")
    stepkto(["slurm", "cancel", str(run)], python_bin, tmp_path, cluster.environment)


def test_doubled_submission_and_cancelling_only_ones_own(
    cluster: Cluster, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    site = write_site(tmp_path / "site.sh", repository, python_bin)
    with site.open("a") as file:
        file.write("SBATCH_EXTRA=(--begin=now+3600)\n")  # nothing of it runs
    foreign = cluster.ask("sbatch", "--parsable", "--begin=now+3600", "--job-name=stepkto-mini_cpu-x", "--wrap=true")
    command = [
        sys.executable, "-m", "megatron_stepkto", "slurm", "submit", *arguments(repository, tmp_path), f"--site={site}",
    ]  # fmt: skip
    environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(repository)}
    running = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    graphs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    numbers = [[line.split()[0] for line in graph.splitlines()] for graph in graphs]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 7
    run = tmp_path / "mini_cpu"

    def mine() -> list[str]:
        listed = cluster.ask("squeue", "-h", "-t", "pending,running", "-o", "%F|%k").splitlines()
        return [line.split("|")[0] for line in listed if line.endswith(str(run))]

    assert sorted(mine()) == sorted(numbers[0])
    # another recipe under the same name is refused while these wait
    refused = subprocess.run(
        [*command, "--set=seed=5"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "in the queue with another recipe (different: seed)" in " ".join(refused.stderr.split())
    # one job goes lost: it and what waits for it are made again, the rest is kept
    cluster.ask("scancel", numbers[0][3])
    cluster.wait(lambda: numbers[0][3] not in mine(), 30, "end of that job")
    third = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    how = {line.split()[1]: line.split()[2] for line in third.splitlines()}
    assert [name for name, word in how.items() if word == "in"] == ["prepare", "sample_1", "judge_1"]
    assert [name for name, word in how.items() if word == "submitted"] == [
        "dataset_1",
        "train_1",
        "convert_1",
        "finish",
    ]
    cluster.wait(lambda: len(mine()) == 7, 30, "seven jobs, none twice")

    said = stepkto(["slurm", "cancel", str(run)], python_bin, tmp_path, cluster.environment)
    assert said.startswith("cancelled: ")
    cluster.wait(lambda: not mine(), 30, "cancelling")
    assert state(cluster, foreign.strip()) == {"PENDING"}
    cluster.ask("scancel", foreign.strip())
