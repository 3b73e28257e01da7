"""The report of a small run folder, every figure counted by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.records import Judge, JudgedSample, Label, LogRatios, Problem, Step, write_records
from megatron_stepkto.evaluation.table import Row
from megatron_stepkto.report.collect import collect
from megatron_stepkto.report.curves import read_training, thin
from megatron_stepkto.report.judge import agreement, calibration
from megatron_stepkto.report.page import FOLDER, counts, duration, embed, finding, write_report
from megatron_stepkto.report.solutions import (
    PositionShare,
    Solution,
    SolutionStep,
    choose,
    error_positions,
    solution_of,
)

HOSTILE = '</script><img src=x onerror="document.title=1">\u2028'


def judged(
    problem_id: str,
    lines: Sequence[tuple[str, Label]],
    outcome: Label,
    *,
    finish: str = "stop",
    answer: str = "1",
) -> JudgedSample:
    """Steps as lines of two tokens each; a span ends before its line break."""
    text, steps = "", []
    for index, (line, label) in enumerate(lines):
        steps.append(
            Step(
                start=len(text),
                end=len(text) + len(line),
                token_start=2 * index,
                token_end=2 * index + 2,
                label=label,
            )
        )
        text += line + "\n"
    return JudgedSample(
        problem_id=problem_id,
        sample_id=f"{problem_id}-0",
        prompt_token_ids=[1],
        token_ids=[1] * (2 * len(lines)),
        text=text,
        finish_reason=finish,
        steps=steps,
        outcome=outcome,
        extracted_answer=answer,
        judge=Judge(outcome="answer", process="equations"),
    )


def row(name: str, pass_at_1: float, share: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "split": "test",
        "num_problems": 3,
        "k": 8,
        "pass_at_1": pass_at_1,
        "pass_at_1_interval": [0.25, 0.75],
        "maj_at_k": 0.5,
        "maj_at_k_interval": [0.25, 0.75],
        "wrong_step_share_of_correct": share,
        "wrong_step_share_of_correct_interval": share and [0.1, 0.9],
        "wrong_step_rate_in_correct": 0.125,
        "wrong_step_rate_in_correct_interval": [0.1, 0.2],
        "num_correct": 1,
        "truncated_share": 0.0,
        "unparsed_share": 0.0,
        "undecided_share": 0.0,
        "mean_response_tokens": 12.5,
    }


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    write_records(
        folder / "evaluate/problems/problems.jsonl",
        [Problem(problem_id=name, problem=f"Problem {name}?", answer="7") for name in ("a", "b", "c")],
    )
    greedy = {
        "M0": [
            judged("a", [("1 + 1 = 2", 1), ("2 + 5 = 7", 1)], 1, answer="7"),
            judged("b", [("1 + 1 = 3", 0), (HOSTILE, 1), ("so 7", None)], 1, answer="7"),
            judged("c", [("2 + 2 = 5", 0)], 0, finish="length"),
        ],
        "M1": [judged(name, [("1 + 6 = 7", 1)], 1, answer="7") for name in ("a", "b", "c")],
    }
    rows = [row("M0", 0.5, 0.5), row("M1", 0.75, None)]
    for (name, samples), one in zip(greedy.items(), rows, strict=True):
        write_records(folder / f"evaluate/{name}/greedy.jsonl", samples)
        write_json(folder / f"evaluate/{name}/metrics.json", one)
    write_lines(
        folder / "iteration_1/train/metrics.jsonl",
        [
            {
                "update": 1,
                "num_updates": 2,
                "loss": 1.5,
                "log_ratio_right": None,
                "num_right": 3,
                "num_wrong": 1,
            },
            {
                "update": 2,
                "num_updates": 2,
                "loss": 1.25,
                "log_ratio_right": 0.5,
                "num_right": 2,
                "num_wrong": 2,
            },
            {"update": 2, "held_out": {"step_margin": 0.75, "num_right": 4}},
        ],
    )
    write_json(
        folder / "summary.json",
        {
            "recipe": "small",
            "seed": 3,
            "method": "step_kto",
            "iterations": rows,
            "seconds": 61.0,
            "stages": [{"name": "iteration_1/train", "seconds": 12.3, "counts": {"updates": 2}}],
        },
    )
    return folder


def test_a_finished_run_is_read_whole(run_dir: Path) -> None:
    report = collect(run_dir)
    assert [one.pass_at_1 for one in report.summary.iterations] == [0.5, 0.75]
    (training,) = report.trainings["step_kto"]
    assert training.updates["update"] == [1, 2]
    assert training.updates["loss"] == [1.5, 1.25]
    assert training.updates["log_ratio_right"] == [None, 0.5]
    assert training.held_out["update"] == [2]
    assert training.held_out["step_margin"] == [0.75]
    assert (training.totals["num_right"], training.totals["num_wrong"]) == (5, 3)
    assert report.positions["M0"] == [PositionShare("1", 3, 2), PositionShare("2", 2, 0)]
    assert report.positions["M1"] == [PositionShare("1", 3, 0)]
    assert report.browser.models == ["M0", "M1"]
    assert report.browser.selected == "M1"
    # Problem b comes first: M0 reached its answer over a wrong step.
    assert [problem.problem_id for problem in report.browser.problems] == ["b", "a", "c"]
    (solution,) = report.browser.problems[0].solutions["M0"]
    assert [(step.label, step.text) for step in solution.steps] == [(0, "1 + 1 = 3"), (1, HOSTILE), (None, "so 7")]
    assert report.browser.problems[2].solutions["M0"][0].truncated
    assert list(report.missing) == []


def test_the_page_shows_figures_and_keeps_model_text_as_data(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    assert "From M0 to M1, pass@1 rose from 50.0% to 75.0%, on 3 held-out problems." in html
    assert '<td data-metric="pass_at_1">75.0% <span class="interval">25.0 – 75.0</span></td>' in html
    assert '<td data-metric="wrong_step_share_of_correct">–</td>' in html
    assert "1 min 1 s" in html
    assert html.count("</script>") == 3  # the data, KaTeX and the script: text of a model ends none
    katex = (FOLDER / "katex" / "katex.min.js").read_text()
    assert katex in html
    own = html.replace(katex, "")
    assert "<img" not in own
    assert set(re.findall(r"https?://[\w./]+", own)) == {"http://www.w3.org/2000/svg"}  # a name: nothing is fetched


def test_counts_and_durations_read_as_text() -> None:
    assert counts({"steps": {"right": 5}, "held_out": 2}) == "steps (right 5), held out 2"
    assert [duration(s) for s in (None, 9.54, 59.97, 3725)] == ["–", "9.5 s", "1 min 0 s", "1 h 2 min"]


def test_embedded_data_survive_the_escaping() -> None:
    text = embed({"text": HOSTILE + "<!--"})
    assert "<" not in text
    assert json.loads(text) == {"text": HOSTILE + "<!--"}
    assert json.loads(embed("a lone surrogate \ud800")) == "a lone surrogate ?"


def test_an_unfinished_run_says_what_is_missing(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    write_json(
        run_dir / "evaluate/M1/manifest.json",
        {"stage": "evaluate", "key": {}, "outputs": {}, "counts": {"problems": 3}, "seconds": 2.0},
    )
    report = collect(run_dir)
    assert [one.name for one in report.summary.iterations] == ["M0", "M1"]
    assert [(stage.name, stage.seconds) for stage in report.summary.stages] == [("evaluate/M1", 2.0)]
    assert list(report.missing) == ["The run is not finished (no summary.json): the page shows what exists so far."]
    assert "The run is not finished" in write_report(run_dir).read_text()


def test_a_run_without_evaluation_still_gives_a_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "run/iteration_1/train/metrics.jsonl", [{"update": 1, "loss": 0.5}])
    write_json(
        tmp_path / "run/summary.json",
        {"recipe": "gsm8k", "seed": 0, "method": "step_kto", "iterations": [], "seconds": 9.5},
    )
    html = write_report(tmp_path / "run").read_text()
    assert "No model has been evaluated" in html
    assert 'id="training-charts"' in html
    assert 'id="table"' not in html
    assert 'id="list"' not in html


def test_compared_methods_bring_their_last_model(run_dir: Path) -> None:
    for name in ("M1", "M10", "M9"):
        write_records(run_dir / f"methods/kto/evaluate/{name}/greedy.jsonl", [judged("a", [(name, 1)], 1)])
    write_lines(run_dir / "methods/kto/iteration_1/train/metrics.jsonl", [{"update": 1, "loss": 0.25}])
    summary = json.loads((run_dir / "summary.json").read_text())
    write_json(run_dir / "summary.json", {**summary, "methods": {"kto": [row("M0", 0.5, 0.5), row("M1", 0.6, 0.4)]}})
    report = collect(run_dir)
    assert report.browser.models == ["M0", "M1", "kto M10"]
    assert report.browser.selected == "M1"
    assert report.trainings["kto"][0].updates["loss"] == [0.25]
    assert list(report.positions) == ["M0", "M1"]
    html = write_report(run_dir).read_text()
    table = html[html.index('id="methods-table"') :]
    assert '<th scope="row">kto M1</th>' in table
    assert "60.0%" in table


@pytest.mark.parametrize(
    ("after", "said"),
    [(0.5, "pass@1 stayed at 50.0%"), (0.25, "fell from 50.0% to 25.0%"), (0.75, "rose from 50.0% to 75")],
)
def test_the_finding(after: float, said: str) -> None:
    found = finding([Row.model_validate(row("M0", 0.5, None)), Row.model_validate(row("M3", after, None))])
    assert found is not None
    assert said in found


def test_each_data_set_has_a_table(run_dir: Path) -> None:
    def parts(name: str, share: float) -> dict[str, Any]:
        whole = row(name, share, 0.5)
        inner = {key: value for key, value in whole.items() if key not in ("name", "split", "k")}
        sets = {"amc": {**inner, "pass_at_1": share / 2, "num_problems": 1}, "math": {**inner, "num_problems": 2}}
        return {**whole, "by": {"data": sets}}

    summary = json.loads((run_dir / "summary.json").read_text())
    rows = {
        "iterations": [parts("M0", 0.5), parts("M1", 0.75)],
        "methods": {"kto": [parts("M0", 0.5), parts("M1", 0.7)]},
    }
    write_json(run_dir / "summary.json", {**summary, **rows})
    html = write_report(run_dir).read_text()
    tables = {name: html[html.index(f'id="{name}"') :].partition("</table>")[0] for name in
              ("table", "table-1", "table-2", "methods-table-1", "methods-table-2")}  # fmt: skip
    assert html.count("<h3>amc: 1 problems</h3>") == 2
    assert ["75.0%" in tables["table"], "37.5%" in tables["table"]] == [True, False]
    assert ["25.0%" in tables["table-1"], "37.5%" in tables["table-1"]] == [True, True]
    assert ["75.0%" in tables["table-2"], "37.5%" in tables["table-2"]] == [True, False]
    assert "kto M1" in tables["methods-table-1"] and "35.0%" in tables["methods-table-1"]
    assert "70.0%" in tables["methods-table-2"]


@pytest.mark.parametrize("create", [False, True])
def test_no_run_is_a_user_error(tmp_path: Path, create: bool) -> None:
    folder = tmp_path / "nothing"
    if create:
        folder.mkdir()
    with pytest.raises(UserError, match="nothing: expected the folder of a run"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_broken_metrics_line_is_named_and_a_cut_last_line_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "loss": 1.0}\n{"update": 2, "lo')
    training = read_training(path, "Iteration 1")
    assert training.updates["loss"] == [1.0]
    assert list(training.notes) == ["Iteration 1: the last line of metrics.jsonl is cut short and was left out."]
    path.write_text('{"update": 1, "loss": 1.0}\n{"update": 2, "lo\n{"update": 3, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected a row of training metrics"):
        read_training(path, "Iteration 1")


def test_a_diverged_training_is_noted_and_its_nan_is_a_gap(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 1.0}, {"update": 2, "loss": float("nan")}])
    training = read_training(path, "Iteration 1")
    assert training.updates["loss"] == [1.0, None]
    assert "1 values are not finite" in training.notes[0]


def test_a_resumed_training_counts_an_update_once(tmp_path: Path) -> None:
    rows = [
        {"update": 1, "loss": 3.0, "tokens": 10},
        {"update": 2, "loss": 2.0, "tokens": 10},
        {"update": 2, "loss": 2.5, "tokens": 10},
    ]
    training = read_training(write_lines(tmp_path / "metrics.jsonl", rows), "Iteration 1")
    assert training.updates["loss"] == [3.0, 2.5]
    assert training.totals["tokens"] == 20


def test_the_trainers_warnings_are_shown(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 1.0}])
    (tmp_path / "notes.json").write_text('{"warnings": ["update 30: the log-ratio fell"]}')
    assert list(read_training(path, "Iteration 1").notes) == ["Iteration 1, update 30: the log-ratio fell"]


def test_the_balance_is_shown(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 1.0}])
    weights = {"right": 3.0, "wrong": 1.0, "desirable_weight": 1.0, "undesirable_weight": 2.25, "ratio": 1.333}
    write_json(tmp_path / "notes.json", {"balance": {"outcome": weights}})
    assert list(read_training(path, "Iteration 1").notes) == [
        "Iteration 1, pull of right over wrong: outcomes 1.333 (right 3 x 1, wrong 1 x 2.25)."
    ]


def test_one_sided_labels_stand_in_a_banner(run_dir: Path) -> None:
    """Also of a run that stopped there, and has no summary."""
    (run_dir / "summary.json").unlink()
    counts = {"samples": 6, "wrong": 6, "warnings": ["all 6 judged answers are wrong"]}
    write_json(
        run_dir / "iteration_1/judge/manifest.json", {"key": {}, "outputs": {}, "seconds": 1.0, "counts": counts}
    )
    html = write_report(run_dir).read_text()
    banner = re.search(r'<ul class="notice alarm" id="warnings" role="alert">(.*?)</ul>', html)
    assert banner and banner[1] == "<li>iteration_1/judge: all 6 judged answers are wrong</li>"
    assert "samples 6, wrong 6<" in html


def test_thinning_takes_means_and_leaves_nulls_out() -> None:
    assert thin([1.0, 3.0, None, 5.0, None, None], limit=3) == [2.0, 5.0, None]
    assert thin([1.0, None], limit=2) == [1.0, None]


def test_no_text_is_lost_between_steps() -> None:
    sample = JudgedSample(
        problem_id="p",
        sample_id="p-0",
        prompt_token_ids=[1],
        token_ids=[1, 2],
        text="  First;\n\nSecond. tail",
        finish_reason="stop",
        steps=[
            Step(start=2, end=8, token_start=0, token_end=1, label=1),
            Step(start=10, end=17, token_start=1, token_end=2, label=0),
        ],
        outcome=1,
        judge=Judge(outcome="answer", process="none"),
    )
    assert solution_of(sample).steps == (SolutionStep(1, "  First;"), SolutionStep(0, "Second. tail"))


def test_members_of_a_combined_judge_stand_beside_the_step() -> None:
    """In the page's data; steps of a single judge carry nothing more than before."""
    step = SolutionStep(None, "x", members={"equations": (0, None), "llm:j": (1, 2 / 3)})
    plain, combined = Solution(1, "7", False, (SolutionStep(1, "x"), step)).payload()["steps"]
    assert plain == [1, "x"]
    assert combined == [None, "x", 0, 0, None, {"equations": [0, None], "llm:j": [1, 0.667]}]


