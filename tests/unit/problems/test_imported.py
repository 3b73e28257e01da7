"""Importers against rows of the public layouts, read by eye. Needs the folder of real data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import JudgedSample, Problem, read_records, read_rows
from megatron_stepkto.judging.imported import import_all, judged_samples, read_imports
from megatron_stepkto.problems.imported.formats import FORMATS, importer_of
from megatron_stepkto.problems.imported.solution import ImportedSolution, problem_id_of, same_answer
from megatron_stepkto.recipe import file as recipe_file
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe

FILES = {
    "steps/processbench_gsm8k.jsonl": "processbench",
    "steps/processbench_math.jsonl": "processbench",
    "steps/mrben_math.jsonl": "mrben",
    "steps/bigbench_mistake_arithmetic.jsonl": "bigbench_mistake",
    "samples/gsm8k_model_solutions.jsonl": "gsm8k_solutions",
    "steps/raw_format_prm800k_sample.jsonl": "prm800k",
    "steps/raw_format_math-shepherd_sample.jsonl": "math_shepherd",
    "steps/raw_format_math-aps_sample.jsonl": "omegaprm",
}


def raw_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse(name: str, row: dict[str, Any]) -> ImportedSolution:
    (solution,) = importer_of(name)(row).solutions
    return solution


def prompts_of(tokenizer: Any) -> Prompts:
    return Prompts(recipe.Prompt(template="{problem}"), tokenizer, [tokenizer.eos_token_id], "M")


def solutions_of(path: Path, name: str) -> list[ImportedSolution]:
    return [solution for row in read_rows(path, importer_of(name)) for solution in row.solutions]


@pytest.fixture(scope="module")
def tokenizer_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [s.text for s in solutions_of(data_dir / "steps/processbench_math.jsonl", "processbench")[:200]]
    train_byte_level_bpe(texts, 700, directory)
    return directory


def test_processbench_lucky_solution(data_dir: Path) -> None:
    """gsm8k-208: right answer, and the last of five steps is wrong."""
    row = raw_rows(data_dir / "steps/processbench_gsm8k.jsonl")[208]
    solution = parse("processbench", row)
    assert (solution.labels, solution.outcome) == ((1, 1, 1, 1, 0), 1)
    assert solution.steps[0] == (
        "To determine the expected earnings of the dance studio in a month, we first need to calculate the "
        "total cost for one session, then multiply it by the number of sessions in a month.\n\n"
    )
    assert solution.steps[4].endswith("would be necessary to complete the calculation.")
    assert solution.solution_id == "processbench/gsm8k-208"
    assert solution.answer == "\\$480"
    assert solution.text == "\n\n".join(row["steps"])


def test_processbench_published_layout_gives_the_same() -> None:
    steps = ["One.", "Two.", "Three."]
    row = {"id": "math-3", "generator": "m", "problem": "P", "steps": steps, "final_answer_correct": False}
    assert parse("processbench", {**row, "label": 1}).labels == (1, 0, None)
    assert parse("processbench", {**row, "label": -1}).labels == (1, 1, 1)
    assert parse("processbench", {**row, "first_error": 1, "labels": [1, 0, None]}).labels == (1, 0, None)
    with pytest.raises(ValueError, match=r"first error 3 .* outside the 3 steps"):
        parse("processbench", {**row, "label": 3})
    with pytest.raises(ValueError, match="missing key 'label'"):
        parse("processbench", row)


@pytest.mark.parametrize("name", ["processbench_gsm8k", "processbench_math", "bigbench_mistake_arithmetic"])
def test_counts_are_those_of_the_raw_labels(data_dir: Path, name: str) -> None:
    path = data_dir / f"steps/{name}.jsonl"
    rows = raw_rows(path)
    solutions = solutions_of(path, FILES[f"steps/{name}.jsonl"])
    assert len(solutions) == len(rows)
    expected = Counter(label for row in rows for label in row["labels"])
    assert Counter(label for s in solutions for label in s.labels) == expected
    for row, solution in zip(rows, solutions, strict=True):
        assert list(solution.labels) == row["labels"]
        if "final_answer_correct" in row:
            assert solution.outcome == int(row["final_answer_correct"])


def test_known_numbers_of_processbench(data_dir: Path) -> None:
    """Lucky solutions as SOURCES.md counts them: 7 of GSM8K, 94 of MATH."""
    for name, lucky in (("gsm8k", 7), ("math", 94)):
        solutions = solutions_of(data_dir / f"steps/processbench_{name}.jsonl", "processbench")
        assert sum(s.outcome == 1 and 0 in s.labels for s in solutions) == lucky


def test_mrben(data_dir: Path) -> None:
    path = data_dir / "steps/mrben_math.jsonl"
    rows, solutions = raw_rows(path), solutions_of(path, "mrben")
    first = solutions[0]
    assert first.labels == (0, None, None, None, None, None, None)
    assert (first.outcome, first.answer) == (0, "A")  # it says Choice_B
    assert first.problem.startswith("The shortest distance from the curve xy = 8 to the origin is\nA: 4 ")
    assert first.steps[-1] == "Solution: Choice_B"
    assert (solutions[1].outcome, solutions[1].labels[4]) == (1, 0)  # lucky: Choice_A by a wrong derivative
    blank = next(s for s in solutions if s.solution_id == "mrben/4786ea7f-4ff1-41aa-8b16-0e4adc622822-GPT3.5")
    assert len(blank.steps) == 9 and blank.labels == (1,) * 9  # ten, one of them a space
    for row, solution in zip(rows, solutions, strict=True):
        assert solution.text == "\n".join(row["steps"])


def test_bigbench_mistake_published_layout(data_dir: Path) -> None:
    row = raw_rows(data_dir / "steps/bigbench_mistake_arithmetic.jsonl")[0]
    published = {
        "input": row["problem"],
        "steps": row["steps"],
        "answer": "1244",
        "target": "-2116",
        "mistake_index": 3,
    }
    solution = parse("bigbench-mistake", published)
    assert (solution.labels, solution.outcome, solution.answer) == ((1, 1, 1, 0, None), 0, "-2116")
    assert solution.steps == parse("bigbench-mistake", row).steps


def test_gsm8k_solution_is_lines_without_step_labels(data_dir: Path) -> None:
    rows = raw_rows(data_dir / "samples/gsm8k_model_solutions.jsonl")
    solution = parse("gsm8k_solutions", rows[0])
    assert solution.steps == (
        "Let x be the amount of money that Brad gets.\n",
        "Jeff gets 4*x.\n",
        "The total is x+4*x = 100 dollars.\n",
        "This simplifies to 5*x = 100.\n",
        "So the value of x is 100/5 = <<100/5=20.0>>20 dollars.\n",
        "Then Jeff gets 4*x = 4*20 = <<4*20=80>>80 dollars.\n",
        "A: 80",
    )
    assert (solution.labels, solution.outcome, solution.answer) == ((None,) * 7, 1, "80")
    assert solution.solution_id == "gsm8k_solutions/544/175b_verification"
    found = Counter(parse("gsm8k_solutions", row).outcome for row in rows)
    assert found == {1: 1384, 0: 2309}


def test_gsm8k_solutions_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,problem,answer,model,response,correct\n0,20 + 3?,23,m,23,True\n1,20 + 3?,23,m,24,False\n")
    found = read_imports([recipe.Import(format="gsm8k_solutions", path=path)])
    assert [(s.answer, s.text, s.outcome) for s in found.solutions] == [("23", "23", 1), ("23", "24", 0)]


def test_math_shepherd(data_dir: Path) -> None:
    path = data_dir / "steps/raw_format_math-shepherd_sample.jsonl"
    solutions = solutions_of(path, "math_shepherd")
    assert [s.labels for s in solutions] == [
        (1, 1, 1, 1, 0), (0, 0, 0), (0, 0), (0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0), (0, 0, 0),
    ]  # fmt: skip
    assert {s.outcome for s in solutions} == {0}
    janet = solutions[0]
    assert janet.problem.startswith("Janet pays $40/hour") and janet.problem.endswith("lessons in a year?")
    assert janet.steps[0] == ("Step 1: Janet spends 3 hours + 5 hours = <<3+5=8>>8 hours per week on music lessons.\n")
    assert janet.steps[4] == (
        "Step 5: She spends 260 * 52 = <<260*52=13520>>13520 on music lessons in a year. The answer is: 13520"
    )
    for row, solution in zip(raw_rows(path), solutions, strict=True):
        assert solution.text == row["input"][len(solution.problem) :].replace(" ки", "").strip()


def test_math_shepherd_right_solution_states_the_answer() -> None:
    text = "How many? Step 1: 2 + 2 = 4. {0}\nStep 2: So four. The answer is: 4 {1}"
    solution = parse("math_shepherd", {"input": text.format("ки", "ки"), "label": text.format("-", "+")})
    assert (solution.labels, solution.outcome, solution.answer) == ((0, 1), 1, "4")


def test_math_shepherd_rejects_labels_that_do_not_fit() -> None:
    row = {"input": "P? Step 1: a ки\nStep 2: b ки", "label": "P? Step 1: a +\nStep 2: b"}
    with pytest.raises(ValueError, match=r"input has 2 step markers, label ends 1 lines .* differ from step 1 on"):
        parse("math_shepherd", row)
    with pytest.raises(ValueError, match="differ from step 0 on"):
        parse("math_shepherd", {**row, "label": "Q? Step 1: a +\nStep 2: b +"})
    with pytest.raises(ValueError, match='expected "Step 1:"'):
        parse("math_shepherd", {"input": "P? a ки", "label": "P? a +"})


def test_prm800k(data_dir: Path) -> None:
    path = data_dir / "steps/raw_format_prm800k_sample.jsonl"
    pencil, senate, seconds, boys, tetrahedron, powers = solutions_of(path, "prm800k")
    # the labeler wrote step 2 and chose the last of five candidates for step 6
    assert pencil.steps[1] == "We have $3p+e=1.24$ and $5p+e=1.82$.\n"
    assert pencil.steps[5] == "That means a pencil costs 29 cents.\n\n# Answer\n\n29"
    assert (pencil.labels, pencil.outcome, pencil.answer) == ((1,) * 6, 1, "29")
    # stopped at the first error: step 7 of 13; step 2 is neutral; 7200 is not 28800
    assert senate.labels == (1, 1, 1, 1, 1, 1, 0, None, None, None, None, None, None)
    assert senate.steps[6].startswith("For the Democrats, there are 5! ways to order them in a line, but")
    assert senate.steps[12] == "# Answer\n\n7200"
    assert (senate.outcome, senate.finished) == (0, True)
    assert (seconds.labels, seconds.steps[4]) == ((1,) * 5, "Exactly.\n\n# Answer\n\n468")
    assert len(boys.steps) == 7
    assert boys.steps[5] == "Since there are more girls than boys, g is 26 and b is 9.\n"
    # given up after the labeler's own step: a beginning
    assert len(tetrahedron.steps) == 8 and tetrahedron.steps[7].startswith("By symmetry,")
    assert (tetrahedron.outcome, tetrahedron.finished) == (None, False)
    # a screening question without a gold answer
    assert (len(powers.steps), powers.outcome, powers.answer) == (12, 1, "8, 3, 1")
    planned = raw_rows(path)[1]["question"]["pre_generated_steps"]
    assert senate.text == "\n".join(planned)


def prm800k_row(steps: list[dict[str, Any]], finish_reason: str, **question: Any) -> dict[str, Any]:
    return {
        "labeler": "a", "timestamp": "2022", "question": {"problem": "P", **question},
        "label": {"steps": steps, "finish_reason": finish_reason},
    }  # fmt: skip


def prm800k_step(rating: int | None, flagged: bool | None = None, chosen: int | None = 0) -> dict[str, Any]:
    completion = {"text": f"rated {rating}", "rating": rating, "flagged": flagged}
    return {"completions": [completion], "human_completion": None, "chosen_completion": chosen}


def test_prm800k_special_rows() -> None:
    flagged = prm800k_row([prm800k_step(1), prm800k_step(-1, flagged=True), prm800k_step(None)], "solution")
    assert parse("prm800k", flagged).labels == (1, None, None)
    broken = importer_of("prm800k")(prm800k_row([prm800k_step(1)], "bad_problem"))
    assert (broken.solutions, broken.skipped) == ((), "bad_problem")
    assert importer_of("prm800k")(prm800k_row([], "give_up")).skipped == "give_up before the first step"
    with pytest.raises(ValueError, match=r"steps\.0: expected chosen_completion below .* \(1\), got 4"):
        parse("prm800k", prm800k_row([prm800k_step(1, chosen=4)], "solution"))
    with pytest.raises(ValueError, match="but steps follow"):
        parse("prm800k", prm800k_row([prm800k_step(-1, chosen=None), prm800k_step(1)], "solution"))
    # a wrong step and the right answer all the same
    lucky = prm800k_row(
        [prm800k_step(-1, chosen=None)], "found_error", pre_generated_steps=["rated -1", "so 5"],
        pre_generated_answer="5", ground_truth_answer="5",
    )  # fmt: skip
    assert (parse("prm800k", lucky).labels, parse("prm800k", lucky).outcome) == ((0, None), 1)


def test_omegaprm_tree(data_dir: Path) -> None:
    path = data_dir / "steps/raw_format_math-aps_sample.jsonl"
    row = raw_rows(path)[1]
    solutions = {len(s.text): s for s in importer_of("math-aps")(row).solutions}
    assert len(solutions) == 7
    # line breaks and a space part the question from the solution: they are not the solution's
    prefixes = [node["solution_prefix"] for node in row["reasoning_steps"]]
    tail = {len(prefix): prefix[len(row["question"]) :].strip() for prefix in prefixes}
    lost = solutions[len(tail[2531])]
    assert (lost.labels, lost.outcome, lost.finished) == ((1, 0, 0), None, False)
    assert lost.text == tail[2531]
    assert lost.steps[0].rstrip() == tail[1991]
    assert (lost.steps[0] + lost.steps[1]).rstrip() == tail[2392]
    right = solutions[len(tail[2604])]
    assert (right.labels, right.outcome, right.finished) == ((1,), 1, True)
    rambling = solutions[len(tail[3306])]  # its last box answers another problem
    assert (rambling.labels, rambling.outcome) == ((1, 1), None)
    counts = [len(importer_of("omegaprm")(row).solutions) for row in raw_rows(path)]
    assert counts == [81, 7, 36]


def test_every_step_list_joins_to_its_text(data_dir: Path) -> None:
    for name, source in FILES.items():
        for solution in solutions_of(data_dir / name, source):
            assert len(solution.steps) == len(solution.labels)
            assert all(step.strip() for step in solution.steps)
            assert solution.text.strip() == solution.text or source in ("processbench", "mrben")


GOOD = {"id": "x", "problem": "P", "steps": ["a"], "label": 0, "final_answer_correct": False}
BAD_LINES = {
    '{"id": "x", ': "broken JSON at column",
    "[1, 2]": "expected a JSON object, got list",
    json.dumps({**GOOD, "labels": [1, 0]}): "expected one label per step, got 2 labels for 1 steps",
    json.dumps({**GOOD, "labels": [1], "first_error": 0}): "contradict first_error 0",
    json.dumps({**GOOD, "steps": ["", " "]}): "the solution is empty",
    json.dumps({**GOOD, "steps": []}): "steps: .*at least 1",
    json.dumps({**GOOD, "steps": ["", "b"]}): "step 0 .* has no text",
    json.dumps({**GOOD, "steps": None}): "steps: .*valid list",
    json.dumps({**GOOD, "steps": [3]}): r"steps\.0: .*got 3",
    json.dumps({**GOOD, "problem": " "}): "the problem is empty",
    json.dumps({**GOOD, "final_answer_correct": None}): "final_answer_correct: .*valid boolean",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_row_names_file_and_line_and_quarantine_keeps_the_rest(tmp_path: Path, line: str) -> None:
    path, bad = tmp_path / "rows.jsonl", tmp_path / "bad" / "bad.jsonl"
    good = [json.dumps({**GOOD, "id": number}) for number in (1, 2)]
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    imports = [recipe.Import(format="processbench", path=path)]
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{BAD_LINES[line]}"):
        read_imports(imports)
    imported = read_imports(imports, quarantine=bad)
    assert [s.solution_id for s in imported.solutions] == ["processbench/1", "processbench/2"]
    (rejected,) = raw_rows(bad)
    assert (rejected["line"], rejected["row"]) == (2, line.strip())


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean processbench\?.*prm800k"):
        importer_of("procesbench")
    assert importer_of("Math-Shepherd") is FORMATS["math_shepherd"]


def test_same_answer() -> None:
    pairs = [("1,000", "1000"), ("7200", "28800"), ("x + 1", "1 + x"), (None, "3"), ("1e9", "2e999999999")]
    assert [same_answer(a, b) for a, b in pairs] == [1, 0, None, None, None]


def test_token_cover_of_real_unicode_solutions(data_dir: Path, tokenizer_dir: Path) -> None:
    """Against byte positions: a byte-level token's spelling has one character per byte."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    solutions = solutions_of(data_dir / "steps/processbench_math.jsonl", "processbench")[:300]
    solutions += solutions_of(data_dir / "steps/raw_format_math-aps_sample.jsonl", "omegaprm")
    assert sum(not s.text.isascii() for s in solutions) >= 10
    samples = judged_samples(solutions, prompts_of(tokenizer))
    for solution, sample in zip(solutions, samples, strict=True):
        body = sample.token_ids[:-1] if solution.finished else sample.token_ids
        assert (sample.token_ids[-1] == tokenizer.eos_token_id) == solution.finished
        assert tokenizer.decode(body) == solution.text
        starts, position = [], 0
        for spelling in tokenizer.convert_ids_to_tokens(body):
            starts.append(position)
            position += len(spelling)
        end = 0
        for step, text in zip(sample.steps, solution.steps, strict=True):
            assert sample.text[step.start : step.end] == text
            begin, end = end, end + len(text.encode())
            expected = [number for number, start in enumerate(starts) if begin <= start < end]
            assert [n for n in range(step.token_start, step.token_end) if n < len(body)] == expected
        assert sample.steps[-1].token_end == len(sample.token_ids)
        assert [s.label for s in sample.steps] == list(solution.labels)


