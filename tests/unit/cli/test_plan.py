"""Plans as a user asks for them: proposals that fit and paste into a recipe, and refusals that say what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from megatron_stepkto.architectures.flops import forward_flops
from megatron_stepkto.architectures.layout import layout_faults
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.cli.main import main
from megatron_stepkto.planning.activations import CUDA, Layout, layer_bytes
from megatron_stepkto.planning.cluster import PRESETS
from megatron_stepkto.planning.memory import check_state_fits, rank_capacity, stage_memory
from megatron_stepkto.planning.times import Assumptions, Scenario, Workload, estimate_times
from megatron_stepkto.recipe.keys import LoRA, Training

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def configs(repository: Path) -> Path:
    return repository / "recipes" / "configs"


def settings(**changes: Any) -> Training:
    tree = {"optimizer": {"lr": 1e-6}, "global_batch_size": 256, "dtype": "bfloat16", **changes}
    return Training.model_validate(tree)


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    main(["plan", *map(str, arguments), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *map(str, arguments)])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# --- numbers ---------------------------------------------------------------------------------------------------


def test_state_of_a_70b_rank_by_hand(configs: Path) -> None:
    """TP 8 x PP 8 x DP 16, first stage: 1,201,045,504 elements, a sixteenth of them in the distributed optimizer."""
    parallel = {"ranks": 1024, "tensor": 8, "pipeline": 8, "sequence": True, "distributed_optimizer": True}
    train = settings(parallel=parallel, micro_batch_tokens=4096)
    config, entries = read_model_config(configs / "llama3.3_70b")
    first = stage_memory(config, entries, train, 0, num_micro_batches=64)
    assert (first.weights, first.gradients, first.optimizer) == (2_402_091_008, 4_804_182_016, 12 * 75_065_344)
    assert first.step == 4 * 75_065_344
    # 8 micro-batches of 10 layers are in flight; one is h / 8 elements, each output too
    layer = sum(layer_bytes(config, Layout(8, True, 2, False, CUDA)).values())
    output = 8 * 4096 * 8192 / 8 * 2
    working = 4096 * (3 * 28672 / 8 + 3 * 8192) * 2
    assert first.activations == pytest.approx(4096 * 80 * layer + output + working)
    last = stage_memory(config, entries, train, 7, num_micro_batches=64)
    # 16,032 words of a rank: logits of all 4,096 tokens may exist at a time
    assert last.head == 4096 * 16032 * (4 + 2) + 16032 * 8192 * (4 + 2 * 2 + 4)
    assert first.head == 0
    assert first.peak == pytest.approx(first.state + 1.05 * first.activations + 3e9)


def test_state_of_adapters_by_hand(configs: Path) -> None:
    """8B, rank 16, all seven matrices of 32 layers: 16 (in + out) elements each; the base is bf16 weights alone."""
    config, entries = read_model_config(configs / "llama3.1_8b")
    memory = stage_memory(config, entries, settings(lora=LoRA(rank=16)), 0, num_micro_batches=1)
    pairs = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 3]
    adapters = 32 * sum(16 * (a + b) for a, b in pairs)
    assert adapters == 41_943_040
    assert memory.weights == 2 * (8_030_261_248 + adapters)
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 12 * adapters)
    assert memory.head < stage_memory(config, entries, settings(), 0, num_micro_batches=1).head - 5e9


def test_float32_needs_no_main_weights(configs: Path) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")
    memory = stage_memory(config, entries, settings(dtype="float32"), 0, num_micro_batches=1)
    assert (memory.weights, memory.optimizer) == (4 * 8_030_261_248, 8 * 8_030_261_248)


def test_recompute_and_sequence_parallelism_lower_activations(configs: Path) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")

    def activations(**changes: Any) -> float:
        return stage_memory(config, entries, settings(**changes), 0, num_micro_batches=1).activations

    whole = activations(parallel={"ranks": 4, "tensor": 4})
    assert activations(parallel={"ranks": 4, "tensor": 4, "sequence": True}) < 0.7 * whole
    assert activations(parallel={"ranks": 4, "tensor": 4}, recompute=True) < 0.35 * whole


def test_flops_by_hand(configs: Path) -> None:
    """8B: 2 FLOPs per weight of a layer's matrices, plus causal attention over documents of 1,024 tokens."""
    config, _ = read_model_config(configs / "llama3.1_8b")
    layer, head = forward_flops(config, tokens=1, response_tokens=0.5, length=1024)
    matrices = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert layer == 2 * matrices + 2 * 2 * 512 * 4096
    assert head == 0.5 * 2 * 4096 * 128_256


