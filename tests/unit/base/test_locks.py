"""One owner at a time among real processes; dead owners are detected, live ones are respected."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_stepkto.base import locks
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.locks import Lock, Watch, exclusive_lock, this_process, try_lock
from tests.unit.base.test_processes import assert_ends, wait_for

LIMIT_S = 300.0  # of real processes on a busy machine
COUNTER = """
import sys, os
from pathlib import Path
from megatron_stepkto.base.locks import exclusive_lock
folder, times = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(times):
    with exclusive_lock(folder / "lock", "it", wait=True):
        number = int((folder / "counter").read_text())
        os.sched_yield()
        (folder / "counter").write_text(str(number + 1))
"""
HOLDER = """
import sys, time
from pathlib import Path
from megatron_stepkto.base.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


def foreign(folder: Path, number: int = 1, **changes: object) -> Path:
    """A lock held by a process of another host."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = replace(this_process(), host="elsewhere", kernel="another boot", **changes)  # type: ignore[arg-type]
    path = folder / f".held.{number:06d}"
    path.write_text(json.dumps(asdict(owner)))
    return path


class Clock:
    """Stands in for ``time`` in the module: it advances when the code sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(locks, "time", clock)
    return clock


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where a process that lost its lock would end itself, at one of its heartbeats, which are quick here."""
    stopped = threading.Event()
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(locks.os, "_exit", lambda code: stopped.set())
    return stopped


def test_no_two_processes_hold_it(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", COUNTER, str(tmp_path), "40"]) for _ in range(4)]
    assert [process.wait(LIMIT_S) for process in running] == [0] * 4
    assert (tmp_path / "counter").read_text() == "160"
    (left,) = (tmp_path / "lock").iterdir()
    assert left.name.startswith(".free."), "nothing is left behind but the newest number"
    assert int(left.name.removeprefix(".free.")) >= 160, "numbers only grow"


def test_a_contender_that_slept_while_the_folder_was_removed_steps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw number 5 free; then the folder went, and another process took number 1 of a new one."""
    folder = tmp_path / "lock"
    folder.mkdir()
    (folder / ".free.000005").touch()
    link = os.link

    def sleep_then_link(source: Path, target: Path) -> None:
        (folder / ".free.000005").unlink()
        foreign(folder, number=1)
        link(source, target)

    monkeypatch.setattr(locks.os, "link", sleep_then_link)
    assert try_lock(folder, Watch()) is None
    assert [path.name for path in folder.iterdir()] == [".held.000001"]


def test_a_killed_owner_of_this_machine_is_dead_at_once(tmp_path: Path, clock: Clock) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=rf"being written by another process \(process {holder.pid} on "):
        exclusive_lock(tmp_path / "lock", "it").__enter__()
    holder.kill()
    holder.communicate(timeout=LIMIT_S)
    with exclusive_lock(tmp_path / "lock", "it") as held:
        assert held.path.name == ".held.000002"
    assert clock.now == 0, "nothing was waited for"
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [".free.000002"]


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    owner = replace(this_process(), started="1")
    (tmp_path / "lock" / ".held.000004").write_text(json.dumps(asdict(owner)))
    with exclusive_lock(tmp_path / "lock", "it") as held:
        assert held.path.name == ".held.000005"


