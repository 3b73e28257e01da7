"""What the trainer trained is what transformers opens: every architecture, after updates, from several layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.checkpoints.adapter import export_adapter, merge_adapter
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_stepkto.checkpoints.verify import verify
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from tests.builders import VOCABULARY, random_examples, write_adapter, write_examples
from tests.model_folders import FAMILIES, write_model
from tests.unit.checkpoint_folders import assert_same_bits

pytestmark = pytest.mark.distributed

TEXTS = [[3 + (7 * i) % 95 for i in range(150)], [5, 9, 11], [3 + (i * i) % 96 for i in range(40)]]
TP2, PP2, EP2 = ({"ranks": 2, axis: 2} for axis in ("tensor", "pipeline", "expert"))
BF16 = {"dtype": "bfloat16"}
LORA = {"lora": {"rank": 4, "alpha": 6}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, interleaved PP 2": ("llama", {**PP2, "virtual_pipeline": 2}, {}),
    "mistral, TP 2, distributed optimizer": ("mistral", TP2, {}),
    "phi3, TP 2": ("phi3", TP2, {}),
    "qwen2, PP 2": ("qwen2", PP2, {}),
    "qwen2, TP 2, bfloat16": ("qwen2", TP2, BF16),
    "qwen3, TP 2": ("qwen3", {**TP2, "sequence": True}, {}),
    "mixtral, EP 2": ("mixtral", EP2, {}),
    "qwen3_moe, TP 2 x EP 2": ("qwen3_moe", {**TP2, "expert": 2, "sequence": True}, {}),
    "qwen3_moe, TP 2 x expert TP 2": ("qwen3_moe", {**TP2, "expert_tensor": 2, "sequence": True}, {}),
    "qwen3_moe, PP 2": ("qwen3_moe_plain", PP2, {}),
    "qwen3, DP 2, distributed optimizer": ("qwen3", {"ranks": 2, "distributed_optimizer": True}, {}),
    "LoRA, llama, interleaved PP 2": ("llama", {**PP2, "virtual_pipeline": 2}, LORA),
    "LoRA, phi3, TP 2": ("phi3", TP2, LORA),
    "LoRA, qwen2, TP 2, bfloat16": ("qwen2", {**TP2, "sequence": True}, LORA | BF16),
    "LoRA, qwen3_moe, TP 2 x EP 2": ("qwen3_moe", {**TP2, "expert": 2, "sequence": True}, LORA),
    "llama_untied, TP 4": ("llama_untied", {"ranks": 4, "tensor": 4}, {}),
    "qwen3_moe, TP 2 x PP 2 x EP 2": ("qwen3_moe", {"ranks": 4, "tensor": 2, "pipeline": 2, "expert": 2,
                                                   "sequence": True}, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Case -> the folder of its job. All cases of as many ranks share a launch."""
    folder = tmp_path_factory.mktemp("export")
    data = write_examples(folder / "train", random_examples(24))
    launched = set[int]()

    def launch(names: list[str], ranks: int) -> None:
        jobs = []
        for name in names:
            family, parallel, more = CASES[name]
            directory = folder / name
            directory.mkdir()
            settings = recipe.Training.model_validate({
                "parallel": parallel, "optimizer": {"lr": 3e-3}, "max_updates": 3, "global_batch_size": 8,
                "loss": {"beta_outcome": 0.2, "beta_step": 0.5}, "micro_batch_tokens": 200, "device": "cpu",
                "timeout_s": 300, **more,
            })  # fmt: skip
            initial = directory / "initial"
            hf_to_megatron(write_model(directory / "hf", family), initial, getattr(torch, settings.dtype))
            adapter = write_adapter(directory / "start", directory / "hf", 4, 6) if settings.lora else None
            job = Job(settings=settings, seed=3, initial=initial, reference=None, train_examples=data, adapter=adapter,
                      held_out_examples=None, directory=directory, fingerprint="x")  # fmt: skip
            (directory / "job.json").write_text(job.model_dump_json())
            jobs.append(str(directory / "job.json"))
        (folder / f"{ranks}.json").write_text(json.dumps({"jobs": jobs, "texts": TEXTS}))
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={ranks}", "-m", "tests.distributed.export_rank"]
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
        children = [Child([*command, str(folder / f"{ranks}.json")], folder / f"{ranks}.log", env)]
        run_children(children, title="export", unit="jobs")

    def find(name: str) -> Path:
        ranks = int(CASES[name][1]["ranks"])
        if ranks not in launched:
            launched.add(ranks)
            launch([n for n, (_, parallel, _) in CASES.items() if parallel["ranks"] == ranks], ranks)
        return folder / name

    return find


