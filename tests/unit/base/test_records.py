"""JSON-lines records: what is refused and how it is told, quarantine, round trips, atomic writes."""

from __future__ import annotations

import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.base.records import (
    JudgedSample,
    KLPartner,
    Problem,
    Sample,
    TrainExample,
    TrainStep,
    read_records,
    set_aside,
    write_records,
)

PROBLEM = {"problem_id": "p", "problem": "1 + 1?", "answer": "2"}
SAMPLE = {
    "problem_id": "p",
    "sample_id": "p/0",
    "prompt_token_ids": [5, 6],
    "token_ids": [7, 8, 9],
    "text": "2",
    "finish_reason": "stop",
}
STEPS = [
    {"start": 0, "end": 1, "token_start": 0, "token_end": 2, "label": 1},
    {"start": 1, "end": 1, "token_start": 2, "token_end": 3, "label": None},
]
JUDGED = {**SAMPLE, "steps": STEPS, "outcome": 1, "judge": {"outcome": "answer", "process": "none"}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(path: Path, model: type[Any] = Problem, quarantine: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(read_records(path, model, quarantine=quarantine))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- faults --------------------------------------------------------------------------------------------------


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: expected a file of JSON lines, found none"
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: expected a file of JSON lines, found a directory without JSON lines, parquet or CSV"
    )


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n\n"])
def test_nothing_in_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert refusal(path) == f"{path}: expected at least one record, the file is empty"


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "", PROBLEM, "   ", {**PROBLEM, "problem_id": "q"}, "")
    assert [row.problem_id for row in read_records(path, Problem)] == ["p", "q"]
    write(path, "", PROBLEM, "", "{")
    assert refusal(path).startswith(f"{path}:4: ")


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PROBLEM) + "\r\n" + json.dumps({**PROBLEM, "problem_id": "q"}))
    assert [row.problem_id for row in read_records(path, Problem)] == ["p", "q"]


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ('{"problem_id": "p",', 20, "Expecting property name"),  # 19 characters, the fault is behind them
        ('{"problem_id" "p"}', 15, "Expecting ':' delimiter"),
        ('{"problem_id": p}', 16, "Expecting value"),
        ("not json", 1, "Expecting value"),
    ],
)
def test_broken_json_names_line_and_column(tmp_path: Path, line: str, column: int, message: str) -> None:
    # the first is a row cut short, as an interrupted copy leaves it
    path = write(tmp_path / "rows.jsonl", PROBLEM, line)
    told = refusal(path)
    assert told.startswith(f"{path}:2: broken JSON at column {column}: {message}")
    assert told.endswith("; correct the row, or pass --quarantine FILE to set bad rows aside")
    with pytest.raises(UserError) as caught:  # a command without that option
        list(read_records(path, Problem))
    assert str(caught.value) == told.replace("pass --quarantine FILE to set bad rows aside", "make the file again")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_not_an_object(tmp_path: Path, line: str, kind: str) -> None:
    path = write(tmp_path / "rows.jsonl", line)
    assert f"{path}:1: expected a JSON object, got {kind};" in refusal(path)


def test_bytes_that_are_not_text_and_nesting_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PROBLEM).encode() + b'\n{"problem_id": "\xff"}\n')
    assert refusal(path).startswith(f"{path}:2: ")
    path.write_text("[" * 100_000 + "\n")
    assert refusal(path).startswith(f"{path}:1: ")


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (without(JUDGED, "token_ids"), "token_ids: Field required"),
        (without(JUDGED, "judge"), "judge: Field required"),
        ({**JUDGED, "steps": [without(STEPS[0], "token_end"), STEPS[1]]}, "steps.0.token_end: Field required"),
        ({**JUDGED, "sample_id": 3}, "sample_id: Input should be a valid string, got 3"),
        ({**JUDGED, "token_ids": "789"}, "token_ids: Input should be a valid list, got '789'"),
        ({**JUDGED, "token_ids": [7, "x", 9]}, "token_ids.1: Input should be a valid integer"),
        ({**JUDGED, "token_ids": [7, 8.5, 9]}, "token_ids.1: Input should be a valid integer"),
        ({**JUDGED, "outcome": 2}, "outcome: Input should be 0 or 1, got 2"),
        ({**JUDGED, "token_ids": []}, "token_ids: List should have at least 1 item after validation, not 0"),
        ({**JUDGED, "prompt_token_ids": []}, "prompt_token_ids: List should have at least 1 item"),
        ({**JUDGED, "steps": []}, "steps: List should have at least 1 item"),
        ({**JUDGED, "reward": 0.5}, "reward: Extra inputs are not permitted"),
        ({**JUDGED, "steps": [STEPS[0]]}, "record: steps cover 2 of 3 response tokens"),
        ({**JUDGED, "token_ids": [7, 8]}, "record: steps cover 3 of 2 response tokens"),
        (
            {**JUDGED, "steps": [STEPS[0], {**STEPS[1], "token_start": 1}]},
            "record: step 1 covers tokens [1, 3), expected it to start at 2",
        ),
        (
            {**JUDGED, "steps": [{**STEPS[0], "token_start": 1}, STEPS[1]]},
            "record: step 0 covers tokens [1, 2), expected it to start at 0",
        ),
        ({**JUDGED, "steps": [STEPS[1], STEPS[0]]}, "record: step 0 covers tokens [2, 3), expected it to start at 0"),
        ({**JUDGED, "steps": [STEPS[0], {**STEPS[1], "token_end": 1}]}, "record: step 1 covers tokens [2, 1)"),
        ({**JUDGED, "token_log_probs": [-1.0, -2.0]}, "record: 2 token_log_probs for 3 token_ids"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "rows.jsonl", JUDGED, row)
    message = refusal(path, JudgedSample)
    assert message.startswith(f"{path}:2: {said}")
    assert "(and" not in message


