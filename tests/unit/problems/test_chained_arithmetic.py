"""The miniature task: problems, the simulated student, the tokenizer, the exact step judge."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.problems.chained_arithmetic.generate import Link, answer_line, generate, parse, split_of
from megatron_stepkto.problems.chained_arithmetic.judge import label_steps
from megatron_stepkto.problems.chained_arithmetic.student import corpus, flaw_rate, habit, write_solution
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.steps.tokens import split_text

PROBLEM = (
    "Max has 27 coins. Tom has 2 more than Max. Kim has 3 fewer than Tom. Ann has twice as many as Kim. "
    "How many does Ann have?"
)
SOLUTION = "Tom has 27 + 2 = 29.\nKim has 29 - 3 = 26.\nAnn has 26 * 2 = 52.\nAnswer: \\boxed{52}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_parse_reads_the_chain_and_writes_it_back() -> None:
    chain = parse(PROBLEM)
    assert (chain.start_name, chain.start_value, chain.things) == ("Max", 27, "coins")
    assert chain.links == (
        Link("Tom", "+", 2, 27, 29),
        Link("Kim", "-", 3, 29, 26),
        Link("Ann", "*", 2, 26, 52),
    )
    assert chain.answer == 52
    assert chain.problem_text == PROBLEM
    assert chain.solution_text == SOLUTION


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What is 2 + 2?", "at the start"),
        (PROBLEM.replace("than Max", "than Kim"), "count refers to Kim, expected Max"),
        (PROBLEM.replace("How many does Ann", "How many does Kim"), "asks for Kim"),
        (PROBLEM.replace("Ann", "Max"), "a name is duplicated"),
        (PROBLEM + " Hurry!", "expected a link or the question"),
        ("Max has 27 coins. How many does Max have?", "expected a link"),
    ],
)
def test_parse_refuses_other_text(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse(text)


def test_generated_problems_are_valid_unique_and_repeatable() -> None:
    problems = generate("test", 300, seed=5)
    assert problems == generate("test", 300, seed=5)
    assert len({p.problem for p in problems}) == len({p.problem_id for p in problems}) == 300
    for problem in problems:
        chain = parse(problem.problem)
        assert 2 <= len(chain.links) <= 5
        assert 3 <= chain.start_value <= 30
        value = chain.start_value
        for link in chain.links:
            assert link.left == value
            value = {"+": value + link.operand, "-": value - link.operand, "*": value * link.operand}[link.op]
            assert link.result == value and 1 <= value <= 99
        assert problem.answer == str(value)
        assert problem.solution is not None and problem.solution.endswith(f"Answer: \\boxed{{{value}}}")


def test_splits_and_seeds_never_share_a_problem_or_an_id() -> None:
    calls = [generate(split, 400, seed) for split in ("train", "dev", "test") for seed in (0, 1)]
    ids = [problem.problem_id for call in calls for problem in call]
    assert len(set(ids)) == len(ids)
    texts = {split: {p.problem for c in calls for p in c if p.split == split} for split in ("train", "dev", "test")}
    assert not (texts["train"] & texts["dev"] or texts["train"] & texts["test"] or texts["dev"] & texts["test"])


def test_split_of_is_sha256_modulo_20() -> None:
    # python3 -c "import hashlib; print(int(hashlib.sha256(b'...').hexdigest(), 16) % 20)"
    import hashlib

    for number in range(60):
        text = f"problem {number}"
        bucket = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20
        assert split_of(text) == ("dev" if bucket == 0 else "test" if bucket in (1, 2, 3) else "train")


def test_unknown_split_is_a_user_error() -> None:
    with pytest.raises(UserError, match="train, dev, test"):
        generate("validation", 1, 0)  # type: ignore[arg-type]


def test_habits() -> None:
    assert habit("+", 17, 5) == ("+", 12)  # dropped carry: 22 becomes 12
    assert habit("+", 11, 5) is None
    assert habit("-", 23, 5) == ("-", 22)  # smaller from larger: 3 and 5 make 2
    assert habit("-", 29, 5) is None
    assert habit("*", 9, 3) == ("+", 12)  # "3 times" read as "3 more"
    assert habit("*", 2, 2) is None  # 2 + 2 = 2 * 2


def test_flaw_rates_are_graded_between_a_tenth_and_four_fifths() -> None:
    rates = [flaw_rate(op, k) for op in ("+", "-") for k in range(2, 10)]  # type: ignore[arg-type]
    assert min(rates) == pytest.approx(0.1) and max(rates) == pytest.approx(0.8)
    assert flaw_rate("+", 2) == pytest.approx(0.1 + 0.7 * 2 / 7)  # 2 * 5 mod 8 = 2
    assert flaw_rate("-", 9) == pytest.approx(0.1)  # 9 * 5 + 3 = 48, mod 8 = 0
    assert flaw_rate("*", 2) == pytest.approx(0.38) and flaw_rate("*", 3) == pytest.approx(0.59)
    assert sum(rate > 0.5 for rate in rates) >= 6


def test_the_students_marginal_statistics() -> None:
    """About half of the answers are right, about 40% of the right ones hold a wrong step: measured with the
    prototype's independent code at 0.56 and 0.42 on 4,000; the tolerance is over three standard errors."""
    right = lucky = 0
    solutions = corpus(3000, seed=11)
    for problem, text in solutions:
        assert problem.split == "train"
        labels = label_steps(problem.problem, text, split_text(text, "line"))
        if text.endswith("\n" + answer_line(int(problem.answer))):
            right += 1
            lucky += 0 in labels
    assert right / len(solutions) == pytest.approx(0.56, abs=0.03)
    assert lucky / right == pytest.approx(0.42, abs=0.04)


