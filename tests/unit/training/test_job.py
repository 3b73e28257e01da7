"""Checkpoint folders at the instants of a kill or a power cut."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_stepkto.base import files
from megatron_stepkto.training import job, loop
from megatron_stepkto.training.job import drop_checkpoint, finished_checkpoints, half_checkpoints
from megatron_stepkto.training.loop import Trainer


def write_checkpoint(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)


def test_what_a_kill_leaves_is_told_from_whole_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "update_000004", "0.distcp", "state.json")
    write_checkpoint(tmp_path / "update_000006", "0.distcp", "state.json")
    write_checkpoint(tmp_path / "update_000002", "0.distcp")  # half dropped
    write_checkpoint(tmp_path / ".update_000007.partial", "0.distcp", "state.json")  # not yet renamed
    write_checkpoint(tmp_path / ".update_000005.partial", "0.distcp")
    write_checkpoint(tmp_path / "mine", "notes")
    assert finished_checkpoints(tmp_path) == [(n, tmp_path / f"update_{n:06d}") for n in (4, 6)]
    for left in half_checkpoints(tmp_path):
        drop_checkpoint(left)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "update_000004", "update_000006"]
    assert half_checkpoints(tmp_path / "absent") == []


def test_a_half_dropped_checkpoint_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who removes the newest by hand, to resume from the one before, must not get a half-removed one."""
    write_checkpoint(tmp_path / "update_000002", "0.distcp", "state.json")

    def killed(folder: Path) -> None:
        (folder / "0.distcp").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(job.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_checkpoint(tmp_path / "update_000002")
    assert finished_checkpoints(tmp_path) == []


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron flushes the weights alone: after a power cut an empty common.pt would be in a finished checkpoint."""
    flushed: set[str] = set()
    fsync, rename = os.fsync, Path.rename

    def note(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def publish(self: Path, target: Path) -> Path:
        assert {path.name for path in self.iterdir()} - {"state.json"} <= flushed  # that one had another name
        return rename(self, target)

    def save(folder: Path) -> None:
        write_checkpoint(folder, "0.distcp", "common.pt", "metadata.json")

    trainer: Any = object.__new__(Trainer)
    trainer.engine = SimpleNamespace(checkpoints=SimpleNamespace(finish_saving=lambda *, wait: None, save_state=save))
    trainer.job = SimpleNamespace(checkpoints=tmp_path / "checkpoints", base="")
    trainer.settings = SimpleNamespace(keep_checkpoints=1, async_checkpoints=False)
    trainer.is_writer, trainer.batch_kl = True, {}
    trainer.journal = SimpleNamespace(right_history=[], notes={})
    trainer.saved = 0
    monkeypatch.setattr(files.os, "fsync", note)
    monkeypatch.setattr(Path, "rename", publish)
    monkeypatch.setattr(loop.dist, "barrier", lambda: None)
    for update in (2, 4):
        trainer._checkpoint(update)
    assert [done for done, _ in finished_checkpoints(tmp_path / "checkpoints")] == [4]
    assert half_checkpoints(tmp_path / "checkpoints") == []
