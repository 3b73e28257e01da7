"""PEFT folders: what is read, refused, and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_stepkto.architectures.adapters import adapted_linears
from megatron_stepkto.checkpoints.adapter import check_adapter, merge_adapter, read_adapter
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.recipe.keys import LoRA
from tests.builders import write_adapter
from tests.unit.checkpoint_folders import QUERY, assert_same_bits, change_weights, copy, refusal

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(models: dict[str, Path], tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", models["tied"], 4, 6, ["q_proj", "down_proj"])


def change(folder: Path, tensors: Callable[[dict[str, Tensor]], object] = lambda _: None, **settings: Any) -> Path:
    found = load_file(folder / WEIGHTS)
    tensors(found)
    save_file(found, folder / WEIGHTS)
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["tied", "bf16"])
def test_merged_is_the_sum_in_float32_rounded_once(
    name: str, dtype: torch.dtype | None, models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """Numbers of few bits, so that no sum depends on its order and every bit can be compared."""
    base = copy(models[name], tmp_path / "base")

    def coarse(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: (tensor * 16).round() / 16 for key, tensor in tensors.items()})

    change_weights(base, coarse)
    change(adapter, coarse)
    merge_adapter(base, adapter, tmp_path / "merged", dtype)
    expected, factors = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS)
    for key, weight in expected.items():
        start = weight.to(dtype or weight.dtype)
        pair = [factors.get(f"base_model.model.{key.removesuffix('weight')}lora_{x}.weight") for x in "AB"]
        if pair[0] is not None:
            start = (start.float() + 6 / 4 * pair[1] @ pair[0]).to(start.dtype)
        expected[key] = start
    assert_same_bits(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    assert not torch.equal(expected[QUERY], load_file(base / "model.safetensors")[QUERY].to(expected[QUERY].dtype))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(expected[QUERY].dtype).removeprefix("torch.")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora = True is not supported, expected False"),
    "rank-stabilised": ({"use_rslora": True}, "use_rslora = True is not supported, expected False"),
    "another rank in a layer": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = {'q_proj': 8} is not supported"),
    "a base that PEFT changed": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
    "some tokens alone": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1] is not supported"),
    "biases": ({"bias": "all"}, "bias = 'all' is not supported, expected 'none'"),
    "another method": ({"peft_type": "IA3"}, "peft_type = 'IA3': expected LORA"),
    "no rank": ({"r": "4"}, "r = '4': expected a whole number, 1 or more"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None: expected a number above 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_a_plain_adapter_is_refused(name: str, adapter: Path) -> None:
    settings, message = FAULTS[name]
    change(adapter, **settings)
    said = refusal(lambda: read_adapter(adapter))
    assert said.startswith(f"{adapter / SETTINGS}: ")
    assert message in said


def test_incomplete_and_strange_tensors_are_refused(adapter: Path) -> None:
    change(adapter, lambda tensors: tensors.pop(A))
    assert A.replace("lora_A", "lora_B") in refusal(lambda: read_adapter(adapter))
    (adapter / WEIGHTS).unlink()
    assert refusal(lambda: read_adapter(adapter)) == (
        f"{adapter}: expected {WEIGHTS}, found none; save the adapter with safetensors"
    )


def test_an_adapter_of_another_model_is_refused(models: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    said = refusal(lambda: merge_adapter(models["wide heads"], adapter, target), target)
    assert "lora_B.weight has shape (64, 4), expected (128, 4)" in said
    other = A.replace("layers.0", "layers.9")
    swap = (other, other.replace("lora_A", "lora_B"))
    change(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 4) for key in swap}))
    said = refusal(lambda: merge_adapter(models["tied"], adapter, target), target)
    assert f"adapts model.layers.9.self_attn.q_proj, which {models['tied']} lacks" in said


def test_not_finite_sums_are_refused(models: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    change(adapter, lambda tensors: tensors[A].fill_(float("inf")))
    target = tmp_path / "merged"
    assert QUERY in refusal(lambda: merge_adapter(models["tied"], adapter, target), target)


def test_a_start_must_be_what_the_recipe_describes(models: dict[str, Path], adapter: Path) -> None:
    _, entries = read_model_config(models["tied"])

    def check(**keys: Any) -> None:
        lora = LoRA(**keys)
        check_adapter(read_adapter(adapter), adapted_linears(entries, lora.targets), lora)

    check(rank=4, alpha=6, targets=["q_proj", "down_proj"])
    assert refusal(lambda: check(rank=8, alpha=16)) == (
        f"{adapter}: its rank is 4, train.lora.rank is 8; its alpha is 6, train.lora.alpha is 16; it adapts down_proj, "
        "q_proj in 8 matrices, train.lora.targets down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj in 28; "
        "make them equal"
    )