def workload(**changes: Any) -> Workload:
    given = {
        "examples": 16_384,
        "global_batch": 256,
        "epochs": 1,
        "tokens": 1000,
        "response_tokens": 800,
        "kl_share": 0.0,
        "uses_reference": False,
        "samples": 0,
    }
    return Workload(**{**given, **changes})


def test_time_of_one_gpu_by_hand(configs: Path) -> None:
    """Nothing to send, no bubble: arithmetic at the stated share of the peak, and the optimizer's memory traffic."""
    config, entries = read_model_config(configs / "llama3.1_8b")
    case = Scenario(config, entries, PRESETS["h100"], workload(), Assumptions(mfu=0.5, fill=1.0))
    times = estimate_times(case, settings(micro_batch_tokens=4000))
    layer, head = forward_flops(config, 256_000, 204_800, 1000)
    arithmetic = (3 * 32 * layer + 4 * head) / (0.5 * 989e12)
    state = 12 * 8_030_261_248
    optimizer = (2 * state + 4 * 8_030_261_248) / 3350e9
    assert times.micro_batches == 64
    assert times.compute == pytest.approx(arithmetic)
    assert times.update == pytest.approx(arithmetic + optimizer)
    assert times.iteration == pytest.approx(64 * times.update)
    assert times.mfu == pytest.approx((96 * layer + 3 * head) / 989e12 / times.update)


def test_bubble_messages_and_passes(configs: Path) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")
    cluster = PRESETS["h100"]

    def times(work: Workload, **layout: Any) -> Any:
        case = Scenario(config, entries, cluster, work, Assumptions(fill=1.0, link=1.0))
        return estimate_times(case, settings(parallel=layout, micro_batch_tokens=4000))

    piped = times(workload(), ranks=4, pipeline=4)
    interleaved = times(workload(), ranks=4, pipeline=4, virtual_pipeline=4)
    running = piped.compute + piped.pipeline_messages
    assert piped.bubble == pytest.approx(running * 3 / 64)  # (P - 1) / m
    assert interleaved.bubble == pytest.approx(
        (interleaved.compute + interleaved.pipeline_messages) * 3 / (64 * 4)
    )  # (P - 1) / (m v)
    split = times(workload(), ranks=2, tensor=2)
    # 2 all-reduces per layer forward, 2 backward, each 2 (n - 1) / n of the hidden states
    assert split.tensor_parallel == pytest.approx(32 * 4 * 256_000 * 4096 * 2 / 450e9)
    replicas = times(workload(), ranks=8, distributed_optimizer=True)
    assert replicas.data_parallel == pytest.approx(7 / 8 * 6 * 8_030_261_248 / 450e9)
    plain, paired = times(workload(), ranks=1), times(workload(kl_share=0.25, uses_reference=True), ranks=1)
    layer, head = forward_flops(config, 256_000, 204_800, 1000)
    forward = (32 * layer + head) / (0.4 * 989e12)
    assert paired.kl_pass == pytest.approx(0.25 * forward)
    assert paired.update - plain.update == pytest.approx(0.25 * forward)
    assert paired.reference_pass == pytest.approx(64 * 1.25 * forward)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "cluster"), [(64, "h100"), (256, "h100"), (1024, "h100"), (64, "h200"), (64, "a100")])
