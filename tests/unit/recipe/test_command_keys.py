"""``--set`` of a key that the command does not read is refused; of one that it reads, never."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.cli import main as cli
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.command_keys import READS, check_overrides, is_read
from megatron_stepkto.recipe.file import load_judging, model_evaluation, read_recipe
from megatron_stepkto.run import stages as run_stages
from tests.conftest import REPOSITORY

MINI = REPOSITORY / "recipes" / "mini_cpu.yaml"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys that hold a value; of a section with several kinds, of the first."""
    for name, field in model.model_fields.items():
        inner = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        sections = [c for c in inner if issubclass(c, BaseModel) and c is not recipe.Import]
        if sections:
            yield from leaves(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


KEYS = sorted(leaves(recipe.Recipe))


def test_the_table_names_keys_that_exist_and_leaves_none_out() -> None:
    assert len(KEYS) > 100
    for command, keys in READS.items():
        for key in keys:
            assert key in KEYS or any(k.startswith(f"{key}.") for k in KEYS), f"{command} reads {key}, which is no key"
    unread = [key for key in KEYS if not any(is_read(command, key) for command in READS)]
    assert unread == ["iterations"], "only commands of a whole run read it, and they read every key"


class _Asked(Exception):
    pass


STAGES = ["problems", "sample", "judge", "dataset", "train", "export", "evaluate"]


@pytest.fixture
def stage_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Stage]:
    """The stage of a command, iteration 1, that would run by the recipe with these overrides."""
    stages: list[Stage] = []

    def ask(run: object, stage: Stage, *_: object, **__: object) -> None:
        stages.append(stage)
        raise _Asked

    monkeypatch.setattr(run_stages.Run, "run", ask)
    commands = {"evaluate": run_stages.evaluate_stage, "export": run_stages.convert_stage}

    def find(command: str, *overrides: str) -> Stage:
        run = run_stages.Run(read_recipe(MINI, [f"output={tmp_path}", *overrides]))
        with pytest.raises(_Asked):
            (run_stages.STAGES | commands)[command](run, 1)
        return stages[-1]

    return find


@pytest.mark.parametrize("command", STAGES)
def test_what_decides_a_stage_is_read(command: str, stage_of: Callable[..., Stage]) -> None:
    """The settings by which a stage knows itself again are the keys that it reads."""
    stage = stage_of(command)
    of = {"per_iteration": "problems.per_iteration", "source": "problems.source", "method": "train.method",
          "held_out_share": "problems.held_out_share"}  # fmt: skip
    for section, value in stage.settings.items():
        if section == "iteration":  # an option of the command
            continue
        for key in [f"{section}.{inner}" for inner in value] if isinstance(value, dict) else [section]:
            assert is_read(command, of.get(key, key)), f"{command} reads {key}"


@pytest.mark.parametrize("command", STAGES)
def test_what_decides_the_model_of_a_stage_is_read(
    command: str, stage_of: Callable[..., Stage], tmp_path: Path
) -> None:
    """Where a key changes which folders a stage reads, the commands of that stage take it with --set."""
    (tmp_path / "other").mkdir()
    before = stage_of(command).inputs
    for key, value in {
        "initial_model": tmp_path / "other", "warm_up.solutions": "[a.jsonl]", "train.lora.start": "adapter",
        "train.lora.rank": 8,
    }.items():  # fmt: skip
        new = ["warm_up.architecture=null", "warm_up.tokenizer=null", "warm_up.corpus_size=null"]
        given = [f"{key}={value}", *(new if key == "warm_up.solutions" else [])]
        if stage_of(command, *given).inputs != before:
            assert is_read(command, key), f"{command} reads {key}"


