"""The methods by name, and the check that a recipe's method exists and suits its other keys.

A new method needs a file beside this one and a line in ``METHODS``: see docs/methods.md.
"""

from __future__ import annotations

import difflib
import os

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.methods.apo_zero import APOZero
from megatron_stepkto.methods.bco import BCO
from megatron_stepkto.methods.dpo import DPO
from megatron_stepkto.methods.irpo import IRPO
from megatron_stepkto.methods.kto import KTO
from megatron_stepkto.methods.method import Method
from megatron_stepkto.methods.rft import RFT
from megatron_stepkto.methods.step_kto import StepKTO
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.file import read_recipe

METHODS: dict[str, Method] = {
    method.name: method for method in (StepKTO(), KTO(), DPO(), IRPO(), RFT(), BCO(), APOZero())
}


def method_of(name: str, place: str = "train.method") -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; names the nearest, and ``place``, where the name was given.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
    raise UserError(f"{place}: unknown method {name!r}; {hint}")


def load_recipe(path: str | os.PathLike[str], overrides: list[str] | None = None) -> recipe.Recipe:
    """Read, override and check a recipe, its method included. Every command that runs a recipe reads it by this.

    Raises:
        UserError: one line per fault, each with file:line and what to do.
    """
    loaded = read_recipe(path, overrides)
    check_suits(loaded, loaded.train.method, f"{loaded.place('train.method')}: train.method")
    if loaded.warm_up:
        training, key = loaded.warm_up.training, "warm_up.training.method"
        place = f"{loaded.place(key)}: {key}"
        method = _check_settings(training, training.method, place)
        if method.paired or method.contrasts:
            raise UserError(
                f"{place}: {method.name} learns from right against wrong solutions, and a warm-up has right ones "
                "alone; set it to rft, or leave it out"
            )
    return loaded


def check_suits(loaded: recipe.Recipe, name: str, place: str) -> None:
    """Check that a recipe's keys suit a method, its own or one that it is compared with.

    Raises:
        UserError: names ``place``, where the method was given, or the key that does not suit it.
    """
    method = _check_settings(loaded.train, name, place)
    if method.estimator(loaded.train.loss) == "mismatched" and loaded.dataset.kl_pair_share == 0:
        raise UserError(
            f"{loaded.place('dataset.kl_pair_share')}: dataset.kl_pair_share is 0, but {name} with "
            "train.loss.reference_point: mismatched needs KL pairs; raise it"
        )
    if method.paired and loaded.sample is not None and loaded.sample.num_samples < 2:
        raise UserError(
            f"{loaded.place('sample.num_samples')}: sample.num_samples is {loaded.sample.num_samples}, but {name} "
            "compares two solutions of a problem; raise it"
        )
    judged = loaded.judge is None or loaded.judge.process.kind != "none"
    if method.reads_steps and not judged and loaded.train.loss.outcome_weight == 0:
        raise UserError(
            f"{loaded.place('judge.process')}: judge.process labels no step and train.loss.outcome_weight is 0: "
            "nothing would be learned; choose a judge, or raise outcome_weight"
        )


def _check_settings(training: recipe.Training, name: str, place: str) -> Method:
    method = method_of(name, place)
    try:
        method.check_settings(training.loss)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return method
