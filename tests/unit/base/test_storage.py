"""A file system that refuses: every command says which file, how much it needs, how much is free, and where."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.base.files import sha256_of, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.storage import STORAGE_FAULTS, check_space, size, writing


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1234, "1.23 kB"), (98_765_432, "98.8 MB"),
     (141_107_412_992, "141 GB"), (2.5e12, "2.50 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize("number", sorted(STORAGE_FAULTS), ids=errno.errorcode.get)
def test_a_fault_of_the_storage_names_the_file_and_the_place(tmp_path: Path, number: int) -> None:
    with pytest.raises(MachineFault) as fault, writing(tmp_path / "a" / "b.json"):
        raise OSError(number, os.strerror(number))
    message = str(fault.value)
    assert message.startswith(f"{tmp_path}/a/b.json: could not be written: {os.strerror(number)}; ")
    assert re.search(r"; [\d.]+ .?B of [\d.]+ .?B are free on /\S*; .* the same command", message)


def test_a_wrong_path_is_no_fault_of_the_storage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        write_json(tmp_path / "file" / "x.json", {})


def test_too_little_space_is_found_before(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "folder", shutil.disk_usage(tmp_path).free // 2, "a model")
    with pytest.raises(MachineFault, match=r"new/folder: a model needs 100000 TB; .* are free on /"):
        check_space(tmp_path / "new" / "folder", 10**17, "a model")


# --- a true file system without room -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def stepkto(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, done.stderr


def fill(place: Path, leave: int = 0) -> Path:
    """A file that takes all room of the file system but ``leave`` bytes."""
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        file.write(b"x" * max(0, shutil.disk_usage(place).free - leave))
    return filler


def test_conversion_says_what_it_needs(small_disk: Path, models: dict[str, Path]) -> None:
    filler = fill(small_disk, leave=200_000)
    target = small_disk / "megatron"
    code, said = stepkto("convert", str(models["tied"]), str(target))
    assert code == 1
    assert re.search(rf"error: {target}: the converted model needs 69\d kB; \d+ kB of 2.10 MB are free on", said)
    filler.unlink()
    assert stepkto("convert", str(models["tied"]), str(target), "--verify")[0] == 0


def test_problems_on_a_full_disk(small_disk: Path, repository: Path) -> None:
    """The first stage; with room again it gives what a run with room gives."""
    recipe = ["problems", str(repository / "recipes" / "mini_cpu.yaml"), "--iteration", "1"]
    run = small_disk / "runs"
    filler = fill(small_disk)
    code, said = stepkto(*recipe, "--set", f"output={run}")
    assert code == 1 and "Traceback" not in said
    assert re.fullmatch(rf"error: {run}\S*: could not be written: No space left .* 0 bytes of 2.10 MB are free on "
                        rf"{small_disk}; free some space and run the same command again\n", said)  # fmt: skip
    filler.unlink()
    assert stepkto(*recipe, "--set", f"output={run}")[0] == 0
    assert stepkto(*recipe, "--set", f"output={small_disk / 'other'}")[0] == 0
    found = [sha256_of(path) for path in sorted(small_disk.glob("*/*/*/problems/problems.jsonl"))]
    assert len(found) == 2 and len(set(found)) == 1


# --- paths that can never be written -------------------------------------------------------------------------------


def test_a_link_that_points_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError) as refused, exclusive_lock(tmp_path / "runs" / "mini" / ".lock", "it"):
        pass
    assert str(refused.value) == (
        f"{tmp_path}/runs: expected a folder, got a link to {tmp_path}/absent, which does not exist; make that folder, "
        "or remove the link"
    )


@pytest.mark.parametrize("kind", ["a file", "a loop of links", "a name too long"])
def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path, kind: str) -> None:
    place = tmp_path / ("x" * 300 if kind == "a name too long" else "place")
    if kind == "a file":
        place.touch()
    elif kind == "a loop of links":
        place.symlink_to(place)
    with pytest.raises((OSError, UserError)) as refused, exclusive_lock(place / "mini" / ".lock", "it"):
        pass
    assert str(place) in str(refused.value)


def test_a_working_directory_that_was_deleted(tmp_path: Path, repository: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os, shutil, sys; os.chdir({str(gone)!r}); shutil.rmtree({str(gone)!r}); "
    command = script + (
        "from megatron_stepkto.cli.main import main; "
        f"main(['problems', {str(repository / 'recipes' / 'mini_cpu.yaml')!r}, '--iteration', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory was deleted; change into a folder that exists\n"
