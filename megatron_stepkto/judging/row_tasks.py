"""Quick work on rows that depends on nothing but the row, by several processes of this machine, kept in one file.

Each finished chunk is a line of ``cache/TASK.jsonl``, keyed by its rows, the options and the code, so that an
interrupted stage resumes, and the result does not depend on which process did which chunk. Other work on many rows
keeps its own way: a comparison of answers may never end, so each has a limit of its own (answers/equivalence.py);
models take minutes to load and a GPU each, so their workers are started once with all their rows (process/prm.py), and
sampling is shared by processes of several nodes (sampling/worker.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

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
    task: str, options: dict[str, Any], rows: Sequence[Any], directory: Path, workers: int, title: str, unit: str,
    state: str = "",
) -> list[Any]:  # fmt: skip
    """The task's value of each row, or a UserError for that row alone; in order.

    Args:
        rows: JSON values.
        directory: holds ``cache`` and ``logs``.
        state: hash of what the options name but do not hold (files).

    Raises:
        StageFailed: a worker died; its log is named.
    """
    make, module = TASKS[task]
    code = code_hash(module)
    chunks = [list(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
    keys = [content_key(code, _kept(options), state, chunk) for chunk in chunks]
    with AnswerCache(directory / "cache" / f"{task}.jsonl") as cache, ProgressBar(title, len(rows), unit) as bar:
        missing = [number for number, key in enumerate(keys) if key not in cache]
        done = len(rows) - sum(len(chunks[number]) for number in missing)
        bar.update(done)
        left = [chunks[number] for number in missing]
        if workers == 1 or sum(map(len, left)) < FEW:
            results = _here(make, options, left)
        else:
            results = _by_workers(task, options, left, directory / "logs", min(workers, len(left)))
        with contextlib.closing(results):  # no process outlives an error here
            for place, values in results:
                cache.put(keys[missing[place]], values)
                done += len(values)
                bar.update(done)
        found = [value for key in keys for value in cache.get(key)]
    return [UserError(value["error"]) if "error" in value else value["value"] for value in found]


def _kept(options: dict[str, Any]) -> dict[str, Any]:
    """Options that decide the result: a folder counts by its content, not by its path."""
    return {name: value for name, value in options.items() if name != "tokenizer"}


def _here(
    make: Callable[[dict[str, Any]], RowFunction], options: dict[str, Any], chunks: Sequence[list[Any]]
) -> Generator[tuple[int, list[Any]], None, None]:
    function = make(options) if chunks else None
    for place, chunk in enumerate(chunks):
        assert function is not None
        yield place, [answer(function, row) for row in chunk]


def _by_workers(
    task: str, options: dict[str, Any], chunks: Sequence[list[Any]], logs: Path, count: int
) -> Generator[tuple[int, list[Any]], None, None]:
    """Finished chunks as they come. One thread per process waits for its replies."""
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(count))
        # killed before the threads are waited for, whatever happens
        arguments, files = [json.dumps([task, options])], [logs / f"{task}-{number}.log" for number in range(count)]
        idle = [(stack.enter_context(LineWorker(ROW_WORKER, arguments, log)), log) for log in files]

        def work(place: int, chunk: list[Any]) -> tuple[int, list[Any]]:
            worker, log = idle.pop()  # as many threads as workers
            try:
                return place, worker.ask(chunk)
            except EOFError:
                raise StageFailed(f"a judging process ended; see {log}; it printed:\n{worker.last_words()}") from None
            finally:
                idle.append((worker, log))

        futures = [threads.submit(work, place, chunk) for place, chunk in enumerate(chunks)]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
