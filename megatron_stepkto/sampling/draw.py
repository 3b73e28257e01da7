"""Draw solutions with any number of worker processes; killed at any instant, the same call goes on."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_stepkto import recipe
from megatron_stepkto.errors import UserError
from megatron_stepkto.files import atomic_writer, read_json, write_json
from megatron_stepkto.processes import Child, run_children
from megatron_stepkto.prompts import load_tokenizer, prompt_token_ids
from megatron_stepkto.records import Problem, Sample, read_records
from megatron_stepkto.sampling.job import Job, Pass, PromptRow
from megatron_stepkto.sampling.vllm_engine import vllm_build, vllm_environment

__all__ = ["DrawResult", "Pass", "PromptRow", "draw", "draw_samples", "read_prompts"]


@dataclass(frozen=True)
class DrawResult:
    """``paths``: a file of Sample rows per pass. ``counts``: solutions, tokens, finish reasons, speed."""

    paths: dict[str, Path]
    counts: dict[str, Any]


def read_prompts(problems: Path, prompt: recipe.Prompt, tokenizer_dir: Path) -> list[PromptRow]:
    """The prompt tokens of a file of Problem rows, in its order."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return [
        PromptRow(problem_id=problem.problem_id, token_ids=prompt_token_ids(prompt, problem.problem, tokenizer))
        for problem in read_records(problems, Problem)
    ]


