"""``stepkto measure``: which problems a folder's evaluation is of, when another command for it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.cli.main import main

Measure = Callable[..., int]


@pytest.fixture
def measure(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs the command on a file of problems, up to the work itself; returns the exit code."""

    def until_the_work(stage: Stage, *_: Any, check: Callable[[], None], **__: Any) -> None:
        check()
        stage.directory.mkdir(exist_ok=True)
        raise SystemExit(0)

    monkeypatch.setattr("megatron_stepkto.evaluation.folder.run_stage", until_the_work)
    for name in ("a", "b"):
        rows = [{"id": n, "problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, *options: str, max_tokens: int = 96) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["measure", str(repository / "recipes" / "mini_cpu_m0"), f"--data={tmp_path}/{name}.jsonl",
                  f"--output={tmp_path}/out", "--set=sample.backend=transformers",
                  f"--set=sample.max_tokens={max_tokens}", *options])  # fmt: skip
        return int(ended.value.code or 0)

    return run


def asked(tmp_path: Path) -> str:
    """The data set of the folder's problems; there is no other file beside them."""
    [path] = (tmp_path / "out" / "asked").iterdir()
    (name,) = {json.loads(line)["data"] for line in path.read_text().splitlines()}
    return str(name)


def test_problems_are_replaced_once_nothing_refuses_the_new_ones(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the finished evaluation belonged to no problems, and its own command was refused."""
    assert measure("a") == 0
    assert measure("b") == 2
    assert "holds an evaluation of other problems" in " ".join(capsys.readouterr().err.split())
    assert measure("b", "--force", max_tokens=5000) == 2
    assert "lower sample.max_tokens" in " ".join(capsys.readouterr().err.split())
    assert asked(tmp_path) == "a"
    assert measure("a") == 0
    assert measure("b", "--force") == 0
    assert asked(tmp_path) == "b"


def test_problems_with_which_another_process_works_stay(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure("a") == 0
    with exclusive_lock(tmp_path / "out" / "results" / ".lock", "it"):
        assert measure("b", "--force") == 2
    assert "is being written by another process" in " ".join(capsys.readouterr().err.split())
    assert asked(tmp_path) == "a"


def test_a_command_that_was_refused_claims_no_folder(measure: Measure, tmp_path: Path) -> None:
    assert measure("a", max_tokens=5000) == 2
    assert measure("b") == 0
    assert asked(tmp_path) == "b"
