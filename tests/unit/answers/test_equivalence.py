"""Answer equivalence on hand-made pairs and on real answers. Those for computer algebra share one checker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_stepkto.answers import exact
from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from tests.unit.base.test_processes import assert_ends


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("25", "025", True),
        ("27.0", "27", True),
        ("1000", "1,000.00", True),
        ("1/2", "0.5", True),
        (r"\frac{3}{4}", "0.75", True),
        (r"1\frac{1}{2}", "3/2", True),
        ("-1 1/2", "-1.5", True),
        ("0.5", r"50\%", True),
        ("1000.99", "1000,99", True),
        ("Evelyn", r"\text{evelyn}", True),
        ("(1, 1/2)", "(1.0, 0.5)", True),
        ("52", "53", False),
        ("1/3", "1/4", False),
        ("1/3", "0.25", False),
        ("A", "(B)", False),
        ("even", "odd", False),
        ("(1,2)", "(1,3)", False),
        ("1/3", "0.3333", None),  # a rounding or not: not certain
        ("listen", "silent", None),  # the same product of letters
        ("(1,2)", "[1,2]", None),
        (r"36^\circ", r"\$36", "units"),
        (r"5\text{ m}", r"500\text{ cm}", True),
        (r"5\text{ m}", r"5\text{ cm}", False),
        ("15 square feet", r"15\text{ ft}^2", True),
        ("15 square feet", "15 feet", "units"),
        ("1 hour", "60 minutes", True),
        ("10", "10 million", False),
        ("10000000", "10 million dollars", True),
        ("0.5", r"0.5\%", "percent"),
        ("1/2", r"0.5\%", "percent"),
        ("20", r"20\%", True),
        ("1500", r"1.5 \times 10^3", True),
        ("1500", "1.5e3", True),
        ("2516_8", "2516_{8}", True),
        ("2516_8", "2516", True),
        ("2516_8", "2516_9", False),
        (r"101_{\text{two}}", "101_2", True),
        ("40", "40_9", "base"),
        ("54", "204_5", "base"),
        ("6", "six", True),
        ("5", "5 and six", None),
        ("12", "１２", True),
        (r"p=5,q=2\text{ and }p=7,q=2", "p = 5, q = 2; p = 7, q = 2", True),
        ("7" * 100_000, "7" * 100_000, True),
        ("7" * 100_000, "7" * 99_999 + "8", False),
        ("1,2", "12", None),
        (r"\sqrt{8}", r"2\sqrt{2}", None),
        ("1/0", "5", None),
        ("", "5", None),
    ],
)
def test_exact(gold: str, answer: str, expected: bool | str | None) -> None:
    """A text gives the reason for a doubt."""
    found = exact.compare(gold, answer)
    assert (found, type(found) is exact.Doubt) == (expected, isinstance(expected, str))


SHIFTED_AND_EQUAL = {("3", "3"), ("7", "7"), ("5", "x=5")}


def test_processes_start_only_when_needed() -> None:
    with EquivalenceChecker(workers=2, timeout_s=1.0) as checker:
        verdicts = checker.check_many([("5", "5.0"), ("5", "6"), ("5", "5.0")])
        assert [(v.verdict, v.how, v.label) for v in verdicts] == [
            ("right", "exact", 1),
            ("wrong", "exact", 0),
            ("right", "exact", 1),
        ]
        assert not checker._workers


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", "right"),
        ("x^2+2x+1", "(x+1)^2", "right"),
        ("1/3", "0.333333", "right"),
        (r"\{1,2\}", r"\{2,1\}", "right"),
        (r"\frac{1}{2^{99}}", r"2^{-99}", "right"),
        ("28%", r"0.28\cdot 1", "right"),
        ("1/2004!", "1/2006!", "wrong"),  # both nothing to six decimals
        ("1/2^{99}", "1/2^{98}", "wrong"),
        (r"4\sqrt{2}", "4", "wrong"),
        ("x+1", "x+2", "wrong"),
        (r"$1 - \frac{1}{\mathrm{e}}$", r"$1 + \frac{1}{\mathrm{e}}$", "wrong"),
        (r"(-\infty,2)", "x < 2", "right"),
        (r"(-\infty,2)", "x > 2", "wrong"),
        ("2^{100}", "2^{100}+1", "wrong"),
        (r"6 \text{ and } 8", "8,6", "right"),
    ],
)
def test_math_verify(checker: EquivalenceChecker, gold: str, answer: str, verdict: str) -> None:
    (found,) = checker.check_many([(gold, answer)])
    assert (found.verdict, found.how) == (verdict, "math-verify")


def test_what_cannot_be_compared_is_undecided(checker: EquivalenceChecker) -> None:
    (unparsed, long) = checker.check_many([("5", r"\frac{"), ("5", "x" * 20_000)])
    assert (unparsed.verdict, unparsed.how) == ("undecided", "unparsed")
    assert (long.verdict, long.how, long.label) == ("undecided", "too-long", None)


@pytest.mark.parametrize(
    ("gold", "answer", "how"),
    [
        (r"5\pi\text{ apples}", r"5\pi\text{ pears}", "doubt: units"),
        ("1:30", "2:60", "doubt: time or ratio"),
        (r"\{3,4\}", "(3,4)", "doubt: set or tuple"),
        ("1+" * 2000 + "1", "1+" * 2000 + "11", "unparsed"),  # some number of it must not stand for all
    ],
)
def test_what_computer_algebra_overlooks_is_undecided(
    checker: EquivalenceChecker, gold: str, answer: str, how: str
) -> None:
    (found,) = checker.check_many([(gold, answer)])
    assert (found.verdict, found.how) == ("undecided", how)


def test_gsm8k_model_solutions_agree_with_their_labels(data_dir: Path, checker: EquivalenceChecker) -> None:
    rows = [json.loads(line) for line in (data_dir / "samples/gsm8k_model_solutions.jsonl").open()]
    answers = [extract_answer(row["response"]) for row in rows]
    stated = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer is not None]
    assert not any(row["correct"] for row, answer in zip(rows, answers, strict=True) if answer is None)
    verdicts = checker.check_many([(row["answer"], answer) for row, answer in stated])
    assert [v.label for v in verdicts] == [int(row["correct"]) for row, _ in stated]
    assert sum(v.how != "exact" for v in verdicts) <= 1


def test_math500_solutions_match_their_answers(data_dir: Path) -> None:
    rows = [json.loads(line) for line in (data_dir / "eval/math500.jsonl").open()]
    assert all(exact.compare(row["answer"], extract_answer(row["solution"]) or "") is True for row in rows)


def test_exact_path_equates_no_other_math500_answers(data_dir: Path) -> None:
    """All 125,000 pairs of golds: those called equal differ in spelling or in a sign that names a unit."""
    golds = [json.loads(line)["answer"] for line in (data_dir / "eval/math500.jsonl").open()]
    equal = {(a, b) for a in golds for b in golds if a < b and exact.compare(a, b) is True}
    spelling = {(r"2 \sqrt{5}", r"2\sqrt{5}"), (r"\frac14", r"\frac{1}{4}"), (r"10,\!080", "10080")}
    units = {("15", r"15\mbox{ cm}^2"), ("36", r"\$36")}
    assert equal == spelling | units | {(n, rf"{n}^\circ") for n in ("120", "30", "36", "90")}


def stated_answer(text: str) -> str:
    """Of other graders' tests, whose golds are whole solutions too and whose texts need not state their answer."""
    return extract_answer(text) or text.strip()


