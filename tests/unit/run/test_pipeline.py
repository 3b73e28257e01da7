from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_stepkto.base import dtypes
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.records import write_records
from megatron_stepkto.base.stage import Stage, run_stage
from megatron_stepkto.cli import main as cli
from megatron_stepkto.recipe import file as recipe_file
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Loss, Optimizer, Parallel, Training
from megatron_stepkto.run import pipeline, refusals
from megatron_stepkto.run import stages as run_stages
from megatron_stepkto.run.folder import Run, RunFolder
from megatron_stepkto.run.pipeline import compared_rows, prepare, run_all
from megatron_stepkto.run.stage_keys import dataset_key, training_key
from megatron_stepkto.run.stages import (
    check_fits,
    dataset_stage,
    drawing_of,
    evaluation_drawing_of,
    evaluation_problems_stage,
    merge_stage,
    problems_stage,
    sample_stage,
    training_of,
)
from megatron_stepkto.sampling import draw
from tests.builders import evaluation_row, write_adapter, write_llama
from tests.unit.methods.test_select import sample


def training(**changes: object) -> Training:
    return Training.model_validate({"optimizer": Optimizer(lr=1e-3), "global_batch_size": 8, **changes})


def test_what_does_not_decide_the_weights_makes_nothing_stale() -> None:
    key = training_key(training())
    assert training_key(training(timeout_s=9.0, keep_checkpoints=5, max_gap=1.0)) == key
    assert training_key(training(loss=Loss(nll_weight=3.0, dpo_beta=9.0))) == key
    assert training_key(training(loss=Loss(beta_step=9.0))) != key
    assert training_key(training(micro_batch_tokens=99, parallel=Parallel(ranks=4, tensor=2), recompute=True)) == key
    assert training_key(training(dtype="bfloat16")) != key
    assert training_key(training(parallel=Parallel(ranks=2, distributed_optimizer=True))) != key
    dpo = training_key(training(method="dpo"))
    assert training_key(training(method="dpo", loss=Loss(beta_step=9.0))) == dpo
    assert training_key(training(method="dpo", loss=Loss(dpo_beta=9.0))) != dpo


