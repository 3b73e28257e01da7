"""Impossible layouts are refused, and the message names the key to change and where it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_stepkto.architectures.layout import check_layout, layout_faults, refuse, tensor_choices
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Parallel


@pytest.fixture(scope="module")
def llama(repository: Path) -> ModelConfig:
    return read_model_config(repository / "recipes" / "configs" / "llama3.3_70b")[0]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"ranks": 64, "tensor": 8, "pipeline": 8, "sequence": True},
        {"ranks": 40, "tensor": 1, "pipeline": 20, "virtual_pipeline": 4},
    ],
)
def test_possible(layout: dict[str, int], llama: ModelConfig) -> None:
    assert layout_faults(llama, Parallel(**layout)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"ranks": 16, "tensor": 16},
            "train.parallel.tensor = 16 does not divide the model's key-value heads (8); choose one of 1, 2, 4, 8",
        ),
        (
            {"ranks": 6, "pipeline": 6},
            "train.parallel.pipeline = 6 does not divide the model's layers (80); "
            "choose one of 1, 2, 4, 5, 8, 10, 16, 20, 40, 80",
        ),
        (
            {"ranks": 8, "pipeline": 8, "virtual_pipeline": 3},
            "train.parallel.virtual_pipeline = 3 does not divide the 10 layers of a stage "
            "(80 layers over train.parallel.pipeline = 8); choose one of 2, 5, 10, or remove it",
        ),
        (
            {"ranks": 80, "pipeline": 80, "virtual_pipeline": 2},
            "train.parallel.virtual_pipeline = 2 does not divide the 1 layers of a stage "
            "(80 layers over train.parallel.pipeline = 80); remove it",
        ),
    ],
)
def test_impossible(layout: dict[str, int], message: str, llama: ModelConfig) -> None:
    with pytest.raises(UserError) as caught:
        refuse(layout_faults(llama, Parallel(**layout)))
    assert str(caught.value) == message


def test_all_faults_are_told_at_once(llama: ModelConfig) -> None:
    faults = layout_faults(llama, Parallel(ranks=18, tensor=3, pipeline=6))
    assert [fault.key for fault in faults] == ["train.parallel.tensor"] * 3 + ["train.parallel.pipeline"]


def test_more_ranks_than_words(llama: ModelConfig) -> None:
    config = dataclasses.replace(llama, vocab_size=3)
    assert [f.key for f in layout_faults(config, Parallel(ranks=4, tensor=4))] == ["train.parallel.tensor"]
    assert tensor_choices(config) == [1, 2]
    assert tensor_choices(llama) == [1, 2, 4, 8]


def test_the_place_of_the_key(tmp_path: Path, repository: Path, llama: ModelConfig) -> None:
    text = (repository / "recipes" / "mini_cpu.yaml").read_text()
    (tmp_path / "mini_cpu_m0").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("{ranks: 2, tensor: 2}", "\n    ranks: 3\n    tensor: 3", 1))
    line = next(n for n, row in enumerate(path.read_text().splitlines(), 1) if row == "    tensor: 3")
    recipe = read_recipe(path)
    with pytest.raises(UserError, match=rf"{path}:{line}: train\.parallel\.tensor = 3 does not divide"):
        check_layout(llama, recipe.train, recipe.place)
    recipe = read_recipe(path, ["train.parallel={ranks: 3, tensor: 3}"])
    assert recipe.place("train.parallel.tensor") == "--set train.parallel={ranks: 3, tensor: 3}"
    recipe = read_recipe(path, ["train.parallel.tensor=6", "train.parallel.ranks=6"])
    with pytest.raises(UserError, match=r"^--set train\.parallel\.tensor=6: train\.parallel\.tensor = 6 does not"):
        check_layout(llama, recipe.train, recipe.place)
