"""The chain's graph and flags, and recipes for real models through --dry-run. No Slurm is needed."""

from __future__ import annotations

import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import write_json
from megatron_stepkto.cli.main import main
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.slurm.chain import Step, chain, command, folder, is_finished
from megatron_stepkto.slurm.checks import check_site
from megatron_stepkto.slurm.commands import _state
from megatron_stepkto.slurm.queue import Queued, comment
from megatron_stepkto.slurm.site import read_site
from tests.builders import evaluation_row
from tests.slurm.cluster import free_ports

JUDGES_OF_REAL = {  # GPUs of the judge's job, and whether it starts a server
    "llama3.1_8b_8xh100": (8, False),
    "qwen2.5_math_7b_8xh100": (8, False),
    "qwen2.5_1.5b_1xh200_smoke": (1, False),
    "llama3.3_70b_64xh100_fp8": (8, True),
    "llama3.1_8b_lora_1xh100": (1, False),
    "llama3.1_8b_offload_1xh100": (1, False),
    "llama3.3_70b_lora_8xh100": (8, False),
    "qwen3_30b_a3b_16xh100": (8, False),
}


def test_graph_of_two_iterations(site: Path, repository: Path, tmp_path: Path) -> None:
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", ["iterations=2", f"output={tmp_path}"])
    steps = {step.name: step for step in chain(recipe, read_site(site))}
    assert {name: step.after for name, step in steps.items()} == {
        "prepare": [], "evaluate_0": ["prepare"],
        "sample_1": ["prepare"], "judge_1": ["sample_1"], "dataset_1": ["judge_1"], "train_1": ["dataset_1"],
        "convert_1": ["train_1"], "evaluate_1": ["convert_1"],
        "sample_2": ["convert_1"], "judge_2": ["sample_2"], "dataset_2": ["judge_2"], "train_2": ["dataset_2"],
        "convert_2": ["train_2"], "evaluate_2": ["convert_2"],
        "finish": ["evaluate_0", "evaluate_1", "evaluate_2"],
    }  # fmt: skip
    ends = read_recipe(
        repository / "recipes" / "mini_cpu.yaml",
        ["iterations=2", f"output={tmp_path}", "evaluate.models=first_and_last"],
    )
    measured = {step.name: step.after for step in chain(ends, read_site(site)) if step.name.startswith(("ev", "fi"))}
    assert measured == {"evaluate_0": ["prepare"], "evaluate_2": ["convert_2"], "finish": ["evaluate_0", "evaluate_2"]}
    run = recipe.run_dir
    write_json(run / "summary.json", {"recipe": "x", "iterations": [evaluation_row(name) for name in ("M0", "M1")]})
    (run / "report.html").touch()
    assert not is_finished(ends), "a summary of an earlier end: M1, not M2"
    write_json(run / "summary.json", {"recipe": "x", "iterations": [evaluation_row(name) for name in ("M0", "M2")]})
    assert is_finished(ends)
    assert not is_finished(recipe)
    assert not steps["judge_1"].is_done
    write_json(run / "iteration_1" / "judge" / "manifest.json", {})
    assert steps["judge_1"].is_done


def test_flags(site: Path, repository: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "train.parallel.ranks=16", "sample.workers=4"]
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", overrides)
    read = read_site(site)
    steps = {step.name: step for step in chain(recipe, read)}
    train = command(steps["train_1"], recipe.run_dir, read, [17], tmp_path)
    assert train[:2] == ["sbatch", "--parsable"]
    for flag in (
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96", "--partition=h100", "--requeue",
        "--signal=B:USR1@30", "--open-mode=append", "--dependency=afterok:17", "--kill-on-invalid-dep=yes",
        f"--comment={comment(recipe.run_dir, 'train_1')}", f"--output={recipe.run_dir}/slurm/logs/train_1.log",
    ):  # fmt: skip
        assert flag in train, flag
    script, arguments = train[-4], train[-3:]
    assert script == f"{repository}/slurm/train.sbatch"
    assert arguments == [f"{recipe.run_dir}/slurm/site.sh", str(recipe.run_dir), "1"]
    sample = command(steps["sample_1"], recipe.run_dir, read, [1], tmp_path)
    for flag in ("--array=0-2", "--gpus-per-node=4", "--cpus-per-task=48"):
        assert flag in sample, flag
    assert f"--output={recipe.run_dir}/slurm/logs/sample_1.%a.log" in sample
    judge = command(steps["judge_1"], recipe.run_dir, read, [1], tmp_path)
    assert "--partition=cpu only" in judge
    assert not any("gpus" in flag for flag in judge)


