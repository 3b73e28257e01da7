"""Sample solutions with any number of worker processes on any number of hosts: each claims chunks that no other holds.

Killed at any instant, the same call resumes. ``Drawing.draw`` may run in several processes concurrently (an array of
Slurm jobs); ``Drawing.finish`` runs once, at the end. Claims are locks on a shared file system, which work of one host
(judging/row_tasks.py) does not need.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_stepkto.base.dtypes import Choice, choose_dtype, gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, read_json, read_json_if_there, write_json
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.processes import Child, gpus_of, run_children
from megatron_stepkto.base.progress import ProgressFile, Report, warn
from megatron_stepkto.base.records import Problem, Sample, read_records
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import BadText, Prompts
from megatron_stepkto.sampling.engines import check_engines
from megatron_stepkto.sampling.job import EngineSettings, Job, Pass, PromptRow, Pulse, Speed
from megatron_stepkto.sampling.vllm_engine import sampling_python, vllm_build, vllm_environment, yarn_positions

WORKER = "megatron_stepkto.sampling.worker"  # imports torch: not here


@dataclass(frozen=True)
class DrawResult:
    """``paths``: a file of Sample rows per pass. ``counts``: solutions, tokens, finish reasons, speed."""

    paths: dict[str, Path]
    counts: dict[str, Any]


def read_prompts(problems: Path, prompt: recipe.Prompt, tokenizer_dir: Path) -> list[PromptRow]:
    """The prompt tokens of a file of Problem rows, in its order.

    Raises:
        UserError: the prompt cannot be (see ``Prompts``), or a problem's text cannot be in one.
    """
    prompts = Prompts.of(prompt, tokenizer_dir)
    for message in prompts.warnings:
        warn(message)
    rows = []
    for problem in read_records(problems, Problem):
        try:
            rows.append(PromptRow(problem_id=problem.problem_id, token_ids=prompts.token_ids(problem.problem)))
        except BadText as error:
            raise UserError(f"{problems}: problem {problem.problem_id}: {error}") from None
    return rows


def sampling_dtype(settings: recipe.Sampling, model: Path, trained_in: str | None = None) -> Choice:
    """The dtype that ``sample.dtype`` means on this machine. trained_in: see ``choose_dtype``."""
    if settings.dtype != "auto":
        return Choice(settings.dtype)
    on_cpu = vllm_build() == "cpu" if settings.backend == "vllm" else not gpu_count()
    return choose_dtype(settings.dtype, model, on_cpu=on_cpu, trained_in=trained_in)


@dataclass(frozen=True)
class FixedDtype:
    """The dtype of the job in a folder, in place of auto.

    The process that begins the job chooses; all others, also later on another processor, take what it chose: samples
    of two dtypes never mix. Two that begin at the same instant may differ; ``Job.owns_chunks`` then stops one.
    """

    path: Path
    choice: Choice

    @classmethod
    def of(cls, settings: recipe.Sampling, model: Path, directory: Path, trained_in: str | None = None) -> FixedDtype:
        """What the job in ``directory`` was begun with, else what it would begin with. Writes nothing."""
        path = directory / "dtype.json"
        begun = read_json_if_there(path) if settings.dtype == "auto" else None
        return cls(path, Choice(**begun) if begun else sampling_dtype(settings, model, trained_in))

    def keep(self, title: str) -> None:
        """Fix the choice for all later processes, and say it, as the job begins."""
        if self.choice.reason and not self.path.exists():
            self.choice.announce(title)
            write_json(self.path, vars(self.choice))


@dataclass(frozen=True)
class Drawing:
    """A job, and how this process takes part in it.

    The samples of a reproducible job depend on the job alone, not on the number of workers nor on interruptions: a
    chunk has the engine for itself and meets an empty cache. Otherwise the requests that share a batch differ, and
    with them the last bits of log-probs. In both, each sample has its own seed, and a chunk's file is whole or absent.
    The samples of the first
    ``settings.gap_problems`` problems of each pass carry ``token_log_probs``: raw ones, of temperature 1.

    logs: what the workers print goes there.
    """

    job: Job
    title: str
    logs: Path
    dtype: FixedDtype | None = None

    def check(self) -> None:
        """Raises UserError for what drawing would refuse: the machine, the prompts."""
        check_engines(self.job.settings, self.job.model)
        check_prompts(self.job)

    def draw(self) -> None:
        """Take part until every chunk is sampled; see ``draw_all``."""
        draw_all([self])

    def finish(self) -> DrawResult:
        """Leave ``directory/<pass>.jsonl``, problems in order, samples in order; only when all is drawn."""
        job = self.job
        speed: dict[str, Any] = {}
        if not job.is_merged:  # once it is, any process may remove the chunks and the files beside them
            speed = _speed(job)
            for pass_ in job.passes:
                _merge(job, pass_, job.output(pass_))
        shutil.rmtree(job.chunk_dir, ignore_errors=True)
        paths = {pass_.name: job.output(pass_) for pass_ in job.passes}
        return DrawResult(paths, {**_count(job, paths), **speed})


def draw_all(drawings: Sequence[Drawing]) -> list[str]:
    """Take part in several jobs, one after the other, until every chunk is sampled; returns the titles of those that
    needed it. One engine serves all of them where ``EngineSettings.serve_both`` says so.

    Raises:
        UserError: the model does not fit the prompts or the machine, or the directory holds another job.
        StageFailed: a worker died; its log is named.
    """
    left = begun = [drawing for drawing in drawings if _begin(drawing)]
    while left:
        first = left[0].job
        group = [drawing for drawing in left if EngineSettings.serve_both(first, drawing.job)]
        left = [drawing for drawing in left if drawing not in group]
        _draw_missing(group)
    for drawing in drawings:
        if drawing.job.is_merged:  # by another process, while our workers' last reports created the folder again
            shutil.rmtree(drawing.job.chunk_dir, ignore_errors=True)
    return [drawing.title for drawing in begun]


def _begin(drawing: Drawing) -> bool:
    """Prepare the folder of a job; False where nothing is left to sample."""
    job = drawing.job
    try:
        if job.is_merged:
            return False
        check_prompts(job)
        if drawing.dtype is not None:
            drawing.dtype.keep(drawing.title)
        _claim(job)
    except (FileNotFoundError, FileExistsError):  # mkdir raises it, too, when the folder is removed at this instant
        if not job.is_merged:
            raise
    return bool(job.missing())


def new_drawing(
    model: Path, model_name: str, prompts: Sequence[PromptRow], passes: Sequence[Pass], settings: recipe.Sampling,
    seed: int, directory: Path, *, title: str, used_by: Path | None = None, trained_in: str | None = None,
) -> Drawing:  # fmt: skip
    """Every pass drawn from ``model``, in ``directory/<pass>.jsonl``; below ``directory/drawn`` where a file
    ``used_by`` is made of them, which then go. trained_in: see ``choose_dtype``."""
    dtype = FixedDtype.of(settings, model, directory, trained_in)
    job = Job(
        model=model, model_name=model_name, passes=list(passes), prompts=list(prompts),
        settings=settings.model_copy(update={"dtype": dtype.choice.dtype}), seed=seed,
        directory=directory / "drawn" if used_by else directory, used_by=used_by,
    )  # fmt: skip
    return Drawing(job, title, directory / "logs", dtype)


def check_prompts(job: Job) -> None:
    """Does the job's model take its prompts, and the longest response behind them?

    Raises:
        UserError: names the first problem whose prompt it does not take.
    """
    config = read_config(job.model)
    seen: set[str] = set()
    vocab_size, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    angles = yarn_positions(config) if job.settings.backend == "vllm" else None
    for prompt in job.prompts:
        if prompt.problem_id in seen:
            raise UserError(f"problem_id {prompt.problem_id} is duplicated; ids must be unique")
        seen.add(prompt.problem_id)
        if vocab_size is not None and max(prompt.token_ids) >= vocab_size:
            raise UserError(
                f"{job.model}: the prompt of problem {prompt.problem_id} holds token "
                f"{max(prompt.token_ids)}, the model's vocabulary is {vocab_size}; give the tokenizer of this model"
            )
        length = len(prompt.token_ids) + job.settings.max_tokens
        if positions is not None and length > positions:
            raise UserError(
                f"{job.model}: the prompt of problem {prompt.problem_id} has {len(prompt.token_ids)} tokens, "
                f"with sample.max_tokens ({job.settings.max_tokens}) that is {length}, and the model's "
                f"max_position_embeddings is {positions}; lower sample.max_tokens or drop the problem"
            )
        if angles is not None and length > angles:
            raise UserError(
                f"{job.model}: the prompt of problem {prompt.problem_id} has {len(prompt.token_ids)} tokens, "
                f"with sample.max_tokens ({job.settings.max_tokens}) that is {length}, and vLLM's table of YaRN angles "
                f"ends at {angles} (original_max_position_embeddings x factor): beyond it samples would be wrong "
                "without an error; lower sample.max_tokens, drop the problem, or set sample.backend: transformers"
            )


def _claim(job: Job) -> None:
    """Write the job for the workers; chunks of another job must not mix with these."""
    if job.owns_chunks() is False:
        raise UserError(
            f"{job.chunk_dir} holds unfinished samples of another model, prompts, seed or settings; "
            "restore the recipe, or delete the folder to sample again"
        )
    write_json(job.path, job.model_dump(mode="json"))


def _draw_missing(drawings: Sequence[Drawing]) -> None:
    """Sample the chunks that are missing of jobs that one engine serves, with this process's workers."""
    from megatron_stepkto.checkpoints.model_folder import check_model_folder  # imports torch

    jobs, first = [drawing.job for drawing in drawings], drawings[0]
    check_model_folder(first.job.model)  # a worker would fail with another library's message, or run out of memory
    me = f"{os.uname().nodename}-{os.getpid()}"
    # beside the chunks, another process that merges them could remove it while a worker starts
    files = [drawing.logs / f"job-{me}.json" for drawing in drawings]
    for job, file in zip(jobs, files, strict=True):
        write_json(file, job.model_dump(mode="json"))
    num_workers = min(first.job.settings.workers, sum(len(job.missing()) for job in jobs))
    names = [f"{me}-{worker}" for worker in range(num_workers)]

    def measure() -> Report:
        reports = [_measure(job, names) for job in jobs]
        for job, report in zip(jobs, reports, strict=True):
            with contextlib.suppress(FileNotFoundError):  # another process just merged all chunks
                ProgressFile(job.progress_path).report(*report)
        note = next((report.note for report in reversed(reports) if report.note), "")
        return Report(sum(report.done for report in reports), sum(report.total for report in reports), note)

    try:
        run_children(
            [_child(jobs, worker, name, files, first.logs) for worker, name in enumerate(names)],
            title=", ".join(drawing.title for drawing in drawings),
            unit="solutions",
            progress=measure,
        )
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    left = [chunk.file_name for job in jobs for chunk in job.missing()]
    assert not left, f"workers ended without an error, but left {left}"


