"""What is to be drawn, and how it is cut: everything that decides the result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from megatron_stepkto.base.files import read_json_if_there, stable_hash
from megatron_stepkto.base.progress import PROGRESS
from megatron_stepkto.recipe import keys as recipe


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pass(_Frozen):
    """Draw ``num_samples`` solutions of every problem. Temperature 0 is greedy decoding."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    num_samples: int = Field(ge=1)
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)


class PromptRow(_Frozen):
    problem_id: str
    token_ids: list[int] = Field(min_length=1)


@dataclass(frozen=True)
class Chunk:
    """Problems [start, end) of one pass: one file, the unit of claiming and resuming."""

    pass_: Pass
    index: int
    start: int
    end: int

    @property
    def file_name(self) -> str:
        return f"{self.pass_.name}-{self.index:05d}.jsonl"

    @property
    def num_solutions(self) -> int:
        return (self.end - self.start) * self.pass_.num_samples


class Job(_Frozen):
    """All passes from one model. The same job gives the same samples on any number of workers.

    used_by: a file that is made of the samples; when it is there they may be gone. None: they stay.
    """

    model: Path
    model_name: str
    passes: list[Pass] = Field(min_length=1)
    prompts: list[PromptRow] = Field(min_length=1)
    settings: recipe.Sampling
    seed: int
    directory: Path
    used_by: Path | None = None

    @property
    def chunk_dir(self) -> Path:
        return self.directory / "chunks"

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + self.settings.max_tokens

    @property
    def sequences_per_chunk(self) -> int:
        return self.settings.chunk_problems * self.settings.num_samples

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in the order of their samples.

        A chunk of every pass holds about as many solutions as one of the recipe's K per problem: with one
        solution per problem it takes more problems, or the engine would run with small batches.
        """
        for pass_ in self.passes:
            size = max(1, self.sequences_per_chunk // pass_.num_samples)
            for index, start in enumerate(range(0, len(self.prompts), size)):
                yield Chunk(pass_, index, start, min(start + size, len(self.prompts)))

    def output(self, pass_: Pass) -> Path:
        """All samples of a pass, in order; it appears when every chunk is there."""
        return self.directory / f"{pass_.name}.jsonl"

    @property
    def is_merged(self) -> bool:
        # The order counts: the outputs go after the other file is there.
        merged = all(self.output(pass_).is_file() for pass_ in self.passes)
        return merged or (self.used_by is not None and self.used_by.is_file())

    def is_drawn(self, chunk: Chunk) -> bool:
        return (self.chunk_dir / chunk.file_name).is_file() or self.is_merged

    def missing(self) -> list[Chunk]:
        """Chunks that nobody has drawn."""
        try:
            found = set(os.listdir(self.chunk_dir))  # one look: a shared file system is slow at single ones
        except FileNotFoundError:
            found = set()
        # The order counts: when chunks are gone because another process merged them, the outputs are there by now.
        left = [chunk for chunk in self.chunks() if chunk.file_name not in found]
        return [] if left and self.is_merged else left

    @property
    def path(self) -> Path:
        """The job itself, beside the chunks that are drawn for it."""
        return self.chunk_dir / "job.json"

    def owns_chunks(self) -> bool | None:
        """Are the chunks in the folder those of this job? None: nobody has begun there."""
        begun = read_json_if_there(self.path, Job)
        return None if begun is None else Job.model_validate(begun)._identity() == self._identity()

    def _identity(self) -> dict[str, Any]:
        """What the samples depend on: not who draws them nor where the folders stand."""
        settings = recipe.deciding(self.settings)
        del settings["temperature"], settings["top_p"]  # the passes carry them
        parts = {name: getattr(self, name) for name in ("model_name", "passes", "prompts", "seed")}
        return {**parts, "settings": settings}

    def claim_path(self, chunk: Chunk) -> Path:
        """Folder of the lock that whoever draws the chunk holds."""
        return self.chunk_dir / "claims" / Path(chunk.file_name).stem

    def sample_id(self, pass_: Pass, problem_id: str, number: int) -> str:
        return f"{problem_id}/{self.model_name}/{pass_.name}/{number}"

    def sample_seed(self, pass_: Pass, problem_id: str, number: int) -> int:
        """A seed of 53 bits: a JSON number of that size survives every reader."""
        return stable_hash(self.seed, pass_.name, problem_id, number) >> 11

    @property
    def progress_path(self) -> Path:
        """How far all processes together are."""
        return self.chunk_dir / PROGRESS

    def pulse_path(self, worker: str) -> Path:
        """What a worker is at: a ``Pulse``."""
        return self.chunk_dir / f"pulse-{worker}.json"

    def speed_path(self, worker: str) -> Path:
        """Where a worker leaves {tokens, generate_seconds, start_seconds} after every chunk."""
        return self.chunk_dir / f"speed-{worker}.json"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is opened with, for one job or several that it serves one after the other.

    max_length: tokens of the longest prompt with the longest response of all jobs.
    """

    model: Path
    settings: recipe.Sampling
    sequences_per_chunk: int
    max_length: int

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> EngineSettings:
        first = jobs[0]
        return cls(first.model, first.settings, first.sequences_per_chunk, max(job.max_length for job in jobs))

    @staticmethod
    def serve_both(one: Job, other: Job) -> bool:
        """Whether one engine can serve two jobs without changing the tokens of either."""
        return EngineSettings._identity(one) == EngineSettings._identity(other)

    @staticmethod
    def _identity(job: Job) -> tuple[Any, ...]:
        batch = job.sequences_per_chunk if job.settings.reproducible else None
        return job.model, recipe.deciding(job.settings, evaluation=True), batch


class Speed(BaseModel):
    """What a worker leaves of its speed."""

    tokens: int
    generate_seconds: float
    start_seconds: float


class Pulse(_Frozen):
    """A worker's sign of life. tokens: all that its engine generated, also for requests that are not finished.

    busy: it starts its engine or draws; otherwise it waits for chunks that other workers have claimed.
    """

    busy: bool
    solutions: int  # finished, of chunks that are not written yet
    tokens: int
    note: str = ""
