"""What is to be drawn, and how it is cut: everything that decides the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from megatron_stepkto import recipe
from megatron_stepkto.files import stable_hash


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
    """Problems [start, end) of one pass: one call of the engine, one file, the unit of resuming."""

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
    """All passes from one model. The same job gives the same samples on any number of workers."""

    model: Path
    model_name: str
    passes: list[Pass] = Field(min_length=1)
    prompts: list[PromptRow] = Field(min_length=1)
    settings: recipe.Sampling
    seed: int
    directory: Path

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

    def missing(self, worker: int | None = None) -> list[Chunk]:
        """Chunks without a file; those of one worker, or all."""
        return [
            chunk
            for number, chunk in enumerate(self.chunks())
            if (worker is None or number % self.settings.workers == worker)
            and not (self.chunk_dir / chunk.file_name).is_file()
        ]

    def sample_id(self, pass_: Pass, problem_id: str, number: int) -> str:
        return f"{problem_id}/{self.model_name}/{pass_.name}/{number}"

    def sample_seed(self, pass_: Pass, problem_id: str, number: int) -> int:
        """A seed of 53 bits: a JSON number of that size survives every reader."""
        return stable_hash(self.seed, pass_.name, problem_id, number) >> 11

    def progress_path(self, worker: int) -> Path:
        return self.chunk_dir / f"progress-{worker}.json"

    def speed_path(self, worker: int) -> Path:
        """Where a worker leaves {tokens, generate_seconds, start_seconds} of its last attempt."""
        return self.chunk_dir / f"speed-{worker}.json"
