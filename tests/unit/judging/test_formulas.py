"""Equations of formulas: what the equations rule says of powers, roots, rounded values and unknowns."""

from __future__ import annotations

import pytest

import megatron_stepkto as sk
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.rules import RULES
from megatron_stepkto.steps.text import split_text


def labels(text: str, problem: str = "P") -> list[Label]:
    """Of each line of a solution."""
    return RULES["equations"](problem, text, split_text(text, "line"))


RIGHT = r"""
$\sqrt{50} = 5\sqrt{2}$
$\sqrt[3]{-8} = -2$
$2^{-3} = \frac{1}{8}$
$(-2)^3 = -8$
$-2^2 = -4$
$\frac{5!}{2!3!} = \binom{5}{2} = 10$
$\frac{\frac12}{\frac14} = 2$
$\frac{100}{\pi} \approx 31.83$
$\sqrt{2} = 1.414$
$\sqrt{1000} \approx 32$
$\sin 150^\circ = \frac{1}{2}$
$\cos \frac{\pi}{3} = \frac12$
$\log_2 8 = 3$
$(1+i)^2 = 2i$
$e^{i \pi} = -1$
$50\% = \frac{1}{2} \cdot 1^2$
$3\text{ cm} \cdot 2^2 = 12\text{ cm}$
$24,\!000 \cdot 10^2 = 2{,}400{,}000$
$|3 - 5|^2 = 4$
$\lfloor \sqrt{10} \rfloor = 3$
$(x+1)^2 = x^2 + 2x + 1$
$3p+2p+3p=8p$
$a^{m}a^{n} = a^{m+n}$
$\sin^2 t + \cos^2 t = 1$
S + 30 + 46 = S + 76
\begin{align*} 2^5 &= 32 \\ &= 4 \cdot 2^3 \end{align*}
"""

WRONG = r"""
$\sqrt{50} = 2\sqrt{5}$
$2^5 = 10$
So $3^2 + 4^2 = 49$.
Thus \[\frac{5!}{2!} = 120.\]
$\binom{5}{2} = 20$
$r = \sqrt{64} = 9$
"""

# Nothing to say: assumed, open in its notation, or not read
OPEN = r"""
$x^2 = 4$
$|x - 5| = 5 - x$
$\arcsin(\sin x) = x$
$x + y = 7$
$f(2) + f(3) = f(5)$
$f(x) = 2x + 1$
$2^5 = 10$ is wrong.
If $2^5 = 10$ were true
Suppose $2^5 = 10$.
$2^5 \ne 10$
$2^5 \equiv 2 = 2^1 + 3$
$\sqrt{10} = 3$
$2^5 = 10$ modulo 11
$\log 8 = 3$
$1 + 2 + \dots + n = 2^3$
$\pi \approx 3.5$
$101_2 = 2^2 + 1$
$a \pm 2 = 2^3$
$\begin{pmatrix} 1 \\ 2 \end{pmatrix} = 2^3$
$(1, 2) = (2^0, 3)$
$\int_0^1 x = 2^3$
$x^10 = x \cdot x^9$
twice $2^3 = 16$
$\sin^{-1} 1 = 2^3$
$[3.7]^2 = 9$
$0.\overline{9} = 2^3$
"""


@pytest.mark.parametrize(
    ("text", "label"),
    [(row, label) for rows, label in ((RIGHT, 1), (WRONG, 0), (OPEN, None)) for row in rows.strip().splitlines()],
)
def test_label_of_a_step(text: str, label: Label) -> None:
    assert labels(text) == [label]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # an unknown solved from the step before; its equation itself is an assumption
        ("$2x + 3 = 7$\n$2x = 4$\n$x = 2$", [None, 1, 1]),
        ("$2x + 3 = 7$\n$2x = 5$\n$x = 3$", [None, None, None]),
        ("5x=810\nx=<<162=162>>162", [None, 1]),
        ("x^2 = 16\nso x = 4", [None, 1]),
        # a value defined two lines before
        ("Let $x = 3$.\nNow we go on.\nThen $2x + 1 = 7$.", [None, None, 1]),
        ("Let $x = 3$.\nNow we go on.\nThen $2x + 1 = 8$.", [None, None, None]),
        ("$y = 2x$\n$x = 5$\n$x + y = 15$", [None, None, 1]),
        # a name that stands for a formula
        ("$b + p = 59$\n$b = 2p - 1$\n$2p - 1 + p = 59$\n$3p = 60$\n$p = 20$", [None, None, 1, 1, 1]),
        # the sum of two equations
        ("$x + y = 5$\n$x - y = 1$\n$2x = 6$", [None, None, 1]),
        # a function that was defined
        ("$f(x) = x^2 + 1$\n$f(3) = 10$", [None, 1]),
        # said twice is not checked
        ("$x + y = 5$\n$x + y = 5$\n$x = 2$\n$x = 2$", [None, None, None, None]),
    ],
)
def test_equations_follow_from_those_before(text: str, expected: list[Label]) -> None:
    assert labels(text) == expected


