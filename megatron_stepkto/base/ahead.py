"""Make the next item while the current one is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class OneAhead(Iterator[R], Generic[R]):
    """``make(item)`` of each item in order, made by one thread, at most one ahead of the one in use.

    Gives the same values in the same order as ``map(make, items)``. An exception of ``make`` is raised when its item's
    turn comes. Leaving the ``with`` block waits for the call in progress and makes no more.
    """

    def __init__(self, make: Callable[[T], R], items: Iterable[T]) -> None:
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._futures = (self._thread.submit(make, item) for item in items)
        self._next: Future[R] | None = next(self._futures, None)

    def __next__(self) -> R:
        ready = self._next
        if ready is None:
            raise StopIteration
        self._next = next(self._futures, None)
        return ready.result()

    def settle(self) -> None:
        """Wait until the thread is idle: a process forked during a call would inherit the locks that it holds."""
        if self._next is not None:
            wait([self._next])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
