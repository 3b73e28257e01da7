"""The README's tree, and the keys of the page on the loss. Its links and commands: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
        assert f"`train.loss.{key}" in page
        assert key in Loss.model_fields
