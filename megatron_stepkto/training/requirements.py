"""Checks of what training needs: packages, devices and memory of the machine, and the length of examples.

They run in the process that starts the ranks, or long before it. The ranks repeat them for their own device and data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel

from megatron_stepkto.base.dtypes import gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.processes import Child, child_main, run_children
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.megatron import patches as cpu
from megatron_stepkto.megatron.acceleration import choose, choose_device, find_machine, find_packages
from megatron_stepkto.megatron.memory import check_norms
from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.planning.memory import check_state_fits, rank_capacity
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.tracking import check_trackers


class Ranks(BaseModel):
    """``ranks`` of a training on one machine. model: a Hugging Face folder; without a config.json its size is
    unknown, and the memory is not checked."""

    settings: recipe.Training
    model: Path
    ranks: int


def training_checks(wanted: Ranks, *, elsewhere: bool = False) -> list[Callable[[], object]]:
    """The checks; each raises UserError for one kind of requirement.

    Args:
        elsewhere: the ranks will run on other machines with the same packages: devices are not checked.
    """
    devices = partial(check_packages, wanted.settings) if elsewhere else partial(check_devices, wanted)
    return [cpu.check_megatron_version, partial(check_trackers, wanted.settings.log), devices]


def check_training(wanted: Ranks) -> None:
    """Run all checks on this machine; raises the first UserError."""
    for check in training_checks(wanted):
        check()


def check_packages(settings: recipe.Training) -> None:
    """Check that the packages that the recipe asks for are installed. The GPUs are another machine's."""
    choose(settings, find_machine(torch.device("cpu")) if settings.device == "cpu" else find_packages())


def check_devices(wanted: Ranks) -> None:
    """Check that this machine has the GPUs, the memory and the packages that its ranks need.

    Raises:
        UserError: names the key. StageFailed: a package crashed the process that loaded it.
    """
    if wanted.settings.device != "cuda" and choose_device(wanted.settings.device).type == "cpu":
        _check_this_process(wanted)
        return
    check_gpus(wanted.ranks)
    # in a process of its own: a context on a GPU would stay as long as this process, which outlives many workers
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        write_json(job, wanted.model_dump(mode="json"))
        command = [sys.executable, "-W", "ignore", "-m", "megatron_stepkto.training.requirements", str(job)]
        run_children([Child(command, Path(folder) / "requirements.log")], title="packages of training", unit="")


def check_gpus(wanted: int) -> None:
    """Raises UserError when torch sees fewer GPUs."""
    if (seen := gpu_count()) < wanted:
        raise UserError(
            f"torch sees {seen} GPUs, the layout needs {wanted} on this node; "
            "ask for them (GPUS_PER_NODE in the site file), or install torch's CUDA build and a driver that fits"
        )


def _check_this_process(wanted: Ranks) -> None:
    device = choose_device(wanted.settings.device)
    if (wanted.model / "config.json").is_file():
        config, entries = read_model_config(wanted.model)
        check_state_fits(config, entries, wanted.settings, *rank_capacity(device, wanted.ranks))
        check_norms(config, wanted.settings, choose(wanted.settings, find_machine(device)))
    else:
        choose(wanted.settings, find_machine(device))


# --- examples ------------------------------------------------------------------------------------------------


def padded_length(tokens: int, settings: recipe.Training) -> int:
    """Tokens that a document takes in a micro-batch."""
    step = settings.document_multiple
    return -(-tokens // step) * step


def room_for(settings: recipe.Training, *, paired: bool) -> int:
    """Tokens of the longest document. The two sides of a preference pair share a micro-batch."""
    return settings.micro_batch_tokens // (2 if paired else 1)


def check_longest(longest_prompt: int, response: int, limit: int | None, settings: recipe.Training, where: str) -> None:
    """Check that a micro-batch has room for the longest example that sampling may make.

    Args:
        longest_prompt, response: tokens. limit: ``dataset.max_tokens``, above which examples are dropped.
        where: the prompts, for the message.

    Raises:
        UserError: it has no room; names the keys and the numbers.
    """
    longest = longest_prompt + response  # also of a KL pair: a prompt with another problem's response
    room = room_for(settings, paired=method_of(settings.method).paired)
    padded = padded_length(longest if limit is None else min(longest, limit), settings)
    if padded > room:
        raise UserError(
            f"{where}: the longest prompt has {longest_prompt} tokens, a response up to {response} "
            f"(sample.max_tokens); with padding an example may have {padded}, a micro-batch has room for {room}; "
            "raise train.micro_batch_tokens, lower sample.max_tokens, or set dataset.max_tokens, above which examples "
            "are dropped"
        )


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    _check_this_process(Ranks.model_validate(read_json(parser.parse_args().job)))


if __name__ == "__main__":
    child_main(_main)
