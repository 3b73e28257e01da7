"""Problems of the usual layouts, templates, and ``stepkto measure`` with a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.tables import table_rows
from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.problems.datasets import load_problems, to_problem
from megatron_stepkto.recipe.keys import Prompt
from megatron_stepkto.recipe.templates import TEMPLATES


def test_benchmarks_of_the_usual_layouts(data_dir: Path) -> None:
    counts = {"math500": 500, "aime24": 30, "amc23": 40, "gsm8k_test": 1319}
    for name, count in counts.items():
        assert len(load_problems(str(data_dir / f"eval/{name}.jsonl"))) == count
    first = load_problems(str(data_dir / "eval/math500.jsonl"))[0]
    assert first.answer == r"\left( 3, \frac{\pi}{2} \right)"
    assert (first.model_extra or {})["subject"] == "Precalculus"
    assert load_problems(str(data_dir / "eval/amc23.jsonl"))[0].answer == "27.0"


def test_gsm8k_as_published() -> None:
    problem = to_problem({"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})
    assert (problem.problem, problem.answer) == ("2 + 2?", "4")
    assert problem.solution == "2 + 2 = <<2+2=4>>4\n#### 4"


def test_an_answer_may_stand_in_the_solution_alone() -> None:
    assert to_problem({"problem": "x?", "solution": r"so \boxed{7}", "type": "Algebra", "id": 3}).answer == "7"
    with pytest.raises(ValueError, match="expected the answer under"):
        to_problem({"problem": "x?", "solution": "so 7"})
    with pytest.raises(ValueError, match="expected the problem under"):
        to_problem({"text": "x?", "answer": "7"})


def test_competitions_as_published() -> None:
    """OlympiadBench's text part in English, AIME 2025, HMMT February 2025."""
    olympiad = to_problem({
        "id": 1606, "question": "Find k.", "solution": ["Long."], "final_answer": ["$2$", "$-1$"],
        "subfield": "Algebra", "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None,
    })  # fmt: skip
    assert (olympiad.problem_id, olympiad.answer, olympiad.solution) == ("1606", "$2$, $-1$", None)
    assert (olympiad.model_extra or {})["subject"] == "Algebra"
    aime = to_problem({"problem": "Find b.", "answer": "70", "id": "0"})
    assert (aime.problem_id, aime.answer) == ("0", "70")
    hmmt = to_problem({"problem_idx": 3, "problem": "n?", "answer": "\\frac{1}{576}", "problem_type": ["Algebra"]})
    assert (hmmt.problem_id, hmmt.answer) == ("3", "\\frac{1}{576}")
    with pytest.raises(ValueError, match="expected the answer as a text or a number"):
        to_problem({"question": "x?", "final_answer": [7]})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"answer": [7]}, r"expected the answer as a text or a number, got \[7\]"),
        ({"answer": True}, "expected the answer as a text or a number, got True"),
        ({"answer": float("nan")}, "expected the answer as a text or a finite number, got nan"),
        ({"problem": "  "}, "must not be blank"),
        ({"problem": "x\0?"}, r"holds the control character U\+0000"),
        ({"id": ""}, "must not be blank"),
    ],
)
def test_rows_that_are_no_problem(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    """In JSON lines and in a list, whose rows have no line."""
    row = {"problem": "x?", "answer": "7", **keys}
    for name, text in (("a.jsonl", json.dumps(row)), ("a.json", json.dumps([row]))):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}:? ?(row )?1: .*{said}"):
            load_problems(str(tmp_path / name))


