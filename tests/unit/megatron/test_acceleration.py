"""What the recipe asks of a GPU, against what the machine has. No GPU is needed: a machine is a value."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.megatron.acceleration import Acceleration, Found, Machine, choose, describe, find_machine
from megatron_stepkto.megatron.model import _heads_without_apex
from megatron_stepkto.recipe.keys import FP8, Training

TE, APEX, ABSENT = Found("2.13.0"), Found("0.1"), Found(None, "not installed")
BROKEN = Found(None, "installed, but does not load: libcuda")
HOPPER = Machine(TE, APEX, (9, 0))


def settings(**keys: Any) -> Training:
    return Training.model_validate({"optimizer": {"lr": 1e-5}, "global_batch_size": 8, "dtype": "bfloat16", **keys})


def test_auto_uses_what_is_there_on_a_gpu_and_nothing_on_a_cpu() -> None:
    assert choose(settings(), HOPPER) == Acceleration(True, True, None)
    assert choose(settings(), dataclasses.replace(HOPPER, apex=ABSENT)) == Acceleration(True, False, None)
    assert choose(settings(), dataclasses.replace(HOPPER, capability=None)) == Acceleration(False, False, None)
    assert choose(settings(transformer_engine="off", apex="off"), HOPPER) == Acceleration(False, False, None)
    assert choose(settings(dtype="float32"), HOPPER) == Acceleration(False, True, None)  # TF32 is not float32


@pytest.mark.parametrize(
    ("keys", "machine", "message"),
    [
        ({"transformer_engine": "required"}, Machine(ABSENT, ABSENT, (9, 0)),
         r"train\.transformer_engine is required, but it is not installed; install Transformer Engine"),
        ({"transformer_engine": "required"}, Machine(TE, ABSENT, None),
         r"train\.transformer_engine is required, but training runs on the CPU"),
        ({"transformer_engine": "required"}, Machine(BROKEN, ABSENT, (9, 0)),
         "does not load: libcuda"),
        ({"apex": "required"}, Machine(TE, Found(None, "installed without amp_C"), (9, 0)),
         r"train\.apex is required, but it is installed without amp_C; install NVIDIA Apex \(built from source"),
        ({"fp8": {}}, Machine(ABSENT, ABSENT, (9, 0)),
         r"train\.fp8 needs Transformer Engine, which is not installed; install transformer-engine\[pytorch\]"),
        ({"fp8": {}}, Machine(TE, ABSENT, None), r"train\.fp8 needs an NVIDIA GPU, but training runs on the CPU"),
        ({"fp8": {"scaling": "mxfp8"}}, HOPPER,
         r"mxfp8 needs a GPU of compute capability 10\.0, this one has 9\.0; choose one of delayed, current, b"),
        ({"fp8": {"scaling": "current"}}, Machine(TE, ABSENT, (8, 0)), r"this one has 8\.0; remove train\.fp8"),
        ({"fp8": {"scaling": "blockwise"}}, Machine(Found("2.2.1"), ABSENT, (9, 0)),
         r"blockwise needs Transformer Engine 2\.3 or newer, 2\.2\.1 is installed"),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_absent_is_an_error(keys: dict[str, Any], machine: Machine, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(settings(**keys), machine)


def test_fp8_on_this_machine_without_transformer_engine_is_refused() -> None:
    """megatron-core would ignore the flag and train in full precision."""
    machine = find_machine(torch.device("cpu"))
    if machine.transformer_engine.version is None:
        assert machine.transformer_engine.reason
    with pytest.raises(UserError, match=r"train\.fp8 needs an NVIDIA GPU"):
        choose(settings(fp8={}), machine)


def test_the_other_project_named_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_machine(torch.device("cpu")).apex.version:
        pytest.skip("NVIDIA Apex is installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("__version__ = '0.9'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert find_machine(torch.device("cpu")).apex == Found(None, "installed without apex.optimizers")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "raise AssertionError('Could not find `transformer-engine`.')",
            "does not load: Could not find `transf",
        ),
        (
            "raise OSError('libx.so: undefined symbol: x')",
            "does not load: libx.so: undefined",
        ),
        ("raise RuntimeError", "does not load: RuntimeError"),
    ],
)
def test_a_package_that_breaks_when_imported_is_not_used(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformer Engine does when its packages are not all there, or were built for another CUDA."""
    if find_machine(torch.device("cpu")).transformer_engine.version:
        pytest.skip("Transformer Engine is installed")
    (tmp_path / "transformer_engine/pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine/__init__.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_machine(torch.device("cpu")).transformer_engine
    assert found.version is None
    assert reason in found.reason


def test_a_model_is_built_under_gradient_fusion_without_apex() -> None:
    """Megatron refuses to build the head then, whose product this package computes itself; elsewhere it still does."""
    if layers._grad_accum_fusion_available:
        pytest.skip("NVIDIA Apex is installed")
    with _heads_without_apex():
        assert layers._grad_accum_fusion_available
    assert not layers._grad_accum_fusion_available


@pytest.mark.parametrize(
    ("fp8", "expected"),
    [
        ({"scaling": "delayed"}, {
            "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_param": False, "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max", "first_last_layers_bf16": False,
        }),
        ({"format": "e4m3"}, {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 1}),
        ({"scaling": "blockwise", "bf16_layers_at_start": 1, "bf16_layers_at_end": 2}, {
            "fp8_recipe": "blockwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 2,
        }),
        ({"scaling": "current", "weights": True}, {"fp8_recipe": "tensorwise", "fp8_param": True}),
    ],
)  # fmt: skip
def test_the_recipe_reaches_megatron_cores_own_config(
    fp8: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print)  # Megatron looks whether the kernel is there
    chosen = Acceleration(True, False, FP8.model_validate(fp8))
    config = TransformerConfig(
        num_layers=8, hidden_size=64, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16,
        use_cpu_initialization=True, **chosen.transformer_fields(),
    )  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.gradient_accumulation_fusion
    assert config.apply_rope_fusion
    assert chosen.data_parallel_fields() == {"fp8_param_gather": fp8.get("weights", False)}
    assert chosen.optimizer_fields() == {"fp8_recipe": config.fp8_recipe}


def test_without_fp8_nothing_of_it_is_set() -> None:
    fields = Acceleration(False, False, None).transformer_fields()
    assert fields == {"transformer_impl": "local", "gradient_accumulation_fusion": False}
    assert Acceleration().data_parallel_fields() == {"fp8_param_gather": False}
    assert Acceleration().optimizer_fields() == {}


@pytest.mark.parametrize(("scaling", "multiple"), [("delayed", 16), ("current", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_tokens_come_in_multiples_that_fp8_products_take(scaling: str, multiple: int) -> None:
    assert Acceleration(True, False, FP8.model_validate({"scaling": scaling})).token_multiple == multiple
    assert Acceleration().token_multiple == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "float32", "fp8": {}}, "fp8 goes with dtype: bfloat16, got float32"),
        ({"fp8": {}, "transformer_engine": "off"}, "fp8 needs Transformer Engine"),
        ({"fp8": {}, "lora": {}}, "lora and fp8 together are not supported"),
        ({"fp8": {"weights": True}}, "fp8.weights needs parallel.distributed_optimizer"),
        (
            {"fp8": {"weights": True, "scaling": "delayed"}},
            "weights: true goes with scaling: current or blockwise, got",
        ),
        (
            {"fp8": {"weights": True, "scaling": "mxfp8"}},
            "weights: true goes with scaling: current or blockwise, got",
        ),
        (
            {"dtype": "float32", "transformer_engine": "required"},
            "it would multiply float32 matrices in TF32, which keeps 11 bits; set dtype: bfloat16, or",
        ),
        (
            {"fp8": {"scaling": "delayed", "bf16_layers_at_start": 1}},
            "delayed cannot leave first or last layers in bf16",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**keys)


def test_the_log_says_what_is_used_and_why_the_rest_is_not() -> None:
    machine = Machine(TE, Found(None, "not installed"), (9, 0))
    fp8 = FP8(scaling="blockwise", bf16_layers_at_start=1, bf16_layers_at_end=1, weights=True)
    line = describe(Acceleration(True, False, fp8), machine)
    assert line.startswith(
        "Transformer Engine layers (transformer-engine 2.13.0); apex not used: not installed; Adam of "
    )
    assert line.endswith("FP8 hybrid, blockwise scaling, 1 first and 1 last layers in bf16, weights in FP8")
    assert describe(Acceleration(), machine).startswith("local layers (transformer-engine not used: switched off")
