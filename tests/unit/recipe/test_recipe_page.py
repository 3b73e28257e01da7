"""docs/recipe.md lists every key with the default and the meaning that the code has."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.templates import TEMPLATES

Row = tuple[str, str, str]  # key, default, meaning


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Heading and model of a section and of all below it; each model once, at its first place."""
    yield path or "The whole recipe", model
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        for each in inner:
            kind = "" if len(inner) == 1 else ", kind: " + typing.get_args(each.model_fields["kind"].annotation)[0]
            yield from sections(each, f"{path}.{name}".lstrip(".") + kind)


def default_of(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "as below"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {text: name for name, text in TEMPLATES.items()}.get(str(value), str(value))


def expected() -> dict[str, list[Row]]:
    found: dict[type[BaseModel], tuple[str, list[Row]]] = {}
    for heading, model in sections(recipe.Recipe):
        rows = [(name, default_of(field), field.description or "") for name, field in model.model_fields.items()]
        found.setdefault(model, (heading, rows))
    return dict(found.values())


def documented(page: str) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, *lines = part.splitlines()
        cells = [
            tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines if line.startswith("| `")
        ]
        found[heading.strip("`")] = [(row[0].strip("`"), row[1].strip("`"), *row[2:]) for row in cells]
    return found


def test_every_key_is_in_the_page(repository: Path) -> None:
    page = documented((repository / "docs" / "recipe.md").read_text())
    assert {heading: [row[:3] for row in rows] for heading, rows in page.items()} == expected()
    unexplained = [
        f"{heading}.{row[0]}" for heading, rows in page.items() for row in rows if len(row) != 4 or not row[3]
    ]
    assert not unexplained, "no reason to change them"