def test_proposals_for_70b_fit_and_paste_into_a_recipe(
    gpus: int, cluster: str, configs: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan_json(capsys, configs / "llama3.3_70b", "--gpus", gpus, "--cluster", cluster)
    config, _ = read_model_config(configs / "llama3.3_70b")
    recipe = yaml.safe_load((repository / "recipes" / "mini_cpu.yaml").read_text())
    assert len(found["plans"]) >= 3
    seconds = [plan["seconds"]["iteration"] for plan in found["plans"]]
    assert seconds == sorted(seconds)
    for plan in found["plans"]:
        pasted = Training.model_validate({**recipe["train"], **plan["train"]})
        assert pasted.parallel.ranks == gpus
        assert layout_faults(config, pasted.parallel) == []
        assert plan["peak_bytes"] <= 0.9 * found["cluster"]["memory_gb"] * 1e9
        assert plan["peak_bytes"] == max(stage["peak"] for stage in plan["stages"])
        assert len(plan["stages"]) == pasted.parallel.pipeline


def test_proposals_for_a_mixture_of_experts(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, configs / "mixtral_8x22b", "--gpus", 128)
    config, _ = read_model_config(configs / "mixtral_8x22b")
    layouts = [settings(**plan["train"]).parallel for plan in found["plans"]]
    assert any(layout.expert > 1 for layout in layouts)
    assert [layout_faults(config, layout) for layout in layouts] == [[]] * len(layouts)
    assert all(plan["peak_bytes"] <= 72e9 for plan in found["plans"])


def test_flops_of_a_mixture_by_hand(configs: Path) -> None:
    """8 experts of 16,384, two per token, and the router."""
    config, _ = read_model_config(configs / "mixtral_8x22b")
    layer, _ = forward_flops(config, tokens=1, response_tokens=0, length=0)
    assert layer == 2 * (6144 * (6144 * 2 + 1024 * 2) + 2 * 3 * 6144 * 16384 + 6144 * 8)


def test_what_is_printed(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(configs / "llama3.1_8b"), "--gpus", "8"])
    text = capsys.readouterr().out
    assert "8.03B parameters, 32 layers, hidden 4,096, 32 heads (8 key-value)" in text
    assert "NVIDIA H100 SXM data sheet" in text
    assert "assumed, not measured: arithmetic at 40% of the peak" in text
    _, _, keys = text.partition("for a recipe:\n\n")
    assert yaml.safe_load(keys)["train"]["dtype"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run's patches last as long as the process")
def test_check_builds_the_shards(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = "tensor=8,pipeline=8,sequence=true"
    found = plan_json(
        capsys, configs / "llama3.3_70b", "--gpus", 64, "--layout", layout, "--cluster", "h200", "--check"
    )
    built = {(c["shard"]["stage"], c["shard"]["tensor_rank"]): c["shard"]["chunks"] for c in found["check"]}
    assert len(built) == 16
    assert built[0, 7] == [1_201_045_504]
    assert built[7, 0] == [1_201_053_696]


def test_refusals_name_the_key(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eight, seventy = configs / "llama3.1_8b", configs / "llama3.3_70b"
    assert "the number of GPUs is missing: give --gpus N" in refusal(capsys, eight)
    assert "no layout of 1 GPU fits into 80 GB each" in refusal(capsys, seventy, "--gpus", 1)
    message = refusal(capsys, eight, "--gpus", 8, "--layout", "tensor=3")
    assert "train.parallel: ranks (8) must be a multiple of tensor x pipeline x context (3 x 1 x 1)" in message
    assert "train.parallel.pipe: Extra inputs are not permitted; keys: ranks, tensor, pipeline" in refusal(
        capsys, eight, "--gpus", 8, "--layout", "pipe=2"
    )
    assert "train.parallel.tensor = 16 does not divide the model's key-value heads (8)" in refusal(
        capsys, eight, "--gpus", 16, "--layout", "tensor=16"
    )
    message = refusal(capsys, eight, "--gpus", 8, "--layout", "tensor=4,sequence=true,micro_batch_tokens=32768")
    assert "pipeline stage 0 needs" in message
    assert "each of these alone makes it fit: train.recompute: true;" in message
    assert "train.parallel.distributed_optimizer: true" in message
    assert "--layout: ranks is 4, but the plan is for 8 GPUs" in refusal(
        capsys, eight, "--gpus", 8, "--layout", "ranks=4,tensor=4"
    )
    for short in (("tensor=4,micro_batch_tokens=10",), ("tensor=4", "--longest", 30000)):
        assert "(--longest); add micro_batch_tokens=" in refusal(capsys, eight, "--gpus", 8, "--layout", *short)
    # both sides of a pair lie in one micro-batch, as training demands
    plans = plan_json(capsys, eight, "--gpus", 8, "--method", "dpo", "--longest", 4096)["plans"]
    assert {plan["train"]["micro_batch_tokens"] % 8192 for plan in plans} == {0}
    assert "add micro_batch_tokens=8192" in refusal(
        capsys, eight, "--gpus", 8, "--method", "dpo", "--longest", 4096, "--layout", "tensor=4,micro_batch_tokens=4096"
    )
    assert "expected --response-tokens <= --tokens <= --longest, got 900, 800, 4096" in refusal(
        capsys, eight, "--gpus", 8, "--tokens", 800, "--response-tokens", 900
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "many"], "--gpus: expected a whole number, got 'many'"),
        (["--gpus", "0"], "--gpus: expected 1 or more, got 0"),
        (["--gpus", "8", "--gpu-memory", "nan"], "--gpu-memory: expected a number above 0, got nan"),
        (["--gpus", "8", "--peak", "inf"], "--peak: expected a number above 0, got inf"),
        (["--gpus", "8", "--layout", "tensor=["], "--layout tensor=[: expected a number, true or false after ="),
    ],
)
def test_numbers_that_are_none(
    configs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, configs / "llama3.1_8b", *arguments)


