"""Prompts that a model has no room for are refused before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.sampling.draw import new_drawing
from megatron_stepkto.sampling.job import Pass, PromptRow
from tests.unit.checkpoint_folders import refusal

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def said(folder: Path, length: int, backend: str, **config: Any) -> str:
    """What is refused for a prompt that is ``length`` tokens long with its solution of 20."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 50, **config}))
    settings = recipe.Sampling.model_validate(
        {"num_samples": 1, "max_tokens": 20, "backend": backend, "dtype": "float32", "workers": 1}
    )
    prompts = [PromptRow(problem_id="p", token_ids=[7] * (length - 20))]
    passes = [Pass(name="samples", num_samples=1, temperature=1, top_p=1)]
    return refusal(lambda: new_drawing(model, "M0", prompts, passes, settings, 0, folder / "out", title="test").draw())


def test_longer_than_the_model(tmp_path: Path) -> None:
    assert "that is 257, and the model's max_position_embeddings is 256" in said(
        tmp_path, 257, "transformers", max_position_embeddings=256
    )


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 256, "rope_scaling": YARN},
        {"max_position_embeddings": 256, "rope_parameters": {**YARN, "rope_type": "yarn"}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_longer_than_vllms_table_of_yarn_angles(config: dict[str, Any], tmp_path: Path) -> None:
    found = said(tmp_path, 129, "vllm", **config)
    assert "that is 129, and vLLM's table of YaRN angles ends at 128 (original_max_position" in found
    assert "set sample.backend: transformers" in found


def test_what_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step, claiming the folder, is reached: by vLLM up to the end of its table, by transformers beyond."""

    class Reached(Exception):
        pass

    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr("megatron_stepkto.sampling.draw._claim", reached)
    yarn = {"max_position_embeddings": 256, "rope_scaling": YARN}
    for number, (length, backend, config) in enumerate([
        (128, "vllm", yarn),
        (256, "transformers", yarn),
        (256, "vllm", {"max_position_embeddings": 256}),
        # the original length is the model's where it is not named
        (256, "vllm", {"max_position_embeddings": 256, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Reached):
            said(folder, length, backend, **config)
