"""What conversion refuses: faults of both kinds of folder, code in a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.huggingface import INDEX
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.stream import all_finite
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from tests.unit.checkpoint_folders import (
    DATA_FILE,
    GATE,
    KEY,
    QUERY,
    UP,
    Chunk,
    assert_same_bits,
    back_refusal,
    change_config,
    change_weights,
    copy,
    forward_refusal,
    refusal,
    shard,
    write_chunks,
)

# --- faults of a Hugging Face folder -------------------------------------------------------------------------


def test_folders_that_are_no_model(models: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected a Hugging Face model folder (with config.json), found none" in forward_refusal(empty)
    pickled = copy(models["tied"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled .bin weights are not read" in forward_refusal(pickled)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "Qwen3ForCausalLM, Qwen3MoeForCausalLM, got GPT2LMHeadModel",
        ),
        ({"architectures": []}, "got None"),
        ({"attention_bias": True}, "attention_bias = True is not supported for Llama; expected False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "RoPE type 'dynamic' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0}},
            "RoPE type llama3 needs factor, high_freq",
        ),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_that_is_not_served(models: dict[str, Path], tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    assert said in forward_refusal(change_config(copy(models["tied"], tmp_path / "hf"), **keys))


@pytest.mark.parametrize(("text", "said"), [("[]", "config.json"), ("{", "config.json:1: expected JSON")])
def test_a_config_that_is_no_config(models: dict[str, Path], tmp_path: Path, text: str, said: str) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    (folder / "config.json").write_text(text)
    assert said in forward_refusal(folder)


def test_missing_and_unmapped_weights_are_all_named(models: dict[str, Path], tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[GATE], weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["score.weight"] = torch.zeros(1, 64)

    assert forward_refusal(change_weights(copy(models["tied"], tmp_path / "hf"), change)).endswith(
        "the weights are not those of its config.json; "
        f"missing: {GATE}, model.norm.weight; not mapped: model.layers.0.self_attn.q_proj.bias, score.weight"
    )


def test_an_untied_model_needs_its_head(models: dict[str, Path], tmp_path: Path) -> None:
    folder = change_config(copy(models["tied"], tmp_path / "hf"), tie_word_embeddings=False)
    assert forward_refusal(folder).endswith("missing: lm_head.weight")


def test_copies_that_say_nothing_new_are_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    expected = load_file(models["tied"] / "model.safetensors")

    def change(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    hf_to_megatron(change_weights(copy(models["tied"], tmp_path / "hf"), change), tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), expected)


def test_a_head_that_is_no_copy_in_a_tied_model(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers would use it, vLLM would not."""

    def change(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][98, 63] += 1

    folder = change_weights(copy(models["tied"], tmp_path / "hf"), change)
    assert (
        "lm_head.weight differs from model.embed_tokens.weight, although tie_word_embeddings is true"
        in forward_refusal(folder)
    )
    change_config(folder, tie_word_embeddings=False)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors"))


