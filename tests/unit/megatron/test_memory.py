"""Keys that save memory or overlap messages: what reaches megatron-core's configuration, and what is refused."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_stepkto.architectures.layout import check_layout
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.megatron.acceleration import Acceleration, Found, Machine, choose, find_machine
from megatron_stepkto.megatron.memory import activation_fields, check_norms, data_parallel_fields, optimizer_fields
from megatron_stepkto.recipe.keys import Recompute, Training
from tests.unit.megatron.test_acceleration import ABSENT, HOPPER, settings
from tests.unit.megatron.test_lora import batches_of, hf, make_engine, ranks, update

__all__ = ["hf", "ranks"]

DISTRIBUTED = {"distributed_optimizer": True}
LOWER = {"moment_dtype": "bfloat16", "gradient_dtype": "bfloat16"}
ON_CPU = Machine(ABSENT, ABSENT, None)


def with_optimizer(parallel: dict[str, Any] | None = None, **keys: Any) -> Training:
    return settings(parallel=parallel or {}, optimizer={"lr": 1e-5, **keys})


def typed(owner: type, fields: dict[str, Any]) -> None:
    """Every name is a field of megatron-core's class, and every value is of the field's type."""
    known = typing.get_type_hints(owner)
    assert set(fields) <= {field.name for field in dataclasses.fields(owner)}
    for name, value in fields.items():
        wanted = known[name]
        options = typing.get_args(wanted) or (wanted,)
        literals = [each for option in options for each in typing.get_args(option)]
        kinds = tuple(typing.get_origin(option) or option for option in options if isinstance(option, type) or
                      isinstance(typing.get_origin(option), type))  # fmt: skip
        assert value in literals or isinstance(value, kinds), f"{name}: {value!r} is no {wanted}"


ACTIVATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"recompute": True}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ({"recompute": {"every": 4}},
     {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4}),
    ({"recompute": {"layers": 3}},
     {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}),
    ({"recompute": {"modules": ["core_attn", "mlp"]}},
     {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    ({"offload_layers": 5}, {"cpu_offloading": True, "cpu_offloading_num_layers": 5}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:If you are using transformer_engine")
@pytest.mark.parametrize(("keys", "fields"), ACTIVATIONS)
def test_activations(keys: dict[str, Any], fields: dict[str, Any]) -> None:
    chosen = settings(**keys)
    got = activation_fields(chosen.recompute, chosen.offload_layers)
    assert got == fields
    typed(TransformerConfig, fields)
    sizes = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "use_cpu_initialization": True}
    config = TransformerConfig(**sizes, **got)  # which checks them
    assert {name: getattr(config, name) for name in fields} == fields


OPTIMIZERS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"gradient_dtype": "bfloat16"}, {}, {"grad_reduce_in_fp32": False}),
    (LOWER,
     {"use_precision_aware_optimizer": True, "main_grads_dtype": torch.bfloat16, "exp_avg_dtype": torch.bfloat16,
      "exp_avg_sq_dtype": torch.bfloat16}, {"grad_reduce_in_fp32": False}),
    ({"moment_dtype": "bfloat16"},
     {"use_precision_aware_optimizer": True, "main_grads_dtype": torch.float32, "exp_avg_dtype": torch.bfloat16,
      "exp_avg_sq_dtype": torch.bfloat16}, {}),
    ({"offload": 0.5},
     {"use_precision_aware_optimizer": True, "main_grads_dtype": torch.float32, "exp_avg_dtype": torch.float32,
      "exp_avg_sq_dtype": torch.float32, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5,
      "overlap_cpu_optimizer_d2h_h2d": True}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "optimizer", "data_parallel"), OPTIMIZERS)
def test_optimizer(keys: dict[str, Any], optimizer: dict[str, Any], data_parallel: dict[str, Any]) -> None:
    chosen = with_optimizer(DISTRIBUTED, **keys)
    fields, others = optimizer_fields(chosen), data_parallel_fields(chosen)
    assert fields == {"overlap_param_gather": True, **optimizer}
    expected = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    assert others == {**expected, "align_param_gather": True, **data_parallel}
    typed(OptimizerConfig, fields)
    typed(DistributedDataParallelConfig, others)
    if not optimizer or find_machine(torch.device("cpu")).transformer_engine.version:  # it asks for its version
        config = OptimizerConfig(bf16=True, use_distributed_optimizer=True, **fields)
        assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 is bool(optimizer)


def test_overlap() -> None:
    def of(**keys: Any) -> tuple[bool, bool]:
        fields = data_parallel_fields(settings(**keys))
        return fields["overlap_grad_reduce"], fields["overlap_param_gather"]

    assert of() == (True, False)
    assert of(parallel=DISTRIBUTED) == (True, True)
    assert of(parallel={"overlap": False, **DISTRIBUTED}) == (False, False)
    # weights in FP8 are worked on after they are gathered, which megatron-core does not do in a forced wait
    assert of(parallel=DISTRIBUTED, fp8={"weights": True}) == (True, False)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"recompute": {}}, "expected one of modules, layers and every, got none"),
        ({"recompute": {"layers": 2, "every": 2}}, "expected one of modules, layers and every, got layers and every"),
        ({"recompute": {"modules": ["mlp", "mlp"]}}, "modules names one twice: mlp, mlp"),
        ({"recompute": {"modules": ["moe_act"]}}, "Input should be 'core_attn', 'layernorm', 'mlp' or 'moe'"),
        ({"recompute": {"modules": []}}, "at least 1 item"),
        ({"recompute": True, "offload_layers": 1}, "offload_layers and recompute together are not supported"),
        ({"offload_layers": 1, "parallel": {"ranks": 2, "pipeline": 2}},
         "offload_layers goes with parallel.pipeline: 1, got 2"),
        ({"offload_layers": 1, "dtype": "float32"}, "offload_layers needs the layers of Transformer Engine"),
        ({"recompute": {"modules": ["layernorm"]}, "fp8": {"scaling": "delayed"}},
         "recompute.modules: layernorm and fp8.scaling: delayed together are not supported"),
        *(({"optimizer": {"lr": 1e-5, **keys}, "parallel": DISTRIBUTED, "dtype": "float32"},
           rf"optimizer\.{name}.* goes with dtype: bfloat16, got float32")
          for name, keys in (("offload", {"offload": 0.5}), ("moment_dtype", {"moment_dtype": "bfloat16"}),
                             ("gradient_dtype", {"gradient_dtype": "bfloat16"}))),
        ({"optimizer": {"lr": 1e-5, "offload": 1.5}}, "less than or equal to 1"),
        ({"optimizer": {"lr": 1e-5, "offload": 0.5}}, r"optimizer.offload needs parallel.distributed_optimizer: true"),
        ({"optimizer": {"lr": 1e-5, "moment_dtype": "bfloat16"}},
         r"optimizer.moment_dtype: bfloat16 needs parallel.distributed_optimizer: true"),
        ({"optimizer": {"lr": 1e-5, "offload": 0.5, "moment_dtype": "bfloat16"}, "parallel": DISTRIBUTED},
         "with it megatron-core ignores moment_dtype; set moment_dtype: float32, or offload: 0"),
        ({"optimizer": {"lr": 1e-5, "offload": 0.5}, "parallel": DISTRIBUTED, "fp8": {"weights": True}},
         "optimizer.offload and fp8.weights together are not supported"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**keys)


@pytest.mark.parametrize(
    ("keys", "machine", "said"),
    [
        ({"optimizer": {"lr": 1e-5, "offload": 0.5}, "parallel": DISTRIBUTED}, ON_CPU,
         r"train\.optimizer\.offload: 0\.5 needs an NVIDIA GPU, but training runs on the CPU, whose memory holds "
         r"everything already; set it to 0"),
        ({"optimizer": {"lr": 1e-5, **LOWER}, "parallel": DISTRIBUTED}, ON_CPU,
         r"train\.optimizer\.moment_dtype: bfloat16 needs an NVIDIA GPU, but training runs on the CPU"),
        ({"offload_layers": 1}, ON_CPU, r"train\.offload_layers: 1 needs an NVIDIA GPU.*; set it to 0"),
        ({"optimizer": {"lr": 1e-5, **LOWER}, "parallel": DISTRIBUTED}, dataclasses.replace(ON_CPU, capability=(9, 0)),
         r"moment_dtype: bfloat16 needs Transformer Engine, which is not installed; install transformer-engine\[pyt"),
        ({"optimizer": {"lr": 1e-5, "offload": 0.5}, "parallel": DISTRIBUTED},
         dataclasses.replace(ON_CPU, capability=(9, 0)),
         r"train\.optimizer\.offload: 0\.5 needs Transformer Engine, which is not installed"),
        ({"offload_layers": 1}, dataclasses.replace(ON_CPU, capability=(9, 0)),
         r"train\.offload_layers: 1 needs Transformer Engine, which is not installed"),
        ({"optimizer": {"lr": 1e-5, **LOWER}, "parallel": DISTRIBUTED}, Machine(Found("1.13.0"), ABSENT, (9, 0)),
         r"needs Transformer Engine 2\.1 or newer, 1\.13\.0 is installed; install a newer one or set it to float32"),
        ({"fp8": {}, "recompute": {"modules": ["layernorm"]}}, Machine(Found("2.5.0"), ABSENT, (9, 0)),
         r"layernorm with train\.fp8 needs Transformer Engine 2\.6 or newer, 2\.5\.0 is installed"),
    ],
)  # fmt: skip
def test_what_a_machine_cannot_do_is_refused(keys: dict[str, Any], machine: Machine, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose(settings(**keys), machine)


def test_a_hopper_gpu_with_transformer_engine_can_do_all() -> None:
    choose(with_optimizer(DISTRIBUTED, **LOWER), HOPPER)
    choose(with_optimizer(DISTRIBUTED, offload=1.0), HOPPER)
    choose(settings(offload_layers=4), HOPPER)


@pytest.mark.parametrize(
    ("model", "keys", "said"),
    [
        ("llama3.1_8b", {"recompute": {"layers": 17}, "parallel": {"ranks": 2, "pipeline": 2}},
         "train.recompute.layers = 17, a model chunk of this layout has 16 layers; choose at most 16"),
        ("llama3.1_8b", {"recompute": {"every": 5}, "parallel": {"ranks": 4, "pipeline": 4, "virtual_pipeline": 2}},
         "train.recompute.every = 5, a model chunk of this layout has 4 layers; choose at most 4"),
        ("llama3.1_8b", {"recompute": {"modules": ["core_attn", "moe"]}},
         "train.recompute.modules names moe, which the model's layers do not have: it is dense; name mlp instead"),
        ("mixtral_8x22b", {"recompute": {"modules": ["mlp"]}},
         "train.recompute.modules names mlp, which the model's layers do not have: it is a mixture of experts; name "
         "moe instead"),
        ("llama3.1_8b", {"offload_layers": 32},
         "train.offload_layers = 32, the model has 32 layers; choose fewer than all"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_the_model_is_refused(
    model: str, keys: dict[str, Any], said: str, repository: Path
) -> None:
    config = read_model_config(repository / "recipes" / "configs" / model)[0]
    with pytest.raises(UserError) as caught:
        check_layout(config, settings(**keys))
    assert str(caught.value) == said


def test_norms_inside_transformer_engines_layers(repository: Path) -> None:
    dense, experts = (read_model_config(repository / "recipes/configs" / name)[0]
                      for name in ("llama3.1_8b", "mixtral_8x22b"))  # fmt: skip
    chosen, te = settings(recompute={"modules": ["layernorm"]}), Acceleration(transformer_engine=True)
    with pytest.raises(UserError, match="the norms of a dense model are inside Transformer Engine's linear layers"):
        check_norms(dense, chosen, te)
    check_norms(dense, chosen, Acceleration())
    check_norms(experts, chosen, te)
    check_norms(dense, settings(recompute={"modules": ["mlp"]}), te)
    assert Recompute(modules=["layernorm"]) == chosen.recompute


def gradients(folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    engine = make_engine(folder, **keys)
    for number, weight in enumerate(each for each in engine.policies[0].parameters() if each.requires_grad):
        if keys.get("lora"):  # adapters that add something to the first layers' outputs
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    engine.accumulate(batches_of(engine), lambda _, log_probs: (-log_probs.sum(), 1, {}))
    named: list[tuple[str, Any]] = list(engine.policies[0].named_parameters())
    return {name: weight.main_grad for name, weight in named if weight.requires_grad}


def test_gradients_in_bfloat16(hf: Path, ranks: None) -> None:
    """Several micro-batches add up to the float32 sums but for rounding, in half the memory."""
    keys = {"dtype": "bfloat16", "micro_batch_tokens": 100}
    exact = gradients(hf, **keys)
    rounded = gradients(hf, **keys, optimizer={"lr": 0.02, "gradient_dtype": "bfloat16"})
    for name, gradient in rounded.items():
        assert (gradient.dtype, exact[name].dtype) == (torch.bfloat16, torch.float32)
        error = (gradient.float() - exact[name]).norm()
        assert 0 < error < 0.01 * exact[name].norm(), name


def test_recompute_loses_no_adapters_gradient(hf: Path, ranks: None) -> None:
    """The first layer's MLP has an input without gradient where the adapters before it are none."""
    keys = {"lora": {"rank": 2, "targets": ["down_proj"]}, "micro_batch_tokens": 100}
    expected = gradients(hf, **keys)
    got = gradients(hf, **keys, recompute={"modules": ["mlp", "layernorm", "core_attn"]})
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("distributed", [False, True])
def test_overlap_changes_no_bit_of_one_process(distributed: bool, hf: Path, ranks: None) -> None:
    """As `make demo` is: tensor parallel alone, so that nothing is sent beside computation."""
    trained = []
    for overlap in (True, False):
        engine = make_engine(
            hf, micro_batch_tokens=100, parallel={"overlap": overlap, "distributed_optimizer": distributed}
        )
        update(engine)
        engine.await_weights()
        trained.append([weight.detach().clone() for weight in engine.policies[0].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