def test_grader_triples(data_dir: Path, repository: Path, checker: EquivalenceChecker) -> None:
    """189 cases from the tests of seven graders, which compare any text; docs/answer_checking.md lists the
    differences with their reasons, and which texts state no answer, so that the judge compares nothing."""
    rows = [json.loads(line) for line in (data_dir / "equivalence/triples.jsonl").open()]
    verdicts = checker.check_many([(stated_answer(row["gold"]), stated_answer(row["pred"])) for row in rows])
    differ = {row["id"] for row, v in zip(rows, verdicts, strict=True) if (v.verdict == "right") != row["expected"]}
    page = (repository / "docs/answer_checking.md").read_text()
    listed = set(re.findall(r"^\| (eq-\d+) ", page, re.MULTILINE))
    assert len(rows) == 189
    assert len(differ) / len(rows) <= 0.05
    assert differ == listed
    (unstated,) = re.findall(r"state no answer: ((?:\d{4}[,.]\s+)+)", page)
    assert re.findall(r"\d{4}", unstated) == [row["id"][3:] for row in rows if extract_answer(row["pred"]) is None]


def test_choices(data_dir: Path) -> None:
    rows = [json.loads(line) for line in (data_dir / "equivalence/letters.jsonl").open()]
    found = [exact.compare(stated_answer(row["gold"]), stated_answer(row["pred"])) for row in rows]
    assert found == [row["expected"] for row in rows]


