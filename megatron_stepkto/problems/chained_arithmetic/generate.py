"""Chained word problems: each person's count is given in terms of the previous person's.

"Max has 27 coins. Tom has 2 more than Max. Ann has twice as many as Tom. How many does Ann have?" has two
links. A solution is one equation per link, then the answer line.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem

NAMES = ("Tom", "Sue", "Ann", "Bob", "Kim", "Max", "Eva", "Leo", "Mia", "Dan")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")
MIN_LINKS, MAX_LINKS = 2, 5
MIN_START, MAX_START = 3, 30
MIN_VALUE, MAX_VALUE = 1, 99

Operator = Literal["+", "-", "*"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def apply(op: Operator, left: int, operand: int) -> int:
    if op == "+":
        return left + operand
    return left - operand if op == "-" else left * operand


@dataclass(frozen=True)
class Link:
    """``name`` has ``left op operand = result``, where ``left`` is what the previous person has."""

    name: str
    op: Operator
    operand: int
    left: int
    result: int

    def sentence(self, before: str) -> str:
        factor = "twice" if self.operand == 2 else f"{self.operand} times"
        relations = {"+": f"{self.operand} more than", "-": f"{self.operand} fewer than", "*": f"{factor} as many as"}
        return f"{self.name} has {relations[self.op]} {before}."


@dataclass(frozen=True)
class Chain:
    """A parsed problem, with everyone's true value."""

    start_name: str
    start_value: int
    things: str
    links: tuple[Link, ...]

    @property
    def answer(self) -> int:
        return self.links[-1].result

    @property
    def problem_text(self) -> str:
        names = [self.start_name, *(link.name for link in self.links)]
        sentences = [link.sentence(before) for link, before in zip(self.links, names, strict=False)]
        opening = f"{self.start_name} has {self.start_value} {self.things}."
        return " ".join([opening, *sentences, f"How many does {names[-1]} have?"])

    @property
    def solution_text(self) -> str:
        lines = [equation(link.name, link.left, link.op, link.operand, link.result) for link in self.links]
        return "".join(lines) + answer_line(self.answer)


def equation(name: str, left: int, op: str, operand: int, result: int) -> str:
    """One step of a solution, with the newline that closes it."""
    return f"{name} has {left} {op} {operand} = {result}.\n"


def answer_line(value: int) -> str:
    return f"Answer: \\boxed{{{value}}}"


def split_of(problem_text: str) -> Split:
    """The only split a problem with this text can be in: SHA-256 modulo 20; 0 dev, 1..3 test, else train."""
    bucket = int.from_bytes(hashlib.sha256(problem_text.encode()).digest()) % 20
    if bucket == 0:
        return "dev"
    return "test" if bucket <= 3 else "train"


def _draw_link(rng: random.Random, name: str, left: int) -> Link:
    op: Operator
    draw = rng.random()
    if draw < 0.36:
        op, operand = "+", rng.randint(2, 9)
    elif draw < 0.72:
        op, operand = "-", rng.randint(2, 9)
    else:
        op, operand = "*", rng.randint(2, 3)
    return Link(name, op, operand, left, apply(op, left, operand))


def draw_chain(rng: random.Random) -> Chain:
    """A chain of 2 to 5 links with every value in 1..99, resampled as a whole until that holds."""
    while True:
        num_links = rng.randint(MIN_LINKS, MAX_LINKS)
        names = rng.sample(NAMES, num_links + 1)
        things = rng.choice(THINGS)
        start = value = rng.randint(MIN_START, MAX_START)
        links: list[Link] = []
        for name in names[1:]:
            link = _draw_link(rng, name, value)
            if not MIN_VALUE <= link.result <= MAX_VALUE:
                break
            links.append(link)
            value = link.result
        if len(links) == num_links:
            return Chain(names[0], start, things, tuple(links))


def generate(split: Split, count: int, seed: int) -> list[Problem]:
    """``count`` different problems of a split; the same arguments give the same problems.

    A problem's split is a function of its text alone (``split_of``), so train, dev and test share no problem
    whatever the seeds. Ids include split and seed, so calls with different ones never share an id.

    Raises:
        UserError: the split is not one of train, dev, test.
    """
    if split not in SPLITS:
        raise UserError(f"chained_arithmetic: expected a split of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"chained_arithmetic {split} {seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        chain = draw_chain(rng)
        text = chain.problem_text
        if split_of(text) != split or text in seen:
            continue
        seen.add(text)
        problems.append(
            Problem(
                problem_id=f"ca-{split}-{seed}-{len(problems):06d}",
                problem=text,
                answer=str(chain.answer),
                solution=chain.solution_text,
                split=split,
            )
        )
    return problems


_NAME = "|".join(NAMES)
_OPENING = re.compile(rf"({_NAME}) has ([1-9]\d?) ({'|'.join(THINGS)})\.")
_SENTENCE = re.compile(
    rf" ({_NAME}) has (?:([2-9]) (more|fewer) than|(twice|3 times) as many as) ({_NAME})\.", re.ASCII
)
_QUESTION = re.compile(rf" How many does ({_NAME}) have\?")


def _bad(problem_text: str, reason: str) -> UserError:
    return UserError(
        f"not a chained-arithmetic problem: {reason}, in {problem_text!r:.200}; "
        "choose another judge.process for problems of other sources"
    )


@functools.lru_cache(maxsize=4096)
def parse(problem_text: str) -> Chain:
    """Read a problem back from its text.

    Raises:
        UserError: the text is not such a problem; says where it differs.
    """
    opening = _OPENING.match(problem_text)
    if not opening:
        raise _bad(problem_text, 'expected "<name> has <number> <things>." at the start')
    before, value, position = opening[1], int(opening[2]), opening.end()
    links: list[Link] = []
    while sentence := _SENTENCE.match(problem_text, position):
        name, operand, direction, factor, of = sentence.groups()
        if of != before:
            raise _bad(problem_text, f"{name}'s count refers to {of}, expected {before}")
        op: Operator = "*" if factor else "+" if direction == "more" else "-"
        number = int(operand) if operand else 2 if factor == "twice" else 3
        link = Link(name, op, number, value, apply(op, value, number))
        links.append(link)
        before, value, position = name, link.result, sentence.end()
    question = _QUESTION.fullmatch(problem_text, position)
    if not question or not links:
        raise _bad(problem_text, f"expected a link or the question at character {position}")
    if question[1] != before:
        raise _bad(problem_text, f"asks for {question[1]}, expected the last person, {before}")
    if len({opening[1], *(link.name for link in links)}) != len(links) + 1:
        raise _bad(problem_text, "a name is duplicated")
    return Chain(opening[1], int(opening[2]), opening[3], tuple(links))