def test_capacity_of_a_cpu_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    capacity, where = rank_capacity(torch.device("cpu"))
    assert capacity == psutil.virtual_memory().total / 4
    assert where == "its share (1 of 4) of the host's memory"


def test_state_that_cannot_fit_is_refused_before_training(configs: Path) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")
    train = settings(parallel={"ranks": 4, "tensor": 2})
    needed = 18 * 4_015_263_744
    check_state_fits(config, entries, train, needed, "a GPU")
    with pytest.raises(UserError) as caught:
        check_state_fits(config, entries, train, needed - 1, "a GPU", lambda key: f"r.yaml:9 ({key})")
    assert str(caught.value) == (
        "r.yaml:9 (train.parallel): weights, gradients and optimizer of a rank of pipeline stage 0 take 72.3 GB, "
        "a GPU has 72.3 GB; raise train.parallel.tensor or train.parallel.pipeline (with train.parallel.ranks), or set "
        "train.parallel.distributed_optimizer: true (`stepkto plan` proposes layouts)"
    )


# --- what lowers memory ------------------------------------------------------------------------------------------


def test_state_of_lower_precision_and_offload_by_hand(configs: Path) -> None:
    """8B on one GPU: gradients of 2 bytes, 16 bits of main weight beside the weight's, 16-bit moments; offload."""
    config, entries = read_model_config(configs / "llama3.1_8b")
    size = 8_030_261_248

    def memory(**optimizer: Any) -> Any:
        keys = {"optimizer": {"lr": 1e-6, **optimizer}, "parallel": {"distributed_optimizer": True}}
        return stage_memory(config, entries, settings(**keys), 0, num_micro_batches=1)

    plain, lower = memory(), memory(moment_dtype="bfloat16", gradient_dtype="bfloat16")
    assert (plain.gradients, plain.optimizer, plain.step, plain.host) == (4 * size, 12 * size, 4 * size, 0)
    assert (lower.weights, lower.gradients, lower.optimizer) == (2 * size, 2 * size, 6 * size)
    half = memory(offload=0.5)
    assert (half.gradients, half.optimizer, half.step, half.host) == (4 * size, 6 * size, 2 * size, 8 * size)
    assert memory(gradient_dtype="bfloat16").step == 8 * size  # and a float32 copy of the gradients
    assert memory(offload=1.0, gradient_dtype="bfloat16").step == 0


