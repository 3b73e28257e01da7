"""What every section of a recipe shares: strict types, paths, and the mark that keeps a key out of stage keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, ValidationInfo


class Section(BaseModel):
    # strict: true is not a number, "3" is not one either, and a list is not a text
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def _resolve(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    return Path(os.path.abspath(folder / path))


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return Path(value)


def _listed(value: object) -> object:
    if value is None or isinstance(value, list):
        return value or []
    return [value]


TextPath = Annotated[Path, BeforeValidator(_path)]
RecipePath = Annotated[TextPath, AfterValidator(_resolve)]
RecipePaths = Annotated[list[RecipePath], BeforeValidator(_listed)]  # a single path is a list of one
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


def of_type(kind: type, then: str, otherwise: str) -> Discriminator:
    """Which of two members of a union a value is checked against: with one of them tried, one fault is one message.

    Their tags begin with "#", by which they are told from keys (``without_tags``).
    """
    return Discriminator(lambda value: then if isinstance(value, kind | BaseModel) else otherwise)


def without_tags(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(part for part in location if not str(part).startswith("#"))


class _Mark:
    """Metadata of a field, told apart by identity."""


_UNKEYED, _TRAINING_ONLY, _ADDED = _Mark(), _Mark(), _Mark()
T = TypeVar("T")

Unkeyed = Annotated[T, _UNKEYED]
"""A key that determines how the work is done, not what comes out: changing it leaves finished stages valid."""

Added = Annotated[T, _ADDED]
"""A key that counts only where it is not at its default, which is what finished runs did before there was the key."""

TrainingSamples = Annotated[T, _TRAINING_ONLY]
"""A key of the section sample that only training samples follow: an evaluation has its own, or none."""


def deciding(section: Section, *, evaluation: bool = False) -> dict[str, Any]:
    """The JSON values of a section that determine a stage's outputs: all but the keys marked ``Unkeyed``, and ``Added``
    ones at their default.

    Sections inside it are treated alike. A path stays a path: a caller that counts a file by its content replaces it.

    Args:
        evaluation: leave out the keys marked ``TrainingSamples`` as well.
    """
    marks = (_UNKEYED, _TRAINING_ONLY) if evaluation else (_UNKEYED,)
    return section.model_dump(mode="json", exclude=_marked(section, marks))


def unkeyed(section: type[Section]) -> frozenset[str]:
    """Names of the keys that are marked ``Unkeyed``, for a section that another process wrote as JSON."""
    return frozenset(name for name in section.model_fields if _has(section, name, (_UNKEYED,)))


def is_added_default(section: type[Section], name: str, value: object) -> bool:
    return _has(section, name, (_ADDED,)) and value == section.model_fields[name].default


def training_only(section: type[Section]) -> frozenset[str]:
    """Names of the keys that are marked ``TrainingSamples``: an evaluation does not read them."""
    return frozenset(name for name in section.model_fields if _has(section, name, (_TRAINING_ONLY,)))


def _marked(section: Section, marks: tuple[_Mark, ...]) -> dict[str, Any]:
    """``exclude`` of ``model_dump``: True for a marked key, the same of a section inside."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if _has(type(section), name, marks) or is_added_default(type(section), name, value):
            found[name] = True
        elif isinstance(value, Section) and (inner := _marked(value, marks)):
            found[name] = inner
    return found


def _has(section: type[Section], name: str, marks: tuple[_Mark, ...]) -> bool:
    return any(mark in marks for mark in section.model_fields[name].metadata)
