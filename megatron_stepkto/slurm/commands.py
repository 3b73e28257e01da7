"""``stepkto slurm submit``, ``status`` and ``cancel``."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, RootModel

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, find_files, read_json_if_there, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.progress import PROGRESS, read_progress, say
from megatron_stepkto.base.stage import MANIFEST, STARTED
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.recipe.file import recipe_content
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.recipe.yaml_text import read_yaml, write_yaml
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.stages import check_fits
from megatron_stepkto.slurm.chain import Step, chain, command, folder, is_finished, log_path
from megatron_stepkto.slurm.checks import check_site
from megatron_stepkto.slurm.queue import Queued, ask, queued_jobs, settled_jobs
from megatron_stepkto.slurm.site import Site, read_site


def submit(recipe: Recipe, site_file: Path, *, dry_run: bool) -> str:
    """Submit the jobs of a run that are neither done nor in the queue; returns the graph with the job numbers.

    Raises:
        UserError: a bad site file, a recipe that does not fit its model, another recipe's jobs in the queue, or
            Slurm refuses.
    """
    site = read_site(site_file)
    # jobs start in the folder of the submission; the copy of the recipe must mean the same from anywhere
    recipe = recipe.model_copy(update={"output": recipe.output.resolve()})
    run = recipe.run_dir
    _check_m0(Run(recipe))
    check_site(recipe, site)
    steps = chain(recipe, site)
    if dry_run:
        return _dry_run(steps, recipe, site)
    with exclusive_lock(folder(run) / ".lock", f"the record of {run}'s jobs", wait=True, note=say):
        queued = settled_jobs(run)
        _write_recipe(recipe, run, queued)
        with atomic_writer(folder(run) / "site.sh", "wb") as file:  # jobs of an earlier submission may be reading it
            file.write(site_file.read_bytes())
        (folder(run) / "logs").mkdir(exist_ok=True)
        return _submit_missing(steps, recipe, site, queued)


def _check_m0(run: Run) -> None:
    """Check, before hours of sampling, that the layout fits M0, and that the chain's jobs can make M0 or have it.

    Raises:
        UserError: it does not fit, or a pretrained model is to be warmed up, for which there is no job.
    """
    if run.recipe.initial_model is not None:
        check_fits(run.blueprint, run.recipe)
    if run.pretrained is not None and not (run.folder.m0("convert") / MANIFEST).is_file():
        raise UserError(
            f"{run.recipe.place('warm_up')}: warm_up trains initial_model, for which the chain has no job: run "
            "`stepkto warm-up RECIPE` with the same output folder in an allocation with the GPUs of "
            "warm_up.training.parallel, then submit"
        )


def _write_recipe(recipe: Recipe, run: Path, queued: list[Queued]) -> None:
    """Jobs read a copy: an edit of the recipe must not change a chain that is under way."""
    path = folder(run) / "recipe.yaml"
    content = recipe_content(recipe)
    if path.is_file() and queued:
        old, _ = read_yaml(path.read_text())
        changed = sorted(key for key in content if content[key] != old.get(key) and key != "iterations")
        if changed:
            raise UserError(
                f"{run}: jobs of this run are in the queue with another recipe (different: {', '.join(changed)}); "
                f"cancel them first: stepkto slurm cancel {run}"
            )
    with atomic_writer(path) as file:
        write_yaml(content, file)


def _dry_run(steps: list[Step], recipe: Recipe, site: Site) -> str:
    """The exact commands, in order, with $NAME for the number of an earlier job."""
    lines = []
    for step in steps:
        words = command(step, recipe.run_dir, site, [f"${{{name}}}" for name in step.after], Path.cwd())
        shown = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words)
        lines.append(f"{step.name}=$({shown})")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Placed:
    job: int | None  # None: the step is done
    how: str


def _submit_missing(steps: list[Step], recipe: Recipe, site: Site, queued: list[Queued]) -> str:
    run = recipe.run_dir
    live: dict[str, list[Queued]] = {}
    for each in queued:
        live.setdefault(each.stage, []).append(each)
    record: dict[str, Any] = _read_record(run)
    placed: dict[str, _Placed] = {}
    for step in steps:
        mine = live.get(step.name, [])
        done = step.is_done or (
            step.name == "finish" and all(p.job is None for p in placed.values()) and is_finished(recipe)
        )
        # A job that waits for one that is gone would be killed with it, or wait forever.
        waits_for_new = any(placed[name].how == "submitted" for name in step.after)
        if done:
            placed[step.name] = _Placed(None, "done")
        elif mine and not waits_for_new:
            placed[step.name] = _Placed(mine[0].job, "in the queue")
        else:
            for old in sorted({each.job for each in mine}):
                ask(["scancel", str(old)])
            for path in _files_of(run, "failures", step.name):
                path.unlink()
            after = [job for name in step.after if (job := placed[name].job) is not None]
            words = command(step, run, site, after, Path.cwd())
            try:
                number = int(ask(words).split(";")[0])
            except UserError as error:
                kept = ", ".join(f"{name} {it.job}" for name, it in placed.items() if it.job is not None) or "none"
                raise UserError(
                    f"{step.name}: {error}; in the queue so far: {kept}. Correct it and submit again (no job is "
                    f"submitted twice), or stepkto slurm cancel {run}"
                ) from None
            placed[step.name] = _Placed(number, "submitted")
            record[step.name] = {"job": number, "after": after, "command": words}
            write_json(_record_path(run), record)
    return "\n".join(_graph(steps, placed))


def _graph(steps: list[Step], placed: dict[str, _Placed]) -> list[str]:
    lines = []
    for step in steps:
        job, how = placed[step.name].job, placed[step.name].how
        after = ", ".join(f"{name} {placed[name].job}" for name in step.after if placed[name].job is not None)
        lines.append(f"{job or '-':>9}  {step.name:<12} {how:<13}{'after ' + after if after and job else ''}".rstrip())
    return lines


class _Submitted(BaseModel):
    """A step's job, those that it waits for, and the command that submitted it."""

    job: int
    after: list[int]
    command: list[str]