def test_weights_that_stand_twice(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    names = load_file(folder / "model.safetensors")
    files = {name: "a.safetensors" if name < "model.norm" else "b.safetensors" for name in names}
    weights = shard(folder, files, twice=(GATE, UP))
    assert "holds model.safetensors and model.safetensors.index.json, which names other files" in forward_refusal(
        folder
    )
    (folder / "model.safetensors").unlink()
    said = forward_refusal(folder)
    for name in (GATE, UP):
        assert f"{name} is also in b.safetensors, {INDEX} names a.safetensors" in said
    (folder / "b.safetensors").unlink()
    save_file({n: t for n, t in weights.items() if files[n] == "b.safetensors"}, folder / "b.safetensors")
    hf_to_megatron(folder, tmp_path / "megatron")


def test_an_adapter_is_not_left_out_silently(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json), which would be left out; merge it" in forward_refusal(folder)


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.norm.weight": (65,)},
        {GATE: (90, 64)},
        {QUERY: (64, 60)},
        {"model.embed_tokens.weight": (104, 64)},
        # these fit in all, and would be cut in the wrong place
        {GATE: (90, 64), UP: (102, 64)},
        {QUERY: (32, 64), KEY: (64, 64)},
        # two entries at once
        {GATE: (90, 64), "model.norm.weight": (65,)},
    ],
    ids=["norm", "gate", "query", "embedding", "gate and up", "query and key", "gate and norm"],
)
def test_misshapen_weights_are_all_named(
    models: dict[str, Path], tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    folder = change_weights(
        copy(models["tied"], tmp_path / "hf"),
        lambda weights: weights.update({n: torch.ones(s) for n, s in shapes.items()}),
    )
    said = forward_refusal(folder)
    assert all(name in said for name in shapes)
    assert all(str(shape) in said for shape in shapes.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(models: dict[str, Path], tmp_path: Path, value: float) -> None:
    folder = change_weights(copy(models["bf16"], tmp_path / "hf"), lambda weights: weights[UP][3, 5].fill_(value))
    assert f"{UP} holds NaN or infinite values" in forward_refusal(folder)


@pytest.mark.parametrize("name", [QUERY, "model.layers.0.input_layernorm.weight"])
def test_two_precisions_in_one_stacked_weight(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """One dtype is all that a stacked weight has: the rest would not come back bit for bit."""
    folder = change_weights(
        copy(models["bf16"], tmp_path / "hf"), lambda weights: weights.update({name: weights[name].float()})
    )
    assert name in forward_refusal(folder)


def test_an_index_that_names_what_is_not_there(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    names = list(load_file(folder / "model.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"model-{i % 3}.safetensors" for i, n in enumerate(names)}}))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert (
        f"{index}: names files that are missing: model-0.safetensors, model-2.safetensors; download them again"
        == forward_refusal(folder)
    )
    change = {**dict.fromkeys(names, "model-1.safetensors")}
    index.write_text(json.dumps({"weight_map": change}))
    only = {name: tensor for name, tensor in load_file(folder / "model-1.safetensors").items() if name != GATE}
    save_file(only, folder / "model-1.safetensors")
    said = forward_refusal(folder)
    assert str(folder / "model-1.safetensors") in said
    assert GATE in said


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_a_truncated_safetensors_file(models: dict[str, Path], tmp_path: Path, kept: float) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert f"{path}: damaged or truncated safetensors file" in forward_refusal(folder)


# --- faults of a Megatron folder -----------------------------------------------------------------------------


def test_folders_that_are_no_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    assert "expected a Megatron torch_dist checkpoint (a folder with .metadata)" in back_refusal(tmp_path / "absent")
    bare = copy(models["megatron"], tmp_path / "bare")
    shutil.rmtree(bare / COMPANIONS)
    assert f"expected a folder {COMPANIONS}/ with config.json" in back_refusal(bare)


def test_missing_and_left_over_weights_of_a_checkpoint_are_all_named(tmp_path: Path, models: dict[str, Path]) -> None:
    folder = tmp_path / "megatron"
    folder.mkdir()
    keys = ["decoder.final_layernorm.weight", "embedding.word_embeddings.weight", "vision.weight", "adapter.weight"]
    write_chunks(folder, (Chunk(key, (2,), (0,), torch.ones(2)) for key in keys))
    shutil.copytree(models["untied"], folder / COMPANIONS)
    said = back_refusal(folder)
    layers = [
        f"decoder.layers.{name}"
        for name in (
            "mlp.linear_fc1.layer_norm_weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
            "self_attention.linear_proj.weight",
            "self_attention.linear_qkv.layer_norm_weight",
            "self_attention.linear_qkv.weight",
        )
    ]
    assert f"missing: {', '.join([*layers, 'output_layer.weight'])}; not mapped: adapter.weight, vision.weight" in said


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"num_hidden_layers": 3}, "decoder.layers."),
        ({"num_hidden_layers": 5}, "decoder.layers."),
        ({"intermediate_size": 80}, "mlp.linear_fc1.weight"),
        ({"intermediate_size": 112}, "mlp.linear_fc1.weight"),
        ({"hidden_size": 32, "head_dim": 16}, "weight"),
        ({"num_key_value_heads": 1}, "linear_qkv.weight"),
        ({"vocab_size": 200}, "embedding.word_embeddings.weight"),
    ],
)
def test_a_checkpoint_whose_shapes_are_not_its_configs(
    models: dict[str, Path], tmp_path: Path, keys: dict[str, Any], wrong: str
) -> None:
    """Only the vocabulary may have more rows than the config says; anything else would be cut without a word."""
    folder = copy(models["megatron"], tmp_path / "megatron")
    change_config(folder / COMPANIONS, **keys)
    assert wrong in back_refusal(folder)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_a_truncated_data_file(models: dict[str, Path], tmp_path: Path, kept: float) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    path = folder / DATA_FILE
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    said = back_refusal(folder)
    assert said.startswith(f"{path}: cannot read ")
    assert "the file is missing or damaged, write the checkpoint again" in said
    path.unlink()
    assert back_refusal(folder).startswith(f"{path}: cannot read ")


@pytest.mark.parametrize("kept", [0, 1, 40, 2000, -1])
def test_truncated_metadata_is_damage_and_not_an_attack(models: dict[str, Path], tmp_path: Path, kept: int) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:kept])
    assert back_refusal(folder).startswith(f"{path}: damaged")