def test_late_positions_are_pooled() -> None:
    labels: list[Label] = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, None]
    shares = error_positions([solution_of(judged("p", [("x", label) for label in labels], 1))])
    assert len(shares) == 10
    assert shares[8] == PositionShare("9", 1, 0)
    assert shares[9] == PositionShare("10+", 3, 2)


def test_the_page_keeps_the_same_problems_for_every_model() -> None:
    plain, lucky = [solution_of(judged("x", [("1", 1)], 1))], [solution_of(judged("x", [("1", 0)], 1))]
    solutions = {"M0": {"a": plain, "b": plain, "c": lucky}, "M1": {"a": plain, "b": plain, "c": plain}}
    everything, _ = choose({}, solutions, 10_000)
    assert [problem.problem_id for problem in everything] == ["c", "a", "b"]
    small, num_problems = choose({}, solutions, 500)
    assert num_problems == 3
    assert [problem.problem_id for problem in small] == ["c", "a"]
    assert all(set(problem.solutions) == {"M0", "M1"} for problem in small)


def voted(outcome: Label, *votes: Sequence[int]) -> Solution:
    steps = tuple(SolutionStep(1 if sum(each) * 2 > len(each) else 0, "x", len(each), sum(each)) for each in votes)
    return Solution(outcome, "1", False, steps)


