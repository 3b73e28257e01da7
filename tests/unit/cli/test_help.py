"""``stepkto --help`` and that of each command, and the spellings that moved to commands of their own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_stepkto.cli.main import main, make_parser

GROUPS = {
    "a run": ["init", "run", "prepare", "warm-up", "status", "report"],
    "stages of a run, one at a time": ["problems", "sample", "judge", "dataset", "train", "export", "evaluate"],
    "models": ["convert", "measure", "compare-evaluations", "compare-logprobs", "plan"],
    "judges and answers": ["check-answers", "judge-eval"],
    "a cluster": ["slurm", "doctor"],
    "records": ["import", "export-samples"],
}
COMMANDS = [*(name for names in GROUPS.values() for name in names), "slurm submit", "slurm status", "slurm cancel"]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_page_of_all_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = shown(capsys)
    groups = {title: re.findall(r"^  ([a-z-]+) +\S", body, re.M) for title, body in
              re.findall(r"^([a-z][a-z ,]*):\n((?:  [a-z].*\n)+)", page, re.M)}  # fmt: skip
    assert groups == GROUPS
    assert len(page.splitlines()) <= 42
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does_and_shows_a_line_that_it_takes(
    command: str, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    page = shown(capsys, *command.split())
    assert re.match(rf"usage: stepkto {command} ", page)
    assert re.search(r"\n\n[A-Z][^\n]*[.)]\n", page)
    [line] = re.findall(r"^example:\n  (.*)$", page, re.M)
    words = shlex.split(line)
    words = words[words.index("stepkto") + 1 :]
    assert " ".join(words).startswith(f"{command} ")
    assert make_parser().parse_args(words).command is not None
    for word in words:
        if word.startswith("recipes/"):
            assert (repository / word).exists()


def test_slurm_scripts_name_commands_that_exist(repository: Path) -> None:
    """As test_docs.py does for the documentation."""
    scripts = sorted((repository / "slurm").glob("*.s*"))
    named = {(name, page.name) for page in scripts for name in re.findall(r"^ *launch .*stepkto ([a-z-]+)",
                                                                         page.read_text(), re.M)}  # fmt: skip
    assert {("export", "convert.sbatch"), ("evaluate", "evaluate.sbatch"), ("train", "train.sbatch")} <= named
    assert {name for name, _ in named} <= {name for names in GROUPS.values() for name in names}


@pytest.mark.parametrize(
    ("words", "now"),
    [
        ("convert mini.yaml --iteration 1", "export RECIPE --iteration T"),
        ("convert mini.yaml --it=1 --force", "export RECIPE --iteration T"),
        ("convert --set train.method=kto mini.yaml", "export RECIPE --iteration T"),
        ("convert mini.yml --method kto", "export RECIPE --iteration T"),
        ("evaluate . --data math500.jsonl --output out", "measure MODEL --data FILE --output DIR"),
        ("evaluate . --set sample.max_tokens=9", "measure MODEL --data FILE --output DIR"),
        ("evaluate --limit 3 nowhere", "measure MODEL --data FILE --output DIR"),
        ("evaluate mini.yaml --iteration 1 --out x", "measure MODEL --data FILE --output DIR"),
    ],
)
def test_a_moved_spelling_is_refused_with_the_new_one(
    words: str, now: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith(f"moved to a command of its own: `stepkto {now}`\n")
    assert not list(tmp_path.iterdir())