# --- code in a checkpoint ------------------------------------------------------------------------------------


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def attacks(marker: Path) -> dict[str, bytes]:
    def by_name(module: str, name: str) -> bytes:
        """module.name("touch marker") in protocol 4, whose names may hold dots."""

        def text(value: str) -> bytes:
            return b"\x8c" + bytes([len(value)]) + value.encode()

        return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(f"touch {marker}") + b"\x85R."

    return {
        "system": pickle.dumps(Calls(os.system, f"touch {marker}")),
        "exec": pickle.dumps(Calls(exec, f"open({str(marker)!r}, 'w')")),
        "open": pickle.dumps({"tensors": [Calls(open, str(marker), "w")]}),
        "dotted": by_name("torch", "serialization.os.system"),
        "dotted from an allowed class": by_name("torch.distributed.checkpoint.metadata", "os.system"),
        "torch.load": pickle.dumps(Calls(torch.load, str(marker))),
    }


ATTACKS = ("system", "exec", "open", "dotted", "dotted from an allowed class", "torch.load")


@pytest.mark.parametrize("name", ATTACKS)
def test_metadata_that_would_run_code_is_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    (folder / ".metadata").write_bytes(attacks(marker)[name])
    assert back_refusal(folder).startswith(f"{folder / '.metadata'}: refused: it asks for ")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["system", "exec", "open"])
def test_the_attacks_would_work_on_an_open_door(tmp_path: Path, name: str) -> None:
    """Else the test above shows nothing."""
    pickle.loads(attacks(tmp_path / "ran")[name])
    assert (tmp_path / "ran").exists()


def test_damaged_metadata_is_an_error_or_harmless(models: dict[str, Path], tmp_path: Path) -> None:
    """Flipped bytes: no other exception, no memory that a damaged length asks for."""
    folder, draw, refused = copy(models["megatron"], tmp_path / "megatron"), random.Random(0), 0
    content = (folder / ".metadata").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    try:
        for _ in range(800):
            damaged = bytearray(content)
            for _ in range(draw.choice([1, 1, 3])):
                damaged[draw.randrange(len(content))] = draw.choice([0, 255, ord("r"), draw.randrange(256)])
            (folder / ".metadata").write_bytes(damaged)
            try:
                reader = CheckpointReader(folder)
                reader.check(reader.shapes())
            except UserError:
                refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert 600 < refused < 800


