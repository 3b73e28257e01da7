"""Child processes of a stage: started together, watched, and never left behind.

The parent calls ``run_children``; a child that is Python of this package wraps its main function in
``child_main``. A child dies with its parent, however the parent dies: the kernel sends SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from megatron_stepkto.base.errors import MachineFault, StageFailed, UserError
from megatron_stepkto.base.progress import ProgressBar, Report, read_progress, say, show_messages, warn
from megatron_stepkto.base.storage import is_nearly_full, refusal, writing

POLL_EVERY_S = 0.3
GRACE_S = 10.0  # between SIGTERM and SIGKILL
RESTARTS = 3
STOPPED = 143  # exit code of a process that was asked to stop, saved and exited
LOG_LINES = 15
ERROR_FILE = "STEPKTO_ERROR_FILE"
LOG_FILE = "STEPKTO_LOG_FILE"
PARENT = "STEPKTO_PARENT"
_PR_SET_PDEATHSIG = 1

# Ties the child to this process before its program starts, so that programs that are not ours (torchrun)
# are tied too: the setting survives exec. A preexec_fn would run Python between fork and exec, which may
# deadlock when another thread holds a lock. SIGUSR1 (save and stop) would kill a child that has no handler yet.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True)
class Child:
    """A command, the log of its output (one per attempt), and additions to its environment.

    stalled: polled about three times a second; True: the child is stuck. It is then killed and restarted, at most
    ``RESTARTS`` times in a row.
    """

    command: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    stalled: Callable[[], bool] | None = None


@dataclass(frozen=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    log: Path
    error_file: Path
    restarts: int = 0


def usable_cores() -> int:
    """Processor cores that this process may run on: a job's or a container's, not the host's."""
    return len(os.sched_getaffinity(0))


