"""Process reward models: the probability that each step is right, by the conventions that such models are trained on.

Workers get fixed shares of the rows at the start: a model takes minutes to load, so that no share is worth moving
(judging/row_tasks.py hands out rows one chunk after another). Where there are GPUs, each worker has one for itself.

``qwen_math_prm`` (Qwen2.5-Math-PRM, arXiv 2501.07301): the chat template with its system prompt, ``<extra_0>``
after each step, a two-class head on that token. ``math_shepherd`` (arXiv 2312.08935, peiyi9979's Mistral): each
step ends with " ки", and the language model's logits of "+" and "-" on that token are compared.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from pydantic import BaseModel, ConfigDict

from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.code_hash import code_hash, versions
from megatron_stepkto.base.dtypes import choose_dtype, gpu_bytes, gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, read_json, write_json
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
    ask_each,
    check_servers,
    from_first,
    run_async,
)
from megatron_stepkto.judging.process.interface import (
    Judged,
    ProcessJudge,
    Resources,
    Solution,
    Solutions,
    Typical,
    Verdict,
    Verdicts,
    Work,
    Workplace,
)
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.judge_keys import server_urls
from megatron_stepkto.recipe.prompts import load_tokenizer, render_chat

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_TAG, SHEPHERD_TAG = "<extra_0>", "ки"
ROWS_PER_CHUNK = 64  # the unit of resuming
ROWS_FILE = "rows.jsonl"
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

    The rows are lines of ``rows.jsonl`` in it (``of``). ``candidates``: tokens whose logits are compared, right first;
    None: the model has a head of two classes, or, with ``whole_solutions``, of one, and the score is its logit.
    """

    model_config = ConfigDict(frozen=True)

    model: Path
    directory: Path
    num_rows: int
    candidates: tuple[int, int] | None
    whole_solutions: bool = False
    dtype: str
    batch_tokens: int
    workers: int

    @classmethod
    def of(cls, rows: Iterable[PRMRow], model_hash: str, cache: Path, **settings: Any) -> Self:
        """The job of these rows, which are written down and not held. ``model_hash``: of the model folder's content."""
        decides = {name: settings.get(name) for name in ("candidates", "whole_solutions", "dtype")}
        digest, count = hashlib.sha256(), 0
        cache.mkdir(parents=True, exist_ok=True)
        drafted = cache / ".rows.jsonl"
        with atomic_writer(drafted, "wb") as file:
            for row in rows:
                line = row.model_dump_json().encode() + b"\n"
                file.write(line)
                digest.update(line)
                count += 1
        key = content_key(digest.hexdigest(), model_hash, decides, code_hash(WORKER), versions("torch", "transformers"))
        directory = cache / f"{'reward' if settings.get('whole_solutions') else 'prm'}-{key[:12]}"
        directory.mkdir(exist_ok=True)
        drafted.replace(directory / ROWS_FILE)
        return cls(directory=directory, num_rows=count, **settings)

    def starts(self) -> range:
        """First rows of the chunks."""
        return range(0, self.num_rows, ROWS_PER_CHUNK)

    def chunks(self, worker: int) -> list[int]:
        """First rows of the chunks of a worker that are not scored yet."""
        return [start for start in self.starts()[worker :: self.workers] if not self.chunk_path(start).is_file()]

    def chunk_path(self, start: int) -> Path:
        return self.directory / f"scores-{start:07d}.json"

    def rows_of(self, starts: Collection[int]) -> Iterator[tuple[int, list[PRMRow]]]:
        """(first row, rows) of these chunks, in order."""
        with (self.directory / ROWS_FILE).open("rb") as lines:
            for start in self.starts():
                chunk = list(itertools.islice(lines, ROWS_PER_CHUNK))
                if start in starts:
                    yield start, [PRMRow.model_validate_json(line) for line in chunk]

    def report(self) -> Report:
        scored = sum(
            min(ROWS_PER_CHUNK, self.num_rows - start) for start in self.starts() if self.chunk_path(start).is_file()
        )
        return Report(scored, self.num_rows, "")


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


def positions_of(model: Path) -> float:
    """The longest row, in tokens, that a model was made for; infinite where its config.json does not say."""
    return read_config(model).get("max_position_embeddings") or math.inf


