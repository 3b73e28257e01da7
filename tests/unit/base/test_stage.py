"""A stage runs once, is never silently redone or mixed with other work, and one process at a time writes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base import stage as stages
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.stage import Result, Stage, input_hash, run_stage


class Work:
    """Writes ``out.txt`` and counts how often it was called."""

    def __init__(self, stage: Stage, text: str = "made") -> None:
        self.stage, self.text, self.calls = stage, text, 0

    def __call__(self) -> Result:
        self.calls += 1
        out = self.stage.directory / "out.txt"
        out.write_text(self.text)
        return Result([out], {"rows": 3})


def make(folder: Path, inputs: dict[str, Path] | None = None, **settings: Any) -> Stage:
    return Stage("sample", folder / "stage", settings, inputs or {})


def refusal(stage: Stage, work: Callable[[], Result], *, force: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        run_stage(stage, work, force=force)
    return str(caught.value)


def cut_short(stage: Stage) -> None:
    """Work that wrote a part and died."""

    def work() -> Result:
        (stage.directory / "part.txt").write_text("part")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, work)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- done once -----------------------------------------------------------------------------------------------


def test_a_stage_runs_once_and_leaves_a_manifest(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("input")
    stage = make(tmp_path, {"source": source}, seed=1)
    work = Work(stage)
    first = run_stage(stage, work)
    assert run_stage(stage, work) == first
    assert work.calls == 1
    assert json.loads(stage.manifest_path.read_text()) == first
    assert first["stage"] == "sample"
    known = {"source": {"path": str(source), "sha256": sha256("input")}}
    assert first["key"] == {"settings": {"seed": 1}, "inputs": known}
    assert first["outputs"] == {"out.txt": {"sha256": sha256("made"), "bytes": 4}}
    assert first["counts"] == {"rows": 3}
    assert first["seconds"] >= 0
    assert first["versions"]["python"].startswith("3.")


def test_force_does_not_redo_what_did_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make(tmp_path, seed=1)
    work = Work(stage)
    run_stage(stage, work)
    run_stage(stage, work, force=True)
    assert work.calls == 1
    said = f"already done ({stage.directory}); nothing changed, so --force keeps it: remove the folder to redo it\n"
    assert said in capsys.readouterr().err


def test_force_says_that_it_keeps_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make(tmp_path, seed=1)
    run_stage(stage, Work(stage))
    (stage.directory / "cache").mkdir()
    (stage.directory / "cache" / "verdicts.jsonl").write_text("paid for")
    other = make(tmp_path, seed=2)
    run_stage(other, Work(other), force=True)
    assert (stage.directory / "cache" / "verdicts.jsonl").read_text() == "paid for"
    assert f"sample: --force keeps {stage.directory / 'cache'}, whose entries are reused" in capsys.readouterr().err


def test_an_input_that_is_missing(tmp_path: Path) -> None:
    stage = make(tmp_path, {"problems": tmp_path / "absent.jsonl"})
    said = refusal(stage, Work(stage))
    assert said == (
        f"sample: input problems is missing: {tmp_path / 'absent.jsonl'}; run the stage that makes it first"
    )
    assert not stage.directory.exists(), "what is refused leaves no folder behind"
    # no stage makes what is outside of the run's folder
    given = replace(stage, hashes=tmp_path / "run" / ".hashes.json")
    assert refusal(given, Work(given)) == (
        f"sample: input problems is missing: {tmp_path / 'absent.jsonl'}; correct the path in the recipe, or put the "
        "file there"
    )
    made = replace(stage, hashes=tmp_path / ".hashes.json")
    assert refusal(made, Work(made)).endswith("run the stage that makes it first")


def test_what_a_check_refuses_leaves_no_folder_behind(tmp_path: Path) -> None:
    def check() -> None:
        raise UserError("no engine here")

    stage = make(tmp_path, seed=1)
    work = Work(stage)
    with pytest.raises(UserError, match="no engine here"):
        run_stage(stage, work, check=check)
    assert work.calls == 0
    assert not stage.directory.exists()
    run_stage(stage, work)
    assert stage.is_finished()
    run_stage(stage, work, check=check)  # done: nothing is needed any more
    run_stage(stage, work, check=check, force=True)
    changed = make(tmp_path, seed=2)
    assert changed.is_finished()
    assert not changed.is_finished(force=True)
    with pytest.raises(UserError, match="no engine here"):
        run_stage(changed, Work(changed), check=check, force=True)
    assert stage.is_finished(force=True), "refused before anything was removed"


# --- other settings, other input -----------------------------------------------------------------------------


def test_changed_settings_are_refused_and_named(tmp_path: Path) -> None:
    stage = make(tmp_path, seed=1, sample={"k": 4, "top_p": 1.0})
    run_stage(stage, Work(stage))
    other = make(tmp_path, seed=1, sample={"k": 8, "top_p": 1.0}, extra=True)
    work = Work(other)
    assert refusal(other, work) == (
        f"{stage.directory} was finished with another configuration:\n  settings.extra: was not given, is True\n"
        "  settings.sample.k: was 4, is 8\n"
        "undo the change, choose another name, or pass --force to redo the stage and what follows"
    )
    assert work.calls == 0
    assert (stage.directory / "out.txt").read_text() == "made"


def test_changed_input_is_refused_and_named(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one")
    stage = make(tmp_path, {"source": source})
    run_stage(stage, Work(stage))
    source.write_text("two")
    said = refusal(stage, Work(stage))
    assert f"inputs.source.sha256: was '{sha256('one')}', is '{sha256('two')}'" in said


def test_force_redoes_a_changed_stage_from_nothing(tmp_path: Path) -> None:
    stage = make(tmp_path, seed=1)
    run_stage(stage, Work(stage))
    (stage.directory / "chunks").mkdir()
    (stage.directory / "chunks" / "0.jsonl").write_text("old")
    (stage.directory / "logs").mkdir()
    (stage.directory / "logs" / "old.log").write_text("kept")
    other = make(tmp_path, seed=2)
    seen: list[str] = []

    def work() -> Result:
        seen.extend(sorted(path.name for path in other.directory.iterdir()))
        return Work(other, "made again")()

    manifest = run_stage(other, work, force=True)
    assert seen == [".lock", "logs", "started.json"]
    assert (other.directory / "logs" / "old.log").read_text() == "kept"
    assert manifest["key"]["settings"] == {"seed": 2}
    assert manifest["outputs"]["out.txt"]["sha256"] == sha256("made again")
    assert run_stage(other, work) == manifest


def test_a_moved_input_with_the_same_content_is_the_same_input(tmp_path: Path) -> None:
    source, moved = tmp_path / "in.txt", tmp_path / "elsewhere" / "other.txt"
    source.write_text("input")
    stage = make(tmp_path, {"source": source})
    work = Work(stage)
    run_stage(stage, work)
    moved.parent.mkdir()
    source.rename(moved)
    run_stage(make(tmp_path, {"source": moved}), work)
    assert work.calls == 1
    moved.write_text("changed")
    assert "inputs.source.sha256" in refusal(make(tmp_path, {"source": moved}), work)


# --- cut short -----------------------------------------------------------------------------------------------


def test_unfinished_work_goes_on_with_its_files(tmp_path: Path) -> None:
    stage = make(tmp_path, seed=1)
    cut_short(stage)
    assert not stage.manifest_path.exists()

    def resume() -> Result:
        assert (stage.directory / "part.txt").read_text() == "part"
        return Result([stage.directory / "part.txt"])

    assert run_stage(stage, resume)["outputs"]["part.txt"]["sha256"] == sha256("part")


def test_unfinished_work_of_another_key_is_refused_or_forced(tmp_path: Path) -> None:
    stage, other = make(tmp_path, seed=1), make(tmp_path, seed=2)
    cut_short(stage)
    work = Work(other)
    assert refusal(other, work).startswith(
        f"{stage.directory} was begun with another configuration:\n  settings.seed: was 1, is 2\n"
    )
    assert (stage.directory / "part.txt").exists()
    run_stage(other, work, force=True)
    assert not (stage.directory / "part.txt").exists()


def test_after_a_refusal_the_corrected_input_is_taken(tmp_path: Path) -> None:
    """A stage that only began, and wrote a log and a kept answer of a server, holds no work of the wrong input."""
    source = tmp_path / "in.txt"
    source.write_text("broken")
    stage = make(tmp_path, {"source": source})

    def refuse() -> Result:
        for name in ("logs", "cache"):
            (stage.directory / name).mkdir()
            (stage.directory / name / "kept").touch()
        raise UserError("in.txt:1: broken; correct the row")

    assert refusal(stage, refuse) == "in.txt:1: broken; correct the row"
    source.write_text("good")
    work = Work(stage)
    assert run_stage(stage, work)["key"]["inputs"]["source"]["sha256"] == sha256("good")
    assert work.calls == 1
    assert (stage.directory / "cache" / "kept").exists()


def test_work_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    stage = make(tmp_path)
    with pytest.raises(ValueError, match="broken"):
        run_stage(stage, lambda: (_ for _ in ()).throw(ValueError("broken")))
    assert sorted(path.name for path in stage.directory.iterdir()) == [".lock", "started.json"]


def test_an_output_that_was_promised_but_not_made_is_not_finished(tmp_path: Path) -> None:
    stage = make(tmp_path)
    with pytest.raises(OSError, match=r"absent\.txt"):
        run_stage(stage, lambda: Result([stage.directory / "absent.txt"]))
    assert not stage.manifest_path.exists()


def test_outputs_are_on_the_disk_before_the_manifest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other libraries write (a tokenizer, first weights) is in the cache: a power cut would leave it empty."""
    stage = make(tmp_path)
    flushed: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def work() -> Result:
        (stage.directory / "model").mkdir()
        (stage.directory / "model" / "w.bin").write_text("w")
        flushed.clear()
        return Result([Work(stage)().outputs[0], stage.directory / "model"])

    monkeypatch.setattr(os, "fsync", note)
    run_stage(stage, work)
    assert flushed[:-1] == ["out.txt", "model", "w.bin"]
    assert flushed[-1].startswith(".manifest.json")


