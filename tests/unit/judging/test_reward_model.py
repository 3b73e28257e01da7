"""A learned outcome reward model, a small random one, against transformers' own forward pass; resumed answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_stepkto.answers import equivalence
from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem, write_records
from megatron_stepkto.judging.outcome import reward_model
from megatron_stepkto.judging.outcome.reward_model import OutcomeRewardModel
from megatron_stepkto.judging.process import prm
from megatron_stepkto.judging.process.interface import Workplace
from megatron_stepkto.judging.process.prm import PRMJob
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer
from tests.unit.judging.test_stage import LUCKY, PROBLEM, RIGHT, WRONG, Folder

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def write_reward_model(folder: Folder, num_labels: int = 1) -> Path:
    """A random Llama classifier with large weights beside the miniature's tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    path = folder.path / f"reward-{num_labels}"
    tokenizer = load_tokenizer(folder.path / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2, num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def own_forward(path: Path, text: str) -> float:
    """transformers' score of one unpadded text."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(path)
    turns = [{"role": "user", "content": PROBLEM.problem}, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def settings(path: Path, threshold: float, **more: Any) -> Judging:
    outcome = {"reward_model": path, "threshold": threshold, "dtype": "float32", **more}
    return Judging.model_validate({"split": "line", "process": "chained_arithmetic", "outcome": outcome})


def test_scores_are_transformers_own_and_labels_say_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = write_reward_model(folder)
    texts = [RIGHT, LUCKY, WRONG, RIGHT[:30]]  # of unequal length: a batch is padded
    expected = [own_forward(path, text) for text in texts]
    assert max(expected) - min(expected) > 0.1
    threshold = sorted(expected)[1] + 1e-4  # two above
    open_problem = PROBLEM.model_copy(update={"answer": None, "problem_id": "open"})
    write_records(folder.problems, [PROBLEM, open_problem])
    samples = [folder.sample(n, text, problem_id="open", sample_id=f"open/{n}") for n, text in enumerate(texts)]
    write_records(folder.samples, [samples[0], folder.sample(9, WRONG), *samples[1:]])
    counts = judge_file(folder.problems, folder.samples, folder.output, tmp_path / "model", settings(path, threshold))
    first, checked, *others = folder.judged()
    judged = [first, *others]
    assert [row.judge.score for row in judged] == pytest.approx(expected, abs=1e-5)
    assert [row.outcome for row in judged] == [int(score > threshold) for score in expected]
    assert {row.judge.outcome for row in judged} == {"reward_model:reward-1"}
    assert {row.judge.threshold for row in judged} == {threshold}
    assert (checked.outcome, checked.judge.outcome, checked.judge.score) == (0, "answer", None)
    assert [step.label for step in first.steps] == [1, 1, None]
    assert counts["samples"] == 5


def test_a_solution_longer_than_the_models_positions_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    path = write_reward_model(folder)
    open_problem = PROBLEM.model_copy(update={"answer": None})
    write_records(folder.problems, [open_problem])
    write_records(folder.samples, [folder.sample(0, RIGHT), folder.sample(1, RIGHT * 30), folder.sample(2, WRONG)])
    judge_file(folder.problems, folder.samples, folder.output, tmp_path / "model", settings(path, 0.0))
    first, long, last = folder.judged()
    assert [first.judge.score, last.judge.score] == pytest.approx(
        [own_forward(path, t) for t in (RIGHT, WRONG)], abs=1e-5
    )
    assert (long.outcome, long.judge.score, long.judge.outcome) == (None, None, "reward_model:reward-1")
    assert "1 of 3 solutions are longer than the reward model's 512 positions" in " ".join(
        capsys.readouterr().err.split()
    )


def test_workers_and_batches_change_no_score(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = write_reward_model(folder)
    pairs = [(PROBLEM.problem, text) for text in (RIGHT, LUCKY, WRONG, "x")]
    found = []
    for name, batch_tokens in (("one", 1), ("all", 10_000)):
        model = recipe.RewardModel(reward_model=path, threshold=0, dtype="float32", batch_tokens=batch_tokens)
        found.append(list(OutcomeRewardModel(model, Workplace(tmp_path / name)).scores(pairs)))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_scores_are_kept_for_all_that_decides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    path = write_reward_model(folder)
    jobs: list[PRMJob] = []

    def score_job(job: PRMJob, logs: Path, title: str) -> Iterator[list[float]]:
        jobs.append(job)
        return iter([[0.0]] * job.num_rows)

    monkeypatch.setattr(reward_model, "score_job", score_job)

    def kept_in(text: str = RIGHT, **changes: Any) -> Path:
        reward = recipe.RewardModel(reward_model=path, **{"threshold": 0, "dtype": "float32", **changes})
        list(OutcomeRewardModel(reward, Workplace(tmp_path)).scores([(PROBLEM.problem, text)]))
        return jobs[-1].directory

    first = kept_in()
    assert first == kept_in(threshold=1, workers=3)
    different = {first, kept_in(WRONG), kept_in(dtype="bfloat16")}
    assert kept_in(dtype="auto") == first  # of float32 weights
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"score.weight": -weights["score.weight"]}, path / "model.safetensors", {"format": "pt"})
    different.add(kept_in())
    monkeypatch.setattr(prm, "code_hash", lambda *modules: "other code")
    different.add(kept_in())
    monkeypatch.setattr(prm, "versions", lambda *packages: {"torch": "0"})
    different.add(kept_in())
    assert len(different) == 6


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write_records(folder.problems, [Problem(problem_id="p1", problem=PROBLEM.problem, answer=None)])
    write_records(folder.samples, [folder.sample(0, RIGHT)])

    def judge(judging: Judging) -> None:
        judge_file(folder.problems, folder.samples, folder.output, tmp_path / "model", judging)

    with pytest.raises(UserError, match="1 problems have no answer, such as p1; give answers, or name a reward model"):
        judge(Judging.model_validate({"split": "line", "process": "none"}))
    with pytest.raises(UserError, match=r"one label.*got LlamaForSequenceClassification with 2 labels"):
        judge(settings(write_reward_model(folder, num_labels=2), 0))
    path = write_reward_model(folder)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="reward model's tokenizer has no chat template"):
        judge(settings(path, 0))


def test_an_interrupted_stage_decides_no_pair_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps computer algebra's verdicts; a second checker with it starts no process."""
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), ("x+1", "x+2"), ("5", "5.0"), ("9^{9^{9^9}}", "5")]
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache, EquivalenceChecker(1, 1.0, cache) as checker:
        first = checker.check_many(pairs[:2] + pairs[3:])
    with path.open("a") as file:
        file.write('{"key": "torn')  # killed while it wrote
    with AnswerCache(path) as cache, EquivalenceChecker(1, 1.0, cache) as checker:
        second = checker.check_many(pairs)
        assert not checker._workers
    assert [(v.verdict, v.how) for v in second] == [
        ("right", "math-verify"), ("wrong", "math-verify"), ("right", "exact"), ("undecided", "timeout"),
    ]  # fmt: skip
    assert second[:2] == first[:2]
    assert len(path.read_text().splitlines()) == 3
    # the verdict of other code, or of another version of a library, is not this one's
    stale = path.read_text().replace('"verdict": "wrong"', '"verdict": "right"')
    path.write_text(stale)
    with AnswerCache(path) as cache, EquivalenceChecker(1, 1.0, cache) as checker:
        assert checker.check_many(pairs[1:2])[0].verdict == "right"
    for change in (["other code", equivalence._algebra()[1]], [equivalence._algebra()[0], {"sympy": "0"}]):
        monkeypatch.setattr(equivalence, "_algebra", lambda change=change: change)
        with AnswerCache(path) as cache, EquivalenceChecker(1, 1.0, cache) as checker:
            assert checker.check_many(pairs[1:2])[0].verdict == "wrong"
        monkeypatch.undo()
    assert all(json.loads(line)["value"]["how"] in ("math-verify", "timeout") for line in path.open())
