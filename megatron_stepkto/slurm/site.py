"""The site file: bash that jobs source, of which ``submit`` reads the few variables that become flags of sbatch."""

from __future__ import annotations

import difflib
import os
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_stepkto.base.errors import UserError


@dataclass(frozen=True)
class Site:
    """Names and values as in slurm/site.example.sh, in lower case."""

    stepkto_home: Path
    account: str
    gpu_partition: str
    cpu_partition: str
    gpus_per_node: int
    cpus_per_node: int
    train_nodes: int | None
    sample_elements: int
    cpu_task_cpus: int
    time_sample: str
    time_judge: str
    time_train: str
    time_evaluate: str
    time_cpu: str
    stop_lead: int
    container: str
    image_train: str
    image_sample: str
    mounts: str
    judge_server: list[str]
    judge_url: str
    rendezvous: str
    extra: list[str]

    @property
    def scripts(self) -> Path:
        return self.stepkto_home / "slurm"


_NAMES = {"extra": "SBATCH_EXTRA"}
# What sbatch takes; GPUS_PER_NODE may be 0.
_LEAST = {"CPUS_PER_NODE": 1, "TRAIN_NODES": 1, "SAMPLE_ELEMENTS": 1, "CPU_TASK_CPUS": 1}
_MOST = {"STOP_LEAD": 65535}
# first the names of all variables in one word, and what kind of thing `environment` is; then, for each name that is
# asked for, it prints NAME, NUL, number of words, NUL, words, each with a NUL; an unset variable prints -1
# No -u, as in *.sbatch: modules use unset variables, and an empty array counts as unset.
_PRINT = """
source "$1" >&2 || { echo "its last command ended with exit code $?" >&2; exit 1; }  # a module may greet
shift
set +u
printf '%s\\0%s\\0' "$(compgen -v | tr '\\n' ' ')" "$(type -t environment)"
for name in "$@"; do
    if ! declare -p "$name" >/dev/null 2>&1; then printf '%s\\0-1\\0' "$name"; continue; fi
    declare -n words=$name
    printf '%s\\0%s\\0' "$name" "${#words[@]}"
    ((${#words[@]})) && printf '%s\\0' "${words[@]}"
    unset -n words
done
exit 0
"""


def read_site(path: Path) -> Site:
    """Source the file in a separate bash and take what ``submit`` needs.

    Raises:
        UserError: no such file, an error in it, a variable missing or of the wrong kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected your cluster's settings, found none; copy slurm/site.example.sh there")
    names = {field.name: _NAMES.get(field.name, field.name.upper()) for field in fields(Site)}
    done = subprocess.run(
        ["bash", "-ec", _PRINT, "bash", str(path.resolve()), *names.values()],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip() or f"it ended bash with exit code {done.returncode}"
        raise UserError(f"{path}: bash cannot read it: {said}; correct the site file")
    if not done.stdout:
        raise UserError(f"{path}: it ended bash before its end (exit 0); remove the exit")
    variables, environment, *words = done.stdout.split("\0")
    found: dict[str, list[str]] = {}
    while len(words) > 1:
        name, count = words[0], int(words[1])
        if count < 0:
            others = set(variables.split()) - set(names.values()) - set(os.environ)
            close = difflib.get_close_matches(name, others, 1, 0.8)
            raise UserError(
                f"{path}: variable {name} is missing"
                + (f" ({close[0]} is set: a typo?)" if close else "")
                + "; see slurm/site.example.sh"
            )
        found[name], words = words[2 : 2 + count], words[2 + count :]
    if environment != "function":
        raise UserError(f"{path}: function environment is missing; see slurm/site.example.sh")
    values: dict[str, object] = {}
    for field in fields(Site):
        given = found[names[field.name]]
        is_list = field.type == "list[str]"
        values[field.name] = given if is_list else _value(path, names[field.name], str(field.type), given)
    site = Site(**values)  # type: ignore[arg-type]
    if site.container not in ("none", "apptainer", "enroot"):
        raise UserError(f"{path}: CONTAINER={site.container}: expected none, apptainer or enroot")
    for image in ("image_train", "image_sample"):
        if site.container != "none" and not getattr(site, image):
            raise UserError(f"{path}: CONTAINER={site.container} needs {image.upper()}")
    if not (site.scripts / "train.sbatch").is_file():
        raise UserError(f"{path}: STEPKTO_HOME={site.stepkto_home}: expected this project's checkout with slurm/ in it")
    return site


def _value(path: Path, name: str, kind: str, given: list[str]) -> object:
    text = given[0] if given else ""
    if kind == "Path":
        return Path(text)
    if kind == "str":
        return text
    if kind == "int | None" and not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{path}: {name}={text}: expected a whole number")
    least, most = _LEAST.get(name, 0), _MOST.get(name)
    if int(text) < least or (most is not None and int(text) > most):
        bound = f"of at least {least}" if int(text) < least else f"of at most {most}"
        raise UserError(f"{path}: {name}={text}: expected a whole number {bound}")
    return int(text)
