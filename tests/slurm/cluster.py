"""A real Slurm of two virtual nodes on this machine, in a folder of its own; nothing outside it is touched.

munged, slurmctld and slurmd run as this user (root: slurmd needs it) with their own ports, sockets and state.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BUSY = 4.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")


def missing() -> str:
    """Why no cluster can be started here; "" when one can."""
    absent = [name for name in PROGRAMS if find(name) is None]
    if absent:
        return f"Slurm is not installed (no {', '.join(absent)}); apt-get install slurm-wlm slurm-client munge"
    return "" if os.getuid() == 0 else "slurmd and munged are started by root only"


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


_TIED = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Cluster:
    """Nodes n1 and n2. ``environment`` makes Slurm's commands speak to this cluster."""

    def __init__(self, folder: Path, cpus: int = 8) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        control, first, second = free_ports(3)
        host = os.uname().nodename.split(".")[0]
        socket_path = folder / "munge" / "socket"
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
# short-lived credentials: a requeue waits until they are over
AuthInfo=socket={socket_path},cred_expire=8
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
# a job that was told to end saves first, on a machine that may be busy with other things
KillWait=60
MinJobAge=300
# no back-fill delays: jobs start when they can
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,default_queue_depth=200
SlurmdTimeout=20
MessageTimeout=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""
        )
        for name in ("state", "spool-n1", "spool-n2", "munge"):
            (folder / name).mkdir()
        self._start_munge(socket_path)
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 60, "idle nodes")

    def _start_munge(self, socket_path: Path) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        # --force: our folder may be below a world-writable /tmp, which munge warns about
        self._start(
            "munged",
            ["munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={key}", "--num-threads=4",
             f"--pid-file={self.folder}/munge/pid", f"--log-file={self.folder}/munge/log",
             f"--seed-file={self.folder}/munge/seed"],
        )  # fmt: skip
        self.wait(socket_path.exists, 20, "munge's socket")

    def _start(self, name: str, command: list[str]) -> None:
        program = find(command[0])
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                # the daemons end with this process, also when it is killed
                [sys.executable, "-S", "-c", _TIED, str(os.getpid()), program, *command[1:]],
                stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", ["slurmd", "-D", "-N", node])

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **self.environment}
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def wait(self, seen: Callable[[], object], limit_s: float, what: str) -> None:
        """limit_s: of a machine with nothing else to do; a busy one is given several times as long."""
        limit_s *= BUSY
        deadline = time.monotonic() + limit_s
        while True:
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended; see {self.folder / name}.out and .log"
            try:
                if seen():
                    return
            except (AssertionError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, f"no {what} in {limit_s} s"
            time.sleep(0.3)

    def jobs(self, name: str) -> list[tuple[str, str]]:
        """(number, state) of all jobs whose name ends so, also of those that ended a short while ago."""
        listed = self.ask("squeue", "-h", "-t", "all", "-r", "-o", "%i|%T|%j").splitlines()
        return [(n, state) for n, state, job in (line.split("|") for line in listed) if job.endswith(name)]

    def stop(self) -> None:
        """Cancel all jobs, stop the daemons that this object started."""
        with_env = {**os.environ, **self.environment}
        for command in (["scancel", "--user=root"], ["scontrol", "shutdown"]):
            subprocess.run(command, capture_output=True, timeout=60, check=False, env=with_env)
            time.sleep(2)
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def write_site(path: Path, repository: Path, python_bin: Path, **changes: str) -> Path:
    """A site file for the two virtual nodes: a copy of the example with some lines changed."""
    values = {
        "STEPKTO_HOME": str(repository), "GPU_PARTITION": "all", "CPU_PARTITION": "all", "GPUS_PER_NODE": "0",
        "CPUS_PER_NODE": "2", "CPU_TASK_CPUS": "2", "TRAIN_NODES": "2", "SAMPLE_ELEMENTS": "2", "STOP_LEAD": "30",
        "TIME_SAMPLE": "10", "TIME_JUDGE": "10", "TIME_TRAIN": "10", "TIME_EVALUATE": "10", "TIME_CPU": "10",
        "RENDEZVOUS": "127.0.0.1", **changes,
    }  # fmt: skip
    lines = []
    for line in (repository / "slurm" / "site.example.sh").read_text().splitlines():
        name = line.split("=")[0]
        lines.append(f"{name}={values.pop(name)}" if name in values else line)
    assert not values, f"not in the example: {values}"
    lines += [
        f"environment() {{ export PATH={python_bin}:$PATH PYTHONPATH={repository}; }}",
        "export GLOO_SOCKET_IFNAME=lo",  # the virtual nodes' names are nowhere known
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def stepkto(command: Sequence[str], python_bin: Path, cwd: Path, environment: dict[str, str]) -> str:
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [str(python_bin / "python"), "-m", "megatron_stepkto", *command], capture_output=True, text=True,
        timeout=300, check=False, cwd=cwd, env={**os.environ, **environment, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