@pytest.mark.parametrize(
    ("nodes", "changes", "said"),
    [
        (
            "3",
            [],
            "ranks=16: expected the same number on each of 3 nodes, at most 8 (GPUS_PER_NODE); change TRAIN_",
        ),
        (
            "\nGPUS_PER_NODE=0",
            ["train.device=cuda"],
            "train.device is cuda, and GPUS_PER_NODE is 0; set it in the site",
        ),
        ("\nGPUS_PER_NODE=0", ["train.dtype=bfloat16", "train.fp8={}"], "train.fp8 needs an NVIDIA GPU, but training"),
        ("1", [], "train.parallel.ranks=16: expected the same number on each of 1 nodes, at most 8"),
        ("", ["sample.workers=5", "sample.tensor_parallel=2"], "expected at most 8 (GPUS_PER_NODE), got 10; lower"),
        (
            "",
            ["judge.process={kind: monte_carlo, sample: {max_tokens: 9, workers: 3, tensor_parallel: 3}}"],
            "judge.process.sample.workers x judge.process.sample.tensor_parallel: expected at most 8 (GPUS_PER_NODE), "
            "got 9; lower judge.process.sample.workers: the judge's job has one node",
        ),
    ],
)
def test_ranks_and_engines_that_do_not_fit(
    site: Path, repository: Path, tmp_path: Path, nodes: str, changes: list[str], said: str
) -> None:
    with site.open("a") as file:
        file.write(f"TRAIN_NODES={nodes}\n")
    overrides = [f"output={tmp_path}", "train.parallel.ranks=16", *changes]
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", overrides)
    with pytest.raises(UserError, match=re.escape(said)):
        check_site(recipe, read_site(site))


JUDGES = {
    "equations": ("cpu only", None, False),
    "{kind: llm, base_url: 'http://127.0.0.1:8000/v1', model: m}": ("h100", 8, True),
    "{kind: llm, base_url: 'http://elsewhere:8000/v1', model: m}": ("cpu only", None, False),
    "{kind: llm, base_url: 'http://elsewhere:8000/v1, http://127.0.0.1:8000/v1/', model: m}": ("h100", 8, True),
    "{kind: prm, base_url: 'http://127.0.0.1:8000/v1/', model: m, convention: qwen_math_prm}": ("h100", 8, True),
    "{kind: prm, model: m, convention: qwen_math_prm, workers: 2}": ("h100", 2, False),
    "{kind: monte_carlo, sample: {max_tokens: 9, workers: 2, tensor_parallel: 2}}": ("h100", 4, False),
}


@pytest.mark.parametrize("judge", JUDGES)
def test_where_a_judge_runs(site: Path, repository: Path, tmp_path: Path, judge: str) -> None:
    """partition, GPUs, and whether it starts the server that it asks."""
    with site.open("a") as file:
        file.write("JUDGE_SERVER=(vllm serve m)\n")
    recipe = read_recipe(
        repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}", "judge.split=line", f"judge.process={judge}"]
    )
    read = read_site(site)
    steps = {step.name: step for step in chain(recipe, read)}
    partition, gpus, server = JUDGES[judge]
    # an evaluation judges, too: on the same GPUs, after the engine of two GPUs that draws
    words = command(steps["evaluate_1"], recipe.run_dir, read, [], tmp_path)
    assert [word for word in words if "gpus" in word] == [f"--gpus-per-node={max(2, gpus or 0)}"]
    assert steps["evaluate_1"].arguments == (["1", "server"] if server else ["1"])
    assert steps["evaluate_0"].arguments == (["0", "server"] if server else ["0"])
    step = steps["judge_1"]
    words = command(step, recipe.run_dir, read, [], tmp_path)
    assert f"--partition={partition}" in words
    assert [word for word in words if "gpus" in word] == ([f"--gpus-per-node={gpus}"] if gpus else [])
    assert step.arguments == (["1", "server"] if server else ["1"])
    assert "--time=10" in words


