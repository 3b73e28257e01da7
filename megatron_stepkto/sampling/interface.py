"""What a sampling engine must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[int], None]  # called with the number of tokens generated since the last call


@dataclass(frozen=True)
class Request:
    token_ids: list[int]
    seed: int
    temperature: float  # 0: greedy
    top_p: float
    log_probs: bool


@dataclass(frozen=True)
class Completion:
    """``token_ids`` end with the end token when the model emitted one (finish reason "stop").

    ``log_probs``: nats, one per token, of the model's own distribution: temperature 1, before top-p.
    """

    token_ids: list[int]
    finish_reason: str
    log_probs: list[float] | None


class Engine(Protocol):
    """Requests are added at any time; each step finishes some of them. Keys name requests and come back with them."""

    @property
    def wants_more(self) -> bool:
        """Whether every request has begun: one more would run, or wait for the next free place, not behind others."""
        ...

    def add(self, requests: Mapping[str, Request]) -> None: ...

    def step(self, report: Report) -> dict[str, Completion]:
        """Generate; returns the requests that finished. Called while there are unfinished ones."""
        ...

    def reset(self) -> None:
        """Forget everything generated before: the next requests meet the state of a new engine. Called while no
        request is unfinished."""
        ...