def test_the_student_is_repeatable_and_writes_small_numbers() -> None:
    assert corpus(50, 3) == corpus(50, 3)
    rng = random.Random(0)
    for problem in generate("dev", 100, 0):
        for line in write_solution(parse(problem.problem), rng).splitlines()[:-1]:
            assert 0 <= int(line.rstrip(".").split(" = ")[1]) <= 297


def test_tokenizer_is_lossless_and_small(tokenizer: Any) -> None:
    assert len(tokenizer) == 48
    assert (tokenizer.pad_token_id, tokenizer.bos_token, tokenizer.eos_token) == (0, "<s>", "</s>")
    for problem, text in corpus(300, 1):
        prompt = tokenizer.encode(problem.problem + "\n")
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(prompt[1:]) == problem.problem + "\n"
        response = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(response) == text
        assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in prompt + response


def test_tokens_of_a_line(tokenizer: Any) -> None:
    assert tokenizer.tokenize("Tom has 27 + 2 = 29.\nAnswer: \\boxed{9}") == [
        "Tom", " has ", "2", "7", " + ", "2", " = ", "2", "9", ".", "\n", "Answer: ", "\\boxed{", "9", "}",
    ]  # fmt: skip
    assert tokenizer.tokenize("Ann has twice as many as Kim. ") == [
        "Ann", " has ", "twice as many as ", "Kim", ". ",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("Tom has 27 + 2 = 29.\n", 1),
        ("Tom has 27 + 2 = 29.", 1),
        ("Tom has 27 + 2 = 19.\n", 0),  # dropped carry
        ("Kim has 26 - 0 = 26.\n", 0),  # true and the right value, but not what the problem says
        ("Ann has 26 + 26 = 52.\n", 0),  # right value by another operation
        ("Kim has 19 - 3 = 16.\n", 0),  # true arithmetic from a wrong value
        ("Max has 27 + 0 = 27.\n", 0),  # the first person is not a link
        ("Leo has 1 + 1 = 2.\n", 0),
        ("Tom has 27 + 2 = 29 coins.\n", 0),
        ("Tom has 27 + 2 = 00029.\n", 0),
        (" Tom has 27 + 2 = 29.\n", 0),
        ("Answer: \\boxed{52}", None),
        ("Answer: ", None),
    ],
)
def test_label_of_a_line(line: str, label: int | None) -> None:
    assert label_steps(PROBLEM, line, [(0, len(line))]) == [label]


def test_nothing_after_the_answer_line_is_judged() -> None:
    text = "Tom has 27 + 2 = 29.\nAnswer: \\boxed{29}\nKim has 1 + 1 = 3.\n"
    assert label_steps(PROBLEM, text, split_text(text, "line")) == [1, None, None]
