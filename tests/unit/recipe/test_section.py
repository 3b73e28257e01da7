"""Which keys are part of a stage's key. The values are those of version 7e1a2bc: a finished run must stay finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.command_keys import is_read
from megatron_stepkto.recipe.file import model_evaluation
from megatron_stepkto.recipe.section import training_only
from megatron_stepkto.run.stage_keys import dataset_key, training_key

SERVER = {"base_url", "api_key_env", "concurrency", "timeout_s", "max_outage_s", "retries"}
UNKEYED: dict[type[recipe.Section], set[str]] = {
    recipe.Sampling: {"workers", "stall_timeout_s", "gpu_memory_utilization"},
    recipe.LLMJudge: SERVER,
    recipe.PRMJudge: {*SERVER, "served_name", "workers", "batch_tokens"},
    recipe.RewardModel: {"workers", "batch_tokens"},
    recipe.Judging: {"workers"},
    recipe.Evaluation: {"models"},
    recipe.Training: {
        "parallel", "device", "micro_batch_tokens", "pad_documents_to", "recompute", "timeout_s", "max_gap",
        "checkpoint_every", "keep_checkpoints", "async_checkpoints", "log", "offload_layers",
    },
}  # fmt: skip


def test_marked_keys() -> None:
    classes = {value for value in vars(recipe).values() if isinstance(value, type) and issubclass(value, BaseModel)}
    assert {each: set(recipe.unkeyed(each)) for each in classes if recipe.unkeyed(each)} == UNKEYED
    assert training_only(recipe.Sampling) == {"num_samples", "temperature", "top_p", "gap_problems"}


def test_an_evaluation_reads_what_is_not_for_training() -> None:
    assert is_read("evaluate", "sample.max_tokens") and is_read("measure", "sample.stall_timeout_s")
    assert not is_read("evaluate", "sample.num_samples") and not is_read("measure", "sample.gap_problems")


def test_training_key() -> None:
    settings = recipe.Training(
        optimizer=recipe.Optimizer(lr=1e-4, warmup_updates=10), loss=recipe.Loss(undesirable_weight_step=0.5),
        global_batch_size=64, micro_batch_tokens=512, parallel=recipe.Parallel(ranks=2, tensor=2),
        log=recipe.Log(entropy=True), recompute=True, device="cpu", keep_checkpoints=7,
    )  # fmt: skip
    expected = {
        "method": "step_kto", "epochs": 1, "max_updates": None, "global_batch_size": 64, "dtype": "float32",
        "reference": "previous", "transformer_engine": "auto", "apex": "auto", "fp8": None,
        "distributed_optimizer": False,
        "optimizer": {
            "lr": 0.0001, "schedule": "constant", "warmup_updates": 10, "min_lr_ratio": 0.0, "weight_decay": 0.0,
            "beta1": 0.9, "beta2": 0.98, "eps": 1e-08, "clip_grad": 1.0,
        },
        "loss": {
            "beta_outcome": 0.1, "beta_step": 0.1, "desirable_weight_outcome": 1.0, "undesirable_weight_outcome": 1.0,
            "desirable_weight_step": 1.0, "undesirable_weight_step": 0.5, "balance": "fixed", "outcome_weight": 1.0,
            "step_weight": 1.0, "step_reduction": "mean", "reference_point": "mismatched",
        },
    }  # fmt: skip
    assert training_key(settings) == expected
    assert training_key(settings.model_copy(update={"method": "irpo"})) == {
        **expected, "method": "irpo", "loss": {"dpo_beta": 0.1, "nll_weight": 1.0},
    }  # fmt: skip
    assert training_key(settings.model_copy(update={"method": "rft"})) == {**expected, "method": "rft", "loss": {}}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("step_kto", {"max_examples_per_problem": None, "max_tokens": 9, "kl_pair_share": 1.0}),
        ("dpo", {"max_tokens": 9, "right_solutions": "any", "pairs_per_problem": 4}),
        ("rft", {"max_examples_per_problem": None, "max_tokens": 9, "right_solutions": "any"}),
    ],
)
def test_dataset_key(method: recipe.Method, expected: dict[str, Any]) -> None:
    assert dataset_key(recipe.Dataset(max_tokens=9), method) == expected


SAMPLE = {"backend": "vllm", "max_tokens": 9, "chunk_problems": 32, "dtype": "auto", "tensor_parallel": 1}
TRAINING_SAMPLE = {**SAMPLE, "num_samples": 8, "temperature": 1.0, "top_p": 1.0, "gap_problems": 8}


def test_sampling_keys() -> None:
    sample = recipe.Sampling(max_tokens=9, workers=4, stall_timeout_s=5.0)
    assert recipe.deciding(sample) == TRAINING_SAMPLE
    assert recipe.deciding(sample, evaluation=True) == SAMPLE
    later = {"reproducible": False, "quantization": "fp8", "speculative": {"method": "ngram", "num_tokens": 2}}
    changed = recipe.deciding(recipe.Sampling.model_validate({"max_tokens": 9, **later}))
    assert changed == {**TRAINING_SAMPLE, **later, "speculative": {**later["speculative"], "model": None}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ("equations", {"kind": "equations"}),
        (
            {"kind": "monte_carlo", "sample": {"max_tokens": 9, "workers": 4}},
            {"kind": "monte_carlo", "model": None, "threshold": 0.0, "sample": TRAINING_SAMPLE},
        ),
        (
            {"kind": "llm", "base_url": "http://a/v1", "model": "m", "retries": 2},
            {
                "kind": "llm", "model": "m", "prompt": None, "votes": 1, "threshold": 0.5, "temperature": 0.6,
                "max_tokens": 4096, "comment_chars": 200, "schema_key": "response_format", "request": {},
                "reported_model": None,
            },
        ),
        (
            {"kind": "prm", "model": "/m", "convention": "qwen_math_prm", "batch_tokens": 7},
            {
                "kind": "prm", "model": "/m", "convention": "qwen_math_prm", "threshold": 0.5, "wrong_below": None,
                "reported_model": None, "dtype": "auto",
            },
        ),
    ],
    ids=["rule", "monte_carlo", "llm", "prm"],
)  # fmt: skip
def test_judge_keys(process: Any, expected: dict[str, Any]) -> None:
    outcome = {"reward_model": "/r", "threshold": 0.0, "workers": 2}
    judge = recipe.Judging.model_validate({"split": "line", "process": process, "workers": 3, "outcome": outcome})
    assert recipe.deciding(judge) == {
        "split": "line", "step_tag": None, "after_first_error": "keep", "timeout_s": 3.0, "process": expected,
        "outcome": {"reward_model": "/r", "threshold": 0.0, "dtype": "auto"},
    }  # fmt: skip


def test_an_evaluation_without_a_recipe() -> None:
    plain = recipe.deciding(model_evaluation("m", False, []))
    assert plain["sample"] == {**TRAINING_SAMPLE, "max_tokens": 2048, "gap_problems": 0}
    assert plain["evaluate"] == {"split": "test", "k": 8, "temperature": 0.7, "top_p": 1.0, "num_problems": None}
    settings = model_evaluation("m", False, ["sample.workers=3", "sample.stall_timeout_s=5", "judge.workers=4"])
    assert recipe.deciding(settings) == recipe.deciding(model_evaluation("m", False, []))


def test_an_evaluation_with_a_recipes_settings(tmp_path: Path) -> None:
    """Its prompt, sampler, judge and k; neither its own problems nor what only training samples have."""
    path = tmp_path / "r.yaml"
    path.write_text(
        'prompt: {template: "{problem}\\n"}\n'
        "sample: {max_tokens: 96, num_samples: 4, temperature: 0.5, gap_problems: 3, dtype: float32}\n"
        "judge: {split: line, process: {kind: llm, base_url: http://a/v1, model: m, prompt: mine.txt}}\n"
        "evaluate: {split: dev, num_problems: 30, k: 4}\n"
    )
    found = model_evaluation("m", True, ["evaluate.temperature=0.5"], path)
    assert found.prompt == recipe.Prompt(template="{problem}\n", chat=False)
    assert found.sample == recipe.Sampling(max_tokens=96, dtype="float32")
    assert found.judge.process.prompt == tmp_path / "mine.txt"  # type: ignore[union-attr]
    assert (found.evaluate.k, found.evaluate.temperature) == (4, 0.5)
    assert (found.evaluate.split, found.evaluate.num_problems) == ("test", None)
    path.write_text("problems: {source: imports}\n")  # an imported run has neither sample nor judge
    default = model_evaluation("m", False, [])
    found = model_evaluation("m", True, [], path)
    assert (found.sample.max_tokens, found.judge) == (default.sample.max_tokens, default.judge)
    assert found.prompt == recipe.Prompt()
    path.write_text("name: x\nevaluate:\n  kk: 4\n")
    with pytest.raises(UserError, match=r"r\.yaml:3: unknown key evaluate\.kk; did you mean k"):
        model_evaluation("m", True, [], path)
