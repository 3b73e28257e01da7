"""Judging killed in the middle, twice: nothing that was decided is decided again, and the file is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.base.records import JudgedSample, Sample, read_records, write_records
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer

SAMPLES, CHUNKS = 2000, 32  # 64 samples each, the last one 16
# the stage, which kills itself in the middle of line N of the cache called NAME
STAGE = """
import os, signal, sys
from pathlib import Path
from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe.keys import Judging

folder, output, name, last = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
put, lines = AnswerCache.put, 0

def killing(self, key, value):
    global lines
    lines += self.path.name == name
    if lines == last:
        self._writer.write(b'{"key": "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, value)

AnswerCache.put = killing
settings = Judging.model_validate_json(sys.argv[5])
judge_file(folder / "p.jsonl", folder / "s.jsonl", output, folder / "model", settings)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 different samples, every third of them with a wrong result in the first step."""
    folder = tmp_path_factory.mktemp("resume")
    build_tokenizer(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    problems = list(generate("train", SAMPLES // 4, 11))
    samples = []
    for number in range(SAMPLES):
        problem = problems[number % len(problems)]
        text = problem.solution or ""
        if number % 3 == 0:
            first, rest = text.split("\n", 1)
            left, result = first.rstrip(".").rsplit(" ", 1)
            text = f"{left} {int(result) + 1 + number // len(problems)}.\n{rest}"
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        prompt = tokenizer.encode(problem.problem + "\n")
        samples.append(
            Sample(
                problem_id=problem.problem_id, sample_id=f"{problem.problem_id}/{number}", prompt_token_ids=prompt,
                token_ids=ids, text=text, finish_reason="stop",
            )
        )  # fmt: skip
    write_records(folder / "p.jsonl", problems)
    write_records(folder / "s.jsonl", samples)
    return folder


def settings(workers: int) -> Judging:
    return Judging.model_validate({"split": "line", "process": "chained_arithmetic", "workers": workers})


def keys(path: Path) -> list[str]:
    """Of the whole lines; a torn one may stand at the end."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]


def wait_for_no_worker_of(folder: Path) -> None:
    """Workers end with their input; each names the folder on its command line."""
    deadline = time.monotonic() + 300
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes()
            except OSError:
                continue
            if b"row_worker" in command and str(folder).encode() in command:
                left.append(path)
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_kill_costs_no_finished_chunk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run" / "judged.jsonl"

    def killed_at(name: str, line: int) -> None:
        command = [sys.executable, "-c", STAGE, folder, output, name, str(line), settings(2).model_dump_json()]
        ended = subprocess.run(command, capture_output=True, timeout=240)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        wait_for_no_worker_of(folder)
        assert not output.exists()

    steps, labels = output.parent / "cache" / "steps.jsonl", output.parent / "cache" / "labels.jsonl"
    killed_at("steps.jsonl", 11)
    first = keys(steps)
    assert len(first) == 10 and not labels.exists()
    killed_at("labels.jsonl", 6)
    assert keys(steps)[:10] == first
    assert len(keys(steps)) == len(set(keys(steps))) == CHUNKS and len(keys(labels)) == 5

    put = AnswerCache.put
    decided: list[str] = []

    def counted(self: AnswerCache, key: str, value: object) -> None:
        decided.append(self.path.name)
        put(self, key, value)

    monkeypatch.setattr(AnswerCache, "put", counted)
    counts = judge_file(folder / "p.jsonl", folder / "s.jsonl", output, folder / "model", settings(2))
    assert decided == ["labels.jsonl"] * (CHUNKS - 5)
    assert len(set(keys(labels))) == CHUNKS

    alone = tmp_path / "alone" / "judged.jsonl"  # one process, never interrupted
    assert judge_file(folder / "p.jsonl", folder / "s.jsonl", alone, folder / "model", settings(1)) == counts
    assert output.read_bytes() == alone.read_bytes()
    rows = list(read_records(output, JudgedSample))
    assert [row.steps[0].label for row in rows] == [0 if number % 3 == 0 else 1 for number in range(SAMPLES)]


def test_another_rule_or_split_is_no_finished_work(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "judged.jsonl"
    for changes, count in (({}, CHUNKS), ({"split": "sentence"}, 2 * CHUNKS), ({"process": "none"}, 2 * CHUNKS)):
        given = Judging.model_validate({"split": "line", "process": "equations", "workers": 1, **changes})
        judge_file(folder / "p.jsonl", folder / "s.jsonl", output, folder / "model", given)
        assert len(set(keys(tmp_path / "cache" / "steps.jsonl"))) == count, changes
    # these sentences are the lines: the same steps under the same rule need no new labels
    assert len(set(keys(tmp_path / "cache" / "labels.jsonl"))) == 2 * CHUNKS
    assert {step.label for row in read_records(output, JudgedSample) for step in row.steps} == {None}
