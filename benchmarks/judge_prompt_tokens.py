"""Tokens that a judge's server has to read per solution: all of the prompts, and what its prefix cache leaves.

    python -m benchmarks.judge_prompt_tokens DATA TOKENIZER [--prompt FILE] [--samples K] [--per-step]

DATA holds eval/ and samples/; TOKENIZER is the judge's Hugging Face folder; FILE is a prompt template (docs/judges.md).
--samples K: K solutions of each problem that has as many. --per-step: as if each step were a request of its own, with
the steps before it, instead of all steps in one.
GSM8K's model solutions, those of one problem one after another as the sample stage writes them, each with the reference
solution. The cache is counted as vLLM's: whole blocks of 16 tokens from the beginning of the prompt, and nothing is
dropped from it. Equal solutions are asked once. No server is asked.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_stepkto.base.records import Problem, Step
from megatron_stepkto.judging.process.interface import Solution
from megatron_stepkto.judging.process.llm import PromptTemplate
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.steps.text import split_text

BLOCK = 16


def read_solutions(data: Path) -> list[Solution]:
    rows = [json.loads(line) for line in (data / "samples/gsm8k_model_solutions.jsonl").open()]
    gold = {row["problem"]: row["solution"] for row in map(json.loads, (data / "eval/gsm8k_test.jsonl").open())}
    solutions = []
    for number, row in enumerate(sorted(rows, key=lambda row: (row["problem"], row["id"]))):
        problem = Problem(
            problem_id=row["problem"], problem=row["problem"], answer=row["answer"], solution=gold.get(row["problem"])
        )
        spans = split_text(row["response"], "line")
        steps = tuple(Step(start=start, end=end, token_start=0, token_end=0) for start, end in spans)
        solutions.append(Solution(str(number), problem, row["response"], steps))
    return solutions


def of_each_problem(solutions: Sequence[Solution], samples: int) -> list[Solution]:
    """The first ``samples`` solutions of each problem that has as many."""
    groups = [list(group) for _, group in itertools.groupby(solutions, lambda s: s.problem.problem_id)]
    return [solution for group in groups if len(group) >= samples for solution in group[:samples]]


def of_each_step(solution: Solution) -> list[Solution]:
    """The solution up to each of its steps."""
    return [replace(solution, steps=solution.steps[: number + 1]) for number in range(len(solution.steps))]


def uncached(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of all prompts that no earlier prompt begins with, in whole blocks; the last block is always read."""
    known: set[int] = set()
    total = 0
    for ids in prompts:
        chain, hit = 0, 0
        blocks = [tuple(ids[start : start + BLOCK]) for start in range(0, len(ids) - BLOCK + 1, BLOCK)]
        for place, block in enumerate(blocks):
            chain = hash((chain, block))
            if chain in known and hit == place:
                hit += 1
            known.add(chain)
        total += len(ids) - min(hit * BLOCK, len(ids) - 1)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--prompt", type=Path)
    parser.add_argument("--samples", type=int, metavar="K")
    parser.add_argument("--per-step", action="store_true")
    options = parser.parse_args()
    solutions = read_solutions(options.data)
    if options.samples:
        solutions = of_each_problem(solutions, options.samples)
    count, problems = len(solutions), len({s.problem.problem_id for s in solutions})
    if options.per_step:
        solutions = [part for solution in solutions for part in of_each_step(solution)]
    template, tokenizer = PromptTemplate(options.prompt), load_tokenizer(options.tokenizer)
    prompts = [template.render(solution, comments=True) for solution in solutions]
    asked = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in dict.fromkeys(prompts)]
    print(
        f"{count} solutions of {problems} problems, {len(asked)} requests, {len(prompts) - len(asked)} equal to another"
    )
    print(f"prompt tokens per solution: {sum(map(len, asked)) / count:.1f}")
    print(f"not in the prefix cache:    {uncached(asked) / count:.1f}")


if __name__ == "__main__":
    main()