def _measure(job: Job, workers: Sequence[str]) -> Report:
    """Solutions of all finished chunks, of any process, and those under way in this process's workers."""
    total = sum(chunk.num_solutions for chunk in job.chunks())
    done = total - sum(chunk.num_solutions for chunk in job.missing())
    pulses = [pulse for name in workers if (pulse := _read_pulse(job.pulse_path(name)))]
    notes = "  ".join(pulse.note for pulse in pulses if pulse.note)
    return Report(min(total, done + sum(pulse.solutions for pulse in pulses)), total, notes)


def _read_pulse(path: Path) -> Pulse | None:
    try:
        return Pulse.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


class _Stall:
    """Is a worker stuck? It is when its engine is busy and has generated no token for ``limit_s``."""

    def __init__(self, pulses: Sequence[Path], limit_s: float) -> None:
        """pulses: files of the worker's pulse, one per job, in the order of the work."""
        self._pulses, self._limit_s = pulses, limit_s
        self._last: list[Pulse | None] = []
        self._since = time.monotonic()

    def __call__(self) -> bool:
        pulses = [_read_pulse(path) for path in self._pulses]
        latest = next(filter(None, reversed(pulses)), None)
        if pulses != self._last or (latest is not None and not latest.busy):
            self._last, self._since = pulses, time.monotonic()
        if time.monotonic() - self._since <= self._limit_s:
            return False
        self._since = time.monotonic()  # the worker that is started again has as long
        return True


