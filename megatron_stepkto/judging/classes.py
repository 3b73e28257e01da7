"""Right against wrong among judged samples: what learns from their difference needs both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_stepkto.base.errors import UserError

SMALL_SHARE = 0.01  # of a class below which a run warns

_LACKS = {
    "right": "check the judge's verdicts (`stepkto check-answers`), the prompt and sample.max_tokens; or sample easier "
    "problems, or more solutions of each (sample.num_samples)",
    "wrong": "check the judge's verdicts (`stepkto check-answers`); or sample harder problems, end at an earlier "
    "iteration (iterations), or train on right solutions alone with train.method: rft",
}


def class_warnings(counts: Mapping[str, Any]) -> list[str]:
    """What is one-sided, or nearly, in counts of ``right``, ``wrong``, ``steps_right`` and ``steps_wrong``."""
    found = []
    for what, prefix in (("answers", ""), ("steps", "steps_")):
        right, wrong = counts[f"{prefix}right"], counts[f"{prefix}wrong"]
        total, (fewer, name) = right + wrong, min((right, "right"), (wrong, "wrong"))
        if not total and what == "answers":  # whether steps should be judged is the method's affair
            found.append("no answer is judged")
        elif total and not fewer:
            found.append(f"all {total:,} judged {what} are {'wrong' if name == 'right' else 'right'}")
        elif total and fewer / total < SMALL_SHARE:
            found.append(f"only {fewer:,} of {total:,} judged {what} are {name}")
    return found


def check_both_classes(where: str, method: str, right: float, wrong: float, had: str) -> None:
    """Refuse data of one class alone.

    Args:
        right, wrong: how much of each class the loss of ``method`` reads. had: what there is instead.

    Raises:
        UserError: one of them is 0.
    """
    for name, amount in (("right", right), ("wrong", wrong)):
        if not amount:
            raise UserError(f"{where}: {method} learns from right against wrong, and nothing is {name}: {had}; "
                            f"{_LACKS[name]}")  # fmt: skip