def draw_samples(
    model: Path,
    model_name: str,
    problems: Path,
    prompt: recipe.Prompt,
    settings: recipe.Sampling,
    seed: int,
    directory: Path,
    *,
    title: str,
) -> tuple[Path, dict[str, Any]]:
    """The sample stage: K solutions of each problem of a file, in ``directory/samples.jsonl``; see ``draw``."""
    pass_ = Pass(
        name="samples",
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    prompts = read_prompts(problems, prompt, model)
    result = draw(model, model_name, prompts, [pass_], settings, seed, directory, title=title)
    return result.paths["samples"], result.counts


def draw(
    model: Path,
    model_name: str,
    prompts: Sequence[PromptRow],
    passes: Sequence[Pass],
    settings: recipe.Sampling,
    seed: int,
    directory: Path,
    *,
    title: str,
    logs: Path | None = None,
) -> DrawResult:
    """Draw every pass from ``model``; leaves ``directory/<pass>.jsonl``, problems in order, samples in order.

    The samples depend on the job alone, not on the number of workers nor on interruptions: what is drawn in
    one call of the engine is fixed by the job, the engine starts each call with an empty cache, each sample
    has its own seed, and a chunk's file is whole or absent. The samples of the first
    ``settings.gap_problems`` problems of each pass carry ``token_log_probs``: raw ones, of temperature 1.
    What the workers print goes to ``logs`` (None: ``directory/logs``).

    Raises:
        UserError: the model does not fit the prompts or the machine, or ``directory`` holds another job.
        StageFailed: a worker died; its log is named.
    """
    job = Job(
        model=model, model_name=model_name, passes=list(passes), prompts=list(prompts), settings=settings,
        seed=seed, directory=directory,
    )  # fmt: skip
    _check(job)
    merged = directory / "chunks.merged"
    if merged.is_dir():
        shutil.rmtree(merged)
    paths = {pass_.name: directory / f"{pass_.name}.jsonl" for pass_ in passes}
    speed: dict[str, Any] = {}
    if job.chunk_dir.is_dir() or not all(path.is_file() for path in paths.values()):
        _claim(job)
        _draw_missing(job, title, logs or directory / "logs")
        for pass_ in passes:
            _merge(job, pass_, paths[pass_.name])
        speed = _speed(job)
        # by rename first: a folder of which half is deleted would look like work to do
        job.chunk_dir.rename(merged)
        shutil.rmtree(merged)
    return DrawResult(paths, {**_count(job, paths), **speed})


def _check(job: Job) -> None:
    config = read_json(job.model / "config.json")
    seen: set[str] = set()
    vocab_size, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    for prompt in job.prompts:
        if prompt.problem_id in seen:
            raise UserError(f"problem_id {prompt.problem_id} stands twice; ids must be unique")
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


def _claim(job: Job) -> None:
    """Write the job for the workers; chunks of another job must not mix with these."""
    path = job.chunk_dir / "job.json"
    ours = job.model_dump(mode="json")
    if path.is_file() and _identity(read_json(path)) != _identity(ours):
        raise UserError(
            f"{job.chunk_dir} holds unfinished samples of another model, prompts, seed or settings; "
            "restore the recipe, or delete the folder to draw anew"
        )
    write_json(path, ours)


def _identity(job: dict[str, Any]) -> dict[str, Any]:
    """What the samples depend on: not who draws them nor where the folders stand."""
    # the passes carry the temperatures
    settings = {k: v for k, v in job["settings"].items() if k not in ("workers", "temperature", "top_p")}
    return {key: job[key] for key in ("model_name", "passes", "prompts", "seed")} | {"settings": settings}


def _draw_missing(job: Job, title: str, logs: Path) -> None:
    missing = sum(chunk.num_solutions for chunk in job.missing())
    if not missing:
        return
    total = sum(chunk.num_solutions for chunk in job.chunks())
    workers = [worker for worker in range(job.settings.workers) if job.missing(worker)]
    for worker in range(job.settings.workers):
        job.progress_path(worker).unlink(missing_ok=True)
        job.speed_path(worker).unlink(missing_ok=True)
    run_children(
        [_child(job, worker, logs) for worker in workers],
        title=title,
        unit="solutions",
        progress=[job.progress_path(worker) for worker in workers],
        done_before=total - missing,
    )
    left = [chunk.file_name for chunk in job.missing()]
    assert not left, f"workers ended well without {left}"


def _child(job: Job, worker: int, logs: Path) -> Child:
    command = [
        sys.executable, "-m", "megatron_stepkto.sampling.worker",
        str(job.chunk_dir / "job.json"), "--worker", str(worker),
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1"}
    if job.settings.backend == "vllm":
        build = vllm_build()
        env = vllm_environment(build)
        if build == "gpu":
            env["CUDA_VISIBLE_DEVICES"] = _gpus_of(worker, job.settings.tensor_parallel)
    elif job.settings.workers > 1:
        env["CUDA_VISIBLE_DEVICES"] = _gpus_of(worker, 1)
    return Child(command, logs / f"worker-{worker}.log", env)


def _gpus_of(worker: int, count: int) -> str:
    """The worker's own GPUs, out of those that this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = worker * count
    if allowed is None:
        return ",".join(str(number) for number in range(first, first + count))
    return ",".join(allowed.split(",")[first : first + count])


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
                raise UserError(f"{path}: sample {sample.sample_id} is not of this job; delete the file")
            reasons[sample.finish_reason] += 1
            tokens += len(sample.token_ids)
            empty += not sample.text.strip()
        if (lost := next(expected, None)) is not None:
            raise UserError(f"{path}: sample {lost} is missing; delete the file to draw anew")
    return {
        "solutions": reasons.total(), "tokens": tokens, "empty": empty,
        "finish_reasons": dict(sorted(reasons.items())),
    }  # fmt: skip


def _speed(job: Job) -> dict[str, Any]:
    """Speed of this attempt's workers; nothing where every chunk was there already."""
    reports = [read_json(path) for path in map(job.speed_path, range(job.settings.workers)) if path.is_file()]
    slowest = max((report["generate_seconds"] for report in reports), default=0.0)
    if not slowest:
        return {}
    return {
        "tokens_per_second": round(sum(report["tokens"] for report in reports) / slowest),
        "engine_start_seconds": round(max(report["start_seconds"] for report in reports), 2),
    }