def assemble(shares: list[dict[str, Any]], config: Any) -> dict[str, Tensor]:
    """Hugging Face's tensors from the ranks' parameters, by hand: nothing of the package's mapping is used."""
    parts: dict[str, dict[int, Tensor]] = {}
    for share in shares:
        for name, tensor in share["weights"].items():
            held = parts.setdefault(name, {})
            # an expert stands on one tensor-parallel rank alone where they share the experts out, or is split by itself
            rank = share["expert_tensor" if ".experts." in name else "tensor"]
            assert rank not in held or torch.equal(held[rank], tensor), f"replicas of {name} differ"
            held[rank] = tensor
    whole: dict[str, list[Tensor]] = {name: [held[rank] for rank in sorted(held)] for name, held in parts.items()}

    def alike(name: str) -> Tensor:
        assert all(torch.equal(one, whole[name][0]) for one in whole[name]), f"tensor-parallel copies of {name} differ"
        return whole[name][0]

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    found = {"model.embed_tokens.weight": torch.cat(whole["embedding.word_embeddings.weight"])[:VOCABULARY],
             "model.norm.weight": alike("decoder.final_layernorm.weight")}  # fmt: skip
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = torch.cat(whole["output_layer.weight"])[:VOCABULARY]

    def gated(ours: str, theirs: str, gate: str, up: str, down: str) -> None:
        halves = [share.chunk(2) for share in whole[f"{ours}.linear_fc1.weight"]]
        found[f"{theirs}.{gate}.weight"] = torch.cat([half[0] for half in halves])
        found[f"{theirs}.{up}.weight"] = torch.cat([half[1] for half in halves])
        found[f"{theirs}.{down}.weight"] = torch.cat(whole[f"{ours}.linear_fc2.weight"], 1)

    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{ours}self_attention.linear_qkv.{kind}" not in whole:
                continue
            fused = torch.cat(whole[f"{ours}self_attention.linear_qkv.{kind}"])
            by_group = fused.view(groups, queries + 2, head_dim, *fused.shape[1:])
            for letter, slots in (("q", slice(queries)), ("k", slice(queries, queries + 1)), ("v", slice(-1, None))):
                heads = by_group[:, slots].reshape(-1, *fused.shape[1:])
                found[f"{theirs}self_attn.{letter}_proj.{kind}"] = heads
        found[f"{theirs}self_attn.o_proj.weight"] = torch.cat(whole[f"{ours}self_attention.linear_proj.weight"], 1)
        for letter in "qk":
            if f"{ours}self_attention.{letter}_layernorm.weight" in whole:
                found[f"{theirs}self_attn.{letter}_norm.weight"] = alike(
                    f"{ours}self_attention.{letter}_layernorm.weight"
                )
        found[f"{theirs}input_layernorm.weight"] = alike(f"{ours}input_layernorm.weight")
        found[f"{theirs}post_attention_layernorm.weight"] = alike(f"{ours}pre_mlp_layernorm.weight")
        if f"{ours}mlp.router.weight" not in whole:
            gated(f"{ours}mlp", f"{theirs}mlp", "gate_proj", "up_proj", "down_proj")
            continue
        mixtral = config.model_type == "mixtral"
        block = f"{theirs}block_sparse_moe" if mixtral else f"{theirs}mlp"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        found[f"{block}.gate.weight"] = alike(f"{ours}mlp.router.weight")
        for expert in range(config.num_local_experts):
            gated(f"{ours}mlp.experts.experts.{expert}", f"{block}.experts.{expert}", *names)
    if config.model_type == "phi3":
        for layer in range(config.num_hidden_layers):
            for block, fused, names in (("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
                                        ("mlp", "gate_up_proj", ("gate_proj", "up_proj"))):  # fmt: skip
                place = f"model.layers.{layer}.{block}."
                pieces = [found.pop(f"{place}{name}.weight") for name in names]
                found[f"{place}{fused}.weight"] = torch.cat(pieces)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if "lora" not in CASES[name][2]])
