"""A converted folder is whole or absent, whatever interrupts; another process's files are left alone."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_stepkto.base import whole_folder as target_folder
from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from tests.unit.checkpoint_folders import DATA_FILE, assert_same_bits, change_weights, copy


def test_an_old_target_stays_until_the_new_one_is_whole(models: dict[str, Path], tmp_path: Path) -> None:
    source, target = copy(models["tied"], tmp_path / "hf"), copy(models["megatron"], tmp_path / "megatron")
    (target / "old").write_text("old")
    broken = change_weights(
        copy(source, tmp_path / "broken"), lambda weights: weights["model.norm.weight"].fill_(torch.nan)
    )
    with pytest.raises(UserError):
        hf_to_megatron(broken, target)
    assert (target / "old").exists()
    megatron_to_hf(target, tmp_path / "back")
    hf_to_megatron(source, target)
    assert not (target / "old").exists()

    (tmp_path / "back" / "old").write_text("old")
    (target / DATA_FILE).write_bytes(b"")
    with pytest.raises(UserError):
        megatron_to_hf(target, tmp_path / "back")
    assert (tmp_path / "back" / "old").exists()
    hf_to_megatron(source, target)
    megatron_to_hf(target, tmp_path / "back")
    assert not (tmp_path / "back" / "old").exists()
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))


@pytest.mark.parametrize("interrupted", ["CheckpointWriter.write", "CheckpointWriter.finish", "write_manifest"])
def test_an_interruption_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_stepkto.checkpoints.convert.{interrupted}", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(models["tied"], target)
    assert [path.name for path in tmp_path.iterdir()] == [".megatron.lock"]
    hf_to_megatron(models["tied"], target)
    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_stepkto.checkpoints.convert.{interrupted.replace('Checkpoint', 'HF')}", stop)
        with pytest.raises(KeyboardInterrupt):
            megatron_to_hf(target, tmp_path / "back")
    locks = [".back.lock", ".megatron.lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*locks, "megatron"]
    megatron_to_hf(target, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*locks, "back", "megatron"]
    for lock in locks:
        assert [path.name for path in (tmp_path / lock).iterdir()] == [".free.000002"], "numbers go on"


@pytest.mark.parametrize("ended", ["at the check", "Ctrl-C", "a file that the other removed"])
def test_who_was_taken_for_dead_leaves_the_others_files(tmp_path: Path, ended: str) -> None:
    """It hung; another process took the lock and fills the partial folder of the same name; then it wakes."""
    partial, lock = tmp_path / ".out.partial", tmp_path / ".out.lock"
    errors = {"at the check": UserError, "Ctrl-C": KeyboardInterrupt, "a file that the other removed": OSError}
    with pytest.raises(errors[ended]), target_folder.whole_folder(tmp_path / "out", 1) as folder:
        assert folder == partial
        (folder / "mine").write_text("hung here")
        (lock / ".held.000001").unlink()
        (lock / ".held.000002").write_text("{}")
        (folder / "mine").unlink()
        (folder / "theirs").write_text("hours of work")
        if ended == "Ctrl-C":
            raise KeyboardInterrupt
        if ended == "a file that the other removed":
            (folder / "mine").read_text()
    assert (partial / "theirs").read_text() == "hours of work"
    assert not (tmp_path / "out").exists()
    assert [path.name for path in lock.iterdir()] == [".held.000002"]


def test_a_disk_that_is_too_small_is_refused_at_once(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1234))
    with pytest.raises(MachineFault) as refused:
        hf_to_megatron(models["tied"], tmp_path / "target")
    assert re.search(
        r"target: the converted model needs 69\d kB; 1\.23 kB of 1\.00 TB are free on /", str(refused.value)
    )
    assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]


def test_a_disk_that_becomes_full(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program fills it meanwhile: what was written is removed, so that there is room again."""
    real, calls = os.pwrite, []

    def full(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            MachineFault, match=r"megatron: could not be written: No space .* needs 69\d kB; .*nothing was"
        ):
            hf_to_megatron(models["tied"], tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == [".megatron.lock"]