def test_parquet_csv_and_json(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 1?", "answer": "3"}])
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(tmp_path / "folder")
    (tmp_path / "a.json").write_text(json.dumps(list(table)))
    for name in ("a.parquet", "a.csv", "folder", "a.json"):
        assert [(p.problem, p.answer) for p in load_problems(str(tmp_path / name))] == [
            ("1 + 1?", "2"),
            ("2 + 1?", "3"),
        ]


@pytest.mark.parametrize(
    "answers",
    [
        ("7", "123456789012345678901"), ("0.5", "9007199254740993"), ("10:30", "09:45"), ("2024-01-05", "2024-02-06"),
        ("1e3", "1.50"), ("007", "8"), ("7", "-12"), ("NA", "null"),
        ("True", "False"), ("true", "true"), ("1", "0"),
    ],
)  # fmt: skip
def test_answers_of_a_csv_file_stay_as_written(tmp_path: Path, answers: tuple[str, str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("problem,answer\n" + "".join(f"{n} + 1?,{answer}\n" for n, answer in enumerate(answers)))
    assert tuple(problem.answer for problem in load_problems(str(path))) == answers


def test_bytes_are_text_in_utf_8_or_refused(tmp_path: Path) -> None:
    """Excel saves a CSV file in the code page of its country; some programs write a parquet file's texts as bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, bad, csv = tmp_path / "good.parquet", tmp_path / "bad.parquet", tmp_path / "excel.csv"
    header = tmp_path / "header.csv"
    for path, text in ((good, "27 € für dich?".encode()), (bad, "27 € für dich?".encode("cp1252"))):
        pq.write_table(
            pa.table({"problem": pa.array([text], pa.binary()), "answer": pa.array([b"2"], pa.binary())}), path
        )
    csv.write_bytes("problem,answer\n27 € für dich?,2\n".encode("cp1252"))
    header.write_bytes("problem,answer,für\n27?,2,3\n".encode("cp1252"))
    assert [(p.problem, p.answer) for p in load_problems(str(good))] == [("27 € für dich?", "2")]
    for path in (bad, csv, header):
        with pytest.raises(
            UserError, match=rf"{path.name}: .*expected text in UTF-8, found other bytes; save the file"
        ):
            load_problems(str(path))


def test_cells_of_a_csv_file_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('label,rating,number,empty\n"True",-1,1.0,\n"False",1,2.5,""\n')
    assert [json.loads(row) for _, row in table_rows(path)] == [
        {"label": "True", "rating": "-1", "number": "1.0", "empty": None},
        {"label": "False", "rating": "1", "number": "2.5", "empty": None},
    ]
    path.write_text("problem,answer\n")
    assert list(table_rows(path)) == []


def test_a_csv_file_of_answers_that_are_true_or_false(tmp_path: Path) -> None:
    """Unlike in JSON, where true is not text."""
    path = tmp_path / "a.csv"
    path.write_text('"problem","answer","id"\n"Is 2 even?","True",1\n"Is 3 even?","False",2\n')
    found = load_problems(str(path))
    assert [(p.problem_id, p.problem, p.answer) for p in found] == [
        ("1", "Is 2 even?", "True"),
        ("2", "Is 3 even?", "False"),
    ]


def test_a_csv_file_may_hold_line_breaks_and_empty_cells(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.csv", tmp_path / "aside.jsonl"
    path.write_text('problem,answer,solution\n"1 +\n1?",2,\n2 + 1?,,so \\boxed{3}\n3?,,so 7\n')
    with pytest.raises(UserError, match=r"a\.csv:3: expected the answer"):
        load_problems(str(path))
    found = load_problems(str(path), quarantine=aside)
    assert [(p.problem, p.answer) for p in found] == [("1 +\n1?", "2"), ("2 + 1?", "3")]
    assert json.loads(aside.read_text())["line"] == 3
    (tmp_path / "b.csv").write_text("problem,answer\n1?,2,3\n")
    with pytest.raises(UserError, match=r"b\.csv: expected a csv file, it does not read: .*Expected 2 columns, got 3"):
        load_problems(str(tmp_path / "b.csv"))
    (tmp_path / "c.txt").write_text("1?")
    with pytest.raises(UserError, match=r"c\.txt: expected \.jsonl, \.ndjson, \.json, \.parquet, \.csv or a folder"):
        load_problems(str(tmp_path / "c.txt"))


def test_nothing_is_downloaded_without_being_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to download it, write hub:math500"):
        load_problems("math500")
    (tmp_path / "bad.jsonl").write_text('{"problem": "1?", "answer": "1"}\n{"problem": "2?"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: expected the answer"):
        load_problems(str(tmp_path / "bad.jsonl"))


def test_templates_are_named_or_text() -> None:
    for name, text in TEMPLATES.items():
        assert text.count("{problem}") == 1
        assert Prompt(template=name).template == text
    assert Prompt(template="Q: {problem}").template == "Q: {problem}"
    with pytest.raises(ValueError, match=r"contain \{problem\} or be one of plain, boxed, qwen_math"):
        Prompt(template="qwen_maths")


def test_evaluate_a_folder(tmp_path: Path, repository: Path) -> None:
    data = tmp_path / "sums.jsonl"
    rows = [
        {"problem": problem.problem, "answer": problem.answer, "level": 1 + number % 2}
        for number, problem in enumerate(generate("test", 6, 5))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "megatron_stepkto", "measure", str(repository / "recipes/mini_cpu_m0"),
        "--data", str(data), "--output", str(output), "--set", "sample.backend=transformers",
        "--set", "sample.max_tokens=150", "--set", "sample.dtype=float32", "--set", "evaluate.k=2",
        "--set", "prompt.template=plain", "--set", "judge.split=line", "--set", "judge.process=chained_arithmetic",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mini_cpu_m0 " in done.stdout
    metrics = read_json(output / "results/metrics.json")
    assert (metrics["num_problems"], metrics["k"], list(metrics["by"])) == (6, 2, ["data", "level"])
    assert metrics["by"]["data"]["sums"]["pass_at_1"] == metrics["pass_at_1"]
    assert metrics["unparsed_share"] < 1
    manifest = read_json(output / "results/manifest.json")
    assert manifest["key"]["settings"]["prompt"]["template"] == "{problem}\n"
    assert manifest["key"]["settings"]["seed"] == 0
    assert set(manifest["key"]["inputs"]) == {"model", "problems"}
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "already done" in again.stderr
    assert again.stdout == done.stdout
    same = subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", "compare-evaluations", str(output), f"{output}/results"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "+0.0 [+0.0, +0.0]" in same.stdout
    wrong = subprocess.run([*command, "--set", "judge.proces=none"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2
    assert "did you mean process?" in wrong.stderr
    data.write_text(data.read_text().replace("has", "had"))
    other = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert other.returncode == 2
    assert "holds an evaluation of other problems" in other.stderr
