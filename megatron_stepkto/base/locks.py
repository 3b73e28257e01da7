"""Locks that work on shared file systems: one owner among processes of many hosts, and the dead are found out.

``flock`` is not used: over NFS it may be local to a host, or absent. A lock is a folder of numbered files, one
per owner that ever was; the newest counts:

    .held.000007   JSON: who owns it; its mtime is set anew every ``HEARTBEAT_S`` seconds
    .free.000007   the same file after its owner let go (a rename): it stays, so that the next number is known

To take the lock a process makes ``.held.<newest + 1>`` by a hard link, which exactly one of any number of
contenders can. Numbers only grow while the folder stands, so that nobody mistakes a fresh owner for the dead one that
he looked at. No owner removes the folder; only who removes what it guards does (the claims of drawn chunks).

Whether an owner is dead is decided without comparing clocks: at once when it ran in this kernel and its process is
gone; else when its heartbeat does not change while *this* process watches, for ``SILENCE_S`` seconds, or for
``SHORT_SILENCE_S`` when Slurm says that its job is over or was started again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.processes import start_time
from megatron_stepkto.base.storage import check_working_directory, writing

HEARTBEAT_S = 10.0
SILENCE_S = 90.0  # nine heartbeats: a stalled file server must not pass for a dead owner
SHORT_SILENCE_S = 25.0
POLL_S = 0.5
# What a file system without hard links answers; FUSE says EPERM, or ENOSYS in some kernels.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# A file that another process removed or renamed; over NFS also one that it removed while it was read.
_GONE = (errno.ENOENT, errno.ESTALE)
_HELD, _FREE = ".held.", ".free."


@dataclass(frozen=True)
class Owner:
    """A process, so that any other can tell whether it still lives. ``kernel``: boot and pid namespace."""

    token: str
    host: str
    kernel: str
    pid: int
    started: str  # of the process, in clock ticks since boot: a pid is used again
    slurm_job: str
    slurm_attempt: int

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _kernel() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{_read(Path('/proc/sys/kernel/random/boot_id')).strip()} {namespace}"


def this_process() -> Owner:
    return Owner(
        token=uuid.uuid4().hex,
        host=os.uname().nodename,
        kernel=_kernel(),
        pid=os.getpid(),
        started=start_time(os.getpid()) or "",
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        slurm_attempt=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def _slurm_says_over(owner: Owner) -> bool:
    """Is the owner's job gone, or in a later attempt? False where Slurm cannot be asked."""
    if not owner.slurm_job:
        return False
    if owner.slurm_job == os.environ.get("SLURM_JOB_ID"):
        return owner.slurm_attempt < int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--jobs", owner.slurm_job, "--format=%T"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    states = set(found.stdout.split())
    if found.returncode:
        return "Invalid job id" in found.stderr
    return not states & {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}


@dataclass(frozen=True)
class Held:
    """A lock in another's hands, as one look found it. ``beat``: the heartbeat, its file's mtime in ns."""

    path: Path
    owner: Owner
    beat: int

    def runs(self) -> bool | None:
        """Does the owner's process still run? None: it cannot be looked up here, as it runs on another host, or as
        this one hides other users' processes (hidepid); only its heartbeat tells.
        """
        if not self.owner.kernel or self.owner.kernel != _kernel():
            return None
        started = start_time(self.owner.pid)
        return None if started is None else started == self.owner.started


def _look(path: Path) -> Held | None:
    """Who holds the lock ``path``; None when it was let go or taken over since the folder was listed.

    Raises:
        UserError: the file is damaged.
    """
    try:
        beat, text = path.stat().st_mtime_ns, path.read_text()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    try:
        return Held(path, Owner(**json.loads(text)), beat)
    except (ValueError, TypeError):
        raise UserError(f"{path}: expected the owner of a lock, got something else; remove {path.parent}") from None


class Watch:
    """Remembers owners and when (on this process's own clock) their heartbeat last changed."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, float, bool]] = {}

    def is_dead(self, held: Held) -> bool:
        """Is the owner dead? Ask again and again: silence is measured between the calls."""
        if (runs := held.runs()) is not None:
            return not runs
        now = time.monotonic()
        before, since, over = self._seen.get(held.path, (None, now, False))
        if held.beat != before:
            self._seen[held.path] = (held.beat, now, _slurm_says_over(held.owner))
            return False
        return now - since > (SHORT_SILENCE_S if over else SILENCE_S)


def _numbered(folder: Path) -> list[Path]:
    """The files that count; none where the folder is gone."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith((_HELD, _FREE))]
    except FileNotFoundError:
        return []


def _newest(folder: Path) -> Path | None:
    # Of one number the freed one counts: who makes it again, having slept while it was held and freed, steps back.
    return max(_numbered(folder), key=lambda path: (_number(path), path.name.startswith(_FREE)), default=None)


def _number(path: Path) -> int:
    return int(path.name[len(_HELD) :])


