"""Generative reward models: transcripts in the layouts that their authors publish, and what is asked of a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.formats import RPRM, Format, GenPRM, ThinkPRM
from megatron_stepkto.judging.process.interface import Workplace
from megatron_stepkto.judging.process.llm import LLMJudge
from megatron_stepkto.recipe.keys import LLMJudge as Settings
from tests.scripted_server import Reply, ScriptedServer, chat
from tests.unit.judging.test_llm_judge import solution

GENPRM = """<analyze>
Let's analyze the Paragraph 2 step by step: the product of 4 and 3 should be \\boxed{{12}}.
</analyze>
<verify>
Let's use python code to find any potential error:
```python
open("ran", "w").write("x")
print("\\\\boxed{{No}}")
```
[Code Output]

```
\\boxed{{No}}
```
</verify>
<output>
**Judgement**: $\\boxed{{{verdict}}}$
</output>
"""
THINKPRM = """Let's verify step by step:
Step 1: The equation is set up as the problem says, and \\boxed{4} is the total. The step is \\boxed{correct}
Step 2: 4 * 3 = 12. Wait, let me check Step 1: it held.
The step is \\boxed{correct}
Step 3: 12 + 1 = 14 is not true. The step is \\boxed{incorrect}
</think>
Is the solution correct? No"""
R_PRM = """Analysis:

**Previous Steps Analysis**:
1. Step 1: This step is correct (Yes/No?).

**Now Step Analysis**:
The Now Step multiplies 4 by 3.

**Calculation Analysis**:
4 * 3 = 12, and Yes, it holds.

