"""How even a router's choice is, by hand; over ranks, micro-batches and recompute: ``tests/distributed``."""

from __future__ import annotations

import torch

from megatron_stepkto.megatron.expert_load import load_metrics


def test_load_by_hand() -> None:
    """Two layers of four experts: 4 over a mean of 2, and even; one expert of eight got nothing."""
    counts = torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2]])
    assert load_metrics(counts) == {"expert_load": 1.5, "expert_load_worst": 2.0, "experts_unused": 1 / 8}


def test_no_token_at_all() -> None:
    assert load_metrics(torch.zeros(1, 4, dtype=torch.int64)) == {
        "expert_load": 0.0, "expert_load_worst": 0.0, "experts_unused": 1.0,
    }  # fmt: skip