def test_silence_of_another_host_is_death_and_a_beat_is_life(tmp_path: Path, clock: Clock) -> None:
    path = foreign(tmp_path / "lock")
    clock.meanwhile = lambda: os.utime(path, (0, clock.now // locks.HEARTBEAT_S))
    with pytest.raises(UserError, match=r"process .* on elsewhere"):
        exclusive_lock(tmp_path / "lock", "it").__enter__()
    clock.meanwhile = lambda: None
    begun = clock.now
    with exclusive_lock(tmp_path / "lock", "it") as held:
        assert held.path.name == ".held.000002"
        assert locks.SILENCE_S < clock.now - begun <= locks.SILENCE_S + 2 * locks.POLL_S


def test_who_waits_waits_for_the_living(tmp_path: Path, clock: Clock) -> None:
    path = foreign(tmp_path / "lock")

    def beat_then_let_go() -> None:
        if clock.now < 1000:
            os.utime(path, (0, clock.now // locks.HEARTBEAT_S))
        elif path.exists():
            path.rename(path.with_name(".free.000001"))

    clock.meanwhile = beat_then_let_go
    with exclusive_lock(tmp_path / "lock", "it", wait=True) as held:
        assert held.path.name == ".held.000002"
        assert 1000 <= clock.now < 1002


def test_the_clock_of_the_other_host_does_not_matter(tmp_path: Path, clock: Clock) -> None:
    """A heartbeat from the far future or past is only a number that changes or does not."""
    for stamp in (0, 4_000_000_000):
        path = foreign(tmp_path / str(stamp))
        os.utime(path, (stamp, stamp))
        begun = clock.now
        with exclusive_lock(tmp_path / str(stamp), "it"):
            assert locks.SILENCE_S < clock.now - begun <= locks.SILENCE_S + 2 * locks.POLL_S


@pytest.mark.parametrize(
    ("answer", "quick"), [("", True), ("COMPLETED", True), ("RUNNING", False), ("COMPLETING", False)]
)
def test_slurm_is_asked_about_the_owners_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, answer: str, quick: bool
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\necho {answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    foreign(tmp_path / "lock", slurm_job="17")
    with exclusive_lock(tmp_path / "lock", "it"):
        limit = locks.SHORT_SILENCE_S if quick else locks.SILENCE_S
        assert limit < clock.now <= limit + 2 * locks.POLL_S


def test_an_earlier_attempt_of_our_own_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    foreign(tmp_path / "lock", slurm_job="17", slurm_attempt=1)
    with exclusive_lock(tmp_path / "lock", "it"):
        assert locks.SHORT_SILENCE_S < clock.now <= locks.SHORT_SILENCE_S + 2 * locks.POLL_S


def test_who_was_taken_for_dead_stops_and_must_not_count(tmp_path: Path, stopped: threading.Event) -> None:
    got = try_lock(tmp_path / "lock", Watch())
    assert isinstance(got, Lock)
    got.check()
    got.path.unlink()
    foreign(tmp_path / "lock", number=2)
    with pytest.raises(UserError, match="another process took the lock over"):
        got.check()
    assert stopped.wait(LIMIT_S)
    got.release()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [".held.000002"], "the other's is left alone"


TAKEN_OVER = """
import sys
from pathlib import Path
from megatron_stepkto.base import locks
from megatron_stepkto.base.processes import Child, run_children
locks.HEARTBEAT_S = 0.1
child = Child([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1], "child.log"))
with locks.exclusive_lock(Path(sys.argv[1], "lock"), "it"):
    run_children([child], title="training", unit="updates", saves=True)
"""
SAVES = """
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: Path("saved").touch())
signal.signal(signal.SIGTERM, lambda *_: Path("saved").touch())
Path("draft").write_text(str(os.getpid()))
Path("draft").rename("started")
while not Path("saved").exists():
    time.sleep(0.01)
"""


def test_who_was_taken_for_dead_does_not_save_once_more(tmp_path: Path) -> None:
    """Its ranks would write a checkpoint into the folder in which those of the new owner write theirs."""
    command = [sys.executable, "-c", TAKEN_OVER, str(tmp_path), SAVES]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "started")
    [held] = (tmp_path / "lock").glob(".held.*")
    foreign(tmp_path / "lock", number=2)
    held.unlink()
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 143
    assert f"error: {held} was taken over by another process: stopping" in said
    assert_ends(int((tmp_path / "started").read_text()))
    assert not (tmp_path / "saved").exists()


def test_the_same_number_in_a_recreated_folder_is_another_lock(tmp_path: Path, stopped: threading.Event) -> None:
    """The run was removed and started over while this process worked: both hold number 1, of different folders."""
    got = try_lock(tmp_path / "lock", Watch())
    assert isinstance(got, Lock)
    shutil.rmtree(tmp_path / "lock")
    held = foreign(tmp_path / "lock", number=1)
    os.utime(held, (7, 7))
    with pytest.raises(UserError, match="another process took the lock over because this one seemed dead, or the"):
        got.check()
    assert stopped.wait(LIMIT_S)
    got.release()
    assert held.stat().st_mtime == 7, "the other's heart does not beat by us"
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [".held.000001"], "nor is it let go"


def test_a_lock_removed_with_what_it_guards_stops_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunk is written, another process merges all and removes the claims, and the heart beats once more."""
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    looked = threading.Semaphore(0)
    look = locks._look

    def counted(path: Path) -> object:
        looked.release()
        return look(path)

    monkeypatch.setattr(locks, "_look", counted)
    got = try_lock(tmp_path / "chunks" / "claims" / "c", Watch())
    assert isinstance(got, Lock)
    shutil.rmtree(tmp_path / "chunks")
    for _ in range(5):  # a look and what follows from it, several times: it would end this process
        assert looked.acquire(timeout=LIMIT_S)
    with pytest.raises(UserError, match="or the folder was removed"):
        got.check()
    got.release()


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_goes_while_its_lock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, error: type[OSError]
) -> None:
    """What pathlib says then: of the folder that it found it raises FileExistsError, of a lost parent the other."""
    mkdir, failures = Path.mkdir, [error, error]

    def gone(self: Path, **options: bool) -> None:
        if failures:
            raise failures.pop()(str(self))
        mkdir(self, **options)

    monkeypatch.setattr(Path, "mkdir", gone)
    lock = try_lock(tmp_path / "lock", Watch())
    assert isinstance(lock, Lock)
    lock.release()


@pytest.mark.parametrize("place", ["/proc/nothing/.lock", "/proc/.lock"])
def test_a_place_where_no_folder_can_be_made_is_refused(place: str, clock: Clock) -> None:
    """/proc answers ENOENT, as for a folder that another process has just removed."""
    said = rf"{place}: this folder cannot be made \(No such file or directory\)"
    with pytest.raises(UserError, match=said), exclusive_lock(Path(place), "it", wait=True):
        pass
    assert clock.now < 5


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_another_thing_in_place_of_the_folder_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lock")
    with pytest.raises(FileExistsError):
        try_lock(tmp_path / "lock", Watch())


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends a request again when no answer comes, and the second finds what the first one made."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(str(target))

    monkeypatch.setattr(locks.os, "link", twice)
    with exclusive_lock(tmp_path / "lock", "it") as held:
        held.check()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [".free.000001"]


def test_who_owns_it_is_on_the_disk_before_the_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut an empty file would stop every later run."""
    done: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(locks.os, "fsync", lambda handle: (done.append("flushed"), fsync(handle)))
    monkeypatch.setattr(locks.os, "link", lambda *paths: (done.append("linked"), link(*paths)))
    with exclusive_lock(tmp_path / "lock", "it"):
        assert done == ["flushed", "linked"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("step", ["stat", "read_text"])
def test_a_lock_let_go_while_it_is_looked_at_is_only_changing_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    """Its holder lets go after the folder was listed (over NFS a removed file that is being read answers ESTALE)."""
    held = foreign(tmp_path / "lock", number=3)
    real = getattr(Path, step)

    def let_go(path: Path, **arguments: object) -> object:
        if path == held and held in held.parent.iterdir():
            held.rename(held.with_name(".free.000003"))
            raise OSError(code, os.strerror(code))
        return real(path, **arguments)

    monkeypatch.setattr(Path, step, let_go)
    assert try_lock(tmp_path / "lock", Watch()) is None
    with exclusive_lock(tmp_path / "lock", "it") as taken:
        assert taken.path.name == ".held.000004"


def test_a_damaged_lock_is_named(tmp_path: Path) -> None:
    held = foreign(tmp_path / "lock", number=3)
    held.write_text("{")
    with pytest.raises(UserError) as caught:
        try_lock(tmp_path / "lock", Watch())
    assert str(caught.value) == f"{held}: expected the owner of a lock, got something else; remove {held.parent}"


@pytest.mark.parametrize(
    ("now", "then"), [(".held.000007", ".free.000003"), (".free.000007", ".free.000006")], ids=["past", "freed"]
)
def test_a_contender_that_slept_does_not_get_a_number_that_is_past_or_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str, then: str
) -> None:
    """It listed the folder, slept while others took and freed the lock, and then makes the number it planned."""
    folder = tmp_path / "lock"
    foreign(folder, number=7)
    (folder / ".held.000007").rename(folder / now)
    real, slept = locks._newest, []

    def asleep(path: Path) -> Path | None:
        if not slept:
            slept.append(True)
            return folder / then
        return real(path)

    monkeypatch.setattr(locks, "_newest", asleep)
    assert try_lock(folder, Watch()) is None
    assert [path.name for path in folder.iterdir()] == [now]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """exFAT, some SMB servers, mounted buckets."""

    def no_link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(locks.os, "link", no_link)
    with pytest.raises(UserError) as caught:
        exclusive_lock(tmp_path / "run" / ".lock", "it").__enter__()
    assert str(caught.value).startswith(
        f"{tmp_path / 'run'}: its file system does not support hard links ({os.strerror(code)})"
    )
    assert "choose a folder on another file system" in str(caught.value)
    assert not list((tmp_path / "run" / ".lock").iterdir()), "no draft is left"


def test_another_fault_of_the_file_system_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.os, "link", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        try_lock(tmp_path / "lock", Watch())


# --- a /proc that hides other users' processes ---------------------------------------------------------------------


def test_a_living_owner_whom_proc_hides_is_not_dead(tmp_path: Path, repository: Path) -> None:
    """hidepid=2: the owner is another user's process on this host. Its heartbeat decides, as on another host."""
    code = (
        "import os, sys; from pathlib import Path; from megatron_stepkto.base import locks, processes\n"
        "held = locks._look(next(Path(sys.argv[1]).glob('.held.*')))\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "print(processes.start_time(held.owner.pid), held.runs(), locks.Watch().is_dead(held))\n"
        "print(repr(processes.start_time(4_000_000)))\n"  # a number that no process has
    )
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", hide, "sh", sys.executable, "-c", code, str(tmp_path / "lock")]
    with exclusive_lock(tmp_path / "lock", "the folder"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=repository)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout == "None None False\n''\n", done.stderr
