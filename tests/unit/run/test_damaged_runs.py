"""Files of a run that are not what was written: one clear line and exit code 2 of every command that reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import (
    MAX_JSON_BYTES,
    read_json,
    read_json_if_there,
    read_json_object,
    sha256_of,
    write_json,
)
from megatron_stepkto.base.stage import Result, Stage, input_hash, run_stage
from megatron_stepkto.evaluation.table import Row
from megatron_stepkto.slurm.commands import _read_record
from megatron_stepkto.training.job import State, finished_checkpoints
from tests.builders import evaluation_row
from tests.unit.base.damages import DAMAGES, damage, stepkto


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with a finished stage and an evaluation."""
    run = tmp_path / "run"
    stage = Stage("problems", run / "iteration_1" / "problems", {"n": 1}, {})

    def work() -> Result:
        (stage.directory / "out.txt").write_text("1")
        return Result([stage.directory / "out.txt"], {"problems": 1})

    run_stage(stage, work)
    write_json(run / "evaluate" / "M0" / "metrics.json", evaluation_row("M0"))
    return run


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["iteration_1/problems/manifest.json", "evaluate/M0/metrics.json"])
def test_status_and_report(finished: Path, capsys: pytest.CaptureFixture[str], name: str, how: str) -> None:
    for command in ("status", "report"):
        assert stepkto(capsys, command, finished)[0] == 0
    (finished / "report.html").unlink()
    damage(finished / name, how)
    for command in ("status", "report"):
        if how in ("a folder", "a pipe") and command == "report":
            continue  # it looks for files, and finds none of that name
        code, said = stepkto(capsys, command, finished)
        assert (code, said.startswith(f"error: {finished / name}")) == (2, True), said


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "started.json"])
def test_a_stage(finished: Path, name: str, how: str) -> None:
    stage = Stage("problems", finished / "iteration_1" / "problems", {"n": 1}, {})
    if name == "started.json":
        stage.manifest_path.unlink()  # else it is not looked at
    damage(stage.directory / name, how)
    with pytest.raises(UserError) as caught:
        run_stage(stage, lambda: pytest.fail("it must not run"))
    assert str(caught.value).startswith(f"{stage.directory / name}")
    assert (stage.directory / "out.txt").read_text() == "1"


@pytest.mark.parametrize("how", DAMAGES)
def test_the_hashes_of_large_folders(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_stepkto.base.stage.LARGE_BYTES", 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("A")
    damage(tmp_path / ".hashes.json", how)
    if how == "an empty object":
        assert input_hash(tmp_path / "model", tmp_path / ".hashes.json") == sha256_of(tmp_path / "model")
        return
    with pytest.raises(UserError, match=r"\.hashes\.json"):
        input_hash(tmp_path / "model", tmp_path / ".hashes.json")


@pytest.mark.parametrize("how", DAMAGES)
def test_other_files_of_a_run(tmp_path: Path, how: str) -> None:
    for shape in (Row, State):
        damage(tmp_path / "file.json", how)
        with pytest.raises(UserError, match=r"file\.json"):
            read_json(tmp_path / "file.json", shape)
        if (tmp_path / "file.json").is_dir():
            (tmp_path / "file.json").rmdir()
    (tmp_path / "slurm").mkdir()
    damage(tmp_path / "slurm" / "jobs.json", how)
    if how != "an empty object":  # no job was submitted
        with pytest.raises(UserError, match=r"jobs\.json"):
            _read_record(tmp_path)


def test_what_json_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "b": {"c": [1, 2]}}')
    assert read_json_object(path) == {"a": 1, "b": {"c": [1, 2]}}
    path.write_text('{"a": 1, "b": {"c": [1, 2]}, "a": 1}')
    with pytest.raises(UserError, match='key "a" is duplicated'):
        read_json(path)
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(UserError, match="the key b has two values, 1 and 2; remove one"):
        read_json(path)
    path.write_text("null")
    assert read_json_if_there(path) is None
    with pytest.raises(UserError, match=r"a\.json: expected a JSON object, got null"):
        read_json_object(path)
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(UserError, match="expected a JSON file of at most 256 MiB, got 256 MiB"):
        read_json(path)


def test_a_checkpoint_counts_with_its_hidden_index(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_text("1")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".lock").write_text("1")
    before = sha256_of(tmp_path)
    (tmp_path / "deep" / ".lock").write_text("2")
    assert sha256_of(tmp_path) == before
    (tmp_path / ".metadata").write_text("2")
    assert sha256_of(tmp_path) != before


def test_folders_with_other_names_are_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "evaluate" / "Mine").mkdir()
    write_json(finished / "evaluate" / "Mine" / "metrics.json", {})
    assert stepkto(capsys, "status", finished)[0] == 0
    for name in ("update_000002", "update_best"):
        (finished / name).mkdir()
        write_json(finished / name / "state.json", {})
    assert finished_checkpoints(finished) == [(2, finished / "update_000002")]