@pytest.mark.parametrize(
    ("command", "assignment"),
    [
        ("problems", "problems={source: files, train: a.jsonl}"),
        ("problems", "evaluate=null"),
        ("sample", "sample.workers=2"),
        ("judge", "judge.process.votes=3"),
        ("train", "train.optimizer.lr=1"),
        ("evaluate", "sample.max_tokens=9"),
        ("measure", "evaluate.num_problems=9"),
        ("run", "warm_up.corpus_size=9"),
        ("slurm submit", "dataset.max_tokens=9"),
        *((command, f"{key}=x") for command in ("sample", "judge", "train", "evaluate")
          for key in ("initial_model", "warm_up.solutions", "train.lora.start")),
        ("problems", "warm_up.solutions=[a.jsonl]"),
        ("export", "initial_model=m"),
        ("export", "warm_up.solutions=[a.jsonl]"),
        ("export", "train.lora.rank=8"),
        ("export", "train.dtype=bfloat16"),
        ("export-samples", "warm_up.solutions=[a.jsonl]"),
        ("warm-up", "train.lora.start=a"),
        ("warm-up", "train.dtype=bfloat16"),
        *(("prepare", key) for key in ("sample.max_tokens=9", "train.micro_batch_tokens=9", "train.method=dpo",
                                       "train.lora.start=a", "train.dtype=bfloat16", "evaluate.k=2")),
    ],
)  # fmt: skip
def test_keys_that_are_read(command: str, assignment: str) -> None:
    check_overrides(command, [assignment])


@pytest.mark.parametrize(
    ("command", "assignment", "readers"),
    [
        ("sample", "train.optimizer.lr=1", "`stepkto train`, `stepkto run`"),
        ("train", "sample.num_samples=4", "`stepkto sample`, `stepkto run`"),
        ("problems", "problems.held_out_share=0.1", "`stepkto dataset`, `stepkto warm-up`, `stepkto run`"),
        ("evaluate", "sample.temperature=0.5", "`stepkto sample`, `stepkto run`"),
        ("measure", "evaluate.split=dev", "`stepkto evaluate`, `stepkto warm-up`, `stepkto run`"),
        ("judge-eval", "dataset.max_tokens=9", "`stepkto dataset`, `stepkto warm-up`, `stepkto run`"),
    ],
)
def test_keys_that_are_not_read(command: str, assignment: str, readers: str) -> None:
    with pytest.raises(UserError) as caught:
        check_overrides(command, [assignment])
    key = assignment.partition("=")[0]
    assert str(caught.value) == (
        f"--set {assignment}: `stepkto {command}` does not read {key}; leave it out, or give it to {readers}"
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [("sample", "--quarantine=f"), ("train", "--allow-overlap"), ("dataset", "--from-scratch"),
     ("warm-up", "--from-scratch"), ("export", "--quarantine=f"), ("evaluate", "--allow-overlap")],
)  # fmt: skip
def test_options_that_would_do_nothing(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(MINI), option, *(["--iteration", "1"] if command != "warm-up" else [])])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_every_way_to_set_a_key_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("problems", "sample", "judge", "dataset", "export"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(MINI), "--iteration", "1", "--set", "train.epochs=2"])
        assert ended.value.code == 2
        assert f"`stepkto {command}` does not read train.epochs" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"`stepkto measure` does not read sample\.num_samples"):
        model_evaluation("m", False, ["sample.num_samples=2"])
    judge = tmp_path / "judge.yaml"
    judge.write_text("judge: {split: line, process: none}\n")
    with pytest.raises(UserError, match=r"`stepkto judge-eval` does not read sample\.max_tokens"):
        load_judging(judge, ["sample.max_tokens=9"])


def test_an_evaluation_of_a_folder_takes_the_first_problems_of_each_set(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def stop(stage: Stage, *_: Any, **__: Any) -> None:
        path = tmp_path / "out" / "asked" / "problems.jsonl"
        asked.append([json.loads(line)["problem_id"] for line in path.read_text().splitlines()])
        assert stage.settings["evaluate"]["num_problems"] == len(asked[-1])
        raise UserError("far enough")

    monkeypatch.setattr("megatron_stepkto.evaluation.folder.run_stage", stop)
    for name in ("a", "b"):
        rows = [{"id": n, "problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["measure", str(repository / "recipes" / "mini_cpu_m0"), "--force", "--output", str(tmp_path / "out")]
    command += [word for name in ("a", "b") for word in ("--data", str(tmp_path / f"{name}.jsonl"))]
    for options in ([], ["--limit", "2"], ["--set", "evaluate.num_problems=2"], ["--limit", "6"]):
        with pytest.raises(SystemExit):
            cli.main([*command, *options])
    assert [len(ids) for ids in asked] == [10, 4, 4]
    assert asked[1] == asked[2] == ["a/0", "a/1", "b/0", "b/1"]
    assert "a.jsonl: --limit (evaluate.num_problems) is 6, the data set has 5 problems; lower it" in " ".join(
        capsys.readouterr().err.split()
    )
