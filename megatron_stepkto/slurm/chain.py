"""The jobs of a run: what each waits for, and the flags with which it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.stage import MANIFEST
from megatron_stepkto.judging.process.interface import Resources
from megatron_stepkto.judging.section import judging_resources
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.run.folder import Run, model_name
from megatron_stepkto.run.summary import Summary
from megatron_stepkto.slurm.queue import comment
from megatron_stepkto.slurm.site import Site


@dataclass(frozen=True)
class Step:
    """One job (or array). ``name``: stage and iteration; ``directories``: of the stages that it makes."""

    name: str
    script: str
    after: list[str]
    directories: list[Path]
    flags: list[str]
    arguments: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return bool(self.directories) and all((folder / MANIFEST).is_file() for folder in self.directories)


def folder(run: Path) -> Path:
    """Where a run keeps what belongs to its jobs: recipe, site file, record, logs, attempts, failures."""
    return run / "slurm"


def log_path(run: Path, name: str) -> Path:
    return folder(run) / "logs" / f"{name}.log"


def chain(recipe: Recipe, site: Site) -> list[Step]:
    """All jobs of a run, each after those that it waits for."""
    run = Run(recipe)
    paths = run.folder
    imported = recipe.problems.source == "imports"
    chosen = [paths.stage("problems", t) for t in range(1, recipe.iterations + 1)]
    first = [] if imported else chosen
    if recipe.evaluate:
        first = [*first, paths.evaluation_problems.parent]
    if run.makes_m0:
        first = [*first, paths.m0("convert")]
    if imported:
        first = [*first, paths.stage("judge", 1)]
    steps = [Step("prepare", "prepare", [], first, _cpu(site))]
    before = "prepare"
    measured = []
    server = ["server"] if has_server(recipe, site) else []

    def add(stage: str, t: int, after: str, directory: Path, flags: list[str], *arguments: str) -> str:
        steps.append(Step(f"{stage}_{t}", stage, [after], [directory], flags, [str(t), *arguments]))
        return f"{stage}_{t}"

    if recipe.evaluate:
        measured.append(add("evaluate", 0, "prepare", paths.evaluation(0), _evaluate(recipe, site), *server))
    for t in range(1, recipe.iterations + 1):
        if not imported:
            before = add("sample", t, before, paths.stage("sample", t), _sample(recipe, site))
            before = add("judge", t, before, paths.stage("judge", t), _judge(recipe, site), *server)
        before = add("dataset", t, before, paths.stage("dataset", t), _cpu(site))
        before = add("train", t, before, paths.stage("train", t), _train(recipe, site))
        before = add("convert", t, before, paths.stage("convert", t), _cpu(site))
        if t in recipe.measured():
            measured.append(add("evaluate", t, before, paths.evaluation(t), _evaluate(recipe, site), *server))
    steps.append(Step("finish", "finish", measured or [before], [], _cpu(site)))
    return steps


def is_finished(recipe: Recipe) -> bool:
    """Is there a report, and a summary with a row for each model that the run measures?"""
    paths = Run(recipe).folder
    if not (paths.summary.is_file() and paths.report.is_file()):
        return False
    rows = [row["name"] for row in read_json(paths.summary, Summary)["iterations"]]
    return rows == [model_name(t) for t in recipe.measured()]


# --- flags of sbatch -------------------------------------------------------------------------------------------


def _gpu_partition(site: Site) -> list[str]:
    return [f"--partition={site.gpu_partition}"] if site.gpu_partition else []


def _cpu(site: Site) -> list[str]:
    partition = [f"--partition={site.cpu_partition}"] if site.cpu_partition else []
    return [*partition, "--nodes=1", f"--cpus-per-task={site.cpu_task_cpus}", f"--time={site.time_cpu}"]


def _gpus(site: Site, wanted: int) -> list[str]:
    """GPUs of one node, and the cores that go with them. A learned judge works with fewer GPUs than it has workers; of
    other needs, check_site refuses more than a node has."""
    if site.gpus_per_node == 0:
        return [f"--cpus-per-task={site.cpus_per_node}"]
    gpus = min(wanted, site.gpus_per_node)
    return [f"--gpus-per-node={gpus}", f"--cpus-per-task={max(1, site.cpus_per_node * gpus // site.gpus_per_node)}"]


def _on_gpus(site: Site, wanted: int, limit: str) -> list[str]:
    return [*_gpu_partition(site), "--nodes=1", *_gpus(site, wanted), f"--time={limit}"]


def _engine_gpus(recipe: Recipe) -> int:
    assert recipe.sample is not None
    return recipe.sample.workers * recipe.sample.tensor_parallel


def _sample(recipe: Recipe, site: Site) -> list[str]:
    return [*_on_gpus(site, _engine_gpus(recipe), site.time_sample), f"--array=0-{site.sample_elements - 1}"]


def _evaluate(recipe: Recipe, site: Site) -> list[str]:
    """It samples, and then it judges."""
    return _on_gpus(site, max(_engine_gpus(recipe), _judge_gpus(recipe, site)), site.time_evaluate)


def has_server(recipe: Recipe, site: Site) -> bool:
    """Whether the jobs that judge start the server that the recipe's judge asks."""
    return bool(site.judge_server) and site.judge_url.rstrip("/") in server_urls(recipe)


