"""Files that other processes write, rename and remove while we look."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base import files
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import find_files, flush, flush_tree, read_json, read_json_if_there, write_json
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.problems.datasets import load_problems
from megatron_stepkto.report.collect import collect
from megatron_stepkto.report.status import status_text
from megatron_stepkto.slurm.chain import Step
from megatron_stepkto.slurm.commands import _progress


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that drops a checkpoint and renames another just when its folder has been listed."""
    train = tmp_path / "iteration_1" / "train"
    saved = train / "checkpoints"
    write_json(train / "started.json", {})
    write_json(train / "progress.json", {"done": 2, "total": 8, "note": "loss 0.5"})
    (train / "logs").mkdir()
    (train / "logs" / "rank-0.log").touch()
    for name in ("update_000001", ".update_000003.partial"):
        (saved / name).mkdir(parents=True)
        (saved / name / "manifest.json").touch()
    walk = os.walk

    def and_then(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(folder):
            yield found
            if found[0] == str(saved) and (saved / "update_000001").exists():
                shutil.rmtree(saved / "update_000001")
                (saved / ".update_000003.partial").rename(saved / "update_000003")

    monkeypatch.setattr(files.os, "walk", and_then)
    return train


def test_status_of_a_run_that_works(training: Path, tmp_path: Path) -> None:
    name, log = "iteration_1/train", training / "logs" / "rank-0.log"
    assert status_text(tmp_path) == f"begun    {name:<28} 2/8 loss 0.5  log: {log}"


def test_slurm_status_of_a_run_that_works(training: Path) -> None:
    assert _progress(Step("train_1", "train", [], [training], [])) == "2/8 loss 0.5"


def test_report_of_a_run_that_works(training: Path, tmp_path: Path) -> None:
    assert collect(tmp_path).summary.stages == []


def test_files_are_found_oldest_first_without_those_that_go_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in enumerate(("a.log", "c/b.log", "b.log", "gone.log", "other.txt")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (100 - age, 100 - age))
    real = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self.name == "gone.log":
            self.unlink()
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert find_files(tmp_path, "*.log") == [tmp_path / name for name in ("b.log", "c/b.log", "a.log")]
    assert find_files(tmp_path / "absent", "*") == []


def test_json_that_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json_if_there(path) is None
    with pytest.raises(UserError, match="expected a JSON file, found none"):
        read_json(path)
    write_json(path, {"a": "ä"})
    assert read_json_if_there(path) == read_json(path) == {"a": "ä"}
    path.write_bytes(b'{"a":\n')
    with pytest.raises(UserError, match=r"a\.json:2: expected JSON"):
        read_json_if_there(path)


def test_a_file_or_a_whole_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "deep/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    flushed: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    flush_tree(tmp_path)
    assert sorted(flushed) == [str(tmp_path / name) for name in ("", "a", "deep", "deep/b")]
    flushed.clear()
    flush_tree(tmp_path / "a")
    assert flushed == [str(tmp_path / "a")]


def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")

    def fail(handle: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files.os, "fsync", fail)
    flush(tmp_path)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        flush(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, ":1: expected JSON, got text that does not parse (nested too deeply)"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "(nested too deeply)"),
        ('{"a": 1, "b": {"c": 2, "c": 2}}', '(key "c" is duplicated; keep one)'),
        ('{"a": 1,\n"b"}', ":2: expected JSON, got text that does not parse (Expecting ':' delimiter"),
        ("9" * 6000, "expected JSON, got text that does not parse (Exceeds the limit"),
    ],
    ids=["lists", "objects", "key", "broken", "number"],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """A configuration, a row of JSON lines, and a JSON array, which has no rows until it parses."""
    path = tmp_path / "file.json"
    path.write_text(text)
    for read in (read_json, read_json_if_there):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:")
        assert said in str(caught.value)
    path.write_text(text.replace("\n", " "))
    with pytest.raises(UserError, match=re.escape(f"{path}:1: ")) as caught:
        list(read_records(path, Problem))
    assert text.startswith("[") or "; correct the row, or make the file again" in str(caught.value)
    with pytest.raises(UserError, match=r"file\.json"):
        load_problems(str(path))
