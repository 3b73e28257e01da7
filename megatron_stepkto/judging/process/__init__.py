"""Which steps of a solution are right: exact rules, a language model, a reward model, rollouts."""

from megatron_stepkto.judging.process.build import judging_key, process_judge
from megatron_stepkto.judging.process.interface import (
    ProcessJudge,
    Solution,
    Verdict,
    Verdicts,
    Workplace,
    cut_after_first_error,
)

__all__ = [
    "ProcessJudge",
    "Solution",
    "Verdict",
    "Verdicts",
    "Workplace",
    "cut_after_first_error",
    "judging_key",
    "process_judge",
]