def gpus_of(worker: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a child that has ``count`` GPUs of its own, out of those that this process may use.

    Args:
        worker: its number, from 0.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = worker * count
    if allowed is None:
        return ",".join(str(number) for number in range(first, first + count))
    return ",".join(allowed.split(",")[first : first + count])


def run_children(
    children: Sequence[Child],
    *,
    title: str,
    unit: str,
    progress: Sequence[Path] | Callable[[], Report | None] = (),
    saves: bool = False,
) -> None:
    """Start all ``children``, show their progress as one bar, and return when all have ended well.

    Args:
        progress: a ``ProgressFile`` per child (some children may have none), whose sums are shown; or a function
            that returns the progress, called about three times a second.
        saves: on SIGTERM, SIGUSR1 or Ctrl-C the children are asked by SIGUSR1 to save and exit with code 143, and
            get the time that they need; a second SIGTERM or Ctrl-C stops them. If all finish before they receive it,
            SIGTERM and Ctrl-C still end this process; SIGUSR1 (the time limit is near) does not.

    Raises:
        SystemExit: 143, they saved and were stopped. KeyboardInterrupt: by Ctrl-C, or by a signal before they saved.
        UserError, MachineFault: a child reported one. StageFailed: a child died; shows the end of its log.
            In each case, and on any other exception, the remaining children are stopped first.
    """
    running: list[_Running] = []
    signals = _Signals(saves)
    try:
        with signals, contextlib.ExitStack() as stack:
            for each in children:
                running.append(_start(each, running[0].error_file if running else None))
            measure = progress if callable(progress) else partial(_sum_of, progress)
            shown = _Display(stack, title, unit, measure)
            left = list(running)
            while left:
                for child in [child for child in left if _ended(child.process)]:
                    left.remove(child)
                    if child.process.returncode and not (signals.told and _was_stopped(child.process)):
                        # a child that failed because of another may be seen first: give the culprit time to end
                        time.sleep(POLL_EVERY_S)
                        failed = [child, *(other for other in left if _ended(other.process))]
                        _stop(left)
                        raise _failure(title, failed)
                for child in [child for child in left if child.child.stalled is not None and child.child.stalled()]:
                    left.remove(child)
                    running.append(_restart(title, child))
                    left.append(running[-1])
                if signals.told:
                    # repeatedly: a child that is still importing ignores it (see _LAUNCHER)
                    for child in left:
                        # not send_signal: it reaps a child that has just ended, and leaves its group behind
                        os.kill(child.process.pid, signal.SIGUSR1)
                shown.update()
                if left:
                    time.sleep(POLL_EVERY_S)
        stopped = any(map(_was_stopped, (child.process for child in running)))
        if signals.told and (stopped or signals.must_end):
            done = "saved and stopped" if stopped else "finished, then stopped"
            say(f"{title}: {done}; run the same command again to resume")
            raise signals.end
    finally:
        _stop(running)


def _was_stopped(process: subprocess.Popen[bytes]) -> bool:
    return process.returncode in (STOPPED, -signal.SIGTERM, -signal.SIGUSR1)


def _sum_of(files: Sequence[Path]) -> Report | None:
    """The sum of several progress files, once all of them exist: only then is the total known."""
    reports = [report for report in map(read_progress, files) if report is not None]
    if not reports or len(reports) < len(files):
        return None
    notes = "  ".join(report.note for report in reports if report.note)
    return Report(
        sum(report.done for report in reports), sum(report.total for report in reports), notes, reports[0].unit
    )


class _Display:
    """One bar; it appears when the total is known."""

    def __init__(
        self, stack: contextlib.ExitStack, title: str, unit: str, measure: Callable[[], Report | None]
    ) -> None:
        self._stack, self._title, self._unit, self._measure = stack, title, unit, measure
        self._bar: ProgressBar | None = None

    def update(self) -> None:
        if (report := self._measure()) is None:
            return
        unit = report.unit or self._unit
        if self._bar is None or (self._bar.total, self._bar.unit) != (report.total, unit):  # a new phase of the work
            self._stack.close()
            self._bar = self._stack.enter_context(ProgressBar(self._title, report.total, unit))
        self._bar.update(report.done, report.note)


def _restart(title: str, stuck: _Running) -> _Running:
    """Kill a child that makes no progress, and start it again.

    Raises:
        StageFailed: it was already restarted ``RESTARTS`` times.
    """
    _signal_group(stuck.process, signal.SIGKILL)  # a hung process may ignore SIGTERM
    stuck.process.wait()
    if stuck.restarts == RESTARTS:
        raise StageFailed(
            f"{title}: a process made no progress, and {RESTARTS} restarts did not help; its log: {stuck.log}"
        )
    warn(f"{title}: a process makes no progress: restarting it; its log: {stuck.log}")
    return replace(_start(stuck.child, stuck.error_file), restarts=stuck.restarts + 1)


def _start(child: Child, error_file: Path | None = None) -> _Running:
    """error_file: where all children of one call report; the first report is the cause of the others."""
    log, output = _open_log(child.log)
    if error_file is None:
        error_file = log.with_suffix(".error")
        error_file.unlink(missing_ok=True)
    parent = f"{os.getpid()}@{os.uname().nodename}"
    env = {**os.environ, **child.env, ERROR_FILE: str(error_file), LOG_FILE: str(log), PARENT: parent}
    with output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCHER, str(os.getpid()), *child.command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
            start_new_session=True,  # a group that can be signalled as a whole, and that Ctrl-C does not reach
        )  # fmt: skip
    return _Running(child, process, log, error_file)


