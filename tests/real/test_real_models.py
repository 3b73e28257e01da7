"""Pretrained models through every stage that can damage them: their numbers against transformers' and vLLM's.

``make test`` runs SmolLM2-135M (a Llama with nine heads in three groups and a tied head), ``make real`` also
Qwen2.5-Coder-0.5B (QKV bias, an untied head, 151,936 words). The random models of the other tests have neither outliers
in their activations nor text that they can continue.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.records import Problem, TrainExample, TrainStep, read_records
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.checkpoints.convert import megatron_to_hf
from megatron_stepkto.evaluation.logprobs import LIMITS, compare_scores
from megatron_stepkto.evaluation.scorers import Scores, open_scorer
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts, load_tokenizer
from megatron_stepkto.training.launch import train
from tests.builders import write_examples
from tests.real.conftest import MATHEMATICS, PROMPT, RealModel, Sampled
from tests.unit.checkpoint_folders import assert_same_bits

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
NEAR_TIE = 1e-3  # logits; another order of summation may choose the other word
SEED, BATCH = 3, 2
BETA_OUTCOME, BETA_STEP, LR, EPS = 0.5, 1.0, 0.5, 0.1


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def token_log_probs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """[tokens of the response], nats."""
    ids = torch.tensor([[*prompt, *response]])
    scores = model(ids, logits_to_keep=len(response) + 1).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(1, torch.tensor(response)[:, None])[:, 0]


@dataclass(frozen=True)
class Mathematics:
    """2,000 tokens of solutions, with transformers' log-probs."""

    examples: list[TrainExample]
    scores: list[Scores]

    @property
    def texts(self) -> list[list[int]]:
        return [[*example.prompt_token_ids, *example.token_ids] for example in self.examples]


@pytest.fixture(scope="session")
def mathematics(real: RealModel) -> Mathematics:
    tokenizer, made = load_tokenizer(real.folder), []
    for row in read_records(MATHEMATICS, Problem):
        prompt, tokens = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.problem, row.solution)
        )
        step = TrainStep(token_start=0, token_end=len(tokens), label=1)
        made.append(TrainExample(example_id=row.problem_id, problem_id=row.problem_id, prompt_token_ids=prompt,
                                 token_ids=tokens, steps=[step], outcome=1))  # fmt: skip
    assert sum(len(example.token_ids) for example in made) > 2000
    scores = open_scorer(str(real.folder), torch.float32).score(Mathematics(made, []).texts)
    examples = [
        example.model_copy(update={"token_log_probs": score.log_probs[-len(example.token_ids) :].tolist()})
        for example, score in zip(made, scores, strict=True)
    ]
    return Mathematics(examples, scores)


def test_there_and_back_is_bit_for_bit(real: RealModel) -> None:
    assert_same_bits(load_file(real.back / "model.safetensors"), load_file(real.folder / "model.safetensors"))
    assert load_tokenizer(real.back).chat_template == load_tokenizer(real.folder).chat_template


def test_prompts_are_those_of_the_chat_template(real: RealModel) -> None:
    tokenizer = load_tokenizer(real.folder)
    for system in (None, "You are careful."):
        prompts = Prompts.of(PROMPT.model_copy(update={"system": system}), real.folder)
        for row in read_records(MATHEMATICS, Problem):
            turns = [{"role": "user", "content": PROMPT.template.replace("{problem}", row.problem)}]
            if system is not None:
                turns.insert(0, {"role": "system", "content": system})
            expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert prompts.token_ids(row.problem) == expected
            assert len(expected) > 20


def test_log_probs_equal_those_of_transformers(real: RealModel, mathematics: Mathematics) -> None:
    """On one rank; the likeliest token before each, too."""
    ours = open_scorer(str(real.megatron), torch.float32).score(mathematics.texts)
    found = compare_scores(("Megatron", "transformers"), ours, mathematics.scores, "float32").total
    assert found.tokens > 2000
    assert found.mean < 1e-5
    assert 0 < found.max < 1e-4
    assert found.agree > 0.999


