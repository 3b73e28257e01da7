"""One sampling process: ``python -m megatron_stepkto.sampling.worker JOB... --name NAME`` samples what nobody samples.

A chunk is claimed before it is sampled, by the lock of its name, so that any number of workers on any hosts share
a job: one that comes late helps, and the claim of one that died is taken over. A chunk's file is whole or absent.

A worker claims its next chunk as soon as every request of the others has begun, so that the engine is always full; not
so in a reproducible job, where each chunk has the engine for itself. One engine serves all jobs, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, read_json_object, stable_hash, write_json
from megatron_stepkto.base.locks import Lock, Watch, try_lock
from megatron_stepkto.base.processes import child_main
from megatron_stepkto.base.records import Sample, Sampler, write_records
from megatron_stepkto.base.storage import check_space, writing
from megatron_stepkto.recipe.prompts import end_token_ids, load_tokenizer
from megatron_stepkto.sampling.engines import EngineSettings, check_completion, open_engine
from megatron_stepkto.sampling.interface import Completion, Engine, Request
from megatron_stepkto.sampling.job import Chunk, Job, Pulse

PULSE_EVERY_S = 0.3
SCRATCH_BYTES = 64 << 20
LOOK_AGAIN_S = 1.0  # when all chunks that are left are in others' hands
ALIVE_S = 300.0  # a worker whose pulse is older than that of this one by so much is not counted: engines start in less


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path, nargs="+", metavar="JOB")
    parser.add_argument("--name", required=True, help="unique among all workers of the jobs")
    arguments = parser.parse_args()
    jobs = [Job.model_validate(read_json(path)) for path in arguments.jobs]
    engine = SharedEngine(jobs)
    for job in jobs:
        Worker(job, arguments.name, engine).run()


class SharedEngine:
    """The engine of all jobs; opened by the first that has something to sample."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.settings = EngineSettings.of(jobs)
        self.tokenizer = load_tokenizer(self.settings.model)
        self.vocab_size: int | None = read_json_object(self.settings.model / "config.json").get("vocab_size")
        self._engine: Engine | None = None

    @property
    def is_open(self) -> bool:
        return self._engine is not None

    def get(self) -> Engine:
        if self._engine is None:
            # without room an engine fails in a library or a compiler, whose messages do not say so
            check_space(Path(tempfile.gettempdir()), SCRATCH_BYTES, "an engine's temporary files (TMPDIR)")
            self._engine = open_engine(self.settings, end_token_ids(self.settings.model, self.tokenizer))
        return self._engine


@dataclass
class Claimed:
    """A chunk that this worker samples."""

    chunk: Chunk
    lock: Lock
    requests: list[Request]
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        return len(self.requests) - len(self.completions)


