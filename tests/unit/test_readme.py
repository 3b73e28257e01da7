"""The README's tree, keys and example recipe. Its links and commands: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Loss


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def test_the_tree(readme: str, repository: Path) -> None:
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


def test_recipe_keys_of_the_loss_page(repository: Path) -> None:
    page = (repository / "docs" / "loss.md").read_text()
    for key in ("step_reduction", "reference_point", "step_weight", "beta_outcome", "beta_step"):
        assert f"`{key}" in page
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
    loaded = read_recipe(recipe)
    assert loaded.problems.source == "files"
    assert loaded.prompt.chat
    assert loaded.warm_up is None
