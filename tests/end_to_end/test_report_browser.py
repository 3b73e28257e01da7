"""The report as a reader uses it, in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.records import Judge, JudgedSample, Label, LogRatios, Problem, Step, write_records
from megatron_stepkto.report.page import write_report

pytestmark = pytest.mark.browser

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> = 2"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# problem -> labels of the steps and outcome, for M0 and M1; the first line of "hostile" is markup.
GREEDY: dict[str, dict[str, tuple[list[Label], Label]]] = {
    "M0": {
        "plain": ([1, 1, 1], 1),
        "lucky": ([0, 1, 1], 1),
        "hostile": ([1, 0, None], 1),
        "failed": ([1, 0, 0], 0),
        "open": ([1, 1, None], None),
    },
    "M1": {
        "plain": ([1, 1, 1], 1),
        "lucky": ([1, 1, 1], 1),
        "hostile": ([1, 1, None], 1),
        "failed": ([0, 1, 1], 1),
        "open": ([1, 0, 0], 0),
    },
}


def solution(problem: str, labels: list[Label], outcome: Label) -> JudgedSample:
    lines = [f"{problem} has {index} + 1 = {index + 1}." for index in range(len(labels))]
    if problem == "hostile":
        lines[0] = HOSTILE
    starts = [sum(len(line) + 1 for line in lines[:index]) for index in range(len(lines))]
    return JudgedSample(
        problem_id=problem,
        sample_id=f"{problem}-0",
        prompt_token_ids=[1],
        token_ids=[1] * len(lines),
        text="\n".join(lines),
        finish_reason="length" if problem == "open" else "stop",
        steps=[
            Step(start=start, end=start + len(line), token_start=index, token_end=index + 1, label=label)
            for index, (start, line, label) in enumerate(zip(starts, lines, labels, strict=True))
        ],
        outcome=outcome,
        extracted_answer="3",
        judge=Judge(outcome="answer", process="equations"),
    )


def trained(sample_id: str, lines: list[str], labels: list[Label], votes: list[list[Label]] | None) -> JudgedSample:
    starts = [sum(len(line) + 1 for line in lines[:index]) for index in range(len(lines))]
    return JudgedSample(
        problem_id="t",
        sample_id=sample_id,
        prompt_token_ids=[1],
        token_ids=[1] * len(lines),
        text="\n".join(lines),
        finish_reason="stop",
        steps=[
            Step(
                start=start, end=start + len(lines[n]), token_start=n, token_end=n + 1,
                label=labels[n], votes=votes and votes[n],
            )
            for n, start in enumerate(starts)
        ],
        outcome=1,
        extracted_answer="1",
        judge=Judge(outcome="answer", process="llm"),
    )  # fmt: skip


FORMULAS = [r"\[x^2 = \boxed{\frac{1}{2}}\]", r"so \(y \le 3\) and $$\undefinedmacro{z}$$", "It costs $5 and $6."]
TRAINED = [
    trained("t-0", FORMULAS, [1, 0, 1], [[1, 1, 1], [0, 0, 1], [1, 1, 1]]),
    trained("t-1", ["1 + 1 = 2"], [1], [[1, 1, 0]]),
]


def evaluation(name: str, pass_at_1: float) -> dict[str, Any]:
    rates = {
        "pass_at_1": pass_at_1,
        "cot_pass_at_1": pass_at_1 / 2,
        "maj_at_k": 0.8,
        "wrong_step_share_of_correct": 0.25,
        "wrong_step_rate_in_correct": 0.125,
    }
    intervals = {f"{key}_interval": [value / 2, value] for key, value in rates.items()}
    return {"name": name, "split": "test", "num_problems": 5, "k": 8, **rates, **intervals}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("runs") / "browsed"
    write_records(run / "iteration_1/judge/judged.jsonl", TRAINED)
    write_records(run / "iteration_1/train/log_ratios.jsonl", [LogRatios(example_id="t-0", steps=[0.25, -1.5, 0.0])])
    write_records(
        run / "iteration_1/problems/problems.jsonl",
        [Problem(problem_id="t", problem=r"What is $\frac{1}{2} + \frac12$, at $5 or $6 each?", answer=r"\frac{2}{2}")],
    )
    write_records(
        run / "evaluate/problems/problems.jsonl",
        [Problem(problem_id=name, problem=f"The {name} problem. How many?", answer="3") for name in GREEDY["M0"]],
    )
    for model, rows in GREEDY.items():
        write_records(run / f"evaluate/{model}/greedy.jsonl", [solution(name, *row) for name, row in rows.items()])
    metrics = run / "iteration_1/train/metrics.jsonl"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(
        "".join(
            json.dumps({"update": n, "loss": 2 - n / 10, "log_ratio_right": n / 10, "log_ratio_wrong": -n / 10}) + "\n"
            for n in range(1, 9)
        )
    )
    write_json(
        run / "summary.json",
        {
            "recipe": "browsed",
            "seed": 1,
            "method": "step_kto",
            "seconds": 5.0,
            "iterations": [evaluation("M0", 0.6), evaluation("M1", 0.8)],
        },
    )
    return write_report(run).as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ.setdefault("SE_AVOID_STATS", "true")
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.set_page_load_timeout(30)
    yield session
    session.quit()


def open_page(chromium: Any, page: str, width: int = 1200) -> None:
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    chromium.get(page)


def texts(chromium: Any, selector: str) -> list[str]:
    return [node.text for node in chromium.find_elements("css selector", selector)]


def click(chromium: Any, selector: str) -> None:
    chromium.find_element("css selector", selector).click()


def listed(chromium: Any) -> list[str]:
    return [node.get_attribute("data-problem") for node in chromium.find_elements("css selector", "#list button")]


def test_the_page_opens_without_console_errors_and_shows_the_table(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert chromium.title == "browsed: run report"
    assert texts(chromium, "#table tbody th") == ["M0", "M1"]
    assert texts(chromium, "#table td[data-metric=pass_at_1]") == ["60.0%\n30.0 – 60.0", "80.0%\n40.0 – 80.0"]
    assert texts(chromium, "#table td[data-metric=cot_pass_at_1]") == ["30.0%\n15.0 – 30.0", "40.0%\n20.0 – 40.0"]
    assert texts(chromium, "#table td[data-metric=wrong_step_share_of_correct]") == ["25.0%\n12.5 – 25.0"] * 2
    assert texts(chromium, "#curves h3") == [
        "pass@1",
        "CoT-pass@1",
        "maj@8",
        "Right answers with a wrong step",
        "Wrong steps in right answers",
    ]
    assert texts(chromium, "#training-charts h3") == ["Loss", "Log-ratio of solutions"]
    assert len(chromium.find_elements("css selector", "#curves svg path.band")) == 5


def test_a_chart_reads_out_the_value_under_the_arrow_keys(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    readout = "#training-charts figure:nth-of-type(2) .readout"
    figure = chromium.find_element("css selector", "#training-charts figure:nth-of-type(2)")
    assert texts(chromium, readout) == ["Iteration 1, update 8\nright 0.800\nwrong −0.800"]
    chart = figure.find_element("css selector", "svg")
    chart.send_keys("\ue012", "\ue012")  # arrow left: first the last update, then the one before it
    assert texts(chromium, readout) == ["Iteration 1, update 7\nright 0.700\nwrong −0.700"]


def test_filters_and_search_narrow_the_list(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    assert listed(chromium)[0] == "failed"  # M1 is shown first, and its one right answer over a wrong step
    click(chromium, "#model [data-key=M0]")
    assert set(listed(chromium)) == set(GREEDY["M0"])
    click(chromium, "#filter [data-key=lucky]")
    assert set(listed(chromium)) == {"lucky", "hostile"}
    click(chromium, "#filter [data-key=wrong]")
    assert listed(chromium) == ["failed"]
    click(chromium, "#filter [data-key=truncated]")
    assert listed(chromium) == ["open"]
    click(chromium, "#filter [data-key=all]")
    chromium.find_element("css selector", "#search").send_keys("LUCKY has 2 + 1")
    assert listed(chromium) == ["lucky"]
    assert texts(chromium, "#found") == ["1 solution"]


def test_a_solution_opens_with_marked_steps_and_compares_models(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    click(chromium, "#model [data-key=M0]")
    click(chromium, "#list [data-problem=lucky]")
    steps = chromium.find_elements("css selector", "#detail .steps li")
    assert [step.get_attribute("class") for step in steps] == ["wrong", "right", "right"]
    assert [step.text.split("\n") for step in steps] == [
        [mark, f"lucky has {n} + 1 = {n + 1}."] for n, mark in enumerate("✗✓✓")
    ]
    red, green = (step.value_of_css_property("border-left-color") for step in steps[:2])
    assert red != green
    assert texts(chromium, "#detail .problem") == ["The lucky problem. How many?"]
    assert texts(chromium, "#detail dd") == ["right answer, wrong step", "3", "3"]
    click(chromium, "#detail .tabs [data-source=M1]")
    steps = chromium.find_elements("css selector", "#detail .steps li")
    assert [step.get_attribute("class") for step in steps] == ["right", "right", "right"]


def test_markup_in_a_solution_stays_text(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    click(chromium, "#list [data-problem=hostile]")
    assert texts(chromium, "#detail .steps .text")[0] == HOSTILE
    assert texts(chromium, "#detail .steps .mark")[2] == "·"
    assert chromium.find_elements("css selector", "img") == []
    assert chromium.title == "browsed: run report"


def test_the_page_fits_a_phone(chromium: Any, page: str) -> None:
    open_page(chromium, page, width=390)
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
    click(chromium, "#model [data-key=M0]")
    click(chromium, "#list [data-problem=hostile]")
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
    detail = chromium.find_element("css selector", "#detail")
    assert 0 <= chromium.execute_script("return arguments[0].getBoundingClientRect().left", detail) < 390
    assert chromium.execute_script("return arguments[0].getBoundingClientRect().top < innerHeight", detail)


def test_training_samples_show_votes_log_ratios_and_formulas(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    click(chromium, '#model [data-key="samples 1"]')
    assert listed(chromium) == ["t", "t"]
    assert texts(chromium, "#detail .tabs button") == ["samples 1 · 1 ✓✗", "samples 1 · 2 ✓"]
    assert texts(chromium, "#detail .votes") == ["3 of 3 votes", "1 of 3 votes", "3 of 3 votes"]
    assert texts(chromium, "#detail .ratio") == ["+0.25", "−1.50", "0.00"]
    assert [node.get_attribute("class") for node in chromium.find_elements("css selector", "#detail .ratio")] == [
        "ratio grew",
        "ratio fell",
        "ratio stayed",
    ]
    (first, second, third) = chromium.find_elements("css selector", "#detail .steps .text")
    assert first.find_element("css selector", "math").get_attribute("display") == "block"
    assert len(first.find_elements("css selector", "math mfrac, math menclose, math msup")) == 3
    # A formula that cannot be read stays text, whole; the one beside it is drawn.
    assert [node.get_attribute("title") for node in second.find_elements("css selector", "math")] == [r"y \le 3"]
    assert r"$$\undefinedmacro{z}$$" in second.text
    assert third.text == "It costs $5 and $6."  # money is no formula
    problem = chromium.find_element("css selector", "#detail .problem")
    assert len(problem.find_elements("css selector", "math")) == 1
    assert problem.text.endswith("at $5 or $6 each?")
    assert len(chromium.find_elements("css selector", "#detail .facts math mfrac")) == 1  # the gold answer
    click(chromium, '#detail .tabs [data-source="samples 1 · 2"]')
    assert texts(chromium, "#detail .steps .text") == ["1 + 1 = 2"]
    assert texts(chromium, "#detail .ratio") == []


def test_the_judge_is_set_against_the_answers(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    assert texts(chromium, "#agreement tbody th") == ["no wrong step", "one wrong step"]
    assert [cell.split("\n")[0] for cell in texts(chromium, "#agreement tbody td:nth-child(3)")] == ["100.0%", "100.0%"]
    assert texts(chromium, "#calibration-chart h3") == ["Calibration of the votes"]
    assert texts(chromium, "#calibration-chart svg .tick")[-3:-1] == ["20–40%", "60–80%"]


def test_thousands_of_real_solutions_are_drawn_without_a_message(chromium: Any, data_dir: Path, tmp_path: Path) -> None:
    """Every problem of MATH-500 six times over, with its real LaTeX: no console message, and formulas are drawn."""
    rows = [json.loads(line) for line in (data_dir / "eval/math500.jsonl").read_text().splitlines()]
    problems, solutions = [], []
    for copy in range(6):
        for row in rows:
            name = f"{row['unique_id']}#{copy}"
            problems.append(Problem(problem_id=name, problem=row["problem"], answer=row["answer"]))
            text = row["solution"].replace("\n\n", "\n")
            solutions.append(
                solution(name, [1], 1).model_copy(
                    update={"text": text, "steps": [Step(start=0, end=len(text), token_start=0, token_end=1, label=1)]}
                )
            )
    write_records(tmp_path / "run/evaluate/problems/problems.jsonl", problems)
    write_records(tmp_path / "run/evaluate/M0/greedy.jsonl", solutions)
    page = write_report(tmp_path / "run")
    assert page.stat().st_size < 6_000_000
    open_page(chromium, page.as_uri())
    drawn, left = chromium.execute_script(
        """
        let drawn = 0, left = [];
        for (const { problem, solutions } of data.browser.problems.slice(0, 500)) {
          for (const text of [problem, solutions.M0[0].steps[0][1]]) {
            const holder = document.createElement("div");
            holder.append(...typeset(text));
            document.getElementById("detail").replaceChildren(holder);
            drawn += holder.querySelectorAll("math").length;
            const found = holder.textContent.match(/.{0,60}\\\\(frac|sqrt|boxed|begin).{0,60}/s);
            if (found) left.push(found[0]);
          }
        }
        return [drawn, left];
        """
    )
    assert drawn > 5000
    assert len(left) <= 10, "\n".join(map(repr, left))  # Asymptote pictures and macros that KaTeX lacks stay text
    messages = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert messages == []