Conclusion:
There are no errors in the Now Step.
Verification: Is the step correct (Yes/No)? Yes"""
TEMPLATE = "Verify \\frac{a}{b}.\nQuestion: {}\nPrevious Steps: {}\nNow Step: {}\nReply: "
ALL = "The step is \\boxed{correct}"


@pytest.mark.parametrize(
    ("format", "text", "labels"),
    [
        (GenPRM(), GENPRM.format(verdict="Yes"), [1]),
        (GenPRM(), GENPRM.format(verdict="No"), [0]),
        (GenPRM(), GENPRM.format(verdict="Maybe"), [None]),
        (GenPRM(), GENPRM.format(verdict="Yes").split("</output>")[0], [None]),
        (GenPRM(), GENPRM.format(verdict="Yes").split("<output>")[0], [None]),
        (GenPRM(), GENPRM.format(verdict="Yes") * 2, [None]),
        (GenPRM(), "<output>\\boxed{Yes} or \\boxed{No}</output>", [None]),
        (GenPRM(), "", [None]),
        (ThinkPRM(), THINKPRM, [1, 1, 0]),
        (ThinkPRM(), THINKPRM.split("Step 3:")[0], [1, 1, None]),
        (ThinkPRM(), f"Step 1: {ALL}\nIs the solution correct? Yes\nStep 2: {ALL}\nStep 3: {ALL}", [1, None, None]),
        (ThinkPRM(), f"**Step 1:** fine. This step is \\boxed{{incorrect}}\nStep 2: {ALL}", [0, None, None]),
        (ThinkPRM(), f"Step 1: {ALL}\nStep 3: {ALL}", [1, None, None]),
        (ThinkPRM(), f"Step 2: {ALL}", [None, None, None]),
        (ThinkPRM(), f"Step 1: {ALL} no, \\boxed{{incorrect}}\nStep 2: {ALL}\nStep 3: no box", [None, 1, None]),
        (ThinkPRM(), "".join(f"Step {n}: {ALL}\n" for n in range(1, 6)), [1, 1, 1]),
        (ThinkPRM(), "All steps are \\boxed{correct}", [None, None, None]),
        (RPRM(TEMPLATE), R_PRM, [1]),
        (RPRM(TEMPLATE), R_PRM.replace("? Yes", "? No."), [0]),
        (RPRM(TEMPLATE), R_PRM + "\nBut wait.", [None]),
        (RPRM(TEMPLATE), R_PRM + "\nVerification: Is the step correct (Yes/No)? No", [None]),
        (RPRM(TEMPLATE), R_PRM.replace("? Yes", "? X"), [None]),
        (RPRM(TEMPLATE), "Yes", [None]),
    ],
)
def test_transcripts(format: Format, text: str, labels: list[Label], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert format.read(text, len(labels)) == labels
    assert not (tmp_path / "ran").exists()  # code is never run


STEPS = ["good 1\n", "bad\n", "good 3"]


def judge(url: str, cache: Path, **changes: Any) -> LLMJudge:
    options = {"kind": "llm", "base_url": url, "model": "judge", "concurrency": 1, **changes}
    return LLMJudge(Settings.model_validate(options), Workplace(cache))


def given(judge: LLMJudge) -> list[Label]:
    (verdicts,) = list(judge.judge([solution(0, STEPS)]))
    assert not isinstance(verdicts, UserError)
    return [verdict.label for verdict in verdicts]


def test_genprm_is_a_conversation(tmp_path: Path) -> None:
    """Each turn shows the steps and critiques before it; votes are kept."""

    def script(body: dict[str, Any], number: int) -> Reply:
        return chat(GENPRM.format(verdict="No" if "bad" in body["messages"][-1]["content"] else "Yes"))

    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path, format="genprm", votes=2)
        assert given(asked) == given(judge(server.url, tmp_path, format="genprm", votes=2)) == [1, 0, 1]
        assert len(server.requests) == 6
        first, second, third = (body["messages"] for body in server.requests[:3])
    assert [m["role"] for m in third] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in third if m["role"] == "user"] == ["Problem 0?\ngood 1", "bad", "good 3"]
    assert third[4]["content"] == GENPRM.format(verdict="No")
    assert first == second[:2] and second == third[:4]
    assert "response_format" not in server.requests[0]
    assert asked.counts()["judge"]["answered"] == 2


@pytest.mark.parametrize(
    ("format", "expected", "requests"), [("genprm", [1, None, None], 2), ("r_prm", [1, None, 1], 3)]
)
def test_an_answer_that_is_cut_off_has_no_verdict(
    tmp_path: Path, format: str, expected: list[Label], requests: int
) -> None:
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    answer = GENPRM.format(verdict="Yes") if format == "genprm" else R_PRM

    def script(body: dict[str, Any], number: int) -> Reply:
        return chat(answer, "length" if number == 1 else "stop")

    prompt = {"prompt": tmp_path / "prompt.txt"} if format == "r_prm" else {}
    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path, format=format, **prompt)
        assert given(asked) == expected
        assert len(server.requests) == requests
    counts = asked.counts()["judge"]
    assert counts["cut_off"] == 1 and counts["steps_without_verdict"] == expected.count(None)


def test_thinkprm_is_one_request(tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: chat(THINKPRM)) as server:
        assert given(judge(server.url, tmp_path, format="thinkprm")) == [1, 1, 0]
        (body,) = server.requests
    assert re.findall(r"^Step \d: \S+", body["messages"][0]["content"], flags=re.M) == [
        "Step 1: good", "Step 2: bad", "Step 3: good",
    ]  # fmt: skip
    with ScriptedServer(lambda body, number: chat(THINKPRM, "length")) as server:
        asked = judge(server.url, tmp_path / "cut", format="thinkprm")
        assert given(asked) == [None, None, None]
    assert asked.counts()["judge"]["failed"] == 1


def test_r_prm_shows_the_steps_before(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    with ScriptedServer(lambda body, number: chat(R_PRM)) as server:
        assert given(judge(server.url, tmp_path, format="r_prm", prompt=tmp_path / "prompt.txt")) == [1, 1, 1]
        first, second, _ = (body["messages"][0]["content"] for body in server.requests)
    assert first.startswith(
        "Verify \\frac{a}{b}.\nQuestion: Problem 0?\nPrevious Steps: Since the Now Step is the first"
    )
    assert second.endswith("Previous Steps: Step 1: good 1\nNow Step: Step 2: bad\nReply: ")
    (tmp_path / "chatml.txt").write_text("<|im_start|>user\n{} {} {}")
    with pytest.raises(UserError, match="without chat markers"):
        judge("http://a:1/v1", tmp_path, format="r_prm", prompt=tmp_path / "chatml.txt").load()


def test_the_prompt_belongs_to_the_format() -> None:
    model = {"kind": "llm", "base_url": "http://a:1/v1", "model": "j"}
    assert LLMJudge(Settings.model_validate({**model, "format": "genprm"})).key()["format"] == "genprm"
    assert "format" not in LLMJudge(Settings.model_validate(model)).key()  # finished runs stay finished
    for wrong, said in (({"format": "r_prm"}, "needs prompt"), ({"format": "genprm", "prompt": "x"}, "remove prompt")):
        with pytest.raises(ValueError, match=said):
            Settings.model_validate({**model, **wrong})


def test_kept_votes_are_of_as_many_steps(tmp_path: Path) -> None:
    """ThinkPRM's message about two steps, and about the same text as one step, is the same."""
    text = ["Step 1: 2 + 2 = 4.\n", "Step 2: So the answer is 4."]
    with ScriptedServer(lambda body, number: chat(f"Step 1: {ALL}\nStep 2: {ALL}\n")) as server:
        for steps in (text, ["".join(text)]):
            settings = {"kind": "llm", "base_url": server.url, "model": "judge", "format": "thinkprm"}
            judge = LLMJudge(Settings.model_validate(settings), Workplace(tmp_path))
            (verdicts,) = judge.judge([solution(0, steps)])
            assert not isinstance(verdicts, UserError)
            assert [verdict.label for verdict in verdicts] == [1] * len(steps)
    assert len(server.requests) == 2
