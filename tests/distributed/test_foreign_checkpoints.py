"""Checkpoints that others wrote: Megatron-Core's own GPTModel, saved as Megatron-LM's trainer saves it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from tests.model_folders import write_model
from tests.unit.checkpoint_folders import assert_same_bits, refusal

pytestmark = pytest.mark.distributed

NAMES = ("stacked", "per layer", "singleton", "module prefix", "trainer")
# A name of each way that the others do not have: the folders really differ.
TELLING = {
    "stacked": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "per layer": "decoder.layers.3.self_attention.linear_qkv.weight",
    "module prefix": "module.decoder.final_layernorm.weight",
}
SINGLETON = {
    "qwen2": "decoder.layers.1.mlp.linear_fc1.weight_w",
    "qwen3_moe": "decoder.layers.1.mlp.experts.experts.7.linear_fc1.weight_v",
}


@pytest.mark.parametrize("layout", [{"ranks": 1}, {"ranks": 2, "tensor": 2}], ids=["one process", "TP 2"])
def test_every_way_to_name_weights_converts_bitwise(layout: dict[str, Any], tmp_path: Path) -> None:
    families = ("qwen2", "qwen3_moe") if layout["ranks"] == 1 else ("qwen2", "llama_untied")
    cases = []
    for family in families:
        write_model(tmp_path / family, family)
        hf_to_megatron(tmp_path / family, tmp_path / f"{family}-ours")
        for how in NAMES:
            folder = tmp_path / f"{family}-{how}"
            folder.mkdir()
            shutil.copytree(tmp_path / family, folder / COMPANIONS, ignore=shutil.ignore_patterns("*.safetensors"))
            cases.append((str(tmp_path / f"{family}-ours"), how, str(folder)))
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"layout": layout, "cases": cases}))
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={layout['ranks']}", "-m", "tests.distributed.foreign_rank", str(job)]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
    run_children([Child(command, tmp_path / "log", env)], title="foreign", unit="models")

    for family in families:
        expected = load_file(tmp_path / family / "model.safetensors")
        for how in NAMES:
            folder = tmp_path / f"{family}-{how}"
            stored = CheckpointReader(folder / "iter_0000010" if how == "trainer" else folder).shapes()
            if how in TELLING:
                assert TELLING[how] in stored
            if how == "singleton" and family in SINGLETON:
                assert SINGLETON[family] in stored
            assert any("optimizer." in name for name in stored) == (how == "trainer")
            megatron_to_hf(folder, tmp_path / f"{family}-{how}-back")
            assert_same_bits(load_file(tmp_path / f"{family}-{how}-back" / "model.safetensors"), expected)

    if layout["ranks"] == 1:
        (folder / "latest_checkpointed_iteration.txt").write_text("20")
        said = refusal(lambda: megatron_to_hf(folder, tmp_path / "never"), tmp_path / "never")
        assert "names iter_0000020, which does not exist (existing: iter_0000010); name one of them" in said