def test_the_judge_is_set_against_the_answers() -> None:
    plain = [
        solution_of(judged("p", [("x", label) for label in labels], outcome))
        for labels, outcome in (
            ((1, 1), 1), ((1, None), 1), ((1, 1), 0),   # no wrong step: 2 of 3 right
            ((1, 0), 1), ((0, 1), 0),                   # one: 1 of 2
            ((0, 0, 0), 0),                             # three: none of 1
            ((None, None), 1),                          # not judged
            ((1, 1), None),                             # undecided answers take no part
        )
    ]  # fmt: skip
    rows = agreement(plain)
    assert [(row.title, row.num, row.share) for row in rows] == [
        ("no wrong step", 3, 2 / 3),
        ("one wrong step", 2, 0.5),
        ("two wrong steps or more", 1, 0.0),
        ("no step judged", 1, 1.0),
    ]
    # Wilson's interval of 2 of 3 with z = 1.959964, by hand: (2/3 + z²/6 ± z √(2/27 + z²/36)) / (1 + z²/3)
    assert rows[0].share_interval == pytest.approx((0.20766, 0.93851), abs=1e-5)
    assert calibration(plain) == []  # single verdicts carry no votes


def test_calibration_goes_by_the_step_with_fewest_votes() -> None:
    rows = calibration(
        [
            voted(1, [1, 1, 1, 1], [1, 1, 1, 1]),  # weakest 1.0: the last bin
            voted(1, [1, 1, 1, 1], [1, 1, 1, 0]),  # 0.75: 60-80%
            voted(0, [1, 1, 1, 0], [1, 1, 1, 1]),
            voted(0, [0, 0, 0, 0], [1, 1, 1, 1]),  # 0: 0-20%
            voted(None, [0, 0, 0, 0]),
        ]
    )
    assert [(row.title, row.num, row.share) for row in rows] == [
        ("0–20%", 1, 0.0),
        ("60–80%", 2, 0.5),
        ("80–100%", 1, 1.0),
    ]


