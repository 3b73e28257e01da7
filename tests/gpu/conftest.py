"""What the GPU tests need, or why they skip.

``STEPKTO_REHEARSE_GPU_TESTS=1`` runs those that need no Transformer Engine on the CPU: it tries the tests, not a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto import recipe
from megatron_stepkto.acceleration import find_machine
from megatron_stepkto.records import TrainExample
from megatron_stepkto.stages import Stage
from megatron_stepkto.training.stage import train
from tests.builders import write_examples, write_llama

# Sizes that FP8 products take (multiples of 128) and that leave something to round.
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.05}  # fmt: skip

Run = Callable[..., tuple[list[dict[str, Any]], dict[str, Any], Path]]


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("STEPKTO_REHEARSE_GPU_TESTS"):
        return "cpu"
    pytest.skip("needs an NVIDIA GPU: torch sees none")


@pytest.fixture(scope="session")
def transformer_engine(device: str) -> str:
    """Its version."""
    found = find_machine(torch.device(device)).transformer_engine
    if device == "cpu" or found.version is None:
        pytest.skip(f"needs Transformer Engine on a GPU: {found.reason or 'rehearsal on the CPU'}")
    return found.version


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), **MODEL)


@pytest.fixture
def run(tmp_path: Path, model: Path, device: str) -> Run:
    """(examples, settings) -> metrics per update, the run's notes, its folder: the train stage as a user runs it."""

    def start(examples: list[TrainExample], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        data = write_examples(tmp_path / f"{folder.name}.jsonl", examples)
        chosen = {"optimizer": {"lr": 1e-4}, "global_batch_size": 8, "micro_batch_tokens": 512, "device": device,
                  "loss": {"beta_outcome": 0.5, "beta_step": 1.0}, "timeout_s": 120, **settings}  # fmt: skip
        train(Stage("train", folder, {}, {"model": model, "train": data}), recipe.Training.model_validate(chosen), 3)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return rows, json.loads((folder / "notes.json").read_text()), folder

    return start
