"""Reading a recipe: one YAML file that is one complete run.

An unknown key, a wrong type or a value out of range is an error that names file and line, and for a misspelt key the
nearest one. ``--set section.key=value`` overrides a key. ``${NAME}`` and ``${NAME:-default}`` read the environment;
as in a shell, an empty variable takes the default. ``$${`` is the text ``${``.
Types are strict: neither ``true`` nor ``"3"`` is a whole number.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.command_keys import check_overrides
from megatron_stepkto.recipe.keys import Judging, ProcessJudge, Recipe, Sampling, nearest_place
from megatron_stepkto.recipe.model_evaluation import ModelEvaluation
from megatron_stepkto.recipe.section import training_only, without_tags
from megatron_stepkto.recipe.yaml_text import BadYAML, read_yaml

M = TypeVar("M", bound=BaseModel)
# What an evaluation of other problems leaves out of a recipe: how training samples are drawn, and its own problems.
_NOT_MEASURED = {"sample": training_only(Sampling), "evaluate": frozenset({"split", "num_problems", "models"})}
_VARIABLE = re.compile(r"(\$\$\{)|\$\{(\w+)(?::-([^}]*))?\}")


def _expand(text: str, path: Path, line: int) -> str:
    def replace(match: re.Match[str]) -> str:
        escaped, name, default = match.groups()
        if escaped:
            return "${"
        found = os.environ.get(name) or default
        if found is None:
            state = "is empty" if name in os.environ else "is not set"
            raise UserError(f"{path}:{line}: environment variable {name} {state} and has no default; set it")
        return found

    return _VARIABLE.sub(replace, text)


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """All values of a recipe, as a file holds them that is read back to the same."""
    return {key: _escaped(value) for key, value in recipe.model_dump(mode="json").items()}


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _section_keys(location: tuple[str | int, ...]) -> list[str]:
    """Keys that are allowed beside ``location``, which names the kind of a section that has several."""
    model: Any = Recipe
    several: list[Any] = []
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if several:
            model = next(m for m in several if part in get_args(m.model_fields["kind"].annotation))
            several = []
            continue
        models = _models(model.model_fields[part].annotation)
        if not models:
            return []
        model, several = models[0], models if len(models) > 1 else []
    return sorted(model.model_fields)


def _without_kinds(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """pydantic names the kind of a section that has several: judge.process.llm.model."""
    kinds = {
        kind
        for judge in get_args(get_args(ProcessJudge)[0])
        for kind in get_args(judge.model_fields["kind"].annotation)
    }
    before = (None, *location)  # a kind comes behind the section's name, or its place in a list
    return tuple(
        part for part, last in zip(location, before, strict=False)
        if not (part in kinds and (last == "process" or isinstance(last, int)))
    )  # fmt: skip


def _explain(error: ValidationError, places: dict[tuple[str | int, ...], str]) -> str:
    messages = []
    for item in error.errors():
        named = without_tags(item["loc"])
        location = _without_kinds(named)
        place = nearest_place(location, places)
        dotted = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            allowed = _section_keys(named)
            near = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
            messages.append(f"{place}: unknown key {dotted}; {hint}")
        elif item["type"] == "missing":
            messages.append(f"{place}: key {dotted} is missing; add it")
        else:
            got = item["input"]
            shown = "" if isinstance(got, dict | BaseModel) else f", got {_shortened(repr(got))}"
            message = item["msg"].removeprefix("Value error, ")
            messages.append(f"{place}: {dotted + ': ' if dotted else ''}{message}{shown}")
    return "\n".join(messages)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _override(tree: dict[str, Any], assignment: str, places: dict[tuple[str | int, ...], str]) -> None:
    """Set a key as ``--set`` says; the assignment is the place of it and of every section that it adds."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise UserError(f"--set {assignment}: expected section.key=value")
    path = tuple(key.split("."))
    *parents, last = path
    for end, part in enumerate(parents, 1):
        if tree.get(part) is None:  # left out, or null: an optional section that is not there
            tree[part] = {}
            places.pop(path[:end], None)
        if not isinstance(tree[part], dict):
            raise UserError(f"--set {assignment}: {part} is a value, not a section")
        tree = tree[part]
    try:
        tree[last] = read_yaml(text)[0]
    except BadYAML as error:
        raise UserError(f"--set {_shortened(assignment)}: {error}; quote the value") from None
    for place in [place for place in places if place[: len(path)] == path]:  # a whole section may be replaced
        del places[place]
    for end in range(1, len(path) + 1):
        places.setdefault(path[:end], f"--set {_shortened(assignment)}")


