"""The train stage: converts the weights to Megatron's format, then starts and watches the ranks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from megatron_stepkto.base.files import read_json, stable_hash, write_json
from megatron_stepkto.base.nodes import Nodes, tell_others, this_node, wait_for_word
from megatron_stepkto.base.processes import Child, run_children, usable_cores
from megatron_stepkto.base.progress import say, warn
from megatron_stepkto.base.stage import Result, Stage
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.methods.metrics import balance_text
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Advice, Job, Notes, finished_checkpoints


def train(
    stage: Stage, settings: recipe.Training, seed: int, nodes: Nodes | None = None, advice: Advice | None = None
) -> Result:
    """Train the input ``model`` on the input ``train``; leaves ``final/`` (torch_dist) and ``metrics.jsonl``.

    An attempt that was cut short resumes from its newest checkpoint. Ctrl-C, SIGTERM and SIGUSR1 save one first, at the
    next update boundary. With several ``nodes`` this is the first of them, and ``help_train`` runs on the others.

    Raises:
        UserError: bad input, found here or by a rank. StageFailed: a rank died; its log is named.
    """
    directory = stage.directory
    initial = directory / "initial"
    reference = directory / "reference" if "reference" in stage.inputs else None
    contents = sorted((name, entry["sha256"]) for name, entry in stage.key()["inputs"].items())
    of_base = [settings.reference] if settings.lora else []  # of one model, with the adapter or without
    fingerprint = f"{stable_hash(contents, settings.dtype, *of_base):016x}"
    job = Job(
        settings=settings,
        seed=seed,
        initial=initial,
        reference=reference,
        adapter=stage.inputs.get("adapter"),
        base=dict(contents)["model"],
        train_examples=stage.inputs["train"],
        held_out_examples=stage.inputs.get("held_out"),
        directory=directory,
        fingerprint=fingerprint,
        identity=f"{stable_hash(stage.key(), str(directory.resolve())):016x}",
        advice=advice or Advice(),
    )
    if not job.final.is_dir():  # it appears whole, by rename, when the training is done
        prepare_weights(stage, settings)
        write_json(directory / "job.json", job.model_dump(mode="json"))
        job.progress.unlink(missing_ok=True)
        if saved := finished_checkpoints(job.checkpoints):
            say(f"{stage.title}: resuming after update {saved[-1][0]}, from {saved[-1][1]}")
        nodes = nodes or this_node()
        children = _ranks(directory, settings, nodes)
        tell_others(directory, nodes, start=True)
        run_children(children, title=stage.title, unit="updates", progress=[job.progress], saves=True)

    notes = read_json(job.notes, Notes)
    for warning in notes.get("warnings", []):
        warn(warning)
    if balance := notes.get("balance"):
        say(f"{stage.title}: {balance_text(balance)}")
    if gap := notes.get("gap"):
        say(
            f"{stage.title}: sampler and trainer differ by {gap['mean']:.1e} nats on average, "
            f"{gap['max']:.1e} at most, over {gap['tokens']} tokens"
        )
    for leftover in (initial, reference, job.checkpoints):
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)
    log_ratios = [job.log_ratios] if job.log_ratios.is_file() else []  # methods without a reference leave none
    return Result([job.final, job.metrics, *log_ratios], notes)


def _convert_once(source: Path, target: Path, dtype: torch.dtype) -> None:
    """An earlier attempt's conversion is kept: it is whole (made by rename) and of the same input (the stage's key)."""
    if not target.is_dir():
        hf_to_megatron(source, target, dtype)


def prepare_weights(stage: Stage, settings: recipe.Training) -> None:
    """Convert the inputs to Megatron's format, ``initial/`` and ``reference/``: the part that needs no GPU."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    _convert_once(stage.inputs["model"], stage.directory / "initial", dtype)
    if "reference" in stage.inputs:
        _convert_once(stage.inputs["reference"], stage.directory / "reference", dtype)


def help_train(directory: Path, settings: recipe.Training, nodes: Nodes, title: str) -> None:
    """Run this node's ranks of the training that the first node leads."""
    if wait_for_word(directory, nodes):
        run_children(_ranks(directory, settings, nodes), title=title, unit="updates", saves=True)


def _ranks(directory: Path, settings: recipe.Training, nodes: Nodes) -> list[Child]:
    """This node's ranks, each with its own log."""
    ranks = settings.parallel.ranks
    here = nodes.ranks_here(ranks)
    threads = max(1, usable_cores() // here)
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    if settings.parallel.tensor * settings.parallel.context > 1:
        # One queue to the GPU: a message that was issued before a product begins before it, and hides behind it
        # (Megatron-LM insists on it for these layouts).
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if nodes.count == 1:
        # gloo looks up the host's name to choose an interface, which fails on machines without DNS: name it.
        env["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    command = [
        sys.executable, "-W", "ignore", "-m", "megatron_stepkto.training.entry", str(directory / "job.json"),
    ]  # fmt: skip
    first = nodes.number * here
    return [
        Child(command, directory / "logs" / f"rank-{first + local}.log", {**env, **nodes.environment(ranks, local)})
        for local in range(here)
    ]