def test_what_was_trained_is_what_transformers_opens(name: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = trained(name)
    _, parallel, more = CASES[name]
    dtype = getattr(torch, more.get("dtype", "float32"))
    megatron_to_hf(folder / "final", tmp_path / "hf")
    assert verify(tmp_path / "hf", folder / "final") == []
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading

    shares = [torch.load(folder / f"rank_{rank}.pt") for rank in range(parallel["ranks"])]
    assert_same_bits(weights, assemble(shares, model.config))
    before = load_file(folder / "hf" / "model.safetensors")
    assert weights.keys() == before.keys()
    for key, tensor in weights.items():
        assert tensor.dtype == dtype
        assert not torch.equal(tensor, before[key].to(dtype)), f"{key} was not trained"

    assert_same_logits(model, torch.load(folder / "logits.pt").float(), dtype)


def assert_same_logits(model: Any, found: Tensor, dtype: torch.dtype) -> None:
    """Those of Megatron are those of transformers."""

    def logits() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in TEXTS])

    expected = logits()
    assert expected.std() > 0.3
    if dtype == torch.float32:
        assert (found - expected).abs().max() < 1e-4
    else:  # both round to bfloat16, in another order: no further apart than transformers is from exact numbers, twice
        model.float()
        rounding = (expected - logits()).abs().mean()
        assert 0 < (found - expected).abs().mean() < 2 * rounding < 0.1 * expected.std()


@pytest.mark.parametrize("name", [name for name in CASES if "lora" in CASES[name][2]])
def test_a_trained_adapter_is_what_peft_reads_and_transformers_opens(
    name: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's layer is W x + alpha / rank * B A x; here in plain torch, as W + alpha / rank * B A."""
    from transformers import AutoModelForCausalLM

    folder = trained(name)
    dtype = getattr(torch, CASES[name][2].get("dtype", "float32"))
    export_adapter(folder / "final", tmp_path / "adapter", folder / "hf")
    factors, start = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", folder / "start")
    )
    assert {key: tensor.shape for key, tensor in factors.items()} == {key: t.shape for key, t in start.items()}
    expected = {name: weight.to(dtype) for name, weight in load_file(folder / "hf" / "model.safetensors").items()}
    for key, a in factors.items():
        assert not torch.equal(a, start[key].to(dtype)), f"{key} was not trained"
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            delta = 6 / 4 * factors[key.replace("lora_A", "lora_B")].float() @ a.float()
            expected[name] = (expected[name].float() + delta).to(dtype)
    merge_adapter(folder / "hf", tmp_path / "adapter", tmp_path / "merged", dtype)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        assert weight.dtype == dtype
        # rounded once: a float32 sum in another order may fall on the other side of a rounding step
        step = weight.abs().max().float() * torch.finfo(dtype).eps
        assert (weight.float() - expected[name].float()).abs().max() <= step
        assert (weight == expected[name]).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.5), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype, attn_implementation="eager")
    assert_same_logits(model, torch.load(folder / "logits.pt").float(), dtype)


def test_every_architecture_is_trained() -> None:
    assert {FAMILIES[family].config_class for family, _, _ in CASES.values()} == {
        made.config_class for made in FAMILIES.values()
    }
