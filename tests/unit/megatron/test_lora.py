"""Adapters on one rank: what they compute, what trains, and that the base beside them is the reference."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from megatron_stepkto.architectures.adapters import adapted_linears
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.checkpoints.adapter import export_adapter, read_adapter
from megatron_stepkto.checkpoints.convert import (
    COMPANIONS,
    LORA_SETTINGS,
    hf_to_megatron,
    megatron_to_hf,
    read_model_config,
)
from megatron_stepkto.checkpoints.huggingface import copy_companions
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.megatron.batch import MicroBatch, pack_units, solution_document
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.lora import _class_with, _WithAdapter, adapters_of, initial_factors
from megatron_stepkto.megatron.main_weights import optimizer_parts
from megatron_stepkto.megatron.ranks import one_rank
from megatron_stepkto.recipe import keys as recipe
from tests.builders import random_examples, write_adapter, write_examples, write_llama

CPU = torch.device("cpu")
RANK, ALPHA = 4, 8.0
LORA = {"rank": RANK, "alpha": ALPHA}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("lora") / "hf", num_hidden_layers=2)


@pytest.fixture
def ranks() -> Iterator[None]:
    with one_rank(CPU):
        yield


def make_engine(hf: Path, **changes: Any) -> Engine:
    """An engine with a Hugging Face folder's weights."""
    settings = recipe.Training.model_validate({
        "optimizer": {"lr": 0.02}, "global_batch_size": 8, "micro_batch_tokens": 300, "device": "cpu", **changes,
    })  # fmt: skip
    folder = hf.with_name(f"{hf.name} {settings.dtype}")
    if not folder.exists():
        hf_to_megatron(hf, folder, getattr(torch, settings.dtype))
    config, entries = read_model_config(folder / COMPANIONS)
    adapted = adapted_linears(entries, settings.lora.targets) if settings.lora else None
    engine = Engine(config, settings, CPU, adapted=adapted)
    engine.checkpoints.load_weights(folder)
    return engine


@functools.cache
def examples() -> Examples:
    with tempfile.TemporaryDirectory() as folder:  # what is open stays readable
        return Examples.open(write_examples(Path(folder) / "train", random_examples(8)))


def batches_of(engine: Engine) -> list[MicroBatch]:
    return pack_units([[solution_document(examples(), i)] for i in range(8)], engine.slot())


def scores(engine: Engine) -> Tensor:
    """Log-probs of all response tokens."""
    return torch.cat(engine.score(batches_of(engine), lambda _, log_probs: log_probs))


def update(engine: Engine, times: int = 3) -> None:
    for _ in range(times):
        engine.accumulate(batches_of(engine), lambda _, log_probs: (-log_probs.sum(), 1, {}))
        assert math.isfinite(engine.step(0.02))


def test_a_new_adapter_changes_no_bit(hf: Path, ranks: None) -> None:
    engine = make_engine(hf, lora=LORA)
    engine.set_adapters(initial_factors(3))
    with engine.without_adapters():
        reference = scores(engine)
    assert torch.equal(scores(engine), reference)
    assert torch.equal(reference, scores(make_engine(hf)))
    for adapter in adapters_of(engine.policies):
        for pair in adapter.children():
            bound = 1 / math.sqrt(pair.a.shape[1])  # PEFT: kaiming_uniform_ with a = sqrt(5)
            assert 0.8 * bound < pair.a.abs().max() <= bound
            assert pair.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert not pair.b.any()