class Lock:
    """A lock that this process holds; a thread keeps its heart beating until ``release``."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            try:
                if self.is_ours:
                    os.utime(self.path)
                    continue
                if not self.path.parent.exists():
                    continue  # it went with what it guards (chunks that were merged): nobody writes beside us
            except OSError:
                continue  # the file server does not answer: the next beat tells
            if not self._over.is_set():
                # Somebody took us for dead (this host hung for minutes). Two writers are worse than none: at once, and
                # with all children (see processes), for on SIGTERM a training would save once more.
                print(f"error: {self.path} was taken over by another process: stopping", file=sys.stderr, flush=True)
                os._exit(143)  # as one that was told to stop: a batch system puts it back
            return

    @property
    def is_ours(self) -> bool:
        """By its content: where the folder was removed and made anew, our number may be another's."""
        held = _look(self.path)
        return held is not None and held.owner == self.owner

    def check(self) -> None:
        """Raises UserError when the lock is lost: what this process made must not count."""
        if not self.is_ours:
            raise UserError(
                f"{self.path.parent.parent}: another process took over, as this one seemed dead, or the folder was "
                "removed; stopping"
            )

    def release(self) -> None:
        """Let go; the number stays behind, freed."""
        self._over.set()
        with contextlib.suppress(FileNotFoundError):
            if self.is_ours:
                self.path.rename(self.path.with_name(self.path.name.replace(_HELD, _FREE)))


def _make(folder: Path) -> bool:
    """Make the folder of a lock; False where it goes in this instant, with what it guards.

    Raises:
        UserError: it can never be made there. MachineFault, OSError: the file system refuses.
    """
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError):
        check_working_directory()
        if folder.is_file():
            raise
        if link := next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None):
            raise UserError(
                f"{link}: expected a folder, got a link to {link.readlink()}, which does not exist; make that folder, "
                "or remove the link"
            ) from None
        return False
    return True


def _write_draft(draft: Path, owner: Owner) -> None:
    """On the disk before the link: a node that is lost must not leave an empty file that everybody trips over."""
    with writing(draft), draft.open("w") as file:
        json.dump(asdict(owner), file)
        file.flush()
        os.fsync(file.fileno())


def _link(draft: Path, mine: Path) -> None:
    try:
        os.link(draft, mine)
    except FileExistsError:
        # NFS: the answer may get lost, and the request that is sent again finds the link that the first one made.
        if draft.stat().st_nlink == 1:
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise UserError(
            f"{mine.parent.parent}: its file system makes no hard links ({error.strerror}), by which a lock keeps a "
            "second writer out; choose a folder on another file system (a local disk, NFS, Lustre; not exFAT, nor a "
            "mounted bucket)"
        ) from None


def try_lock(folder: Path, watch: Watch) -> Lock | Held | None:
    """Take the lock, or tell who holds it and is not known to be dead (None: just changing hands, try again).

    Raises:
        UserError: the file system makes no hard links, or a damaged lock.
    """
    if not _make(folder):
        return None
    newest = _newest(folder)
    if newest is not None and newest.name.startswith(_HELD):
        held = _look(newest)
        if held is None or not watch.is_dead(held):
            return held
    number = _number(newest) + 1 if newest is not None else 1
    ours, mine = this_process(), folder / f"{_HELD}{number:06d}"
    draft = folder / f".draft.{ours.token}"
    try:
        _write_draft(draft, ours)
        _link(draft, mine)
    except (FileExistsError, FileNotFoundError):  # taken, or the folder went with what it guards
        return None
    finally:
        draft.unlink(missing_ok=True)
    # A contender that slept since it listed the folder may have made a number that is long past, or one of a folder
    # that was removed and made anew.
    if _newest(folder) != mine or (newest is not None and not newest.exists()):
        mine.unlink(missing_ok=True)
        return None
    for path in _numbered(folder):
        if _number(path) < number:
            path.unlink(missing_ok=True)
    return Lock(mine, ours)


@contextlib.contextmanager
def exclusive_lock(
    folder: Path, what: str, *, wait: bool = False, note: Callable[[str], None] | None = None
) -> Iterator[Lock]:
    """Hold the lock in ``folder``. An owner that may be dead is watched until that is known.

    Args:
        wait: for an owner that lives too, as long as it takes.
        note: is told once when there is something to wait for.

    Raises:
        UserError: a process that is alive holds it (unless ``wait``), or what ``try_lock`` raises.
    """
    watch, told = Watch(), False
    first: Held | None = None
    while True:
        got = try_lock(folder, watch)
        if isinstance(got, Lock):
            break
        if got is not None:
            if first is None or first.owner != got.owner:
                first = got
            if not wait and (got.runs() or got.beat != first.beat):
                raise UserError(
                    f"{what} is being written by another process ({got.owner}): "
                    "wait for it or stop it, then run the command again"
                )
            if note and not told:
                told = True
                note(f"{what} is held by {got.owner}: " + ("waiting" if wait else "watching whether it is alive"))
        time.sleep(POLL_S if got is not None else 0.05)
    try:
        yield got
    finally:
        got.release()
