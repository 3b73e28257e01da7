"""Monte-Carlo estimates: labels from outcomes by hand, and rollouts of a real model from the sampler's own tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label, Sample, read_records
from megatron_stepkto.judging.process import monte_carlo
from megatron_stepkto.judging.process.interface import Solution, Workplace
from megatron_stepkto.judging.process.monte_carlo import estimate
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.section import judging_key
from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.steps.tokens import step_spans


@pytest.mark.parametrize(
    ("outcomes", "threshold", "label", "score"),
    [
        ([0, 0, 1, 0], 0.0, 1, 0.25), ([0, 0, 0, 0], 0.0, 0, 0.0), ([0, 0, None, 0], 0.0, None, 0.0),
        ([1, 0, 0, 0], 0.5, 0, 0.25), ([1, 1, 0, 0], 0.5, 0, 0.5), ([1, 1, 1, 0], 0.5, 1, 0.75),
        ([1, 1, None, 0], 0.5, None, 0.5), ([1, 1, 1, None], 0.5, 1, 0.75), ([None], 0.0, None, 0.0),
    ],
)  # fmt: skip
def test_estimate(outcomes: list[Label], threshold: float, label: Label, score: float) -> None:
    verdict = estimate(outcomes, threshold)
    assert (verdict.label, verdict.score, verdict.votes) == (label, score, tuple(outcomes))


def judging(backend: str = "transformers", **changes: Any) -> Any:
    sample = {"backend": backend, "num_samples": 4, "max_tokens": 64, "dtype": "float32", "chunk_problems": 8}
    return Judging.model_validate({"split": "line", "process": {"kind": "monte_carlo", "sample": sample, **changes}})


def solutions(model: Path, count: int) -> list[Solution]:
    """Gold solutions, every second one with the first step's result changed."""
    tokenizer = load_tokenizer(model)
    made = []
    for number, problem in enumerate(generate("test", count, 5)):
        assert problem.solution is not None
        text = problem.solution
        if number % 2:
            first, rest = text.split("\n", 1)
            left, result = first.rstrip(".").rsplit(" ", 1)
            text = f"{left} {int(result) + 7}.\n{rest}"
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        steps = step_spans(text, ids, tokenizer, "line")
        prompt = tokenizer.encode(problem.problem + "\n")
        made.append(Solution(f"s{number}", problem, text, tuple(steps), tuple(prompt), tuple(ids)))
    return made


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_rollouts_of_the_shipped_model(backend: str, repository: Path, tmp_path: Path) -> None:
    """M0 of the demo solves about half: from right prefixes rollouts reach the answer more often than from wrong."""
    if backend == "vllm":
        pytest.importorskip("vllm", reason="the environment of Megatron-Core 0.19 has none")
    model = repository / "recipes" / "mini_cpu_m0"
    given = solutions(model, 12)
    place = Workplace(tmp_path, model, seed=3)
    judge = process_judge(judging(backend).process, place)
    verdicts = list(judge.judge(given))
    assert not any(isinstance(row, UserError) for row in verdicts)
    right = [row[0].score or 0.0 for number, row in enumerate(verdicts) if not number % 2]  # type: ignore[index]
    wrong = [row[0].score or 0.0 for number, row in enumerate(verdicts) if number % 2]  # type: ignore[index]
    assert sum(right) > sum(wrong) + 1
    for solution, row in zip(given, verdicts, strict=True):
        assert not isinstance(row, UserError) and len(row) == len(solution.steps)
        assert all(len(v.votes or ()) == 4 for v in row[:-1])
        assert row[-1].votes == (1,)  # the answer line itself is right in all of them: nothing is rolled out
    # the prompts of the rollouts are the sampler's own ids, cut at the ends of steps
    (file,) = (tmp_path / "cache").glob("rollouts-*/rollouts.jsonl")
    rows = list(read_records(file, Sample))
    steps = [(solution, step) for solution in given for step in solution.steps[:-1]]
    assert len(rows) == 4 * len(steps)
    for row, (solution, step) in zip(rows[::4], steps, strict=True):
        assert row.prompt_token_ids == [*solution.prompt_token_ids, *solution.token_ids[: step.token_end]]
    # asked again: the same rollouts, none drawn
    before = file.stat().st_mtime_ns
    again = list(process_judge(judging(backend, threshold=0.5).process, place).judge(given))
    assert file.stat().st_mtime_ns == before
    assert [[v.score for v in row] for row in again] == [[v.score for v in row] for row in verdicts]  # type: ignore[union-attr]
    assert judge.counts()["rollouts"]["solutions"] == len(rows)