class _Record(RootModel[dict[str, _Submitted]]):
    """``jobs.json``: the steps that were submitted, by name."""


def _record_path(run: Path) -> Path:
    return folder(run) / "jobs.json"


def _read_record(run: Path) -> dict[str, Any]:
    return dict(read_json_if_there(_record_path(run), _Record) or {})


def _files_of(run: Path, kind: Literal["attempts", "failures"], name: str) -> list[Path]:
    """The files of a step; of an array those of all elements."""
    return [*(folder(run) / kind).glob(name), *(folder(run) / kind).glob(f"{name}.*")]


# --- status ----------------------------------------------------------------------------------------------------


def _known_run(run: Path) -> tuple[Path, Recipe]:
    run = run.resolve()
    if not (folder(run) / "recipe.yaml").is_file():
        raise UserError(f"{run}: expected a run that was submitted to Slurm, found none; see stepkto slurm submit")
    return run, load_recipe(folder(run) / "recipe.yaml")


def status(run: Path) -> str:
    """Each job: state, number, attempts, progress, why it waits or where its log is.

    Raises:
        UserError: the folder is not a run that was submitted to Slurm, or Slurm does not answer.
    """
    run, recipe = _known_run(run)
    queued = queued_jobs(run)
    record = _read_record(run)
    lines = [f"{'job':>9}  {'stage':<12} {'state':<12} {'attempts':<9} {'progress':<22} notes"]
    for step in chain(recipe, read_site(folder(run) / "site.sh")):
        mine = [job for job in queued if job.stage == step.name]
        number = mine[0].job if mine else record.get(step.name, {}).get("job")
        attempts, failures = _count(run, "attempts", step.name), _count(run, "failures", step.name)
        shown = str(attempts or "") + (f" ({failures} failed)" if failures else "")
        state, note = _state(run, recipe, step, mine)
        lines.append(
            f"{number or '-':>9}  {step.name:<12} {state:<12} {shown:<9} {_progress(step):<22} {note}".rstrip()
        )
    return "\n".join(lines)


def _state(run: Path, recipe: Recipe, step: Step, mine: list[Queued]) -> tuple[str, str]:
    stopped = sorted(path for path in _files_of(run, "failures", step.name) if path.suffix == ".stopped")
    if step.is_done or (step.name == "finish" and not mine and is_finished(recipe)):
        return "done", ""
    if stopped:
        log = log_path(run, stopped[0].name.removesuffix(".stopped"))
        return "stopped", f"{_text(stopped[0]).strip()}; log: {log}"
    if not mine:
        return "not queued", "stepkto slurm submit continues the run"
    states = sorted({job.state for job in mine})
    if "RUNNING" in states:
        logs = list((folder(run) / "logs").glob(f"{step.name}.*log"))  # judge_1.log, sample_1.3.log of an array
        return "running", f"log: {max(logs)}" if logs else ""
    return states[0].lower(), f"reason: {', '.join(sorted({job.reason for job in mine}))}"


def _count(run: Path, kind: Literal["attempts", "failures"], name: str) -> int:
    return sum(len(_text(path).splitlines()) for path in _files_of(run, kind, name) if path.suffix != ".stopped")


def _text(path: Path) -> str:
    """The file's text; empty if a submission has just removed it."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    return ""


def _progress(step: Step) -> str:
    if not step.directories or step.is_done:
        return ""
    directory = next((d for d in step.directories if (d / STARTED).is_file() and not (d / MANIFEST).is_file()), None)
    if directory is None:
        return ""
    reports = [report for path in find_files(directory, PROGRESS) if (report := read_progress(path))]
    return str(reports[-1])[:40] if reports else "begun"


# --- cancel ----------------------------------------------------------------------------------------------------


def cancel(run: Path) -> str:
    """Cancel the jobs that are this run's by their comment; nothing that is done is lost."""
    run, _ = _known_run(run)
    with exclusive_lock(folder(run) / ".lock", f"the record of {run}'s jobs", wait=True, note=say):
        numbers = sorted({job.job for job in queued_jobs(run)})
        if numbers:
            ask(["scancel", *map(str, numbers)])
    if not numbers:
        return f"{run}: no job is in the queue"
    return f"cancelled: {', '.join(map(str, numbers))}; finished work is kept, stepkto slurm submit resumes"