def test_log_ratios_after_updates_are_those_of_two_models(hf: Path, ranks: None, tmp_path: Path) -> None:
    """The second model is made by hand: W + alpha / rank * B A in Hugging Face's names, from PEFT's folder."""
    engine = make_engine(hf, lora=LORA)
    engine.set_adapters(initial_factors(3))
    before = {name: weight.clone() for name, weight in engine.policies[0].named_parameters() if ".adapter." not in name}
    reference = scores(engine)
    update(engine)
    with engine.without_adapters():
        assert torch.equal(scores(engine), reference)
    for name, weight in engine.policies[0].named_parameters():
        assert ".adapter." in name or torch.equal(weight, before[name])

    saved = tmp_path / "saved"
    engine.checkpoints.save_weights(saved)
    assert all(".adapter." in key for key in CheckpointReader(saved).shapes())
    (saved / LORA_SETTINGS).write_text(json.dumps({"lora": LORA, "base": "x"}))
    copy_companions(hf, saved / COMPANIONS)
    with pytest.raises(UserError, match="holds adapters alone"):
        megatron_to_hf(saved, tmp_path / "model")
    export_adapter(saved, tmp_path / "adapter", hf)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = load_file(hf / "model.safetensors")
    for key, a in factors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            weights[name] += ALPHA / RANK * factors[key.replace("lora_A", "lora_B")] @ a
    assert len(factors) == 2 * 7 * 2
    merged = tmp_path / "merged"
    copy_companions(hf, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    log_ratios, expected = scores(engine) - reference, scores(make_engine(merged)) - scores(make_engine(hf))
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(log_ratios, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_have_gradients_and_optimizer_state(hf: Path, ranks: None, dtype: str) -> None:
    engine = make_engine(hf, lora=LORA, dtype=dtype)
    engine.set_adapters(initial_factors(3))
    update(engine, times=1)
    named: dict[str, Any] = dict(engine.policies[0].named_parameters())
    trained = {name: weight for name, weight in named.items() if ".adapter." in name}
    assert 0 < sum(w.numel() for w in trained.values()) < 0.2 * sum(w.numel() for w in named.values())
    for name, weight in named.items():
        assert weight.dtype == getattr(torch, dtype)
        assert weight.requires_grad == hasattr(weight, "main_grad") == (name in trained), name
        assert name in trained or weight.grad is None
    held = sum(w.numel() for part in optimizer_parts(engine.optimizer) for group in part.optimizer.param_groups
               for w in group["params"])  # fmt: skip
    assert held == sum(w.numel() for w in trained.values())
    assert sum(buffer.grad_data.numel() for buffer in engine.model[0].buffers) == held
    assert all(weight.any() for weight in trained.values())


@pytest.mark.parametrize("parallel", [{}, {"distributed_optimizer": True}], ids=["whole", "distributed optimizer"])
def test_a_resumed_training_ends_with_the_same_bits(hf: Path, ranks: None, tmp_path: Path, parallel: Any) -> None:
    """In bfloat16: main weights and moments are in the checkpoint too. tests/distributed/test_resume.py kills ranks."""
    engine = make_engine(hf, lora=LORA, dtype="bfloat16", parallel=parallel)
    engine.set_adapters(initial_factors(3))
    update(engine, times=2)
    engine.checkpoints.save_state(tmp_path / "state")
    keys = CheckpointReader(tmp_path / "state").shapes()
    assert all(".adapter." in key for key in keys)
    assert any(key.startswith("optimizer.") for key in keys)
    update(engine, times=2)
    resumed = make_engine(hf, lora=LORA, dtype="bfloat16", parallel=parallel)
    resumed.set_adapters(initial_factors(4))
    resumed.checkpoints.load_state(tmp_path / "state")
    update(resumed, times=2)
    for (name, got), expected in zip(
        resumed.policies[0].named_parameters(), engine.policies[0].parameters(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_a_layer_with_its_norm_inside_gives_the_adapter_what_the_product_sees(hf: Path, ranks: None) -> None:
    """As Transformer Engine's, which this machine need not have."""
    engine = make_engine(hf, lora=LORA)
    engine.set_adapters(read_adapter(write_adapter(hf.with_name("adapter"), hf, RANK, ALPHA)).factors)
    linear = engine.policies[0].decoder.layers[0].mlp.linear_fc1
    x, norm = torch.randn(5, 1, 64), torch.rand(64)
    expected, _ = linear(rms_norm(x, (64,), norm, 1e-5))
    plain: Any = type(linear).__mro__[2]

    class WithNorm(plain):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return super().forward(rms_norm(x, (64,), self.layer_norm_weight, self.eps))

    linear.__class__ = _class_with(_WithAdapter, WithNorm)
    linear.layer_norm_weight, linear.eps = nn.Parameter(norm), 1e-5
    torch.testing.assert_close(linear(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_unknown_targets_are_refused_by_name(hf: Path) -> None:
    _, entries = read_model_config(hf)
    with pytest.raises(UserError) as caught:
        adapted_linears(entries, ["q_proj", "query", "lm_head"], "recipe.yaml:7: train.lora.targets")
    assert str(caught.value) == (
        "recipe.yaml:7: train.lora.targets: the model has no linear layer lm_head, query that can have an adapter; "
        "expected all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )
