"""``stepkto check-answers`` as a user runs it: order, bad lines, streaming, hostile answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "megatron_stepkto", "check-answers"]


def check(path: Path, *options: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    done = subprocess.run([*COMMAND, str(path), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_one_row_per_line_in_order(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"gold": "\\\\sqrt{8}", "pred": "so \\\\boxed{2\\\\sqrt{2}}.", "expected": true, "id": "a"}\n'
        '{"gold": 27.0, "pred": "The answer is 27.", "expected": "right"}\n'
        "{broken\n"
        "\n"
        '["gold"]\n'
        '{"gold": "5"}\n'
        '{"gold": "5", "pred": "6", "expected": "maybe"}\n'
        '{"gold": "5", "pred": "\\ud83d", "expected": false}\n'
        '{"gold": "5", "pred": "5", "expected": false}\n'
        '{"gold": "12", "pred": "Therefore, 3 * 4 = 12.", "expected": "wrong"}'
    )
    rows, said = check(path, code=2)
    assert [row["line"] for row in rows] == list(range(1, 11))
    assert [row.get("verdict") for row in rows] == ["right", "right", *[None] * 5, "undecided", "right", "wrong"]
    assert [row.get("agrees") for row in rows] == [True, True, *[None] * 5, True, False, True]
    assert (rows[0]["id"], rows[0]["answer"], rows[0]["how"]) == ("a", r"2\sqrt{2}", "math-verify")
    assert (rows[9]["answer"], rows[9]["how"]) == (None, "no answer")  # the judge compares nothing, and so here
    assert [row.get("error", "")[:22] for row in rows[2:7]] == [
        "broken JSON at column ",
        "an empty line",
        "expected a JSON object",
        'key "pred" is missing',
        "expected: must be true",
    ]
    assert "agreement with expected: 4 of 5 (80.0%)" in said
    assert "5 lines could not be read" in said


def test_agreement_with_other_graders_tests(data_dir: Path, repository: Path) -> None:
    """docs/answer_checking.md gives the count, and why the other rows differ."""
    rows, said = check(data_dir / "equivalence/triples.jsonl")
    assert "agreement with expected: 164 of 189 (86.8%)" in said
    page = " ".join((repository / "docs/answer_checking.md").read_text().split())
    assert "agrees with 164. Of the 25 others, seven are in the table" in page
    others = [row for row in rows if not row["agrees"]]
    assert len(others) == 25
    assert sum(row["how"] == "no answer" for row in others) == 15
    listed = {f"eq-{number}" for number in re.findall(r"\| eq-(\d{4}) \|", page)}
    compared = {row["id"] for row in others if row["how"] != "no answer"}
    assert len(compared & listed) == 7
    assert compared - listed == {"eq-0058", "eq-0206", "eq-0207"}
    assert {row["verdict"] for row in others if row["id"] not in listed and row["how"] != "no answer"} == {"undecided"}


def test_answers_come_as_lines_come_in() -> None:
    process = subprocess.Popen([*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    for gold in ("1", "2"):  # the second is written only when the first is answered
        process.stdin.write(json.dumps({"gold": gold, "pred": "2"}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["verdict"] == ("right" if gold == "2" else "wrong")
    process.stdin.close()
    assert process.wait(300) == 0


def test_no_file_and_no_line(tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"gold": "5", "pred": "5"}\n')
    assert re.match(r"1 pair in \d+\.\d s: 1 right, 0 wrong, 0 undecided", check(one)[1])
    _, said = check(tmp_path / "none.jsonl", code=2)
    assert "expected a file of JSON lines" in said
    (tmp_path / "empty.jsonl").touch()
    _, said = check(tmp_path / "empty.jsonl", code=2)
    assert "found none" in said


def test_closed_standard_input() -> None:
    """As ``stepkto check-answers - <&-`` and some job schedulers start it."""
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, "-"], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected JSON lines with gold and pred on standard input, it is closed" in done.stderr
    assert "Traceback" not in done.stderr


HOSTILE = [
    "9^{9^{9^9}}",
    "10^9!",
    r"\sum_{n=1}^{10^9} n^{n}",
    r"\binom{10^6}{5\cdot10^5}",
    "{" * 3000 + "}" * 3000,
    "(" * 3000 + ")" * 3000,
    r"\frac{" * 800 + "1" + "}{2}" * 800,
    "\\sqrt{" * 500 + "2" + "}" * 500,
    "x" * 1_000_000,
    "9" * 1_000_000,
    "\\boxed{" * 100_000,
    "answer is " * 100_000,
    "1e999999999",
    r"1\times 10^{999999999}",
    "__import__('os').system('touch pwned')",
    'exec(\'open("pwned", "w")\')',
    "\x00\x01\x02\x1b[31m6",
    "\u202e6\x00",
    "٣",
    "\ud83d",
    "nan",
    "inf",
    "1/0",
]


def test_hostile_answers(tmp_path: Path) -> None:
    """None is right, each takes at most 5 s (of CPU, and 1 GiB), and the pair after them is decided."""
    path = tmp_path / "hostile.jsonl"
    lines = [{"gold": "5", "pred": text, "expected": False} for text in HOSTILE]
    after = {"gold": r"\sqrt{8}", "pred": r"2\sqrt{2}", "expected": True}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, after]))
    rows, _ = check(path, "--cpu-seconds", "2")
    assert [row["agrees"] for row in rows] == [True] * (len(HOSTILE) + 1)
    assert max(row["milliseconds"] for row in rows) <= 5000
    assert rows[-1]["how"] == "math-verify"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_is_bounded() -> None:
    """A worker may not hold more than 1 GiB: to ask for more is an error inside it, not of the machine."""
    code = (
        "import sys\n"
        "from megatron_stepkto.answers import math_verify_worker as worker\n"
        "take = lambda answer: bytearray(int(answer) if answer.isdigit() else 1)\n"
        "worker.compare = lambda gold, answer: ('right', 'ok' if take(answer) else '')\n"
        "worker.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(os.getpid()), "5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    given = "".join(json.dumps({"gold": "", "answer": str(size)}) + "\n" for size in (10**8, 2 * 10**9, 10**8))
    out, _ = process.communicate(given, timeout=300)
    assert [json.loads(line).get("how") for line in out.splitlines()] == [None, "ok", "failed: MemoryError", "ok"]


@pytest.mark.parametrize("name", ["math500", "math_train_part"])
def test_published_solutions_against_their_answers(data_dir: Path, tmp_path: Path, name: str) -> None:
    """MATH-500 agrees in all 500. In the part of the train set, rows whose solution boxes two answers and whose
    answer is one of them do not: they are listed in docs/answer_checking.md."""
    folder = "eval" if name == "math500" else "problems"
    rows = [json.loads(line) for line in (data_dir / folder / f"{name}.jsonl").open()]
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"gold": r["answer"], "pred": r["solution"], "expected": True}) + "\n" for r in rows)
    )
    found, _ = check(path)
    differ = [n for n, row in enumerate(found, 1) if not row["agrees"]]
    assert differ == {"math500": [], "math_train_part": [1333, 1695, 3200]}[name]