def test_activations_on_the_host_by_hand(configs: Path) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")
    layer = 4096 * sum(layer_bytes(config, Layout(1, False, 2, False, CUDA)).values())
    whole = stage_memory(config, entries, settings(), 0, num_micro_batches=1)
    away = stage_memory(config, entries, settings(offload_layers=12), 0, num_micro_batches=1)
    assert whole.activations - away.activations == pytest.approx(10 * layer)  # two are on their way
    assert away.host == pytest.approx(12 * layer)


def test_seconds_of_offload_by_hand(configs: Path) -> None:
    """6 bytes a weight over PCIe at 70% of 64 GB/s, AdamW's 28 at half of the host's 76.8; layers there and back."""
    config, entries = read_model_config(configs / "llama3.1_8b")
    case = Scenario(config, entries, PRESETS["h100"], workload(), Assumptions(fill=1.0))
    keys = {"optimizer": {"lr": 1e-6, "offload": 0.5}, "parallel": {"distributed_optimizer": True}}
    elements = 0.5 * 8_030_261_248
    seconds = elements * 6 / (0.7 * 64e9) + elements * 28 / (0.5 * 76.8e9)
    found = estimate_times(case, settings(**keys, micro_batch_tokens=4000))
    assert found.offload == pytest.approx(seconds)
    layer = sum(layer_bytes(config, Layout(1, False, 2, False, CUDA)).values())
    layers = estimate_times(case, settings(offload_layers=12, micro_batch_tokens=4000))
    assert layers.offload == pytest.approx(2 * 256_000 * 12 * layer / (0.7 * 64e9))
    plain = estimate_times(case, settings(micro_batch_tokens=4000))
    assert layers.update - plain.update == pytest.approx(layers.offload)


@pytest.mark.parametrize(
    ("recompute", "share"),
    [
        (True, 1.0),
        ({"every": 4}, 1.0),
        ({"layers": 8}, 0.25),
        ({"modules": ["mlp"]}, 2 * 3 * 4096 * 14336),
        ({"modules": ["core_attn"]}, 2 * 1000 * 4096),
        ({"modules": ["layernorm"]}, 0.0),
    ],
)
def test_seconds_of_recompute_by_hand(configs: Path, recompute: Any, share: float) -> None:
    """share: of the layers' forward FLOPs; above 1: FLOPs of a layer per token."""
    config, entries = read_model_config(configs / "llama3.1_8b")
    case = Scenario(config, entries, PRESETS["h100"], workload(), Assumptions(mfu=0.5, fill=1.0))
    layer, _ = forward_flops(config, 256_000, 204_800, 1000)
    again = layer * share if share <= 1 else 256_000 * share
    found = estimate_times(case, settings(recompute=recompute, micro_batch_tokens=4000))
    assert found.recompute == pytest.approx(32 * again / (0.5 * 989e12))
    assert found.update == pytest.approx(found.compute + found.recompute + found.optimizer)