def test_a_lost_output_is_noticed(tmp_path: Path) -> None:
    stage = make(tmp_path)
    work = Work(stage)
    run_stage(stage, work)
    (stage.directory / "out.txt").unlink()
    assert refusal(stage, work) == (f"{stage.directory}: finished, but out.txt is missing; restore it or pass --force")
    run_stage(stage, work, force=True)
    assert work.calls == 2
    assert (stage.directory / "out.txt").exists()


def test_a_forced_clearing_cut_short_never_passes_for_work_of_the_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old chunks must not be taken up under the new key: the sign of the old key goes last."""
    stage, other = make(tmp_path, seed=1), make(tmp_path, seed=2)
    run_stage(stage, Work(stage))
    (stage.directory / "chunks").mkdir()
    listing = Path.iterdir

    def signs_first(self: Path) -> list[Path]:  # a file system may list a folder in any order
        return sorted(listing(self), key=lambda path: (path.suffix != ".json", path.name))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", signs_first)
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(other, Work(other), force=True)
    assert (stage.directory / "chunks").is_dir()
    assert "with another configuration" in refusal(other, Work(other))


# --- two processes -------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from megatron_stepkto.base.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    stage = make(tmp_path)
    work = Work(stage)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(stage.directory / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = refusal(stage, work)
        assert said.startswith(f"{stage.directory} is being written by another process (process {holder.pid} on ")
        assert said.endswith("wait for it or stop it, then run the command again")
        assert refusal(stage, work, force=True) == said
        assert work.calls == 0
    finally:
        holder.kill()  # dies without cleaning up: the kernel frees the lock
        holder.communicate(timeout=300)
    run_stage(stage, work)
    assert work.calls == 1


# --- hashes of inputs ----------------------------------------------------------------------------------------


def test_a_finished_output_is_known_by_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded hash is used for a file that is huge: it is not read again."""
    stage = make(tmp_path)
    run_stage(stage, Work(stage))
    monkeypatch.setattr(stages, "LARGE_BYTES", 4)
    foreign = stage.directory / "not_an_output.txt"
    foreign.write_text("foreign")
    read: list[Path] = []

    def spy(path: Path) -> str:
        read.append(path)
        return "hash"

    monkeypatch.setattr(stages, "sha256_of", spy)
    assert input_hash(stage.directory / "out.txt") == sha256("made")
    assert read == []
    assert input_hash(foreign) == "hash"
    assert read == [foreign]


