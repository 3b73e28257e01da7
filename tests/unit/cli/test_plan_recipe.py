"""Plans of recipes: their own layout beside the proposals, their work, and what their judges cost."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_stepkto.architectures.layout import check_layout
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.cli.main import main
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.planning.cluster import PRESETS
from megatron_stepkto.planning.judges import judge_costs
from megatron_stepkto.planning.search import make_plan
from megatron_stepkto.planning.times import Assumptions, Scenario, Workload
from megatron_stepkto.recipe.keys import Judging
from tests.unit.cli.test_plan import plan_json, refusal, workload

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def configs(repository: Path) -> Path:
    return repository / "recipes" / "configs"


@pytest.fixture
def models(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the shipped recipes' models and judges, with nothing but config.json."""
    folder = tmp_path / "models"
    for name, known in {
        "Llama-3.1-8B-Instruct": "llama3.1_8b",
        "Llama-3.3-70B-Instruct": "llama3.3_70b",
        "Qwen2.5-Math-7B-Instruct": "qwen2.5_math_7b",
        "Qwen3-30B-A3B-Instruct-2507": "qwen3_30b_a3b",
        "Qwen2.5-Math-PRM-7B": "qwen2.5_math_7b",
    }.items():
        shutil.copytree(configs / known, folder / name)
    config = folder / "Qwen2.5-Math-PRM-7B" / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "Qwen2ForProcessRewardModel"))
    monkeypatch.setenv("STEPKTO_MODELS", str(folder))
    return folder


# --- the recipe's own layout -------------------------------------------------------------------------------------


def test_the_offload_recipes_own_layout_by_hand(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    """20 layers computed again as written, where the proposal finds that 17 are enough; optimizer on the host."""
    path, size = repository / "recipes" / "llama3.1_8b_offload_1xh100.yaml", 8_030_261_248
    found = plan_json(capsys, path)
    own, proposed = found["recipe"]["plan"], found["plans"][0]
    assert own["train"]["recompute"] == {"layers": 20} and proposed["train"]["recompute"] == {"layers": 17}
    assert own["train"]["optimizer"] == {"offload": 1.0}
    [stage] = own["stages"]
    assert (stage["weights"], stage["gradients"], stage["optimizer"], stage["host"]) == (
        2 * size, 4 * size, 0, 16 * size
    )  # fmt: skip
    # activations and head do not coexist with the KL pass or the step, 5% of fragmentation, 3 GB of overhead
    assert own["peak_bytes"] == pytest.approx(6 * size + 1.05 * (stage["activations"] + stage["head"]) + 3e9)
    assert own["peak_bytes"] == pytest.approx(69.6e9, abs=0.05e9)
    main(["plan", str(path)])
    shown = capsys.readouterr().out
    assert "The recipe's own layout fits: its fullest GPU needs 69.6 of 80 GB.\n" in shown
    assert "\n1 GPU, 8 per node: 80 GB" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    first = rows.index("recipe 1 1 1 1 1 no 20 layers 4,608 69.6 50.96 0% 28% 1.69 offload 100%")
    assert rows[first + 1] == "1 1 1 1 1 1 no 17 layers 4,608 71.8 49.97 0% 29% 1.67 offload 100%"
    assert shown.index("The recipe's layout, GB per rank") < shown.index("Layout 1, GB per rank")
    assert yaml.safe_load(shown.partition("Layout 1, for a recipe:\n\n")[2])["train"]["recompute"] == {"layers": 17}


def test_the_recipes_layout_comes_before_faster_ones(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    found = plan_json(capsys, repository / "recipes" / "llama3.3_70b_lora_8xh100.yaml")
    own, fastest = found["recipe"]["plan"], found["plans"][0]
    assert (own["train"]["parallel"]["tensor"], fastest["train"]["parallel"]["tensor"]) == (8, 4)
    assert [each["peak_bytes"] / 1e9 for each in (own, fastest)] == pytest.approx([38.5, 70.9], abs=0.05)
    assert own["seconds"]["update"] > fastest["seconds"]["update"]


def test_a_recipes_layout_that_does_not_fit(repository: Path, capsys: pytest.CaptureFixture[str], models: Path) -> None:
    path = repository / "recipes" / "llama3.1_8b_offload_1xh100.yaml"
    found = plan_json(capsys, path, "--gpu-memory", 60)
    line = load_recipe(path).place("train.parallel")
    assert found["recipe"]["fits"] is False
    assert found["recipe"]["said"].startswith(
        f"The recipe's own layout does not fit: {line}: pipeline stage 0 needs 69.6 GB, a GPU has 60 GB (state 48.2,"
    )
    assert "each of these alone makes it fit: train.lora: {}" in found["recipe"]["said"]
    # what is proposed instead can be pasted: moments of 16 bits and offload exclude each other
    for plan in found["plans"]:
        optimizer = plan["train"].get("optimizer", {})
        assert not ("offload" in optimizer and "moment_dtype" in optimizer)
    assert "{'" not in found["why"]
    assert "(tensor 1, pipeline 1, micro-batches of 4,608 tokens, recompute full, offload 100%)" in found["why"]


def test_a_recipes_layout_that_is_all_that_fits(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    """Adapters and all layers computed again fill the memory: nothing leaves 10% free, so nothing is proposed."""
    text = (repository / "recipes" / "llama3.1_8b_lora_1xh100.yaml").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("  micro_batch_tokens:", "  recompute: true\n  micro_batch_tokens:"))
    main(["plan", str(path), "--gpu-memory", "23"])
    shown = capsys.readouterr().out
    assert "The recipe's own layout fits: its fullest GPU needs 22.9 of 23 GB." in shown
    assert "There is no proposal: no layout of 1 GPU fits into 23 GB each (with 10% left free): " in shown
    assert "Layout 1" not in shown
    assert "own layout does not fit" in refusal(capsys, path, "--gpu-memory", "22")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("llama3.1_8b_8xh100", ["--gpus", "16"], "not planned: it is for 8 GPUs, the plan for 16 GPUs."),
        ("mini_cpu", [], "not planned: it trains in float32, and plans are for bfloat16."),
        ("llama3.1_8b_8xh100", ["--longest", "9000"],
         "train.micro_batch_tokens is 4,608, the longest example has 9,000 tokens (--longest)"),
    ],
)  # fmt: skip
def test_why_a_recipes_layout_is_not_planned(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path, name: str, arguments: list[str], said: str
) -> None:
    found = plan_json(capsys, repository / "recipes" / f"{name}.yaml", *arguments)
    assert (found["recipe"]["plan"], found["recipe"]["fits"]) == (None, None)
    assert said in found["recipe"]["said"]
    assert found["plans"]


