"""From recipe keys to a process judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_stepkto.base.stage import input_hash
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

        return PRMJudge(settings, place)
    if isinstance(settings, recipe.MonteCarloJudge):
        from megatron_stepkto.judging.process.monte_carlo import MonteCarloJudge

        return MonteCarloJudge(settings, place)
    return RuleJudge(settings.kind, place.directory, place.workers)


# How the work is done, not what comes out: a change of these leaves finished labels as they are.
_HOW = {
    "base_url", "api_key_env", "timeout_s", "retries", "max_outage_s", "concurrency", "workers", "batch_tokens",
    "served_name",
}  # fmt: skip


def judging_key(settings: recipe.Judging, sampler: Path | None = None, hashes: Path | None = None) -> dict[str, Any]:
    """What of the section decides the labels; a prompt or a model counts by content, not by where it stands.

    Args:
        sampler: Hugging Face folder of the model that sampled.
        hashes: file that keeps the hashes of large folders (see ``stages.input_hash``).
    """
    key = settings.model_dump(mode="json", exclude={"workers"})
    process = {name: value for name, value in key["process"].items() if name not in _HOW}
    if isinstance(settings.process, recipe.LLMJudge):
        from megatron_stepkto.judging.process.llm import template_hash

        process["prompt"] = {"sha256": template_hash(settings.process.prompt)}
    elif isinstance(settings.process, recipe.PRMJudge):
        process["model"] = {"sha256": input_hash(settings.process.model, hashes)}
    elif isinstance(settings.process, recipe.MonteCarloJudge):
        if (model := settings.process.model or sampler) is not None:
            process["model"] = {"sha256": input_hash(model, hashes)}
        process["sample"] = {n: v for n, v in process["sample"].items() if n not in ("workers", "stall_timeout_s")}
    if settings.outcome is not None:
        key["outcome"] = {
            "threshold": settings.outcome.threshold,
            "dtype": settings.outcome.dtype,
            "model": {"sha256": input_hash(settings.outcome.reward_model, hashes)},
        }
    return {**key, "process": process}