def test_trimmed_offsets_give_the_same_steps(data_dir: Path, tokenizer_dir: Path) -> None:
    """GPT-2's and Llama 3's tokenizers leave a token's leading space out of its offsets."""
    plain = AutoTokenizer.from_pretrained(tokenizer_dir)
    core = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    solutions = solutions_of(data_dir / "steps/processbench_gsm8k.jsonl", "processbench")[:50]
    expected = judged_samples(solutions, prompts_of(plain))
    for one, other in zip(expected, judged_samples(solutions, prompts_of(trimmed)), strict=True):
        assert one.steps == other.steps and one.token_ids == other.token_ids


def sewn_tokenizer(merged: str) -> PreTrainedTokenizerFast:
    """Tokens a, b, c, d, the line break, and ``merged`` with its beginnings."""
    pieces = ["</s>", *"abcd\n"]
    merges = []
    for length in range(2, len(merged) + 1):
        merges.append((merged[: length - 1], merged[length - 1]))
        pieces.append(merged[:length])
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_token_over_a_boundary_belongs_where_it_starts() -> None:
    solution = ImportedSolution(
        problem_id="p", problem="abc", answer=None, solution_id="s", source="processbench",
        steps=("ab\n", "cd"), labels=(1, 0), outcome=0,
    )  # fmt: skip
    (sample,) = judged_samples([solution], prompts_of(sewn_tokenizer("b\nc")))
    assert [(s.token_start, s.token_end, s.label) for s in sample.steps] == [(0, 2, 1), (2, 4, 0)]
    # the second step has no token of its own: nothing to learn from its label, and the end token is not its token
    (sample,) = judged_samples([solution], prompts_of(sewn_tokenizer("b\ncd")))
    assert [(s.token_start, s.token_end, s.label) for s in sample.steps] == [(0, 3, 1), (3, 3, None)]
    beginning = solution.model_copy(update={"finished": False})
    (sample,) = judged_samples([beginning], prompts_of(sewn_tokenizer("b\ncd")))
    assert [(s.token_start, s.token_end, s.label) for s in sample.steps] == [(0, 2, 1), (2, 2, None)]
    assert sample.finish_reason == "length"