def test_the_number_of_further_faults_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"problem_id": "p"})
    assert f"{path}:1: problem: Field required (and 1 more);" in refusal(path)


@pytest.mark.parametrize("row", [{**PROBLEM, "problem": ""}, {**PROBLEM, "answer": ""}])
def test_a_problem_says_something(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "must not be blank, got ''" in refusal(write(tmp_path / "rows.jsonl", row))


def test_a_problem_keeps_keys_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {**PROBLEM, "level": 3, "subject": ["a", "b"]})
    row = next(iter(read_records(path, Problem)))
    assert row.model_dump() == {**PROBLEM, "solution": None, "split": None, "level": 3, "subject": ["a", "b"]}


# --- quarantine ----------------------------------------------------------------------------------------------


def test_quarantine_keeps_good_rows_in_order_and_lists_bad_ones(tmp_path: Path) -> None:
    good = [{**PROBLEM, "problem_id": name} for name in "abc"]
    path = write(tmp_path / "rows.jsonl", "{,}", good[0], "", {"problem_id": "über"}, good[1], "[2]", good[2])
    aside = tmp_path / "bad.jsonl"
    assert [row.problem_id for row in read_records(path, Problem, quarantine=aside)] == ["a", "b", "c"]
    listed = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [(row["file"], row["line"], row["row"]) for row in listed] == [
        (str(path), 1, "{,}"),
        (str(path), 4, json.dumps({"problem_id": "über"})),
        (str(path), 6, "[2]"),
    ]
    assert [row["error"] for row in listed] == [
        "broken JSON at column 2: Expecting property name enclosed in double quotes",
        "problem: Field required (and 1 more)",
        "expected a JSON object, got list",
    ]
    assert all(set(row) == {"file", "line", "error", "row"} for row in listed)


def test_quarantine_adds_to_what_is_there(tmp_path: Path) -> None:
    aside = tmp_path / "bad.jsonl"
    other, rows = write(tmp_path / "other.jsonl", "{", PROBLEM), write(tmp_path / "rows.jsonl", PROBLEM, "{")
    for path in (other, rows, rows):  # the second reading of a file replaces what the first one left
        list(read_records(path, Problem, quarantine=aside))
    listed = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"]) for row in listed] == [("other.jsonl", 1), ("rows.jsonl", 2)]


def test_several_runs_may_set_rows_aside_into_one_file(tmp_path: Path) -> None:
    """Each reads what is there and writes it again with its own. Text may hold what str.splitlines takes for an end."""
    aside, together = tmp_path / "bad.jsonl", threading.Barrier(6)

    def run(number: int) -> None:
        together.wait()
        set_aside(aside, Path(f"{number}.jsonl"), [{"file": f"{number}.jsonl", "row": "a\u2028b"}])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
    rows = [json.loads(line) for line in aside.read_bytes().splitlines()]
    assert sorted(row["file"] for row in rows) == [f"{number}.jsonl" for number in range(6)]


def test_a_quarantine_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    aside = tmp_path / "notes.jsonl"
    aside.write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"notes\.jsonl: expected the quarantine file of an earlier run"):
        list(read_records(write(tmp_path / "rows.jsonl", PROBLEM, "{"), Problem, quarantine=aside))
    assert aside.read_text() == '{"mine": 1}\n'


