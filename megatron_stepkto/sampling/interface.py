"""What a sampling engine must offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[int, int], None]  # called with the requests finished and the tokens generated since the last call


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
    def generate(self, requests: Sequence[Request], report: Report) -> list[Completion]:
        """Draw one completion per request, in order. The result depends on nothing drawn before."""
        ...
