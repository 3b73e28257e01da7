"""judge-eval: the benchmarks' measures by hand, on real files, and through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.cli.main import main
from megatron_stepkto.evaluation.judge_measures import Judged, compare, f1, reliability, score
from megatron_stepkto.evaluation.judges import judge_eval
from megatron_stepkto.recipe.keys import Import, Judging
from tests.scripted_server import Reply, ScriptedServer, chat

EQUATIONS = Judging.model_validate({"split": "line", "process": "equations"})


def test_scores_by_hand() -> None:
    """Four erroneous solutions, two named exactly; three correct ones, two left alone."""
    rows = [
        Judged((1, 0, None), (1, 0, 1)),  # found
        Judged((0, None), (0, None)),  # found
        Judged((1, 1, 0), (1, 0, 0)),  # a step too early: not found
        Judged((1, 0), (None, None)),  # predicts -1
        Judged((1, 1), (1, 1)),  # left alone
        Judged((1,), (None,)),  # left alone: nothing was called wrong
        Judged((1, 1), (1, 0)),  # called wrong
    ]
    found = score(rows)
    assert (found["erroneous"], found["correct"]) == (4, 3)
    assert found["error_accuracy"] == 0.5 and found["correct_accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert found["steps"] == {
        "people_right_judge_right": 5, "people_right_judge_wrong": 2, "people_right_judge_null": 2,
        "people_wrong_judge_right": 0, "people_wrong_judge_wrong": 3, "people_wrong_judge_null": 1,
    }  # fmt: skip
    assert found["judged_share"] == pytest.approx(10 / 13)
    assert found["precision_of_wrong"] == pytest.approx(3 / 5) and found["wrong_steps_found"] == pytest.approx(3 / 4)
    assert found["precision_of_right"] == 1.0 and found["right_steps_found"] == pytest.approx(5 / 9)
    low, high = found["f1_interval"]
    assert 0 <= low < found["f1"] < high <= 1


def test_a_judge_that_judges_nothing() -> None:
    found = score([Judged((1, 0), (None, None)), Judged((1,), (None,))])
    assert (found["error_accuracy"], found["correct_accuracy"], found["f1"]) == (0.0, 1.0, 0.0)
    assert found["judged_share"] == 0.0 and found["precision_of_wrong"] is None


def test_right_answers_by_hand() -> None:
    """Three right answers, two with a wrong step that people saw; the fourth solution's answer is wrong."""
    rows = [
        Judged((1, 0), (1, 0), outcome=1),
        Judged((1, 0, None), (0, 1, 0), outcome=1),
        Judged((1, 1), (1, None), outcome=1),
        Judged((0,), (0,), outcome=0),
    ]
    right = score(rows)["right_answers"]
    assert (right["solutions"], right["with_a_wrong_step"]) == (3, 2)
    assert right["precision_of_wrong"] == 0.5 and right["wrong_steps_found"] == 0.5
    assert right["judged_share"] == pytest.approx(5 / 6)
    low, high = right["precision_of_wrong_interval"]
    assert 0 < low < 0.5 < high < 1
    assert score(rows)["precision_of_wrong"] == pytest.approx(2 / 3)
    assert score(rows[3:])["right_answers"]["precision_of_wrong"] is None


def test_reliability_by_hand() -> None:
    rows = [
        Judged((1, 0, None), (1, 1, 1), (0.95, 0.91, 0.9)),
        Judged((1, 0), (1, 0), (1.0, 0.05)),
        Judged((1,), (1,), (None,)),
        Judged((1,), (1,)),
    ]
    low, high = reliability(rows)
    assert (low["from"], low["to"], low["steps"], low["mean_score"], low["right"]) == (0.0, 0.1, 1, 0.05, 0.0)
    assert (high["from"], high["steps"], high["right"]) == (0.9, 3, pytest.approx(2 / 3))
    assert high["mean_score"] == pytest.approx((0.95 + 0.91 + 1.0) / 3)
    assert reliability(rows[3:]) == []


