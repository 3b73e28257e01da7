"""One sampling process: ``python -m megatron_stepkto.sampling.worker JOB --worker I`` draws its chunks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.files import read_json, write_json
from megatron_stepkto.processes import child_main
from megatron_stepkto.progress import ProgressFile
from megatron_stepkto.prompts import load_tokenizer
from megatron_stepkto.records import Sample, Sampler, write_records
from megatron_stepkto.sampling.engines import (
    Completion,
    Engine,
    Request,
    check_completion,
    end_token_ids,
    open_engine,
)
from megatron_stepkto.sampling.job import Chunk, Job


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--worker", type=int, required=True)
    arguments = parser.parse_args()
    Worker(Job.model_validate(read_json(arguments.job)), arguments.worker).run()


class Worker:
    def __init__(self, job: Job, number: int) -> None:
        self._job, self._number = job, number
        self._chunks = job.missing(number)
        self._total = sum(chunk.num_solutions for chunk in self._chunks)
        self._progress = ProgressFile(job.progress_path(number))
        self._done = self._tokens = 0
        self._seconds = 0.0
        self._vocab_size: int | None = read_json(job.model / "config.json").get("vocab_size")

    def run(self) -> None:
        self._progress.report(0, self._total, "starting the engine", last=True)
        begun = time.monotonic()
        tokenizer = load_tokenizer(self._job.model)
        engine = open_engine(self._job, end_token_ids(self._job.model, tokenizer))
        start_seconds = time.monotonic() - begun
        for chunk in self._chunks:
            self._draw(chunk, engine, tokenizer)
        self._progress.report(self._done, self._total, self._note(), last=True)
        speed = {"tokens": self._tokens, "generate_seconds": self._seconds, "start_seconds": start_seconds}
        write_json(self._job.speed_path(self._number), speed)

    def _draw(self, chunk: Chunk, engine: Engine, tokenizer: Any) -> None:
        requests = chunk_requests(self._job, chunk)
        begun = time.monotonic()
        completions = engine.generate(
            requests,
            lambda finished: self._progress.report(self._done + finished, self._total, self._note()),
        )
        self._seconds += time.monotonic() - begun
        self._tokens += sum(len(completion.token_ids) for completion in completions)
        samples = chunk_samples(self._job, chunk, requests, completions, tokenizer, self._vocab_size)
        write_records(self._job.chunk_dir / chunk.file_name, samples)
        self._done += chunk.num_solutions

    def _note(self) -> str:
        return f"{self._tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""


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
