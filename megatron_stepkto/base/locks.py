"""Locks for shared file systems: one owner among processes on many hosts, and detection of dead owners.

``flock`` is not used: over NFS it may be local to a host, or absent. A lock is a folder of numbered files, one
per acquisition; the one with the highest number counts:

    .held.000007   JSON: the owner; its mtime is updated every ``HEARTBEAT_S`` seconds
    .free.000007   the same file after release (a rename): kept, so that the next number is known

To acquire the lock a process creates ``.held.<newest + 1>`` as a hard link, which succeeds for exactly one contender.
Numbers only grow while the folder exists, so a contender cannot mistake a new owner for the dead one that it looked
at. No owner removes the folder; only the code that removes what the lock guards does (the claims of sampled chunks).

Whether an owner is dead is decided without comparing clocks: at once when it ran in this kernel and its process has
ended; else when its heartbeat does not change while *this* process watches, for ``SILENCE_S`` seconds, or for
``SHORT_SILENCE_S`` when Slurm reports that its job has ended or was requeued.
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
MAKE_TRIES = 40  # two seconds: what another process removes is gone, and can be made again, in far less
# Errors of a file system without hard links; FUSE returns EPERM, or ENOSYS in some kernels.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# A file that another process removed or renamed; over NFS also one that it removed while it was read.
_GONE = (errno.ENOENT, errno.ESTALE)
_HELD, _FREE = ".held.", ".free."


@dataclass(frozen=True)
class Owner:
    """Identifies a process, so that any other can tell whether it is alive. ``kernel``: boot id and pid namespace."""

    token: str
    host: str
    kernel: str
    pid: int
    started: str  # start time in clock ticks since boot: pids are reused
    slurm_job: str
    slurm_attempt: int

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def _kernel() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


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
    """Snapshot of a lock that another process holds. ``beat``: its heartbeat, the file's mtime in ns."""

    path: Path
    owner: Owner
    beat: int

    def runs(self) -> bool | None:
        """Is the owner's process still running? None: it cannot be looked up here, because it runs on another host or
        this one hides other users' processes (hidepid); only its heartbeat tells.
        """
        if not self.owner.kernel or self.owner.kernel != _kernel():
            return None
        started = start_time(self.owner.pid)
        return None if started is None else started == self.owner.started


def _look(path: Path) -> Held | None:
    """The holder of the lock ``path``; None when it was released or taken over since the folder was listed.

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
        """Is the owner dead? Call repeatedly: silence is measured between calls."""
        if (runs := held.runs()) is not None:
            return not runs
        now = time.monotonic()
        before, since, over = self._seen.get(held.path, (None, now, False))
        if held.beat != before:
            self._seen[held.path] = (held.beat, now, _slurm_says_over(held.owner))
            return False
        return now - since > (SHORT_SILENCE_S if over else SILENCE_S)


def _numbered(folder: Path) -> list[Path]:
    """The numbered files; none where the folder was removed."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith((_HELD, _FREE))]
    except FileNotFoundError:
        return []


def _newest(folder: Path) -> Path | None:
    # Where a number is both held and freed, the freed file counts: a contender that was suspended meanwhile and created
    # the number a second time must withdraw.
    return max(_numbered(folder), key=lambda path: (_number(path), path.name.startswith(_FREE)), default=None)


def _number(path: Path) -> int:
    return int(path.name[len(_HELD) :])


class Lock:
    """A lock that this process holds; a thread updates its heartbeat until ``release``."""

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
                    continue  # removed with what it guards (merged chunks): no other process writes here
            except OSError:
                continue  # the file server does not answer: the next beat decides
            if not self._over.is_set():
                # Another process considered this one dead (this host hung for minutes). Two writers are worse than
                # none: exit at once with all children (see processes); on SIGTERM a training would save once more.
                print(f"error: {self.path} was taken over by another process: stopping", file=sys.stderr, flush=True)
                os._exit(143)  # the code of a requested stop: a batch system requeues it
            return

    @property
    def is_ours(self) -> bool:
        """Compares contents: where the folder was removed and created again, another process may hold this number."""
        held = _look(self.path)
        return held is not None and held.owner == self.owner

    def check(self) -> None:
        """Raises UserError when the lock is lost: the work of this process must not be used."""
        if not self.is_ours:
            raise UserError(
                f"{self.path.parent.parent}: another process took the lock over because this one seemed dead, or the "
                "folder was removed; stopping"
            )

    def release(self) -> None:
        """Release the lock; its number is kept, as freed."""
        self._over.set()
        with contextlib.suppress(FileNotFoundError):
            if self.is_ours:
                self.path.rename(self.path.with_name(self.path.name.replace(_HELD, _FREE)))


def _make(folder: Path) -> None:
    """Create the folder of a lock.

    Another process may remove it at this moment, with what it guards: pathlib then raises as it does where no folder
    can ever be made, such as in /proc. Only trying again tells them apart.

    Raises:
        UserError: it cannot be created there. MachineFault, OSError: the file system refuses.
    """
    for left in reversed(range(MAKE_TRIES)):
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            return
        except (FileExistsError, FileNotFoundError) as error:
            check_working_directory()
            if folder.exists() and not folder.is_dir():
                raise
            if link := next(
                (each for each in (folder, *folder.parents) if each.is_symlink() and not each.exists()), None
            ):
                raise UserError(
                    f"{link}: expected a folder, got a link to {link.readlink()}, which does not exist; make that "
                    "folder, or remove the link"
                ) from None
            if not left:
                raise UserError(
                    f"{folder}: this folder cannot be made ({os.strerror(error.errno or errno.ENOENT)}); choose a "
                    "place where folders can be made"
                ) from None
        time.sleep(POLL_S / 10)


def _write_draft(draft: Path, owner: Owner) -> None:
    """Flush before linking: a lost node must not leave an empty lock file behind."""
    with writing(draft), draft.open("w") as file:
        json.dump(asdict(owner), file)
        file.flush()
        os.fsync(file.fileno())


def _link(draft: Path, mine: Path) -> None:
    try:
        os.link(draft, mine)
    except FileExistsError:
        # NFS: the reply may be lost, and the repeated request then finds the link that the first one created.
        if draft.stat().st_nlink == 1:
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise UserError(
            f"{mine.parent.parent}: its file system does not support hard links ({error.strerror}), which the lock "
            "needs to exclude a second writer; choose a folder on another file system (a local disk, NFS, Lustre; not "
            "exFAT or a mounted bucket)"
        ) from None


def try_lock(folder: Path, watch: Watch) -> Lock | Held | None:
    """Acquire the lock, or return the holder that is not known to be dead (None: it is changing hands, try again).

    Raises:
        UserError: the file system does not support hard links, the folder cannot be made, or the lock is damaged.
    """
    _make(folder)
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
    except (FileExistsError, FileNotFoundError):  # taken, or the folder was removed with what it guards
        return None
    finally:
        draft.unlink(missing_ok=True)
    # A contender that was suspended since it listed the folder may have created an outdated number, or one in a folder
    # that was removed and created again.
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
    """Hold the lock in ``folder``. Waits until it is known whether an owner is dead.

    Args:
        wait: also wait for a live owner, without limit.
        note: called once with a message when there is something to wait for.

    Raises:
        UserError: a live process holds it (unless ``wait``); see also ``try_lock``.
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
                note(f"{what} is held by {got.owner}: " + ("waiting" if wait else "checking whether it is alive"))
        time.sleep(POLL_S if got is not None else 0.05)
    try:
        yield got
    finally:
        got.release()
