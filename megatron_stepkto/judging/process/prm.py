"""Process reward models: the probability that each step is right, by the conventions that such models are trained on.

Workers get fixed shares of the rows at the start: a model takes minutes to load, so that no share is worth moving
(judging/row_tasks.py hands out rows one chunk after another). Where there are GPUs, each worker has one for itself.

``qwen_math_prm`` (Qwen2.5-Math-PRM, arXiv 2501.07301): the chat template with its system prompt, ``<extra_0>``
after each step, a two-class head on that token. ``math_shepherd`` (arXiv 2312.08935, peiyi9979's Mistral): each
step ends with " ки", and the language model's logits of "+" and "-" on that token are compared.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.code_hash import code_hash, versions
from megatron_stepkto.base.dtypes import choose_dtype, gpu_bytes, gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.processes import Child, gpus_of, run_children
from megatron_stepkto.base.progress import ProgressBar, Report, say, warn
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.client import (
    BadAnswer,
    Client,
    NoAnswer,
    Service,
    TooLong,
    check_servers,
    run_async,
    split_urls,
)
from megatron_stepkto.judging.process.interface import (
    ProcessJudge,
    Resources,
    Solution,
    Typical,
    Verdict,
    Verdicts,
    Work,
    Workplace,
)
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import load_tokenizer, render_chat

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_TAG, SHEPHERD_TAG = "<extra_0>", "ки"
ROWS_PER_CHUNK = 64  # the unit of resuming
WORKER = "megatron_stepkto.judging.process.prm_worker"  # imports torch: not here
HEAD = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")  # of Qwen2ForProcessRewardModel
GPU_SHARE = 0.9  # of a GPU's memory that weights may take; the rest is for activations and CUDA


Scores = Sequence[float | None]  # probability of "right" of each step; None: not judged


class PRMRow(BaseModel):
    """Tokens of one solution as the model reads it; ``positions`` are those of its step ends."""

    model_config = ConfigDict(frozen=True)

    token_ids: list[int]
    positions: list[int]


class PRMJob(BaseModel):
    """Rows to score, in a folder of ``cache`` that is named by all that decides the scores.

    ``model_hash`` is of the model folder's content. ``candidates``: tokens whose logits are compared, right first;
    None: the model has a head of two classes, or, with ``whole_solutions``, of one, and the score is its logit.
    """

    model_config = ConfigDict(frozen=True)

    model: Path
    model_hash: str
    rows: list[PRMRow]
    candidates: tuple[int, int] | None
    whole_solutions: bool = False
    dtype: str
    batch_tokens: int
    workers: int
    cache: Path

    @functools.cached_property
    def directory(self) -> Path:
        decides = self.model_dump(mode="json", include={"model_hash", "rows", "candidates", "whole_solutions", "dtype"})
        key = content_key(decides, code_hash(WORKER), versions("torch", "transformers"))
        return self.cache / f"{'reward' if self.whole_solutions else 'prm'}-{key[:12]}"

    def chunks(self, worker: int) -> list[int]:
        """First rows of the chunks of a worker that are not scored yet."""
        starts = range(0, len(self.rows), ROWS_PER_CHUNK)
        return [start for start in starts[worker :: self.workers] if not self.chunk_path(start).is_file()]

    def chunk_path(self, start: int) -> Path:
        return self.directory / f"scores-{start:07d}.json"

    def report(self) -> Report:
        starts = [start for start in range(0, len(self.rows), ROWS_PER_CHUNK) if self.chunk_path(start).is_file()]
        return Report(sum(len(self.rows[start : start + ROWS_PER_CHUNK]) for start in starts), len(self.rows), "")


def qwen_math_prm_row(solution: Solution, tokenizer: Any) -> PRMRow:
    tag = _only_token(tokenizer, QWEN_TAG)
    messages = [
        {"role": "system", "content": QWEN_SYSTEM},
        {"role": "user", "content": solution.problem.problem},
        {"role": "assistant", "content": "".join(step.strip() + QWEN_TAG for step in solution.step_texts)},
    ]
    text = render_chat(tokenizer, messages, "judge.process.model", generation_prompt=False)
    return _row(solution, tokenizer(text, add_special_tokens=False)["input_ids"], tag)


def math_shepherd_row(solution: Solution, tokenizer: Any) -> PRMRow:
    tag = tokenizer(f" {SHEPHERD_TAG}", add_special_tokens=False)["input_ids"][-1]
    steps = "\n".join(f"{step.strip()} {SHEPHERD_TAG}" for step in solution.step_texts)
    return _row(solution, tokenizer(f"{solution.problem.problem} {steps}")["input_ids"], tag)


def _only_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(
            f"judge.process.model: its tokenizer has no single token {text}; check judge.process.convention"
        )
    return int(ids[0])


def _row(solution: Solution, token_ids: Sequence[int], tag: int) -> PRMRow:
    positions = [position for position, token in enumerate(token_ids) if token == tag]
    if len(positions) != len(solution.steps):
        raise UserError(
            f"solution {solution.solution_id}: expected one step mark per step, got {len(positions)} for "
            f"{len(solution.steps)} steps: the solution or the problem contains the mark itself"
        )
    return PRMRow(token_ids=list(token_ids), positions=positions)


ROWS: dict[str, Callable[[Solution, Any], PRMRow]] = {
    "qwen_math_prm": qwen_math_prm_row,
    "math_shepherd": math_shepherd_row,
}


def candidate_tokens(convention: str, tokenizer: Any) -> tuple[int, int] | None:
    """As the model card has it: the last two tokens of "+ -"."""
    if convention == "qwen_math_prm":
        return None
    plus, minus = tokenizer("+ -", add_special_tokens=False)["input_ids"][-2:]
    return int(plus), int(minus)


def score_job(job: PRMJob, logs: Path, title: str) -> list[list[float]]:
    """The scores of every row, from worker processes; what an earlier attempt scored is read."""
    if gpus := gpu_count():
        job = _placed(job, gpus, title)
    workers = [worker for worker in range(job.workers) if job.chunks(worker)]
    if workers:
        write_json(job.directory / "job.json", job.model_dump(mode="json"))
        run_children(
            [_child(job, worker, logs, on_gpu=gpus > 0) for worker in workers],
            title=title, unit="solutions", progress=job.report,
        )  # fmt: skip
    starts = range(0, len(job.rows), ROWS_PER_CHUNK)
    return [scores for start in starts for scores in read_json(job.chunk_path(start))]


def _placed(job: PRMJob, gpus: int, title: str) -> PRMJob:
    """At most one worker per GPU: two models on one would be slower than one, and may not fit."""
    if job.workers > gpus:
        say(f"{title}: {gpus} of {job.workers} workers, one on each GPU")
    return job.model_copy(update={"workers": min(job.workers, gpus)})


def _child(job: PRMJob, worker: int, logs: Path, *, on_gpu: bool) -> Child:
    command = [
        sys.executable, "-m", WORKER, str(job.directory / "job.json"), "--worker", str(worker),
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if on_gpu:
        env["CUDA_VISIBLE_DEVICES"] = gpus_of(worker, 1)
    return Child(command, logs / f"{job.directory.name}-{worker}.log", env)


def check_weights(model: Path, head: Sequence[str]) -> None:
    """Check that a reward model's folder is whole, and that its weights fit on one GPU where there are GPUs.

    Args:
        head: tensors that it must hold.

    Raises:
        UserError: it is not, they do not, or one is missing.
    """
    from megatron_stepkto.checkpoints.huggingface import HFCheckpoint  # imports torch

    weights = HFCheckpoint(model).weights
    if missing := [name for name in head if name not in weights]:
        raise UserError(f"{model}: expected a Qwen2ForProcessRewardModel, its safetensors lack {', '.join(missing)}")
    size, gpu = sum(weight.num_bytes for weight in weights.values()), gpu_bytes()
    if gpu is not None and size > GPU_SHARE * gpu:
        raise UserError(
            f"{model}: {size / 1e9:.1f} GB of weights, and a GPU here has {gpu / 1e9:.1f} GB: a local reward model "
            "must fit on one; serve it with vLLM (base_url), or name a smaller model"
        )


class PRMJudge(ProcessJudge[recipe.PRMJudge]):
    recipe_keys = recipe.PRMJudge

    def __init__(self, settings: recipe.PRMJudge, place: Workplace | None = None) -> None:
        super().__init__(settings, place)
        self._counts: Counter[str] = Counter()
        self._dtype: str | None = None  # a server's is its own
        self._too_long = ""  # what the server said of the last solution that was

    @property
    def name(self) -> str:
        return f"prm:{self.settings.model.name}"

    def inputs(self) -> dict[str, Path]:
        return {"model": self.settings.model}

    def resources(self) -> Resources:
        if self.settings.base_url is not None:
            return Resources(servers=split_urls(self.settings.base_url), served=self._served_name)
        return Resources(self.settings.workers, ("judge.process.workers",), takes_fewer=True)

    def work(self, typical: Typical) -> Work:
        length = typical.prompt + typical.response + typical.steps  # a mark ends each step
        local = (0, 0) if self.settings.base_url is not None else (self.settings.workers, self.settings.batch_tokens)
        return Work(self.settings.model, typical.solutions * length, 0, length, *local)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.settings.model)

    def load(self) -> None:
        _ = self._tokenizer

    def counts(self) -> dict[str, Any]:
        dtype = {"dtype": self._dtype} if self._dtype else {}
        return {"judge": dict(sorted(self._counts.items())) | dtype}

    @property
    def _served_name(self) -> str:
        return self.settings.served_name or str(self.settings.model)

    def _service(self) -> Service:
        settings = self.settings
        assert settings.base_url is not None
        return Service(
            settings.base_url, self._served_name, settings.api_key_env, settings.timeout_s, settings.retries,
            settings.max_outage_s, settings.reported_model,
        )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.settings.base_url:
            run_async(check_servers(self._service()))
        else:
            check_weights(self.settings.model, HEAD if self.settings.convention == "qwen_math_prm" else ())

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        make, limit = ROWS[self.settings.convention], self._positions()
        rows: list[PRMRow] = []
        judged: list[Verdicts | None] = []  # None: the scores of the next row
        for solution in solutions:
            try:
                row = make(solution, self._tokenizer)
            except UserError as error:
                judged.append(error)
                continue
            if len(row.token_ids) > limit:
                self._too_long = f"{len(row.token_ids)} tokens, the model has {limit} positions"
                self._counts["too_long"] += 1
                judged.append(self._verdicts([None] * len(row.positions)))
                continue
            rows.append(row)
            judged.append(None)
        scores = iter(self._ask(rows) if self.settings.base_url else self._run(rows))
        found = [self._verdicts(next(scores)) if verdicts is None else verdicts for verdicts in judged]
        if self._too_long:
            counted = self._counts["too_long"]
            warn(f"{counted} of {len(judged)} solutions are too long to judge; the last: {self._too_long}")
        return found

    def _positions(self) -> float:
        """The longest row that the local model was made for; a server refuses longer ones itself."""
        given = None if self.settings.base_url else read_config(self.settings.model).get("max_position_embeddings")
        return given or math.inf

    def _verdicts(self, scores: Scores) -> list[Verdict]:
        return [Verdict(self._label(score), None, score) for score in scores]

    def _label(self, score: float | None) -> Label:
        if score is None:
            return None
        low = self.settings.threshold if self.settings.wrong_below is None else self.settings.wrong_below
        return 1 if score >= self.settings.threshold else 0 if score < low else None

    # --- transformers, in worker processes ---

    def _run(self, rows: list[PRMRow]) -> list[Scores]:
        settings, title = self.settings, "judging steps"
        chosen = choose_dtype(settings.dtype, settings.model, on_cpu=not gpu_count())
        chosen.announce(title)
        self._dtype = chosen.dtype
        job = PRMJob(
            model=settings.model, model_hash=self.place.hash_of(settings.model), rows=rows,
            candidates=candidate_tokens(settings.convention, self._tokenizer), dtype=chosen.dtype,
            batch_tokens=settings.batch_tokens, workers=settings.workers, cache=self.place.cache,
        )  # fmt: skip
        return [*score_job(job, self.place.logs, title)]

    # --- a vLLM server ---

    def _ask(self, rows: list[PRMRow]) -> list[Scores]:
        found: dict[int, Scores] = {}
        with AnswerCache(self.place.cache / "scores.jsonl") as cache:
            run_async(self._ask_all(rows, cache, found))
        return [found[number] for number in range(len(rows))]

    async def _ask_all(self, rows: list[PRMRow], cache: AnswerCache, found: dict[int, Scores]) -> None:
        settings = self.settings
        keys = self._keys(self._served_name, rows)
        for number, key in enumerate(keys):
            known = cache.get(key)
            if known is not None:
                found[number] = known
        self._counts["cached"] = len(found)
        missing = iter([number for number in range(len(rows)) if number not in found])
        if len(found) == len(rows):
            return
        async with Client(self._service(), self._counts) as client:
            await client.check_model()
            with ProgressBar("judging steps", len(rows), "solutions") as bar:
                bar.update(len(found))

                async def worker() -> None:
                    for number in missing:
                        row = rows[number]
                        body = {"model": self._served_name, "input": row.token_ids, "task": "token_classify"}
                        scores: Scores
                        try:
                            scores = await client.post(
                                "//pooling",
                                body,
                                lambda answer, row=row: read_scores(answer, len(row.positions)),  # type: ignore[misc]
                            )
                            cache.put(keys[number], scores)
                        except TooLong as error:
                            self._counts["too_long"] += 1
                            self._too_long = str(error)
                            scores = [None] * len(row.positions)
                        except NoAnswer as error:
                            raise UserError(f"judge.process: solution {number} has no scores: {error}") from None
                        found[number] = scores
                        bar.update(len(found))

                async with asyncio.TaskGroup() as group:
                    for _ in range(min(settings.concurrency, len(rows) - len(found))):
                        group.create_task(worker())

    def _keys(self, name: str, rows: list[PRMRow]) -> list[str]:
        """Of the scores in the cache. The server's weights are known by its model's name and, where the folder holds
        them, by their content."""
        model = self.place.hash_of(self.settings.model)
        reading = inspect.getsource(read_scores)
        return [content_key(name, model, row.model_dump(), reading) for row in rows]


def read_scores(answer: Any, num_steps: int) -> list[float]:
    """Probabilities of "right" in a pooling answer: one row of two classes per step.

    Raises:
        BadAnswer: it is something else.
    """
    try:
        rows = answer["data"][0]["data"]
        scores = [float(right) for _, right in rows]
        if len(scores) != num_steps or not all(0 <= score <= 1 for score in scores):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError):
        raise BadAnswer(
            f"expected two probabilities for each of {num_steps} steps, got {str(answer)[:200]}; is the server's "
            "step_tag_id the tokenizer's <extra_0>?"
        ) from None
    return scores
