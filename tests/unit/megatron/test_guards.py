"""What Megatron-Core does wrong without a word, and this package keeps out of (each was seen with 0.16.1)."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.megatron import patches

# Before Megatron-Core is imported, as in a run; not beside a GPU, whose tests may share this process.
if not torch.cuda.is_available():
    patches.install()

from benchmarks.gpu_train import SHAPES
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration
from megatron_stepkto.megatron.layers import PackedAttention, RMSNorm
from megatron_stepkto.megatron.model import _block_spec, transformer_config
from megatron_stepkto.recipe.keys import Parallel

ROOT = Path(__file__).resolve().parents[3]
MODEL = SHAPES["tiny"].config(4)


def config(on_cpu: bool = True, **parallel: Any) -> Any:
    return transformer_config(MODEL, Parallel(**parallel), torch.float32, on_cpu=on_cpu)


def test_interleaved_pipelines_never_send_in_batches() -> None:
    """At pipeline 2 that gives wrong gradients."""
    interleaved = config(ranks=2, pipeline=2, virtual_pipeline=2)
    assert (interleaved.batch_p2p_comm, interleaved.overlap_p2p_comm) == (False, True)
    plain = config(ranks=2, pipeline=2)
    assert (plain.batch_p2p_comm, plain.overlap_p2p_comm) == (True, False)


def test_nothing_is_compiled_on_a_cpu() -> None:
    for on_cpu in (True, False):
        chosen = config(on_cpu)
        assert chosen.bias_activation_fusion is not on_cpu
        assert chosen.bias_dropout_fusion is not on_cpu


def test_gradients_are_divided_once_by_the_units_of_the_global_batch() -> None:
    """Without this Megatron divides a micro-batch's loss in place, and the logged one with it."""
    assert config().calculate_per_token_loss


@pytest.mark.parametrize("sequence", [False, True])
def test_a_norm_is_marked_for_sequence_parallelism(sequence: bool) -> None:
    """Megatron sums a marked weight's gradient over the ranks, each of which sees a part of the tokens."""
    norm = RMSNorm(types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence), 8)
    assert norm.weight.sequence_parallel is sequence


def test_local_layers_have_packed_attention_and_a_norm_for_sequence_parallelism() -> None:
    """Megatron's own attention needs O(s^2) memory and masks with -10,000; its own norm refuses such a layout."""
    block = _block_spec(MODEL, 2, 1, PLAIN, scored=False)
    for layer in block.layer_specs:
        assert layer.submodules.self_attention.submodules.core_attention is PackedAttention
        assert layer.submodules.input_layernorm is layer.submodules.pre_mlp_layernorm is RMSNorm
    assert block.layer_norm is RMSNorm


def test_a_module_that_saves_starts_nothing_when_it_is_imported_again() -> None:
    """Saving starts a process that imports the main module under the name __mp_main__."""
    for path in ("megatron_stepkto/training/entry.py", "tests/gpu/worker.py"):
        text = (ROOT / path).read_text()
        assert 'if __name__ == "__main__":\n    child_main(main)' in text, path
        assert not re.search(r"^(main|child_main)\(", text, re.MULTILINE), path


def test_a_process_that_a_save_starts_is_tied_to_its_rank_before_slow_imports() -> None:
    """Left by a killed rank, it would live on for the seconds that torch takes."""
    script = (
        "import runpy, sys\n"
        "from megatron_stepkto.base import processes\n"
        "processes.die_with_parent = lambda: print('tied')\n"
        "runpy.run_module('megatron_stepkto.training.entry', run_name='__mp_main__', alter_sys=True)\n"
        "print('torch' in sys.modules, 'megatron.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["tied", "False", "False"]


def test_transformer_engine_is_asked_for_where_it_is_used_alone() -> None:
    assert "apply_rope_fusion" not in Acceleration().transformer_fields()
    assert Acceleration(transformer_engine=True).transformer_fields()["apply_rope_fusion"] is True
