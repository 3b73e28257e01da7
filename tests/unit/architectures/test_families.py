"""What each architecture reads from config.json, and what it refuses; the documentation's example."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_stepkto.architectures import families as checkpoints
from megatron_stepkto.architectures.families import find_architecture
from megatron_stepkto.architectures.layout import layout_faults
from megatron_stepkto.architectures.model_config import Experts, ModelConfig
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.recipe.keys import Parallel
from tests.model_folders import FAMILIES, LLAMA3_ROPE, YARN_ROPE, read_tensor, write_model
from tests.unit.checkpoint_folders import assert_same_bits, refusal

# The published config.json of these models, as far as it describes the network.
SIZES = {"hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 14336, "vocab_size": 32000, "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_scaling": None,
                         "attention_bias": False, "pretraining_tp": 1, "mlp_bias": False},
    "MistralForCausalLM": {"max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
    "MixtralForCausalLM": {"max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
                           "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False,
                           "router_aux_loss_coef": 0.02},
    # Phi-4
    "Phi3ForCausalLM": {"max_position_embeddings": 16384, "rope_theta": 250000.0, "sliding_window": None,
                        "original_max_position_embeddings": 16384, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
                        "partial_rotary_factor": 1.0, "rope_scaling": None, "attention_bias": False},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": 131072,
                         "use_sliding_window": False, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"max_position_embeddings": 40960, "rope_theta": 1e6, "head_dim": 128,
                         "use_sliding_window": False, "max_window_layers": 36, "attention_bias": False},
    "Qwen3MoeForCausalLM": {"max_position_embeddings": 40960, "rope_theta": 1e6, "head_dim": 128, "num_experts": 128,
                            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
                            "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001},
}  # fmt: skip


def read(name: str, **changes: Any) -> ModelConfig:
    hf = {"architectures": [name], **SIZES, **CONFIGS[name], **changes}
    return find_architecture(hf, "config.json").read_config(hf)


def test_what_the_published_configs_say() -> None:
    found = {name: read(name) for name in CONFIGS}
    assert {name for name, c in found.items() if c.qkv_bias} == {"Qwen2ForCausalLM"}
    assert {name for name, c in found.items() if c.qk_norm} == {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
    assert found["MixtralForCausalLM"].experts == Experts(8, 2, 14336, renormalize=True)
    assert found["Qwen3MoeForCausalLM"].experts == Experts(128, 8, 768, renormalize=True)
    assert not any(c.tied for c in found.values())
    assert read("MistralForCausalLM", head_dim=160).head_dim == 160
    assert read("Qwen3MoeForCausalLM", norm_topk_prob=False).experts == Experts(128, 8, 768, renormalize=False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not known"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "new": 1}}, "rope_scaling: new = 1 is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [2.0]}}, "RoPE type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "rope_scaling: RoPE type yarn needs factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling: factor = '4': expected a positive number"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': expected an object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta = None: expected a positive"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0: expected a positive number"),
        # transformers takes the older block where both are there
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN_ROPE}, "both set and"),
        ({"is_causal": False}, "is_causal = False is not supported"),
        ({"attention_chunk_size": 8}, "attention_chunk_size = 8 is not known"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None: expected a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': expected true or false"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None: expected a whole number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide num_attention_heads = 32"),
    ],
)
def test_a_setting_that_would_change_the_numbers(name: str, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: read(name, **changes))


# What config.json may leave out or spell in two ways, with transformers as the judge of what it means.
SPELLINGS: dict[str, dict[str, Any]] = {
    "silent": {},
    "transformers 4": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "transformers 5": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    "the same in both": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "rope_parameters": LLAMA3_ROPE},
    "base inside and outside": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 3e4},
    "base outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4},
    "YaRN": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
    "YaRN, length from the model": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "YaRN, its own strength": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7}},
    "YaRN, mscale": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "YaRN, not truncated": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "truncate": None}},
    "wide heads": {"head_dim": 64},
    "epsilon, tied": {"rms_norm_eps": 1e-3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_means_what_transformers_makes_of_it(name: str, spelling: str) -> None:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
             "intermediate_size": 512, "vocab_size": 100}  # fmt: skip
    if "YaRN" in spelling:
        sizes |= {"max_position_embeddings": 16384, "head_dim": 32}
    if name == "MistralForCausalLM":
        sizes["sliding_window"] = None  # type: ignore[assignment]
    if name == "Qwen3MoeForCausalLM":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    if name == "MixtralForCausalLM":
        sizes |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    written = {**sizes, **copy.deepcopy(SPELLINGS[spelling])}
    if name == "Phi3ForCausalLM":
        written["pad_token_id"] = 0  # transformers' default is past this vocabulary
    hf = {"architectures": [name], **copy.deepcopy(written)}
    if name == "Phi3ForCausalLM" and (written.get("rope_scaling") or written.get("rope_parameters", {}).get("factor")):
        assert "RoPE scaling is not supported for Phi-3" in refusal(lambda: find_architecture(hf, "").read_config(hf))
        return
    found = find_architecture(hf, "config.json").read_config(hf)
    model_class = getattr(transformers, name)
    theirs = model_class.config_class(**written)
    module = importlib.import_module(model_class.__module__)
    rotary = next(value for key, value in vars(module).items() if key.endswith("RotaryEmbedding"))(theirs)
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.tied == theirs.tie_word_embeddings
    assert found.max_positions == theirs.max_position_embeddings
    assert found.head_dim == (getattr(theirs, "head_dim", None) or 32)
    assert found.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    torch.testing.assert_close(found.inv_freq(), rotary.inv_freq, rtol=1e-6, atol=0)
    if found.experts:
        assert found.experts.renormalize == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize(
    "keys",
    [
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},  # SmolLM2
        {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "_name_or_path": "x"},  # of Llama 2's time
    ],
    ids=["SmolLM2", "Llama 2"],
)
def test_keys_of_published_configs_that_change_nothing(keys: dict[str, Any]) -> None:
    assert read("LlamaForCausalLM", **keys) == read("LlamaForCausalLM")


def test_layers_that_slide_in_a_model_that_does_not() -> None:
    layers = ["full_attention", "sliding_attention"] * 2
    assert "layer_types names sliding_attention, but use_sliding_window is not true" in refusal(
        lambda: read("Qwen2ForCausalLM", layer_types=layers)
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}),
        ("Phi3ForCausalLM", {"sliding_window": 4096}),
        ("MixtralForCausalLM", {"sliding_window": 4096}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 4096,
                              "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 4096}),
    ],
)  # fmt: skip
def test_a_window_that_would_matter(name: str, changes: dict[str, Any]) -> None:
    assert "sliding_window = 4096 is shorter than max_position_embeddings" in refusal(lambda: read(name, **changes))
    assert read(name, **changes, max_position_embeddings=4096).max_positions == 4096


def test_the_published_phi_3_mini_4k_and_the_edit_that_makes_it_convert() -> None:
    """Its config.json cuts attention to 2047 of 4096 positions."""
    published = {"sliding_window": 2047, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
                 "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    assert refusal(lambda: read("Phi3ForCausalLM", **published, max_position_embeddings=4096)) == (
        "config.json: sliding_window = 2047 is shorter than max_position_embeddings = 4096 and is not supported; if no "
        "prompt with its solution exceeds 2047 tokens, set max_position_embeddings to 2047: then the window changes "
        "nothing"
    )
    assert read("Phi3ForCausalLM", **published, max_position_embeddings=2047).max_positions == 2047


def test_a_window_that_no_layer_has() -> None:
    assert read("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4096, max_window_layers=4)


@pytest.mark.parametrize(("key", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_dense_layers_between_expert_layers(key: str, value: Any) -> None:
    assert f"{key} = {value!r} is not supported for Qwen3-MoE" in refusal(
        lambda: read("Qwen3MoeForCausalLM", **{key: value})
    )


def test_one_expert_per_token() -> None:
    """Its weight is its probability, or always 1: then Megatron-Core's router fails when the model is built."""
    for name, changes in (("MixtralForCausalLM", {}), ("Qwen3MoeForCausalLM", {"norm_topk_prob": True})):
        said = refusal(lambda name=name, changes=changes: read(name, num_experts_per_tok=1, **changes))
        assert "num_experts_per_tok = 1 is not supported" in said
    plain = read("Qwen3MoeForCausalLM", num_experts_per_tok=1, norm_topk_prob=False)
    assert plain.experts == Experts(128, 1, 768, renormalize=False)


