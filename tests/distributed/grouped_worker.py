"""One rank of ``test_layouts`` whose experts are Megatron-Core's TEGroupedMLP, without Transformer Engine.

Transformer Engine's ``GroupedLinear`` is replaced by a loop of products; everything around it (the module, its names
in a checkpoint, its marks, the tokens' way there and back) is Megatron-Core's own. Attention is the local one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import linear

from megatron_stepkto.base.processes import child_main


class GroupedLinear(torch.nn.Module):
    """As transformer_engine.pytorch's (module/grouped_linear.py), in the arguments and names that Megatron uses."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, params_dtype: torch.dtype, bias: bool,
        fuse_wgrad_accumulation: bool, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias and not fuse_wgrad_accumulation
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for number in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype)
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        shares = enumerate(x.split(m_splits))
        return torch.cat([linear(share, getattr(self, f"weight{number}")) for number, share in shares])

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0


def grouped_classes() -> ModuleType:
    """Megatron-Core's wrappers of Transformer Engine's layers, around the stand-in: a second copy of their module.

    Everything else of Megatron-Core was imported without Transformer Engine, and stays so.
    """
    import megatron.core.extensions.transformer_engine as real

    assert not real.HAVE_TE, "a machine without Transformer Engine is asked for"
    unused = {name: type(name, (torch.nn.Module,), {}) for name in ("Linear", "LayerNormLinear", "DotProductAttention")}
    found = {
        "transformer_engine": {"__version__": "1.11.0"},  # grouped layers, and the least of other imports
        "transformer_engine.pytorch": {"GroupedLinear": GroupedLinear, **unused},
        "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": None, "fp8_autocast": None},
        "transformer_engine.pytorch.distributed": {"CudaRNGStatesTracker": object, "checkpoint": None},
        "transformer_engine.pytorch.attention": {"apply_rotary_pos_emb": None},
        "transformer_engine.pytorch.cpu_offload": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"DelayedScaling": object},
    }
    for name, members in found.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        spec = importlib.util.spec_from_file_location("grouped_layers", str(real.__file__))
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
    finally:
        for name in found:
            del sys.modules[name]
    return copy


def group_experts() -> None:
    """Give our local layers the experts of Megatron's specification for Transformer Engine."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_stepkto.megatron import model

    copy = grouped_classes()
    parts = MLPSubmodules(linear_fc1=copy.TEColumnParallelGroupedLinear, linear_fc2=copy.TERowParallelGroupedLinear)
    made: Callable[..., Any] = model._block_spec

    def with_groups(*arguments: Any, **keys: Any) -> Any:
        block = made(*arguments, **keys)
        for layer in block.layer_specs:
            layer.submodules.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=parts)
        return block

    model._block_spec = with_groups


def main() -> None:
    group_experts()
    from tests.distributed import layout_worker

    layout_worker.main()


if __name__ == "__main__":
    child_main(main)