@pytest.mark.distributed
@pytest.mark.parametrize("number", [0, 1], ids=["tensor", "pipeline"])
def test_log_probs_over_ranks(number: int, real: RealModel, mathematics: Mathematics, tmp_path: Path) -> None:
    """TP 3 (2 for Qwen's two key-value heads) and PP 2, through the run's comparison with the sampler."""
    name, parallel = list(real.layouts.items())[number]
    done = run_train(tmp_path, real, mathematics.examples, parallel=parallel, method="rft", global_batch_size=1)
    assert done.gap["tokens"] == sum(len(example.token_ids) for example in mathematics.examples), name
    assert done.gap["mean"] < 1e-5, name
    assert 0 < done.gap["max"] < 1e-4, name


@dataclass(frozen=True)
class Trained:
    row: dict[str, Any]
    gap: dict[str, Any]
    final: Path


def run_train(folder: Path, real: RealModel, examples: list[TrainExample], **changes: Any) -> Trained:
    """One update. A large epsilon makes it linear in the gradient, so that it hides no part of it."""
    settings = recipe.Training.model_validate({
        "optimizer": {"lr": LR, "eps": EPS, "clip_grad": 0}, "global_batch_size": BATCH, "micro_batch_tokens": 512,
        "max_updates": 1, "device": "cpu", "log": {"tensorboard": False}, "timeout_s": 300,
        "loss": {"beta_outcome": BETA_OUTCOME, "beta_step": BETA_STEP}, **changes,
    })  # fmt: skip
    data = write_examples(folder / "train.jsonl", examples)
    train(Stage("train", folder / "train", {}, {"model": real.folder, "train": data}), settings, SEED)
    [row] = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    notes = json.loads((folder / "train" / "notes.json").read_text())
    return Trained(row, notes["gap"], folder / "train" / "final")


# --- samples ---------------------------------------------------------------------------------------------------