def test_the_problem_counts_as_said_before() -> None:
    assert labels("So $x = 2$.", "Solve $2x + 3 = 7$.") == [1]
    assert labels("So $x = 3$.", "Solve $2x + 3 = 7$.") == [None]


@pytest.mark.parametrize(
    "text", ["$" + "(" * 500 + "=1$", "$9^{9^{9^9}} = 1$", "$1000! = 1$", "$x^{-1} = 1/0$", "$= = =$"]
)
def test_hostile_formulas_have_no_label(text: str) -> None:
    assert labels(text) == [None]


# What a review found: texts, and the label of each line. Numbers that no float holds, sums over rows, roundings inside.
REVIEWED = [
    (r"$\sqrt{4} = 1" + "0" * 400 + "$", [None]),
    (r"$\sqrt{2} \approx 1" + "0" * 400 + "$", [None]),
    ("\n".join(f"${a}(x) = {b}(x){'x' * 170}$" for a, b in zip("ABCDEFG", "BCDEFGH", strict=True)) + "\n$A(2) = 3$",
     [None] * 8),
    ("$P(x)=x^2$\n" + "\n".join(f"${a}(x) = {'+'.join([f'{b}(x)'] * 39)}$"
                                for a, b in zip("QRSTUV", "PQRSTU", strict=True)) + "\n$V(2) = 3$", [None] * 8),
    (r"$\sqrt{\frac{8 \cdot 10^{14}}{10^{14}}} = 5$", [None]),
    (r"$\frac{20!\,\pi}{20!}=9$", [None]),
    (r"$\frac{x \cdot 10^{14}}{10^{14}} = 3x$", [None]),
    (r"$\pi^{500}\cdot\pi^{500} = 5$", [None]),
    (r"$\sin\pi = 0$", [1]),
    (r"$\frac{10^{15}\sqrt{2}}{10^{15}}=\sqrt2$", [1]),
    (r"$2^3 \approx 0$", [None]),
    (r"$2^3 \approx 100$", [None]),
    (r"$5^2 \approx 1000000$", [None]),
    (r"$\sqrt{50} \approx 7.07$", [1]),
    ("$x^2-5x+6=0$\n$x = 2$ or $x = 3$\n$2x = 100$\n$7x+1=0$", [None, 1, None, None]),
    ("$2x + 3 = 8$\n$x = 3$\n$x + 4 = 9$", [None, None, None]),
    ("$2x + 3 = 7$\n$2x = 4$\n$x = 2$", [None, 1, 1]),
    (r"$10\sqrt{3} = 10(1.732) = 17.32$", [None]),
    (r"$1000(1.05)^{10} = 1000(1.6289) = 1628.9$", [None]),
    (r"$2^{64} = 1.84 \times 10^{19}$", [None]),
    (r"$2^{3} = 9$", [0]),
    ("\\[ 1^2+2^2+3^2 \\\\ + 4^2 = 30 \\]", [None]),
    (r"\begin{align*} S &= 1^2+2^2+3^2 \\ &\quad + 4^2 = 30 \end{align*}", [None]),
    ("2^3^2 = 512", [None]),
    (r"$3\frac{1}{2}^2 = 12.25$", [None]),
    ("$1^3 + 2^3 + . . . + 5^3 = 225$", [None]),
    ("$5^2 = 25!$", [None]),
    ("$120 = 5!$", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REVIEWED)
def test_texts_of_a_review(text: str, expected: list[int | None]) -> None:
    assert [step.label for step in sk.label_steps(text, rule="equations")] == expected
