"""Layouts worth proposing for a model on a cluster: all that fit, fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_stepkto.architectures.layout import expert_choices, layout_faults, tensor_choices
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.planning.cluster import Cluster
from megatron_stepkto.planning.memory import StageMemory, advice, stage_memory
from megatron_stepkto.planning.times import Scenario, Times, estimate_times
from megatron_stepkto.recipe.keys import Parallel, Training

MAX_VIRTUAL = 8
# Margin for errors in the estimate of activations.
PROPOSED_SHARE = 0.90


@dataclass(frozen=True)
class Plan:
    """A layout with its memory per pipeline stage and its times."""

    settings: Training
    stages: tuple[StageMemory, ...]
    times: Times

    @property
    def peak(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.peak for stage in self.stages)

    def fits(self, cluster: Cluster, share: float = 1.0) -> bool:
        return self.peak <= share * cluster.memory_gb * 1e9

    def as_dict(self) -> dict[str, Any]:
        return {
            "train": recipe_keys(self.settings),
            "peak_bytes": self.peak,
            "stages": [{**asdict(stage), "peak": stage.peak} for stage in self.stages],
            "seconds": asdict(self.times),
        }


def recipe_keys(settings: Training) -> dict[str, Any]:
    """The part of a recipe's section train that a plan decides; defaults of ``parallel`` are left out."""
    return {
        "parallel": settings.parallel.model_dump(exclude_defaults=True),
        "micro_batch_tokens": settings.micro_batch_tokens,
        "recompute": settings.recompute,
        "dtype": settings.dtype,
    }


def make_plan(case: Scenario, settings: Training) -> Plan:
    times = estimate_times(case, settings)
    stages = tuple(
        stage_memory(
            case.config,
            case.entries,
            settings,
            stage,
            num_micro_batches=times.micro_batches,
            response_share=case.work.response_share,
        )
        for stage in range(settings.parallel.pipeline)
    )
    return Plan(settings, stages, times)


def possible_layouts(config: ModelConfig, cluster: Cluster) -> Iterator[Parallel]:
    """Every layout of all GPUs that the model allows; tensor parallelism stays inside a node."""
    for tensor in tensor_choices(config):
        if tensor > cluster.gpus_per_node:
            continue
        for pipeline in range(1, min(config.num_layers, cluster.gpus // tensor) + 1):
            if cluster.gpus % (tensor * pipeline) or config.num_layers % pipeline:
                continue
            per_stage = config.num_layers // pipeline
            virtual = [v for v in range(2, MAX_VIRTUAL + 1) if pipeline > 1 and not per_stage % v]
            for chunks, expert in itertools.product((None, *virtual), expert_choices(config, cluster.gpus // pipeline)):
                parallel = Parallel(
                    ranks=cluster.gpus,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=chunks,
                    expert=expert,
                    sequence=tensor > 1,
                    distributed_optimizer=cluster.gpus > tensor * pipeline,
                )
                assert not layout_faults(config, parallel)
                yield parallel


def propose(case: Scenario, base: Training, longest: int) -> list[Plan]:
    """Plans that fit, the fastest iteration first, the best one of each (tensor, pipeline, expert).

    Args:
        base: everything of the section train that a plan does not decide.
        longest: tokens of the longest document; a micro-batch holds 1, 2, 4 or 8 of it.
    """
    best: dict[tuple[int, ...], Plan] = {}
    for plan in _all_plans(case, base, longest):
        if not plan.fits(case.cluster, PROPOSED_SHARE):
            continue
        parallel = plan.settings.parallel
        key = (parallel.tensor, parallel.pipeline, parallel.expert)
        if key not in best or _rank(plan) < _rank(best[key]):
            best[key] = plan
    return sorted(best.values(), key=_rank)


def smallest(case: Scenario, base: Training, longest: int) -> Plan | None:
    """The plan with the lowest peak, whether it fits or not; None: no layout is possible at all."""
    plans = _all_plans(case, base, longest)
    return min(plans, key=lambda plan: (plan.peak, not plan.settings.recompute), default=None)


def nothing_fits(case: Scenario, base: Training, longest: int, otherwise: str) -> str:
    """Why ``propose`` found nothing. otherwise: what else than the GPUs can be changed."""
    least = smallest(case, base, longest)
    cluster = case.cluster
    if least is None:
        return (
            f"no layout of {cluster.gpus} GPUs is possible: tensor x pipeline must divide it, tensor the model's heads "
            f"and pipeline its {case.config.num_layers} layers; change --gpus"
        )
    return (
        f"no layout of {cluster.gpus} GPUs fits into {cluster.memory_gb:g} GB each (with 10% left free): the smallest "
        f"needs {least.peak / 1e9:.1f} GB at {recipe_keys(least.settings)}; raise --gpus, take GPUs with more memory, "
        f"or {otherwise}"
    )


def _rank(plan: Plan) -> tuple[float, float]:
    return plan.times.iteration, plan.peak


def _all_plans(case: Scenario, base: Training, longest: int) -> Iterator[Plan]:
    for parallel in possible_layouts(case.config, case.cluster):
        for multiple in (1, 2, 4, 8):
            for recompute in (False, True):
                settings = base.model_copy(
                    update={
                        "parallel": parallel,
                        "micro_batch_tokens": longest * multiple,
                        "recompute": recompute,
                    }
                )
                yield make_plan(case, settings)


def ways_out(case: Scenario, plan: Plan) -> str:
    """What to change in a layout that does not fit: single changes that make it fit, else general advice."""
    settings, parallel = plan.settings, plan.settings.parallel
    changes: dict[str, dict[str, Any]] = {}
    if not settings.recompute:
        changes["train.recompute: true"] = {"recompute": True}
    if not parallel.distributed_optimizer and parallel.ranks > parallel.tensor * parallel.pipeline:
        changed = parallel.model_copy(update={"distributed_optimizer": True})
        changes["train.parallel.distributed_optimizer: true"] = {"parallel": changed}
    if not parallel.sequence and parallel.tensor > 1:
        changes["train.parallel.sequence: true"] = {"parallel": parallel.model_copy(update={"sequence": True})}
    half = settings.micro_batch_tokens // 2
    changes[f"train.micro_batch_tokens: {half}"] = {"micro_batch_tokens": half}
    enough = [
        text
        for text, change in changes.items()
        if make_plan(case, settings.model_copy(update=change)).fits(case.cluster)
    ]
    return f"each of these alone makes it fit: {'; '.join(enough)}" if enough else advice(parallel)