def test_a_comparison_by_hand() -> None:
    """Of eight erroneous solutions, all with a right answer, the first judge names seven, the second one."""
    gold: list[tuple[Any, ...]] = [(1, 0)] * 8 + [(1, 1)] * 2
    first = [Judged(g, g if n < 7 else (1, 1), outcome=1) for n, g in enumerate(gold)]
    second = [Judged(g, (1, 0) if n in (0, 8) else (1, 1), outcome=1) for n, g in enumerate(gold)]
    found = compare(first, second)
    assert (found["solutions"], found["found_only_by_first"], found["found_only_by_second"]) == (10, 7, 0)
    assert found["p_value"] == pytest.approx(2 / 2**7)
    assert found["f1"]["difference"] == pytest.approx(2 * 0.875 / 1.875 - 2 * 0.125 * 0.5 / 0.625)
    right = found["right_answers"]
    assert right["wrong_steps_found"]["difference"] == pytest.approx(6 / 8)
    assert right["precision_of_wrong"]["difference"] == pytest.approx(1 - 1 / 2)
    low, high = right["wrong_steps_found"]["interval"]
    assert 0 < low < 0.75 < high <= 1
    assert compare(first, first)["f1"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    silent = compare(first, [Judged(g, (None, None), outcome=1) for g in gold])
    assert silent["right_answers"]["precision_of_wrong"] == {"difference": None, "interval": None}


def test_f1() -> None:
    assert f1(0.5, 1.0) == pytest.approx(2 / 3) and f1(0.0, 0.0) == 0.0 and f1(None, 1.0) is None


def solutions(path: Path, count: int = 8) -> Path:
    rows = [
        {"id": f"g-{n}", "problem": f"Problem {n}?",
         "steps": ["2 + 2 = 4", f"3 * 3 = {9 + n % 2}: \\boxed{{{9 + n % 2}}}"],
         "label": 1 if n % 2 else -1, "final_answer_correct": not n % 2}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = solutions(tmp_path / "made.jsonl")
    main(["judge-eval", "equations", f"processbench={file}", "--output", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "| made.jsonl | 8 | 100.0 [51.0, 100.0] | 100.0 [51.0, 100.0] | 100.0 [100.0, 100.0] | 100.0" in table
    report = json.loads((tmp_path / "out" / "judge_eval.json").read_text())
    assert report["judge"] == "equations" and report["sources"][0]["f1"] == 1.0


def test_members_and_another_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The combination is silent, as one member is; beside it stand its members, and a judge from another run."""
    file, settings = solutions(tmp_path / "made.jsonl"), tmp_path / "judge.yaml"
    settings.write_text("judge:\n  split: line\n  process: {kind: combine, judges: [equations, none], rule: all}\n")
    main(["judge-eval", "equations", f"processbench={file}", "--output", str(tmp_path / "rule"), "--limit", "6"])
    command = ["judge-eval", str(settings), f"processbench={file}", "--output", str(tmp_path / "both")]
    main([*command, "--against", str(tmp_path / "rule")])
    table = capsys.readouterr().out
    assert "| made.jsonl: equations | 8 | 100.0" in table
    assert "| made.jsonl: equations | 6 | 0 | 3 | 0.25 | -100.0 [-100.0, -100.0] | – | – |" in table
    (source,) = json.loads((tmp_path / "both" / "judge_eval.json").read_text())["sources"]
    assert source["f1"] == 0.0 and source["members"]["equations"]["f1"] == 1.0
    assert source["members"]["none"]["judged_share"] == 0.0
    assert source["members"]["equations"]["combination"]["found_only_by_second"] == 4
    assert source["against"]["judge"] == "equations" and source["against"]["solutions"] == 6
    with pytest.raises(SystemExit):
        main([*command, "--against", str(tmp_path / "absent")])
    assert "run it for the other judge" in capsys.readouterr().err.replace("\n", " ")


def test_a_file_named_twice(tmp_path: Path) -> None:
    given = Import(path=solutions(tmp_path / "made.jsonl"), format="processbench")
    with pytest.raises(UserError, match=r"expected each file once, got .*made\.jsonl twice"):
        judge_eval(EQUATIONS, [given, given], tmp_path / "out")


@pytest.mark.parametrize(
    ("judge", "file", "said"),
    [
        ("equation", "processbench=x", "one of the rules chained_arithmetic, equations, none, got equation"),
        ("equations", "x.jsonl", "expected FORMAT=FILE; formats: bigbench_mistake"),
        ("equations", "processbnech=x.jsonl", "did you mean processbench"),
        ("equations", "processbench=x.jsonl", "found none"),
    ],
)
def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, file: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["judge-eval", judge, file, "--output", str(tmp_path)])
    assert ended.value.code == 2
    import re

    assert re.search(said, capsys.readouterr().err.replace("\n", " "))


def test_solutions_that_nobody_judged(tmp_path: Path) -> None:
    row = {"id": 1, "problem": "?", "answer": "4", "model": "m", "response": "2 + 2 = 4", "correct": True}
    (tmp_path / "g.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="steps people judged, got none"):
        judge_eval(EQUATIONS, [Import(format="gsm8k_solutions", path=tmp_path / "g.jsonl")], tmp_path / "out")


def test_an_llm_judge_from_a_file_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies after three answers; the second call asks only for the rest."""
    file = solutions(tmp_path / "made.jsonl")

    def script(body: dict[str, Any], number: int) -> Reply:
        wrong = "boxed{10}" in body["messages"][0]["content"]
        assert "Correct final answer" not in body["messages"][0]["content"]  # ProcessBench has none to give
        verdicts = {"step_1": {"verdict": "right"}, "step_2": {"verdict": "wrong" if wrong else "right"}}
        return chat(verdicts) if number < 3 or server.alive else Reply("stopped", 400)  # type: ignore[attr-defined]

    settings = tmp_path / "judge.yaml"
    with ScriptedServer(script) as server:
        server.alive = False  # type: ignore[attr-defined]
        settings.write_text(
            "judge:\n  split: line\n  process: {kind: llm, model: judge, base_url: '${JUDGE_URL}', concurrency: 1}\n"
        )
        monkeypatch.setenv("JUDGE_URL", server.url)
        command = ["judge-eval", str(settings), f"processbench={file}", "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            main(command)
        assert len(server.requests) == 4 and not (tmp_path / "out" / "judge_eval.json").exists()
        server.alive = True  # type: ignore[attr-defined]
        main(command)
        assert len(server.requests) == 4 + 5
    (source,) = json.loads((tmp_path / "out" / "judge_eval.json").read_text())["sources"]
    assert source["f1"] == 1.0 and source["judged_share"] == 1.0


def test_a_solution_that_the_judge_cannot_take_counts_as_not_judged(tmp_path: Path) -> None:
    file = solutions(tmp_path / "made.jsonl", 2)
    settings = Judging.model_validate({"split": "line", "process": "chained_arithmetic"})
    (source,) = judge_eval(settings, [Import(format="processbench", path=file)], tmp_path / "out")["sources"]
    assert source["refused"] == 2 and source["judged_share"] == 0.0 and source["correct_accuracy"] == 1.0
    assert "not a chained-arithmetic problem" in source["first_refused"][0]


def test_equations_on_real_labels(data_dir: Path, tmp_path: Path) -> None:
    """docs/measurements: no change may lower what a "wrong" of this judge is worth."""
    files = [
        Import(format="processbench", path=data_dir / "steps/processbench_gsm8k.jsonl"),
        Import(format="processbench", path=data_dir / "steps/processbench_math.jsonl"),
        Import(format="mrben", path=data_dir / "steps/mrben_math.jsonl"),
        Import(format="bigbench_mistake", path=data_dir / "steps/bigbench_mistake_arithmetic.jsonl"),
    ]
    gsm8k, math, mrben, bigbench = judge_eval(EQUATIONS, files, tmp_path)["sources"]
    assert [s["solutions"] for s in (gsm8k, math, mrben, bigbench)] == [400, 1000, 918, 300]
    assert (gsm8k["erroneous"], gsm8k["correct"]) == (207, 193)
    wrong = [
        (s["steps"]["people_wrong_judge_wrong"], s["steps"]["people_right_judge_wrong"]) for s in (gsm8k, math, mrben)
    ]
    assert all(by_people >= least for (by_people, _), least in zip(wrong, (13, 17, 17), strict=True)), wrong
    assert all(against <= most for (_, against), most in zip(wrong, (0, 3, 3), strict=True)), wrong
    assert gsm8k["correct_accuracy"] == math["correct_accuracy"] == 1.0
    assert bigbench["f1"] > 0.84
