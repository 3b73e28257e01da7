"""The trainer against an independent two-model implementation in plain transformers and autograd."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.records import TrainExample, TrainStep
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.checkpoints.convert import megatron_to_hf
from megatron_stepkto.megatron import onednn
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.launch import train
from tests.builders import random_examples, write_examples, write_llama

pytestmark = pytest.mark.distributed

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tied, as many key-value heads as heads": {"num_key_value_heads": 4},
    "untied, grouped-query": {"tie_word_embeddings": False},
    "llama3 RoPE scaling": {"rope_parameters": LLAMA3_ROPE},
}
BETA_OUTCOME, BETA_STEP, LAMBDA_UNDESIRABLE_STEP, LR, CLIP = 0.5, 2.0, 0.7, 1e-3, 0.5
DECAY = 5.0  # large: 0.5% of a weight per update


def load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def token_log_probs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *response]])
    scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, len(prompt) :, None])[:, 0]


def token_entropies(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    scores = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return torch.distributions.Categorical(logits=scores).entropy()


def step_log_probs(model: Any, prompt: list[int], response: list[int], steps: list[TrainStep]) -> torch.Tensor:
    tokens = token_log_probs(model, prompt, response)
    return torch.stack([tokens[step.token_start : step.token_end].sum() for step in steps])


def settings(**changes: Any) -> recipe.Training:
    return recipe.Training.model_validate({
        "optimizer": {"lr": LR, "clip_grad": CLIP, "beta2": 0.98, "weight_decay": DECAY},
        "loss": {"beta_outcome": BETA_OUTCOME, "beta_step": BETA_STEP,
                 "undesirable_weight_step": LAMBDA_UNDESIRABLE_STEP},
        "global_batch_size": 8, "micro_batch_tokens": 300, "max_updates": 3, "device": "cpu", "timeout_s": 300,
        "log": {"tensorboard": False, "entropy": True}, **changes,
    })  # fmt: skip


def run_train(folder: Path, model: Path, data: Path, training: recipe.Training, **inputs: Path) -> list[dict[str, Any]]:
    train(Stage("train", folder, {}, {"model": model, "train": data, **inputs}), training, seed=3)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ONE, TP2, PP2 = {"ranks": 1}, {"ranks": 2, "tensor": 2}, {"ranks": 2, "pipeline": 2}
TIED, UNTIED, LLAMA3 = MODELS


@pytest.mark.parametrize(
    ("name", "parallel"),
    [(TIED, ONE), (TIED, TP2), (TIED, PP2), (UNTIED, TP2), (UNTIED, PP2), (LLAMA3, TP2)],
    ids=str,
)
def test_log_probs_equal_transformers(name: str, parallel: dict[str, int], tmp_path: Path) -> None:
    """Through the run's own comparison of sampler and trainer, with transformers as the sampler."""
    folder = write_llama(tmp_path / "model", **MODELS[name])
    model = load(folder)
    long = TrainExample(example_id="long", problem_id="long", prompt_token_ids=list(range(3, 43)), outcome=1,
                        token_ids=[5 + i * 7 % 90 for i in range(150)],
                        steps=[TrainStep(token_start=0, token_end=150, label=1)])  # fmt: skip
    examples = []
    with torch.no_grad():
        for example in [*random_examples(8), long]:
            ours = token_log_probs(model, example.prompt_token_ids, example.token_ids)
            examples.append(example.model_copy(update={"token_log_probs": ours.tolist()}))
    data = write_examples(tmp_path / "train", examples)
    run_train(tmp_path / "run", folder, data, settings(parallel=parallel, max_updates=1))
    notes = json.loads((tmp_path / "run" / "notes.json").read_text())
    assert notes["acceleration"].endswith("by oneDNN" if onednn.is_faster() else "by torch's BLAS")
    gap = notes["gap"]
    assert gap["tokens"] == sum(len(e.token_ids) for e in examples)
    assert 0 < gap["max"] < 1e-4


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def independent_update(policy: Any, reference: Any, optimizer: Any, batch: list[TrainExample]) -> dict[str, float]:
    """One Step-KTO update written straight from the formula, with two resident models and no packing."""
    z: dict[str, list[float]] = {"outcome": [], "step": []}
    with torch.no_grad():
        for example in batch:
            if example.kl_partner:
                other = example.kl_partner
                ratio = step_log_probs(policy, example.prompt_token_ids, other.token_ids, other.steps) - step_log_probs(
                    reference, example.prompt_token_ids, other.token_ids, other.steps
                )
                z["outcome"].append(ratio.sum().item())
                z["step"] += [r.item() for r, s in zip(ratio, other.steps, strict=True) if s.label is not None]
    z_outcome = max(0.0, sum(z["outcome"]) / len(z["outcome"]))
    z_step = max(0.0, sum(z["step"]) / len(z["step"]))
    loss = torch.zeros(())
    with torch.no_grad():
        entropies = torch.cat([token_entropies(policy, e.prompt_token_ids, e.token_ids) for e in batch])
    for example in batch:
        with torch.no_grad():
            base = step_log_probs(reference, example.prompt_token_ids, example.token_ids, example.steps)
        ratio = step_log_probs(policy, example.prompt_token_ids, example.token_ids, example.steps) - base
        if example.outcome is not None:
            sign = 1 if example.outcome else -1
            loss = loss + 1 - sigmoid(BETA_OUTCOME * sign * (ratio.sum() - z_outcome))
        judged = []
        for r, step in zip(ratio, example.steps, strict=True):
            if step.label == 1:
                judged.append(1 - sigmoid(BETA_STEP * (r - z_step)))
            elif step.label == 0:
                judged.append(LAMBDA_UNDESIRABLE_STEP * (1 - sigmoid(BETA_STEP * (z_step - r))))
        if judged:
            loss = loss + sum(judged) / len(judged)
    loss = loss / len(batch)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
    optimizer.step()
    return {"loss": loss.item(), "z_outcome": z_outcome, "z_step": z_step, "grad_norm": norm.item(),
            "entropy": entropies.mean().item()}  # fmt: skip