def test_fp8_is_not_planned(repository: Path, capsys: pytest.CaptureFixture[str], models: Path) -> None:
    found = plan_json(capsys, repository / "recipes" / "llama3.3_70b_64xh100_fp8.yaml")
    assert found["recipe"]["said"].endswith("58.1 of 80 GB. Planned in bf16, without what train.fp8 changes.")


def test_a_recipe_whose_model_is_not_there(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPKTO_MODELS", "/nowhere")
    said = refusal(capsys, repository / "recipes" / "llama3.1_8b_8xh100.yaml")
    assert "llama3.1_8b_8xh100.yaml:12: initial_model: expected a Hugging Face folder, found none at /nowhere" in said


def test_a_recipe_brings_its_own_work(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, repository / "recipes" / "mini_cpu.yaml", "--method", "rft")
    assert found["cluster"]["gpus"] == 2
    assert (found["work"]["examples"], found["work"]["global_batch"]) == (320 * 8, 64)
    assert (found["work"]["kl_share"], found["work"]["uses_reference"]) == (0.0, False)


PLANNED = re.compile(r"stepkto plan: (\d+) of 80 GB")
WITH_GPUS = sorted((REPOSITORY / "recipes").glob("*xh100*.yaml"))


@pytest.mark.parametrize("path", WITH_GPUS, ids=lambda path: path.stem)
def test_shipped_recipes_fit_and_say_their_memory(path: Path, capsys: pytest.CaptureFixture[str], models: Path) -> None:
    main(["plan", str(path), "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["recipe"]["fits"] is True
    work = found["work"]
    recipe = load_recipe(path)
    config, entries = read_model_config(recipe.given_model() or path)
    case = Scenario(config, entries, replace(PRESETS["h100"], gpus=recipe.train.parallel.ranks), Workload(**work),
                    Assumptions())  # fmt: skip
    check_layout(config, recipe.train)
    plan = make_plan(case, recipe.train)
    assert found["recipe"]["plan"]["peak_bytes"] == plan.peak
    for said in PLANNED.findall(path.read_text()):
        assert plan.peak / 1e9 == pytest.approx(float(said), abs=0.6)
    assert plan.peak <= 0.9 * 80e9


# --- judges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3.1_8b_8xh100", "qwen2.5_math_7b_8xh100"])
def test_a_reward_models_cost_by_hand(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path, name: str
) -> None:
    """60,000 solutions of 1,152 tokens, 979 of them in steps of 80, each with a mark; 30% of the peak of 8 GPUs."""
    [judge] = plan_json(capsys, repository / "recipes" / f"{name}.yaml")["judges"]
    length = 1152 + 979 / 80
    matrices = 28 * (3584 * (3584 + 512 + 512 + 3584) + 3 * 3584 * 18944)
    seconds = 60_000 * length * (2 * matrices + 28 * 2 * length * 3584) / (8 * 0.3 * 989e12)
    assert (judge["judge"], judge["unknown"], judge["gpus"]) == ("prm:Qwen2.5-Math-PRM-7B", "", 8)
    assert judge["read"] == pytest.approx(60_000 * length) and judge["written"] == 0
    assert judge["seconds"] == pytest.approx(seconds)
    assert judge["gpu_hours"] == pytest.approx(8 * seconds / 3600)
    assert judge["weights"] == 2 * 7_615_616_512
    assert judge["memory"] == pytest.approx(judge["weights"] + 16_384 * 2 * (4 * 3584 + 3 * 18_944) + 3e9)


def test_a_served_judges_cost_by_hand(repository: Path, capsys: pytest.CaptureFixture[str], models: Path) -> None:
    """What 8 solutions of a problem share is read once; two engines of four GPUs write as in sampling."""
    recipe = repository / "recipes" / "llama3.3_70b_64xh100_fp8.yaml"
    [judge] = plan_json(capsys, recipe)["judges"]
    response, prompt = 870, 1024 - 870
    steps = response / 80
    shared, own, answer = prompt + 271, response + 6 * steps, steps * (16 + 200 / 4)
    assert (judge["gpus"], judge["judge"]) == (8, "llm:Llama-3.3-70B-Instruct")
    assert judge["read"] == pytest.approx(60_000 * (shared / 8 + own))
    assert judge["written"] == pytest.approx(60_000 * answer)
    weights, cache = 2 * 70_553_706_496, 4 * 80 * 8 * 128 * (179 + shared + own + answer)
    sequences = (0.9 * 80e9 * 4 - weights) // cache
    assert sequences == 198
    assert judge["write_rate"] == pytest.approx(2 * sequences * 0.5 * 3350e9 * 4 / (weights + cache * sequences))
    assert judge["weights"] == weights / 4
    assert judge["seconds"] == pytest.approx(
        judge["read"] / judge["read_rate"] + judge["written"] / judge["write_rate"]
    )


def test_judges_of_a_plan_as_text(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    text = (repository / "recipes" / "llama3.3_70b_64xh100_fp8.yaml").read_text()
    path = tmp_path / "recipe.yaml"

    def plan(model: str, *arguments: str) -> str:
        path.write_text(text.replace("model: Llama-3.3-70B-Instruct", model))
        main(["plan", str(path), *arguments])
        return capsys.readouterr().out

    shown = plan("model: Llama-3.3-70B-Instruct")
    assert "Judging an iteration's 60,000 solutions (assumed, not measured: 80 tokens per step" in shown
    [row] = [line.split() for line in shown.splitlines() if line.startswith("llm:")]
    cells = ["8", "35.3", "72.0", "59.3M", "16,971", "43.1M", "9,227", "2.27", "18.1"]
    assert row == ["llm:Llama-3.3-70B-Instruct", *cells]
    assert f"llm:other: found no config.json of other at {models}/other: give its folder by --judge-model" in plan(
        "model: other"
    )
    assert "llm:other     8        35.3" in plan(
        "model: other", "--judge-model", str(models / "Llama-3.3-70B-Instruct")
    )
    assert "the length of its answers in format thinkprm is not known" in plan("model: other\n    format: thinkprm")


def test_the_folder_of_a_reward_model_may_be_given(
    repository: Path, capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    recipe, reward = repository / "recipes" / "llama3.1_8b_8xh100.yaml", tmp_path / "Qwen2.5-Math-PRM-7B"
    shutil.move(models / reward.name, reward)
    main(["plan", str(recipe)])
    assert "give its folder by --judge-model (it must be called Qwen2.5-Math-PRM-7B)" in capsys.readouterr().out
    main(["plan", str(recipe), "--judge-model", str(reward)])
    assert "found no config.json" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ("equations", [("equations", "it has no model: CPU only")]),
        (
            "{kind: combine, rule: first, judges: [equations, {kind: monte_carlo, sample: {max_tokens: 9}}]}",
            [("equations", "it has no model: CPU only"), ("monte_carlo:8", "")],
        ),
    ],
)
def test_judges_without_a_model_and_combined_ones(
    repository: Path, configs: Path, process: str, expected: list[tuple[str, str]]
) -> None:
    config, entries = read_model_config(configs / "llama3.1_8b")
    work = workload(samples=100)
    case = Scenario(config, entries, PRESETS["h100"], work, Assumptions())
    section = Judging.model_validate({"split": "line", "process": yaml.safe_load(process)})
    costs = judge_costs(section, case, 4, configs / "llama3.1_8b")
    assert [(cost.judge, cost.unknown) for cost in costs] == expected
    for cost in costs[1:]:
        assert cost.written == 100 * 10 * 8 * 800 / 2  # 10 steps, 8 completions of half a response each