def test_files_together_share_problems(data_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """372 of ProcessBench's 375 GSM8K problems are among the 1,311 of the model solutions."""
    imports = [
        recipe.Import(format="processbench", path=data_dir / "steps/processbench_gsm8k.jsonl"),
        recipe.Import(format="gsm8k_solutions", path=data_dir / "samples/gsm8k_model_solutions.jsonl"),
    ]
    counts = import_all(imports, tokenizer_dir, recipe.Prompt(), tmp_path / "p.jsonl", tmp_path / "j.jsonl")
    assert (counts["problems"], counts["solutions"]) == (1311 + 375 - 372, 4093)
    assert counts["sources"][str(imports[0].path)]["outcomes"] == {"right": 200, "wrong": 200, "unjudged": 0}
    assert counts["sources"][str(imports[1].path)]["steps"] == {"right": 0, "wrong": 0, "unjudged": 16226}
    samples = list(read_records(tmp_path / "j.jsonl", JudgedSample))
    problems = {p.problem_id: p for p in read_records(tmp_path / "p.jsonl", Problem)}
    assert len(samples) == 4093 and counts["response_tokens"] == sum(len(s.token_ids) for s in samples)
    assert len(problems) == counts["problems"] - counts["problems_without_answer"]
    assert problems[samples[0].problem_id].answer == "24"  # the gold answer, not one that a solution states
    prompts = {(s.problem_id, tuple(s.prompt_token_ids)) for s in samples}
    assert len(prompts) == counts["problems"]
    assert problem_id_of("a  b\n") == problem_id_of(" a b") != problem_id_of("ab")


def test_one_id_with_two_texts_is_refused_and_a_repeated_row_dropped(tmp_path: Path) -> None:
    row = {"id": "x", "problem": "P", "steps": ["a"], "label": 0, "final_answer_correct": False}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    imported = read_imports([recipe.Import(format="processbench", path=path)])
    assert (len(imported.solutions), imported.counts["duplicates_dropped"]) == (1, 1)
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "steps": ["b"]}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*processbench/x is duplicated with different content"):
        read_imports([recipe.Import(format="processbench", path=path)])
    aside = tmp_path / "aside.jsonl"
    assert read_imports([recipe.Import(format="processbench", path=path)], quarantine=aside).solutions == (
        imported.solutions
    )
    assert json.loads(aside.read_text())["line"] == 2


