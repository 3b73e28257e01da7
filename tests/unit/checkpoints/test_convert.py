"""Hugging Face <-> Megatron: bit for bit, for every kind of folder; the mapping by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from megatron_stepkto.architectures.llama import read_config
from megatron_stepkto.architectures.mapping import Entry, gate_up, qkv, same
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints import huggingface
from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from tests.model_folders import read_tensor
from tests.unit.checkpoint_folders import LLAMA3, Chunk, assert_same_bits, copy, shard, write_chunks

# --- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "untied", "wide heads", "llama3", "bf16"])
def test_there_and_back_is_bitwise(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = copy(models[name], tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for unwanted in ("modeling_evil.py", "pytorch_model.bin"):
        (source / unwanted).write_text("no")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = load_file(source / "model.safetensors")
    assert ("lm_head.weight" in expected) == (name not in ("tied", "llama3"))
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), expected)
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "conversion.json",
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
    names = sorted(load_file(source / "model.safetensors"))
    weights = shard(source, {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)})
    (source / "model.safetensors").unlink()
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


def column(*values: int) -> Tensor:
    return torch.tensor(values)[:, None]


def _stacked(entry: Entry, tensors: Sequence[Tensor]) -> Tensor:
    """One slice of Megatron's key, by the entry's runs."""
    return torch.cat([tensors[run.part][run.source : run.source + run.count] for run in entry.runs])


def _taken_apart(entry: Entry, stacked: Tensor) -> list[Tensor]:
    """The slice's Hugging Face tensors, by the entry's runs."""
    parts: list[list[Tensor]] = [[] for _ in entry.hf]
    for run in sorted(entry.runs, key=lambda run: run.source):
        parts[run.part].append(stacked[run.target : run.target + run.count])
    return [torch.cat(part) for part in parts]


def test_qkv_by_hand() -> None:
    """Two groups of two query heads, two rows per head: query heads 1 to 4 (11 12, 21 22, ...), keys 5x, values 7x."""
    entry = qkv("k", ("q", "k", "v"), layers=1, groups=2, heads=4, head_dim=2, columns=1)
    query, key, value = column(11, 12, 21, 22, 31, 32, 41, 42), column(51, 52, 61, 62), column(71, 72, 81, 82)
    stacked = _stacked(entry, [query, key, value])
    assert stacked[:, 0].tolist() == [11, 12, 21, 22, 51, 52, 71, 72, 31, 32, 41, 42, 61, 62, 81, 82]
    assert (entry.shape, entry.full_shape, entry.hf_shapes()) == ((16, 1), (1, 16, 1), [(8, 1), (4, 1), (4, 1)])
    for back, expected in zip(_taken_apart(entry, stacked), (query, key, value), strict=True):
        assert torch.equal(back, expected)


def test_gate_and_up_by_hand() -> None:
    entry = gate_up("k", "gate", "up", 1, 4, 1)
    stacked = _stacked(entry, [column(1, 2), column(3, 4)])
    assert stacked[:, 0].tolist() == [1, 2, 3, 4]
    assert [part[:, 0].tolist() for part in _taken_apart(entry, stacked)] == [[1, 2], [3, 4]]


def test_experts_are_stacked_over_layers_and_experts() -> None:
    entry = same("k", "{layer}.experts.{expert}.w2", 2, 3, 5, 7, stacked=2)
    assert (entry.lead, entry.shape) == ((2, 3), (5, 7))
    assert [entry.hf_names(index) for index in entry.indices()][3:] == [[f"1.experts.{e}.w2"] for e in range(3)]


def test_regions_of_a_tensor_cut_into_blocks(tmp_path: Path) -> None:
    """[2, 4, 6] in blocks of [1, 2, 3], as tensor-parallel ranks would save it; rows past 3 are padding."""
    whole = torch.arange(48.0).view(2, 4, 6)
    offsets = [(a, b, c) for c in (3, 0) for b in (2, 0) for a in (0, 1)]
    write_chunks(
        tmp_path, (Chunk("w", (2, 4, 6), (a, b, c), whole[a : a + 1, b : b + 2, c : c + 3]) for a, b, c in offsets)
    )
    reader = CheckpointReader(tmp_path)
    assert reader.shapes() == {"w": (2, 4, 6)}
    assert torch.equal(read_tensor(reader, "w"), whole)
    assert torch.equal(read_tensor(reader, "w", (1,)), whole[1])
    assert torch.equal(read_tensor(reader, "w", (0,), rows=3), whole[0, :3])
    assert torch.equal(read_tensor(reader, "w", (1, 3)), whole[1, 3])
    with pytest.raises(UserError, match="no tensor absent"):
        read_tensor(reader, "absent")


def test_a_region_that_no_chunk_covers(tmp_path: Path) -> None:
    write_chunks(tmp_path, [Chunk("w", (4, 2), (0, 0), torch.ones(3, 2))])
    with pytest.raises(UserError, match="w: chunks cover 6 of 8 elements; the checkpoint is incomplete"):
        read_tensor(CheckpointReader(tmp_path), "w")


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
