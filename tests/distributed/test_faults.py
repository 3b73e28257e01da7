"""Numbers that are not finite stop a run, and the records behind them are named."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.launch import train
from tests.builders import VOCABULARY, random_examples, write_examples, write_llama

pytestmark = pytest.mark.distributed

POISON = VOCABULARY - 1  # a token whose embedding will not do
PARALLEL = {"ranks": 2}


MARK = 1.0e20  # finite, or the conversion would refuse it


def write_poisoned(folder: Path, value: float = MARK, **changes: Any) -> Path:
    """A Llama with untied embeddings whose input row of ``POISON`` holds ``value``."""
    write_llama(folder, tie_word_embeddings=False, **changes)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert_poisoned(run: Path, model: Path) -> None:
    """What the stage would convert, but with NaN in place of the mark: as after a disk's or a memory's fault."""
    hf_to_megatron(model, run / "initial", torch.float32)
    found = 0
    for file in (run / "initial").glob("*.distcp"):
        content = file.read_bytes()
        mark, nan = (struct.pack("<f", value) * 64 for value in (MARK, float("nan")))
        found += content.count(mark)
        file.write_bytes(content.replace(mark, nan))
    assert found == 1


def examples_with_poison(*where: int) -> list[TrainExample]:
    """Right solutions; those at ``where`` hold the token in their prompts (so that no KL partner does)."""
    made = []
    for number, example in enumerate(random_examples(16)):
        prompt = [1 + t % (POISON - 1) for t in example.prompt_token_ids]
        made.append(example.model_copy(update={
            "outcome": 1, "prompt_token_ids": [*prompt, POISON] if number in where else prompt,
            "token_ids": [1 + t % (POISON - 1) for t in example.token_ids],
            "kl_partner": example.kl_partner and example.kl_partner.model_copy(
                update={"token_ids": [1 + t % (POISON - 1) for t in example.kl_partner.token_ids]}),
        }))  # fmt: skip
    return made


def settings(**changes: Any) -> recipe.Training:
    return recipe.Training.model_validate({
        "parallel": PARALLEL, "optimizer": {"lr": 1e-3}, "global_batch_size": 16, "micro_batch_tokens": 90,
        "device": "cpu", "timeout_s": 300, **changes,
    })  # fmt: skip


def run(folder: Path, model: Path, examples: list[TrainExample], training: recipe.Training, **inputs: Path) -> None:
    data = write_examples(folder.with_name(f"{folder.name}-data"), examples)
    train(Stage("train", folder, {}, {"model": model, "train": data, **inputs}), training, seed=3)


def test_a_loss_that_is_not_finite_names_the_records(tmp_path: Path) -> None:
    model = write_poisoned(tmp_path / "model")
    convert_poisoned(tmp_path / "run", model)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", model, examples_with_poison(4, 11), settings(method="rft"))
    message = str(caught.value)
    assert message.startswith("update 1: the loss is not finite; records concerned: ")
    assert set(message.partition("concerned: ")[2].partition(";")[0].split(", ")) == {"e4", "e11"}
    assert f"last good checkpoint: {tmp_path / 'run' / 'initial'}; leave these records out; or lower optim" in message


def test_a_gradient_that_is_not_finite_names_the_record(tmp_path: Path) -> None:
    """A norm without epsilon of values of 1e-20 has a finite value and a gradient of 1e20; its square is infinite."""
    model = write_poisoned(tmp_path / "model", 1e-20, rms_norm_eps=1e-45)
    training = settings(parallel={"ranks": 2, "tensor": 2}, loss={"outcome_weight": 1e8, "step_weight": 0})
    *right, last = examples_with_poison(7)
    with pytest.raises(UserError, match=r"update 1: the gradient is not finite; records concerned: e7; last good"):
        run(tmp_path / "run", model, [*right, last.model_copy(update={"outcome": 0})], training)


def test_a_reference_point_that_is_not_finite_names_the_pair(tmp_path: Path) -> None:
    model = write_poisoned(tmp_path / "model")
    convert_poisoned(tmp_path / "run", model)
    reference = write_llama(tmp_path / "reference", tie_word_embeddings=False)
    examples = examples_with_poison(4)
    with pytest.raises(UserError, match=r"over the KL pairs is not finite; KL pairs concerned: e4 <- e5; last good"):
        run(tmp_path / "run", model, examples, settings(), reference=reference)


def test_a_reference_that_is_not_finite_names_the_documents(tmp_path: Path) -> None:
    model = write_poisoned(tmp_path / "model")
    convert_poisoned(tmp_path / "run", model)
    with pytest.raises(UserError, match="log-probs of 2 of 26 documents are not finite: e4, e4 <- e5; check the"):
        run(tmp_path / "run", model, examples_with_poison(4), settings())