def test_what_rollouts_need(repository: Path, tmp_path: Path) -> None:
    model = repository / "recipes" / "mini_cpu_m0"
    (one,) = solutions(model, 1)
    with pytest.raises(UserError, match=r"judge\.process\.model"):
        process_judge(judging().process, Workplace(tmp_path)).load()
    judge = process_judge(judging().process, Workplace(tmp_path, model))
    nameless = Solution("s", one.problem.model_copy(update={"answer": ""}), one.text, one.steps)
    (verdict,) = list(judge.judge([nameless]))
    assert isinstance(verdict, UserError) and "need the problem's answer" in str(verdict)
    with pytest.raises(UserError, match="need the prompt's tokens"):
        list(judge.judge([Solution("s", one.problem, one.text, one.steps, (), one.token_ids)]))


def test_rollouts_are_kept_for_all_that_decides_them(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another completing model, new weights under the same path, another seed, dtype, code or engine draws again."""
    own = repository / "recipes" / "mini_cpu_m0"
    model = tmp_path / "model"
    shutil.copytree(own, model)
    (given,) = solutions(own, 1)

    def folder(seed: int = 3, sampler: Path = own, **changes: Any) -> Path:
        """Where the rollouts stand."""
        found: list[Path] = []

        def new_drawing(*arguments: Any, title: str) -> Any:
            found.append(arguments[6])
            raise UserError("far enough")

        monkeypatch.setattr(monte_carlo, "new_drawing", new_drawing)
        with pytest.raises(UserError, match="far enough"):
            list(process_judge(judging(**changes).process, Workplace(tmp_path, sampler, seed)).judge([given]))
        return found[0]

    first = folder(model=str(model))
    assert first == folder() == folder(model=str(model), threshold=0.5)  # equal content
    different = {first, folder(seed=4), folder(backend="vllm")}
    weights = load_file(model / "model.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})
    assert folder() == first
    different |= {folder(model=str(model)), folder(sampler=model)}
    assert folder(model=str(model)) == folder(sampler=model) == folder(model=str(model))
    monkeypatch.setattr(monte_carlo, "code_hash", lambda *modules: "other code")
    different.add(folder())
    monkeypatch.setattr(monte_carlo, "engine_versions", lambda: {"torch": "0"})
    different.add(folder())
    assert len(different) == 6


def test_the_stage_key_holds_the_completing_model(repository: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(repository / "recipes" / "mini_cpu_m0", model)
    before = judging_key(judging(), model)
    assert before == judging_key(judging(), repository / "recipes" / "mini_cpu_m0")
    (model / "model.safetensors").write_bytes(b"other weights")
    assert judging_key(judging(), model) != before


def retokenised(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model whose tokenizer.json is changed."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for key, change in changes.items():
        content[key] = change(content[key])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_model_with_another_tokenizer_is_refused(repository: Path, tmp_path: Path) -> None:
    """Its ids would be other text: all that it completes would be judged wrong, or right by chance."""
    own = repository / "recipes" / "mini_cpu_m0"

    def swapped(model: dict[str, Any]) -> dict[str, Any]:
        vocab = dict(model["vocab"])
        vocab["7"], vocab["8"] = vocab["8"], vocab["7"]
        return {**model, "vocab": vocab}

    def longer(model: dict[str, Any]) -> dict[str, Any]:
        return {**model, "vocab": model["vocab"] | {"zebra": len(model["vocab"])}}

    def build(model: Path) -> None:
        process_judge(judging(model=str(model)).process, Workplace(tmp_path, own)).load()

    build(own)
    same = retokenised(own, tmp_path / "same")
    config = json.loads((same / "tokenizer_config.json").read_text())
    (same / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    build(same)
    for name, changes, said in (
        ("swapped", {"model": swapped}, r"token \d+ is '[78]' in one and '[78]' in the other"),
        ("longer", {"model": longer}, "is None in one and 'zebra' in the other"),
        (
            "decoder",
            {"decoder": lambda _: {"type": "WordPiece", "prefix": "##", "cleanup": False}},
            "same vocabulary, another decoder",
        ),
    ):
        with pytest.raises(UserError, match=rf"judge\.process\.model: .*{name} would read .*{said}"):
            build(retokenised(own, tmp_path / name, **changes))