class Worker:
    def __init__(self, job: Job, name: str, engine: SharedEngine) -> None:
        self._job, self._name, self._shared = job, name, engine
        self._watch = Watch()
        self._claimed: dict[str, Claimed] = {}  # by the file's name
        self._tokens = 0
        self._last_pulse = self._seconds = self._start_seconds = 0.0
        self._next_look = 0.0

    def run(self) -> None:
        """Sample until no chunk of the job is missing."""
        try:
            while True:
                self._claim_more()
                if self._claimed:
                    self._step()
                elif not self._job.missing():
                    return
                else:
                    self._pulse(busy=False, now=True)
                    time.sleep(LOOK_AGAIN_S)
        finally:
            for claimed in self._claimed.values():
                claimed.lock.release()

    def _claim_more(self) -> None:
        """Claim the next chunk where the engine has room for it."""
        if self._claimed:
            if self._job.settings.reproducible or not self._shared.get().wants_more:
                return
            if time.monotonic() < self._next_look:  # of a folder that may be on a slow file system
                return
        missing = [chunk for chunk in self._job.missing() if chunk.file_name not in self._claimed]
        claimed = self._claim(missing) if missing and self._is_my_turn(missing) else None
        if claimed is None:
            self._next_look = time.monotonic() + LOOK_AGAIN_S
            return
        name = claimed.chunk.file_name
        self._claimed[name] = claimed  # before anything fails: ``run`` releases its lock
        engine = self._open()  # not before: a worker that finds nothing to do loads no model
        if len(self._claimed) == 1:
            engine.reset()
        engine.add({f"{name} {number}": request for number, request in enumerate(claimed.requests)})
        self._pulse(busy=True, now=True)

    def _is_my_turn(self, missing: Sequence[Chunk]) -> bool:
        """Whether a further chunk leaves enough for the other workers of the job: at the end all shall be busy."""
        if not self._claimed:
            return True
        mine = sum(claimed.unfinished for claimed in self._claimed.values())
        left = mine + sum(chunk.num_solutions for chunk in missing)
        return mine + missing[0].num_solutions <= math.ceil(left / self._workers())

    def _workers(self) -> int:
        """Workers of all processes that sample this job now. Times of one file system are compared, not clocks."""
        times = {}
        for path in self._job.chunk_dir.glob("pulse-*.json"):
            with contextlib.suppress(FileNotFoundError):
                times[path] = path.stat().st_mtime
        now = times.get(self._job.pulse_path(self._name), max(times.values(), default=0.0))
        return max(1, sum(now - time < ALIVE_S for time in times.values()))

    def _claim(self, missing: Sequence[Chunk]) -> Claimed | None:
        """A chunk that nobody alive is at. Each worker looks from a place of its own, or all would collide."""
        first = stable_hash(self._name) % len(missing)
        for chunk in [*missing[first:], *missing[:first]]:
            lock = None
            with contextlib.suppress(FileNotFoundError):  # another process just merged all chunks
                lock = try_lock(self._job.claim_path(chunk), self._watch)
            if not isinstance(lock, Lock):
                continue
            if not self._job.is_drawn(chunk):
                return Claimed(chunk, lock, chunk_requests(self._job, chunk))
            lock.release()  # its owner finished it between our two looks
        return None

    def _open(self) -> Engine:
        if self._shared.is_open:
            return self._shared.get()
        self._pulse(busy=True, note="starting the engine", now=True)
        begun = time.monotonic()
        engine = self._shared.get()
        self._start_seconds = time.monotonic() - begun
        return engine

    def _step(self) -> None:
        begun = time.monotonic()
        for key, completion in self._shared.get().step(self._report).items():
            name, number = key.split(" ")
            self._claimed[name].completions[int(number)] = completion
        self._seconds += time.monotonic() - begun
        self._report(0)
        for name in [name for name, claimed in self._claimed.items() if not claimed.unfinished]:
            claimed = self._claimed.pop(name)
            try:
                self._write(claimed)
            finally:
                claimed.lock.release()

    def _report(self, new_tokens: int) -> None:
        self._tokens += new_tokens
        self._pulse(busy=True)

    def _write(self, claimed: Claimed) -> None:
        completions = [claimed.completions[number] for number in range(len(claimed.requests))]
        samples = chunk_samples(
            self._job, claimed.chunk, claimed.requests, completions, self._shared.tokenizer, self._shared.vocab_size
        )
        if self._job.is_merged:
            return  # this host hung for minutes: another process drew the chunk, too, and merged and removed all
        if not self._job.owns_chunks():  # a chunk of these settings would be taken for one of the others
            raise UserError(
                f"{self._job.chunk_dir}: another process removed what was drawn, to draw with other settings "
                "(--force); these solutions are not wanted any more: stopping"
            )
        speed = {"tokens": self._tokens, "generate_seconds": self._seconds, "start_seconds": self._start_seconds}
        write_json(self._job.speed_path(self._name), speed)
        # The last act: once all chunks are there, another process may merge them and remove the folder.
        write_records(self._job.chunk_dir / claimed.chunk.file_name, samples)

    def _pulse(self, *, busy: bool, note: str = "", now: bool = False) -> None:
        if now or time.monotonic() - self._last_pulse >= PULSE_EVERY_S:
            self._last_pulse = time.monotonic()
            if self._seconds and not note:
                note = f"{self._tokens / self._seconds:,.0f} tokens/s"
            solutions = sum(len(claimed.completions) for claimed in self._claimed.values())
            pulse = Pulse(busy=busy, solutions=solutions, tokens=self._tokens, note=note)
            path = self._job.pulse_path(self._name)
            draft = path.with_suffix(".tmp")
            with contextlib.suppress(FileNotFoundError), writing(path):
                draft.write_text(pulse.model_dump_json())
                draft.replace(path)


def chunk_requests(job: Job, chunk: Chunk) -> list[Request]:
    """Requests of a chunk, problem by problem; the job's first ``gap_problems`` problems ask for log-probs."""
    return [
        Request(
            prompt.token_ids,
            job.sample_seed(chunk.pass_, prompt.problem_id, number),
            chunk.pass_.temperature,
            chunk.pass_.top_p,
            position < job.settings.gap_problems,
        )
        for position, prompt in enumerate(job.prompts[chunk.start : chunk.end], chunk.start)
        for number in range(chunk.pass_.num_samples)
    ]


def chunk_samples(
    job: Job,
    chunk: Chunk,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    tokenizer: Any,
    vocab_size: int | None,
) -> list[Sample]:
    """Records of a chunk. The text is the decoding of the tokens, special tokens left out.

    Raises:
        UserError: a completion that cannot be (see ``check_completion``).
    """
    texts = tokenizer.batch_decode(
        [completion.token_ids for completion in completions],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    prompts = job.prompts[chunk.start : chunk.end]
    samples = []
    for position, (request, completion, text) in enumerate(zip(requests, completions, texts, strict=True)):
        row, number = divmod(position, chunk.pass_.num_samples)
        problem_id = prompts[row].problem_id
        sample_id = job.sample_id(chunk.pass_, problem_id, number)
        check_completion(completion, vocab_size, sample_id)
        sampler = Sampler(model=job.model_name, temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        samples.append(
            Sample(
                problem_id=problem_id,
                sample_id=sample_id,
                prompt_token_ids=request.token_ids,
                token_ids=completion.token_ids,
                text=text,
                finish_reason=completion.finish_reason,
                sampler=sampler,
                token_log_probs=completion.log_probs,
            )
        )
    return samples


if __name__ == "__main__":
    child_main(main)
