"""Stages in containers, and the judge's own server, through what can befall it.

Neither Apptainer nor Pyxis can be installed here: ``stand_ins`` enter a real other root for them, so that what a
container sees, its environment, its signals and its exit codes are real; that the true programs behave as their
manuals say is not shown.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import psutil
import pytest

from megatron_stepkto.base.files import read_json
from tests.end_to_end.test_judges_vllm import COMPACT, SERVER_ENV, server_command, write_chat_model
from tests.slurm.cluster import Cluster, free_ports, stepkto, write_site
from tests.slurm.environments import WITHOUT, installed, make_environment
from tests.slurm.runs import arguments, copy_without, lines, number, state, updates_saved

pytestmark = [pytest.mark.slurm, pytest.mark.vllm, pytest.mark.distributed, pytest.mark.long]
STAND_INS = Path(__file__).parent / "stand_ins"


def write_image(folder: Path, kind: str, repository: Path) -> Path:
    """An image for the stand-ins: this system and an environment, a command stepkto that notes where it ran."""
    image = folder / kind
    binaries, environment = image / "root" / "bin", folder / f"venv-{kind}"
    binaries.mkdir(parents=True)
    make_environment(environment, kind, repository)
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc"]
    contents = [*system, repository, sys.prefix, sys.base_prefix, *installed(), environment]
    found = [str(path) for path in contents if os.path.exists(path)]
    image.joinpath("contents").write_text("\n".join(found))
    program = binaries / "stepkto"
    program.write_text(
        f'#!/bin/bash\necho "$1 {kind} $SAID $PWD" >>"${{2%/*}}/ran_in"\nexec {environment}/bin/stepkto "$@"\n'
    )
    program.chmod(0o755)
    return image


def write_server(image: Path, starts: Path, model: Path, port: int, repository: Path, python_bin: Path) -> None:
    """The program judge-server of an image: it dies, loads for ever, is slow, is a real vLLM, then is slow again."""
    variables = "\n".join(f"export {name}={value}" for name, value in SERVER_ENV.items())
    vllm = shlex.join(server_command(model, port, "--structured-outputs-config", COMPACT))
    program = image / "root" / "bin" / "judge-server"
    program.write_text(
        f"""#!/bin/bash
