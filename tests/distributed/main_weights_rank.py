"""One rank of ``test_main_weights``: bf16 under the distributed optimizer, on real gloo ranks, as if FP8."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stepkto.base.processes import child_main
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.layers import RMSNorm
from megatron_stepkto.megatron.main_weights import load_main_weights, whole_main_weights
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.megatron.state import Checkpoints
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.rank import make_trainer


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    device = torch.device("cpu")
    join_ranks(job.settings.parallel, device, job.settings.timeout_s)
    trainer = make_trainer(job, device)
    trainer.train()
    engine = trainer.engine
    (policy,) = engine.policies
    weights = dict(policy.named_parameters())
    owned = [name for name, weight in weights.items() if getattr(weight, "main_param", None) is not None]
    assert 0 < len(owned) < len(weights), "each rank should hold main weights of some tensors, not of all"

    # After an update the model's bf16 weights are the main weights rounded: both must be the same, bit for bit.
    rounded = whole_main_weights(engine.optimizer, policy, torch.bfloat16)
    assert rounded.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(rounded[name], weight), name

    # They come from the main weights, not from the model's: what is loaded there comes back exactly, in fp32.
    generator = torch.Generator().manual_seed(5)
    fresh = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    load_main_weights(engine.optimizer, policy, fresh)
    exact = whole_main_weights(engine.optimizer, policy, torch.float32)
    for name, weight in weights.items():
        assert torch.equal(exact[name], fresh[name]), name
        assert torch.equal(weight, before[name]), name
    check_state(engine, job.directory / "state")
    (job.directory / f"rank{dist.get_rank()}.passed").write_text("")
    dist.barrier()
    dist.destroy_process_group()


def check_state(engine: Engine, directory: Path) -> None:
    """A state is saved from the main weights; loading it restores them in fp32, and the model's weights from them.

    Every norm plays one of Transformer Engine's: it has an extra state, which is in no checkpoint of a conversion.
    """
    seen: list[Any] = []
    RMSNorm.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)  # type: ignore[method-assign]
    RMSNorm.set_extra_state = lambda self, state: seen.append(state)  # type: ignore[method-assign]
    Checkpoints._fp8_weights = property(lambda self: True)  # type: ignore[assignment, method-assign]
    # without Transformer Engine no layer asks for such a state, so that its bytes are never read
    engine.checkpoints._acceleration = replace(engine.checkpoints._acceleration, transformer_engine=True)
    (policy,) = engine.policies
    weights = dict(policy.named_parameters())
    mains = {n: w.main_param for n, w in weights.items() if getattr(w, "main_param", None) is not None}
    truth = {name: main.clone() for name, main in mains.items()}
    engine.checkpoints.save_state(directory)
    for weight in [*mains.values(), *weights.values()]:
        weight.data.fill_(7.0)
    engine.checkpoints.load_state(directory)
    for name, main in mains.items():
        assert torch.equal(main, truth[name]), name
    whole = whole_main_weights(engine.optimizer, policy, torch.bfloat16)
    for name, weight in weights.items():
        assert torch.equal(weight, whole[name]), name
    assert seen
    assert not any(state is None for state in seen), "this checkpoint holds the norms' extra states"
    seen.clear()
    engine.checkpoints.load_weights(Path(sys.argv[1]).parent / "initial")
    assert seen
    assert all(state is None for state in seen), "a conversion holds none"


if __name__ == "__main__":
    child_main(main)
