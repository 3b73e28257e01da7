"""Whether engines stay full, on an engine that counts: one step generates one token of each request that runs."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling import draw, worker
from megatron_stepkto.sampling.interface import Completion, Report, Request
from megatron_stepkto.sampling.job import EngineSettings, Job, Pass, PromptRow, Pulse
from megatron_stepkto.sampling.worker import SharedEngine, Worker

SLOTS, CHUNK, PROBLEMS = 16, 20, 400


def length(request: Request) -> int:
    """Of a completion: lognormal with sigma 0.6 and mean 8.6 (a hundredth of a real solution), at most 20."""
    return min(20, max(1, round(random.Random(request.seed).lognormvariate(1.97, 0.6))))


class CountingEngine:
    def __init__(self) -> None:
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, list[int]] = {}
        self.steps = self.resets = self.most = 0
        self.added: list[str] = []

    @property
    def wants_more(self) -> bool:
        return not self.waiting

    def add(self, requests: Mapping[str, Request]) -> None:
        self.waiting.update(requests)
        self.added += requests
        self.most = max(self.most, len(self.waiting) + len(self.running))

    def step(self, report: Report) -> dict[str, Completion]:
        while self.waiting and len(self.running) < SLOTS:
            key, request = next(iter(self.waiting.items()))
            del self.waiting[key]
            self.running[key] = [length(request), 0]
        self.steps += 1
        for counts in self.running.values():
            counts[1] += 1
        report(len(self.running))
        done = {key: counts[1] for key, counts in self.running.items() if counts[0] == counts[1]}
        for key in done:
            del self.running[key]
        return {key: Completion([7] * number, "stop", None) for key, number in done.items()}

    def reset(self) -> None:
        assert not self.waiting
        assert not self.running
        self.resets += 1


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """20 chunks of 20 requests."""
    build_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    settings = Sampling(
        backend="transformers", num_samples=1, chunk_problems=CHUNK, max_tokens=20, gap_problems=0, reproducible=False
    )
    return Job(
        model=tmp_path / "model", model_name="M0", settings=settings, seed=3, directory=tmp_path / "sample",
        prompts=[PromptRow(problem_id=f"p{number}", token_ids=[5]) for number in range(PROBLEMS)],
        passes=[Pass(name="samples", num_samples=1, temperature=1.0, top_p=1.0)],
    )  # fmt: skip


def reproducible(job: Job) -> Job:
    return job.model_copy(update={"settings": job.settings.model_copy(update={"reproducible": True})})


def work(job: Job, monkeypatch: pytest.MonkeyPatch, engine: CountingEngine) -> None:
    monkeypatch.setattr(worker, "open_engine", lambda *_: engine)
    draw._claim(job)
    Worker(job, "w", SharedEngine([job])).run()
    assert not job.missing()


def rows(job: Job) -> list[str]:
    return [line for chunk in job.chunks() for line in (job.chunk_dir / chunk.file_name).read_text().splitlines()]


def test_an_engine_that_is_fed_is_always_full(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a full engine: all tokens over all slots. The last chunk's slowest request may add 20."""
    fed, alone = CountingEngine(), CountingEngine()
    work(job, monkeypatch, fed)
    tokens = sum(len(json.loads(row)["token_ids"]) for row in rows(job))
    assert fed.steps <= tokens / SLOTS + 20
    assert fed.most <= SLOTS - 1 + 2 * CHUNK, "one chunk waits at most, and what runs may be of others"
    again = reproducible(job).model_copy(update={"directory": job.directory.parent / "again"})
    work(again, monkeypatch, alone)
    assert rows(again) == rows(job)
    assert alone.steps > 1.25 * fed.steps, "each chunk waits for its slowest request"


def test_a_reproducible_chunk_has_the_engine_for_itself(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CountingEngine()
    work(reproducible(job), monkeypatch, engine)
    assert engine.most == CHUNK
    assert engine.resets == PROBLEMS // CHUNK


def test_killed_at_any_step_and_resumed_loses_nothing_and_samples_nothing_twice(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    whole = CountingEngine()
    work(job.model_copy(update={"directory": job.directory.parent / "whole"}), monkeypatch, whole)
    begun: list[str] = []
    for _ in range(3):
        engine = CountingEngine()
        step = engine.step

        def killed(report: Report, engine: CountingEngine = engine, step=step) -> dict[str, Completion]:  # type: ignore[no-untyped-def]
            if engine.steps == 70:
                raise Killed
            return step(report)  # type: ignore[no-any-return]

        monkeypatch.setattr(engine, "step", killed)
        with pytest.raises(Killed):
            work(job, monkeypatch, engine)
        kept = {chunk.file_name for chunk in job.chunks() if (job.chunk_dir / chunk.file_name).exists()}
        begun += [key for key in engine.added if key.split(" ")[0] in kept]
    assert begun, "nothing was finished before the first kill"
    last = CountingEngine()
    work(job, monkeypatch, last)
    assert sorted(begun + last.added) == sorted(whole.added), "each chunk that was written was sampled once"
    assert rows(job) == rows(job.model_copy(update={"directory": job.directory.parent / "whole"}))


@pytest.mark.parametrize(("others", "most"), [(0, SLOTS - 1 + 2 * CHUNK), (9, 2 * CHUNK), (19, CHUNK)])
def test_the_last_chunks_are_left_to_the_other_workers(
    job: Job, monkeypatch: pytest.MonkeyPatch, others: int, most: int
) -> None:
    """20 chunks: with 20 workers there is one for each."""
    job.chunk_dir.mkdir(parents=True)
    for number in range(others):
        job.pulse_path(f"other-{number}").write_text(Pulse(busy=True, solutions=0, tokens=0).model_dump_json())
    dead = job.pulse_path("dead")
    dead.write_text("{}")
    os.utime(dead, (time.time() - 400, time.time() - 400))
    engine = CountingEngine()
    work(job, monkeypatch, engine)
    assert engine.most <= most


def test_one_engine_serves_two_jobs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of two engines."""
    second = job.model_copy(update={"directory": job.directory.parent / "second", "seed": 4})
    engine, opened = CountingEngine(), []
    monkeypatch.setattr(worker, "open_engine", lambda *_: opened.append(1) or engine)
    shared = SharedEngine([job, second])
    for each in (job, second):
        draw._claim(each)
        Worker(each, "w", shared).run()
    assert len(opened) == 1
    third = second.model_copy(update={"directory": job.directory.parent / "third"})
    work(third, monkeypatch, CountingEngine())
    assert rows(second) == rows(third)


def test_which_jobs_one_engine_serves(job: Job) -> None:
    """An evaluation and the sampling after it: other numbers of samples, the same batches."""
    evaluation = job.model_copy(update={"settings": job.settings.model_copy(update={"num_samples": 4})})
    assert EngineSettings.serve_both(job, evaluation)
    assert not EngineSettings.serve_both(reproducible(job), reproducible(evaluation)), "other batches, other bits"
    assert not EngineSettings.serve_both(job, job.model_copy(update={"model": Path("other")}))
    longer = job.model_copy(update={"prompts": [PromptRow(problem_id="p", token_ids=[5] * 30)]})
    assert EngineSettings.of([job, longer]).max_length == 50
