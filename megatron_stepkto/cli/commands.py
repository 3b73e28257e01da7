"""What the groups of commands share: a parser for each command, the page of ``stepkto --help``, recipes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.methods.registry import METHODS, check_suits, load_recipe
from megatron_stepkto.recipe.command_keys import TAKES, check_overrides
from megatron_stepkto.recipe.keys import Recipe

if TYPE_CHECKING:
    from megatron_stepkto.run.folder import Run

Action = Callable[[argparse.Namespace], None]


class Commands:
    """The commands of ``stepkto`` by group."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(
            prog=parser.prog, required=True, metavar="COMMAND", help=argparse.SUPPRESS
        )
        self._groups: dict[str, list[tuple[str, str]]] = {}

    def group(self, title: str) -> None:
        """Commands that are added from here on belong to it."""
        self._groups[title] = []

    def add(self, name: str, action: Action, text: str, example: str, notes: str = "") -> argparse.ArgumentParser:
        """A command's parser.

        Args:
            text: what it does, in one line; ``stepkto --help`` shows it beside the name.
            example: one command line.
            notes: for the end of its --help.
        """
        list(self._groups.values())[-1].append((name, text))
        parser = self._parsers.add_parser(
            name, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example:\n  {example}\n\n{notes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.set_defaults(command=action, name=name)
        return parser

    def page(self) -> str:
        """All commands by group, as the end of ``stepkto --help``."""
        lines = []
        for title, commands in self._groups.items():
            lines += [f"{title}:", *(f"  {name:<20}{text}" for name, text in commands)]
        return "\n".join([*lines, "", "stepkto COMMAND --help shows a command's options and an example."])


class Moved(argparse.Action):
    """An argument that another command takes now: refused with one line that names that command.

    Args:
        to: the new command line. when: for which values; the default is all.
    """

    def __init__(self, *args: Any, to: str, when: Callable[[Any], bool] = lambda _: True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._to, self._when = to, when

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if self._when(values):
            raise UserError(f"{parser.prog} {option or values}: moved to a command of its own: `stepkto {self._to}`")
        setattr(namespace, self.dest, values)


def hide_moved(parser: argparse.ArgumentParser, options: str, to: str) -> None:
    """Refuse these options, which --help does not list."""
    for option in options.split():
        parser.add_argument(option, nargs="?", action=Moved, to=to, help=argparse.SUPPRESS, dest="moved")


def add_recipe(parser: argparse.ArgumentParser, **action: Any) -> None:
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/mini_cpu.yaml", **action
    )
    add_set(parser, "override a recipe key; repeatable")


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_quarantine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="set bad input rows aside there and continue")


def add_run_options(parser: argparse.ArgumentParser, name: str, **action: Any) -> None:
    """A recipe, and the options of commands that work in its run's folder."""
    add_recipe(parser, **action)
    parser.add_argument("--force", action="store_true", help="redo stages whose settings or inputs changed")
    if name in TAKES["--from-scratch"]:
        parser.add_argument(
            "--from-scratch", action="store_true", help="make M0 by warm_up, though initial_model is given"
        )
    if name in TAKES["--quarantine"]:
        add_quarantine(parser)
    if name in TAKES["--allow-overlap"]:
        parser.add_argument(
            "--allow-overlap", action="store_true", help="train on problems of an evaluation set; the manifest says so"
        )
    parser.set_defaults(from_scratch=False, quarantine=None, allow_overlap=False, method=None)


def methods(text: str) -> list[str]:
    """The type of --compare. Raises ArgumentTypeError for an unknown method."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return found


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Raises UserError for a recipe, or a ``--set``, that cannot be used."""
    overrides = list(arguments.set)
    if getattr(arguments, "iterations", None):
        overrides.append(f"iterations={arguments.iterations}")
    recipe = load_recipe(arguments.recipe, overrides)
    check_overrides(arguments.name, arguments.set)  # last: no command reads a misspelt key
    return recipe


def run_of(arguments: argparse.Namespace, recipe: Recipe | None = None, *, from_scratch: bool = False) -> Run:
    """The run of the recipe, in the folder of the method that ``--method`` names."""
    from megatron_stepkto.run.folder import Run

    recipe = recipe or recipe_of(arguments)
    method = arguments.method if arguments.method != recipe.train.method else None
    if method is not None:
        check_suits(recipe, method, f"--method {method}")
    return Run(
        recipe, from_scratch or arguments.from_scratch, arguments.force, arguments.quarantine, method,
        arguments.allow_overlap,
    )  # fmt: skip