def test_gold_solutions_state_their_answers(data_dir: Path) -> None:
    """All of AIME24 and GSM8K; AMC23 has answers only, as floats, which equal what a model writes."""
    for name, count in (("aime24", 30), ("gsm8k_test", 1319)):
        rows = [json.loads(line) for line in (data_dir / f"eval/{name}.jsonl").open()]
        assert [exact.compare(str(row["answer"]), stated_answer(row["solution"])) for row in rows] == [True] * count
    answers = [json.loads(line)["answer"] for line in (data_dir / "eval/amc23.jsonl").open()]
    assert [exact.compare(str(answer), f"{answer:g}") for answer in answers] == [True] * 40


def test_shifted_pairs_agree_only_where_they_are_equal(data_dir: Path, checker: EquivalenceChecker) -> None:
    golds = [json.loads(line)["answer"] for line in (data_dir / "eval/math500.jsonl").open()]
    pairs = list(zip(golds, golds[1:] + golds[:1], strict=True))
    verdicts = checker.check_many(pairs)
    assert {pair for pair, v in zip(pairs, verdicts, strict=True) if v.verdict == "right"} == SHIFTED_AND_EQUAL
    assert sum(v.verdict == "undecided" for v in verdicts) <= 5


def test_load_changes_no_verdict() -> None:
    """Eight busy processes: pairs take many times longer by the clock, and use the same CPU time."""
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), ("9^{9^{9^9}}", "5"), ("(x+1)^{30}", "(x+1)^{29}(1+x)"), ("x", "x+1")]
    with EquivalenceChecker(workers=2, timeout_s=1.5) as checker:
        alone = checker.check_many(pairs)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        with EquivalenceChecker(workers=2, timeout_s=1.5) as checker:
            loaded = checker.check_many(pairs)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [(v.verdict, v.how) for v in alone] == [(v.verdict, v.how) for v in loaded]
    assert [v.how for v in alone] == ["math-verify", "timeout", "math-verify", "math-verify"]


def test_a_time_out_is_undecided_and_the_next_pair_is_decided() -> None:
    pairs = [("9^{9^{9^9}}", "5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("{" * 3000 + "}" * 3000, "1"), ("x", "x+1")]
    with EquivalenceChecker(workers=2, timeout_s=2.0) as checker:
        verdicts = checker.check_many(pairs)
    assert [v.how for v in verdicts] == ["timeout", "math-verify", "timeout", "math-verify"]
    assert [v.verdict for v in verdicts] == ["undecided", "right", "undecided", "wrong"]
    assert verdicts[0].milliseconds == 2000  # CPU time


PARENT = """
import sys
from megatron_stepkto.answers.equivalence import EquivalenceChecker
checker = EquivalenceChecker(1, 60.0)
checker.check_many([("x+1", "1+x")])
print(checker._workers[0]._process.pid, flush=True)
sys.stdin.read()
"""


def test_workers_die_with_their_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert_ends(worker)