def test_training_samples_bring_votes_and_log_ratios(run_dir: Path) -> None:
    first = judged("t", [("1 + 1 = 2", 1), ("2 + 2 = 5", 0)], 1)
    steps = [first.steps[0], first.steps[1].model_copy(update={"votes": [0, 1, 0, None]})]
    first = first.model_copy(update={"steps": steps})
    second = judged("t", [("1 + 1 = 2", 1)], 0).model_copy(update={"sample_id": "t-1"})
    folder = run_dir / "iteration_1"
    write_records(folder / "judge/judged.jsonl", [first, second])
    write_records(folder / "train/log_ratios.jsonl", [LogRatios(example_id="t-0", steps=[0.25, -1.5])])
    write_records(folder / "problems/problems.jsonl", [Problem(problem_id="t", problem="Trained?", answer="1")])
    report = collect(run_dir)
    assert list(report.browser.iterations) == ["samples 1"]
    problem = report.browser.problems[-1]
    assert problem.problem == "Trained?"
    assert problem.payload()["solutions"]["samples 1"] == [
        {
            "outcome": 1, "answer": "1", "truncated": False,
            "steps": [[1, "1 + 1 = 2", 0, 0, 0.25], [0, "2 + 2 = 5", 1, 4, -1.5]],
        },
        {"outcome": 0, "answer": "1", "truncated": False, "steps": [[1, "1 + 1 = 2"]]},
    ]  # fmt: skip
    assert [(row.title, row.num, row.share) for row in report.agreement] == [
        ("no wrong step", 1, 0.0),
        ("one wrong step", 1, 1.0),
    ]
    assert "one wrong step" in write_report(run_dir).read_text()
    # judged again since: the log-ratios are of other steps
    for stage, manifest in (
        ("judge", {"key": {}, "outputs": {"judged.jsonl": {"sha256": "new"}}, "counts": {}, "seconds": 0.0}),
        ("dataset", {"key": {"inputs": {"judged": {"sha256": "old"}}}, "outputs": {}, "counts": {}, "seconds": 0.0}),
    ):
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "manifest.json").write_text(json.dumps(manifest))
    [shown, _] = collect(run_dir).browser.problems[-1].payload()["solutions"]["samples 1"]
    assert shown["steps"] == [[1, "1 + 1 = 2"], [0, "2 + 2 = 5", 1, 4]]


def test_imported_solutions_are_shown_with_their_problems(run_dir: Path) -> None:
    """An import writes its problems beside the judged solutions: such a run has no stage of problems."""
    judge = run_dir / "iteration_1/judge"
    write_records(judge / "judged.jsonl", [judged("t", [("1 + 1 = 2", 1)], 1)])
    write_records(judge / "problems.jsonl", [Problem(problem_id="t", problem="Imported?", answer="1")])
    assert "Imported?" in [problem.problem for problem in collect(run_dir).browser.problems]
