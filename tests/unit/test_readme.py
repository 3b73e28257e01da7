"""The README's commands, targets, files and keys exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_stepkto.cli.main import _parser
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.recipe.file import load_recipe
from megatron_stepkto.recipe.keys import Loss


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def test_make_targets(readme: str, repository: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z0-9-]*)", readme)) - {"and"}
    assert {"demo", "test", "compare", "gsm8k", "figures"} <= named
    assert named <= targets


def test_commands(readme: str) -> None:
    commands = next(action.choices for action in _parser()._actions if action.choices)
    assert commands is not None
    named = {word for match in re.findall(r"stepkto ([a-z|-]+)", readme) for word in match.split("|")} - {""}
    assert {"run", "status", "import", "evaluate"} <= named
    assert named <= set(commands)
    assert set(re.search(r"--compare ([a-z,]+)", readme)[1].split(",")) < set(METHODS)  # type: ignore[index]


def test_linked_and_listed_files(readme: str, repository: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert len(links) >= 5
    for link in links:
        assert (repository / link).exists(), link
    tree = readme[readme.index("## The tree") :]
    tree = tree[tree.index("```") + 4 :]
    tree = tree[: tree.index("```")]
    folder = Path()
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0:1] if not line.startswith(" ") else [line.strip().split("   ")[0]]
        for name in re.findall(r"[\w./]+(?:\.\w+|/)", names[0]):
            if not line.startswith(" "):
                folder = Path(name) if name.endswith("/") else Path()
                assert (repository / name).exists(), name
            else:
                assert (repository / folder / name).exists(), folder / name


def test_recipe_keys_of_the_loss_section(readme: str) -> None:
    for key in ("step_reduction", "reference_point"):
        assert f"`{key}" in readme
        assert key in Loss.model_fields


def test_the_example_recipe_loads(readme: str, repository: Path, tmp_path: Path) -> None:
    """What the README says to set in a copy of the demo's recipe is a recipe."""
    [example] = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    changed = {line.strip().split(":")[0]: line.strip() for line in example.splitlines() if line.strip()}
    kept, skip = [], False
    for line in (repository / "recipes" / "mini_cpu.yaml").read_text().splitlines():
        if not line.startswith((" ", "#")):
            skip = line.split(":")[0] in {*changed, "warm_up"}
        if not skip:
            kept.append(line)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("\n".join([*kept, *changed.values()]) + "\n")
    loaded = load_recipe(recipe)
    assert loaded.problems.source == "files"
    assert loaded.prompt.chat
    assert loaded.warm_up is None
