"""Is an answer equal to the gold answer? What cannot be checked is "undecided", never "wrong".

Pairs are not spread in chunks (judging/row_tasks.py): each may exhaust its limit and take its worker with it.

The exact path decides what it can decide with certainty. The rest goes to math-verify in worker processes that hold at
most 1 GiB and die with this process. Each pair has a limit of *CPU time*, measured by the kernel for
that process, so that a loaded machine gives the same verdicts as an idle one; only a worker that sleeps is
ended by a far larger wall-clock limit (``NET``). Importing math-verify costs seconds, so
workers start with the first pair that needs one.
"""

from __future__ import annotations

import functools
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from megatron_stepkto.answers import exact, math_verify_worker
from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.code_hash import code_hash, versions
from megatron_stepkto.base.errors import StageFailed
from megatron_stepkto.base.line_worker import LineWorker
from megatron_stepkto.base.records import Label

START_TIMEOUT_S = 180.0  # a cold start on a loaded machine
NET, MIN_NET_S = 60, 60.0  # wall-clock seconds per CPU second, and at least, after which a worker counts as stuck


_LABELS: dict[str, Label] = {"right": 1, "wrong": 0, "undecided": None}


@dataclass(frozen=True)
class Verdict:
    """``how`` it was decided: exact or math-verify; or why it was not: unparsed, timeout (CPU), stuck (wall clock),
    too-long, crashed, "doubt: <units, base, ...>", "failed: <exception>" (MemoryError: past 1 GiB).
    ``milliseconds`` of CPU time.
    """

    verdict: Literal["right", "wrong", "undecided"]
    how: str
    milliseconds: float

    @property
    def label(self) -> Label:
        return _LABELS[self.verdict]


class _Worker(LineWorker):
    """One math-verify process and the pair it works on."""

    def __init__(self, cpu_seconds: float) -> None:
        super().__init__(
            math_verify_worker.__name__,
            [str(os.getpid()), str(cpu_seconds)],
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        self.ready = False
        self.pair: int | None = None
        self.since = time.monotonic()

    def compare(self, number: int, gold: str, answer: str) -> None:
        self.pair, self.since = number, time.monotonic()
        self.send({"gold": gold, "answer": answer})

    def elapsed(self) -> float:
        return time.monotonic() - self.since


@functools.cache
def _algebra() -> list[Any]:
    """What determines a verdict besides the pair and the limit: code of this package, versions of the libraries."""
    return [
        code_hash(math_verify_worker.__name__, exact.__name__),
        versions("math-verify", "latex2sympy2_extended", "sympy", "mpmath"),
    ]


class EquivalenceChecker:
    """Compares answers; a context manager, because it may own processes.

    Args:
        workers: maximum number of processes; each handles one pair at a time.
        timeout_s: CPU seconds of one pair; past it the pair is undecided.
        cache: an open cache for verdicts of computer algebra.
    """

    def __init__(self, workers: int, timeout_s: float, cache: AnswerCache | None = None) -> None:
        self._num_workers, self._timeout_s, self._cache = workers, timeout_s, cache
        self._net_s = max(MIN_NET_S, NET * timeout_s)
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in list(self._workers):
            self._retire(worker)
        self._selector.close()

    def check_many(
        self, pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """One verdict per (gold, answer), in order; equal pairs are decided once.

        ``progress`` is called with the number of pairs decided so far, at most ``len(pairs)``.

        Raises:
            StageFailed: a worker cannot start (shows what it printed).
        """
        found: dict[tuple[str, str], Verdict] = {}
        hard: list[tuple[str, str]] = []
        for pair in dict.fromkeys(pairs):
            begun = time.perf_counter()
            certain = exact.compare(*pair)
            milliseconds = (time.perf_counter() - begun) * 1000
            if isinstance(certain, exact.Doubt):
                found[pair] = Verdict("undecided", f"doubt: {certain}", milliseconds)
            elif certain is not None:
                found[pair] = Verdict("right" if certain else "wrong", "exact", milliseconds)
            elif max(map(len, pair)) > exact.MAX_ANSWER_CHARS:
                found[pair] = Verdict("undecided", "too-long", milliseconds)
            elif self._cache is not None and (known := self._cache.get(self._key(pair))):
                found[pair] = Verdict(**known)
            else:
                hard.append(pair)
        report = progress or (lambda done: None)
        report(len(found))
        self._compute(hard, found, report)
        return [found[pair] for pair in pairs]

    def _key(self, pair: tuple[str, str]) -> str:
        return content_key(_algebra(), self._timeout_s, *pair)

    def _compute(
        self, hard: list[tuple[str, str]], found: dict[tuple[str, str], Verdict], report: Callable[[int], None]
    ) -> None:
        waiting = iter(range(len(hard)))
        left = len(hard)
        while left:
            while len(self._workers) < min(self._num_workers, left):
                worker = _Worker(self._timeout_s)
                self._workers.append(worker)
                self._selector.register(worker.fileno, selectors.EVENT_READ, worker)
            for worker in self._workers:
                if worker.ready and worker.pair is None and (number := next(waiting, None)) is not None:
                    worker.compare(number, *hard[number])
            for number, verdict in self._collect():
                why = exact.doubt if verdict.verdict == "right" else exact.why_open if verdict.how == "open" else None
                if why and (doubt := why(*hard[number])):
                    verdict = Verdict("undecided", f"doubt: {doubt}", verdict.milliseconds)
                found[hard[number]] = verdict
                if self._cache is not None and verdict.how not in ("stuck", "crashed"):
                    self._cache.put(self._key(hard[number]), vars(verdict))
                left -= 1
                report(len(found))

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.fileno)
        worker.kill()

    def _collect(self) -> list[tuple[int, Verdict]]:
        """Wait for the next reply, death or time-out; workers that died or ran late are gone afterwards."""
        limits = [
            (self._net_s if worker.ready else START_TIMEOUT_S) - worker.elapsed()
            for worker in self._workers
            if worker.pair is not None or not worker.ready
        ]
        done: list[tuple[int, Verdict]] = []
        for key, _ in self._selector.select(max(0.0, min(limits, default=0.0))):
            worker: _Worker = key.data
            try:
                reply = worker.receive()
            except EOFError:
                number, words = worker.pair, worker.last_words()
                started, how = worker.ready, "timeout" if worker.exit_code() == -signal.SIGPROF else "crashed"
                self._retire(worker)
                if not started:
                    raise StageFailed(f"a math-verify process did not start; it printed:\n{words}") from None
                if number is not None:
                    milliseconds = 1000 * (self._timeout_s if how == "timeout" else worker.elapsed())
                    done.append((number, Verdict("undecided", how, milliseconds)))
                continue
            if reply is None:
                continue
            if "ready" in reply:
                worker.ready = True
            elif worker.pair is not None:
                done.append((worker.pair, Verdict(reply["verdict"], reply["how"], reply["milliseconds"])))
                worker.pair = None
        for worker in list(self._workers):
            if not worker.ready and worker.elapsed() > START_TIMEOUT_S:
                raise StageFailed(
                    f"a math-verify process was not ready in {START_TIMEOUT_S:.0f} s: {worker.last_words()}"
                )
            if worker.pair is not None and worker.elapsed() > self._net_s:
                done.append((worker.pair, Verdict("undecided", "stuck", worker.elapsed() * 1000)))
                self._retire(worker)
        return done
