"""What a user gets for bad input: exit code 2, one clear message with the place and the fix, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_stepkto.base.locks import exclusive_lock
from tests.builders import write_llama

pytestmark = pytest.mark.end_to_end


def stepkto(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, cwd=cwd, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in parts:
        assert part in done.stderr, f"{part!r} is not in: {done.stderr}"


@pytest.fixture
def mini(repository: Path, tmp_path: Path) -> Path:
    """The demo's recipe in a folder of its own, beside its M0."""
    recipe = tmp_path / "mini.yaml"
    recipe.write_text((repository / "recipes" / "mini_cpu.yaml").read_text())
    (tmp_path / "mini_cpu_m0").symlink_to(repository / "recipes" / "mini_cpu_m0")
    return recipe


def test_recipe_faults(mini: Path, tmp_path: Path) -> None:
    refused(stepkto("run", tmp_path / "none.yaml", cwd=tmp_path), "none.yaml", "expected a recipe")
    text = mini.read_text().replace("  temperature: 1.0", "  temprature: 1.0")
    mini.write_text(text)
    line = text.splitlines().index("  temprature: 1.0") + 1
    refused(
        stepkto("run", mini, cwd=tmp_path),
        f"mini.yaml:{line}: unknown key sample.temprature; did you mean temperature?",
    )


