"""Children of a stage: real processes that end well, fail, report, hang, and lose their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_stepkto.base import processes
from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.base.progress import Report, read_progress

WAIT_S = 120.0  # on a busy machine


def python(script: str, log: Path, env: dict[str, str] | None = None) -> Child:
    return Child([sys.executable, "-c", script], log, env or {})


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear in {WAIT_S} s")


def is_running(pid: int) -> bool:
    """A zombie is dead: reaping it is the task of the machine's init, which a container may lack."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between the opening and the reading
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def test_all_end_well_and_each_attempt_has_its_own_log(tmp_path: Path) -> None:
    children = [
        python("import os; print('one', os.environ['SHADE'])", tmp_path / "logs" / "a.log", {"SHADE": "red"}),
        python("import sys; print('two', file=sys.stderr)", tmp_path / "logs" / "b.log"),
    ]
    run_children(children, title="test", unit="units")
    run_children(children[:1], title="test", unit="units")
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs == {"a.log": "one red\n", "b.log": "two\n", "a-2.log": "one red\n"}


def test_who_starts_children_at_once_has_logs_of_his_own(tmp_path: Path) -> None:
    """As elements of a Slurm array: of one log, and the report of errors beside it, each would read the other's."""
    together = threading.Barrier(8)

    def open_log(_: int) -> Path:
        together.wait()
        path, file = processes._open_log(tmp_path / "logs" / "worker-0.log")
        file.close()
        return path

    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(open_log, range(8)))
    assert {path.name for path in logs} == {"worker-0.log", *(f"worker-0-{n}.log" for n in range(2, 9))}


def test_failure_names_the_log_shows_its_end_and_stops_the_others(tmp_path: Path) -> None:
    pid_file, log = tmp_path / "pid", tmp_path / "bad.log"
    hang = f"import os,time; open({str(pid_file)!r},'w').write(str(os.getpid())); time.sleep(600)"
    fail = (
        f"import os,time\nwhile not os.path.exists({str(pid_file)!r}): time.sleep(0.05)\n"
        "[print('line', n) for n in range(40)]; raise SystemExit(3)"
    )
    with pytest.raises(StageFailed) as caught:
        run_children([python(hang, tmp_path / "hang.log"), python(fail, log)], title="test", unit="units")
    message = str(caught.value)
    assert str(log) in message
    assert "exit code 3" in message
    assert [line.strip() for line in message.splitlines()[1:]] == [f"line {n}" for n in range(25, 40)]
    assert_ends(int(pid_file.read_text()))


def test_a_folder_that_is_removed_meanwhile_is_named_as_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "stage" / "logs" / "a.log"
    script = f"import shutil, sys; shutil.rmtree({str(tmp_path / 'stage')!r}); open({str(log)!r})"
    with pytest.raises(StageFailed) as caught:
        run_children([python(script, log)], title="sample", unit="units")
    assert str(caught.value) == (
        f"sample: a process ended with exit code 1, and its log {log} is gone: the folder was removed while it ran; "
        "run the same command again"
    )


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="killed by SIGKILL"):
        run_children([python("import os; os.kill(os.getpid(), 9)", tmp_path / "a.log")], title="test", unit="units")


def test_user_error_of_a_child_reaches_the_parent(tmp_path: Path) -> None:
    script = (
        "from megatron_stepkto.base.errors import UserError\n"
        "from megatron_stepkto.base.processes import child_main\n"
        "def main(): raise UserError('row 7: expected a fish')\n"
        "child_main(main)"
    )
    with pytest.raises(UserError, match=r"^row 7: expected a fish$"):
        run_children([python(script, tmp_path / "a.log")], title="test", unit="units")
    assert (tmp_path / "a.log").read_text() == "error: row 7: expected a fish\n"


def test_traceback_behind_a_noisy_launcher_is_shown(tmp_path: Path) -> None:
    """As under torchrun: the process that ends prints pages of its own after the rank's traceback."""
    rank = "from megatron_stepkto.base.processes import child_main\ndef main(): return [][5]\nchild_main(main)"
    launcher = (
        f"import subprocess, sys; code = subprocess.call([sys.executable, '-c', {rank!r}]); "
        "print('noise\\n' * 100); sys.exit(code)"
    )
    with pytest.raises(StageFailed, match="IndexError: list index out of range"):
        run_children([python(launcher, tmp_path / "a.log")], title="test", unit="units")


def test_grandchildren_go_with_a_failed_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); sys.exit(1)"
    )
    with pytest.raises(StageFailed):
        run_children([python(script, tmp_path / "a.log")], title="test", unit="units")
    assert_ends(int(pid_file.read_text()))


