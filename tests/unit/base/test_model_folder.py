"""Model folders that are not what their files say: one clear line of every command, before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_stepkto.base.model_folder import LIMITS, end_tokens, read_config
from megatron_stepkto.checkpoints.convert import COMPANIONS, HFSide, hf_to_megatron, megatron_to_hf, read_model_config
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.model_folder import check_model_folder
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.sampling.draw import new_drawing
from megatron_stepkto.sampling.job import Pass, PromptRow
from tests.builders import write_llama
from tests.unit.architectures.test_families import CONFIGS, SIZES
from tests.unit.base.damages import DAMAGES, damage, stepkto
from tests.unit.checkpoint_folders import change_config, copy, refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with a tokenizer and generation settings."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    build_tokenizer(folder)
    write_llama(folder, vocab_size=len(load_tokenizer(folder)))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return folder


def draw_from(model: Path, directory: Path) -> None:
    settings = recipe.Sampling(num_samples=1, max_tokens=4, temperature=1, backend="transformers")
    pass_ = Pass(name="samples", num_samples=1, temperature=0, top_p=1)
    new_drawing(
        model, "M0", [PromptRow(problem_id="p", token_ids=[1])], [pass_], settings, 0, directory, title="sample"
    ).draw()


# --- small files ----------------------------------------------------------------------------------------------

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", SMALL)
def test_a_damaged_small_file(
    model: Path, tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if how in ("an empty object", "wrong types") and name != "config.json":
        return  # an object of such keys says nothing that is wrong
    folder = copy(model, tmp_path / "model")
    damage(folder / name, how)
    if (folder / "config.json").is_file():
        code, said = stepkto(capsys, "convert", folder, tmp_path / "megatron")
        assert (code, str(folder / name) in said) == (2, True), said
        assert not (tmp_path / "megatron").exists()
    if how not in ("an empty object", "wrong types"):
        assert str(folder / name) in refusal(lambda: load_tokenizer(folder))
    assert str(folder / name) in refusal(lambda: check_model_folder(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_weights(model: Path, tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(model, tmp_path / "model")
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    damage(folder / name, how)
    assert str(folder) in refusal(lambda: check_model_folder(folder))
    code, said = stepkto(capsys, "convert", folder, tmp_path / "megatron")
    assert (code, str(folder) in said) == (2, True), said


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": 3, "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 16]}},
        {"a": [4]},
        {"a": None},
        [1],
        3,
    ],
)
def test_a_header_that_lies(model: Path, tmp_path: Path, header: Any) -> None:
    folder = copy(model, tmp_path / "model")
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
    said = refusal(lambda: check_model_folder(folder))
    assert said.startswith(f"{folder / 'model.safetensors'}: damaged or truncated safetensors file")


def test_every_command_says_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = change_config(copy(model, tmp_path / "model"), num_hidden_layers=10**9)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem_id": "p", "problem": "1 + 1 = ?", "answer": "2"}\n')
    for words in (
        ("convert", folder, tmp_path / "megatron"),
        ("convert", folder, "--dry-run"),
        ("plan", folder, "--gpus", 8),
        ("measure", folder, "--data", problems, "--output", tmp_path / "out", "--set", "sample.backend=transformers"),
        ("compare-logprobs", folder, folder),
    ):
        code, said = stepkto(capsys, *words)
        expected = f"{folder / 'config.json'}: num_hidden_layers = 1000000000: expected a whole number, 1 to 4096"
        assert (code, said) == (2, f"error: {expected}")


# --- configs ----------------------------------------------------------------------------------------------------

BAD: list[Any] = [0, -3, 10**30, "128", True, 1.5, [], {}, [1], {"a": 1}, [None], None, [["a"]]]
SETTINGS = sorted({"architectures", *LIMITS, *SIZES, *(key for keys in CONFIGS.values() for key in keys),
                   "rope_parameters", "layer_types", "sliding_window", "tie_word_embeddings", "dtype"})  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_a_setting_holds_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """No other exception, for any setting of any architecture."""
    from megatron_stepkto.base.errors import UserError

    whole = {"architectures": [name], **SIZES, **CONFIGS[name]}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": True}
    changes = [{key: value} for key in SETTINGS for value in BAD]
    changes += [{"use_sliding_window": True, key: value} for key in SETTINGS[-8:] for value in BAD]
    changes += [
        {"rope_theta": None, "rope_parameters": {**yarn, key: value}} for key in [*yarn, "type"] for value in BAD
    ]
    refused = 0
    for change in [{}, *changes]:
        (tmp_path / "config.json").write_text(json.dumps({**whole, **change}))
        try:
            read_model_config(tmp_path)
        except UserError as error:
            assert change, error
            refused += 1
    assert refused > len(changes) / 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected a whole number, 1 to 4096"),
        ({"num_hidden_layers": -3}, "num_hidden_layers = -3: expected a whole number, 1 to 4096"),
        ({"hidden_size": "128"}, "hidden_size = '128': expected a whole number, 1 to 1048576"),
        ({"text_config": {"vocab_size": 0}}, "vocab_size = 0: expected a whole number, 1 to 67108864"),
        ({"num_local_experts": 16000, "num_hidden_layers": 100}, "100 layers of 16000 experts each: expected at most"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM': expected a list of names"),
        ({"torch_dtype": 16}, "torch_dtype = 16: expected the name of a dtype, such as bfloat16"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta = 500000.0 and rope_parameters.rope_theta = 10000.0 differ; remove the wrong one",
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta = 500000.0 and rope_scaling.rope_theta = 10000.0 differ; remove the wrong one",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "type": "llama3"}},
            "rope_scaling.rope_type = 'yarn' and rope_scaling.type = 'llama3' differ; remove the wrong one",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_scaling.factor = 2 and rope_parameters.factor = 4 differ; remove the wrong one",
        ),
        (
            {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "llama3"}},
            "rope_scaling.rope_type = 'yarn' and rope_parameters.rope_type = 'llama3' differ; remove the wrong one",
        ),
        ({"torch_dtype": "float16", "dtype": "float32"}, "torch_dtype = 'float16' and dtype = 'float32' differ"),
        ({"num_local_experts": 8, "num_experts": 16}, "num_local_experts = 8 and num_experts = 16 differ"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
            "partial_rotary_factor = 0.5 and rope_parameters.partial_rotary_factor = 1.0 differ",
        ),
    ],
)
def test_a_config_that_is_refused_whatever_its_architecture(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NewForCausalLM"], "vocab_size": 48, **keys}))
    found = refusal(lambda: read_config(tmp_path))
    assert found.startswith(f"{tmp_path / 'config.json'}: ")
    assert said in found


def test_a_config_that_says_one_thing_twice(tmp_path: Path) -> None:
    both = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = {"rope_theta": 10000, "rope_scaling": both, "rope_parameters": both, "dtype": "float16",
              "torch_dtype": "float16", "num_experts": 4, "num_local_experts": None, "intermediate_size": [8, 16],
              "moe_intermediate_size": 0}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


def test_weights_of_fewer_layers_than_the_config_asks_for(model: Path, tmp_path: Path) -> None:
    """Of an architecture that no declaration serves: transformers would fill the rest with random numbers."""
    folder = change_config(copy(model, tmp_path / "model"), num_hidden_layers=5)
    assert refusal(lambda: check_model_folder(folder)) == (
        f"{folder}: the weights are not those of its config.json: num_hidden_layers = 5, the weights hold 4 layers"
    )
    assert refusal(lambda: draw_from(folder, tmp_path / "drawn")).startswith(f"{folder}: the weights are not those")
    said = refusal(lambda: HFSide(change_config(folder, num_hidden_layers=4096)))
    assert said.endswith(", ... (36728 more)")
    assert check_model_folder(model).vocab_size == json.loads((model / "config.json").read_text())["vocab_size"]


def test_what_only_transformers_knows(model: Path, tmp_path: Path) -> None:
    folder = change_config(copy(model, tmp_path / "model"), model_type="unheard_of")
    assert refusal(lambda: check_model_folder(folder)).startswith(f"{folder / 'config.json'}: transformers cannot use")


@pytest.mark.parametrize("value", ["2", {"a": 1}, [2, "3"], 1.5, True, -1])
def test_an_end_token_that_is_none(model: Path, tmp_path: Path, value: Any) -> None:
    folder = copy(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    said = refusal(lambda: end_tokens(folder))
    assert said.startswith(f"{folder / 'generation_config.json'}: eos_token_id = {value!r}: expected a token id")
    assert end_tokens(model) >= {2, 3}


def test_the_exports_two_names_of_a_dtype_agree(model: Path, tmp_path: Path) -> None:
    import torch

    source = change_config(copy(model, tmp_path / "hf"), dtype="float32", torch_dtype="float32")
    hf_to_megatron(source, tmp_path / "megatron", torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "back" / "model.safetensors").values()} == {torch.bfloat16}


# --- Megatron folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [f"{COMPANIONS}/config.json", "conversion.json"])
def test_a_damaged_file_of_a_megatron_folder(
    models: dict[str, Path], tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    damage(folder / name, how)
    if name == "conversion.json" and how in ("a folder", "a pipe"):
        return  # it need not be there
    code, said = stepkto(capsys, "convert", folder, tmp_path / "hf")
    assert (code, str(folder / name) in said) == (2, True), said


@pytest.mark.parametrize("content", ["", "x", "-1", "99999999999999999999", b"\xff\xfe", "../megatron", "9" * 5000])
def test_a_tracker_that_names_no_iteration(models: dict[str, Path], tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "latest_checkpointed_iteration.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(lambda: megatron_to_hf(tmp_path, tmp_path / "hf")).startswith(f"{path}: ")


def test_a_metadata_file_of_a_terabyte(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    damage(folder / ".metadata", "huge")
    assert refusal(lambda: read_metadata(folder)).startswith(f"{folder / '.metadata'}: damaged")
