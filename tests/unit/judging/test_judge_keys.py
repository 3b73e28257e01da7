"""What a judge says of itself: the settings of a stage, and what Slurm gives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_stepkto.base.cache import content_key
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.judging.process import registry as judges
from megatron_stepkto.judging.process.interface import ProcessJudge, Resources, Solution, Verdicts
from megatron_stepkto.judging.section import judging_key, judging_resources
from megatron_stepkto.recipe import keys as recipe

URL = "http://a:1/v1"
MODEL = "ed55e9d4147630ddcb6c750981e075bac100775bbfde7d4184aa5579b454f3de"
SAMPLER = "00be6b4bab55c866aaae669519aa6187e7e7b60cde4b615e7a59ce6ff5b690ef"
PROMPT = "9ac16ec54faab365b72302ba3c4ff0a66a1ec326c07005ad9904b49a50ef863d"  # of the text, its line end as "\n"
LLM = {
    "kind": "llm", "model": "j", "votes": 1, "threshold": 0.5, "temperature": 0.6, "max_tokens": 4096,
    "comment_chars": 200, "schema_key": "response_format", "request": {}, "reported_model": None,
}  # fmt: skip
PRM = {
    "kind": "prm", "model": {"sha256": MODEL}, "convention": "qwen_math_prm", "threshold": 0.5, "wrong_below": None,
    "reported_model": None, "dtype": "auto",
}  # fmt: skip
SAMPLE = {
    "backend": "vllm", "num_samples": 8, "temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "chunk_problems": 32,
    "dtype": "auto", "tensor_parallel": 1, "gap_problems": 8,
}  # fmt: skip
ROLLOUTS: dict[str, Any] = {"kind": "monte_carlo", "sample": SAMPLE, "threshold": 0.0}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("model", "sampler"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("of the judge")
    (tmp_path / "sampler" / "model.safetensors").write_text("of the sampler")
    (tmp_path / "prompt.txt").write_bytes(b"{{ problem }}\r\n")
    return tmp_path


def section(process: Any, **keys: Any) -> recipe.Judging:
    return recipe.Judging.model_validate({"split": "line", "process": process, **keys})


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ("equations", {"kind": "equations"}),
        (
            {"kind": "llm", "base_url": URL, "model": "j", "prompt": "prompt.txt", "api_key_env": "K", "retries": 1},
            LLM | {"prompt": {"sha256": PROMPT}},
        ),
        ({"kind": "prm", "model": "model", "convention": "qwen_math_prm", "workers": 3, "batch_tokens": 9}, PRM),
        (
            {"kind": "prm", "model": "model", "convention": "qwen_math_prm", "base_url": URL, "served_name": "x"},
            PRM,
        ),
        (
            {"kind": "monte_carlo", "sample": {"max_tokens": 9, "workers": 2, "stall_timeout_s": 1.0}},
            ROLLOUTS | {"model": {"sha256": SAMPLER}},
        ),
        (
            {"kind": "monte_carlo", "model": "model", "sample": {"max_tokens": 9, "num_samples": 4}, "threshold": 0.25},
            {
                "kind": "monte_carlo", "model": {"sha256": MODEL}, "sample": SAMPLE | {"num_samples": 4},
                "threshold": 0.25,
            },
        ),
    ],
)  # fmt: skip
def test_the_settings_of_finished_stages(
    files: Path, monkeypatch: pytest.MonkeyPatch, process: Any, expected: dict[str, Any]
) -> None:
    """Each key is what earlier versions wrote, or their finished runs would be refused."""
    monkeypatch.chdir(files)
    assert judging_key(section(process, workers=7), files / "sampler") == {
        "split": "line", "step_tag": None, "process": expected, "outcome": None, "after_first_error": "keep",
        "timeout_s": 3.0,
    }  # fmt: skip


def test_the_settings_without_a_sampler_and_with_a_reward_model(files: Path) -> None:
    model = str(files / "model")
    outcome = {"reward_model": model, "threshold": 0.5, "workers": 2, "batch_tokens": 7}
    key = judging_key(section({"kind": "monte_carlo", "sample": {"max_tokens": 9}}, outcome=outcome))
    assert key["process"] == ROLLOUTS | {"model": None}
    assert key["outcome"] == {"threshold": 0.5, "dtype": "auto", "model": {"sha256": MODEL}}


def test_a_missing_prompt_is_named() -> None:
    process = {"kind": "llm", "base_url": URL, "model": "j", "prompt": "/absent.txt"}
    with pytest.raises(UserError, match=r"judge\.process\.prompt: /absent\.txt: expected a text file"):
        judging_key(section(process))


def test_the_settings_with_the_packages_own_prompt() -> None:
    key = judging_key(section({"kind": "llm", "base_url": URL, "model": "j", "votes": 3, "request": {"top_k": 20}}))
    assert content_key(key) == "3abd86039fa505dfff1947e81e97fa0bf0668efd89a0a756f0a040ee89bfc3d7"


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ("none", Resources()),
        (
            {"kind": "llm", "base_url": "http://a:1/v1/, http://b:1/v1,", "model": "j"},
            Resources(servers=(URL, "http://b:1/v1"), served="j"),
        ),
        (
            {"kind": "prm", "model": "absent", "convention": "qwen_math_prm", "workers": 3},
            Resources(3, ("judge.process.workers",), takes_fewer=True),
        ),
        (
            {"kind": "prm", "model": "absent", "convention": "qwen_math_prm", "workers": 3, "base_url": URL},
            Resources(servers=(URL,), served=str(Path("absent").resolve())),
        ),
        (
            {"kind": "monte_carlo", "sample": {"max_tokens": 9, "workers": 2, "tensor_parallel": 4}},
            Resources(8, ("judge.process.sample.workers", "judge.process.sample.tensor_parallel")),
        ),
    ],
)
def test_what_judges_need(process: Any, expected: Resources) -> None:
    """Asked without the judge's files: Slurm asks on a login node."""
    assert judging_resources(section(process)) == [expected]
    outcome = {"reward_model": "absent", "threshold": 0, "workers": 2}
    assert judging_resources(section(process, outcome=outcome)) == [
        expected,
        Resources(2, ("judge.outcome.workers",), takes_fewer=True),
    ]


def test_each_process_key_class_has_one_judge() -> None:
    union, _ = get_args(recipe.ProcessJudge)
    assert [judge.recipe_keys for judge in judges.JUDGES] == list(get_args(union))


class Oracle(ProcessJudge[recipe.RuleJudge]):
    """A judge of one's own."""

    recipe_keys = recipe.RuleJudge
    name = "oracle"

    def resources(self) -> Resources:
        return Resources(5, ("judge.process.workers",), servers=(URL,))

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        return [[] for _ in solutions]


def test_one_class_is_all_that_a_judge_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judges._BY_KEYS, recipe.RuleJudge, Oracle)
    assert judges.process_judge(recipe.RuleJudge(kind="none")).name == "oracle"
    assert judging_key(section("none"))["process"] == {"kind": "none"}
    assert judging_resources(section("none")) == [Resources(5, ("judge.process.workers",), servers=(URL,))]
