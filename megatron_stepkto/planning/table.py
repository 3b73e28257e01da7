"""A plan as text: what was assumed, the proposals, the first one's memory per stage, and the YAML to paste."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_stepkto.architectures.sharding import Check, data_parallel_size, model_parameters
from megatron_stepkto.planning.judges import REFERENCE_TOKENS, STEP_TOKENS, JudgeCost
from megatron_stepkto.planning.search import Plan, recipe_keys
from megatron_stepkto.planning.times import Scenario


def report(
    model: Path, case: Scenario, plans: Sequence[Plan], checks: Sequence[Check] | None, judges: Sequence[JudgeCost]
) -> str:
    parts = [_header(model, case), _proposals(case, plans), _memory(plans[0]), _times(plans[0])]
    if judges:
        parts.append(_judges(case, judges))
    if checks is not None:
        parts.append(_checked(checks))
    keys = yaml.safe_dump({"train": recipe_keys(plans[0].settings)}, sort_keys=False)
    return "\n\n".join([*parts, "Layout 1, for a recipe:\n\n" + keys.rstrip()])


def _header(model: Path, case: Scenario) -> str:
    c, k, w, a = case.config, case.cluster, case.work, case.assumed
    return "\n".join(
        [
            f"{model}: {model_parameters(case.entries) / 1e9:.2f}B parameters, {c.num_layers} layers, hidden "
            f"{c.hidden_size:,}, {c.num_heads} heads ({c.num_kv_heads} key-value), vocabulary {c.vocab_size:,}",
            f"{k.gpus} GPUs, {k.gpus_per_node} per node: {k.memory_gb:g} GB, {k.bf16_tflops:g} TFLOP/s bf16, "
            f"{k.hbm_gbs:g} GB/s memory, {k.node_gbs:g} GB/s in the node, {k.network_gbs:g} GB/s between nodes",
            f"  {k.name}: {k.source}",
            f"an iteration: {w.examples:,} examples of {w.tokens:,} tokens on average ({w.response_tokens:,} of the "
            f"response), {w.updates:,} updates of {w.global_batch}, {w.kl_share:g} KL pairs per example, "
            f"{w.samples:,} solutions sampled",
            f"assumed, not measured: arithmetic at {a.mfu:.0%} of the peak, links at {a.link:.0%} of the data sheet "
            f"with nothing overlapped, micro-batches {a.fill:.0%} full; sampling {a.sequences} sequences per engine, "
            f"{a.sampling_hbm:.0%} of memory bandwidth, {a.sampling_mfu:.0%} of the peak; judging comes on top",
        ]
    )


def _rows(rows: Sequence[Sequence[object]]) -> str:
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row) for row in zip(*aligned, strict=True))


def _proposals(case: Scenario, plans: Sequence[Plan]) -> str:
    rows: list[list[object]] = [[
        "", "TP", "PP", "v", "DP", "EP", "SP", "recompute", "micro-batch", "peak GB", "s/update", "bubble", "MFU",
        "h/iteration",
    ]]  # fmt: skip
    for number, plan in enumerate(plans, 1):
        p, t = plan.settings.parallel, plan.times
        rows.append([
            number, p.tensor, p.pipeline, p.virtual_pipeline or 1, data_parallel_size(p), p.expert,
            "yes" if p.sequence else "no", "full" if plan.settings.recompute is True else "no",
            f"{plan.settings.micro_batch_tokens:,}", f"{plan.peak / 1e9:.1f}", f"{t.update:.2f}",
            f"{t.bubble / t.update:.0%}", f"{t.mfu:.0%}", f"{t.iteration / 3600:.2f}",
        ])  # fmt: skip
    return f"Layouts, fastest first (peak of {case.cluster.memory_gb:g} GB; v: chunks per stage):\n\n" + _rows(rows)


def _memory(plan: Plan) -> str:
    names = ["stage", "parameters", "weights", "gradients", "optimizer", "activations", "head", "KL pass", "step"]
    rows = [[*names, "overhead", "peak"]]
    shown = {0, 1, plan.settings.parallel.pipeline - 1}
    for s in plan.stages:
        if s.stage not in shown:
            continue
        sizes = (s.weights, s.gradients, s.optimizer, s.activations, s.head, s.kl_pass, s.step, s.overhead, s.peak)
        rows.append([str(s.stage), f"{s.parameters:,}", *(f"{size / 1e9:.1f}" for size in sizes)])
    return (
        "Layout 1, GB per rank of a pipeline stage (peak: state + the largest of activations and head, KL pass, "
        "optimizer step, + 5% + overhead):\n\n" + _rows(rows)
    )


def _times(plan: Plan) -> str:
    t = plan.times
    parts = {
        "arithmetic": t.compute,
        "tensor-parallel messages": t.tensor_parallel,
        "expert-parallel messages": t.expert_parallel,
        "pipeline messages": t.pipeline_messages,
        "bubble": t.bubble,
        "data-parallel reduction": t.data_parallel,
        "optimizer": t.optimizer,
        "KL pass": t.kl_pass,
    }
    update = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds)
    return (
        f"Layout 1, seconds: update {t.update:.2f} = {update}; {t.micro_batches} micro-batches per replica.\n"
        f"Iteration {t.iteration:,.0f} = sampling {t.sampling:,.0f} + reference pass {t.reference_pass:,.0f} + updates "
        f"{t.iteration - t.sampling - t.reference_pass:,.0f}."
    )


def _judges(case: Scenario, judges: Sequence[JudgeCost]) -> str:
    rows = [
        ["", "GPUs", "weights GB", "GB per GPU", "tokens read", "read/s", "written", "written/s", "hours", "GPU-hours"]
    ]
    notes = []
    for each in judges:
        if each.unknown:
            notes.append(f"{each.judge}: {each.unknown}")
            continue
        written = [f"{each.written / 1e6:,.1f}M", f"{each.write_rate:,.0f}"] if each.written else ["-", "-"]
        read = [f"{each.read / 1e6:,.1f}M", f"{each.read_rate:,.0f}"]
        memory = [f"{each.weights / 1e9:.1f}", f"{each.memory / 1e9:.1f}"]
        hours = [f"{each.seconds / 3600:.2f}", f"{each.gpu_hours:.1f}"]
        rows.append([each.judge, str(each.gpus), *memory, *read, *written, *hours])
        if each.memory > case.cluster.memory_gb * 1e9:
            notes.append(f"{each.judge}: does not fit on these GPUs; take a smaller model or GPUs with more memory")
    assumed = (
        f"Judging an iteration's {case.work.samples:,} solutions (assumed, not measured: {STEP_TOKENS} tokens per "
        f"step, {REFERENCE_TOKENS} of a reference solution, reading at {case.assumed.sampling_mfu:.0%} of the peak, "
        "writing as in sampling, comments of full length, a server on one node with its prefix cache):"
    )
    return "\n".join([assumed, "", *([_rows(rows)] if len(rows) > 1 else []), *notes])


def _checked(checks: Sequence[Check]) -> str:
    rows: list[list[object]] = [["rank", "tensor", "stage", "parameters", "optimizer shard"]]
    for check in checks:
        s = check.shard
        held = f"{s.optimizer:,}" if s.optimizer is not None else "whole"
        rows.append([s.rank, s.tensor_rank, s.stage, f"{s.parameters:,}", held])
    return (
        "Shards built on the meta device, equal to the plan (data-parallel rank 0, first and last tensor rank):\n\n"
        + _rows(rows)
    )
