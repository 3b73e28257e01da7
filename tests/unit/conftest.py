"""Fixtures that several unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_stepkto.checkpoints.convert import hf_to_megatron
from tests.builders import write_llama
from tests.slurm.cluster import write_site
from tests.unit.checkpoint_folders import LLAMA3, change_weights


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that the tests copy or read, never change. 4 layers, hidden 64, 4 heads in 2 groups, FFN 96."""
    base = tmp_path_factory.mktemp("models")
    made = {
        "tied": write_llama(base / "tied"),
        "untied": write_llama(base / "untied", tie_word_embeddings=False),
        "wide heads": write_llama(base / "wide", tie_word_embeddings=False, head_dim=32, num_key_value_heads=4),
        "llama3": write_llama(base / "llama3", rope_parameters=LLAMA3),
        "bf16": write_llama(base / "bf16", tie_word_embeddings=False),
    }
    change_weights(made["bf16"], lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()}))
    hf_to_megatron(made["tied"], base / "megatron")
    return {**made, "megatron": base / "megatron"}


@pytest.fixture
def site(tmp_path: Path, repository: Path) -> Path:
    """A site file of a cluster that is not there."""
    return write_site(
        tmp_path / "site.sh", repository, Path("/nowhere"), GPUS_PER_NODE="8", CPUS_PER_NODE="96", TRAIN_NODES="",
        GPU_PARTITION="h100", CPU_PARTITION="'cpu only'", SAMPLE_ELEMENTS="3",
    )  # fmt: skip
