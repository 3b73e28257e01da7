"""Layouts worth proposing for a model on a cluster: all that fit, fastest first."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_stepkto.architectures.layout import expert_choices, layout_faults, tensor_choices
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.words import counted
from megatron_stepkto.planning.cluster import Cluster
from megatron_stepkto.planning.memory import StageMemory, advice, stage_memory
from megatron_stepkto.planning.times import Scenario, Times, estimate_times
from megatron_stepkto.recipe.keys import LoRA, Parallel, Recompute, Training

MAX_VIRTUAL = 8
# Margin for errors in the estimate of activations.
PROPOSED_SHARE = 0.90
OFFLOAD_SHARES = (0.5, 1.0)
# Keys of train.optimizer that a plan decides.
OPTIMIZER_KEYS = ("offload", "moment_dtype", "gradient_dtype")


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
    """The part of a recipe's section train that a plan decides; defaults are left out where they are not telling."""
    keys = {
        "parallel": settings.parallel.model_dump(exclude_defaults=True),
        "micro_batch_tokens": settings.micro_batch_tokens,
        "recompute": _plain(settings.recompute),
        "dtype": settings.dtype,
    }
    if settings.offload_layers:
        keys["offload_layers"] = settings.offload_layers
    if settings.lora is not None:
        keys["lora"] = settings.lora.model_dump(include={"rank", "alpha"}) | settings.lora.model_dump(
            mode="json", exclude_defaults=True
        )
    optimizer = settings.optimizer.model_dump(include=set(OPTIMIZER_KEYS), exclude_defaults=True)
    return keys | ({"optimizer": optimizer} if optimizer else {})


def _plain(recompute: bool | Recompute) -> Any:
    return recompute.model_dump(exclude_none=True) if isinstance(recompute, Recompute) else recompute


def recompute_text(recompute: bool | Recompute) -> str:
    """As a cell of a table: no, full, 12 layers, mlp."""
    if not isinstance(recompute, Recompute):
        return "full" if recompute else "no"
    if recompute.modules:
        return "+".join(recompute.modules)
    return counted(recompute.layers, "layer") if recompute.layers else f"every {recompute.every}"


def means_text(settings: Training) -> str:
    """What lowers memory besides the layout: LoRA 16, offload 100%, bf16 moments."""
    optimizer = settings.optimizer
    found = {
        f"LoRA {settings.lora.rank if settings.lora else 0}": settings.lora is not None,
        f"offload {optimizer.offload:.0%}": optimizer.offload > 0,
        "bf16 moments": optimizer.moment_dtype == "bfloat16",
        "bf16 gradients": optimizer.gradient_dtype == "bfloat16",
        f"offload of {counted(settings.offload_layers, 'layer')}": settings.offload_layers > 0,
    }
    return ", ".join(text for text, used in found.items() if used) or "-"


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


def propose(case: Scenario, base: Training, room: int) -> list[Plan]:
    """Plans that fit, the fastest iteration first, the best one of each (tensor, pipeline, expert).

    Args:
        base: everything of the section train that a plan does not decide.
        room: tokens of the longest document or pair; a micro-batch holds 1, 2, 4 or 8 of it.
    """
    best: dict[tuple[int, ...], Plan] = {}
    for settings in _layouts(case, base, room):
        plan = _least_recompute(case, settings)
        if plan is None:
            continue
        parallel = plan.settings.parallel
        key = (parallel.tensor, parallel.pipeline, parallel.expert)
        if key not in best or _rank(plan) < _rank(best[key]):
            best[key] = plan
    return sorted(best.values(), key=_rank)


def propose_otherwise(case: Scenario, base: Training, room: int) -> list[Plan]:
    """Where ``propose`` finds nothing: what fits by other means, the fastest iteration first, the best one of each.

    The means: the optimizer's state in lower precision, on the host (the smallest share that fits), both gradients and
    offload, adapters alone.
    """
    optimizer, found = base.optimizer, []
    # megatron-core ignores moments' dtype on the host: never both, whatever the recipe has
    lower = {"moment_dtype": "bfloat16", "gradient_dtype": "bfloat16", "offload": 0.0}
    offloads = [{"offload": share, "moment_dtype": "float32"} for share in OFFLOAD_SHARES]
    tries: list[list[dict[str, Any]]] = [
        [{"optimizer": optimizer.model_copy(update=lower)}],
        [{"optimizer": optimizer.model_copy(update=share)} for share in offloads],
        [{"optimizer": optimizer.model_copy(update={**share, "gradient_dtype": "bfloat16"})} for share in offloads],
        [{"lora": LoRA()}] if base.lora is None else [],
    ]
    for changes in tries:
        for change in changes:
            if plans := propose(case, base.model_copy(update=change), room):
                found.append(plans[0])
                break
    return sorted(found, key=_rank)