@pytest.mark.parametrize(("text", "large"), [("MADE", 1 << 30), ("cut", 1 << 30), ("cut", 1)])
def test_an_output_that_was_changed_afterwards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, large: int
) -> None:
    """By its content; a large one, by its size."""
    monkeypatch.setattr(stages, "LARGE_BYTES", large)
    first = make(tmp_path)
    run_stage(first, Work(first))
    (first.directory / "out.txt").write_text(text)
    second = Stage("judge", tmp_path / "second", {}, {"samples": first.directory / "out.txt"})
    said = refusal(second, Work(second))
    assert said.startswith(f"{first.directory / 'out.txt'}: changed after its stage finished: ")
    assert not second.manifest_path.exists()


def test_a_foreign_folder_is_hashed_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("B")
    (folder / "deep" / "a.txt").write_text("A")
    by_hand = sha256(f"b.txt\0{sha256('B')}\ndeep/a.txt\0{sha256('A')}\n")
    assert input_hash(folder) == by_hand
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / ".lock").write_text("hidden files do not count")
    assert input_hash(copy) == by_hand
    (copy / "b.txt").rename(copy / "c.txt")
    assert input_hash(copy) != by_hand
    assert input_hash(folder / "b.txt") == sha256("B")


@pytest.mark.parametrize("foreign", ["[]", '{"name": "an app"}', '{"outputs": ["model"]}', '{"outputs": {}}'])
def test_a_manifest_that_is_not_ours_is_a_file_like_others(tmp_path: Path, foreign: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "manifest.json").write_text(foreign)
    assert input_hash(folder) == sha256(f"manifest.json\0{sha256(foreign)}\n")


