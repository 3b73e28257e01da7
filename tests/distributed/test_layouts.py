"""The same result at any layout, on real gloo ranks, through the train stage itself.

What the loss of an update must be, at any cut into ranks and micro-batches:

    L = (1 / N) * sum over the N examples of the global batch of l_i(z_o, z_s)

Scale factors. A micro-batch's loss is a sum over its examples, with its number of examples as Megatron's
"tokens". With ``calculate_per_token_loss`` the schedule divides by nothing; DDP sums gradients over data-parallel
ranks without dividing; ``finalize_model_grads`` sums the counts over the same ranks and scales all gradients by
1 / N once. Tensor parallel: the head's gradient with respect to the hidden states is this rank's words' part,
summed in the backward of copy_to (or the reduce-scatter of gather_from_sequence). z_o and z_s are pooled
sums and counts over all data-parallel ranks and micro-batches, clamped after. So every layout below must agree
with one process to float32 rounding: losses, reference points, gradient norms and weights after three updates.

Not tested here: context parallelism (needs Transformer Engine), expert parallelism.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto import recipe
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.stages import Stage
from megatron_stepkto.training.stage import train
from tests.builders import random_examples, write_examples, write_llama

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "small micro-batches": {"micro_batch_tokens": 60},
    "recompute": {"recompute": True},
    "TP 2": {"parallel": {"ranks": 2, "tensor": 2}},
    "TP 2, sequence parallel": {"parallel": {"ranks": 2, "tensor": 2, "sequence": True}, "micro_batch_tokens": 90},
    "PP 2": {"parallel": {"ranks": 2, "pipeline": 2}, "micro_batch_tokens": 90},
    "PP 2 interleaved": {"parallel": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}, "micro_batch_tokens": 90},
    "DP 2": {"parallel": {"ranks": 2}, "micro_batch_tokens": 90},
    "DP 2, distributed optimizer": {"parallel": {"ranks": 2, "distributed_optimizer": True}, "micro_batch_tokens": 90},
    "DP 2 x TP 2": {"parallel": {"ranks": 4, "tensor": 2}, "micro_batch_tokens": 90},
    # one example per update: the second data-parallel rank holds nothing at all
    "DP 2, an idle rank": {"parallel": {"ranks": 2}, "global_batch_size": 1},
}


def settings(**changes: Any) -> recipe.Training:
    return recipe.Training.model_validate(
        {
            "optimizer": {"lr": 2e-3, "clip_grad": 0.5},
            "loss": {"beta_outcome": 0.5, "beta_step": 2.0, "undesirable_weight_step": 0.7},
            "global_batch_size": 8,
            "micro_batch_tokens": 2000,
            "max_updates": 3,
            "device": "cpu",
            "timeout_s": 60,
            **changes,
        }
    )


def run(
    folder: Path, model: Path, data: Path, training: recipe.Training
) -> tuple[list[dict[str, Any]], CheckpointReader]:
    stage = Stage("train", folder, {}, {"model": model, "train": data})
    train(stage, training, seed=3)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, CheckpointReader(folder / "final")


# untied embeddings differ from tied ones only under tensor and pipeline parallelism
CASES = [("tied", name) for name in LAYOUTS] + [("untied", "TP 2"), ("untied", "PP 2")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """(embeddings, global batch size) -> folder and result of one process; each is run once."""
    folder = tmp_path_factory.mktemp("layouts")
    data = write_examples(folder / "train.jsonl", random_examples(24))

    @functools.cache
    def result(embeddings: str, global_batch_size: int) -> Any:
        model = folder / embeddings
        if not model.exists():
            write_llama(model, tie_word_embeddings=embeddings == "tied")
        name = f"{embeddings}-one-{global_batch_size}"
        return folder, model, data, *run(folder / name, model, data, settings(global_batch_size=global_batch_size))

    return result


@pytest.mark.parametrize(("embeddings", "name"), CASES)
def test_layout_agrees_with_one_process(embeddings: str, name: str, one_process: Callable[[str, int], Any]) -> None:
    changed = settings(**LAYOUTS[name])
    folder, model, data, expected_rows, expected = one_process(embeddings, changed.global_batch_size)
    rows, got = run(folder / f"{embeddings}-{name.replace(' ', '_')}", model, data, changed)
    assert len(rows) == len(expected_rows) == 3
    for row, right in zip(rows, expected_rows, strict=True):
        for key in ("loss", "loss_outcome", "loss_step", "grad_norm"):
            assert row[key] == pytest.approx(right[key], rel=1e-5), key
        for key in (
            "z_outcome",
            "z_step",
            "kl_outcome",
            "kl_step",
            "log_ratio_right",
            "log_ratio_wrong",
            "log_ratio_right_steps",
            "log_ratio_wrong_steps",
        ):
            # differences of two sums of about 100 nats, each rounded to 1e-5 in float32
            assert row[key] == (None if right[key] is None else pytest.approx(right[key], rel=1e-5, abs=3e-5)), key
        for key in ("num_right", "num_wrong", "num_right_steps", "num_wrong_steps", "tokens"):
            assert row[key] == right[key], key
    assert set(got.shapes()) == set(expected.shapes())
    for key in expected.shapes():
        rows_used = 99 if "word_embeddings" in key or "output_layer" in key else None
        ours, truth = got.read(key, rows=rows_used), expected.read(key, rows=rows_used)
        assert (ours - truth).norm() <= 1e-5 * truth.norm(), key


def test_the_reference_run_learns_and_has_a_reference_point(one_process: Callable[[str, int], Any]) -> None:
    """The comparison above would pass on zeros: loss, z and gradient must be those of a run that moves."""
    *_, rows, _ = one_process("tied", 8)
    assert rows[0]["log_ratio_right"] == pytest.approx(0.0, abs=1e-4), "policy and reference begin as one model"
    assert abs(rows[2]["log_ratio_right"]) > 0.01
    assert max(abs(row["kl_outcome"]) for row in rows) > 0.01
    assert all(row["grad_norm"] > 0.5 for row in rows), "clipping at 0.5 must act: it hides in no layout"