def smallest(case: Scenario, base: Training, room: int) -> Plan | None:
    """The plan with the lowest peak, whether it fits or not; None: no layout is possible at all."""
    plans = (
        make_plan(case, settings.model_copy(update={"recompute": recompute}))
        for settings in _layouts(case, base, room)
        for recompute in (False, True)
    )
    return min(plans, key=lambda plan: (plan.peak, plan.settings.recompute is False), default=None)


def nothing_fits(case: Scenario, base: Training, room: int, otherwise: str) -> str:
    """Why ``propose`` found nothing. otherwise: what else than the GPUs can be changed."""
    least = smallest(case, base, room)
    cluster, gpus = case.cluster, counted(case.cluster.gpus, "GPU")
    if least is None:
        return (
            f"no layout of {gpus} is possible: tensor x pipeline must divide it, tensor the model's heads "
            f"and pipeline its {case.config.num_layers} layers; change --gpus"
        )
    return (
        f"no layout of {gpus} fits into {cluster.memory_gb:g} GB each (with 10% left free): the smallest needs "
        f"{least.peak / 1e9:.1f} GB ({_layout_text(least.settings)}); raise --gpus, take GPUs with more memory, "
        f"or {otherwise}"
    )


def _layout_text(settings: Training) -> str:
    parallel = settings.parallel
    sizes = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    sizes += [f"expert {parallel.expert}"] if parallel.expert > 1 else []
    used = means_text(settings)
    return ", ".join([
        *sizes, f"micro-batches of {settings.micro_batch_tokens:,} tokens",
        f"recompute {recompute_text(settings.recompute)}", *([used] if used != "-" else []),
    ])  # fmt: skip


def _rank(plan: Plan) -> tuple[float, float]:
    return plan.times.iteration, plan.peak


def _layouts(case: Scenario, base: Training, room: int) -> Iterator[Training]:
    for parallel in possible_layouts(case.config, case.cluster):
        if base.optimizer.offload or base.optimizer.moment_dtype == "bfloat16":  # part of that code path
            parallel = parallel.model_copy(update={"distributed_optimizer": True})
        for multiple in (1, 2, 4, 8):
            yield base.model_copy(update={"parallel": parallel, "micro_batch_tokens": room * multiple})


def _least_recompute(case: Scenario, settings: Training) -> Plan | None:
    """The plan that fits and computes least again: nothing, attention, the feed-forward part, some layers, all."""
    whole = make_plan(case, settings.model_copy(update={"recompute": False}))
    if whole.fits(case.cluster, PROPOSED_SHARE):
        return whole
    full = make_plan(case, settings.model_copy(update={"recompute": True}))
    if not full.fits(case.cluster, PROPOSED_SHARE):
        return None
    held = case.config.num_layers // (settings.parallel.pipeline * (settings.parallel.virtual_pipeline or 1))
    # memory falls with every layer more that is computed again: the first number that fits, by halving
    fewest = bisect.bisect_left(
        range(1, held),
        True,
        key=lambda number: make_plan(case, _recomputing(settings, layers=number)).fits(case.cluster, PROPOSED_SHARE),
    )
    some = [_recomputing(settings, modules=["moe" if case.config.experts else "mlp"])]
    some += [_recomputing(settings, layers=fewest + 1)] if fewest + 1 < held else []
    plans = [plan for each in some if (plan := make_plan(case, each)).fits(case.cluster, PROPOSED_SHARE)]
    return min([*plans, full], key=_rank)


def _recomputing(settings: Training, **keys: Any) -> Training:
    return settings.model_copy(update={"recompute": Recompute.model_validate(keys)})


def ways_out(case: Scenario, plan: Plan) -> str:
    """What to change in a layout that does not fit: single changes that make it fit, else general advice."""
    settings, parallel, optimizer = plan.settings, plan.settings.parallel, plan.settings.optimizer
    changes: dict[str, dict[str, Any]] = {}
    if settings.recompute is not True:
        changes["train.recompute: true"] = {"recompute": True}
    if not parallel.distributed_optimizer and parallel.ranks > parallel.tensor * parallel.pipeline:
        changed = parallel.model_copy(update={"distributed_optimizer": True})
        changes["train.parallel.distributed_optimizer: true"] = {"parallel": changed}
    if not parallel.sequence and parallel.tensor > 1:
        changes["train.parallel.sequence: true"] = {"parallel": parallel.model_copy(update={"sequence": True})}
    half = settings.micro_batch_tokens // 2
    changes[f"train.micro_batch_tokens: {half}"] = {"micro_batch_tokens": half}
    if not optimizer.offload and optimizer.moment_dtype == "float32" and parallel.distributed_optimizer:
        changes["train.optimizer.offload: 1.0"] = {"optimizer": optimizer.model_copy(update={"offload": 1.0})}
    if settings.lora is None:
        changes["train.lora: {}"] = {"lora": LoRA()}
    enough = [
        text
        for text, change in changes.items()
        if make_plan(case, settings.model_copy(update=change)).fits(case.cluster)
    ]
    return f"each of these alone makes it fit: {'; '.join(enough)}" if enough else advice(parallel)
