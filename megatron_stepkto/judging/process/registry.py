"""All process judges. A new one is a class in a file of its own, its keys in ``recipe``, and one line here."""

from __future__ import annotations

from typing import Any

from megatron_stepkto.judging.process.combine import CombinedJudge
from megatron_stepkto.judging.process.interface import ProcessJudge, Workplace
from megatron_stepkto.judging.process.llm import LLMJudge
from megatron_stepkto.judging.process.monte_carlo import MonteCarloJudge
from megatron_stepkto.judging.process.prm import PRMJudge
from megatron_stepkto.judging.process.rule import RuleJudge
from megatron_stepkto.recipe import keys as recipe

JUDGES: tuple[type[ProcessJudge[Any]], ...] = (
    RuleJudge,
    LLMJudge,
    PRMJudge,
    MonteCarloJudge,
    CombinedJudge,
)
_BY_KEYS = {judge.recipe_keys: judge for judge in JUDGES}


def process_judge(settings: recipe.ProcessJudge, place: Workplace | None = None) -> ProcessJudge[Any]:
    """The judge that ``judge.process`` asks for; see ``ProcessJudge`` for what it reads and when."""
    if isinstance(settings, recipe.CombinedJudge):
        return CombinedJudge(settings, place, [process_judge(member, place) for member in settings.judges])
    return _BY_KEYS[type(settings)](settings, place)