def test_exception_in_the_parent_stops_a_child_that_ignores_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_stepkto.base.processes.GRACE_S", 0.5)
    pid_file = tmp_path / "pid"
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )

    def progress() -> None:
        if pid_file.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_children([python(script, tmp_path / "a.log")], title="test", unit="units", progress=progress)
    assert_ends(int(pid_file.read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_parent_leaves_no_orphan(tmp_path: Path, number: signal.Signals) -> None:
    """The child never heard of this package (as torchrun), the grandchild calls die_with_parent (as a rank).

    The grandchild has a session of its own, as torchrun gives its ranks: signals to the group miss it.
    """
    child_pid, grandchild_pid = tmp_path / "child", tmp_path / "grandchild"
    grandchild = (
        "import os, time; from megatron_stepkto.base.processes import die_with_parent; die_with_parent()\n"
        f"open({str(grandchild_pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    child = (
        f"import os, subprocess, sys; open({str(child_pid)!r}, 'w').write(str(os.getpid()))\n"
        f"subprocess.run([sys.executable, '-c', {grandchild!r}], start_new_session=True)"
    )
    parent = (
        "import sys; from pathlib import Path; from megatron_stepkto.base.processes import Child, run_children\n"
        "from megatron_stepkto.cli.guard import guarded\n"
        f"child = Child([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'a.log')!r}))\n"
        "guarded(lambda: run_children([child], title='test', unit='units'))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True)
    pids = [int(wait_for(path)) for path in (child_pid, grandchild_pid)]
    assert all(map(is_running, pids))
    os.kill(process.pid, number)
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + 15)
    if number == signal.SIGTERM:
        assert said == "interrupted: finished work is kept; run the same command again to resume\n"
    for pid in pids:
        assert_ends(pid)


def test_forks_of_a_killed_process_die_and_theirs(tmp_path: Path) -> None:
    """As Megatron forks writers of a checkpoint, in a rank or in a writer beside the training."""
    script = (
        "import os, time; from megatron_stepkto.base.processes import tie_forks; tie_forks()\n"
        "for name in ('child', 'grandchild'):\n"
        "    if os.fork(): time.sleep(600)\n"
        "    open(f'{name}.draft', 'w').write(str(os.getpid())); os.rename(f'{name}.draft', name)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    pids = [int(wait_for(tmp_path / name)) for name in ("child", "grandchild")]
    process.kill()
    process.wait()
    for pid in pids:
        assert_ends(pid)


def test_a_fork_whose_parent_is_already_gone_ends(tmp_path: Path) -> None:
    script = (
        "import os, time; from megatron_stepkto.base import processes\n"
        "tie = processes.die_with_parent\n"
        "def late(parent):\n"
        "    open('draft', 'w').write(str(os.getpid())); os.rename('draft', 'pid')\n"
        "    while os.getppid() == parent: time.sleep(0.01)\n"
        "    tie(parent)\n"
        "processes.die_with_parent = late\n"
        "processes.tie_forks()\n"
        "os.fork(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    pid = int(wait_for(tmp_path / "pid"))
    process.kill()
    process.wait()
    assert_ends(pid)


def test_a_launcher_that_was_not_reaped_yet_is_dead() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    script = "from megatron_stepkto.base.processes import die_with_parent; die_with_parent(); print('lives')"
    env = {**os.environ, processes.PARENT: f"{launcher.pid}@{os.uname().nodename}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    launcher.wait()


def test_progress_of_several_children_is_summed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    scripts = [
        "from pathlib import Path; from megatron_stepkto.base.progress import ProgressFile\n"
        f"ProgressFile(Path({str(path)!r})).report({done}, 10, {note!r}, at_once=True)"
        for path, done, note in zip(files, (10, 7), ("fast", ""), strict=True)
    ]
    children = [python(script, tmp_path / f"{n}.log") for n, script in enumerate(scripts)]
    run_children(children, title="drawing", unit="solutions", progress=files)
    assert "drawing: 17/20 solutions" in capsys.readouterr().err


def test_a_phase_that_counts_other_things_has_a_bar_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, seen = tmp_path / "progress.json", tmp_path / "seen"
    script = (
        "import time; from pathlib import Path; from megatron_stepkto.base.progress import ProgressFile\n"
        f"file, seen = ProgressFile(Path({str(file)!r})), Path({str(seen)!r})\n"
        "file.report(3, 9, unit='tokens', at_once=True)\n"
        "while not seen.exists(): time.sleep(0.01)\n"
        "file.report(1, 9, 'loss 1', at_once=True)"
    )

    def see() -> Report | None:
        if (report := read_progress(file)) and report.unit:
            assert str(report) == "3/9 tokens"
            seen.touch()
        return report

    run_children([python(script, tmp_path / "a.log")], title="train", unit="updates", progress=see)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["train: 3/9 tokens", "train: 1/9 updates"]


def test_a_stuck_child_is_killed_and_started_again_a_few_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stuck until its third start: the two before are killed, whatever they do with SIGTERM."""
    starts = tmp_path / "starts"
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(starts)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        f"while len(open({str(starts)!r}).readlines()) < 3: time.sleep(0.1)\n"
    )
    asked: list[int] = []

    def stalled() -> bool:
        pids = [int(line) for line in starts.read_text().split()] if starts.exists() else []
        if len(pids) in (1, 2) and pids[-1] not in asked:
            asked.append(pids[-1])
            return True
        return False

    child = Child([sys.executable, "-c", script], tmp_path / "a.log", {}, stalled)
    run_children([child], title="drawing", unit="units")
    assert len(starts.read_text().split()) == 3
    for pid in asked:
        assert_ends(pid)
    assert capsys.readouterr().err.count("makes no progress: restarting it") == 2
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["a-2.log", "a-3.log", "a.log"]


def test_restarts_of_a_stuck_child_are_bounded(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "a.log", {}, lambda: True)
    with pytest.raises(StageFailed, match=r"3 restarts did not help; its log: .*a-4\.log"):
        run_children([child], title="drawing", unit="units")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_children_that_save_are_asked_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    """The request comes while one child still starts and cannot hear it: it is asked again, and nothing is lost."""
    child = (
        "import os, signal, sys, time\n"
        "name = sys.argv[1]\n"
        "open(name + '.started', 'w').write(str(os.getpid()))\n"
        "time.sleep(1.5 if name.endswith('slow') else 0)\n"  # imports, say
        "told = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: told.append(1))\n"
        "while not told: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"  # an update and a checkpoint
        "open(name + '.saved', 'w').write('saved')\n"
        "sys.exit(143)\n"
    )
    names = [str(tmp_path / "quick"), str(tmp_path / "slow")]
    parent = (
        "import sys; from pathlib import Path; from megatron_stepkto.base.processes import Child, run_children\n"
        "from megatron_stepkto.base.progress import show_messages; show_messages()\n"
        f"children = [Child([sys.executable, '-c', {child!r}, name], Path(name + '.log')) for name in {names!r}]\n"
        "run_children(children, title='test', unit='units', saves=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True)
    for name in names:
        wait_for(Path(name + ".started"))
    process.send_signal(number)
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 143, said
    assert "saved and stopped" in said
    for name in names:
        assert Path(name + ".saved").read_text() == "saved"


def test_what_a_child_leaves_goes_also_where_it_ends_when_it_is_asked_to_save(tmp_path: Path) -> None:
    """It ends between two looks of the parent, in which it is asked: its group must be ended before it is reaped."""
    pids, told = tmp_path / "pids", tmp_path / "told"
    script = (
        "import os, subprocess, sys, time\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{left.pid}}\\n')\n"
        f"while not os.path.exists({str(told)!r}): time.sleep(0.05)\n"
        "sys.exit(143)"
    )

    def stalled() -> bool:
        if pids.exists() and pids.read_text().endswith("\n") and not told.exists():
            os.kill(os.getpid(), signal.SIGUSR1)
            told.touch()
            assert_ends(int(pids.read_text().split()[0]))
        return False

    child = Child([sys.executable, "-c", script], tmp_path / "a.log", {}, stalled)
    with pytest.raises(SystemExit, match="143"):
        run_children([child], title="test", unit="units", saves=True)
    assert_ends(int(pids.read_text().split()[1]))


def test_a_real_failure_while_stopping_is_a_failure(tmp_path: Path) -> None:
    child = (
        "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\n"
        "open(sys.argv[1], 'w').write('x'); signal.pause()"
    )
    parent = (
        "import sys; from pathlib import Path; from megatron_stepkto.base.processes import Child, run_children\n"
        f"command = [sys.executable, '-c', {child!r}, {str(tmp_path / 'up')!r}]\n"
        f"child = Child(command, Path({str(tmp_path / 'a.log')!r}))\n"
        "run_children([child], title='test', unit='units', saves=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 1
    assert "exit code 9" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)], ids=str
)
def test_a_request_to_end_counts_where_the_children_were_done_before_they_heard_it(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    child = (
        f"import os, time; open({str(tmp_path / 'up')!r}, 'w').write('x')\n"
        f"while not os.path.exists({str(tmp_path / 'told')!r}): time.sleep(0.05)"
    )
    parent = (
        "import sys; from pathlib import Path; from megatron_stepkto.base.processes import Child, run_children\n"
        "from megatron_stepkto.cli.guard import guarded\n"
        f"child = Child([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'a.log')!r}))\n"
        "guarded(lambda: run_children([child], title='test', unit='units', saves=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "up")
    process.send_signal(number)
    (tmp_path / "told").touch()  # the child ends after the signal was sent, however late that is
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == code, said
    assert ("finished, then stopped" in said) == bool(code)


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_an_interrupt_at_any_moment_is_one_line(seconds: float) -> None:
    """Also while Python imports what the command needs: the moment is counted from main's first line."""
    code = (
        "import sys; from megatron_stepkto.__main__ import leave_at_once, main\n"
        "leave_at_once(); print('up', flush=True); sys.argv = ['stepkto', 'check-answers', '-']; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130  # before its input is closed: check-answers waits for lines
    said = process.communicate()[1]
    assert (said.split(":")[0], said.count("\n")) == ("interrupted", 1)
