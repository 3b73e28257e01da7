"""What Slurm knows about a run's jobs. They are found by their comment, which names the run's folder and the stage."""

from __future__ import annotations

import os
import pwd
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import say

TIMEOUT_S = 60
ENDING_S = 120.0  # a job that was told to stop saves first


@dataclass(frozen=True)
class Queued:
    """A job, or an element of an array, that is in the queue. ``job``: the number that dependencies name."""

    job: int
    element: str
    state: str
    reason: str
    stage: str


def ask(command: Sequence[str]) -> str:
    """Run a Slurm command.

    Raises:
        UserError: Slurm is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; run this where Slurm's commands are (a login node)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: Slurm did not answer in {TIMEOUT_S} s; try again") from None
    if done.returncode:
        said = "; ".join(line.removeprefix(f"{command[0]}: ") for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"{command[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def comment(run: Path, stage: str) -> str:
    return f"stepkto {stage} {run}"


def settled_jobs(run: Path) -> list[Queued]:
    """``queued_jobs`` when none of them is just ending: it may be over, cancelled, or go back into the queue.

    Raises:
        UserError: Slurm does not come to an end with one.
    """
    deadline, told = time.monotonic() + ENDING_S, False
    while True:
        jobs = queued_jobs(run)
        ending = sorted({str(job.job) for job in jobs if job.state == "COMPLETING"})
        if not ending:
            return jobs
        if time.monotonic() > deadline:
            raise UserError(f"Slurm is still ending job {', '.join(ending)}; look at its node, then try again")
        if not told:
            say(f"waiting for the end of job {', '.join(ending)}")
            told = True
        time.sleep(1)


def queued_jobs(run: Path) -> list[Queued]:
    """This user's jobs of this run that are not over."""
    user = pwd.getpwuid(os.getuid()).pw_name
    listed = ask(["squeue", "--noheader", f"--user={user}", "--format=%F|%K|%T|%r|%k"])
    found = []
    for line in listed.splitlines():
        job, element, state, reason, note = line.split("|", 4)
        word, _, rest = note.strip().partition(" ")
        stage, _, folder = rest.partition(" ")
        if word == "stepkto" and folder == str(run):
            found.append(Queued(int(job), "" if element == "N/A" else element, state, reason, stage))
    return found
