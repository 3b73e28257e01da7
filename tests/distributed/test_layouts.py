"""The same result at any layout, on real gloo ranks.

What the loss of an update must be, at any cut into ranks and micro-batches:

    L = (1 / N) * sum over the N examples of the global batch of l_i(z_o, z_s)

with z the clamped mean over the KL pairs of the whole global batch. Every factor between l_i and the weights:

1. Number of micro-batches. A micro-batch hands the schedule the *sum* of its l_i and its number of examples as
   Megatron's "tokens". With ``calculate_per_token_loss`` the schedule does not divide by num_microbatches.
2. Pipeline. The last stage alone computes a loss; what it sends back is the gradient of that sum, and no stage
   scales it again. Each of the M micro-batches is sent once, so a stage's gradient is the sum over M. An interleaved
   schedule rounds M up to a multiple of the stages: the micro-batches added hold no document, their sum is 0 * h.
3. Data parallel. ``calculate_per_token_loss`` sets DDP's gradient scaling to 1: buffers are summed over replicas, not
   averaged. ``finalize_model_grads`` then sums the example counts of the last stage over the replicas, broadcasts
   them through the pipeline and scales all gradients by 1 / N, once. So replicas may hold different numbers of
   examples, or none (``1 / N`` is of the sum, not a mean of means). The distributed optimizer reduce-scatters the
   same sums; its parts of the gradient norm are added over the replicas that hold them.
4. Tensor parallel. The head's gradient with respect to the hidden states is only this rank's words' part; the
   backward of copy_to (with sequence parallelism: of gather_from_sequence, a reduce-scatter) sums it. Weights that
   every rank holds whole get equal gradients; the gradient norm counts them on rank 0 alone, and split weights on
   every rank (by their ``tensor_model_parallel`` mark).
5. Sequence parallel. Each rank sees a part of the tokens, so the gradient of a norm's weight is a part: it is summed
   over the tensor-parallel ranks in ``finalize_model_grads`` (by its ``sequence_parallel`` mark).
6. Tied embeddings under pipeline parallelism are two tensors on two stages: their gradients are summed between the
   first and the last stage before the update, and the norm counts the first stage's alone.
7. Recompute changes no bit (``SAME_BITS``), but for adapters in whole layers, where it is rounding. Padding tokens
   belong to no step and get no gradient.
8. z_o and z_s are pooled as float64 sums and counts over micro-batches and replicas, divided once, clamped, detached.
9. Context parallel. Each rank holds parts of every document; the log-probs of the response tokens are summed into one
   [R] vector on all of them, whose backward is the identity: each rank computes the same loss and sends the gradient
   of its own tokens back. Keys and values are gathered; their gradients are summed over the ranks. DDP sums the
   weights' gradients over replicas and context, Megatron the example counts too: one context rank reports them.
10. Adapters (LoRA). megatron/lora.py says which of their matrices are whole on every rank, and which messages make
    their gradients whole. The base has none. Recompute needs an input with a gradient, which a frozen embedding's
    output is made to be. The rows start from an adapter that is not zero, and the reference is the base.
11. Overlap. Gradients are summed over replicas bucket by bucket while the backward pass of the last micro-batch runs,
    and with the distributed optimizer a module waits for its weights before it runs. It is on in every row but two; the
    ranks make buckets of about half a layer, and weights that are read before they are waited for are nan
    (``layout_worker``). Where replicas are two and nothing is scattered, it changes no bit.
12. Balanced class weights are counted over the whole data set, by every rank alike.

Comparison. Losses and gradient norms: 1e-5 relative. Reference points and log-ratios are differences of sums of about
100 nats that float32 rounds to 1e-5: 2e-5 nats. Weights: their change over three updates, w3 - w0, to 1e-5 of that
change's norm per tensor, plus half a unit in the last place of w0 (the weights themselves are rounded; a norm's weight
of 1 moves in steps of 1e-7). AdamW divides a gradient by its own size: where that is near zero its *sign* is rounding
error, and the update differs by 2 lr. So most rows use an epsilon far above the gradients, where the update is linear
in them and hides nothing; the rows "usual epsilon" use 1e-8, and compare weights to 1e-5 of the weights.

Not tested here: experts over four ranks or beside pipeline parallelism, Transformer Engine's context parallelism (a
ring exchange), CUDA, NCCL.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.base.records import KLPartner, TrainExample
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.megatron.batch import (
    Documents,
    Part,
    Slot,
    pack_units,
    with_partner,
)
from megatron_stepkto.megatron.version import needs_common_pt
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from tests.builders import VOCABULARY, random_examples, write_adapter, write_examples, write_llama
from tests.model_folders import read_tensor, write_model

pytestmark = pytest.mark.distributed

TIME_LIMIT_S = 900  # on a busy machine
SEED = 3
LINEAR = {"lr": 0.3, "eps": 0.1, "clip_grad": 0.5, "weight_decay": 0.01}
USUAL = {"lr": 2e-3, "clip_grad": 0.5, "weight_decay": 0.01}


@dataclass(frozen=True)
class Row:
    """A layout, with what it is tried on. ``padded``: documents of equal length, so many to a micro-batch.
    ``fused_head``: the head adds its gradient to the buffer itself, as beside Transformer Engine's layers."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "tied"
    data: str = "mixed"
    batch: int = 8
    micro_batch_tokens: int = 90
    padded: bool = False
    recompute: bool | dict[str, Any] = False
    optimizer: dict[str, Any] = field(default_factory=lambda: LINEAR)
    method: str = "step_kto"
    lora: dict[str, Any] | None = None
    fused_head: bool = False
    grouped: bool = False  # experts as Transformer Engine's grouped products, with a stand-in for its layer

    @property
    def ranks(self) -> int:
        return int(self.parallel.get("ranks", 1))

    @property
    def baseline(self) -> Row:
        """One process, everything in one packed micro-batch."""
        adapters = f", adapters of {self.lora['targets']}" if self.lora else ""
        what = f"{self.model}, {self.data}, {self.batch}, {self.optimizer['lr']}, {self.method}{adapters}"
        return Row(f"one process: {what}", model=self.model, data=self.data, batch=self.batch, micro_batch_tokens=4000,
                   optimizer=self.optimizer, method=self.method, lora=self.lora)  # fmt: skip

    def settings(self) -> recipe.Training:
        return recipe.Training.model_validate({
            "method": self.method, "parallel": self.parallel, "optimizer": self.optimizer,
            "loss": {"beta_outcome": 0.2, "beta_step": 0.5, "undesirable_weight_step": 0.7, "balance": "auto"},
            "global_batch_size": self.batch, "micro_batch_tokens": self.micro_batch_tokens,
            "pad_documents_to": 64 if self.padded else 1, "recompute": self.recompute, "reference": "initial",
            "max_updates": 3, "device": "cpu", "timeout_s": 300, "log": {"tensorboard": False, "entropy": True},
            "lora": self.lora,
        })  # fmt: skip


