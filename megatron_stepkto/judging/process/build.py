"""From recipe keys to a process judge."""

from __future__ import annotations

from typing import Any

from megatron_stepkto.judging.process.interface import ProcessJudge, Workplace
from megatron_stepkto.judging.process.rule import RuleJudge
from megatron_stepkto.recipe import keys as recipe


def process_judge(settings: recipe.ProcessJudge, place: Workplace) -> ProcessJudge:
    """The judge that ``judge.process`` asks for.

    Raises:
        UserError: its files, or variables of the environment, are missing.
    """
    if isinstance(settings, recipe.LLMJudge):
        from megatron_stepkto.judging.process.llm import LLMJudge

        return LLMJudge(settings, place.directory / "cache" / "verdicts.jsonl")
    if isinstance(settings, recipe.PRMJudge):
        from megatron_stepkto.judging.process.prm import PRMJudge

        return PRMJudge(settings, place.directory)
    if isinstance(settings, recipe.MonteCarloJudge):
        from megatron_stepkto.judging.process.monte_carlo import MonteCarloJudge

        return MonteCarloJudge(settings, place)
    return RuleJudge(settings.kind, place.directory, place.workers)


# How the work is done, not what comes out: a change of these leaves finished labels as they are.
_HOW = {"base_url", "api_key_env", "timeout_s", "retries", "concurrency", "workers", "batch_tokens", "served_name"}


def judging_key(settings: recipe.Judging) -> dict[str, Any]:
    """What of the section decides the labels; a prompt or a model counts by content, not by where it stands."""
    from megatron_stepkto.base.files import sha256_of

    key = settings.model_dump(mode="json", exclude={"workers"})
    process = {name: value for name, value in key["process"].items() if name not in _HOW}
    if isinstance(settings.process, recipe.LLMJudge):
        from megatron_stepkto.judging.process.llm import template_hash

        process["prompt"] = {"sha256": template_hash(settings.process.prompt)}
    elif isinstance(settings.process, recipe.PRMJudge):
        process["model"] = {"sha256": sha256_of(settings.process.model)}
    elif isinstance(settings.process, recipe.MonteCarloJudge):
        if settings.process.model is not None:
            process["model"] = {"sha256": sha256_of(settings.process.model)}
        process["sample"] = {n: v for n, v in process["sample"].items() if n not in ("workers", "stall_timeout_s")}
    if settings.outcome is not None:
        key["outcome"] = {
            "threshold": settings.outcome.threshold,
            "dtype": settings.outcome.dtype,
            "model": {"sha256": sha256_of(settings.outcome.reward_model)},
        }
    return {**key, "process": process}