@pytest.mark.parametrize(
    ("given", "added", "said"),
    [
        ("JUDGE_SERVER=()", "judge.process.base_url=http://localhost:8000/v1",
         "http://localhost:8000/v1: the judge job must start the server at this address, but JUDGE_SERVER is"),
        ("JUDGE_SERVER=(vllm serve m)", "judge.process.base_url=http://localhost:8000/v1",
         "but JUDGE_URL is http://127.0.0.1:8000/v1; in the site file set JUDGE_SERVER, and JUDGE_URL to the recipe's"),
        ("JUDGE_SERVER=()", "judge.process.base_url='http://node7:8000/v1,http://localhost:8000/v1'",
         "http://localhost:8000/v1: the judge job must start the server at this address, but JUDGE_SERVER is"),
        ("JUDGE_SERVER=(vllm serve m)", "judge.process.base_url='http://127.0.0.1:8000/v1,http://127.0.0.1:8001/v1'",
         "base_url: http://127.0.0.1:8001/v1: the judge job must start the server at this address, but JUDGE_URL is"),
        ("JUDGE_SERVER=()", "initial_model=nowhere",
         "error: --set initial_model=nowhere: initial_model: expected a Hugging Face folder, found none at /"),
        ("JUDGE_SERVER=()", "problems.apart_from=[nowhere.jsonl]",
         "error: --set problems.apart_from=[nowhere.jsonl]: problems.apart_from: /"),
        ("CONTAINER=enroot IMAGE_TRAIN=t IMAGE_SAMPLE=s MOUNTS=/scratch", "seed=0",
         "MOUNTS=/scratch: expected this folder (/"),
        ("CONTAINER=enroot IMAGE_TRAIN=t IMAGE_SAMPLE=s MOUNTS=$HERE:/elsewhere", "seed=0", "expected this folder (/"),
        ("CONTAINER=enroot IMAGE_TRAIN=t IMAGE_SAMPLE=s MOUNTS=$HERE", "seed=0", "expected initial_model (/"),
    ],
)  # fmt: skip
def test_what_a_job_would_not_find_is_told_at_submission(
    site: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    given: str, added: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with site.open("a") as file:
        file.write(f"HERE={tmp_path}\n{given}\n")
    judge = "judge.process={kind: llm, base_url: 'http://node7:8000/v1', model: m}"
    with pytest.raises(SystemExit) as stop:
        main(["slurm", "submit", str(repository / "recipes" / "mini_cpu.yaml"), f"--site={site}", f"--set={judge}",
              f"--set={added}", "--dry-run"])  # fmt: skip
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


VLLM = "vllm serve $HERE --served-model-name m other --port 8000"


@pytest.mark.parametrize(
    ("server", "judge", "said"),
    [
        (VLLM, "model: m", None),
        (f"{VLLM} -tp 4 --data-parallel-size=2", "model: other", None),
        ("python -m vllm.entrypoints.openai.api_server --model $HERE --served-model-name m", "model: m", None),
        ("my-server anything", "model: m", None),
        (
            VLLM,
            "model: Qwen",
            "JUDGE_SERVER serves m other, and the recipe's judge asks for Qwen; give the server --se",
        ),
        (
            "vllm serve $HERE",
            "model: m",
            "JUDGE_SERVER serves $HERE, and the recipe's judge asks for m; give the server",
        ),
        ("vllm serve $HERE/no --served-model-name m", "model: m", "expected the judge's model folder, found none at"),
        (
            f"{VLLM} --tensor-parallel-size 8 -dp 2",
            "model: m",
            "JUDGE_SERVER needs 16 GPUs (8 x 1 x 2), its node has 8",
        ),
    ],
)
def test_the_judges_server_is_checked_at_submission(
    site: Path, repository: Path, tmp_path: Path, server: str, judge: str, said: str | None
) -> None:
    """The judge's job would find out only after hours of sampling."""
    with site.open("a") as file:
        file.write(f"HERE={tmp_path}\nJUDGE_SERVER=({server})\n")
    process = f"judge.process={{kind: llm, base_url: 'http://127.0.0.1:8000/v1', {judge}}}"
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}", process])
    if said is None:
        check_site(recipe, read_site(site))
        return
    with pytest.raises(UserError, match=re.escape(said.replace("$HERE", str(tmp_path)))):
        check_site(recipe, read_site(site))


@pytest.mark.parametrize(
    "judge",
    ["{kind: llm, base_url: 'http://localhost:8000/v1', model: m}",
     "{kind: monte_carlo, sample: {max_tokens: 9, workers: 9}}"],
)  # fmt: skip
def test_imported_solutions_need_no_judge_on_the_site(site: Path, repository: Path, tmp_path: Path, judge: str) -> None:
    """Their labels come with them: the chain has no judge job whose node could be wrong."""
    path = repository / "recipes" / "gsm8k_offline_cpu.yaml"
    recipe = read_recipe(path, [f"output={tmp_path}", f"judge={{split: line, process: {judge}}}"])
    read = read_site(site)
    check_site(recipe, read)
    assert "judge_1" not in [step.name for step in chain(recipe, read)]


ACT = """set -eo pipefail
SITE=$1 RUN=$2; source "$SITE"; source "$STEPKTO_HOME/slurm/lib.sh"
begin judge_1
"""
STAND_INS = {  # of Slurm's commands: they note what they were asked
    "srun": 'echo "srun $*" >>"$RUN/asked"; while [[ $1 != judge-server ]]; do shift; done; exec "${@:2}"',
    "scontrol": 'echo "scontrol $*" >>"$RUN/asked"',
}


def act(site: Path, run: Path, script: str) -> tuple[int, str, list[str]]:
    """Some bash in a job of the judge: its exit code, what its log has, and what Slurm was asked."""
    for name, body in STAND_INS.items():
        program = run / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    log, asked = run / "slurm" / "logs" / "judge_1.log", run / "asked"
    log.parent.mkdir(parents=True, exist_ok=True)
    asked.unlink(missing_ok=True)
    path = f"{run / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "RUN": str(run), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    with log.open("a") as file:
        done = subprocess.run(
            ["bash", "-c", ACT + script, "bash", str(site), str(run)], stdout=file, stderr=file,
            timeout=300, check=False, env={**os.environ, **environment},
        )  # fmt: skip
    return done.returncode, log.read_text(), asked.read_text().splitlines() if asked.is_file() else []


class Answer(http.server.BaseHTTPRequestHandler):
    """A server that answers every question with one status."""

    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_server_that_is_not_the_jobs_own_is_not_asked(site: Path, tmp_path: Path, status: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}/v1"
        code, log, asked = act(
            site, tmp_path, f"serve sample {url} $RUN/server.log judge-server sleep 60; echo asked\n"
        )
        other.shutdown()
    assert code == 143
    assert f"error: another process listens at {url} on n1 (status {status}) before the judge server is started" in log
    assert "=== judge_1: failed (1 of 3), exit code 1\n" in log
    assert "log of the judge server" not in log, "there is none"
    assert asked == ["scontrol requeue 7"], "no server was started"
    assert not (tmp_path / "server.log").exists()


