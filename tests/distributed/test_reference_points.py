"""z_o and z_s over ranks and micro-batches against numbers made by hand.

The reference's log-probs are written so that each step's log-ratio is a number chosen here. Three KL pairs on two
data-parallel ranks, one pair to a micro-batch:

    pair    steps' log-ratios (judged unless in brackets)    whole
    e0      -4  1                                             -3
    e1      6  (2)                                             8
    e2      (0.5)  0.5                                         1
    e3      no pair

z_o = (-3 + 8 + 1) / 3 = 2.    z_s = (-4 + 1 + 6 + 0.5) / 4 = 0.875.    Clamped per rank and then averaged, z_o would be
(0 + 4.5) / 2, (4.5 + 0) / 2 or (8 + 0) / 2, as the pairs fall: never 2.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.megatron.batch import Documents, Part, with_partner
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.launch import train
from megatron_stepkto.training.references import open_references
from tests.builders import write_examples, write_llama

pytestmark = pytest.mark.distributed

RATIOS = {"e0": [-4.0, 1.0], "e1": [6.0, 2.0], "e2": [0.5, 0.5]}
LABELS: dict[str, list[int | None]] = {"e0": [0, 1], "e1": [1, None], "e2": [None, 1]}


def steps(labels: list[int | None], length: int) -> list[TrainStep]:
    """Two of equal length."""
    bounds = ((0, length // 2), (length // 2, length))
    return [TrainStep(token_start=a, token_end=b, label=c) for (a, b), c in zip(bounds, labels, strict=True)]


def examples() -> list[TrainExample]:
    made = []
    for number in range(4):
        name, length = f"e{number}", 10 + 2 * number
        response = [3 + (7 * number + 5 * i) % 90 for i in range(length)]
        partner = None
        if name in RATIOS:
            other = [4 + (3 * number + 11 * i) % 90 for i in range(12 + 2 * number)]
            partner = KLPartner(example_id=f"x{number}", token_ids=other, steps=steps(LABELS[name], len(other)))
        made.append(TrainExample(example_id=name, problem_id=name, prompt_token_ids=[5 + number, 9, 12],
                                 token_ids=response, steps=steps([1, 0], length), outcome=number % 2,
                                 kl_partner=partner))  # fmt: skip
    return made


def policy_log_probs(folder: Path, prompt: list[int], response: list[int], parts: list[TrainStep]) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    tokens = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return torch.stack([tokens[step.token_start : step.token_end].sum() for step in parts])


@pytest.mark.parametrize(
    ("estimator", "z_outcome", "z_step"), [("mismatched", 2.0, 0.875), ("none", 0.0, 0.0), ("batch", 0.0, 0.0)]
)
def test_pooled_over_ranks_and_clamped_after(estimator: str, z_outcome: float, z_step: float, tmp_path: Path) -> None:
    """batch: the first update has none before it to take a mean of; test_resume follows it from there."""
    model = write_llama(tmp_path / "model")
    rows = examples()
    stage = Stage("train", tmp_path / "run", {}, {"model": model, "train": write_examples(tmp_path / "t", rows)})
    mapped = Examples.of(rows)
    parts = [Part(mapped, np.arange(4))]
    references = [policy_log_probs(model, e.prompt_token_ids, e.token_ids, e.steps) for e in rows]
    if estimator == "mismatched":
        parts.append(Part(mapped, with_partner(mapped, np.arange(4)), kl=True))
        for e in rows:
            if e.kl_partner:
                ours = policy_log_probs(model, e.prompt_token_ids, e.kl_partner.token_ids, e.kl_partner.steps)
                references.append(ours - torch.tensor(RATIOS[e.example_id]))
    contents = sorted((name, entry["sha256"]) for name, entry in stage.key()["inputs"].items())
    stage.directory.mkdir()
    fingerprint, documents = f"{stable_hash(contents, 'float32'):016x}", Documents(parts)
    path = stage.directory / f"reference-{stable_hash(fingerprint, documents.digest()):016x}.npy"
    open_references(path, int(documents.num_steps.sum()))[:] = torch.cat(references).numpy()
    before = path.stat().st_mtime_ns
    settings = recipe.Training.model_validate({
        "parallel": {"ranks": 2}, "optimizer": {"lr": 1e-3}, "loss": {"reference_point": estimator},
        "global_batch_size": 4, "micro_batch_tokens": 24, "device": "cpu", "timeout_s": 300,
    })  # fmt: skip
    train(stage, settings, seed=3)
    assert path.stat().st_mtime_ns == before, "made by hand, not by a pass"
    [row] = [json.loads(line) for line in (stage.directory / "metrics.jsonl").read_text().splitlines()]
    assert row["z_outcome"] == pytest.approx(z_outcome, abs=1e-4)
    assert row["z_step"] == pytest.approx(z_step, abs=1e-4)
    assert row["num_kl_pairs"] == {"mismatched": 3, "none": 0, "batch": 4}[estimator]
    if estimator == "mismatched":
        assert row["kl_outcome"] == pytest.approx(2.0, abs=1e-4)


def test_an_update_without_a_pair_is_told(tmp_path: Path) -> None:
    """One example an update, of which e3 has no pair. Trackers tell trainings of other settings apart."""
    inputs = {"model": write_llama(tmp_path / "model"), "train": write_examples(tmp_path / "t", examples())}
    identities = set()
    for lr in (1e-3, 2e-3):
        stage = Stage("train", tmp_path / f"{lr}", {"lr": lr}, inputs)
        settings = recipe.Training.model_validate({
            "optimizer": {"lr": lr}, "global_batch_size": 1, "micro_batch_tokens": 24, "device": "cpu",
            "timeout_s": 300,
        })  # fmt: skip
        train(stage, settings, seed=3)
        [warning] = json.loads((stage.directory / "notes.json").read_text())["warnings"]
        assert warning.startswith(
            "1 of 4 updates have no KL pair: their reference point is 0, not a mean; raise dataset"
        )
        rows = [json.loads(line) for line in (stage.directory / "metrics.jsonl").read_text().splitlines()]
        assert sorted(row["num_kl_pairs"] for row in rows) == [0, 1, 1, 1]
        identities.add(json.loads((stage.directory / "job.json").read_text())["identity"])
    assert len(identities) == 2