def _open_log(wanted: Path) -> tuple[Path, BinaryIO]:
    """Open the first of a.log, a-2.log, ... that does not exist. Exclusive creation: processes on other hosts (elements
    of a Slurm array) may look for one at the same time, and would read each other's errors as their own."""
    log, attempt = wanted, 1
    while True:
        try:
            with writing(log):
                log.parent.mkdir(parents=True, exist_ok=True)
                return log, log.open("xb")
        except FileExistsError:
            attempt += 1
            log = wanted.with_name(f"{wanted.stem}-{attempt}{wanted.suffix}")


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Has it ended? If so, kill its group before reaping it: until then no other process can get its pid."""
    if process.returncode is not None:
        return True
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    _signal_group(process, signal.SIGKILL)
    process.wait()
    return True


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # no such group: the child has not created one yet, or only the unreaped child is left (macOS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _stop(children: Sequence[_Running]) -> None:
    left = [child for child in children if not _ended(child.process)]
    for child in left:
        _signal_group(child.process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [child for child in left if not _ended(child.process)]
    for child in left:
        _signal_group(child.process, signal.SIGKILL)
        child.process.wait()


def _failure(title: str, failed: Sequence[_Running]) -> Exception:
    """Why the children ended: the first report, else the exit status of one that failed."""
    report = _read_report(failed[0].error_file)
    if report and report["kind"] == "user":
        return UserError(report["message"])
    if report and report["kind"] == "machine":
        return MachineFault(report["message"])
    child = next((c for c in failed if report and str(c.log) == report["log"]), failed[0])
    code = child.process.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    log = report["log"] if report else child.log
    if is_nearly_full(child.log.parent):  # the child could not write its report
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return MachineFault(f"{title}: a process ended with {how}: " + refusal(child.log, error))
    try:
        text = report["message"] if report else child.log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return StageFailed(
            f"{title}: a process ended with {how}, and its log {log} is gone: the folder was removed while it ran; "
            "run the same command again"
        )
    end = "\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES:])
    return StageFailed(f"{title}: a process ended with {how}; the end of its log {log}:\n{end}")


def _read_report(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return None


class _Signals:
    """Handles SIGTERM and SIGUSR1 inside the ``with`` block (only the main thread gets signals).

    When the children can save, the first signal only sets ``told``. Otherwise, and for a second one, KeyboardInterrupt
    is raised (with the signal's number; without one for Ctrl-C), so that the children are stopped first.
    """

    def __init__(self, saves: bool) -> None:
        self._saves = saves
        self._numbers = [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if saves else [])]
        self.told = False
        self.must_end = False  # even if the children finished before they received it
        self.end: BaseException = SystemExit(STOPPED)
        self._before: list[Any] = []

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._handle) for number in self._numbers]

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._numbers, self._before, strict=False):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._saves and not self.told:
            self.told = True
            self.must_end = number != signal.SIGUSR1
            if number == signal.SIGINT:
                self.end = KeyboardInterrupt()
                warn("saving at the next opportunity, then stopping; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif not self._saves or number == signal.SIGTERM:
            raise KeyboardInterrupt(number)


def die_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when its parent dies (Linux); exits if it is dead already.

    Checks the parent (which may be torchrun's agent) and the process that called ``run_children``.

    Args:
        parent: its pid, where it is known.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    parent = parent or os.getppid()
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    number, _, node = os.environ.get(PARENT, "").partition("@")
    gone = node == os.uname().nodename and start_time(int(number)) == ""
    if gone or os.getppid() != parent:
        os._exit(1)


def tie_forks() -> None:
    """Make every process that this one forks, at any depth, die with its parent. Megatron forks processes that write a
    checkpoint: orphans of a killed rank would hold its memory and write into the files of the restarted one."""
    parent = os.getpid()

    def tie() -> None:
        nonlocal parent
        die_with_parent(parent)
        parent = os.getpid()

    os.register_at_fork(after_in_child=tie)


def start_time(pid: int) -> str | None:
    """When the process ``pid`` of this kernel started, in clock ticks since boot; "" where it is not running (a zombie
    is not); None where it cannot be known because /proc hides other users' processes.
    """
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it exists, and belongs to another user
    return None


def child_main(function: Callable[[], None]) -> None:
    """Run a child's main function: it dies with its parent, and reports failures to it.

    Exit code 2: UserError. 1: MachineFault, or a crash.
    """
    die_with_parent()
    show_messages()  # its standard error is a log
    try:
        function()
    except UserError as error:
        _end("user", str(error), 2)
    except MachineFault as error:
        _end("machine", str(error), 1)
    except Exception:
        _report("crash", traceback.format_exc())
        raise


def _end(kind: str, message: str, code: int) -> NoReturn:
    _report(kind, message)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _report(kind: str, message: str) -> None:
    """Report to the parent, unless another rank did: the first failure is the cause of the others.

    On a full disk the report cannot be written; the parent detects that itself.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    whole = Path(f"{path}.{os.getpid()}")
    report = {"kind": kind, "message": message, "log": os.environ.get(LOG_FILE, "")}
    with contextlib.suppress(OSError):
        whole.write_text(json.dumps(report), encoding="utf-8")
        os.link(whole, path)
    with contextlib.suppress(OSError):
        whole.unlink()
