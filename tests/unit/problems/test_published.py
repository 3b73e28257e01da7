"""Problems as their publishers ship them: layouts, ids, duplicates, bad rows with file:line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem
from megatron_stepkto.base.tables import splits_of
from megatron_stepkto.problems.published import Published, hold_out, read_published, without

GSM8K = {"question": "2 boxes of 3?", "answer": "2*3 = <<2*3=6>>6.\n#### 6"}
MATH = {"problem": "$1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
NUMINA = {"source": "olympiads", "problem": "Find x.", "solution": "So $x = \\boxed{\\frac{1}{2}}$.", "messages": []}
NUMINA_15 = {"problem": "Find y.", "solution": "...", "answer": "7", "problem_type": "Number Theory"}


def read(*paths: Path) -> Published:
    return read_published(paths, lambda problem: problem, lambda rows: None)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answer"), [(GSM8K, "6"), (MATH, "2"), (NUMINA, "\\frac{1}{2}"), (NUMINA_15, "7")],
    ids=["gsm8k", "math", "numina", "numina_1.5"],
)  # fmt: skip
def test_layouts_in_json_lines_and_parquet(row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, table = write(tmp_path / "rows.jsonl", [row]), tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{key: value for key, value in row.items() if value != []}]), table)
    [problem] = read(lines).problems
    assert read(table).problems == [problem]
    assert problem.answer == answer
    assert len(problem.problem_id) == 16  # a hash: none of these layouts has an id


def test_one_file_per_problem_and_splits_as_in_the_archive_of_math(tmp_path: Path) -> None:
    for split, subject, number in (("train", "algebra", 1), ("train", "geometry", 2), ("test", "algebra", 3)):
        path = tmp_path / "MATH" / split / subject / f"{number}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**MATH, "problem": f"${number}$?"}, indent=4))
    splits = splits_of(tmp_path / "MATH")
    assert {split: len(files) for split, files in splits.items()} == {"train": 2, "test": 1}
    assert [problem.problem for problem in read(*splits["train"]).problems] == ["$1$?", "$2$?"]


def test_a_split_stands_anywhere_in_a_name(tmp_path: Path) -> None:
    names = {
        "gsm8k_train.jsonl": "train", "GSM8K-Test.jsonl": "test", "math.dev.jsonl": "dev", "pretrained.jsonl": "",
        "contests.jsonl": "", "validation_1.jsonl": "validation",
    }  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("{}\n")
    found = {path.name: split for split, paths in splits_of(tmp_path).items() for path in paths}
    assert found == names


def test_splits_of_a_folder_of_the_hub_and_of_save_to_disk(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / "hub" / "main").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / "main" / name).touch()
    assert set(splits_of(tmp_path / "hub")) == {"train", "test"}
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert splits_of(tmp_path / "saved")["test"] == [tmp_path / "saved" / "test"]


def test_bad_rows_are_named_and_duplicates_counted(tmp_path: Path) -> None:
    proof = {**NUMINA_15, "problem": "Prove it.", "answer": "proof"}
    twice = {**GSM8K, "question": "2 boxes  of 3?"}
    conflict = [{"problem": "Q?", "answer": "1"}, {"problem": "Q?", "answer": "2"}]
    path = write(tmp_path / "rows.jsonl", [GSM8K, "{broken", twice, proof, *conflict, {"text": "no problem"}])
    found = read(path)
    assert [problem.answer for problem in found.problems] == ["6"]
    assert found.repeated == [f"{path}:3"]
    reasons = {row["line"]: row["error"] for row in found.rejected}
    assert set(reasons) == {2, 4, 5, 6, 7}
    assert reasons[4] == "has no final answer to check (answer: proof)"
    assert f"two answers, 1 ({path}:5) and 2 ({path}:6)" in reasons[5]


def test_ids_that_are_not_unique_become_hashes(tmp_path: Path) -> None:
    rows = [{"id": 1, "problem": f"{n}?", "answer": str(n)} for n in (3, 4)]
    found = read(write(tmp_path / "rows.jsonl", rows))
    assert found.renamed
    assert len({problem.problem_id for problem in found.problems}) == 2


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["nothing", {"a": 1}])
    with pytest.raises(UserError, match=rf"got 2 rows that cannot be used: {path}:1: broken JSON"):
        read(path)


def test_held_out_problems_depend_on_the_texts_alone() -> None:
    problems = [Problem(problem_id=str(n), problem=f"{n} + 1 = ?", answer=str(n + 1)) for n in range(50)]
    rest, held_out = hold_out(problems, 5)
    _, same = hold_out(problems[::-1], 5)
    assert (len(rest), len(held_out)) == (45, 5)
    assert {p.problem for p in same} == {p.problem for p in held_out}
    assert len(without(problems, held_out)) == 45