echo start >>{starts}
case $(wc -l <{starts}) in
1) echo "no room for the weights"; exit 9 ;;
2) exec sleep 500 ;;
4) ;;
*) cd {repository}; exec {python_bin}/python -m tests.slurm.slow_judge {port} ;;
esac
{variables}
exec {vllm}
"""
    )
    program.chmod(0o755)


def kill(*words: str) -> None:
    found = [p for p in psutil.process_iter(["cmdline"]) if set(words) <= set(p.info["cmdline"] or [])]
    assert found, words
    for process in found:
        os.kill(process.pid, signal.SIGKILL)


def test_a_run_in_containers_whose_judge_has_a_server_of_its_own(
    cluster: Cluster, undisturbed: Path, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    run = copy_without(undisturbed, tmp_path, ["judge", "dataset", "train", "convert"])
    images = {kind: write_image(tmp_path / "images", kind, repository) for kind in WITHOUT}
    model, [port] = tmp_path / "judge model", free_ports(1)
    model.mkdir()
    write_chat_model(model)
    write_server(images["sample"], tmp_path / "starts", model, port, repository, python_bin)
    url = f"http://127.0.0.1:{port}/v1"

    def site(container: str) -> Path:
        path = write_site(
            tmp_path / "site.sh", repository, python_bin, CONTAINER=container, IMAGE_TRAIN=str(images["train"]),
            IMAGE_SAMPLE=str(images["sample"]), MOUNTS=f"{tmp_path},{repository}", JUDGE_SERVER="(judge-server)",
            JUDGE_URL=url,
        )  # fmt: skip
        with path.open("a") as file:
            # as `module load` would do; and the environment of the example for images that hold everything
            file.write(f"export PATH={STAND_INS if container == 'enroot' else tmp_path}:$PATH\n")
            file.write("environment() { export SAID=$1-$CONTAINER; }\n")
        return path

    (tmp_path / "apptainer").symlink_to(STAND_INS / "apptainer")  # alone: srun is Slurm's
    recipe = [
        *arguments(repository, tmp_path), "--set=train.global_batch_size=4",
        f"--set=judge.process={{kind: llm, base_url: '{url}', model: judge, max_tokens: 800, comment_chars: 0, "
        "concurrency: 2}", "--set=evaluate={split: test, num_problems: 4, k: 2}",
    ]  # fmt: skip
    submit = ["slurm", "submit", *recipe, f"--site={tmp_path / 'site.sh'}"]
    site("apptainer")
    stepkto(submit, python_bin, tmp_path, cluster.environment)
    # all nodes are this host: two servers at a time would meet at one address
    cluster.ask("scontrol", "hold", number(cluster, run, "evaluate_0"))
    job, logs = number(cluster, run, "judge_1"), run / "slurm" / "logs"
    attempts, failures = (run / "slurm" / name / "judge_1" for name in ("attempts", "failures"))
    starts, log, server_log = tmp_path / "starts", logs / "judge_1.log", logs / "judge_server_1.log"

    # 1. the server dies while it loads
    cluster.wait(lambda: len(lines(failures)) == 1, 100, "first failure")
    assert f"error: the judge server has ended; its log: {server_log}" in log.read_text()
    assert "no room for the weights" in server_log.read_text()
    # 2. the job is told to stop while it waits for the server
    cluster.wait(lambda: len(lines(starts)) == 2, 100, "second start of the server")
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(lambda: "interrupted; finished work is kept" in log.read_text(), 30, "end of the wait for the server")
    # 3. the server is lost when some is judged: the judge would wait for it, and the job ends it
    verdicts = run / "iteration_1" / "judge" / "cache" / "verdicts.jsonl"
    cluster.wait(lambda: len(lines(verdicts)) >= 4, 150, "verdicts")
    kill("tests.slurm.slow_judge", str(port))
    cluster.wait(lambda: len(lines(failures)) == 2, 100, "second failure")
    assert log.read_text().count(f"error: the judge server has ended; its log: {server_log}") == 2
    assert "exit 1 " in lines(failures)[1]
    known = len(lines(verdicts))
    # 4. a real vLLM judges the rest
    cluster.wait((run / "iteration_1" / "judge" / "manifest.json").is_file, 240, "judge")
    counts = read_json(run / "iteration_1" / "judge" / "manifest.json")["counts"]["judge"]
    assert counts["cached"] >= known >= 4
    assert counts["answered"] == len(lines(verdicts)) - known > 30
    assert "failed" not in counts
    assert len(lines(attempts)) == len(lines(starts)) == 4
    cluster.wait(lambda: state(cluster, job) == {"COMPLETED"}, 60, "end of the judge's job")
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(port) in (p.info["cmdline"] or [])], "server ended"

    # two nodes train in containers; a signal goes through to the ranks, their exit code comes back
    job, log = number(cluster, run, "train_1"), logs / "train_1.log"
    cluster.wait(lambda: updates_saved(run) >= 2, 150, "first updates")
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(lambda: "interrupted; finished work is kept" in log.read_text(), 60, "end of the attempt")
    assert "saved and stopped" in log.read_text()
    saved = updates_saved(run)
    assert 2 <= saved < 32
    # the rest with Pyxis
    stepkto(["slurm", "cancel", str(run)], python_bin, tmp_path, cluster.environment)
    site("enroot")
    stepkto(submit, python_bin, tmp_path, cluster.environment)
    cluster.ask("scontrol", "hold", number(cluster, run, "evaluate_1"))
    cluster.wait((run / "evaluate" / "M0" / "manifest.json").is_file, 240, "first evaluation")
    cluster.ask("scontrol", "release", number(cluster, run, "evaluate_1"))
    cluster.wait((run / "report.html").is_file, 240, "end of the run")
    # an evaluation draws first, then starts the server, which judges
    assert len(lines(starts)) == 6
    for t in (0, 1):
        rows = [json.loads(line) for line in lines(run / "evaluate" / f"M{t}" / "sampled.jsonl")]
        assert [row["judge"]["process"] for row in rows] == ["llm:judge"] * 8
        assert {step["label"] for row in rows for step in row["steps"]} == {1}
        assert len(lines(run / "slurm" / "attempts" / f"evaluate_{t}")) == 1
        assert ", server: judge-server\n" in (logs / f"evaluate_server_{t}.log").read_text()
    assert f"resuming after update {saved}" in log.read_text()
    assert len(lines(run / "iteration_1" / "train" / "metrics.jsonl")) == 32
    ran = [tuple(line.split()) for line in lines(run / "slurm" / "ran_in")]
    here = str(tmp_path)
    assert ran.count(("evaluate", "sample", "sample-enroot", here)) == 4
    assert set(ran) == {
        ("prepare", "train", "train-apptainer", here), ("evaluate", "sample", "sample-enroot", here),
        ("judge", "sample", "sample-apptainer", here), ("dataset", "train", "train-apptainer", here),
        *[(stage, "train", f"train-{name}", here) for stage in ("doctor", "train") for name in ("apptainer", "enroot")],
        ("export", "train", "train-enroot", here), ("run", "sample", "sample-enroot", here),
    }  # fmt: skip