def test_prompt_faults(mini: Path, tmp_path: Path) -> None:
    """One line and exit code 2: a job that ends with another code is tried again."""
    model = shutil.copytree(mini.parent / "mini_cpu_m0", tmp_path / "model")
    problems = tmp_path / "p.jsonl"
    rows = [{"problem_id": name, "problem": text, "answer": "2"} for name, text in (("a", "1 + 1?"), ("b", "2</s>?"))]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose = ("problems", mini, "--iteration", 1, "--set", f"problems={{source: files, train: {problems}}}",
              "--set", "evaluate=null", "--set", f"initial_model={model}")  # fmt: skip
    refused(stepkto(*choose, cwd=tmp_path), "p.jsonl:2: the problem holds the text of special tokens (</s>)")
    done = stepkto(*choose, "--quarantine", tmp_path / "aside", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_model_faults(mini: Path, tmp_path: Path) -> None:
    refused(stepkto("run", mini, "--set", "initial_model=nowhere", cwd=tmp_path), "initial_model", "nowhere")
    pickled = shutil.copytree(mini.parent / "mini_cpu_m0", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(stepkto("run", mini, "--set", f"initial_model={pickled}", cwd=tmp_path), "expected model.safetensors or")
    other = write_llama(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    done = stepkto("train", mini, "--iteration", 1, "--set", f"initial_model={other}", cwd=tmp_path)
    refused(done, "input train is missing")  # first things first: nothing was sampled yet
    data = tmp_path / "runs" / "mini_cpu" / "iteration_1" / "dataset"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text('{"no": "matter"}\n')
    done = stepkto("train", mini, "--iteration", 1, "--set", f"initial_model={other}", cwd=tmp_path)
    refused(done, "BertForMaskedLM", "LlamaForCausalLM")


def test_problem_file_faults_and_quarantine(mini: Path, tmp_path: Path) -> None:
    good = '{"problem_id": "a", "problem": "What is 1 + 1?", "answer": "2"}'
    files = ("--set", "problems.source=files", "--set", "problems.per_iteration=null", "--set", "evaluate=null")
    run = ("problems", mini, "--iteration", 1, *files)
    missing = stepkto(*run, "--set", f"problems.train={tmp_path / 'p.jsonl'}", cwd=tmp_path)
    refused(missing, "p.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good + "\n" + '{"problem_id": "b", "problem": \n' + '{"problem_id": "c", "answer": "1"}\n')
    refused(stepkto(*run, "--set", f"problems.train={bad}", cwd=tmp_path), "bad.jsonl:2", "broken JSON", "--quarantine")
    aside = tmp_path / "aside.jsonl"
    done = stepkto(*run, "--set", f"problems.train={bad}", "--quarantine", aside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["line"] for line in aside.read_text().splitlines()] == [2, 3]
    kept = (tmp_path / "runs" / "mini_cpu" / "iteration_1" / "problems" / "problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem_id"] for line in kept] == ["a"]


def test_import_faults(repository: Path, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "rows.jsonl", repository / "recipes" / "mini_cpu_m0"
    source.write_text('{"id": "r", "problem": "1 + 1?", "steps": [], "final_answer_correct": true}\n')
    run = ("import", "processbench", source, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    refused(stepkto(*run, cwd=tmp_path), "rows.jsonl:1")


def test_solutions_of_which_none_is_right_do_not_train(repository: Path, tmp_path: Path) -> None:
    rows = [
        {"id": n, "problem": f"Max has {20 + n} coins. Tom has {3 + n} more than Max. How many coins does Tom have?",
         "answer": str(23 + 2 * n), "model": "m", "correct": False,
         "response": f"Tom has {20 + n} + {3 + n} = {24 + 2 * n}.\nAnswer: \\boxed{{{24 + 2 * n}}}"}
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "name": "wrong", "initial_model": str(repository / "recipes" / "mini_cpu_m0"),
        "problems": {"source": "imports", "imports": [{"format": "gsm8k_solutions", "path": "wrong.jsonl"}]},
        "train": {"optimizer": {"lr": 1e-4}, "global_batch_size": 2},
    }  # fmt: skip
    (tmp_path / "wrong.yaml").write_text(json.dumps(keys))
    done = stepkto("run", "wrong.yaml", cwd=tmp_path)
    refused(
        done,
        "warning: import: all 6 judged answers are wrong",
        "judged.jsonl: step_kto learns from right against wrong, and nothing is right: 0 right and 6 wrong answers",
    )
    assert not (tmp_path / "runs/wrong/iteration_1/train").exists()
    assert stepkto("report", "runs/wrong", cwd=tmp_path).returncode == 0
    assert "all 6 judged answers are wrong</li>" in (tmp_path / "runs/wrong/report.html").read_text()


def test_changed_recipe_is_refused_with_the_difference(mini: Path, tmp_path: Path) -> None:
    run = ("problems", mini, "--iteration", 1)
    assert stepkto(*run, "--set", "problems.per_iteration=3", cwd=tmp_path).returncode == 0
    refused(stepkto(*run, "--set", "problems.per_iteration=4", cwd=tmp_path), "per_iteration: was 3, is 4", "--force")
    assert stepkto(*run, "--set", "problems.per_iteration=4", "--force", cwd=tmp_path).returncode == 0


def test_a_recipe_of_imports_has_no_sampling(repository: Path, tmp_path: Path) -> None:
    recipe = repository / "recipes" / "gsm8k_offline_cpu.yaml"
    for stage in ("problems", "sample"):
        refused(stepkto(stage, recipe, "--iteration", 1, cwd=tmp_path), "problems.source is imports")


def test_places_that_cannot_be_written(mini: Path, repository: Path, tmp_path: Path) -> None:
    refused(stepkto("problems", mini, "--iteration", 1, "--set", "output=/dev/null", cwd=tmp_path), "/dev/null")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    for tool in ("hf_to_megatron.py", "megatron_to_hf.py"):
        done = subprocess.run(
            [sys.executable, str(repository / "tools" / tool), str(repository / "recipes" / "mini_cpu_m0"), "mine"],
            capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        )  # fmt: skip
        refused(done, "mine: already there")
    assert (tmp_path / "mine" / "precious").read_text() == "x"


def test_two_runs_of_one_folder(mini: Path, tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "runs" / "mini_cpu" / ".lock", "the run"):
        refused(stepkto("run", mini, cwd=tmp_path), "is being written by another process")


def test_other_commands(tmp_path: Path) -> None:
    refused(stepkto("report", tmp_path / "nowhere", cwd=tmp_path), "nowhere")
    refused(stepkto("status", tmp_path / "nowhere", cwd=tmp_path), "nowhere")
    refused(stepkto("nonsense", cwd=tmp_path), "nonsense")
    assert stepkto("--help", cwd=tmp_path).returncode == 0
