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
# The keys that choose the folders Run.base_model and Run.tokenizer_folder, and Run.model.
_BASE = ("initial_model", "warm_up.solutions")
_MODEL = (*_BASE, "train.lora.start")

# Command -> keys, each with all below it. A command that is not listed reads the whole recipe. With --method,
# train.method tells the folder of a compared method.
READS: dict[str, tuple[str, ...]] = {
    "problems": (*_RUN, *_TRAIN_PROBLEMS, *_BASE, "problems.train", "problems.per_iteration", "seed", "prompt"),
    "sample": (*_RUN, *_MODEL, "sample", "prompt", "seed", "train.method"),
    "judge": (*_RUN, *_TRAIN_PROBLEMS, *_MODEL, "problems.imports", "judge", "prompt", "seed", "train.method"),
    "dataset": (*_RUN, "dataset", "problems.held_out_share", "seed", "train.method"),
    "train": (*_RUN, *_MODEL, "train", "seed"),
    "export": (*_RUN, *_BASE, "train.lora", "train.dtype", "train.method"),
    "evaluate": (*_RUN, *_HELD_OUT, *_DRAWING, *_MODEL, "evaluate", "judge", "prompt", "train.method"),
    "measure": (
        "name", *_DRAWING, "prompt", "judge", "evaluate.num_problems", "evaluate.k", "evaluate.temperature",
        "evaluate.top_p",
    ),
    "warm-up": (
        *_RUN, *_TRAIN_PROBLEMS, *_BASE, "problems.train", "problems.imports", "seed", "prompt", "warm_up",
        "dataset", "problems.held_out_share",  # a warm-up on imports trains on their examples
        "train.lora", "train.dtype", "train.parallel", "train.recompute", "train.offload_layers",  # a merge into M0
        "evaluate.split", "evaluate.num_problems",
    ),
    "judge-eval": ("judge",),
    "export-samples": (*_RUN, *_BASE, "prompt", "problems.source", "train.method"),
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