@pytest.mark.parametrize(
    ("begun", "changed", "said"),
    [
        ({}, {"parallel": {"ranks": 2, "distributed_optimizer": True}}, "distributed_optimizer: was False, is True"),
        ({}, {"optimizer": {"lr": 1e-3, "offload": 0.5}, "parallel": {"distributed_optimizer": True}},
         "optimizer.offload: was not given, is 0.5"),
        ({"optimizer": {"lr": 1e-3, "offload": 0.5}}, {}, "optimizer.offload: was 0.5, is not given"),
        ({}, {"optimizer": {"lr": 1e-3, "moment_dtype": "bfloat16"}},
         "optimizer.moment_dtype: was not given, is 'bfloat16'"),
        ({}, {"optimizer": {"lr": 1e-3, "gradient_dtype": "bfloat16"}},
         "optimizer.gradient_dtype: was not given, is 'bfloat16'"),
    ],
)  # fmt: skip
def test_a_training_does_not_resume_with_another_form_of_the_optimizer(
    tmp_path: Path, begun: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    shared = (
        {"dtype": "bfloat16", "parallel": {"distributed_optimizer": True}} if begun or "optimizer" in changed else {}
    )

    def stage(changes: dict[str, Any]) -> Stage:
        return Stage("train", tmp_path / "train", {"train": training_key(training(**{**shared, **changes}))}, {})

    run_stage(stage(begun), lambda: None)
    (tmp_path / "train" / "checkpoint").mkdir()  # of an attempt that was killed
    with pytest.raises(UserError) as caught:
        run_stage(stage(changed), lambda: pytest.fail("resumed"))
    assert f"settings.train.{said}\n" in str(caught.value)
    # another layout resumes
    other = {**begun, "recompute": True, "offload_layers": 0, "micro_batch_tokens": 99}
    assert run_stage(stage(other), lambda: None) == {}


def test_dataset_key() -> None:
    base = recipe.Dataset()
    other_pairs = recipe.Dataset(pairs_per_problem=9)
    assert dataset_key(other_pairs, "step_kto") == dataset_key(base, "step_kto")
    assert dataset_key(other_pairs, "dpo") != dataset_key(base, "dpo")
    assert dataset_key(recipe.Dataset(kl_pair_share=0.5), "rft") == dataset_key(base, "rft")
    assert dataset_key(recipe.Dataset(kl_pair_share=0.5), "kto") != dataset_key(base, "kto")


def test_compared_rows_are_found_on_disk(tmp_path: Path) -> None:
    for name in ("evaluate/M0", "methods/kto/evaluate/M1", "methods/kto/evaluate/M2", "methods/rft/iteration_1"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("evaluate/M0", "methods/kto/evaluate/M1"):
        (tmp_path / name / "metrics.json").write_text(json.dumps(evaluation_row(name[-2:])))
    assert compared_rows(RunFolder(tmp_path)) == {"kto": [evaluation_row("M0"), evaluation_row("M1")]}
    last = tmp_path / "methods/rft/evaluate/M3"  # M1 and M2 were not measured
    last.mkdir(parents=True)
    (last / "metrics.json").write_text(json.dumps(evaluation_row("M3")))
    assert compared_rows(RunFolder(tmp_path))["rft"] == [evaluation_row("M0"), evaluation_row("M3")]


@pytest.mark.parametrize(
    ("from_scratch", "sets", "expected"),
    [
        (False, [], ["evaluation", "problems 1", "problems 2", "check"]),
        (False, ["warm_up={solutions: [s.jsonl], training: {optimizer: {lr: 1.0e-3}, global_batch_size: 2}}"],
         ["evaluation", "problems 1", "problems 2", "check", "M0"]),
        # what an earlier attempt left as M0 may be of another architecture
        (True, [], ["tokenizer", "evaluation", "problems 1", "problems 2", "M0", "check"]),
    ],
)  # fmt: skip
def test_problems_are_looked_at_before_m0_is_trained(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, from_scratch: bool, sets: list[str],
    expected: list[str],
) -> None:  # fmt: skip
    done: list[str] = []
    monkeypatch.setattr(pipeline.warm_up, "tokenizer_stage", lambda _: done.append("tokenizer"))
    monkeypatch.setattr(pipeline.warm_up, "make_m0", lambda _: done.append("M0"))
    monkeypatch.setattr(pipeline, "evaluation_problems_stage", lambda _: done.append("evaluation"))
    monkeypatch.setattr(pipeline, "problems_stage", lambda _, t: done.append(f"problems {t}"))
    monkeypatch.setattr(refusals, "check_prepared", lambda *_: done.append("check"))
    given = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}", "iterations=2", *sets])
    prepare(Run(given, from_scratch=from_scratch))
    assert done == expected


def test_the_data_set_of_an_iteration_leaves_out_what_its_file_names(tmp_path: Path, repository: Path) -> None:
    """The file is an input: its content counts, and only in its iteration."""
    given = [f"output={tmp_path}", "problems.per_iteration=16"]

    def build(t: int, *more: str, force: bool = False) -> list[str]:
        dataset_stage(Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", [*given, *more]), force=force), t)
        return sorted(e.example_id for e in Examples.open(folder.stage("dataset", t) / "train"))

    folder = RunFolder(tmp_path / "mini_cpu")
    for t in (1, 2):
        folder.judged(t).parent.mkdir(parents=True)
        rows = [sample(p, n, n % 2, [n % 2], [5] * 3) for p in "pq" for n in range(2)]
        write_records(folder.judged(t), rows)
    assert build(1) == build(2) == ["p/0", "p/1", "q/0", "q/1"]
    file = tmp_path / "bad.txt"
    file.write_text("p/1\n")
    exclude = f"dataset.exclude.2={file}"
    assert build(1, exclude) == ["p/0", "p/1", "q/0", "q/1"]
    with pytest.raises(UserError, match=r"inputs\.exclude: was not given, is"):
        build(2, exclude)
    assert build(2, exclude, force=True) == build(2, exclude) == ["p/0", "q/0", "q/1"]
    file.write_text("p/1\nq/0\n")
    with pytest.raises(UserError, match=r"inputs\.exclude\.sha256"):
        build(2, exclude)
    file.unlink()
    with pytest.raises(UserError, match="iteration 2 dataset: input exclude is missing"):
        build(2, exclude)
    missing = refusals.machine_refusals(Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", [*given, exclude])))
    assert missing[0] == (
        f"inputs: --set {exclude}: dataset.exclude.2: expected a file of sample ids, found none at {file}; correct the "
        "path, or remove the key"
    ), "before anything is sampled"
    with pytest.raises(UserError, match=r"dataset\.exclude\.0"):
        build(2, f"dataset.exclude.0={file}")


@pytest.mark.parametrize("compared", [None, "kto"])
def test_the_advice_on_a_number_that_is_not_finite_is_commands_that_work(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, compared: str | None
) -> None:
    """Written as they stand: the data set without the records is made, and the training takes it."""
    recipe_path, file = repository / "recipes" / "mini_cpu.yaml", tmp_path / "bad.txt"
    file.write_text("p/1\n")
    loaded = read_recipe(recipe_path, [f"output={tmp_path}"])
    run = Run(loaded, compared=compared)
    run.folder.judged(2).parent.mkdir(parents=True)
    write_records(run.folder.judged(2), [sample(p, n, n % 2, [n % 2], [5] * 3) for p in "pq" for n in range(2)])
    dataset_stage(run, 2)
    trained: list[tuple[Run, int]] = []
    whole: list[Run] = []
    monkeypatch.setitem(run_stages.STAGES, "train", lambda run, t: trained.append((run, t)))
    monkeypatch.setattr("megatron_stepkto.run.pipeline.run_all", lambda run, _: whole.append(run) or {"iterations": []})
    monkeypatch.setattr("megatron_stepkto.report.page.write_report", lambda _: None)

    def follow(command: str) -> None:
        words = command.replace("RECIPE", str(recipe_path)).replace("FILE", str(file)).replace("=LR", "=1e-9").split()
        assert words.pop(0) == "stepkto"
        cli.main([*words, "--set", f"output={tmp_path}"])

    advice = run_stages.not_finite(run, 2)
    start, exclude, dataset, train = re.findall("`(.+?)`", advice.without_records)
    for command in (dataset, train, f"{start} {exclude}", " ".join(re.findall("`(.+?)`", advice.lower_rate))):
        follow(command)
    examples = Examples.open(run.folder.stage("dataset", 2) / "train")
    assert sorted(e.example_id for e in examples) == ["p/0", "q/0", "q/1"]
    assert [(each.folder, t, each.force) for each, t in trained] == [(run.folder, 2, True)]
    assert [each.recipe.dataset.exclude for each in whole] == [{"2": file}, {}]
    assert [each.recipe.train.optimizer.lr == 1e-9 for each in whole] == [False, True]
    assert all(each.force for each in whole)


def test_a_summary_stays_until_a_stage_works(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(size: int, force: bool = False) -> Run:
        changes = [f"output={tmp_path}", "iterations=1", f"problems.per_iteration={size}", "evaluate.num_problems=4"]
        return Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", changes), force=force)

    monkeypatch.setattr(refusals, "machine_refusals", lambda *_, **__: [])
    prepare(run(4))
    summary = run(4).folder.summary
    summary.write_text("{}")
    prepare(run(4))
    with pytest.raises(UserError, match="was finished with another configuration"):
        run_all(run(5), [])
    assert summary.is_file(), "a refusal changes nothing"
    problems_stage(run(5, force=True), 1)
    assert not summary.exists(), "it is of stages that are no longer there"


def test_a_run_with_adapters_trains_one_of_m0_and_reads_no_other_model(tmp_path: Path, repository: Path) -> None:
    model = write_llama(tmp_path / "model", num_hidden_layers=1)
    start = write_adapter(tmp_path / "start", model, 16, 32)

    def run(*changes: str) -> Run:
        path = repository / "recipes" / "mini_cpu.yaml"
        given = [f"initial_model={model}", f"output={tmp_path}", "train.reference=initial", *changes]
        return Run(recipe_file.read_recipe(path, given))

    new, full = run("train.lora={rank: 16, alpha: 32}"), run()
    inputs = {t: training_of(new, t).inputs for t in (1, 2)}
    assert inputs[1].keys() == {"model", "train"}
    assert inputs[2].keys() == {"model", "train", "adapter"}
    assert inputs[1]["model"] == inputs[2]["model"] == model == new.model(0)
    assert inputs[2]["adapter"] == new.folder.model(1).parent / "adapter"
    assert training_of(full, 2).inputs["reference"] == model
    assert training_of(full, 2).inputs["model"] == full.folder.model(1)

    with pytest.raises(UserError, match=r"train: reference: initial goes with a new adapter"):
        run(f"train.lora={{rank: 16, alpha: 32, start: {start}}}")
    previous = "train.reference=previous"
    new = run("train.lora={rank: 16, alpha: 32}", previous)
    continued = run(f"train.lora={{rank: 16, alpha: 32, start: {start}}}", previous)
    assert training_of(continued, 1).inputs["adapter"] == start
    assert training_of(continued, 1).inputs["model"] == model
    assert training_of(continued, 1).settings == training_of(new, 1).settings  # its content counts, as an input
    assert continued.model(0) != model
    merge_stage(continued)
    weights, before = (load_file(folder / "model.safetensors") for folder in (continued.model(0), model))
    assert sum(not torch.equal(weights[name], before[name]) for name in before) == 7
    check_fits(model, continued.recipe)
    with pytest.raises(UserError, match=r"start: its rank is 16, train\.lora\.rank is 8; make them equal"):
        check_fits(model, run(f"train.lora={{rank: 8, alpha: 32, start: {start}}}", previous).recipe)
    with pytest.raises(UserError, match=r"train\.lora\.targets: the model has no linear layer query that can"):
        check_fits(model, run("train.lora={targets: [q_proj, query]}").recipe)


def test_a_model_that_does_not_fit_the_layout_is_refused_before_sampling(tmp_path: Path, repository: Path) -> None:
    model = write_llama(tmp_path / "model")  # 4 layers, 4 heads, 2 key-value heads

    def with_layout(ranks: int, tensor: int, pipeline: int) -> recipe.Recipe:
        layout = f"train.parallel={{ranks: {ranks}, tensor: {tensor}, pipeline: {pipeline}}}"
        return recipe_file.read_recipe(repository / "recipes" / "mini_cpu.yaml", [layout])

    check_fits(model, with_layout(4, 2, 2))
    with pytest.raises(
        UserError, match=r"train\.parallel\.tensor = 4 does not divide the model's key-value heads \(2\)"
    ):
        check_fits(model, with_layout(4, 4, 1))
    with pytest.raises(UserError, match=r"train\.parallel\.pipeline = 3 does not divide the model's layers \(4\)"):
        check_fits(model, with_layout(3, 1, 3))


@pytest.fixture
def halves(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniature's M0 in bfloat16, on a processor that has units for it."""
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: {"avx512_bf16"})
    folder = tmp_path / "halves"
    shutil.copytree(repository / "recipes" / "mini_cpu_m0", folder)
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def test_force_with_another_model_chooses_the_dtype_anew(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(drawing: Any) -> None:
        raise Stop

    monkeypatch.setattr(draw, "_draw_missing", stop)
    for model, force, dtype in ((None, False, "float32"), (halves, False, None), (halves, True, "bfloat16")):
        sets = [f"output={tmp_path}", "sample.dtype=auto", "problems.per_iteration=4"]
        more = [] if model is None else [f"initial_model={model}", "train.dtype=bfloat16"]
        run = Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", sets + more), force=force)
        problems_stage(run, 1)
        with pytest.raises(UserError if dtype is None else Stop):
            sample_stage(run, 1)
        if dtype is not None:
            assert json.loads((run.folder.stage("sample", 1) / "dtype.json").read_text())["dtype"] == dtype


def test_all_models_of_a_run_are_sampled_in_one_dtype(repository: Path, tmp_path: Path, halves: Path) -> None:
    """M0 is a folder in bfloat16; those that training in float32 writes are in float32."""
    for trained_in in ("float32", "bfloat16"):
        sets = [f"output={tmp_path / trained_in}", "sample.dtype=auto", f"train.dtype={trained_in}",
                "problems.per_iteration=4", "evaluate.num_problems=4"]  # fmt: skip
        run = Run(read_recipe(repository / "recipes" / "mini_cpu.yaml", sets))
        problems_stage(run, 1)
        evaluation_problems_stage(run)
        folders = (halves, repository / "recipes" / "mini_cpu_m0")
        chosen = [
            drawing.job.settings.dtype
            for model in folders
            for drawing in (drawing_of(run, 1, model), evaluation_drawing_of(run, 1, model))
        ]
        assert chosen == 4 * [trained_in]
