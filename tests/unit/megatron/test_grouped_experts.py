"""Grouped experts are the sequential ones: same log-probs, gradients, and tensors in a checkpoint, with adapters too.

The class is Megatron-Core's TEGroupedMLP around a stand-in for Transformer Engine's layer (``grouped_worker``). Layouts
of several ranks: ``tests/distributed/test_layouts.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core.utils
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_stepkto.architectures.adapters import adapted_linears
from megatron_stepkto.checkpoints.convert import hf_to_megatron, read_model_config
from megatron_stepkto.megatron import model as models
from megatron_stepkto.megatron.acceleration import PLAIN
from megatron_stepkto.megatron.batch import Document, make_micro_batch
from megatron_stepkto.megatron.lora import adapters_of
from megatron_stepkto.megatron.ranks import one_rank
from megatron_stepkto.megatron.state import Checkpoints
from megatron_stepkto.megatron.version import needs_common_pt
from megatron_stepkto.recipe.keys import LoRA, Parallel
from tests.distributed.grouped_worker import group_experts
from tests.model_folders import write_model

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's patches last as long as the process"),
    pytest.mark.skipif(not needs_common_pt(), reason="the stand-in is made for megatron-core 0.16's module"),
]


def factors(name: str, shape: tuple[int, int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator) / 10


def trained(folder: Path, lora: LoRA | None, kind: type) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
    """Log-probs, and the gradient of every tensor of a checkpoint by its key, whole shape and offset in that."""
    config, entries = read_model_config(folder / "hf")
    megatron = models.transformer_config(config, Parallel(), torch.float32, on_cpu=True)
    [policy] = models.build_model_chunks(
        config, megatron, lora=lora, adapted=adapted_linears(entries, "all") if lora else None
    )
    assert all(type(layer.mlp.experts) is kind for layer in policy.decoder.layers)
    assert all(not weight.allreduce for layer in policy.decoder.layers for weight in layer.mlp.experts.parameters())
    Checkpoints([policy], [policy], None, torch.float32, PLAIN).load_weights(folder / "megatron")
    for adapter in adapters_of([policy]):
        adapter.fill(factors)
    documents = [Document(str(i), [1, 2, 3], [4 + i] * (20 + i), [20 + i], [1], 1) for i in range(3)]
    batch = make_micro_batch(documents, 1, torch.device("cpu"))
    hidden = policy(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
    log_probs, _ = policy.log_probs(hidden, batch.rows, batch.targets)
    log_probs.sum().backward()  # type: ignore[no-untyped-call]
    state = policy.sharded_state_dict()
    for name, weight in policy.named_parameters():
        state[name].data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    apply_factories(state)
    shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return log_probs.detach(), {(s.key, s.global_shape, s.global_offset): s.data for s in shards}


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["all weights", "LoRA"])
def test_grouped_experts_are_the_sequential_ones(
    lora: LoRA | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_to_megatron(write_model(tmp_path / "hf", "qwen3_moe"), tmp_path / "megatron", torch.float32)
    with one_rank(torch.device("cpu")):
        expected, gradients = trained(tmp_path, lora, SequentialMLP)
        monkeypatch.setattr(megatron.core.utils, "_te_version", None)
        monkeypatch.setattr(models, "_block_spec", models._block_spec)  # put back afterwards
        group_experts()
        got, ours = trained(tmp_path, lora, TEGroupedMLP)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert ours.keys() == gradients.keys()
    assert sum("experts" in key for key, *_ in ours) > 50
    for key, truth in gradients.items():
        torch.testing.assert_close(ours[key], truth, rtol=1e-5, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1
