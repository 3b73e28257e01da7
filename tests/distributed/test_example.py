"""The one-file example against the package: the same solutions give the same updates."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep
from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.recipe import keys as recipe
from tests.builders import write_examples
from tests.distributed.test_against_transformers import run_train
from tests.example_scripts import EXAMPLES, load_example

pytestmark = pytest.mark.distributed

LINES, UPDATES, BATCH, SEED = 150, 3, 16, 3


@pytest.fixture(scope="module")
def example() -> Any:
    name = f"step_kto_in_{LINES}_lines"
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= LINES
    return load_example(name)


def steps_of(solution: Any) -> list[TrainStep]:
    return [
        TrainStep(token_start=start, token_end=end, label=label)
        for (start, end), label in zip(solution.steps, solution.labels, strict=True)
    ]


def record(number: int, solution: Any) -> TrainExample:
    partner = solution.partner
    return TrainExample(
        example_id=f"e{number}", problem_id=f"p{number}", prompt_token_ids=solution.prompt,
        token_ids=solution.response, steps=steps_of(solution), outcome=solution.outcome,
        kl_partner=KLPartner(example_id=f"y{number}", token_ids=partner.response, steps=steps_of(partner)),
    )  # fmt: skip


def test_its_updates_are_ours(example: Any, tmp_path: Path) -> None:
    """Loss, both reference points and gradient norm of three updates on sampled solutions, on two ranks."""
    torch.manual_seed(0)
    tokenizer, policy = AutoTokenizer.from_pretrained(example.M0), AutoModelForCausalLM.from_pretrained(example.M0)
    groups = example.sample(policy.eval(), tokenizer, generate("train", UPDATES * BATCH // 4, seed=7), 4)
    solutions = list(chain(*groups))
    outcomes, labels = [s.outcome for s in solutions], [label for s in solutions for label in s.labels]
    assert {0, 1} <= set(outcomes) and {0, 1, None} <= set(labels)  # M0 is wrong often enough for both levels

    training = recipe.Training.model_validate({
        "parallel": {"ranks": 2, "tensor": 2}, "global_batch_size": BATCH, "micro_batch_tokens": 1024, "device": "cpu",
        "optimizer": {"lr": example.LR, "beta2": 0.98, "clip_grad": example.CLIP}, "log": {"tensorboard": False},
        "loss": {"beta_outcome": example.BETA["outcome"], "beta_step": example.BETA["step"],
                 "undesirable_weight_outcome": example.LAMBDA[0], "undesirable_weight_step": example.LAMBDA[0]},
    })  # fmt: skip
    data = write_examples(tmp_path / "train", [record(n, s) for n, s in enumerate(solutions)])
    rows = run_train(tmp_path / "run", example.M0, data, training)

    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=example.LR, betas=(0.9, 0.98), weight_decay=0.0)
    assert len(rows) == UPDATES
    for row, members in zip(rows, plan_updates(len(solutions), BATCH, 1, SEED), strict=True):
        loss, z_outcome, z_step, norm = example.update(policy, reference, optimizer, [solutions[i] for i in members])
        expected = {"loss": loss, "z_outcome": z_outcome, "z_step": z_step, "grad_norm": norm}
        # float32 log-probs of some sixty tokens, and Adam, which divides by small moments at first, amplify rounding
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4), row["update"]
    assert z_outcome > 1e-3 or rows[-1]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-2)  # the updates did something
