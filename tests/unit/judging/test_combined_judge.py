"""Combined judges: the rules by hand, members' opinions in the records, their caches, and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label, Opinion, Step
from megatron_stepkto.judging.process.combine import RULES
from megatron_stepkto.judging.process.interface import Resources, Workplace, cut_after_first_error
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.section import judging_key, judging_resources
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.file import load_judging
from tests.scripted_server import ScriptedServer, chat
from tests.unit.judging.test_llm_judge import honest, solution

TEXTS = ["good. So 2 + 2 = 4\n", "bad. So 2 + 2 = 5\n", "bad\n", "good. So 3 + 3 = 5\n", "unclear"]
EQUATIONS: list[Label] = [1, 0, None, 0, None]
MODEL: list[Label] = [1, 0, 0, 1, None]


@pytest.mark.parametrize(
    ("rule", "labels", "expected"),
    [
        ("all", (1, 1, 1), 1), ("all", (0, 0), 0), ("all", (1, None), None), ("all", (1, 0), None),
        ("all", (None, None), None), ("majority", (1, 1, 0), 1), ("majority", (0, None, 0), 0),
        ("majority", (1, 0), None), ("majority", (1, None), None), ("majority", (1, 1, 0, 0), None),
        ("majority", (0, None, None), None), ("first", (None, 0, 1), 0), ("first", (1, 0), 1),
        ("first", (None, None), None), ("confirm_wrong", (0, 0), 0), ("confirm_wrong", (0, 1), None),
        ("confirm_wrong", (0, None), None), ("confirm_wrong", (0, 1, 0), 0), ("confirm_wrong", (1, 0), 1),
        ("confirm_wrong", (None, 0), None),
    ],
)  # fmt: skip
def test_rules(rule: str, labels: tuple[Label, ...], expected: Label) -> None:
    assert RULES[rule](labels) == expected


def settings(url: str, rule: str = "first", **changes: Any) -> recipe.Judging:
    model = {"kind": "llm", "base_url": url, "model": "judge", **changes}
    process = {"kind": "combine", "judges": ["equations", model], "rule": rule}
    return recipe.Judging.model_validate({"split": "line", "process": process})


def test_each_member_keeps_its_opinion_and_its_answers(tmp_path: Path) -> None:
    """A change of the rule, or of one member, asks the other nothing."""
    place = Workplace(tmp_path)
    with ScriptedServer(honest) as server:
        judge = process_judge(settings(server.url).process, place)
        assert judge.name == "first(equations, llm:judge)"
        (verdicts,) = list(judge.judge([solution(0, TEXTS)]))
        assert not isinstance(verdicts, UserError)
        assert [v.label for v in verdicts] == [1, 0, 0, 0, None]
        assert judge.counts()["judges"]["llm:judge"]["judge"]["answered"] == 1
        for name, labels in (("equations", EQUATIONS), ("llm:judge", MODEL)):
            assert [v.members and v.members[name].label for v in verdicts] == labels
        (other,) = list(process_judge(settings(server.url, "confirm_wrong").process, place).judge([solution(0, TEXTS)]))
        assert not isinstance(other, UserError)
        assert [v.label for v in other] == [1, 0, None, None, None]
        alone = settings(server.url).process.judges[1]  # type: ignore[union-attr]
        list(process_judge(alone, place).judge([solution(0, TEXTS)]))
        assert len(server.requests) == 1
    step = Step(start=0, end=1, token_start=0, token_end=0).model_copy(update=verdicts[0].of_step())
    assert step.members == {
        "equations": Opinion(label=1), "llm:judge": Opinion(label=1, votes=[1], score=1.0),
    }  # fmt: skip
    assert Step.model_validate_json(step.model_dump_json()) == step
    assert cut_after_first_error(verdicts)[2].members == verdicts[2].members


def test_steps_of_other_judges_are_written_as_before() -> None:
    assert "members" not in Step(start=0, end=1, token_start=0, token_end=0).model_dump_json()


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "prm").mkdir()
    (tmp_path / "prm" / "model.safetensors").write_text("weights")
    prm = {"kind": "prm", "model": str(tmp_path / "prm"), "convention": "qwen_math_prm", "workers": 3}
    model = {"kind": "llm", "base_url": "http://a:1/v1", "model": "j"}
    rollouts = {"kind": "monte_carlo", "sample": {"max_tokens": 9, "workers": 2}}
    process = {"kind": "combine", "judges": [prm, model, {**model, "votes": 3}, rollouts], "rule": "all"}
    section = recipe.Judging.model_validate({"split": "line", "process": process})
    judge = process_judge(section.process)
    assert list(judge.members()) == ["prm:prm", "llm:j", "llm:j#2", "monte_carlo:8"]
    assert judge.resources() == Resources(3, ("judge.process.workers",), True, ("http://a:1/v1",))
    needs = judging_resources(section)
    assert [(need.gpus, need.takes_fewer, len(need.servers)) for need in needs] == [
        (3, True, 0), (0, False, 1), (0, False, 1), (2, False, 0),
    ]  # fmt: skip
    key = judging_key(section)["process"]
    assert (key["kind"], key["rule"]) == ("combine", "all")
    assert key["judges"] == [member.key() for member in judge.members().values()]
    assert list(judge.inputs()) == ["judges.0.model", "judges.1.prompt", "judges.2.prompt"]


def test_a_solution_that_one_member_refuses(tmp_path: Path) -> None:
    process = {"kind": "combine", "judges": ["equations", "chained_arithmetic"], "rule": "first"}
    section = recipe.Judging.model_validate({"split": "line", "process": process})
    (verdicts,) = list(process_judge(section.process, Workplace(tmp_path)).judge([solution(0, TEXTS)]))
    assert isinstance(verdicts, UserError)
    assert str(verdicts).startswith("chained_arithmetic: ")


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("{kind: combine, rule: all, judges: [equations]}", r"judge\.process\.judges: .*at least 2 items"),
        ("{kind: combine, rule: most, judges: [equations, none]}", r"judge\.process\.rule: .*'confirm_wrong'"),
        (
            "{kind: combine, rule: all, judges: [equations, {kind: llm, base_ulr: x, model: j}]}",
            r"judge\.process\.judges\.1\.base_ulr; did you mean base_url",
        ),
        (
            "{kind: combine, rule: all, judges: [none, {kind: combine, rule: all, judges: [none, none]}]}",
            r"judge\.process\.judges\.1: .*'combine'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, process: str, said: str) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(f"judge:\n  split: line\n  process: {process}\n")
    with pytest.raises(UserError, match=said):
        load_judging(path, [])


def test_an_unreachable_member_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda body, number: chat({}), models=None) as server:
        judge = process_judge(settings(server.url, model="llama").process, Workplace(tmp_path))
        with pytest.raises(UserError, match=r"^judge\.process\.judges\.1\.model: .* has no model 'llama'"):
            judge.check()
