"""examples/word_problems.py: no text twice, none with two answers, none in two of the files that must be apart."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_stepkto.base.records import Problem, read_records
from tests.example_scripts import load_example


def row(text: str, answer: str, operations: int = 1) -> dict[str, str]:
    return {"problem": text, "answer": answer, "solution": "<<1+1=2>>2\n" * operations + f"#### {answer}"}


def test_files(tmp_path: Path) -> None:
    words = [row(f"Tom has {n} pens.", str(n)) for n in range(400)]
    words += [row("tom has 7  pens.", "7"), row("Ann has some.", "1"), row("Ann has some.", "2")]
    files = {
        "problems/mawps_asdiv_train.jsonl": words,
        "problems/gsm8k_train.jsonl": [row(f"Eve has {n}.", "1", operations=n) for n in range(4)],
        "eval/svamp.jsonl": [row("Carl has 5.", "5")],
        "eval/gsm8k_test.jsonl": [row(f"Dan has {n}.", "1", operations=n) for n in range(4)],
    }
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    counts = load_example("word_problems").prepare(tmp_path, tmp_path / "out")
    assert counts == {"train": 100, "dev": 300, "sft": 102, "svamp": 1, "gsm8k_two_steps": 2}
    made = {name: [p.problem for p in read_records(tmp_path / "out" / f"{name}.jsonl", Problem)] for name in counts}
    assert sorted([*made["train"], *made["dev"]]) == sorted(f"Tom has {n} pens." for n in range(400))
    assert made["sft"] == [*made["train"], "Eve has 1.", "Eve has 2."]
    assert made["gsm8k_two_steps"] == ["Dan has 1.", "Dan has 2."]
