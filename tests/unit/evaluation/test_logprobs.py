"""Comparison of log-probs: by hand, and on models that are equal or have one of the faults that it is there to find."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.cli.main import main
from megatron_stepkto.evaluation.logprobs import DEFAULT_TEXT, LIMITS, compare_scores, distribution, judge
from megatron_stepkto.evaluation.scorers import Scores
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe
from tests.builders import write_llama
from tests.unit.checkpoint_folders import LLAMA3, UP, change_config, change_weights, copy, load_in_megatron, refusal

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="cpu.install() lasts as long as the process: not beside GPU tests"
)


def stepkto(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# --- by hand -------------------------------------------------------------------------------------------------


def test_distribution_by_hand() -> None:
    differences = torch.tensor([0.1, -0.3, 0.0, 0.2, -1.0])
    found = distribution(differences, torch.tensor([True, True, False, True, False]))
    assert (found.tokens, found.median, found.max, found.agree) == (5, pytest.approx(0.2), 1.0, pytest.approx(0.6))
    assert found.mean == pytest.approx(0.32)
    assert found.p99 == pytest.approx(0.3 + 0.96 * 0.7)  # between the 4th and 5th of 5 sorted values


def test_one_bad_token_among_many_good_ones_is_different() -> None:
    good = Scores(torch.full((1000,), -1.0, dtype=torch.float64), torch.zeros(1000, dtype=torch.long))
    bad = Scores(good.log_probs.clone(), good.best)
    assert compare_scores(("a", "b"), [good], [bad], "float32").same
    bad.log_probs[123] -= 0.01
    found = compare_scores(("a", "b"), [good], [bad], "float32")
    assert found.faults == ("max is 1.00e-02, the limit 0.002",)
    assert compare_scores(("a", "b"), [good], [bad], "bfloat16").same


def test_not_a_number_is_different() -> None:
    nan = Scores(torch.tensor([-1.0, math.nan], dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    assert len(compare_scores(("a", "b"), [nan], [nan], "bfloat16").faults) == 3
    assert judge(distribution(torch.tensor([math.inf]), torch.tensor([True])), LIMITS["bfloat16"])


# --- models --------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 300, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("compared")
    rope = {**LLAMA3, "original_max_position_embeddings": 32}
    made = {
        "hf": write_llama(base / "hf", **SIZES, rope_parameters=rope, max_position_embeddings=512),
        "biased": write_llama(base / "biased", **SIZES, attention_bias=True),
    }
    noise = torch.Generator().manual_seed(1)
    change_weights(
        made["biased"],
        lambda weights: weights.update(
            {name: torch.randn(t.shape, generator=noise) * 0.1 for name, t in weights.items() if name.endswith("bias")}
        ),
    )
    for folder in made.values():
        train_byte_level_bpe(DEFAULT_TEXT, 300, folder)
    made["megatron"] = base / "megatron"
    hf_to_megatron(made["hf"], made["megatron"])
    return made


def test_the_same_model_twice(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert stepkto("compare-logprobs", folders["hf"], folders["megatron"], "--json", report) == 0
    said = capsys.readouterr()
    assert "SAME: within the limits for float32" in said.out
    assert "are cut to the 512 that both models take" in said.err
    numbers = json.loads(report.read_text())
    assert numbers["total"]["max"] < 1e-4
    assert numbers["total"]["agree"] > 0.99
    assert numbers["total"]["tokens"] == sum(text["tokens"] for text in numbers["texts"]) > 900
    assert len(numbers["texts"]) == len(DEFAULT_TEXT)


def test_bfloat16_weights_computed_in_float32_and_in_bfloat16(folders: dict[str, Path], tmp_path: Path) -> None:
    source = change_weights(
        copy(folders["hf"], tmp_path / "hf"),
        lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()}),
    )
    hf_to_megatron(source, tmp_path / "megatron")
    for dtype in ("float32", "bfloat16"):
        assert stepkto("compare-logprobs", source, tmp_path / "megatron", "--dtype", dtype) == 0


@pytest.mark.parametrize("fault", ["one weight", "one row", "one norm", "rope scaling", "rope scaling in Megatron"])
def test_a_fault_is_found(
    folders: dict[str, Path], tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = copy(folders["hf"], tmp_path / "hf"), copy(folders["megatron"], tmp_path / "megatron")
    norm = "model.layers.1.input_layernorm.weight"
    if fault == "one weight":
        change_weights(hf, lambda weights: weights[UP][3, 5].add_(1))
    elif fault == "one row":
        change_weights(hf, lambda weights: weights[UP][3].mul_(1.5))
    elif fault == "one norm":
        change_weights(hf, lambda weights: weights[norm].mul_(1.1))
    elif fault == "rope scaling":
        change_config(hf, rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]})
    else:
        plain = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
        change_config(megatron / COMPANIONS, rope_parameters=plain)
    assert stepkto("compare-logprobs", hf, megatron) == 1
    assert "DIFFERENT for float32: mean is " in capsys.readouterr().out


def test_a_dropped_bias_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    """Between two Hugging Face folders."""
    dropped = copy(folders["biased"], tmp_path / "dropped")
    assert stepkto("compare-logprobs", folders["biased"], dropped) == 0
    weights = load_file(dropped / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("bias")}
    assert len(kept) == len(weights) - 16
    save_file(kept, dropped / "model.safetensors", metadata={"format": "pt"})
    change_config(dropped, attention_bias=False)
    assert stepkto("compare-logprobs", folders["biased"], dropped) == 1


def test_what_transformers_would_fill_or_leave_out_is_an_error(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy(folders["hf"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["extra.weight"] = weights.pop(UP)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert stepkto("compare-logprobs", broken, folders["hf"]) == 2
    assert f"missing keys: {UP}" in capsys.readouterr().err


def test_inputs_to_correct(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = folders["hf"]
    bare = copy(hf, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    for arguments, said in (
        ((tmp_path / "absent", hf), "expected a Hugging Face folder"),
        ((hf, "http://127.0.0.1:9"), "expected the answer of a vLLM server"),
        ((bare, bare), "expected a Hugging Face folder with a tokenizer"),
        ((hf, hf, "--text", tmp_path / "absent.txt"), "expected a text file"),
    ):
        assert stepkto("compare-logprobs", *arguments) == 2
        assert said in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("\n \n")
    assert stepkto("compare-logprobs", hf, hf, "--text", text) == 2
    text.write_text("One line.\n\nAnother line, of more words.\n")
    assert stepkto("compare-logprobs", bare, hf, "--text", text, "--tokenizer", hf) == 0
    assert "text 2" in capsys.readouterr().out


# --- Megatron folders that are not what they say --------------------------------------------------------------


def test_a_megatron_folder_of_another_shape_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = copy(folders["megatron"], tmp_path / "megatron")
    change_config(megatron / COMPANIONS, intermediate_size=32)
    assert stepkto("compare-logprobs", folders["hf"], megatron) == 2
    said = capsys.readouterr().err
    assert f"{megatron}: the weights are not those of {megatron / COMPANIONS / 'config.json'}; " in said
    assert "linear_fc1.weight has shape (4, 192, 64), expected (4, 64, 64); " in said
    assert "linear_fc2.weight has shape (4, 64, 96), expected (4, 64, 32)" in said


@pytest.mark.parametrize(("words", "status"), [(299, 0), (301, 2)])
def test_a_megatron_folder_may_pad_the_vocabulary_but_not_lack_words(
    folders: dict[str, Path], tmp_path: Path, words: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = copy(folders["megatron"], tmp_path / "megatron")
    change_config(megatron / COMPANIONS, vocab_size=words)
    (tmp_path / "text.txt").write_text("1 + 2 = 3, 2 + 3 = 5\n")  # none of its tokens is the last word
    options = ("--tokenizer", folders["hf"], "--text", tmp_path / "text.txt")
    assert stepkto("compare-logprobs", megatron, megatron, *options) == status
    assert ("embedding.word_embeddings.weight has shape (300, 64)" in capsys.readouterr().err) == bool(status)


@pytest.mark.parametrize("key", ["embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1.weight"])
def test_a_weight_that_would_be_unpickled_is_refused(
    folders: dict[str, Path], tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's loader calls torch.load(weights_only=False) for an entry that is not a tensor, whatever was asked."""
    megatron = copy(folders["megatron"], tmp_path / "megatron")
    metadata = read_metadata(megatron)
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    storage: Any = {index: info for index, info in metadata.storage_data.items() if index.fqn != key}
    (megatron / "__9_0.distcp").write_bytes(b"never read")
    metadata.storage_data = storage | {MetadataIndex(key): _StorageInfo("__9_0.distcp", 0, 10)}
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    assert stepkto("compare-logprobs", folders["hf"], megatron) == 2
    assert f"missing: {key}" in capsys.readouterr().err
    said = refusal(lambda: load_in_megatron(megatron))
    assert said == f"{megatron}: not a checkpoint of this model: {key} is not a tensor"