@pytest.mark.parametrize(("model", "gpus"), [("llama3.1_8b", 1), ("llama3.3_70b", 8)])
def test_what_is_proposed_where_full_training_does_not_fit(
    configs: Path, capsys: pytest.CaptureFixture[str], model: str, gpus: int
) -> None:
    found = plan_json(capsys, configs / model, "--gpus", gpus, "--longest", 2048)
    assert found["why"].startswith(f"no layout of {gpus} GPU{'s' if gpus > 1 else ''} fits into 80 GB each")
    plans = [Training.model_validate({"optimizer": {"lr": 1}, "global_batch_size": 1, **deepened(plan["train"])})
             for plan in found["plans"]]  # fmt: skip
    assert sorted((plan.lora is not None, plan.optimizer.offload > 0) for plan in plans) == [
        (False, True), (False, True), (True, False)
    ]  # fmt: skip
    seconds = [plan["seconds"] for plan in found["plans"]]
    assert [each["iteration"] for each in seconds] == sorted(each["iteration"] for each in seconds)
    for plan, shown, times in zip(plans, found["plans"], seconds, strict=True):
        assert shown["peak_bytes"] <= 0.9 * 80e9
        assert (times["offload"] > 0) == (plan.optimizer.offload > 0)
        assert (times["recompute"] > 0) == (plan.recompute is not False)
        assert (shown["stages"][0]["host"] > 0) == (plan.optimizer.offload > 0)


def test_other_means_as_text(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(configs / "llama3.1_8b"), "--gpus", "1"])
    text = capsys.readouterr().out
    assert "Full training does not fit" in text and "What fits instead, and what it costs:" in text
    assert "offload 6.93: 48.2 GB over PCIe at 70% of 64 GB/s, and AdamW on the host, which reads and" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("    0  8,030,261,248")]
    assert (["16.1", "32.1", "0.0"], "128.5") in [(row[2:5], row[-1]) for row in rows]
    assert yaml.safe_load(text.partition("for a recipe:\n\n")[2])["train"]["lora"] == {"rank": 16, "alpha": 32.0}


def deepened(train: dict[str, Any]) -> dict[str, Any]:
    """The keys of a plan, pasted beside a learning rate."""
    return {**train, "optimizer": {"lr": 1, **train.get("optimizer", {})}}


def test_a_given_layout_with_other_means(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distributed_optimizer=true,offload=1.0,gradient_dtype=bfloat16", "lora=8,recompute={layers: 4}"]
    offload, lora = (plan_json(capsys, configs / "llama3.1_8b", "--gpus", 1, "--layout", each) for each in words)
    assert offload["plans"][0]["train"]["optimizer"] == {"offload": 1.0, "gradient_dtype": "bfloat16"}
    assert offload["plans"][0]["stages"][0]["host"] == 16 * 8_030_261_248
    assert lora["plans"][0]["train"]["lora"]["rank"] == 8
    assert lora["plans"][0]["train"]["recompute"] == {"layers": 4}
    said = refusal(capsys, configs / "llama3.1_8b", "--gpus", 1, "--layout", "offload=1.0")
    assert "offload needs parallel.distributed_optimizer: true" in said


def test_nothing_fits_at_all(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, configs / "llama3.3_70b", "--gpus", 1)
    assert "no layout of 1 GPU fits into 80 GB each" in said
    assert "neither LoRA nor the optimizer's state on the host or in lower precision fits" in said


def test_the_least_that_is_computed_again(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One layer fewer that is computed again would not fit."""
    found = plan_json(capsys, configs / "llama3.1_8b", "--gpus", 4, "--gpu-memory", 64)
    config, entries = read_model_config(configs / "llama3.1_8b")
    counts = [plan for plan in found["plans"] if isinstance(plan["train"]["recompute"], dict)]
    assert counts
    for plan in counts:
        if (number := plan["train"]["recompute"].get("layers", 1)) > 1:
            fewer = settings(**{**plan["train"], "recompute": {"layers": number - 1}})
            assert plan["peak_bytes"] <= 0.9 * 64e9 < max(
                stage_memory(config, entries, fewer, stage, num_micro_batches=plan["seconds"]["micro_batches"],
                             response_share=870 / 1024).peak for stage in range(fewer.parallel.pipeline)
            )  # fmt: skip
