"""The activation formula against the tensors that autograd really keeps, on real layers of this package.

Storages are counted once, by ``saved_tensors_hooks``, weights and the micro-batch itself aside. Ranks are fake (one
process acts as each), so that tensor and sequence parallel shapes are the real ones; values do not matter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_stepkto.architectures.adapters import adapted_linears, low_rank_width
from megatron_stepkto.architectures.decoder import decoder_entries
from megatron_stepkto.architectures.llama import read_config
from megatron_stepkto.architectures.model_config import Experts, ModelConfig
from megatron_stepkto.megatron import patches
from megatron_stepkto.megatron.batch import Document, MicroBatch, make_micro_batch
from megatron_stepkto.megatron.dry_run import fake_rank
from megatron_stepkto.planning.activations import CPU, Layout, head_saved_bytes, layers_in_flight, saved_per_layer
from megatron_stepkto.recipe.keys import LoRA, Parallel, Recompute

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's kernels")

BAND = 0.05


def llama(**changes: int) -> ModelConfig:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    }
    return read_config({**sizes, **changes})


def documents(lengths: list[int], parallel: Parallel) -> MicroBatch:
    made = []
    for number, length in enumerate(lengths):
        response = length - length // 4
        made.append(Document(str(number), [1] * (length // 4), [2] * response, [response], [1], 1))
    return make_micro_batch(made, parallel.tensor if parallel.sequence else 1, torch.device("cpu"))


def kept_bytes(
    config: ModelConfig,
    parallel: Parallel,
    batch: MicroBatch,
    dtype: torch.dtype,
    recompute: bool | Recompute,
    lora: LoRA | None = None,
) -> int:
    """Bytes of all storages that autograd keeps from a forward pass and the head, each counted once."""
    from megatron.core import tensor_parallel

    from megatron_stepkto.megatron.model import build_model_chunks, transformer_config

    patches.install()
    kept: dict[int, torch.UntypedStorage] = {}
    with fake_rank(parallel, 0):
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        megatron = transformer_config(config, parallel, dtype, on_cpu=True, recompute=recompute)
        adapted = adapted_linears(decoder_entries(config), lora.targets) if lora else None
        [model] = build_model_chunks(config, megatron, lora=lora, adapted=adapted)
        given = [*model.parameters(), batch.tokens, batch.position_ids, batch.rows, batch.targets]
        others = {tensor.untyped_storage()._cdata for tensor in given}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in others:
                kept[storage._cdata] = storage  # held: a freed storage's address may come again
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
            model.log_probs(hidden, batch.rows, batch.targets)
    # now: outputs that are computed again were saved, and emptied afterwards
    return sum(storage.nbytes() for storage in kept.values())


def mixture(**changes: int) -> ModelConfig:
    return dataclasses.replace(llama(**changes), experts=Experts(4, 2, 352, True))


MIXTURE = {"one process": {}, "TP 2, sequence parallel": {"ranks": 2, "tensor": 2, "sequence": True}}


@pytest.mark.parametrize("name", MIXTURE)
def test_mixture_of_experts(name: str) -> None:
    config, parallel = mixture(), Parallel(**MIXTURE[name])  # type: ignore[arg-type]
    batch = documents([300, 200], parallel)
    kept = kept_bytes(config, parallel, batch, torch.float32, False)
    how = Layout(parallel.tensor, parallel.sequence, 4, False, CPU)
    per_token, per_row = head_saved_bytes(config, how)
    tokens, rows = batch.tokens.numel(), batch.rows.numel()
    planned = tokens * (config.num_layers * saved_per_layer(config, how) + per_token) + rows * per_row
    assert planned == pytest.approx(kept, rel=BAND)


CASES = {
    "plain": ({}, {}, [300, 200], torch.float32, False),
    "one document": ({}, {}, [384], torch.float32, False),
    "bf16": ({}, {}, [300, 200], torch.bfloat16, False),
    "wide MLP, many heads": (
        {"intermediate_size": 2816, "num_attention_heads": 16},
        {},
        [256] * 2,
        torch.float32,
        False,
    ),
    "large vocabulary": ({"vocab_size": 9999}, {}, [300, 200], torch.float32, False),
    "TP 2": ({}, {"ranks": 2, "tensor": 2}, [300, 200], torch.float32, False),
    "TP 2, sequence parallel": ({}, {"ranks": 2, "tensor": 2, "sequence": True}, [300, 200], torch.float32, False),
    "TP 4, sequence parallel, bf16": (
        {},
        {"ranks": 4, "tensor": 4, "sequence": True},
        [300, 201],
        torch.bfloat16,
        False,
    ),
    "recompute": ({"num_hidden_layers": 8}, {}, [300, 200], torch.float32, True),
    "recompute, TP 2, sequence parallel": (
        {"num_hidden_layers": 8},
        {"ranks": 2, "tensor": 2, "sequence": True},
        [300, 200],
        torch.float32,
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formula_is_what_autograd_keeps(name: str) -> None:
    sizes, layout, lengths, dtype, recompute = CASES[name]
    config, parallel = llama(**sizes), Parallel(**layout)  # type: ignore[arg-type]
    batch = documents(lengths, parallel)
    kept = kept_bytes(config, parallel, batch, dtype, recompute)
    how = Layout(parallel.tensor, parallel.sequence, dtype.itemsize, recompute, CPU)
    per_token, per_row = head_saved_bytes(config, how)
    tokens, rows = batch.tokens.numel(), batch.rows.numel()
    planned = tokens * (config.num_layers * saved_per_layer(config, how) + per_token) + rows * per_row
    assert planned == pytest.approx(kept, rel=BAND)


RECOMPUTED = {
    "core_attn": ({"modules": ["core_attn"]}, {}),
    "layernorm": ({"modules": ["layernorm"]}, {}),
    "mlp": ({"modules": ["mlp"]}, {}),
    "mlp, TP 2, sequence parallel": ({"modules": ["mlp"]}, {"ranks": 2, "tensor": 2, "sequence": True}),
    "core_attn and mlp": ({"modules": ["core_attn", "mlp"]}, {}),
    "5 of 8 layers": ({"layers": 5}, {}),
    "every 4 layers": ({"every": 4}, {}),
    "moe": ({"modules": ["moe"]}, {}),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_partial_recompute_keeps(name: str) -> None:
    chosen, layout = RECOMPUTED[name]
    recompute, parallel = Recompute.model_validate(chosen), Parallel.model_validate(layout)
    config = mixture(num_hidden_layers=8) if name == "moe" else llama(num_hidden_layers=8)
    batch = documents([300, 200], parallel)
    kept = kept_bytes(config, parallel, batch, torch.float32, recompute)
    how = Layout(parallel.tensor, parallel.sequence, 4, recompute, CPU, chunk_layers=8)
    per_token, per_row = head_saved_bytes(config, how)
    tokens, rows = batch.tokens.numel(), batch.rows.numel()
    planned = tokens * (config.num_layers * saved_per_layer(config, how) + per_token) + rows * per_row
    assert planned == pytest.approx(kept, rel=BAND)


@pytest.mark.parametrize("layout", [{}, {"ranks": 2, "tensor": 2, "sequence": True}], ids=["plain", "TP 2 SP"])
def test_adapters_keep_what_full_training_keeps_and_their_low_rank_products(layout: dict[str, Any]) -> None:
    config, parallel, lora = llama(), Parallel(**layout), LoRA(rank=32)
    batch = documents([300, 200], parallel)
    width = low_rank_width(config, decoder_entries(config), lora, parallel)
    assert width == 32 * (3 + 2 + 2 / (parallel.tensor if parallel.sequence else 1))
    how = Layout(parallel.tensor, parallel.sequence, 4, False, CPU, width)
    per_token, per_row = head_saved_bytes(config, how)
    tokens, rows = batch.tokens.numel(), batch.rows.numel()
    planned = tokens * (config.num_layers * saved_per_layer(config, how) + per_token) + rows * per_row
    kept = kept_bytes(config, parallel, batch, torch.float32, False, lora)
    # beside tokens: the stacked A of query, key and value, and of gate and up
    stacked = 4 * config.num_layers * 5 * 32 * config.hidden_size
    assert planned == pytest.approx(kept - stacked, rel=BAND)


def test_more_layers_cost_what_the_formula_says() -> None:
    """The slope over layers: nothing that is counted once hides a wrong cost per layer."""
    few, many = llama(), llama(num_hidden_layers=6)
    batch = documents([300, 200], Parallel())
    how = Layout(1, False, 4, False, CPU)
    grown = kept_bytes(many, Parallel(), batch, torch.float32, False) - kept_bytes(
        few, Parallel(), batch, torch.float32, False
    )
    assert 4 * batch.tokens.numel() * saved_per_layer(few, how) == pytest.approx(grown, rel=BAND)


@pytest.mark.parametrize(
    ("layout", "micro_batches", "expected"),
    [
        # 1F1B over 4 stages of 4 layers: stage p holds 4 - p micro-batches
        ({"ranks": 4, "pipeline": 4}, 16, [16, 12, 8, 4]),
        ({"ranks": 4, "pipeline": 4}, 2, [8, 8, 8, 4]),
        # interleaved, 2 chunks of 2 layers: 2 (3 - p) + 4 + 1 chunks
        ({"ranks": 4, "pipeline": 4, "virtual_pipeline": 2}, 16, [22, 18, 14, 10]),
        ({"ranks": 1}, 16, [16]),
    ],
)
def test_in_flight(layout: dict[str, int], micro_batches: int, expected: list[int]) -> None:
    config, parallel = llama(num_hidden_layers=16), Parallel(**layout)
    stages = range(parallel.pipeline)
    assert [layers_in_flight(config, parallel, stage, micro_batches) for stage in stages] == expected
    if parallel.virtual_pipeline:  # Korthikanti et al., section 4.2.3: L (1 + (p - 1) / (p m)) layers on stage 0
        p, m = parallel.pipeline, parallel.virtual_pipeline
        assert expected[0] == config.num_layers * (1 + (p - 1) / (p * m))


def test_against_the_published_formula() -> None:
    """34 s b h minus their dropout masks and plus ours: the two counts agree on what they share.

    Per token of h = 4 heads-widths, bf16, no tensor parallelism, an MLP of 4 h without a gate would keep
    4 h (norms) + 2 h (attention input) + 6 h (q, k, v) + 2 h (attention output) + 2 h (mlp input) + 8 h (fc2 input)
    of theirs; the gated one of equal weight here keeps 3 x 8/3 h x 2 = 16 h for GELU's 8 h + 8 h.
    """
    config = dataclasses.replace(llama(), hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, ffn_size=10923)
    from megatron_stepkto.planning.activations import CUDA, layer_bytes

    parts = layer_bytes(config, Layout(1, False, 2, False, CUDA))
    h = 4096
    assert parts["norms"] == 4 * h + 8
    assert parts["attention input"] == parts["mlp input"] == 2 * h
    assert parts["mlp"] == pytest.approx(16 * h, rel=1e-3)
    theirs = 34 * h - 2 * h  # without the two dropout masks of one byte each
    ours = sum(parts.values())
    # ours above theirs: rotated copies of q and k (4 h), a second copy of attention's output (2 h), cosines and sines
    assert ours == pytest.approx(theirs + 4 * h + 2 * h + 4 * 128 * 2 + 4 * 32 + 8, rel=2e-3)