def test_the_jobs_own_server_is_started_where_nobody_listens(site: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    [port] = free_ports(1)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("{}")
    server = f"judge-server {sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {tmp_path}"
    script = f"serve sample http://127.0.0.1:{port}/v1 $RUN/server.log {server}; echo asked; exit 0\n"
    code, log, asked = act(site, tmp_path, f"http_proxy=http://127.0.0.1:9 {script}")
    assert code == 0, log
    assert log.endswith("\nasked\n")
    assert len(asked) == 1
    assert asked[0].startswith("srun --overlap ")
    assert '"GET /v1/models HTTP/1.1" 200' in (tmp_path / "server.log").read_text()


def test_a_step_does_not_outlive_the_jobs_own_server(site: Path, tmp_path: Path) -> None:
    """The judge would wait for a server that nobody starts again; the job ends it and goes back into the queue."""
    script = (
        "sleep 1 & SERVER_PID=$! SERVER_LOG=$RUN/server.log\n"
        "make_step() { STEP=(bash -c 'trap \"exit 143\" TERM; for _ in {1..300}; do sleep 0.1; done'); }\n"
        "launch sample 1 stepkto judge\n"
    )
    code, log, asked = act(site, tmp_path, script)
    assert code == 143
    assert "error: the judge server has ended; its log:" in log
    assert "=== judge_1: failed (1 of 3), exit code 1\n" in log
    assert asked == ["scontrol requeue 7"]


@pytest.mark.parametrize("server", [True, False])
def test_an_evaluation_samples_before_it_starts_the_judges_server(
    site: Path, repository: Path, tmp_path: Path, server: bool
) -> None:
    """Its engines have released the GPUs by then. What `stepkto` is asked, and whether the server answers then."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    [port] = free_ports(1)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("{}")
    url, run = f"http://127.0.0.1:{port}/v1", tmp_path / "run"
    programs = {
        "srun": 'while [[ $1 != bash ]]; do shift; done; exec "$@"',
        "stepkto": f"echo \"$* $(curl -s --noproxy '*' -o /dev/null -w '%{{http_code}}' {url}/models)\" >>{run}/asked",
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    with site.open("a") as file:
        file.write(f"JUDGE_SERVER=({sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {tmp_path})\n")
        file.write(f"JUDGE_URL={url}\nenvironment() {{ export PATH={tmp_path}/bin:$PATH; }}\n")
    (run / "slurm" / "logs").mkdir(parents=True)
    done = subprocess.run(
        ["bash", repository / "slurm" / "evaluate.sbatch", site, run, "1", *(["server"] if server else [])],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NODELIST": "n1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = f"evaluate {run}/slurm/recipe.yaml --iteration 1"
    expected = [f"{words} --sample-only 000", f"{words} 200"] if server else [f"{words} 000"]
    assert (run / "asked").read_text().splitlines() == expected
    assert (run / "slurm" / "logs" / "evaluate_server_1.log").is_file() == server


CANCELLED = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 ***"


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        (CANCELLED, "=== judge_1: cancelled"),
        ("slurmd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 DUE to SIGNAL Terminated ***", "cancelled"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 DUE TO PREEMPTION ***", "queue"),
        ("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026-11-25T20:00:00 ***", "back into the queue"),
        ("told to stop", "back into the queue"),
    ],
)
def test_a_cancelled_job_is_not_put_back(site: Path, tmp_path: Path, line: str, ends: str) -> None:
    code, log, asked = act(site, tmp_path, f"echo {shlex.quote(line)}; settle 143")
    assert code == 143
    assert log.splitlines()[-1].endswith(ends)
    assert asked == ([] if "cancelled" in ends else ["scontrol requeue 7"])
    # put back by hand, under the same number and in the same log, and then preempted
    code, log, asked = act(site, tmp_path, "settle 143")
    assert code == 143
    assert log.splitlines()[-1] == "=== judge_1: back into the queue"
    assert asked == ["scontrol requeue 7"]


def test_a_pretrained_model_is_warmed_up_before_the_chain(
    site: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No job of the chain trains M0 on GPUs; once `stepkto warm-up` has made it, the chain is as without warm_up."""
    (tmp_path / "solutions.jsonl").touch()
    training = "{method: rft, optimizer: {lr: 1}, global_batch_size: 1}"
    words = ["slurm", "submit", str(repository / "recipes" / "mini_cpu.yaml"), f"--site={site}", "--dry-run",
             f"--set=output={tmp_path}",
             f"--set=warm_up={{solutions: [{tmp_path}/solutions.jsonl], training: {training}}}"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert "warm_up trains initial_model, for which the chain has no job: run `stepkto warm-up RECIPE`" in said
    write_json(tmp_path / "mini_cpu" / "M0" / "convert" / "manifest.json", {})
    main(words)
    assert len(capsys.readouterr().out.splitlines()) == 3 + 6 * 3


@pytest.mark.parametrize("name", JUDGES_OF_REAL)
def test_recipes_for_real_models(
    name: str, site: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each is parsed, fits its model's layout, and its chain is shown; the shown commands are bash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPKTO_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("STEPKTO_PROBLEMS", str(tmp_path / "math"))
    monkeypatch.delenv("JUDGE_URL", raising=False)
    recipe = read_recipe(repository / "recipes" / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.initial_model is not None
    # the run has nothing else than the model's config.json; the smoke model is a small one of the same family
    known = {
        "Llama-3.1-8B-Instruct": "llama3.1_8b",
        "Llama-3.3-70B-Instruct": "llama3.3_70b",
        "Qwen3-30B-A3B-Instruct-2507": "qwen3_30b_a3b",
    }.get(recipe.initial_model.name, "qwen2.5_math_7b")
    shutil.copytree(repository / "recipes" / "configs" / known, recipe.initial_model)
    (tmp_path / "models" / "Qwen2.5-Math-PRM-7B").mkdir()
    with site.open("a") as file:
        file.write("MODEL=$STEPKTO_MODELS/Llama-3.3-70B-Instruct\n")
        file.write("JUDGE_SERVER=(vllm serve $MODEL --served-model-name Llama-3.3-70B-Instruct -tp 4 -dp 2)\n")
    (tmp_path / "math").mkdir()
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / "math" / file).touch()
    main(["slurm", "submit", str(repository / "recipes" / f"{name}.yaml"), f"--site={site}", "--dry-run"])
    script = capsys.readouterr().out
    commands = script.splitlines()
    assert len(commands) == 3 + 6 * recipe.iterations
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    [train] = [line for line in commands if line.startswith("train_1=")]
    words = shlex.split(train.removeprefix("train_1=$(").removesuffix(")"))
    assert "--dependency=afterok:${dataset_1}" in words
    nodes, per_node = max(1, recipe.train.parallel.ranks // 8), min(8, recipe.train.parallel.ranks)
    assert {f"--nodes={nodes}", f"--gpus-per-node={per_node}"} <= set(words)
    gpus, server = JUDGES_OF_REAL[name]
    for job in ("judge_1", "evaluate_0"):
        [line] = [line for line in commands if line.startswith(f"{job}=")]
        words = shlex.split(line.split("=", 1)[1].removeprefix("$(").removesuffix(")"))
        assert {f"--gpus-per-node={gpus}", "--partition=h100"} <= set(words)
        assert (words[-1] == "server") == server
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_scripts_are_clean(repository: Path) -> None:
    scripts = sorted(map(str, [*(repository / "slurm").glob("*.sbatch"), *(repository / "slurm").glob("*.sh")]))
    assert len(scripts) == 10
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        if script.endswith(".sbatch"):
            assert "\nset -euo pipefail\n" in Path(script).read_text()
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only bash's own check was made")
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stdout


def test_the_log_of_a_running_job_is_its_own(repository: Path, tmp_path: Path) -> None:
    """judge_10.log is not of judge_1; of an array, the newest element's is shown."""
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}"])
    logs = folder(tmp_path) / "logs"
    logs.mkdir(parents=True)
    for name in ("judge_1.log", "judge_10.log", "sample_1.0.log", "sample_1.1.log", "sample_11.0.log"):
        (logs / name).touch()
    for name, expected in (("judge_1", "judge_1.log"), ("sample_1", "sample_1.1.log")):
        step = Step(name, name.split("_")[0], [], [tmp_path / "not_done"], [])
        assert _state(tmp_path, recipe, step, [Queued(7, "", "RUNNING", "None", name)]) == (
            "running", f"log: {logs / expected}",
        )  # fmt: skip