def test_quarantine_of_a_clean_file_writes_nothing(tmp_path: Path) -> None:
    aside = tmp_path / "bad.jsonl"
    list(read_records(write(tmp_path / "rows.jsonl", PROBLEM), Problem, quarantine=aside))
    assert not aside.exists()


def test_only_bad_rows_are_refused_but_listed(tmp_path: Path) -> None:
    path, aside = write(tmp_path / "rows.jsonl", "{", "[]"), tmp_path / "bad.jsonl"
    assert refusal(path, quarantine=aside) == f"{path}: expected at least one record, got 2 bad rows and no good ones"
    assert len(aside.read_text().splitlines()) == 2


def test_quarantine_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    aside = tmp_path / "new" / "bad.jsonl"
    path = write(tmp_path / "rows.jsonl", PROBLEM, "{")
    assert [row.problem_id for row in read_records(path, Problem, quarantine=aside)] == ["p"]
    assert json.loads(aside.read_text())["line"] == 2


# --- round trips ---------------------------------------------------------------------------------------------

TEXT = 'Zoë: 3 × 4 = 12 😀\u2028\n\t"\\boxed{12}" \\u0041 \x00'


def test_round_trip_with_unicode_and_nulls(tmp_path: Path) -> None:
    rows = [
        JudgedSample.model_validate({**JUDGED, "text": TEXT, "outcome": None, "extracted_answer": None}),
        JudgedSample.model_validate(
            {
                **JUDGED,
                "sample_id": "p/1",
                "token_log_probs": [-0.1, -1e-30, -12345.678901234],
                "sampler": {"model": "M0", "temperature": 0.7, "top_p": 1.0, "seed": 2**62},
                "extracted_answer": "½",
            }
        ),
    ]
    path = tmp_path / "deep" / "rows.jsonl"
    assert write_records(path, rows) == 2
    assert path.read_bytes().count(b"\n") == 2
    assert list(read_records(path, JudgedSample)) == rows
    plain = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert plain["text"] == TEXT
    assert plain["outcome"] is None
    assert plain["steps"][1]["label"] is None
    assert plain["token_log_probs"] is None


def test_round_trip_of_a_train_example(tmp_path: Path) -> None:
    steps = [TrainStep(token_start=0, token_end=1, label=0), TrainStep(token_start=1, token_end=2, label=None)]
    example = TrainExample(
        example_id="a",
        problem_id="p",
        prompt_token_ids=[1],
        token_ids=[2, 3],
        steps=steps,
        outcome=0,
        kl_partner=KLPartner(example_id="b", token_ids=[4], steps=[TrainStep(token_start=0, token_end=1, label=1)]),
        pair_id="p/pair/0",
        side="rejected",
    )
    write_records(tmp_path / "rows.jsonl", [example])
    assert list(read_records(tmp_path / "rows.jsonl", TrainExample)) == [example]


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot hold: such a row must not pass and then fail to be written."""
    path = write(tmp_path / "rows.jsonl", PROBLEM, '{"problem_id": "q", "problem": "\\ud83d", "answer": "1"}')
    aside = tmp_path / "bad.jsonl"
    rows = list(read_records(path, Problem, quarantine=aside))
    assert [row.problem_id for row in rows] == ["p"]
    assert write_records(tmp_path / "out.jsonl", rows) == 1
    assert json.loads(aside.read_text())["line"] == 2


def test_records_are_frozen() -> None:
    sample = Sample.model_validate(SAMPLE)
    with pytest.raises(ValueError, match="frozen"):
        sample.text = "3"  # type: ignore[misc]


# --- atomic writes -------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    for failure in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(failure), atomic_writer(path) as file:
            file.write("half of the new")
            file.flush()
            raise failure
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file.txt"]


def test_a_first_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_writer(tmp_path / "file.bin", "wb") as file:
        file.write(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file.txt"
    with atomic_writer(path) as file:
        file.write("one ½")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "one ½"
    with atomic_writer(path) as file:
        file.write("two")
        file.flush()
        assert path.read_text(encoding="utf-8") == "one ½"
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_records_that_fail_midway_leave_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_records(path, [Problem.model_validate(PROBLEM)])
    before = path.read_bytes()

    def rows() -> Any:
        yield Problem.model_validate({**PROBLEM, "problem_id": "q"})
        raise UserError("a bad row")

    with pytest.raises(UserError):
        write_records(path, rows())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]
