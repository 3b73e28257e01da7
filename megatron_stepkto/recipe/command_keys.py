"""Which recipe keys and options each command reads. Any other would have no effect, and is refused.

A recipe may hold every key, as it describes the whole run; an explicit ``--set`` is meant for this command.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import Recipe, Sampling
from megatron_stepkto.recipe.section import training_only
from megatron_stepkto.recipe.yaml_text import read_yaml

_RUN = ("name", "output")
_HELD_OUT = ("problems.source", "problems.dev", "problems.test")
_TRAIN_PROBLEMS = (*_HELD_OUT, "problems.apart_from", "problems.overlap")
_DRAWING = tuple(f"sample.{key}" for key in Sampling.model_fields if key not in training_only(Sampling))
_PREPARE = (
    *_RUN, *_TRAIN_PROBLEMS, "problems.train", "problems.imports", "seed", "initial_model", "prompt", "warm_up",
    "dataset", "problems.held_out_share",  # a warm-up on imports trains on their examples
    "train.parallel", "evaluate.split", "evaluate.num_problems",
)  # fmt: skip

# Command -> keys, each with all below it. A command that is not listed reads the whole recipe. With --method,
# train.method tells the folder of a compared method.
READS: dict[str, tuple[str, ...]] = {
    "problems": (
        *_RUN, *_TRAIN_PROBLEMS, "problems.train", "problems.per_iteration", "seed", "initial_model", "prompt",
    ),
    "sample": (*_RUN, "sample", "prompt", "seed", "initial_model", "train.method"),
    "judge": (
        *_RUN, *_TRAIN_PROBLEMS, "problems.imports", "judge", "prompt", "seed", "initial_model", "train.method",
    ),
    "dataset": (*_RUN, "dataset", "problems.held_out_share", "seed", "train.method"),
    "train": (*_RUN, "train", "seed", "initial_model"),
    "export": (*_RUN, "train.method"),
    "evaluate": (*_RUN, *_HELD_OUT, *_DRAWING, "evaluate", "judge", "prompt", "initial_model", "train.method"),
    "measure": (
        "name", *_DRAWING, "prompt", "judge", "evaluate.num_problems", "evaluate.k", "evaluate.temperature",
        "evaluate.top_p",
    ),
    "prepare": (*_PREPARE, "problems.per_iteration", "iterations"),
    "warm-up": _PREPARE,
    "judge-eval": ("judge",),
    "export-samples": (*_RUN, "prompt", "problems.source", "initial_model", "train.method"),
}  # fmt: skip

# Option -> the commands on which it has an effect.
TAKES: dict[str, tuple[str, ...]] = {
    "--from-scratch": ("run", "prepare", "problems", "sample", "judge", "train", "evaluate"),
    "--quarantine": ("run", "prepare", "warm-up", "problems", "judge", "dataset", "evaluate"),
    "--allow-overlap": ("run", "prepare", "warm-up", "problems", "judge"),
}


def is_read(command: str, key: str) -> bool:
    """Does the command read the dotted key, one below it or a section around it?"""
    return command not in READS or any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in READS[command])


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Refuse ``--set`` of a key that the command does not read.

    ``--set section=null`` goes with every command: without an optional section another recipe is valid.

    Raises:
        UserError: names the commands that read the key.
    """
    for assignment in overrides:
        key, _, value = assignment.partition("=")
        if is_read(command, key) or (key in Recipe.model_fields and read_yaml(value)[0] is None):
            continue
        readers = [name for name in READS if is_read(name, key)]
        raise UserError(
            f"--set {assignment:.200}: `stepkto {command}` does not read {key}; leave it out, or give it to "
            f"{', '.join(f'`stepkto {name}`' for name in (*readers, 'run'))}"
        )