def _child(jobs: Sequence[Job], worker: int, name: str, files: Sequence[Path], logs: Path) -> Child:
    job = jobs[0]
    python = sampling_python() if job.settings.backend == "vllm" else sys.executable
    command = [python, "-m", WORKER, *map(str, files), "--name", name]
    env = {"OMP_NUM_THREADS": "1"}
    if job.settings.backend == "vllm":
        build = vllm_build()
        env = vllm_environment(build)
        if build == "gpu":
            env["CUDA_VISIBLE_DEVICES"] = gpus_of(worker, job.settings.tensor_parallel)
    elif job.settings.workers > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpus_of(worker, 1)
    stall = _Stall([job.pulse_path(name) for job in jobs], job.settings.stall_timeout_s)
    return Child(command, logs / f"worker-{worker}.log", env, stall)


def _merge(job: Job, pass_: Pass, path: Path) -> None:
    with atomic_writer(path, "wb") as file:
        for chunk in job.chunks():
            if chunk.pass_ == pass_:
                file.write((job.chunk_dir / chunk.file_name).read_bytes())


def _count(job: Job, paths: dict[str, Path]) -> dict[str, Any]:
    """Counts over all passes; asserts on the way that every sample is there, once and in order."""
    reasons: Counter[str] = Counter()
    tokens = empty = 0
    for pass_ in job.passes:
        expected = (
            job.sample_id(pass_, prompt.problem_id, number)
            for prompt in job.prompts
            for number in range(pass_.num_samples)
        )
        path = paths[pass_.name]
        for sample in read_records(path, Sample):
            if sample.sample_id != next(expected, None):
                raise UserError(
                    f"{path}: sample {sample.sample_id} does not belong to this job; delete the file to sample again"
                )
            reasons[sample.finish_reason] += 1
            tokens += len(sample.token_ids)
            empty += not sample.text.strip()
        if (lost := next(expected, None)) is not None:
            raise UserError(f"{path}: sample {lost} is missing; delete the file to sample again")
    return {
        "solutions": reasons.total(), "tokens": tokens, "empty": empty,
        "finish_reasons": dict(sorted(reasons.items())),
        "finished_share": round(reasons["stop"] / reasons.total(), 4),
        "dtype": job.settings.dtype, "reproducible": job.settings.reproducible,
    }  # fmt: skip


def _speed(job: Job) -> dict[str, Any]:
    """Speed of all workers that drew a chunk, of all processes and attempts."""
    reports = [read_json(path, Speed) for path in sorted(job.chunk_dir.glob("speed-*.json"))]
    rates = [report["tokens"] / report["generate_seconds"] for report in reports if report["generate_seconds"]]
    if not rates:
        return {}
    return {
        "engines": len(rates),
        "tokens_per_second_per_engine": round(sum(rates) / len(rates)),
        "engine_seconds": round(sum(r["generate_seconds"] + r["start_seconds"] for r in reports), 1),
        "engine_start_seconds": round(max(report["start_seconds"] for report in reports), 2),
    }
