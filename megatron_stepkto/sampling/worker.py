"""One sampling process: ``python -m megatron_stepkto.sampling.worker JOB --name NAME`` draws what nobody draws.

A chunk is claimed before it is drawn, by the lock of its name, so that any number of workers on any hosts share
a job: one that comes late helps, and the claim of one that died is taken over. A chunk's file is whole or absent.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, read_json_object, stable_hash, write_json
from megatron_stepkto.base.locks import Lock, Watch, try_lock
from megatron_stepkto.base.processes import child_main
from megatron_stepkto.base.records import Sample, Sampler, write_records
from megatron_stepkto.base.storage import check_space, writing
from megatron_stepkto.recipe.prompts import end_token_ids, load_tokenizer
from megatron_stepkto.sampling.engines import check_completion, open_engine
from megatron_stepkto.sampling.interface import Completion, Engine, Request
from megatron_stepkto.sampling.job import Chunk, Job, Pulse

PULSE_EVERY_S = 0.3
SCRATCH_BYTES = 64 << 20
LOOK_AGAIN_S = 1.0  # when all chunks that are left are in others' hands


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--name", required=True, help="unique among all workers of the job")
    arguments = parser.parse_args()
    Worker(Job.model_validate(read_json(arguments.job)), arguments.name).run()


class Worker:
    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._watch = Watch()
        self._tokens = self._drawn_tokens = 0
        self._last_pulse = self._seconds = self._start_seconds = 0.0
        self._vocab_size: int | None = read_json_object(job.model / "config.json").get("vocab_size")

    def run(self) -> None:
        engine: Engine | None = None
        tokenizer = load_tokenizer(self._job.model)
        while missing := self._job.missing():
            claimed = self._claim(missing)
            if claimed is None:
                self._pulse(busy=False, solutions=0, now=True)
                time.sleep(LOOK_AGAIN_S)
                continue
            chunk, claim = claimed
            try:
                if self._job.is_drawn(chunk):  # its owner finished it between our two looks
                    continue
                if engine is None:  # not before: a worker that finds nothing to do loads no model
                    engine = self._open(tokenizer)
                self._draw(chunk, engine, tokenizer)
            finally:
                claim.release()

    def _claim(self, missing: Sequence[Chunk]) -> tuple[Chunk, Lock] | None:
        """A chunk that nobody alive is at. Each worker looks from a place of its own, or all would collide."""
        first = stable_hash(self._name) % len(missing)
        for chunk in [*missing[first:], *missing[:first]]:
            claim = None
            with contextlib.suppress(FileNotFoundError):  # another process just merged all chunks
                claim = try_lock(self._job.claim_path(chunk), self._watch)
            if isinstance(claim, Lock):
                return chunk, claim
        return None

    def _open(self, tokenizer: Any) -> Engine:
        self._pulse(busy=True, solutions=0, note="starting the engine", now=True)
        # without room an engine fails in a library or a compiler, whose messages do not say so
        check_space(Path(tempfile.gettempdir()), SCRATCH_BYTES, "an engine's temporary files (TMPDIR)")
        begun = time.monotonic()
        engine = open_engine(self._job, end_token_ids(self._job.model, tokenizer))
        self._start_seconds = time.monotonic() - begun
        return engine

    def _draw(self, chunk: Chunk, engine: Engine, tokenizer: Any) -> None:
        requests = chunk_requests(self._job, chunk)
        begun = time.monotonic()
        self._pulse(busy=True, solutions=0, now=True)

        def report(finished: int, new_tokens: int) -> None:
            self._tokens += new_tokens
            self._pulse(busy=True, solutions=finished)

        completions = engine.generate(requests, report)
        self._seconds += time.monotonic() - begun
        self._drawn_tokens += sum(len(completion.token_ids) for completion in completions)
        samples = chunk_samples(self._job, chunk, requests, completions, tokenizer, self._vocab_size)
        if self._job.is_merged:
            return  # this host hung for minutes: another process drew the chunk, too, and merged and removed all
        if not self._job.owns_chunks():  # a chunk of these settings would be taken for one of the others
            raise UserError(
                f"{self._job.chunk_dir}: another process removed what was drawn, to draw with other settings "
                "(--force); these solutions are not wanted any more: stopping"
            )
        speed = {
            "tokens": self._drawn_tokens,
            "generate_seconds": self._seconds,
            "start_seconds": self._start_seconds,
        }
        write_json(self._job.speed_path(self._name), speed)
        # The last act: once all chunks are there, another process may merge them and remove the folder.
        write_records(self._job.chunk_dir / chunk.file_name, samples)

    def _pulse(self, *, busy: bool, solutions: int, note: str = "", now: bool = False) -> None:
        if now or time.monotonic() - self._last_pulse >= PULSE_EVERY_S:
            self._last_pulse = time.monotonic()
            if self._seconds and not note:
                note = f"{self._drawn_tokens / self._seconds:,.0f} tokens/s"
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