def test_a_solution_that_math_shepherd_labels_twice_is_two(tmp_path: Path) -> None:
    """Its rows have no ids."""
    text = "Q? Step 1: 1 + 1 = 2 {0}\nStep 2: The answer is: 2 {1}"
    rows = [
        {"input": text.format("ки", "ки"), "label": text.format("+", sign), "task": "GSM8K"} for sign in ("+", "-", "+")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    imported = read_imports([recipe.Import(format="math_shepherd", path=path)])
    assert [solution.outcome for solution in imported.solutions] == [1, 0]
    assert imported.counts["duplicates_dropped"] == 1


def import_one(format_: str, path: Path, tokenizer: Path, out: Path, quarantine: Path | None = None) -> dict[str, Any]:
    item, files = recipe.Import(format=format_, path=path), (out / "problems.jsonl", out / "judged.jsonl")
    return import_all([item], tokenizer, recipe.Prompt(), *files, quarantine=quarantine)


def test_an_import_writes_both_files(data_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "steps/raw_format_prm800k_sample.jsonl"
    counts = import_one("PRM800K", path, tokenizer_dir, tmp_path / "out")
    assert counts["sources"][str(path)]["outcomes"] == {"right": 4, "wrong": 1, "unjudged": 1}
    samples = list(read_records(tmp_path / "out/judged.jsonl", JudgedSample))
    assert [s.judge.process for s in samples] == ["prm800k"] * 6
    assert len(list(read_records(tmp_path / "out/problems.jsonl", Problem))) == 6


def test_recipe_of_real_text_reads_its_files(data_dir: Path, repository: Path) -> None:
    loaded = recipe_file.read_recipe(repository / "recipes" / "gsm8k_offline_cpu.yaml")
    if not all(item.path.is_file() for item in loaded.problems.imports):
        pytest.skip("the recipe looks for the data beside the checkout; set STEPKTO_TEST_DATA to move it")
    counts = read_imports(loaded.problems.imports).counts
    assert counts["solutions"] == 400 + 1000 + 6 + 7 + 3693
    assert counts["problems_with_conflicting_answers"] == 0


def test_mrben_as_published(data_dir: Path) -> None:
    """The authors' keys (1-based steps, N/A) give what the normalised file gives."""
    lines = (data_dir / "steps/mrben_math.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[:200]):
        uuid, model = row["id"].rsplit("-", 1)
        published = {
            "Question_UUID": uuid,
            "Question": row["problem"],
            "Options": row["options"],
            "Ground_Truth_Answer": "Z",
            "Ground_Truth_Answer_Modified": row["answer"],
            "Sampled_Model": model,
            "Model_Solution_Steps": row["steps"],
            "Model_Solution_Correctness": "correct" if row["solution_correct"] else "incorrect",
            "Model_Solution_First_Error_Step": "N/A" if row["first_error"] is None else str(row["first_error"] + 1),
        }
        importer = importer_of("mrben")
        assert importer(published) == importer(row)
        with pytest.raises(ValueError, match="contradicts the first error step"):
            importer({**published, "Model_Solution_Correctness": "correct", "Model_Solution_First_Error_Step": "1"})
        with pytest.raises(ValueError, match="missing key 'Sampled_Model'"):
            importer({key: value for key, value in published.items() if key != "Sampled_Model"})


# --- special tokens in the text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"response": "20 + 3 = 23.\nAnswer: \\boxed{23}</s>"}, "the response holds the text of special tokens (</s>)"),
        ({"response": "20 + 3 = 23.</s>\n"}, "the response holds the text of special tokens (</s>)"),
        ({"response": "<s>20 + 3 =</s> 23."}, "the response holds the text of special tokens (<s> </s>)"),
        ({"problem": "What is 20</s> + 3?"}, "the problem holds the text of special tokens (</s>)"),
    ],
)
def test_special_tokens_in_a_row_make_it_a_bad_one(
    repository: Path, tmp_path: Path, keys: dict[str, str], said: str
) -> None:
    """Model solutions dumped with their end token: with a second one added, the model would learn to end twice."""
    good = {"id": 0, "problem": "20 + 3?", "answer": "23", "model": "m", "response": "It is 23.", "correct": True}
    source, out, aside = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "aside.jsonl"
    source.write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'id': 1, **keys})}\n")
    arguments = ("gsm8k_solutions", source, repository / "recipes" / "mini_cpu_m0", out)
    with pytest.raises(UserError) as caught:
        import_one(*arguments)
    assert str(caught.value).startswith(f"{source}:2: {said}")
    assert not (out / "judged.jsonl").exists()
    import_one(*arguments, aside)
    assert [json.loads(line)["line"] for line in aside.read_text().splitlines()] == [2]
    (sample,) = read_records(out / "judged.jsonl", JudgedSample)
    assert (sample.token_ids.count(2), sample.token_ids[-1], sample.finish_reason) == (1, 2, "stop")
