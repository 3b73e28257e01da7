"""Quick work on rows that depends on nothing but the row, by several processes of this machine, kept in one file.

Each finished chunk is a line of ``cache/TASK.jsonl``, keyed by its rows, the options and the code, so that an
interrupted stage resumes, and the result does not depend on which process did which chunk. Other work on many rows
keeps its own way: a comparison of answers may never end, so each has a limit of its own (answers/equivalence.py);
models take minutes to load and a GPU each, so their workers are started once with all their rows (process/prm.py), and
sampling is shared by processes of several nodes (sampling/worker.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.code_hash import code_hash, versions
from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.files import sha256_of
from megatron_stepkto.base.line_worker import LineWorker
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.steps.tokens import step_spans

ROW_WORKER = "megatron_stepkto.judging.row_worker"
CHUNK = 64  # rows of one line of the cache: a kill loses at most one chunk per worker
FEW = 1024  # rows: starting processes would take longer than the work
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
RowFunction = Callable[[Any], Any]


def _splitter(options: dict[str, Any]) -> RowFunction:
    """[text, token ids] to [start, end, token start, token end] of each step."""
    tokenizer = load_tokenizer(Path(options["tokenizer"]))

    def split(row: Any) -> Any:
        steps = step_spans(row[0], row[1], tokenizer, options["split"], options["step_tag"])
        return [[step.start, step.end, step.token_start, step.token_end] for step in steps]

    return split


def _labeller(options: dict[str, Any]) -> RowFunction:
    """[problem, text, [start, end] of each step] to the label of each step."""
    from megatron_stepkto.judging.process.rules import RULES

    rule = RULES[options["rule"]]
    return lambda row: rule(*row)


# what each task is made by, and the module whose code decides its results
TASKS: dict[str, tuple[Callable[[dict[str, Any]], RowFunction], str]] = {
    "steps": (_splitter, step_spans.__module__),
    "labels": (_labeller, "megatron_stepkto.judging.process.rules"),
}


def tokenizer_hash(directory: Path) -> str:
    """Of the files that a tokenizer may be made of; the weights beside them do not count."""
    files = sorted(path for path in directory.iterdir() if path.suffix in TOKENIZER_SUFFIXES)
    return content_key([[path.name, sha256_of(path)] for path in files], versions("tokenizers", "transformers"))


def answer(function: RowFunction, row: Any) -> dict[str, Any]:
    """{"value"}, or {"error"} where this row is bad."""
    try:
        return {"value": function(row)}
    except UserError as error:
        return {"error": str(error)}


def run_task(
    task: str, options: dict[str, Any], rows: Iterable[Any], directory: Path, workers: int,
    bar: ProgressBar | None = None, state: str = "",
) -> Iterator[Any]:  # fmt: skip
    """The task's value of each row, or a UserError for that row alone; in order.

    Rows are read as workers need them: at most ``rows_ahead`` are in memory, however many there are.

    Args:
        rows: JSON values.
        directory: holds ``cache`` and ``logs``.
        bar: counts the rows that are done.
        state: hash of what the options name but do not hold (files).

    Raises:
        StageFailed: a worker died; its log is named.
    """
    make, module = TASKS[task]
    code = code_hash(module)
    with (
        AnswerCache(directory / "cache" / f"{task}.jsonl") as cache,
        _Workers(task, options, directory / "logs", workers) as pool,
    ):
        work = _Work(make, options, pool, cache)
        chunks: deque[_Chunk] = deque()
        left, more = iter(rows), True
        done = kept = 0
        if bar is not None:
            bar.update(0)
        while more or chunks:
            while more and sum(chunk.count for chunk in chunks) < rows_ahead(workers):
                taken = list(itertools.islice(left, CHUNK))
                more = len(taken) == CHUNK
                if taken:
                    chunks.append(
                        work.begin(_Chunk(taken, len(taken), content_key(code, _kept(options), state, taken)))
                    )
            if not chunks:
                break
            chunk = chunks.popleft()
            values = work.values(chunk)
            done += len(values)
            kept += len(values) if chunk.kept else 0
            if bar is not None:
                bar.update(done, kept=kept)
            for value in values:
                yield UserError(value["error"]) if "error" in value else value["value"]


def rows_ahead(workers: int) -> int:
    """Rows read before the first is done: enough for every worker, and to decide whether to start any."""
    return max(FEW, 2 * workers * CHUNK)


@dataclass
class _Chunk:
    """Rows of one line of the cache. ``kept``: an earlier attempt did them."""

    rows: list[Any]  # emptied where they are not needed
    count: int
    key: str
    kept: bool = False
    answers: Future[list[Any]] | None = None


class _Work:
    """Chunks done by this process while they are few, else by the workers."""

    def __init__(
        self, make: Callable[[dict[str, Any]], RowFunction], options: dict[str, Any], pool: _Workers, cache: AnswerCache
    ) -> None:
        self._make, self._options, self._pool, self._cache = make, options, pool, cache
        self._waiting: list[_Chunk] = []  # until there are enough for processes to be worth their start
        self._function: RowFunction | None = None

    def begin(self, chunk: _Chunk) -> _Chunk:
        chunk.kept = chunk.key in self._cache
        if chunk.kept:
            chunk.rows = []
        else:
            self._waiting.append(chunk)
            if self._pool.count > 1 and (self._pool.started or sum(len(c.rows) for c in self._waiting) >= FEW):
                for each in self._waiting:
                    each.answers = self._pool.submit(each.rows, each.key, self._cache)
                self._waiting.clear()
        return chunk

    def values(self, chunk: _Chunk) -> list[Any]:
        if chunk.kept:
            return list(self._cache.get(chunk.key))
        if chunk.answers is not None:
            return chunk.answers.result()
        self._waiting.remove(chunk)
        self._function = self._function or self._make(self._options)
        values = [answer(self._function, row) for row in chunk.rows]
        self._cache.put(chunk.key, values)
        return values


def _kept(options: dict[str, Any]) -> dict[str, Any]:
    """Options that decide the result: a folder counts by its content, not by its path."""
    return {name: value for name, value in options.items() if name != "tokenizer"}


class _Workers:
    """Processes that do chunks of a task, started with the first chunk. A thread for each waits for its replies."""

    def __init__(self, task: str, options: dict[str, Any], logs: Path, count: int) -> None:
        self._task, self._options, self._logs, self.count = task, options, logs, count
        self._stack = contextlib.ExitStack()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def started(self) -> bool:
        return self._threads is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._stack.close()  # processes are killed before the threads are waited for, whatever happens

    def submit(self, rows: list[Any], key: str, cache: AnswerCache) -> Future[list[Any]]:
        """The answers to come; they are kept in the cache when they do, in whatever order they are asked for."""
        if self._threads is None:
            self._threads = self._stack.enter_context(ThreadPoolExecutor(self.count))
            arguments = [json.dumps([self._task, self._options])]
            logs = [self._logs / f"{self._task}-{number}.log" for number in range(self.count)]
            self._idle = [(self._stack.enter_context(LineWorker(ROW_WORKER, arguments, log)), log) for log in logs]
        return self._threads.submit(self._ask, rows, key, cache)

    def _ask(self, rows: list[Any], key: str, cache: AnswerCache) -> list[Any]:
        worker, log = self._idle.pop()  # as many threads as workers
        try:
            values: list[Any] = worker.ask(rows)
        except EOFError:
            raise StageFailed(f"a judging process ended; see {log}; it printed:\n{worker.last_words()}") from None
        finally:
            self._idle.append((worker, log))
        cache.put(key, values)
        return values
