"""One rank of a training, from its job file to its final weights (entry.py starts it)."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_stepkto.architectures.adapters import adapted_linears
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import NONE, Examples
from megatron_stepkto.base.files import read_json
from megatron_stepkto.checkpoints.convert import COMPANIONS, read_model_config
from megatron_stepkto.megatron import onednn
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration, choose, choose_device, describe, find_machine
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.ranks import join_ranks, lay_out
from megatron_stepkto.planning.memory import check_state_fits, rank_capacity
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.loop import Trainer
from megatron_stepkto.training.requirements import padded_length, room_for


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    job = Job.model_validate(read_json(parser.parse_args().job))
    logging.getLogger("megatron").setLevel(logging.ERROR)
    device = choose_device(job.settings.device)
    join_ranks(job.settings.parallel, device, job.settings.timeout_s)
    machine = find_machine(device)
    acceleration = choose(job.settings, machine)
    trainer = make_trainer(job, device, acceleration)
    line = describe(acceleration, machine)
    if device.type == "cpu":
        line += f"; matrix products by {onednn.matrix_products()}"
    trainer.journal.notes["acceleration"] = same_everywhere(line)
    trainer.run()
    dist.barrier()
    dist.destroy_process_group()


def make_trainer(job: Job, device: torch.device, acceleration: Acceleration = PLAIN) -> Trainer:
    """Lay out the ranks, build this rank's part of the model and read the data.

    Every rank maps the examples for itself: none waits in a collective while another prepares.
    """
    lay_out(job.settings.parallel, job.settings.timeout_s)
    config, entries = read_model_config(job.initial / COMPANIONS)
    check_state_fits(config, entries, job.settings, *rank_capacity(device))
    examples = Examples.open(job.train_examples)
    held_out = Examples.open(job.held_out_examples) if job.held_out_examples else None
    for path, each in ((job.train_examples, examples), (job.held_out_examples, held_out)):
        if each and path:
            check_lengths(each, path, job, config.max_positions, config.vocab_size)
    lora = job.settings.lora
    adapted = adapted_linears(entries, lora.targets) if lora else None
    engine = Engine(config, job.settings, device, acceleration, adapted=adapted)
    return Trainer(engine, job, examples, held_out)


def same_everywhere(line: str) -> str:
    """Check that every rank computes with the same packages and kind of machine; returns ``line``, which names them.

    Raises:
        UserError: a rank has other packages, so its numbers would differ.
    """
    lines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    for rank, other in enumerate(lines):
        if other != lines[0]:
            raise UserError(f"ranks 0 and {rank} would compute differently; install the same packages on every node\n"
                            f"rank 0: {lines[0]}\nrank {rank}: {other}")  # fmt: skip
    if dist.get_rank() == 0:
        print(line, flush=True)  # into the log of this attempt
    return line


def check_lengths(examples: Examples, path: Path, job: Job, max_positions: int, vocab_size: int) -> None:
    """Raises UserError for an example that no micro-batch or the model cannot hold, or with an unknown token."""
    own = examples.sample
    other = np.where(examples.partner == NONE, own, examples.partner)
    response = np.maximum(examples.response_tokens[own], examples.response_tokens[other])
    lengths = examples.prompt_tokens[own] + response  # with its KL partner's response, where that is longer
    room = room_for(job.settings, paired=bool((examples.side != NONE).any()))
    step = job.settings.document_multiple
    if (bad := np.flatnonzero(lengths > room // step * step)).size:
        tokens = padded_length(int(lengths[bad[0]]), job.settings)
        raise UserError(
            f"{path}: {examples.example_id(bad[0])} has {tokens} tokens (with its KL partner"
            f"{' and padding' if step > 1 else ''}), "
            f"a micro-batch has room for {room}; raise micro_batch_tokens, or set dataset.max_tokens, which drops "
            "longer examples"
        )
    if (bad := np.flatnonzero(lengths > max_positions)).size:
        raise UserError(
            f"{path}: {examples.example_id(bad[0])} has {lengths[bad[0]]} tokens, the model's "
            f"max_position_embeddings is {max_positions}; set dataset.max_tokens, which drops longer examples"
        )
    if (bad := np.flatnonzero(examples.largest_token[own] >= vocab_size)).size:
        raise UserError(
            f"{path}: {examples.example_id(bad[0])} holds a token id past the model's vocabulary "
            f"({vocab_size}); the data were made with another tokenizer"
        )
