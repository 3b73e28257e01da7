"""The chain's graph and flags, the site file, and recipes for real models through --dry-run. No Slurm is needed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_stepkto.cli import main
from megatron_stepkto.errors import UserError
from megatron_stepkto.files import write_json
from megatron_stepkto.recipe import load_recipe
from megatron_stepkto.slurm.chain import chain, command, train_nodes
from megatron_stepkto.slurm.queue import comment
from megatron_stepkto.slurm.site import read_site
from tests.slurm.cluster import write_site

REAL = ["llama3.1_8b_8xh100", "qwen2.5_math_7b_8xh100", "qwen2.5_1.5b_1xh200_smoke", "llama3.3_70b_64xh100_fp8"]


@pytest.fixture
def site(tmp_path: Path, repository: Path) -> Path:
    return write_site(
        tmp_path / "site.sh", repository, Path("/nowhere"), GPUS_PER_NODE="8", CPUS_PER_NODE="96", TRAIN_NODES="",
        GPU_PARTITION="h100", CPU_PARTITION="'cpu only'", SAMPLE_ELEMENTS="3",
    )  # fmt: skip


def test_site_file(site: Path) -> None:
    read = read_site(site)
    assert (read.gpus_per_node, read.train_nodes, read.gpu_partition, read.cpu_partition) == (
        8,
        None,
        "h100",
        "cpu only",
    )
    assert read.extra == []
    assert not read.has_judge_server
    with site.open("a") as file:
        file.write("SBATCH_EXTRA=(--qos=long '--comment=two words')\nJUDGE_SERVER=(vllm serve x)\n")
    again = read_site(site)
    assert again.extra == ["--qos=long", "--comment=two words"]
    assert again.has_judge_server


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("GPUS_PER_NODE=eight", "GPUS_PER_NODE=eight: expected a whole number"),
        ("unset TIME_TRAIN", "variable TIME_TRAIN is missing; see slurm/site.example.sh"),
        ("CONTAINER=docker", "CONTAINER=docker: expected none, apptainer or enroot"),
        ("CONTAINER=apptainer", "CONTAINER=apptainer needs IMAGE_TRAIN"),
        ("STEPKTO_HOME=/nowhere", "STEPKTO_HOME=/nowhere: expected this project's checkout"),
        ("if", "bash cannot read it"),
    ],
)
def test_faults_of_a_site_file_are_named(site: Path, added: str, said: str) -> None:
    with site.open("a") as file:
        file.write(added + "\n")
    with pytest.raises(UserError, match=re.escape(said)):
        read_site(site)


def test_no_site_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"copy slurm/site\.example\.sh there"):
        read_site(tmp_path / "absent.sh")


def test_graph_of_two_iterations(site: Path, repository: Path, tmp_path: Path) -> None:
    recipe = load_recipe(repository / "recipes" / "mini_cpu.yaml", ["iterations=2", f"output={tmp_path}"])
    steps = {step.name: step for step in chain(recipe, read_site(site))}
    assert {name: step.after for name, step in steps.items()} == {
        "prepare": [], "evaluate_0": ["prepare"],
        "sample_1": ["prepare"], "judge_1": ["sample_1"], "dataset_1": ["judge_1"], "train_1": ["dataset_1"],
        "convert_1": ["train_1"], "evaluate_1": ["convert_1"],
        "sample_2": ["convert_1"], "judge_2": ["sample_2"], "dataset_2": ["judge_2"], "train_2": ["dataset_2"],
        "convert_2": ["train_2"], "evaluate_2": ["convert_2"],
        "finish": ["evaluate_0", "evaluate_1", "evaluate_2"],
    }  # fmt: skip
    run = recipe.run_dir
    assert not steps["judge_1"].is_done
    write_json(run / "iteration_1" / "judge" / "manifest.json", {})
    assert steps["judge_1"].is_done


def test_flags(site: Path, repository: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "train.parallel.ranks=16", "sample.workers=4"]
    recipe = load_recipe(repository / "recipes" / "mini_cpu.yaml", overrides)
    read = read_site(site)
    assert train_nodes(recipe, read) == 2
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


@pytest.mark.parametrize("name", REAL)
def test_recipes_for_real_models(
    name: str, site: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each is parsed, fits its model's layout, and its chain is shown; the shown commands are bash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPKTO_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("STEPKTO_PROBLEMS", str(tmp_path / "math"))
    recipe = load_recipe(repository / "recipes" / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.initial_model is not None
    # the run has nothing else than the model's config.json; the smoke model is a small one of the same family
    known = {"Llama-3.1-8B-Instruct": "llama3.1_8b", "Llama-3.3-70B-Instruct": "llama3.3_70b"}.get(
        recipe.initial_model.name, "qwen2.5_math_7b"
    )
    shutil.copytree(repository / "recipes" / "configs" / known, recipe.initial_model)
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