def test_a_stage_whose_input_is_another_stages_folder(tmp_path: Path) -> None:
    """Redone with other output it is another input; the manifest's own time and versions do not count."""
    first = Stage("first", tmp_path / "first", {"n": 1}, {})

    def folder_work(text: str) -> Callable[[], Result]:
        def work() -> Result:
            (first.directory / "model").mkdir(exist_ok=True)
            (first.directory / "model" / "w.txt").write_text(text)
            return Result([first.directory / "model"])

        return work

    manifest = run_stage(first, folder_work("same"))
    assert manifest["outputs"]["model"] == {"sha256": sha256(f"w.txt\0{sha256('same')}\n"), "bytes": 4}
    second = make(tmp_path, {"model": first.directory / "model"})
    work = Work(second)
    run_stage(second, work)
    again = Stage("first", tmp_path / "first", {"n": 2}, {})
    run_stage(again, folder_work("same"), force=True)
    run_stage(second, work)
    assert work.calls == 1
    run_stage(first, folder_work("different"), force=True)
    assert "inputs.model.sha256" in refusal(second, work)


def test_an_input_of_an_unfinished_stage_is_refused(tmp_path: Path) -> None:
    """Half a data set must not pass for a whole one: its stage has begun, and has no manifest."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "train.jsonl").write_text("{}\n")
    (tmp_path / "before" / "started.json").write_text("{}")
    after = Stage("after", tmp_path / "after", {}, {"train": tmp_path / "before" / "train.jsonl"})
    with pytest.raises(UserError, match="input train belongs to an unfinished stage"):
        run_stage(after, lambda: Result([]))


def test_a_large_folder_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hashes = tmp_path / "model", tmp_path / "hashes.json"
    folder.mkdir()
    (folder / "w.bin").write_text("one")
    expected = input_hash(folder)
    assert input_hash(folder, hashes) == expected
    assert not hashes.exists(), "small ones are read each time"
    monkeypatch.setattr(stages, "LARGE_BYTES", 3)
    assert input_hash(folder, hashes) == expected
    real, read = stages.sha256_of, []
    monkeypatch.setattr(stages, "sha256_of", lambda path: read.append(path) or real(path))
    assert input_hash(folder, hashes) == expected
    assert read == []
    (folder / "w.bin").write_text("two")
    assert input_hash(folder, hashes) == real(folder) != expected
    assert read == [folder]
