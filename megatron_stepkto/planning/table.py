"""A plan as text: assumptions, the recipe's own layout and the proposals, memory per stage, and the YAML to paste."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_stepkto.architectures.sharding import Check, data_parallel_size, model_parameters
from megatron_stepkto.base.words import counted
from megatron_stepkto.planning.judges import REFERENCE_TOKENS, STEP_TOKENS, JudgeCost
from megatron_stepkto.planning.search import Plan, means_text, recipe_keys, recompute_text
from megatron_stepkto.planning.times import Scenario, micro_batch_tokens, offloaded


def report(
    model: Path,
    case: Scenario,
    plans: Sequence[Plan],
    checks: Sequence[Check] | None,
    judges: Sequence[JudgeCost],
    why: str = "",
    own: Plan | None = None,
    of_own: str = "",
) -> str:
    """
    Args:
        plans: the proposals. why: where they are other means than a layout, the reason.
        own: the recipe's own layout. of_own: whether it fits, or why it is not planned.
    """
    numbered = [(f"Layout {number}", plan) for number, plan in enumerate(plans, 1)]
    shown = [*([("The recipe's layout", own)] if own else []), *(numbered if why else numbered[:1])]
    parts = [text for text in (_header(model, case), of_own, why) if text]
    parts.append(_proposals(case, plans, own))
    parts += [_memory(name, plan) for name, plan in shown]
    parts.append("\n".join(_times(case, name, plan) for name, plan in shown))
    if judges:
        parts.append(_judges(case, judges))
    if checks is not None:
        parts.append(_checked(shown[0][0], checks))
    if plans:
        keys = yaml.safe_dump({"train": recipe_keys(plans[0].settings)}, sort_keys=False)
        parts.append("Layout 1, for a recipe:\n\n" + keys.rstrip())
    return "\n\n".join(parts)


def _header(model: Path, case: Scenario) -> str:
    c, k, w, a = case.config, case.cluster, case.work, case.assumed
    return "\n".join(
        [
            f"{model}: {model_parameters(case.entries) / 1e9:.2f}B parameters, {c.num_layers} layers, hidden "
            f"{c.hidden_size:,}, {c.num_heads} heads ({c.num_kv_heads} key-value), vocabulary {c.vocab_size:,}",
            f"{counted(k.gpus, 'GPU')}, {k.gpus_per_node} per node: {k.memory_gb:g} GB, {k.bf16_tflops:g} TFLOP/s "
            f"bf16, {k.hbm_gbs:g} GB/s memory, {k.node_gbs:g} GB/s in the node, {k.network_gbs:g} GB/s between nodes",
            f"  {k.name}: {k.source}",
            f"an iteration: {w.examples:,} examples of {w.tokens:,} tokens on average ({w.response_tokens:,} of the "
            f"response), {w.updates:,} updates of {w.global_batch}, {counted(w.kl_share, 'KL pair')} per example, "
            f"{w.samples:,} solutions sampled",
            f"assumed, not measured: arithmetic at {a.mfu:.0%} of the peak, links at {a.link:.0%} of the data sheet "
            f"with nothing overlapped, PCIe ({k.pcie_gbs:g} GB/s) at {a.pcie:.0%} and the host's memory "
            f"({k.host_gbs:g} GB/s for each GPU) at {a.host:.0%}, micro-batches {a.fill:.0%} full; sampling "
            f"{a.sequences} sequences per engine, {a.sampling_hbm:.0%} of memory bandwidth, {a.sampling_mfu:.0%} of "
            "the peak; judging comes on top",
        ]
    )


def _rows(rows: Sequence[Sequence[object]]) -> str:
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row) for row in zip(*aligned, strict=True))


def _proposals(case: Scenario, plans: Sequence[Plan], own: Plan | None) -> str:
    named = [*([("recipe", own)] if own else []), *((str(number), plan) for number, plan in enumerate(plans, 1))]
    any_means = any(means_text(plan.settings) != "-" for _, plan in named)
    rows: list[list[object]] = [[
        "", "TP", "PP", "v", "DP", "EP", "SP", "recompute", "micro-batch", "peak GB", "s/update", "bubble", "MFU",
        "h/iteration", *(["by"] if any_means else []),
    ]]  # fmt: skip
    for name, plan in named:
        p, t = plan.settings.parallel, plan.times
        rows.append([
            name, p.tensor, p.pipeline, p.virtual_pipeline or 1, data_parallel_size(p), p.expert,
            "yes" if p.sequence else "no", recompute_text(plan.settings.recompute),
            f"{plan.settings.micro_batch_tokens:,}", f"{plan.peak / 1e9:.1f}", f"{t.update:.2f}",
            f"{t.bubble / t.update:.0%}", f"{t.mfu:.0%}", f"{t.iteration / 3600:.2f}",
            *([means_text(plan.settings)] if any_means else []),
        ])  # fmt: skip
    title = "Layouts: the recipe's own, then proposals" if own else "Layouts"
    return f"{title}, fastest first (peak of {case.cluster.memory_gb:g} GB; v: chunks per stage):\n\n" + _rows(rows)


def _memory(name: str, plan: Plan) -> str:
    names = ["stage", "parameters", "weights", "gradients", "optimizer", "activations", "head", "KL pass", "step"]
    on_host = any(stage.host for stage in plan.stages)
    rows = [[*names, "overhead", "peak", *(["host"] if on_host else [])]]
    shown = {0, 1, plan.settings.parallel.pipeline - 1}
    for s in plan.stages:
        if s.stage not in shown:
            continue
        sizes = (s.weights, s.gradients, s.optimizer, s.activations, s.head, s.kl_pass, s.step, s.overhead, s.peak)
        host = [f"{s.host / 1e9:.1f}"] if on_host else []
        rows.append([str(s.stage), f"{s.parameters:,}", *(f"{size / 1e9:.1f}" for size in sizes), *host])
    text = "state + the largest of activations and head, KL pass, optimizer step, + 5% + overhead"
    text += "; host: of the host's memory, on top" if on_host else ""
    return f"{name}, GB per rank of a pipeline stage (peak: {text}):\n\n{_rows(rows)}"


def _times(case: Scenario, name: str, plan: Plan) -> str:
    t = plan.times
    parts = {
        "arithmetic": t.compute,
        "computed again": t.recompute,
        "tensor-parallel messages": t.tensor_parallel,
        "expert-parallel messages": t.expert_parallel,
        "pipeline messages": t.pipeline_messages,
        "bubble": t.bubble,
        "data-parallel reduction": t.data_parallel,
        "optimizer": t.optimizer,
        "offload": t.offload,
        "KL pass": t.kl_pass,
    }
    update = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds)
    return (
        f"{name}, seconds: update {t.update:.2f} = {update}; "
        f"{t.micro_batches} micro-batch{'es' if t.micro_batches != 1 else ''} per replica.\n"
        + "".join(f"  {line}\n" for line in _costs(case, plan))
        + f"Iteration {t.iteration:,.0f} = sampling {t.sampling:,.0f} + reference pass {t.reference_pass:,.0f} + "
        f"updates {t.iteration - t.sampling - t.reference_pass:,.0f}."
    )


def _costs(case: Scenario, plan: Plan) -> list[str]:
    """What each means that lowers memory costs, and the model behind the number."""
    t, k, a, settings = plan.times, case.cluster, case.assumed, plan.settings
    lines = []
    if t.recompute:
        again = t.recompute * k.bf16_tflops * a.mfu
        lines.append(
            f"recompute ({recompute_text(settings.recompute)}) {t.recompute:.2f}: {again:,.0f} TFLOP per GPU computed "
            f"again, at {a.mfu:.0%} of {k.bf16_tflops:g} TFLOP/s"
        )
    if t.offload:
        moved = offloaded(case, settings, t.micro_batches, micro_batch_tokens(case, settings))
        lines.append(
            f"offload {t.offload:.2f}: {moved.pcie / 1e9:,.1f} GB over PCIe at {a.pcie:.0%} of {k.pcie_gbs:g} GB/s"
            + (
                f", and AdamW on the host, which reads and writes {moved.host / 1e9:,.1f} GB at {a.host:.0%} of "
                f"{k.host_gbs:g} GB/s"
                if moved.host
                else ""
            )
            + "; nothing is taken to overlap"
        )
    if settings.lora:
        lines.append(
            "LoRA: the base's weights have no gradient, which saves a third of the arithmetic of forward and backward "
            "passes; it trains adapters, which is not the same as all weights (docs/training.md)"
        )
    if settings.optimizer.moment_dtype == "bfloat16":
        lines.append("bf16 moments: no time; less precision in AdamW, and Transformer Engine is needed")
    if settings.optimizer.gradient_dtype == "bfloat16":
        lines.append("bf16 gradients: half the bytes of their reduction; sums of micro-batches round to 8 bits")
    return lines


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


def _checked(name: str, checks: Sequence[Check]) -> str:
    rows: list[list[object]] = [["rank", "tensor", "stage", "parameters", "optimizer shard"]]
    for check in checks:
        s = check.shard
        held = f"{s.optimizer:,}" if s.optimizer is not None else "whole"
        rows.append([s.rank, s.tensor_rank, s.stage, f"{s.parameters:,}", held])
    return (
        f"{name}: shards built on the meta device, equal to the plan (data-parallel rank 0, first and last tensor "
        "rank):\n\n" + _rows(rows)
    )