def test_three_updates_equal_the_formula_with_two_models(tmp_path: Path) -> None:
    """Loss, reference points and gradient norm of each update, and the exported model's held-out log-ratios."""
    folder = write_llama(tmp_path / "model", tie_word_embeddings=False)
    examples, held_out = random_examples(24), random_examples(10, seed=9)
    held_out = [e.model_copy(update={"example_id": f"h{i}", "kl_partner": None}) for i, e in enumerate(held_out)]
    data = write_examples(tmp_path / "train", examples)
    rows = run_train(
        tmp_path / "run", folder, data, settings(parallel={"ranks": 2, "tensor": 2}),
        held_out=write_examples(tmp_path / "held_out", held_out),
    )  # fmt: skip
    updates = [row for row in rows if "held_out" not in row]

    policy = load(folder)
    reference = copy.deepcopy(policy).requires_grad_(False)
    groups = [
        {"params": [w for w in policy.parameters() if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in policy.parameters() if w.dim() == 1], "weight_decay": 0.0},  # norms
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-8)
    for row, members in zip(updates, plan_updates(24, 8, 1, 3, 3), strict=True):
        expected = independent_update(policy, reference, optimizer, [examples[i] for i in members])
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=2e-5, abs=3e-5), (row["update"], key)

    megatron_to_hf(tmp_path / "run" / "final", tmp_path / "exported")
    exported = load(tmp_path / "exported")
    ratios: dict[str, list[float]] = {"log_ratio_right": [], "log_ratio_wrong": [], "log_ratio_right_steps": [],
                                      "log_ratio_wrong_steps": []}  # fmt: skip
    with torch.no_grad():
        for e in held_out:
            ratio = step_log_probs(exported, e.prompt_token_ids, e.token_ids, e.steps) - step_log_probs(
                reference, e.prompt_token_ids, e.token_ids, e.steps
            )
            if e.outcome is not None:
                ratios["log_ratio_right" if e.outcome else "log_ratio_wrong"].append(ratio.sum().item())
            for r, s in zip(ratio.tolist(), e.steps, strict=True):
                if s.label is not None:
                    ratios["log_ratio_right_steps" if s.label else "log_ratio_wrong_steps"].append(r)
    first, last = (row["held_out"] for row in rows if "held_out" in row)
    for key, values in ratios.items():
        assert first[key] == pytest.approx(0.0, abs=1e-4)
        assert last[key] == pytest.approx(math.fsum(values) / len(values), abs=1e-4), key
        assert abs(last[key]) > 1e-3
    assert last["step_margin"] == pytest.approx(last["log_ratio_right_steps"] - last["log_ratio_wrong_steps"])


