"""Options of sbatch that break a chain: those that it sets itself, and those that hide its jobs from it.

They come from the site file (SBATCH_EXTRA), which follows the chain's own flags on the command line, and from
variables of the shell that submits, which sbatch reads where no flag says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_stepkto.base.errors import UserError

# What an option does to the chain, and what decides it instead.
_REASONS = {
    "output error open-mode": "moves a job's log, which the jobs read; it is RUN/slurm/logs/STAGE.log",
    "dependency kill-on-invalid-dep": "orders the jobs: the chain sets their order",
    "job-name comment": "names a job: the chain finds its jobs by their names",
    "clusters": "sends jobs to another cluster than the one that status and cancel ask",
    "parsable wait test-only wrap help usage version": (
        "changes what sbatch does or prints: submit reads the job's number, and does not wait"
    ),
    "array": "makes arrays of jobs: set SAMPLE_ELEMENTS",
    "nodes": "asks for nodes: set TRAIN_NODES and SAMPLE_ELEMENTS",
    "partition": "chooses a partition: set GPU_PARTITION and CPU_PARTITION",
    "cpus-per-task": "asks for cores: set CPUS_PER_NODE and CPU_TASK_CPUS",
    "gpus gpus-per-node gpus-per-socket gpus-per-task": "asks for GPUs: set GPUS_PER_NODE",
    "ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket": (
        "starts tasks: a job has one on each of its nodes"
    ),
    "time time-min": "limits a job's time: set TIME_SAMPLE, TIME_JUDGE, TIME_TRAIN, TIME_EVALUATE and TIME_CPU",
    "signal": "decides when a job is told to stop: set STOP_LEAD",
    "requeue no-requeue": "decides what happens to a job that ends early: the chain requeues it",
    "chdir": "moves a job to another folder than the one that you submit from",
}
REFUSED = {name: reason for names, reason in _REASONS.items() for name in names.split()}
_SHORT = {
    "a": "array", "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "G": "gpus", "h": "help",
    "J": "job-name", "M": "clusters", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "t": "time",
    "V": "version", "W": "wait",
}  # fmt: skip
_SHORT_ALONE = "HhkOQsvVW"  # without a value: another one may follow in the same word
# Variables that sbatch reads and that no flag of ours overrules on every job.
VARIABLES = {
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_ERROR": "error",
    "SBATCH_GPUS": "gpus",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_SOCKET": "gpus-per-socket",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_WAIT": "wait",
}


def check_options(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises UserError for the first word of SBATCH_EXTRA, or variable of the shell, that would break a chain."""
    takes_value = False  # whether the word before may have this one as its value
    for word in words:
        if word in (":", "--"):
            raise UserError(f"SBATCH_EXTRA: {word}: expected flags of one job; remove it from the site file")
        if not word.startswith("-") and not takes_value:
            raise UserError(
                f"SBATCH_EXTRA: {word}: expected flags, such as (--qos=long --mem=0); sbatch would take this word for "
                "the job's script"
            )
        if word.startswith("-") and " -" in word:
            raise UserError(
                f"SBATCH_EXTRA: {word}: expected one flag a word; write an array: ({' '.join(word.split())})"
            )
        takes_value = word.startswith("-") and "=" not in word
        for name in _options_in(word):
            if name in REFUSED:
                raise UserError(
                    f"SBATCH_EXTRA: {word}: expected no flag that {REFUSED[name]}; remove it from the site file"
                )
    for variable, name in VARIABLES.items():
        if variable in environment:
            raise UserError(
                f"{variable}={environment[variable]}: expected no variable in this shell that {REFUSED[name]}; "
                f"unset {variable}, which sbatch reads"
            )


def _options_in(word: str) -> Iterator[str]:
    """Long names of the options in a word, as sbatch reads it; nothing where it is the value of the one before."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0]
        # sbatch takes long names cut short
        yield name if name in REFUSED else next((full for full in REFUSED if name and full.startswith(name)), name)
        return
    for letter in word[1:] if word.startswith("-") else "":
        yield _SHORT.get(letter, letter)
        if letter not in _SHORT_ALONE:  # the rest of the word is its value
            return
