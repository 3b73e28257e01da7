"""Finding and normalising final answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.answers.text import normalise


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Tom has 2 + 3 = 5.\nAnswer: \boxed{5}", "5"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"so $\boxed{\left\{ x \right.}$", r"\left\{ x \right."),
        (r"\boxed{ {a}_{b} }", "{a}_{b}"),
        (r"$\framebox{204}$ minutes", "204"),
        (r"Thus \boxed 7$", "7"),
        (r"Answer: \boxed{1", None),  # cut while it wrote the answer
        (r"\boxed{}", None),
        ("6 * 2 = <<6*2=12>>12\n#### 1,012", "1,012"),
        ("so he has 80.\nA: 80", "80"),
        ("Answer: 12\nno, Answer: 13", "13"),
        ("**Answer:** 42**", "42"),
        ("Final Answer: $x=2$", "$x=2$"),
        ("The answer is 3.5. Done", "3.5"),
        ("the answer is 18.", "18"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$x = \boxed{1}$ papers and $y = \boxed{2}$ bins", "1, 2"),
        (r"\boxed{15\frac{39}{40}}$ or $\boxed{\frac{639}{40}}", r"\frac{639}{40}"),
        (r"\boxed{49}, that is \boxed{49}", "49"),
        (r"half is \boxed{200}. The final answer is $455$. I hope it is correct.", "$455$"),
        (r"\boxed{80}. Rounding before the final answer is a common mistake.", "80"),
        ("答案：12。", "12"),
        ("#### 5\n\nQuestion: 2 + 2?\nAnswer: #### 4", "5"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("025", "25"),
        ("000", "0"),
        ("27.0", "27"),
        ("+.50", "0.5"),
        ("-0.0", "0"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("1 000", "1000"),
        ("(1,2)", "(1,2)"),
        (r"\$1,000.99", "1000.99"),
        (r"$\dfrac{3}{4}$.", r"\frac{3}{4}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{12}", r"\frac{1}{12}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\textbf{(073)}", "73"),
        (r"\text{(C)}", "C"),
        ("18 dollars", "18"),
        (r"15\mbox{ cm}^2", "15"),
        (r"30^\circ", "30"),
        (r"20\%", "20"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"2 \sqrt{5}", r"2\sqrt{5}"),
        ("5m", "5m"),  # a product, not metres
        ("x^2 + 1", "x^2+1"),
    ],
)
def test_normalise(answer: str, form: str) -> None:
    assert normalise(answer) == form


def test_every_published_gold_answer_is_found(data_dir: Path) -> None:
    """AIME answers are zero padded; among the boxes are \\framebox{204} and \\boxed{\\textbf{(073)}}."""
    rows = [json.loads(line) for line in (data_dir / "eval/aime24.jsonl").open()]
    assert all(normalise(extract_answer(row["solution"]) or "") == normalise(row["answer"]) for row in rows)
    rows = [json.loads(line) for line in (data_dir / "eval/gsm8k_test.jsonl").open()]
    assert all(normalise(extract_answer(row["solution"]) or "") == normalise(row["answer"]) for row in rows)


def test_a_hostile_text_takes_linear_time() -> None:
    begun = time.process_time()  # not the clock: the machine may be busy
    extract_answer("\\boxed{" * 30_000)
    extract_answer("{" * 100_000 + "\\boxed{1}" + "}" * 100_000)
    for text in (
        "answer " * 30_000,
        "answer is " * 20_000,
        "<answer>" * 50_000,
        "<answer>x y is (" * 20_000,
        "A: 1\n" * 50_000,
        "answer:" + "\n" * 200_000,
        "answer is 5" + " " * 9000 + "x",
        "answer is 5" + ", it" * 100_000,
        "\\boxed{1} and " * 20_000,
        "**a" * 100_000,
    ):
        extract_answer(text)
    for text in (
        "5 " + "cm " * 3000,
        "1" * 9000,
        "5" + " " * 9000 + "x",
        "\\text{" * 1500,
        "\\frac" * 1800,
        "1," * 4500,
    ):
        normalise(text)
    assert time.process_time() - begun < 60  # a second or two; what grows with the square takes many minutes