class TestSamples:
    pytestmark = needs_vllm

    def test_greedy_tokens_of_the_exported_model(self, real: RealModel, sampled: Sampled) -> None:
        """Given the same tokens before, vLLM's greedy choice is transformers' likeliest token."""
        model, compared = load(real.folder), 0
        for sample in sampled.greedy:
            ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])
            with torch.no_grad():
                logits = model(ids, logits_to_keep=len(sample.token_ids) + 1).logits[0, :-1]
            top = logits.topk(2)
            margins = top.values[:, 0] - top.values[:, 1]
            for token, choice, margin in zip(
                sample.token_ids, top.indices[:, 0].tolist(), margins.tolist(), strict=True
            ):
                if margin < NEAR_TIE:
                    break  # from here on both texts may differ
                assert token == choice, (sample.problem_id, margin)
                compared += 1
        assert compared > 0.8 * sum(len(sample.token_ids) for sample in sampled.greedy)
        assert compared > 100

    def test_steps_cover_text_and_tokens(self, real: RealModel, sampled: Sampled) -> None:
        """A step starts at the first token whose first character is in it, by decoding every prefix."""
        tokenizer = load_tokenizer(real.folder)
        count = 0
        for sample in sampled.judged:
            ids = [token for token in sample.token_ids if token not in tokenizer.all_special_ids]
            assert tokenizer.decode(ids) == sample.text
            starts = [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]  # no character is cut: ASCII
            assert "".join(sample.text[step.start : step.end] for step in sample.steps) == sample.text
            assert sample.steps[0].token_start == 0
            assert sample.steps[-1].token_end == len(sample.token_ids)
            for step, following in zip(sample.steps, sample.steps[1:], strict=False):
                assert step.token_end == following.token_start
                assert starts[following.token_start] >= following.start > starts[following.token_start - 1]
            count += len(sample.steps)
            # the rule ``line``: every line with text on it is a step of its own
            lines = [line for line in sample.text.split("\n") if line.strip()]
            assert [sample.text[s.start : s.end].strip() for s in sample.steps if s.token_end > s.token_start] == [
                line.strip() for line in lines
            ]
        assert count > 2 * len(sampled.judged)

    @pytest.mark.distributed
    def test_one_update_in_float32_and_the_gap_to_the_sampler(
        self, real: RealModel, sampled: Sampled, formula: Formula, tmp_path: Path
    ) -> None:
        """Loss, gradient norm and the change of every weight are those of the formula in transformers."""
        done = run_train(tmp_path, real, sampled.examples)
        assert done.gap["tokens"] == sum(len(example.token_ids) for example in sampled.examples)
        assert done.gap["mean"] < LIMITS["float32"].mean
        assert 0 < done.gap["max"] < LIMITS["float32"].p99
        assert done.row["loss"] == pytest.approx(formula.loss, rel=1e-5)
        assert done.row["grad_norm"] == pytest.approx(formula.grad_norm, rel=1e-4)

        megatron_to_hf(done.final, tmp_path / "exported")
        after = load_file(tmp_path / "exported" / "model.safetensors")
        compared = 0
        for name, weight in formula.model.named_parameters():
            if name not in after:  # a head that is tied
                continue
            expected = -LR * weight.grad / (weight.grad.abs() + EPS)
            change = after[name] - weight.detach()
            rounding = float(weight.detach().abs().max()) * 2**-24 * math.sqrt(weight.numel())
            assert float((change - expected).norm()) < 1e-3 * float(expected.norm()) + rounding, name
            compared += 1
        assert compared == len(after)

    @pytest.mark.long
    @pytest.mark.distributed
    def test_one_update_in_bfloat16(self, real: RealModel, sampled: Sampled, formula: Formula, tmp_path: Path) -> None:
        """Loss and gradient norm to rounding, and a gap to vLLM's float32 that is that of rounding."""
        done = run_train(tmp_path, real, sampled.examples, dtype="bfloat16")
        assert done.row["loss"] == pytest.approx(formula.loss, rel=1e-2)
        assert done.row["grad_norm"] == pytest.approx(formula.grad_norm, rel=0.05)
        assert 1e-3 < done.gap["mean"] < LIMITS["bfloat16"].mean


@dataclass(frozen=True)
class Formula:
    """The first update from the loss's formula: the gradients are in the model."""

    model: Any
    loss: float
    grad_norm: float


@pytest.fixture(scope="session")
def formula(real: RealModel, sampled: Sampled) -> Formula:
    [members] = plan_updates(len(sampled.examples), BATCH, 1, SEED, 1)
    model = load(real.folder)
    # transformers gives the padding token's input embedding no gradient, and here that token also ends every turn
    model.get_input_embeddings().padding_idx = None
    loss = first_update(model, [sampled.examples[i] for i in members])
    squares = [float(weight.grad.double().square().sum()) for weight in model.parameters()]
    return Formula(model, loss, math.sqrt(sum(squares)))


def first_update(model: Any, batch: list[TrainExample]) -> float:
    """The loss of the first update, with its gradients in ``model``: policy and reference are equal, so z is 0."""
    total = 0.0
    for example in batch:
        own = token_log_probs(model, example.prompt_token_ids, example.token_ids)
        ratios = own - own.detach()
        loss = torch.zeros(())
        if example.outcome is not None:
            sign = 1 if example.outcome else -1
            loss = loss + 1 - torch.sigmoid(BETA_OUTCOME * sign * ratios.sum())
        steps = [
            1 - torch.sigmoid(BETA_STEP * (1 if step.label else -1) * ratios[step.token_start : step.token_end].sum())
            for step in example.steps if step.label is not None
        ]  # fmt: skip
        if steps:
            loss = loss + torch.stack(steps).mean()
        (loss / len(batch)).backward()
        total += float(loss.detach()) / len(batch)
    return total
