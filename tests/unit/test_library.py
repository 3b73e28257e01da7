"""The package as a library: what an import costs, the exports, silence, and the examples of docs/library.md."""

from __future__ import annotations

import ast
import doctest
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import megatron_stepkto as sk
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar, console, say, show_messages, warn

HEAVY = {"torch", "megatron", "vllm", "transformers", "sympy", "numpy", "pydantic", "rich"}


def imported_by(*lines: str) -> set[str]:
    """Those of HEAVY that a fresh process has imported after the lines."""
    script = ["import json, sys, megatron_stepkto as sk", *lines, "print(json.dumps(sorted(sys.modules)))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout)} & HEAVY


def test_what_imports_cost(repository: Path) -> None:
    assert imported_by("dir(sk); sk.__version__") == set()
    light = ("sk.judge_answer('18 dollars', '18')", "sk.label_steps('2 + 2 = 4')",
             f"sk.load_recipe({str(repository / 'recipes' / 'mini_cpu.yaml')!r})")  # fmt: skip
    assert imported_by(*light) <= {"numpy", "pydantic", "rich"}
    assert not imported_by("sk.step_kto_loss, sk.linear_log_probs, sk.convert") & {"megatron", "vllm", "transformers"}


def test_exports_are_lazy_and_seen_by_type_checkers() -> None:
    tree = ast.parse(Path(sk.__file__).read_text())
    [checked] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "mypy takes `import x as x` for an export"
            typed[alias.name] = node.module
    assert typed == sk._HOME
    assert set(sk.__all__) == {*typed, "__version__"} <= set(dir(sk))
    for name in sk.__all__:
        assert getattr(sk, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'judge_anwser'"):
        sk.judge_anwser  # noqa: B018


@pytest.mark.filterwarnings("error")
def test_messages_and_bars_are_of_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", True)
    monkeypatch.setattr(console, "_force_terminal", True)
    say("a message")
    with ProgressBar("work", 2, "rows") as bar:
        bar.update(2)
    with pytest.warns(UserWarning, match="^a warning$"):
        warn("a warning")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "_force_terminal", False)
    show_messages()
    say("a message")
    warn("a warning")
    with ProgressBar("work", 2, "rows") as bar:
        bar.update(2)
    said = capsys.readouterr().err
    assert said.startswith("a message\nwarning: a warning\nwork: 2/2 rows")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sk.judge_answer("18", 18), "gold: expected a text (str), got 18 (int)"),  # type: ignore[arg-type]
        (lambda: sk.judge_answer(None, "18"), "text: expected a text (str), got None"),  # type: ignore[arg-type]
        (lambda: sk.judge_answers(["1"], ["1", "2"]), "two lists of the same length"),
        (lambda: sk.judge_answers("12", "12"), "two lists of the same length"),
        (lambda: sk.label_steps("1 + 1 = 2", "equation"), "rule: expected one of chained_arithmetic, equations, none"),
        (lambda: sk.label_steps("1 + 1 = 2", split="lines"), "expected one of line"),  # type: ignore[arg-type]
        (lambda: sk.label_steps("1 + 1 = 2", "chained_arithmetic"), 'expected "<name> has'),
        (lambda: sk.convert("nowhere", "there"), "nowhere: expected a Hugging Face folder"),
        (lambda: sk.load_recipe("nowhere.yaml"), "nowhere.yaml: expected a recipe"),
    ],
)
def test_input_that_cannot_be_used(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        call()  # type: ignore[operator]
    assert type(caught.value) is sk.UserError is UserError


def test_labels_join_to_the_text() -> None:
    text = "## Step 1\n2 + 2 = 4\n## Step 2\n4 * 3 = 13\n"
    steps = sk.label_steps(text, split="step_heading")
    assert "".join(step.text for step in steps) == text
    assert [step.label for step in steps] == [1, 0]
    chained = "Max has 27 coins. Tom has 2 more than Max. How many does Tom have?"
    steps = sk.label_steps("Tom has 27 + 2 = 29.\nAnswer: \\boxed{29}", "chained_arithmetic", problem=chained)
    assert [label for _, label in steps] == [1, None]
    assert [label for _, label in sk.label_steps("1 = 1\n2 = 3", "none")] == [None, None]


def test_the_examples_of_the_documentation(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    monkeypatch.chdir(tmp_path)
    page = (repository / "docs" / "library.md").read_text()
    blocks = re.findall(r"```pycon\n(.*?)```", page, re.DOTALL)
    source = "".join(blocks)
    shown = set(re.findall(r"sk\.(\w+)", source))
    named = shown | set(re.findall(r"`(\w+)`", page))
    assert set(sk.__all__) - {"__version__", "LossSum", "PooledMean", "ReferencePoints", "UserError"} <= named
    test = doctest.DocTestParser().get_doctest(source, {}, "docs/library.md", "docs/library.md", 0)
    assert len(test.examples) > 25
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert results.failed == 0, "".join(told)


def swallows_user_errors(node: ast.Try) -> bool:
    """Does a clause for ValueError catch a UserError that the block itself raises?"""
    raises = any(
        isinstance(inner, ast.Raise) and "UserError" in ast.dump(inner)
        for part in node.body
        for inner in ast.walk(part)
    )
    for handler in node.handlers:
        caught = ast.dump(handler.type) if handler.type else ""
        if "'UserError'" in caught:
            return False
        if "'ValueError'" in caught:
            return raises
    return False


def test_no_clause_for_value_errors_swallows_a_user_error(repository: Path) -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in sorted((repository / "megatron_stepkto").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Try) and swallows_user_errors(node)
    ]
    assert not found
