"""One sampling process: ``python -m megatron_stepkto.sampling.worker JOB WORKER WORKERS``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_stepkto.files import read_json
from megatron_stepkto.processes import child_main
from megatron_stepkto.progress import ProgressFile
from megatron_stepkto.prompts import load_tokenizer
from megatron_stepkto.records import Sample, Sampler, write_records
from megatron_stepkto.sampling.draw import Chunk, DrawJob
from megatron_stepkto.sampling.engines import Engine, Request, close, start_engine


def main() -> None:
    job = DrawJob.model_validate(read_json(Path(sys.argv[1])))
    worker, workers = int(sys.argv[2]), int(sys.argv[3])
    missing = [chunk for chunk in job.chunks() if not job.path(chunk).exists()]
    mine = missing[worker::workers]
    progress = ProgressFile(job.progress(worker))
    total = sum(chunk.num_samples for chunk in mine)
    progress.report(0, total, "starting the engine", last=True)
    tokenizer = load_tokenizer(job.model)
    # From the whole job, not from what is left of it: the engine must be the same after an interruption.
    engine = start_engine(job.model, job.settings, max(chunk.num_samples for chunk in job.chunks()))
    done = 0
    for chunk in mine:
        write_records(job.path(chunk), complete_chunk(engine, job, chunk, tokenizer))
        done += chunk.num_samples
        progress.report(done, total, last=True)
    close(engine)


def complete_chunk(engine: Engine, job: DrawJob, chunk: Chunk, tokenizer: Any) -> list[Sample]:
    """All samples of a chunk, in problem order, drawn in one call."""
    numbered = [
        (index, prompt, number)
        for index, prompt in enumerate(job.prompts[chunk.start : chunk.end], chunk.start)
        for number in range(chunk.of.num_samples)
    ]
    requests = [
        Request(
            prompt.token_ids, chunk.of.temperature, chunk.of.top_p, job.settings.max_tokens,
            job.sample_seed(chunk.of.name, prompt.problem_id, number),
            # a fixed few, spread over nothing: the first problems of the pass
            want_log_probs=index < job.settings.gap_problems and chunk.of.temperature > 0,
        )
        for index, prompt, number in numbered
    ]
    samples = []
    for (_, prompt, number), request, completion in zip(numbered, requests, engine.complete(requests), strict=True):
        samples.append(Sample(
            problem_id=prompt.problem_id,
            sample_id=f"{prompt.problem_id}/{job.model_name}/{chunk.of.name}/{number}",
            prompt_token_ids=prompt.token_ids, token_ids=completion.token_ids,
            text=tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            sampler=Sampler(model=job.model_name, temperature=request.temperature, top_p=request.top_p, seed=request.seed),
            token_log_probs=completion.log_probs,
        ))
    return samples


if __name__ == "__main__":
    child_main(main)
