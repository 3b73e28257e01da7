"""The corpus of a warm-up from a pretrained model: what it holds, and what is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.recipe.prompts import Prompts
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.refusals import machine_refusals
from megatron_stepkto.run.warm_up import make_m0, write_solutions

TRAINING = "{method: rft, optimizer: {lr: 1.0e-3}, global_batch_size: 2, device: cpu}"
ROWS = [
    {
        "problem_id": "one",
        "problem": "Tom has 3 pens.",
        "answer": "3",
        "solution": "Tom has 3 pens.\nAnswer: \\boxed{3}",
    },
    {"question": "Ann has 5 pens.", "answer": "Ann has 5 pens.\n#### 5"},  # as GSM8K is published
]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(repository: Path) -> Path:
    return repository / "recipes" / "mini_cpu_m0"


def recipe(repository: Path, folder: Path, *more: str, solutions: Path | None = None) -> Recipe:
    file = solutions or write(folder / "solutions.jsonl", *ROWS)
    sets = [f"output={folder}", "evaluate=null", f"warm_up={{solutions: [{file}], training: {TRAINING}}}", *more]
    return load_recipe(repository / "recipes" / "mini_cpu.yaml", sets)


def test_a_solution_follows_the_prompt_that_sampling_uses(repository: Path, model: Path, tmp_path: Path) -> None:
    prompts = Prompts.of(recipe(repository, tmp_path).prompt, model)
    files = [write(tmp_path / "a.jsonl", ROWS[0]), write(tmp_path / "b.jsonl", ROWS[1])]
    counts = write_solutions(files, prompts, None, tmp_path / "train")
    one, two = Examples.open(tmp_path / "train")
    assert [one.example_id, two.example_id] == ["solutions-0/0", "solutions-1/0"]
    for example, row, text in (
        (one, ROWS[0]["problem"], ROWS[0]["solution"]),
        (two, ROWS[1]["question"], ROWS[1]["answer"]),
    ):
        assert example.prompt_token_ids == prompts.token_ids(row)
        assert example.token_ids[:-1] == prompts.tokenizer.encode(text, add_special_tokens=False)
        assert example.token_ids[-1] == prompts.tokenizer.eos_token_id
        assert example.outcome == 1
    lengths = [len(example.prompt_token_ids) + len(example.token_ids) for example in (one, two)]
    assert counts == {"examples": 2, "too_long": 0, "tokens": sum(lengths)}

    limit = min(lengths)
    assert write_solutions(files, prompts, limit, tmp_path / "short") == {
        "examples": 1, "too_long": 1, "tokens": limit,
    }  # fmt: skip
    with pytest.raises(UserError, match=rf"all 2 solutions are longer than dataset.max_tokens \({limit - 1}\)"):
        write_solutions(files, prompts, limit - 1, tmp_path / "none")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "Two.", "answer": "2"}, "expected a solution under the key solution"),
        ({"problem": "Two.", "answer": "2", "solution": " "}, "expected a solution under the key solution"),
        ({"problem": "Two.", "answer": "2", "solution": "2</s>"}, "the response holds the text of special tokens"),
        ({"problem": "Two.</s>", "answer": "2", "solution": "2"}, "the problem holds the text of special tokens"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_set_aside(
    repository: Path, model: Path, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    prompts = Prompts.of(recipe(repository, tmp_path).prompt, model)
    file = write(tmp_path / "a.jsonl", ROWS[0], row)
    with pytest.raises(UserError) as caught:
        write_solutions([file], prompts, None, tmp_path / "train")
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)
    assert not (tmp_path / "train").exists()
    counts = write_solutions([file], prompts, None, tmp_path / "train", tmp_path / "bad.jsonl")
    assert counts["examples"] == 1
    assert [json.loads(line)["line"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [2]


def test_no_problem_of_an_evaluation_set_is_trained_on(repository: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", {"problem_id": "t", "problem": "ann has  5 pens.", "answer": "5"})
    train = write(tmp_path / "train.jsonl", {"problem_id": "u", "problem": "Eve has 7 pens.", "answer": "7"})
    problems = f"problems={{source: files, train: {train}, test: {test}}}"
    loaded = recipe(repository, tmp_path, problems)
    with pytest.raises(UserError, match="1 training problems are also in an evaluation set") as caught:
        make_m0(Run(loaded))
    assert f"{tmp_path / 'solutions.jsonl'}:2" in str(caught.value)
    assert not (tmp_path / "mini_cpu" / "M0" / "train").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("initial_model=null", "warm_up.solutions train initial_model, a Hugging Face folder: give initial_model"),
        ("warm_up.corpus_size=5", "solutions train initial_model, and corpus_size are of a new model"),
        ("warm_up.solutions=[]", "give solutions, to train initial_model on them, or architecture and tokenizer"),
    ],
)
def test_keys_that_do_not_go_together(repository: Path, tmp_path: Path, keys: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(repository, tmp_path, keys)
    assert said in str(caught.value)


def test_the_layout_is_checked_before_anything_is_trained(repository: Path, tmp_path: Path) -> None:
    """Against the pretrained model, as M0 is not made yet."""
    loaded = recipe(
        repository,
        tmp_path,
        "warm_up.training.parallel={ranks: 3, tensor: 3}",
        "train.parallel={ranks: 2, pipeline: 2}",
    )
    found = machine_refusals(Run(loaded), environment="train")
    assert any(
        "M0 train: --set warm_up.training.parallel" in one and "tensor = 3 does not divide" in one for one in found
    )
    assert any("iteration 1 train: " in one and "pipeline = 2 does not divide" in one for one in found), found