def model_evaluation(name: str, chat: bool, overrides: Sequence[str], recipe: Path | None = None) -> ModelEvaluation:
    """The settings of an evaluation without a run: a recipe's sections or defaults, and ``--set section.key=value``.

    Args:
        chat: of the defaults; a recipe says itself whether it uses the chat template.
        recipe: gives prompt, sample, judge and evaluate, but not which problems, nor how many.

    Raises:
        UserError: an unknown key, one that such an evaluation does not read, or a value that does not fit.
    """
    places: dict[tuple[str | int, ...], str] = {(): "--set"}
    tree: dict[str, Any] = {
        "prompt": {"template": "boxed", "chat": chat},
        "sample": {"max_tokens": 2048, "gap_problems": 0},
        "judge": {"split": "blank_line", "process": "none"},
        "evaluate": {},
    }
    if recipe is not None:
        given, places = _read_tree(recipe, None)
        tree |= {"prompt": {}} | {section: given[section] for section in tree if given.get(section) is not None}
        for section, keys in _NOT_MEASURED.items():
            if isinstance(tree[section], dict):
                tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    for assignment in overrides:
        _override(tree, assignment, places)
    settings = _validated(ModelEvaluation, {"name": name, **tree}, places, recipe.parent if recipe else Path())
    check_overrides("measure", overrides)
    return settings


def read_recipe(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file.
        overrides: each "section.key=value", as ``--set`` takes it.

    Raises:
        UserError: one line per fault, each with file:line and what to do.
    """
    path = Path(path)
    tree, places = _read_tree(path, overrides)
    recipe = _validated(Recipe, tree, places, path.parent)
    recipe._places = places
    return recipe


class _JudgeAlone(BaseModel):
    judge: Judging


def load_judging(path: Path, overrides: list[str] | None = None) -> Judging:
    """The section judge of a recipe, or of a file that holds nothing else.

    Raises:
        UserError: as ``read_recipe``, for that section.
    """
    tree, places = _read_tree(path, overrides)
    judging = _validated(_JudgeAlone, tree, places, path.parent).judge
    check_overrides("judge-eval", overrides or [])
    return judging


def _validated(model: type[M], tree: dict[str, Any], places: dict[tuple[str | int, ...], str], folder: Path) -> M:
    try:
        return model.model_validate(tree, context={"folder": folder})
    except ValidationError as error:
        raise UserError(_explain(error, places)) from None


def _read_tree(path: Path, overrides: list[str] | None) -> tuple[dict[str, Any], dict[tuple[str | int, ...], str]]:
    """The keys of a YAML file, overridden, and the place of each."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a recipe (a YAML file), found none; see recipes/") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        utf_16 = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = "UTF-16" if utf_16 else f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{line}: expected text in UTF-8, got {found}; save the file as UTF-8") from None
    try:
        tree, lines = read_yaml(text, lambda value, line: _expand(value, path, line))
    except BadYAML as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}:1: expected a mapping of recipe keys, got {type(tree).__name__}")
    places = {(): f"{path}:1", **{key: f"{path}:{line}" for key, line in lines.items()}}
    for assignment in overrides or []:
        _override(tree, assignment, places)
    return tree, places
