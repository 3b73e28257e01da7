"""Run by torchrun: save models as Megatron-LM's trainer does, with each of Megatron-Core's ways to name weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_stepkto.base.processes import child_main, die_with_parent
from megatron_stepkto.checkpoints.convert import COMPANIONS, read_model_config
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.model import padded_vocab_size, transformer_config
from megatron_stepkto.megatron.ranks import join_ranks, lay_out
from megatron_stepkto.recipe import keys as recipe

METADATA: dict[str, dict[str, Any]] = {
    "stacked": {},
    "per layer": {"non_homogeneous_layers": True},
    "singleton": {"singleton_local_shards": True},
    "module prefix": {},
    "trainer": {},
}


def plain_model(engine: Engine) -> GPTModel:
    """GPTModel with Megatron-Core's own local layer spec and the engine's weights."""
    config = engine.config
    megatron = transformer_config(config, engine.settings.parallel, torch.float32, on_cpu=True)
    spec = get_gpt_layer_local_spec(
        num_experts=config.experts.number if config.experts else None,
        qk_layernorm=config.qk_norm,
        normalization="RMSNorm",
    )
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(config.vocab_size, megatron.tensor_model_parallel_size),
        max_sequence_length=config.max_positions,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.tied,
    )
    model.load_state_dict(engine.policies[0].state_dict())
    return model


def save(engine: Engine, how: str, folder: Path) -> None:
    model = plain_model(engine)
    state = {"model": model.sharded_state_dict(prefix="module." if "prefix" in how else "", metadata=METADATA[how])}
    if how == "trainer":
        engine.checkpoints._allocate_optimizer_state()
        state |= {
            "optimizer": engine.optimizer.sharded_state_dict({"model": engine.policies[0].sharded_state_dict()}),
            "args": argparse.Namespace(num_layers=4),
            "checkpoint_version": 3.0,
            "iteration": 10,
            "opt_param_scheduler": {"num_steps": 80},
            "rng_state": ShardedObject("rng_state", [1], (1,), (0,), replica_id=dist.get_rank()),
        }
        if dist.get_rank() == 0:
            (folder / "latest_checkpointed_iteration.txt").write_text("10")
        folder = folder / "iter_0000010"
    folder.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))
    dist.barrier()


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    parallel = recipe.Parallel.model_validate(job["layout"])
    join_ranks(parallel, torch.device("cpu"), timeout_s=300)
    lay_out(parallel, timeout_s=300)
    settings = recipe.Training.model_validate(
        {"optimizer": {"lr": 0.1}, "parallel": job["layout"], "global_batch_size": 1, "device": "cpu"}
    )
    for source, how, folder in job["cases"]:
        config, _ = read_model_config(Path(source) / COMPANIONS)
        engine = Engine(config, settings, torch.device("cpu"))
        engine.checkpoints.load_weights(Path(source))
        save(engine, how, Path(folder))
    dist.destroy_process_group()


if __name__ == "__mp_main__":
    die_with_parent()
if __name__ == "__main__":
    child_main(main)
