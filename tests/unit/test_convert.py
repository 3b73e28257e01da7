"""Hugging Face <-> Megatron: bit for bit or refused, whole or absent, and never running a checkpoint's code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_stepkto.checkpoints import convert, huggingface
from megatron_stepkto.checkpoints.architecture import QKV, GateUp, ModelConfig
from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.llama import read_config
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.torch_dist import DATA_FILE, CheckpointReader, Chunk, write_checkpoint
from megatron_stepkto.errors import UserError
from tests.builders import write_llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
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


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def refusal(call: Callable[[], object], target: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert target is None or not target.exists()
    return str(caught.value)


def forward_refusal(folder: Path) -> str:
    target = folder.parent / "target"
    return refusal(lambda: hf_to_megatron(folder, target), target)


def back_refusal(folder: Path) -> str:
    target = folder.parent / "target"
    return refusal(lambda: megatron_to_hf(folder, target), target)


# --- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "untied", "wide heads", "llama3", "bf16"])
def test_there_and_back_is_bitwise(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = copy(models[name], tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for unwanted in ("modeling_evil.py", "pytorch_model.bin"):
        (source / unwanted).write_text("no")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = load_file(source / "model.safetensors")
    assert ("lm_head.weight" in expected) == (name not in ("tied", "llama3"))
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), expected)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after.pop("dtype") == ("bfloat16" if name == "bf16" else "float32")
    before.pop("dtype", None)
    assert after == before


def test_a_sharded_source(models: dict[str, Path], tmp_path: Path) -> None:
    source = copy(models["untied"], tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, source / file)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights)
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_a_sharded_target(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 50_000)  # the largest weight, fc1's half, has 24,576
    megatron_to_hf(models["megatron"], tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 5
    found = {}
    for file in files:
        part = load_file(tmp_path / "back" / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 50_000
        assert all(index["weight_map"][name] == file for name in part)
        found.update(part)
    expected = load_file(models["tied"] / "model.safetensors")
    assert_same_bits(found, expected)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_torchs_own_reader_finds_the_stacked_weights(models: dict[str, Path]) -> None:
    hf = load_file(models["tied"] / "model.safetensors")
    state = {
        "decoder.layers.mlp.linear_fc1.weight": torch.zeros(4, 192, 64),
        "decoder.layers.self_attention.linear_qkv.weight": torch.zeros(4, 128, 64),
        "embedding.word_embeddings.weight": torch.zeros(99, 64),
    }
    dcp.load(state, checkpoint_id=str(models["megatron"]), no_dist=True)
    assert torch.equal(state["embedding.word_embeddings.weight"], hf["model.embed_tokens.weight"])
    for layer in range(4):
        name = f"model.layers.{layer}."
        fc1, qkv = (state[key][layer] for key in list(state)[:2])
        assert torch.equal(fc1[:96], hf[name + "mlp.gate_proj.weight"])
        assert torch.equal(fc1[96:], hf[name + "mlp.up_proj.weight"])
        # head_dim 16, two query heads per group: q0 q1 k0 v0 q2 q3 k1 v1
        q, k, v = (hf[f"{name}self_attn.{part}_proj.weight"] for part in "qkv")
        assert torch.equal(qkv, torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]))


def test_what_torchs_own_writer_wrote_is_read_and_padded_words_are_cut(models: dict[str, Path], tmp_path: Path) -> None:
    """One chunk per stacked key, as one rank saves it, and a vocabulary padded from 99 to 104."""
    hf = load_file(models["tied"] / "model.safetensors")

    def stack(make: Callable[[str], Tensor]) -> Tensor:
        return torch.stack([make(f"model.layers.{layer}.") for layer in range(4)])

    def qkv(name: str) -> Tensor:
        q, k, v = (hf[f"{name}self_attn.{part}_proj.weight"] for part in "qkv")
        return torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])

    state = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], torch.full((5, 64), 7.0)]),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stack(lambda n: hf[n + "input_layernorm.weight"]),
        "decoder.layers.self_attention.linear_qkv.weight": stack(qkv),
        "decoder.layers.self_attention.linear_proj.weight": stack(lambda n: hf[n + "self_attn.o_proj.weight"]),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stack(lambda n: hf[n + "post_attention_layernorm.weight"]),
        "decoder.layers.mlp.linear_fc1.weight": stack(
            lambda n: torch.cat([hf[n + "mlp.gate_proj.weight"], hf[n + "mlp.up_proj.weight"]])
        ),
        "decoder.layers.mlp.linear_fc2.weight": stack(lambda n: hf[n + "mlp.down_proj.weight"]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(64),
    }
    dcp.save(state, checkpoint_id=str(tmp_path / "megatron"), no_dist=True)
    shutil.copytree(models["tied"], tmp_path / "megatron" / COMPANIONS)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), hf)


def test_a_training_dtype_is_a_plain_cast(models: dict[str, Path], tmp_path: Path) -> None:
    hf_to_megatron(models["tied"], tmp_path / "megatron", torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.bfloat16() for name, tensor in load_file(models["tied"] / "model.safetensors").items()}
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), expected)


def test_extra_state_entries_that_a_strict_load_asks_for(models: dict[str, Path]) -> None:
    keys = read_metadata(models["megatron"]).state_dict_metadata
    assert {key for key in keys if "_extra_state" in key} == {
        f"decoder.layers.{module}._extra_state/shard_{layer}_4"
        for layer in range(4)
        for module in ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    }


# --- the mapping by hand -------------------------------------------------------------------------------------


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "num_layers": 1,
            "hidden_size": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 2,
            "ffn_size": 2,
            "vocab_size": 3,
            "max_positions": 8,
            "norm_eps": 1e-5,
            "rope_base": 1e4,
            "rope_scaling": None,
            "tied": True,
            **changes,
        }
    )


def column(*values: int) -> Tensor:
    return torch.tensor(values)[:, None]


def test_qkv_by_hand() -> None:
    """Two groups of two query heads, two rows per head: query heads 1 to 4 (11 12, 21 22, ...), keys 5x, values 7x."""
    entry = QKV("k", "q", "k", "v")
    query, key, value = column(11, 12, 21, 22, 31, 32, 41, 42), column(51, 52, 61, 62), column(71, 72, 81, 82)
    stacked = entry.to_megatron([query, key, value], small())
    assert stacked[:, 0].tolist() == [11, 12, 21, 22, 51, 52, 71, 72, 31, 32, 41, 42, 61, 62, 81, 82]
    assert entry.shape(small()) == (16, 1)
    for back, expected in zip(entry.to_hf(stacked, small()), (query, key, value), strict=True):
        assert torch.equal(back, expected)


def test_gate_and_up_by_hand() -> None:
    entry = GateUp("k", "gate", "up")
    stacked = entry.to_megatron([column(1, 2), column(3, 4)], small())
    assert stacked[:, 0].tolist() == [1, 2, 3, 4]
    assert [part[:, 0].tolist() for part in entry.to_hf(stacked, small())] == [[1, 2], [3, 4]]


def test_regions_of_a_tensor_cut_into_blocks(tmp_path: Path) -> None:
    """[2, 4, 6] in blocks of [1, 2, 3], as tensor-parallel ranks would save it; rows past 3 are padding."""
    whole = torch.arange(48.0).view(2, 4, 6)
    offsets = [(a, b, c) for c in (3, 0) for b in (2, 0) for a in (0, 1)]
    write_checkpoint(
        tmp_path, (Chunk("w", (2, 4, 6), (a, b, c), whole[a : a + 1, b : b + 2, c : c + 3]) for a, b, c in offsets), []
    )
    reader = CheckpointReader(tmp_path)
    assert reader.shapes() == {"w": (2, 4, 6)}
    assert torch.equal(reader.read("w"), whole)
    assert torch.equal(reader.read("w", 1), whole[1])
    assert torch.equal(reader.read("w", 0, rows=3), whole[0, :3])
    with pytest.raises(UserError, match="no tensor absent"):
        reader.read("absent")


def test_a_region_that_no_chunk_covers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [Chunk("w", (4, 2), (0, 0), torch.ones(3, 2))], [])
    with pytest.raises(UserError, match="w: chunks cover 6 of 8 elements; the checkpoint is incomplete"):
        CheckpointReader(tmp_path).read("w")


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, large base": {"rope_type": "default", "rope_theta": 1000000.5},
    "Llama 3.1": {**LLAMA3, "original_max_position_embeddings": 8192},
    "Llama 3.2": {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0},
    "short": LLAMA3,
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": head_dim, "max_position_embeddings": 131072}
    hf = LlamaConfig(**sizes, rope_parameters=dict(rope))
    expected = LlamaRotaryEmbedding(hf).inv_freq
    found = read_config(hf.to_dict()).inv_freq()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # as transformers 4 wrote it
    old = {key: value for key, value in hf.to_dict().items() if key != "rope_parameters"}
    old["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert torch.equal(read_config(old).inv_freq(), found)


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
            "expected architectures to be one of LlamaForCausalLM, got GPT2LMHeadModel",
        ),
        ({"architectures": []}, "got None"),
        ({"attention_bias": True}, "attention_bias = True is not supported for Llama; expected False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0}}, "key 'factor' is missing"),
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
    write_checkpoint(folder, (Chunk(key, (2,), (0,), torch.ones(2)) for key in keys), [])
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


# --- whole or absent -----------------------------------------------------------------------------------------


def test_an_old_target_stays_until_the_new_one_is_whole(models: dict[str, Path], tmp_path: Path) -> None:
    source, target = copy(models["tied"], tmp_path / "hf"), copy(models["megatron"], tmp_path / "megatron")
    (target / "old").write_text("old")
    broken = change_weights(
        copy(source, tmp_path / "broken"), lambda weights: weights["model.norm.weight"].fill_(torch.nan)
    )
    with pytest.raises(UserError):
        hf_to_megatron(broken, target)
    assert (target / "old").exists()
    megatron_to_hf(target, tmp_path / "back")
    hf_to_megatron(source, target)
    assert not (target / "old").exists()

    (tmp_path / "back" / "old").write_text("old")
    (target / DATA_FILE).write_bytes(b"")
    with pytest.raises(UserError):
        megatron_to_hf(target, tmp_path / "back")
    assert (tmp_path / "back" / "old").exists()
    hf_to_megatron(source, target)
    megatron_to_hf(target, tmp_path / "back")
    assert not (tmp_path / "back" / "old").exists()
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))


@pytest.mark.parametrize("interrupted", ["copy_companions", "_publish"])
def test_an_interruption_leaves_nothing_that_looks_finished(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, interrupted, stop)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(models["tied"], tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == [".megatron.partial"]
    hf_to_megatron(models["tied"], tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]