def score_job(job: PRMJob, logs: Path, title: str) -> Iterator[list[float]]:
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
    for start in job.starts():
        yield from read_json(job.chunk_path(start))


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
        self._finished = 0  # solutions
        self._too_long = ""  # what the server said of the last solution that was

    @property
    def name(self) -> str:
        return f"prm:{self.settings.model.name}"

    def inputs(self) -> dict[str, Path]:
        return {"model": self.settings.model}

    def resources(self) -> Resources:
        if self.settings.base_url is not None:
            return Resources(servers=server_urls(self.settings.base_url), served=self._served_name)
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

    def judge(self, solutions: Solutions) -> Judged:
        """Rows go to a file, or to the server and their scores into the cache; verdicts are then made in order."""
        settled: dict[int, Verdicts] = {}
        scores = self._ask(solutions, settled) if self.settings.base_url else self._run(solutions, settled)
        total = 0
        for total, found in enumerate(scores, 1):
            yield settled[total - 1] if found is None else self._verdicts(found)
        if self._too_long:
            counted = self._counts["too_long"]
            warn(f"{counted} of {total} solutions are too long to judge; the last: {self._too_long}")

    def _rows(self, solutions: Solutions, settled: dict[int, Verdicts]) -> Iterator[PRMRow | None]:
        """A row for each solution; None for one that no model is asked about: what it gets goes into ``settled``."""
        make = ROWS[self.settings.convention]
        limit = math.inf if self.settings.base_url else positions_of(self.settings.model)  # a server refuses by itself
        for number, solution in enumerate(solutions):
            try:
                row = make(solution, self._tokenizer)
            except UserError as error:
                settled[number] = error
                yield None
                continue
            if len(row.token_ids) > limit:
                self._too_long = f"{len(row.token_ids)} tokens, the model has {limit} positions"
                self._counts["too_long"] += 1
                settled[number] = self._verdicts([None] * len(row.positions))
                yield None
            else:
                yield row

    def _verdicts(self, scores: Scores) -> list[Verdict]:
        return [Verdict(self._label(score), None, score) for score in scores]

    def _label(self, score: float | None) -> Label:
        if score is None:
            return None
        low = self.settings.threshold if self.settings.wrong_below is None else self.settings.wrong_below
        return 1 if score >= self.settings.threshold else 0 if score < low else None

    # --- transformers, in worker processes ---

    def _run(self, solutions: Solutions, settled: dict[int, Verdicts]) -> Iterator[Scores | None]:
        settings, title = self.settings, "judging steps"
        chosen = choose_dtype(settings.dtype, settings.model, on_cpu=not gpu_count())
        chosen.announce(title)
        self._dtype = chosen.dtype
        job = PRMJob.of(
            (row for row in self._rows(solutions, settled) if row is not None),
            self.place.hash_of(settings.model), self.place.cache,
            model=settings.model, candidates=candidate_tokens(settings.convention, self._tokenizer),
            dtype=chosen.dtype, batch_tokens=settings.batch_tokens, workers=settings.workers,
        )  # fmt: skip
        scores = score_job(job, self.place.logs, title)
        for number in range(len(solutions)):
            yield None if number in settled else next(scores)

    # --- a vLLM server ---

    def _ask(self, solutions: Solutions, settled: dict[int, Verdicts]) -> Iterator[Scores | None]:
        with (
            AnswerCache(self.place.cache / "scores.jsonl") as cache,
            tempfile.TemporaryFile("w+", dir=self.place.cache) as asked,
        ):
            self._ask_all(solutions, settled, cache, asked)
            asked.seek(0)
            for number, line in enumerate(asked):
                num_steps, key = json.loads(line)
                # one that is too long has no scores
                yield None if number in settled else cache.get(key) or [None] * num_steps

    def _questions(
        self, solutions: Solutions, settled: dict[int, Verdicts], cache: AnswerCache, asked: IO[str]
    ) -> Iterator[tuple[int, str, PRMRow] | None]:
        """(number, key, row) of each row that is to be asked; None where there is nothing to ask.

        ``asked`` gets a line for each solution: what is needed to find its scores again.
        """
        for number, row in enumerate(self._rows(solutions, settled)):
            key = "" if row is None else self._key(row)
            asked.write(json.dumps([0 if row is None else len(row.positions), key]) + "\n")
            if row is None or key in cache:
                self._counts["cached"] += cache.was_kept(key)
                self._finished += 1
                yield None
            else:
                yield number, key, row

    def _ask_all(self, solutions: Solutions, settled: dict[int, Verdicts], cache: AnswerCache, asked: IO[str]) -> None:
        self._counts["cached"] = self._finished = 0
        questions = from_first(self._questions(solutions, settled, cache, asked))
        if questions is not None:
            run_async(self._work(questions, len(solutions), cache))

    async def _work(self, questions: Iterator[tuple[int, str, PRMRow] | None], total: int, cache: AnswerCache) -> None:
        async with Client(self._service(), self._counts) as client:
            await client.check_model()
            with ProgressBar("judging steps", total, "solutions") as bar:

                def show() -> None:
                    bar.update(self._finished, kept=self._counts["cached"])

                async def ask(question: tuple[int, str, PRMRow]) -> None:
                    await self._ask_one(client, cache, *question)
                    self._finished += 1

                show()
                await ask_each(questions, min(self.settings.concurrency, total), ask, show)

    async def _ask_one(self, client: Client, cache: AnswerCache, number: int, key: str, row: PRMRow) -> None:
        body = {"model": self._served_name, "input": row.token_ids, "task": "token_classify"}
        try:
            scores = await client.post("//pooling", body, lambda answer: read_scores(answer, len(row.positions)))
            cache.put(key, scores)
        except TooLong as error:
            self._counts["too_long"] += 1
            self._too_long = str(error)
        except NoAnswer as error:
            raise UserError(f"judge.process: solution {number} has no scores: {error}") from None

    def _key(self, row: PRMRow) -> str:
        """Of the scores in the cache. The server's weights are known by its model's name and, where the folder holds
        them, by their content."""
        return content_key(self._served_name, self._model_hash, row.model_dump(), inspect.getsource(read_scores))

    @functools.cached_property
    def _model_hash(self) -> str:
        return self.place.hash_of(self.settings.model)


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