def pairs(examples: list[TrainExample]) -> list[TrainExample]:
    return [
        example.model_copy(update={"pair_id": f"pair{number // 2}", "side": ("chosen", "rejected")[number % 2]})
        for number, example in enumerate(examples)
    ]


def independent_loss(method: str, policy: Any, reference: Any, examples: list[TrainExample]) -> torch.Tensor:
    """The other methods from their papers' formulas, over all examples as one batch."""
    log_probs, ratios = [], []
    for e in examples:
        own = token_log_probs(policy, e.prompt_token_ids, e.token_ids)
        with torch.no_grad():
            base = token_log_probs(reference, e.prompt_token_ids, e.token_ids)
        log_probs.append(own)
        ratios.append((own - base).sum())
    if method == "rft":
        return -torch.cat(log_probs).mean()
    total = torch.zeros(())
    for chosen in range(0, len(examples), 2):
        total = total - torch.log(sigmoid(0.1 * (ratios[chosen] - ratios[chosen + 1])))
        if method == "irpo":
            total = total - 0.5 * log_probs[chosen].mean()
    return total / (len(examples) // 2)


@pytest.mark.parametrize(("method", "parallel"), [("dpo", TP2), ("irpo", ONE), ("rft", TP2)], ids=str)
def test_other_methods_against_their_formulas(method: str, parallel: dict[str, int], tmp_path: Path) -> None:
    """One update with a reference that is not the trained model, so that no log-ratio is zero."""
    folder, reference = write_llama(tmp_path / "model"), write_llama(tmp_path / "reference", seed=1)
    examples = random_examples(8)
    right = [e.model_copy(update={"outcome": 1}) for e in examples]  # rft trains on nothing else
    data = write_examples(tmp_path / "train", right if method == "rft" else pairs(examples))
    training = settings(
        method=method, parallel=parallel, loss={"dpo_beta": 0.1, "nll_weight": 0.5}, max_updates=1,
        global_batch_size=4 if method != "rft" else 8,
    )  # fmt: skip
    [row] = run_train(tmp_path / "run", folder, data, training, reference=reference)
    policy = load(folder)
    loss = independent_loss(method, policy, load(reference), examples)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
    assert row["loss"] == pytest.approx(loss.item(), rel=2e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=2e-5)


def test_reference_that_is_not_the_trained_model(tmp_path: Path) -> None:
    """reference: initial. The log-ratios before the first update are those to that model."""
    folder, reference = write_llama(tmp_path / "model"), write_llama(tmp_path / "reference", seed=1)
    examples = random_examples(8)
    data = write_examples(tmp_path / "train", examples)
    [row] = run_train(tmp_path / "run", folder, data, settings(parallel=TP2, max_updates=1), reference=reference)
    policy, base = load(folder), load(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR)
    for key, value in independent_update(policy, base, optimizer, examples).items():
        assert row[key] == pytest.approx(value, rel=2e-5, abs=3e-5), key
    assert abs(row["log_ratio_right"]) > 0.1
