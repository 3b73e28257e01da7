"""The command ``stepkto``: its parser, made of the groups of commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_stepkto import __version__
from megatron_stepkto.cli import cluster, judges, models, runs, stages
from megatron_stepkto.cli.commands import Action, Commands
from megatron_stepkto.cli.guard import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0: done; 1: a stage failed; 2: input to correct; 130 and 143: interrupted, run again to resume."""

    def work() -> None:
        arguments = make_parser().parse_args(argv)
        command: Action = arguments.command
        command(arguments)

    guarded(work)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepkto", usage="stepkto COMMAND ...", description="Step-KTO on Megatron-Core (arXiv 2501.10799)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"megatron-stepkto {__version__}")
    commands = Commands(parser)
    runs.add_commands(commands)
    stages.add_commands(commands)
    models.add_commands(commands)
    judges.add_commands(commands)
    cluster.add_commands(commands)
    judges.add_record_commands(commands)
    parser.epilog = commands.page()
    return parser


if __name__ == "__main__":
    main()