def server_urls(recipe: Recipe) -> list[str]:
    """The servers that the jobs that judge ask."""
    return [url for need in judge_needs(recipe) for url in need.servers]


def judge_needs(recipe: Recipe) -> list[Resources]:
    """What the judges need of the nodes on which they work; empty where no job judges."""
    if recipe.judge is None or recipe.problems.source == "imports":
        return []
    return judging_resources(recipe.judge)


def _judge_gpus(recipe: Recipe, site: Site) -> int:
    if has_server(recipe, site):
        return max(1, site.gpus_per_node)
    return max((need.gpus for need in judge_needs(recipe)), default=0)


def _judge(recipe: Recipe, site: Site) -> list[str]:
    if gpus := _judge_gpus(recipe, site):
        return _on_gpus(site, gpus, site.time_judge)
    return [*_cpu(site)[:-1], f"--time={site.time_judge}"]


def train_nodes(recipe: Recipe, site: Site) -> int:
    return site.train_nodes or (-(-recipe.train.parallel.ranks // site.gpus_per_node) if site.gpus_per_node else 1)


def _train(recipe: Recipe, site: Site) -> list[str]:
    nodes = train_nodes(recipe, site)
    per_node = recipe.train.parallel.ranks // nodes
    flags = [f"--nodes={nodes}", "--ntasks-per-node=1", *_gpus(site, per_node), f"--time={site.time_train}"]
    return [*_gpu_partition(site), *flags]


def command(step: Step, run: Path, site: Site, after: Sequence[int | str], cwd: Path) -> list[str]:
    """The sbatch command of a step. ``after``: job numbers that it waits for, or what stands for them."""
    log = log_path(run, f"{step.name}.%a" if any(flag.startswith("--array") for flag in step.flags) else step.name)
    flags = [
        "sbatch", "--parsable",
        f"--job-name=stepkto-{run.name}-{step.name}",
        f"--comment={comment(run, step.name)}",
        f"--output={log}", "--open-mode=append",  # all attempts of a job write one log
        f"--chdir={cwd}",
        "--requeue",  # a lost node or a preemption puts the job back
        f"--signal=B:USR1@{site.stop_lead}",
        *([f"--account={site.account}"] if site.account else []),
        *step.flags,
        *site.extra,
    ]  # fmt: skip
    if after:
        # without the second flag a job that depends on a failed one waits forever
        flags += ["--dependency=afterok:" + ":".join(map(str, after)), "--kill-on-invalid-dep=yes"]
    script = site.scripts / f"{step.script}.sbatch"
    return [*flags, str(script), str(folder(run) / "site.sh"), str(run), *step.arguments]