def test_a_chunk_that_would_run_code_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    metadata = read_metadata(folder)
    with (folder / DATA_FILE).open("wb") as file:
        torch.save(Calls(os.system, f"touch {marker}"), file)
    length = (folder / DATA_FILE).stat().st_size
    for info in metadata.storage_data.values():
        object.__setattr__(info, "offset", 0)
        object.__setattr__(info, "length", length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert back_refusal(folder).startswith(f"{folder / DATA_FILE}: cannot read ")
    assert not marker.exists()


# --- all faults at once --------------------------------------------------------------------------------------


def test_faults_of_many_files_are_all_named(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    names = sorted(load_file(folder / "model.safetensors"))
    shard(folder, {name: f"model-{n % 4}.safetensors" for n, name in enumerate(names)})
    (folder / "model.safetensors").unlink()
    (folder / "model-0.safetensors").unlink()
    (folder / "model-1.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes()[:-7])
    held = load_file(folder / "model-2.safetensors")
    lost = sorted(held)[0]
    held["stray.weight"] = held.pop(lost)
    save_file(held, folder / "model-2.safetensors")
    said = forward_refusal(folder)
    for part in (
        "names files that are missing: model-0.safetensors",
        "model-1.safetensors: damaged or truncated safetensors file",
        f"model-2.safetensors: cannot find {lost}",
        "model.safetensors.index.json does not list its stray.weight",
    ):
        assert part in said


def test_weights_that_are_not_finite_are_all_named_in_both_directions(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["tied"], tmp_path / "hf")
    spoiled = {GATE: torch.nan, QUERY: torch.inf, "model.norm.weight": -torch.inf}

    def change(weights: dict[str, Tensor]) -> None:
        for name, value in spoiled.items():
            weights[name].view(-1)[-1] = value

    change_weights(folder, change)
    said = forward_refusal(folder)
    assert all(name in said for name in spoiled)
    assert UP not in said

    megatron = copy(models["megatron"], tmp_path / "megatron")
    (megatron / "conversion.json").unlink()
    row = load_file(models["tied"] / "model.safetensors")[GATE][7].numpy().tobytes()
    content = (megatron / DATA_FILE).read_bytes()
    nan = torch.tensor([torch.nan]).numpy().tobytes()
    (megatron / DATA_FILE).write_bytes(content.replace(row, nan + row[4:]))
    assert f"{GATE} holds NaN or infinite values" in back_refusal(megatron)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_every_bit_pattern_is_judged_as_torch_judges_it(name: str) -> None:
    dtype = getattr(torch, name)
    if dtype == torch.float32:
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        patterns = torch.cat([upper, upper | 1, upper | 0xFFFF])
    else:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(dtype)
    expected = torch.isfinite(numbers)
    found = [all_finite(one.view(torch.uint8).numpy(), dtype) for one in numbers.split(1)]
    assert found == expected.tolist()
    finite = numbers[expected].contiguous()
    assert all_finite(finite.view(torch.uint8).numpy(), dtype)
    assert not all_finite(numbers.view(torch.uint8).numpy(), dtype)


def test_a_cast_that_overflows_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    folder = change_weights(copy(models["tied"], tmp_path / "hf"), lambda weights: weights[UP][0].fill_(1e6))
    said = refusal(lambda: hf_to_megatron(folder, tmp_path / "target", torch.float16), tmp_path / "target")
    assert UP in said
    assert "overflow" in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes_are_refused(models: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    folder = change_weights(
        copy(models["tied"], tmp_path / "hf"), lambda weights: weights.update({UP: weights[UP].to(dtype)})
    )
    assert f"{UP} is {'F64' if dtype == torch.float64 else 'I8'}, expected F32, F16, BF16" in forward_refusal(folder)


def test_a_chunk_outside_of_the_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    metadata = read_metadata(folder)
    (tmp_path / "secret").write_bytes((folder / DATA_FILE).read_bytes())
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", "../secret")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "its file is outside of the folder: refused" in back_refusal(folder)


def test_rows_that_are_not_stored_in_order_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    metadata = read_metadata(folder)
    with (folder / "other.distcp").open("wb") as file:
        torch.save(torch.ones(64, 99).t(), file)
    for index, info in metadata.storage_data.items():
        if index.fqn == "embedding.word_embeddings.weight":
            object.__setattr__(info, "relative_path", "other.distcp")
            object.__setattr__(info, "offset", 0)
            object.__setattr__(info, "length", (folder / "other.distcp").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "its rows are not stored in order" in back_refusal(folder)
