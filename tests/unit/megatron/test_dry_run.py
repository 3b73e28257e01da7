"""The plan's parameter counts against shards that are really built, on the meta device under a fake process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.architectures.sharding import model_parameters, optimizer_shard, stage_parameters
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.megatron.dry_run import build_shard, check_plan
from megatron_stepkto.recipe.keys import LoRA, Parallel
from tests.builders import write_llama

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="cpu.install() lasts as long as the process: on a GPU machine use plan --check"
)

# Published sizes of the models; the first was also counted in one process without this package.
SIZES = {
    "llama3.3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "qwen2.5_math_7b": 7_615_616_512,
    "qwen2.5_72b": 72_706_203_648,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_30b_a3b": 30_532_122_624,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_whole_model(name: str, size: int, repository: Path) -> None:
    assert model_parameters(read_model_config(repository / "recipes" / "configs" / name)[1]) == size


LAYOUTS = [
    ("llama3.3_70b", {"ranks": 64, "tensor": 8, "pipeline": 8, "sequence": True}),
    ("llama3.3_70b", {"ranks": 256, "tensor": 8, "pipeline": 4, "virtual_pipeline": 5, "sequence": True}),
    ("llama3.3_70b", {"ranks": 1024, "tensor": 8, "pipeline": 8, "sequence": True}),
    ("llama3.1_8b", {"ranks": 8, "tensor": 2, "distributed_optimizer": True}),
    ("llama3.1_8b", {"ranks": 40, "tensor": 4, "pipeline": 2, "distributed_optimizer": True}),
]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2.5_72b", {"ranks": 64, "tensor": 8, "pipeline": 4, "distributed_optimizer": True}),
        ("mixtral_8x22b", {"ranks": 64, "tensor": 4, "pipeline": 4, "expert": 8, "sequence": True}),
        (
            "mixtral_8x22b",
            {
                "ranks": 64,
                "tensor": 2,
                "pipeline": 4,
                "virtual_pipeline": 7,
                "expert": 8,
                "sequence": True,
                "distributed_optimizer": True,
            },
        ),
        ("mixtral_8x22b", {"ranks": 256, "pipeline": 8, "expert": 8, "distributed_optimizer": True}),
        (
            "mixtral_8x22b",
            {"ranks": 64, "pipeline": 2, "context": 2, "expert": 4, "expert_tensor": 4, "distributed_optimizer": True},
        ),
    ],
)
def test_biases_and_experts(name: str, layout: dict[str, int], repository: Path) -> None:
    config, entries = read_model_config(repository / "recipes" / "configs" / name)
    checks = check_plan(config, entries, Parallel(**layout), torch.bfloat16)  # type: ignore[arg-type]
    assert [check for check in checks if not check.agrees] == []


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_stage_is_as_planned(name: str, layout: dict[str, int], repository: Path) -> None:
    config, entries = read_model_config(repository / "recipes" / "configs" / name)
    parallel = Parallel(**layout)  # type: ignore[arg-type]
    checks = check_plan(config, entries, parallel, torch.bfloat16)
    assert [check for check in checks if not check.agrees] == []
    assert {check.shard.stage for check in checks} == set(range(parallel.pipeline))
    # without padding and shared weights the stages make up the whole model, but for norms that ranks share
    norms = (2 * config.num_layers + 1) * config.hidden_size
    split = sum(stage_parameters(config, entries, parallel, s).total for s in range(parallel.pipeline))
    assert split * parallel.tensor - norms * (parallel.tensor - 1) == model_parameters(entries)


@pytest.mark.parametrize(
    ("name", "layout", "targets"),
    [
        ("llama3.3_70b", {"ranks": 16, "tensor": 4, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}, "all"),
        ("llama3.3_70b", {"ranks": 16, "tensor": 8, "distributed_optimizer": True}, ["q_proj", "v_proj", "down_proj"]),
        ("mixtral_8x22b", {"ranks": 64, "pipeline": 4, "expert": 8, "distributed_optimizer": True}, "all"),
        ("mixtral_8x22b", {"ranks": 64, "expert": 4, "expert_tensor": 2, "distributed_optimizer": True}, "all"),
    ],
)
def test_adapters(name: str, layout: dict[str, int], targets: Any, repository: Path) -> None:
    config, entries = read_model_config(repository / "recipes" / "configs" / name)
    checks = check_plan(config, entries, Parallel(**layout), torch.bfloat16, LoRA(rank=16, targets=targets))  # type: ignore[arg-type]
    assert [check for check in checks if not check.agrees] == []


def test_70b_at_1024_ranks(repository: Path) -> None:
    """Figures of an independent count (plain GPTModel, without this package's builder)."""
    config, entries = read_model_config(repository / "recipes" / "configs" / "llama3.3_70b")
    parallel = Parallel(ranks=1024, tensor=8, pipeline=8, sequence=True, distributed_optimizer=True)
    assert [stage_parameters(config, entries, parallel, s).total for s in (0, 1, 7)] == [
        1_201_045_504,
        1_069_711_360,
        1_201_053_696,
    ]
    first = build_shard(config, parallel, torch.bfloat16, optimizer=True)
    assert first.optimizer == 75_065_344
    last = build_shard(config, parallel, torch.bfloat16, tensor_rank=7, stage=7, data_rank=15, optimizer=True)
    assert (last.rank, last.parameters, last.optimizer) == (1023, 1_201_053_696, 75_065_856)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        {"ranks": 10, "tensor": 2},
        {"ranks": 6, "pipeline": 2},
        {"ranks": 4, "tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    ],
)
def test_padding_and_tied_embeddings(tied: bool, layout: dict[str, int], tmp_path: Path) -> None:
    """99 words are padded at TP 2; a tied head on another stage is a second copy; buffers are padded."""
    model = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    config, entries = read_model_config(model)
    parallel = Parallel(**layout, distributed_optimizer=True)
    assert [c for c in check_plan(config, entries, parallel, torch.float32) if not c.agrees] == []


def test_the_shards_of_all_data_parallel_ranks_are_the_stage(tmp_path: Path) -> None:
    config, entries = read_model_config(write_llama(tmp_path / "model", tie_word_embeddings=False))
    parallel = Parallel(ranks=10, tensor=2, distributed_optimizer=True)
    held = [build_shard(config, parallel, torch.bfloat16, data_rank=d, optimizer=True).optimizer for d in range(5)]
    planned = stage_parameters(config, entries, parallel, 0)
    assert sum(shard or 0 for shard in held) == planned.total == 68_416
    assert max(shard or 0 for shard in held) == optimizer_shard(planned, parallel) == 13_696