def layout(ranks: int, **keys: Any) -> dict[str, Any]:
    return {"ranks": ranks, **keys}


TP2, TP4 = layout(2, tensor=2), layout(4, tensor=4)
TP2_SP, TP4_SP = layout(2, tensor=2, sequence=True), layout(4, tensor=4, sequence=True)
PP2, PP4 = layout(2, pipeline=2), layout(4, pipeline=4)
PP2_VPP2 = layout(2, pipeline=2, virtual_pipeline=2)
CP2 = layout(2, context=2)
DP2, DP2_DO = layout(2), layout(2, distributed_optimizer=True)
MODULES = {"modules": ["core_attn", "layernorm", "mlp"]}
LORA = {"rank": 4, "alpha": 8, "targets": "all"}
SOME = LORA | {"targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}

ROWS = [
    # micro-batches: packed to different sizes, and padded to 64 tokens with exactly 1, 2 and 4 examples in each
    Row("packed, 60 tokens", micro_batch_tokens=60),
    Row("packed, 90 tokens"),
    Row("packed, 180 tokens", micro_batch_tokens=180),
    *(Row(f"padded, {n} to a micro-batch", micro_batch_tokens=64 * n, padded=True) for n in (1, 2, 4)),
    Row("recompute", recompute=True),
    Row("recompute of two layers", recompute={"layers": 2}),
    Row("recompute, every second input kept", recompute={"every": 2}),
    Row("recompute of modules", recompute=MODULES),
    Row("recompute of modules, packed, 60 tokens", recompute=MODULES, micro_batch_tokens=60),
    Row("LoRA, recompute of modules, packed, 60 tokens", recompute=MODULES, micro_batch_tokens=60, lora=LORA),
    Row("LoRA, packed, 60 tokens", micro_batch_tokens=60, lora=LORA),
    Row("experts, recompute of modules, packed, 60 tokens", model="experts", micro_batch_tokens=60,
        recompute={"modules": ["core_attn", "layernorm", "moe"]}),
    Row("LoRA, recompute, packed, 60 tokens", recompute=True, micro_batch_tokens=60, lora=LORA),
    # two ranks
    Row("TP 2", TP2),
    Row("TP 2, untied", TP2, model="untied"),
    Row("TP 2, sequence parallel", TP2_SP),
    Row("TP 2, sequence parallel, untied, recompute", TP2_SP, model="untied", recompute=True),
    Row("TP 2, sequence parallel, untied, recompute of modules", TP2_SP, model="untied", recompute=MODULES),
    Row("TP 2, sequence parallel, padded", TP2_SP, micro_batch_tokens=128, padded=True),
    Row("PP 2", PP2),
    Row("PP 2, untied, recompute", PP2, model="untied", recompute=True),
    Row("PP 2, recompute of a layer a stage", PP2, recompute={"layers": 1}),
    Row("PP 2, padded, 4 to a micro-batch", PP2, micro_batch_tokens=256, padded=True),
    Row("interleaved PP 2x2", PP2_VPP2),
    Row("interleaved PP 2x2, untied", PP2_VPP2, model="untied"),
    Row("DP 2", DP2),
    Row("DP 2, no overlap", DP2 | {"overlap": False}),
    Row("DP 2, untied, recompute of modules, fused head", DP2, model="untied", recompute=MODULES, fused_head=True),
    Row("DP 2, fused head", DP2, fused_head=True),
    Row("DP 2, padded, 2 to a micro-batch", DP2, micro_batch_tokens=128, padded=True),
    Row("DP 2, distributed optimizer", DP2_DO),
    Row("DP 2, distributed optimizer, no overlap", DP2_DO | {"overlap": False}),
    Row("DP 2, distributed optimizer, recompute, untied", DP2_DO, model="untied", recompute=True),
    Row("DP 2, an idle rank", DP2, batch=1),
    # every update holds one or two of each kind, one to a micro-batch (see ``lopsided``)
    *(Row(f"DP 2, a rank with {kind}", DP2, data=kind, batch=2, micro_batch_tokens=60)
      for kind in ("no right example", "no KL pair", "no judged step")),
    Row("DP 2, distributed optimizer, a rank with no right example", DP2_DO, data="no right example", batch=2,
        micro_batch_tokens=60),
    Row("TP 2, usual epsilon", TP2, optimizer=USUAL),
    Row("DP 2, distributed optimizer, usual epsilon", DP2_DO, optimizer=USUAL),
    Row("PP 2, KTO", PP2, method="kto"),
    Row("CP 2", CP2),
    Row("CP 2, untied, recompute, one to a micro-batch", CP2, model="untied", recompute=True, micro_batch_tokens=64),
    Row("CP 2, padded, 2 to a micro-batch", CP2, micro_batch_tokens=128, padded=True),
    Row("experts, packed, 60 tokens", model="experts", micro_batch_tokens=60),
    Row("experts, DP 2, each rank all experts", DP2, model="experts"),
    Row("EP 2", layout(2, expert=2), model="experts"),
    Row("EP 2, distributed optimizer", layout(2, expert=2, distributed_optimizer=True), model="experts"),
    Row("TP 2 x EP 2, sequence parallel", layout(2, tensor=2, expert=2, sequence=True), model="experts"),
    Row("experts, CP 2", CP2, model="experts"),
    Row("CP 2 x EP 2, recompute", layout(2, context=2, expert=2), model="experts", recompute=True),
    Row("expert TP 2", layout(2, expert_tensor=2), model="experts"),
    Row("TP 2 x expert TP 2, sequence parallel, packed, 60 tokens",
        layout(2, tensor=2, expert_tensor=2, sequence=True), model="experts", micro_batch_tokens=60),
    Row("CP 2 x expert TP 2, distributed optimizer", layout(2, context=2, expert_tensor=2, distributed_optimizer=True),
        model="experts"),
    Row("LoRA, TP 2", TP2, lora=LORA),
    Row("LoRA, TP 2, sequence parallel, recompute", TP2_SP, recompute=True, lora=LORA),
    Row("LoRA of some layers, TP 2, sequence parallel", TP2_SP, lora=SOME),
    Row("LoRA, PP 2, recompute", PP2, recompute=True, lora=LORA),
    Row("LoRA, interleaved PP 2x2", PP2_VPP2, lora=LORA),
    Row("LoRA, CP 2", CP2, lora=LORA),
    Row("LoRA, DP 2, distributed optimizer", DP2_DO, lora=LORA),
    Row("LoRA, experts, TP 2 x EP 2, sequence parallel", layout(2, tensor=2, expert=2, sequence=True), model="experts",
        lora=LORA),
    Row("LoRA, experts, CP 2 x EP 2", layout(2, context=2, expert=2), model="experts", lora=LORA),
    Row("LoRA, experts, expert TP 2", layout(2, expert_tensor=2), model="experts", lora=LORA),
    Row("grouped experts, EP 2, packed, 60 tokens", layout(2, expert=2), model="experts", micro_batch_tokens=60,
        grouped=True),
    Row("grouped experts, TP 2 x expert TP 2, sequence parallel, recompute, distributed optimizer",
        layout(2, tensor=2, expert_tensor=2, sequence=True, distributed_optimizer=True), model="experts",
        recompute=True, grouped=True),
    Row("LoRA, grouped experts, CP 2 x EP 2", layout(2, context=2, expert=2), model="experts", lora=LORA, grouped=True),
    Row("LoRA, grouped experts, expert TP 2", layout(2, expert_tensor=2), model="experts", lora=LORA, grouped=True),
    # four ranks
    Row("CP 2 x TP 2 x EP 4, sequence parallel", layout(4, context=2, tensor=2, expert=4, sequence=True),
        model="experts"),
    Row("EP 2 x expert TP 2, distributed optimizer", layout(4, expert=2, expert_tensor=2, distributed_optimizer=True),
        model="experts"),
    Row("PP 2 x EP 2", layout(4, pipeline=2, expert=2), model="experts"),
    Row("LoRA, TP 2 x PP 2, sequence parallel", layout(4, tensor=2, pipeline=2, sequence=True), lora=LORA),
    Row("LoRA, DP 2 x TP 2, distributed optimizer", layout(4, tensor=2, distributed_optimizer=True), lora=LORA),
    Row("TP 4", TP4),
    Row("TP 4, sequence parallel, untied", TP4_SP, model="untied"),
    Row("PP 4", PP4),
    Row("PP 4, untied", PP4, model="untied"),
    Row("TP 2 x PP 2", layout(4, tensor=2, pipeline=2)),
    Row("TP 2 x PP 2, sequence parallel, untied, recompute", layout(4, tensor=2, pipeline=2, sequence=True),
        model="untied", recompute=True),
    Row("TP 2 x interleaved PP 2x2, sequence parallel",
        layout(4, tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)),
    Row("DP 2 x TP 2", layout(4, tensor=2)),
    Row("DP 2 x TP 2, sequence parallel, distributed optimizer, untied",
        layout(4, tensor=2, sequence=True, distributed_optimizer=True), model="untied"),
    Row("DP 2 x PP 2, distributed optimizer", layout(4, pipeline=2, distributed_optimizer=True)),
    Row("CP 2 x TP 2, sequence parallel", layout(4, context=2, tensor=2, sequence=True)),
    Row("CP 2 x PP 2, untied", layout(4, context=2, pipeline=2), model="untied"),
    Row("CP 2 x DP 2, distributed optimizer", layout(4, context=2, distributed_optimizer=True)),
    Row("CP 4", layout(4, context=4)),
    Row("TP 2 x PP 2, usual epsilon", layout(4, tensor=2, pipeline=2), optimizer=USUAL),
]  # fmt: skip
RESTORED = ("DP 2, distributed optimizer", "LoRA, DP 2, distributed optimizer")  # by layout_worker, from a checkpoint
BASELINES = list({row.baseline.name: row.baseline for row in ROWS}.values())


def lopsided(kind: str) -> list[TrainExample]:
    """Examples of two kinds in turn: one kind is right, has judged steps and a KL pair, the other lacks ``kind``."""
    examples = [e for e in random_examples(60, seed=1) if 31 <= len(e.prompt_token_ids) + len(e.token_ids) <= 45][:8]
    assert len(examples) == 8
    made = []
    for number, example in enumerate(examples):
        without = number % 2 == 1
        partner = examples[(number + 1) % 8]
        judged = [step.model_copy(update={"label": (i + number) % 2}) for i, step in enumerate(example.steps)]
        unjudged = [step.model_copy(update={"label": None}) for step in example.steps]
        made.append(example.model_copy(update={
            "outcome": 0 if without and kind == "no right example" else 1 if number % 4 < 2 or not without else 0,
            "steps": unjudged if without and kind == "no judged step" else judged,
            "kl_partner": None if without and kind == "no KL pair" else
            KLPartner(example_id=partner.example_id, token_ids=partner.token_ids, steps=partner.steps),
        }))  # fmt: skip
    return made


def write_neighbour(source: Path, target: Path) -> Path:
    """A model near ``source``: log-ratios of about a nat, so that no sigmoid of the loss is saturated."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(target)
    return target


def data_of(name: str) -> list[TrainExample]:
    return random_examples(24) if name == "mixed" else lopsided(name)


Outcome = tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, int]]


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Outcome]:
    """Row -> its metrics, its change of every weight, facts. All rows of as many ranks run in one launch."""
    folder = tmp_path_factory.mktemp("layouts")
    initial: dict[str, Path] = {}
    for name in sorted({row.model for row in ROWS}):
        source = folder / f"{name} initial hf"
        if name == "experts":
            write_model(source, "qwen3_moe")
        else:
            write_llama(source, tie_word_embeddings=name == "tied", num_key_value_heads=4, num_attention_heads=8)
        for which, hf in (("initial", source), ("reference", write_neighbour(source, folder / f"{name} reference hf"))):
            hf_to_megatron(hf, folder / f"{name} {which}", torch.float32)
        initial[name] = folder / f"{name} initial"
    for name in sorted({row.data for row in ROWS}):
        write_examples(folder / name, data_of(name))
    launched: set[tuple[int, bool]] = set()

    def launch(rows: Sequence[Row], ranks: int, worker: str) -> None:
        jobs = []
        for row in rows:
            directory = folder / row.name
            directory.mkdir()
            given: dict[str, Any] = {"reference": folder / f"{row.model} reference"}
            if row.lora:  # the reference is the model without the adapter
                model, some = folder / f"{row.model} initial hf", None if row.lora is LORA else row.lora["targets"]
                given = {"reference": None, "adapter": write_adapter(directory / "adapter", model, 4, 8, some)}
            job = Job(settings=row.settings(), seed=SEED, initial=initial[row.model], **given,
                      train_examples=folder / row.data,
                      held_out_examples=None, directory=directory, fingerprint="x")  # fmt: skip
            (directory / "job.json").write_text(job.model_dump_json())
            for name, wanted in (("fused head", row.fused_head), ("restored", row.name in RESTORED)):
                if wanted:
                    (directory / name).touch()
            jobs.append(str(directory / "job.json"))
        listed = folder / f"{ranks} {worker}.json"
        listed.write_text(json.dumps(jobs))
        torchrun = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *torchrun, "-m", f"tests.distributed.{worker}", str(listed)]
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        deadline = time.monotonic() + TIME_LIMIT_S

        def in_time() -> None:
            assert time.monotonic() < deadline, f"{ranks} ranks took more than {TIME_LIMIT_S} s"

        run_children([Child(command, listed.with_suffix(".log"), env)], title="layouts", unit="jobs", progress=in_time)

    def outcome(row: Row) -> Outcome:
        together = (row.ranks, row.grouped)
        if together not in launched:
            rows = [r for r in ROWS if (r.ranks, r.grouped) == together] + (BASELINES if row.ranks == 1 else [])
            launched.add(together)  # before: a launch that fails is not tried again by every row
            launch(rows, row.ranks, "grouped_worker" if row.grouped else "layout_worker")
        rows = [json.loads(line) for line in (folder / row.name / "metrics.jsonl").read_text().splitlines()]
        result = torch.load(folder / row.name / "result.pt", weights_only=True)
        before, weights = CheckpointReader(initial[row.model]), result.pop("weights")
        if row.lora:
            adapters = result.pop("before")
            assert set(adapters) == set(weights)
            return rows, {key: torch.stack([adapters[key], weights[key]]) for key in weights}, result
        change = {}
        for key, weight in weights.items():
            words = VOCABULARY if "embedding" in key or "output_layer" in key else None  # without the padding's rows
            change[key] = torch.stack([read_tensor(before, key, rows=words), weight[:words]])
        assert set(change) == set(before.shapes())
        return rows, change, result

    return outcome


SAME = ("loss", "loss_outcome", "loss_step", "grad_norm", "entropy")
NEAR = ("z_outcome", "z_step", "kl_outcome", "kl_step", "log_ratio_right", "log_ratio_wrong", "log_ratio_right_steps",
        "log_ratio_wrong_steps")  # fmt: skip
LOADS = ("expert_load", "expert_load_worst", "experts_unused")  # of a mixture of experts
COUNTS = ("num_right", "num_wrong", "num_right_steps", "num_wrong_steps", "tokens")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_agrees_with_one_process(row: Row, outcome_of: Callable[[Row], Outcome]) -> None:
    if row.grouped and not needs_common_pt():
        pytest.skip("the stand-in for Transformer Engine is made for megatron-core 0.16's module")
    expected_rows, expected, _ = outcome_of(row.baseline)
    rows, got, _ = outcome_of(row)
    assert len(rows) == len(expected_rows) == 3
    for ours, truth in zip(rows, expected_rows, strict=True):
        for key in SAME:
            assert ours[key] == pytest.approx(truth[key], rel=1e-5), key
        for key in NEAR:
            assert ours[key] == (None if truth[key] is None else pytest.approx(truth[key], rel=1e-5, abs=2e-5)), key
        for key in COUNTS:
            assert ours[key] == truth[key], key
        for key in LOADS if row.model == "experts" else ():  # exact: counts of tokens without padding
            assert ours[key] == pytest.approx(truth[key], rel=1e-12), key
    assert set(got) == set(expected)
    for key, (before, truth) in expected.items():
        assert torch.equal(got[key][0], before)
        ours = got[key][1]
        assert torch.isfinite(ours).all(), f"{key}: some elements are on no rank"
        if row.optimizer is USUAL:
            assert (ours - truth).norm() <= 1e-5 * truth.norm(), key
        else:
            rounding = before.abs().mul(2.0**-24).norm()
            assert (ours - truth).norm() <= 1e-5 * (truth - before).norm() + rounding, key


SAME_BITS = [
    *(
        (name, "packed, 90 tokens")
        for name in (
            "recompute",
            "recompute of two layers",
            "recompute, every second input kept",
            "recompute of modules",
        )
    ),
    ("recompute of modules, packed, 60 tokens", "packed, 60 tokens"),
    ("LoRA, recompute of modules, packed, 60 tokens", "LoRA, packed, 60 tokens"),
    ("experts, recompute of modules, packed, 60 tokens", "experts, packed, 60 tokens"),
    ("PP 2, recompute of a layer a stage", "PP 2"),
    ("DP 2", "DP 2, no overlap"),
]


@pytest.mark.parametrize(("name", "other"), SAME_BITS, ids=[name for name, _ in SAME_BITS])
def test_what_changes_no_bit(name: str, other: str, outcome_of: Callable[[Row], Outcome]) -> None:
    named = {row.name: row for row in ROWS}
    (ours, got, _), (theirs, expected, _) = outcome_of(named[name]), outcome_of(named[other])
    for key in (*SAME, *NEAR):
        assert [r[key] for r in ours] == [r[key] for r in theirs], key
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_the_compared_runs_move(outcome_of: Callable[[Row], Outcome]) -> None:
    """The comparison would pass on zeros: loss, reference points, clipping and every weight must be in motion."""
    for row in BASELINES:
        rows, change, _ = outcome_of(row)
        assert all(r["grad_norm"] > 0.5 for r in rows) or row.batch < 8, "clipping at 0.5 must act: it hides in no row"
        # one update of a row may meet a KL near zero: with the usual epsilon its value is the processor's rounding
        assert max(abs(r["kl_outcome"] or 0) for r in rows) > 0.05, row.name
        for key, (before, after) in change.items():
            assert (after - before).norm() > 1e-4 * before.norm(), (row.name, key)
    for z in ("z_outcome", "z_step"):
        assert sum(r[z] > 0.01 for row in BASELINES for r in outcome_of(row)[0]) >= 3


def cut(row: Row, update: int, kl: bool) -> list[list[list[str]]]:
    """Names of the documents that each data-parallel rank holds in an update, by micro-batch."""
    examples = Examples.of(data_of(row.data))
    members = np.array(plan_updates(len(examples), row.batch, 1, SEED, 3)[update])
    chosen = with_partner(examples, members) if kl else members
    units = [[document] for document in Documents([Part(examples, chosen, kl)])]
    ranks = row.ranks // math.prod(row.parallel.get(way, 1) for way in ("tensor", "pipeline", "context"))
    multiple = 64 if row.padded else 1
    slots = [Slot(r, ranks, row.micro_batch_tokens, 1, 1, torch.device("cpu"), multiple) for r in range(ranks)]
    return [[[d.key for d in batch.documents] for batch in pack_units(units, slot)] for slot in slots]


def test_the_rows_are_what_their_names_say() -> None:
    """Micro-batches of 1, 2 and 4 examples; ranks that lack a kind of example in some update."""
    for row in ROWS:
        if row.padded:
            assert {len(names) for rank in cut(row, 0, kl=False) for names in rank} == {row.micro_batch_tokens // 64}
        if row.data != "mixed":
            examples = {e.example_id: e for e in data_of(row.data)}

            def holds(name: str, kind: str = row.data, examples: Any = examples) -> bool:
                example = examples[name]
                return example.outcome == 1 if "right" in kind else any(s.label is not None for s in example.steps)

            found = False
            for update in range(3):
                ranks = [[name for names in rank for name in names] for rank in cut(row, update, kl="KL" in row.data)]
                having = [bool(r) if "KL" in row.data else any(map(holds, r)) for r in ranks]
                found |= sorted(having) == [False, True]
            assert found, row.name
    [idle] = [row for row in ROWS if "idle" in row.name]
    assert sorted(len(names) for rank in cut(idle, 0, kl=False) for names in rank) == [0, 1]


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in RESTORED], ids=lambda row: row.name)
def test_a_checkpoint_gives_back_the_state_of_many_buckets(row: Row, outcome_of: Callable[[Row], Outcome]) -> None:
    """Each bucket is padded and cut among the ranks by itself."""
    *_, facts = outcome_of(row)
    assert facts["restored"] == facts["state"] > 20


RESIDENT = ("TP 2", "DP 2", "TP 2 x PP 2", "LoRA, TP 2")


@pytest.mark.parametrize("row", [ROWS[0].baseline, *(r for r in ROWS if r.name in RESIDENT)], ids=lambda row: row.name)
def test_no_second_model_is_resident(row: Row, outcome_of: Callable[[Row], Outcome]) -> None:
    """reference: initial, of another model than the one trained; parameters that live in rank 0 during any pass."""
    *_, facts = outcome_of(row)
    assert facts["resident"] == facts["parameters"] > 0
