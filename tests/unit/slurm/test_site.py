"""The site file: what is read from it, and what is refused at submission. No Slurm is needed."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.cli.main import main
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.slurm.checks import _seconds, check_site
from megatron_stepkto.slurm.site import read_site

PRINT_STEP = """set -eo pipefail
SITE=$1; source "$SITE"; source "$STEPKTO_HOME/slurm/lib.sh"
make_step "${@:2}"; printf '%s\n' "${STEP[@]}"
"""


def test_site_file(site: Path) -> None:
    read = read_site(site)
    assert (read.gpus_per_node, read.train_nodes, read.gpu_partition, read.cpu_partition) == (
        8,
        None,
        "h100",
        "cpu only",
    )
    assert read.extra == []
    assert read.judge_server == []
    with site.open("a") as file:
        file.write("SBATCH_EXTRA=(--qos=long '--mail-user=two words')\nJUDGE_SERVER=(vllm serve x)\n")
    again = read_site(site)
    assert again.extra == ["--qos=long", "--mail-user=two words"]
    assert again.judge_server == ["vllm", "serve", "x"]


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("GPUS_PER_NODE=eight", "GPUS_PER_NODE=eight: expected a whole number"),
        ("unset TIME_TRAIN", "variable TIME_TRAIN is missing; see slurm/site.example.sh"),
        ("unset JUDGE_URL; JUGDE_URL=x", "variable JUDGE_URL is missing (JUGDE_URL is set: a typo?); see"),
        ("unset -f environment", "function environment is missing; see slurm/site.example.sh"),
        ("CONTAINER=docker", "CONTAINER=docker: expected none, apptainer or enroot"),
        ("CONTAINER=apptainer", "CONTAINER=apptainer needs IMAGE_TRAIN"),
        ("STEPKTO_HOME=/nowhere", "STEPKTO_HOME=/nowhere: expected this project's checkout"),
        ("if", "bash cannot read it"),
        ("SAMPLE_ELEMENTS=0", "SAMPLE_ELEMENTS=0: expected a whole number of at least 1"),
        ("CPU_TASK_CPUS=0", "CPU_TASK_CPUS=0: expected a whole number of at least 1"),
        ("STOP_LEAD=100000", "STOP_LEAD=100000: expected a whole number of at most 65535"),
        (
            "[[ -f /nowhere ]] && source /nowhere",
            "bash cannot read it: its last command ended with exit code 1",
        ),
        ("exit 3", "bash cannot read it: it ended bash with exit code 3; correct the site file"),
        ("exit 0", "it ended bash before its end (exit 0); remove the exit"),
    ],
)
def test_faults_of_a_site_file_are_named(site: Path, added: str, said: str) -> None:
    with site.open("a") as file:
        file.write(added + "\n")
    with pytest.raises(UserError, match=re.escape(said)):
        read_site(site)


def test_a_site_file_may_talk(site: Path) -> None:
    with site.open("a") as file:
        file.write("echo Welcome to the cluster\n")
    assert read_site(site).gpus_per_node == 8


MODULES = """module() { local loaded=$LOADEDMODULES:$1; [[ $2 == apptainer ]] || return 1; export LOADED=$loaded; }
module load apptainer 2>/dev/null || true
module load unknown 2>/dev/null || true
"""


def test_a_site_file_may_load_modules_as_the_documentation_says(site: Path, repository: Path, tmp_path: Path) -> None:
    """They use unset variables, which under set -u end the shell whatever stands behind ``||``."""
    site.write_text(MODULES + site.read_text())
    assert read_site(site).gpus_per_node == 8
    scripts = sorted((repository / "slurm").glob("*.sbatch"))
    assert len(scripts) == 8
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOADEDMODULES", "SLURM_ARRAY_TASK_ID")
    }
    for script in scripts:
        run = tmp_path / script.stem
        program = run / "bin" / "srun"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/bash\necho "$LOADED ${{@: -1}}" >>{run}/asked\n')
        program.chmod(0o755)
        done = subprocess.run(
            ["bash", str(script), str(site), str(run), "1"], capture_output=True, text=True, check=False,
            env={**environment, "PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                 "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (run / "asked").read_text().startswith(":load ")
    done = subprocess.run(
        ["bash", "-c", PRINT_STEP + 'echo "$ABSENT"', "bash", str(site), "sample", "1", "x"], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "ABSENT: unbound variable" in done.stderr, "lib.sh is strict with itself"


def test_told_to_stop_while_modules_are_loaded(site: Path, repository: Path, tmp_path: Path) -> None:
    """The signal that a limit is near may come at once: it must not end a job that would be put back a second later."""
    site.write_text("kill -USR1 $$\n" + site.read_text())
    for script in sorted((repository / "slurm").glob("*.sbatch")):
        run = tmp_path / script.stem
        (run / "bin").mkdir(parents=True)
        for name in ("srun", "scontrol"):
            (run / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{run}/asked\n')
            (run / "bin" / name).chmod(0o755)
        (run / "slurm" / "logs").mkdir(parents=True)
        for part in (script.stem, f"{script.stem}_1"):
            (run / "slurm" / "logs" / f"{part}.log").touch()
        done = subprocess.run(
            ["bash", str(script), str(site), str(run), "1"], capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": f"{run / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                 "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"},
        )  # fmt: skip
        assert done.returncode == 143, done.stderr
        assert "interrupted; finished work is kept" in done.stdout
        assert (run / "asked").read_text().splitlines()[-1] == "scontrol requeue 7"
        assert "srun" not in (run / "asked").read_text()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("2:30", 150), ("08:00:00", 28800), ("1-6", 108000), ("1-0:30", 88200), ("2-01:00:09", 176409),
     *[(text, math.inf) for text in ("UNLIMITED", "infinite", "-1", "0", "00:00:00", "0-0")],
     *[(text, None) for text in ("", "8h", "-2", "1:2:3:4", "1-", "UNLIMITED ")]],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: float | None) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("TIME_TRAIN=8h", "TIME_TRAIN=8h: expected minutes, [days-]HH:MM:SS or UNLIMITED; correct it in the site file"),
        ("STOP_LEAD=600", "TIME_SAMPLE=10 is not longer than STOP_LEAD=600 seconds: a job would be told"),
        ("TIME_CPU=0:30", "TIME_CPU=0:30 is not longer than STOP_LEAD=30 seconds"),
        ("TIME_CPU=UNLIMITED TIME_TRAIN=0 TIME_SAMPLE=-1 TIME_JUDGE=infinite", ""),
        (
            "SBATCH_EXTRA=(--qos=long --output=/scratch/log)",
            "SBATCH_EXTRA: --output=/scratch/log: expected no flag that",
        ),
        ("SBATCH_EXTRA=(--out /scratch/log)", "SBATCH_EXTRA: --out: expected"),
        ("SBATCH_EXTRA=(-o/scratch/log)", "SBATCH_EXTRA: -o/scratch/log: expected"),
        ("SBATCH_EXTRA=(-e /scratch/log)", "SBATCH_EXTRA: -e: expected"),
        ("SBATCH_EXTRA=(--error=x)", "SBATCH_EXTRA: --error=x: expected"),
        ("SBATCH_EXTRA=(--open-mode=truncate)", "SBATCH_EXTRA: --open-mode=truncate: expected"),
        ("SBATCH_EXTRA=(--nice=-o -QW)", "SBATCH_EXTRA: -QW: expected no flag that changes what sbatch does or prints"),
        ("SBATCH_EXTRA=(--wait)", "SBATCH_EXTRA: --wait: expected no flag that changes what sbatch does"),
        ("SBATCH_EXTRA=(--parsable)", "SBATCH_EXTRA: --parsable: expected no flag that changes what sbatch does"),
        ("SBATCH_EXTRA=(--test-only)", "SBATCH_EXTRA: --test-only: expected no flag that changes what sbatch does"),
        ("SBATCH_EXTRA=(--wrap=true)", "SBATCH_EXTRA: --wrap=true: expected no flag that changes what sbatch does"),
        (
            "SBATCH_EXTRA=(--array=0-3)",
            "SBATCH_EXTRA: --array=0-3: expected no flag that makes arrays of jobs: set SAM",
        ),
        ("SBATCH_EXTRA=(-a 0-3)", "SBATCH_EXTRA: -a: expected no flag that makes arrays of jobs"),
        ("SBATCH_EXTRA=(--dep=afterany:7)", "SBATCH_EXTRA: --dep=afterany:7: expected no flag that orders the jobs"),
        (
            "SBATCH_EXTRA=(--kill-on-invalid-dep=no)",
            "expected no flag that orders the jobs: the chain sets their order",
        ),
        ("SBATCH_EXTRA=(--no-requeue)", "SBATCH_EXTRA: --no-requeue: expected no flag that decides what happens to a"),
        ("SBATCH_EXTRA=(--requeue)", "SBATCH_EXTRA: --requeue: expected no flag that decides what happens to a job"),
        ("SBATCH_EXTRA=(--signal=TERM@9)", "expected no flag that decides when a job is told to stop: set STOP_LEAD"),
        ("SBATCH_EXTRA=(--job-name=x)", "SBATCH_EXTRA: --job-name=x: expected no flag that names a job"),
        ("SBATCH_EXTRA=(-Jx)", "SBATCH_EXTRA: -Jx: expected no flag that names a job"),
        ("SBATCH_EXTRA=('--comment=my run')", "SBATCH_EXTRA: --comment=my run: expected no flag that names a job"),
        ("SBATCH_EXTRA=(-N2)", "SBATCH_EXTRA: -N2: expected no flag that asks for nodes: set TRAIN_NODES"),
        ("SBATCH_EXTRA=(--ntasks=2)", "SBATCH_EXTRA: --ntasks=2: expected no flag that starts tasks"),
        ("SBATCH_EXTRA=(--gpus=8)", "SBATCH_EXTRA: --gpus=8: expected no flag that asks for GPUs: set GPUS_PER_NODE"),
        (
            "SBATCH_EXTRA=(--time=9)",
            "SBATCH_EXTRA: --time=9: expected no flag that limits a job's time: set TIME_SAMPLE",
        ),
        ("SBATCH_EXTRA=(-M other)", "SBATCH_EXTRA: -M: expected no flag that sends jobs to another cluster"),
        ("SBATCH_EXTRA=(script.sh)", "SBATCH_EXTRA: script.sh: expected flags, such as (--qos=long --mem=0); sbatch"),
        ("SBATCH_EXTRA='--qos=long --mem=0'", "expected one flag a word; write an array: (--qos=long --mem=0)"),
        ("SBATCH_EXTRA=(--qos=a : --qos=b)", "SBATCH_EXTRA: :: expected flags of one job"),
        ("SBATCH_EXTRA=(--exclusive --export=NONE --oversubscribe --exclude=n3 --nice=-o -A me)", ""),
        (
            "SBATCH_EXTRA=(--export=A=1,B --nodelist=n1 --hold -sv --mem=0 --gres=tmp:1 --constraint=a --get-user-env)",
            "",
        ),
    ],
)
def test_limits_and_flags_are_judged_at_submission_alone(
    site: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    added: str, said: str,
) -> None:  # fmt: skip
    """``status`` still shows a run whose stored site file would be refused today."""
    with site.open("a") as file:
        file.write(added + "\n")
    words = [str(repository / "recipes" / "mini_cpu.yaml"), f"--set=output={tmp_path}"]
    if said:
        with pytest.raises(SystemExit) as stop:
            main(["slurm", "submit", *words, f"--site={site}", "--dry-run"])
        assert stop.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    else:
        main(["slurm", "submit", *words, f"--site={site}", "--dry-run"])
        assert "train_1=$(sbatch" in capsys.readouterr().out
    run, squeue = tmp_path / "mini_cpu", tmp_path / "bin" / "squeue"
    (run / "slurm").mkdir(parents=True)
    shutil.copyfile(site, run / "slurm" / "site.sh")
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}"])
    (run / "slurm" / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/bash\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    main(["slurm", "status", str(run)])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "train_1" in line]
    assert "not queued" in line


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("SBATCH_WAIT", "that changes what sbatch does or prints"),
        ("SBATCH_ARRAY_INX", "that makes arrays of jobs: set SAMPLE_ELEMENTS"),
        ("SBATCH_ERROR", "that moves a job's log"),
        ("SBATCH_CLUSTERS", "that sends jobs to another cluster"),
        ("SBATCH_GPUS_PER_NODE", "that asks for GPUs: set GPUS_PER_NODE"),
        ("SBATCH_EXPORT", ""),  # steps get all that the job has
        ("SBATCH_TIMELIMIT", ""),  # our own flag counts
        ("SBATCH_QOS", ""),
    ],
)
def test_variables_of_the_shell_that_sbatch_reads(
    site: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "1")
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}"])
    if not said:
        check_site(recipe, read_site(site))
        return
    with pytest.raises(UserError, match=re.escape(f"{variable}=1: expected no variable in this shell {said}")):
        check_site(recipe, read_site(site))


def test_steps_write_into_the_log_whatever_the_shell_says(site: Path) -> None:
    """srun reads these of the shell that submitted, where sbatch passes them on."""
    redirected = {"SLURM_STDOUTMODE": "none", "SLURM_STDERRMODE": "none", "SLURM_TIMELIMIT": "1"}
    script = 'source "$1"; source "$STEPKTO_HOME/slurm/lib.sh"; env'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(site)], capture_output=True, text=True, check=True,
        env={**os.environ, **redirected},
    )  # fmt: skip
    assert not any(line.partition("=")[0] in redirected for line in done.stdout.splitlines())


def test_no_site_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"copy slurm/site\.example\.sh there"):
        read_site(tmp_path / "absent.sh")


@pytest.mark.parametrize(
    ("container", "gpus", "expected"),
    [
        ("none", 8, []),
        ("apptainer", 8, ["apptainer", "exec", "--bind", "/a b:/a b,/c:/d", "--pwd", "PWD", "--nv", "/vllm.sif"]),
        ("apptainer", 0, ["apptainer", "exec", "--bind", "/a b:/a b,/c:/d", "--pwd", "PWD", "/vllm.sif"]),
        ("enroot", 8, ["--container-image=/vllm.sif", "--container-mounts=/a b:/a b,/c:/d", "--container-workdir=PWD"]),
    ],
)
def test_the_step_that_a_stage_runs_as(
    site: Path, tmp_path: Path, container: str, gpus: int, expected: list[str]
) -> None:
    """As Apptainer's and Pyxis' manuals want it: both sides of a mount, the folder to start in, GPUs."""
    with site.open("a") as file:
        file.write(f"CONTAINER={container} GPUS_PER_NODE={gpus} IMAGE_SAMPLE=/vllm.sif MOUNTS='/a b,/c:/d'\n")
    done = subprocess.run(
        ["bash", "-c", PRINT_STEP, "bash", str(site), "sample", "2", "stepkto", "two words"], cwd=tmp_path,
        capture_output=True, text=True, check=True, env={**os.environ, "SLURM_CPUS_PER_TASK": "3"},
    )  # fmt: skip
    words = done.stdout.splitlines()
    flags = ["--export=ALL", "--kill-on-bad-exit=1", "--wait=0"]
    flags += ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=3"]
    assert words[:8] == ["srun", *flags]
    own = [word.replace("PWD", str(tmp_path)) for word in expected]
    assert words[8 : 8 + len(own)] == own
    rest = words[8 + len(own) :]
    assert rest[:2] == ["bash", "-c"]
    assert rest[3:] == [str(site), "sample", "stepkto", "two words"]