def test_layouts_of_experts() -> None:
    dense, mixture = read("LlamaForCausalLM"), read("MixtralForCausalLM")

    def said(config: ModelConfig, **layout: Any) -> str:
        return "; ".join(fault.message for fault in layout_faults(config, Parallel(**layout)))

    assert "the model has no experts" in said(dense, ranks=2, expert=2)
    assert "train.parallel.expert = 3 does not divide the model's experts (8)" in said(mixture, ranks=3, expert=3)
    assert "train.parallel.sequence must be true" in said(mixture, ranks=2, tensor=2)
    assert not said(mixture, ranks=4, tensor=2, expert=4, sequence=True)
    assert not said(mixture, ranks=8, context=2, expert=2, expert_tensor=4)
    assert "train.parallel.expert_tensor = 2, but the model has no experts" in said(dense, ranks=2, expert_tensor=2)
    assert "train.parallel.expert_tensor = 3 does not divide the experts' feed-forward size (14336)" in said(
        mixture, ranks=3, expert_tensor=3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", family, num_hidden_layers=2)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights)


def test_the_stacks_of_experts(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "mixtral", num_hidden_layers=2)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    hf, reader = load_file(tmp_path / "hf" / "model.safetensors"), CheckpointReader(tmp_path / "megatron")
    fc1, fc2 = (f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
    assert reader.shapes()[fc1] == (2, 4, 192, 64)
    assert reader.shapes()["decoder.layers.mlp.router.weight"] == (2, 4, 64)
    name = "model.layers.1.block_sparse_moe.experts.3."
    assert torch.equal(read_tensor(reader, fc1, (1, 3)), torch.cat([hf[f"{name}w1.weight"], hf[f"{name}w3.weight"]]))
    assert torch.equal(read_tensor(reader, fc2, (1, 3)), hf[f"{name}w2.weight"])


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setattr(checkpoints, "ARCHITECTURES", (*checkpoints.ARCHITECTURES, names["EXAMPLE"]))
    write_model(tmp_path / "hf", "qwen2", num_hidden_layers=2)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for key in ("layer_types", "max_window_layers"):
        del config[key]
    path.write_text(json.dumps({**config, "architectures": ["ExampleForCausalLM"], "use_bias": True}))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert "decoder.layers.self_attention.linear_qkv.bias" in CheckpointReader(tmp_path / "megatron").shapes()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights)
