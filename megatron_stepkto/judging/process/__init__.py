"""Which steps of a solution are right: exact rules, a language model, a reward model, rollouts."""

from megatron_stepkto.judging.process.interface import (
    ProcessJudge,
    Resources,
    Solution,
    Verdict,
    Verdicts,
    Workplace,
    cut_after_first_error,
)

__all__ = [
    "ProcessJudge",
    "Resources",
    "Solution",
    "Verdict",
    "Verdicts",
    "Workplace",
    "cut_after_first_error",
]
