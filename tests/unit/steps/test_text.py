"""Text to steps: every rule on texts of the kind that models write, and on hostile ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.steps.text import SPLIT_RULES, split_text


def pieces_of(text: str, how: str, tag: str | None = None) -> list[str]:
    return [text[start:end] for start, end in split_text(text, how, tag)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "how", "pieces"),
    [
        ("", "line", [""]),
        ("a", "line", ["a"]),
        ("a\nb", "line", ["a\n", "b"]),
        ("a\nb\n", "line", ["a\n", "b\n"]),
        ("\n\na\n\nb\n", "line", ["\n\na\n\n", "b\n"]),
        ("a\n  \n b", "line", ["a\n  \n", " b"]),
        (" \n ", "line", [" \n "]),
        ("a\r\nb", "line", ["a\r\n", "b"]),
        ("a\u2028b\x0bc", "line", ["a\u2028b\x0bc"]),
        ("a\nb\n\nc", "blank_line", ["a\nb\n\n", "c"]),
        ("a\n \t\n\n  b\nc\n", "blank_line", ["a\n \t\n\n", "  b\nc\n"]),
        ("\n\na\n\n", "blank_line", ["\n\na\n\n"]),
    ],
)
def test_lines(text: str, how: str, pieces: list[str]) -> None:
    assert pieces_of(text, how) == pieces


@pytest.mark.parametrize(
    "whole",
    [
        '[asy]\ndraw((0,0)--(1,1));\n\nlabel("$A$", A);\n[/asy]',
        "\\[\nx = 1\n\n+ 2\n\\]",
        "$$\na\n\nb\n$$",
        "\\begin{align*}\na &= b\n\n\\\\ c &= d\n\\end{align*}",
        "```python\nx = 1\n\nprint(x)\n```",
    ],
)
def test_code_and_displayed_formulas_stay_whole(whole: str) -> None:
    text = f"See this.\n\n{whole}\n\nThen that."
    assert pieces_of(text, "blank_line") == ["See this.\n\n", f"{whole}\n\n", "Then that."]
    assert pieces_of(text, "line") == ["See this.\n\n", f"{whole}\n\n", "Then that."]


@pytest.mark.parametrize("opened", ["[asy]", "\\[", "$$", "\\begin{align}", "```", "\\]", "[/asy]", "\\end{a}"])
def test_what_is_not_closed_protects_nothing(opened: str) -> None:
    assert pieces_of(f"a {opened}\n\nb\n\nc", "blank_line") == [f"a {opened}\n\n", "b\n\n", "c"]


def test_a_formula_of_ten_thousand_characters_protects_nothing() -> None:
    text = "\\[ " + "x\n\n" * 4000 + "\\]"
    assert len(pieces_of(text, "blank_line")) == 4001


SOLUTION = "Let us see.\n\nStep 1: add.\n\n2 + 2 = 4\n## Step 2: multiply.\n**Step 3.** done, see Step 1\nstepwise\n"


def test_numbered_steps() -> None:
    assert pieces_of(SOLUTION, "step_number") == [
        "Let us see.\n\n",
        "Step 1: add.\n\n2 + 2 = 4\n",
        "## Step 2: multiply.\n",
        "**Step 3.** done, see Step 1\nstepwise\n",
    ]
    assert pieces_of(SOLUTION, "step_heading") == [
        "Let us see.\n\nStep 1: add.\n\n2 + 2 = 4\n",
        "## Step 2: multiply.\n**Step 3.** done, see Step 1\nstepwise\n",
    ]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a ки\nb ки\n c", ["a ки\n", "b ки\n", " c"]),
        ("a ки b ки", ["a ки", " b ки"]),
        ("ки\na", ["ки\n", "a"]),
        ("no tag", ["no tag"]),
    ],
)
def test_tag(text: str, pieces: list[str]) -> None:
    assert pieces_of(text, "tag", "ки") == pieces


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Smith has 3.14 pies.", " He eats 1.5.", " Then he rests!", " Is 5! = 120?", " Yes."],
        ["It holds, i.e. always, e.g. for B.", " See Eq. 3 and No. 5 vs. Fig. 2.", " The answer is no.", " Stop."],
        ["1. First we add.\n", "2. Then we stop.\n", "(a) The rest.\n", "- And so on."],
        ["She pays $5.", " He pays $6.", " Both pay $11."],
        ["Take $x. Y$ and \\(a. B\\).", " \\[ 1. A. \\] and done."],
        ["It is $x = 3.$", " Also \\[y = 4.\\]", " Thus\n$$z.\n$$\n", "The end."],
        ["J. K. Rowling wrote it.", " “Really.”", " (Yes.)", " The point is A.", " We win."],
        ["There are 5! ways, that is 120! and more.", " So 1, 2, ..., 10 add up."],
        ["We wrap\nlines here. and here\ntoo.\n", "Next line."],
        ["No stop\n\n", "Next paragraph"],
        ["We use \\left. X \\right. Here it is.", " End."],
        ["我们有三个。", "然后！", "好"],
        ["Nothing at the end... ", ],
    ],
)  # fmt: skip
def test_sentences(sentences: list[str]) -> None:
    assert pieces_of("".join(sentences), "sentence") == sentences


def test_sentences_of_real_solutions(data_dir: Path) -> None:
    """MATH's own solutions: no sentence begins in the middle of a number or a formula."""
    pieces = []
    for line in (data_dir / "eval/math500.jsonl").open():
        found = pieces_of(json.loads(line)["solution"], "sentence")
        assert "".join(found) == json.loads(line)["solution"]
        pieces += found
    assert len(pieces) > 1900
    assert not [piece for piece in pieces if piece.count("\\[") != piece.count("\\]")]
    assert not [piece for piece in pieces if piece.count("[asy]") != piece.count("[/asy]")]
    assert sum(piece.count("$") % 2 for piece in pieces) < 20  # prices, and dollars inside [asy]
    assert not [piece for piece in pieces if re.fullmatch(r"\s*\d+\.\s*", piece)]


def test_wrong_rules() -> None:
    with pytest.raises(UserError, match="line, blank_line"):
        split_text("a", "sentences")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"judge\.step_tag"):
        split_text("a", "tag")


PARTS = st.sampled_from(
    ["\n", "\n\n", " ", ". ", "! ", "Mr. ", "3.5", "\\[", "\\]", "$", "$$", "[asy]", "[/asy]", "Step 1", "## Step 2:",
     "A", "b", "1. ", "ки", "😀", "。", "\\begin{a}", "\\end{a}", "\t", "\r\n", "…", "“", "”"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PARTS, st.text(max_size=4)), max_size=25).map("".join), st.sampled_from(SPLIT_RULES))
def test_split_is_lossless(text: str, how: str) -> None:
    pieces = pieces_of(text, how, "ки")
    assert "".join(pieces) == text
    if text:
        assert all(pieces)
    if text.strip():
        assert all(piece.strip() for piece in pieces)


@pytest.mark.parametrize(
    "unit", ["\\[", "$a", "$ a", "[asy]", "\\begin{a}", "(", ".", "!)", "\n", "\n ", "step ", "1. "]
)
def test_hostile_texts(unit: str) -> None:
    """Quadratic work on these would take hours, not seconds."""
    text = unit * 20_000
    for how in SPLIT_RULES:
        spans = split_text(text, how, "ки")  # type: ignore[arg-type]
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
